"""Products with power-of-two weights, one block of rows at a time: the code that shift kernels are made of.

A product goes through stages, for each of which there is a method that emits its code:

1. `stage` brings a block of activations into the form that the machine's instructions take, in scratch memory that
   stays in the second-level cache.
2. `decode` turns the codes of a panel of outputs into numbers, a block of inputs at a time.
3. `multiply` sums up a tile of the outcome over a block of inputs.

`panels` does 2 and 3 for a range of outputs, and hands the outcome over to be stored.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from shiftadd3d.kernels.cpu.blocks import activate
from shiftadd3d.kernels.cpu.decode import EXPONENT_BIAS, FRACTION_BITS, GROUP, Decoder, Scratch, Weights
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.tile import Tile
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.memory import Dtype
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index, Load, Store

Form = Literal["float32", "int16", "int8", "bfloat16x1", "bfloat16x3"]

# The bits of 2**-64 and 2**64.
LOWEST, HIGHEST = ((EXPONENT_BIAS + exponent) << FRACTION_BITS for exponent in (-64, 64))


def tile_shape(target: CpuTarget, form: Form) -> tuple[int, int]:
    """Rows and columns of a tile.

    Two vectors across, and accumulators in 12 of 16 registers, or in 24 of 32; or two by two of AMX's tiles.
    """
    rows = 32 if form.startswith("bfloat16") else 12 if target.has_avx512 else 6
    return rows, 2 * target.lanes


class ShiftProduct(Decoder):
    """The code of one product; `shift_product` makes one.

    Attributes:
        rows: rows of a tile; memory is for a multiple of them.
        columns: outputs of a panel.
        block: inputs whose weights are decoded at a time.
    """

    number = "int32"
    """What staged activations and decoded weights are stored as; int32 stands for `pair` shorter numbers."""
    pair = 2
    pieces = 1
    """How many numbers there are for each activation."""
    has_factors = False
    """Whether weights lack their channel's offset, which sums are then multiplied by."""
    coarse = False
    """Whether rounding makes more difference than a coarse activation function (`blocks.activate`)."""

    def __init__(self, target: CpuTarget, form: Form, bits: int, terms: int, dtype: Dtype, block: int) -> None:
        self.rows, columns = tile_shape(target, form)
        super().__init__(Isa(target), columns, bits, terms, block)
        self.round_weights = dtype == "bfloat16"  # as the twin does, where two terms make it necessary
        # A little more than a power of two: the rows of a tile must not all fall into the same few lines of the cache.
        self.stride = block // self.pair + 16
        # 24 independent sums need no unrolling, and LLVM takes a longer chain of dot products apart.
        self.unroll = 1 if target.has_avx512 else 2

    def scratch(self, rows: Index, inputs: Expr) -> Scratch:
        """Allocate the memory of a task for `rows` rows (a multiple of `self.rows`) of `inputs` inputs."""
        blocks = T.bind((inputs + (self.block - 1)) // self.block)
        decoded = -(-self.block // (2 * GROUP)) * (2 * GROUP)
        return Scratch(
            rows=rows,
            blocks=blocks,
            activations=T.alloc(self.pieces * blocks * rows, self.stride, dtype=self.number),
            bytes=T.alloc(self.columns, decoded * self.bits // 8 + GROUP, dtype="uint8"),
            codes=T.alloc(max(self.columns, GROUP), GROUP, dtype="uint8"),
            panel=T.alloc(decoded // self.pair, self.columns, dtype=self.number),
            units=T.alloc(self.columns, dtype="int32"),
            bias=T.alloc(self.columns),
            factors=T.alloc(self.columns),
            sums=T.alloc(rows, self.columns),
            scales=T.alloc(rows + self.isa.lanes),
            starts=T.alloc(blocks, rows + self.isa.lanes, dtype="int32"),
        )

    def release(self) -> None:
        """Emit what a task has to do last."""

    def stage(
        self,
        scratch: Scratch,
        rows: Expr,
        inputs: Expr,
        load: Load,
        flag: Buffer,
        before_rows: Callable[[Expr, Expr], None] | None = None,
    ) -> None:
        """Bring `rows` rows of `inputs` activations into `scratch.activations`.

        Args:
            load: ``load(row, start, count)``: `count` float32 activations of a row from input `start` on, a vector, or
                a scalar if `count` is 1.
            flag: its first number, an int32, is set to 1 if the form cannot express an activation.
            before_rows: ``before_rows(first, count)`` emits what prepares rows that are loaded next, as many as a
                vector has lanes or, of the last ones, fewer.
        """
        self.before_staging()
        with self.isa.groups(rows) as (first, count):
            if before_rows is not None:
                before_rows(first, count)
            self.stage_rows(scratch, first, count, inputs, load, flag)
        self.fill_up(scratch, rows)

    def before_staging(self) -> None:
        """Emit what `stage_rows` needs once for all rows."""

    def stage_rows(self, scratch: Scratch, first: Expr, count: Expr, inputs: Expr, load: Load, flag: Buffer) -> None:
        """`stage` of `count` rows, no more than a vector has lanes. Blocks of inputs are filled up with zeros as far as
        `multiply` reads them."""
        with T.serial(count) as i:
            self.stage_row(scratch, T.bind(first + i), inputs, load, flag)

    def fill_up(self, scratch: Scratch, rows: Expr) -> None:
        """Stage rows of zeros up to the end of the last tile: their sums go nowhere, but must not be slow to form."""
        isa = self.isa
        parts, blocks = self.stride // isa.lanes, self.pieces * scratch.blocks
        zero = T.broadcast(T.number(self.number, 0), isa.lanes)
        with T.serial(-rows % self.rows) as spare, T.serial(blocks) as block, T.serial(parts) as part:
            scratch.activations[block * scratch.rows + rows + spare, isa.at(part * isa.lanes)] = zero

    def panels(
        self,
        scratch: Scratch,
        rows: Expr,
        weights: Weights,
        first: Expr,
        last: Expr,
        apply: Callable[[Expr], Expr],
        store: Store,
        *,
        whole_tiles: bool = False,
    ) -> None:
        """Multiply `rows` staged rows by the weights of panels `first` to `last` - 1, and store the outputs.

        Args:
            apply: what becomes of a vector of outputs before it is stored, for instance its activation.
            store: ``store(row, output, value, count)`` stores `count` outputs, a vector, or a scalar if `count` is 1.
            whole_tiles: whether `store` has room for rows and outputs beyond the last ones, up to the end of a tile.
        """
        turns = scratch.blocks * self.passes
        with T.serial(last - first) as step:
            start = T.bind((first + step) * self.columns)
            self._take_bias(scratch, weights, start)
            outcome = _Outcome(self, scratch, rows, weights.outputs, start, apply, store, whole_tiles)
            with T.serial(turns) as turn:
                block = T.bind(turn // self.passes)
                count = T.bind(T.min(weights.inputs - block * self.block, T.int64(self.block)))
                self.decode(scratch, weights, start, turn, count)
                with T.serial((rows + (self.rows - 1)) // self.rows) as tile:
                    row = T.bind(tile * self.rows)
                    place = T.bind(self.place_of_sums(scratch, row))
                    sums = self.multiply(scratch, row, turn, count)
                    if sums:
                        outcome.from_registers(sums, row, place, turn + 1 == turns)
                    else:
                        outcome.from_memory(row, place, turn + 1 == turns)

    def _take_bias(self, scratch: Scratch, weights: Weights, start: Expr) -> None:
        """Bring the bias and the factors of a panel's outputs into `scratch`, with zeros beyond the last one."""
        with T.serial(self.columns) as column:
            inside, output = start + column < weights.outputs, start + column
            scratch.bias[column] = T.if_then_else(inside, weights.bias[output], T.float32(0))
            if self.has_factors:
                scratch.factors[column] = self.factor(weights, output, inside)

    def factor(self, weights: Weights, output: Expr, inside: Expr) -> Expr:
        """Where `has_factors`: what a channel's sums are multiplied by, if there is one."""
        exponent = T.if_then_else(inside, self.exponent(weights, output), T.int32(0))
        return T.reinterpret("float32", (exponent + EXPONENT_BIAS) << FRACTION_BITS)

    def exponent(self, weights: Weights, output: Expr) -> Expr:
        """Of that factor, if it is a power of two: int32."""
        raise NotImplementedError

    def stage_row(self, scratch: Scratch, row: Expr, inputs: Expr, load: Load, flag: Buffer) -> None:
        """`stage_rows` of one row, for forms that have nothing to gain from more."""
        raise NotImplementedError

    @abstractmethod
    def multiply(self, scratch: Scratch, row: Expr, turn: Expr, count: Expr) -> Tile | None:
        """The product of the tile of rows that begins at `row` by the panel, over all turns up to this one.

        Sums of earlier turns are taken from `scratch.sums`.

        Returns:
            The sums in float32, in registers; or None if they are in `scratch.sums`.
        """

    def place_of_sums(self, scratch: Scratch, row: Expr) -> Expr:
        """The row of `scratch.sums` that the sums of a tile begin at; one place serves all if it is for one turn only.

        They then stay in the first-level cache on their way to the outcome.
        """
        return T.select(scratch.blocks * self.passes == 1, T.int64(0), row)

    # What forms have in common.

    def activation(self, name: Activation) -> Callable[[Expr], Expr]:
        """What an activation function makes of a vector of outputs, as exactly as this form's rounding is worth it."""
        return partial(activate, self.isa, name, coarse=self.coarse)

    def refuse_extremes(self, magnitudes: Expr, flag: Buffer) -> Expr:
        """Raise the flag unless the largest of a vector of magnitudes is zero or in the middle of float32's range.

        Returns:
            Its bits, int32.
        """
        peak = T.bind(self.isa.largest_int(magnitudes))
        with T.when(T.either(peak >= HIGHEST, T.both(peak > 0, peak < LOWEST))):
            flag[0] = T.int32(1)
        return peak

    def groups_of_vectors(
        self, row: Expr, first: Expr, count: Expr, load: Load, use: Callable[[list[Expr], Expr], None], group: int
    ) -> None:
        """Emit ``use(vectors, part)`` for `count` activations of a row, `group` vectors at a time, the last ones, with
        zeros behind them, first: LLVM makes a call of copying those, across which no vector stays in a register."""
        isa, lanes, size = self.isa, self.isa.lanes, group * self.isa.lanes
        starts = range(0, size, lanes)
        known = T.known(count)
        if known is not None and known % lanes == 0:
            with T.serial(known // size) as i:
                use([T.bind(load(row, first + (i * size + j), lanes)) for j in starts], i)
            behind = known // size * size
            if behind < known:
                zero, last = isa.splat(0), [behind + j for j in starts]
                xs = [T.bind(load(row, first + j, lanes)) if j < known else zero for j in last]
                use(xs, T.int64(known // size))
            return
        rest = T.alloc(size)
        part, left = T.bind(count // size), T.bind(count % size)
        with T.when(left > 0):
            behind = T.bind(first + part * size)
            for j in starts:
                rest[isa.at(j)] = isa.splat(0)
            with T.serial(left // lanes) as i:
                rest[isa.at(i * lanes)] = load(row, behind + i * lanes, lanes)
            with T.serial(left % lanes) as i:
                position = left // lanes * lanes + i
                rest[position] = load(row, behind + position, 1)
            use([T.bind(rest[isa.at(j)]) for j in starts], part)
        with T.serial(part) as i:
            position = T.bind(first + i * size)
            use([T.bind(load(row, position + j, lanes)) for j in starts], i)

    def each_block(self, scratch: Scratch, inputs: Expr, use: Callable[[Expr, Expr, Expr], None]) -> None:
        """Emit ``use(block, first input, number of inputs)`` for all blocks of inputs."""
        known = T.known(inputs)
        if known is not None:
            whole, rest = divmod(known, self.block)
            if whole:
                with T.serial(whole) as block:
                    use(block, T.bind(block * self.block), T.int64(self.block))
            if rest:
                use(T.int64(whole), T.int64(whole * self.block), T.int64(rest))
            return
        with T.serial(scratch.blocks) as block:
            first = T.bind(block * self.block)
            use(block, first, T.bind(T.min(inputs - first, T.int64(self.block))))

    def add_products(
        self,
        totals: Tile,
        scratch: Scratch,
        row: Expr,
        turn: Expr,
        count: Expr,
        multiply_add: Callable[[Expr, Expr, Expr], Expr],
    ) -> None:
        """Add to a tile the products of a block of inputs by the panel."""
        staged = T.bind(turn * scratch.rows + row)
        inputs = self.pair * self.unroll
        totals.add_products(
            (count + (inputs - 1)) // inputs,
            lambda i, k: scratch.activations[staged + i, k],
            lambda k, j: scratch.panel[k, self.isa.at(j)],
            multiply_add,
            self.unroll,
        )

    def copy_panel(self, scratch: Scratch, weights: Weights, start: Expr, first: Expr, rows: Expr) -> None:
        """`decode` of ordinary weights in panels ready made: copy so many rows of a panel, from the first one on."""
        panel = weights.codes.part(T.bind(T.truncdiv(start, T.int64(self.columns))))
        with T.serial(rows) as row:
            for j in self.vectors:
                scratch.panel[row, self.isa.at(j)] = panel[first + row, self.isa.at(j)]

    def add_earlier(self, scratch: Scratch, row: Expr, turn: Expr, sums: Tile) -> None:
        """Add to a tile the sums of earlier turns."""
        with T.when(turn > 0):
            sums.fill(lambda i, j: scratch.sums[row + i, self.isa.at(j)] + sums.vector(i, j))


@dataclass(frozen=True)
class _Outcome:
    """Where the sums of a panel go."""

    product: ShiftProduct
    scratch: Scratch
    rows: Expr
    outputs: Expr  # of the layer
    start: Expr  # the panel's first output
    apply: Callable[[Expr], Expr]
    store: Store
    whole_tiles: bool  # that `store` takes, rows and outputs beyond the last ones included

    def from_registers(self, sums: Tile, row: Expr, place: Expr, complete: Expr) -> None:
        """Store a tile's outputs, if its sums are complete; else keep them in `scratch.sums`.

        Args:
            row: the tile's first.
            place: see `ShiftProduct.place_of_sums`.
        """
        isa, whole = self.product.isa, T.both(row + self.product.rows <= self.rows, self._has_all_columns)
        with T.If(complete if self.whole_tiles else T.both(complete, whole)):
            with T.Then():
                for i, j, x in sums.vectors():
                    self.store(row + i, self.start + j, self._output(x, j), isa.lanes)
            with T.Else():
                for i, j, x in sums.vectors():
                    self.scratch.sums[place + i, isa.at(j)] = x
        if not self.whole_tiles:
            with T.when(T.both(complete, T.negate(whole))):
                self._from_memory(row, place, has_all_columns=False)

    def from_memory(self, row: Expr, place: Expr, complete: Expr) -> None:
        """Store the outputs of a tile whose sums are in `scratch.sums`, if they are complete."""
        with T.when(complete), T.If(self._has_all_columns):
            with T.Then():
                self._from_memory(row, place, has_all_columns=True)
            with T.Else():
                self._from_memory(row, place, has_all_columns=False)

    @property
    def _has_all_columns(self) -> Expr:
        return self.start + self.product.columns <= self.outputs

    def _from_memory(self, row: Expr, place: Expr, *, has_all_columns: bool) -> None:
        isa, sums, start = self.product.isa, self.scratch.sums, self.start
        with T.serial(T.min(self.rows - row, T.int64(self.product.rows))) as i:
            for j in self.product.vectors:
                value = self._output(sums[place + i, isa.at(j)], j)
                if has_all_columns:
                    self.store(row + i, start + j, value, isa.lanes)
                    continue
                with T.If(start + (j + isa.lanes) <= self.outputs):
                    with T.Then():
                        self.store(row + i, start + j, value, isa.lanes)
                    with T.Else():
                        sums[place + i, isa.at(j)] = value
                        with T.serial(T.max(self.outputs - start - j, T.int64(0))) as rest:
                            self.store(row + i, start + j + rest, sums[place + i, j + rest], 1)

    def _output(self, sums: Expr, j: int) -> Expr:
        """What is stored of a vector of sums, those of the panel's outputs from j on."""
        at = self.product.isa.at(j)
        factors, bias = self.scratch.factors[at], self.scratch.bias[at]
        return self.apply(
            T.bind(self.product.isa.fma(sums, factors, bias) if self.product.has_factors else sums + bias)
        )
