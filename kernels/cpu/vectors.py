"""Vector arithmetic in TIR: what the kernels' functions are written with, for any width of vector register.

The methods are called while a function is being parsed. They return expressions, and emit statements before the one
they are called in where a value is needed more than once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from shiftadd3d.kernels.runtime.targets import CpuTarget

#: Rows beyond the last one that `Vectors.product` may ask for and write to: tiles are done whole.
ROW_PADDING = 8

# A tile of the product keeps 12 accumulators in registers (of 16 or 32), whatever its width: rows for 1, 2, 3 vectors.
_TILE_ROWS = {1: 8, 2: 6, 3: 4}
ACCUMULATORS = 12


class Vectors:
    """Float32 vectors of one target.

    Args:
        target: whose registers and instructions to use.
        lanes: floats in a vector; as many as a register holds, or fewer.
    """

    def __init__(self, target: CpuTarget, lanes: int | None = None) -> None:
        import tvm.script

        self._T: Any = tvm.script.tirx
        self.lanes = lanes or target.lanes
        self._has_fma = target.has_fma
        self._floats, self._integers = f"float32x{self.lanes}", f"int32x{self.lanes}"

    def padded(self, count: int) -> int:
        """`count` floats rounded up to whole vectors."""
        return -(-count // self.lanes) * self.lanes

    def at(self, start: Any) -> Any:
        """The index of the vector that begins at `start`."""
        return self._T.ramp(start, 1, self.lanes)

    def splat(self, x: Any) -> Any:
        """`x`, a number or a float32 expression, in every lane."""
        return self._T.broadcast(self._T.float32(x) if isinstance(x, (int, float)) else x, self.lanes)

    def splat_integer(self, x: Any) -> Any:
        """`x`, an integer or an int32 expression, in every lane."""
        return self._T.broadcast(self._T.int32(x) if isinstance(x, int) else x, self.lanes)

    def keep(self, x: Any, *, integer: bool = False) -> Any:
        """`x` computed here and now, for use in more than one place.

        Not by a let binding: TVM's simplifier looks through those, in time exponential in their number.
        """
        T = self._T
        place = T.alloc_buffer((self.lanes,), "int32" if integer else "float32", align=64)
        T.buffer_store(place, x, [self.at(0)])
        return place[self.at(0)]

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """``a * b + c``, rounded once where the target can."""
        if not self._has_fma:
            return a * b + c
        return self._T.call_llvm_pure_intrin(self._floats, f"llvm.fma.v{self.lanes}f32", a, b, c)

    def at_least(self, x: Any, least: Any) -> Any:
        """The larger of the two; NaN in `x` stays, as it does in torch."""
        x = self.keep(x)
        return self._T.Select(x < least, least, x)

    def at_most(self, x: Any, most: Any) -> Any:
        """The smaller of the two; NaN in `x` stays, as it does in torch."""
        x = self.keep(x)
        return self._T.Select(x > most, most, x)

    def larger(self, x: Any, y: Any) -> Any:
        """The larger of two; of NaN and a number, the number."""
        return self._T.call_llvm_pure_intrin(self._floats, f"llvm.maxnum.v{self.lanes}f32", x, y)

    def smaller(self, x: Any, y: Any) -> Any:
        """The smaller of two; of NaN and a number, the number."""
        return self._T.call_llvm_pure_intrin(self._floats, f"llvm.minnum.v{self.lanes}f32", x, y)

    def larger_or_nan(self, x: Any, y: Any) -> Any:
        """The larger of two, NaN if either is."""
        return self._T.call_llvm_pure_intrin(self._floats, f"llvm.maximum.v{self.lanes}f32", x, y)

    def relu(self, x: Any) -> Any:
        return self.at_least(x, self.splat(0.0))

    def absolute(self, x: Any) -> Any:
        return self._T.call_llvm_pure_intrin(self._floats, f"llvm.fabs.v{self.lanes}f32", x)

    def square_root(self, x: Any) -> Any:
        return self._T.call_llvm_pure_intrin(self._floats, f"llvm.sqrt.v{self.lanes}f32", x)

    def floor(self, x: Any) -> Any:
        return self._T.call_llvm_pure_intrin(self._floats, f"llvm.floor.v{self.lanes}f32", x)

    def select(self, condition: Any, x: Any, y: Any) -> Any:
        """Lane by lane, x where the condition holds, else y."""
        return self._T.Select(condition, x, y)

    def to_integer(self, x: Any) -> Any:
        """Whole-numbered floats as int32."""
        return self._T.cast(x, self._integers)

    def total(self, x: Any) -> Any:
        """The sum of the lanes, a float."""
        T = self._T
        place = T.alloc_buffer((self.lanes,), "float32", align=64)
        T.buffer_store(place, x, [self.at(0)])
        parts = [place[i] for i in range(self.lanes)]
        while len(parts) > 1:
            half = len(parts) // 2
            parts = [a + b for a, b in zip(parts[:half], parts[half:], strict=True)]
        T.buffer_store(place, parts[0], [0])
        return place[0]

    def exp(self, x: Any) -> Any:
        """``e**x`` for x <= 0, to 2 units in the last place; below -87, where float32 ends, ``e**-87``. NaN stays.

        The polynomial is that of the Cephes library's expf: x = n ln 2 + r, ln 2 in two pieces.
        """
        T = self._T
        x = self.at_least(x, self.splat(-87.0))
        x = self.keep(x)
        n = self.keep(T.nearbyint(x * self.splat(1.44269504088896341)))
        r = self.multiply_add(n, self.splat(-0.693359375), x)
        r = self.keep(self.multiply_add(n, self.splat(2.12194440e-4), r))
        p = self.splat(1.9875691500e-4)
        for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            p = self.multiply_add(p, r, self.splat(coefficient))
        p = self.multiply_add(p * r, r, r) + self.splat(1.0)
        # Times 2**n: n is added to the exponent's bits.
        bits = T.reinterpret(self._integers, p) + (self.to_integer(n) << self.splat_integer(23))
        return T.reinterpret(self._floats, bits)

    def sine_and_cosine(self, x: Any) -> tuple[Any, Any]:
        r"""``sin x`` and ``cos x`` to 2e-7, for \|x\| up to a million; needs fused multiply-adds.

        x = n pi/2 + r with pi/2 in three pieces; polynomials in r after the Cephes library's sinf and cosf.
        """
        T = self._T
        x = self.keep(x)
        n = self.keep(T.nearbyint(x * self.splat(0.63661977236758134)))
        r = x
        for piece in (1.57079637050628662109375, -4.37113900018624283e-8, -1.71512451000121e-15):
            r = self.multiply_add(n, self.splat(-piece), r)
        r = self.keep(r)
        square = self.keep(r * r)
        sine = self.splat(-1.9515295891e-4)
        for coefficient in (8.3321608736e-3, -1.6666654611e-1):
            sine = self.multiply_add(sine, square, self.splat(coefficient))
        sine = self.keep(self.multiply_add(sine * square, r, r))
        cosine = self.splat(2.443315711809948e-5)
        for coefficient in (-1.388731625493765e-3, 4.166664568298827e-2):
            cosine = self.multiply_add(cosine, square, self.splat(coefficient))
        cosine = self.multiply_add(
            cosine * square, square, self.multiply_add(square, self.splat(-0.5), self.splat(1.0))
        )
        cosine = self.keep(cosine)
        # A quarter turn swaps the two, and two quarter turns change both signs.
        quarter = self.keep(self.to_integer(n), integer=True)
        one, two = self.splat_integer(1), self.splat_integer(2)
        odd = (quarter & one) != self.splat_integer(0)
        sine, cosine = self.keep(self.select(odd, cosine, sine)), self.keep(self.select(odd, sine, cosine))

        def with_sign(value: Any, turned: Any) -> Any:
            bits = T.reinterpret(self._integers, value) ^ ((turned & two) << self.splat_integer(30))
            return T.reinterpret(self._floats, bits)

        return with_sign(sine, quarter), with_sign(cosine, quarter + one)

    def product(
        self,
        rows: Any,
        width: int,
        bias: Callable[[Any, Any], Any],
        terms: Sequence[tuple[Any, Callable[[Any, Any], Any], Callable[[Any, Any], Any]]],
        store: Callable[[Any, Any, Any], None],
        accumulators: Any,
    ) -> None:
        """A matrix product: ``bias(r, c) + sum over terms, k of value(r, k) * weight(k, c)`` for r < rows, c < width.

        The weights are read along c by whole vectors, the values one by one, and a tile of the outcome stays in
        registers over the whole sum.

        Args:
            rows: how many. Up to `ROW_PADDING` more are worked on, a tile at a time: whatever the callbacks are asked
                for those must be there to read and to write to, and means nothing.
            width: columns, a multiple of `lanes`.
            bias: ``bias(row, column)``, the vector of columns from `column` that the sum begins with.
            terms: (number of k, ``value(row, k)``, ``weight(k, column)``, a float and a vector).
            store: ``store(row, column, x)``: what to do with a vector of sums.
            accumulators: a buffer of ``ACCUMULATORS * lanes`` floats that the compiler keeps in registers.
        """
        T, lanes = self._T, self.lanes
        vectors, start = width // lanes, 0
        while start < vectors:
            # Never one vector alone if it can be helped: it would read a value for every product.
            across = 2 if vectors - start in (2, 4) else min(3, vectors - start)
            down = _TILE_ROWS[across]
            columns = [(start + j) * lanes for j in range(across)]
            tile = [[self.at((i * across + j) * lanes) for j in range(across)] for i in range(down)]
            with T.serial((rows + (down - 1)) // down) as t:
                for i in range(down):
                    for j in range(across):
                        T.buffer_store(accumulators, bias(t * down + i, columns[j]), [tile[i][j]])
                for count, value, weight in terms:
                    with T.serial(count) as k:
                        weights = [weight(k, column) for column in columns]
                        for i in range(down):
                            x = T.broadcast(value(t * down + i, k), lanes)
                            for j in range(across):
                                total = self.multiply_add(x, weights[j], accumulators[tile[i][j]])
                                T.buffer_store(accumulators, total, [tile[i][j]])
                for i in range(down):
                    for j in range(across):
                        store(t * down + i, columns[j], accumulators[tile[i][j]])
            start += across
