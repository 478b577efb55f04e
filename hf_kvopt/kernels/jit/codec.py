"""Reads stored channels as vectors of float32; see quant/formats.py for what the codes mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from llvmlite import ir

from hf_kvopt.kernels.jit.emitter import F16, F32, I8, I16, I32, Emitter


class Codec(NamedTuple):
    """How `count` channels are read.

    Args:
        bits: of a channel.
        read: (emitter, address, count) -> vector of count float32, to be multiplied by `gain` and the token's scale.
        gain: see `read`.
        has_scale: whether a scale is stored with each token and head.
    """

    bits: int
    read: Callable[[Emitter, ir.Value, int], ir.Value]
    gain: float = 1.0
    has_scale: bool = False

    def load(self, e: Emitter, base: ir.Value, first: int, count: int) -> ir.Value:
        """Channels `first` to `first + count` of the token at `base`, filled up with zeros to a whole vector."""
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
    return _from_bytes(e, e.load(address, I8, count))


def _int4(e: Emitter, address: ir.Value, count: int) -> ir.Value:
    packed = e.load(address, I8, count // 2)
    low = e.b.and_(packed, ir.Constant(packed.type, [15] * (count // 2)))
    high = e.b.lshr(packed, ir.Constant(packed.type, [4] * (count // 2)))
    nibbles = e.shuffle(low, high, [lane // 2 + lane % 2 * (count // 2) for lane in range(count)])
    return _from_bytes(e, e.b.sub(nibbles, ir.Constant(nibbles.type, [8] * count)))


def _from_bytes(e: Emitter, codes: ir.Value) -> ir.Value:
    count = codes.type.count
    return e.b.sitofp(e.b.sext(codes, ir.VectorType(I32, count)), ir.VectorType(F32, count))


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
    "int8": Codec(8, _int8, has_scale=True),
    "uint8": Codec(4, _int4, has_scale=True),
    "float8_e4m3fn": Codec(8, _e4m3, gain=256.0, has_scale=True),
    "float8_e5m2": Codec(8, _e5m2, has_scale=True),
}
