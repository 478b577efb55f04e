"""A decode step over codes against attention over what the codes stand for."""

import pytest
import torch

from hf_kvopt.kernels.cpu import codes as cpu_codes
from hf_kvopt.kernels.cpu.codes import decode_codes
from hf_kvopt.kernels.cpu.dense import attend
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.quant import FORMATS, dequantize, get_format, quantize, widen

PAIRS = [*((name, name) for name in FORMATS if name != "native"), ("int8", "int4"), ("native", "fp8_e4m3")]
OPTIONS = {
    "plain": {},
    "capped": {"softcap": 3.0},
    "window": {"window": 7},
    "sinks": {"sinks": True},
    "bool mask": {"mask": "bool"},
    "float mask by head": {"mask": "float"},
    "everything": {"softcap": 3.0, "window": 7, "sinks": True, "mask": "bool"},
}


def both(formats, shape, *, softcap=None, window=None, sinks=None, mask=None, magnitude=1.0):
    """The step over codes, and over dequantized keys and values; shape is batch, kv heads, group, kv_len, dim."""
    torch.manual_seed(0)
    batch, heads, group, kv_len, dim = shape
    k, v = (magnitude * torch.randn(batch, heads, kv_len, dim) for _ in range(2))
    q = torch.randn(batch, heads * group, 1, dim)
    fmts = tuple(map(get_format, formats))
    stored = [quantize(x, fmt) for x, fmt in zip((k, v), fmts, strict=True)]
    masks = {
        None: None,
        "bool": (torch.rand(batch, 1, 1, kv_len) > 0.3).index_fill(-1, torch.tensor(kv_len - 1), True),
        "float": torch.randn(1, heads * group, 1, kv_len),
    }
    options = {
        "scale": 0.2, "softcap": softcap, "window": window, "mask": masks[mask],
        "sinks": torch.randn(heads * group) if sinks else None,
    }  # fmt: skip
    dense = [dequantize(*x, fmt) for x, fmt in zip(stored, fmts, strict=True)]
    return decode_codes(q, *stored, fmts, Pattern(**options)), attend(q, *dense, Pattern(**options))


def assert_equal_up_to_float32(got, want):
    assert got.shape == want.shape
    assert (got - want).abs().max() < 4e-6


@pytest.mark.parametrize("formats", PAIRS, ids="-".join)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", [(1, 2, 4, 33, 32), (3, 2, 2, 16, 64), (2, 1, 4, 1, 96), (2, 4, 1, 47, 40)], ids=str)
def test_codes_give_what_dequantized_keys_and_values_give(formats, options, shape):
    assert_equal_up_to_float32(*both(formats, shape, **options))


@pytest.mark.parametrize("formats", PAIRS, ids="-".join)
@pytest.mark.parametrize("kv_len", [15, 16, 17, 63, 64, 65])
def test_tiles_of_any_size_agree(formats, kv_len, monkeypatch):
    monkeypatch.setattr(cpu_codes, "_TILE_CHANNELS", 2 * 32 * 16)
    assert_equal_up_to_float32(*both(formats, (1, 2, 2, kv_len, 32)))
    assert_equal_up_to_float32(*both(formats, (1, 2, 2, kv_len, 32), sinks=True, mask="bool"))


@pytest.mark.parametrize("name", ["int8", "int4", "fp8_e4m3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_queries_get_their_own_type_back(name, dtype):
    torch.manual_seed(0)
    fmt = get_format(name)
    k, v = (quantize(torch.randn(2, 2, 20, 32), fmt) for _ in range(2))
    q = torch.randn(2, 4, 1, 32).to(dtype)
    got = decode_codes(q, k, v, (fmt, fmt), Pattern(0.2))
    want = decode_codes(q.float(), k, v, (fmt, fmt), Pattern(0.2))
    assert got.dtype == dtype
    assert torch.equal(got, want.to(dtype))


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_every_finite_float8_widens_to_itself(name):
    fmt = get_format(name)
    codes = torch.arange(256, dtype=torch.uint8).view(fmt.code_dtype)
    finite = codes.float().isfinite()
    numbers, factor = widen(codes, fmt)
    assert torch.equal((numbers * factor)[finite], codes.float()[finite])
    assert finite.sum() >= 248


@pytest.mark.parametrize("name", ["int8", "int4", "fp8_e4m3"])
def test_a_token_that_is_no_number_shows_in_its_row_alone(name):
    fmt = get_format(name)
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, 20, 32), torch.randn(2, 2, 20, 32)
    k[1, 0, 3, 5] = torch.nan
    got = decode_codes(torch.randn(2, 4, 1, 32), quantize(k, fmt), quantize(v, fmt), (fmt, fmt), Pattern(0.2))
    assert got[0].isfinite().all()
    assert got[1, 0, :2].isnan().all()
    assert got[1, 0, 2:].isfinite().all()
