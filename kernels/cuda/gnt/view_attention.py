"""Fused view attention on NVIDIA GPUs, in float32.

A block has the views of as many points as fit into 64 rows. All its data stays in shared memory, from the embedding of
ray differences to the pooled views. A thread computes 8 rows by 4 columns of the one large product. The panels are
those of the kernel for CPUs (`shiftadd3d.kernels.pack.gnt.view_attention`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    both, threads = width + hidden, _threads(width, hidden)
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
        with grid((P + (points_of_block - 1)) // points_of_block, threads=threads) as (block, thread):
            xs = shared(_ROWS, width)  # views, then what is pooled of them
            position, query_out, row_out = shared(_ROWS, hidden), shared(_ROWS, hidden), shared(_ROWS, both)
            sums, total, largest, shares, pooled = (
                Tile(thread, threads // (_ROWS // DOWN)),
                *(local(1) for _ in range(4)),
            )
            first = T.bind(block * points_of_block)
            points = T.bind(T.min(points_of_block, P - first))
            rows, each = T.bind(points * V), partial(shared_out, thread, threads)

            def add(count: Index, start: Expr, product: Callable[[Expr], Expr]) -> Expr:
                """``start + sum of product(k)``."""
                total[0] = start
                with T.serial(count) as k:
                    total[0] = total[0] + product(k)
                return total[0]

            with each(_ROWS * width) as at:
                row, c = at // width, at % width
                x = views[first * V + T.min(row, rows - 1), c]
                xs[row, c] = T.select(row < rows, x, T.float32(0))
            with each(_ROWS * hidden) as at:
                row, h = at // hidden, at % hidden
                pair, point = first * V + T.min(row, rows - 1), first + T.min(row, points - 1)
                position[row, h] = relu(add(4, w_position[4, h], lambda j: ray_diff[pair, j] * w_position[j, h]))
                query_out[row, h] = add(width, b_query[h], lambda k: query[point, k] * w_query[k, h])
            sums.fill(lambda column: b_row[T.min(column, both - 1)])
            _add_rows(sums, xs, w_row)
            _add_rows(sums, position, w_row.below(width))

            def keep(row: Expr, column: Expr, x: Expr, _: Expr) -> None:
                with T.when(column < both):
                    row_out[row, column] = x

            sums.each(keep)
            # The scores' hidden layer overwrites that of the positions.
            with each(_ROWS * hidden) as at:
                row, h = at // hidden, at % hidden
                position[row, h] = relu(row_out[row, width + h] + query_out[T.truncdiv(row, V), h])
            with T.serial((_ROWS * width + (threads - 1)) // threads) as turn:
                at = T.bind(turn * threads + thread)
                with T.when(at < points * width):
                    row, c = at // width * V, at % width
                    largest[0], shares[0], pooled[0] = T.float32(-3.0e38), T.float32(0), T.float32(0)
                    with T.serial(V) as v:
                        score = add(hidden, T.float32(0), lambda h: position[row + v, h] * w_score[h, c])
                        seen = T.bind(mask[first * V + row + v] != T.number("uint8", 0))
                        total[0] = T.select(seen, score, T.float32(-1e9))
                        # The sums so far are relative to the largest score so far. Make them relative to this one.
                        with T.when(total[0] > largest[0]):
                            for summed in (shares, pooled):
                                summed[0] = summed[0] * T.exp(largest[0] - total[0])
                            largest[0] = total[0]
                        total[0] = T.exp(total[0] - largest[0])
                        shares[0] = shares[0] + total[0]
                        pooled[0] = pooled[0] + total[0] * row_out[row + v, c]
                    xs[at // width, c] = pooled[0] / shares[0]
            with T.serial((_ROWS * width + (threads - 1)) // threads) as turn:
                at = T.bind(turn * threads + thread)
                with T.when(at < points * width):
                    point, c = at // width, at % width
                    out[first + point, c] = add(width, b_out[c], lambda k: xs[point, k] * w_out[k, c])
    return function.get()


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
