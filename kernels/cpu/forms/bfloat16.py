"""Products of bfloat16 in matrix tiles (AMX), of one or three pieces of each activation.

Tiles 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights. No weight is larger than 1, and so neither sums nor their
parts come near to where tiles lose bits: denormals.
"""

from __future__ import annotations

from collections.abc import Callable

from shiftadd3d.kernels.cpu.decode import EXPONENT_BIAS, GROUP, Scratch, Weights, steps_of_32
from shiftadd3d.kernels.cpu.forms.base import Form, ShiftProduct
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.memory import Dtype
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index, Load

_QUARTERS = [(i, j) for i in range(2) for j in range(2)]  # of a tile of sums; the number of (i, j) is 2 i + j


class Bfloat16Product(ShiftProduct):
    has_factors = True

    def __init__(self, target: CpuTarget, form: Form, bits: int, terms: int, dtype: Dtype) -> None:
        self.pieces = 1 if form == "bfloat16x1" else 3
        self.coarse = self.pieces == 1 and dtype == "float32"
        # A sum of two powers is more than one bfloat16 can hold; in a layer of bfloat16 the twin rounds it to one.
        self.passes = 1 if dtype == "bfloat16" else terms
        self.by_pairs = bits == 4 and terms == 1
        super().__init__(target, form, bits, terms, dtype, block=256)

    def scratch(self, rows: Index, inputs: Expr) -> Scratch:
        self.isa.configure_tiles()
        return super().scratch(rows, inputs)

    def release(self) -> None:
        self.isa.release_tiles()

    def exponent(self, weights: Weights, output: Expr) -> Expr:
        offsets = [self.offset(weights, term, output) for term in range(self.terms)]
        return T.max(offsets[0], offsets[-1])

    def unit(self, weights: Weights, term: Index, output: Expr) -> Expr:
        return super().unit(weights, term, output) - self.exponent(weights, output)

    def expand_pairs(self, scratch: Scratch, count: Expr, load: Callable[[int, Expr], Expr]) -> None:
        # A byte holds a pair of codes, as an entry of a tile does. The pairs change places four at a time, and a table
        # makes weights of them.
        levels = [0, *((EXPONENT_BIAS - self.levels + level) << 7 for level in range(1, self.levels + 1))]
        # Twice, as it is looked up by five bits, and the fifth one is another code's.
        entries = 2 * [T.number("int16", level - sign) for sign in (0, 1 << 15) for level in levels]
        table = T.bind(T.shuffle(entries, range(len(entries))))

        def splat(x: int) -> Expr:
            return T.broadcast(T.number("uint32", x), GROUP)

        with T.serial(steps_of_32(count)) as step:
            for half in range(0, self.columns, GROUP):
                rows = [T.bind(T.reinterpret("uint32x4", load(half + i, step))) for i in range(GROUP)]
                for word, codes in enumerate(_words(rows)):
                    for byte in range(4):
                        pair = T.bind(codes >> splat(8 * byte))
                        pair = (pair & splat(0xFFFF)) | ((pair << splat(12)) & splat(0xFFFF0000))
                        pair = T.reinterpret("int32x16", self.isa.look_up_words(table, pair))
                        scratch.panel[step * GROUP + 4 * word + byte, self.isa.at(half)] = pair

    def store_weights(self, scratch: Scratch, codes: list[Expr], group: Expr, column: Expr, add: bool) -> None:
        splat = self.isa.splat_int
        unit, zero = T.bind(scratch.units[column]), splat(0)

        def bits(code: Expr) -> Expr:
            level = T.bind(self.level(code))
            exponent = T.select(level == zero, zero, T.max(level + unit, zero))
            return T.bind((exponent << splat(7)) | (self.negative(code) << splat(15)))

        for k in range(0, GROUP, 2):
            low, high = bits(codes[k]), bits(codes[k + 1])
            place = group * (GROUP // 2) + k // 2
            if add:
                earlier = T.bind(scratch.panel[place, column])
                low = self._sum(low << splat(16), earlier << splat(16)) >> splat(16)
                high = self._sum(high << splat(16), earlier & splat(-65536)) >> splat(16)
            scratch.panel[place, column] = self.isa.pairs(low, high)

    def _sum(self, a: Expr, b: Expr) -> Expr:
        """Bits of float32: the sum of two numbers, given as such bits, rounded to bfloat16."""
        isa = self.isa
        return isa.as_integer(isa.round_to_bfloat16(isa.as_float(a) + isa.as_float(b)))

    def stage_row(self, scratch: Scratch, row: Expr, inputs: Expr, load: Load, flag: Buffer) -> None:
        isa = self.isa
        largest = isa.register(0, integer=True)

        def convert(block: Expr, first: Expr, count: Expr) -> None:
            def use(xs: list[Expr], part: Expr) -> None:
                low, high = xs
                for x in xs:
                    largest.value = T.max(largest.value, isa.magnitude_bits(x))
                for piece in range(self.pieces):
                    place = (piece * scratch.blocks + block) * scratch.rows + row
                    at = isa.at(part * isa.lanes)
                    scratch.activations[place, at] = isa.to_bfloat16(low, high)
                    if piece + 1 < self.pieces:
                        low, high = self._minus(T.bind(scratch.activations[place, at]), low, high)

            self.groups_of_vectors(row, first, count, load, use, self.pair)

        self.each_block(scratch, inputs, convert)
        # Pieces of these are no denormals, or too small to count.
        self.refuse_extremes(largest.value, flag)

    def multiply(self, scratch: Scratch, row: Expr, turn: Expr, count: Expr) -> None:
        isa, stride = self.isa, 4 * self.columns
        place = T.bind(self.place_of_sums(scratch, row))
        sums = {(i, j): scratch.sums.address(place + 16 * i, 16 * j) for i, j in _QUARTERS}
        with T.If(turn == 0):
            with T.Then():
                for i, j in _QUARTERS:
                    isa.zero_tile(2 * i + j)
            with T.Else():
                for i, j in _QUARTERS:
                    isa.load_tile(2 * i + j, sums[i, j], stride)
        block = turn // self.passes
        with T.serial((count + 31) // 32) as step:
            for j in range(2):
                isa.load_tile(6 + j, scratch.panel.address(step * 16, 16 * j), stride)
            for piece in range(self.pieces):
                first = (piece * scratch.blocks + block) * scratch.rows + row
                for i in range(2):
                    isa.load_tile(4 + i, scratch.activations.address(first + 16 * i, step * 16), 4 * self.stride)
                for i, j in _QUARTERS:
                    isa.multiply_tiles(2 * i + j, 4 + i, 6 + j)
        for i, j in _QUARTERS:
            isa.store_tile(2 * i + j, sums[i, j], stride)

    def _minus(self, pairs: Expr, low: Expr, high: Expr) -> tuple[Expr, Expr]:
        """What rounding has left over of two vectors, exactly."""
        numbers = T.bind(T.reinterpret("uint16x32", pairs))
        halves = [T.bind(T.cast(T.shuffle([numbers], range(i, i + 16)), "uint32x16")) for i in (0, 16)]
        sixteen = T.broadcast(T.number("uint32", 16), 16)
        rounded = [self.isa.as_float(T.bind(half << sixteen)) for half in halves]
        return T.bind(low - rounded[0]), T.bind(high - rounded[1])


def _words(rows: list[Expr]) -> list[Expr]:
    """The first words of 16 vectors of four words in one vector, the second ones in another, and so on."""

    def shuffle(vectors: list[Expr], order: list[int]) -> Expr:
        return T.bind(T.shuffle(vectors, [part + i for part in range(0, GROUP, 4) for i in order]))

    # Matrices of four by four words, one in every 128-bit part: no word has to leave its part.
    a, b, c, d = (shuffle(rows[i::4], [0, 1, 2, 3]) for i in range(4))
    pairs = [(shuffle([a, b], order), shuffle([c, d], order)) for order in ([0, 16, 1, 17], [2, 18, 3, 19])]
    return [shuffle(list(pair), order) for pair in pairs for order in ([0, 1, 16, 17], [2, 3, 18, 19])]
