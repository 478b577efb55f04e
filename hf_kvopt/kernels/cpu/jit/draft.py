"""Emits drafting with an EAGLE-3 layer: some tokens that the target has read, then a chain, in one call.

    combine  f = W features
    layer    x = [norm(e); norm(f)]    q, k, v = W x    k, v to the pool    attention over the blocks
             h = residual + W attended             states = h + W (silu(gate) * up)
    choose   logits = W norm(states)   the likeliest token of each row, and whether the chain goes on

    run      combine   layer(tokens read)   choose   layer(token chosen)   choose   ...

Phases end at barriers; between them every thread does its share of a phase's outputs, and what is small and needed by
all (norms of a few tokens) is computed by each for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from llvmlite import ir

from hf_kvopt.kernels.cpu.jit.attention import define
from hf_kvopt.kernels.cpu.jit.choose import TokenChoice
from hf_kvopt.kernels.cpu.jit.codec import CODECS
from hf_kvopt.kernels.cpu.jit.coder import stored
from hf_kvopt.kernels.cpu.jit.dense import team
from hf_kvopt.kernels.cpu.jit.emitter import F32, I32, I64, PTR
from hf_kvopt.kernels.cpu.jit.kernel import VOID, Kernel
from hf_kvopt.kernels.cpu.jit.phase import Phase
from hf_kvopt.kernels.cpu.jit.spec import ARGUMENTS, DRAFT_ARGUMENTS, DraftSpec

_LAYER = (PTR, I64, I64, PTR, PTR, PTR, PTR, I64, PTR, I64, PTR)


def emit(spec: DraftSpec) -> ir.Module:
    """A module with one function `run(arguments)`."""
    module = ir.Module("hf_kvopt")
    attend = define(module, spec.attention)
    layer = ir.Function(module, ir.FunctionType(VOID, _LAYER), "layer")
    choose, combine = (
        ir.Function(module, ir.FunctionType(VOID, [PTR, I64, I64, *more]), name)
        for name, more in (("choose", [I64, PTR]), ("combine", []))
    )
    work, run = (ir.Function(module, ir.FunctionType(VOID, [PTR]), name) for name in ("draft", "run"))
    layer.linkage = choose.linkage = combine.linkage = work.linkage = "internal"
    Layer(layer, spec, *attend).emit()
    TokenChoice(choose, spec).emit()
    Combination(combine, spec).emit()
    _emit_work(Kernel(work, spec.lanes, DRAFT_ARGUMENTS), combine, layer, choose)
    e = Kernel(run, spec.lanes, DRAFT_ARGUMENTS)
    e.share_out(work)
    e.b.ret_void()
    return module


def _emit_work(e: Kernel, combine: ir.Function, layer: ir.Function, choose: ir.Function) -> None:
    """Emit what every thread does."""
    thread, threads = team(e)
    first, rows, zero = e.number("num_first"), e.number("num_rows"), e.integer(0)
    with e.b.if_then(e.b.icmp_signed(">", first, zero)):
        features = e.var(e.pointer("features"))
        with e.b.if_then(e.b.icmp_signed("!=", e.number("fc"), zero)):
            e.b.call(combine, [e.arguments, thread, threads])
            features.set(e.pointer("combined"))
        given = [e.pointer(name) for name in ("first_tokens", "first_positions", "first_slots")]
        read = [features.get(), *given, first, e.pointer("last"), zero, e.pointer("states")]
        e.b.call(layer, [e.arguments, thread, threads, *read])
    # `states` stay those behind the last token read, so that another draft can begin there.
    states = e.var(e.pointer("states"))
    with (
        e.loop(zero, e.number("steps"), 1) as depth,
        # After `choose` all threads agree on whether the chain is over.
        e.b.if_then(e.b.icmp_signed("==", e.number("is_over"), zero)),
    ):
        e.b.call(choose, [e.arguments, thread, threads, depth, states.get()])
        more = e.b.icmp_signed("<", e.b.add(depth, e.integer(1)), e.number("steps"))
        goes_on = e.b.and_(more, e.b.icmp_signed("==", e.number("is_over"), zero))
        with e.b.if_then(goes_on):
            offset = e.b.mul(depth, rows)
            given = [e.item(e.pointer(name), I64, offset) for name in ("tokens", "positions", "slots")]
            chain = [states.get(), *given, rows, e.pointer("identity"), e.integer(1), e.pointer("drafted")]
            e.b.call(layer, [e.arguments, thread, threads, *chain])
            states.set(e.pointer("drafted"))
    e.b.ret_void()


class Combination(Phase):
    """combine(...): `combined` of all features."""

    def emit(self) -> None:
        """Write the function."""
        width = self.spec.features

        def combine(output: ir.Value, rows: list[ir.Value]) -> None:
            weight = self.weight_row(self.pointer("fc"), output, width)
            products = self.products(weight, width, [self.row(self.pointer("features"), row, width) for row in rows])
            for row, x in zip(rows, products, strict=True):
                target = self.row(self.pointer("combined"), row, self.spec.hidden)
                self.store(x, self.item(target, F32, output))

        self.outputs(self.spec.hidden, self.number("num_first"), combine)
        self.barrier()
        self.b.ret_void()


class Layer(Phase):
    """layer(..., features, tokens, positions, slots, count, last, grows, target): states of the tokens in `last`.

    `grows` is how many tokens each row has more than at the last call; `target` may be `features`.
    """

    def __init__(self, function: ir.Function, spec: DraftSpec, attend: ir.Function, finish: ir.Function) -> None:
        super().__init__(function, spec)
        self.attend, self.finish = attend, finish
        self.features, self.tokens, self.positions, self.slots, self.count, *others = function.args[3:]
        self.last, self.grows, self.target = others

    def emit(self) -> None:
        """Write the function."""
        self.inputs = self.scratch()
        size = self.b.mul(self.count, self.integer(2 * self.spec.hidden))
        self.head = self.item(self.inputs, F32, size)
        self._begin()
        self._take_in()
        self._project()
        self.barrier()
        self._attend()
        self._add_attended()
        self.barrier()
        self._activate()
        self.barrier()
        self._add_activated()
        self.barrier()
        self.b.ret_void()

    def _begin(self) -> None:
        """Attention's tasks start anew, and rows are longer by what is written now."""
        with self.b.if_then(self.b.icmp_signed("==", self.thread, self.integer(0))):
            self.b.store(self.integer(0), self.pointer("attention"))
            with self.loop(self.integer(0), self.number("num_rows"), 1) as row:
                length = self.item(self.pointer("seq_lens"), I32, row)
                self.b.store(self.b.add(self.b.load(length, typ=I32), self.b.trunc(self.grows, I32)), length)

    def _take_in(self) -> None:
        hidden = self.spec.hidden
        with self.loop(self.integer(0), self.count, 1) as i:
            x = self._input(i)
            token = self.index(self.tokens, i)
            embedding = self.at(self.pointer("embeds"), self.b.mul(token, self.number("embeds_row")))
            self.rms_norm(embedding, CODECS[self.spec.embeds], self.pointer("input_norm"), hidden, x)
            feature, half = self.row(self.features, i, hidden), self.item(x, F32, self.integer(hidden))
            self.rms_norm(feature, CODECS["float32"], self.pointer("hidden_norm"), hidden, half)

    def _input(self, i: ir.Value) -> ir.Value:
        return self.row(self.inputs, i, 2 * self.spec.hidden)

    def _project(self) -> None:
        """Queries of the last tokens, keys and values of all."""
        heads, kv_heads, rows = self.spec.num_heads, self.spec.num_kv_heads, self.number("num_rows")
        with self._heads(0, heads) as head:
            self._head(head, rows, lambda row: self.index(self.last, row))
            with self.loop(self.integer(0), rows, 1) as row:
                index = self.b.add(self.b.mul(row, self.integer(heads)), head)
                target = self.row(self.pointer("queries"), index, self.spec.head_dim)
                position = self.index(self.positions, self.index(self.last, row))
                for i, x in enumerate(self._rotated(row, position)):
                    self.store(x, self.item(target, F32, self.integer(i * self.lanes)))
        for name, first in (("k", heads), ("v", heads + kv_heads)):
            with self._heads(first, kv_heads) as head:
                self._head(head, self.count, lambda i: i)
                with self.loop(self.integer(0), self.count, 1) as i:
                    vectors = self._rotated(i, self.index(self.positions, i)) if name == "k" else self._vectors(i)
                    self._keep(name, vectors, self.b.sub(head, self.integer(first)), self.index(self.slots, i))

    def _heads(self, first: int, count: int) -> AbstractContextManager[ir.Value]:
        """A loop over this thread's heads, of `count` from `first` on."""
        start, stop = (self.b.add(x, self.integer(first)) for x in self.share(count))
        return self.loop(start, stop, 1)

    def _head(self, head: ir.Value, count: ir.Value, of: Callable[[ir.Value], ir.Value]) -> None:
        """One head of `count` tokens, of which `of` tells the input, before rotation."""
        dim, width = self.spec.head_dim, 2 * self.spec.hidden
        with self.loop(self.integer(0), self.integer(dim), self.lanes) as channel:
            row = self.b.add(self.b.mul(head, self.integer(dim)), channel)
            weight = self.weight_row(self.pointer("qkv"), row, width)

            def project(tokens: list[ir.Value], weight: ir.Value = weight, channel: ir.Value = channel) -> None:
                products = self.products(weight, width, [self._input(of(token)) for token in tokens])
                for token, x in zip(tokens, products, strict=True):
                    self.store(x, self.item(self.row(self.head, token, dim), F32, channel))

            self.blocks(count, project)

    def _vectors(self, token: ir.Value) -> list[ir.Value]:
        base = self.row(self.head, token, self.spec.head_dim)
        return [self.load(self.item(base, F32, self.integer(i))) for i in range(0, self.spec.head_dim, self.lanes)]

    def _rotated(self, token: ir.Value, position: ir.Value) -> list[ir.Value]:
        """Halves against each other; the signs are in the sines."""
        x, count = self._vectors(token), self.spec.head_dim // self.lanes
        table = self.row(self.pointer("rotations"), position, 2 * self.spec.head_dim)
        cos, sin = (
            [self.load(self.item(table, F32, self.integer((first + i) * self.lanes))) for i in range(count)]
            for first in (0, count)
        )
        return [self.fma(x[(i + count // 2) % count], sin[i], self.b.fmul(x[i], cos[i])) for i in range(count)]

    def _keep(self, name: str, vectors: list[ir.Value], head: ir.Value, slot: ir.Value) -> None:
        block = self.b.ashr(slot, self.number("block_shift"))
        offset = self.b.sub(slot, self.b.shl(block, self.number("block_shift")))
        address = self.pointer(name)
        for index, stride in ((block, "block"), (offset, "token"), (head, "head")):
            address = self.at(address, self.b.mul(index, self.number(f"{name}_{stride}")))
        size = CODECS[self.spec.store].bits // 8
        for i, x in enumerate(vectors):
            self.store(stored(self, x, self.spec.store), self.at(address, self.integer(i * self.lanes * size)))

    def _attend(self) -> None:
        attention = self.pointer("attention")
        self.b.call(self.attend, [attention])
        self.barrier()
        splits, tasks = (
            self.b.load(self.item(attention, I64, self.integer(ARGUMENTS.index(name))), typ=I64)
            for name in ("splits", "num_tasks")
        )
        with self.b.if_then(self.b.icmp_signed(">", splits, self.integer(1))):
            is_first = self.b.icmp_signed("==", self.thread, self.integer(0))
            with self.b.if_then(is_first), self.loop(self.integer(0), self.b.udiv(tasks, splits), 1) as pair:
                self.b.call(self.finish, [attention, pair])
            self.barrier()

    def _add_attended(self) -> None:
        hidden, width = self.spec.hidden, self.spec.num_heads * self.spec.head_dim

        def add(output: ir.Value, rows: list[ir.Value]) -> None:
            weight = self.weight_row(self.pointer("o"), output, width)
            products = self.products(weight, width, [self.row(self.pointer("attended"), row, width) for row in rows])
            for row, x in zip(rows, products, strict=True):
                entry = self.index(self.last, row)
                if self.spec.is_normed_residual:
                    residual = self.item(self._input(entry), F32, self.integer(hidden))
                else:
                    residual = self.row(self.features, entry, hidden)
                total = self.b.fadd(x, self.load(self.item(residual, F32, output)))
                self.store(total, self.item(self.row(self.pointer("middle"), row, hidden), F32, output))

        self.outputs(hidden, self.number("num_rows"), add)

    def _activate(self) -> None:
        hidden, inner, normed = self.spec.hidden, self.spec.inner, self.inputs
        self.normed(self.pointer("middle"), "post_norm", normed)

        def activate(output: ir.Value, rows: list[ir.Value]) -> None:
            xs = [self.row(normed, row, hidden) for row in rows]
            weight = self.weight_row(self.pointer("gate_up"), output, hidden)
            gates = self.products(weight, hidden, xs)
            ups = self.products(self.weight_row(weight, self.integer(inner), hidden), hidden, xs)
            for row, gate, up in zip(rows, gates, ups, strict=True):
                target = self.row(self.pointer("activated"), row, inner)
                self.store(self.b.fmul(self.silu(gate), up), self.item(target, F32, output))

        self.outputs(inner, self.number("num_rows"), activate)

    def _add_activated(self) -> None:
        hidden, inner = self.spec.hidden, self.spec.inner

        def add(output: ir.Value, rows: list[ir.Value]) -> None:
            weight = self.weight_row(self.pointer("down"), output, inner)
            products = self.products(weight, inner, [self.row(self.pointer("activated"), row, inner) for row in rows])
            for row, x in zip(rows, products, strict=True):
                residual = self.load(self.item(self.row(self.pointer("middle"), row, hidden), F32, output))
                target = self.item(self.row(self.target, row, hidden), F32, output)
                self.store(self.b.fadd(x, residual), target)

        self.outputs(hidden, self.number("num_rows"), add)
