"""The embedded scenes: what is in the folder, that its cameras are right, and that the maker still makes it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shiftadd3d.scenes import make as maker
from shiftadd3d.scenes import scene_names, scene_path

Meta = dict


@pytest.fixture(scope="module")
def scene() -> Path:
    return scene_path()


@pytest.fixture(scope="module")
def meta(scene: Path) -> Meta:
    return json.loads((scene / "transforms.json").read_text())


@pytest.fixture(scope="module")
def poses(meta: Meta) -> dict[str, np.ndarray]:
    return {frame["file_path"]: np.array(frame["transform_matrix"]) for frame in meta["frames"]}


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.asarray(image, dtype=np.float64) / 255


def psnr(error: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean(error**2)))


def nearest(name: str, candidates: list[str], poses: dict[str, np.ndarray]) -> str:
    return min(candidates, key=lambda other: np.linalg.norm(poses[other][:3, 3] - poses[name][:3, 3]))


def test_the_still_life_is_the_default_scene():
    assert "still_life" in scene_names()
    assert scene_path() == scene_path("still_life")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no embedded scene 'fern': expected one of .*still_life"):
        scene_path("fern")


def test_a_scene_weighs_less_than_six_megabytes(scene: Path):
    assert sum(path.stat().st_size for path in scene.rglob("*") if path.is_file()) < 6e6


def test_every_picture_has_the_stated_size(scene: Path, meta: Meta):
    for frame in meta["frames"]:
        assert picture(scene / frame["file_path"]).shape == (meta["h"], meta["w"], 3)
    assert len(meta["frames"]) == len(list((scene / "images").iterdir()))


def test_train_and_test_views_are_disjoint_and_cover_the_scene(meta: Meta, poses: dict[str, np.ndarray]):
    train, test = meta["train_filenames"], meta["test_filenames"]
    assert len(poses) == len(meta["frames"]) >= 40
    assert len(test) >= 6
    assert not set(train) & set(test)
    assert sorted(train + test) == sorted(poses)
    assert set(meta["val_filenames"]) <= set(test)


def test_poses_are_rigid(poses: dict[str, np.ndarray]):
    for pose in poses.values():
        np.testing.assert_allclose(pose[:3, :3].T @ pose[:3, :3], np.eye(3), atol=1e-6)
        assert np.linalg.det(pose[:3, :3]) == pytest.approx(1, abs=1e-6)
        np.testing.assert_array_equal(pose[3], [0, 0, 0, 1])


def test_cameras_stand_upright_above_the_table_and_see_its_middle(meta: Meta, poses: dict[str, np.ndarray]):
    for pose in poses.values():
        x, y, z = pose[:3, :3].T @ (np.array([0.1, 0.1, 0.3]) - pose[:3, 3])
        assert pose[2, 3] > 0.5
        assert pose[2, 1] > 0.5  # the camera's y axis points up
        assert meta["shiftadd3d"]["near"] < -z < meta["shiftadd3d"]["far"]
        assert abs(meta["fl_x"] * x / z) < 0.1 * meta["w"]
        assert abs(meta["fl_y"] * y / z) < 0.15 * meta["h"]


def test_the_nearest_training_picture_is_no_answer_for_a_test_view(
    scene: Path, meta: Meta, poses: dict[str, np.ndarray]
):
    for name in meta["test_filenames"]:
        source = nearest(name, meta["train_filenames"], poses)
        assert psnr(picture(scene / name) - picture(scene / source)) < 21


def test_depth_bounds_are_tight_enough_to_sample(meta: Meta):
    assert 0 < meta["shiftadd3d"]["near"] < meta["shiftadd3d"]["far"] <= 5 * meta["shiftadd3d"]["near"]


def test_nerfstudio_reads_the_split(scene: Path, meta: Meta):
    parsers = pytest.importorskip("nerfstudio.data.dataparsers.nerfstudio_dataparser")
    parser = parsers.NerfstudioDataParserConfig(data=scene).setup()
    for split in ("train", "val", "test"):
        outputs = parser.get_dataparser_outputs(split=split)
        assert [path.name for path in outputs.image_filenames] == [
            Path(name).name for name in sorted(meta[f"{split}_filenames"])
        ]
        assert outputs.cameras.cx[0].item() == meta["w"] / 2


@pytest.fixture(scope="module")
def studio(meta: Meta) -> maker.Studio:
    pytest.importorskip("mitsuba")
    return maker.Studio(maker.Config(out=Path("unused"), size=(meta["w"], meta["h"])))


def test_pictures_agree_with_the_geometry_to_a_fraction_of_a_pixel(
    scene: Path, meta: Meta, poses: dict[str, np.ndarray], studio: maker.Studio
):
    """Points seen in a test view, projected into the nearest training view, have the same colour there.

    Only with pixel centres at half integers: with whole ones the agreement is several decibels worse.
    """
    target = meta["test_filenames"][4]
    source = nearest(target, meta["train_filenames"], poses)
    points = studio.positions(poses[target], spp=4)
    seen = studio.positions(poses[source], spp=4)
    local = (points - poses[source][:3, 3]) @ poses[source][:3, :3]
    column = meta["cx"] - meta["fl_x"] * local[..., 0] / local[..., 2]
    row = meta["cy"] + meta["fl_y"] * local[..., 1] / local[..., 2]
    inside = (column > 1.5) & (column < meta["w"] - 1.5) & (row > 1.5) & (row < meta["h"] - 1.5)

    def sample(image: np.ndarray, centre: float) -> np.ndarray:
        x, y = column[inside] - centre, row[inside] - centre
        i, j = x.astype(int), y.astype(int)
        a, b = (x - i)[:, None], (y - j)[:, None]
        return (1 - b) * ((1 - a) * image[j, i] + a * image[j, i + 1]) + b * (
            (1 - a) * image[j + 1, i] + a * image[j + 1, i + 1]
        )

    visible = np.linalg.norm(sample(seen, 0.5) - points[inside], axis=1) < 0.05
    assert visible.mean() > 0.7
    error = {
        centre: (sample(picture(scene / source), centre) - picture(scene / target)[inside])[visible]
        for centre in (0.0, 0.5, 1.0)
    }
    assert psnr(error[0.5]) > 28
    assert psnr(error[0.5]) > max(psnr(error[0.0]), psnr(error[1.0])) + 3


def test_the_maker_writes_a_data_set_of_the_same_form(tmp_path: Path, meta: Meta):
    pytest.importorskip("mitsuba")
    arguments = ["--out", str(tmp_path), "--size", "16", "12", "--spp", "1"]
    assert maker.main([*arguments, "--rows", "1", "--columns", "1", "--tests", "1"]) == 0
    made = json.loads((tmp_path / "transforms.json").read_text())
    assert made.keys() == meta.keys()
    assert len(made["frames"]) == 2
    for frame in made["frames"]:
        assert picture(tmp_path / frame["file_path"]).shape == (12, 16, 3)
    first = picture(tmp_path / "images" / "train_00.png")
    assert maker.main([*arguments, "--rows", "1", "--columns", "1", "--tests", "1"]) == 0
    # The same scene and cameras; the noise of single samples may differ, as the renderer's threads take blocks of
    # pixels in any order.
    assert json.loads((tmp_path / "transforms.json").read_text()) == made
    assert picture(tmp_path / "images" / "train_00.png").mean() == pytest.approx(first.mean(), abs=0.05)


def test_the_embedded_cameras_are_the_makers(poses: dict[str, np.ndarray]):
    for view in maker.camera_views(maker.Config(out=Path("unused"))):
        np.testing.assert_allclose(poses[f"images/{view.name}.png"], view.pose, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--size", "100", "200"], "so tall"),
        (["--seed", "-1"], "--seed must not be negative"),
        (["--spp", "0"], "--spp must be at least 1"),
        (["--fov", "170"], "--fov must be between 5 and 60"),
    ],
)
def test_a_bad_setting_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
):
    assert maker.main(["--out", str(tmp_path), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert reason in error
    assert error.count("\n") == 1


def test_a_missing_mitsuba_names_the_group_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "mitsuba", None)
    assert maker.main(["--out", str(tmp_path)]) == 1
    assert "pip install 'shiftadd3d[scenes]'" in capsys.readouterr().err
