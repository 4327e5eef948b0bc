"""Products of 16-bit integers: every row of activations has a power of two as its scale."""

from __future__ import annotations

from collections.abc import Callable

from shiftadd3d.kernels.cpu.decode import (
    EXPONENT_BIAS,
    FRACTION_BITS,
    GROUP,
    Scratch,
    Weights,
    steps_of_32,
    transpose,
)
from shiftadd3d.kernels.cpu.forms.base import LOWEST, Form, ShiftProduct
from shiftadd3d.kernels.cpu.tile import Tile
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

    def factor(self, weights: Weights, output: Expr) -> Expr:
        """The weight of level 1, which integers count in."""
        return self.offset(weights, 0, output) - (self.levels - 1)

    def store_weights(self, scratch: Scratch, codes: list[Expr], group: Expr, column: Expr, add: bool) -> None:
        for k in range(0, GROUP, 2):
            low, high = (self.integer(code) for code in codes[k : k + 2])
            pair = (low & self.isa.splat_int(0xFFFF)) | (high << self.isa.splat_int(16))
            scratch.panel[group * (GROUP // 2) + k // 2, column] = pair

    def expand_pairs(self, scratch: Scratch, count: Expr, load: Callable[[int, Expr], Expr]) -> None:
        # A table makes weights of codes, which then change places four bytes at a time, four channels by four words.
        words_of_step = 2 * GROUP // self.pair
        with T.serial(steps_of_32(count)) as step:
            for column in range(0, self.columns, 4):
                channels = [self.words(load(column + i, step)) for i in range(4)]
                for number, words in enumerate(zip(*channels, strict=True)):
                    for i, word in enumerate(transpose(words)):
                        scratch.panel[step * words_of_step + 4 * number + i, T.ramp(column, 4)] = word

    def words(self, pairs: Expr) -> list[Expr]:
        """The weights of 16 bytes, pairs of codes, in vectors of four words."""
        return [
            T.bind(T.reinterpret("int32x4", T.cast(T.shuffle([weights], range(half, half + 8)), "int16x8")))
            for weights in self.look_up(pairs)
            for half in (0, 8)
        ]

    def stage_row(self, scratch: Scratch, row: Expr, inputs: Expr, load: Load, flag: Buffer) -> None:
        isa = self.isa
        largest = isa.register(0, integer=True)

        def compare(xs: list[Expr], part: Expr) -> None:
            for x in xs:
                largest.value = T.max(largest.value, isa.magnitude_bits(x))

        self.groups_of_vectors(row, T.int64(0), inputs, load, compare)
        # Within these bounds neither the scale, nor its reciprocal, nor sums times either overflow.
        peak = self.refuse_extremes(largest.value, flag)
        scale, reciprocal = self.scale(T.bind(T.max(peak, T.int32(LOWEST))))
        scratch.scales[row] = scale
        factor = T.bind(isa.splat(T.bind(reciprocal)))

        def convert(block: Expr, first: Expr, count: Expr) -> None:
            self.convert(scratch, T.bind(block * scratch.rows + row), row, first, count, load, factor)

        self.each_block(scratch, inputs, convert)

    def scale(self, peak: Expr) -> tuple[Expr, Expr]:
        """What the integers of a row count in, and its reciprocal; `peak` is its largest magnitude, as int32 bits."""
        fraction = self.activation_bits - 1
        exponent = T.bind(peak >> FRACTION_BITS)
        bits = (exponent - fraction, 2 * EXPONENT_BIAS + fraction - exponent)
        scale, reciprocal = (T.reinterpret("float32", part << FRACTION_BITS) for part in bits)
        return scale, reciprocal

    def convert(
        self, scratch: Scratch, place: Expr, row: Expr, first: Expr, count: Expr, load: Load, factor: Expr
    ) -> None:
        """Store `count` activations of a row, times `factor`, at a place of `scratch.activations`."""
        isa = self.isa

        def use(xs: list[Expr], part: Expr) -> None:
            low, high = [isa.to_nearest(x * factor) for x in xs]
            scratch.activations[place, isa.at(part * isa.lanes)] = isa.to_int16(low, high)

        self.groups_of_vectors(row, first, count, load, use)

    def multiply(self, scratch: Scratch, row: Expr, turn: Expr, count: Expr) -> Tile:
        isa = self.isa
        totals = Tile(isa, self.rows, self.columns, "int32")
        sums = Tile(isa, self.rows, self.columns)
        first = T.bind(turn * scratch.rows + row)
        totals.fill(lambda i, j: isa.splat_int(self.start(scratch, first + i)))
        self.add_products(totals, scratch, row, turn, count, self.dot)
        scales = [T.bind(isa.splat(scratch.scales[row + i])) for i in range(self.rows)]
        sums.fill(lambda i, j: T.cast(totals.vector(i, j), isa.floats) * scales[i])
        self.add_earlier(scratch, row, turn, sums)
        return sums

    def dot(self, x: Expr, weights: Expr, sums: Expr) -> Expr:
        return self.isa.dot_int16(x, weights, sums)

    def start(self, scratch: Scratch, place: Expr) -> Index:
        """What the sums of a row begin with, which lies at a place of `scratch.activations`."""
        return 0
