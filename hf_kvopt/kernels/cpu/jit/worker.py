"""Emits the work on one task after another: scores, softmax and weighted values of a KV head and CHUNK tokens."""

from __future__ import annotations

from llvmlite import ir

from hf_kvopt.kernels.cpu.jit.block_reader import BlockReader
from hf_kvopt.kernels.cpu.jit.codec import CODECS
from hf_kvopt.kernels.cpu.jit.emitter import F32, I32, NEG_INF
from hf_kvopt.kernels.cpu.jit.scoring import Scoring
from hf_kvopt.kernels.cpu.jit.spec import CHUNK, TILE, SealedSpec, Spec

# Sums that are kept in registers at once, by lanes; the other registers hold what is multiplied.
_ACCUMULATORS = {16: 16, 8: 8}


class Worker(Scoring):
    """Takes tasks until none is left.

    Args:
        function: an empty function.
        spec: what it computes.
        finish: called with the row and KV head of a task that is all there is of them; None: never.
    """

    def __init__(self, function: ir.Function, spec: Spec | SealedSpec, finish: ir.Function | None = None) -> None:
        super().__init__(function, spec)
        self.finish = finish
        self.k_codec, self.v_codec = CODECS[spec.k_code], CODECS[spec.v_code]
        accumulators = _ACCUMULATORS[spec.lanes]
        # Tokens whose products with all rows are in registers at once: a power of two.
        self.unit = accumulators // (1 << (spec.rows - 1).bit_length())
        self.width = max(1, accumulators // spec.rows)
        self.scores = self.alloca(F32, spec.rows * TILE)
        self.k_scales, self.v_scales = (self.alloca(F32, TILE) for _ in range(2))

    def emit(self) -> None:
        """Write the function."""
        self.queries = self.allocate(self.b.mul(self._most_queries(), self.integer(self.k_vectors * self.lanes * 4)))
        with self.tasks() as task:
            self._task(task)
        self.b.ret_void()

    def _task(self, task: ir.Value) -> None:
        splits, num_kv_heads = self.number("splits"), self.number("num_kv_heads")
        split, pair = self.b.urem(task, splits), self.b.udiv(task, splits)
        row, kv_head = self.b.udiv(pair, num_kv_heads), self.b.urem(pair, num_kv_heads)
        self.where = row, kv_head
        self.part_of_task = self.part(pair, split)
        self._open(row, kv_head)
        self._bounds(row, split)
        self._prepare()
        self._read()
        assert self.finish is not None
        with self.b.if_then(self.b.icmp_signed("==", splits, self.integer(1))):
            self.b.call(self.finish, [self.arguments, pair])

    def _most_queries(self) -> ir.Value:
        """Queries of any task at most."""
        return self.num_padded()

    def _num_queries(self) -> ir.Value:
        """Queries of this task, rounded up to what is computed together."""
        return self.num_padded()

    def _part_row(self, query: ir.Value) -> ir.Value:
        """(acc, m, l) of a query of this task."""
        return self.part_row(self.part_of_task, query)

    def _open(self, row: ir.Value, kv_head: ir.Value) -> None:
        """Make the readers of the keys and values of a task."""
        self.k = BlockReader(self, "k", self.k_codec, row, kv_head)
        self.v = BlockReader(self, "v", self.v_codec, row, kv_head)

    def _read(self) -> None:
        """Read all tiles of a task."""
        with self.loop(self.round_down(self.begin, TILE), self.end, TILE) as tile:
            self.tile = tile
            self.first = self.greatest(self.begin, tile)
            self.stop = self.least(self.end, self.b.add(tile, self.integer(TILE)))
            self._load_scales()
            with self.loop(self.integer(0), self._num_queries(), self.spec.rows) as query:
                bounds = [self._seen(self.b.add(query, self.integer(q))) for q in self._rows]
                with self.b.if_then(self._is_seen(bounds)):
                    self._tile(query, bounds)

    def _bounds(self, row: ir.Value, split: ir.Value) -> None:
        """The tokens of this task: those that some query sees, and that were not attended to before."""
        self.seq_len = self.per_row("seq_lens", row)
        self.past = self.b.sub(self.seq_len, self.number("q_len"))
        self.column0 = self.column0_of(row)
        start = self.b.add(self.column0, self.per_row("starts", row, 0))
        window_start = self.b.add(self.b.sub(self.past, self.number("window")), self.integer(1))
        lowest = self.greatest(self.greatest(start, window_start), self.integer(0))
        chunk = self.b.mul(split, self.integer(CHUNK))
        shared = self.per_row("shared", self.b.udiv(row, self.number("run")), 0)
        self.is_begun = self.b.icmp_signed(">", shared, chunk)
        self.begin = self.greatest(self.greatest(lowest, shared), chunk)
        self.end = self.least(self.seq_len, self.b.add(chunk, self.integer(CHUNK)))

    def _prepare(self) -> None:
        """Scale the queries, and start with nothing seen; the last query fills up the rows computed together."""
        last = self.b.sub(self.num_rows(), self.integer(1))
        with self.loop(self.integer(0), self.num_padded(), 1) as query:
            self._scale(query, self.where, self.least(query, last))
            with self.b.if_then(self.b.not_(self.is_begun)):
                self._clear(self._part_row(query))

    def _scale(self, query: ir.Value, where: tuple[ir.Value, ir.Value], source: ir.Value) -> None:
        """Keep query `source` of a row and KV head, scaled, as this task's number `query`."""
        address = self.item(self.pointer("q"), F32, self.locate(where, "q", source))
        scale = self.splat(self.real("scale"))
        for i in range(self.k_vectors):
            count = min(self.lanes, self.spec.k_dim - i * self.lanes)
            channels = self.widen(self.load(self.item(address, F32, self.integer(i * self.lanes)), F32, count))
            self.store(self.b.fmul(channels, scale), self._query(query, i))

    def _clear(self, row: ir.Value) -> None:
        """Let a query have seen nothing."""
        for i in range(self.v_vectors):
            self.store(self.splat(0.0), self.item(row, F32, self.integer(i * self.lanes)))
        self.b.store(ir.Constant(F32, NEG_INF), self.extreme(row))
        self.b.store(ir.Constant(F32, 0.0), self.denominator(row))

    def _query(self, query: ir.Value, i: int) -> ir.Value:
        """Address of the i-th vector of a scaled query."""
        items = self.b.mul(query, self.integer(self.k_vectors * self.lanes))
        return self.item(self.queries, F32, self.b.add(items, self.integer(i * self.lanes)))

    def _load_scales(self) -> None:
        for plane, codec, scales in ((self.k, self.k_codec, self.k_scales), (self.v, self.v_codec, self.v_scales)):
            if codec.num_scales == 1:
                with self._vectors() as token:
                    self.store(plane.scales(token), self.item(scales, F32, self.b.sub(token, self.tile)))

    def _tile(self, query: ir.Value, bounds: list[tuple[ir.Value, ir.Value]]) -> None:
        """One step of `rows` queries over one tile of tokens."""
        with self.loop(self.round_down(self.first, self.unit), self.stop, self.unit) as token:
            self._products(query, token)
        if self.k_codec.num_scales == 1:
            with self._vectors() as token:
                self._rescale(token)
        self._cap_and_mask(query)
        alphas = self._softmax(query, bounds)
        for first in range(0, self.v_vectors, self.width):
            self._add_values(query, alphas, range(first, min(first + self.width, self.v_vectors)))

    def _products(self, query: ir.Value, token: ir.Value) -> None:
        """Scores of `rows` queries and `unit` tokens."""
        base = self.k.address(token)
        keys = [self.at(base, self.b.mul(self.k.token, self.integer(t))) for t in range(self.unit)]
        pairs = [self._pair(self.k, self.b.add(token, self.integer(t))) for t in range(self.unit)]
        sums = [[self.splat(0.0)] * self.unit for _ in self._rows]
        for i in range(self.k_vectors):
            count = min(self.lanes, self.spec.k_dim - i * self.lanes)
            queries = [self.load(self._query(self.b.add(query, self.integer(q)), i)) for q in self._rows]
            for t, (address, pair) in enumerate(zip(keys, pairs, strict=True)):
                key = self._paired(self.k_codec.load(self, address, i * self.lanes, count), pair)
                for q in self._rows:
                    sums[q][t] = self.fma(queries[q], key, sums[q][t])
        flat = [value for row in sums for value in row]
        flat += [self.splat(0.0)] * (-len(flat) % self.lanes)
        for first in range(0, len(flat), self.lanes):
            self._store_scores(self.sums(flat[first : first + self.lanes]), first, token)

    def _pair(self, plane: BlockReader, token: ir.Value) -> tuple[ir.Value, ir.Value] | None:
        return plane.pair(token) if plane.codec.num_scales == 2 else None

    def _paired(self, numbers: ir.Value, pair: tuple[ir.Value, ir.Value] | None) -> ir.Value:
        """Channels with scales of their own; other scales touch the scores and the weights instead."""
        return numbers if pair is None else self.fma(numbers, *pair)

    def _softmax(self, query: ir.Value, bounds: list[tuple[ir.Value, ir.Value]]) -> list[ir.Value]:
        """Turn scores into weights of the values; returns by how much each row's sums so far shrink."""
        rows = [self._part_row(self.b.add(query, self.integer(q))) for q in self._rows]
        old = [self.b.load(self.extreme(row), typ=F32) for row in rows]
        new = self._maxima(old, bounds)
        pivots = [self.pivot(m) for m in new]
        alphas = [self.power(self.b.fsub(m, pivot)) for m, pivot in zip(old, pivots, strict=True)]
        totals = [self.var(self.splat(0.0)) for _ in rows]
        with self._vectors() as token:
            for q, pivot in enumerate(pivots):
                weights = self.exp2(self.b.fsub(self.load(self._score(q, token)), self.splat(pivot)))
                totals[q].set(self.b.fadd(totals[q].get(), weights))
                if self.v_codec.num_scales == 1:
                    scales = self.load(self.item(self.v_scales, F32, self.b.sub(token, self.tile)))
                    weights = self.b.fmul(weights, scales)
                self.store(weights, self._score(q, token))
        for row, m, alpha, total in zip(rows, new, alphas, totals, strict=True):
            self.b.store(m, self.extreme(row))
            shrunk = self.b.fmul(self.b.load(self.denominator(row), typ=F32), self.lane0(alpha))
            self.b.store(self.b.fadd(shrunk, self.fold(total.get(), "add")), self.denominator(row))
        return alphas

    def _maxima(self, old: list[ir.Value], bounds: list[tuple[ir.Value, ir.Value]]) -> list[ir.Value]:
        """Hide what a query does not see; returns the greatest score of each row so far."""
        maxima = [self.var(self.splat(m)) for m in old]
        steps = ir.Constant(ir.VectorType(I32, self.lanes), list(range(self.lanes)))
        with self._vectors() as token:
            tokens = self.b.add(self.splat(self.b.trunc(token, I32)), steps)
            for q, (low, high) in enumerate(bounds):
                seen = self.b.and_(
                    self.b.icmp_signed(">=", tokens, self.splat(low)), self.b.icmp_signed("<", tokens, self.splat(high))
                )
                scores = self.b.select(seen, self.load(self._score(q, token)), self.splat(NEG_INF))
                self.store(scores, self._score(q, token))
                maxima[q].set(self.larger(scores, maxima[q].get()))
        return [self.fold(greatest.get(), "max") for greatest in maxima]

    def _seen(self, query: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The tokens [low, high) of this task that a query sees by its position."""
        position = self.b.add(self.past, self.b.urem(query, self.number("q_len")))
        window_start = self.b.add(self.b.sub(position, self.number("window")), self.integer(1))
        is_causal = self.b.icmp_signed("!=", self.number("is_causal"), self.integer(0))
        after = self.b.select(is_causal, self.b.add(position, self.integer(1)), self.end)
        low, high = self.greatest(self.begin, window_start), self.least(self.end, after)
        return self.b.trunc(low, I32), self.b.trunc(high, I32)

    def _is_seen(self, bounds: list[tuple[ir.Value, ir.Value]]) -> ir.Value:
        """Return whether some query sees some token of the tile."""
        first, stop = self.b.trunc(self.first, I32), self.b.trunc(self.stop, I32)
        seen = ir.Constant(ir.IntType(1), 0)
        for low, high in bounds:
            begins, ends = self.b.icmp_signed("<", low, stop), self.b.icmp_signed(">", high, first)
            seen = self.b.or_(seen, self.b.and_(begins, ends))
        return seen

    def _add_values(self, query: ir.Value, alphas: list[ir.Value], vectors: range) -> None:
        """acc = acc * alpha + weights @ values, for some of the channels."""
        rows = [self._part_row(self.b.add(query, self.integer(q))) for q in self._rows]
        slots = [[self.item(row, F32, self.integer(i * self.lanes)) for i in vectors] for row in rows]
        acc = [
            [self.var(self.b.fmul(self.load(slot), alpha)) for slot in of_row]
            for of_row, alpha in zip(slots, alphas, strict=True)
        ]
        shift = self.v.shift
        last = self.b.ashr(self.b.sub(self.stop, self.integer(1)), shift)
        with self.loop(self.b.ashr(self.first, shift), self.b.add(last, self.integer(1)), 1) as column:
            start = self.b.shl(column, shift)
            size = self.b.shl(self.integer(1), shift)
            base = self.v.block_at(column)
            stop = self.least(self.stop, self.b.add(start, size))
            with self.loop(self.greatest(self.first, start), stop, 1) as token:
                address = self.at(base, self.b.mul(self.b.sub(token, start), self.v.token))
                weights = [self.splat(self.b.load(self._score(q, token), typ=F32)) for q in self._rows]
                pair = self._pair(self.v, token)
                for j, i in enumerate(vectors):
                    count = min(self.lanes, self.spec.v_dim - i * self.lanes)
                    values = self._paired(self.v_codec.load(self, address, i * self.lanes, count), pair)
                    for q in self._rows:
                        acc[q][j].set(self.fma(weights[q], values, acc[q][j].get()))
        for of_row, sums in zip(slots, acc, strict=True):
            for slot, value in zip(of_row, sums, strict=True):
                self.store(value.get(), slot)
