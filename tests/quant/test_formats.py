"""Formats: the registry's errors, byte counts, and the bounds that each format promises."""

import copy
import pickle

import pytest
import torch

from hf_kvopt.quant import FORMATS, dequantize, format_of, get_format, quantize, unpack_int4
from hf_kvopt.quant.reference import INT4_DIVISORS

SCALED = [fmt for fmt in FORMATS.values() if fmt.has_scale]
by_name = pytest.mark.parametrize("fmt", SCALED, ids=lambda fmt: fmt.name)
by_scale = pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32], ids=str)


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="native, int8, fp8_e4m3, fp8_e5m2, int4: got 'int2'"):
        get_format("int2")


def test_pool_dtype_names_its_format():
    assert [format_of(fmt.code_dtype) for fmt in SCALED] == SCALED
    assert format_of(torch.bfloat16).name == "native"
    with pytest.raises(TypeError, match=r"got torch\.int32"):
        format_of(torch.int32)


def test_formats_are_hashable_and_frozen():
    assert len(set(FORMATS.values())) == len(FORMATS)
    with pytest.raises(AttributeError):
        get_format("int8").bits = 4


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_a_copied_format_is_the_format(fmt):
    assert copy.deepcopy(fmt) is fmt
    assert pickle.loads(pickle.dumps(fmt)) is fmt


def test_odd_dim_cannot_be_packed():
    with pytest.raises(ValueError, match="multiple of 2 for int4: got 63"):
        get_format("int4").packed_dim(63)


@pytest.mark.parametrize(("name", "expected"), [("native", 256), ("int8", 130), ("fp8_e4m3", 130), ("int4", 68)])
def test_bytes_per_vector_count_the_scale(name, expected):
    assert get_format(name).bytes_per_vector(128, torch.bfloat16, torch.float16) == expected


def by_channel(scale, x):
    """The scale of each channel of x; int4 has one for even and one for odd channels."""
    scale = scale.float()
    if scale.dim() < x.dim():
        return scale.unsqueeze(-1).expand_as(x)
    return scale.unsqueeze(-2).expand(*x.shape[:-1], x.shape[-1] // 2, 2).flatten(-2)


def step_bound(x, fmt, scale):
    """Half a step: of the scale for integers, of the value's own binade for floats."""
    signed = by_channel(scale, x)
    step = signed.abs()
    if fmt.mantissa_bits is None:
        half = 0.5 * step
        # Beyond the ends of -8..7 a value is cut.
        return torch.stack((half, (x / signed - 7) * step, (-8 - x / signed) * step)).amax(0) if fmt.bits == 4 else half
    exponent = torch.floor(torch.log2((x.abs() / step).clamp(min=2.0**fmt.min_exponent)))
    return 0.5 * step * 2.0 ** (exponent - fmt.mantissa_bits)


@by_name
@by_scale
@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 1.0, 300.0], ids=lambda m: f"magnitude-{m:g}")
def test_error_stays_within_half_a_step(fmt, scale_dtype, magnitude):
    torch.manual_seed(0)
    x = torch.randn(7, 3, 80) * magnitude
    codes, scale = quantize(x, fmt, scale_dtype)
    assert codes.dtype == fmt.code_dtype
    assert codes.shape == (7, 3, fmt.packed_dim(80))
    assert scale.dtype == scale_dtype
    error = (dequantize(codes, scale, fmt) - x).abs()
    # 2**-10: the stored scale may be half a float16 step smaller than absmax / qmax asks for.
    slack = by_channel(scale, x).abs() * fmt.qmax * 2.0**-10 + 1e-12
    assert (error <= step_bound(x, fmt, scale) + slack).all()


@by_name
def test_zero_vector_reads_back_as_zero(fmt):
    codes, scale = quantize(torch.zeros(2, 32), fmt)
    assert torch.equal(dequantize(codes, scale, fmt), torch.zeros(2, 32))


@by_name
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_value_shows_as_nan_in_its_own_token_only(fmt, bad):
    x = torch.randn(4, 32)
    alone = dequantize(*quantize(x, fmt), fmt)
    x[1, 5] = bad
    back = dequantize(*quantize(x, fmt), fmt)
    # int4 has a scale for the odd channels, and one for the even ones.
    assert back[1, 1::2].isnan().all()
    assert back[1, ::2].isnan().all() or fmt.bits == 4
    assert torch.equal(back[[0, 2, 3]], alone[[0, 2, 3]])


@by_name
def test_scale_beyond_float16_is_loud(fmt):
    x = torch.full((1, 32), 3e38)
    assert dequantize(*quantize(x, fmt, torch.float16), fmt).isnan().all()
    assert dequantize(*quantize(x, fmt, torch.float32), fmt).isfinite().all()


@by_name
def test_a_token_does_not_depend_on_its_neighbours(fmt):
    x = torch.randn(5, 2, 64)
    alone = quantize(x[2:3], fmt)
    x[[0, 1, 3, 4]] *= 100
    together = quantize(x, fmt)
    assert torch.equal(alone.codes.view(torch.uint8), together.codes[2:3].view(torch.uint8))
    assert torch.equal(alone.scale, together.scale[2:3])


def test_int4_layout_is_even_low_odd_high():
    x = torch.tensor([[-8.0, 14.0, 1.0, -16.0]])
    codes, scale = quantize(x, get_format("int4"))
    assert scale.tolist() == [[1.0, 2.0]]
    assert codes.tolist() == [[0 | 15 << 4, 9 | 0 << 4]]
    assert unpack_int4(codes).tolist() == [[-8, 7, 1, -8]]
    assert torch.equal(dequantize(codes, scale, get_format("int4")), x)


def test_int4_takes_the_nearest_of_its_scales():
    fmt = get_format("int4")
    torch.manual_seed(0)
    x = torch.randn(500, 32)
    codes, scale = quantize(x, fmt, torch.float32)
    ours = (dequantize(codes, scale, fmt) - x).square().view(500, 16, 2).sum(1)
    planes = x.view(500, 16, 2)
    extreme = planes.gather(1, planes.abs().argmax(1, keepdim=True))
    errors = []
    for divisor in INT4_DIVISORS:
        step = extreme / divisor
        errors.append((torch.round(planes / step).clamp(-8, 7) * step - planes).square().sum(1))
    assert torch.allclose(ours, torch.stack(errors).amin(0), rtol=1e-4)
    assert set(torch.stack(errors).argmin(0).flatten().tolist()) == {0, 1, 2, 3}


def test_the_planes_of_int4_do_not_touch_each_other():
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    louder = x.clone()
    louder[:, 1::2] *= 100
    fmt = get_format("int4")
    assert torch.equal(dequantize(*quantize(x, fmt), fmt)[:, ::2], dequantize(*quantize(louder, fmt), fmt)[:, ::2])


def test_int4_signed_scale_beats_the_symmetric_range():
    torch.manual_seed(0)
    x = torch.randn(4096, 128)
    fmt = get_format("int4")
    ours = (dequantize(*quantize(x, fmt), fmt) - x).square().mean()
    step = x.abs().amax(-1, keepdim=True) / 7
    symmetric = (torch.round(x / step).clamp(-7, 7) * step - x).square().mean()
    assert ours < 0.8 * symmetric
