"""Emits the sealing of full blocks, each head of each block from its own tokens alone.

    x = states H,  m = mean(x) in float16                              once a block, where keys are centred
    y = x - m,  unit = reach(y) * share                                a token and group of channels; of several shares
    code = cut(round(y / unit + middle)),  packed                      the one of the nearest direction
    s = <y, y> / <y, code - middle> in float16

What quant/sealed.py computes: sums are made in float64, of which float32 does not keep the order.
"""

from __future__ import annotations

from llvmlite import ir

from hf_kvopt.kernels.cpu.jit.codec import CODECS
from hf_kvopt.kernels.cpu.jit.emitter import F16, F32, I8, I32, I64, PTR
from hf_kvopt.kernels.cpu.jit.kernel import Kernel, module_of
from hf_kvopt.kernels.cpu.jit.spec import SEAL_ARGUMENTS, SealSpec
from hf_kvopt.kernels.cpu.jit.stored import rotated
from hf_kvopt.quant.sealed import LIMIT, RANGES
from hf_kvopt.quant.sealed_formats import Part

_BYTES = 16  # packed at a time


def emit(spec: SealSpec) -> ir.Module:
    """A module with one function `run(arguments)`."""
    return module_of(lambda work: Seal(work, spec).emit(), spec.lanes, SEAL_ARGUMENTS)


class Seal(Kernel):
    """Takes tasks, each one head of one block, until none is left."""

    def __init__(self, function: ir.Function, spec: SealSpec) -> None:
        super().__init__(function, spec.lanes, SEAL_ARGUMENTS)
        self.spec, self.codec = spec, spec.codec
        self.num_vectors = -(-spec.dim // spec.lanes)
        self.doubles = ir.VectorType(ir.DoubleType(), spec.lanes)
        self.halves = ir.VectorType(F16, spec.lanes)
        width = self.num_vectors * spec.lanes
        self.states = self.alloca(F32, spec.block_size * width)
        self.soundness = self.alloca(F32, spec.block_size)  # 1, or 0 where a token is no number
        self.codes = self.alloca(I8, width + _BYTES)  # of one token, one to a byte

    def emit(self) -> None:
        """Write the function."""
        with self.tasks() as task:
            num_heads = self.number("num_heads")
            place, head = self.b.udiv(task, num_heads), self.b.urem(task, num_heads)
            block = self.b.load(self.item(self.pointer("blocks"), I64, place), typ=I64)
            address = self.b.load(self.item(self.pointer("sources"), I64, place), typ=I64)
            source = self._along(self.b.inttoptr(address, PTR), head, "source_head")
            means = self._read(source, self._stored("mean", block, head))
            codes, scales = (self._stored(part, block, head) for part in ("codes", "params"))
            groups = self.codec.num_groups(self.spec.dim)
            with self.loop(self.integer(0), self.integer(self.spec.block_size), 1) as token:
                self._write(
                    token,
                    means,
                    self._along(codes, token, "codes_token"),
                    self.item(scales, F16, self.b.mul(token, self.integer(groups))),
                )
        self.b.ret_void()

    def _along(self, base: ir.Value, index: ir.Value, stride: str) -> ir.Value:
        return self.at(base, self.b.mul(index, self.number(stride)))

    def _stored(self, part: str, block: ir.Value, head: ir.Value) -> ir.Value:
        return self._along(self._along(self.pointer(part), block, f"{part}_block"), head, f"{part}_head")

    def _counts(self) -> list[int]:
        """Channels in each vector."""
        return [min(self.lanes, self.spec.dim - first) for first in range(0, self.spec.dim, self.lanes)]

    def _read(self, source: ir.Value, mean: ir.Value) -> list[ir.Value]:
        """Rotate the block's tokens into `states`, and return what is taken out of each vector of channels."""
        sums = [self.var(ir.Constant(self.doubles, None)) for _ in range(self.num_vectors)]
        num_sound = self.var(ir.Constant(F32, 0.0))
        with self.loop(self.integer(0), self.integer(self.spec.block_size), 1) as token:
            base, load = self._along(source, token, "source_token"), CODECS[self.spec.source].load
            channels = [load(self, base, i * self.lanes, count) for i, count in enumerate(self._counts())]
            if self.codec.rotates:
                channels = rotated(self, channels, self.spec.dim, is_exact=True)
            is_sound = self._is_sound(channels)
            one = self.b.select(is_sound, ir.Constant(F32, 1.0), ir.Constant(F32, 0.0))
            self.b.store(one, self.item(self.soundness, F32, token))
            num_sound.set(self.b.fadd(num_sound.get(), one))
            for i, (x, total) in enumerate(zip(channels, sums, strict=True)):
                kept = self.b.select(is_sound, x, self.splat(0.0))
                self.store(kept, self._state(token, i))
                total.set(self.b.fadd(total.get(), self.b.fpext(kept, self.doubles)))
        if not self.codec.centred:
            return []
        count = self.b.select(
            self.b.fcmp_ordered(">", num_sound.get(), ir.Constant(F32, 0.0)), num_sound.get(), ir.Constant(F32, 1.0)
        )
        divisor, means = self.splat(self.b.fpext(count, ir.DoubleType())), []
        for i, (total, num) in enumerate(zip(sums, self._counts(), strict=True)):
            half = self.b.fptrunc(
                self.b.fptrunc(self.b.fdiv(total.get(), divisor), self.vec), self.halves
            )  # fmt: skip
            self.store(self.narrow(half, 0, num), self.item(mean, F16, self.integer(i * self.lanes)))
            means.append(self.b.fpext(half, self.vec))
        return means

    def _state(self, token: ir.Value, i: int) -> ir.Value:
        first = self.b.mul(token, self.integer(self.num_vectors * self.lanes))
        return self.item(self.states, F32, self.b.add(first, self.integer(i * self.lanes)))

    def _magnitude(self, x: ir.Value) -> ir.Value:
        return self.b.select(self.b.fcmp_ordered("<", x, self.splat(0.0)), self.b.fneg(x), x)

    def _is_sound(self, channels: list[ir.Value]) -> ir.Value:
        """Return whether no channel is NaN, or beyond what float16 parameters reach."""
        odd = self.splat(0.0)
        for x in channels:
            is_fine = self.b.fcmp_ordered("<=", self._magnitude(x), self.splat(LIMIT))
            odd = self.b.select(is_fine, odd, self.splat(1.0))
        return self.b.fcmp_ordered("==", self.fold(odd, "add"), ir.Constant(F32, 0.0))

    def _write(self, token: ir.Value, means: list[ir.Value], codes: ir.Value, scales: ir.Value) -> None:
        """Quantize one token, and store its codes and scales."""
        channels = [self.load(self._state(token, i)) for i in range(self.num_vectors)]
        if means:
            channels = [self.b.fsub(x, mean) for x, mean in zip(channels, means, strict=True)]
        sound = self.b.load(self.item(self.soundness, F32, token), typ=F32)
        is_sound = self.b.fcmp_ordered("!=", sound, ir.Constant(F32, 0.0))
        groups = self.codec.num_groups(self.spec.dim)
        size = self.num_vectors // groups
        for group in range(groups):
            own = range(group * size, (group + 1) * size)
            unit, half = self._nearest([channels[i] for i in own], own)
            kept = self.b.select(is_sound, half, ir.Constant(F16, float("nan")))
            self.b.store(kept, self.item(scales, F16, self.integer(group)))
            for i in own:
                whole = self.b.fptoui(self._steps(channels[i], unit), ir.VectorType(I32, self.lanes))
                place = self.at(self.codes, self.integer(i * self.lanes))
                self.store(self.b.trunc(whole, ir.VectorType(I8, self.lanes)), place)
        for part in self.codec.parts(self.spec.dim):
            self._pack(part, codes)

    def _nearest(self, channels: list[ir.Value], vectors: range) -> tuple[ir.Value, ir.Value]:
        """The unit of the codes that point most nearly in the channels' direction, and their scale as it is stored."""
        largest, squares = self.splat(0.0), ir.Constant(self.doubles, None)
        for x in channels:
            largest, wide = self.larger(self._magnitude(x), largest), self.b.fpext(x, self.doubles)
            squares = self.b.fadd(squares, self.b.fmul(wide, wide))
        reach = self.b.fdiv(self.splat(self.fold(largest, "max")), self.splat(self.codec.middle))
        best: tuple[ir.Value, ...] | None = None
        for share in RANGES[self.codec.bits]:
            unit = self.b.fmul(reach, self.splat(share))
            along, length = self._products(channels, vectors, unit)
            nearness = self.b.fdiv(self.b.fmul(along, along), length)
            if best is None:
                best = unit, along, nearness
                continue
            is_nearer = self.b.fcmp_ordered(">", nearness, best[2])
            best = tuple(self.b.select(is_nearer, a, b) for a, b in zip((unit, along, nearness), best, strict=True))
        assert best is not None
        unit, along, _ = best
        nothing = ir.Constant(ir.DoubleType(), 0.0)
        norm = self.lane0(self.folded(squares, self.b.fadd))
        scale = self.b.select(self.b.fcmp_ordered(">", along, nothing), self.b.fdiv(norm, along), nothing)
        halves = self.b.fptrunc(self.splat(self.b.fptrunc(scale, F32)), self.halves)
        return unit, self.lane0(halves)

    def _steps(self, x: ir.Value, unit: ir.Value) -> ir.Value:
        """Codes as float32, cut to their range; 0 instead of NaN."""
        steps = self.rounded(self.b.fadd(self.b.fdiv(x, unit), self.splat(self.codec.middle)))
        most = self.splat(2 * self.codec.middle)
        steps = self.b.select(self.b.fcmp_ordered(">", steps, most), most, steps)
        return self.b.select(self.b.fcmp_ordered(">", steps, self.splat(0.0)), steps, self.splat(0.0))

    def _products(self, channels: list[ir.Value], vectors: range, unit: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The products of the codes, less their middle, with the channels and with themselves, as doubles."""
        along, length, counts = ir.Constant(self.doubles, None), ir.Constant(self.doubles, None), self._counts()
        for i, x in zip(vectors, channels, strict=True):
            levels = self.b.fsub(self._steps(x, unit), self.splat(self.codec.middle))
            if counts[i] < self.lanes:  # channels that there are none of
                kept = [lane < counts[i] for lane in range(self.lanes)]
                mask = ir.Constant(ir.VectorType(ir.IntType(1), self.lanes), kept)
                levels = self.b.select(mask, levels, self.splat(0.0))
            levels = self.b.fpext(levels, self.doubles)
            along = self.b.fadd(along, self.b.fmul(levels, self.b.fpext(x, self.doubles)))
            length = self.b.fadd(length, self.b.fmul(levels, levels))
        return self.lane0(self.folded(along, self.b.fadd)), self.lane0(self.folded(length, self.b.fadd))

    def _pack(self, part: Part, codes: ir.Value) -> None:
        """Store some bits of all codes of a token; see `quant.sealed_formats.Part`."""
        for first in range(0, part.width, _BYTES):
            count = min(_BYTES, part.width - first)
            kind, total = ir.VectorType(I8, count), None
            for i in range(8 // part.bits):
                stored = self.load(self.at(self.codes, self.integer(i * part.width + first)), I8, count)
                bits = self.b.lshr(stored, ir.Constant(kind, [part.shift] * count))
                bits = self.b.and_(bits, ir.Constant(kind, [(1 << part.bits) - 1] * count))
                bits = self.b.shl(bits, ir.Constant(kind, [i * part.bits] * count))
                total = bits if total is None else self.b.or_(total, bits)
            self.store(total, self.at(codes, self.integer(part.offset + first)))
