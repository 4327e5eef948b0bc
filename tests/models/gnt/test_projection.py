"""Cameras, and what source views show at points."""

import numpy as np
import pytest
import torch

from shiftadd3d import UserError
from shiftadd3d.models.gnt.projection import (
    Cameras,
    Silhouettes,
    SourceViews,
    empty_views,
    project_points,
    ray_differences,
    sample_sources,
)


def pixel_grid(width: int, height: int) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(width), torch.arange(height)).float()


def test_a_point_on_a_pixels_ray_projects_onto_that_pixel(cameras):
    batch = cameras(3)
    pixels = torch.rand(50, 2) * 30
    depths = torch.rand(50) * 5 + 0.5
    for view in range(3):
        origins, directions = Cameras(batch.intrinsics[view], batch.camera_to_world[view]).rays(pixels)
        points = origins + depths[:, None] * directions
        seen, z = project_points(points[None], batch)
        torch.testing.assert_close(seen[view, 0], pixels, atol=1e-3, rtol=0)
        torch.testing.assert_close(z[view, 0], depths, atol=1e-5, rtol=0)  # rays count z depth


def test_the_z_axis_looks_forward_and_y_down():
    camera = Cameras(torch.tensor([[10.0, 0, 4], [0, 10, 3], [0, 0, 1]])[None], torch.eye(4)[None])
    pixels, z = project_points(torch.tensor([[[0.0, 0, 2], [1, 0, 2], [0, 1, 2], [0, 0, -2]]]), camera)
    torch.testing.assert_close(pixels[0, 0, :3], torch.tensor([[4.0, 3], [9, 3], [4, 8]]))
    assert z[0, 0].tolist() == [2, 2, 2, -2]


def looking_ahead(width: int, height: int, valid: torch.Tensor | None = None) -> SourceViews:
    """One view from the origin along z, whose red is its pixel's x and green its y."""
    xy = pixel_grid(width, height).reshape(width, height, 2).transpose(0, 1)
    image = torch.cat([xy, torch.zeros(height, width, 1)], dim=-1)[None]
    intrinsics = torch.tensor([[20.0, 0, (width - 1) / 2], [0, 20.0, (height - 1) / 2], [0, 0, 1]])[None]
    features = torch.zeros(1, 4, (height + 3) // 4, (width + 3) // 4)
    return SourceViews(image, Cameras(intrinsics, torch.eye(4)[None]), (features, features), valid)


def look(views: SourceViews, pixels: torch.Tensor, depth: float = 2.0):
    origins, directions = Cameras(views.cameras.intrinsics[0], views.cameras.camera_to_world[0]).rays(pixels)
    points = origins + depth * directions
    return sample_sources(points[:, None], origins - 1.0, views, views.features[0])


@pytest.mark.parametrize(("width", "height"), [(8, 6), (7, 5), (33, 41)])
def test_every_pixel_shows_its_own_colour_at_any_image_size(width, height):
    pixels = pixel_grid(width, height)
    # Not exactly on the border, where rounding decides whether a pixel is still inside.
    inner = pixels[(pixels > 0).all(-1) & (pixels[:, 0] < width - 1) & (pixels[:, 1] < height - 1)]
    samples = look(looking_ahead(width, height), inner)
    assert samples.rgb.shape == (len(inner), 1, 1, 3)
    assert samples.features.shape == (len(inner), 1, 1, 4)
    torch.testing.assert_close(samples.rgb[:, 0, 0, :2], inner, atol=2e-4, rtol=0)
    assert bool(samples.mask.all())


def test_features_span_the_same_picture_as_the_image():
    views = looking_ahead(9, 9)
    ramp = torch.linspace(0, 8, 3).expand(1, 1, 3, 3)
    views.features = (ramp, ramp)
    samples = look(views, torch.tensor([[2.0, 4.0], [6.5, 4.0]]))
    torch.testing.assert_close(samples.features.flatten(), torch.tensor([2.0, 6.5]), atol=1e-4, rtol=0)


def test_what_is_outside_the_picture_or_behind_is_not_seen():
    views = looking_ahead(8, 6)
    pixels = torch.tensor([[3.0, 2], [-0.6, 2], [7.6, 2], [3, -0.6], [3, 5.6]])
    assert look(views, pixels).mask.flatten().tolist() == [True, False, False, False, False]
    behind = look(views, pixels[:1], depth=-2.0)
    assert not behind.mask.any()
    at_the_camera = sample_sources(torch.zeros(1, 1, 3), torch.ones(1, 3), views, views.features[0])
    assert not at_the_camera.mask.any()
    for samples in (behind, at_the_camera):
        assert all(bool(torch.isfinite(x).all()) for x in (samples.rgb, samples.features, samples.ray_diff))


def test_a_pixel_counts_as_seen_only_if_all_its_neighbours_are_valid():
    valid = torch.ones(1, 6, 8, dtype=torch.bool)
    valid[0, 2, 3] = False
    views = looking_ahead(8, 6, valid)
    pixels = torch.tensor([[3.0, 2.0], [2.5, 2.0], [3.0, 2.5], [1.9, 2.0], [4.1, 3.1]])
    assert look(views, pixels).mask.flatten().tolist() == [False, False, False, True, True]


def test_ray_differences_are_a_unit_direction_and_a_cosine():
    points = torch.tensor([[[0.0, 0, 0]]])
    target = torch.tensor([[0.0, 0, -2]])
    sources = torch.tensor([[0.0, 0, -5], [3.0, 0, 0], [0, 0, 1]])
    difference = ray_differences(points, target, sources)[0, 0]
    torch.testing.assert_close(difference[:, 3], torch.tensor([1.0, 0.0, -1.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(difference[1, :3], torch.tensor([-1.0, 0, -1.0]) / 2**0.5)
    torch.testing.assert_close(difference[2, :3], torch.tensor([0.0, 0, -1.0]))


def test_a_four_by_four_intrinsic_matrix_is_its_upper_left_part():
    k = np.array([[50.0, 0, 20], [0, 50, 15], [0, 0, 1]])
    padded = np.eye(4)
    padded[:3, :3] = k
    camera = Cameras.of({"intrinsics": padded, "camera_to_world": np.eye(4)})
    assert camera.intrinsics.dtype == torch.float32
    np.testing.assert_array_equal(camera.intrinsics.numpy(), k)


def test_cameras_pass_through_unchanged(cameras):
    batch = cameras(2)
    assert Cameras.of(batch) is batch


EYE3, EYE4 = np.eye(3), np.eye(4)


@pytest.mark.parametrize(
    ("camera", "complaint"),
    [
        ({"intrinsics": EYE3}, "camera_to_world"),
        (None, "mapping"),
        ([1, 2], "mapping"),
        ({"intrinsics": np.eye(2), "camera_to_world": EYE4}, "intrinsics must be"),
        ({"intrinsics": 50.0, "camera_to_world": EYE4}, "intrinsics must be"),
        ({"intrinsics": EYE3, "camera_to_world": EYE4[:3]}, "camera_to_world must be"),
        ({"intrinsics": EYE3 * np.nan, "camera_to_world": EYE4}, "finite"),
        ({"intrinsics": EYE3, "camera_to_world": np.full((4, 4), np.inf)}, "finite"),
        ({"intrinsics": "wide", "camera_to_world": EYE4}, "numbers"),
        ({"intrinsics": [[1, 2], [3]], "camera_to_world": EYE4}, "numbers"),
        ({"intrinsics": EYE3 * 0, "camera_to_world": EYE4}, "invertible"),
        ({"intrinsics": EYE3, "camera_to_world": EYE4 * 0}, "invertible"),
    ],
)
def test_a_bad_camera_is_refused_by_name(camera, complaint):
    with pytest.raises(UserError, match=rf"target_camera.*{complaint}"):
        Cameras.of(camera, "target_camera")


def test_views_say_that_a_point_is_empty_where_all_around_it_is():
    views = looking_ahead(8, 6)
    views.empty = torch.zeros(1, 6, 8, dtype=torch.bool)
    views.empty[0, 1:4, 2:5] = True
    pixels = torch.tensor([[3.0, 2], [2.5, 1.5], [4.6, 2], [6, 2], [-3, 2], [3, 90]])
    origins, directions = Cameras(views.cameras.intrinsics[0], views.cameras.camera_to_world[0]).rays(pixels)
    ahead, behind = origins + 2.0 * directions, origins - 2.0 * directions
    assert empty_views(ahead[:, None], views)[:, 0].tolist() == [1, 1, 0, 0, 0, 0]
    assert empty_views(behind[:, None], views).sum() == 0
    twice = Cameras(*(matrix.repeat(2, 1, 1) for matrix in (views.cameras.intrinsics, views.cameras.camera_to_world)))
    views.silhouettes = Silhouettes(twice, views.empty.repeat(2, 1, 1))
    assert empty_views(ahead[:, None], views)[:, 0].tolist() == [2, 2, 0, 0, 0, 0]
