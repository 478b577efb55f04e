"""Emits the storing of new keys or values: each vector quantized alone, and written to its slot of the pool.

    x = (states - centre) H            where keys are guarded, see quant/guard.py
    scale = extreme(x) / divisor       in float16; of several divisors the one nearest to x as a whole
    codes = pack(cut(x / scale))

To the last bit what quant/reference.py computes, but for the choice among divisors: where two are equally near, the
order of the sum of squares decides, which is another than torch's.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from hf_kvopt.kernels.cpu.jit.codec import CODECS
from hf_kvopt.kernels.cpu.jit.coder import CODERS, stored
from hf_kvopt.kernels.cpu.jit.emitter import F16, I32, I64
from hf_kvopt.kernels.cpu.jit.kernel import Kernel, module_of
from hf_kvopt.kernels.cpu.jit.spec import STORE_ARGUMENTS, STORE_CHUNK, StoreSpec
from hf_kvopt.kernels.cpu.jit.stored import rotated
from hf_kvopt.quant.reference import FLOAT16_NUDGE


def emit(spec: StoreSpec) -> ir.Module:
    """A module with one function `run(arguments)`."""
    return module_of(lambda work: Store(work, spec).emit(), spec.lanes, STORE_ARGUMENTS)


class Store(Kernel):
    """Takes tasks, each some tokens of one head of one row, until none is left."""

    def __init__(self, function: ir.Function, spec: StoreSpec) -> None:
        super().__init__(function, spec.lanes, STORE_ARGUMENTS)
        self.spec = spec
        self.coder: Any = CODERS.get(spec.code)  # None: stored as they come
        self.scales = ir.ArrayType(F16, self.coder.num_scales if self.coder else 0)  # of one token and head
        self.ints = ir.VectorType(I32, spec.lanes)

    def emit(self) -> None:
        """Write the function."""
        with self.tasks() as task:
            num_heads, chunks = self.number("num_heads"), self.number("chunks")
            pair, chunk = self.b.udiv(task, chunks), self.b.urem(task, chunks)
            row, head = self.b.udiv(pair, num_heads), self.b.urem(pair, num_heads)
            self._chunk(row, head, self.b.mul(chunk, self.integer(STORE_CHUNK)))
        self.b.ret_void()

    def _chunk(self, row: ir.Value, head: ir.Value, first: ir.Value) -> None:
        tokens, num_slots = self.number("tokens"), self.number("num_slots")
        states = self._along(self._along(self.pointer("states"), row, "states_row"), head, "states_head")
        codes, scale = (self._along(self.pointer(name), head, f"{name}_head") for name in ("codes", "scale"))
        slots = self.item(self.pointer("slots"), I64, self.b.mul(row, tokens))
        centre = self._centre(row, head)
        stop = self.least(tokens, self.b.add(first, self.integer(STORE_CHUNK)))
        with self.loop(first, stop, 1) as token:
            slot = self.b.load(self.item(slots, I64, token), typ=I64)
            # Unsigned: a slot below 0, which is to be skipped, lies beyond the pool as well.
            with self.b.if_then(self.b.icmp_unsigned("<", slot, num_slots)):
                channels = self._channels(self._along(states, token, "states_token"), centre)
                block = self.b.ashr(slot, self.number("block_shift"))
                offset = self.b.sub(slot, self.b.shl(block, self.number("block_shift")))
                self._write(
                    channels,
                    self._along(self._along(codes, block, "codes_block"), offset, "codes_token"),
                    self.item(self._along(scale, block, "scale_block"), self.scales, offset),
                )
            with self.b.if_then(self.b.icmp_signed(">=", slot, num_slots)):
                self.b.store(slot, self.argument("outside"))

    def _along(self, base: ir.Value, index: ir.Value, stride: str) -> ir.Value:
        return self.at(base, self.b.mul(index, self.number(stride)))

    def _centre(self, row: ir.Value, head: ir.Value) -> ir.Value | None:
        if not self.spec.is_centred:
            return None
        return self._along(self._along(self.pointer("centre"), row, "centre_row"), head, "centre_head")

    def _channels(self, states: ir.Value, centre: ir.Value | None) -> list[ir.Value]:
        """A token's channels, guarded, in vectors that are filled up with zeros."""
        channels = []
        for first in range(0, self.spec.dim, self.lanes):
            count = min(self.lanes, self.spec.dim - first)
            x = CODECS[self.spec.source].load(self, states, first, count)
            if centre is not None:
                x = self.b.fsub(x, CODECS["float32"].load(self, centre, first, count))
            channels.append(x)
        return rotated(self, channels, self.spec.dim, is_exact=True) if self.spec.rotates else channels

    def _write(self, channels: list[ir.Value], codes: ir.Value, scales: ir.Value) -> None:
        """Quantize a vector where it is to be, and store its codes and its scales."""
        if self.coder is None:
            size = CODECS[self.spec.code].bits // 8
            for first, x in zip(range(0, self.spec.dim, self.lanes), channels, strict=True):
                part = self.narrow(stored(self, x, self.spec.code), 0, min(self.lanes, self.spec.dim - first))
                self.store(part, self.at(codes, self.integer(first * size)))
            return
        extreme = self._extreme(channels)
        scale = self._nearest(channels, [self._rounded(extreme, divisor) for divisor in self.coder.divisors])
        halves = self.b.fptrunc(scale, ir.VectorType(F16, self.lanes))
        self.store(self.narrow(halves, 0, self.coder.num_scales), scales)
        for i, x in enumerate(channels):
            first = i * self.lanes
            count = min(self.lanes, self.spec.dim - first)
            packed = self.coder.pack(self, self.coder.steps(self, x, scale))
            offset = self.integer(first * self.coder.bits // 8)
            self.store(self.narrow(packed, 0, count * self.coder.bits // 8), self.at(codes, offset))

    def _extreme(self, channels: list[ir.Value]) -> ir.Value:
        """The channel of the largest magnitude, of those with the same scale in each lane; NaN where there is one.

        Without its sign where scales have none; else the negative one where both signs have it.
        """
        # With the sign as the last bit floats are ordered as integers, NaN above all.
        greatest = ir.Constant(self.ints, None)
        for x in channels:
            greatest = self._larger(self._shifted(self.b.bitcast(x, self.ints), 1, 31), greatest)
        greatest = self.folded(greatest, self._larger, self.coder.num_scales)
        is_signed = self.coder.chooses
        bits = self._shifted(greatest, 31, 1) if is_signed else self.b.lshr(greatest, self._integers(1))
        return self.b.bitcast(bits, self.vec)

    def _shifted(self, bits: ir.Value, left: int, right: int) -> ir.Value:
        return self.b.or_(self.b.shl(bits, self._integers(left)), self.b.lshr(bits, self._integers(right)))

    def _larger(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.b.select(self.b.icmp_unsigned(">", a, b), a, b)

    def _integers(self, value: int) -> ir.Value:
        return ir.Constant(self.ints, [value] * self.lanes)

    def _rounded(self, extreme: ir.Value, divisor: float) -> ir.Value:
        """The scale as it will be read: of float16, away from zero, NaN where that is not finite."""
        raw = self.b.fdiv(extreme, self.splat(divisor))
        is_negative = self.b.fcmp_ordered("<", raw, self.splat(0.0))
        nudge = self.b.select(is_negative, self.splat(-FLOAT16_NUDGE), self.splat(FLOAT16_NUDGE))
        halves = self.b.fptrunc(self.b.fadd(raw, nudge), ir.VectorType(F16, self.lanes))
        scale = self.b.fpext(halves, self.vec)
        return self.b.fadd(self.b.fsub(scale, scale), scale)

    def _nearest(self, channels: list[ir.Value], scales: list[ir.Value]) -> ir.Value:
        """The scale with the least sum of squared errors, the first where they tie."""
        best = scales[0]
        if len(scales) > 1:
            least = self._error(channels, best)
            for scale in scales[1:]:
                error = self._error(channels, scale)
                is_nearer = self.b.fcmp_ordered("<", error, least)
                best, least = self.b.select(is_nearer, scale, best), self.b.select(is_nearer, error, least)
        return best

    def _error(self, channels: list[ir.Value], scale: ir.Value) -> ir.Value:
        total = self.splat(0.0)
        for x in channels:
            error = self.b.fsub(self.b.fmul(self.coder.steps(self, x, scale), scale), x)
            total = self.b.fadd(total, self.b.fmul(error, error))
        return self.folded(total, self.b.fadd, self.coder.num_scales)
