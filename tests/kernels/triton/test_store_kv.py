"""store_kv writes what quant.reference writes, where it says, and nothing else."""

import pytest
import torch

from hf_kvopt.kernels.triton.store_kv import store_kv, store_kv_reference
from hf_kvopt.quant import dequantize, get_format
from tests.kernels.triton.conftest import make_query

FORMAT_PAIRS = [
    ("native", "native"),
    ("int8", "int8"),
    ("fp8_e4m3", "fp8_e4m3"),
    ("fp8_e5m2", "fp8_e5m2"),
    ("int4", "int4"),
    ("int8", "int4"),
]
by_formats = pytest.mark.parametrize("formats", FORMAT_PAIRS, ids="-".join)


def make_pools(formats, num_kv_heads, dims, dtype=torch.float32, scale_dtype=torch.float16, num_blocks=3):
    pools = []
    for name, dim in zip(formats, dims, strict=True):
        fmt = get_format(name)
        shape = (num_blocks, 16, num_kv_heads)
        pool = torch.zeros(*shape, fmt.packed_dim(dim), dtype=fmt.code_dtype or dtype)
        pools.append((pool, torch.full((*shape, *fmt.scale_shape), -1.0, dtype=scale_dtype) if fmt.has_scale else None))
    return pools


def run_both(k, v, slots, formats, scale_dtype=torch.float16):
    """Return ((k_pool, v_pool, k_scale, v_scale) of the kernel, the same of the reference)."""
    results = []
    for op in (store_kv, store_kv_reference):
        (k_pool, k_scale), (v_pool, v_scale) = make_pools(
            formats, k.shape[1], (k.shape[3], v.shape[3]), k.dtype, scale_dtype
        )
        op(k, v, k_pool, v_pool, slots, k_scale, v_scale)
        results.append((k_pool, v_pool, k_scale, v_scale))
    return results


def as_bits(tensor):
    return tensor.view(torch.uint8) if tensor is not None else torch.empty(0)


def assert_same_bits(ours, theirs):
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.equal(as_bits(mine), as_bits(reference))


@by_formats
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32], ids=str)
def test_codes_and_scales_equal_the_reference_bit_for_bit(formats, scale_dtype):
    k, v = make_query(2, 2, 5, 48) * 3, make_query(2, 2, 5, 32)
    slots = torch.tensor([7, 21, -1, 0, 47, 3, 16, -1, 15, 31])
    assert_same_bits(*run_both(k, v, slots, formats, scale_dtype))


@by_formats
@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 1e4], ids=lambda m: f"magnitude-{m:g}")
def test_small_and_large_magnitudes_equal_the_reference(formats, magnitude):
    k, v = make_query(1, 3, 4, 32) * magnitude, make_query(1, 3, 4, 32) * magnitude
    assert_same_bits(*run_both(k, v, torch.arange(4) + 5, formats))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@by_formats
def test_half_inputs_equal_the_reference(formats, dtype):
    k, v = make_query(1, 2, 4, 40, dtype), make_query(1, 2, 4, 40, dtype)
    assert_same_bits(*run_both(k, v, torch.tensor([9, 2, -1, 40]), formats))


@by_formats
def test_skipped_tokens_leave_every_other_slot_untouched(formats):
    k, v = make_query(1, 2, 3, 32), make_query(1, 2, 3, 32)
    (k_pool, v_pool, k_scale, v_scale), _ = run_both(k, v, torch.tensor([-1, 20, -1]), formats)
    for pool in (k_pool, v_pool):
        touched = pool.view(torch.uint8).view(48, -1).any(dim=1).nonzero().flatten().tolist()
        assert touched == [20]
    for scale in (k_scale, v_scale):
        if scale is not None:
            assert (scale.view(48, -1) != -1).any(dim=1).nonzero().flatten().tolist() == [20]


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3", "fp8_e5m2", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_make_their_token_nan_and_no_other(name, bad):
    k, v = make_query(1, 1, 3, 32), make_query(1, 1, 3, 32)
    k[0, 0, 1, 6] = bad
    k[0, 0, 2, 7] = bad
    (k_pool, _, k_scale, _), (_, _, expected, _) = run_both(k, v, torch.arange(3), (name, name))
    assert torch.equal(k_scale.isnan(), expected.isnan())
    back = dequantize(k_pool[0, :3, 0], k_scale[0, :3, 0], get_format(name))
    assert back[0].isfinite().all()
    # int4 has a scale for even channels (token 1) and one for odd ones (token 2).
    halves = (slice(None), slice(None)) if name != "int4" else (slice(0, None, 2), slice(1, None, 2))
    assert back[1, halves[0]].isnan().all()
    assert back[2, halves[1]].isnan().all()


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3", "int4"])
def test_a_scale_beyond_float16_is_nan_not_a_clamp(name):
    k = torch.full((1, 1, 1, 32), 3e38)
    (_, _, k_scale, _), _ = run_both(k, k, torch.tensor([0]), (name, name))
    assert k_scale[0, 0, 0].isnan().all()


def test_fp8_rounds_to_nearest_even_over_its_whole_range():
    """Every representable value, every midpoint, and points beside them, in one vector per 128 channels."""
    for name in ("fp8_e4m3", "fp8_e5m2"):
        fmt = get_format(name)
        codes = torch.arange(128, dtype=torch.int32).to(torch.uint8).view(fmt.code_dtype).float()
        values = codes[codes.isfinite() & (codes <= fmt.qmax)].sort().values
        middles = (values[1:] + values[:-1]) / 2
        points = torch.cat((values, -middles, middles * 1.001, -middles * 0.999))
        points = torch.cat((points, torch.zeros(-len(points) % 127))).view(-1, 127)
        # One channel pins the scale to 1.
        points = torch.cat((points, torch.full((len(points), 1), fmt.qmax)), dim=1)[None, None]
        slots = torch.arange(points.shape[2])
        ours, theirs = run_both(points, points, slots, (name, name), torch.float32)
        assert (ours[2].view(-1)[: len(slots)] == 1.0).all()
        assert torch.equal(ours[0].float(), theirs[0].float())


def test_many_heads_are_spread_over_programs():
    k = make_query(1, 40, 2, 256)
    assert_same_bits(*run_both(k, k, torch.tensor([4, 30]), ("int8", "native")))


def test_zero_tokens_are_no_launch():
    k = torch.empty(1, 2, 0, 32)
    run_both(k, k, torch.empty(0, dtype=torch.int64), ("int8", "int8"))
