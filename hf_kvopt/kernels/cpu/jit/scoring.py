"""Emits what becomes of the scores of a tile between the products and the softmax: scales, a cap, a mask."""

from __future__ import annotations

from contextlib import AbstractContextManager

from llvmlite import ir

from hf_kvopt.kernels.cpu.jit.body import Body
from hf_kvopt.kernels.cpu.jit.emitter import F32, I8, NEG_INF
from hf_kvopt.kernels.cpu.jit.spec import BOOL_MASK, FLOAT_MASK, TILE
from hf_kvopt.kernels.pattern import LOG2E

_LEAST_FLOAT = -3.4028234663852886e38


class Scoring(Body):
    """A function that has scores [rows, TILE] of some queries and a tile; a subclass says which."""

    unit: int  # tokens whose products with all rows are in registers at once
    scores: ir.Value  # address of the scores
    k_scales: ir.Value  # address of the scales of the tile's keys, where these have one each
    where: tuple[ir.Value, ir.Value]  # row and KV head of the task
    column0: ir.Value  # the token that stands in the first column
    tile: ir.Value  # the tile's first token, and of those that are seen the first and the end
    first: ir.Value
    stop: ir.Value

    def _score(self, q: int, token: ir.Value) -> ir.Value:
        """Address of the score of query q of the tile and a token."""
        offset = self.b.add(self.b.sub(token, self.tile), self.integer(q * TILE))
        return self.item(self.scores, F32, offset)

    @property
    def _rows(self) -> range:
        return range(self.spec.rows)

    def _vectors(self) -> AbstractContextManager[ir.Value]:
        """A loop over the tile's tokens, a vector at a time from a multiple of the lanes on."""
        return self.loop(self.round_down(self.first, self.lanes), self.stop, self.lanes)

    def _store_scores(self, scores: ir.Value, first: int, token: ir.Value) -> None:
        """Store a vector whose lanes are the scores number first, first + 1, ... = q * unit + t."""
        count = min(self.unit, self.lanes)
        for lane in range(0, self.lanes, count):
            q, t = divmod(first + lane, self.unit)
            if q < self.spec.rows:
                self.store(self.narrow(scores, lane, count), self._score(q, self.b.add(token, self.integer(t))))

    def _rescale(self, token: ir.Value) -> None:
        scales = self.load(self.item(self.k_scales, F32, self.b.sub(token, self.tile)))
        for q in self._rows:
            self.store(self.b.fmul(self.load(self._score(q, token)), scales), self._score(q, token))

    def _cap_and_mask(self, query: ir.Value) -> None:
        """Do to the scores of a tile what the pattern says."""
        self._cap_all()
        for kind, item in ((BOOL_MASK, 1), (FLOAT_MASK, 4)):
            with self.b.if_then(self.b.icmp_signed("==", self.number("mask_kind"), self.integer(kind))):
                self._mask(query, kind, item)

    def _cap_all(self) -> None:
        is_capped = self.b.icmp_signed("!=", self.number("softcap"), self.integer(0))
        with self.b.if_then(is_capped), self._vectors() as token:
            self._cap(token)

    def _cap(self, token: ir.Value) -> None:
        cap = self.splat(self.real("softcap"))
        for q in self._rows:
            self.store(self.b.fmul(cap, self.tanh(self.load(self._score(q, token)))), self._score(q, token))

    def _mask(self, query: ir.Value, kind: int, item: int) -> None:
        """Apply the mask, whose memory ends with the last token: whole vectors first, then one token at a time."""
        count = self.b.sub(self.stop, self.first)
        middle = self.b.add(self.first, self.round_down(count, self.lanes))
        for q in self._rows:
            row = self._mask_row(self.b.add(query, self.integer(q)), item)
            for lanes, first, stop in ((self.lanes, self.first, middle), (1, middle, self.stop)):
                with self.loop(first, stop, lanes) as token:
                    self._mask_some(self.at(row, self.b.mul(token, self.integer(item))), q, token, kind, lanes)

    def _mask_row(self, query: ir.Value, item: int) -> ir.Value:
        """Address of the mask of a query of this task and token 0, which may lie before the mask's first column."""
        last = self.b.sub(self.num_rows(), self.integer(1))
        row = self.at(self.pointer("mask"), self.locate(self.where, "mask", self.least(query, last)))
        return self.at(row, self.b.mul(self.column0, self.integer(-item)))

    def _mask_some(self, address: ir.Value, q: int, token: ir.Value, kind: int, lanes: int) -> None:
        scores = self.load(self._score(q, token), F32, lanes)
        nothing = ir.Constant(scores.type, [NEG_INF] * lanes)
        if kind == BOOL_MASK:
            allowed = self.load(address, I8, lanes)
            scores = self.b.select(
                self.b.icmp_unsigned("!=", allowed, ir.Constant(allowed.type, None)), scores, nothing
            )
        else:
            bias = self.load(address, F32, lanes)
            least, log2_e = (ir.Constant(bias.type, [value] * lanes) for value in (_LEAST_FLOAT, LOG2E))
            # The least float stands for minus infinity. NaN goes on.
            hidden = self.b.fcmp_ordered("<=", bias, least)
            scores = self.b.select(hidden, nothing, self.b.fadd(scores, self.b.fmul(bias, log2_e)))
        self.store(scores, self._score(q, token))
