from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nerfstudio")

from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManager
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

from shiftadd3d import UserError
from shiftadd3d.nerf.datamanager import GNTDataManager, GNTDataManagerConfig
from shiftadd3d.nerf.dataparsers import AutoDataParserConfig

NEAR_FAR = {"shiftadd3d": {"near": 1.0, "far": 8.0}}


def manager(scene, test_mode="val", views=3, rays=64, **settings) -> GNTDataManager:
    config = GNTDataManagerConfig(
        data=scene,
        num_source_views=views,
        train_num_rays_per_batch=rays,
        eval_num_rays_per_batch=rays,
        **{"dataparser": AutoDataParserConfig(eval_mode="all"), **settings},
    )
    return config.setup(device="cpu", test_mode=test_mode)


def test_a_batch_is_the_rays_and_colours_of_one_view(write_scene, tmp_path):
    data = manager(write_scene["nerfstudio"](tmp_path))
    for step in range(4):
        rays, batch = data.next_train(step)
        assert rays.shape == (64,)
        view, row, column = batch["indices"].T
        assert (view == view[0]).all()
        assert rays.camera_indices is not None
        assert (rays.camera_indices[:, 0] == view).all()
        image = np.asarray(Image.open(data.train_dataset.image_filenames[view[0]]))
        np.testing.assert_allclose(batch["image"] * 255, image[row, column], atol=1e-4)
        # The ray leaves through the middle of its pixel.
        world_to_camera = torch.linalg.inv(data.source_bank.camera_to_world[view[0]])
        pixels = rays.directions @ world_to_camera[:3, :3].T @ data.source_bank.intrinsics[view[0]].T
        torch.testing.assert_close((pixels[:, :2] / pixels[:, 2:]).round().long(), torch.stack([column, row], dim=-1))


def test_rays_of_a_distorting_lens_start_from_the_photo_as_it_was_taken(write_scene, tmp_path):
    data = manager(write_scene["nerfstudio"](tmp_path, k1=-0.2))
    assert not data.source_bank.pristine
    rays, batch = data.next_train(0)
    view, row, column = batch["indices"].T
    image = np.asarray(Image.open(data.train_dataset.image_filenames[view[0]]))
    np.testing.assert_allclose(batch["image"] * 255, image[row, column], atol=1e-4)
    expected = data.train_dataset.cameras.generate_rays(camera_indices=int(view[0]))[row, column]
    torch.testing.assert_close(rays.directions, expected.directions.reshape(-1, 3))


def test_source_ids_are_the_nearest_views_without_the_target(write_scene, tmp_path):
    data = manager(write_scene["nerfstudio"](tmp_path))
    for step in range(8):
        rays, batch = data.next_train(step)
        target = int(batch["indices"][0, 0])
        sources = rays.metadata["source_ids"]
        assert sources.shape == (64, 3)
        assert (sources == sources[0]).all()
        assert target not in sources[0].tolist()
        expected = data.source_bank.nearest(data.source_bank.camera_to_world[target], 3, exclude=target)
        assert sources[0].tolist() == expected.tolist()
        assert rays[10:20].metadata["source_ids"].shape == (10, 3)  # the model renders chunk by chunk


def test_judged_views_are_no_targets_but_sources_still(write_scene, tmp_path):
    data = manager(write_scene["nerfstudio"](tmp_path, count=20), judged_views=2)
    assert data.judged == [5, 15]
    batches = [data.next_train(step) for step in range(40)]
    assert {int(batch["indices"][0, 0]) for _, batch in batches} == set(range(20)) - {5, 15}
    assert {5, 15} < {source for rays, _ in batches for source in rays.metadata["source_ids"][0].tolist()}
    first, second = data.judged_batches(), data.judged_batches()
    for view, (rays, batch), (_, again) in zip(data.judged, first, second, strict=True):
        assert (batch["indices"][:, 0] == view).all() and torch.equal(batch["indices"], again["indices"])
        assert view not in rays.metadata["source_ids"][0].tolist()
        image = np.asarray(Image.open(data.train_dataset.image_filenames[view]))
        np.testing.assert_allclose(batch["image"] * 255, image[tuple(batch["indices"][:, 1:].T)], atol=1e-4)


def test_no_more_than_an_eighth_of_the_views_is_judged(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path, count=20)
    assert len(manager(scene, judged_views=9).judged) == 2
    assert manager(scene, judged_views=1).judged == [10]
    assert manager(scene).judged == [] and manager(scene).judged_batches() == []
    with pytest.raises(UserError, match="judged-views -1: expected 0 or more"):
        manager(scene, judged_views=-1)


def test_a_frame_that_is_listed_twice_is_no_source_of_itself(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path)
    meta = json.loads((scene / "transforms.json").read_text())
    meta["frames"][1]["transform_matrix"] = meta["frames"][0]["transform_matrix"]
    (scene / "transforms.json").write_text(json.dumps(meta))
    data = manager(scene)
    for step in range(10):
        rays, batch = data.next_train(step)
        if int(batch["indices"][0, 0]) in (0, 1):
            assert not {0, 1} & set(rays.metadata["source_ids"][0].tolist())


def test_fisheye_rays_count_z_depth_and_one_goes_along_the_axis(write_scene, tmp_path):
    odd = {"size": (25, 17), "camera_model": "OPENCV_FISHEYE"}
    data = manager(write_scene["nerfstudio"](tmp_path, **odd, fl_x=20.0, fl_y=20.0), rays=5000)
    rays, batch = data.next_train(0)
    view, row, column = batch["indices"].T
    axis = data.source_bank.camera_to_world[view[0], :3, 2]
    middle = (row == 8) & (column == 12)
    assert middle.any()
    torch.testing.assert_close(rays.directions[middle], axis.expand(int(middle.sum()), 3))
    along = rays.directions * rays.metadata["directions_norm"]
    torch.testing.assert_close(along @ axis, torch.ones(5000))


def test_files_that_break_off_are_named(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path, masks=True)
    data = manager(scene, dataparser=AutoDataParserConfig())
    train, held_out = data.train_dataset.image_filenames[2], data.eval_dataset.image_filenames[0]
    for path in (train, held_out):
        path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(UserError, match=f"^{train} cannot be read .*; expected a whole image: copy it again") as caught:
        _ = data.source_bank
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"^{held_out} cannot be read"):
        next(iter(data.fixed_indices_eval_dataloader))
    (scene / "masks" / "003.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"masks/003.png cannot be read"):
        _ = data.train_dataset[[path.name for path in data.train_dataset.image_filenames].index("003.png")]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("train_num_rays_per_batch", 0), ("eval_num_rays_per_batch", -1), ("camera_res_scale_factor", 0.0)],
)
def test_settings_that_leave_nothing_are_refused(write_scene, tmp_path, setting, value):
    config = GNTDataManagerConfig(data=write_scene["nerfstudio"](tmp_path), num_source_views=3)
    setattr(config, setting, value)
    with pytest.raises(UserError, match=rf"{setting.replace('_', '-')} {value:g}: expected"):
        config.setup(device="cpu", test_mode="val")


def test_every_view_is_a_target_once_before_any_is_again(write_scene, tmp_path):
    data = manager(write_scene["nerfstudio"](tmp_path), rays=2)
    targets = [int(data.next_train(step)[1]["indices"][0, 0]) for step in range(20)]
    assert sorted(targets[:10]) == sorted(targets[10:]) == list(range(10))


def test_evaluation_rays_have_training_views_as_sources_but_never_their_own(write_scene, tmp_path):
    scene = write_scene["llff"](tmp_path, count=17)
    held_out = manager(scene, dataparser=AutoDataParserConfig())
    rays, batch = held_out.next_eval(0)
    assert rays.metadata["source_ids"].shape == (64, 3)
    assert len(held_out.eval_dataset) == 3
    everywhere = manager(scene)
    for step in range(17):
        rays, batch = everywhere.next_eval(step)
        assert int(batch["indices"][0, 0]) not in rays.metadata["source_ids"][0].tolist()


def test_only_pixels_inside_the_masks_are_drawn(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path, masks=True)
    Image.new("L", (24, 16)).save(scene / "masks/002.png")  # nothing to learn from this view
    data = manager(scene, rays=500)
    seen = torch.cat([data.next_train(step)[1]["indices"] for step in range(14)])
    rows, columns = seen[:, 1], seen[:, 2]
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 8, 6, 11)
    assert set(seen[:, 0].tolist()) == set(range(10)) - {2}


def test_masks_that_leave_nothing_are_refused(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path, masks=True)
    for mask in (scene / "masks").iterdir():
        Image.new("L", (24, 16)).save(mask)
    with pytest.raises(UserError, match="all 10 views are masked throughout; expected masks that are white"):
        manager(scene).next_train(0)


def test_too_few_training_views_for_the_source_views_are_refused(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path)
    manager(scene, views=9)
    with pytest.raises(UserError, match=r"10 training views; 10 source .*num-source-views 9 or fewer"):
        manager(scene, views=10)


@pytest.mark.parametrize("mode", ["test", "inference"])
def test_rendering_sees_the_test_split_at_the_size_trained_at(write_scene, tmp_path, mode):
    scene = write_scene["llff"](tmp_path, count=17)
    data = manager(scene, test_mode=mode, dataparser=AutoDataParserConfig())
    assert isinstance(data, VanillaDataManager)  # ns-render asserts it
    assert data.source_bank.images.shape == (14, 16, 24, 3)
    assert len(data.fixed_indices_eval_dataloader.image_indices) == 3
    camera, batch = data.next_eval_image(0)
    assert (int(camera.width), int(camera.height)) == (24, 16)
    assert batch["image"].shape == (16, 24, 3)
    spiral_start, _ = data.eval_dataloader.get_camera(image_idx=0)
    assert spiral_start.shape == (1,)
    assert data.train_pixel_sampler is not None  # ns-export sets its number of rays
    data.train_pixel_sampler.num_rays_per_batch = 5
    assert data.next_train(0)[0].shape == (5,)


def test_images_can_be_shrunk_while_they_are_read(write_scene, tmp_path):
    data = manager(write_scene["nerfstudio"](tmp_path), camera_res_scale_factor=0.5)
    assert data.source_bank.images.shape[1:3] == (8, 12)
    assert data.source_bank.intrinsics[0, 0, 0] == 10.0
    assert data.next_train(0)[1]["indices"][:, 1].max() < 8


def test_cameras_and_rays_are_float32_whatever_the_parser_gives(write_scene, tmp_path):
    data = manager(write_scene["blender"](tmp_path), dataparser=BlenderDataParserConfig())
    for cameras in (data.train_dataset.cameras, data.eval_dataset.cameras):
        assert cameras.fx.dtype == cameras.cx.dtype == cameras.camera_to_worlds.dtype == torch.float32
    rays, batch = data.next_train(0)
    assert rays.origins.dtype == rays.directions.dtype == batch["image"].dtype == torch.float32


def test_transparent_images_are_blended_for_sources_targets_and_metrics_alike(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path, mode="RGBA")
    data = manager(scene, dataparser=NerfstudioDataParserConfig())  # which has no background colour of its own
    rgba = np.asarray(Image.open(scene / "images/001.png")) / 255
    white = rgba[..., :3] * rgba[..., 3:] + (1 - rgba[..., 3:])
    np.testing.assert_allclose(data.source_bank.gather([1]).images[0], white, atol=0.51 / 255)
    assert data.next_train(0)[1]["image"].shape == (64, 3)
    assert data.next_eval_image(0)[1]["image"].shape == (16, 24, 3)


def test_scenes_of_nerfstudios_own_parsers_are_checked_too(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path)
    (scene / "images/003.png").unlink()
    with pytest.raises(UserError, match="1 of 9 images not found"):
        manager(scene, dataparser=NerfstudioDataParserConfig())


def test_the_depth_range_is_the_scenes_own_or_the_one_given(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path, **NEAR_FAR)
    data = manager(scene)
    scale = data.train_dataparser_outputs.dataparser_scale
    assert data.near_far == pytest.approx((1.0 * scale, 8.0 * scale))
    assert manager(scene, near=0.25, far=3.0).near_far == (0.25, 3.0)
    with pytest.raises(UserError, match="expected 0 < near < far"):
        _ = manager(scene, near=3.0, far=0.25).near_far


def test_the_source_bank_is_no_part_of_the_state_that_is_saved(write_scene, tmp_path):
    data = manager(write_scene["nerfstudio"](tmp_path))
    _ = data.source_bank
    data.next_train(0)
    assert data.state_dict() == {}
    assert list(data.parameters()) == []
