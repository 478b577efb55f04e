"""Emits the last phase of a drafting step: logits, the likeliest token of each row, and its probability."""

from __future__ import annotations

from llvmlite import ir

from hf_kvopt.kernels.cpu.jit.emitter import F32, I32, I64, NEG_INF
from hf_kvopt.kernels.cpu.jit.phase import Phase
from hf_kvopt.kernels.cpu.jit.spec import PARTIAL, DraftSpec


class TokenChoice(Phase):
    """choose(..., depth, states): logits, the likeliest tokens, and `is_over` where they are not believed in."""

    def __init__(self, function: ir.Function, spec: DraftSpec) -> None:
        super().__init__(function, spec)
        self.depth, self.states = function.args[3:]
        self.ints = ir.VectorType(I32, spec.lanes)

    def emit(self) -> None:
        """Write the function."""
        hidden, vocab, normed = self.spec.hidden, self.spec.vocab, self.scratch()
        self.normed(self.states, "norm", normed)

        def score(output: ir.Value, rows: list[ir.Value]) -> None:
            weight = self.weight_row(self.pointer("lm_head"), output, hidden)
            for row, x in zip(
                rows, self.products(weight, hidden, [self.row(normed, row, hidden) for row in rows]), strict=True
            ):
                self.store(x, self.item(self._logits(row), F32, output))

        self.outputs(vocab, self.number("num_rows"), score)
        with self.loop(self.integer(0), self.number("num_rows"), 1) as row:
            self._reduce(row)
        self.barrier()
        with self.b.if_then(self.b.icmp_signed("==", self.thread, self.integer(0))):
            self._merge()
        self.barrier()
        self.b.ret_void()

    def _logits(self, row: ir.Value) -> ir.Value:
        return self.row(self.pointer("logits"), row, self.spec.vocab)

    def _partial(self, thread: ir.Value, row: ir.Value) -> list[ir.Value]:
        """Addresses of the greatest, its token and the sum of a thread's share of a row."""
        index = self.b.add(self.b.mul(thread, self.number("num_rows")), row)
        base = self.row(self.pointer("partials"), index, PARTIAL)
        return [self.item(base, F32, self.integer(i)) for i in range(3)]

    def _reduce(self, row: ir.Value) -> None:
        """The greatest logit of this thread's share, the first token that has it, and the sum of exp(logit - it)."""
        logits = self._logits(row)
        first, stop = (self.b.mul(x, self.integer(self.lanes)) for x in self.share(self.spec.vocab // self.lanes))
        steps = ir.Constant(self.ints, list(range(self.lanes)))
        greatest, where = self.var(self.splat(NEG_INF)), self.var(ir.Constant(self.ints, None))
        with self.loop(first, stop, self.lanes) as token:
            x = self.load(self.item(logits, F32, token))
            is_greater = self.b.fcmp_ordered(">", x, greatest.get())
            tokens = self.b.add(self.splat(self.b.trunc(token, I32)), steps)
            where.set(self.b.select(is_greater, tokens, where.get()))
            greatest.set(self.b.select(is_greater, x, greatest.get()))
        most = self.splat(self.fold(greatest.get(), "max"))
        total = self.var(self.splat(0.0))
        with self.loop(first, stop, self.lanes) as token:
            x = self.load(self.item(logits, F32, token))
            total.set(self.b.fadd(total.get(), self.exp(self.b.fsub(x, most))))
        # Of the lanes that have it, the one with the least token.
        none = ir.Constant(self.ints, [(1 << 31) - 1] * self.lanes)
        tied = self.b.select(self.b.fcmp_ordered("==", greatest.get(), most), where.get(), none)
        least = self.folded(tied, lambda a, b: self.b.select(self.b.icmp_signed("<", a, b), a, b))
        extreme, token_at, sum_at = self._partial(self.thread, row)
        self.b.store(self.lane0(most), extreme)
        self.b.store(self.lane0(least), token_at)
        self.b.store(self.fold(total.get(), "add"), sum_at)

    def _merge(self) -> None:
        """Choose the first token of the greatest logit of each row, and note what the drafter believes of the chain."""
        belief, rows = self.var(ir.Constant(F32, 0.0)), self.number("num_rows")
        with self.loop(self.integer(0), rows, 1) as row:
            greatest, token = self.var(ir.Constant(F32, NEG_INF)), self.var(ir.Constant(I32, 0))
            with self.loop(self.integer(0), self.threads, 1) as thread:
                extreme, token_at, _ = self._partial(thread, row)
                value = self.b.load(extreme, typ=F32)
                with self.b.if_then(self.b.fcmp_ordered(">", value, greatest.get())):
                    greatest.set(value)
                    token.set(self.b.load(token_at, typ=I32))
            total = self.var(ir.Constant(F32, 0.0))
            with self.loop(self.integer(0), self.threads, 1) as thread:
                extreme, _, sum_at = self._partial(thread, row)
                weight = self.exp(self.splat(self.b.fsub(self.b.load(extreme, typ=F32), greatest.get())))
                part = self.b.fmul(self.b.load(sum_at, typ=F32), self.lane0(weight))
                total.set(self.b.fadd(total.get(), part))
            joint = self.item(self.pointer("joint"), F32, row)
            likely = self.b.fdiv(self.b.load(joint, typ=F32), total.get())
            self.b.store(likely, joint)
            belief.set(self.b.fadd(belief.get(), likely))
            place = self.b.add(self.b.mul(self.depth, rows), row)
            self.b.store(self._to_target(token.get()), self.item(self.pointer("tokens"), I64, place))
        wanted = self.b.fmul(self.real("limit"), self.b.sitofp(rows, F32))
        # NaN ends the chain as well.
        with self.b.if_else(self.b.fcmp_ordered(">=", belief.get(), wanted)) as (goes_on, ends):
            with goes_on:
                self.b.store(self.b.add(self.depth, self.integer(1)), self.argument("made"))
            with ends:
                self.b.store(self.integer(1), self.argument("is_over"))

    def _to_target(self, token: ir.Value) -> ir.Value:
        found = self.var(self.b.sext(token, I64))
        with self.b.if_then(self.b.icmp_signed("!=", self.number("d2t"), self.integer(0))):
            found.set(self.b.add(found.get(), self.index(self.pointer("d2t"), found.get())))
        return found.get()
