"""View attention on CPUs, in one pass over the views: nothing of the size [points, views, C] is written.

With x_v what view v shows of a point, d_v how its ray differs, q the point's query, and products of weights taken
beforehand (`shiftadd3d.kernels.pack.gnt.view_attention`)::

    p_v = relu(P d_v + b)                               position
    (u_v, h_v) = R (x_v, p_v) + b                       row
    s_v = A relu(h_v - W q + b)                         score, -1e9 where the view is masked
    out = W_o sum_v softmax_v(s)_v u_v + b_o            out

With shift weights in panels of integers, products of weights are taken only where they are small: a power of two times
another one is a power of two, but a sum of them is not::

    k_v = W_k x_v                                       key
    (u_v, h_v) = (W_v, A_1) k_v + R' p_v + b            row, and what `row` above has for p_v
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.blocks import copy_row, exp, exp2, softmax_of_vectors
from shiftadd3d.kernels.cpu.forms import panels as forms
from shiftadd3d.kernels.cpu.forms.panels import AnyForm, PanelProduct, panel_arguments, panel_product
from shiftadd3d.kernels.cpu.gnt.shift_problems import random_shift_attention
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.tile import ROW_PADDING, Scalars, product
from shiftadd3d.kernels.cpu.trials import check_within
from shiftadd3d.kernels.pack.gnt.view_attention import panels, shift_forms, shift_sizes
from shiftadd3d.kernels.pack.shift import shift_panel
from shiftadd3d.kernels.reference.gnt.view_attention import (
    MAX_VIEWS,
    compare_with_twin,
)
from shiftadd3d.kernels.runtime import memory
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled, Kernel
from shiftadd3d.kernels.runtime.targets import CpuTarget, current
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index

# (point, view) rows at once: what they need of caches stays within the first level for 64 channels.
_ROWS = 64

# Blocks of so many rows that a parallel task takes: enough to allocate buffers for, few enough to share out evenly.
_BLOCKS_A_TASK = 16


def _build(target: CpuTarget, *, width: int, hidden: int, form: AnyForm) -> T.PrimFunc:
    isa = Isa(target)
    wide, narrow = isa.padded(width), isa.padded(hidden)
    padding = max(ROW_PADDING, forms.ROW_PADDING)
    rows_of_tile = _ROWS + padding

    with T.function("view_attention") as function:
        P, R = T.sizes(2)
        query, views = T.argument("query", (P, width)), T.argument("views", (R, width))  # rows of views: (point, view)
        ray_diff, mask = T.argument("ray_diff", (R, 4)), T.argument("mask", (R,), "uint8")
        w_row, b_row = T.panel("w_row", width + hidden, wide + narrow), T.panel("b_row", wide + narrow)
        w_position = T.panel("w_position", 5, narrow)  # the bias last
        w_query, b_query = T.panel("w_query", width, narrow), T.panel("b_query", narrow)
        w_score = T.panel("w_score", hidden, wide)
        w_out, b_out = T.panel("w_out", width, wide), T.panel("b_out", wide)
        sizes = shift_sizes(width, hidden, isa.lanes)
        shift_panels = [] if form == "float32" else panel_arguments(form, sizes)
        V, out = T.scalar("V"), T.argument("out", (P, width))
        flag = T.argument("flag", (1,), "int32")

        points_of_block = T.bind(T.int64(_ROWS) // V)
        blocks = T.bind((P + points_of_block - 1) // points_of_block)
        with T.parallel((blocks + _BLOCKS_A_TASK - 1) // _BLOCKS_A_TASK) as task:
            hidden_rows = T.alloc(rows_of_tile, narrow)
            row_out, query_out = T.alloc(rows_of_tile, wide + narrow), T.alloc(rows_of_tile, narrow)
            begin = T.bind(task * _BLOCKS_A_TASK * points_of_block)
            points_of_task = T.bind(T.min(points_of_block * _BLOCKS_A_TASK, P - begin))
            pooled, shares = T.alloc(points_of_task + padding, wide), T.alloc(MAX_VIEWS * isa.lanes)
            shifts = None if form == "float32" else _Shifts(panel_product(target, form), width, *shift_panels)
            power, factor = (exp, 1.0) if shifts is None else (exp2, math.log2(math.e))
            with T.serial(T.min(T.int64(_BLOCKS_A_TASK), blocks - task * _BLOCKS_A_TASK)) as block:
                first = T.bind(begin + block * points_of_block)
                points = T.bind(T.min(points_of_block, P - first))
                rows = T.bind(points * V)

                def view(r: Index, k: Index) -> Expr:
                    return views[first * V + T.min(r, rows - 1), k]

                def point(r: Index, k: Index) -> Expr:
                    return query[first + T.min(r, points - 1), k]

                with T.serial(rows) as r:
                    _position(isa, ray_diff.part(first * V + r), w_position, hidden_rows.part(r))
                of_position = hidden, hidden_rows, w_row.below(width)
                if shifts is None:
                    product(isa, rows, wide + narrow, b_row, [(width, view, w_row), of_position], row_out)
                else:
                    product(isa, rows, wide + narrow, b_row, [of_position], row_out)
                    shifts.add_views(rows, view, row_out)
                product(isa, points, narrow, b_query, [(width, point, w_query)], query_out)
                with T.serial(points) as p:
                    shown, hidden_of_point = row_out.below(p * V), hidden_rows.below(p * V)
                    seen = mask.below((first + p) * V)
                    with T.serial(V) as v:
                        if shifts is not None:
                            _prefetch(views.part((first + points + p) * V + v), width)
                        for n in range(0, narrow, isa.lanes):
                            sums = isa.relu(shown[v, isa.at(wide + n)] + query_out[p, isa.at(n)])
                            hidden_of_point[v, isa.at(n)] = sums if shifts is None else sums * isa.splat(factor)
                    with T.serial(wide // isa.lanes) as n:
                        channels = isa.at(n * isa.lanes)
                        vector = _pool(isa, hidden_of_point, w_score, seen, shown, V, channels, shares, power)
                        pooled[first - begin + p, channels] = vector
            # All points of a task together: a block's alone would leave tiles half empty.
            outcome = T.alloc(points_of_task + padding, wide)
            if shifts is None:
                product(isa, points_of_task, wide, b_out, [(width, pooled, w_out)], outcome)
            else:
                shifts.leave(points_of_task, pooled, b_out, outcome)
                shifts.product.finish(flag)
            with T.serial(points_of_task) as p:
                copy_row(isa, outcome.part(p), out.part(begin + p), width)
    return function.get()


def _prefetch(row: Buffer, width: int) -> None:
    """Ask for a row of the next block, which is staged all at once: memory would be waited for."""
    for c in range(0, width, 16):
        Isa.prefetch(row.address(c))


class _Shifts:
    """Products with shift weights, within a task.

    Args:
        product: of the weights' form.
        key, row, out: panels.
    """

    def __init__(self, product: PanelProduct, width: int, key: Buffer, row: Buffer, out: Buffer) -> None:
        self.product, self._key, self._row, self._out = product, key, row, out
        self._keys, self._staged = T.alloc(_ROWS + forms.ROW_PADDING, width), product.staged(_ROWS, width)
        self._isa, self._width = product.isa, width

    def add_views(self, rows: Expr, view: Scalars, sums: Buffer) -> None:
        """Add to rows what there is of the views themselves."""
        isa, last = self._isa, rows - 1

        def keep(r: Expr, c: int, x: Expr) -> None:
            self._keys[r, isa.at(c)] = x

        def add(r: Expr, c: int, x: Expr) -> None:
            sums[r, isa.at(c)] = x

        self.product.stage(self._staged, rows, lambda r, c: view(r, isa.at(c)))
        self.product.multiply(rows, self._staged, self._key, lambda r, c: isa.splat(0.0), keep)
        self.product.stage(self._staged, rows, lambda r, c: self._keys[T.min(r, last), isa.at(c)])
        self.product.multiply(rows, self._staged, self._row, lambda r, c: sums[r, isa.at(c)], add)

    def leave(self, points: Expr, pooled: Buffer, bias: Buffer, out: Buffer) -> None:
        """The output layer."""
        isa, last = self._isa, points - 1
        staged = self.product.staged(points, self._width)

        def store(r: Expr, c: int, x: Expr) -> None:
            out[r, isa.at(c)] = x

        self.product.stage(staged, points, lambda r, c: pooled[T.min(r, last), isa.at(c)])
        self.product.multiply(points, staged, self._out, bias, store)


def _position(isa: Isa, ray_diff: Buffer, weight: Buffer, out: Buffer) -> None:
    """``relu(P d + b)`` of one view."""
    for n in range(0, weight.extent(1), isa.lanes):
        total = weight[4, isa.at(n)]
        for i in range(4):
            total = isa.fma(isa.splat(ray_diff[i]), weight[i, isa.at(n)], total)
        out[isa.at(n)] = isa.relu(total)


def _pool(
    isa: Isa,
    hidden: Buffer,
    w_score: Buffer,
    mask: Buffer,
    shown: Buffer,
    V: Expr,
    channels: Expr,
    shares: Buffer,
    power: Callable[[Isa, Expr], Expr],
) -> Expr:
    """``sum_v softmax_v(A h)_v u_v`` of the V views of one point, for a vector of channels."""
    summed = isa.register(0.0)

    def score(v: Expr) -> Expr:
        total = isa.splat(0.0)
        for h in range(w_score.extent(0)):
            total = isa.fma(isa.splat(hidden[v, h]), w_score[h, channels], total)
        # Not a branch: which views are masked is hard to guess.
        return T.select(mask[v] != T.number("uint8", 0), total, isa.splat(-1e9))

    def add(v: Expr, share: Expr) -> None:
        summed.value = isa.fma(share, shown[v, channels], summed.value)

    total = softmax_of_vectors(isa, shares, V, score, add, power)
    return summed.value / total


def _trial(function: Compiled, *, width: int, hidden: int, form: AnyForm) -> None:
    def packed(*arguments: Any) -> Tensor:
        *inputs, weights, biases = arguments
        out = run(function, *inputs, panels=panels(weights, biases, current().lanes))
        assert out is not None
        return out

    if form == "float32":
        compare_with_twin(packed, torch.device("cpu"), width, hidden)
        return
    problem = random_shift_attention(0, points=37, views=5, width=width, hidden=hidden)
    out = run(function, *problem.inputs, [*problem.panels, *(shift_panel(x, form) for x in problem.shifts.values())])
    assert out is not None, "it found an activation that it cannot express"
    expected = problem.rounded(form)
    check_within(out, expected, forms.error_bound(form) * 4 * expected.abs().amax() + 1e-4)


def run(
    function: Compiled, query: Tensor, views: Tensor, ray_diff: Tensor, mask: Tensor, panels: Sequence[Tensor]
) -> Tensor | None:
    """Call a compiled function with the panels of its form; None if that cannot express an activation."""
    count, width = views.shape[-2:]
    out, flag = memory.empty(*query.shape, dtype=torch.float32), torch.zeros(1, dtype=torch.int32)
    function(
        query.float().reshape(-1, width).contiguous(),
        views.float().reshape(-1, width).contiguous(),
        ray_diff.float().reshape(-1, 4).contiguous(),
        mask.reshape(-1).contiguous().view(torch.uint8),
        *panels,
        count,
        out.view(-1, width),
        flag,
    )
    return None if flag.item() else out.to(query.dtype)


def _variants(target: CpuTarget) -> Iterator[dict[str, Any]]:
    for width in (32, 64):
        for form in ("float32", *shift_forms(target)):
            yield {"width": width, "hidden": width // 8, "form": form}


KERNEL = Kernel("view_attention", _build, _trial, _variants)
