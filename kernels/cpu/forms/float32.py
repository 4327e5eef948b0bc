"""Products in float32, of powers of two and of ordinary weights."""

from __future__ import annotations

from collections.abc import Callable

from shiftadd3d.kernels.cpu.decode import EXPONENT_BIAS, FRACTION_BITS, GROUP, Scratch, Weights, steps_of_32, transpose
from shiftadd3d.kernels.cpu.forms.base import Form, ShiftProduct
from shiftadd3d.kernels.cpu.tile import Tile
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.memory import Dtype
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index, Load, Store


class Float32Product(ShiftProduct):
    number, pair = "float32", 1

    def __init__(self, target: CpuTarget, form: Form, bits: int, terms: int, dtype: Dtype) -> None:
        # A panel takes up half of a first-level cache at most. Every block is summed up on its own: with longer ones
        # the errors of rounding would exceed those of torch's products.
        super().__init__(target, form, bits, terms, dtype, block=128)
        self.by_pairs = bits == 4 and terms == 1 and "avx2" in target.flags

    def expand_pairs(self, scratch: Scratch, count: Expr, load: Callable[[int, Expr], Expr]) -> None:
        # A table makes integers of codes. These change places 16 channels by 16 inputs, and become floats last.
        isa = self.isa
        exponents = {j: scratch.units[isa.at(j)] + isa.splat_int(1) for j in self.vectors}
        units = {j: T.bind(isa.as_float(exponents[j] << isa.splat_int(FRACTION_BITS))) for j in self.vectors}
        with T.serial(steps_of_32(count)) as step:
            for column in range(0, self.columns, GROUP):
                channels = [self.look_up(load(column + i, step)) for i in range(GROUP)]
                for half, integers in enumerate(zip(*channels, strict=True)):
                    for i, row in enumerate(transpose(integers)):
                        for j in range(0, GROUP, isa.lanes):
                            part = T.cast(T.shuffle([row], range(j, j + isa.lanes)), isa.floats)
                            place = (2 * step + half) * GROUP + i
                            scratch.panel[place, isa.at(column + j)] = part * units[column + j]

    def scales_of_words(self, scratch: Scratch, weights: Weights, start: Expr) -> list[Expr | None]:
        with T.serial(self.columns) as column:
            inside, output = start + column < weights.outputs, start + column
            unit = T.if_then_else(inside, self.unit(weights, 0, output), T.int32(EXPONENT_BIAS))
            scratch.units[column] = (unit + T.int32(1)) << FRACTION_BITS
        return [self.isa.keep(self.isa.as_float(scratch.units[self.isa.at(j)])) for j in self.vectors]

    def store_words(self, scratch: Scratch, word: Expr, column: Expr, bytes_: Expr, scale: Expr | None) -> None:
        assert scale is not None
        for i, integers in enumerate(self.integers_of(bytes_)):
            scratch.panel[word * 4 + i, column] = T.cast(integers, self.isa.floats) * scale

    def store_weights(self, scratch: Scratch, codes: list[Expr], group: Expr, column: Expr, add: bool) -> None:
        unit = T.bind(scratch.units[column])
        for k, code in enumerate(codes):
            weight = self.isa.as_float(self._float_bits(code, unit))
            if add:
                weight = scratch.panel[group * GROUP + k, column] + weight
                weight = self.isa.round_to_bfloat16(weight) if self.round_weights else weight
            scratch.panel[group * GROUP + k, column] = weight

    def _float_bits(self, codes: Expr, unit: Expr) -> Expr:
        """The bits of float32 weights; `unit` is what level 0 would have in its exponent's place."""
        integers = self.isa.splat_int
        level = T.bind(self.level(codes))
        magnitude = T.select(level == integers(0), integers(0), (level + unit) << integers(FRACTION_BITS))
        return magnitude | (self.negative(codes) << integers(31))

    def stage_row(self, scratch: Scratch, row: Expr, inputs: Expr, load: Load, flag: Buffer) -> None:
        lanes = self.isa.lanes

        def copy(block: Expr, first: Expr, count: Expr) -> None:
            staged = scratch.activations.part(T.bind(block * scratch.rows + row))
            with T.serial(count // lanes) as part:
                staged[self.isa.at(part * lanes)] = load(row, first + part * lanes, lanes)
            with T.serial(count % lanes) as rest:
                position = count // lanes * lanes + rest
                staged[position] = load(row, first + position, 1)
            with T.serial(-count % self.unroll) as rest:
                staged[count + rest] = T.float32(0)

        self.each_block(scratch, inputs, copy)

    def stage_store(self, scratch: Scratch) -> Store:
        """What stores outputs of a product before this one where `stage` would bring them; then call `finish_stage`."""

        def store(row: Index, column: Index, value: Expr, count: int) -> None:
            block, position = column // self.block, column % self.block
            scratch.activations[block * scratch.rows + row, T.at(position, count)] = value

        return store

    def finish_stage(self, scratch: Scratch, rows: Expr, inputs: Expr) -> None:
        """Do the rest of `stage` once all outputs are stored."""
        block, count = T.bind((inputs - 1) // self.block), T.bind((inputs - 1) % self.block + 1)
        with T.serial(rows) as row, T.serial(-count % self.unroll) as rest:
            scratch.activations[block * scratch.rows + row, count + rest] = T.float32(0)
        self.fill_up(scratch, rows)

    def multiply(self, scratch: Scratch, row: Expr, turn: Expr, count: Expr) -> Tile:
        sums = Tile(self.isa, self.rows, self.columns)
        sums.fill(lambda i, j: self.isa.splat(0))
        self.add_products(sums, scratch, row, turn, count, self.isa.fma)
        self.add_earlier(scratch, row, turn, sums)
        return sums


class OrdinaryProduct(Float32Product):
    """A product with ordinary weights: panels are transposed, from [outputs, inputs] float32, where others decode."""

    def __init__(self, target: CpuTarget) -> None:
        super().__init__(target, "float32", bits=4, terms=1, dtype="float32")  # no codes are ever looked at

    def decode(self, scratch: Scratch, weights: Weights, start: Expr, turn: Expr, count: Expr) -> None:
        isa, lanes = self.isa, self.isa.lanes
        first = T.bind(turn * self.block)

        def weight(column: Index, inputs: Expr) -> Expr:
            # Columns beyond the last one come to something, which nobody stores.
            return weights.codes[T.min(start + column, weights.outputs - 1), inputs]

        with T.serial(count // lanes) as part:
            for j in self.vectors:
                rows = [T.bind(weight(j + i, isa.at(first + part * lanes))) for i in range(lanes)]
                for k, row in enumerate(transpose(rows)):
                    scratch.panel[part * lanes + k, isa.at(j)] = row
        with T.serial(count % lanes) as rest, T.serial(self.columns) as column:
            position = count // lanes * lanes + rest
            scratch.panel[position, column] = weight(column, first + position)
        self._fill_up_panel(scratch, count)

    def _fill_up_panel(self, scratch: Scratch, count: Expr) -> None:
        """Put weights of zero behind those of `count` inputs, as far as `multiply` reads them."""
        with T.serial(-count % self.unroll) as rest:
            for j in self.vectors:
                scratch.panel[count + rest, self.isa.at(j)] = self.isa.splat(0)


class PanelProduct(OrdinaryProduct):
    """The same, of weights that lie in panels ready made, [panels, inputs, columns]."""

    def decode(self, scratch: Scratch, weights: Weights, start: Expr, turn: Expr, count: Expr) -> None:
        self.copy_panel(scratch, weights, start, T.bind(turn * self.block), count)
        self._fill_up_panel(scratch, count)
