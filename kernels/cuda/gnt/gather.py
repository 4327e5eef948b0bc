"""Looking up 3D points in source views on NVIDIA GPUs.

A thread of a block projects one point into one view, and leaves the four pixels around it in shared memory. All threads
then mix pixels, neighbours taking neighbouring channels, which lie side by side in maps and outcome.
"""

# TVMScript's annotations are calls:
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shiftadd3d.kernels.cuda.driver import CudaFunction, CudaKernel
from shiftadd3d.kernels.pack.gnt.gather import as_bytes
from shiftadd3d.kernels.reference.gnt.gather import VALID, compare_with_twin
from shiftadd3d.kernels.runtime.targets import CudaTarget

_THREADS = 128  # of a block, and (point, view) pairs


class _Lookup:
    """Where a point lies in one view, as statements of a kernel.

    Args:
        position: its three components, expressions.
        to_target: the vector from it to the target camera.
        projection: buffer [V, 3, 4].
        centers: buffer [V, 3].
        view: the number of the view.

    Attributes:
        depth: z depth.
        pixel: x and y.
    """

    def __init__(self, position: list[Any], to_target: list[Any], projection: Any, centers: Any, view: Any) -> None:
        import tvm.script

        T = self._T = tvm.script.tirx
        self._position, self._to_target, self._center = position, to_target, [centers[view, axis] for axis in range(3)]

        def projected(row: int) -> Any:
            products = [x * projection[view, row, axis] for axis, x in enumerate(position)]
            return T.bind(products[0] + products[1] + products[2] + projection[view, row, 3])

        self.depth = projected(2)
        ahead = T.bind(self._within(self.depth, 1e-8, None))
        self.pixel = [T.bind(self._within(projected(row) / ahead, -1e6, 1e6)) for row in (0, 1)]

    def is_inside(self, size: tuple[Any, Any]) -> Any:
        """Whether it is in front of the camera and inside a picture of (height, width)."""
        T, inside = self._T, self.depth > self._T.float32(0)
        for x, count in zip(self.pixel, reversed(size), strict=True):
            inside = T.And(inside, T.And(x >= T.float32(0), x <= T.cast(count - 1, "float32")))
        return inside

    def taps(self, size: tuple[Any, Any], map_size: tuple[Any, Any]) -> list[tuple[Any, Any]]:
        """Index and share of the four pixels around it on a map [h, w] that spans the same picture [H, W].

        Beyond the border nothing is mixed in.
        """
        T, zero = self._T, self._T.float32(0)
        along = []
        for x, count, of_map in zip(self.pixel, reversed(size), reversed(map_size), strict=True):
            last = T.bind(T.cast(of_map - 1, "float32"))
            x = x if count is of_map else T.bind(x * (last / T.cast(count - 1, "float32")))
            low = T.bind(T.floor(x))
            near_and_far = []
            for at, amount in ((low, T.float32(1) - (x - low)), (T.bind(low + T.float32(1)), x - low)):
                # Written so that NaN, which is not beyond any border, stays in the share, and is no address.
                share = T.bind(T.Select(T.Or(at < zero, at > last), zero, amount))
                index = T.Select(at > zero, T.Select(at < last, at, last), zero)
                near_and_far.append((T.bind(T.cast(index, "int32")), share))
            along.append(near_and_far)
        columns, rows = along
        return [(y * map_size[1] + x, share_y * share_x) for y, share_y in rows for x, share_x in columns]

    def difference(self) -> list[Any]:
        """The four components of the ray difference."""
        T = self._T

        def unit(x: list[Any]) -> list[Any]:
            scale = T.bind(T.float32(1) / (self._norm(x) + T.float32(1e-6)))
            return [T.bind(component * scale) for component in x]

        target = unit(self._to_target)
        source = unit([T.bind(center - x) for center, x in zip(self._center, self._position, strict=True)])
        apart = [T.bind(a - b) for a, b in zip(target, source, strict=True)]
        scale = T.bind(T.float32(1) / self._within(self._norm(apart), 1e-6, None))
        return [*(x * scale for x in apart), sum((a * b for a, b in zip(target, source, strict=True)), T.float32(0))]

    def _norm(self, x: list[Any]) -> Any:
        return self._T.bind(self._T.sqrt(x[0] * x[0] + x[1] * x[1] + x[2] * x[2]))

    def _within(self, x: Any, least: float, most: float | None) -> Any:
        """x between two numbers; NaN stays."""
        T = self._T
        x = T.bind(x)
        at_most = x if most is None else T.Select(x > T.float32(most), T.float32(most), x)
        return T.Select(x < T.float32(least), T.float32(least), at_most)


def build(target: CudaTarget, with_valid: bool, least_valid: float) -> Any:
    """The function of what `run` gives it. Blocks: (point, view) pairs along x.

    Args:
        with_valid: whether there are pixels that are not valid.
        least_valid: the share of valid pixels from which a mixture of four counts as valid.
    """
    from tvm.script import tirx as T

    def block(
        pairs: Any,
        number: Any,
        thread: Any,
        views: Any,
        size: tuple[Any, Any],
        map_size: tuple[Any, Any],
        channels: Any,
        scene: tuple[Any, ...],
        values: Any,
        ray_diff: Any,
        mask: Any,
    ) -> None:
        points, origins, projection, centers, images, maps, valid = scene
        indices = T.alloc_buffer((8, _THREADS), "int32", scope="shared")  # four pixels of the image, four of the map
        shares = T.alloc_buffer((8, _THREADS), "float32", scope="shared")
        first = T.bind(number * _THREADS)
        pair = T.bind(T.min(first + thread, pairs - 1))
        point, view = T.bind(T.truncdiv(pair, views)), T.bind(T.truncmod(pair, views))
        ray = T.bind(T.truncdiv(point, T.truncdiv(points.shape[0], origins.shape[0])))
        position = [T.bind(points[point, axis]) for axis in range(3)]
        to_target = [T.bind(origins[ray, axis] - x) for axis, x in enumerate(position)]
        lookup = _Lookup(position, to_target, projection, centers, view)
        seen = T.bind(lookup.is_inside(size))
        on_image = lookup.taps(size, size)
        for tap, (index, share) in enumerate([*on_image, *lookup.taps(size, map_size)]):
            rows, columns = size if tap < 4 else map_size
            T.buffer_store(indices, view * rows * columns + index, [tap, thread])
            T.buffer_store(shares, share, [tap, thread])
        if with_valid:
            pixel = view * size[0] * size[1]
            total = T.float32(0)
            for index, share in on_image:
                total = T.bind(total + share * T.cast(valid[pixel + index], "float32"))
            seen = T.bind(T.And(seen, total > T.float32(least_valid)))
        difference = [T.bind(x) for x in lookup.difference()]
        with T.If(first + thread < pairs), T.Then():
            T.buffer_store(mask, T.cast(seen, "uint8"), [first + thread])
            for component, x in enumerate(difference):
                T.buffer_store(ray_diff, x, [first + thread, component])

        def mixed(picture: Any, tap: int, own: Any, width: Any, channel: Any) -> Any:
            products = [shares[i, own] * picture[indices[i, own] * width + channel] for i in range(tap, tap + 4)]
            return products[0] + products[1] + products[2] + products[3]

        width = T.bind(channels + 3)
        count = T.bind(T.min(_THREADS, pairs - first) * width)
        with T.serial((count + (_THREADS - 1)) // _THREADS) as turn:
            at = T.bind(turn * _THREADS + thread)
            own, channel = T.bind(T.truncdiv(at, width)), T.bind(T.truncmod(at, width))
            with T.If(at < count), T.Then(), T.If(channel < 3):
                with T.Then():
                    T.buffer_store(values, mixed(images, 0, own, 3, channel), [first + own, channel])
                with T.Else():
                    T.buffer_store(values, mixed(maps, 4, own, channels, channel - 3), [first + own, channel])

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
        height: T.int32,
        width: T.int32,
        map_height: T.int32,
        map_width: T.int32,
        channels: T.int32,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        P = T.int32()
        R = T.int32()
        V = T.int32()
        image_numbers = T.int32()
        map_numbers = T.int32()
        valid_numbers = T.int32()
        points = T.match_buffer(points_handle, (P, 3), "float32")
        origins = T.match_buffer(origins_handle, (R, 3), "float32")
        projection = T.match_buffer(projection_handle, (V, 3, 4), "float32")
        centers = T.match_buffer(centers_handle, (V, 3), "float32")
        images = T.match_buffer(images_handle, (image_numbers,), "float32")
        maps = T.match_buffer(maps_handle, (map_numbers,), "float32")
        valid = T.match_buffer(valid_handle, (valid_numbers,), "uint8")
        values = T.match_buffer(values_handle, (P * V, channels + 3), "float32")
        ray_diff = T.match_buffer(ray_diff_handle, (P * V, 4), "float32")
        mask = T.match_buffer(mask_handle, (P * V,), "uint8")
        for number in T.thread_binding((P * V + (_THREADS - 1)) // _THREADS, "blockIdx.x"):
            for thread in T.thread_binding(_THREADS, "threadIdx.x"):
                block(
                    P * V,
                    number,
                    thread,
                    V,
                    (height, width),
                    (map_height, map_width),
                    channels,
                    (points, origins, projection, centers, images, maps, valid),
                    values,
                    ray_diff,
                    mask,
                )

    return point_samples


def run(
    function: Callable[..., None],
    points: Tensor,  # [R, S, 3]
    origins: Tensor,  # [R, 3]
    projection: Tensor,  # [V, 3, 4]
    centers: Tensor,  # [V, 3]
    images: Tensor,  # [V, H, W, 3]
    maps: Tensor,  # [V, h, w, C]
    valid: Tensor,  # [V * H * W] uint8, or none
) -> tuple[Tensor, Tensor, Tensor]:
    """Call a compiled function, on float32 tensors of which none is empty."""
    rays, samples, views = *points.shape[:2], len(images)
    values = points.new_empty(rays, samples, views, 3 + maps.shape[-1])
    ray_diff = points.new_empty(rays, samples, views, 4)
    mask = points.new_empty(rays, samples, views, dtype=torch.bool)
    function(
        -(-rays * samples * views // _THREADS),
        points=points.contiguous(),
        origins=origins.contiguous(),
        projection=projection.contiguous(),
        centers=centers.contiguous(),
        images=images.contiguous(),
        maps=maps.contiguous(),
        valid=valid,
        values=values,
        ray_diff=ray_diff,
        mask=mask.view(torch.uint8),
        P=rays * samples,
        R=rays,
        V=views,
        height=images.shape[1],
        width=images.shape[2],
        map_height=maps.shape[1],
        map_width=maps.shape[2],
        channels=maps.shape[3],
    )
    return values, ray_diff, mask


def run_on_tensors(
    function: Any,
    points: Tensor,
    origins: Tensor,
    projection: Tensor,
    centers: Tensor,
    images: Tensor,
    maps: Tensor,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    bytes_of_valid = as_bytes(valid, points.device)
    return run(function, points, origins, projection, centers, images, maps, bytes_of_valid)


def _trial_cuda(function: CudaFunction, *, with_valid: bool, least_valid: float) -> None:
    compare_with_twin(partial(run_on_tensors, function), function.device, with_valid)


CUDA_KERNEL = CudaKernel(
    "point_samples",
    build,
    _trial_cuda,
    lambda target: [{"with_valid": with_valid, "least_valid": VALID} for with_valid in (False, True)],
)
