"""Sealed caches through the Triton kernels: written, sealed and read, against the float32 reference."""

from types import SimpleNamespace

import pytest
import torch

from hf_kvopt.kernels import attention as readers
from hf_kvopt.kernels import store
from hf_kvopt.kernels.triton import attention as route
from hf_kvopt.quant import KVFormat, formats
from hf_kvopt.quant.formats import NATIVE
from hf_kvopt.quant.sealed_formats import SEALED, BlockCodec, SealedKV
from tests.cache.sealed import Text, expected, feed, feed_in, left_padding, make_cache, stored, text
from tests.kernels.triton.conftest import assert_close, same_dtype_torch

CODECS = {
    **SEALED,
    "plain": SealedKV(k=BlockCodec(bits=4, rotates=False), v=BlockCodec(bits=2, rotates=False)),
    "bytes": SealedKV(k=BlockCodec(bits=8), v=BlockCodec(bits=8, group=16)),
    "halves": SealedKV(k=BlockCodec(bits=2, centred=True), v=BlockCodec(bits=3, group=16)),
}


@pytest.fixture
def name(request, monkeypatch):
    """A format by one of the codecs, which are no formats of a user's for the most part."""
    chosen = getattr(request, "param", "int4")
    monkeypatch.setitem(formats.KV_FORMATS, chosen, KVFormat(NATIVE, NATIVE, sealed=CODECS[chosen]))
    return chosen


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """What the kernels were called for; nothing else may read or seal."""
    seen = SimpleNamespace(few=[], sealed=0)
    attend, seal = route.sealed_attention, store.seal_blocks

    def counted(*args, few):
        seen.few.append(few)
        return attend(*args, few=few)

    def counted_seal(*args):
        seen.sealed += 1
        return seal(*args)

    monkeypatch.setattr(route, "sealed_attention", counted)
    monkeypatch.setattr(store, "seal_blocks", counted_seal)
    monkeypatch.setattr(readers, "READERS", [r for r in readers.READERS if r.name == "triton"])
    return seen


def close(out, exact):
    torch.testing.assert_close(out, exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "dims"),
    [*((codec, (32, 32)) for codec in CODECS), ("int4", (64, 64)), ("int3", (40, 80)), ("k4v2", (96, 64))],
    ids=str,
    indirect=["name"],
)
def test_a_chunk_and_steps_over_both_forms_are_the_reference(name, dims, calls):
    whole = text(1, 5 * 16 + 2, dims=dims)
    cache = make_cache(name)
    out = feed(cache, whole.columns(0, 5 * 16))
    close(torch.cat((out, feed_in(cache, whole, 1, start=5 * 16)), 1), expected(name, whole))
    assert calls.few == [False, True, True]
    assert calls.sealed == 1


@pytest.mark.parametrize("chunk", [17, 40])
def test_no_output_and_no_byte_depends_on_how_a_text_came_in(name, chunk):
    whole = text(1, 5 * 16 + 5)
    one, many = make_cache(name), make_cache(name)
    close(feed_in(many, whole, chunk), feed(one, whole))
    assert all(torch.equal(a, b) for a, b in zip(stored(one, 0), stored(many, 0), strict=True))


@pytest.mark.parametrize(("q_len", "few"), [(5, True), (30, True), (70, False)])
def test_each_query_of_a_step_reads_by_its_own_position(name, q_len, few, calls):
    # The step crosses a border of blocks in its middle, a long one four of them.
    stop = 6 * 16 + q_len // 2
    whole = text(1, stop)
    cache = make_cache(name)
    feed(cache, whole.columns(0, stop - q_len))
    close(feed(cache, whole.columns(stop - q_len, stop)), expected(name, whole, stop - q_len))
    assert calls.few[-1] is few


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 32, 33, 48, 49])
def test_any_length_is_read_whole(name, num_tokens):
    whole = text(1, num_tokens)
    cache = make_cache(name)
    if num_tokens > 1:
        feed(cache, whole.columns(0, num_tokens - 1))
    close(feed(cache, whole.columns(num_tokens - 1, num_tokens)), expected(name, whole, num_tokens - 1))


def test_blocks_of_64_in_tiles_of_16(name):
    whole = text(1, 4 * 64 + 3)
    cache = make_cache(name, 64)
    feed(cache, whole.columns(0, 4 * 64))
    close(feed(cache, whole.columns(4 * 64, 4 * 64 + 3)), expected(name, whole, 4 * 64, 64))


@pytest.mark.parametrize("window", [1, 20, 50])
@pytest.mark.parametrize("q_len", [1, 40])
def test_a_window_hides_what_lies_behind_it(name, window, q_len):
    whole = text(1, 6 * 16 + q_len)
    cache = make_cache(name)
    feed(cache, whole.columns(0, 6 * 16))
    mask = left_padding([0], q_len, 6 * 16 + q_len, window)
    close(feed(cache, whole.columns(6 * 16, 6 * 16 + q_len), mask), expected(name, whole, 6 * 16, window=window))


@pytest.mark.parametrize("q_len", [3, 40])
def test_softcap_sinks_and_masks_hold_over_both_forms(name, q_len):
    whole = text(2, 5 * 16 + q_len)
    cache = make_cache(name)
    feed(cache, whole.columns(0, 5 * 16))
    sinks, mask = torch.randn(4), torch.rand(2, 1, q_len, 5 * 16 + q_len) > 0.4
    mask[..., 0] = True
    mask &= torch.ones(q_len, 5 * 16 + q_len, dtype=torch.bool).tril(5 * 16)
    out = feed(cache, whole.columns(5 * 16, 5 * 16 + q_len), mask, softcap=2.0, s_aux=sinks)
    close(out, expected(name, whole, 5 * 16, is_causal=False, softcap=2.0, sinks=sinks, mask=mask))


def test_rows_of_unlike_lengths_stand_at_places_of_their_own(name):
    pads, num_tokens = (0, 7, 33), 6 * 16 + 1
    whole = text(3, num_tokens)
    cache = make_cache(name)
    first = feed(cache, whole.columns(0, num_tokens - 1), left_padding(pads, num_tokens - 1, num_tokens - 1))
    last = feed(cache, whole.columns(num_tokens - 1, num_tokens), left_padding(pads, 1, num_tokens))
    close(torch.cat((first, last), 1), expected(name, whole, lags=torch.tensor(pads)))


def test_nodes_of_a_tree_read_by_their_depths(name):
    # A node in the slot behind a border, whose position lies before it.
    start, parents = 4 * 16 - 3, [-1, 0, 0, 1, 1, 3, 5, 6]
    whole, nodes = text(1, start), text(1, len(parents), seed=4)
    seen = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] |= seen[parent]
    cache = make_cache(name)
    feed(cache, whole)
    mask = torch.cat((torch.ones(len(parents), start, dtype=torch.bool), seen), 1)[None, None]
    out = feed(cache, nodes, mask)
    for node in range(len(parents)):
        path = seen[node].nonzero().view(-1)
        own = Text(*(torch.cat((a, b[:, :, path]), 2) for a, b in zip(whole, nodes, strict=True)))
        close(out[:, node], expected(name, own, start + len(path) - 1)[:, 0])


@pytest.mark.parametrize("name", SEALED, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays_within_the_derived_tolerance(name, dtype):
    whole = text(1, 5 * 16 + 1, dtype=dtype)
    cache = make_cache(name)
    got = [feed(cache, whole.columns(0, 5 * 16)), feed(cache, whole.columns(5 * 16, 5 * 16 + 1))]
    seen = torch.ones(1, 1, 5 * 16 + 1, 5 * 16 + 1, dtype=torch.bool).tril()
    exact = [Text(*(x.float() for x in whole)), whole]
    plain, honest = (same_dtype_torch(*x, seen, 32**-0.5) for x in exact)
    # What rounding does to attention over these states, beside the reference in float32 over what is stored of them.
    reference = expected(name, Text(*(x.float() for x in whole)))
    assert_close(torch.cat(got, 1), reference, reference + (honest - plain))


def test_a_token_that_is_no_number_shows_in_its_row_alone(name):
    whole = text(2, 5 * 16 + 1)
    whole.k[1, :, 20] = torch.nan
    whole.v[1, :, 20] = torch.nan
    cache = make_cache(name)
    feed(cache, whole.columns(0, 5 * 16))
    out = feed(cache, whole.columns(5 * 16, 5 * 16 + 1))
    assert out[0].isfinite().all()
    assert out[1].isnan().all()
