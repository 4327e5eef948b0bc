"""Products in matrix tiles (AMX) of rows that are packed in bfloat16 already.

The values of the views stay in bfloat16 from function to function. `shiftadd3d.kernels.cpu.forms.panels` does it
differently: it stages float32 activations and hands on sums vector by vector. Here the code that makes a row packs it,
and sums are used while they are in the first-level cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shiftadd3d.kernels.cpu.forms.base import HIGHEST
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.tile import product_in_tiles
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr

WORDS = 16
"""Words of a row in one tile. A word has two numbers."""
ROWS = 32
"""Rows that are multiplied at once. Buffers need this many rows beyond the last: they are read and written, too."""


class Tiles:
    """The tile registers of a task, from here to `finish`."""

    def __init__(self, target: CpuTarget) -> None:
        self.isa = Isa(target)
        self.isa.configure_tiles()
        self._largest = self.isa.register(0, integer=True)

    def pack(self, low: Expr, high: Expr) -> Expr:
        """Two vectors of float32 as one vector of words, in order. `finish` reports values that are too large."""
        low, high = self.isa.keep(low), self.isa.keep(high)
        for x in (low, high):
            self._largest.value = T.max(self._largest.value, self.isa.magnitude_bits(x))
        return self.isa.to_bfloat16(low, high)

    def finish(self, flag: Buffer) -> None:
        """Emit the last code of a task: it sets the flag, [1] int32, if a value was above 2**64, infinite or NaN."""
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
        """Emit the products of rows with a panel.

        Args:
            rows: their number.
            packed: [rows + `ROWS`, words] int32.
            panel: [*, outputs] int32, as `shiftadd3d.kernels.pack.shift` packs bfloat16; outputs are a multiple of 16.
            parts: the summands, as pairs: the first of `WORDS` words in a row, and the panel's row for that word.
            sums: [rows + `ROWS`, outputs], for the products.
            use: with it, sums are only [ROWS, outputs]. ``use(row, i)`` is called for each row; its sums are in row i.
        """
        with T.serial((rows + (ROWS - 1)) // ROWS) as number:
            top = T.bind(number * ROWS)
            for left in range(0, panel.extent(1), 32):
                outcome = sums if use else sums.below(top)
                product_in_tiles(self.isa, packed, top, panel, left, parts, outcome, left)
            if use is not None:
                with T.serial(T.min(T.int64(ROWS), rows - top)) as i:
                    use(T.bind(top + i), i)


def unit(isa: Isa, panel: Buffer, column: int) -> Expr:
    """The units of a vector of a panel's outputs (see `shiftadd3d.kernels.pack.shift.WholeWeights`)."""
    return isa.as_float(panel[panel.extent(0) - 1, isa.at(column)])


def copy_words(source: Buffer, out: Buffer, count: int) -> None:
    """Copy the first `count` words of a row, a multiple of `WORDS`."""
    for start in range(0, count, WORDS):
        out[T.ramp(start, WORDS)] = source[T.ramp(start, WORDS)]


def unpacked(isa: Isa, words: Expr) -> tuple[Expr, Expr]:
    """The numbers in a vector of words, as float32: the first of each word, and the second of each."""
    words = isa.keep(words, integer=True)
    return isa.as_float(words << isa.splat_int(16)), isa.as_float(words & isa.splat_int(-65536))
