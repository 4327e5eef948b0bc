"""Looking up 3D points in source views on CPUs, all steps in one pass.

torch needs a pass over memory for each of about thirty steps. It gathers channel by channel from maps that are stored
channel after channel. Here a point is projected into all views while its numbers are in registers. The channels of a
pixel are stored side by side and read together. The result has the layout that the next layer reads: ``[points, views,
colour + channels]``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.blocks import Bilinear
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.pack.gnt.gather import stored
from shiftadd3d.kernels.reference.gnt.gather import VALID, Scene, compare_with_twin
from shiftadd3d.kernels.runtime import memory
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled, Kernel
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index


class Views(NamedTuple):
    """The source views, as arguments of a function.

    Attributes:
        projection: [V, 3, 4].
        centers: [V, 3].
        images: [V, H, W, 3]; or [V, H, W, 4], with a last channel that is 1 for a valid pixel, else 0.
        maps: [V, h, w, C].
        valid: [V * H * W] uint8, or empty. Not used if images have four channels.
    """

    projection: Buffer
    centers: Buffer
    images: Buffer
    maps: Buffer
    valid: Buffer

    @classmethod
    def argument(cls) -> Views:
        """The next arguments."""
        V, H, W, h, w, C, valid = T.sizes(7)
        return cls(
            T.argument("projection", (V, 3, 4)),
            T.argument("centers", (V, 3)),
            T.argument("images", (V, H, W, 3)),
            T.argument("maps", (V, h, w, C)),
            T.argument("valid", (valid,), "uint8"),
        )

    @classmethod
    def of_pixels(cls, V: Expr) -> Views:
        """The next arguments, of V views with images of four channels."""
        H, W, h, w, C = T.sizes(5)
        projection, centers = T.argument("projection", (V, 3, 4)), T.argument("centers", (V, 3))
        pixels, maps = T.argument("pixels", (V, H, W, 4)), T.argument("maps", (V, h, w, C))
        return cls(projection, centers, pixels, maps, pixels)


class Places(NamedTuple):
    """Coordinates of points, as functions ``(point, axis)``.

    Attributes:
        point: coordinates of the point.
        origin: coordinates of the origin of its ray.
    """

    point: Callable[[Expr, int], Expr]
    origin: Callable[[Expr, int], Expr]


class Lookup:
    """Emits the look-up of a vector of points in one view after another. Lanes are points.

    The constructor emits the buffers for the results.

    Args:
        isa: the vectors of the target.
        views: the source views.
        images, maps: those of `views`, flat.

    Attributes:
        seen: [lanes] float32, 1 if the view sees the point, else 0. It does not know of pixels that are not valid.
        difference: [4 * lanes] float32, the ray difference, component by component.
        has_pixels: whether images have four channels, so that `pixel` can read them.
    """

    def __init__(self, isa: Isa, views: Views, images: Buffer, maps: Buffer) -> None:
        self._isa, self._views, self._images, self._maps = isa, views, images, maps
        _, self._height, self._width, _ = views.images.shape
        self._pitch, self._four = views.images.extent(3), Isa(isa.target, 4)
        self.has_pixels = self._pitch == 4
        _, self._map_height, self._map_width, self._channels = views.maps.shape
        self._place = T.alloc(9 * isa.lanes)  # point, origin, unit vector between the two
        self._on_image, self._on_map = Bilinear(isa), Bilinear(isa)
        self.seen, self.difference = T.alloc(isa.lanes), T.alloc(4 * isa.lanes)

    def load(self, first: Expr, count: Expr, places: Places) -> None:
        """Read the coordinates of `count` points from `first` on; at most as many as there are lanes."""
        isa, lanes = self._isa, self._isa.lanes
        with T.serial(lanes) as i:
            point = T.bind(first + T.min(T.cast(i, "int64"), count - 1))
            for axis in range(3):
                self._place[axis * lanes + i] = places.point(point, axis)
                self._place[(3 + axis) * lanes + i] = places.origin(point, axis)
        to_target = self._unit([self._component(3 + axis) - self._component(axis) for axis in range(3)])
        for axis in range(3):
            self._place[isa.at((6 + axis) * lanes)] = to_target[axis]

    def look(self, view: Expr) -> None:
        """Project the points into a view. Fills `seen`, `difference`, and the weights for `color`, `feature` etc."""
        isa = self._isa
        position = [self._component(axis) for axis in range(3)]
        across, down, depth = (self._projected(view, row, position) for row in range(3))
        ahead = isa.keep(isa.at_least(depth, isa.splat(1e-8)))
        lowest, highest = isa.splat(-1e6), isa.splat(1e6)
        pixel = [isa.keep(isa.at_most(isa.at_least(x / ahead, lowest), highest)) for x in (across, down)]
        last = [T.bind(T.cast(size - 1, "float32")) for size in (self._width, self._height)]
        zero, one = isa.splat(0.0), isa.splat(1.0)
        inside = T.select(depth > zero, one, zero)
        for x, end in zip(pixel, last, strict=True):
            inside = T.select(x >= zero, inside, zero)
            inside = T.select(x <= isa.splat(end), inside, zero)
        self.seen[isa.at(0)] = inside
        self._on_image.place(pixel, (self._height, self._width), self._pitch)
        sizes = zip(pixel, (self._map_width, self._map_height), last, strict=True)
        on_map = [isa.keep(x * isa.splat(T.cast(size - 1, "float32") / end)) for x, size, end in sizes]
        self._on_map.place(on_map, (self._map_height, self._map_width), self._channels)
        self._compare_rays(view, position)

    def _projected(self, view: Expr, row: int, position: list[Expr]) -> Expr:
        isa, projection = self._isa, self._views.projection.part(view, row)
        total = position[0] * isa.splat(projection[0])
        for axis in (1, 2):
            total = isa.fma(position[axis], isa.splat(projection[axis]), total)
        return isa.keep(total + isa.splat(projection[3]))

    def _compare_rays(self, view: Expr, position: list[Expr]) -> None:
        """Write the ray difference: the unit vector of the difference of both directions, and their cosine."""
        isa = self._isa
        to_source = [isa.splat(self._views.centers[view, axis]) - position[axis] for axis in range(3)]
        to_source = [isa.keep(x) for x in self._unit(to_source)]
        to_target = [self._component(6 + axis) for axis in range(3)]
        apart = [isa.keep(a - b) for a, b in zip(to_target, to_source, strict=True)]
        scale = isa.keep(isa.splat(1.0) / isa.at_least(self._norm(apart), isa.splat(1e-6)))
        cosine = to_target[0] * to_source[0]
        for axis in (1, 2):
            cosine = isa.fma(to_target[axis], to_source[axis], cosine)
        for i, x in enumerate([*(a * scale for a in apart), cosine]):
            self.difference[isa.at(i * isa.lanes)] = x

    def color(self, view: Expr, lane: Expr, channel: Index) -> Expr:
        """One channel of the image at a point."""
        return self._on_image.value(lane, lambda offset: self._images[self._image(view) + (offset + channel)])

    def pixel(self, view: Expr, lane: Expr) -> Expr:
        """All channels of an image of four at a point."""
        four = self._four
        return self._on_image.vector(lane, lambda offset: self._images[four.at(self._image(view) + offset)], four)

    def _image(self, view: Expr) -> Expr:
        return view * (self._height * self._width * self._pitch)

    def is_valid(self, view: Expr, lane: Expr) -> Expr:
        """Whether all pixels that are mixed into the value are valid."""
        pixels, valid = view * (self._height * self._width), self._views.valid
        share = self._on_image.value(lane, lambda offset: T.cast(valid[pixels + offset // 3], "float32"))
        return share > T.float32(VALID)

    def feature(self, view: Expr, lane: Expr, channel: Index) -> Expr:
        """One channel of the map at a point."""
        return self._on_map.value(lane, lambda offset: self._maps[self._map(view) + (offset + channel)])

    def features(self, view: Expr, lane: Expr, channel: Index, isa: Isa) -> Expr:
        """A vector of the map's channels at a point, with the lanes of `isa`."""
        return self._on_map.vector(lane, lambda offset: self._maps[isa.at(self._map(view) + (offset + channel))], isa)

    def _map(self, view: Expr) -> Expr:
        return view * (self._map_height * self._map_width * self._channels)

    def _component(self, i: int) -> Expr:
        return self._place[self._isa.at(i * self._isa.lanes)]

    def _unit(self, x: list[Expr]) -> list[Expr]:
        isa = self._isa
        x = [isa.keep(component) for component in x]
        scale = isa.keep(isa.splat(1.0) / (self._norm(x) + isa.splat(1e-6)))
        return [component * scale for component in x]

    def _norm(self, x: list[Expr]) -> Expr:
        total = x[0] * x[0]
        for component in x[1:]:
            total = self._isa.fma(component, component, total)
        return self._isa.square_root(total)


def _build(target: CpuTarget, *, with_valid: bool) -> T.PrimFunc:
    isa = Isa(target)
    lanes = isa.lanes

    with T.function("point_samples") as function:
        P, R = T.sizes(2)
        points, origins = T.argument("points", (P, 3)), T.argument("origins", (R, 3))
        scene = Views.argument()
        V, C = scene.images.shape[0], scene.maps.shape[3]
        values, ray_diff = T.argument("values", (P * V, C + 3)), T.argument("ray_diff", (P * V, 4))
        mask = T.argument("mask", (P * V,), "uint8")
        images, maps = scene.images.flat(), scene.maps.flat()
        samples = T.bind(P // R)
        places = Places(lambda point, axis: points[point, axis], lambda point, axis: origins[point // samples, axis])
        with T.parallel((P + lanes - 1) // lanes) as block:
            first = T.bind(block * lanes)
            count = T.bind(T.min(T.int64(lanes), P - first))
            lookup = Lookup(isa, scene, images, maps)
            lookup.load(first, count, places)
            with T.serial(V) as v:
                lookup.look(v)
                with T.serial(count) as i:
                    row = T.bind((first + i) * V + v)
                    shown = values.part(row)
                    for c in range(3):
                        shown[c] = lookup.color(v, i, c)
                    with T.serial(C // lanes) as n:
                        shown[isa.at(3 + n * lanes)] = lookup.features(v, i, n * lanes, isa)
                    with T.serial(C % lanes) as c:
                        shown[3 + C // lanes * lanes + c] = lookup.feature(v, i, C // lanes * lanes + c)
                    for c in range(4):
                        ray_diff[row, c] = lookup.difference[c * lanes + i]
                    seen = lookup.seen[i] > T.float32(0.0)
                    mask[row] = T.cast(T.both(seen, lookup.is_valid(v, i)) if with_valid else seen, "uint8")
    return function.get()


def run(function: Compiled, scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
    """Call a compiled function; the outcome is that of `point_samples_twin`."""
    (rays, samples), views, channels = scene.points.shape[:2], scene.images.shape[0], scene.maps.shape[-1]
    values = memory.empty(rays, samples, views, 3 + channels, dtype=torch.float32)
    ray_diff = memory.empty(rays, samples, views, 4, dtype=torch.float32)
    mask = torch.empty(rays, samples, views, dtype=torch.bool)
    rows = values.view(-1, 3 + channels), ray_diff.view(-1, 4), mask.view(-1).view(torch.uint8)
    function(*stored(scene), *rows)
    return values, ray_diff, mask


def _trial(function: Compiled, *, with_valid: bool) -> None:
    compare_with_twin(partial(run, function), torch.device("cpu"), with_valid)


KERNEL = Kernel("point_samples", _build, _trial, lambda target: [{"with_valid": False}, {"with_valid": True}])
