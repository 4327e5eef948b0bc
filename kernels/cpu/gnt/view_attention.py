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

CPUs without VNNI have the products of weights in 16 bits, rounded, and need no key (`merges_key`). Nor do matrix tiles
in executables (`shiftadd3d.kernels.cpu.gnt.view_tiles`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.blocks import add_row, copy_row, exp, exp2, layer_norm, softmax_of_vectors
from shiftadd3d.kernels.cpu.forms import panels as forms
from shiftadd3d.kernels.cpu.forms.panels import AnyForm, PanelProduct, panel_arguments, panel_product
from shiftadd3d.kernels.cpu.gnt.shift_problems import random_shift_attention
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.tile import ROW_PADDING, Scalars, product
from shiftadd3d.kernels.cpu.trials import check_within
from shiftadd3d.kernels.pack.gnt.view_attention import merges_key, panels, shift_forms, shift_sizes
from shiftadd3d.kernels.pack.shift import PanelForm, shift_panel
from shiftadd3d.kernels.reference.gnt.view_attention import (
    MAX_VIEWS,
    compare_with_twin,
)
from shiftadd3d.kernels.runtime import memory
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled, Kernel, Spec
from shiftadd3d.kernels.runtime.targets import CpuTarget, current
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index

# (point, view) rows at once: what they need of caches stays within the first level for 64 channels.
_ROWS = 64

# Blocks of so many rows that a parallel task takes: enough to allocate buffers for, few enough to share out evenly.
_BLOCKS_A_TASK = 16


def _build(target: CpuTarget, *, width: int, hidden: int, form: AnyForm) -> T.PrimFunc:
    with T.function("view_attention") as function:
        P, R = T.sizes(2)
        query, views = T.argument("query", (P, width)), T.argument("views", (R, width))
        shown = Shown(views, T.argument("ray_diff", (R, 4)), T.argument("mask", (R,), "uint8"))
        weights = Weights.argument(Isa(target), width, hidden, form)
        V, out = T.scalar("V"), T.argument("out", (P, width))
        flag = T.argument("flag", (1,), "int32")
        emit(target, form, query, shown, weights, V, out, flag)
    return function.get()


class Shown(NamedTuple):
    """What the views show of points: rows are (point, view)."""

    views: Buffer  # [rows, C]
    ray_diff: Buffer  # [rows, 4]
    mask: Buffer  # [rows] uint8


class Weights(NamedTuple):
    """The arguments that hold `shiftadd3d.kernels.pack.gnt.view_attention.Panels`, and panels of integers."""

    row: Buffer
    row_bias: Buffer
    position: Buffer  # the bias last
    query: Buffer
    query_bias: Buffer
    score: Buffer
    out: Buffer
    out_bias: Buffer
    shifts: list[Buffer]

    @classmethod
    def argument(cls, isa: Isa, width: int, hidden: int, form: AnyForm) -> Weights:
        """The next arguments of a function."""
        wide, narrow = isa.padded(width), isa.padded(hidden)
        sizes = shift_sizes(isa.target, width, hidden)
        return cls(
            row=T.panel("w_row", width + hidden, wide + narrow),
            row_bias=T.panel("b_row", wide + narrow),
            position=T.panel("w_position", 5, narrow),
            query=T.panel("w_query", width, narrow),
            query_bias=T.panel("b_query", narrow),
            score=T.panel("w_score", hidden, wide),
            out=T.panel("w_out", width, wide),
            out_bias=T.panel("b_out", wide),
            shifts=[] if form == "float32" else panel_arguments(form, sizes),
        )


def emit(
    target: CpuTarget,
    form: AnyForm,
    query: Buffer,
    given: Shown,
    weights: Weights,
    V: Expr,
    out: Buffer,
    flag: Buffer,
    eps: float | None = None,
) -> None:
    """Emit the attention of all points, after all arguments: out [P, C].

    Args:
        query: [P, C].
        V: the number of views.
        eps: with one, queries are normalised first, and added to what comes out: a residual block, pre-norm. The norm's
            weight and bias are taken into those of the query.
    """
    isa, (P, width), hidden = Isa(target), query.shape, weights.score.extent(0)
    assert isinstance(width, int)
    wide, narrow = isa.padded(width), isa.padded(hidden)
    padding = max(ROW_PADDING, forms.ROW_PADDING)
    rows_of_tile = _ROWS + padding
    points_of_block = T.bind(T.int64(_ROWS) // V)
    blocks = T.bind((P + points_of_block - 1) // points_of_block)
    with T.parallel((blocks + _BLOCKS_A_TASK - 1) // _BLOCKS_A_TASK) as task:
        hidden_rows = T.alloc(rows_of_tile, narrow)
        row_out, query_out = T.alloc(rows_of_tile, wide + narrow), T.alloc(rows_of_tile, narrow)
        normed = T.alloc(rows_of_tile, wide)
        begin = T.bind(task * _BLOCKS_A_TASK * points_of_block)
        points_of_task = T.bind(T.min(points_of_block * _BLOCKS_A_TASK, P - begin))
        pooled, shares = T.alloc(points_of_task + padding, wide), T.alloc(MAX_VIEWS * isa.lanes)
        shifts = None if form == "float32" else _Shifts(panel_product(target, form), width, *weights.shifts)
        power, factor = (exp, 1.0) if shifts is None else (exp2, math.log2(math.e))
        with T.serial(T.min(T.int64(_BLOCKS_A_TASK), blocks - task * _BLOCKS_A_TASK)) as block:
            first = T.bind(begin + block * points_of_block)
            points = T.bind(T.min(points_of_block, P - first))
            rows = T.bind(points * V)

            def view(r: Index, k: Index) -> Expr:
                return given.views[first * V + T.min(r, rows - 1), k]

            def point(r: Index, k: Index) -> Expr:
                r = T.min(r, points - 1)
                return query[first + r, k] if eps is None else normed[r, k]

            with T.serial(rows) as r:
                position(isa, given.ray_diff.part(first * V + r), weights.position, hidden_rows.part(r))
            of_position = hidden, hidden_rows, weights.row.below(width)
            if shifts is None:
                product(isa, rows, wide + narrow, weights.row_bias, [(width, view, weights.row), of_position], row_out)
            else:
                product(isa, rows, wide + narrow, weights.row_bias, [of_position], row_out)
                shifts.add_views(rows, view, row_out)
            if eps is not None:
                layer_norm(isa, points, width, lambda r, c: query[first + r, c], normed, T.float32(eps))
            product(isa, points, narrow, weights.query_bias, [(width, point, weights.query)], query_out)
            with T.serial(points) as p:
                shown, hidden_of_point = row_out.below(p * V), hidden_rows.below(p * V)
                seen = given.mask.below((first + p) * V)
                with T.serial(V) as v:
                    if shifts is not None:
                        prefetch(given.views.part((first + points + p) * V + v), width)
                    for n in range(0, narrow, isa.lanes):
                        sums = isa.relu(shown[v, isa.at(wide + n)] + query_out[p, isa.at(n)])
                        hidden_of_point[v, isa.at(n)] = sums if shifts is None else sums * isa.splat(factor)
                with T.serial(wide // isa.lanes) as n:
                    channels = isa.at(n * isa.lanes)
                    vector = pool(isa, hidden_of_point, weights.score, seen, shown, V, channels, shares, power)
                    pooled[first - begin + p, channels] = vector
        # All points of a task together: a block's alone would leave tiles half empty.
        outcome = T.alloc(points_of_task + padding, wide)
        if shifts is None:
            product(isa, points_of_task, wide, weights.out_bias, [(width, pooled, weights.out)], outcome)
        else:
            shifts.leave(points_of_task, pooled, weights.out_bias, outcome)
            shifts.product.finish(flag)
        with T.serial(points_of_task) as p:
            if eps is not None:
                add_row(isa, query.part(begin + p), outcome.part(p), width)
            copy_row(isa, outcome.part(p), out.part(begin + p), width)


def prefetch(row: Buffer, width: int) -> None:
    """Ask for a row of the next block, which is staged all at once: memory would be waited for."""
    for c in range(0, width, 16):
        Isa.prefetch(row.address(c))


class _Shifts:
    """Products with shift weights, within a task.

    Args:
        product: of the weights' form.
        panels: key, row and out; without a key, the row has its products, and takes the views themselves.
    """

    def __init__(self, product: PanelProduct, width: int, *panels: Buffer) -> None:
        self.product, (*self._key, self._row, self._out) = product, panels
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
        for key in self._key:
            self.product.multiply(rows, self._staged, key, lambda r, c: isa.splat(0.0), keep)
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


def position(isa: Isa, ray_diff: Buffer, weight: Buffer, out: Buffer) -> None:
    """``relu(P d + b)`` of one view."""
    for n in range(0, weight.extent(1), isa.lanes):
        total = weight[4, isa.at(n)]
        for i in range(4):
            total = isa.fma(isa.splat(ray_diff[i]), weight[i, isa.at(n)], total)
        out[isa.at(n)] = isa.relu(total)


def pool(
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


def error_bound(form: PanelForm, width: int) -> float:
    """What an activation may be off by, as a multiple of the largest magnitude of its row, with what weights are."""
    return (1 + width) / 65534 if merges_key(current()) else forms.error_bound(form)


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
    check_within(out, expected, error_bound(form, width) * 4 * expected.abs().amax() + 1e-4)


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


def _variants(target: CpuTarget) -> Iterator[Spec]:
    for width in (32, 64):
        for form in ("float32", *shift_forms(target)):
            yield {"width": width, "hidden": width // 8, "form": form}


KERNEL = Kernel("view_attention", _build, _trial, _variants)
