"""Where a GNT's rays meet the source views: the plane sweep, and what views show with its embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.cpu.blocks import copy_row
from shiftadd3d.kernels.cpu.forms.panels import error_bound, panel_arguments
from shiftadd3d.kernels.cpu.gnt import plane_sweep, view_embedding
from shiftadd3d.kernels.cpu.gnt.gather import Lookup, Places, Views
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.trials import Draw
from shiftadd3d.kernels.pack.gnt import plane_sweep as pack_plane_sweep
from shiftadd3d.kernels.pack.gnt import view_embedding as pack_view_embedding
from shiftadd3d.kernels.pack.gnt.gather import beside_validity, pixels_of
from shiftadd3d.kernels.pack.shift import GRANULE, WholeWeights, shift_panel
from shiftadd3d.kernels.reference.gnt.gather import VALID, Scene, point_samples_twin
from shiftadd3d.kernels.reference.gnt.plane_sweep import plane_sweep_twin, random_sweep
from shiftadd3d.kernels.reference.gnt.view_embedding import random_views, view_embedding_twin
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled
from shiftadd3d.kernels.runtime.targets import CpuTarget, current
from shiftadd3d.kernels.runtime.tir import Buffer, Expr
from shiftadd3d.kernels.whole.parts import control_argument, held, rows_of
from shiftadd3d.kernels.whole.program import Dim, Function, Program, Value

# Vectors of points that a task looks up: enough to allocate buffers for, few enough to share out evenly.
_BLOCKS_A_TASK = 4


class Rays(NamedTuple):
    """Inputs of a program: rays, depths along them, and the views to look points up in.

    Attributes:
        origins, directions: [R, 3].
        depths: [R, S], in the directions' lengths.
        projection: [V, 3, 4].
        centers: [V, 3].
        pixels: [V, H, W, 4], see `pixels_of`.
        maps: [V, h, w, C].
    """

    origins: Value
    directions: Value
    depths: Value
    projection: Value
    centers: Value
    pixels: Value
    maps: Value

    @classmethod
    def inputs(cls, program: Program, channels: int) -> Rays:
        """The next inputs of a program, of any sizes but for the channels of the maps."""
        return cls(
            program.input("rays", 3),
            program.input("rays", 3),
            program.input("rays", "samples"),
            program.input("views", 3, 4),
            program.input("views", 3),
            program.input("views", "height", "width", 4),
            program.input("views", "map height", "map width", channels),
        )

    @property
    def samples(self) -> tuple[Dim, Dim]:
        """Rays, and samples of each."""
        rays, samples = self.depths.shape
        return rays, samples


def _rays_argument(R: Expr, S: Expr) -> tuple[Buffer, Buffer, Buffer]:
    """The next arguments: origins, directions, depths."""
    return T.argument("origins", (R, 3)), T.argument("directions", (R, 3)), T.argument("depths", (R, S))


# Plane sweep


def _build_sweep(target: CpuTarget, channels: int, hidden: int) -> T.PrimFunc:
    """The function ``(Rays, panels, control, rgb, weights, seen)``."""
    with T.function("sweep") as function:
        R, S, V = T.sizes(3)
        origins, directions, depths = _rays_argument(R, S)
        scene = Views.of_pixels(V)
        network = plane_sweep.Network.argument(Isa(target), channels, hidden)
        control_argument()
        rgb, weights = T.argument("rgb", (R, 3)), T.argument("weights", (R, S))
        seen = T.argument("seen", (R, S), "uint8")

        def places(ray: Expr) -> Places:
            return Places(
                lambda point, axis: origins[ray, axis] + depths[ray, point] * directions[ray, axis],
                lambda point, axis: origins[ray, axis],
            )

        plane_sweep.emit(target, scene, network, places, rgb, weights, seen, with_valid=True)
    return function.get()


def _try_sweep(function: Compiled, channels: int, hidden: int) -> None:
    scene, network = random_sweep(0, rays=5, samples=13, views=3, channels=channels, hidden=hidden, with_valid=True)
    directions, depths, scene = _on_rays(scene)
    outcome = torch.empty(5, 3), torch.empty(5, 13), torch.empty(5, 13, dtype=torch.bool)
    *floats, seen = outcome
    packed = pack_plane_sweep.panels(network, current().lanes)
    function(*_tensors(scene, directions, depths), *packed, _control(), *floats, seen.view(torch.uint8))
    for out, expected in zip(outcome, plane_sweep_twin(scene, network), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


def _on_rays(scene: Scene) -> tuple[Tensor, Tensor, Scene]:
    """Directions and depths, and a scene of points there."""
    rays, samples = scene.points.shape[:2]
    directions = F.normalize(scene.points[:, 0], dim=-1) + torch.tensor([0.0, 0.0, 0.5])
    depths = torch.linspace(0.5, 4.0, samples).repeat(rays, 1) + 0.1 * scene.points[..., 0]
    points = scene.origins[:, None] + depths[..., None] * directions[:, None]
    return directions, depths, scene._replace(points=points)


def _tensors(scene: Scene, directions: Tensor, depths: Tensor) -> list[Tensor]:
    """`Rays` of a scene."""
    pixels = pixels_of(scene.images, scene.valid)
    return [scene.origins, directions, depths, scene.projection, scene.centers, pixels, scene.maps]


def _control() -> Tensor:
    return torch.tensor([0, 2], dtype=torch.int32)


SWEEP = Function("sweep", _build_sweep, _try_sweep)


def sweep(program: Program, rays: Rays, panels: pack_plane_sweep.Panels, hidden: int) -> tuple[Value, ...]:
    """Judge points of rays by how well views agree: rgb [R, 3], weights [R, S], and whether any sees them, uint8."""
    channels = pack_plane_sweep.channels_compared(panels)
    outcomes = [((rays.samples[0], 3), "float32"), (rays.samples, "float32"), (rays.samples, "uint8")]
    arguments = [*rays, *map(program.weight, panels)]
    return program.call_for(SWEEP, arguments, outcomes, channels=channels, hidden=hidden)


# What views show


class Shown(NamedTuple):
    """What views show of samples.

    Attributes:
        values: [R, S, V, 4 + C]: colour, validity and features.
        ray_diff: [R, S, V, 4].
        mask: [R, S, V] uint8.
    """

    values: Value
    ray_diff: Value
    mask: Value


def _build_views(
    target: CpuTarget, inputs: int, hidden: int, width: int, with_moments: bool, tiles: bool
) -> T.PrimFunc:
    """The function ``(Rays, panels, control, values, ray_diff, mask, embedding, query)``."""
    isa = Isa(target)
    with T.function("views") as function:
        R, S, V = T.sizes(3)
        origins, directions, depths = _rays_argument(R, S)
        scene = Views.of_pixels(V)
        layers = view_embedding.Layers.argument(isa, inputs, hidden, width, with_moments=with_moments)
        sizes = view_embedding.tile_sizes(inputs, hidden, width) if tiles else []
        shifts = panel_arguments("bfloat16", sizes)
        control = control_argument()
        values, ray_diff = T.argument("values", (R, S, V, inputs)), T.argument("ray_diff", (R, S, V, 4))
        mask = T.argument("mask", (R, S, V), "uint8")
        embedding, query = T.argument("embedding", (R, S, V, width)), T.argument("query", (R, S, width))
        values, ray_diff, embedding, query = map(rows_of, (values, ray_diff, embedding, query))
        mask, images, maps = mask.flat(), scene.images.flat(), scene.maps.flat()

        def place(point: Expr, axis: int) -> Expr:
            ray, sample = T.truncdiv(point, S), T.truncmod(point, S)
            return origins[ray, axis] + depths[ray, sample] * directions[ray, axis]

        places = Places(place, lambda point, axis: origins[T.truncdiv(point, S), axis])
        points = held(R * S)
        span = isa.lanes * _BLOCKS_A_TASK
        with T.parallel((points + (span - 1)) // span) as task:
            lookup = Lookup(isa, scene, images, maps)
            block = view_embedding.Embedding(isa, layers, V * isa.lanes, isa.lanes, shifts)
            left = T.bind(T.min(T.int64(span), points - task * span))
            with T.serial((left + (isa.lanes - 1)) // isa.lanes) as number:
                first = T.bind(task * span + number * isa.lanes)
                count = T.bind(T.min(T.int64(isa.lanes), points - first))
                lookup.load(first, count, places)
                with T.serial(V) as v:
                    lookup.look(v)
                    with T.serial(count) as i:
                        row = T.bind(i * V + v)
                        _show(isa, lookup, v, i, block.shown.part(row), inputs)
                        seen = T.select(block.shown[row, 3] > T.float32(VALID), lookup.seen[i], T.float32(0.0))
                        block.seen[row] = seen
                        mask[first * V + row] = T.cast(seen > T.float32(0.0), "uint8")
                        for c in range(4):
                            ray_diff[first * V + row, c] = lookup.difference[c * isa.lanes + i]
                with T.serial(count * V) as row:
                    copy_row(isa, block.shown.part(row), values.part(first * V + row), inputs)
                block.emit(count, V, embedding.below(first * V), query.below(first))
            block.finish(control)
    return function.get()


def _show(isa: Isa, lookup: Lookup, view: Expr, lane: Expr, row: Buffer, inputs: int) -> None:
    """Write what a view shows of a point."""
    channels = inputs - 4
    row[T.ramp(0, 4)] = lookup.pixel(view, lane)
    for c in range(0, channels - isa.lanes + 1, isa.lanes):
        row[isa.at(4 + c)] = lookup.features(view, lane, c, isa)
    for c in range(channels // isa.lanes * isa.lanes, channels):
        row[4 + c] = lookup.feature(view, lane, c)


def _try_views(function: Compiled, inputs: int, hidden: int, width: int, with_moments: bool, tiles: bool) -> None:
    scene, _ = random_sweep(0, rays=5, samples=7, views=3, channels=inputs - 7, hidden=4, with_valid=True)
    directions, depths, scene = _on_rays(scene)
    sizes = {"inputs": inputs - 1, "hidden": hidden, "width": width}
    _, _, weights, biases = random_views(0, points=1, views=1, **sizes, with_moments=with_moments)
    shifts: list[Tensor] = []
    if tiles:
        draw = Draw()
        layers = [draw.whole(inputs - 1, hidden), draw.whole(hidden, width)]
        weights[:2] = [layer.integers * layer.unit[:, None] for layer in layers]
        shifts = embedding_tiles(layers)
    shape = 5, 7, 3
    values, ray_diff = torch.empty(*shape, inputs), torch.empty(*shape, 4)
    mask = torch.empty(shape, dtype=torch.bool)
    embedding, query = torch.empty(*shape, width), torch.empty(5, 7, width)
    packed = embedding_panels(weights, biases, current().lanes)
    control, outcome = _control(), (values, ray_diff, mask.view(torch.uint8), embedding, query)
    function(*_tensors(scene, directions, depths), *packed, *shifts, control, *outcome)
    assert control[0] == 0, "it found an activation that it cannot express"
    shown = values[..., [0, 1, 2, *range(4, inputs)]]
    for out, expected in zip((shown, ray_diff, mask), point_samples_twin(*scene), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    expected = view_embedding_twin(shown, mask, weights, biases)
    error = 0.0
    if tiles:  # of both layers, and what the second makes of the first one's
        most = [shown.abs().max(), F.relu(F.linear(shown, weights[0], biases[0])).max()]
        sums = [weight.abs().sum(1).max() for weight in weights[:2]]
        error = error_bound("bfloat16") * float((1.01 * most[0] * sums[0] + most[1]) * sums[1])
    for out, one in zip((embedding, query), expected, strict=True):
        torch.testing.assert_close(out, one, rtol=1e-4, atol=1e-4 + error)


VIEWS = Function("views", _build_views, _try_views)


def embedding_panels(weights: Sequence[Tensor], biases: Sequence[Tensor], lanes: int) -> pack_view_embedding.Panels:
    """`pack.gnt.view_embedding.panels`, for values that have validity behind the colour."""
    inputs = weights[0].shape[1]
    spread = [beside_validity(weight, groups) for weight, groups in zip(weights, ((0,), (), (0, inputs)), strict=False)]
    return pack_view_embedding.panels(spread, biases, lanes)


def embedding_tiles(layers: Sequence[WholeWeights]) -> list[Tensor]:
    """Panels for matrix tiles, of both layers; none where their sizes do not fit."""
    first, second = layers
    integers = beside_validity(first.integers, (0,))
    if second.integers.shape[1] % GRANULE:
        return []
    integers = F.pad(integers, (0, -integers.shape[1] % GRANULE))
    return [shift_panel(layer, "bfloat16") for layer in (first._replace(integers=integers), second)]


def views(
    program: Program, rays: Rays, panels: pack_view_embedding.Panels, width: int, tiles: Sequence[Tensor] = ()
) -> tuple[Shown, Value, Value]:
    """What views show of samples, embedded [R, S, V, width], and the first queries [R, S, width].

    Args:
        tiles: of `embedding_tiles`; without, products are those of float32.
    """
    inputs, hidden = panels.first.shape[0], panels.second.shape[0]
    shape = (*rays.samples, rays.centers.shape[0])
    floats = [(shape, inputs), (shape, 4), (shape, width), (rays.samples, width)]
    outcomes: list[Any] = [((*leading, size), "float32") for leading, size in floats]
    outcomes.insert(2, (shape, "uint8"))
    spec = {"inputs": inputs, "hidden": hidden, "width": width, "with_moments": bool(panels.moments.numel())}
    arguments = [*rays, *map(program.weight, (*panels, *tiles))]
    *shown, embedding, query = program.call_for(VIEWS, arguments, outcomes, **spec, tiles=bool(tiles))
    return Shown(*shown), embedding, query
