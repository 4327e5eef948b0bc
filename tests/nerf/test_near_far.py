from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("nerfstudio")

from nerfstudio.data.datasets.base_dataset import InputDataset

from shiftadd3d import UserError
from shiftadd3d.nerf.dataparsers import AutoDataParserConfig, LLFFDataParserConfig
from shiftadd3d.nerf.near_far import (
    near_far_from_bounds,
    near_far_from_cameras,
    near_far_from_matches,
    near_far_from_points,
    scene_near_far,
)
from shiftadd3d.nerf.source_bank import SourceBank
from shiftadd3d.scenes import scene_path


def read(config):
    outputs = config.setup().get_dataparser_outputs("train")
    return SourceBank.from_dataset(InputDataset(outputs)), outputs


def found(near_far: tuple[float, float] | None) -> tuple[float, float]:
    assert near_far is not None
    return near_far


def blank_bank(poses_opengl: np.ndarray, size: int = 32, focal: float = 40.0) -> SourceBank:
    poses = torch.from_numpy(poses_opengl).float() @ torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))
    middle = (size - 1) / 2
    intrinsics = torch.tensor([[focal, 0.0, middle], [0.0, focal, middle], [0.0, 0.0, 1.0]]).repeat(len(poses), 1, 1)
    return SourceBank(torch.zeros(len(poses), size, size, 3, dtype=torch.uint8), None, intrinsics, poses)


def test_points_in_view_give_their_depths_with_a_margin(orbit_poses):
    bank = blank_bank(orbit_poses(10, radius=4.0, height=0.0))
    ball = torch.nn.functional.normalize(torch.randn(5000, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    far_away = torch.tensor([[0.0, 0.0, 100.0]]).repeat(500, 1)  # above all cameras' views
    near, far = found(near_far_from_points(bank, torch.cat([ball, far_away])))
    assert near == pytest.approx(0.85 * 3.0, rel=0.03)
    assert far == pytest.approx(1.2 * 5.0, rel=0.03)


def test_points_on_masked_pixels_say_nothing_of_depths(orbit_poses):
    poses = orbit_poses(10, radius=4.0, height=0.0)
    ball = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0)) * 0.1 + torch.tensor([0.8, 0.0, 0.0])
    bank, first = blank_bank(poses), blank_bank(poses[:1])
    bank.valid = torch.zeros(10, 32, 32, dtype=torch.bool)
    assert near_far_from_points(bank, ball) is None
    bank.valid[0] = True
    assert found(near_far_from_points(bank, ball)) == found(near_far_from_points(first, ball))
    bank.valid = None
    assert found(near_far_from_points(bank, ball)) != found(near_far_from_points(first, ball))


def test_too_few_points_in_view_give_nothing(orbit_poses):
    assert near_far_from_points(blank_bank(orbit_poses(10)), torch.zeros(3, 3)) is None


def test_cameras_around_an_object_give_two_to_six_at_the_distance_of_the_synthetic_scenes(orbit_poses):
    bank = blank_bank(orbit_poses(20, radius=4.0, height=0.0))
    assert near_far_from_cameras(bank) == pytest.approx((2.0, 6.0), rel=1e-4)


def test_cameras_side_by_side_give_a_wide_guess_in_units_of_their_spread():
    poses = np.tile(np.eye(4), (5, 1, 1))
    poses[:, 0, 3] = np.arange(5)
    assert near_far_from_cameras(blank_bank(poses)) == pytest.approx((2.0, 80.0))


def test_images_without_texture_give_no_matches_and_the_cameras_decide(orbit_poses):
    bank = blank_bank(orbit_poses(8, radius=4.0, height=0.0))
    assert near_far_from_matches(bank) is None
    assert scene_near_far(bank) == pytest.approx((2.0, 6.0), rel=1e-4)


def test_the_best_source_wins(orbit_poses):
    bank = blank_bank(orbit_poses(8, radius=4.0, height=0.0))
    bounds = torch.tensor([[2.0, 5.0], [3.0, 7.0]])
    points = torch.nn.functional.normalize(torch.randn(2000, 3), dim=-1) * 0.5
    assert scene_near_far(bank, hint=(1.0, 9.0), bounds=bounds, points=points) == (1.0, 9.0)
    assert (
        scene_near_far(bank, bounds=bounds, points=points) == near_far_from_bounds(bounds) == pytest.approx((1.8, 7.7))
    )
    bank.empty = torch.ones(8, 32, 32, dtype=torch.bool)  # nothing is behind the points
    assert scene_near_far(bank, points=points) == near_far_from_points(bank, points)
    assert scene_near_far(bank, hint=(1.0, 9.0), far=4.0) == (1.0, 4.0)
    assert scene_near_far(bank, hint=(1.0, 9.0), near=0.5, far=4.0) == (0.5, 4.0)


def test_points_on_one_thing_leave_room_for_a_background_that_has_none(orbit_poses):
    bank = blank_bank(orbit_poses(8, radius=4.0, height=0.0))
    ball = torch.nn.functional.normalize(torch.randn(2000, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    near, far = found(near_far_from_points(bank, 0.5 * ball))
    assert far < 2.0 * near
    assert scene_near_far(bank, points=0.5 * ball) == pytest.approx((near, 4.0 * near))
    near, far = found(near_far_from_points(bank, 3.0 * ball))
    assert far > 4.0 * near
    assert scene_near_far(bank, points=3.0 * ball) == (near, far)
    bounds = torch.tensor([[2.0, 5.0]])
    assert scene_near_far(bank, bounds=bounds) == near_far_from_bounds(bounds)


@pytest.mark.parametrize(("near", "far"), [(2.0, 1.0), (0.0, 1.0), (-1.0, 1.0), (1.0, 1.0), (1.0, float("nan"))])
def test_ranges_that_are_none_are_refused(orbit_poses, near, far):
    with pytest.raises(UserError, match="expected 0 < near < far"):
        scene_near_far(blank_bank(orbit_poses(4)), near=near, far=far)


def test_matches_find_the_range_that_the_embedded_scene_was_made_with():
    bank, outputs = read(AutoDataParserConfig())
    truth = json.loads((scene_path() / "transforms.json").read_text())["shiftadd3d"]
    near, far = (depth / outputs.dataparser_scale for depth in found(near_far_from_matches(bank)))
    assert 0.8 * truth["near"] < near < 1.05 * truth["near"]
    assert 0.95 * truth["far"] < far < 1.2 * truth["far"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fern", "ethiopian_head"])
def test_matches_agree_with_the_bounds_of_real_llff_scenes(shared, name):
    bank, outputs = read(LLFFDataParserConfig(data=shared / "data/nvs" / name))
    near, far = found(near_far_from_matches(bank))
    expected_near, expected_far = near_far_from_bounds(outputs.metadata["bounds"])
    assert near == pytest.approx(expected_near, rel=0.1)
    assert far == pytest.approx(expected_far, rel=0.1)


@pytest.mark.slow
def test_matches_agree_with_the_sparse_points_of_a_real_colmap_scene(shared):
    bank, outputs = read(AutoDataParserConfig(data=shared / "data/nvs/chess_colmap"))
    expected = near_far_from_points(bank, outputs.metadata["points3D_xyz"])
    assert near_far_from_matches(bank) == pytest.approx(expected, rel=0.1)


@pytest.mark.slow
def test_the_range_of_the_real_fox_photos_spans_the_point_that_they_look_at(shared):
    bank, _ = read(AutoDataParserConfig(data=shared / "data/nvs/fox"))
    near, far = found(near_far_from_matches(bank))
    # The camera's axes meet at depths 1.0 to 1.7 (half the nearest and one and a half the farthest, undone).
    low, high = near_far_from_cameras(bank)
    assert near < 2.0 * low
    assert far > high / 1.5
    assert far / near < 10


@pytest.mark.slow
def test_the_range_of_a_synthetic_object_spans_all_of_it(shared):
    bank, outputs = read(AutoDataParserConfig(data=shared / "data/nvs/chair"))
    near, far = (depth / outputs.dataparser_scale for depth in found(near_far_from_matches(bank)))
    # Depths of the object's silhouette hull over the training cameras, carved from the alpha channels: 2.80 to 5.32.
    assert 2.0 < near < 2.80
    assert 5.32 < far < 6.5
