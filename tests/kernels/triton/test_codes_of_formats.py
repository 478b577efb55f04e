"""The PTX that unpacks stored codes, executed here instruction by instruction for every pair of bytes.

Triton's interpreter cannot run it; what it computes there instead is proven beside each kernel.
"""

import os
import re

import pytest
import torch

pytest.importorskip("triton")

from hf_kvopt.kernels.triton import codes
from hf_kvopt.quant import dequantize, get_format

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="says nothing about the interpreter")

MASK = 0xFFFFFFFF
# Every 16-bit element in the lower half of a register, every one in the upper half.
LOW = torch.arange(1 << 16)
HIGH = (LOW * 40503 + 12345) % (1 << 16)
REGISTER = LOW | HIGH << 16


def halves(register, dtype):
    """[n] 32-bit registers as [n, 2] values of a 16-bit dtype."""
    parts = torch.stack([register & 0xFFFF, register >> 16], dim=1)
    return parts.to(torch.int32).to(torch.int16).view(dtype)


def register_of(values):
    bits = values.view(torch.int16).long() & 0xFFFF
    return bits[:, 0] | bits[:, 1] << 16


def lop3(a, b, c, table):
    out = torch.zeros_like(a)
    for index in range(8):
        if table >> index & 1:
            term = torch.full_like(a, MASK)
            for operand, bit in ((a, 4), (b, 2), (c, 1)):
                term = term & (operand if index & bit else ~operand)
            out = out | term
    return out & MASK


def prmt(a, b, selector):
    source = a | b << 32
    picked = [(source >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i for i in range(4)]
    return picked[0] | picked[1] | picked[2] | picked[3]


def fma_bf16x2(a, b, c):
    a, b, c = (halves(x, torch.bfloat16).double() for x in (a, b, c))
    return register_of((a * b + c).float().bfloat16())


def e4m3x2(pair):
    return register_of(torch.stack([pair & 255, pair >> 8], dim=1).to(torch.uint8).view(torch.float8_e4m3fn).half())


def execute(asm, num_outputs, second=None):
    """Run one asm text over all REGISTERs, and over `second` where it takes two inputs, and return its outputs."""
    values = {f"${num_outputs}": REGISTER, f"${num_outputs + 1}": second}

    def read(name):
        return values[name] if name in values else torch.full_like(REGISTER, int(name, 0))

    for line in re.findall(r"^\s*([a-z].*?);", asm, re.MULTILINE):
        name, rest = line.split(" ", 1)
        if name == "mov.b32" and rest.startswith("{"):
            low, high, source = re.findall(r"[\w$]+", rest)
            values[low], values[high] = read(source) & 0xFFFF, read(source) >> 16
            continue
        target, *operands = re.split(r",\s*", rest)
        args = [read(operand) for operand in operands]
        values[target] = {
            "mov.b32": lambda a: a,
            "and.b32": lambda a, b: a & b,
            "shl.b32": lambda a, n: (a << n) & MASK,
            "shr.u32": lambda a, n: a >> n,
            "lop3.b32": lambda a, b, c, table: lop3(a, b, c, int(table[0])),
            "prmt.b32": lambda a, b, selector: prmt(a, b, int(selector[0])),
            "fma.rn.bf16x2": fma_bf16x2,
            "cvt.rn.f16x2.e4m3x2": e4m3x2,
        }[name](*args)
    return [values[f"${i}"] for i in range(num_outputs)]


def expected_planes(name):
    """What each plane of every REGISTER holds, [planes, n, 2] float32."""
    fmt = get_format(name)
    elements = halves(REGISTER, torch.int16)
    stored = elements.contiguous().view(torch.uint8).view(*elements.shape, 2)
    stored = stored if name == "int4" else stored.view(fmt.code_dtype)
    if stored.is_floating_point():
        return stored.float().permute(2, 0, 1)  # `dequantize` does not read the codes that no store writes
    return dequantize(stored, torch.ones(*stored.shape[:-1], *fmt.scale_shape), fmt).permute(2, 0, 1)


FORMATS = pytest.mark.parametrize("name", ["int8", "int4", "fp8_e4m3", "fp8_e5m2"])


def text(name, kind):
    return getattr(codes, f"_{name.removeprefix('fp8_').upper()}_{kind}").value


@FORMATS
def test_values_are_the_codes_exactly(name):
    expected = expected_planes(name)
    got = [halves(plane, torch.bfloat16).float() for plane in execute(text(name, "VALUES"), len(expected))]
    for plane, wanted in zip(got, expected, strict=True):
        # A token whose scale is NaN has zeros as codes; no store writes the codes that stand for NaN and infinity.
        known = wanted.isfinite()
        assert torch.equal(plane[known], wanted[known])


@FORMATS
def test_keys_are_the_codes_but_for_unit_and_bias(name):
    expected = expected_planes(name)
    unit, bias = {"int8": (codes.KEY_UNIT, 128), "int4": (codes.KEY_UNIT, 8)}.get(name, (1, 0))
    got = [halves(plane, torch.float16).double() for plane in execute(text(name, "KEYS"), len(expected))]
    for index, (plane, wanted) in enumerate(zip(got, expected, strict=True)):
        factor = unit / 16 if name == "int4" and index % 2 else unit
        known = wanted.isfinite()
        assert torch.equal((plane * factor - bias)[known].float(), wanted[known])


def test_every_pair_of_bytes_was_there():
    assert LOW.unique().numel() == HIGH.unique().numel() == 1 << 16
