"""Parts that the phases of a drafting kernel share: scratch, norms, and outputs that threads take in turn."""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from hf_kvopt.kernels.cpu.jit.codec import CODECS
from hf_kvopt.kernels.cpu.jit.dense import Dense
from hf_kvopt.kernels.cpu.jit.spec import DRAFT_ARGUMENTS, DraftSpec


class Phase(Dense):
    """A function of the drafting kernel; the fourth argument on are its own."""

    def __init__(self, function: ir.Function, spec: DraftSpec) -> None:
        super().__init__(function, spec.lanes, DRAFT_ARGUMENTS, spec.weights, spec.eps)
        self.spec = spec

    def scratch(self) -> ir.Value:
        """Memory of this thread alone."""
        return self.at(self.pointer("scratch"), self.b.mul(self.thread, self.number("scratch_thread")))

    def normed(self, source: ir.Value, norm: str, target: ir.Value) -> None:
        """Rows of hidden states of the batch, normed, for this thread."""
        with self.loop(self.integer(0), self.number("num_rows"), 1) as row:
            x, y = (self.row(base, row, self.spec.hidden) for base in (source, target))
            self.rms_norm(x, CODECS["float32"], self.pointer(norm), self.spec.hidden, y)

    def outputs(self, count: int, rows: ir.Value, body: Callable[[ir.Value, list[ir.Value]], None]) -> None:
        """`body` of this thread's outputs, a vector's worth of them from a first one on, and some of the rows."""
        first, stop = self.share(count // self.lanes)
        with self.loop(first, stop, 1) as tile:
            output = self.b.mul(tile, self.integer(self.lanes))
            self.blocks(rows, lambda some: body(output, some))
