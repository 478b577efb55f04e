"""Reads stored channels as vectors of float32; see quant/formats.py for what the codes mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from llvmlite import ir

from hf_kvopt.kernels.cpu.jit.emitter import F16, F32, I8, I16, I32, Emitter


class Codec(NamedTuple):
    """Plan by which `count` channels are read.

    Args:
        bits: of a channel.
        read: (emitter, address, count) -> numbers as a vector of count float32; a channel is
            (number + offset) * gain * scale.
        num_scales: of a token and head: none, one, or two for even and odd channels.
        gain: see `read`.
        offset: see `read`; not 0 only where there are two scales.
    """

    bits: int
    read: Callable[[Emitter, ir.Value, int], ir.Value]
    num_scales: int = 0
    gain: float = 1.0
    offset: float = 0.0

    def load(self, e: Emitter, base: ir.Value, first: int, count: int) -> ir.Value:
        """Numbers of channels `first` to `first + count` of the token at `base`, filled up to a whole vector."""
        return e.widen(self.read(e, e.at(base, e.integer(first * self.bits // 8)), count))


def _float32(e: Emitter, address: ir.Value, count: int) -> ir.Value:
    return e.load(address, F32, count)


def _bfloat16(e: Emitter, address: ir.Value, count: int) -> ir.Value:
    ints = ir.VectorType(I32, count)
    bits = e.b.shl(e.b.zext(e.load(address, I16, count), ints), ir.Constant(ints, [16] * count))
    return e.b.bitcast(bits, ir.VectorType(F32, count))


def _float16(e: Emitter, address: ir.Value, count: int) -> ir.Value:
    return e.b.fpext(e.load(address, F16, count), ir.VectorType(F32, count))


def _int8(e: Emitter, address: ir.Value, count: int) -> ir.Value:
    codes = e.load(address, I8, count)
    return e.b.sitofp(e.b.sext(codes, ir.VectorType(I32, count)), ir.VectorType(F32, count))


def _int4(e: Emitter, address: ir.Value, count: int) -> ir.Value:
    """0 to 15: each byte twice, and the upper nibble shifted down in the odd lanes."""
    ints = ir.VectorType(I32, count)
    packed = e.load(address, I8, count // 2)
    twice = e.b.zext(e.shuffle(packed, packed, [lane // 2 for lane in range(count)]), ints)
    shifted = e.b.lshr(twice, ir.Constant(ints, [4 * (lane % 2) for lane in range(count)]))
    return e.b.uitofp(e.b.and_(shifted, ir.Constant(ints, [15] * count)), ir.VectorType(F32, count))


def _e5m2(e: Emitter, address: ir.Value, count: int) -> ir.Value:
    """float16 with the lower byte left out."""
    shorts = ir.VectorType(I16, count)
    bits = e.b.shl(e.b.zext(e.load(address, I8, count), shorts), ir.Constant(shorts, [8] * count))
    return e.b.fpext(e.b.bitcast(bits, ir.VectorType(F16, count)), ir.VectorType(F32, count))


def _e4m3(e: Emitter, address: ir.Value, count: int) -> ir.Value:
    """The bits moved into a float16 are the value / 2^8, subnormals too; NaN codes come with a NaN scale."""
    shorts = ir.VectorType(I16, count)
    wide = e.b.sext(e.load(address, I8, count), shorts)
    sign = e.b.and_(wide, ir.Constant(shorts, [-32768] * count))
    rest = e.b.and_(e.b.shl(wide, ir.Constant(shorts, [7] * count)), ir.Constant(shorts, [0x3F80] * count))
    return e.b.fpext(e.b.bitcast(e.b.or_(sign, rest), ir.VectorType(F16, count)), ir.VectorType(F32, count))


CODECS = {
    "float32": Codec(32, _float32),
    "bfloat16": Codec(16, _bfloat16),
    "float16": Codec(16, _float16),
    "int8": Codec(8, _int8, num_scales=1),
    "uint8": Codec(4, _int4, num_scales=2, offset=-8.0),
    "float8_e4m3fn": Codec(8, _e4m3, num_scales=1, gain=256.0),
    "float8_e5m2": Codec(8, _e5m2, num_scales=1),
}
