from __future__ import annotations

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nerfstudio")

from shiftadd3d import UserError
from shiftadd3d.nerf.dataparsers import AutoDataParserConfig, LLFFDataParserConfig, check_outputs, find_scene
from shiftadd3d.scenes import scene_path


def parse(data, split="train", **settings):
    return AutoDataParserConfig(data=data, **settings).setup().get_dataparser_outputs(split)


def parse_llff(data, split="train", **settings):
    return LLFFDataParserConfig(data=data, **settings).setup().get_dataparser_outputs(split)


def edit_transforms(folder, change):
    path = folder / "transforms.json"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


def refused(function, *args, **kwargs) -> str:
    """The message of the UserError that the call ends in, which is one line."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# LLFF


def test_llff_cameras_are_those_of_the_same_scene_in_nerfstudio_form(shared):
    scene = shared / "data/nvs/fern"
    meta = json.loads((scene / "transforms.json").read_text())
    expected = {frame["file_path"].split("/")[-1]: np.array(frame["transform_matrix"]) for frame in meta["frames"]}
    outputs = parse_llff(scene, eval_mode="all")
    original = outputs.transform_poses_to_original_space(outputs.cameras.camera_to_worlds, camera_convention="opengl")
    assert len(original) == 20
    for path, pose in zip(outputs.image_filenames, original.numpy(), strict=True):
        np.testing.assert_allclose(pose, expected[path.name][:3], atol=2e-5)
    cameras = outputs.cameras
    torch.testing.assert_close(cameras.fx, torch.full((20, 1), meta["fl_x"]))
    assert (cameras.width == 504).all() and (cameras.height == 378).all()
    assert (cameras.cx == 252).all() and (cameras.cy == 189).all()


def test_llff_bounds_are_scaled_like_the_poses(shared):
    scene = shared / "data/nvs/fern"
    outputs = parse_llff(scene, eval_mode="all")
    rows = np.load(scene / "poses_bounds.npy")
    np.testing.assert_allclose(outputs.metadata["bounds"] / outputs.dataparser_scale, rows[:, 15:], rtol=1e-5)
    spread = np.linalg.norm(rows[0, :15].reshape(3, 5)[:, 3] - rows[-1, :15].reshape(3, 5)[:, 3])
    centres = outputs.cameras.camera_to_worlds[:, :, 3]
    assert float((centres[0] - centres[-1]).norm()) == pytest.approx(spread * outputs.dataparser_scale, rel=1e-4)
    assert float(centres.abs().max()) == pytest.approx(1.0)


def test_llff_holds_out_every_eighth_view_by_default(write_scene, tmp_path):
    scene = write_scene["llff"](tmp_path, count=17)
    assert [path.stem[-3:] for path in parse_llff(scene, "test").image_filenames] == ["000", "008", "016"]
    assert len(parse_llff(scene, "train").image_filenames) == 14
    halves = {"eval_mode": "fraction", "train_split_fraction": 0.5}
    assert len(parse_llff(scene, "test", **halves).image_filenames) == 8


def test_llff_finds_masks_of_the_images_size(shared):
    outputs = parse_llff(shared / "data/nvs/ethiopian_head")
    assert outputs.mask_filenames is not None
    assert outputs.image_filenames[3].stem == outputs.mask_filenames[3].stem
    assert outputs.mask_filenames[3].parent.name == "masks_8"


def test_llff_reads_the_largest_images_of_at_most_1600_pixels(write_scene, tmp_path):
    scene = write_scene["llff"](tmp_path, factor=200)  # full size 4800 x 3200
    for factor in (2, 4):
        for image in (scene / "images_200").iterdir():
            target = scene / f"images_{factor}" / image.name
            target.parent.mkdir(exist_ok=True)
            Image.new("RGB", (4800 // factor, 3200 // factor)).save(target)
    outputs = parse_llff(scene)
    assert outputs.image_filenames[0].parent.name == "images_4"
    assert int(outputs.cameras.width[0]) == 1200
    assert float(outputs.cameras.fx[0]) == pytest.approx(20.0 * 200 / 4)
    assert parse_llff(scene, downscale_factor=200).image_filenames[0].parent.name == "images_200"
    assert "expected one of: 2, 4, 200" in refused(parse_llff, scene, downscale_factor=8)


def test_llff_images_of_another_number_than_the_poses_are_refused(write_scene, tmp_path):
    scene = write_scene["llff"](tmp_path)
    (scene / "images_4/image003.png").unlink()
    assert "9 poses, but there are 8 in images_4" in refused(parse_llff, scene)


def test_llff_files_that_are_not_poses_and_bounds_are_refused(write_scene, tmp_path):
    scene = write_scene["llff"](tmp_path)
    rows = np.load(scene / "poses_bounds.npy")
    np.save(scene / "poses_bounds.npy", rows[:, :15])
    assert "shape [9, 15]" in refused(parse_llff, scene)
    np.save(scene / "poses_bounds.npy", np.concatenate([rows[:, :15], rows[:, [16, 15]]], axis=1))
    assert "0 < near < far" in refused(parse_llff, scene)
    rows[2, 3] = np.nan
    np.save(scene / "poses_bounds.npy", rows)
    assert "NaN" in refused(parse_llff, scene)
    (scene / "poses_bounds.npy").write_text("no numbers here")
    assert "cannot be read" in refused(parse_llff, scene)


# Any scene


@pytest.mark.parametrize(
    ("name", "kind", "views", "size"),
    [
        ("fox", "nerfstudio", 45, (270, 480)),
        ("fern", "nerfstudio", 18, (504, 378)),
        ("ethiopian_head", "nerfstudio", 60, (500, 500)),
        ("chess_colmap", "colmap", 20, (500, 328)),
        ("chair", "blender", 100, (400, 400)),
    ],
)
def test_real_scenes_of_every_kind_are_recognised(shared, name, kind, views, size):
    scene = shared / "data/nvs" / name
    assert find_scene(scene) == (kind, scene)
    outputs = parse(scene)
    assert len(outputs.image_filenames) == views
    assert (int(outputs.cameras.width[0]), int(outputs.cameras.height[0])) == size
    assert len(parse(scene, "test").image_filenames) > 0


def test_the_default_scene_is_the_embedded_one_and_brings_its_depth_range():
    config = AutoDataParserConfig()
    assert config.data == scene_path()
    outputs = config.setup().get_dataparser_outputs("train")
    hint = json.loads((scene_path() / "transforms.json").read_text())["shiftadd3d"]
    expected = (hint["near"] * outputs.dataparser_scale, hint["far"] * outputs.dataparser_scale)
    assert outputs.metadata["near_far"] == pytest.approx(expected)


def test_depth_range_in_the_camera_file_is_in_units_of_its_matrices(write_scene, tmp_path):
    hint = {"near": 2.0, "far": 6.0}
    scene = write_scene["nerfstudio"](tmp_path, applied_scale=10.0, shiftadd3d=hint)
    outputs = parse(scene)
    radius = float(outputs.cameras.camera_to_worlds[0, :2, 3].norm())  # 4 in the file
    assert outputs.metadata["near_far"] == pytest.approx((2.0 * radius / 4.0, 6.0 * radius / 4.0), rel=1e-4)
    edit_transforms(scene, lambda meta: meta["shiftadd3d"].update(near=7.0))
    assert "near 7.0, far 6.0" in refused(parse, scene)


def test_a_camera_file_stands_for_its_folder(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path)
    assert len(parse(scene / "transforms.json").image_filenames) == len(parse(scene).image_filenames) == 9


def test_transparent_pixels_get_a_background_in_every_format(write_scene, tmp_path):
    assert parse(write_scene["nerfstudio"](tmp_path, mode="RGBA")).alpha_color.tolist() == [1.0, 1.0, 1.0]
    assert parse(tmp_path, alpha_color="black").alpha_color.tolist() == [0.0, 0.0, 0.0]


def test_val_and_test_stand_in_for_each_other(write_scene, tmp_path):
    blender = write_scene["blender"](tmp_path / "blender", splits=("train", "test"))
    assert parse(blender, "val").image_filenames == parse(blender, "test").image_filenames
    names = [f"images/{index:03d}.png" for index in range(10)]
    listed = write_scene["nerfstudio"](tmp_path / "listed", train_filenames=names[:6], test_filenames=names[6:])
    assert [path.name for path in parse(listed, "val").image_filenames] == ["006.png", "007.png", "008.png", "009.png"]


def test_large_colmap_photos_without_smaller_copies_are_read_without_a_question(write_scene, tmp_path, monkeypatch):
    def ask(*args, **kwargs):
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr("rich.prompt.Confirm.ask", ask)
    scene = write_scene["colmap"](tmp_path, size=(1700, 20))
    outputs = parse(scene)
    assert int(outputs.cameras.width[0]) == 1700
    assert len(outputs.image_filenames) == 7  # 9 but for every 8th
    assert "expected one of: 1" in refused(parse, scene, downscale_factor=2)


def test_colmap_photos_that_exist_only_downscaled_are_read(write_scene, tmp_path):
    outputs = parse(write_scene["colmap"](tmp_path, factor=100))
    assert outputs.image_filenames[0].parent.name == "images_100"
    assert (int(outputs.cameras.width[0]), float(outputs.cameras.fx[0])) == (24, 20.0)


def test_image_sizes_may_differ_from_the_cameras_by_the_rounding_of_a_downscale_factor(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path, w=49, h=33, fl_x=40.0, fl_y=40.0, cx=24.5, cy=16.5)
    shutil.copytree(scene / "images", scene / "images_2")
    for image in (scene / "images_2").iterdir():
        Image.new("RGB", (25, 17)).save(image)
    cameras = parse(scene, downscale_factor=2).cameras
    assert (cameras.width == 25).all() and (cameras.height == 17).all()


def test_an_llff_folder_that_keeps_a_colmap_model_of_other_file_names_is_llff(write_scene, tmp_path):
    write_scene["llff"](tmp_path)
    write_scene["colmap"](tmp_path, prefix="IMG_")
    assert find_scene(tmp_path)[0] == "llff"
    shutil.rmtree(tmp_path / "images_4")
    assert find_scene(tmp_path)[0] == "colmap"


def test_folders_that_hold_no_scene_are_refused_with_what_would_be_accepted(tmp_path):
    for data in (tmp_path, tmp_path / "nowhere"):
        message = refused(parse, data)
        assert str(data) in message
        for name in ("transforms.json", "transforms_train.json", "sparse/0", "poses_bounds.npy"):
            assert name in message


def test_missing_images_are_counted_and_named(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path)
    for index in (0, 2, 3, 4, 5):
        (scene / f"images/{index:03d}.png").unlink()
    message = refused(parse, scene)
    assert "5 of 10 images not found" in message
    assert "000.png" in message
    assert "and 2 more" in message


def test_unreadable_images_are_named(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path)
    (scene / "images/003.png").write_bytes(b"not a picture")
    message = refused(parse, scene)
    assert "1 of 9 images cannot be read" in message
    assert "003.png" in message
    (scene / "images/000.png").write_bytes(b"")  # the one that nerfstudio opens for its size
    assert "2 of 10 images cannot be read" in refused(parse, scene)


def test_pixel_formats_that_would_be_misread_are_refused(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path)
    Image.new("LAB", (24, 16)).save(scene / "images/003.png", format="TIFF")
    assert "003.png is LAB); expected one of: black and white, 8-bit grey" in refused(parse, scene)


def test_images_of_another_size_than_the_cameras_are_refused(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path)
    Image.new("RGB", (23, 16)).save(scene / "images/003.png")
    message = refused(parse, scene)
    assert "1 of 9 images" in message
    assert "is 23x16, its camera 24x16" in message


def test_masks_of_another_size_than_the_images_are_refused(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path, masks=True)
    Image.new("L", (12, 8)).save(scene / "masks/003.png")
    assert "is 12x8, its image 24x16" in refused(parse, scene)
    (scene / "masks/003.png").unlink()
    assert "1 of 10 masks not found" in refused(parse, scene)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "1", "P", "I;16", "F", "CMYK"])
def test_masks_are_of_a_pixel_format_that_says_white(write_scene, tmp_path, mode):
    scene = write_scene["nerfstudio"](tmp_path, masks=True)
    picture = Image.new(mode, (24, 16))
    picture.save(scene / "masks/003.png", format="TIFF" if mode in ("F", "CMYK") else "PNG")
    if mode in ("F", "CMYK"):
        assert f"003.png is {mode}); expected one of: black and white, 8-bit grey" in refused(parse, scene)
    else:
        assert parse(scene).mask_filenames is not None


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        (np.full((4, 4), np.nan), "NaN"),
        (np.zeros((4, 4)), "not a rotation"),
        (np.diag([2.0, 2.0, 2.0, 1.0]), "not a rotation"),
        (np.diag([1.0, 1.0, -1.0, 1.0]), "not a rotation"),
        (np.eye(3), "not a 4x4 matrix"),
        ([["a"] * 4] * 4, "not a 4x4 matrix"),
    ],
    ids=["nan", "singular", "scaled", "mirrored", "3x3", "words"],
)
def test_poses_that_are_not_rigid_motions_are_refused(write_scene, tmp_path, matrix, expected):
    scene = write_scene["nerfstudio"](tmp_path)
    values = matrix.tolist() if isinstance(matrix, np.ndarray) else matrix
    edit_transforms(scene, lambda meta: meta["frames"][5].update(transform_matrix=values))
    message = refused(parse, scene)
    assert expected in message
    assert "005.png" in message


def test_cameras_at_one_point_are_refused(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path)

    def stand_still(meta):
        for frame in meta["frames"]:
            frame["transform_matrix"] = np.eye(4).tolist()

    edit_transforms(scene, stand_still)
    assert "stand at one point" in refused(parse, scene)


def test_a_focal_length_that_is_not_positive_is_refused(write_scene, tmp_path):
    assert "fx is -3" in refused(parse, write_scene["nerfstudio"](tmp_path, fl_x=-3.0))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"fl_x": []}, "fl_x is []; expected a number"),
        ({"w": [80]}, "w is [80]; expected a number"),
        ({"k1": []}, "k1 is []; expected a number"),
        ({"k1": float("nan")}, "k1 is NaN; expected a number"),
        ({"applied_scale": []}, "applied_scale is []"),
        ({"applied_scale": 0}, "applied_scale is 0; expected a positive number"),
        ({"distortion_params": "x"}, "expected six numbers"),
        ({"distortion_params": [0.1, 0.2]}, "expected six numbers"),
        ({"camera_model": "FOO"}, "expected one of: OPENCV"),
        ({"train_filenames": 3}, "expected a list of file names"),
        ({"train_filenames": [1, 2]}, "expected a list of file names"),
        ({"shiftadd3d": 5}, '"shiftadd3d" is 5; expected {"near"'),
        ({"shiftadd3d": "x"}, '"shiftadd3d" is "x"; expected'),
        ({"shiftadd3d": [1, 2]}, '"shiftadd3d" is [1, 2]; expected'),
        ({"shiftadd3d": {"far": 2}}, '"shiftadd3d" is {"far": 2}; expected'),
        (
            {"cx": 4000},
            "cx is 4000 (000.png, 001.png, 002.png and 6 more); expected a point in the middle half of the image, "
            "6 < cx < 18: are these numbers of the full-size photos",
        ),
        ({"cy": -1}, "4 < cy < 12"),
        ({"applied_transform": []}, "applied_transform is []; expected a 3x4 matrix"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_that_are_not_what_they_should_be_are_refused(write_scene, tmp_path, change, expected):
    scene = write_scene["nerfstudio"](tmp_path)
    edit_transforms(scene, lambda meta: meta.update(change))
    assert expected in refused(parse, scene)


@pytest.mark.parametrize("key", ["k1", "mask_path"])
def test_a_frame_with_such_a_value_is_named(write_scene, tmp_path, key):
    scene = write_scene["nerfstudio"](tmp_path)
    edit_transforms(scene, lambda meta: meta["frames"][5].update({key: []}))
    assert f"transforms.json, images/005.png: {key} is []" in refused(parse, scene)


def test_a_blender_camera_angle_that_is_no_number_is_refused(write_scene, tmp_path):
    scene = write_scene["blender"](tmp_path)
    meta = json.loads((scene / "transforms_train.json").read_text())
    (scene / "transforms_train.json").write_text(json.dumps({**meta, "camera_angle_x": []}))
    assert "camera_angle_x is []; expected a number" in refused(parse, scene)


def test_distortion_of_another_parser_is_checked_too(write_scene, tmp_path):
    outputs = parse(write_scene["nerfstudio"](tmp_path))
    for distortion in (torch.zeros(9, 2), torch.full((9, 6), torch.nan)):
        outputs.cameras.distortion_params = distortion
        assert "expected six finite numbers" in refused(check_outputs, outputs, "train")


@pytest.mark.parametrize(
    ("file", "content"), [("cameras", struct.pack("<Qii", 1, 1, 1)), ("cameras", struct.pack("<QiiQQ", 1, 1, 77, 9, 9))]
)
def test_a_colmap_model_that_breaks_off_or_has_unknown_cameras_is_refused(write_scene, tmp_path, file, content):
    scene = write_scene["colmap"](tmp_path)
    model = scene / "sparse/0"
    (model / "cameras.txt").unlink()
    (model / f"{file}.bin").write_bytes(content)
    image = (
        struct.pack("<idddddddi", 1, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1) + b"photo000.png\0" + struct.pack("<Q", 0)
    )
    (model / "images.bin").write_bytes(struct.pack("<Q", 1) + image)
    message = refused(parse, scene)
    assert "cannot be read as a colmap scene" in message
    assert "expected whole files of cameras" in message


def test_too_few_views_to_train_on_or_to_test_on_are_refused(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path)
    assert "test split has no views" in refused(parse, scene, "test", eval_mode="fraction", train_split_fraction=1.0)
    assert "has 1 view;" in refused(parse, write_scene["nerfstudio"](tmp_path / "one", count=1))
    assert "train split has 1 view;" in refused(parse, write_scene["llff"](tmp_path / "two", count=2))


def test_scenes_of_few_views_still_hold_one_out(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path, count=8)
    assert len(parse(scene).image_filenames) == 7
    assert len(parse(scene, "test").image_filenames) == 1


def test_camera_files_that_are_incomplete_are_refused(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path)
    edit_transforms(scene, lambda meta: (meta.pop("fl_x"), meta.pop("fl_y")))
    assert "lacks fl_x" in refused(parse, scene)
    edit_transforms(scene, lambda meta: meta.pop("frames"))
    assert "has no frames" in refused(parse, scene)
    (scene / "transforms.json").write_text("{")
    assert "not valid JSON" in refused(parse, scene)


def test_a_damaged_colmap_model_is_refused(write_scene, tmp_path):
    scene = write_scene["colmap"](tmp_path)
    (scene / "sparse/0/images.txt").write_text("1 2 three\n")
    assert "cannot be read" in refused(parse, scene)


@pytest.mark.parametrize("factor", [0, -2])
def test_an_impossible_downscale_factor_is_refused(write_scene, tmp_path, factor):
    message = refused(parse, write_scene["nerfstudio"](tmp_path), downscale_factor=factor)
    assert message == f"downscale-factor {factor}: expected 1 or more"


def test_splits_by_impossible_settings_are_refused(write_scene, tmp_path):
    scene = write_scene["llff"](tmp_path)
    assert "in every image name" in refused(parse, scene, eval_mode="filename")
    assert "expected 2 or more" in refused(parse, scene, eval_interval=1)
    assert "have one size" in refused(parse, write_scene["blender"](tmp_path / "blender"), downscale_factor=2)
