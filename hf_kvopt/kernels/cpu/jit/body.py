"""Parts that the functions of attention share: its arguments, and where a row's queries and partial sums lie."""

from __future__ import annotations

from llvmlite import ir

from hf_kvopt.kernels.cpu.jit.emitter import F32, I32, I64, NEG_INF
from hf_kvopt.kernels.cpu.jit.kernel import Kernel
from hf_kvopt.kernels.cpu.jit.spec import SealedSpec, Spec, part_items


class Body(Kernel):
    """A function of the kernel."""

    def __init__(self, function: ir.Function, spec: Spec | SealedSpec) -> None:
        super().__init__(function, spec.lanes, spec.arguments)
        self.spec: Spec | SealedSpec = spec
        self.k_vectors, self.v_vectors = (-(-dim // spec.lanes) for dim in (spec.k_dim, spec.v_dim))

    def num_rows(self) -> ir.Value:
        """Queries that share a KV head."""
        return self.b.mul(self.number("group"), self.number("q_len"))

    def num_padded(self) -> ir.Value:
        """`num_rows`, rounded up to what is computed together."""
        return self.number("padded")

    def per_row(self, name: str, row: ir.Value, default: int | None = None) -> ir.Value:
        """An item of an int32 array; `default` where the address may be 0."""
        if default is None:
            return self.b.sext(self.b.load(self.item(self.pointer(name), I32, row), typ=I32), I64)
        value = self.var(self.integer(default))
        with self.b.if_then(self.b.icmp_signed("!=", self.number(name), self.integer(0))):
            value.set(self.per_row(name, row))
        return value.get()

    def column0_of(self, row: ir.Value) -> ir.Value:
        """The token of a row that stands in the first column."""
        return self.b.sub(self.number("skip"), self.per_row("lags", row, 0))

    def part(self, pair: ir.Value, split: ir.Value) -> ir.Value:
        """(acc, m, l) of the rows of a task."""
        index = self.b.add(self.b.mul(pair, self.number("splits")), split)
        items = self.b.mul(self.b.mul(index, self.num_padded()), self.integer(part_items(self.spec)))
        return self.item(self.pointer("parts"), F32, items)

    def part_row(self, part: ir.Value, row: ir.Value) -> ir.Value:
        """(acc, m, l) of one row."""
        return self.item(part, F32, self.b.mul(row, self.integer(part_items(self.spec))))

    def extreme(self, part_row: ir.Value) -> ir.Value:
        """Address of m."""
        return self.item(part_row, F32, self.integer(self.v_vectors * self.lanes))

    def denominator(self, part_row: ir.Value) -> ir.Value:
        """Address of l."""
        return self.item(part_row, F32, self.integer(self.v_vectors * self.lanes + 1))

    def pivot(self, extreme: ir.Value) -> ir.Value:
        """m, or 0 where nothing was seen, so that -inf - pivot is no NaN."""
        is_empty = self.b.fcmp_ordered("==", extreme, ir.Constant(F32, NEG_INF))
        return self.b.select(is_empty, ir.Constant(F32, 0.0), extreme)

    def power(self, exponent: ir.Value) -> ir.Value:
        """2^exponent of a float, in all lanes."""
        return self.exp2(self.splat(exponent))

    def locate(self, row_and_head: tuple[ir.Value, ir.Value], name: str, query: ir.Value) -> ir.Value:
        """Items or bytes from the start of q, mask or sinks to a query, r = head in group * q_len + token."""
        row, kv_head = row_and_head
        q_len = self.number("q_len")
        head = self.b.add(self.b.mul(kv_head, self.number("group")), self.b.udiv(query, q_len))
        parts = ((row, "batch"), (head, "head"), (self.b.urem(query, q_len), "token"))
        offset = self.integer(0)
        for index, axis in parts:
            offset = self.b.add(offset, self.b.mul(index, self.number(f"{name}_{axis}")))
        return offset
