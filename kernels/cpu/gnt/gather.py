"""Looking up 3D points in source views on CPUs, all steps at once.

torch needs a pass over memory for each of some thirty steps, and gathers channel by channel from maps stored channel
after channel. Here a point is projected into all views while its numbers stay in registers, and a pixel's channels,
stored side by side, are read together. What comes out has the layout the next layer reads: ``[points, views, colour +
channels]``.
"""

# ruff: noqa: B023 (the loops of a TIR function are gone through once, while it is parsed)

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.vectors import Vectors
from shiftadd3d.kernels.pack.gnt.gather import as_bytes
from shiftadd3d.kernels.reference.gnt.gather import VALID, compare_with_twin
from shiftadd3d.kernels.runtime import memory
from shiftadd3d.kernels.runtime.kernel import Kernel
from shiftadd3d.kernels.runtime.targets import CpuTarget


class Lookup:
    """Where a vector of points lies in one view, as statements of a kernel: lanes are points.

    Emits into the function being parsed, at the place where it is made, the buffers it keeps its results in.

    Args:
        vec: the target's vectors.
        points: buffer [P, 3].
        origins: buffer [R, 3].
        projection: buffer [V, 3, 4].
        centers: buffer [V, 3].
        image_size, map_size: (height, width), expressions.
        map_pitch: floats from a pixel of the maps to the next.

    Attributes:
        seen: [lanes] float32, 1 where the view sees the point (but for pixels that are not valid), else 0.
        difference: [4 * lanes] float32, the ray difference, component by component.
    """

    def __init__(
        self,
        vec: Vectors,
        points: Any,
        origins: Any,
        projection: Any,
        centers: Any,
        image_size: tuple[Any, Any],
        map_size: tuple[Any, Any],
        map_pitch: Any,
    ) -> None:
        from tvm.script import tirx as T

        self._T, self._vec = T, vec
        self._points, self._origins, self._projection, self._centers = points, origins, projection, centers
        self._image_size, self._map_size, self._map_pitch = image_size, map_size, map_pitch
        lanes = vec.lanes
        self._place = T.alloc_buffer((9 * lanes,), "float32", align=64)  # point, origin, unit vector between the two
        self._taps = T.alloc_buffer((8 * lanes,), "int32", align=64)  # offsets of 4 pixels of the image, 4 of the map
        self._shares = T.alloc_buffer((8 * lanes,), "float32", align=64)  # and how much of each is mixed in
        self.seen = T.alloc_buffer((lanes,), "float32", align=64)
        self.difference = T.alloc_buffer((4 * lanes,), "float32", align=64)

    def load(self, first: Any, count: Any, samples: Any) -> None:
        """Take up the points from `first` on, `count` at most; `samples` of them share an origin."""
        T, vec, lanes = self._T, self._vec, self._vec.lanes
        with T.serial(lanes) as i:
            point = T.bind(first + T.min(T.cast(i, "int64"), count - 1))
            for axis in range(3):
                T.buffer_store(self._place, self._points[point, axis], [axis * lanes + i])
                T.buffer_store(self._place, self._origins[point // samples, axis], [(3 + axis) * lanes + i])
        to_target = [vec.keep(self._component(3 + axis) - self._component(axis)) for axis in range(3)]
        scale = vec.keep(vec.splat(1.0) / (self._norm(to_target) + vec.splat(1e-6)))
        for axis in range(3):
            T.buffer_store(self._place, to_target[axis] * scale, [vec.at((6 + axis) * lanes)])

    def look(self, view: Any) -> None:
        """Project the points into a view: fills `seen`, `difference` and what `interpolate` needs."""
        T, vec, lanes = self._T, self._vec, self._vec.lanes
        position = [self._component(axis) for axis in range(3)]

        def projected(row: int) -> Any:
            total = position[0] * vec.splat(self._projection[view, row, 0])
            for axis in (1, 2):
                total = vec.multiply_add(position[axis], vec.splat(self._projection[view, row, axis]), total)
            return vec.keep(total + vec.splat(self._projection[view, row, 3]))

        depth = projected(2)
        ahead = vec.keep(vec.at_least(depth, vec.splat(1e-8)))
        pixel = [
            vec.keep(vec.at_most(vec.at_least(projected(row) / ahead, vec.splat(-1e6)), vec.splat(1e6)))
            for row in (0, 1)
        ]
        last = [T.bind(T.cast(self._image_size[1 - axis] - 1, "float32")) for axis in (0, 1)]  # of x, of y
        inside = vec.select(depth > vec.splat(0.0), vec.splat(1.0), vec.splat(0.0))
        for axis in (0, 1):
            inside = vec.select(pixel[axis] >= vec.splat(0.0), inside, vec.splat(0.0))
            inside = vec.select(pixel[axis] <= vec.splat(last[axis]), inside, vec.splat(0.0))
        T.buffer_store(self.seen, inside, [vec.at(0)])
        self._place_taps(0, pixel, self._image_size, 3)
        map_scale = [T.cast(self._map_size[1 - axis] - 1, "float32") / last[axis] for axis in (0, 1)]
        on_map = [vec.keep(pixel[axis] * vec.splat(map_scale[axis])) for axis in (0, 1)]
        self._place_taps(4, on_map, self._map_size, self._map_pitch)

        to_source = [vec.keep(vec.splat(self._centers[view, axis]) - position[axis]) for axis in range(3)]
        scale = vec.keep(vec.splat(1.0) / (self._norm(to_source) + vec.splat(1e-6)))
        to_source = [vec.keep(x * scale) for x in to_source]
        to_target = [self._component(6 + axis) for axis in range(3)]
        apart = [vec.keep(a - b) for a, b in zip(to_target, to_source, strict=True)]
        scale = vec.keep(vec.splat(1.0) / vec.at_least(self._norm(apart), vec.splat(1e-6)))
        cosine = to_target[0] * to_source[0]
        for axis in (1, 2):
            cosine = vec.multiply_add(to_target[axis], to_source[axis], cosine)
        for i, x in enumerate([*(a * scale for a in apart), cosine]):
            T.buffer_store(self.difference, x, [vec.at(i * lanes)])

    def image_value(self, lane: Any, read: Callable[[Any], Any]) -> Any:
        """One channel of the image at a point: `read(offset)` gives it for a pixel [H, W, 3]."""
        return self._mixed(lane, 0, read)

    def map_value(self, lane: Any, read: Callable[[Any], Any]) -> Any:
        """One channel of the map at a point."""
        return self._mixed(lane, 4, read)

    def map_values(self, lane: Any, read: Callable[[Any], Any], vec: Vectors) -> Any:
        """A vector of the map's channels at a point: `read(offset)` gives it for a pixel [h, w, map_pitch]."""
        total = vec.splat(0.0)
        for share, offset in self._around(lane, 4):
            total = vec.multiply_add(vec.splat(share), read(offset), total)
        return total

    def _mixed(self, lane: Any, first: int, read: Callable[[Any], Any]) -> Any:
        (share, offset), *others = self._around(lane, first)
        total = share * read(offset)
        for share, offset in others:
            total = total + share * read(offset)
        return total

    def _around(self, lane: Any, first: int) -> list[tuple[Any, Any]]:
        places = [tap * self._vec.lanes + lane for tap in range(first, first + 4)]
        return [(self._shares[place], self._T.cast(self._taps[place], "int64")) for place in places]

    def _place_taps(self, first: int, pixel: list[Any], size: tuple[Any, Any], pitch: Any) -> None:
        """Offsets and shares of the four pixels around a place; beyond the border nothing is mixed in."""
        T, vec, lanes = self._T, self._vec, self._vec.lanes
        zero = vec.splat(0.0)
        near, far, share_near, share_far = [], [], [], []
        for axis, x in enumerate(pixel):
            last = vec.keep(vec.splat(T.cast(size[1 - axis] - 1, "float32")))
            low = vec.keep(vec.floor(x))
            high = vec.keep(low + vec.splat(1.0))
            fraction = vec.keep(x - low)

            def share(amount: Any, at: Any, last: Any = last) -> Any:
                # Written so that NaN, which is not beyond any border, stays.
                return vec.keep(vec.select(at < zero, zero, vec.select(at > last, zero, amount)))

            def index(at: Any, last: Any = last) -> Any:
                # Not by comparing: of NaN and a number these give the number, so that every address can be read from.
                return vec.keep(vec.to_integer(vec.smaller(vec.larger(at, zero), last)), integer=True)

            near.append(index(low))
            far.append(index(high))
            share_near.append(share(vec.splat(1.0) - fraction, low))
            share_far.append(share(fraction, high))
        width = vec.splat_integer(T.cast(size[1], "int32"))
        pitch = vec.splat_integer(pitch if isinstance(pitch, int) else T.cast(pitch, "int32"))
        for tap, (y, x, share_y, share_x) in enumerate(
            (y, x, share_y, share_x)
            for y, share_y in ((near[1], share_near[1]), (far[1], share_far[1]))
            for x, share_x in ((near[0], share_near[0]), (far[0], share_far[0]))
        ):
            T.buffer_store(self._taps, (y * width + x) * pitch, [vec.at((first + tap) * lanes)])
            T.buffer_store(self._shares, share_y * share_x, [vec.at((first + tap) * lanes)])

    def _component(self, i: int) -> Any:
        return self._place[self._vec.at(i * self._vec.lanes)]

    def _norm(self, x: list[Any]) -> Any:
        total = x[0] * x[0]
        for component in x[1:]:
            total = self._vec.multiply_add(component, component, total)
        return self._vec.square_root(total)


def _build(target: CpuTarget, *, with_valid: bool) -> Any:
    from tvm.script import tirx as T

    vec = Vectors(target)
    lanes, at = vec.lanes, vec.at

    @T.prim_func(s_tir=True)
    def point_samples(
        points_handle: T.handle,
        origins_handle: T.handle,
        projection_handle: T.handle,
        centers_handle: T.handle,
        images_handle: T.handle,
        maps_handle: T.handle,
        valid_handle: T.handle,
        values_handle: T.handle,
        ray_diff_handle: T.handle,
        mask_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        P = T.int64()
        R = T.int64()
        V = T.int64()
        H = T.int64()
        W = T.int64()
        h = T.int64()
        w = T.int64()
        C = T.int64()
        valid_size = T.int64()
        points = T.match_buffer(points_handle, (P, 3), "float32", align=4)
        origins = T.match_buffer(origins_handle, (R, 3), "float32", align=4)
        projection = T.match_buffer(projection_handle, (V, 3, 4), "float32", align=4)
        centers = T.match_buffer(centers_handle, (V, 3), "float32", align=4)
        images = T.match_buffer(images_handle, (V, H, W, 3), "float32", align=4)
        maps = T.match_buffer(maps_handle, (V, h, w, C), "float32", align=4)
        valid = T.match_buffer(valid_handle, (valid_size,), "uint8", align=1)
        values = T.match_buffer(values_handle, (P * V, C + 3), "float32", align=4)
        ray_diff = T.match_buffer(ray_diff_handle, (P * V, 4), "float32", align=4)
        mask = T.match_buffer(mask_handle, (P * V,), "uint8", align=1)
        images_flat = T.decl_buffer((V * H * W * 3,), "float32", data=images.data)
        maps_flat = T.decl_buffer((V * h * w * C,), "float32", data=maps.data)
        for block in T.parallel((P + lanes - 1) // lanes):
            first: T.let[T.int64] = block * lanes
            count: T.let[T.int64] = T.min(T.int64(lanes), P - first)
            lookup = T.meta_var(Lookup(vec, points, origins, projection, centers, (H, W), (h, w), C))
            lookup.load(first, count, P // R)
            for v in T.serial(V):
                lookup.look(v)
                for i in T.serial(count):
                    row: T.let[T.int64] = (first + i) * V + v
                    for c in T.unroll(3):
                        values[row, c] = lookup.image_value(i, lambda offset: images_flat[v * (H * W * 3) + offset + c])
                    for n in T.serial(C // lanes):
                        values[row, at(3 + n * lanes)] = lookup.map_values(
                            i, lambda offset: maps_flat[at(v * (h * w * C) + offset + n * lanes)], vec
                        )
                    for c in T.serial(C % lanes):
                        values[row, 3 + C // lanes * lanes + c] = lookup.map_value(
                            i, lambda offset: maps_flat[v * (h * w * C) + offset + C // lanes * lanes + c]
                        )
                    for c in T.unroll(4):
                        ray_diff[row, c] = lookup.difference[c * lanes + i]
                    if with_valid:
                        mask[row] = T.cast(
                            T.And(
                                lookup.seen[i] > T.float32(0.0),
                                lookup.image_value(
                                    i, lambda offset: T.cast(valid[v * (H * W) + offset // 3], "float32")
                                )
                                > T.float32(VALID),
                            ),
                            "uint8",
                        )
                    else:
                        mask[row] = T.cast(lookup.seen[i] > T.float32(0.0), "uint8")

    return point_samples


def run(
    function: Any,
    points: Tensor,
    origins: Tensor,
    projection: Tensor,
    centers: Tensor,
    images: Tensor,
    maps: Tensor,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rays, samples, views = points.shape[0], points.shape[1], images.shape[0]
    values = memory.empty(rays, samples, views, 3 + maps.shape[-1], dtype=torch.float32)
    ray_diff = memory.empty(rays, samples, views, 4, dtype=torch.float32)
    mask = torch.empty(rays, samples, views, dtype=torch.bool)
    function(
        points.reshape(-1, 3).contiguous(),
        *(tensor.contiguous() for tensor in (origins, projection, centers, images, maps)),
        as_bytes(valid),
        values.view(-1, values.shape[-1]),
        ray_diff.view(-1, 4),
        mask.view(-1).view(torch.uint8),
    )
    return values, ray_diff, mask


def _trial(function: Any, *, with_valid: bool) -> None:
    compare_with_twin(partial(run, function), torch.device("cpu"), with_valid)


KERNEL = Kernel("point_samples", _build, _trial, lambda target: [{"with_valid": False}, {"with_valid": True}])
