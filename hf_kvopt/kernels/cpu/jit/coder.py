"""Makes bytes of channels that were divided by their scale; see quant/formats.py for what the codes mean."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from llvmlite import ir

from hf_kvopt.kernels.cpu.jit.emitter import F16, I8, I16, I32, Emitter
from hf_kvopt.quant.formats import FP8_E4M3, FP8_E5M2, INT4, INT8, Format
from hf_kvopt.quant.reference import INT4_DIVISORS


class Coder(NamedTuple):
    """Plan by which a vector of channels is quantized.

    Args:
        pack: (emitter, steps) -> codes of a vector's lanes, one after the other, as bytes.
        divisors: of the largest magnitude: the scales to choose from.
        low: the least step.
        high: the greatest.
        bits: of a code.
        num_scales: of a vector of channels: one, or two for even and odd channels.
    """

    pack: Callable[[Emitter, ir.Value], ir.Value]
    divisors: tuple[float, ...]
    low: float
    high: float
    bits: int = 8
    num_scales: int = 1

    @property
    def chooses(self) -> bool:
        """Return whether scales are signed and several of them tried, with codes rounded before they are cut."""
        return len(self.divisors) > 1

    def steps(self, e: Emitter, channels: ir.Value, scale: ir.Value) -> ir.Value:
        """Channels in units of the scale, cut to the codes' range; 0 instead of NaN."""
        steps = e.b.fdiv(channels, scale)
        if self.chooses:
            steps = e.rounded(steps)
        for sign, bound in (("<", self.low), (">", self.high)):
            steps = e.b.select(e.b.fcmp_ordered(sign, steps, e.splat(bound)), e.splat(bound), steps)
        return e.b.select(e.b.fcmp_unordered("uno", steps, steps), e.splat(0.0), steps)


def _integers(e: Emitter, steps: ir.Value) -> ir.Value:
    return e.b.fptosi(e.rounded(steps), ir.VectorType(I8, e.lanes))


def _nibbles(e: Emitter, steps: ir.Value) -> ir.Value:
    """The even channel's code + 8 in the low nibble, the odd one's in the high nibble."""
    codes = e.b.fptosi(e.b.fadd(steps, e.splat(8.0)), ir.VectorType(I32, e.lanes))
    even, odd = (e.shuffle(codes, codes, range(first, e.lanes, 2)) for first in (0, 1))
    both = e.b.or_(even, e.b.shl(odd, ir.Constant(odd.type, [4] * odd.type.count)))
    return e.b.trunc(both, ir.VectorType(I8, e.lanes // 2))


def _floats(e: Emitter, steps: ir.Value, fmt: Format) -> ir.Value:
    """Rounded to nearest, ties to even, in the bits of the float32."""
    assert fmt.mantissa_bits is not None
    ints, shift = ir.VectorType(I32, e.lanes), 23 - fmt.mantissa_bits

    def integers(value: int) -> ir.Value:
        return ir.Constant(ints, [value & 0xFFFFFFFF] * e.lanes)

    bits = e.b.bitcast(steps, ints)
    magnitude = e.b.and_(bits, integers(0x7FFFFFFF))
    # Exponents counted as the code counts them, and half a code more: a bit less than half where the code is even.
    is_odd = e.b.and_(e.b.lshr(magnitude, integers(shift)), integers(1))
    more = integers((1 << (shift - 1)) - 1 - ((fmt.min_exponent + 126) << 23))
    normal = e.b.lshr(e.b.add(e.b.add(magnitude, more), is_odd), integers(shift))
    # A float32 whose last bit is worth the smallest code: in the sum the machine has rounded to such codes.
    magic = integers((fmt.min_exponent + shift + 127) << 23)
    rounded = e.b.fadd(e.b.bitcast(magnitude, e.vec), e.b.bitcast(magic, e.vec))
    subnormal = e.b.sub(e.b.bitcast(rounded, ints), magic)
    is_subnormal = e.b.icmp_unsigned("<", magnitude, integers((fmt.min_exponent + 127) << 23))
    sign = e.b.and_(e.b.lshr(bits, integers(24)), integers(0x80))
    code = e.b.or_(e.b.select(is_subnormal, subnormal, normal), sign)
    return e.b.trunc(code, ir.VectorType(I8, e.lanes))


def _bytes(fmt: Format, pack: Callable[[Emitter, ir.Value], ir.Value]) -> Coder:
    return Coder(pack, (fmt.qmax,), -fmt.qmax, fmt.qmax)


CODERS = {
    "int8": _bytes(INT8, _integers),
    "float8_e4m3fn": _bytes(FP8_E4M3, partial(_floats, fmt=FP8_E4M3)),
    "float8_e5m2": _bytes(FP8_E5M2, partial(_floats, fmt=FP8_E5M2)),
    "uint8": Coder(_nibbles, INT4_DIVISORS, -8.0, 7.0, bits=INT4.bits or 0, num_scales=2),
}


def stored(e: Emitter, channels: ir.Value, code: str) -> ir.Value:
    """Channels as an unquantized pool has them: float32, bfloat16 or float16, rounded to nearest."""
    if code == "float32":
        return channels
    if code == "float16":
        return e.b.fptrunc(channels, ir.VectorType(F16, e.lanes))
    ints = ir.VectorType(I32, e.lanes)
    bits = e.b.bitcast(channels, ints)
    sixteen, one, half = (ir.Constant(ints, [value] * e.lanes) for value in (16, 1, 0x7FFF))
    is_odd = e.b.and_(e.b.lshr(bits, sixteen), one)
    rounded = e.b.lshr(e.b.add(e.b.add(bits, half), is_odd), sixteen)
    # The sum would carry a NaN over into the sign.
    is_nan = e.b.fcmp_unordered("uno", channels, channels)
    return e.b.trunc(e.b.select(is_nan, e.b.lshr(bits, sixteen), rounded), ir.VectorType(I16, e.lanes))
