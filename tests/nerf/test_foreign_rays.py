"""Source views for rays that others made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nerfstudio.cameras.rays import RayBundle

from shiftadd3d.nerf.foreign_rays import RayGroup, group_rays
from shiftadd3d.nerf.source_bank import SourceBank

VIEWS, SOURCES, NEAR_FAR = 12, 4, (2.0, 8.0)


@pytest.fixture(scope="module")
def bank(orbit_poses: Callable[..., np.ndarray]) -> SourceBank:
    poses = torch.from_numpy(orbit_poses(VIEWS)).float() @ torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))
    intrinsics = torch.tensor([[20.0, 0.0, 11.5], [0.0, 20.0, 7.5], [0.0, 0.0, 1.0]]).expand(VIEWS, 3, 3)
    return SourceBank(torch.zeros(VIEWS, 16, 24, 3, dtype=torch.uint8), None, intrinsics, poses)


def bundle(origins: torch.Tensor, directions: torch.Tensor, **more: Any) -> RayBundle:
    return RayBundle(origins=origins, directions=directions, pixel_area=torch.ones_like(origins[..., :1]), **more)


def rays_of(bank: SourceBank, view: int, count: int = 6) -> RayBundle:
    """Of a training view, as nerfstudio's cameras make them."""
    generator = torch.Generator().manual_seed(view)
    pose = bank.camera_to_world[view]
    local = torch.cat([torch.rand(count, 2, generator=generator) - 0.5, torch.ones(count, 1)], dim=1) @ pose[:3, :3].T
    return bundle(
        pose[:3, 3].expand(count, 3),
        torch.nn.functional.normalize(local, dim=-1),
        camera_indices=torch.full((count, 1), view),
        metadata={"directions_norm": local.norm(dim=-1, keepdim=True)},
    )


def grouped(rays: RayBundle, bank: SourceBank) -> list[RayGroup]:
    return list(group_rays(rays, bank, SOURCES, NEAR_FAR))


def test_the_rays_of_a_training_view_go_with_its_neighbours_without_itself(bank: SourceBank):
    rays = rays_of(bank, 5)
    (group,) = grouped(rays, bank)
    assert group.source_ids.tolist() == bank.nearest(bank.camera_to_world[5], SOURCES, exclude=5).tolist()
    assert torch.allclose(group.length, rays.metadata["directions_norm"], atol=1e-5)
    assert group.near.tolist() == [2.0] * 6 and group.far.tolist() == [8.0] * 6


def test_a_camera_index_that_the_origin_belies_is_not_believed(bank: SourceBank):
    rays = rays_of(bank, 5)
    rays.origins = rays.origins * 1.05
    for number in (0, 7, 99, -3):
        rays.camera_indices = torch.full((6, 1), float(number))  # exporters make floats of them
        assert {id for group in grouped(rays, bank) for id in group.source_ids.tolist()[:1]} <= {4, 5, 6}


def test_every_ray_is_in_one_group_and_groups_are_few(bank: SourceBank):
    generator = torch.Generator().manual_seed(0)
    origins, directions = torch.randn(2, 10, 30, 3, generator=generator).unbind()
    groups = grouped(bundle(origins, directions), bank)
    assert torch.cat([group.rows for group in groups]).sort().values.tolist() == list(range(300))
    assert 1 < len(groups) <= 2 * VIEWS
    for group in groups:
        assert torch.equal(group.origins, origins.view(-1, 3)[group.rows])
        assert torch.allclose(group.directions.norm(dim=-1), torch.ones(len(group.rows)), atol=1e-5)
        assert torch.equal(group.length, torch.ones(len(group.rows), 1))


def test_a_ray_goes_with_the_view_that_looks_its_way(bank: SourceBank):
    poses = bank.camera_to_world
    groups = grouped(bundle(poses[:, :3, 3] * 0.9, 3.0 * poses[:, :3, 2]), bank)
    assert [(group.rows.tolist(), int(group.source_ids[0])) for group in groups] == [([i], i) for i in range(VIEWS)]


def test_rays_over_a_surface_are_sampled_there_and_go_with_views_from_which_it_is_seen(bank: SourceBank):
    towards = bank.camera_to_world[3, :3, 2].expand(5, 3)
    (group,) = grouped(bundle(-0.1 * towards, towards, nears=torch.zeros(5, 1), fars=torch.full((5, 1), 0.2)), bank)
    assert int(group.source_ids[0]) == 3
    assert (group.near > 0).all() and (group.near < 0.01).all()
    assert torch.allclose(group.far, torch.tensor(0.2))


def test_a_range_of_no_extent_can_be_sampled(bank: SourceBank):
    towards = bank.camera_to_world[3, :3, 2].expand(2, 3)
    far = torch.tensor([[0.0], [1.0]])
    groups = grouped(bundle(towards, towards, nears=torch.ones(2, 1), fars=far), bank)
    for group in groups:
        assert (group.near > 0).all() and (group.far > group.near).all()


def test_no_rays_are_no_groups(bank: SourceBank):
    assert grouped(bundle(torch.zeros(0, 3), torch.zeros(0, 3)), bank) == []
