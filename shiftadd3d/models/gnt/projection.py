"""Cameras, and looking up 3D points in the source views.

Cameras here follow OpenCV: x right, y down, z forward, and the centre of the top left pixel is at (0, 0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.reference.gnt import gather as reference_gather
from shiftadd3d.kernels.reference.gnt.gather import VALID, Scene, ray_differences

__all__ = [
    "Cameras",
    "PointLookUp",
    "PointSamples",
    "Silhouettes",
    "SourceViews",
    "empty_views",
    "project_points",
    "projection_matrices",
    "ray_differences",
    "sample_sources",
]


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
class Silhouettes:
    """Pixels in which cameras see only background. A point of an object is in none of them (the visual hull, Laurentini
    1994).

    Attributes:
        cameras: N pinhole cameras.
        empty: [N, H, W] bool, True where a pixel is known to show background alone.
    """

    cameras: Cameras
    empty: Tensor


@dataclass
class SourceViews:
    """The pictures that a ray is rendered from, with their feature maps.

    Attributes:
        images: [V, H, W, 3], 0..1.
        cameras: V pinhole cameras.
        features: feature maps for the coarse and the fine network, each [V, C, h, w].
        valid: [V, H, W] bool, False for pixels without information (masked, or beyond a lens's border); None if all are
            valid.
        empty: [V, H, W] bool, True where a pixel is known to show background alone; None if none is.
        silhouettes: silhouettes of these and of further views; None for these only.
    """

    images: Tensor
    cameras: Cameras
    features: tuple[Tensor, Tensor]
    valid: Tensor | None = None
    empty: Tensor | None = None
    silhouettes: Silhouettes | None = None


@dataclass
class PointSamples:
    """What the source views show at points on rays.

    Attributes:
        values: [R, S, V, 3 + C], colour and features of each view.
        ray_diff: [R, S, V, 4], unit difference between the directions to the target and to the source camera, and the
            cosine between the two.
        mask: [R, S, V, 1] bool, whether the view can see the point at all (in front, inside the picture, valid pixel).
    """

    values: Tensor
    ray_diff: Tensor
    mask: Tensor

    @property
    def rgb(self) -> Tensor:
        """The colours alone, [R, S, V, 3]."""
        return self.values[..., :3]

    @property
    def features(self) -> Tensor:
        """The features alone, [R, S, V, C]."""
        return self.values[..., 3:]


def projection_matrices(cameras: Cameras) -> Tensor:
    """[V, 3, 4], from world to homogeneous pixels; the last of the three is the z depth."""
    return cameras.intrinsics @ torch.linalg.inv(cameras.camera_to_world)[:, :3]


def project_points(points: Tensor, cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Pixels at which cameras see points.

    Args:
        points: [R, S, 3], world.
        cameras: V of them.

    Returns:
        pixels [V, R, S, 2] as (x, y), and z depths [V, R, S] (negative behind the camera).
    """
    return reference_gather.project_points(points, projection_matrices(cameras))


def sample_sources(points: Tensor, target_center: Tensor, sources: SourceViews, feature_maps: Tensor) -> PointSamples:
    """Look up points in every source view.

    Args:
        points: [R, S, 3], world.
        target_center: [R, 3], where each ray starts.
        sources: V views.
        feature_maps: [V, C, h, w], those of `sources` to look at.
    """
    scene = scene_of(points, target_center, sources, feature_maps)
    values, ray_diff, mask = reference_gather.point_samples_twin(*scene)
    return PointSamples(values, ray_diff, mask.unsqueeze(-1))


class PointLookUp(nn.Module):
    """`sample_sources` as a module without parameters, which `freeze_` replaces by a kernel."""

    def forward(self, points: Tensor, target_center: Tensor, sources: SourceViews, maps: Tensor) -> PointSamples:
        return sample_sources(points, target_center, sources, maps)


def empty_views(points: Tensor, sources: SourceViews) -> Tensor:
    """Number of views that see only background at points. Such a point is on no surface (the visual hull).

    Args:
        points: [R, S, 3], world.
        sources: V views with `empty`, or with `silhouettes` of N views. A view counts if all pixels that are
            interpolated are empty.

    Returns:
        [R, S], 0..V, or 0..N.
    """
    cameras, empty = sources.cameras, sources.empty
    if sources.silhouettes is not None:
        cameras, empty = sources.silhouettes.cameras, sources.silhouettes.empty
    assert empty is not None
    height, width = empty.shape[1:]
    pixels, depth = project_points(points, cameras)
    last = pixels.new_tensor([width - 1.0, height - 1.0])
    # Beyond the border zeros are mixed in.
    shown = F.grid_sample(empty[:, None].to(pixels.dtype), 2.0 * pixels / last - 1.0, align_corners=True)
    return ((shown[:, 0] > VALID) & (depth > 0)).sum(dim=0)


def scene_of(points: Tensor, target_center: Tensor, sources: SourceViews, feature_maps: Tensor) -> Scene:
    """The same arguments as plain tensors, as kernels take them."""
    return Scene(
        points,
        target_center,
        projection_matrices(sources.cameras),
        sources.cameras.camera_to_world[:, :3, 3],
        sources.images,
        feature_maps.permute(0, 2, 3, 1),
        sources.valid,
    )
