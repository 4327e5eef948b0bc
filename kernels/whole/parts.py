"""What the functions of programs are made of: layer norm on the way in, and how work is divided among threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shiftadd3d.kernels.cpu.blocks import folded_each
from shiftadd3d.kernels.cpu.forms import Form, even_blocks, tile_shape
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index, Load, Store


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


def block_of(rows: Expr, longest: int, tile: int, threads: Expr, fewest: int = 4) -> Expr:
    """Rows of a block, as `rows_of_block` has it; `fewest`: see `even_blocks`."""
    return held(even_blocks(rows, longest, tile, threads, _held_min, _held_max, fewest))


def tiles_of(target: CpuTarget, form: Form, longest: int, tokens: int | str) -> dict[str, int]:
    """Rows of a product's tile, and `longest` as a multiple of them, for pictures of so many tokens.

    A picture's last tile takes as long as a whole one, so it should lack few rows: 7 x 7 tokens are four tiles of 13
    rows, or five of 12. AVX-512 has registers for both.
    """
    rows, _ = tile_shape(target, form)
    if isinstance(tokens, int) and not form.startswith("bfloat16"):
        if tokens == 1:
            rows = 4
        elif target.has_avx512:
            rows = min((rows, rows + 1), key=lambda some: -(-tokens // some) * some)
    return {"tile": rows, "longest": max(rows, longest // rows * rows)}


def _held_min(a: Expr, b: Expr) -> Expr:
    return held(T.min(a, b))


def _held_max(a: Expr, b: Expr) -> Expr:
    return held(T.max(a, b))
