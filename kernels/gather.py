"""Looking up 3D points in source views: projection, bilinear interpolation, visibility and ray differences at once.

torch needs a pass over memory for each of some thirty steps, and gathers channel by channel from maps stored channel
after channel. Here a point is projected into all views while its numbers stay in registers, and a pixel's channels,
stored side by side, are read together. What comes out has the layout the next layer reads: ``[points, views, colour +
channels]``.

Inference only: no gradients flow through the op. A pixel of a map that is infinite or NaN also spoils points next to
the border nearest to it.

Source: Wang et al., "IBRNet" (CVPR 2021), section 3.2.
"""

# ruff: noqa: B023 (the loops of a TIR function are gone through once, while it is parsed)
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels import cuda_gather, memory
from shiftadd3d.kernels.cuda import MAX_ELEMENTS, CudaFunction, CudaKernel
from shiftadd3d.kernels.kernel import Kernel, define_op
from shiftadd3d.kernels.targets import CpuTarget
from shiftadd3d.kernels.vector import Vectors

# --------------------------------------------------------------------------------------------------------------------
# Twin
# --------------------------------------------------------------------------------------------------------------------

#: An interpolated pixel is valid only if all that is mixed into it is: at a border a wrong colour would come in.
VALID = 0.999


def project_points(points: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels at which cameras see points.

    Args:
        points: [R, S, 3], world.
        projection: [V, 3, 4], from world to homogeneous pixels, the last one being the z depth.

    Returns:
        pixels [V, R, S, 2] as (x, y), and z depths [V, R, S] (negative behind the camera).
    """
    projected = torch.einsum("vij,rsj->vrsi", projection[..., :3], points) + projection[:, None, None, :, 3]
    pixels = (projected[..., :2] / projected[..., 2:].clamp(min=1e-8)).clamp(-1e6, 1e6)
    return pixels, projected[..., 2]


def ray_differences(points: Tensor, target_center: Tensor, source_centers: Tensor) -> Tensor:
    """How differently a source camera looks at a point than the target does (IBRNet, Wang et al. 2021, sec. 3.2).

    Args:
        points: [R, S, 3].
        target_center: [R, 3], where each ray starts.
        source_centers: [V, 3].

    Returns:
        [R, S, V, 4]: the unit vector of the difference of the two unit directions, and their dot product.
    """

    def unit(x: Tensor) -> Tensor:
        return x / (x.norm(dim=-1, keepdim=True) + 1e-6)

    to_target = unit(target_center[:, None] - points)[:, :, None]  # [R, S, 1, 3]
    to_source = unit(source_centers - points[:, :, None])  # [R, S, V, 3]
    difference = to_target - to_source
    difference = difference / difference.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    return torch.cat([difference, (to_target * to_source).sum(dim=-1, keepdim=True)], dim=-1)


def point_samples_twin(
    points: Tensor,  # [R, S, 3] world
    origins: Tensor,  # [R, 3] where each ray starts
    projection: Tensor,  # [V, 3, 4] world to homogeneous pixels
    centers: Tensor,  # [V, 3] where the source cameras stand
    images: Tensor,  # [V, H, W, 3]
    maps: Tensor,  # [V, h, w, C]
    valid: Tensor | None,  # [V, H, W] bool; None: all pixels
) -> tuple[Tensor, Tensor, Tensor]:
    """What `point_samples` computes, in plain torch; differentiable.

    Returns:
        values [R, S, V, 3 + C], the colour and the features each view shows at a point, zeros beyond its border; ray
        differences [R, S, V, 4]; and mask [R, S, V] bool, whether the view sees the point: in front of the camera,
        inside the picture, among valid pixels.
    """
    height, width = images.shape[1:3]
    pixels, depth = project_points(points, projection)
    x, y = pixels.unbind(-1)
    mask = (depth > 0) & (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)  # [V, R, S]
    # Both maps span the same picture: align_corners puts their outermost samples on its outermost pixels.
    grid = 2.0 * pixels / pixels.new_tensor([width - 1.0, height - 1.0]) - 1.0

    def sample(maps: Tensor) -> Tensor:
        """[V, C, h, w] to [R, S, V, C]."""
        return F.grid_sample(maps, grid, mode="bilinear", align_corners=True).permute(2, 3, 0, 1)

    if valid is not None:
        mask &= sample(valid[:, None].to(grid.dtype))[..., 0].permute(2, 0, 1) > VALID
    values = torch.cat([sample(images.permute(0, 3, 1, 2)), sample(maps.permute(0, 3, 1, 2))], dim=-1)
    return values, ray_differences(points, origins, centers), mask.permute(1, 2, 0)


# --------------------------------------------------------------------------------------------------------------------
# TIR
# --------------------------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------------------------
# Trial and op
# --------------------------------------------------------------------------------------------------------------------


def _run(
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


def as_bytes(valid: Tensor | None, device: torch.device | None = None) -> Tensor:
    """The valid pixels as the functions take them; none, on `device`, where all are."""
    return (
        torch.empty(0, dtype=torch.uint8, device=device)
        if valid is None
        else valid.contiguous().view(-1).view(torch.uint8)
    )


def random_scene(seed: int, *, rays: int, samples: int, views: int, channels: int, with_valid: bool) -> tuple[Any, ...]:
    """Arguments of `point_samples` for a trial: cameras that look at a cloud of points, some of which they miss."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    height, width = 37, 50
    pose = torch.eye(4).repeat(views, 1, 1)
    pose[:, :3, 3] = 0.3 * draw(views, 3)
    intrinsics = torch.tensor([[40.0, 0.0, width / 2], [0.0, 40.0, height / 2], [0.0, 0.0, 1.0]])
    projection = intrinsics @ torch.linalg.inv(pose)[:, :3]
    points = draw(rays, samples, 3) + torch.tensor([0.0, 0.0, 2.0])
    images, maps = draw(views, height, width, 3), draw(views, 10, 13, channels)
    valid = torch.rand(views, height, width, generator=generator) > 0.05 if with_valid else None
    return points, 0.3 * draw(rays, 3), projection, pose[:, :3, 3].contiguous(), images, maps, valid


def _run_cuda(
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
    return cuda_gather.run(function, points, origins, projection, centers, images, maps, bytes_of_valid)


def _trial(function: Any, *, with_valid: bool) -> None:
    _compare(partial(_run, function), torch.device("cpu"), with_valid)


def _trial_cuda(function: CudaFunction, *, with_valid: bool, least_valid: float) -> None:
    _compare(partial(_run_cuda, function), function.device, with_valid)


def _compare(run: Callable[..., Any], device: torch.device, with_valid: bool) -> None:
    scene = random_scene(0, rays=7, samples=5, views=3, channels=19, with_valid=with_valid)
    found = run(*(None if tensor is None else tensor.to(device) for tensor in scene))
    for out, expected in zip(found, point_samples_twin(*scene), strict=True):
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-3, atol=1e-3)


KERNEL = Kernel("point_samples", _build, _trial, lambda target: [{"with_valid": False}, {"with_valid": True}])
CUDA_KERNEL = CudaKernel(
    "point_samples",
    cuda_gather.build,
    _trial_cuda,
    lambda target: [{"with_valid": with_valid, "least_valid": VALID} for with_valid in (False, True)],
)


def check_scene(
    points: Tensor,
    origins: Tensor,
    projection: Tensor,
    centers: Tensor,
    images: Tensor,
    maps: Tensor,
    valid: Tensor | None,
) -> None:
    """Raise `UserError` unless the arguments of `point_samples` fit together."""
    rays, views = points.shape[0], images.shape[0]
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "points": (points, (rays, points.shape[1], 3)),
        "origins": (origins, (rays, 3)),
        "projection": (projection, (views, 3, 4)),
        "centers": (centers, (views, 3)),
        "images": (images, (views, *images.shape[1:3], 3)),
        "maps": (maps, (views, *maps.shape[1:])),
    }
    if valid is not None:
        expected["valid"] = (valid, tuple(images.shape[:3]))
        if valid.dtype != torch.bool:
            raise UserError(f"valid must be bool, not {valid.dtype}")
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise UserError(f"{name} must be {list(shape)} beside the others, not {list(tensor.shape)}")
    if maps.dim() != 4 or min(*images.shape[1:3], *maps.shape[1:3]) < 2:
        raise UserError("images and maps must be [views, height, width, channels] of 2 x 2 pixels or more")


def is_served(*tensors: Tensor) -> bool:
    """Whether the compiled kernels take these: all float32, none empty."""
    return all(tensor.dtype == torch.float32 and tensor.numel() for tensor in tensors)


def _cpu(
    points: Tensor,
    origins: Tensor,
    projection: Tensor,
    centers: Tensor,
    images: Tensor,
    maps: Tensor,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    scene = (points, origins, projection, centers, images, maps)
    check_scene(*scene, valid)
    function = KERNEL.function(with_valid=valid is not None) if is_served(*scene) else None
    if function is None:
        return point_samples_twin(*scene, valid)
    return _run(function, *scene, valid)


def _cuda(
    points: Tensor,
    origins: Tensor,
    projection: Tensor,
    centers: Tensor,
    images: Tensor,
    maps: Tensor,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    scene = (points, origins, projection, centers, images, maps)
    check_scene(*scene, valid)
    function = None
    if is_served(*scene):
        rows = points[..., 0].numel() * len(images)
        if max(rows * (3 + maps.shape[-1]), images.numel(), maps.numel()) > MAX_ELEMENTS:
            CUDA_KERNEL.decline(f"points {list(points.shape)} in maps {list(maps.shape)} are too many for it")
        else:
            function = CUDA_KERNEL.function(device=points.device, with_valid=valid is not None, least_valid=VALID)
    if function is None:
        return point_samples_twin(*scene, valid)
    return _run_cuda(function, *scene, valid)


def _fake(
    points: Tensor,
    origins: Tensor,
    projection: Tensor,
    centers: Tensor,
    images: Tensor,
    maps: Tensor,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*points.shape[:2], images.shape[0])
    return (
        points.new_empty(*shape, 3 + maps.shape[-1]),
        points.new_empty(*shape, 4),
        points.new_empty(*shape, dtype=torch.bool),
    )


#: ``torch.ops.shiftadd3d.point_samples``; arguments and outcome as those of its twin. float32, on CPUs and CUDA GPUs;
#: maps stored with a pixel's channels side by side are read where they are, others are copied first.
point_samples = define_op(
    "point_samples(Tensor points, Tensor origins, Tensor projection, Tensor centers, Tensor images, Tensor maps, "
    "Tensor? valid) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu,
    cuda=_cuda,
    twin=point_samples_twin,
    fake=_fake,
)
