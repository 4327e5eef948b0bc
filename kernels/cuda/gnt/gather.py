"""Looking up 3D points in source views on NVIDIA GPUs.

Each thread of a block projects one point into one view, and stores the four pixels around it in shared memory. Then all
threads interpolate. Neighbouring threads take neighbouring channels, which are side by side in maps and outcome.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from shiftadd3d.kernels.cuda.driver import CudaFunction, CudaKernel
from shiftadd3d.kernels.cuda.tile import grid, shared
from shiftadd3d.kernels.pack.gnt.gather import stored
from shiftadd3d.kernels.reference.gnt.gather import VALID, Scene, compare_with_twin
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.targets import CudaTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr

_THREADS = 128  # of a block, and (point, view) pairs


class _Lookup:
    """Emits the projection of a point into one view.

    Args:
        position: three components.
        to_target: the vector from the point to the target camera.
        projection: [3, 4], of the view.
        center: [3], the position of the view's camera.

    Attributes:
        depth: z depth.
        pixel: x and y.
    """

    def __init__(self, position: list[Expr], to_target: list[Expr], projection: Buffer, center: Buffer) -> None:
        def projected(row: int) -> Expr:
            x, y, z = (component * projection[row, axis] for axis, component in enumerate(position))
            return T.bind(x + y + z + projection[row, 3])

        self._to_target = to_target
        self._to_source = [T.bind(center[axis] - component) for axis, component in enumerate(position)]
        self.depth = projected(2)
        ahead = T.bind(_within(self.depth, 1e-8))
        self.pixel = [T.bind(_within(projected(row) / ahead, -1e6, 1e6)) for row in (0, 1)]

    def is_inside(self, size: tuple[Expr, Expr]) -> Expr:
        """Whether the point is in front of the camera and inside a picture of (height, width)."""
        inside = self.depth > T.float32(0)
        for x, count in zip(self.pixel, reversed(size), strict=True):
            inside = T.both(inside, T.both(x >= T.float32(0), x <= T.cast(count - 1, "float32")))
        return inside

    def taps(self, size: tuple[Expr, Expr], map_size: tuple[Expr, Expr]) -> list[tuple[Expr, Expr]]:
        """Indices and weights of the four pixels around the point on a map [h, w] that spans the picture [H, W].

        Pixels beyond the border have weight 0.
        """
        zero, one, along = T.float32(0), T.float32(1), []
        for x, count, of_map in zip(self.pixel, reversed(size), reversed(map_size), strict=True):
            last = T.bind(T.cast(of_map - 1, "float32"))
            x = x if count is of_map else T.bind(x * (last / T.cast(count - 1, "float32")))
            low = T.bind(T.floor(x))
            near_and_far = []
            for at, amount in ((low, one - (x - low)), (T.bind(low + one), x - low)):
                # NaN is not beyond any border: so it stays in the share. It must not become an address.
                share = T.bind(T.select(T.either(at < zero, at > last), zero, amount))
                index = T.select(at > zero, T.select(at < last, at, last), zero)
                near_and_far.append((T.bind(T.cast(index, "int32")), share))
            along.append(near_and_far)
        columns, rows = along
        return [(y * map_size[1] + x, share_y * share_x) for y, share_y in rows for x, share_x in columns]

    def difference(self) -> list[Expr]:
        """The four components of the ray difference."""
        target, source = (
            _scaled(x, T.float32(1) / (_norm(x) + T.float32(1e-6))) for x in (self._to_target, self._to_source)
        )
        apart = [T.bind(a - b) for a, b in zip(target, source, strict=True)]
        x, y, z = (a * b for a, b in zip(target, source, strict=True))
        return [*_scaled(apart, T.float32(1) / _within(_norm(apart), 1e-6)), T.bind(x + y + z)]


def _scaled(x: list[Expr], scale: Expr) -> list[Expr]:
    scale = T.bind(scale)
    return [T.bind(component * scale) for component in x]


def _norm(x: list[Expr]) -> Expr:
    return T.bind(T.sqrt(x[0] * x[0] + x[1] * x[1] + x[2] * x[2]))


def _within(x: Expr, least: float, most: float | None = None) -> Expr:
    """x clamped to two numbers; NaN stays NaN."""
    x = T.bind(x)
    at_most = x if most is None else T.select(x > T.float32(most), T.float32(most), x)
    return T.select(x < T.float32(least), T.float32(least), at_most)


def build(target: CudaTarget, with_valid: bool, least_valid: float) -> T.PrimFunc:
    """The function ``(sizes, tensors of a scene as `stored` makes them, values, ray_diff, mask)``.

    Blocks: (point, view) pairs along x.

    Args:
        with_valid: whether some pixels are not valid.
        least_valid: an interpolated pixel is valid if valid pixels have more than this share of it.
    """
    with T.function("point_samples") as function:
        P, R, V = T.scalars("P", "R", "V")
        H, W, h, w, channels = T.scalars("height", "width", "map_height", "map_width", "channels")
        points, origins = T.tensor("points", (P, 3), "float32"), T.tensor("origins", (R, 3), "float32")
        projection = T.tensor("projection", (V, 3, 4), "float32")
        centers = T.tensor("centers", (V, 3), "float32")
        images = T.tensor("images", (V * H * W * 3,), "float32")
        maps = T.tensor("maps", (V * h * w * channels,), "float32")
        valid = T.tensor("valid", (V * H * W,), "uint8") if with_valid else None
        values = T.tensor("values", (P * V, channels + 3), "float32")
        ray_diff, mask = T.tensor("ray_diff", (P * V, 4), "float32"), T.tensor("mask", (P * V,), "uint8")
        pairs = P * V
        with grid((pairs + (_THREADS - 1)) // _THREADS, threads=_THREADS) as (block, thread):
            indices = shared(8, _THREADS, dtype="int32")  # four pixels of the image, four of the map
            shares = shared(8, _THREADS)
            first = T.bind(block * _THREADS)
            pair = T.bind(T.min(first + thread, pairs - 1))
            point, view = T.bind(T.truncdiv(pair, V)), T.bind(T.truncmod(pair, V))
            ray = T.bind(T.truncdiv(point, T.truncdiv(P, R)))
            position = [T.bind(points[point, axis]) for axis in range(3)]
            to_target = [T.bind(origins[ray, axis] - x) for axis, x in enumerate(position)]
            lookup = _Lookup(position, to_target, projection.part(view), centers.part(view))
            seen = T.bind(lookup.is_inside((H, W)))
            on_image, on_map = lookup.taps((H, W), (H, W)), lookup.taps((H, W), (h, w))
            for tap, (index, share) in enumerate([*on_image, *on_map]):
                indices[tap, thread] = view * (H * W if tap < 4 else h * w) + index
                shares[tap, thread] = share
            if valid is not None:
                total = T.total([share * T.cast(valid[view * H * W + index], "float32") for index, share in on_image])
                seen = T.bind(T.both(seen, total > T.float32(least_valid)))
            difference = lookup.difference()
            with T.when(first + thread < pairs):
                mask[first + thread] = T.cast(seen, "uint8")
                for component, x in enumerate(difference):
                    ray_diff[first + thread, component] = x

            width = T.bind(channels + 3)
            count = T.bind(T.min(_THREADS, pairs - first) * width)
            with T.serial((count + (_THREADS - 1)) // _THREADS) as turn:
                at = T.bind(turn * _THREADS + thread)
                own, channel = T.bind(T.truncdiv(at, width)), T.bind(T.truncmod(at, width))
                pixels = [(indices[tap, own], shares[tap, own]) for tap in range(8)]
                with T.when(at < count), T.If(channel < 3):
                    with T.Then():
                        values[first + own, channel] = _interpolated(images, pixels[:4], 3, channel)
                    with T.Else():
                        values[first + own, channel] = _interpolated(maps, pixels[4:], channels, channel - 3)
    return function.get()


def _interpolated(picture: Buffer, pixels: list[tuple[Expr, Expr]], pitch: Expr | int, channel: Expr) -> Expr:
    """A channel of a picture with `pitch` channels, side by side, at the indices and with the weights of pixels."""
    return T.total([share * picture[index * pitch + channel] for index, share in pixels])


def run(function: CudaFunction, scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
    """Call a compiled function with float32 tensors, none of them empty: the outcome of `point_samples_twin`."""
    (rays, samples), (views, height, width, _) = scene.points.shape[:2], scene.images.shape
    _, map_height, map_width, channels = scene.maps.shape
    new = scene.points.new_empty
    values, ray_diff = new(rays, samples, views, 3 + channels), new(rays, samples, views, 4)
    mask = new(rays, samples, views, dtype=torch.bool)
    sizes = {"height": height, "width": width, "map_height": map_height, "map_width": map_width, "channels": channels}
    function(
        -(-rays * samples * views // _THREADS),
        **dict(zip(Scene._fields, stored(scene), strict=True)),
        values=values,
        ray_diff=ray_diff,
        mask=mask.view(torch.uint8),
        P=rays * samples,
        R=rays,
        V=views,
        **sizes,
    )
    return values, ray_diff, mask


def _trial(function: CudaFunction, *, with_valid: bool, least_valid: float) -> None:
    compare_with_twin(partial(run, function), function.device, with_valid)


CUDA_KERNEL = CudaKernel(
    "point_samples",
    build,
    _trial,
    lambda target: [{"with_valid": with_valid, "least_valid": VALID} for with_valid in (False, True)],
)
