"""Emits attention of rows to the tokens that they have in common, read once for all of them (cascade attention).

A task is one KV head, CHUNK of the tokens that a run of rows shares, and `piece` of these rows, which are hidden the
same tokens of before a first one. It leaves what a task
of each row alone would leave of these tokens, (acc, m, l) of each query in the row's own part, to the last bit: tiles,
their order and the steps on them are those of `Worker`. The rows' own tasks then go on from there. Hydragen: Juravsky
et al., 2024.
"""

from __future__ import annotations

from llvmlite import ir

from hf_kvopt.kernels.cpu.jit.block_reader import BlockReader
from hf_kvopt.kernels.cpu.jit.emitter import F32, I32, I64, PTR
from hf_kvopt.kernels.cpu.jit.kernel import module_of
from hf_kvopt.kernels.cpu.jit.spec import BOOL_MASK, CHUNK, TILE, Spec, part_items
from hf_kvopt.kernels.cpu.jit.wide_tile import WideTile, widened
from hf_kvopt.kernels.cpu.jit.worker import Worker


def emit(spec: Spec) -> ir.Module:
    """A module with one function `run(arguments)`."""
    return module_of(lambda function: SharedWorker(function, spec).emit(), spec.lanes, spec.arguments)


class SharedWorker(Worker):
    """Takes tasks until none is left, each of several rows; by its position, every query sees all tokens of a task."""

    spec: Spec

    def emit(self) -> None:
        # An address for each query.
        self.parts, self.masks = (self.allocate(self.b.mul(self._most_queries(), self.integer(8))) for _ in range(2))
        self.spare = self.alloca(F32, part_items(self.spec))  # for queries that fill up what is computed together
        self.k_stored, self.v_stored = self.k_codec, self.v_codec
        self.k_room, self.v_room = (
            self.alloca(F32, TILE * vectors * self.lanes) if codec.num_scales else None
            for vectors, codec in ((self.k_vectors, self.k_codec), (self.v_vectors, self.v_codec))
        )
        self.k_codec, self.v_codec = widened(self.k_codec), widened(self.v_codec)
        super().emit()

    def _open(self, row: ir.Value, kv_head: ir.Value) -> None:
        self.k = BlockReader(self, "k", self.k_stored, row, kv_head)
        self.v = BlockReader(self, "v", self.v_stored, row, kv_head)
        # Codes are widened once a tile: 8 rows of 4 heads read int4 in 0.65x, fp8_e4m3 in 0.8x of the time.
        if self.k_room is not None:
            self.k = WideTile(self.k, self.k_room, self.k_vectors, self.spec.k_dim)
        if self.v_room is not None:
            self.v = WideTile(self.v, self.v_room, self.v_vectors, self.spec.v_dim)

    def _load_scales(self) -> None:
        super()._load_scales()
        for plane in (self.k, self.v):
            if isinstance(plane, WideTile):
                plane.fill(self.tile, self.stop)

    def _task(self, task: ir.Value) -> None:
        splits, num_kv_heads, run = (self.number(name) for name in ("shared_splits", "num_kv_heads", "run"))
        self.split, rest = self.b.urem(task, splits), self.b.udiv(task, splits)
        self.kv_head, piece = self.b.urem(rest, num_kv_heads), self.b.udiv(rest, num_kv_heads)
        size = self.number("piece")
        pieces = self._parts_of(run, size)
        number, piece = self.b.udiv(piece, pieces), self.b.urem(piece, pieces)
        first = self.b.mul(piece, size)
        self.row = self.b.add(self.b.mul(number, run), first)
        self.count = self.b.mul(self.least(self.b.sub(run, first), size), self.num_rows())
        tokens = self.b.sext(self.b.load(self.item(self.pointer("shared"), I32, number), typ=I32), I64)
        chunk = self.b.mul(self.split, self.integer(CHUNK))
        start = self.b.add(self.column0_of(self.row), self.per_row("starts", self.row, 0))
        self.begin = self.greatest(start, chunk)
        self.end = self.least(tokens, self.b.add(chunk, self.integer(CHUNK)))
        # Parts are begun wherever a row's own task leaves that out, also where all of these tokens are hidden.
        with self.b.if_then(self.b.icmp_signed("<", chunk, self.end)):
            self._open(self.row, self.kv_head)
            self._prepare()
            self._read()

    def _prepare(self) -> None:
        num_rows, last = self.num_rows(), self.b.sub(self.count, self.integer(1))
        is_bool = self.b.icmp_signed("==", self.number("mask_kind"), self.integer(BOOL_MASK))
        item = self.b.select(is_bool, self.integer(-1), self.integer(-4))
        with self.loop(self.integer(0), self._num_queries(), 1) as query:
            source = self.least(query, last)
            row, own = self.b.add(self.row, self.b.udiv(source, num_rows)), self.b.urem(source, num_rows)
            self._scale(query, (row, self.kv_head), own)
            pair = self.b.add(self.b.mul(row, self.number("num_kv_heads")), self.kv_head)
            part = self.part_row(self.part(pair, self.split), own)
            part = self.b.select(self.b.icmp_signed("<=", query, last), part, self.spare)
            self.b.store(self.b.ptrtoint(part, I64), self.item(self.parts, I64, query))
            self._clear(part)
            mask = self.at(self.pointer("mask"), self.locate((row, self.kv_head), "mask", own))
            mask = self.at(mask, self.b.mul(self.column0_of(row), item))
            self.b.store(self.b.ptrtoint(mask, I64), self.item(self.masks, I64, query))

    def _parts_of(self, count: ir.Value, size: ir.Value) -> ir.Value:
        """The parts of `size` that `count` is cut in, the last one maybe smaller."""
        return self.b.udiv(self.b.add(count, self.b.sub(size, self.integer(1))), size)

    def _padded(self, count: ir.Value) -> ir.Value:
        rows = self.integer(self.spec.rows)
        return self.b.mul(self._parts_of(count, rows), rows)

    def _most_queries(self) -> ir.Value:
        return self._padded(self.b.mul(self.number("piece"), self.num_rows()))

    def _num_queries(self) -> ir.Value:
        return self._padded(self.count)

    def _part_row(self, query: ir.Value) -> ir.Value:
        return self.b.inttoptr(self.b.load(self.item(self.parts, I64, query), typ=I64), PTR)

    def _seen(self, query: ir.Value) -> tuple[ir.Value, ir.Value]:
        return self.b.trunc(self.begin, I32), self.b.trunc(self.end, I32)

    def _mask_row(self, query: ir.Value, item: int) -> ir.Value:
        return self.b.inttoptr(self.b.load(self.item(self.masks, I64, query), typ=I64), PTR)
