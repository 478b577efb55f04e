"""Loops over tiles of sealed and exact blocks, and where the exact ones lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llvmlite import ir

from hf_kvopt.kernels.cpu.jit.block_reader import BlockReader
from hf_kvopt.kernels.cpu.jit.codec import Codec
from hf_kvopt.kernels.cpu.jit.emitter import I32

if TYPE_CHECKING:
    from hf_kvopt.kernels.cpu.jit.sealed import SealedWorker


class Tiles:
    """A loop over the tiles of some tokens, which lie within a block each."""

    def __init__(self, e: SealedWorker, begin: ir.Value, end: ir.Value) -> None:
        self.e, self.begin, self.end = e, begin, end

    def __enter__(self) -> ir.Value:
        e, size = self.e, self.e.tile_size
        self.loop = e.loop(e.round_down(self.begin, size), self.end, size)
        e.tile = tile = self.loop.__enter__()
        e.first, e.stop = e.greatest(self.begin, tile), e.least(self.end, e.b.add(tile, e.integer(size)))
        return tile

    def __exit__(self, *error: object) -> None:
        self.loop.__exit__(*error)  # type: ignore[arg-type]


def exact_reader(e: SealedWorker, name: str, codec: Codec, row: ir.Value, head: ir.Value) -> BlockReader:
    """The exact keys or values of a task, found by the places of the row's blocks."""
    plane = BlockReader(e, name, codec, row, head)
    plane.table = e.item(e.pointer("exact_table"), I32, e.b.mul(row, e.number("exact_table_row")))
    return plane
