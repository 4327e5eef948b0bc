"""Building blocks of kernels for GPUs: blocks and threads, memory, and sums in registers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index

# Rows and columns of the sums of a thread.
DOWN, ACROSS = 8, 4


@contextmanager
def grid(*blocks: Index, threads: int) -> Iterator[list[Expr]]:
    """The body of a kernel. Yields the number of the block along each axis, and the number of the thread."""
    places = [f"blockIdx.{axis}" for axis in "xyz"[: len(blocks)]]
    with ExitStack() as loops:
        numbers = [loops.enter_context(T.bound(*one)) for one in zip(blocks, places, strict=True)]
        yield [*numbers, loops.enter_context(T.bound(threads, "threadIdx.x"))]


@contextmanager
def shared_out(thread: Expr, threads: int, count: Index, unroll: int | None = None) -> Iterator[Expr]:
    """A loop over `count` numbers that a block's threads share. Neighbouring threads get neighbouring numbers."""
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
    """Wait for all threads of the block, where TVM does not see that this is necessary."""
    T.emit("tvm_storage_sync", "shared")


def relu(x: Expr) -> Expr:
    """The larger of x and 0; NaN stays NaN."""
    return T.select(x < T.float32(0), T.float32(0), x)


class Tile:
    """Sums in the registers of a block's threads, `DOWN` by `ACROSS` in each.

    Args:
        thread: the thread's number in the block.
        across: the number of threads with the same rows. A thread's columns are this far apart.
        last: one more column, which each thread also sums up for its own rows.
    """

    def __init__(self, thread: Expr, across: int, last: int | None = None) -> None:
        self._row, self._column, self._last = thread // across * DOWN, thread % across, last
        self._across, self._columns = across, ACROSS if last is None else ACROSS + 1
        self._sums = local(DOWN, self._columns)

    def _place(self, i: Expr, j: Expr) -> tuple[Expr, Expr]:
        column = self._column + j * self._across
        return self._row + i, column if self._last is None else T.select(j < ACROSS, column, T.int32(self._last))

    def fill(self, value: Callable[[Expr], Expr]) -> None:
        """Set the sums to ``value(column)``."""
        with T.unroll(DOWN) as i, T.unroll(self._columns) as j:
            self._sums[i, j] = value(self._place(i, j)[1])

    def add_products(self, x: Callable[[Expr], Expr], weight: Callable[[Expr], Expr]) -> None:
        """Add ``x(row) * weight(column)``. nvcc makes this a fused multiply-add."""
        with T.unroll(DOWN) as i, T.unroll(self._columns) as j:
            row, column = self._place(i, j)
            self._sums[i, j] = self._sums[i, j] + x(row) * weight(column)

    def each(self, use: Callable[[Expr, Expr, Expr, Expr], None]) -> None:
        """Emit ``use(row, column, sum, sum of the row's last column)`` for each sum outside of the last column."""
        with T.unroll(DOWN) as i, T.unroll(ACROSS) as j:
            use(*self._place(i, j), self._sums[i, j], self._sums[i, self._columns - 1])
