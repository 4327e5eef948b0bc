"""What the functions of programs are made of: layer norm on the way in, and how work is divided among threads."""

from __future__ import annotations

from dataclasses import dataclass

from shiftadd3d.kernels.cpu.forms import even_blocks
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Load


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

    def emit(self, isa: Isa, load: Load, row: Expr, width: Expr, out: Buffer) -> None:
        """Write a row, normalised, to out [width].

        Args:
            load: as of `ShiftProduct.stage`.
        """
        lanes = isa.lanes
        whole = T.bind(T.truncdiv(width, T.int64(lanes)))
        rest, behind = T.bind(width - whole * lanes), T.bind(whole * lanes)
        vector, single = isa.register(), T.alloc(1, align=4)
        mean, factor = T.alloc(1, align=4), T.alloc(1, align=4)

        vector.value = isa.splat(0.0)
        with T.serial(whole) as j:
            vector.value = vector.value + load(row, j * lanes, lanes)
        single[0] = isa.total(vector.value)
        with T.serial(rest) as j:
            single[0] = single[0] + load(row, behind + j, 1)
        mean[0] = single[0] / T.cast(width, "float32")

        vector.value = isa.splat(0.0)
        with T.serial(whole) as j:
            apart = isa.keep(load(row, j * lanes, lanes) - isa.splat(mean[0]))
            vector.value = isa.fma(apart, apart, vector.value)
        single[0] = isa.total(vector.value)
        with T.serial(rest) as j:
            apart = T.bind(load(row, behind + j, 1) - mean[0])
            single[0] = single[0] + apart * apart
        factor[0] = T.float32(1) / T.sqrt(single[0] / T.cast(width, "float32") + T.float32(self.eps))

        with T.serial(whole) as j:
            at = isa.at(j * lanes)
            normed = (load(row, j * lanes, lanes) - isa.splat(mean[0])) * isa.splat(factor[0])
            out[at] = isa.fma(normed, self.gain[at], self.shift[at])
        with T.serial(rest) as j:
            normed = (load(row, behind + j, 1) - mean[0]) * factor[0]
            out[behind + j] = normed * self.gain[behind + j] + self.shift[behind + j]


def block_of(rows: Expr, longest: int, tile: int, threads: Expr) -> Expr:
    """Rows of a block, as `rows_of_block` has it."""
    return held(even_blocks(rows, longest, tile, threads, _held_min, _held_max))


def _held_min(a: Expr, b: Expr) -> Expr:
    return held(T.min(a, b))


def _held_max(a: Expr, b: Expr) -> Expr:
    return held(T.max(a, b))
