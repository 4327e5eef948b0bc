"""Source views for rays from elsewhere: nerfstudio's exporters and panoramic cameras do not choose source views."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from nerfstudio.cameras.rays import RayBundle
from torch import Tensor

from shiftadd3d.nerf.source_bank import SourceBank

#: The nearest depth in a ray's own range, as a share of the farthest: samples in inverse depth cannot start at zero.
_NEAREST = 1e-2


class RayGroup(NamedTuple):
    """Rays with the same source views, ready for the network."""

    rows: Int[Tensor, " rays"]
    """Numbers of the rays in the bundle, in row-major order."""
    source_ids: Int[Tensor, " views"]
    origins: Float[Tensor, "rays 3"]
    directions: Float[Tensor, "rays 3"]
    """Directions of unit length."""
    length: Float[Tensor, "rays 1"]
    """Distance along the ray where z depth is 1."""
    near: Float[Tensor, " rays"]
    far: Float[Tensor, " rays"]
    """z depths."""


def group_rays(
    bundle: RayBundle, bank: SourceBank, num_source_views: int, near_far: tuple[float, float]
) -> Iterator[RayGroup]:
    """Choose source views from where rays start and look.

    A ray that starts at the training view that its `camera_indices` name is that view's, and is rendered from the views
    nearest to it, without itself, as in training. (Exporters also fill in 0 where they have no camera.) Every other ray
    goes with the training view nearest to it, and is rendered from that one and its neighbours.

    Args:
        bundle: [...]; directions of any length. With `nears` and `fars`, distances along the ray, it is sampled between
            these: texture is looked up on a surface, with rays that start just above it. `metadata["directions_norm"]`
            may be missing.
        bank: the training views.
        num_source_views: K.
        near_far: z depths of the scene, for rays without a range of their own.

    Yields:
        Groups that together hold every ray once, on the bundle's device; no more than twice as many as there are views.

    Raises:
        UserError: fewer than K views.
    """
    origins, given = bundle.origins.reshape(-1, 3), bundle.directions.reshape(-1, 3)
    norm = given.norm(dim=-1, keepdim=True)
    directions = given / norm
    length = bundle.metadata.get("directions_norm")
    length = torch.ones_like(norm) if length is None else length.reshape(-1, 1).to(norm)
    own_range = None
    looks_from = origins
    if bundle.nears is not None and bundle.fars is not None:
        far = bundle.fars.reshape(-1, 1).to(norm).clamp(min=1e-6)
        own_range = torch.maximum(bundle.nears.reshape(-1, 1).to(norm), _NEAREST * far).minimum((1 - _NEAREST) * far)
        own_range = torch.cat([own_range, far], dim=-1)
        # From as far off as cameras see things: views that stand right at the surface would show hardly any of it.
        usual = 2.0 / sum(1.0 / depth for depth in near_far)
        looks_from = origins + directions * (own_range.mean(dim=-1, keepdim=True) - usual).clamp(max=0.0)
    anchors = bank.nearest_to_rays(looks_from, directions)
    at_view = torch.zeros(len(anchors), dtype=torch.bool)
    if bundle.camera_indices is not None:
        cameras = bundle.camera_indices.reshape(-1).long().cpu()
        at_view = (cameras >= 0) & (cameras < len(bank))
        at_view &= bank.stand_at(cameras.where(at_view, 0), origins.cpu())
        anchors = cameras.where(at_view, anchors)
    for key in torch.unique(2 * anchors + at_view).tolist():
        anchor, own = divmod(key, 2)
        rows = (2 * anchors + at_view == key).nonzero()[:, 0].to(origins.device)
        pose = bank.camera_to_world[anchor]
        ids = bank.nearest(pose, num_source_views, exclude=anchor if own else None, exclude_same_pose=bool(own))
        unit, one = directions[rows], length[rows]
        if own:  # what nerfstudio leaves out for fisheye lenses: see `mend_fisheye_rays`
            axis = pose[:3, 2].to(unit)
            unit = torch.where(unit.isfinite().all(dim=-1, keepdim=True), unit, axis)
            one = 1.0 / (unit @ axis)[:, None].clamp(min=0.1)
        bounds = torch.tensor(near_far).to(one).expand(len(rows), 2) if own_range is None else own_range[rows] / one
        yield RayGroup(rows, ids, origins[rows], unit, one, bounds[:, 0], bounds[:, 1])
