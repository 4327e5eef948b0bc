"""The blend of the views' colours on CPUs: ray by ray, with one pass over the values of the views.

`shiftadd3d.kernels.reference.gnt.color_blend` has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.blocks import blend_colors, softmax_of_row
from shiftadd3d.kernels.cpu.forms.panels import panel_arguments
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.tile import ROW_PADDING, Scalars, product
from shiftadd3d.kernels.pack.gnt.color_blend import panels, sizes, tile_inputs
from shiftadd3d.kernels.reference.gnt.color_blend import LEAST_ANGLE, MAX_VIEWS, color_blend_twin, random_blend
from shiftadd3d.kernels.reference.gnt.plane_sweep import MASKED_LOGIT
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled, Kernel, Spec
from shiftadd3d.kernels.runtime.targets import CpuTarget, current
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index

# (sample, view) rows that are multiplied at once, and the samples of a task. A task takes one ray or more.
ROWS, _POINTS_A_TASK = 64, 64


class Judge(Protocol):
    """Computes colours and scores of a task's points from the values of the views. Each task makes one."""

    def judge(self, first: Expr, count: Expr, row: Expr, outcome: Outcome) -> None:
        """Emit the code for some points. It writes their colours, scores and counts.

        Args:
            first, count: the points, counted within the task.
            row: the (sample, view) row of the first point's first view.
        """
        ...

    def finish(self) -> None:
        """Emit the last code of a task."""
        ...


class Outcome(NamedTuple):
    """Buffers for the points of a task. `own` is an input of a `Judge`, the others are its results."""

    own: Buffer  # [points, hidden + 1]: a point's part of the views' hidden layer, then its own logit
    colors: Buffer  # [points, 4]: red, green, blue, and a number without a meaning
    scores: Buffer  # [points]
    counts: Buffer  # [points]: the number of views that see the point


class Views:
    """A `Judge` of values in float32. Rows are (ray, sample, view).

    Args:
        shown: values [rows, inputs], ray differences [rows, 4], mask [rows] uint8.
        V: the number of views.
    """

    def __init__(self, isa: Isa, shown: tuple[Buffer, Buffer, Buffer], weights: Weights, V: Expr) -> None:
        self._isa, (self._values, self._ray_diff, self._mask), self._V = isa, shown, V
        self._weights, inputs = weights, shown[0].extent(1)
        self._activation = T.alloc(ROWS + ROW_PADDING, weights.view.extent(1))
        self._apart, self._logits = T.alloc(ROWS + ROW_PADDING, inputs), T.alloc(isa.padded(MAX_VIEWS))
        self._seen, self._off = T.alloc(1, align=4), T.alloc(1, align=4)

    def judge(self, first: Expr, count: Expr, row: Expr, outcome: Outcome) -> None:
        isa, V, weights, values, inputs = self._isa, self._V, self._weights, self._values, self._values.extent(1)
        with T.serial(count) as i:
            self._consensus(row + i * V, i * V, first + i, outcome)
        terms = (
            (inputs, lambda i, k: values[row + i, k], weights.view),
            (4, lambda i, k: self._ray_diff[row + i, k], weights.view.below(inputs)),
            (inputs, self._apart, weights.view.below(inputs + 4)),
        )
        deep = weights.view.extent(1)
        product(isa, count * V, deep, lambda i, c: isa.splat(0.0), terms, self._activation)
        with T.serial(count) as i:
            with T.serial(V) as v:
                own = outcome.own.part(first + i)
                self._logits[v] = _logit(isa, self._activation.part(i * V + v), own, weights.view_logit)
            self._blend(row + i * V, outcome.colors.part(first + i))

    def finish(self) -> None:
        pass

    def _shares(self, row: Expr) -> Expr:
        """Turn the logits of a sample's views into unnormalised softmax weights; returns their sum.

        The angle prior is added to the logits first. `_seen` gets the number of views that see the sample.
        """
        one, scales = T.float32(1.0), self._weights.scales
        self._seen[0] = self._off[0] = T.float32(0.0)
        with T.serial(self._V) as v:
            sees = T.cast(self._mask[row + v], "float32")
            self._seen[0] = self._seen[0] + sees
            self._off[0] = self._off[0] + sees * (one - self._ray_diff[row + v, 3])
        mean = T.max(self._off[0] / T.max(self._seen[0], one), T.float32(LEAST_ANGLE))
        scale = T.bind(scales[0] * (one + scales[2] / mean))
        with T.serial(self._V) as v:
            angle = scale * (self._ray_diff[row + v, 3] - one)
            sees = self._mask[row + v] != T.number("uint8", 0)
            self._logits[v] = T.select(sees, self._logits[v] + angle, T.float32(MASKED_LOGIT))
        return softmax_of_row(self._isa, self._logits, self._V)

    def _blend(self, row: Expr, color: Buffer) -> None:
        """Write a sample's colour, and the blend of the first feature, from the logits of its views.

        Args:
            row: the row of the sample's first view.
        """
        four = Isa(self._isa.target, 4)
        mixed = four.register(0.0)
        total = T.bind(T.float32(1.0) / self._shares(row))
        with T.serial(self._V) as v:
            value = self._values[row + v, four.at(0)]
            mixed.value = four.fma(four.splat(self._logits[v]), value, mixed.value)
        color[four.at(0)] = mixed.value * four.splat(total)

    def _consensus(self, row: Expr, first: Expr, point: Expr, outcome: Outcome) -> None:
        """Write the distances of a point's views from their consensus, and the point's score.

        Args:
            row: the row of the point's first view.
            first: the first of the V rows of `_apart` that get the distances.
        """
        isa, logits, inputs = self._isa, self._logits, self._values.extent(1)
        mean, deviation = T.alloc(isa.padded(inputs)), T.alloc(1, align=4)
        with T.serial(self._V) as v:
            logits[v] = T.float32(0.0)
        total = T.bind(T.float32(1.0) / self._shares(row))
        for k in range(0, inputs, isa.lanes):
            mean[isa.at(k)] = isa.splat(0.0)
        with T.serial(self._V) as v:
            share = logits[v] * total
            shown = self._values.part(row + v)

            def add(k: Expr) -> None:
                mean[k] = mean[k] + share * shown[k]

            def add_vector(vectors: Isa, k: Expr) -> None:
                mean[k] = vectors.fma(vectors.splat(share), shown[k], mean[k])

            self._each_channel(add_vector, add)
        deviation[0] = T.float32(0.0)
        with T.serial(self._V) as v:
            shown, out = self._values.part(row + v), self._apart.part(first + v)

            def distance(k: Expr) -> None:
                out[k] = T.select(shown[k] < mean[k], mean[k] - shown[k], shown[k] - mean[k])

            def distances(vectors: Isa, k: Expr) -> None:
                out[k] = vectors.absolute(shown[k] - mean[k])

            self._each_channel(distances, distance)
            deviation[0] = deviation[0] + logits[v] * (out[0] + out[1] + out[2])
        outcome.counts[point] = self._seen[0]
        outcome.scores[point] = score(self._weights, outcome, point, deviation[0] * total)

    def _each_channel(self, of_vector: Callable[[Isa, Expr], None], of_one: Callable[[Expr], None]) -> None:
        """Emit ``of_vector(vectors, index)`` for channels that fill vectors, and ``of_one(channel)`` for the rest."""
        inputs, end = self._values.extent(1), 0
        for vectors in (self._isa, Isa(self._isa.target, 4)):
            while end + vectors.lanes <= inputs:
                of_vector(vectors, vectors.at(end))
                end += vectors.lanes
        with T.serial(inputs - end) as k:
            of_one(end + k)


def score(weights: Weights, outcome: Outcome, point: Expr, deviation: Expr) -> Expr:
    """The score of a point: its own logit less a multiple of the deviation of its views' colours.

    Args:
        deviation: the sum over the three colour channels.
    """
    agreement = outcome.own[point, weights.hidden] - weights.scales[1] * (deviation * T.float32(1.0 / 3.0))
    return T.select(outcome.counts[point] < T.float32(1.5), T.float32(MASKED_LOGIT), agreement)


def _build(target: CpuTarget, *, width: int, inputs: int, hidden: int) -> T.PrimFunc:
    isa = Isa(target)
    with T.function("color_blend") as function:
        R, S, N = T.sizes(3)
        x, values = T.argument("x", (R * S, width)), T.argument("values", (N, inputs))
        ray_diff, mask = T.argument("ray_diff", (N, 4)), T.argument("mask", (N,), "uint8")
        weights = Weights.argument(isa, width, inputs, hidden)
        V = T.scalar("V")
        rgb, shares = T.argument("rgb", (R, 3)), T.argument("weights", (R, S))
        shown = values, ray_diff, mask
        emit(
            target,
            lambda ray, points: lambda p, k: x[ray * S + p, k],
            lambda: Views(Isa(target), shown, weights, V),
            weights,
            V,
            rgb,
            shares,
        )
    return function.get()


class Weights(NamedTuple):
    """The arguments that hold `shiftadd3d.kernels.pack.gnt.color_blend.Panels`, and their sizes."""

    width: int
    hidden: int
    own: Buffer  # outputs: a sample's part of the views' hidden layer, then its own logit
    own_bias: Buffer
    view: Buffer
    view_logit: Buffer
    scales: Buffer

    @classmethod
    def argument(cls, isa: Isa, width: int, inputs: int, hidden: int, *, tiles: bool = False) -> Weights:
        """The next arguments of a function.

        Args:
            tiles: whether the views' layer is a `shiftadd3d.kernels.pack.gnt.color_blend.tile_panel`.
        """
        own, own_bias, view, logit, scales = sizes(isa.lanes, width, inputs, hidden)
        of_points = T.panel("own", *own), T.panel("own_bias", *own_bias)
        if tiles:
            (of_views,) = panel_arguments("bfloat16", [(tile_inputs(inputs - 4), isa.padded(hidden))])
        else:
            of_views = T.panel("view", *view)
        return cls(width, hidden, *of_points, of_views, T.panel("view_logit", *logit), T.panel("scales", *scales))


def emit(
    target: CpuTarget,
    features: Callable[[Expr, Expr], Scalars],
    judge: Callable[[], Judge],
    weights: Weights,
    V: Expr,
    rgb: Buffer,
    shares: Buffer,
    *,
    at_once: Index = ROWS,
    seen: Buffer | None = None,
    behind: Callable[[Expr, Expr], None] = lambda ray, number: None,
) -> None:
    """Emit the blend of all rays, after all arguments.

    Args:
        features: ``features(ray, points)`` is called first in a task. It returns the features of the task's samples:
            `points` of them, beginning with the first sample of `ray`.
        judge: ``judge()`` is called next, and makes the `Judge` of the task.
        V: the number of views.
        rgb: [R, 3], for the colours.
        shares: [R, S], for the weights of the samples.
        at_once: how many (sample, view) rows the judge takes at once.
        seen: [R, S], set to 1 if any view sees the sample, else to 0.
        behind: ``behind(ray, number)`` is called last for each ray. The number counts the rays of the task.
    """
    isa, (R, S), own = Isa(target), shares.shape, weights.own.extent(1)
    samples_of_block = T.bind(T.truncdiv(at_once + T.int64(0), V))
    rays_of_task = T.bind(T.max(T.truncdiv(T.int64(_POINTS_A_TASK), S), T.int64(1)))
    with T.parallel((R + rays_of_task - 1) // rays_of_task) as task:
        first_ray = T.bind(task * rays_of_task)
        rays = T.bind(T.min(rays_of_task, R - first_ray))
        points, room = T.bind(rays * S), T.bind(rays_of_task * S)
        outcome = Outcome(T.alloc(room + ROW_PADDING, own), T.alloc(room, 4), T.alloc(room), T.alloc(room))
        of_ray, views = T.alloc(S + isa.lanes), judge()
        term = (weights.width, features(first_ray, points), weights.own)
        product(isa, points, own, weights.own_bias, [term], outcome.own)
        with T.serial((points + samples_of_block - 1) // samples_of_block) as block:
            first = T.bind(block * samples_of_block)
            count = T.bind(T.min(samples_of_block, points - first))
            views.judge(first, count, T.bind((first_ray * S + first) * V), outcome)
        views.finish()
        with T.serial(rays) as number:
            ray = T.bind(first_ray + number)
            scores, colors = outcome.scores.below(number * S), outcome.colors.below(number * S)
            counts = outcome.counts.below(number * S)
            with T.serial(S) as s:
                of_ray[s] = scores[s]
                if seen is not None:
                    seen[ray, s] = T.cast(counts[s] > T.float32(0.0), "uint8")
            blend_colors(isa, of_ray, S, lambda s: colors[s, T.ramp(0, 4)], shares.part(ray), rgb.part(ray))
            behind(ray, number)


def _logit(isa: Isa, view: Buffer, own: Buffer, weight: Buffer) -> Expr:
    """The second layer for one view of a sample. Its bias is left out: it is the same for all views."""
    total = isa.splat(0.0)
    for n in range(0, weight.extent(0), isa.lanes):
        total = isa.fma(isa.relu(view[isa.at(n)] + own[isa.at(n)]), weight[isa.at(n)], total)
    return isa.total(total)


def run(
    function: Compiled, x: Tensor, values: Tensor, ray_diff: Tensor, mask: Tensor, panels: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Call a compiled function: colours [R, 3] and weights of samples [R, S]; arguments as those of the op."""
    rays, samples, views, inputs = values.shape
    rgb, weights = torch.empty(rays, 3), torch.empty(rays, samples)
    function(
        x.reshape(rays * samples, -1).contiguous(),
        values.reshape(-1, inputs).contiguous(),
        ray_diff.reshape(-1, 4).contiguous(),
        mask.reshape(-1).contiguous().view(torch.uint8),
        *panels,
        views,
        rgb,
        weights,
    )
    return rgb, weights


def _trial(function: Compiled, *, width: int, inputs: int, hidden: int) -> None:
    arguments = random_blend(0, rays=5, samples=19, views=5, width=width, inputs=inputs, hidden=hidden)
    outcome = run(function, *arguments[:4], panels=panels(*arguments[4:], lanes=current().lanes))
    for out, twin in zip(outcome, color_blend_twin(*arguments), strict=True):
        torch.testing.assert_close(out, twin, rtol=1e-4, atol=1e-5)


def _variants(target: CpuTarget) -> list[Spec]:
    return [{"width": width, "inputs": 35, "hidden": width // 2} for width in (32, 64)]


KERNEL = Kernel("color_blend", _build, _trial, _variants)
