"""What the views show, in bfloat16 from function to function, and products of it in matrix tiles (AMX).

`shiftadd3d.kernels.cpu.forms.panels` stages float32 activations and hands on sums vector by vector. Here rows are
packed where they come up, and sums are used while they are in the first-level cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shiftadd3d.kernels.cpu.forms.base import HIGHEST
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr

WORDS = 16
"""Words of a row that a tile takes, of two numbers each."""
ROWS = 32
"""Rows at once: as many more than the last one are read and written to."""


class Tiles:
    """The tile registers of a task, from here until `finish`: 0 to 3 are sums, 4 and 5 rows, 6 and 7 weights."""

    def __init__(self, target: CpuTarget) -> None:
        self.isa = Isa(target)
        self.isa.configure_tiles()
        self._largest = self.isa.register(0, integer=True)

    def pack(self, low: Expr, high: Expr) -> Expr:
        """A vector of words of two vectors of float32, in order. `finish` tells of those that are too large."""
        low, high = self.isa.keep(low), self.isa.keep(high)
        for x in (low, high):
            self._largest.value = T.max(self._largest.value, self.isa.magnitude_bits(x))
        return self.isa.to_bfloat16(low, high)

    def finish(self, flag: Buffer) -> None:
        """Emit what a task has to do last: raise the flag [1] int32 if a number was above 2**64, infinite or NaN."""
        self.isa.release_tiles()
        with T.when(self.isa.largest_int(self._largest.value) > HIGHEST - 1):
            flag[0] = T.int32(1)

    def multiply(
        self,
        rows: Expr,
        packed: Buffer,
        panel: Buffer,
        parts: Sequence[tuple[int, int]],
        sums: Buffer,
        use: Callable[[Expr, Expr], None] | None = None,
    ) -> None:
        """The products of rows with a panel.

        Args:
            rows: how many.
            packed: [rows and `ROWS`, words] int32.
            panel: [*, outputs] int32, as `shiftadd3d.kernels.pack.shift` packs bfloat16; outputs are a multiple of 16.
            parts: what is summed up: the first of `WORDS` words of a row, and the panel's row that belongs to it.
            sums: [rows and `ROWS`, outputs], for the products.
            use: with it, sums are [ROWS, outputs], and ``use(row, i)`` finds those of a row in row i.
        """
        with T.serial((rows + (ROWS - 1)) // ROWS) as number:
            top = T.bind(number * ROWS)
            for left in range(0, panel.extent(1), 32):
                self._columns(top, packed, panel, parts, left, sums if use else sums.below(top))
            if use is not None:
                with T.serial(T.min(T.int64(ROWS), rows - top)) as i:
                    use(T.bind(top + i), i)

    def _columns(
        self, top: Expr, packed: Buffer, panel: Buffer, parts: Sequence[tuple[int, int]], left: int, sums: Buffer
    ) -> None:
        """Two tiles of columns, from one on, of `ROWS` rows."""
        isa, width, pitch = self.isa, panel.extent(1), 4 * packed.extent(1)
        halves = [j for j in range(2) if left + 16 * j < width]
        places = [(i, j) for i in range(2) for j in halves]
        for i, j in places:
            isa.zero_tile(2 * i + j)
        for first in dict.fromkeys(first for first, _ in parts):
            for i in range(2):
                isa.load_tile(4 + i, packed.address(top + 16 * i, first), pitch)
            for row in (row for start, row in parts if start == first):
                for j in halves:
                    isa.load_tile(6 + j, panel.address(row, left + 16 * j), 4 * width)
                for i, j in places:
                    isa.multiply_tiles(2 * i + j, 4 + i, 6 + j)
        for i, j in places:
            isa.store_tile(2 * i + j, sums.address(16 * i, left + 16 * j), 4 * sums.extent(1))


def unit(isa: Isa, panel: Buffer, column: int) -> Expr:
    """A vector of what a panel's outputs count in."""
    return isa.as_float(panel[panel.extent(0) - 1, isa.at(column)])


def copy_words(source: Buffer, out: Buffer, count: int) -> None:
    """So many words of a row, a multiple of `WORDS`."""
    for start in range(0, count, WORDS):
        out[T.ramp(start, WORDS)] = source[T.ramp(start, WORDS)]


def unpacked(isa: Isa, words: Expr) -> tuple[Expr, Expr]:
    """The numbers of a vector of words: the first ones of each, and the second ones."""
    words = isa.keep(words, integer=True)
    return isa.as_float(words << isa.splat_int(16)), isa.as_float(words & isa.splat_int(-65536))
