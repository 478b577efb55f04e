"""Reads sealed blocks as vectors of float32: codes, parameters of tokens, and means; see quant/sealed_formats.py."""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from hf_kvopt.kernels.cpu.jit.body import Body
from hf_kvopt.kernels.cpu.jit.emitter import F16, F32, I8, I32, Emitter
from hf_kvopt.quant.sealed_formats import BlockCodec


def load_codes(e: Emitter, vector: ir.Value, codec: BlockCodec, dim: int, first: int, count: int) -> ir.Value:
    """Codes of the channels `first` to `first + count` of the vector at an address, as float32 filled up with zeros."""
    ints = ir.VectorType(I32, count)
    channels = range(first, first + count)
    total = None
    for part in codec.parts(dim):
        places = [channel % part.width for channel in channels]
        low = min(places)
        stored = e.load(e.at(vector, e.integer(part.offset + low)), I8, max(places) - low + 1)
        if places != list(range(low, low + count)):
            stored = e.shuffle(stored, stored, [place - low for place in places])
        bits = e.b.zext(stored, ints)
        shifts = [part.bits * (channel // part.width) for channel in channels]
        if any(shifts):
            bits = e.b.lshr(bits, ir.Constant(ints, shifts))
        if part.bits < 8:
            bits = e.b.and_(bits, ir.Constant(ints, [(1 << part.bits) - 1] * count))
        if part.shift:
            bits = e.b.shl(bits, ir.Constant(ints, [part.shift] * count))
        total = bits if total is None else e.b.or_(total, bits)
    return e.widen(e.b.uitofp(total, ir.VectorType(F32, count)))


def rotated(e: Emitter, channels: list[ir.Value], dim: int, *, is_exact: bool = False) -> list[ir.Value]:
    """x H in sums and differences; see `quant.guard.hadamard`.

    Made in float64 where it is to be exact, so that float32 does not show their order.
    """
    size, half = dim & -dim, 1
    if is_exact:
        doubles = ir.VectorType(ir.DoubleType(), e.lanes)
        channels = [e.b.fpext(x, doubles) for x in channels]
    while half < size:
        if half < e.lanes:
            channels = [_within(e, x, half) for x in channels]
        else:
            step = half // e.lanes
            pairs = [(channels[i & ~step], channels[i | step]) for i in range(len(channels))]
            channels = [e.b.fsub(a, b) if i & step else e.b.fadd(a, b) for i, (a, b) in enumerate(pairs)]
        half *= 2
    factor = ir.Constant(channels[0].type, [size**-0.5] * e.lanes)
    channels = [e.b.fmul(x, factor) for x in channels]
    return [e.b.fptrunc(x, e.vec) for x in channels] if is_exact else channels


def by_group(e: Emitter, values: Sequence[ir.Value], dim: int, i: int) -> ir.Value:
    """Vector i of the channels, each with the value of its group."""
    size = dim // len(values)
    groups = [min(channel // size, len(values) - 1) for channel in range(i * e.lanes, (i + 1) * e.lanes)]
    vector = e.splat(values[groups[0]])
    for group in range(groups[0] + 1, groups[-1] + 1):
        lanes = [lane + e.lanes * (groups[lane] >= group) for lane in range(e.lanes)]
        vector = e.shuffle(vector, e.splat(values[group]), lanes)
    return vector


def _within(e: Emitter, x: ir.Value, half: int) -> ir.Value:
    """a + b in lane i and a - b in lane i + half, of the lanes a and b there."""
    lanes = range(e.lanes)
    a, b = (e.shuffle(x, x, [lane & ~half | bit for lane in lanes]) for bit in (0, half))
    places = [lane + e.lanes * bool(lane & half) for lane in lanes]
    return e.shuffle(e.b.fadd(a, b), e.b.fsub(a, b), places)


class Stored:
    """Address of the sealed keys or values of one task: codes, the parameters of tokens, and means."""

    def __init__(self, e: Body, name: str, codec: BlockCodec, dim: int, head: ir.Value) -> None:
        self.e, self.name, self.codec, self.dim = e, name, codec, dim
        parts = ("codes", "params", "mean") if codec.centred else ("codes", "params")
        self.bases = {
            part: e.at(e.pointer(f"{name}_{part}"), e.b.mul(head, e.number(f"{name}_{part}_head"))) for part in parts
        }
        self.stride = e.number(f"{name}_codes_token")
        self.num_groups = codec.num_groups(dim)

    def enter(self, block: ir.Value) -> None:
        """Read from this block of the pool."""
        e = self.e
        self.at = {
            part: e.at(base, e.b.mul(block, e.number(f"{self.name}_{part}_block"))) for part, base in self.bases.items()
        }

    def codes(self, offset: ir.Value) -> ir.Value:
        """Address of the codes of the block's token `offset`."""
        return self.e.at(self.at["codes"], self.e.b.mul(offset, self.stride))

    def scales(self, offset: ir.Value) -> list[ir.Value]:
        """s of each group, of as many tokens of the block as there are lanes."""
        e, count = self.e, self.num_groups
        halves = e.load(e.item(self.at["params"], F16, e.b.mul(offset, e.integer(count))), F16, count * e.lanes)
        if count == 1:
            return [e.b.fpext(halves, e.vec)]
        return [e.b.fpext(e.shuffle(halves, halves, range(i, count * e.lanes, count)), e.vec) for i in range(count)]

    def mean(self, first: int, count: int) -> ir.Value:
        """Means of the channels `first` to `first + count`, filled up with zeros."""
        e = self.e
        halves = e.load(e.item(self.at["mean"], F16, e.integer(first)), F16, count)
        return e.widen(e.b.fpext(halves, ir.VectorType(F32, count)))
