"""Products of 16-bit integers: every row of activations has a power of two as its scale."""

from __future__ import annotations

from collections.abc import Callable

from shiftadd3d.kernels.cpu.blocks import folded_each
from shiftadd3d.kernels.cpu.decode import (
    EXPONENT_BIAS,
    FRACTION_BITS,
    GROUP,
    Scratch,
    Weights,
    steps_of_32,
    transpose,
)
from shiftadd3d.kernels.cpu.forms.base import HIGHEST, LOWEST, Form, ShiftProduct
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.tile import Tile
from shiftadd3d.kernels.pack.whole import MOST_WEIGHT
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.memory import Dtype
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index, Load


class Int16Product(ShiftProduct):
    has_factors = True

    def __init__(self, target: CpuTarget, form: Form, bits: int, terms: int, dtype: Dtype) -> None:
        # Sums stay below 2**31: they reach 2**15 * 2**6 * 512 with 4 bits, 2**11 * 2**14 * 48 with 5.
        self.activation_bits, block = (15, 512) if bits <= 4 else (11, 48)
        self.by_pairs = bits == 4
        super().__init__(target, form, bits, terms, dtype, block)

    def exponent(self, weights: Weights, output: Expr) -> Expr:
        """The weight of level 1, which integers count in."""
        return self.offset(weights, 0, output) - (self.levels - 1)

    def store_weights(self, scratch: Scratch, codes: list[Expr], group: Expr, column: Expr, add: bool) -> None:
        for k in range(0, GROUP, 2):
            low, high = (self.integer(code) for code in codes[k : k + 2])
            scratch.panel[group * (GROUP // 2) + k // 2, column] = self.isa.pairs(low, high)

    def expand_pairs(self, scratch: Scratch, count: Expr, load: Callable[[int, Expr], Expr]) -> None:
        # A table makes weights of codes, which then change places four bytes at a time, four channels by four words.
        words_of_step = 2 * GROUP // self.pair
        with T.serial(steps_of_32(count)) as step:
            for column in range(0, self.columns, 4):
                channels = [self.words(load(column + i, step)) for i in range(4)]
                for number, words in enumerate(zip(*channels, strict=True)):
                    for i, word in enumerate(transpose(words)):
                        scratch.panel[step * words_of_step + 4 * number + i, T.ramp(column, 4)] = word

    def store_words(self, scratch: Scratch, word: Expr, column: Expr, bytes_: Expr, scale: Expr | None) -> None:
        integers = self.integers_of(bytes_)
        for i in (0, 2):
            scratch.panel[word * 2 + i // 2, column] = self.isa.pairs(*integers[i : i + 2])

    def words(self, pairs: Expr) -> list[Expr]:
        """The weights of 16 bytes, pairs of codes, in vectors of four words."""
        return [
            T.bind(T.reinterpret("int32x4", T.cast(T.shuffle([weights], range(half, half + 8)), "int16x8")))
            for weights in self.look_up(pairs)
            for half in (0, 8)
        ]

    def before_staging(self) -> None:
        lanes = self.isa.lanes
        self._of_rows, self._factors = T.alloc(lanes, lanes, dtype="int32"), T.alloc(lanes)

    def stage_rows(self, scratch: Scratch, first: Expr, count: Expr, inputs: Expr, load: Load, flag: Buffer) -> None:
        isa = self.isa

        def peaks_of(i: Expr) -> Expr:
            largest = isa.register(0, integer=True)

            def compare(xs: list[Expr], part: Expr) -> None:
                largest.value = T.max(largest.value, isa.magnitude_bits(xs[0]))

            self.groups_of_vectors(T.bind(first + i), T.int64(0), inputs, load, compare, 1)
            return largest.value

        peaks = self.of_each_row(count, peaks_of, T.max)
        self._refuse_extremes_of_any(peaks, flag)
        # Within these bounds neither the scale, nor its reciprocal, nor sums times either overflow.
        scale, reciprocal = self.scale(isa.keep(T.max(peaks, isa.splat_int(LOWEST)), integer=True))
        scratch.scales[isa.at(first)] = scale
        self._factors[isa.at(0)] = reciprocal

        def convert(block: Expr, start: Expr, length: Expr) -> None:
            place = T.bind(block * scratch.rows + first)

            def row(i: Expr) -> Expr:
                factor = T.bind(isa.splat(self._factors[i]))
                return self.convert(scratch, T.bind(place + i), T.bind(first + i), start, length, load, factor)

            self.convert_rows(scratch, block, first, count, row)

        self.each_block(scratch, inputs, convert)

    def of_each_row(self, count: Expr, vector: Callable[[Expr], Expr], fold: Callable[[Expr, Expr], Expr]) -> Expr:
        """The lanes of ``vector(i)``, int32, folded into one, for `count` rows: a vector of these, then of zeros."""
        at = self.isa.at(0)
        with T.serial(count) as i:
            self._of_rows[i, at] = vector(i)
        with T.serial(self.isa.lanes - count) as i:
            self._of_rows[count + i, at] = self.isa.splat_int(0)
        return folded_each(self.isa, self._of_rows, fold, integer=True)

    def _refuse_extremes_of_any(self, peaks: Expr, flag: Buffer) -> None:
        """`refuse_extremes` of the largest magnitudes of rows, as int32 bits."""
        zero, one = self.isa.splat_int(0), self.isa.splat_int(1)
        low = T.select(peaks < self.isa.splat_int(LOWEST), T.min(peaks, one), zero)
        high = T.select(peaks < self.isa.splat_int(HIGHEST), zero, one)
        with T.when(self.isa.largest_int(T.max(low, high)) > 0):
            flag[0] = T.int32(1)

    def scale(self, peaks: Expr) -> tuple[Expr, Expr]:
        """What the integers of rows count in, and its reciprocal; of their largest magnitudes, as int32 bits."""
        isa, fraction = self.isa, self.activation_bits - 1
        exponents = isa.keep(peaks >> isa.splat_int(FRACTION_BITS), integer=True)
        bits = (exponents - isa.splat_int(fraction), isa.splat_int(2 * EXPONENT_BIAS + fraction) - exponents)
        scale, reciprocal = (isa.as_float(part << isa.splat_int(FRACTION_BITS)) for part in bits)
        return scale, reciprocal

    def convert_rows(
        self, scratch: Scratch, block: Expr, first: Expr, count: Expr, convert: Callable[[Expr], Expr]
    ) -> None:
        """``convert(i)`` of `count` rows from the first one on, a block of their inputs."""
        with T.serial(count) as i:
            convert(i)

    def convert(
        self, scratch: Scratch, place: Expr, row: Expr, first: Expr, count: Expr, load: Load, factor: Expr
    ) -> Expr:
        """Store `count` activations of a row, times `factor`, at a place of `scratch.activations`.

        Returns:
            What the lanes of a vector of int32 have to be known of.
        """
        isa = self.isa

        def use(xs: list[Expr], part: Expr) -> None:
            low, high = [isa.to_nearest(x * factor) for x in xs]
            scratch.activations[place, isa.at(part * isa.lanes)] = isa.to_int16(low, high)

        self.groups_of_vectors(row, first, count, load, use, self.pair)
        return isa.splat_int(0)

    def multiply(self, scratch: Scratch, row: Expr, turn: Expr, count: Expr) -> Tile:
        isa = self.isa
        totals = Tile(isa, self.rows, self.columns, "int32")
        sums = Tile(isa, self.rows, self.columns)
        totals.fill(lambda i, j: isa.splat_int(self.start(scratch, turn, row + i)))
        self.add_products(totals, scratch, row, turn, count, self.dot)
        scales = [T.bind(isa.splat(scratch.scales[row + i])) for i in range(self.rows)]
        sums.fill(lambda i, j: T.cast(totals.vector(i, j), isa.floats) * scales[i])
        self.add_earlier(scratch, row, turn, sums)
        return sums

    def dot(self, x: Expr, weights: Expr, sums: Expr) -> Expr:
        return self.isa.dot_int16(x, weights, sums)

    def start(self, scratch: Scratch, block: Expr, row: Expr) -> Index:
        """What the sums of a row over a block of inputs begin with."""
        return 0


class OrdinaryInt16Product(Int16Product):
    """A product with ordinary weights that lie in panels of integers ready made, [panels, pairs of inputs, columns]."""

    # What stands for the largest magnitude of a row. With weights up to 2047, sums of 256 inputs stay below 2**31.
    _MOST, _BLOCK = 4095, 256

    def __init__(self, target: CpuTarget) -> None:
        # No codes are ever looked at.
        ShiftProduct.__init__(self, target, "int16", bits=4, terms=1, dtype="float32", block=self._BLOCK)

    def scale(self, peaks: Expr) -> tuple[Expr, Expr]:
        return linear_scale(self.isa, peaks, self._MOST)

    def factor(self, weights: Weights, output: Expr, inside: Expr) -> Expr:
        assert weights.offset is not None
        return T.if_then_else(inside, weights.offset[output], T.float32(1)) * T.float32(1 / MOST_WEIGHT)

    def decode(self, scratch: Scratch, weights: Weights, start: Expr, turn: Expr, count: Expr) -> None:
        self.copy_panel(scratch, weights, start, T.bind(turn * (self.block // 2)), (count + 1) // 2)


def linear_scale(isa: Isa, peaks: Expr, most: int) -> tuple[Expr, Expr]:
    """What integers count in of which `most` stands for peaks, given as int32 bits, and its reciprocal."""
    largest = isa.keep(isa.as_float(peaks))
    return largest / isa.splat(most), isa.splat(most) / largest
