"""The plane sweep on CPUs, ray by ray.

Points are looked up as in `shiftadd3d.kernels.cpu.gnt.gather`, but the values of the views never leave the kernel. It
keeps the mean and the deviation over the views for each point of one ray. A small network turns the deviations of a
point and of its two neighbours into the point's score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.blocks import blend_colors, softmax_of_vectors
from shiftadd3d.kernels.cpu.gnt.gather import Lookup, Places, Views
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.tile import ROW_PADDING, product
from shiftadd3d.kernels.pack.gnt.gather import stored
from shiftadd3d.kernels.pack.gnt.plane_sweep import panels, sizes
from shiftadd3d.kernels.reference.gnt.gather import VALID, Scene
from shiftadd3d.kernels.reference.gnt.plane_sweep import MASKED_LOGIT, plane_sweep_twin, random_sweep
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled, Kernel, Spec
from shiftadd3d.kernels.runtime.targets import CpuTarget, current
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index

# Enough that memory is allocated rarely; few enough that threads get equal shares.
_RAYS_A_TASK = 16


class _Columns:
    """The layout of a view's values of a point: channels, zeros up to a multiple of four, colour, one more float.

    Attributes:
        pitch: floats from a point's values to the next point's.
        color: where the colour begins.
        groups: vectors that cover all values, and where they begin. The vector with the colour comes first.
        is_one_vector: whether all values fit into one vector, with room to spare.
    """

    def __init__(self, target: CpuTarget, channels: int) -> None:
        self.channels, self.color = channels, -(-channels // 4) * 4
        self.pitch = self.color + 4
        self.groups, start = [(Isa(target, 4), self.color)], 0
        self.is_one_vector = channels in (4, 8) and self.pitch < target.lanes
        while start < self.color:
            size = next(size for size in (16, 8, 4) if size <= min(target.lanes, self.color - start))
            self.groups.append((Isa(target, size), start))
            start += size
        if self.is_one_vector:
            self.pitch = target.lanes


def _build(target: CpuTarget, *, channels: int, hidden: int, with_valid: bool) -> T.PrimFunc:
    with T.function("plane_sweep") as function:
        R, P = T.sizes(2)
        points, origins = T.argument("points", (R * P, 3)), T.argument("origins", (R, 3))
        scene = Views.argument()
        network = Network.argument(Isa(target), channels, hidden)
        rgb, weights = T.argument("rgb", (R, 3)), T.argument("weights", (R, P))
        seen = T.argument("seen", (R, P), "uint8")

        def places(r: Expr) -> Places:
            return Places(lambda point, axis: points[r * P + point, axis], lambda point, axis: origins[r, axis])

        emit(target, scene, network, places, rgb, weights, seen, with_valid=with_valid)
    return function.get()


class Network(NamedTuple):
    """The network that scores points: the arguments that hold `shiftadd3d.kernels.pack.gnt.plane_sweep.Panels`."""

    channels: int  # of the maps that are compared
    hidden: int
    w_hidden: Buffer
    b_hidden: Buffer
    w_score: Buffer
    b_score: Buffer
    scales: Buffer  # of angles and of agreement

    @classmethod
    def argument(cls, isa: Isa, channels: int, hidden: int) -> Network:
        """The next arguments of a function."""
        return cls(channels, hidden, *T.panels(sizes(isa.lanes, channels, hidden)))


def emit(
    target: CpuTarget,
    scene: Views,
    network: Network,
    places: Callable[[Expr], Places],
    rgb: Buffer,
    weights: Buffer,
    seen: Buffer,
    *,
    with_valid: bool,
) -> None:
    """Emit the sweep of all rays, after all arguments.

    Args:
        places: ``places(ray)`` gives the coordinates of the ray's points. Points are counted within the ray.
        rgb: [R, 3], for the colours.
        weights: [R, P], for the weights of points.
        seen: [R, P] uint8, set to 1 if any view sees the point, else to 0.
        with_valid: whether some pixels are not valid.
    """
    isa, columns = Isa(target), _Columns(target, network.channels)
    own, hidden = 3 + network.channels + 1, network.hidden  # floats of evidence on a point
    wide, V = isa.padded(hidden), scene.images.shape[0]
    w_hidden, b_hidden, w_score, b_score, scales = network[2:]
    R, P = weights.shape
    images, maps = scene.images.flat(), scene.maps.flat()
    with T.parallel((R + (_RAYS_A_TASK - 1)) // _RAYS_A_TASK) as task:
        # A row for each point, and for a neighbour beyond either end: the network reads three rows in sequence.
        evidence, means = T.alloc((P + 2 + ROW_PADDING) * own + 4), T.alloc(P * 4)
        activation, scores = T.alloc(P + ROW_PADDING, wide), T.alloc(P + ROW_PADDING, isa.lanes)
        logits = T.alloc(P + isa.lanes)
        views = _Agreement(isa, columns, Lookup(isa, scene, images, maps), V, scales[0], with_valid)
        with T.serial(T.min(T.int64(_RAYS_A_TASK), R - task * _RAYS_A_TASK)) as number:
            r = T.bind(task * _RAYS_A_TASK + number)
            with T.serial((P + isa.lanes - 1) // isa.lanes) as block:
                first = T.bind(block * isa.lanes)
                here = T.bind(T.min(T.int64(isa.lanes), P - first))
                views.load(first, here, places(r))
                with T.serial(here) as i:
                    row = T.bind((first + i + 1) * own)
                    views.agree(i, means, (first + i) * 4, evidence, row)
                    evidence[row + own - 1] = views.count[i] / T.cast(V, "float32")
                    seen[r, first + i] = T.cast(views.count[i] > T.float32(0.0), "uint8")
            with T.serial(own) as c:
                evidence[c] = evidence[own + c]
                evidence[(P + 1) * own + c] = evidence[P * own + c]
            of_points = [(3 * own, lambda p, k: evidence[p * own + k], w_hidden)]
            product(isa, P, wide, b_hidden, of_points, activation, isa.relu)
            product(isa, P, isa.lanes, b_score, [(hidden, activation, w_score)], scores)
            with T.serial(P) as p:
                row = T.bind((p + 1) * own)
                apart = evidence[row] + evidence[row + 1] + evidence[row + 2]
                score = scores[p, 0] - scales[1] * (apart / T.float32(3.0))
                is_lonely = evidence[row + own - 1] * T.cast(V, "float32") < T.float32(1.5)
                logits[p] = T.select(is_lonely, T.float32(MASKED_LOGIT), score)
            four = Isa(target, 4)
            blend_colors(isa, logits, P, lambda p: means[four.at(p * 4)], weights.part(r), rgb.part(r))


class _Agreement:
    """Emits the look-up of a vector of points in all views, and how well the views agree.

    Attributes:
        count: [lanes], the number of views that see each point.
    """

    def __init__(
        self, isa: Isa, columns: _Columns, lookup: Lookup, V: Index, angle_scale: Expr, with_valid: bool
    ) -> None:
        self._isa, self._columns, self._lookup, self._V = isa, columns, lookup, V
        self._angle_scale, self._with_valid, self._has_pixels = angle_scale, with_valid, lookup.has_pixels
        self._shown, self._share = T.alloc(V * isa.lanes * columns.pitch), T.alloc(V * isa.lanes)
        self.count = T.alloc(isa.lanes)
        with T.serial(V * isa.lanes * columns.pitch) as i:
            self._shown[i] = T.float32(0.0)

    def load(self, first: Expr, count: Expr, places: Places) -> None:
        """Look up `count` points, from `first` on, and compute the weights of the views."""
        isa, lookup, here = self._isa, self._lookup, self._isa.at(0)
        lookup.load(first, count, places)
        self.count[here] = isa.splat(0.0)

        def logit(v: Expr) -> Expr:
            lookup.look(v)
            with T.serial(count) as i:
                self._show(v, i)
                if self._has_pixels:
                    valid = self._shown[(v * isa.lanes + i) * self._columns.pitch + self._columns.color + 3]
                    lookup.seen[i] = T.select(valid > T.float32(VALID), lookup.seen[i], T.float32(0.0))
                elif self._with_valid:
                    with T.when(T.negate(lookup.is_valid(v, i))):
                        lookup.seen[i] = T.float32(0.0)
            self.count[here] = self.count[here] + lookup.seen[here]
            angle = isa.splat(self._angle_scale) * (lookup.difference[isa.at(3 * isa.lanes)] - isa.splat(1.0))
            return T.select(lookup.seen[here] > isa.splat(0.0), angle, isa.splat(MASKED_LOGIT))

        total = softmax_of_vectors(isa, self._share, self._V, logit, lambda v, share: None)
        with T.serial(self._V) as v:
            at = isa.at(v * isa.lanes)
            self._share[at] = self._share[at] / total

    def _show(self, view: Expr, lane: Expr) -> None:
        """Store the values of the current view for one point."""
        columns, lookup = self._columns, self._lookup
        row = (view * self._isa.lanes + lane) * columns.pitch
        if self._has_pixels:
            self._shown[T.ramp(row + columns.color, 4)] = lookup.pixel(view, lane)
        else:
            for c in range(3):
                self._shown[row + columns.color + c] = lookup.color(view, lane, c)
        for group, column in columns.groups[1:]:
            if column + group.lanes <= columns.channels:
                self._shown[group.at(row + column)] = lookup.features(view, lane, column, group)
            else:
                for c in range(column, columns.channels):
                    self._shown[row + c] = lookup.feature(view, lane, c)

    def agree(self, lane: Expr, means: Buffer, mean_at: Expr, evidence: Buffer, row: Expr) -> None:
        """Write the mean colour and the deviations of all values over the views for one point: `view_agreement`."""
        columns = self._columns
        if columns.is_one_vector:
            mean, apart = self._agreement(self._isa, lane, 0)
            color, end = range(columns.color, columns.color + 4), columns.channels
            means[T.ramp(mean_at, 4)] = T.shuffle([mean], color)
            evidence[T.ramp(row, 4)] = T.shuffle([apart], color)
            evidence[T.ramp(row + 3, end)] = T.shuffle([apart], range(end))
            return
        for group, column in columns.groups:
            mean, apart = self._agreement(group, lane, column)
            if column == columns.color:
                means[group.at(mean_at)] = mean
                evidence[group.at(row)] = apart
            else:
                evidence[group.at(row + 3 + column)] = apart

    def _agreement(self, group: Isa, lane: Expr, column: int) -> tuple[Expr, Expr]:
        """Mean and deviation over the views of a vector of values, from a column on."""
        pitch, lanes = self._columns.pitch, self._isa.lanes
        total, apart = group.register(0.0), group.register(0.0)
        for sums in (total, apart):
            with T.serial(self._V) as v:
                value = self._shown[group.at((v * lanes + lane) * pitch + column)]
                value = group.absolute(value - total.value) if sums is apart else value
                sums.value = group.fma(group.splat(self._share[v * lanes + lane]), value, sums.value)
        return total.value, apart.value


def run(function: Compiled, scene: Scene, panels: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Call a compiled function; the outcome is that of `plane_sweep_twin`."""
    rays, samples = scene.points.shape[:2]
    rgb, weights = torch.empty(rays, 3), torch.empty(rays, samples)
    seen = torch.empty(rays, samples, dtype=torch.bool)
    function(*stored(scene), *panels, rgb, weights, seen.view(torch.uint8))
    return rgb, weights, seen


def _trial(function: Compiled, *, channels: int, hidden: int, with_valid: bool) -> None:
    scene, network = random_sweep(
        0, rays=5, samples=13, views=3, channels=channels, hidden=hidden, with_valid=with_valid
    )
    outcome = run(function, scene, panels(network, current().lanes))
    for out, expected in zip(outcome, plane_sweep_twin(scene, network), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


def _variants(target: CpuTarget) -> list[Spec]:
    return [{"channels": 8, "hidden": 16, "with_valid": with_valid} for with_valid in (False, True)]


KERNEL = Kernel("plane_sweep", _build, _trial, _variants)
