"""The compiled kernel over sealed and exact blocks: against the reference, and by the torch path's side."""

import pytest
import torch

from hf_kvopt.kernels.cpu import program, sealed
from hf_kvopt.kernels.cpu import sealed_tiles as route
from hf_kvopt.kernels.cpu.program import can_compile
from hf_kvopt.quant import NATIVE, KVFormat, formats
from hf_kvopt.quant.sealed_formats import SEALED, BlockCodec, SealedKV
from tests.cache.sealed import Text, expected, feed, feed_in, left_padding, make_cache, text

pytestmark = pytest.mark.skipif(not can_compile(), reason="needs llvmlite and AVX2")
CODECS = {
    **SEALED,
    "plain": SealedKV(k=BlockCodec(bits=4, rotates=False), v=BlockCodec(bits=2, rotates=False)),
    "uncentred": SealedKV(k=BlockCodec(bits=8), v=BlockCodec(bits=8, group=16)),
}


@pytest.fixture
def name(request, monkeypatch):
    """A format by one of the codecs, which are no formats of a user's for the most part."""
    chosen = getattr(request, "param", "k4v2")
    monkeypatch.setitem(formats.KV_FORMATS, chosen, KVFormat(NATIVE, NATIVE, sealed=CODECS[chosen]))
    return chosen


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls that the kernel takes."""
    seen = []
    original = route.attend_sealed_blocks

    def counted(*args):
        seen.append(args[0].shape)
        return original(*args)

    monkeypatch.setattr(route, "attend_sealed_blocks", counted)
    return seen


def close(out, exact):
    torch.testing.assert_close(out, exact, rtol=0, atol=3e-5)


@pytest.mark.parametrize(
    ("name", "dims"),
    [*((codec, (64, 64)) for codec in CODECS), ("int3", (80, 80)), ("k4v2", (96, 64)), ("int4", (72, 128))],
    ids=str,
    indirect=["name"],
)
def test_a_step_over_both_forms_is_the_reference(name, dims, calls):
    whole = text(2, 5 * 16 + 9, dims=dims)
    cache = make_cache(name)
    feed(cache, whole.columns(0, 5 * 16))
    calls.clear()
    close(feed_in(cache, whole, 1, start=5 * 16), expected(name, whole, 5 * 16))
    assert len(calls) == 9


@pytest.mark.parametrize("name", ["k4v2", "uncentred"], indirect=True)
@pytest.mark.parametrize(("block_size", "q_len"), [(16, 2), (64, 1), (64, 5), (64, 30), (128, 2)])
def test_each_query_of_a_step_reads_by_its_own_position(name, block_size, q_len, calls):
    # The step crosses a border of blocks in its middle.
    stop = 4 * block_size + q_len // 2
    whole = text(1, stop, dims=(64, 64))
    cache = make_cache(name, block_size)
    feed(cache, whole.columns(0, stop - q_len))
    close(feed(cache, whole.columns(stop - q_len, stop)), expected(name, whole, stop - q_len, block_size))
    assert calls[-1][2] == q_len


@pytest.mark.parametrize("num_tokens", [1, 64, 65, 128, 129, 192, 193, 1025, 2112])
def test_any_length_is_read_whole(num_tokens):
    whole = text(1, num_tokens, dims=(64, 64))
    cache = make_cache("int3", 64)
    if num_tokens > 1:
        feed(cache, whole.columns(0, num_tokens - 1))
    close(feed(cache, whole.columns(num_tokens - 1, num_tokens)), expected("int3", whole, num_tokens - 1, 64))


@pytest.mark.parametrize("window", [1, 20, 50, 200])
def test_a_window_hides_what_lies_behind_it(name, window):
    whole = text(1, 7 * 16)
    cache = make_cache(name)
    feed(cache, whole.columns(0, 6 * 16))
    out = feed_in_window(cache, whole, 6 * 16, window)
    close(out, expected(name, whole, 6 * 16, window=window))


def feed_in_window(cache, whole: Text, start: int, window: int):
    outs = []
    for i in range(start, whole.q.shape[2]):
        outs.append(feed(cache, whole.columns(i, i + 1), left_padding([0], 1, i + 1, window)))
    return torch.cat(outs, 1)


def test_softcap_sinks_and_masks_hold_over_both_forms(name, calls):
    whole = text(2, 5 * 16 + 3)
    cache = make_cache(name)
    feed(cache, whole.columns(0, 5 * 16))
    calls.clear()
    sinks, mask = torch.randn(4), torch.rand(2, 1, 3, 5 * 16 + 3) > 0.4
    mask[..., 0] = True
    mask &= torch.ones(3, 5 * 16 + 3, dtype=torch.bool).tril(5 * 16)
    out = feed(cache, whole.columns(5 * 16, 5 * 16 + 3), mask, softcap=2.0, s_aux=sinks)
    close(out, expected(name, whole, 5 * 16, is_causal=False, softcap=2.0, sinks=sinks, mask=mask))
    assert calls


def test_rows_of_unlike_lengths_stand_at_places_of_their_own(name, calls):
    pads, num_tokens = (0, 7, 33), 6 * 16 + 1
    whole = text(3, num_tokens)
    cache = make_cache(name)
    feed(cache, whole.columns(0, num_tokens - 1), left_padding(pads, num_tokens - 1, num_tokens - 1))
    out = feed(cache, whole.columns(num_tokens - 1, num_tokens), left_padding(pads, 1, num_tokens))
    close(out, expected(name, whole, num_tokens - 1, lags=torch.tensor(pads)))
    assert calls


def test_eight_lanes_give_what_sixteen_give(name, monkeypatch):
    whole = text(1, 6 * 16, dims=(64, 64))
    outs = []
    for lanes in (8, program.lanes()):
        monkeypatch.setattr(sealed, "lanes", lambda lanes=lanes: lanes)
        cache = make_cache(name)
        feed(cache, whole.columns(0, 6 * 16 - 1))
        outs.append(feed(cache, whole.columns(6 * 16 - 1, 6 * 16)))
    close(*outs)


def test_no_row_depends_on_another_or_on_the_threads(name):
    whole = text(3, 5 * 16 + 1)
    outs = []
    for rows in ([0, 1, 2], [2, 0], [1]):
        cache = make_cache(name)
        feed_in(cache, whole.rows(rows).columns(0, 5 * 16), 20)
        out = feed(cache, whole.rows(rows).columns(5 * 16, 5 * 16 + 1))
        outs.append({row: out[i] for i, row in enumerate(rows)})
    for some in outs[1:]:
        for row, out in some.items():
            assert torch.equal(out, outs[0][row])


def test_a_token_that_is_no_number_is_no_matter_to_queries_that_do_not_see_it(name):
    whole = text(1, 6 * 16)
    cache = make_cache(name)
    whole.k[0, :, 20] = float("nan")
    whole.v[0, :, 20] = float("nan")
    feed(cache, whole.columns(0, 6 * 16 - 1))
    mask = torch.ones(1, 1, 1, 6 * 16, dtype=torch.bool)
    mask[..., 20] = False
    assert feed(cache, whole.columns(6 * 16 - 1, 6 * 16), mask).isfinite().all()


@pytest.mark.parametrize("takes_kernel", [True, False])
def test_nodes_of_a_tree_read_by_their_depths(name, takes_kernel, monkeypatch, calls):
    # A node in the slot behind a border, whose position lies before it.
    start, parents = 4 * 16 - 3, [-1, 0, 0, 1, 1, 3, 5, 6]
    whole, nodes = text(1, start), text(1, len(parents), seed=4)
    seen = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] |= seen[parent]
    if not takes_kernel:
        monkeypatch.setattr(route, "can_attend_sealed", lambda *_: False)
    cache = make_cache(name)
    feed(cache, whole)
    mask = torch.cat((torch.ones(len(parents), start, dtype=torch.bool), seen), 1)[None, None]
    calls.clear()
    out = feed(cache, nodes, mask)
    assert bool(calls) == takes_kernel
    for node in range(len(parents)):
        path = seen[node].nonzero().view(-1)
        own = Text(*(torch.cat((a, b[:, :, path]), 2) for a, b in zip(whole, nodes, strict=True)))
        close(out[:, node], expected(name, own, start + len(path) - 1)[:, 0])
