"""Matrix products in registers: in vectors, and in the matrix tiles of AMX.

What TVM ships does no better: of a float32 product, the best of MetaSchedule's 64 trials reached 0.4 of torch's speed,
where one written like this reached 1.06; and TVM 0.27's tensor intrinsic for VNNI does not compile with its LLVM 22.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeAlias

from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index

#: Rows beyond the last one that `product` may write to: tiles are done whole.
ROW_PADDING = 8

# 12 accumulators in registers (of 16 or 32), whatever the width of a tile: rows for 1, 2, 3 vectors.
_ROWS = {1: 8, 2: 6, 3: 4}

Scalars: TypeAlias = Callable[[Index, Index], Expr]
Vectors: TypeAlias = Callable[[Index, int], Expr]
Term: TypeAlias = tuple[Index, "Buffer | Scalars", "Buffer | Vectors"]


class Tile:
    """Registers for a tile of sums: a buffer for each row, as stack memory over 1,024 bytes is left in memory."""

    def __init__(self, isa: Isa, rows: int, columns: int, dtype: str = "float32") -> None:
        self._isa = isa
        self._rows = [T.alloc(columns, dtype=dtype) for _ in range(rows)]
        self._columns = range(0, columns, isa.lanes)

    def fill(self, value: Callable[[int, int], Expr]) -> None:
        """Set each vector to ``value(row, column)``."""
        for i, row in enumerate(self._rows):
            for j in self._columns:
                row[self._isa.at(j)] = value(i, j)

    def vector(self, i: int, j: int) -> Expr:
        """The vector of row i from column j on."""
        return self._rows[i][self._isa.at(j)]

    def vectors(self) -> Iterator[tuple[int, int, Expr]]:
        """Row, column and value of all vectors."""
        return ((i, j, self.vector(i, j)) for i in range(len(self._rows)) for j in self._columns)

    def add_products(
        self,
        steps: Index,
        value: Callable[[int, Expr], Expr],
        weight: Callable[[Expr, int], Expr],
        multiply_add: Callable[[Expr, Expr, Expr], Expr],
        unroll: int = 1,
    ) -> None:
        """Add ``sum over k < steps * unroll of value(row, k) * weight(k, column)``.

        Args:
            value: a scalar; an int32 may hold several numbers.
            weight: a vector from a column on.
            multiply_add: ``multiply_add(values, weights, sums)`` of vectors.
        """
        with T.serial(steps) as step:
            for number in range(unroll):
                k = T.bind(step * unroll + number) if unroll > 1 else step
                weights = [T.bind(weight(k, j)) for j in self._columns]
                for i, row in enumerate(self._rows):
                    x = T.bind(self._isa.splat(value(i, k)))
                    for j, of_column in zip(self._columns, weights, strict=True):
                        row[self._isa.at(j)] = multiply_add(x, of_column, row[self._isa.at(j)])


def product(
    isa: Isa,
    rows: Index,
    width: int,
    bias: Buffer | Vectors,
    terms: Sequence[Term],
    out: Buffer | Callable[[Index, int, Expr], None],
    apply: Callable[[Expr], Expr] = lambda sums: sums,
) -> None:
    """A product of float32 matrices: ``out(r, c) = apply(bias(r, c) + sum over terms, k of value(r, k) weight(k, c))``.

    The weights are read along c by whole vectors, the values one by one, and a tile of the outcome stays in registers
    over the whole sum.

    Args:
        rows: how many. Up to `ROW_PADDING` more are written to, a tile at a time: copies of the last one. Memory beyond
            the values is not read: what it holds may be subnormal, and an operation on such a number takes a hundred
            cycles or more.
        width: columns, a multiple of ``isa.lanes``.
        bias: [width], or ``bias(row, column)``: the vector of columns from `column` that the sum begins with.
        terms: (number of k, values, weights). Values: [rows, k] or ``value(row, k)``; weights: [k, width] or
            ``weight(k, column)``, a vector.
        out: [rows, width], or ``out(row, column, x)``: what to do with a vector of outcomes.
        apply: what becomes of a vector of sums, for instance its activation.
    """
    of_column = bias if callable(bias) else lambda r, c: bias[isa.at(c)]
    vectors, start = width // isa.lanes, 0
    while start < vectors:
        # Never one vector alone if it can be helped: it would read a value for every product.
        across = 2 if vectors - start in (2, 4) else min(3, vectors - start)
        _columns(isa, rows, (start * isa.lanes, across), of_column, terms, out, apply)
        start += across


def _columns(
    isa: Isa,
    rows: Index,
    columns: tuple[int, int],
    bias: Vectors,
    terms: Sequence[Term],
    out: Buffer | Callable[[Index, int, Expr], None],
    apply: Callable[[Expr], Expr],
) -> None:
    """Some of the columns of `product`: the first, and how many vectors."""
    left, across = columns
    tile = Tile(isa, _ROWS[across], across * isa.lanes)
    with T.serial((rows + (_ROWS[across] - 1)) // _ROWS[across]) as number:
        top = number * _ROWS[across]
        read = [T.bind(T.min(top + i, rows - 1)) for i in range(_ROWS[across])]
        tile.fill(lambda i, j: bias(read[i], left + j))
        for count, values, weights in terms:
            value = partial(_value, values, read)
            weight = partial(_weight, isa, weights, left)
            tile.add_products(count, value, weight, isa.fma)
        for i, j, x in tile.vectors():
            if isinstance(out, Buffer):
                out[top + i, isa.at(left + j)] = apply(x)
            else:
                out(top + i, left + j, apply(x))


def _value(values: Buffer | Scalars, rows: Sequence[Expr], i: int, k: Expr) -> Expr:
    return values[rows[i], k] if isinstance(values, Buffer) else values(rows[i], k)


def _weight(isa: Isa, weights: Buffer | Vectors, left: int, k: Expr, j: int) -> Expr:
    return weights[k, isa.at(left + j)] if isinstance(weights, Buffer) else weights(k, left + j)


def halves_of(panel: Buffer, left: int) -> list[int]:
    """Which of the two tiles of columns, from column `left` on, a panel has: 0, or 0 and 1."""
    return [j for j in range(2) if left + 16 * j < panel.extent(1)]


def product_in_tiles(
    isa: Isa,
    rows: Buffer,
    top: Expr,
    panel: Buffer,
    left: int,
    parts: Sequence[tuple[int, int]],
    sums: Buffer,
    column: int,
) -> None:
    """The product of 32 rows of bfloat16 and up to 32 columns, two by two tiles (AMX).

    Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 weights.

    Args:
        rows: [*, words] int32, of which those from `top` on are multiplied. A word has two numbers.
        panel: [*, outputs] int32, of which the columns from `left` on are multiplied.
        parts: the summands, as pairs: the first of 16 words in a row, and the panel's row for that word.
        sums: [32, *], where the product goes, from a column on.
    """
    width, pitch = panel.extent(1), 4 * rows.extent(1)
    halves = halves_of(panel, left)
    places = [(i, j) for i in range(2) for j in halves]
    for i, j in places:
        isa.zero_tile(2 * i + j)
    for first in dict.fromkeys(first for first, _ in parts):
        for i in range(2):
            isa.load_tile(4 + i, rows.address(top + 16 * i, first), pitch)
        for row in (row for start, row in parts if start == first):
            for j in halves:
                isa.load_tile(6 + j, panel.address(row, left + 16 * j), 4 * width)
            for i, j in places:
                isa.multiply_tiles(2 * i + j, 4 + i, 6 + j)
    for i, j in places:
        isa.store_tile(2 * i + j, sums.address(16 * i, column + 16 * j), 4 * sums.extent(1))
