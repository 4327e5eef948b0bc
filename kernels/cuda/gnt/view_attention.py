"""Fused view attention on NVIDIA GPUs, in float32.

A block has the views of as many points as make up 64 rows. What these rows need, from the embedding of ray differences
to the pooled views, stays in shared memory; a thread computes 8 rows by 4 columns of the one large product. The weights
are those that the kernel for CPUs takes, products of weights that have been multiplied once.
"""

# TVMScript's annotations are calls:
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shiftadd3d.kernels.cuda.driver import CudaFunction, CudaKernel
from shiftadd3d.kernels.pack.gnt.view_attention import panels
from shiftadd3d.kernels.reference.gnt.view_attention import compare_with_twin
from shiftadd3d.kernels.runtime.targets import CudaTarget

_ROWS = 64  # (point, view) pairs of a block
_DOWN, _ACROSS = 8, 4  # numbers of a thread in the large product

# Widths up to which what a block keeps fits into the 48 KiB of shared memory that every GPU gives without being asked.
_SHARED_FLOATS = (48 << 10) // 4


def fits(width: int, hidden: int) -> bool:
    """Whether a block has room for such an attention."""
    return _ROWS * (2 * width + 3 * hidden) <= _SHARED_FLOATS and _threads(width, hidden) <= 1024


def _threads(width: int, hidden: int) -> int:
    return _ROWS // _DOWN * -(-(width + hidden) // _ACROSS)


def build(target: CudaTarget, width: int, hidden: int) -> Any:
    """The function of (query, views, ray_diff, mask, the eight weights and biases, views a point, out)."""
    from tvm.script import tirx as T

    both = width + hidden
    across = -(-both // _ACROSS)
    threads = _threads(width, hidden)

    def add(total: Any, a: Any, b: Any) -> None:
        T.buffer_store(total, total[0] + a * b, [0])

    def add_to(sums: Any, place: list[Any], a: Any, b: Any) -> None:
        T.buffer_store(sums, sums[(*place,)] + a * b, place)

    def relu(x: Any) -> Any:
        return T.Select(x < T.float32(0), T.float32(0), x)  # NaN stays

    @T.prim_func(s_tir=True)
    def view_attention(
        query_handle: T.handle,
        views_handle: T.handle,
        ray_diff_handle: T.handle,
        mask_handle: T.handle,
        w_row: T.Buffer((both, both), "float32"),
        b_row: T.Buffer((both,), "float32"),
        w_position: T.Buffer((5, hidden), "float32"),
        w_query: T.Buffer((width, hidden), "float32"),
        b_query: T.Buffer((hidden,), "float32"),
        w_score: T.Buffer((hidden, width), "float32"),
        w_out: T.Buffer((width, width), "float32"),
        b_out: T.Buffer((width,), "float32"),
        V: T.int32,
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        P = T.int32()
        R = T.int32()
        query = T.match_buffer(query_handle, (P, width), "float32")
        views = T.match_buffer(views_handle, (R, width), "float32")  # rows are (point, view)
        ray_diff = T.match_buffer(ray_diff_handle, (R, 4), "float32")
        mask = T.match_buffer(mask_handle, (R,), "uint8")
        out = T.match_buffer(out_handle, (P, width), "float32")
        for block in T.thread_binding((P + (T.truncdiv(_ROWS, V) - 1)) // T.truncdiv(_ROWS, V), "blockIdx.x"):
            for thread in T.thread_binding(threads, "threadIdx.x"):
                xs = T.alloc_buffer((_ROWS, width), "float32", scope="shared")  # views, then what is pooled of them
                position = T.alloc_buffer((_ROWS, hidden), "float32", scope="shared")
                row_out = T.alloc_buffer((_ROWS, both), "float32", scope="shared")
                query_out = T.alloc_buffer((_ROWS, hidden), "float32", scope="shared")
                sums = T.alloc_buffer((_DOWN, _ACROSS), "float32", scope="local")
                total = T.alloc_buffer((1,), "float32", scope="local")
                largest = T.alloc_buffer((1,), "float32", scope="local")
                shares = T.alloc_buffer((1,), "float32", scope="local")
                pooled = T.alloc_buffer((1,), "float32", scope="local")
                first: T.let[T.int32] = block * T.truncdiv(_ROWS, V)
                points: T.let[T.int32] = T.min(T.truncdiv(_ROWS, V), P - first)
                rows: T.let[T.int32] = points * V
                for i in T.serial((_ROWS * width + (threads - 1)) // threads):
                    x_at: T.let[T.int32] = i * threads + thread
                    if x_at < _ROWS * width:
                        xs[x_at // width, x_at % width] = T.Select(
                            x_at // width < rows,
                            views[first * V + T.min(x_at // width, rows - 1), x_at % width],
                            T.float32(0),
                        )
                for i in T.serial((_ROWS * hidden + (threads - 1)) // threads):
                    h_at: T.let[T.int32] = i * threads + thread
                    if h_at < _ROWS * hidden:
                        total[0] = w_position[4, h_at % hidden]
                        for j in T.serial(4):
                            add(
                                total,
                                ray_diff[first * V + T.min(h_at // hidden, rows - 1), j],
                                w_position[j, h_at % hidden],
                            )
                        position[h_at // hidden, h_at % hidden] = relu(total[0])
                        total[0] = b_query[h_at % hidden]
                        for k in T.serial(width):
                            add(
                                total,
                                query[first + T.min(h_at // hidden, points - 1), k],
                                w_query[k, h_at % hidden],
                            )
                        query_out[h_at // hidden, h_at % hidden] = total[0]
                for i in T.unroll(_DOWN):
                    for j in T.unroll(_ACROSS):
                        sums[i, j] = b_row[T.min(thread % across + j * across, both - 1)]
                for k in T.serial(width):
                    for i in T.unroll(_DOWN):
                        for j in T.unroll(_ACROSS):
                            add_to(
                                sums,
                                [i, j],
                                xs[thread // across * _DOWN + i, k],
                                w_row[k, T.min(thread % across + j * across, both - 1)],
                            )
                for k in T.serial(hidden):
                    for i in T.unroll(_DOWN):
                        for j in T.unroll(_ACROSS):
                            add_to(
                                sums,
                                [i, j],
                                position[thread // across * _DOWN + i, k],
                                w_row[width + k, T.min(thread % across + j * across, both - 1)],
                            )
                for i in T.unroll(_DOWN):
                    for j in T.unroll(_ACROSS):
                        if thread % across + j * across < both:
                            row_out[thread // across * _DOWN + i, thread % across + j * across] = sums[i, j]
                # The scores' hidden layer takes the place of the positions'.
                for i in T.serial((_ROWS * hidden + (threads - 1)) // threads):
                    s_at: T.let[T.int32] = i * threads + thread
                    if s_at < _ROWS * hidden:
                        position[s_at // hidden, s_at % hidden] = relu(
                            row_out[s_at // hidden, width + s_at % hidden]
                            + query_out[T.truncdiv(s_at // hidden, V), s_at % hidden]
                        )
                for i in T.serial((_ROWS * width + (threads - 1)) // threads):
                    c_at: T.let[T.int32] = i * threads + thread
                    if c_at < points * width:
                        largest[0] = T.float32(-3.0e38)
                        shares[0] = T.float32(0)
                        pooled[0] = T.float32(0)
                        for v in T.serial(V):
                            total[0] = T.float32(0)
                            for h in T.serial(hidden):
                                add(total, position[c_at // width * V + v, h], w_score[h, c_at % width])
                            seen: T.let[T.bool] = mask[(first + c_at // width) * V + v] != T.uint8(0)
                            total[0] = T.Select(seen, total[0], T.float32(-1e9))
                            # What was summed relative to a smaller largest score shrinks by the difference.
                            if total[0] > largest[0]:
                                shares[0] = shares[0] * T.exp(largest[0] - total[0])
                                pooled[0] = pooled[0] * T.exp(largest[0] - total[0])
                                largest[0] = total[0]
                            total[0] = T.exp(total[0] - largest[0])
                            shares[0] = shares[0] + total[0]
                            add(pooled, total[0], row_out[c_at // width * V + v, c_at % width])
                        xs[c_at // width, c_at % width] = pooled[0] / shares[0]
                for i in T.serial((_ROWS * width + (threads - 1)) // threads):
                    o_at: T.let[T.int32] = i * threads + thread
                    if o_at < points * width:
                        total[0] = b_out[o_at % width]
                        for k in T.serial(width):
                            add(total, xs[o_at // width, k], w_out[k, o_at % width])
                        out[first + o_at // width, o_at % width] = total[0]

    return view_attention


def run(
    function: Callable[..., None],
    query: Tensor,  # [P, C]
    views: Tensor,  # [P * V, C]
    ray_diff: Tensor,  # [P * V, 4]
    mask: Tensor,  # [P * V] uint8
    panels: Sequence[Tensor],
    count: int,
    out: Tensor,  # [P, C]
) -> None:
    """Call a compiled function, on contiguous float32 tensors, which writes into `out`; `count` is V, at most 64."""
    names = ("w_row", "b_row", "w_position", "w_query", "b_query", "w_score", "w_out", "b_out")
    function(
        -(-len(query) // (_ROWS // count)),
        query=query,
        views=views,
        ray_diff=ray_diff,
        mask=mask,
        **dict(zip(names, panels, strict=True)),
        V=count,
        P=len(query),
        R=len(views),
        out=out,
    )


def _trial_cuda(function: CudaFunction, *, width: int, hidden: int) -> None:
    def packed(*arguments: Any) -> Tensor:
        return run_on_tensors(function, *arguments[:4], panels=panels(*arguments[4:], lanes=1))

    compare_with_twin(packed, function.device, width, hidden)


def run_on_tensors(
    function: Any, query: Tensor, views: Tensor, ray_diff: Tensor, mask: Tensor, panels: Sequence[Tensor]
) -> Tensor:
    count, width = views.shape[-2:]
    out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    run(
        function,
        query.float().reshape(-1, width).contiguous(),
        views.float().reshape(-1, width).contiguous(),
        ray_diff.float().reshape(-1, 4).contiguous(),
        mask.reshape(-1).contiguous().view(torch.uint8),
        panels,
        count,
        out.view(-1, width),
    )
    return out.to(query.dtype)


def _variants(target: CudaTarget) -> list[dict[str, int]]:
    return [{"width": width, "hidden": width // 8} for width in (32, 64)]


CUDA_KERNEL = CudaKernel("view_attention", build, _trial_cuda, _variants)
