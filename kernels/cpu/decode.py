"""Codes to numbers: a panel of power-of-two weights, as they are stored, in the form that a product takes.

Codes are read two to a byte, a block of inputs at a time, and expanded anew for each block of rows, which costs a few
per cent of the product: nothing but the codes lives in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.reference import power_of_two
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index

GROUP = 16  # codes are transposed 16 inputs by 16 outputs at a time, which fits 128-bit registers
FRACTION_BITS, EXPONENT_BIAS = 23, 127


@dataclass(frozen=True)
class Weights:
    """Buffers of codes as `power_of_two.pack` stores them: what a product is multiplied by.

    Attributes:
        codes: [terms, outputs, bytes of a row] uint8; of ordinary weights themselves, [outputs, inputs] float32, or in
            panels [panels, inputs, columns]; or rounded, in pairs in an int32 [panels, pairs of inputs, columns].
        offset: [terms, outputs] int8; None of ordinary weights, in panels the largest magnitude of each output's
            [outputs] float32.
        bias: [outputs] float32.
        inputs, outputs: their numbers, int64.
    """

    codes: Buffer
    offset: Buffer | None
    bias: Buffer
    inputs: Expr
    outputs: Expr

    @classmethod
    def argument(cls, name: str, terms: int, inputs: Expr, outputs: Expr) -> Weights:
        """The next arguments of a function: codes, offset and bias. 0 terms are ordinary weights, without offset."""
        if terms:
            codes = T.argument(f"codes{name}", (terms, outputs, *T.sizes(1)), "uint8")
            offset = T.argument(f"offset{name}", (terms, outputs), "int8")
        else:
            codes, offset = T.argument(f"weight{name}", (outputs, inputs)), None
        return cls(codes, offset, T.argument(f"bias{name}", (outputs,)), inputs, outputs)


@dataclass(frozen=True)
class Scratch:
    """Memory of one task; `ShiftProduct.scratch` makes it."""

    rows: Index  # that there is memory for
    blocks: Expr  # of inputs
    activations: Buffer  # [pieces * blocks * rows, stride], the form's numbers
    bytes: Buffer  # [columns, bytes of a block of inputs] uint8: the codes of a panel
    codes: Buffer  # [columns or 16, 16] uint8: codes of as many outputs and 16 inputs
    panel: Buffer  # [numbers of a block of inputs, columns], the form's numbers
    units: Buffer  # [columns] int32: what the offset of a channel makes of its levels
    bias: Buffer  # [columns] float32
    factors: Buffer  # [columns] float32: what sums of a channel are multiplied by
    sums: Buffer  # [rows, columns] float32
    scales: Buffer  # [rows and a vector] float32: what sums of integers are multiplied by
    starts: Buffer  # [blocks, rows and a vector] int32: what sums of integers begin with, if not with zero


class Decoder(ABC):
    """What brings codes into the panels of a product.

    Args:
        isa: the target's.
        columns: outputs of a panel.
        bits, terms: the weights' code.
        block: inputs whose weights are decoded at a time.
    """

    passes = 1
    """How often the sums go through all inputs."""
    by_pairs = False
    """Whether `expand_pairs` makes weights of codes, as they are stored, and not `expand`."""
    in_panels = False
    """Whether codes lie as `pack.whole.code_panels` has them: then `store_words` makes weights of them."""

    def __init__(self, isa: Isa, columns: int, bits: int, terms: int, block: int) -> None:
        self.isa, self.columns, self.bits, self.terms, self.block = isa, columns, bits, terms, block
        self.levels = power_of_two.num_exponents(bits)
        self.vectors = range(0, columns, isa.lanes)

    def decode(self, scratch: Scratch, weights: Weights, start: Expr, turn: Expr, count: Expr) -> None:
        """Decode into `scratch.panel` the weights of the outputs from `start` on and of the block of inputs at hand.

        Args:
            count: how many inputs the block has. Weights beyond are finite, and meet activations of zero.
        """
        if self.in_panels:
            self._decode_panel(scratch, weights, start, turn, count)
            return
        if not self.by_pairs:
            self._decode_copied(scratch, weights, start, turn, count)
            return
        first = T.bind(turn * (self.block // 2))

        def load(column: int, step: Expr) -> Expr:
            return weights.codes[0, start + column, T.ramp(first + step * GROUP, GROUP)]

        with T.If(T.both(start + self.columns <= weights.outputs, count % (2 * GROUP) == 0)):
            with T.Then():
                with T.serial(self.columns) as column:
                    scratch.units[column] = self.unit(weights, 0, start + column)
                self.expand_pairs(scratch, count, load)
            with T.Else():
                self._decode_copied(scratch, weights, start, turn, count)

    def _decode_panel(self, scratch: Scratch, weights: Weights, start: Expr, turn: Expr, count: Expr) -> None:
        """`decode` of codes in panels. Two vectors of bytes are the weights of four inputs."""
        first = T.bind(turn * (self.block // 4))
        number = T.bind(T.truncdiv(start, T.int64(self.columns)))
        panel, following = weights.codes.part(number), weights.codes.part(number + 1)
        scales = self.scales_of_words(scratch, weights, start)
        table = self.table(self.lowest, 4 * self.isa.lanes)
        with T.serial((count + 3) // 4) as word:
            # Codes of other layers have pushed these out of the cache. They come back while this panel is multiplied.
            self.isa.prefetch(following.address(first + word, 0))
            halves = halves_of_bytes(panel[first + word, T.ramp(0, 4 * self.isa.lanes)], 4 * self.isa.lanes)
            for j, half, scale in zip(self.vectors, halves, scales, strict=True):
                bytes_ = T.bind(self.isa.look_up_in_parts(table, half))
                self.store_words(scratch, word, self.isa.at(j), bytes_, scale)

    lowest = 0
    """What weights in `store_words` are counted from."""

    def scales_of_words(self, scratch: Scratch, weights: Weights, start: Expr) -> list[Expr | None]:
        """What `store_words` is to multiply the weights of each vector of outputs by, if anything."""
        return [None for _ in self.vectors]

    def store_words(self, scratch: Scratch, word: Expr, column: Expr, bytes_: Expr, scale: Expr | None) -> None:
        """Store in `scratch.panel` the weights of a vector of outputs and of four inputs, from 4 * `word` on.

        Args:
            bytes_: four int8 for each output, counted in the weight of level 1, from `lowest`.
        """
        raise NotImplementedError

    def integers_of(self, bytes_: Expr) -> list[Expr]:
        """The four int8 of each output that `store_words` is given, as vectors of int32."""
        words = T.bind(T.reinterpret(self.isa.integers, bytes_))
        return [(words << self.isa.splat_int(24 - 8 * i)) >> self.isa.splat_int(24) for i in range(4)]

    def _decode_copied(self, scratch: Scratch, weights: Weights, start: Expr, turn: Expr, count: Expr) -> None:
        """`decode`, by a copy of the codes: there may be fewer of them than a panel has."""
        first = T.bind(turn // self.passes * (self.block * self.bits // 8))
        length = T.bind((count * self.bits + 7) // 8)
        for term in range(self.terms) if self.passes == 1 else (turn % self.passes,):
            with T.serial(self.columns) as column, T.If(start + column < weights.outputs):
                with T.Then():
                    scratch.units[column] = self.unit(weights, term, start + column)
                    source = weights.codes.part(term, start + column)
                    with T.serial(length // GROUP) as part:
                        codes = source[T.ramp(first + part * GROUP, GROUP)]
                        scratch.bytes[column, T.ramp(part * GROUP, GROUP)] = codes
                    with T.serial(length % GROUP) as rest:
                        position = length // GROUP * GROUP + rest
                        scratch.bytes[column, position] = source[first + position]
                with T.Else():
                    scratch.units[column] = T.int32(EXPONENT_BIAS)
            if self.by_pairs:
                self.expand_pairs(
                    scratch, count, lambda column, step: scratch.bytes[column, T.ramp(step * GROUP, GROUP)]
                )
            else:
                self.expand(scratch, count, isinstance(term, int) and term > 0)

    def expand_pairs(self, scratch: Scratch, count: Expr, load: Callable[[int, Expr], Expr]) -> None:
        """Make weights of the codes of `count` inputs, which have 4 bits and one term.

        Args:
            load: ``load(column, step)``: 16 bytes, the codes of 32 inputs.
        """
        raise NotImplementedError

    def expand(self, scratch: Scratch, count: Expr, add: bool) -> None:
        """Make weights of the codes in `scratch.bytes`."""
        # By twos, for the sake of products that take 32 inputs at a time.
        with T.serial(steps_of_32(count) * 2) as group:
            with T.serial(self.columns) as column:
                packed = scratch.bytes[column, T.ramp(group * (2 * self.bits), GROUP)]
                scratch.codes[column, T.ramp(0, GROUP)] = unpacked(packed, self.bits)
            for half in range(0, self.columns, GROUP):
                rows = [scratch.codes[half + i, T.ramp(0, GROUP)] for i in range(GROUP)]
                codes = transpose([T.bind(row) for row in rows])
                for j in range(0, min(GROUP, self.columns - half), self.isa.lanes):
                    lanes = range(j, j + self.isa.lanes)
                    wide = [T.bind(T.cast(T.shuffle([c], lanes), self.isa.integers)) for c in codes]
                    self.store_weights(scratch, wide, group, self.isa.at(half + j), add)

    @abstractmethod
    def store_weights(self, scratch: Scratch, codes: list[Expr], group: Expr, column: Expr, add: bool) -> None:
        """Store in `scratch.panel` the weights of 16 inputs, given as vectors of codes, or add them to those there."""

    def unit(self, weights: Weights, term: Index, output: Expr) -> Expr:
        """What `scratch.units` keeps of a channel's offset, int32: the exponent that level 0 would have, biased."""
        return self.offset(weights, term, output) + (EXPONENT_BIAS - self.levels)

    def offset(self, weights: Weights, term: Index, output: Expr) -> Expr:
        """A channel's offset, int32."""
        assert weights.offset is not None
        return T.cast(weights.offset[term, output], "int32")

    def level(self, codes: Expr) -> Expr:
        """Levels of codes, int32."""
        return codes & self.isa.splat_int(self.levels)

    def negative(self, codes: Expr) -> Expr:
        """Signs of codes as 0 and 1, int32."""
        return codes >> self.isa.splat_int(self.bits - 1)

    def integer(self, code: Expr) -> Expr:
        """Weights of codes, in units of the weight of level 1."""
        one = self.isa.splat_int(1)
        mask = T.bind(self.isa.splat_int(0) - self.negative(code))
        return T.bind((((one << self.level(code)) >> one) ^ mask) - mask)

    def look_up(self, pairs: Expr, lowest: int = 0) -> list[Expr]:
        """The weights of 16 pairs of codes, less `lowest`, in units of the weight of level 1: two vectors of int8."""
        table = self.table(lowest, GROUP)
        codes = halves_of_bytes(T.bind(pairs))
        halves = [T.reinterpret("int8x16", T.shuffle(codes, interleaved(half, GROUP))) for half in (0, 1)]
        return [T.bind(self.isa.look_up_bytes(table, half)) for half in halves]

    def table(self, lowest: int, size: int) -> Expr:
        """`size` int8: the weights of all 4-bit codes, less `lowest`, in units of the weight of level 1, repeated."""
        magnitudes = [0, *(1 << level for level in range(self.levels))]
        entries = [
            T.number("uint8", (sign * magnitude - lowest) & 0xFF) for sign in (1, -1) for magnitude in magnitudes
        ]
        entries *= size // len(entries)
        return T.bind(T.reinterpret(f"int8x{size}", T.shuffle(entries, range(size))))


def steps_of_32(count: Expr) -> Expr:
    """How often 32 inputs cover `count`."""
    return (count + (2 * GROUP - 1)) // (2 * GROUP)


def halves_of_bytes(packed: Expr, size: int = GROUP) -> list[Expr]:
    """The lower and the upper four bits of so many bytes."""
    packed = T.bind(packed)
    halves = packed & T.broadcast(T.number("uint8", 15), size), packed >> T.broadcast(T.number("uint8", 4), size)
    return [T.bind(half) for half in halves]


def unpacked(packed: Expr, bits: int) -> Expr:
    """The first 16 codes of 16 bytes, one to a byte."""
    packed = T.bind(packed)
    if bits == 4:
        return T.shuffle(halves_of_bytes(packed), interleaved(0, GROUP))
    # Every code lies within two bytes: gather those, and shift them by as much as each needs.
    first = [i * bits // 8 for i in range(GROUP)]
    low, high = (T.cast(T.shuffle([packed], [i + j for i in first]), "uint16x16") for j in range(2))
    shifts = T.shuffle([T.number("uint16", i * bits % 8) for i in range(GROUP)], range(GROUP))
    both = low | (high << T.broadcast(T.number("uint16", 8), GROUP))
    return T.cast((both >> shifts) & T.broadcast(T.number("uint16", (1 << bits) - 1), GROUP), "uint8x16")


def transpose(rows: Sequence[Expr]) -> list[Expr]:
    """The transpose of n vectors of n lanes, where n is a power of two: rounds of a perfect shuffle."""
    rows, size = list(rows), len(rows)
    for _ in range(size.bit_length() - 1):
        pairs = [[rows[i], rows[i + size // 2]] for i in range(size // 2)]
        rows = [T.bind(T.shuffle(pair, interleaved(half, size))) for pair in pairs for half in range(2)]
    return rows


def interleaved(half: int, size: int) -> list[int]:
    """Lanes of the lower (0) or upper (1) halves of two vectors of `size`, taken in turn."""
    return [i + j for i in range(size // 2 * half, size // 2 * (half + 1)) for j in (0, size)]
