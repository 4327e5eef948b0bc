"""Looking up 3D points in source views: projection, bilinear interpolation, visibility and ray differences.

Source: Wang et al., "IBRNet" (CVPR 2021), section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.reference.arguments import takes
from shiftadd3d.kernels.reference.trials import Draw

#: An interpolated pixel is valid only if all pixels that are mixed into it are. Else a wrong colour would come in.
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
    """The difference of the directions from which target camera and source cameras see a point.

    Source: Wang et al., "IBRNet" (CVPR 2021), section 3.2.

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


class Scene(NamedTuple):
    """Points on rays, and the source views to look them up in: the arguments of `point_samples`.

    Kernels run in float32 on CPUs and CUDA GPUs. They read maps where they are if a pixel's channels are side by side
    in memory, and copies of all others. Plain torch runs in all other cases. Raises `UserError` if shapes or dtypes do
    not fit each other. An infinite or NaN pixel of a map also affects points beyond the border next to it.

    Attributes:
        points: [R, S, 3], world.
        origins: [R, 3], where each ray starts.
        projection: [V, 3, 4], world to homogeneous pixels.
        centers: [V, 3], where the source cameras stand.
        images: [V, H, W, 3].
        maps: [V, h, w, C].
        valid: [V, H, W] bool; None: all pixels.
    """

    points: Tensor
    origins: Tensor
    projection: Tensor
    centers: Tensor
    images: Tensor
    maps: Tensor
    valid: Tensor | None


@takes(Scene)
def point_samples_twin(scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
    """What `point_samples` computes, in plain torch; differentiable.

    Returns:
        values [R, S, V, 3 + C], the colour and the features each view shows at a point, zeros beyond its border; ray
        differences [R, S, V, 4]; and mask [R, S, V] bool, whether the view sees the point: in front of the camera,
        inside the picture, among valid pixels.
    """
    points, origins, projection, centers, images, maps, valid = scene
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


def random_scene(seed: int, *, rays: int, samples: int, views: int, channels: int, with_valid: bool) -> Scene:
    """Arguments of `point_samples` for a trial: cameras that look at a cloud of points, some of which they miss."""
    draw, height, width = Draw(seed), 37, 50
    pose = torch.eye(4).repeat(views, 1, 1)
    pose[:, :3, 3] = 0.3 * draw.normal(views, 3)
    intrinsics = torch.tensor([[40.0, 0.0, width / 2], [0.0, 40.0, height / 2], [0.0, 0.0, 1.0]])
    projection = intrinsics @ torch.linalg.inv(pose)[:, :3]
    points = draw.normal(rays, samples, 3) + torch.tensor([0.0, 0.0, 2.0])
    images, maps = draw.normal(views, height, width, 3), draw.normal(views, 10, 13, channels)
    valid = draw.uniform(views, height, width) > 0.05 if with_valid else None
    return Scene(points, 0.3 * draw.normal(rays, 3), projection, pose[:, :3, 3].contiguous(), images, maps, valid)


def compare_with_twin(run: Callable[[Scene], tuple[Tensor, ...]], device: torch.device, with_valid: bool) -> None:
    """Raise `AssertionError` unless `run`, given a scene on `device`, computes what the twin does."""
    scene = random_scene(0, rays=7, samples=5, views=3, channels=19, with_valid=with_valid)
    found = run(scene._replace(**{name: x.to(device) for name, x in scene._asdict().items() if x is not None}))
    for out, expected in zip(found, point_samples_twin(*scene), strict=True):
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-3, atol=1e-3)
