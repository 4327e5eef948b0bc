"""Cameras, and looking up 3D points in the source views.

Cameras here follow OpenCV: x right, y down, z forward, and the centre of the top left pixel is at (0, 0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d._errors import UserError

#: Logit of what must not be chosen: finite, so that a softmax over nothing but such ones is even instead of NaN.
MASKED_LOGIT = -1e4


@dataclass
class Cameras:
    """Pinhole cameras, one or a batch.

    Attributes:
        intrinsics: [..., 3, 3], in pixels, pixel centres at integers.
        camera_to_world: [..., 4, 4], OpenCV axes.
    """

    intrinsics: Tensor
    camera_to_world: Tensor

    @classmethod
    def of(cls, camera: Cameras | Mapping[str, Any], name: str = "camera") -> Cameras:
        """From a mapping with `intrinsics` ([..., 3, 3] or [..., 4, 4]) and `camera_to_world` ([..., 4, 4]).

        Raises:
            UserError: a missing key, a wrong shape, a value that is not finite, or a matrix that has no inverse.
        """
        if isinstance(camera, cls):
            return camera
        try:
            raw = {key: camera[key] for key in ("intrinsics", "camera_to_world")}  # type: ignore[index]
        except (KeyError, TypeError, IndexError):
            raise UserError(f"{name} must be a mapping with `intrinsics` and `camera_to_world`") from None
        try:
            intrinsics, pose = (torch.as_tensor(value, dtype=torch.float32) for value in raw.values())
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{name}: intrinsics and camera_to_world must be arrays of numbers ({error})") from None
        if intrinsics.shape[-2:] not in ((3, 3), (4, 4)):
            raise UserError(f"{name}: intrinsics must be [..., 3, 3] or [..., 4, 4], not {list(intrinsics.shape)}")
        if pose.shape[-2:] != (4, 4):
            raise UserError(f"{name}: camera_to_world must be [..., 4, 4], not {list(pose.shape)}")
        if not (torch.isfinite(intrinsics).all() and torch.isfinite(pose).all()):
            raise UserError(f"{name}: intrinsics and camera_to_world must be finite")
        intrinsics = intrinsics[..., :3, :3]
        if not (torch.linalg.det(intrinsics).all() and torch.linalg.det(pose).all()):
            raise UserError(f"{name}: intrinsics and camera_to_world must be invertible")
        return cls(intrinsics, pose)

    def to(self, like: Tensor) -> Cameras:
        """The same cameras with the dtype and on the device of a tensor."""
        return Cameras(self.intrinsics.to(like), self.camera_to_world.to(like))

    def rays(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Rays of one camera through pixels.

        Args:
            pixels: [R, 2], (x, y).

        Returns:
            origins [R, 3] and directions [R, 3], scaled so that one unit along the ray is one unit of z depth.
        """
        homogeneous = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=-1)
        directions = homogeneous @ torch.linalg.inv(self.intrinsics).T @ self.camera_to_world[:3, :3].T
        return self.camera_to_world[:3, 3].expand_as(directions), directions


@dataclass
class SourceViews:
    """The pictures a ray is rendered from, with their feature maps.

    Attributes:
        images: [V, H, W, 3], 0..1.
        cameras: V pinhole cameras.
        features: feature maps for the coarse and the fine network, each [V, C, h, w].
        valid: [V, H, W] bool, False where a pixel says nothing (masked, beyond a lens's border); None if all do.
    """

    images: Tensor
    cameras: Cameras
    features: tuple[Tensor, Tensor]
    valid: Tensor | None = None


@dataclass
class PointSamples:
    """What the source views say about points on rays.

    Attributes:
        rgb: [R, S, V, 3], colour each view shows there.
        features: [R, S, V, C].
        ray_diff: [R, S, V, 4], unit difference between the directions to the target and to the source camera, and the
            cosine between the two.
        mask: [R, S, V, 1] bool, whether the view can see the point at all (in front, inside the picture, valid pixel).
    """

    rgb: Tensor
    features: Tensor
    ray_diff: Tensor
    mask: Tensor


def _grid_sample(maps: Tensor, grid: Tensor) -> Tensor:
    """[V, C, h, w] at [V, R, S, 2] to [R, S, V, C]."""
    return F.grid_sample(maps, grid, mode="bilinear", align_corners=True).permute(2, 3, 0, 1)


def project_points(points: Tensor, cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Pixels at which cameras see points.

    Args:
        points: [R, S, 3], world.
        cameras: V of them.

    Returns:
        pixels [V, R, S, 2] as (x, y), and z depths [V, R, S] (negative behind the camera).
    """
    world_to_camera = torch.linalg.inv(cameras.camera_to_world)
    projection = cameras.intrinsics @ world_to_camera[:, :3]  # [V, 3, 4]
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


def sample_sources(points: Tensor, target_center: Tensor, sources: SourceViews, feature_maps: Tensor) -> PointSamples:
    """Look up points in every source view.

    Args:
        points: [R, S, 3], world.
        target_center: [R, 3], where each ray starts.
        sources: V views.
        feature_maps: [V, C, h, w], those of `sources` to look at.
    """
    height, width = sources.images.shape[1:3]
    pixels, depth = project_points(points, sources.cameras)
    x, y = pixels.unbind(-1)
    mask = (depth > 0) & (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)  # [V, R, S]
    # Both maps span the same picture: align_corners puts their outermost samples on its outermost pixels.
    grid = 2.0 * pixels / pixels.new_tensor([width - 1.0, height - 1.0]) - 1.0
    if sources.valid is not None:
        # All four neighbours must be valid: a border pixel mixed with a blank one has a wrong colour.
        mask &= _grid_sample(sources.valid[:, None].to(grid.dtype), grid)[..., 0].permute(2, 0, 1) > 0.999
    return PointSamples(
        rgb=_grid_sample(sources.images.permute(0, 3, 1, 2), grid),
        features=_grid_sample(feature_maps, grid),
        ray_diff=ray_differences(points, target_center, sources.cameras.camera_to_world[:, :3, 3]),
        mask=mask.permute(1, 2, 0)[..., None],
    )
