"""Emits attention of a few queries over blocks: out = softmax(softcap(q k^T * scale) + mask) v, block by block.

A task is one KV head of one row and CHUNK of its tokens; threads take tasks as they come free. All queries of the KV
head's group share it. Within a task, for each tile of tokens and each `rows` queries:

    scores    rows x unit products at a time in registers, a key read once for all rows
    softmax   one step of the running maximum m, denominator l and sum acc, in base 2
    acc       rows x channels in registers while the tile's values pass by

Only tokens that some query may see are read of the values; of the keys also the others of a unit of at most 16 tokens,
which lie in the same block. A row's tasks leave (acc, m, l) each and are merged in their order, so that what is
computed depends neither on the number of threads nor on the other rows.
"""

from __future__ import annotations

from llvmlite import ir

from hf_kvopt.kernels.cpu.jit.body import Body
from hf_kvopt.kernels.cpu.jit.emitter import F32, I64, NEG_INF, PTR
from hf_kvopt.kernels.cpu.jit.kernel import VOID
from hf_kvopt.kernels.cpu.jit.spec import SealedSpec, Spec
from hf_kvopt.kernels.cpu.jit.worker import Worker
from hf_kvopt.kernels.pattern import LOG2E


def emit(spec: Spec) -> ir.Module:
    """A module with one function `run(arguments)`."""
    module = ir.Module("hf_kvopt")
    work, finish = define(module, spec)
    emit_run(ir.Function(module, ir.FunctionType(VOID, [PTR]), "run"), work, finish, spec)
    return module


def define(module: ir.Module, spec: Spec) -> tuple[ir.Function, ir.Function]:
    """Functions of the module: work(arguments), for all threads, and finish(arguments, row and KV head) after it."""
    finish, work = (
        ir.Function(module, ir.FunctionType(VOID, [PTR, *more]), name)
        for name, more in (("finish", [I64]), ("work", []))
    )
    finish.linkage = work.linkage = "internal"
    emit_finish(finish, spec)
    Worker(work, spec, finish).emit()
    return work, finish


def emit_run(function: ir.Function, work: ir.Function, finish: ir.Function, spec: Spec | SealedSpec) -> None:
    """Work, then merge."""
    e = Body(function, spec)
    e.share_out(work)
    splits = e.number("splits")
    is_split = e.b.icmp_signed(">", splits, e.integer(1))
    with e.b.if_then(is_split), e.loop(e.integer(0), e.b.udiv(e.number("num_tasks"), splits), 1) as pair:
        e.b.call(finish, [e.arguments, pair])
    e.b.ret_void()


def emit_finish(function: ir.Function, spec: Spec | SealedSpec) -> None:
    """Merge the parts of one row and KV head, let the sinks join the denominator, divide, and write the output."""
    e = Body(function, spec)
    pair, splits, num_kv_heads = function.args[1], e.number("splits"), e.number("num_kv_heads")
    where = e.b.udiv(pair, num_kv_heads), e.b.urem(pair, num_kv_heads)
    with e.loop(e.integer(0), e.num_rows(), 1) as query:
        m = e.var(ir.Constant(F32, NEG_INF))
        sink = e.var(ir.Constant(F32, NEG_INF))
        with e.b.if_then(e.b.icmp_signed("!=", e.number("sinks"), e.integer(0))):
            logit = e.b.load(e.item(e.pointer("sinks"), F32, e.locate(where, "sinks", query)), typ=F32)
            sink.set(e.b.fmul(logit, ir.Constant(F32, LOG2E)))
            m.set(sink.get())
        with e.loop(e.integer(0), splits, 1) as split:
            other = e.b.load(e.extreme(e.part_row(e.part(pair, split), query)), typ=F32)
            m.set(e.larger(other, m.get()))
        pivot = e.pivot(m.get())
        acc = [e.var(e.splat(0.0)) for _ in range(e.v_vectors)]
        total = e.var(e.splat(0.0))
        with e.loop(e.integer(0), splits, 1) as split:
            row = e.part_row(e.part(pair, split), query)
            weight = e.power(e.b.fsub(e.b.load(e.extreme(row), typ=F32), pivot))
            total.set(e.fma(e.splat(e.b.load(e.denominator(row), typ=F32)), weight, total.get()))
            for i, part in enumerate(acc):
                part.set(e.fma(e.load(e.item(row, F32, e.integer(i * e.lanes))), weight, part.get()))
        denominator = e.b.fadd(total.get(), e.power(e.b.fsub(sink.get(), pivot)))
        is_empty = e.b.fcmp_ordered("==", denominator, e.splat(0.0))
        inverse = e.b.select(is_empty, e.splat(0.0), e.b.fdiv(e.splat(1.0), denominator))
        _write(e, where, query, [e.b.fmul(part.get(), inverse) for part in acc])
    e.b.ret_void()


def _write(e: Body, where: tuple[ir.Value, ir.Value], query: ir.Value, values: list[ir.Value]) -> None:
    """Store a query's output, [batch, q_len, num_heads, v_dim] contiguous."""
    row, kv_head = where
    q_len, group = e.number("q_len"), e.number("group")
    token = e.b.add(e.b.mul(row, q_len), e.b.urem(query, q_len))
    head = e.b.add(e.b.mul(kv_head, group), e.b.udiv(query, q_len))
    index = e.b.add(e.b.mul(token, e.b.mul(e.number("num_kv_heads"), group)), head)
    out = e.item(e.pointer("out"), F32, e.b.mul(index, e.integer(e.spec.v_dim)))
    for i, value in enumerate(values):
        count = min(e.lanes, e.spec.v_dim - i * e.lanes)
        e.store(e.narrow(value, 0, count), e.item(out, F32, e.integer(i * e.lanes)))
