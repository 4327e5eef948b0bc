"""Products with shift weights in panels of integers (`shiftadd3d.kernels.pack.shift`), between float32 activations.

Rows of activations are staged, a block at a time: rounded to bfloat16, or to integers up to the form's largest one,
which stands for the largest magnitude of the row. A form cannot express activations beyond ``2**64``, infinity and NaN,
nor those of integer rows whose largest magnitude is below ``2**-64``: then a flag is raised.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from shiftadd3d.kernels.cpu.blocks import folded_each
from shiftadd3d.kernels.cpu.forms.base import HIGHEST, LOWEST
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.tile import Tile, Vectors, halves_of, product_in_tiles
from shiftadd3d.kernels.pack.shift import PAIR, PanelForm, panel_shape
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index

ROW_PADDING = 32
"""Rows beyond the last one that may be asked for and written to: they are staged and multiplied some at a time."""

AnyForm: TypeAlias = Literal["float32"] | PanelForm

Source = Callable[[Expr, int], Expr]
"""``source(row, column)``: the vector of float32 activations of a row from a column on."""

Sink = Callable[[Expr, int, Expr], None]
"""``sink(row, column, x)``: what to do with a vector of outcomes."""


@dataclass(frozen=True)
class Staged:
    """Rows of activations as a form's instructions take them.

    Attributes:
        inputs: of a row.
        words: [rows, words of a row] int32.
        scales: [rows], what sums of integers are multiplied by.
    """

    inputs: int
    words: Buffer
    scales: Buffer


class PanelProduct(ABC):
    """The code of products of one form; `panel_product` makes one, at the beginning of a task."""

    def __init__(self, target: CpuTarget, form: PanelForm) -> None:
        self.isa, self.form, self.pair = Isa(target), form, PAIR[form]
        self._unfit = self.isa.register(0, integer=True)  # above zero in some lane where an activation does not fit

    def staged(self, rows: int | Expr, inputs: int) -> Staged:
        """Memory for so many rows."""
        words = -(-inputs // (self.pair * self.isa.lanes)) * self.isa.lanes
        room = rows + ROW_PADDING
        return Staged(inputs, T.alloc(room, words, dtype="int32"), T.alloc(room))

    @abstractmethod
    def stage(self, staged: Staged, rows: Index, source: Source | Buffer) -> None:
        """Stage rows. What a source gives for those beyond the last one counts: let it be that one again."""

    @abstractmethod
    def multiply(self, rows: Index, staged: Staged, panel: Buffer, bias: Vectors | Buffer, sink: Sink | Buffer) -> None:
        """``sink(r, c, bias(r, c) + sum over k of activation(r, k) * weight(k, c))`` for all vectors of columns."""

    def finish(self, flag: Buffer) -> None:
        """Emit what a task has to do last: raise the flag [1] int32 if an activation did not fit."""
        with T.when(self.isa.largest_int(self._unfit.value) > 0):
            flag[0] = T.int32(1)

    def unit(self, panel: Buffer, column: Index) -> Expr:
        """A vector of the outputs' units."""
        return self.isa.as_float(panel[panel.extent(0) - 1, self.isa.at(column)])

    def bias_of(self, bias: Vectors | Buffer) -> Vectors:
        return bias if callable(bias) else lambda r, c: bias[self.isa.at(c)]

    def source_of(self, source: Source | Buffer, rows: Index) -> Source:
        """The first rows of a buffer as a source."""
        if callable(source):
            return source
        last = rows - 1
        return lambda r, c: source[T.min(r, last), self.isa.at(c)]

    def sink_of(self, sink: Sink | Buffer) -> Sink:
        """A buffer [rows, columns] as a sink."""
        if callable(sink):
            return sink

        def store(r: Expr, c: int, x: Expr) -> None:
            sink[r, self.isa.at(c)] = x

        return store


class IntegerProduct(PanelProduct):
    """Dot products of bytes or of 16-bit integers."""

    def __init__(self, target: CpuTarget, form: PanelForm) -> None:
        super().__init__(target, form)
        self._most = 127 if form == "int8" else 32767
        self._peaks, self._factors = T.alloc(self.isa.lanes, self.isa.lanes, dtype="int32"), T.alloc(self.isa.lanes)

    def stage(self, staged: Staged, rows: Index, source: Source | Buffer) -> None:
        isa, source = self.isa, self.source_of(source, rows)
        with T.serial((rows + (isa.lanes - 1)) // isa.lanes) as batch:
            top = T.bind(batch * isa.lanes)
            with T.serial(isa.lanes) as i:
                peak = isa.register(isa.magnitude_bits(source(top + i, 0)), integer=True)
                for c in range(isa.lanes, staged.inputs, isa.lanes):
                    peak.value = T.max(peak.value, isa.magnitude_bits(source(top + i, c)))
                self._peaks[i, isa.at(0)] = peak.value
            peaks = folded_each(isa, self._peaks, T.max, integer=True)
            low, high = isa.splat_int(LOWEST), isa.splat_int(HIGHEST)
            zero, one = isa.splat_int(0), isa.splat_int(1)
            too_low = T.select(peaks < low, T.min(peaks, one), zero)
            self._unfit.value = T.max(self._unfit.value, T.max(too_low, T.select(peaks < high, zero, one)))
            largest = isa.keep(isa.as_float(T.max(peaks, low)))
            staged.scales[isa.at(top)] = largest * isa.splat(1.0 / self._most)
            self._factors[isa.at(0)] = isa.splat(float(self._most)) / largest
            with T.serial(isa.lanes) as i:
                factor = T.bind(isa.splat(self._factors[i]))
                for c in range(0, staged.inputs, self.pair * isa.lanes):
                    columns = range(c, c + self.pair * isa.lanes, isa.lanes)
                    staged.words[top + i, isa.at(c // self.pair)] = self._words(
                        [isa.to_nearest(source(top + i, j) * factor) if j < staged.inputs else zero for j in columns]
                    )

    def _words(self, integers: list[Expr]) -> Expr:
        if self.form == "int16":
            return self.isa.to_int16(*integers)
        return self.isa.to_int8(integers) ^ self.isa.splat_int(-0x7F7F7F80)  # the sign bits turned: 128 is added

    def multiply(self, rows: Index, staged: Staged, panel: Buffer, bias: Vectors | Buffer, sink: Sink | Buffer) -> None:
        isa, start, sink = self.isa, 0, self.sink_of(sink)
        vectors, widest = panel.extent(1) // isa.lanes, 4 if isa.target.has_avx512 else 2
        while start < vectors:
            across = min(widest, vectors - start)
            self._columns(rows, staged, panel, (start * isa.lanes, across), self.bias_of(bias), sink)
            start += across

    def _columns(
        self, rows: Index, staged: Staged, panel: Buffer, columns: tuple[int, int], bias: Vectors, sink: Sink
    ) -> None:
        """Some of the columns: the first, and how many vectors. 24 accumulators of 32 registers, or 12 of 16."""
        isa, (left, across) = self.isa, columns
        height = min(8, (24 if isa.target.has_avx512 else 12) // across)
        words = staged.inputs // self.pair
        totals = Tile(isa, height, across * isa.lanes, "int32")
        with T.serial((rows + (height - 1)) // height) as number:
            top = T.bind(number * height)
            totals.fill(lambda i, j: panel[words, isa.at(left + j)])
            totals.add_products(
                words,
                lambda i, k: staged.words[top + i, k],
                lambda k, j: panel[k, isa.at(left + j)],
                self._dot,
            )
            for i, j, x in totals.vectors():
                x = T.cast(x, isa.floats) * isa.splat(staged.scales[top + i])
                sink(top + i, left + j, isa.fma(x, self.unit(panel, left + j), bias(top + i, left + j)))

    def _dot(self, x: Expr, weights: Expr, sums: Expr) -> Expr:
        return self.isa.dot_int16(x, weights, sums) if self.form == "int16" else self.isa.dot_int8(weights, x, sums)


class TileProduct(PanelProduct):
    """Matrix tiles of bfloat16 (AMX), two by two.

    A panel of more inputs than there are activations holds weights in pieces, of which each is multiplied.
    """

    def __init__(self, target: CpuTarget, form: PanelForm) -> None:
        super().__init__(target, form)
        self.isa.configure_tiles()
        self._sums = T.alloc(32, 32)

    def stage(self, staged: Staged, rows: Index, source: Source | Buffer) -> None:
        isa, source = self.isa, self.source_of(source, rows)
        largest = isa.register(0, integer=True)
        with T.serial((rows + 31) // 32 * 32) as row:
            for c in range(0, staged.inputs, 2 * isa.lanes):
                low, high = (isa.keep(source(row, c + j)) for j in (0, isa.lanes))
                for x in (low, high):
                    largest.value = T.max(largest.value, isa.magnitude_bits(x))
                staged.words[row, isa.at(c // 2)] = isa.to_bfloat16(low, high)
        self._unfit.value = T.max(self._unfit.value, largest.value - isa.splat_int(HIGHEST - 1))

    def multiply(self, rows: Index, staged: Staged, panel: Buffer, bias: Vectors | Buffer, sink: Sink | Buffer) -> None:
        isa, of_column, sums, words = self.isa, self.bias_of(bias), self._sums, staged.inputs // 2
        sink = self.sink_of(sink)
        pieces = range(0, panel.extent(0) - 1, words)
        parts = [(word, piece + word) for word in range(0, words, 16) for piece in pieces]
        with T.serial((rows + 31) // 32) as number:
            top = T.bind(number * 32)
            here = T.bind(T.min(T.int64(32), rows - top))
            for left in range(0, panel.extent(1), 32):
                product_in_tiles(isa, staged.words, top, panel, left, parts, sums, 0)
                with T.serial(here) as i:
                    r = T.bind(top + i)
                    for j in halves_of(panel, left):
                        c = left + 16 * j
                        sink(r, c, isa.fma(sums[i, isa.at(16 * j)], self.unit(panel, c), of_column(r, c)))

    def finish(self, flag: Buffer) -> None:
        self.isa.release_tiles()
        super().finish(flag)


def panel_arguments(form: PanelForm, sizes: Sequence[tuple[int, int]], name: str = "") -> list[Buffer]:
    """The next arguments of a function, panels of these inputs and outputs."""
    shapes = enumerate(panel_shape(form, *size) for size in sizes)
    return [T.argument(f"shifts{name}_{number}", shape, "int32", align=64) for number, shape in shapes]


def panel_product(target: CpuTarget, form: PanelForm) -> PanelProduct:
    """The code of products of a form, within a task."""
    return TileProduct(target, form) if form == "bfloat16" else IntegerProduct(target, form)


def error_bound(form: PanelForm) -> float:
    """What an activation may be off by, as a multiple of the largest magnitude of its row."""
    return {"int16": 1 / 65534, "int8": 1 / 254, "bfloat16": 2.0**-9}[form] * 1.001
