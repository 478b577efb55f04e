"""Eviction from rows whose blocks are sealed: what is left is read as a text of its own blocks, numbered on."""

import copy

import pytest
import torch

from hf_kvopt import CacheStateError, Knorm, SinkRecent, SinkRecentPeriodic, SnapKV
from tests.cache.sealed import BLOCK, FORMATS, Text, expected, feed, left_padding, make_cache, stored, text

POLICIES = {
    "sinks and recent": SinkRecent(4, 32),
    "a block": SinkRecent(4, 16),
    "no sinks": SinkRecent(0, 48),
    "periodic": SinkRecentPeriodic(4, 32, 64),
}
by_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def kept_of(policy, length: int) -> list[int]:
    """Tokens that a forward behind `length` tokens finds: what the policy drops goes by blocks, but for three."""
    whole = length // BLOCK
    gone = {
        block
        for dropped in policy.after_step(whole * BLOCK)
        for block in range(-(-dropped.start // BLOCK), dropped.stop // BLOCK)
        if 0 < block < whole - 1
    }
    return [t for t in range(length) if t // BLOCK not in gone]


def mask_of(cache, pads, q_len: int):
    """The mask of rows with so many pads on the left, over what the cache hands out with `q_len` more columns."""
    kv_len, start = cache.get_mask_sizes(q_len, 0) if cache.layers else (q_len, 0)
    return left_padding([max(0, pad - start) for pad in pads], q_len, kv_len)


def columns(whole: Text, tokens: list[int]) -> Text:
    """Some columns of a text."""
    return Text(*(x[:, :, tokens] for x in whole))


@pytest.mark.parametrize("name", FORMATS)
@by_policy
def test_each_token_reads_what_is_left_as_a_text_of_its_own(name, policy):
    whole = text(1, 11 * BLOCK + 3)
    cache = make_cache(name, policy=policy)
    feed(cache, whole.columns(0, 3 * BLOCK + 5))
    for i in range(3 * BLOCK + 5, whole.q.shape[2]):
        out = feed(cache, whole.columns(i, i + 1))
        left = [*kept_of(policy, i), i]
        want = expected(name, columns(whole, left), len(left) - 1)
        torch.testing.assert_close(out, want, rtol=0, atol=3e-5)
    assert cache.stats().evicted > 0
    cache.check_integrity()


@pytest.mark.parametrize("chunk", [2, BLOCK, 3 * BLOCK + 1, 5 * BLOCK])
def test_a_later_step_of_many_tokens_finds_the_same(chunk):
    policy, whole, start = SinkRecent(4, 32), text(1, 17 * BLOCK), 9 * BLOCK + 7
    cache = make_cache("int4", policy=policy)
    feed(cache, whole.columns(0, start))
    for i in range(start, whole.q.shape[2] - chunk, chunk):
        out = feed(cache, whole.columns(i, i + chunk))
        left = [*kept_of(policy, i), *range(i, i + chunk)]
        want = expected("int4", columns(whole, left), len(left) - chunk)
        torch.testing.assert_close(out, want, rtol=0, atol=3e-5)


@by_policy
def test_rows_of_unlike_lengths_drop_and_read_as_each_alone(policy):
    pads, num_tokens = (0, 7, 2 * BLOCK + 9), 9 * BLOCK
    whole = text(3, num_tokens)
    cache = make_cache("k4v2", policy=policy)
    alone = [make_cache("k4v2", policy=policy) for _ in pads]
    for start, stop in [(0, 4 * BLOCK), *((i, i + 1) for i in range(4 * BLOCK, num_tokens))]:
        out = feed(cache, whole.columns(start, stop), mask_of(cache, pads, stop - start))
        for row, (own, pad) in enumerate(zip(alone, pads, strict=True)):
            first = max(start, pad)
            want = feed(own, whole.rows([row]).columns(first, stop))
            torch.testing.assert_close(out[row : row + 1, first - start :], want, rtol=0, atol=3e-5)
    for row, own in enumerate(alone):
        assert all(torch.equal(a, b) for a, b in zip(stored(cache, row), stored(own, 0), strict=True))


def test_a_fork_and_its_original_drop_apart():
    policy, whole = SinkRecent(4, 32), text(1, 9 * BLOCK)
    cache, want = (make_cache("int4", policy=policy) for _ in range(2))
    feed(cache, whole.columns(0, 5 * BLOCK + 3))
    feed(want, whole.columns(0, 5 * BLOCK + 3))
    fork = copy.deepcopy(cache)
    for i in range(5 * BLOCK + 3, 9 * BLOCK):
        part = whole.columns(i, i + 1)
        assert torch.equal(feed(fork, part), feed(want, part))
    again = make_cache("int4", policy=policy)
    feed(again, whole.columns(0, 5 * BLOCK + 3))
    for i in range(5 * BLOCK + 3, 8 * BLOCK):
        part = whole.columns(i, i + 1)
        assert torch.equal(feed(cache, part), feed(again, part))
    cache.check_integrity()


def test_a_crop_to_where_a_dropped_block_would_be_read_exact_is_refused():
    policy, whole = SinkRecent(4, 32), text(1, 12 * BLOCK)
    cache = make_cache("int4", policy=policy)
    feed(cache, whole.columns(0, 5 * BLOCK))
    for i in range(5 * BLOCK, 11 * BLOCK + 2):
        feed(cache, whole.columns(i, i + 1))
    cache.crop(-1)
    feed(cache, whole.columns(11 * BLOCK + 1, 11 * BLOCK + 2))
    with pytest.raises(CacheStateError, match="dropped its tokens"):
        cache.crop(-3 * BLOCK)
    cache.check_integrity()


@pytest.mark.parametrize("policy", [SnapKV(0.4, window=8), Knorm(0.3)], ids=str)
@pytest.mark.parametrize("pads", [(0,), (0, 11, 60)], ids=str)
def test_what_heads_chose_is_sealed_from_the_states_as_they_came(policy, pads):
    num_tokens = 10 * BLOCK + 5
    whole = text(len(pads), num_tokens + BLOCK)
    cache = make_cache("int4", policy=policy)
    feed(cache, whole.columns(0, num_tokens), mask_of(cache, pads, num_tokens))
    chosen = [rows.clone() for rows in next(iter(cache.layers[0].table.choices.values()))]
    for i in range(num_tokens, num_tokens + BLOCK):
        out = feed(cache, whole.columns(i, i + 1), mask_of(cache, pads, 1))
        for row, (pad, heads) in enumerate(zip(pads, chosen, strict=True)):
            new = torch.arange(num_tokens, i + 1).expand(len(heads), -1)
            places = torch.cat((heads + pad, new), 1)[None, :, :, None].expand(-1, -1, -1, whole.k.shape[3])
            k, v = (x[row : row + 1].gather(2, places) for x in (whole.k, whole.v))
            q = torch.zeros(1, whole.q.shape[1], k.shape[2], k.shape[3])
            q[:, :, -1] = whole.q[row : row + 1, :, i]
            want = expected("int4", Text(q, k, v), k.shape[2] - 1)
            torch.testing.assert_close(out[row : row + 1], want, rtol=0, atol=3e-5)
    assert cache.stats().evicted > 0
    cache.check_integrity()
