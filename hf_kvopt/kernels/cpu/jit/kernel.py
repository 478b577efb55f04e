"""Parts of all compiled kernels: named arguments, and tasks that threads take as they come free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from llvmlite import ir

from hf_kvopt.kernels.cpu.jit.emitter import F32, I32, I64, PTR, Emitter

VOID = ir.VoidType()
# libgomp's entry: (function, its argument, threads, flags); LLVM's and Intel's OpenMP have it as well.
FORK = "GOMP_parallel"


def module_of(emit_work: Callable[[ir.Function], None], lanes: int, names: Sequence[str]) -> ir.Module:
    """A module with one function `run(arguments)`, all of whose threads do what `emit_work` writes into a function."""
    module = ir.Module("hf_kvopt")
    work, run = (ir.Function(module, ir.FunctionType(VOID, [PTR]), name) for name in ("work", "run"))
    work.linkage = "internal"
    emit_work(work)
    e = Kernel(run, lanes, names)
    e.share_out(work)
    e.b.ret_void()
    return module


class Kernel(Emitter):
    """An emitter of a function that is given the kernel's arguments, an int64 each.

    Args:
        function: an empty function whose first argument is the address of the arguments.
        lanes: float32 values in a vector register.
        names: of the arguments: "num_threads" among them, and for `tasks` "next_task" first and "num_tasks".
    """

    def __init__(self, function: ir.Function, lanes: int, names: Sequence[str]) -> None:
        super().__init__(function, lanes)
        self.arguments, self._names = function.args[0], names

    def argument(self, name: str) -> ir.Value:
        """The address of an argument."""
        return self.item(self.arguments, I64, self.integer(self._names.index(name)))

    def number(self, name: str) -> ir.Value:
        """An int64 argument."""
        return self.b.load(self.argument(name), typ=I64)

    def pointer(self, name: str) -> ir.Value:
        """An address."""
        return self.b.inttoptr(self.number(name), PTR)

    def real(self, name: str) -> ir.Value:
        """A float32 argument, handed over as a float64."""
        return self.b.fptrunc(self.b.bitcast(self.number(name), ir.DoubleType()), F32)

    @contextmanager
    def tasks(self) -> Iterator[ir.Value]:
        """Take one task after another until none is left."""
        head, body, after = (self.function.append_basic_block(name) for name in ("next", "task", "done"))
        self.b.branch(head)
        self.b.position_at_end(head)
        task = self.b.atomic_rmw("add", self.arguments, self.integer(1), "monotonic")
        self.b.cbranch(self.b.icmp_signed("<", task, self.number("num_tasks")), body, after)
        self.b.position_at_end(body)
        yield task
        self.b.branch(head)
        self.b.position_at_end(after)

    def share_out(self, work: ir.Function) -> None:
        """Call `work` in the threads of torch's own OpenMP team, or in this one alone."""
        fork = ir.Function(self.function.module, ir.FunctionType(VOID, [PTR, PTR, I32, I32]), FORK)
        with self.b.if_else(self.b.icmp_signed(">", self.number("num_threads"), self.integer(1))) as (many, one):
            with many:
                threads = self.b.trunc(self.number("num_threads"), I32)
                self.b.call(fork, [work, self.arguments, threads, ir.Constant(I32, 0)])
            with one:
                self.b.call(work, [self.arguments])
