"""What kernels for GPUs are written with: blocks and their threads, memory, and sums in registers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index

# Sums of a thread: below one another, and side by side.
DOWN, ACROSS = 8, 4


@contextmanager
def grid(*blocks: Index, threads: int) -> Iterator[list[Expr]]:
    """The whole of a kernel: yields the number of the block along each axis, and of the thread."""
    places = [f"blockIdx.{axis}" for axis in "xyz"[: len(blocks)]]
    with ExitStack() as loops:
        numbers = [loops.enter_context(T.bound(*one)) for one in zip(blocks, places, strict=True)]
        yield [*numbers, loops.enter_context(T.bound(threads, "threadIdx.x"))]


@contextmanager
def shared_out(thread: Expr, threads: int, count: Index, unroll: int | None = None) -> Iterator[Expr]:
    """Statements for each of `count` numbers, neighbouring ones for neighbouring threads of a block."""
    with T.serial((count + (threads - 1)) // threads, unroll) as turn:
        number = T.bind(turn * threads + thread)
        if isinstance(count, int) and count % threads == 0:
            yield number
        else:
            with T.when(number < count):
                yield number


def shared(*shape: int, dtype: str = "float32") -> Buffer:
    """Memory of a block."""
    return T.alloc(*shape, dtype=dtype, align=-1, scope="shared")


def local(*shape: int, dtype: str = "float32") -> Buffer:
    """Registers of a thread."""
    return T.alloc(*shape, dtype=dtype, align=-1, scope="local")


def wait() -> None:
    """Have all threads of a block come by, where TVM does not see that they must."""
    T.emit("tvm_storage_sync", "shared")


def relu(x: Expr) -> Expr:
    """NaN stays."""
    return T.select(x < T.float32(0), T.float32(0), x)


class Tile:
    """Sums in the registers of a block's threads, `DOWN` by `ACROSS` in each.

    Args:
        thread: its number in the block.
        across: threads that share rows; a thread's columns lie so far apart.
        last: a column that each thread sums up for its own rows, too.
    """

    def __init__(self, thread: Expr, across: int, last: int | None = None) -> None:
        self._row, self._column, self._last = thread // across * DOWN, thread % across, last
        self._across, self._columns = across, ACROSS if last is None else ACROSS + 1
        self._sums = local(DOWN, self._columns)

    def _place(self, i: Expr, j: Expr) -> tuple[Expr, Expr]:
        column = self._column + j * self._across
        return self._row + i, column if self._last is None else T.select(j < ACROSS, column, T.int32(self._last))

    def fill(self, value: Callable[[Expr], Expr]) -> None:
        """Begin with ``value(column)``."""
        with T.unroll(DOWN) as i, T.unroll(self._columns) as j:
            self._sums[i, j] = value(self._place(i, j)[1])

    def add_products(self, x: Callable[[Expr], Expr], weight: Callable[[Expr], Expr]) -> None:
        """Add ``x(row) * weight(column)``, which nvcc makes a fused multiply-add."""
        with T.unroll(DOWN) as i, T.unroll(self._columns) as j:
            row, column = self._place(i, j)
            self._sums[i, j] = self._sums[i, j] + x(row) * weight(column)

    def each(self, use: Callable[[Expr, Expr, Expr, Expr], None]) -> None:
        """Emit ``use(row, column, sum, sum of the row's last column)`` for each sum but those of the last column."""
        with T.unroll(DOWN) as i, T.unroll(ACROSS) as j:
            use(*self._place(i, j), self._sums[i, j], self._sums[i, self._columns - 1])
