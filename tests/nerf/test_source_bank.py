from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nerfstudio")

from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.datasets.base_dataset import InputDataset

from shiftadd3d import UserError
from shiftadd3d.nerf.dataparsers import AutoDataParserConfig
from shiftadd3d.nerf.source_bank import SourceBank, camera_rays, distort, mend_fisheye_rays, opencv_cameras, undistort

PERSPECTIVE, FISHEYE = CameraType.PERSPECTIVE.value, CameraType.FISHEYE.value
BARREL = [-0.15, 0.02, 0.004, -0.003, 0.002, -0.001]
PINCUSHION = [0.1, 0.01, 0.0, 0.0, -0.001, 0.002]


def read_bank(config) -> SourceBank:
    return SourceBank.from_dataset(InputDataset(config.setup().get_dataparser_outputs("train")))


def a_camera(camera_type=CameraType.PERSPECTIVE, distortion=None, scale=1) -> Cameras:
    """A camera somewhere, turned somehow, with all intrinsics different, as float64 like those of Blender scenes."""
    rotation, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))
    rotation *= np.sign(np.linalg.det(rotation))
    pose = np.concatenate([rotation, [[0.3], [-1.2], [2.5]]], axis=1)
    return Cameras(
        camera_to_worlds=torch.from_numpy(pose)[None].float(),
        fx=torch.tensor([50.0 * scale], dtype=torch.float64),
        fy=torch.tensor([47.0 * scale], dtype=torch.float64),
        cx=torch.tensor([31.2 * scale], dtype=torch.float64),
        cy=torch.tensor([18.7 * scale], dtype=torch.float64),
        width=60 * scale,
        height=40 * scale,
        distortion_params=None if distortion is None else torch.tensor([distortion]),
        camera_type=camera_type,
    )


def bank_at(poses_opengl: np.ndarray) -> SourceBank:
    """A bank of blank images at these poses."""
    count = len(poses_opengl)
    poses = torch.from_numpy(poses_opengl).float() @ torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))
    blank = torch.zeros(count, 2, 2, 3, dtype=torch.uint8)
    return SourceBank(blank, None, torch.eye(3).repeat(count, 1, 1), poses)


# Cameras


def test_a_point_on_a_nerfstudio_ray_projects_onto_the_pixel_that_the_ray_came_from():
    cameras = a_camera()
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(60), indexing="ij")
    pixels = torch.stack([rows, columns], dim=-1).reshape(-1, 2)
    rays = cameras.generate_rays(camera_indices=torch.zeros(len(pixels), 1, dtype=torch.long), coords=pixels + 0.5)
    depth = 1.0 + 5.0 * torch.rand(len(pixels), 1)
    points = rays.origins + rays.directions * depth * rays.metadata["directions_norm"]

    intrinsics, camera_to_world = opencv_cameras(cameras)
    assert intrinsics.dtype == camera_to_world.dtype == torch.float32
    inverse = torch.linalg.inv(camera_to_world[0])
    camera = points.float() @ inverse[:3, :3].T + inverse[:3, 3]
    torch.testing.assert_close(camera[:, 2:], depth, atol=1e-4, rtol=0)  # z-depth, and ahead is positive
    projected = camera @ intrinsics[0].T
    torch.testing.assert_close(projected[:, :2] / projected[:, 2:], pixels.flip(-1).float(), atol=2e-3, rtol=0)


def test_one_camera_without_a_batch_dimension_is_a_batch_of_one():
    intrinsics, camera_to_world = opencv_cameras(a_camera()[0])
    assert intrinsics.shape == (1, 3, 3)
    assert camera_to_world.shape == (1, 4, 4)


# Lens distortion


@pytest.mark.parametrize("camera_type", [CameraType.PERSPECTIVE, CameraType.FISHEYE])
def test_distortion_is_the_inverse_of_what_nerfstudio_does_to_its_rays(camera_type):
    cameras = a_camera(camera_type, BARREL)
    pixels = torch.stack(torch.meshgrid(torch.arange(40), torch.arange(60), indexing="ij"), dim=-1).reshape(-1, 2)
    rays = cameras.generate_rays(camera_indices=torch.zeros(len(pixels), 1, dtype=torch.long), coords=pixels + 0.5)
    intrinsics, camera_to_world = opencv_cameras(cameras)
    directions = (rays.directions.float() @ camera_to_world[0, :3, :3]).double().numpy()
    k = intrinsics[0].double().numpy()
    distorted = distort(directions[:, :2] / directions[:, 2:], np.array(BARREL), camera_type.value)
    np.testing.assert_allclose(distorted @ k[:2, :2].T + k[:2, 2], pixels.numpy()[:, ::-1], atol=2e-2)


def test_distortion_is_opencvs_where_opencv_has_the_model():
    xy = np.random.default_rng(0).uniform(-0.6, 0.6, (50, 2))
    points = np.concatenate([xy, np.ones((50, 1))], axis=1)
    k1, k2, k3, k4, p1, p2 = BARREL
    zero, eye = np.zeros(3), np.eye(3)
    expected, _ = cv2.projectPoints(points, zero, zero, eye, np.array([k1, k2, p1, p2, k3]))
    np.testing.assert_allclose(distort(xy, np.array([k1, k2, k3, 0, p1, p2]), PERSPECTIVE), expected[:, 0], atol=1e-12)
    expected = cv2.fisheye.distortPoints(xy[None], eye, np.array([k1, k2, k3, k4]))[0]
    np.testing.assert_allclose(distort(xy, np.array([k1, k2, k3, k4, 0, 0]), FISHEYE), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("camera_type", "distortion", "least_seen", "most_seen"),
    [
        (CameraType.PERSPECTIVE, BARREL, 0.95, 1.0),
        (CameraType.PERSPECTIVE, PINCUSHION, 0.5, 0.95),
        (CameraType.FISHEYE, BARREL, 0.95, 1.0),
    ],
)
def test_undistorted_images_show_what_a_pinhole_camera_would_see(camera_type, distortion, least_seen, most_seen):
    def paint(xy):
        """A smooth pattern on the plane z = 1."""
        waves = [np.sin(7 * xy[..., 0]), np.cos(6 * xy[..., 1]), np.sin(5 * (xy[..., 0] + xy[..., 1]))]
        return 127.5 + 120.0 * np.stack(waves, axis=-1)

    cameras = a_camera(camera_type, distortion, scale=3)
    rays = cameras.generate_rays(camera_indices=0)
    intrinsics, camera_to_world = opencv_cameras(cameras)
    seen = (rays.directions.float() @ camera_to_world[0, :3, :3]).numpy()
    photo = paint(seen[..., :2] / seen[..., 2:]).round().astype(np.uint8)

    k = intrinsics[0].numpy()
    image, valid = undistort(photo, k, np.array(distortion), camera_type.value)
    pixels = np.stack(np.meshgrid(np.arange(180), np.arange(120)), axis=-1)
    expected = paint((pixels - k[:2, 2]) / k[[0, 1], [0, 1]])
    assert least_seen < valid.mean() <= most_seen
    assert np.abs(image - expected)[valid].mean() < 1.0
    assert np.abs(image - expected)[valid].max() < 6.0
    assert (image[~valid] == 0).all()


def test_cameras_without_a_pinhole_equivalent_are_refused(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path, camera_model="EQUIRECTANGULAR")
    with pytest.raises(UserError, match="EQUIRECTANGULAR cannot be a source view"):
        read_bank(NerfstudioDataParserConfig(data=scene))


def test_features_of_real_distorted_photos_obey_the_epipolar_geometry_of_the_sources(shared):
    bank = read_bank(AutoDataParserConfig(data=shared / "data/nvs/fox"))
    assert bank.valid is not None
    assert not bank.pristine
    sift, matcher = cv2.SIFT.create(nfeatures=1500), cv2.BFMatcher(cv2.NORM_L2, crossCheck=False)
    everywhere = np.ones((480, 270), dtype=np.uint8)
    close = total = 0
    for a in range(0, 40, 8):
        b = int(bank.nearest(bank.camera_to_world[a], 2, exclude=a)[1])
        (points_a, found_a), (points_b, found_b) = (
            sift.detectAndCompute(cv2.cvtColor(bank.images[view].numpy(), cv2.COLOR_RGB2GRAY), everywhere)
            for view in (a, b)
        )
        matches = [m for m, n in matcher.knnMatch(found_a, found_b, k=2) if m.distance < 0.75 * n.distance]
        left = np.array([[*points_a[m.queryIdx].pt, 1.0] for m in matches])
        right = np.array([[*points_b[m.trainIdx].pt, 1.0] for m in matches])
        a_to_b = torch.linalg.inv(bank.camera_to_world[b].double()) @ bank.camera_to_world[a].double()
        x, y, z = a_to_b[:3, 3].tolist()
        essential = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ a_to_b[:3, :3].numpy()
        inverse_a, inverse_b = (np.linalg.inv(bank.intrinsics[view].double().numpy()) for view in (a, b))
        lines = left @ (inverse_b.T @ essential @ inverse_a).T
        distance = np.abs((lines * right).sum(axis=1)) / np.linalg.norm(lines[:, :2], axis=1)
        close += int((distance < 1.5).sum())
        total += len(matches)
    assert total > 500
    assert close / total > 0.9


# Images


def test_transparent_pixels_show_the_background(write_scene, tmp_path):
    scene = write_scene["blender"](tmp_path)
    rgba = np.asarray(Image.open(scene / "train/r_2.png")).astype(np.float64)
    alpha = rgba[..., 3:] / 255
    for colour, value in (("white", 255), ("black", 0)):
        bank = read_bank(BlenderDataParserConfig(data=scene, alpha_color=colour))
        np.testing.assert_allclose(bank.images[2].numpy(), rgba[..., :3] * alpha + value * (1 - alpha), atol=0.51)
    outputs = BlenderDataParserConfig(data=scene, alpha_color=None).setup().get_dataparser_outputs("train")
    bank = SourceBank.from_dataset(InputDataset(outputs), background=torch.tensor([0.0, 0.0, 1.0]))
    expected = rgba[..., :3] * alpha + np.array([0, 0, 255]) * (1 - alpha)
    np.testing.assert_allclose(bank.images[2].numpy(), expected, atol=0.51)


def test_images_of_a_plain_camera_are_kept_to_the_byte(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path)
    bank = read_bank(NerfstudioDataParserConfig(data=scene))
    assert bank.pristine
    assert bank.valid is None
    for image, path in zip(bank.images, bank.image_paths, strict=True):
        np.testing.assert_array_equal(image.numpy(), np.asarray(Image.open(path)))


def test_images_of_different_sizes_are_padded_at_the_bottom_and_right(write_scene, tmp_path):
    scene = write_scene["colmap"](tmp_path)
    small = Image.open(scene / "images/photo003.png").crop((0, 0, 20, 13))
    small.save(scene / "images/photo003.png")
    cameras = scene / "sparse/0/cameras.txt"
    cameras.write_text(cameras.read_text() + "2 PINHOLE 20 13 20 20 12 8\n")
    images = scene / "sparse/0/images.txt"
    images.write_text(images.read_text().replace("1 photo003.png", "2 photo003.png"))
    bank = read_bank(AutoDataParserConfig(data=scene))
    view = [path.name for path in bank.image_paths].index("photo003.png")
    assert bank.images.shape[1:3] == (16, 24)
    np.testing.assert_array_equal(bank.images[view, :13, :20].numpy(), np.asarray(small))
    assert bank.valid is not None
    assert bank.valid[view, :13, :20].all()
    assert bank.valid[view].sum() == 13 * 20
    assert bank.valid.sum() == 13 * 20 + (len(bank) - 1) * 16 * 24
    torch.testing.assert_close(bank.intrinsics[view], bank.intrinsics[0])  # both have cx 12, cy 8
    assert not bank.pristine


def test_masked_pixels_are_not_valid(write_scene, tmp_path):
    bank = read_bank(NerfstudioDataParserConfig(data=write_scene["nerfstudio"](tmp_path, masks=True)))
    assert bank.valid is not None
    assert bank.valid[0].nonzero().min(0).values.tolist() == [4, 6]
    assert bank.valid[0].nonzero().max(0).values.tolist() == [8, 11]


def test_gathered_views_are_floats_in_the_order_asked_for(write_scene, tmp_path):
    bank = read_bank(NerfstudioDataParserConfig(data=write_scene["nerfstudio"](tmp_path, masks=True)))
    views = bank.gather(torch.tensor([3, 1]))
    assert views.images.dtype == torch.float32
    torch.testing.assert_close(views.images * 255, bank.images[[3, 1]].float())
    assert views.valid is not None
    assert views.valid.shape == (2, 16, 24)
    torch.testing.assert_close(views.camera_to_world, bank.camera_to_world[[3, 1]])
    torch.testing.assert_close(views.intrinsics, bank.intrinsics[[3, 1]])


# The nearest views


def test_nearest_views_on_an_orbit_are_the_neighbours(orbit_poses):
    bank = bank_at(orbit_poses(12))
    nearest = bank.nearest(bank.camera_to_world[5], 4, exclude=5).tolist()
    assert sorted(nearest[:2]) == [4, 6]
    assert sorted(nearest[2:]) == [3, 7]


def test_nearest_views_of_cameras_that_look_ahead_are_the_closest():
    poses = np.tile(np.eye(4), (9, 1, 1))
    poses[:, 0, 3] = np.arange(9)
    bank = bank_at(poses)
    target = bank.camera_to_world[4].clone()
    target[0, 3] += 0.1
    assert bank.nearest(target, 3).tolist() == [4, 5, 3]


def test_a_view_that_looks_the_other_way_is_not_near(orbit_poses):
    poses = orbit_poses(12)
    turned = poses[5] @ np.diag([-1.0, 1.0, -1.0, 1.0])
    bank = bank_at(np.concatenate([poses, turned[None]]))
    assert 12 not in bank.nearest(bank.camera_to_world[5], 6, exclude=5).tolist()


def test_the_target_is_left_out_by_its_id_or_by_its_pose(orbit_poses):
    bank = bank_at(np.concatenate([orbit_poses(12), orbit_poses(12)[5:6]]))
    target = bank.camera_to_world[5]
    assert set(bank.nearest(target, 2).tolist()) == {5, 12}
    assert 5 not in bank.nearest(target, 12, exclude=5).tolist()
    assert not {5, 12} & set(bank.nearest(target, 11, exclude_same_pose=True).tolist())
    assert not {4, 6} & set(bank.nearest(target, 11, exclude=[4, 6]).tolist())


def test_more_views_than_there_are_is_an_error(orbit_poses):
    bank = bank_at(orbit_poses(5))
    with pytest.raises(UserError, match="5 source views asked for, 4 to choose from"):
        bank.nearest(bank.camera_to_world[0], 5, exclude=0)


def test_spare_views_vary_the_choice_but_keep_the_order(orbit_poses):
    bank = bank_at(orbit_poses(24, height=0.3))
    target = bank.camera_to_world[7]
    ranking = bank.nearest(target, 23, exclude=7).tolist()
    torch.manual_seed(0)
    choices = [bank.nearest(target, 4, exclude=7, spare=4).tolist() for _ in range(50)]
    assert {view for choice in choices for view in choice} == set(ranking[:8])
    assert all(sorted(choice, key=ranking.index) == choice for choice in choices)
    assert len({tuple(choice) for choice in choices}) > 10
    assert bank.nearest(target, 4, exclude=7).tolist() == ranking[:4]


@pytest.mark.parametrize("kind", [CameraType.PERSPECTIVE, CameraType.FISHEYE, CameraType.EQUIRECTANGULAR])
@pytest.mark.parametrize("distortion", [None, 0.1])
def test_a_pictures_rays_are_those_that_nerfstudio_makes(kind: CameraType, distortion: float | None):
    pose = torch.eye(4)[:3]
    pose[:, :3] = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0))).Q
    pose[:, 3] = torch.tensor([1.0, -2.0, 3.0])
    lens = None if distortion is None else torch.tensor([[distortion, 0.0, 0.0, 0.0, 0.0, 0.0]])
    sizes = {"width": 11, "height": 7, "camera_type": kind, "distortion_params": lens}
    camera = Cameras(pose[None], fx=9.0, fy=8.0, cx=5.0, cy=3.0, **sizes)
    found, expected = camera_rays(camera), camera.generate_rays(camera_indices=0, keep_shape=True)
    mend_fisheye_rays(expected, camera)
    assert found.shape == expected.shape == (7, 11)
    for name in ("origins", "directions"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), atol=1e-6)
    lengths = found.metadata["directions_norm"], expected.metadata["directions_norm"]
    assert torch.allclose(*lengths, atol=1e-6)
