"""View attention on CPUs, in one pass over the views. No tensor of the size [points, views, C] is written.

x_v are the features of view v at a point, d_v is its ray difference, and q is the point's query. Products of weights
are computed beforehand (`shiftadd3d.kernels.pack.gnt.view_attention`)::

    p_v = relu(P d_v + b)                               position
    (u_v, h_v) = R (x_v, p_v) + b                       row
    s_v = A relu(h_v - W q + b)                         score, -1e9 where the view is masked
    out = W_o sum_v softmax_v(s)_v u_v + b_o            out

With shift weights in panels of integers, W_v W_k and A_1 W_k are not computed beforehand. A product of two powers of
two is a power of two, but a sum of such products is not::

    k_v = W_k x_v                                       key
    (u_v, h_v) = (W_v, A_1) k_v + R' p_v + b            row; R' are the columns of R for p_v

There is no key in two cases. CPUs without VNNI read the products of weights, rounded to 16 bits (`merges_key`). Matrix
tiles in executables read them as sums of two bfloat16 pieces (`shiftadd3d.kernels.cpu.gnt.view_tiles`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.blocks import add_row, copy_row, exp, exp2, layer_norm, softmax_of_vectors
from shiftadd3d.kernels.cpu.forms import panels as forms
from shiftadd3d.kernels.cpu.forms.panels import AnyForm, PanelProduct, panel_arguments, panel_product
from shiftadd3d.kernels.cpu.gnt.shift_problems import random_shift_attention
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.tile import ROW_PADDING, Scalars, product
from shiftadd3d.kernels.cpu.trials import check_within
from shiftadd3d.kernels.pack.gnt.view_attention import merges_key, panels, shift_forms, shift_sizes, sizes
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

# (point, view) rows of a block. With 64 channels, all their data fits into the first-level cache.
_ROWS = 64

# Blocks of a task: enough to allocate buffers for, few enough that threads get equal shares.
_BLOCKS_A_TASK = 16

# Rows behind the last one that products read and write.
_PADDING = max(ROW_PADDING, forms.ROW_PADDING)


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
    """The values of the views. Rows are (point, view)."""

    views: Buffer  # [rows, C]
    ray_diff: Buffer  # [rows, 4]
    mask: Buffer  # [rows] uint8


class Weights(NamedTuple):
    """The arguments that hold `shiftadd3d.kernels.pack.gnt.view_attention.Panels`, and panels of integers."""

    row: Buffer
    row_bias: Buffer
    position: Buffer  # the last row is the bias
    query: Buffer
    query_bias: Buffer
    score: Buffer
    out: Buffer
    out_bias: Buffer
    shifts: list[Buffer]

    @classmethod
    def argument(cls, isa: Isa, width: int, hidden: int, form: AnyForm) -> Weights:
        """The next arguments of a function."""
        names = ("w_row", "b_row", "w_position", "w_query", "b_query", "w_score", "w_out", "b_out")
        panels = T.panels(sizes(isa.lanes, width, hidden), names)
        shifts = [] if form == "float32" else panel_arguments(form, shift_sizes(isa.target, width, hidden))
        return cls(*panels, shifts=shifts)


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
    isa, (P, width), wide = Isa(target), query.shape, weights.out_bias.extent(0)
    assert isinstance(width, int)
    points_of_block = T.bind(T.int64(_ROWS) // V)
    blocks = T.bind((P + points_of_block - 1) // points_of_block)
    with T.parallel((blocks + _BLOCKS_A_TASK - 1) // _BLOCKS_A_TASK) as task:
        block = _Block(isa, query, given, weights, V, eps)
        begin = T.bind(task * _BLOCKS_A_TASK * points_of_block)
        points_of_task = T.bind(T.min(points_of_block * _BLOCKS_A_TASK, P - begin))
        pooled, shares = T.alloc(points_of_task + _PADDING, wide), T.alloc(MAX_VIEWS * isa.lanes)
        shifts = None if form == "float32" else _Shifts(panel_product(target, form), width, *weights.shifts)
        with T.serial(T.min(T.int64(_BLOCKS_A_TASK), blocks - task * _BLOCKS_A_TASK)) as number:
            first = T.bind(begin + number * points_of_block)
            points = T.bind(T.min(points_of_block, P - first))
            block.multiply(first, points, shifts)
            block.pool(first, points, shifts, shares, pooled.below(first - begin))
        # All points of a task together: a block's alone would leave tiles half empty.
        outcome = T.alloc(points_of_task + _PADDING, wide)
        if shifts is None:
            product(isa, points_of_task, wide, weights.out_bias, [(width, pooled, weights.out)], outcome)
        else:
            shifts.leave(points_of_task, pooled, weights.out_bias, outcome)
            shifts.product.finish(flag)
        with T.serial(points_of_task) as p:
            if eps is not None:
                add_row(isa, query.part(begin + p), outcome.part(p), width)
            copy_row(isa, outcome.part(p), out.part(begin + p), width)


class _Block:
    """Emits the pooling of views for a block of points, and holds the memory for it within a task."""

    def __init__(self, isa: Isa, query: Buffer, given: Shown, weights: Weights, V: Expr, eps: float | None) -> None:
        self._isa, self._query, self._given, self._weights, self._V, self._eps = isa, query, given, weights, V, eps
        self._width, wide, narrow = query.extent(1), weights.out_bias.extent(0), weights.query_bias.extent(0)
        rows = _ROWS + _PADDING
        self._hidden = T.alloc(rows, narrow)
        self._row_out, self._query_out = T.alloc(rows, wide + narrow), T.alloc(rows, narrow)
        self._normed = T.alloc(rows, wide)

    def multiply(self, first: Expr, points: Expr, shifts: _Shifts | None) -> None:
        """Emit the products of `points` queries and of their views, from point `first` on."""
        isa, query, given, weights, V = self._isa, self._query, self._given, self._weights, self._V
        width, both, narrow = self._width, self._row_out.extent(1), self._query_out.extent(1)
        rows = T.bind(points * V)

        def view(r: Index, k: Index) -> Expr:
            return given.views[first * V + T.min(r, rows - 1), k]

        def point(r: Index, k: Index) -> Expr:
            r = T.min(r, points - 1)
            return query[first + r, k] if self._eps is None else self._normed[r, k]

        with T.serial(rows) as r:
            position(isa, given.ray_diff.part(first * V + r), weights.position, self._hidden.part(r))
        terms = [(weights.score.extent(0), self._hidden, weights.row.below(width))]
        if shifts is None:
            terms = [(width, view, weights.row), *terms]
        product(isa, rows, both, weights.row_bias, terms, self._row_out)
        if shifts is not None:
            shifts.add_views(rows, view, self._row_out)
        if self._eps is not None:
            layer_norm(isa, points, width, lambda r, c: query[first + r, c], self._normed, T.float32(self._eps))
        product(isa, points, narrow, weights.query_bias, [(width, point, weights.query)], self._query_out)

    def pool(self, first: Expr, points: Expr, shifts: _Shifts | None, shares: Buffer, pooled: Buffer) -> None:
        """Emit the softmax and the sum over the views of `points` points, into the first rows of `pooled` [*, C]."""
        isa, given, weights, V = self._isa, self._given, self._weights, self._V
        wide, narrow = weights.out_bias.extent(0), self._query_out.extent(1)
        power, factor = (exp, 1.0) if shifts is None else (exp2, math.log2(math.e))
        with T.serial(points) as p:
            shown, hidden = self._row_out.below(p * V), self._hidden.below(p * V)
            seen = given.mask.below((first + p) * V)
            with T.serial(V) as v:
                if shifts is not None:
                    prefetch(given.views.part((first + points + p) * V + v), self._width)
                for n in range(0, narrow, isa.lanes):
                    sums = isa.relu(shown[v, isa.at(wide + n)] + self._query_out[p, isa.at(n)])
                    hidden[v, isa.at(n)] = sums if shifts is None else sums * isa.splat(factor)
            with T.serial(wide // isa.lanes) as n:
                channels = isa.at(n * isa.lanes)
                pooled[p, channels] = pool(isa, hidden, weights.score, seen, shown, V, channels, shares, power)


def prefetch(row: Buffer, width: int) -> None:
    """Prefetch a row of the next block. Blocks are staged at once, so the CPU would wait for memory."""
    for c in range(0, width, 16):
        Isa.prefetch(row.address(c))


class _Shifts:
    """Products with shift weights, within a task.

    Args:
        product: the product for the form of the weights.
        panels: key, row and out; or row and out, if the row's weights are products with those of the key.
    """

    def __init__(self, product: PanelProduct, width: int, *panels: Buffer) -> None:
        self.product, (*self._key, self._row, self._out) = product, panels
        self._keys, self._staged = T.alloc(_ROWS + forms.ROW_PADDING, width), product.staged(_ROWS, width)
        self._isa, self._width = product.isa, width

    def add_views(self, rows: Expr, view: Scalars, sums: Buffer) -> None:
        """Add the views' products to the sums of rows."""
        isa = self._isa
        self.product.stage(self._staged, rows, lambda r, c: view(r, isa.at(c)))
        for key in self._key:
            self.product.multiply(rows, self._staged, key, lambda r, c: isa.splat(0.0), self._keys)
            self.product.stage(self._staged, rows, self._keys)
        self.product.multiply(rows, self._staged, self._row, lambda r, c: sums[r, isa.at(c)], sums)

    def leave(self, points: Expr, pooled: Buffer, bias: Buffer, out: Buffer) -> None:
        """The output layer."""
        staged = self.product.staged(points, self._width)
        self.product.stage(staged, points, pooled)
        self.product.multiply(points, staged, self._out, bias, out)


def position(isa: Isa, ray_diff: Buffer, weight: Buffer, out: Buffer) -> None:
    """Write ``relu(P d + b)`` for one view."""
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
    """``sum_v softmax_v(A h)_v u_v`` over the V views of one point, for a vector of channels.

    Args:
        hidden: [V, H], the scores' hidden layer.
        w_score: [H, C].
        mask: [V] uint8.
        shown: [V, *], of which `channels` are u_v.
        shares: [V * lanes], scratch memory.
        power: the exponential function for the softmax.
    """
    summed = isa.register(0.0)

    def score(v: Expr) -> Expr:
        total = isa.splat(0.0)
        for h in range(w_score.extent(0)):
            total = isa.fma(isa.splat(hidden[v, h]), w_score[h, channels], total)
        # Not a branch: the CPU cannot predict which views are masked.
        return T.select(mask[v] != T.number("uint8", 0), total, isa.splat(-1e9))

    def add(v: Expr, share: Expr) -> None:
        summed.value = isa.fma(share, shown[v, channels], summed.value)

    total = softmax_of_vectors(isa, shares, V, score, add, power)
    return summed.value / total


def error_bound(form: PanelForm, width: int) -> float:
    """The largest error of an activation by rounding, in multiples of the largest magnitude of its row.

    Without VNNI, it includes the rounding of weights.
    """
    return (1 + width) / 65534 if merges_key(current()) else forms.error_bound(form)


def _trial(function: Compiled, *, width: int, hidden: int, form: AnyForm) -> None:
    def packed(
        query: Tensor, views: Tensor, ray_diff: Tensor, mask: Tensor, weights: list[Tensor], biases: list[Tensor]
    ) -> Tensor:
        out = run(function, query, views, ray_diff, mask, panels(weights, biases, current().lanes))
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
    """Call a compiled function with the panels of its form; None if the form cannot express an activation."""
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
