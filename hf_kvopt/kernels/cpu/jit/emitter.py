"""LLVM IR by hand: loops, vectors of float32, and the few functions that attention needs of them.

A vector has as many lanes as a register of the machine, so that what is written here is what runs: which values stay
in registers is decided where a kernel is emitted, not by a vectorizer. There are no fast-math flags; NaN and infinity
mean what they mean in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from llvmlite import ir

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
PTR = ir.PointerType()
NEG_INF = float("-inf")

# Cephes' exp2f: (2^f - 1) / f for |f| <= 1/2, highest power first; 2^f to 1 ulp.
_EXP2 = (
    1.535336188319500e-4, 1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2, 2.402264791363012e-1,
    6.931472028550421e-1,
)  # fmt: skip
# Eigen's rational tanh: x P(x^2) / Q(x^2), a few ulp over all of float32; it is 1 to rounding beyond the bound.
_TANH_P = (
    -2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08, 1.48572235717979e-05,
    6.37261928875436e-04, 4.89352455891786e-03,
)  # fmt: skip
_TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
_TANH_BOUND = 7.90531110763549805


class Var:
    """A mutable value; LLVM keeps it in a register."""

    def __init__(self, emitter: Emitter, value: ir.Value) -> None:
        self.emitter = emitter
        self.type = value.type
        self.slot = emitter.alloca(value.type)
        self.set(value)

    def get(self) -> ir.Value:
        """The value now."""
        return self.emitter.b.load(self.slot, typ=self.type)

    def set(self, value: ir.Value) -> None:
        """Change it."""
        self.emitter.b.store(value, self.slot)


class Emitter:
    """Writes the body of one function.

    Args:
        function: an empty function.
        lanes: float32 values in a vector register.
    """

    def __init__(self, function: ir.Function, lanes: int) -> None:
        self.function, self.lanes = function, lanes
        self.vec = ir.VectorType(F32, lanes)
        self._allocas = ir.IRBuilder(function.append_basic_block("allocas"))
        start = function.append_basic_block("start")
        self._end_of_allocas = self._allocas.branch(start)
        self._allocas.position_before(self._end_of_allocas)
        self.b = ir.IRBuilder(start)

    def integer(self, value: int) -> ir.Value:
        """An int64 constant."""
        return ir.Constant(I64, value)

    def alloca(self, kind: ir.Type, count: int = 1) -> ir.Value:
        """Stack memory of a constant size, aligned for vectors."""
        return self._opaque(self._allocas.alloca(kind, ir.Constant(I32, count)), is_array=count > 1)

    def allocate(self, num_bytes: ir.Value) -> ir.Value:
        """Stack memory of a size that is known at run time, until the function returns."""
        return self._opaque(self.b.alloca(I8, num_bytes), is_array=True)

    @staticmethod
    def _opaque(slot: ir.Value, is_array: bool) -> ir.Value:
        slot.type = PTR  # the builder gives it a pointer type of old, which LLVM no longer knows
        if is_array:
            slot.align = 64
        return slot

    def var(self, value: ir.Value) -> Var:
        """A mutable value."""
        return Var(self, value)

    @contextmanager
    def loop(self, first: ir.Value, stop: ir.Value, step: int) -> Iterator[ir.Value]:
        """`for i in range(first, stop, step)`."""
        counter = self.var(first)
        head, body, after = (self.function.append_basic_block(name) for name in ("head", "body", "after"))
        self.b.branch(head)
        self.b.position_at_end(head)
        i = counter.get()
        self.b.cbranch(self.b.icmp_signed("<", i, stop), body, after)
        self.b.position_at_end(body)
        yield i
        counter.set(self.b.add(i, self.integer(step)))
        self.b.branch(head)
        self.b.position_at_end(after)

    def at(self, base: ir.Value, num_bytes: ir.Value) -> ir.Value:
        """base + num_bytes."""
        return self.b.gep(base, [num_bytes], source_etype=I8)

    def item(self, base: ir.Value, kind: ir.Type, index: ir.Value) -> ir.Value:
        """The address of an item of an array."""
        return self.b.gep(base, [index], source_etype=kind)

    def least(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """min(a, b) of signed integers."""
        return self.b.select(self.b.icmp_signed("<", a, b), a, b)

    def greatest(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """max(a, b) of signed integers."""
        return self.b.select(self.b.icmp_signed(">", a, b), a, b)

    def round_down(self, value: ir.Value, multiple: int) -> ir.Value:
        """The greatest multiple (a power of two) up to `value`."""
        return self.b.and_(value, self.integer(-multiple))

    def splat(self, value: ir.Value | float) -> ir.Value:
        """A vector of one value."""
        if not isinstance(value, ir.Value):
            return ir.Constant(self.vec, [value] * self.lanes)
        kind = ir.VectorType(value.type, self.lanes)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
        return self.shuffle(one, one, [0] * self.lanes)

    def shuffle(self, a: ir.Value, b: ir.Value, lanes: Sequence[int]) -> ir.Value:
        """The lanes named, of a and b after one another."""
        return self.b.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))

    def load(self, address: ir.Value, kind: ir.Type = F32, count: int | None = None) -> ir.Value:
        """A vector of `count` items (all lanes if None) from memory of any alignment."""
        vector = ir.VectorType(kind, self.lanes if count is None else count)
        return self.b.load(address, typ=vector, align=1)

    def store(self, value: ir.Value, address: ir.Value) -> None:
        """Store a vector or a float to memory of any alignment."""
        self.b.store(value, address, align=1)

    def widen(self, vector: ir.Value) -> ir.Value:
        """A shorter vector, filled up with zeros."""
        count = vector.type.count
        if count == self.lanes:
            return vector
        return self.shuffle(vector, ir.Constant(vector.type, None), [min(i, count) for i in range(self.lanes)])

    def narrow(self, vector: ir.Value, first: int, count: int) -> ir.Value:
        """`count` lanes of a vector."""
        return self.shuffle(vector, vector, range(first, first + count)) if count < vector.type.count else vector

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a * b + c, in one rounding where the machine can."""
        name = f"llvm.fmuladd.v{self.lanes}f32"
        module = self.function.module
        op = module.globals.get(name) or ir.Function(module, ir.FunctionType(self.vec, [self.vec] * 3), name)
        return self.b.call(op, [a, b, c])

    def polynomial(self, x: ir.Value, coefficients: Sequence[float]) -> ir.Value:
        """Horner's rule, highest power first."""
        value = self.splat(coefficients[0])
        for coefficient in coefficients[1:]:
            value = self.fma(value, x, self.splat(coefficient))
        return value

    def larger(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """max of each lane; b where either is NaN."""
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def rounded(self, x: ir.Value) -> ir.Value:
        """The nearest integer, ties to even; right below 2^22."""
        magic = self.splat(12582912.0)  # 1.5 * 2^23: leaves no bit for the fraction
        return self.b.fsub(self.b.fadd(x, magic), magic)

    def exp2(self, x: ir.Value) -> ir.Value:
        """2^x for x <= 0, to 1 ulp; 0 below the normal floats, NaN for NaN."""
        is_tiny = self.b.fcmp_ordered("<", x, self.splat(-126.0))
        x = self.b.select(is_tiny, self.splat(-126.0), x)
        # Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits; 127 more is the float's exponent.
        magic = self.splat(12582912.0 + 127.0)
        shifted = self.b.fadd(x, magic)
        fraction = self.b.fsub(x, self.b.fsub(shifted, magic))
        ints = ir.VectorType(I32, self.lanes)
        power = self.b.shl(self.b.bitcast(shifted, ints), ir.Constant(ints, [23] * self.lanes))
        mantissa = self.fma(self.polynomial(fraction, _EXP2), fraction, self.splat(1.0))
        value = self.b.fmul(mantissa, self.b.bitcast(power, self.vec))
        return self.b.select(is_tiny, self.splat(0.0), value)

    def tanh(self, x: ir.Value) -> ir.Value:
        """tanh to a few ulp; NaN for NaN."""
        for sign, bound in (("<", -_TANH_BOUND), (">", _TANH_BOUND)):
            x = self.b.select(self.b.fcmp_ordered(sign, x, self.splat(bound)), self.splat(bound), x)
        square = self.b.fmul(x, x)
        top = self.b.fmul(x, self.polynomial(square, _TANH_P))
        return self.b.fdiv(top, self.polynomial(square, _TANH_Q))

    def fold(self, vector: ir.Value, op: str) -> ir.Value:
        """The sum ("add") or the greatest ("max") of all lanes, as a float."""
        return self.lane0(self.folded(vector, self.b.fadd if op == "add" else self.larger))

    def folded(self, vector: ir.Value, op: Callable[[ir.Value, ir.Value], ir.Value], period: int = 1) -> ir.Value:
        """Return what `op` makes of every `period`-th lane, in each of these lanes."""
        distance = self.lanes // 2
        while distance >= period:
            vector = op(vector, self.shuffle(vector, vector, [lane ^ distance for lane in range(self.lanes)]))
            distance //= 2
        return vector

    def lane0(self, vector: ir.Value) -> ir.Value:
        """Lane 0."""
        return self.b.extract_element(vector, ir.Constant(I32, 0))

    def sums(self, vectors: Sequence[ir.Value]) -> ir.Value:
        """A vector whose lane i is the sum of the lanes of vector i; takes as many vectors as there are lanes.

        Half as many vectors a step: a and b become [a low, b low] + [a high, b high], at ever smaller halves.
        """
        parts = list(vectors)
        size = self.lanes
        while len(parts) > 1:
            pairs = zip(parts[: len(parts) // 2], parts[len(parts) // 2 :], strict=True)
            low = [
                group + part + source * self.lanes
                for group in range(0, self.lanes, size)
                for source in (0, 1)
                for part in range(size // 2)
            ]
            high = [lane + size // 2 for lane in low]
            parts = [self.b.fadd(self.shuffle(a, b, low), self.shuffle(a, b, high)) for a, b in pairs]
            size //= 2
        return parts[0]
