"""Parts of a decoder layer of a few tokens: RMS norm, products with a weight's rows, barriers between phases.

All threads of a team run the same function and divide each phase's outputs among them; a barrier ends a phase whose
outputs others read. Weights pass by once for up to four tokens, in the type that they are stored in; sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from hf_kvopt.kernels.cpu.jit.codec import CODECS, Codec
from hf_kvopt.kernels.cpu.jit.emitter import F32, I32, I64
from hf_kvopt.kernels.cpu.jit.kernel import VOID, Kernel
from hf_kvopt.kernels.pattern import LOG2E

# OpenMP, by the names of libgomp.
BARRIER, THREAD, TEAM = "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads"
_TOGETHER = 4  # tokens that share the reads of a weight: with a fourth of a vector of outputs they fill one


class Dense(Kernel):
    """A function of a kernel in phases; its second and third argument are the thread and the team's size.

    Args:
        function: an empty function of (arguments, thread, threads, ...).
        lanes: float32 values in a vector register.
        names: of the arguments.
        weights: how weights are stored, a name in codec.CODECS.
        eps: of the norms.
    """

    def __init__(self, function: ir.Function, lanes: int, names: Sequence[str], weights: str, eps: float) -> None:
        super().__init__(function, lanes, names)
        self.thread, self.threads = function.args[1:3]
        self.codec, self.eps = CODECS[weights], eps
        self._products = self.alloca(F32, _TOGETHER * lanes)

    def barrier(self) -> None:
        """Wait for all threads of the team."""
        with self.b.if_then(self.b.icmp_signed(">", self.threads, self.integer(1))):
            self.b.call(external(self.function.module, BARRIER, VOID), [])

    def share(self, count: int) -> tuple[ir.Value, ir.Value]:
        """First and last (exclusive) of `count` things that this thread does."""
        first, stop = (
            self.b.sdiv(self.b.mul(n, self.integer(count)), self.threads)
            for n in (self.thread, self.b.add(self.thread, self.integer(1)))
        )
        return first, stop

    def row(self, base: ir.Value, index: ir.Value, size: int) -> ir.Value:
        """Address of a row of `size` float32 values."""
        return self.item(base, F32, self.b.mul(index, self.integer(size)))

    def index(self, base: ir.Value, i: ir.Value) -> ir.Value:
        """An item of an int64 array."""
        return self.b.load(self.item(base, I64, i), typ=I64)

    def weight_row(self, base: ir.Value, row: ir.Value, size: int) -> ir.Value:
        """Address of a row of `size` weights."""
        return self.at(base, self.b.mul(row, self.integer(size * self.codec.bits // 8)))

    def rms_norm(self, source: ir.Value, codec: Codec, weight: ir.Value, size: int, target: ir.Value) -> None:
        """target = source / rms(source) * weight, of `size` values, the target in float32."""
        total = self.var(self.splat(0.0))
        with self.loop(self.integer(0), self.integer(size), self.lanes) as i:
            x = self._load(codec, source, i)
            total.set(self.fma(x, x, total.get()))
        mean = self.b.fdiv(self.fold(total.get(), "add"), ir.Constant(F32, float(size)))
        root = self.b.call(self._sqrt(), [self.b.fadd(mean, ir.Constant(F32, self.eps))])
        inverse = self.splat(self.b.fdiv(ir.Constant(F32, 1.0), root))
        with self.loop(self.integer(0), self.integer(size), self.lanes) as i:
            x = self.b.fmul(self.b.fmul(self._load(codec, source, i), inverse), self._load(self.codec, weight, i))
            self.store(x, self.item(target, F32, i))

    def blocks(self, count: ir.Value, body: Callable[[list[ir.Value]], None]) -> None:
        """`body` of the numbers of a few tokens at a time, until there were `count`."""
        whole = self.round_down(count, _TOGETHER)
        with self.loop(self.integer(0), whole, _TOGETHER) as first:
            body([self.b.add(first, self.integer(i)) for i in range(_TOGETHER)])
        with self.loop(whole, count, 1) as token:
            body([token])

    def products(self, weight: ir.Value, size: int, xs: Sequence[ir.Value]) -> list[ir.Value]:
        """A vector for each of one or four tokens: products of its `size` values with as many rows from `weight` on."""
        count, row_bytes = len(xs), size * self.codec.bits // 8
        # Few rows at a time, each for several vectors: memory is read in long stretches.
        rows = self.lanes // count if count > 1 else _TOGETHER
        steps = self.lanes // (rows * count)
        while size % (steps * self.lanes):
            steps //= 2
        with self.loop(self.integer(0), self.integer(self.lanes), rows) as first:
            sums = [[self.var(self.splat(0.0)) for _ in range(rows)] for _ in range(steps) for _ in xs]
            base = self.at(weight, self.b.mul(first, self.integer(row_bytes)))
            with self.loop(self.integer(0), self.integer(size), steps * self.lanes) as start:
                for step in range(steps):
                    i = self.b.add(start, self.integer(step * self.lanes))
                    values = [self.load(self.item(x, F32, i)) for x in xs]
                    for row in range(rows):
                        column = self._load(self.codec, self.at(base, self.integer(row * row_bytes)), i)
                        for token, value in enumerate(values):
                            total = sums[step * count + token][row]
                            total.set(self.fma(value, column, total.get()))
            flat = [var.get() for of_token in sums for var in of_token]
            flat += [self.splat(0.0)] * (self.lanes - len(flat))
            folded = self.sums(flat)
            if count == 1:
                folded = self.folded(folded, self.b.fadd, rows)
            for token in range(count):
                address = self.item(self._products, F32, self.b.add(first, self.integer(token * self.lanes)))
                self.store(self.narrow(folded, token * rows, rows), address)
        return [self.load(self.item(self._products, F32, self.integer(token * self.lanes))) for token in range(count)]

    def exp(self, x: ir.Value) -> ir.Value:
        """e^x for x <= 0."""
        return self.exp2(self.b.fmul(x, self.splat(LOG2E)))

    def silu(self, x: ir.Value) -> ir.Value:
        """x / (1 + e^-x)."""
        is_negative = self.b.fcmp_ordered("<", x, self.splat(0.0))
        power = self.exp(self.b.select(is_negative, x, self.b.fneg(x)))
        top = self.b.select(is_negative, self.b.fmul(x, power), x)
        return self.b.fdiv(top, self.b.fadd(self.splat(1.0), power))

    def _load(self, codec: Codec, base: ir.Value, first: ir.Value) -> ir.Value:
        return codec.load(self, self.at(base, self.b.mul(first, self.integer(codec.bits // 8))), 0, self.lanes)

    def _sqrt(self) -> ir.Function:
        return external(self.function.module, "llvm.sqrt.f32", F32, F32)


def external(module: ir.Module, name: str, result: ir.Type, *arguments: ir.Type) -> ir.Function:
    """A function that lies elsewhere."""
    return module.globals.get(name) or ir.Function(module, ir.FunctionType(result, arguments), name)


def team(e: Kernel) -> tuple[ir.Value, ir.Value]:
    """(thread, threads) of the caller as int64; OpenMP may give fewer threads than were asked for."""
    thread, threads = e.var(e.integer(0)), e.var(e.integer(1))
    with e.b.if_then(e.b.icmp_signed(">", e.number("num_threads"), e.integer(1))):
        for var, name in ((thread, THREAD), (threads, TEAM)):
            var.set(e.b.sext(e.b.call(external(e.function.module, name, I32), []), I64))
    return thread.get(), threads.get()
