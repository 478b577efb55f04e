"""Compiled quantizing and storing on a CPU against quant.reference, byte by byte, in pools full of NaN elsewhere."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_kvopt import QuantizedPagedCache
from hf_kvopt.kernels.cpu import store as cpu_store
from hf_kvopt.kernels.cpu.address import address_of
from hf_kvopt.kernels.cpu.program import can_compile
from hf_kvopt.kernels.cpu.store import can_store, store_states
from hf_kvopt.quant import SCALE_DTYPE, Format, Quantized, dequantize, get_format, hadamard, quantize
from tests.helpers import assert_in_a_forked_child

pytestmark = pytest.mark.skipif(not can_compile(), reason="needs llvmlite and AVX2")

FORMATS = ["int8", "fp8_e4m3", "fp8_e5m2", "int4"]
EXACT = FORMATS[:3]
BLOCK = 16
in_every_format = pytest.mark.parametrize("name", FORMATS)
POISON = 0x7F  # a float8 and, twice, a float16 that is no number


def make_states(
    batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """[batch, heads, tokens, dim] of all magnitudes, laid out as attention modules hand them out."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, heads, dim, generator=draw)
    return (x * 10 ** (3 * torch.randn(batch, tokens, heads, 1, generator=draw))).to(dtype).transpose(1, 2)


def make_pool(fmt: Format, num_tokens: int, heads: int, dim: int) -> tuple[Tensor, Tensor]:
    """Codes and scales [blocks, BLOCK, heads, ...], poisoned, with room for twice the tokens."""
    shape = heads, -(-2 * num_tokens // BLOCK), BLOCK
    codes = torch.full((*shape, fmt.packed_dim(dim)), POISON, dtype=torch.uint8).view(fmt.code_dtype)
    scale = torch.full((*shape, *fmt.scale_shape), torch.nan, dtype=SCALE_DTYPE)
    return codes.movedim(0, 2), scale.movedim(0, 2)


def make_slots(num_tokens: int, seed: int = 0) -> Tensor:
    """Scattered slots of such a pool, every fifth -1."""
    slots = torch.randperm(2 * num_tokens, generator=torch.Generator().manual_seed(seed))[:num_tokens]
    slots[::5] = -1
    return slots


def bits(x: Tensor) -> Tensor:
    """[slots, heads, bytes] of a pool; all NaN are one."""
    if x.dtype == SCALE_DTYPE:
        x = torch.where(x.isnan(), torch.nan, x)
    return x.contiguous().view(torch.uint8).flatten(0, 1).flatten(2) if x.dim() > 3 else bits(x.unsqueeze(-1))


def check(x: Tensor, name: str, slots: Tensor, centre: Tensor | None = None, rotates: bool = False) -> None:
    """Store x, and compare the whole pool with one that torch wrote."""
    fmt = get_format(name)
    batch, heads, tokens, dim = x.shape
    pool, want = (Quantized(*make_pool(fmt, batch * tokens, heads, dim)) for _ in range(2))
    place = address_of(*pool)
    assert place is not None
    assert can_store(x, place)
    store_states(x, place, slots, centre, rotates)
    guarded = x.float() if centre is None else x.float() - centre.unsqueeze(2)
    encoded = quantize(hadamard(guarded) if rotates else guarded, fmt)
    kept = slots >= 0
    where = slots[kept] // BLOCK, slots[kept] % BLOCK
    for held, new in zip(want.parts, encoded.parts, strict=True):
        # index_put knows no float8.
        as_bytes = torch.uint8 if held.element_size() == 1 else held.dtype
        held.view(as_bytes)[where] = new.transpose(1, 2).flatten(0, 1)[kept].view(as_bytes)
    codes_differ, scales_differ = ((bits(a) != bits(b)).any(-1) for a, b in zip(pool.parts, want.parts, strict=True))
    differ = codes_differ | scales_differ
    if name != "int4":
        assert not differ.any()
        return
    # Among the scales of int4 two may be equally near, but for the order of a sum.
    exact = torch.zeros(*differ.shape, dim)
    exact[slots[kept]] = (hadamard(guarded) if rotates else guarded).transpose(1, 2).flatten(0, 1)[kept]
    mine, theirs = (
        (dequantize(*p, fmt, torch.float32).flatten(0, 1)[differ].double() - exact[differ]).square().sum(-1)
        for p in (pool, want)
    )
    assert ((mine - theirs).abs() <= 1e-6 * theirs).all()
    assert differ.sum() <= 1e-3 * differ.numel()


@in_every_format
@pytest.mark.parametrize("dim", [8, 32, 36, 40, 64, 80, 128, 256], ids="head_dim {}".format)
def test_bytes_are_those_of_the_reference(name, dim):
    check(make_states(2, 3, 70, dim), name, make_slots(140))


@in_every_format
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_types_are_stored_as_float32_would_be(name, dtype):
    check(make_states(2, 3, 40, 64, dtype).clamp(-1e4, 1e4), name, make_slots(80))


@in_every_format
def test_states_of_any_strides_are_taken(name):
    x = make_states(2, 3, 40, 64)
    for view in (x.contiguous(), x.mT.contiguous().mT, x.repeat(1, 1, 1, 2)[..., 64:], x[:, :, ::3], x.flip(0)[:1]):
        check(view, name, make_slots(view.shape[0] * view.shape[2]))
    check(x[:1].expand(2, -1, -1, -1), name, make_slots(80))


@in_every_format
def test_what_is_no_number_too_large_or_too_small_is_stored_as_by_the_reference(name):
    x = make_states(1, 2, 40, 64)
    big = 65504.0  # of float16
    odd = [torch.nan, torch.inf, 3e38, -3e38, 1e-45, -1e-30, 2.0**-46, 2.0**-25, 6.1e-5 * 127, 8 * big, 448 * big]
    for token, value in enumerate(odd):
        x[0, 0, token, 5] = value  # one channel among others
        x[0, 1, token] = 0.0
        x[0, 1, token, 5] = value  # alone
        x[0, 1, token + len(odd)] = value  # everywhere
    x[0, 0, 35:37] = torch.tensor([[0.0], [-0.0]])
    check(x, name, torch.arange(40))
    check(-x, name, torch.arange(40))


@in_every_format
def test_every_tie_is_rounded_as_by_the_reference(name):
    # The scale is 1 (of int4 that of the divisor -8): steps are the numbers themselves.
    fmt = get_format(name)
    ties = _float8_ties(fmt) if fmt.mantissa_bits else torch.arange(-2 * fmt.qmax, 2 * fmt.qmax + 1) / 2
    x = torch.zeros(-(-len(ties) // 30), 32)
    x[:, :2] = fmt.qmax
    for i, tie in enumerate(ties):
        x[i // 30, 2 + i % 30] = tie
    check(x[None, None], name, torch.arange(len(x)))


def _float8_ties(fmt: Format) -> Tensor:
    codes = torch.arange(256, dtype=torch.uint8).view(fmt.code_dtype).float()
    codes = codes[codes.abs() <= fmt.qmax].sort().values
    return torch.cat([codes, (codes[1:] + codes[:-1]) / 2])


magnitudes = st.floats(width=32, allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5])


@in_every_format
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_numbers_come_bytes_are_those_of_the_reference(name, data):
    values = data.draw(st.lists(magnitudes, min_size=1, max_size=24))
    scale = data.draw(st.sampled_from([1.0, 1e-7, 1e4]))
    x = torch.tensor(values, dtype=torch.float32).repeat(24)[:24].view(1, 1, 3, 8) * scale
    check(x, name, torch.tensor([1, -1, 0]))


@pytest.mark.parametrize("dim", [32, 40, 64, 128, 256], ids="head_dim {}".format)
@pytest.mark.parametrize("is_centred", [False, True], ids=["", "centred"])
@pytest.mark.parametrize(("name", "rotates"), [("int8", False), ("int4", True)], ids=["int8", "int4 rotated"])
def test_keys_are_guarded_as_by_the_reference(name, rotates, is_centred, dim):
    centre = 40 * torch.randn(2, 3, dim, generator=torch.Generator().manual_seed(1)) if is_centred else None
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, 70, dim, generator=torch.Generator().manual_seed(2)).to(dtype)
        check(x, name, make_slots(140), centre, rotates)


def stored_alone(x: Tensor, name: str, rotates: bool) -> list[Tensor]:
    fmt = get_format(name)
    batch, heads, tokens, dim = x.shape
    pool = make_pool(fmt, batch * tokens, heads, dim)
    place = address_of(*pool)
    assert place is not None
    store_states(x, place, torch.arange(batch * tokens), None, rotates)
    return [bits(part) for part in pool]


@in_every_format
@pytest.mark.parametrize("rotates", [False, True], ids=["", "rotated"])
def test_a_token_depends_neither_on_others_nor_on_threads(name, rotates, monkeypatch):
    x = make_states(3, 2, 100, 64)
    together = stored_alone(x, name, rotates)
    for row, token in ((0, 0), (1, 63), (2, 64), (2, 99)):
        alone = stored_alone(x[row : row + 1, :, token : token + 1], name, rotates)
        assert all(torch.equal(a[0], b[100 * row + token]) for a, b in zip(alone, together, strict=True))
    monkeypatch.setattr(cpu_store, "_SERIAL_WORK", 0)
    for threads in (2, 3):
        monkeypatch.setattr(cpu_store, "num_threads", lambda threads=threads: threads)
        assert all(torch.equal(a, b) for a, b in zip(stored_alone(x, name, rotates), together, strict=True))


@in_every_format
@pytest.mark.parametrize("dim", [36, 64, 256], ids="head_dim {}".format)
def test_avx2_stores_the_same(name, dim, avx2):
    x = make_states(1, 2, 40, dim)
    x[0, 0, 3, 5] = torch.nan
    check(x, name, make_slots(40))
    check(x.clamp(-10, 10).nan_to_num(), name, make_slots(40), torch.ones(1, 2, dim), rotates=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_stores_without_waiting_for_threads_that_it_lacks(monkeypatch):
    monkeypatch.setattr(cpu_store, "_SERIAL_WORK", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x = make_states(1, 2, 200, 64)
    want = stored_alone(x, "int8", False)
    assert_in_a_forked_child(
        lambda: all(torch.equal(a, b) for a, b in zip(stored_alone(x, "int8", False), want, strict=True))
    )


def test_a_slot_that_the_pool_lacks_is_refused_and_nothing_is_written_there():
    x, fmt = make_states(1, 2, 3, 32), get_format("int8")
    whole = make_pool(fmt, 32, 2, 32)
    before = [bits(part) for part in whole]
    place = address_of(*(part[:2] for part in whole))
    assert place is not None
    for slot in (32, 1 << 40, (1 << 63) - 1):
        with pytest.raises(IndexError, match=rf"slots must lie below 32: got {slot}; reserve"):
            store_states(x, place, torch.tensor([-1, slot, -7]))
    assert all(torch.equal(bits(part), old) for part, old in zip(whole, before, strict=True))
    for wrong in (torch.arange(4), torch.arange(3, dtype=torch.int32), torch.arange(6)[::2]):
        with pytest.raises(ValueError, match="3 adjacent int64"):
            store_states(x, place, wrong)
    for wrong in (x[:, :1], x[..., :16]):
        with pytest.raises(ValueError, match="2 heads of 32"):
            store_states(wrong, place, torch.arange(3))


def test_what_cannot_be_taken_is_left_to_torch():
    x = make_states(1, 2, 3, 32)
    place = address_of(*make_pool(get_format("int8"), 16, 2, 32))
    native = address_of(torch.zeros(1, 16, 2, 32, dtype=torch.bfloat16), None)
    assert place is not None
    assert native is not None
    assert can_store(x, place)
    assert not can_store(x, native)
    assert not can_store(x, place._replace(scale_bits=32))
    assert not can_store(x.to("meta"), place)
    compiled = []
    torch.compile(lambda: compiled.append(can_store(x, place)), backend="eager")()
    assert compiled == [False]


@pytest.mark.parametrize("dim", [8, 36, 64, 256], ids="head_dim {}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_unquantized_pools_hold_the_very_bits(dtype, dim):
    x, slots = make_states(2, 3, 40, dim, dtype), make_slots(80)
    x[0, 0, :4, 0] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0], dtype=dtype)
    pool = torch.full((3, 10, BLOCK, dim), 7.0, dtype=dtype).movedim(0, 2)
    want, place, kept = pool.clone(), address_of(pool, None), slots >= 0
    assert place is not None
    assert can_store(x, place)
    store_states(x, place, slots)
    want[slots[kept] // BLOCK, slots[kept] % BLOCK] = x.transpose(1, 2).flatten(0, 1)[kept]
    assert torch.equal(pool.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wider_states_are_rounded_to_the_nearest_and_ties_to_even(dtype):
    x = make_states(1, 2, 40, 64, torch.float32).contiguous()
    # Halves between two neighbours, upwards and downwards, and what has no neighbour.
    x[:, :, ::2] = (x[:, :, ::2].view(torch.int32) & -0x10000 | 0x8000).view(torch.float32)
    x[:, :, 1::4] = (x[:, :, 1::4].view(torch.int32) & -0x2000 | 0x1000).view(torch.float32)
    x[0, 0, 0, :6] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 3.4e38, -3.4e38])
    pool = torch.zeros(2, 4, BLOCK, 64, dtype=dtype).movedim(0, 2)
    store_states(x, address_of(pool, None), torch.arange(40))
    got = pool.flatten(0, 1)[:40].transpose(0, 1)
    assert torch.equal(got.nan_to_num(7.0), x[0].to(dtype).nan_to_num(7.0))
    assert torch.equal(got.isnan(), x[0].isnan())


def cache_bytes(name: str, steps: list[int], loud: bool = False) -> list[Tensor]:
    """Codes and scales that two layers hold of two rows that came in such steps."""
    cache = QuantizedPagedCache(format="int4/int4" if name == "int4" else name)  # of single tokens
    draw = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 2, sum(steps), 8, generator=draw, dtype=torch.float32) for _ in range(2))
    if loud:
        keys[..., 3] += 60
    for k, v in zip(keys.split(steps, 2), values.split(steps, 2), strict=True):
        for layer in range(2):
            cache.update(k, v, layer)
    planes = [plane for layer in cache.layers for plane in layer.pool.planes]
    return [bits(x) for plane in planes for x in plane.view(cache.layers[0].table, sum(steps)).codes().parts]


@pytest.mark.parametrize("loud", [False, True], ids=["quiet keys", "loud keys"])
@pytest.mark.parametrize("name", [*FORMATS, "int8/int4", "native/int4", "int8/native"])
def test_a_text_is_stored_alike_however_it_is_cut(name, loud):
    whole = cache_bytes(name, [45], loud=loud)
    for steps in ([1] * 45, [16, 16, 13], [39, 1, 1, 4]):
        assert all(torch.equal(a, b) for a, b in zip(cache_bytes(name, steps, loud=loud), whole, strict=True))


@pytest.mark.parametrize("loud", [False, True], ids=["quiet keys", "loud keys"])
@pytest.mark.parametrize("name", [*EXACT, "int8/native"])
def test_a_cache_holds_the_bytes_that_torch_would_write(name, loud, monkeypatch):
    steps = [20, 1, 1, 9]
    taken = []

    def counting(*args, **kwargs):
        taken.append(1)
        return store_states(*args, **kwargs)

    monkeypatch.setattr(cpu_store, "store_states", counting)
    mine = cache_bytes(name, steps, loud=loud)
    assert len(taken) >= 2 * len(steps)
    monkeypatch.setattr(cpu_store, "can_store", lambda states, place: False)
    assert all(torch.equal(a, b) for a, b in zip(cache_bytes(name, steps, loud=loud), mine, strict=True))


@in_every_format
def test_defaults_of_torch_change_nothing(name):
    steps = [20, 1, 9]
    want = cache_bytes(name, steps, loud=True)
    torch.set_default_dtype(torch.float64)
    try:
        got = cache_bytes(name, steps, loud=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
