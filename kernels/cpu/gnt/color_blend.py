"""The blend of the views' colours on CPUs, ray by ray, in one pass over what the views show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.blocks import blend_colors, softmax_of_row
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.tile import ROW_PADDING, Scalars, product
from shiftadd3d.kernels.pack.gnt.color_blend import panels, sizes
from shiftadd3d.kernels.reference.gnt.color_blend import LEAST_ANGLE, MAX_VIEWS, color_blend_twin, random_blend
from shiftadd3d.kernels.reference.gnt.plane_sweep import MASKED_LOGIT
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled, Kernel, Spec
from shiftadd3d.kernels.runtime.targets import CpuTarget, current
from shiftadd3d.kernels.runtime.tir import Buffer, Expr

# (sample, view) rows at once.
_ROWS = 64


@dataclass(frozen=True)
class _Views:
    """What the views show, whose rows are (ray, sample, view), and memory for the logits of one sample."""

    isa: Isa
    values: Buffer  # [rows, inputs]
    ray_diff: Buffer  # [rows, 4]
    mask: Buffer  # [rows] uint8
    scales: Buffer  # [3], `shiftadd3d.kernels.reference.gnt.color_blend.Scales`
    V: Expr
    logits: Buffer  # [V and more]
    seen: Buffer  # [1]: how many views see the sample
    off: Buffer  # [1]: the sum of 1 - cosine over these

    def shares(self, row: Expr) -> Expr:
        """The softmax of the logits, angles added, but for the division by what is returned; counts who sees."""
        one = T.float32(1.0)
        self.seen[0] = self.off[0] = T.float32(0.0)
        with T.serial(self.V) as v:
            sees = T.cast(self.mask[row + v], "float32")
            self.seen[0] = self.seen[0] + sees
            self.off[0] = self.off[0] + sees * (one - self.ray_diff[row + v, 3])
        mean = T.max(self.off[0] / T.max(self.seen[0], one), T.float32(LEAST_ANGLE))
        scale = T.bind(self.scales[0] * (one + self.scales[2] / mean))
        with T.serial(self.V) as v:
            angle = scale * (self.ray_diff[row + v, 3] - one)
            sees = self.mask[row + v] != T.number("uint8", 0)
            self.logits[v] = T.select(sees, self.logits[v] + angle, T.float32(MASKED_LOGIT))
        return softmax_of_row(self.isa, self.logits, self.V)

    def blend(self, row: Expr, color: Buffer) -> None:
        """From the views' logits of a sample, whose rows begin at `row`: its colour, and the first feature."""
        four = Isa(self.isa.target, 4)
        mixed = four.register(0.0)
        total = T.bind(T.float32(1.0) / self.shares(row))
        with T.serial(self.V) as v:
            value = self.values[row + v, four.at(0)]
            mixed.value = four.fma(four.splat(self.logits[v]), value, mixed.value)
        color[four.at(0)] = mixed.value * four.splat(total)

    def consensus(self, row: Expr, apart: Buffer, first: Expr, scores: Buffer, s: Expr) -> None:
        """How far the views of a sample are from what they show together: rows of `apart` from `first`; score s."""
        isa, logits, inputs = self.isa, self.logits, self.values.extent(1)
        mean, deviation = T.alloc(isa.padded(inputs)), T.alloc(1, align=4)
        with T.serial(self.V) as v:
            logits[v] = T.float32(0.0)
        total = T.bind(T.float32(1.0) / self.shares(row))
        for k in range(0, inputs, isa.lanes):
            mean[isa.at(k)] = isa.splat(0.0)
        with T.serial(self.V) as v:
            share = logits[v] * total
            shown = self.values.part(row + v)

            def add(k: Expr) -> None:
                mean[k] = mean[k] + share * shown[k]

            def add_vector(vectors: Isa, k: Expr) -> None:
                mean[k] = vectors.fma(vectors.splat(share), shown[k], mean[k])

            self._each_channel(add_vector, add)
        deviation[0] = T.float32(0.0)
        with T.serial(self.V) as v:
            shown, out = self.values.part(row + v), apart.part(first + v)

            def distance(k: Expr) -> None:
                out[k] = T.select(shown[k] < mean[k], mean[k] - shown[k], shown[k] - mean[k])

            def distances(vectors: Isa, k: Expr) -> None:
                out[k] = vectors.absolute(shown[k] - mean[k])

            self._each_channel(distances, distance)
            deviation[0] = deviation[0] + logits[v] * (out[0] + out[1] + out[2])
        agreement = scores[s] - self.scales[1] * (deviation[0] * total * T.float32(1.0 / 3.0))
        scores[s] = T.select(self.seen[0] < T.float32(1.5), T.float32(MASKED_LOGIT), agreement)

    def _each_channel(self, of_vector: Callable[[Isa, Expr], None], of_one: Callable[[Expr], None]) -> None:
        """``of_vector(vectors, index)`` for channels of a view that fill vectors, ``of_one(channel)`` for others."""
        inputs, end = self.values.extent(1), 0
        for vectors in (self.isa, Isa(self.isa.target, 4)):
            while end + vectors.lanes <= inputs:
                of_vector(vectors, vectors.at(end))
                end += vectors.lanes
        with T.serial(inputs - end) as k:
            of_one(end + k)


def _build(target: CpuTarget, *, width: int, inputs: int, hidden: int) -> T.PrimFunc:
    isa = Isa(target)
    with T.function("color_blend") as function:
        R, S, N = T.sizes(3)
        x, values = T.argument("x", (R * S, width)), T.argument("values", (N, inputs))
        ray_diff, mask = T.argument("ray_diff", (N, 4)), T.argument("mask", (N,), "uint8")
        weights = Weights.argument(isa, width, inputs, hidden)
        V = T.scalar("V")
        rgb, shares = T.argument("rgb", (R, 3)), T.argument("weights", (R, S))
        emit(target, lambda r: lambda s, k: x[r * S + s, k], (values, ray_diff, mask), weights, V, rgb, shares)
    return function.get()


class Weights(NamedTuple):
    """The arguments that hold `shiftadd3d.kernels.pack.gnt.color_blend.Panels`, and sizes."""

    width: int
    hidden: int
    own: Buffer  # of a sample: its part of the views' hidden layer, then its own logit
    own_bias: Buffer
    view: Buffer
    view_logit: Buffer
    scales: Buffer

    @classmethod
    def argument(cls, isa: Isa, width: int, inputs: int, hidden: int) -> Weights:
        """The next arguments of a function."""
        return cls(width, hidden, *T.panels(sizes(isa.lanes, width, inputs, hidden)))


def emit(
    target: CpuTarget,
    features: Callable[[Expr], Scalars],
    shown: tuple[Buffer, Buffer, Buffer],
    weights: Weights,
    V: Expr,
    rgb: Buffer,
    shares: Buffer,
    *,
    seen: Buffer | None = None,
    behind: Callable[[Expr], None] = lambda ray: None,
) -> None:
    """Emit the blend of all rays, after all arguments: colours [R, 3], and shares of samples [R, S].

    Args:
        features: ``features(ray)``, emitted first of all: what gives those of its samples.
        shown: values [R * S * V, inputs], ray differences [R * S * V, 4] and mask [R * S * V].
        V: the number of views.
        seen: [R, S], set to 1 where any view sees a sample, else to 0.
        behind: ``behind(ray)``, emitted last of all.
    """
    isa, (values, ray_diff, mask), (R, S) = Isa(target), shown, shares.shape
    hidden, inputs, own, deep = weights.hidden, values.extent(1), weights.own.extent(1), weights.view.extent(1)
    samples_of_block = T.bind(T.int64(_ROWS) // V)
    with T.parallel(R) as r:
        points, activation = T.alloc(S + ROW_PADDING, own), T.alloc(_ROWS + ROW_PADDING, deep)
        apart, colors = T.alloc(_ROWS + ROW_PADDING, inputs), T.alloc(S, 4)
        logits, scores = T.alloc(isa.padded(MAX_VIEWS)), T.alloc(S + isa.lanes)
        counts = T.alloc(1, align=4), T.alloc(1, align=4)
        views = _Views(isa, values, ray_diff, mask, weights.scales, V, logits, *counts)
        product(isa, S, own, weights.own_bias, [(weights.width, features(r), weights.own)], points)
        with T.serial(S) as s:
            scores[s] = points[s, hidden]
        with T.serial((S + samples_of_block - 1) // samples_of_block) as block:
            first = T.bind(block * samples_of_block)
            here = T.bind(T.min(samples_of_block, S - first))
            row = T.bind((r * S + first) * V)
            with T.serial(here) as s:
                views.consensus(row + s * V, apart, s * V, scores, first + s)
                if seen is not None:
                    seen[r, first + s] = T.cast(views.seen[0] > T.float32(0.0), "uint8")
            terms = (
                (inputs, lambda i, k: values[row + i, k], weights.view),
                (4, lambda i, k: ray_diff[row + i, k], weights.view.below(inputs)),
                (inputs, apart, weights.view.below(inputs + 4)),
            )
            product(isa, here * V, deep, lambda i, c: isa.splat(0.0), terms, activation)
            with T.serial(here) as s:
                with T.serial(V) as v:
                    logits[v] = _logit(isa, activation.part(s * V + v), points.part(first + s), weights.view_logit)
                views.blend(row + s * V, colors.part(first + s))
        blend_colors(isa, scores, S, lambda s: colors[s, T.ramp(0, 4)], shares.part(r), rgb.part(r))
        behind(r)


def _logit(isa: Isa, view: Buffer, own: Buffer, weight: Buffer) -> Expr:
    """The second layer for a view of a sample, without its bias, which all views have alike."""
    total = isa.splat(0.0)
    for n in range(0, weight.extent(0), isa.lanes):
        total = isa.fma(isa.relu(view[isa.at(n)] + own[isa.at(n)]), weight[isa.at(n)], total)
    return isa.total(total)


def run(
    function: Compiled, x: Tensor, values: Tensor, ray_diff: Tensor, mask: Tensor, panels: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
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
