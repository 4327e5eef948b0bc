"""The functions that look up a GNT's samples in source views: the plane sweep, and the views' values and embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.cpu.blocks import copy_row
from shiftadd3d.kernels.cpu.forms.panels import AnyForm, error_bound, panel_arguments
from shiftadd3d.kernels.cpu.gnt import plane_sweep, view_embedding
from shiftadd3d.kernels.cpu.gnt.gather import Lookup, Places, Views
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.trials import Draw
from shiftadd3d.kernels.pack.gnt import plane_sweep as pack_plane_sweep
from shiftadd3d.kernels.pack.gnt import view_embedding as pack_view_embedding
from shiftadd3d.kernels.pack.gnt.gather import beside_validity, pixels_of
from shiftadd3d.kernels.pack.panel import filled, padded
from shiftadd3d.kernels.pack.shift import GRANULE, PanelForm, WholeWeights, shift_panel
from shiftadd3d.kernels.reference.gnt.gather import VALID, Scene, point_samples_twin
from shiftadd3d.kernels.reference.gnt.plane_sweep import plane_sweep_twin, random_sweep
from shiftadd3d.kernels.reference.gnt.view_embedding import random_views, view_embedding_twin
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled
from shiftadd3d.kernels.runtime.targets import CpuTarget, current
from shiftadd3d.kernels.runtime.tir import Buffer, Expr
from shiftadd3d.kernels.whole.parts import control_argument, held, rows_of
from shiftadd3d.kernels.whole.program import Dim, Program, Value, fixed

# Vectors of points of a task: enough to allocate buffers for, few enough that threads get equal shares.
_BLOCKS_A_TASK = 4


class Rays(NamedTuple):
    """Inputs of a program: rays, depths along them, and the views to look points up in.

    Attributes:
        origins, directions: [R, 3].
        depths: [R, S]; a point is ``origin + depth * direction``.
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
        """The next inputs of a program. All sizes but the maps' channels may change from call to call."""
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
        """The number of rays, and of samples of each ray."""
        rays, samples = self.depths.shape
        return rays, samples


def _rays_argument(R: Expr, S: Expr) -> tuple[Buffer, Buffer, Buffer]:
    """The next arguments: origins, directions, depths."""
    return T.argument("origins", (R, 3)), T.argument("directions", (R, 3)), T.argument("depths", (R, S))


# Plane sweep


class SweepSpec(NamedTuple):
    channels: int  # that are compared
    hidden: int


def _build_sweep(target: CpuTarget, spec: SweepSpec) -> T.PrimFunc:
    """The function ``(Rays, panels, control, rgb, weights, seen)``."""
    with T.function("sweep") as function:
        R, S, V = T.sizes(3)
        origins, directions, depths = _rays_argument(R, S)
        scene = Views.of_pixels(V)
        network = plane_sweep.Network.argument(Isa(target), *spec)
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


def _try_sweep(function: Compiled, spec: SweepSpec) -> None:
    scene, network = random_sweep(0, rays=5, samples=13, views=3, **spec._asdict(), with_valid=True)
    directions, depths, scene = _on_rays(scene)
    outcome = torch.empty(5, 3), torch.empty(5, 13), torch.empty(5, 13, dtype=torch.bool)
    *floats, seen = outcome
    packed = pack_plane_sweep.panels(network, current().lanes)
    function(*_tensors(scene, directions, depths), *packed, _control(), *floats, seen.view(torch.uint8))
    for out, expected in zip(outcome, plane_sweep_twin(scene, network), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


def _on_rays(scene: Scene) -> tuple[Tensor, Tensor, Scene]:
    """Directions and depths of rays, and the scene with its points moved there."""
    rays, samples = scene.points.shape[:2]
    directions = F.normalize(scene.points[:, 0], dim=-1) + torch.tensor([0.0, 0.0, 0.5])
    depths = torch.linspace(0.5, 4.0, samples).repeat(rays, 1) + 0.1 * scene.points[..., 0]
    points = scene.origins[:, None] + depths[..., None] * directions[:, None]
    return directions, depths, scene._replace(points=points)


def _tensors(scene: Scene, directions: Tensor, depths: Tensor) -> list[Tensor]:
    """The tensors of `Rays` for a scene."""
    pixels = pixels_of(scene.images, scene.valid)
    return [scene.origins, directions, depths, scene.projection, scene.centers, pixels, scene.maps]


def _control() -> Tensor:
    return torch.tensor([0, 2], dtype=torch.int32)


SWEEP = fixed("sweep", _build_sweep, _try_sweep)


def sweep(program: Program, rays: Rays, panels: pack_plane_sweep.Panels, hidden: int) -> tuple[Value, ...]:
    """The plane sweep: colours [R, 3], weights [R, S], and whether any view sees a point, [R, S] uint8."""
    asked = SweepSpec(pack_plane_sweep.channels_compared(panels), hidden)
    outcomes = [((rays.samples[0], 3), "float32"), (rays.samples, "float32"), (rays.samples, "uint8")]
    arguments = [*rays, *map(program.weight, panels)]
    return program.call_for(SWEEP, arguments, outcomes, asked)


# Values of views


class Shown(NamedTuple):
    """The values of the views at samples.

    Attributes:
        values: [R, S, V, 4 + C], colour, validity and features; or packed, [R, S, V, C / 2] int32, features only.
        ray_diff: [R, S, V, 4].
        mask: [R, S, V] uint8.
        pixels: [R, S, V, 4], colour and validity; only beside packed values.
    """

    values: Value
    ray_diff: Value
    mask: Value
    pixels: Value | None = None

    @property
    def tensors(self) -> list[Value]:
        """All tensors, without `pixels` if it is None."""
        return [value for value in self if value is not None]


class ViewsSpec(NamedTuple):
    """What is compiled in.

    Attributes:
        inputs: numbers of a view's value, with the validity.
        hidden, width: units of the embedding's layers.
        with_moments: whether queries begin with statistics of the views.
        form: of the embedding's products. With ``"bfloat16"``, values and embedding are packed, and pixels follow the
            mask.
    """

    inputs: int
    hidden: int
    width: int
    with_moments: bool
    form: AnyForm


def _build_views(target: CpuTarget, spec: ViewsSpec) -> T.PrimFunc:
    """The function ``(Rays, panels, control, values, ray_diff, mask, embedding, query)``."""
    isa, (inputs, hidden, width, with_moments, form) = Isa(target), spec
    tiles = form == "bfloat16"
    with T.function("views") as function:
        R, S, V = T.sizes(3)
        of_rays, scene = _rays_argument(R, S), Views.of_pixels(V)
        layers = view_embedding.Layers.argument(isa, inputs, hidden, width, with_moments=with_moments)
        sizes = view_embedding.shift_sizes(isa, inputs, hidden, width, form)
        shifts = [] if form == "float32" else panel_arguments(form, sizes)
        control = control_argument()
        shape, dtype, numbers = (R, S, V), "int32" if tiles else "float32", 2 if tiles else 1
        values = T.argument("values", (*shape, (inputs - 4) // 2 if tiles else inputs), dtype)
        ray_diff, mask = T.argument("ray_diff", (*shape, 4)), T.argument("mask", shape, "uint8")
        pixels = T.argument("pixels", (*shape, 4)) if tiles else None
        embedding = T.argument("embedding", (*shape, width // numbers), dtype)
        query = T.argument("query", (R, S, width))
        values, ray_diff, embedding, query = map(rows_of, (values, ray_diff, embedding, query))
        pixels, mask = None if pixels is None else rows_of(pixels), mask.flat()
        images, maps = scene.images.flat(), scene.maps.flat()
        places, points, span = _places(of_rays, S), held(R * S), isa.lanes * _BLOCKS_A_TASK
        with T.parallel((points + (span - 1)) // span) as task:
            lookup, rows = Lookup(isa, scene, images, maps), V * isa.lanes
            if tiles:
                block = view_embedding.EmbeddingInTiles(target, layers, rows, isa.lanes, shifts)
            else:
                block = view_embedding.Embedding(target, layers, rows, isa.lanes, form, shifts)
            seen = _Seen(isa, lookup, block.shown, block.seen, inputs, features_first=tiles)
            left = T.bind(T.min(T.int64(span), points - task * span))
            with T.serial((left + (isa.lanes - 1)) // isa.lanes) as number:
                first = T.bind(task * span + number * isa.lanes)
                count = T.bind(T.min(T.int64(isa.lanes), points - first))
                row = T.bind(first * V)
                lookup.load(first, count, places)
                with T.serial(V) as v:
                    lookup.look(v)
                    with T.serial(count) as i:
                        seen.note(v, i, i * V + v, row + i * V + v, ray_diff, mask, pixels)
                if isinstance(block, view_embedding.EmbeddingInTiles):
                    block.emit(count, V, values.below(row), embedding.below(row), query.below(first))
                else:
                    with T.serial(count * V) as i:
                        copy_row(isa, block.shown.part(i), values.part(row + i), inputs)
                    block.emit(count, V, embedding.below(row), query.below(first))
            block.finish(control)
    return function.get()


def _places(of_rays: tuple[Buffer, Buffer, Buffer], S: Expr) -> Places:
    """Coordinates of samples. Samples are counted through all rays."""
    origins, directions, depths = of_rays

    def place(point: Expr, axis: int) -> Expr:
        ray, sample = T.truncdiv(point, S), T.truncmod(point, S)
        return origins[ray, axis] + depths[ray, sample] * directions[ray, axis]

    return Places(place, lambda point, axis: origins[T.truncdiv(point, S), axis])


class _Seen:
    """Emits stores of a view's values of a point.

    Args:
        shown, seen: buffers of the embedding.
        features_first: whether features come before colour and validity in `shown`.
    """

    def __init__(
        self, isa: Isa, lookup: Lookup, shown: Buffer, seen: Buffer, inputs: int, *, features_first: bool
    ) -> None:
        self._isa, self._lookup, self._shown, self._seen = isa, lookup, shown, seen
        self._channels = inputs - 4
        self._color, self._features = (self._channels, 0) if features_first else (0, 4)

    def note(
        self, view: Expr, lane: Expr, at: Expr, row: Expr, ray_diff: Buffer, mask: Buffer, pixels: Buffer | None
    ) -> None:
        """Store the values of the view that the look-up has projected into last.

        Args:
            at: the row of `shown`.
            row: the row of the outcomes.
        """
        isa, lookup, shown, four = self._isa, self._lookup, self._shown.part(at), Isa(self._isa.target, 4)
        pixel = four.keep(lookup.pixel(view, lane))
        shown[four.at(self._color)] = pixel
        if pixels is not None:
            pixels[row, four.at(0)] = pixel
        for c in range(0, self._channels - isa.lanes + 1, isa.lanes):
            shown[isa.at(self._features + c)] = lookup.features(view, lane, c, isa)
        for c in range(self._channels // isa.lanes * isa.lanes, self._channels):
            shown[self._features + c] = lookup.feature(view, lane, c)
        seen = T.select(shown[self._color + 3] > T.float32(VALID), lookup.seen[lane], T.float32(0.0))
        self._seen[at] = seen
        mask[row] = T.cast(seen > T.float32(0.0), "uint8")
        for c in range(4):
            ray_diff[row, c] = lookup.difference[c * isa.lanes + lane]


def _try_views(function: Compiled, spec: ViewsSpec) -> None:
    inputs, hidden, width, with_moments, form = spec
    tiles = form == "bfloat16"
    scene, _ = random_sweep(0, rays=5, samples=7, views=3, channels=inputs - 7, hidden=4, with_valid=True)
    directions, depths, scene = _on_rays(scene)
    sizes = {"inputs": inputs - 1, "hidden": hidden, "width": width}
    _, _, weights, biases = random_views(0, points=1, views=1, **sizes, with_moments=with_moments)
    shifts: list[Tensor] = []
    if form != "float32":
        draw = Draw()
        layers = [draw.whole(inputs - 1, hidden), draw.whole(hidden, width)]
        weights[:2] = [layer.integers * layer.unit[:, None] for layer in layers]
        shifts = embedding_shifts(layers, form, current().lanes)
    shape, numbers, dtype = (5, 7, 3), 2 if tiles else 1, torch.int32 if tiles else torch.float32
    values = torch.empty(*shape, (inputs - 4) // 2 if tiles else inputs, dtype=dtype)
    ray_diff, mask, pixels = torch.empty(*shape, 4), torch.empty(shape, dtype=torch.bool), torch.empty(*shape, 4)
    embedding, query = torch.empty(*shape, width // numbers, dtype=dtype), torch.empty(5, 7, width)
    packed = embedding_panels(weights, biases, current().lanes, features_first=tiles)
    control, beside = _control(), [pixels] if tiles else []
    outcome = values, ray_diff, mask.view(torch.uint8), *beside, embedding, query
    function(*_tensors(scene, directions, depths), *packed, *shifts, control, *outcome)
    assert control[0] == 0, "it found an activation that it cannot express"
    error = 0.0 if form == "float32" else error_bound(form)
    if tiles:
        values, embedding = (x.view(torch.bfloat16).float() for x in (values, embedding))
        values = torch.cat([pixels, values], dim=-1)
    shown, expected = values[..., [0, 1, 2, *range(4, inputs)]], point_samples_twin(*scene)
    rounding = error * float(expected[0].abs().max()) if tiles else 0.0
    torch.testing.assert_close(shown, expected[0], rtol=1e-3, atol=1e-3 + rounding)
    for out, one in zip((ray_diff, mask), expected[1:], strict=True):
        torch.testing.assert_close(out, one, rtol=1e-3, atol=1e-3)
    shown = expected[0] if tiles else shown
    expected = view_embedding_twin(shown, mask, weights, biases)
    if error:  # of both layers, of what the second makes of the first one's, and of the outcome
        most = [shown.abs().max(), F.relu(F.linear(shown, weights[0], biases[0])).max()]
        sums = [weight.abs().sum(1).max() for weight in weights[:2]]
        error *= float((1.01 * most[0] * sums[0] + most[1]) * sums[1] + expected[0].abs().max())
    for out, one in zip((embedding, query), expected, strict=True):
        torch.testing.assert_close(out, one, rtol=1e-4, atol=1e-4 + error)


VIEWS = fixed("views", _build_views, _try_views)


def embedding_panels(
    weights: Sequence[Tensor], biases: Sequence[Tensor], lanes: int, *, features_first: bool = False
) -> pack_view_embedding.Panels:
    """`pack.gnt.view_embedding.panels` for values with the validity after the colour.

    Args:
        features_first: whether the colour comes after the features, as for `embedding_shifts` of ``"bfloat16"``.
    """
    inputs, where = weights[0].shape[1], _color_at(weights[0].shape[1], features_first=features_first)
    groups = ((where,), (), (where, inputs + where))
    spread: list[Tensor] = []
    for weight, colors in zip(weights, groups, strict=False):
        parts = weight.split([inputs] * len(colors) + [weight.shape[1] - inputs * len(colors)], dim=1)
        moved = [_in_order(part, where) for part in parts[: len(colors)]]
        spread.append(beside_validity(torch.cat([*moved, *parts[len(colors) :]], dim=1), colors))
    return pack_view_embedding.panels(spread, biases, lanes)


def _color_at(inputs: int, *, features_first: bool) -> int:
    return inputs - 3 if features_first else 0


def _in_order(weight: Tensor, color: int) -> Tensor:
    """A weight [outputs, inputs] of colour and features. If `color` is not 0, the colour's inputs move to the end."""
    return weight if color == 0 else torch.cat([weight[:, 3:], weight[:, :3]], dim=1)


def embedding_shifts(layers: Sequence[WholeWeights], form: PanelForm, lanes: int) -> list[Tensor]:
    """The panels of both layers in a form, of `view_embedding.shift_sizes`; an empty list if the sizes do not fit."""
    first, second = layers
    inputs = first.integers.shape[1]
    if any(size % GRANULE for size in (inputs - 3, *second.integers.shape)):
        return []
    color = _color_at(inputs, features_first=form == "bfloat16")
    integers = beside_validity(_in_order(first.integers, color), (color,))
    integers = filled(integers, padded(integers.shape[1], GRANULE if form == "bfloat16" else lanes))
    return [shift_panel(layer, form) for layer in (first._replace(integers=integers), second)]


def views(
    program: Program,
    rays: Rays,
    panels: pack_view_embedding.Panels,
    width: int,
    form: AnyForm = "float32",
    shifts: Sequence[Tensor] = (),
) -> tuple[Shown, Value, Value]:
    """The values of the views at samples, their embeddings [R, S, V, width], and the first queries [R, S, width].

    Args:
        panels: the outcome of `embedding_panels`; for ``"bfloat16"``, features come first.
        form: of the embedding's products. With ``"bfloat16"``, values and embeddings [R, S, V, width / 2] are packed.
        shifts: the outcome of `embedding_shifts` for any form but float32.
    """
    inputs, hidden = panels.first.shape[0], panels.second.shape[0]
    shape, samples = (*rays.samples, rays.centers.shape[0]), rays.samples
    outcomes: list[tuple[tuple[Dim, ...], str]] = [((*shape, 4), "float32"), (shape, "uint8")]
    if form == "bfloat16":
        outcomes = [((*shape, (inputs - 4) // 2), "int32"), *outcomes, ((*shape, 4), "float32")]
        outcomes += [((*shape, width // 2), "int32")]
    else:
        outcomes = [((*shape, inputs), "float32"), *outcomes, ((*shape, width), "float32")]
    outcomes.append(((*samples, width), "float32"))
    asked = ViewsSpec(inputs, hidden, width, bool(panels.moments.numel()), form)
    arguments = [*rays, *map(program.weight, (*panels, *shifts))]
    *shown, embedding, query = program.call_for(VIEWS, arguments, outcomes, asked)
    return Shown(*shown), embedding, query
