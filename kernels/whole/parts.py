"""What the functions of programs are made of: norm before, addition behind, and how work is divided among threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from shiftadd3d.kernels.cpu.blocks import folded_each
from shiftadd3d.kernels.cpu.forms import Form, even_blocks, tile_shape
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index, Load, Store

NormWeights = tuple[Tensor, Tensor, float]
"""Weight, bias and epsilon of a layer norm."""


class Around(NamedTuple):
    """What is compiled in of the steps around products: a norm before them if there is an epsilon, then their
    activation function, and whether something is added."""

    eps: float | None
    activation: Activation
    residual: bool

    @classmethod
    def of(cls, norm: NormWeights | None, activation: Activation, residual: object | None) -> Around:
        return cls(None if norm is None else norm[2], activation, residual is not None)


def control_argument() -> Buffer:
    """The next argument: two int32, where products raise their flag, and the number of threads."""
    return T.argument("control", (2,), "int32")


def threads_of(control: Buffer) -> Expr:
    return held(T.cast(control[1], "int64"))


def held(x: Expr) -> Expr:
    """An int64 computed here and now, which the compiler looks no further into: TVM's simplifier takes exponential time
    for sizes bound one upon the other."""
    memory = T.alloc(1, dtype="int64")
    memory[0] = x
    return memory[0]


def rows_of(x: Buffer) -> Buffer:
    """[*, columns] as a matrix; after all arguments."""
    rows = x.shape[0]
    for size in x.shape[1:-1]:
        rows = rows * size
    return x.view(rows, x.shape[-1])


@dataclass(frozen=True)
class Norm:
    """A layer norm: its weight and bias [width]."""

    gain: Buffer
    shift: Buffer
    eps: float

    @classmethod
    def arguments(cls, width: Expr, eps: float, name: str = "") -> Norm:
        """The next two arguments of a function."""
        return cls(T.argument(f"gain{name}", (width,)), T.argument(f"shift{name}", (width,)), eps)

    def emit(self, isa: Isa, load: Load, first: Expr, count: Index, width: Expr, store: Store) -> None:
        """Normalise `count` rows from the first one on, no more than a vector has lanes: all their sums are taken at
        once, lane by lane.

        Args:
            load: as of `ShiftProduct.stage`.
            store: as of `ShiftProduct.panels`.
        """
        lanes = isa.lanes
        whole = T.bind(T.truncdiv(width, T.int64(lanes)))
        rest, behind = T.bind(width - whole * lanes), T.bind(whole * lanes)
        vector, sums = isa.register(), T.alloc(lanes, lanes)
        means, factors = T.alloc(lanes), T.alloc(lanes)

        def mean_of(value: Callable[[Expr, Index, int], Expr]) -> Expr:
            """Of ``value(row, column, count)``, the mean of each row."""
            with T.serial(count) as i:
                vector.value = isa.splat(0.0)
                with T.serial(whole) as j:
                    vector.value = vector.value + value(i, j * lanes, lanes)
                sums[i, isa.at(0)] = vector.value
                with T.serial(rest) as j:
                    sums[i, 0] = sums[i, 0] + value(i, behind + j, 1)
            with T.serial(lanes - count) as i:
                sums[count + i, isa.at(0)] = isa.splat(0.0)
            return folded_each(isa, sums, lambda a, b: a + b) / isa.splat(T.cast(width, "float32"))

        def apart(i: Expr, column: Index, lanes: int) -> Expr:
            return load(first + i, column, lanes) - (means[i] if lanes == 1 else isa.splat(means[i]))

        def square(i: Expr, column: Index, lanes: int) -> Expr:
            x = apart(i, column, lanes)
            x = T.bind(x) if lanes == 1 else isa.keep(x)
            return x * x

        means[isa.at(0)] = mean_of(lambda i, column, lanes: load(first + i, column, lanes))
        factors[isa.at(0)] = isa.splat(1.0) / isa.square_root(mean_of(square) + isa.splat(self.eps))
        with T.serial(count) as i:
            with T.serial(whole) as j:
                at = isa.at(j * lanes)
                normed = apart(i, j * lanes, lanes) * isa.splat(factors[i])
                store(first + i, j * lanes, isa.fma(normed, self.gain[at], self.shift[at]), lanes)
            with T.serial(rest) as j:
                c = T.bind(behind + j)
                store(first + i, c, apart(i, c, 1) * factors[i] * self.gain[c] + self.shift[c], 1)

    def staged(self, isa: Isa, load: Load, width: Expr) -> tuple[Load, Callable[[Expr, Expr], None]]:
        """`load` and `before_rows` of rows that are normalised as they are staged, in a cache's memory."""
        rows = T.alloc(isa.lanes, width)

        def store(row: Index, column: Index, value: Expr, count: int) -> None:
            rows[row % isa.lanes, T.at(column, count)] = value

        return (
            lambda row, start, count: rows[row % isa.lanes, T.at(start, count)],
            lambda first, count: self.emit(isa, load, first, count, width, store),
        )


class Source(NamedTuple):
    """The tokens that a function reads, [B, N, inputs], and the norm before its products."""

    x: Buffer
    norm: Norm | None

    @classmethod
    def argument(cls, batch: Index, tokens: Index, inputs: Expr, eps: float | None) -> Source:
        """The next arguments of a function."""
        x = T.argument("x", (batch, tokens, inputs))
        return cls(x, None if eps is None else Norm.arguments(inputs, eps))


@dataclass(frozen=True)
class Ends:
    """What a function from tokens to tokens reads and writes, its rows those of all tokens.

    Attributes:
        x: [rows, inputs].
        norm: of x, if any.
        added: [rows, outputs], to be added to the outcome, if any.
        control: see `Program`.
        y: [rows, outputs], those behind the ones of which only signs are kept.
        signs: [rows, bytes] uint8, if there are any of those.
    """

    x: Buffer
    norm: Norm | None
    added: Buffer | None
    control: Buffer
    y: Buffer
    signs: Buffer | None = None

    @classmethod
    def arguments(cls, source: Source, outputs: Expr, *, residual: bool, signs: bool = False) -> Ends:
        """The last arguments of a function, and its source: what is added, control, signs, y."""
        batch, tokens, _ = source.x.shape
        added = T.argument("added", (batch, tokens, outputs)) if residual else None
        control = control_argument()
        kept = T.argument("signs", (batch, tokens, *T.sizes(1)), "uint8") if signs else None
        y = T.argument("y", (batch, tokens, *T.sizes(1)) if signs else (batch, tokens, outputs))
        x, y = rows_of(source.x), rows_of(y)
        added, kept = (None if one is None else rows_of(one) for one in (added, kept))
        return cls(x, source.norm, added, control, y, kept)

    @property
    def signed(self) -> Expr:
        """Of how many outputs only signs are kept."""
        return T.int64(0) if self.signs is None else held(self.signs.shape[1] * 8)

    def load(self, isa: Isa, top: Expr) -> tuple[Load, Callable[[Expr, Expr], None] | None]:
        """`load` and `before_rows` of `ShiftProduct.stage`, of the rows from `top` on, normalised."""
        load = isa.reader(self.x, lambda row: top + row)
        return (load, None) if self.norm is None else self.norm.staged(isa, load, self.x.shape[1])

    def store(self, top: Expr) -> Store:
        """What stores outcomes of the rows from `top` on, after the addition."""

        signed = self.signed

        def store(row: Index, column: Index, value: Expr, count: int) -> None:
            at = top + row, T.at(column if self.signs is None else column - signed, count)
            self.y[at] = value if self.added is None else value + self.added[at]

        return store

    def store_signs(self, isa: Isa, top: Expr) -> Store:
        """What stores signs of outcomes of the rows from `top` on. Panels have all columns."""
        assert self.signs is not None
        rows = self.signs

        def store(row: Index, column: Index, value: Expr, count: int) -> None:
            if count > 1:
                for i, code in enumerate(isa.codes(value, count)):
                    rows[top + row, T.truncdiv(column, T.int64(8)) + i] = code

        return store


@contextmanager
def each_block(rows: Expr, block: Expr) -> Iterator[tuple[Expr, Expr]]:
    """Emit a parallel loop over blocks of rows; yields the first row of one, and their number."""
    with T.parallel((rows + block - 1) // block) as task:
        top = held(task * block)
        yield top, held(T.min(block, rows - top))


def block_of(rows: Expr, longest: int, tile: int, threads: Expr, fewest: int = 4) -> Expr:
    """Rows of a block, as `rows_of_block` has it; `fewest`: see `even_blocks`."""
    return held(even_blocks(rows, longest, tile, threads, _held_min, _held_max, fewest))


_BESIDE_ROWS = 0.1  # what a tile takes beside its rows, in rows


def tiles_of(target: CpuTarget, form: Form, longest: int, tokens: int | str) -> tuple[int, int]:
    """Rows of a product's tile, and `longest` as a multiple of them, for pictures of so many tokens.

    A picture's last tile takes as long as a whole one, so it should lack few rows: 7 x 7 tokens are four tiles of 13
    rows, or five of 12, and 197 tokens are 18 tiles of 11 rows. AVX-512 has registers for all of these.
    """
    rows, _ = tile_shape(target, form)
    if isinstance(tokens, int) and not form.startswith("bfloat16"):
        if tokens == 1:
            rows = 4
        elif target.has_avx512:
            rows = min((rows, rows + 1, rows - 1), key=lambda some: -(-tokens // some) * (some + _BESIDE_ROWS))
    return rows, max(rows, longest // rows * rows)


def _held_min(a: Expr, b: Expr) -> Expr:
    return held(T.min(a, b))


def _held_max(a: Expr, b: Expr) -> Expr:
    return held(T.max(a, b))
