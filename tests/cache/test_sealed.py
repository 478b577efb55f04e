"""Caches whose full blocks are sealed: each query reads what its position says, however its text came in."""

import copy
import pickle

import pytest
import torch

from tests.cache.sealed import (
    BLOCK,
    DIM,
    FORMATS,
    Text,
    expected,
    feed,
    feed_in,
    left_padding,
    make_cache,
    stored,
    text,
)

by_format = pytest.mark.parametrize("name", FORMATS)
CLOSE = {"rtol": 0, "atol": 2e-5}


@by_format
@pytest.mark.parametrize("num_tokens", [1, BLOCK, 2 * BLOCK, 2 * BLOCK + 1, 3 * BLOCK, 5 * BLOCK + 7])
def test_a_prompt_reads_what_its_positions_say(name, num_tokens):
    whole = text(2, num_tokens)
    torch.testing.assert_close(feed(make_cache(name), whole), expected(name, whole), **CLOSE)


@by_format
@pytest.mark.parametrize("chunk", [1, 7, 16, 40, 64])
def test_no_output_and_no_byte_depends_on_how_a_text_came_in(name, chunk):
    whole = text(2, 6 * BLOCK + 5)
    one, many = make_cache(name), make_cache(name)
    torch.testing.assert_close(feed_in(many, whole, chunk), feed(one, whole), **CLOSE)
    for row in range(2):
        assert all(torch.equal(a, b) for a, b in zip(stored(one, row), stored(many, row), strict=True))


def test_what_is_read_differs_from_the_states_that_came():
    # Without it the comparisons above would hold of a cache that seals nothing.
    whole = text(1, 6 * BLOCK)
    exact = torch.nn.functional.scaled_dot_product_attention(*whole, is_causal=True, enable_gqa=True).transpose(1, 2)
    error = (feed(make_cache("int3"), whole) - exact).abs().amax(dim=(0, 2, 3))
    assert error[: 3 * BLOCK].max() < 1e-5  # blocks 0, 1 and 2 read one another exact
    assert error[3 * BLOCK :].min() > 1e-4


@by_format
def test_a_row_is_stored_and_read_alike_whatever_lies_beside_it(name):
    whole = text(3, 5 * BLOCK + 3)
    together = make_cache(name)
    out = feed_in(together, whole, 24)
    for row in range(3):
        alone = make_cache(name)
        torch.testing.assert_close(feed_in(alone, whole.rows([row]), 24)[0], out[row], **CLOSE)
        assert all(torch.equal(a, b) for a, b in zip(stored(alone, 0), stored(together, row), strict=True))


@by_format
@pytest.mark.parametrize("chunk", [200, 24, 9])
def test_left_padding_moves_no_block(name, chunk):
    pads, num_tokens = (0, 5, 40), 5 * BLOCK + 3
    whole = text(3, num_tokens)
    padded = make_cache(name)
    outs = []
    for start in range(0, num_tokens, chunk):
        stop = min(num_tokens, start + chunk)
        outs.append(feed(padded, whole.columns(start, stop), left_padding(pads, stop - start, stop)))
    out = torch.cat(outs, dim=1)
    assert padded.layers[0].table.lengths == [num_tokens - n for n in pads]
    padded.check_integrity()
    for row, pad in enumerate(pads):
        own = whole.rows([row]).columns(pad, num_tokens)
        alone = make_cache(name)
        torch.testing.assert_close(out[row, pad:], feed(alone, own)[0], **CLOSE)
        assert all(torch.equal(a, b) for a, b in zip(stored(alone, 0), stored(padded, row), strict=True))


@by_format
def test_a_draft_that_is_cut_back_over_a_border_leaves_no_trace(name):
    whole, draft = text(1, 6 * BLOCK), text(1, 20, seed=7)
    plain, drafted = make_cache(name), make_cache(name)
    start = 4 * BLOCK - 3
    for cache in (plain, drafted):
        feed(cache, whole.columns(0, start))
    # The accepted tokens are the first of the draft; what comes behind them is not the text.
    joined = Text(*(torch.cat((a[:, :, start : start + 5], b), 2) for a, b in zip(whole, draft, strict=True)))
    feed(drafted, joined)
    drafted.crop(-20)
    feed(plain, whole.columns(start, start + 5))
    rest = whole.columns(start + 5, 6 * BLOCK)
    assert torch.equal(feed_in(drafted, rest, 1), feed_in(plain, rest, 1))
    assert all(torch.equal(a, b) for a, b in zip(stored(plain, 0), stored(drafted, 0), strict=True))
    drafted.check_integrity()


@by_format
def test_an_accepted_path_of_a_tree_is_sealed_as_the_text(name):
    whole, start = text(2, 6 * BLOCK), 3 * BLOCK - 4
    cache, plain = make_cache(name), make_cache(name)
    order = [0, 3, 5, 6, 8, 9, 10]  # nodes that hold the text's next tokens
    nodes = Text(*(x.clone() for x in text(2, 12, seed=3)))
    for new, old in zip(nodes, whole, strict=True):
        new[:, :, order] = old[:, :, start : start + len(order)]
    for one in (cache, plain):
        feed(one, whole.columns(0, start))
    feed(cache, nodes)
    cache.keep_paths(12, [order, order])
    feed(plain, whole.columns(start, start + len(order)))
    rest = whole.columns(start + len(order), 6 * BLOCK)
    assert torch.equal(feed_in(cache, rest, 1), feed_in(plain, rest, 1))
    for row in range(2):
        assert all(torch.equal(a, b) for a, b in zip(stored(plain, row), stored(cache, row), strict=True))


@by_format
def test_rows_cut_to_unlike_lengths_read_by_their_own_positions(name):
    whole = text(2, 6 * BLOCK)
    cache = make_cache(name)
    feed(cache, whole.columns(0, 3 * BLOCK))
    feed(cache, whole.columns(3 * BLOCK, 3 * BLOCK + 18))
    lengths = [3 * BLOCK + 18, 3 * BLOCK + 1]
    cache.crop_rows(lengths)
    new = text(2, 2 * BLOCK, seed=5)
    out = feed_in(cache, new, 3)
    for row, length in enumerate(lengths):
        own = Text(
            *(torch.cat((a[row : row + 1, :, :length], b[row : row + 1]), 2) for a, b in zip(whole, new, strict=True))
        )
        torch.testing.assert_close(out[row], expected(name, own, length)[0], **CLOSE)


@by_format
def test_a_deep_cut_goes_on_from_what_was_stored(name):
    whole = text(1, 10 * BLOCK)
    cache = make_cache(name)
    feed_in(cache, whole, 1)
    cache.crop(-(5 * BLOCK + 3))
    held = 5 * BLOCK - 3
    assert cache.get_seq_length() == held
    # Blocks 3 and 4, that the next token reads exact, are what their sealed form stands for.
    known = make_cache(name)
    feed_in(known, whole.columns(0, held), 1)
    read = cache.layers[0].keys.dense()
    exact = known.layers[0].keys.dense()
    assert torch.equal(read[:, :, : 3 * BLOCK], exact[:, :, : 3 * BLOCK])
    step = (read - exact)[:, :, 3 * BLOCK :].abs().amax()
    assert 0 < step < 1.5 * (exact[:, :, BLOCK : 3 * BLOCK] - whole.k[:, :, BLOCK : 3 * BLOCK]).abs().amax()
    feed_in(cache, whole.columns(held, 10 * BLOCK), 1)
    cache.check_integrity()


@by_format
def test_forks_share_blocks_and_part_in_both_forms(name):
    whole, other = text(1, 6 * BLOCK), text(1, 6 * BLOCK, seed=9)
    cache = make_cache(name)
    start = 3 * BLOCK + 5
    feed(cache, whole.columns(0, start))
    before = cache.stats().used_blocks
    twin = copy.deepcopy(cache)
    assert cache.stats().used_blocks == before
    mixed = Text(*(torch.cat((a[:, :, :start], b[:, :, start:]), 2) for a, b in zip(whole, other, strict=True)))
    # Turn by turn, so that neither may live on what the other leaves.
    outs = [[], []]
    for i in range(start, 6 * BLOCK):
        for out, one, given in zip(outs, (cache, twin), (whole, mixed), strict=True):
            out.append(feed(one, given.columns(i, i + 1)))
    torch.testing.assert_close(torch.cat(outs[0], 1), expected(name, whole, start), **CLOSE)
    torch.testing.assert_close(torch.cat(outs[1], 1), expected(name, mixed, start), **CLOSE)
    cache.check_integrity()
    del twin
    cache.check_integrity()


@by_format
def test_beams_take_their_exact_blocks_along(name):
    whole = text(3, 5 * BLOCK)
    cache = make_cache(name)
    outs, order = [], [0, 1, 2]
    feed(cache, whole.columns(0, 2 * BLOCK - 2))
    past = whole.columns(0, 2 * BLOCK - 2)
    made = torch.Generator().manual_seed(0)
    for i in range(2 * BLOCK - 2, 5 * BLOCK):
        now = whole.columns(i, i + 1)
        past = Text(*(torch.cat(pair, 2) for pair in zip(past, now, strict=True)))
        outs = feed(cache, now)
        torch.testing.assert_close(outs, expected(name, past, i), **CLOSE)
        order = torch.randint(0, 3, (3,), generator=made)
        cache.reorder_cache(order)
        past = past.rows(order.tolist())
    cache.check_integrity()


@by_format
def test_batches_are_repeated_and_selected(name):
    whole = text(2, 4 * BLOCK)
    cache = make_cache(name)
    feed(cache, whole.columns(0, 3 * BLOCK + 2))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    rows = whole.rows([1, 0])
    out = feed_in(cache, rows, 1, start=3 * BLOCK + 2)
    torch.testing.assert_close(out, expected(name, rows, 3 * BLOCK + 2), **CLOSE)


@by_format
def test_a_cache_begins_anew_after_reset_and_free(name):
    whole = text(2, 4 * BLOCK + 1)
    cache = make_cache(name)
    for forget in (cache.reset, cache.free, cache.reset):
        torch.testing.assert_close(feed_in(cache, whole, 20), expected(name, whole), **CLOSE)
        forget()
    assert cache.stats().used_blocks == 0


@by_format
def test_a_pickled_cache_goes_on(name):
    whole = text(1, 5 * BLOCK)
    cache = make_cache(name)
    feed(cache, whole.columns(0, 4 * BLOCK - 3))
    twin = pickle.loads(pickle.dumps(cache))
    out = feed_in(twin, whole, 1, start=4 * BLOCK - 3)
    torch.testing.assert_close(out, expected(name, whole, 4 * BLOCK - 3), **CLOSE)
    twin.check_integrity()


@by_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_within_its_own_rounding(name, dtype):
    whole = text(2, 5 * BLOCK, dtype=dtype)
    out = feed_in(make_cache(name), whole, 13)
    exact = expected(name, Text(*(x.float() for x in whole)))
    assert (out.float() - exact).abs().max() < 16 * torch.finfo(dtype).eps


@by_format
def test_softcap_sinks_and_masks_hold_over_both_forms(name):
    whole = text(2, 5 * BLOCK)
    cache = make_cache(name)
    sinks = torch.randn(4)
    feed(cache, whole.columns(0, 4 * BLOCK))
    rest = whole.columns(4 * BLOCK, 5 * BLOCK)
    mask = torch.rand(2, 1, BLOCK, 5 * BLOCK) > 0.3
    mask[..., 0] = True
    mask &= torch.ones(BLOCK, 5 * BLOCK, dtype=torch.bool).tril(4 * BLOCK)
    out = feed(cache, rest, mask, softcap=2.0, s_aux=sinks)
    exact = expected(name, whole, 4 * BLOCK, is_causal=False, softcap=2.0, sinks=sinks, mask=mask)
    torch.testing.assert_close(out, exact, **CLOSE)


@by_format
def test_nan_shows_where_it_is_read_and_nowhere_else(name):
    whole = text(2, 5 * BLOCK)
    whole.k[1, 0, BLOCK + 3, 2] = float("nan")
    # One by one: beside a NaN that is masked, torch's own attention gives NaN to all queries of a forward.
    out = feed_in(make_cache(name), whole, 1)
    assert out[0].isfinite().all()
    assert out[1, : BLOCK + 3].isfinite().all()
    assert out[1, BLOCK + 3 :, :2].isnan().all()  # the two query heads of its KV head
    assert out[1, :, 2:].isfinite().all()


def test_two_or_three_blocks_of_a_row_are_exact_beside_its_first():
    cache = make_cache("int3")
    feed(cache, text(1, 40 * BLOCK))
    tails = cache.layers[0].table.allocator.tails
    assert tails.capacity <= 4
    feed_in(cache, text(1, 3 * BLOCK, seed=1), 1)
    assert len(tails.places) == 3
    assert tails.capacity <= 4


def test_dense_keys_are_those_that_the_last_token_reads():
    whole = text(1, 5 * BLOCK + 2)
    cache = make_cache("int3")
    feed_in(cache, whole, 30)
    keys = cache.layers[0].keys + 0.0
    error = (keys - whole.k).abs().amax(dim=(0, 1, 3)).view(-1)
    exact = error == 0
    assert exact[:BLOCK].all()
    assert exact[4 * BLOCK :].all()
    assert not exact[BLOCK : 4 * BLOCK].any()
    assert keys.shape[3] == DIM
