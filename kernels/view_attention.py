"""Subtraction attention of points over source views (GNT's view transformer), in one pass over the views.

For each point, with x_v what view v shows and d_v how its ray differs::

    k_v = W_k x_v        p_v = P_2 relu(P_1 d_v + b_1) + b_2
    s_v = A_2 relu(A_1 (k_v - W_q query + p_v) + a_1) + a_2        one score a channel, -1e9 where the view is masked
    out = W_o sum_v softmax_v(s)_v (W_v k_v + p_v) + b_o

Nothing of the size [points, views, C] is written. What the sum needs of a view is linear in (x_v, relu(...)), so that
products of weights are taken once: ``W_v W_k``, ``A_1 W_k``, ``A_1 P_2`` and ``A_1 W_q`` (in float64, rounded to
float32), which saves nearly half of the multiplications; ``a_2``, the same for all views, drops out of the softmax.
Weights that are powers of two are decoded first: on a CPU they multiply like any other. NaN makes its point NaN, as in
the twin; infinities may come out as infinities where the twin, which subtracts them, has NaN.

Inference only: no gradients flow through these ops; training uses `shiftadd3d.models.gnt`'s layers.

Source: Varma T. et al., "Is Attention All That NeRF Needs?" (ICLR 2023), section 3.2.
"""

# TVMScript's annotations are calls:
# pyright: reportInvalidTypeForm=false

# ruff: noqa: B023 (the loops of a TIR function are gone through once, while it is parsed)
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels import cuda_view_attention, memory, power_of_two
from shiftadd3d.kernels.cuda import MAX_ELEMENTS, CudaFunction, CudaKernel
from shiftadd3d.kernels.kernel import Kernel, define_op
from shiftadd3d.kernels.targets import CpuTarget, CudaTarget, current
from shiftadd3d.kernels.vector import ACCUMULATORS, ROW_PADDING, Vectors

MAX_VIEWS = 32

# (point, view) rows at once: what they need of caches stays within the first level for 64 channels.
_ROWS = 64
# Blocks of so many rows that a parallel task takes: enough to allocate buffers for, few enough to share out evenly.
_BLOCKS_A_TASK = 16

WEIGHTS = ("q", "k", "v", "position 1", "position 2", "attention 1", "attention 2", "out")
BIASES = ("position 1", "position 2", "attention 1", "attention 2", "out")


# --------------------------------------------------------------------------------------------------------------------
# Twins
# --------------------------------------------------------------------------------------------------------------------


def view_attention_twin(
    query: Tensor,  # [*, C]
    views: Tensor,  # [*, V, C]
    ray_diff: Tensor,  # [*, V, 4]
    mask: Tensor,  # [*, V] bool
    weights: list[Tensor],
    biases: list[Tensor],
) -> Tensor:  # [*, C]
    """What `view_attention` computes, in plain torch."""
    w_q, w_k, w_v, w_p1, w_p2, w_a1, w_a2, w_o = (weight.to(query.dtype) for weight in weights)
    b_p1, b_p2, b_a1, b_a2, b_o = (bias.to(query.dtype) for bias in biases)
    q = F.linear(query, w_q)
    k = F.linear(views, w_k)
    v = F.linear(k, w_v)
    position = F.linear(F.relu(F.linear(ray_diff, w_p1, b_p1)), w_p2, b_p2)
    scores = F.linear(F.relu(F.linear(k - q.unsqueeze(-2) + position, w_a1, b_a1)), w_a2, b_a2)
    share = torch.softmax(scores.masked_fill(~mask.unsqueeze(-1), -1e9), dim=-2)
    return F.linear(((v + position) * share).sum(-2), w_o, b_o)


def view_attention_shift_twin(
    query: Tensor,
    views: Tensor,
    ray_diff: Tensor,
    mask: Tensor,
    codes: list[Tensor],
    offsets: list[Tensor],
    biases: list[Tensor],
    bits: int,
) -> Tensor:
    """What `view_attention_shift` computes, in plain torch."""
    return view_attention_twin(query, views, ray_diff, mask, _decoded(codes, offsets, bits, query.shape[-1]), biases)


def _decoded(codes: list[Tensor], offsets: list[Tensor], bits: int, width: int) -> list[Tensor]:
    hidden = codes[3].shape[-2]
    inputs = (width, width, width, 4, hidden, width, hidden, width)
    return [
        power_of_two.decode(power_of_two.unpack(code, bits, count), offset, bits)
        for code, offset, count in zip(codes, offsets, inputs, strict=True)
    ]


# --------------------------------------------------------------------------------------------------------------------
# TIR
# --------------------------------------------------------------------------------------------------------------------


class _Panels(NamedTuple):
    """The weights as the function reads them: inputs down, outputs across, each group padded to whole vectors.

    Attributes:
        row: [C + H, C + H], from a view's (x, relu of its ray difference) to (what is summed, score's hidden layer).
        row_bias: [C + H].
        position: [5, H], weights of the four ray differences, then the bias.
        query: [C, H], the query's part of the scores' hidden layer, negative.
        query_bias: [H].
        score: [H, C].
        out: [C, C].
        out_bias: [C].
    """

    row: Tensor
    row_bias: Tensor
    position: Tensor
    query: Tensor
    query_bias: Tensor
    score: Tensor
    out: Tensor
    out_bias: Tensor


def _panels(weights: list[Tensor], biases: list[Tensor], lanes: int) -> _Panels:
    w_q, w_k, w_v, w_p1, w_p2, w_a1, w_a2, w_o = (weight.detach().double() for weight in weights)
    b_p1, b_p2, b_a1, _, b_o = (bias.detach().double() for bias in biases)

    def across(*groups: Tensor) -> Tensor:
        """[outputs, inputs] each, to [inputs, outputs of all]."""
        return torch.cat([F.pad(group.mT, (0, -group.shape[0] % lanes)) for group in groups], dim=1)

    def row(bias: Tensor) -> Tensor:
        return F.pad(bias, (0, -bias.shape[0] % lanes))

    panels = _Panels(
        row=torch.cat([across(w_v @ w_k, w_a1 @ w_k), across(w_p2, w_a1 @ w_p2)]),
        row_bias=torch.cat([row(b_p2), row(torch.zeros_like(b_a1))]),
        position=torch.cat([across(w_p1), row(b_p1)[None]]),
        query=-across(w_a1 @ w_q),
        query_bias=row(w_a1 @ b_p2 + b_a1),
        score=across(w_a2),
        out=across(w_o),
        out_bias=row(b_o),
    )
    return _Panels(*(panel.float().contiguous() for panel in panels))


def _build(target: CpuTarget, *, width: int, hidden: int) -> Any:
    from tvm.script import tirx as T

    vec = Vectors(target)
    lanes, at, splat = vec.lanes, vec.at, vec.splat
    wide, narrow = vec.padded(width), vec.padded(hidden)
    both = wide + narrow

    def position_hidden(ray_diff, weights, row, start):
        total = weights[4, at(start)]
        for i in range(4):
            total = vec.multiply_add(splat(ray_diff[row, i]), weights[i, at(start)], total)
        return vec.relu(total)

    def score(hidden_rows, weights, row, start, seen):
        total = splat(0.0)
        for h in range(hidden):
            total = vec.multiply_add(splat(hidden_rows[row, h]), weights[h, at(start)], total)
        return T.if_then_else(seen != T.uint8(0), total, splat(-1e9))

    @T.prim_func(s_tir=True)
    def view_attention(
        query_handle: T.handle,
        views_handle: T.handle,
        ray_diff_handle: T.handle,
        mask_handle: T.handle,
        w_row: T.Buffer((width + hidden, both), "float32"),
        b_row: T.Buffer((both,), "float32"),
        w_position: T.Buffer((5, narrow), "float32"),
        w_query: T.Buffer((width, narrow), "float32"),
        b_query: T.Buffer((narrow,), "float32"),
        w_score: T.Buffer((hidden, wide), "float32"),
        w_out: T.Buffer((width, wide), "float32"),
        b_out: T.Buffer((wide,), "float32"),
        V: T.int64,
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        P = T.int64()
        R = T.int64()
        query = T.match_buffer(query_handle, (P, width), "float32", align=4)
        views = T.match_buffer(views_handle, (R, width), "float32", align=4)  # rows are (point, view)
        ray_diff = T.match_buffer(ray_diff_handle, (R, 4), "float32", align=4)
        mask = T.match_buffer(mask_handle, (R,), "uint8", align=1)
        out = T.match_buffer(out_handle, (P, width), "float32", align=4)
        points_a_block: T.let[T.int64] = _ROWS // V
        blocks: T.let[T.int64] = (P + points_a_block - 1) // points_a_block
        for task in T.parallel((blocks + _BLOCKS_A_TASK - 1) // _BLOCKS_A_TASK):
            hidden_rows = T.alloc_buffer((_ROWS + ROW_PADDING, narrow), "float32", align=64)
            row_out = T.alloc_buffer((_ROWS + ROW_PADDING, both), "float32", align=64)
            query_out = T.alloc_buffer((_ROWS + ROW_PADDING, narrow), "float32", align=64)
            pooled = T.alloc_buffer((_ROWS + ROW_PADDING, wide), "float32", align=64)
            scores = T.alloc_buffer((MAX_VIEWS * lanes,), "float32", align=64)
            accumulators = T.alloc_buffer((ACCUMULATORS * lanes,), "float32", align=64)
            largest = T.alloc_buffer((lanes,), "float32", align=64)
            total = T.alloc_buffer((lanes,), "float32", align=64)
            summed = T.alloc_buffer((lanes,), "float32", align=64)
            for block in T.serial(T.min(T.int64(_BLOCKS_A_TASK), blocks - task * _BLOCKS_A_TASK)):
                first: T.let[T.int64] = (task * _BLOCKS_A_TASK + block) * points_a_block
                points: T.let[T.int64] = T.min(points_a_block, P - first)
                rows: T.let[T.int64] = points * V
                for r in T.serial(rows):
                    for n in T.unroll(narrow // lanes):
                        hidden_rows[r, at(n * lanes)] = position_hidden(ray_diff, w_position, first * V + r, n * lanes)
                vec.product(
                    rows,
                    both,
                    lambda r, c: b_row[at(c)],
                    [
                        (width, lambda r, k: views[first * V + T.min(r, rows - 1), k], lambda k, c: w_row[k, at(c)]),
                        (hidden, lambda r, k: hidden_rows[r, k], lambda k, c: w_row[width + k, at(c)]),
                    ],
                    lambda r, c, x: T.buffer_store(row_out, x, [r, at(c)]),
                    accumulators,
                )
                vec.product(
                    points,
                    narrow,
                    lambda r, c: b_query[at(c)],
                    [(width, lambda r, k: query[first + T.min(r, points - 1), k], lambda k, c: w_query[k, at(c)])],
                    lambda r, c, x: T.buffer_store(query_out, x, [r, at(c)]),
                    accumulators,
                )
                for p in T.serial(points):
                    for v in T.serial(V):
                        for n in T.unroll(narrow // lanes):
                            hidden_rows[p * V + v, at(n * lanes)] = vec.relu(
                                row_out[p * V + v, at(wide + n * lanes)] + query_out[p, at(n * lanes)]
                            )
                    for n in T.serial(wide // lanes):
                        largest[at(0)] = splat(-3.0e38)
                        for v in T.serial(V):
                            scores[at(v * lanes)] = score(
                                hidden_rows, w_score, p * V + v, n * lanes, mask[(first + p) * V + v]
                            )
                            largest[at(0)] = vec.at_least(scores[at(v * lanes)], largest[at(0)])
                        total[at(0)] = splat(0.0)
                        summed[at(0)] = splat(0.0)
                        for v in T.serial(V):
                            scores[at(v * lanes)] = vec.exp(scores[at(v * lanes)] - largest[at(0)])
                            total[at(0)] = total[at(0)] + scores[at(v * lanes)]
                            summed[at(0)] = vec.multiply_add(
                                scores[at(v * lanes)], row_out[p * V + v, at(n * lanes)], summed[at(0)]
                            )
                        pooled[p, at(n * lanes)] = summed[at(0)] / total[at(0)]
                vec.product(
                    points,
                    wide,
                    lambda r, c: b_out[at(c)],
                    [(width, lambda r, k: pooled[r, k], lambda k, c: w_out[k, at(c)])],
                    lambda r, c, x: T.buffer_store(row_out, x, [r, at(c)]),
                    accumulators,
                )
                for p in T.serial(points):
                    for n in T.serial(width // lanes):
                        out[first + p, at(n * lanes)] = row_out[p, at(n * lanes)]
                    for c in T.serial(width % lanes):
                        out[first + p, width // lanes * lanes + c] = row_out[p, width // lanes * lanes + c]

    return view_attention


# --------------------------------------------------------------------------------------------------------------------
# Trial and ops
# --------------------------------------------------------------------------------------------------------------------


def _trial(function: Any, *, width: int, hidden: int) -> None:
    _compare(partial(_run, function), torch.device("cpu"), width, hidden)


def _trial_cuda(function: CudaFunction, *, width: int, hidden: int) -> None:
    _compare(partial(_run_cuda, function), function.device, width, hidden)


def _compare(run: Callable[..., Tensor], device: torch.device, width: int, hidden: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    points, views = 37, 5
    inputs = (draw(points, width), draw(points, views, width), draw(points, views, 4))
    mask = torch.rand(points, views, generator=generator) > 0.3
    mask[3] = False
    sizes = _weight_sizes(width, hidden)
    weights = [draw(*size) / size[1] ** 0.5 for size in sizes]
    biases = [draw(sizes[i][0]) for i in (3, 4, 5, 6, 7)]
    on_device = (
        *(x.to(device) for x in (*inputs, mask)),
        [weight.to(device) for weight in weights],
        [bias.to(device) for bias in biases],
    )
    torch.testing.assert_close(
        run(*on_device).cpu(), view_attention_twin(*inputs, mask, weights, biases), rtol=1e-4, atol=1e-5
    )


def _weight_sizes(width: int, hidden: int) -> tuple[tuple[int, int], ...]:
    square, up, down = (width, width), (width, hidden), (hidden, width)
    return (square, square, square, (hidden, 4), up, down, up, square)


def _run(
    function: Any,
    query: Tensor,
    views: Tensor,
    ray_diff: Tensor,
    mask: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
) -> Tensor:
    count, width = views.shape[-2:]
    out = memory.empty(*query.shape, dtype=torch.float32)
    function(
        query.float().reshape(-1, width).contiguous(),
        views.float().reshape(-1, width).contiguous(),
        ray_diff.float().reshape(-1, 4).contiguous(),
        mask.reshape(-1).contiguous().view(torch.uint8),
        *_panels(weights, biases, current().lanes),
        count,
        out.view(-1, width),
    )
    return out.to(query.dtype)


def _run_cuda(
    function: Any,
    query: Tensor,
    views: Tensor,
    ray_diff: Tensor,
    mask: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
) -> Tensor:
    count, width = views.shape[-2:]
    out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    cuda_view_attention.run(
        function,
        query.float().reshape(-1, width).contiguous(),
        views.float().reshape(-1, width).contiguous(),
        ray_diff.float().reshape(-1, 4).contiguous(),
        mask.reshape(-1).contiguous().view(torch.uint8),
        _panels(weights, biases, lanes=1),
        count,
        out.view(-1, width),
    )
    return out.to(query.dtype)


def _variants(target: CpuTarget | CudaTarget) -> list[dict[str, int]]:
    return [{"width": width, "hidden": width // 8} for width in (32, 64)]


KERNEL = Kernel("view_attention", _build, _trial, _variants)
CUDA_KERNEL = CudaKernel("view_attention", cuda_view_attention.build, _trial_cuda, _variants)


def _check(
    query: Tensor, views: Tensor, ray_diff: Tensor, mask: Tensor, weights: list[Tensor], biases: list[Tensor]
) -> None:
    count, width = views.shape[-2:]
    expected = {
        "views": (views, (*query.shape[:-1], count, query.shape[-1])),
        "ray_diff": (ray_diff, (*query.shape[:-1], count, 4)),
        "mask": (mask, (*query.shape[:-1], count)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise UserError(
                f"{name} must be {list(shape)} beside queries {list(query.shape)}, not {list(tensor.shape)}"
            )
    if mask.dtype != torch.bool:
        raise UserError(f"mask must be bool, not {mask.dtype}")
    if not 1 <= count <= MAX_VIEWS:
        raise UserError(f"view attention takes 1 to {MAX_VIEWS} views, not {count}")
    if len(weights) != len(WEIGHTS) or len(biases) != len(BIASES):
        raise UserError(f"view attention takes weights of {', '.join(WEIGHTS)} and biases of {', '.join(BIASES)}")
    sizes = _weight_sizes(width, weights[3].shape[0])
    for name, weight, size in zip(WEIGHTS, weights, sizes, strict=True):
        if weight.shape != size:
            raise UserError(f"the weight of {name} must be {list(size)}, not {list(weight.shape)}")
    for name, bias in zip(BIASES, biases, strict=True):
        size = sizes[WEIGHTS.index(name)][0]
        if bias.shape != (size,):
            raise UserError(f"the bias of {name} must be [{size}], not {list(bias.shape)}")


def _cpu(
    query: Tensor,
    views: Tensor,
    ray_diff: Tensor,
    mask: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
) -> Tensor:
    _check(query, views, ray_diff, mask, weights, biases)
    if query.numel() == 0:
        return torch.empty_like(query)
    function = None
    if query.dtype in (torch.float32, torch.bfloat16):
        function = KERNEL.function(width=query.shape[-1], hidden=weights[3].shape[0])
    if function is None:
        return view_attention_twin(query, views, ray_diff, mask, weights, biases)
    return _run(function, query, views, ray_diff, mask, weights, biases)


def _cuda(
    query: Tensor,
    views: Tensor,
    ray_diff: Tensor,
    mask: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
) -> Tensor:
    _check(query, views, ray_diff, mask, weights, biases)
    if query.numel() == 0:
        return torch.empty_like(query)
    function, width, hidden = None, query.shape[-1], weights[3].shape[0]
    if not cuda_view_attention.fits(width, hidden) or views.numel() > MAX_ELEMENTS:
        CUDA_KERNEL.decline(f"views {list(views.shape)} are too large for it")
    elif query.dtype in (torch.float32, torch.bfloat16, torch.float16):
        function = CUDA_KERNEL.function(device=query.device, width=width, hidden=hidden)
    if function is None:
        return view_attention_twin(query, views, ray_diff, mask, weights, biases)
    return _run_cuda(function, query, views, ray_diff, mask, weights, biases)


def _with_codes(view_attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same with packed weights."""

    def shift(
        query: Tensor,
        views: Tensor,
        ray_diff: Tensor,
        mask: Tensor,
        codes: list[Tensor],
        offsets: list[Tensor],
        biases: list[Tensor],
        bits: int,
    ) -> Tensor:
        weights = _decoded(codes, offsets, bits, query.shape[-1])
        return view_attention(query, views, ray_diff, mask, weights, biases)

    return shift


_SCHEMA = "Tensor query, Tensor views, Tensor ray_diff, Tensor mask"

#: ``torch.ops.shiftadd3d.view_attention``; arguments as those of its twin. 1 to 32 views, any width; float32 and
#: bfloat16 (computed in float32). The weights are, in this order, those of `WEIGHTS`, the biases those of `BIASES`.
view_attention = define_op(
    f"view_attention({_SCHEMA}, Tensor[] weights, Tensor[] biases) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    twin=view_attention_twin,
    fake=lambda query, *_: torch.empty_like(query),
    activations=3,
)
#: ``torch.ops.shiftadd3d.view_attention_shift``: the same with packed power-of-two weights, as `PackedShiftLinear` has
#: them: codes [terms, out, ceil(in * bits / 8)] uint8 and offsets [terms, out] int8.
view_attention_shift = define_op(
    f"view_attention_shift({_SCHEMA}, Tensor[] codes, Tensor[] offsets, Tensor[] biases, int bits) -> Tensor",
    cpu=_with_codes(_cpu),
    cuda=_with_codes(_cuda),
    twin=view_attention_shift_twin,
    fake=lambda query, *_: torch.empty_like(query),
    activations=3,
)
