"""Products of bytes: activations up to 127, which stands for a row's largest magnitude, by weights of up to 4 bits.

One factor has to be unsigned, so weights are counted from -64, which is as low as they get: what 64 times the sum of
the activations adds to each product is subtracted at the start. A pair of products is no more than ``2 * 127 * 128``,
which 16 bits hold.
"""

from __future__ import annotations

from collections.abc import Callable

from shiftadd3d.kernels.cpu.decode import GROUP, Scratch
from shiftadd3d.kernels.cpu.forms.int16 import Int16Product, linear_scale
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.tir import Expr, Load

_LOWEST_WEIGHT = -64


class Int8Product(Int16Product):
    pair = 4
    coarse = True
    lowest = _LOWEST_WEIGHT

    def scale(self, peaks: Expr) -> tuple[Expr, Expr]:
        return linear_scale(self.isa, peaks, 127)

    def store_weights(self, scratch: Scratch, codes: list[Expr], group: Expr, column: Expr, add: bool) -> None:
        lowest = self.isa.splat_int(_LOWEST_WEIGHT)
        for k in range(0, GROUP, 4):
            word, *others = [T.bind(self.integer(code) - lowest) for code in codes[k : k + 4]]
            for i, integer in enumerate(others, 1):
                word = word | (integer << self.isa.splat_int(8 * i))
            scratch.panel[group * (GROUP // 4) + k // 4, column] = word

    def store_words(self, scratch: Scratch, word: Expr, column: Expr, bytes_: Expr, scale: Expr | None) -> None:
        scratch.panel[word, column] = T.reinterpret(self.isa.integers, bytes_)

    def words(self, pairs: Expr) -> list[Expr]:
        return [T.bind(T.reinterpret("int32x4", part)) for part in self.look_up(pairs, _LOWEST_WEIGHT)]

    def convert_rows(
        self, scratch: Scratch, block: Expr, first: Expr, count: Expr, convert: Callable[[Expr], Expr]
    ) -> None:
        totals = self.of_each_row(count, convert, lambda a, b: a + b)
        scratch.starts[block, self.isa.at(first)] = totals * self.isa.splat_int(_LOWEST_WEIGHT)

    def convert(
        self, scratch: Scratch, place: Expr, row: Expr, first: Expr, count: Expr, load: Load, factor: Expr
    ) -> Expr:
        """As that of 16-bit integers; returns a vector of sums of the activations."""
        isa = self.isa
        total = isa.register(0, integer=True)

        def use(xs: list[Expr], part: Expr) -> None:
            integers = [isa.to_nearest(x * factor) for x in xs]
            four = T.bind((integers[0] + integers[1]) + (integers[2] + integers[3]))
            total.value = total.value + four
            scratch.activations[place, isa.at(part * isa.lanes)] = isa.to_int8(integers)

        self.groups_of_vectors(row, first, count, load, use, self.pair)
        return total.value

    def start(self, scratch: Scratch, block: Expr, row: Expr) -> Expr:
        return scratch.starts[block, row]

    def dot(self, x: Expr, weights: Expr, sums: Expr) -> Expr:
        return self.isa.dot_int8(x, weights, sums)
