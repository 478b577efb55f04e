"""Emits attention of a few queries over sealed and exact blocks in one pass; quant/sealed_formats.py has the codes.

    sealed tiles    s * (code . q H  -  middle * sum(q H))  +  m . q H          m . q H once a block and query
                    acc += (p * s) code  -  middle * sum(p * s)                 in the rotated space
    then            acc = acc H, and the exact tiles, with q as it came: the order of tiles is free

A query at position p reads block b sealed where 0 < b < p // block_size - 1. Tiles lie within a block; near the border
one is visited twice, for the queries that read it sealed and for the others.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from llvmlite import ir

from hf_kvopt.kernels.cpu.jit.attention import emit_finish, emit_run
from hf_kvopt.kernels.cpu.jit.emitter import F32, I32, I64, PTR
from hf_kvopt.kernels.cpu.jit.kernel import VOID
from hf_kvopt.kernels.cpu.jit.spec import TILE, SealedSpec
from hf_kvopt.kernels.cpu.jit.stored import Stored, by_group, load_codes, rotated
from hf_kvopt.kernels.cpu.jit.tiles import Tiles, exact_reader
from hf_kvopt.kernels.cpu.jit.worker import Worker

Bounds = list[tuple[ir.Value, ir.Value]]


def emit(spec: SealedSpec) -> ir.Module:
    """A module with one function `run(arguments)`."""
    module = ir.Module("hf_kvopt")
    finish, work = (
        ir.Function(module, ir.FunctionType(VOID, [PTR, *more]), name)
        for name, more in (("finish", [I64]), ("work", []))
    )
    finish.linkage = work.linkage = "internal"
    emit_finish(finish, spec)
    SealedWorker(work, spec, finish).emit()
    emit_run(ir.Function(module, ir.FunctionType(VOID, [PTR]), "run"), work, finish, spec)
    return module


class SealedWorker(Worker):
    """Takes tasks until none is left, each in sealed tiles first."""

    spec: SealedSpec

    def __init__(self, function: ir.Function, spec: SealedSpec, finish: ir.Function) -> None:
        super().__init__(function, spec, finish)
        assert spec.k.num_groups(spec.k_dim) == 1
        groups = spec.v.num_groups(spec.v_dim)
        self.tile_size = min(TILE, spec.block_size)
        self.exact_codecs = self.k_codec, self.v_codec
        self.weights = [self.alloca(F32, spec.rows * TILE) for _ in range(groups)]
        self.v_scales = [self.alloca(F32, TILE) for _ in range(groups)]

    def emit(self) -> None:
        num_items = self.b.mul(self.num_padded(), self.integer(self.k_vectors * self.lanes * 4))
        self.turned = self.allocate(num_items)  # queries as codes are multiplied with
        self.offsets_of_queries = self.allocate(self.b.mul(self.num_padded(), self.integer(4)))  # - middle * sum
        super().emit()

    def _open(self, row: ir.Value, kv_head: ir.Value) -> None:
        self.table = self.item(self.pointer("table"), I32, self.b.mul(row, self.number("table_row")))
        self.sealed_k = Stored(self, "k", self.spec.k, self.spec.k_dim, kv_head)
        self.sealed_v = Stored(self, "v", self.spec.v, self.spec.v_dim, kv_head)
        self.k, self.v = (
            exact_reader(self, name, codec, row, kv_head) for name, codec in zip("kv", self.exact_codecs, strict=True)
        )

    def _read(self) -> None:
        size = self.spec.block_size
        # The row's first block is exact; it is the table's first one unless that is behind a window already.
        self.opening = self.b.select(
            self.b.icmp_signed("==", self.number("first_block"), self.integer(0)), self.integer(size), self.integer(0)
        )
        last = self.b.sub(self.number("q_len"), self.integer(1))
        # No query stands further behind the first one than its number.
        lowest, highest = (self._border(token) for token in (self.integer(0), last))
        start, stop = self.greatest(self.begin, self.opening), self.least(self.end, highest)
        with self._tiles(start, stop) as tile:
            self._sealed_tile(tile)
        if self.spec.v.rotates:
            with self.b.if_then(self.b.icmp_signed("<", start, stop)):
                self._turn_sums()
        with self._tiles(self.begin, self.least(self.end, self.opening)):
            self._exact_tile(is_opening=True)
        with self._tiles(self.greatest(self.greatest(self.begin, lowest), self.opening), self.end):
            self._exact_tile(is_opening=False)

    def _border(self, token: ir.Value) -> ir.Value:
        """The first of the row's newest tokens, which a query `token` positions behind the step's first reads exact."""
        size = self.spec.block_size
        border = self.b.sub(self.round_down(self.b.add(self.past, token), size), self.integer(size))
        return self.greatest(border, self.opening)

    def _depth(self, token: ir.Value) -> ir.Value:
        """By how much the position of the step's query number `token` is behind that of the first one."""
        depth = self.var(token)
        with self.b.if_then(self.b.icmp_signed("!=", self.number("depths"), self.integer(0))):
            stored = self.b.load(self.item(self.pointer("depths"), I32, token), typ=I32)
            depth.set(self.b.sext(stored, I64))
        return depth.get()

    def _tiles(self, begin: ir.Value, end: ir.Value) -> Tiles:
        """A loop over tiles between two tokens; sets what `Worker` reads of a tile."""
        return Tiles(self, begin, end)

    def _groups_of_queries(self) -> AbstractContextManager[ir.Value]:
        """A loop over the queries that are computed together."""
        return self.loop(self.integer(0), self.num_padded(), self.spec.rows)

    def _exact_tile(self, *, is_opening: bool) -> None:
        with self._groups_of_queries() as query:
            bounds = []
            for q in self._rows:
                each = self.b.add(query, self.integer(q))
                low, high = self._seen(each)
                if is_opening:
                    high = self._lower(high, self.opening)
                else:
                    low = self._higher(low, self._border_of(each))
                bounds.append((low, high))
            with self.b.if_then(self._is_seen(bounds)):
                self._tile(query, bounds)

    def _sealed_tile(self, tile: ir.Value) -> None:
        shift = self.number("block_shift")
        column = self.b.ashr(tile, shift)
        block = self.b.sext(self.b.load(self.item(self.table, I32, column), typ=I32), I64)
        self.sealed_k.enter(block)
        self.sealed_v.enter(block)
        self.offset = self.b.sub(tile, self.b.shl(column, shift))  # of the tile in its block
        self._load_scales()
        with self._groups_of_queries() as query:
            bounds = []
            for q in self._rows:
                each = self.b.add(query, self.integer(q))
                low, high = self._seen(each)
                bounds.append((self._higher(low, self.opening), self._lower(high, self._border_of(each))))
            with self.b.if_then(self._is_seen(bounds)):
                self._read_sealed(query, bounds)

    def _border_of(self, query: ir.Value) -> ir.Value:
        return self._border(self._depth(self.b.urem(query, self.number("q_len"))))

    def _higher(self, low: ir.Value, bound: ir.Value) -> ir.Value:
        return self.greatest(low, self.b.trunc(bound, I32))

    def _lower(self, high: ir.Value, bound: ir.Value) -> ir.Value:
        return self.least(high, self.b.trunc(bound, I32))

    def _prepare(self) -> None:
        super()._prepare()
        with self.loop(self.integer(0), self.num_padded(), 1) as query:
            channels = [self.load(self._query(query, i)) for i in range(self.k_vectors)]
            turned = rotated(self, channels, self.spec.k_dim) if self.spec.k.rotates else channels
            total = self.splat(0.0)
            for i, x in enumerate(turned):
                self.store(x, self._turned(query, i))
                total = self.b.fadd(total, x)
            offset = self.b.fmul(self.fold(total, "add"), ir.Constant(F32, -self.spec.k.middle))
            self.b.store(offset, self.item(self.offsets_of_queries, F32, query))

    def _turned(self, query: ir.Value, i: int) -> ir.Value:
        items = self.b.mul(query, self.integer(self.k_vectors * self.lanes))
        return self.item(self.turned, F32, self.b.add(items, self.integer(i * self.lanes)))

    def _turn_sums(self) -> None:
        """Bring the sums of sealed values back from the rotated space."""
        with self.loop(self.integer(0), self.num_padded(), 1) as query:
            row = self._part_row(query)
            slots = [self.item(row, F32, self.integer(i * self.lanes)) for i in range(self.v_vectors)]
            for slot, x in zip(slots, rotated(self, [self.load(s) for s in slots], self.spec.v_dim), strict=True):
                self.store(x, slot)

    def _in_block(self, token: ir.Value) -> ir.Value:
        """Offset in the block of a token of the tile."""
        return self.b.add(self.b.sub(token, self.tile), self.offset)

    def _in_tile(self, array: ir.Value, token: ir.Value) -> ir.Value:
        return self.item(array, F32, self.b.sub(token, self.tile))

    def _load_scales(self) -> None:
        """s of the tile's values, for all queries."""
        with self._vectors() as token:
            for s, array in zip(self.sealed_v.scales(self._in_block(token)), self.v_scales, strict=True):
                self.store(s, self._in_tile(array, token))

    def _read_sealed(self, query: ir.Value, bounds: Bounds) -> None:
        """One step of `rows` queries over one sealed tile."""
        with self.loop(self.round_down(self.first, self.unit), self.stop, self.unit) as token:
            self._sealed_products(query, token)
        shared = [self._shared_score(self.b.add(query, self.integer(q))) for q in self._rows]
        with self._vectors() as token:
            (s,) = self.sealed_k.scales(self._in_block(token))
            for q in self._rows:
                each = self.b.add(query, self.integer(q))
                offset = self.splat(self.b.load(self.item(self.offsets_of_queries, F32, each), typ=F32))
                score = self.b.fadd(self.load(self._score(q, token)), offset)
                self.store(self.fma(score, s, self.splat(shared[q])), self._score(q, token))
        self._cap_and_mask(query)
        alphas, added = self._sealed_softmax(query, bounds)
        for first in range(0, self.v_vectors, self.width):
            self._add_sealed(query, alphas, added, range(first, min(first + self.width, self.v_vectors)))

    def _shared_score(self, query: ir.Value) -> ir.Value:
        """m . q H of the tile's block."""
        total = self.splat(0.0)
        for i in range(self.k_vectors if self.spec.k.centred else 0):
            first = i * self.lanes
            mean = self.sealed_k.mean(first, min(self.lanes, self.spec.k_dim - first))
            total = self.fma(mean, self.load(self._turned(query, i)), total)
        return self.fold(total, "add")

    def _sealed_products(self, query: ir.Value, token: ir.Value) -> None:
        """code . q H of `rows` queries and `unit` tokens."""
        base = self.sealed_k.codes(self._in_block(token))
        keys = [self.at(base, self.b.mul(self.sealed_k.stride, self.integer(t))) for t in range(self.unit)]
        sums = [[self.splat(0.0)] * self.unit for _ in self._rows]
        for i in range(self.k_vectors):
            first = i * self.lanes
            queries = [self.load(self._turned(self.b.add(query, self.integer(q)), i)) for q in self._rows]
            for t, address in enumerate(keys):
                count = min(self.lanes, self.spec.k_dim - first)
                code = load_codes(self, address, self.spec.k, self.spec.k_dim, first, count)
                for q in self._rows:
                    sums[q][t] = self.fma(queries[q], code, sums[q][t])
        flat = [value for row in sums for value in row]
        flat += [self.splat(0.0)] * (-len(flat) % self.lanes)
        for first in range(0, len(flat), self.lanes):
            self._store_scores(self.sums(flat[first : first + self.lanes]), first, token)

    def _sealed_softmax(self, query: ir.Value, bounds: Bounds) -> tuple[list[ir.Value], list[list[ir.Value]]]:
        """Turn scores into weights of the codes of each group.

        Returns:
            By how much each row's sums so far shrink, and - middle * sum(p * s) of each row and group.
        """
        rows = [self._part_row(self.b.add(query, self.integer(q))) for q in self._rows]
        old = [self.b.load(self.extreme(row), typ=F32) for row in rows]
        new = self._maxima(old, bounds)
        pivots = [self.pivot(m) for m in new]
        alphas = [self.power(self.b.fsub(m, pivot)) for m, pivot in zip(old, pivots, strict=True)]
        totals = [self.var(self.splat(0.0)) for _ in rows]
        sums = [[self.var(self.splat(0.0)) for _ in self.weights] for _ in rows]  # p * s
        nothing = self.splat(0.0)
        with self._vectors() as token:
            scales = [self.load(self._in_tile(array, token)) for array in self.v_scales]
            for q, pivot in enumerate(pivots):
                p = self.exp2(self.b.fsub(self.load(self._score(q, token)), self.splat(pivot)))
                totals[q].set(self.b.fadd(totals[q].get(), p))
                is_seen = self.b.fcmp_unordered("!=", p, nothing)  # a token that is NaN is no matter to others
                for s, array, total in zip(scales, self.weights, sums[q], strict=True):
                    weight = self.b.select(is_seen, self.b.fmul(p, s), nothing)
                    total.set(self.b.fadd(total.get(), weight))
                    self.store(weight, self._weight(array, q, token))
        for row, m, alpha, total in zip(rows, new, alphas, totals, strict=True):
            self.b.store(m, self.extreme(row))
            shrunk = self.b.fmul(self.b.load(self.denominator(row), typ=F32), self.lane0(alpha))
            self.b.store(self.b.fadd(shrunk, self.fold(total.get(), "add")), self.denominator(row))
        middle = ir.Constant(F32, -self.spec.v.middle)
        return alphas, [[self.b.fmul(self.fold(total.get(), "add"), middle) for total in row] for row in sums]

    def _weight(self, array: ir.Value, q: int, token: ir.Value) -> ir.Value:
        return self.item(array, F32, self.b.add(self.b.sub(token, self.tile), self.integer(q * TILE)))

    def _add_sealed(self, query: ir.Value, alphas: list[ir.Value], added: list[list[ir.Value]], vectors: range) -> None:
        """acc = acc * alpha - middle * sum(p * s) + weights @ codes, for some of the channels."""
        rows = [self._part_row(self.b.add(query, self.integer(q))) for q in self._rows]
        slots = [[self.item(row, F32, self.integer(i * self.lanes)) for i in vectors] for row in rows]
        acc = [
            [
                self.var(self.fma(self.load(slot), alpha, by_group(self, sums, self.spec.v_dim, i)))
                for slot, i in zip(of_row, vectors, strict=True)
            ]
            for of_row, alpha, sums in zip(slots, alphas, added, strict=True)
        ]
        with self.loop(self.first, self.stop, 1) as token:
            address = self.sealed_v.codes(self._in_block(token))
            weights = [
                [self.b.load(self._weight(array, q, token), typ=F32) for array in self.weights] for q in self._rows
            ]
            for j, i in enumerate(vectors):
                first = i * self.lanes
                count = min(self.lanes, self.spec.v_dim - first)
                code = load_codes(self, address, self.spec.v, self.spec.v_dim, first, count)
                for q in self._rows:
                    acc[q][j].set(self.fma(by_group(self, weights[q], self.spec.v_dim, i), code, acc[q][j].get()))
        for of_row, sums in zip(slots, acc, strict=True):
            for slot, value in zip(of_row, sums, strict=True):
                self.store(value.get(), slot)
