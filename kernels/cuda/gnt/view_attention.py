"""Fused view attention on NVIDIA GPUs, in float32.

A block has the views of as many points as fit into 64 rows. All its data stays in shared memory, from the embedding of
ray differences to the pooled views. A thread computes 8 rows by 4 columns of the one large product. The panels are
those of the kernel for CPUs (`shiftadd3d.kernels.pack.gnt.view_attention`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from shiftadd3d.kernels.cuda.driver import CudaFunction, CudaKernel
from shiftadd3d.kernels.cuda.tile import ACROSS, DOWN, Tile, grid, local, relu, shared, shared_out
from shiftadd3d.kernels.pack.gnt.view_attention import Panels, panels, sizes
from shiftadd3d.kernels.reference.gnt.view_attention import compare_with_twin
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Spec
from shiftadd3d.kernels.runtime.targets import CudaTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index

_ROWS = 64  # (point, view) pairs of a block

# A block has 48 KiB of shared memory on every GPU. More needs a special request.
_SHARED_FLOATS = (48 << 10) // 4


def fits(width: int, hidden: int) -> bool:
    """Whether the data of a block fits into shared memory, and a block has enough threads."""
    return _ROWS * (2 * width + 3 * hidden) <= _SHARED_FLOATS and _threads(width, hidden) <= 1024


def _threads(width: int, hidden: int) -> int:
    return _ROWS // DOWN * -(-(width + hidden) // ACROSS)


def build(target: CudaTarget, width: int, hidden: int) -> T.PrimFunc:
    """The function ``(P, R, V, query, views, ray_diff, mask, the eight panels, out)``.

    P is the number of points, V the number of views of each, and R their product. Blocks: points along x.
    """
    threads = _threads(width, hidden)
    with T.function("view_attention") as function:
        P, R, V = T.scalars("P", "R", "V")
        query, views = T.tensor("query", (P, width), "float32"), T.tensor("views", (R, width), "float32")
        ray_diff, mask = T.tensor("ray_diff", (R, 4), "float32"), T.tensor("mask", (R,), "uint8")  # rows: (point, view)
        w_row, b_row, w_position, w_query, b_query, w_score, w_out, b_out = (
            T.tensor(f"w_{name}", shape, "float32")
            for name, shape in zip(Panels._fields, sizes(1, width, hidden), strict=True)
        )
        out = T.tensor("out", (P, width), "float32")
        points_of_block = T.truncdiv(T.int32(_ROWS), V)
        with grid((P + (points_of_block - 1)) // points_of_block, threads=threads) as (number, thread):
            block = _Block(thread, threads, width, hidden)
            first = T.bind(number * points_of_block)
            points = T.bind(T.min(points_of_block, P - first))
            rows = T.bind(points * V)
            block.read(views, first * V, rows)
            with block.each(_ROWS * hidden) as at:
                row, h = at // hidden, at % hidden
                pair, point = first * V + T.min(row, rows - 1), first + T.min(row, points - 1)
                ahead = block.add(4, w_position[4, h], lambda j: ray_diff[pair, j] * w_position[j, h])
                block.position[row, h] = relu(ahead)
                block.query[row, h] = block.add(width, b_query[h], lambda k: query[point, k] * w_query[k, h])
            block.multiply(w_row, b_row)
            with block.each(_ROWS * hidden) as at:  # the scores' hidden layer overwrites that of the positions
                row, h = at // hidden, at % hidden
                sums = block.row[row, width + h] + block.query[T.truncdiv(row, V), h]
                block.position[row, h] = relu(sums)
            with block.each_pooled(points) as (point, c):
                block.pool(point, c, w_score, lambda row, v: mask[first * V + row + v], V)
            with block.each_pooled(points) as (point, c):
                pooled = block.views
                out[first + point, c] = block.add(width, b_out[c], lambda k: pooled[point, k] * w_out[k, c])
    return function.get()


class _Block:
    """The memory of a block, and what its threads do with it. Rows are (point, view) pairs.

    Attributes:
        views: [_ROWS, C], later what is pooled of them: [points, C].
        position: [_ROWS, H], the hidden layer of the positions, later that of the scores.
        query: [points, H], the products of the queries.
        row: [_ROWS, C + H], the products of the rows.
    """

    def __init__(self, thread: Expr, threads: int, width: int, hidden: int) -> None:
        self._thread, self._threads, self._width, self._hidden = thread, threads, width, hidden
        self.views = shared(_ROWS, width)
        self.position, self.query = shared(_ROWS, hidden), shared(_ROWS, hidden)
        self.row = shared(_ROWS, width + hidden)
        self._sums = Tile(thread, threads // (_ROWS // DOWN))
        self._total, self._largest, self._shares, self._pooled = (local(1) for _ in range(4))
        self.each = partial(shared_out, thread, threads)

    @contextmanager
    def each_pooled(self, points: Expr) -> Iterator[tuple[Expr, Expr]]:
        """A loop over the channels of the block's points that its threads share; yields the point and the channel."""
        with T.serial((_ROWS * self._width + (self._threads - 1)) // self._threads) as turn:
            at = T.bind(turn * self._threads + self._thread)
            with T.when(at < points * self._width):
                yield at // self._width, at % self._width

    def add(self, count: Index, start: Expr, product: Callable[[Expr], Expr]) -> Expr:
        """``start + sum of product(k)``."""
        total = self._total
        total[0] = start
        with T.serial(count) as k:
            total[0] = total[0] + product(k)
        return total[0]

    def read(self, views: Buffer, start: Expr, rows: Expr) -> None:
        """Read so many rows of the views from `start` on; the others are zero."""
        with self.each(_ROWS * self._width) as at:
            row, c = at // self._width, at % self._width
            x = views[start + T.min(row, rows - 1), c]
            self.views[row, c] = T.select(row < rows, x, T.float32(0))

    def multiply(self, weight: Buffer, bias: Buffer) -> None:
        """The products of the rows."""
        both = self._width + self._hidden
        self._sums.fill(lambda column: bias[T.min(column, both - 1)])
        _add_rows(self._sums, self.views, weight)
        _add_rows(self._sums, self.position, weight.below(self._width))

        def keep(row: Expr, column: Expr, x: Expr, _: Expr) -> None:
            with T.when(column < both):
                self.row[row, column] = x

        self._sums.each(keep)

    def pool(self, point: Expr, c: Expr, w_score: Buffer, mask: Callable[[Expr, Expr], Expr], V: Expr) -> None:
        """Sum the views of a point up, weighted by the softmax of their scores, in one channel."""
        total, largest, shares, pooled = self._total, self._largest, self._shares, self._pooled
        row = point * V
        largest[0], shares[0], pooled[0] = T.float32(-3.0e38), T.float32(0), T.float32(0)
        with T.serial(V) as v:
            score = self.add(self._hidden, T.float32(0), lambda h: self.position[row + v, h] * w_score[h, c])
            seen = T.bind(mask(row, v) != T.number("uint8", 0))
            total[0] = T.select(seen, score, T.float32(-1e9))
            # The sums so far are relative to the largest score so far. Make them relative to this one.
            with T.when(total[0] > largest[0]):
                for summed in (shares, pooled):
                    summed[0] = summed[0] * T.exp(largest[0] - total[0])
                largest[0] = total[0]
            total[0] = T.exp(total[0] - largest[0])
            shares[0] = shares[0] + total[0]
            pooled[0] = pooled[0] + total[0] * self.row[row + v, c]
        self.views[point, c] = pooled[0] / shares[0]


def _add_rows(sums: Tile, x: Buffer, weight: Buffer) -> None:
    """Add the product of rows [_ROWS, k] with the first k rows of a weight. Excess threads repeat the last column."""
    last = weight.extent(1) - 1
    with T.serial(x.extent(1)) as k:
        sums.add_products(lambda row: x[row, k], lambda column: weight[k, T.min(column, last)])


def run(
    function: CudaFunction,
    query: Tensor,  # [*, C]
    views: Tensor,  # [*, V, C]
    ray_diff: Tensor,  # [*, V, 4]
    mask: Tensor,  # [*, V] bool
    panels: Sequence[Tensor],
) -> Tensor:  # [*, C]
    """Call a compiled function; V is at most 64."""
    count, width = views.shape[-2:]
    out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    points, rows = (x.float().reshape(-1, width).contiguous() for x in (query, views))
    function(
        -(-len(points) // (_ROWS // count)),
        query=points,
        views=rows,
        ray_diff=ray_diff.float().reshape(-1, 4).contiguous(),
        mask=mask.reshape(-1).contiguous().view(torch.uint8),
        **{f"w_{name}": panel for name, panel in zip(Panels._fields, panels, strict=True)},
        V=count,
        P=len(points),
        R=len(rows),
        out=out.view(-1, width),
    )
    return out.to(query.dtype)


def _trial(function: CudaFunction, *, width: int, hidden: int) -> None:
    def packed(
        query: Tensor, views: Tensor, ray_diff: Tensor, mask: Tensor, weights: list[Tensor], biases: list[Tensor]
    ) -> Tensor:
        return run(function, query, views, ray_diff, mask, panels(weights, biases, lanes=1))

    compare_with_twin(packed, function.device, width, hidden)


def _variants(target: CudaTarget) -> list[Spec]:
    return [{"width": width, "hidden": width // 8} for width in (32, 64)]


CUDA_KERNEL = CudaKernel("view_attention", build, _trial, _variants)
