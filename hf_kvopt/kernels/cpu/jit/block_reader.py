"""Emits the reads of stored keys or values through the block table."""

from __future__ import annotations

from llvmlite import ir

from hf_kvopt.kernels.cpu.jit.body import Body
from hf_kvopt.kernels.cpu.jit.codec import Codec
from hf_kvopt.kernels.cpu.jit.emitter import F16, F32, I32, I64

# Sums that are kept in registers at once, by lanes; the other registers hold what is multiplied.
_ACCUMULATORS = {16: 16, 8: 8}
_LEAST_FLOAT = -3.4028234663852886e38


class BlockReader:
    """Address of the keys or values of one task."""

    def __init__(self, e: Body, name: str, codec: Codec, row: ir.Value, head: ir.Value) -> None:
        self.e, self.codec = e, codec
        self.table = e.item(e.pointer("table"), I32, e.b.mul(row, e.number("table_row")))
        self.shift = e.number("block_shift")
        self.base = e.at(e.pointer(name), e.b.mul(head, e.number(f"{name}_head")))
        self.block, self.token = e.number(f"{name}_block"), e.number(f"{name}_token")
        self.scale_item = e.spec.scale_bits // 8
        if codec.num_scales:
            self.scale_base = e.at(e.pointer(f"{name}_scale"), e.b.mul(head, e.number(f"{name}_scale_head")))
            self.scale_block = e.number(f"{name}_scale_block")

    def block_at(self, column: ir.Value) -> ir.Value:
        """Address of the first token of a block of the row."""
        return self.e.at(self.base, self.e.b.mul(self._block_number(column), self.block))

    def address(self, token: ir.Value) -> ir.Value:
        """Address of a token."""
        column, offset = self._split(token)
        return self.e.at(self.block_at(column), self.e.b.mul(offset, self.token))

    def scales(self, token: ir.Value) -> ir.Value:
        """Scales of as many tokens as there are lanes, from `token` on, with the codec's gain."""
        return self.e.b.fmul(self._load_scales(token, self.e.lanes), self.e.splat(self.codec.gain))

    def pair(self, token: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The scales of a token's even and odd channels in turn, and the same times the codec's offset."""
        two = self._load_scales(token, 2)
        scale = self.e.shuffle(two, two, [lane % 2 for lane in range(self.e.lanes)])
        return scale, self.e.b.fmul(scale, self.e.splat(self.codec.offset))

    def _load_scales(self, token: ir.Value, count: int) -> ir.Value:
        e = self.e
        column, offset = self._split(token)
        block = e.at(self.scale_base, e.b.mul(self._block_number(column), self.scale_block))
        address = e.at(block, e.b.mul(offset, e.integer(self.scale_item * self.codec.num_scales)))
        if self.scale_item == 4:
            return e.load(address, F32, count)
        return e.b.fpext(e.load(address, F16, count), ir.VectorType(F32, count))

    def _split(self, token: ir.Value) -> tuple[ir.Value, ir.Value]:
        column = self.e.b.ashr(token, self.shift)
        return column, self.e.b.sub(token, self.e.b.shl(column, self.shift))

    def _block_number(self, column: ir.Value) -> ir.Value:
        return self.e.b.sext(self.e.b.load(self.e.item(self.table, I32, column), typ=I32), I64)
