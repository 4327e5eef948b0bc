"""The factory of scenes: what it makes, that it makes the same again, goes on where it ended, and what it refuses."""

from __future__ import annotations

import filecmp
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shiftadd3d import UserError, cli
from shiftadd3d.scenes import _random_textures as textures
from shiftadd3d.scenes import _random_things as things
from shiftadd3d.scenes import factory as factories
from shiftadd3d.scenes._meshes import extrude
from shiftadd3d.scenes._photograph import Photograph, exposure, objection, picture
from shiftadd3d.scenes._random_scene import KINDS, PIXELS, Stage, draw_stage
from shiftadd3d.scenes.factory import Factory, draw_contact_sheets, make_factory, make_scene, open_factory
from shiftadd3d.scenes.make import look_at

SIZE = (40, 32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Factory:
    """Three small scenes, one of them without background; do not change them."""
    pytest.importorskip("mitsuba")
    factory = Factory(tmp_path_factory.mktemp("factory") / "made", seed=8, size=SIZE)
    make_factory(factory, 3, workers=2)
    return factory


def copy_of(factory: Factory, folder: Path) -> Factory:
    shutil.copytree(factory.folder, folder)
    return replace(factory, folder=folder)


def index_of(factory: Factory) -> dict:
    return json.loads((factory.folder / "factory.json").read_text())


def transforms_of(scene: Path) -> dict:
    return json.loads((scene / "transforms.json").read_text())


def depth_of(scene: Path, frame: dict) -> np.ndarray:
    with Image.open(scene / frame["depth_file_path"]) as image:
        return np.asarray(image, dtype=float) / 1000


# What it makes


def test_the_index_lists_what_lies_in_the_folder(made: Factory):
    index = index_of(made)
    assert index["seed"] == 8
    assert index["size"] == list(SIZE)
    assert index["generator"] == factories.GENERATOR
    assert [scene["name"] for scene in index["scenes"]] == ["scene_00000", "scene_00001", "scene_00002"]
    for line in index["scenes"]:
        meta = transforms_of(made.folder / line["name"])
        assert line["views"] == len(meta["frames"])
        assert (line["near"], line["far"]) == (meta["shiftadd3d"]["near"], meta["shiftadd3d"]["far"])
        assert line["kind"] in KINDS
        assert line["seconds"] > 0
    assert {line["alpha"] for line in index["scenes"]} == {True, False}, "choose a seed that has both"


def test_a_scene_has_a_picture_and_a_depth_for_each_view_and_a_split(made: Factory):
    for line in index_of(made)["scenes"]:
        scene = made.folder / line["name"]
        meta = transforms_of(scene)
        assert 8 <= len(meta["frames"]) <= 40
        train, test = meta["train_filenames"], meta["test_filenames"]
        assert sorted(train + test) == [frame["file_path"] for frame in meta["frames"]]
        assert len(test) == max(1, round(len(meta["frames"]) / 8))
        for frame in meta["frames"]:
            with Image.open(scene / frame["file_path"]) as image:
                assert image.size == SIZE
                assert image.mode == ("RGBA" if line["alpha"] else "RGB")
            depth = depth_of(scene, frame)
            assert depth.shape == SIZE[::-1]
            assert (depth > 0).all() != line["alpha"]
            inside = (depth[depth > 0] > line["near"]) & (depth[depth > 0] < line["far"])
            assert inside.mean() > 0.97


def warped(scene: Path, target: int, source: int) -> tuple[np.ndarray, dict[float, float]]:
    """Which pixels of a view are seen by another, and the colour error there by where pixel centres are assumed."""
    meta = transforms_of(scene)
    width, height, focal = meta["w"], meta["h"], meta["fl_x"]
    poses = [np.array(frame["transform_matrix"]) for frame in meta["frames"]]
    frames = [meta["frames"][k] for k in (target, source)]
    seen, other = (np.asarray(Image.open(scene / f["file_path"]).convert("RGB")) / 255 for f in frames)
    depth, found = (depth_of(scene, frame) for frame in frames)
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    rays = np.stack([(x - meta["cx"]) / focal, (meta["cy"] - y) / focal, -np.ones_like(x)], axis=2)
    points = (rays * depth[..., None]) @ poses[target][:3, :3].T + poses[target][:3, 3]
    local = (points - poses[source][:3, 3]) @ poses[source][:3, :3]
    z = np.maximum(-local[..., 2], 1e-6)
    column, row = meta["cx"] + focal * local[..., 0] / z, meta["cy"] - focal * local[..., 1] / z
    inside = (depth > 0) & (local[..., 2] < 0) & (column > 2) & (column < width - 2) & (row > 2) & (row < height - 2)
    inside[inside] &= np.abs(found[row[inside].astype(int), column[inside].astype(int)] - z[inside]) < 0.02 * z[inside]
    errors = {}
    for centre in (0.0, 0.5, 1.0):
        u, v = column[inside] - centre, row[inside] - centre
        i, j = u.astype(int), v.astype(int)
        a, b = (u - i)[:, None], (v - j)[:, None]
        upper = (1 - a) * other[j, i] + a * other[j, i + 1]
        lower = (1 - a) * other[j + 1, i] + a * other[j + 1, i + 1]
        errors[centre] = float(np.mean(((1 - b) * upper + b * lower - seen[inside]) ** 2))
    return inside, errors


def test_pictures_depths_and_cameras_agree_to_a_fraction_of_a_pixel(made: Factory):
    for line in index_of(made)["scenes"]:
        scene = made.folder / line["name"]
        poses = np.array([frame["transform_matrix"] for frame in transforms_of(scene)["frames"]])
        target = len(poses) // 2
        away = np.linalg.norm(poses[:, :3, 3] - poses[target, :3, 3], axis=1)
        source = int(np.argsort(away)[1])
        inside, errors = warped(scene, target, source)
        assert inside.sum() > 60
        assert errors[0.5] < 0.01
        assert errors[0.5] < min(errors[0.0], errors[1.0])


def test_nerfstudio_reads_a_scene_with_its_depths(made: Factory):
    parsers = pytest.importorskip("nerfstudio.data.dataparsers.nerfstudio_dataparser")
    for line in index_of(made)["scenes"]:
        parser = parsers.NerfstudioDataParserConfig(data=made.folder / line["name"]).setup()
        parts = [parser.get_dataparser_outputs(split=split) for split in ("train", "test")]
        assert sum(len(part.image_filenames) for part in parts) == line["views"]
        assert all(len(part.metadata["depth_filenames"]) == len(part.image_filenames) for part in parts)


def test_contact_sheets_show_every_scene(made: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    factory = copy_of(made, tmp_path / "copy")
    shutil.rmtree(factory.folder / "contact-sheets")
    monkeypatch.setattr(factories, "_SHEET_SCENES", 2)
    assert cli.main(["scenes", "contact-sheets", str(factory.folder)]) == 0
    sheets = sorted((factory.folder / "contact-sheets").iterdir())
    assert [sheet.name for sheet in sheets] == ["00000.png", "00002.png"]
    for sheet in draw_contact_sheets(factory):
        with Image.open(sheet) as image:
            assert np.asarray(image).std() > 20


# The same again


def test_a_scene_depends_on_seed_and_number_alone(made: Factory, tmp_path: Path):
    again = replace(made, folder=tmp_path)
    make_scene(again, 1)  # first, and in this process
    files = [path.relative_to(made.scene(1)) for path in made.scene(1).rglob("*") if path.is_file()]
    _, different, missing = filecmp.cmpfiles(made.scene(1), again.scene(1), map(str, files), shallow=False)
    assert missing == []
    assert set(different) <= {"scene.json"}  # which has the seconds
    other = replace(again, seed=9)
    assert not np.array_equal(
        *(draw_stage(np.random.default_rng([f.seed, 1, 0]), SIZE).poses[0] for f in (again, other))
    )


def test_the_same_command_makes_what_is_missing_and_leaves_what_is_there(made: Factory, tmp_path: Path):
    factory = copy_of(made, tmp_path / "copy")
    before = {path: path.stat().st_mtime_ns for path in factory.folder.rglob("images/*.png")}
    shutil.rmtree(factory.scene(1))
    half = factory.folder / f".scene_00001-{factories._host()}-999999999"
    (half / "images").mkdir(parents=True)
    command = ["scenes", "make-factory", str(factory.folder), "--count", "3", "--seed", "8", "--size", "40", "32"]
    assert cli.main(command) == 0
    assert not half.exists()
    for path, when in before.items():
        assert (path.stat().st_mtime_ns == when) == ("scene_00001" not in path.parts)
        assert path.read_bytes() == (made.folder / path.relative_to(factory.folder)).read_bytes()
    assert [scene["name"] for scene in index_of(factory)["scenes"]] == [f"scene_{k:05d}" for k in range(3)]


def test_ctrl_c_leaves_finished_scenes_and_nothing_half_made(tmp_path: Path, ctrl_c_interrupts: None):
    pytest.importorskip("mitsuba")
    command = ["scenes", "make-factory", str(tmp_path / "f"), "--count", "50", "--size", "40", "32"]
    process = subprocess.Popen(
        [sys.executable, "-m", "shiftadd3d.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 300
    while not list((tmp_path / "f").glob("scene_*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "the same command continues" in output
    assert "Traceback" not in output
    names = sorted(path.name for path in (tmp_path / "f").iterdir())
    assert names == ["factory.json", *(name for name in names if name.startswith("scene_"))]
    index = json.loads((tmp_path / "f" / "factory.json").read_text())
    assert 1 <= len(list((tmp_path / "f").glob("scene_*"))) < 50
    assert len(index["scenes"]) <= len(list((tmp_path / "f").glob("scene_*")))


# What is drawn


def test_every_texture_is_a_picture_that_its_seed_decides():
    for maker in (*textures._SIMPLE, textures._collage, textures._plain, textures.foliage):
        first, second, other = (maker(np.random.default_rng(seed), 64) for seed in (0, 0, 1))
        assert first.dtype == np.uint8
        assert first.ndim == 3 and first.shape[2] == 3
        np.testing.assert_array_equal(first, second)
        assert first.shape != other.shape or not np.array_equal(first, other)


@pytest.mark.parametrize("maker", [*things._SOLID_KINDS, *things._SOFT_KINDS, things.drapery], ids=lambda m: m.__name__)
def test_every_thing_is_a_sound_mesh_of_about_one_unit(maker):
    for seed in range(4):
        for thing in maker(np.random.default_rng(seed)):
            mesh = thing.mesh
            assert np.isfinite(mesh.points).all() and np.isfinite(mesh.uv).all()
            assert mesh.faces.min() >= 0 and mesh.faces.max() < len(mesh.points)
            assert len(mesh.points) == len(mesh.normals) == len(mesh.uv)
            np.testing.assert_allclose(np.linalg.norm(mesh.normals, axis=1), 1, atol=1e-3)
            assert 0.05 < np.abs(mesh.points).max() < 4.5
            assert mesh.points[:, 2].min() > -2.0


def test_an_extruded_outline_is_closed_and_faces_outwards():
    triangle = extrude(np.array([[0, 0], [2, 0], [0, 2.0]]), 3.0)
    a, b, c = (triangle.points[triangle.faces[:, k]] for k in range(3))
    volume = np.einsum("ni,ni->n", a, np.cross(b, c)).sum() / 6
    assert volume == pytest.approx(6.0)
    assert (np.einsum("ni,ni->n", np.cross(b - a, c - a), triangle.normals[triangle.faces[:, 0]]) > 0).all()


def test_stages_differ_in_kind_size_views_and_focal_length_and_keep_the_bounds():
    stages = [draw_stage(np.random.default_rng([5, k, 0]), None) for k in range(10)]
    assert set(Counter(stage.kind for stage in stages)) == set(KINDS)
    assert len({stage.size for stage in stages}) > 4
    assert any(width < height for width, height in (stage.size for stage in stages))
    assert np.ptp([stage.fov for stage in stages]) > 20
    for stage in stages:
        width, height = stage.size
        assert max(width, height) <= 252
        assert 8 <= len(stage.poses) <= 40
        assert len(stage.poses) * width * height <= max(PIXELS, 8 * width * height)
        for pose in stage.poses:
            np.testing.assert_allclose(pose[:3, :3].T @ pose[:3, :3], np.eye(3), atol=1e-9)


# What is drawn again


def facing_a_wall(**changes) -> tuple[Stage, list[Photograph]]:
    """A stage as eight cameras side by side see it: a wall three units away, with some pattern."""
    poses = [look_at(np.array([0.05 * k, 0, 0]), np.array([0.05 * k, 3.0, 0])) for k in range(8)]
    stage = Stage("shelf", poses=poses, size=(32, 24))
    light = np.broadcast_to(np.linspace(0.2, 0.6, 32), (24, 32))
    seen = Photograph(np.repeat(light[..., None], 3, axis=2), np.ones((24, 32)), np.full((24, 32), 3.0))
    return stage, [replace(seen, **changes) for _ in poses]


def test_a_stage_without_defects_is_taken():
    assert objection(*facing_a_wall()) is None


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"depth": np.pad(np.full((24, 30), 3.0), ((0, 0), (0, 2)))}, "the void"),
        ({"depth": np.full((24, 32), 0.1)}, "right before a camera"),
        ({"depth": np.pad(np.full((24, 15), 0.5), ((0, 0), (0, 17)), constant_values=3.0)}, "right before a camera"),
        ({"radiance": np.full((24, 32, 3), 0.4)}, "hardly anything"),
        ({"radiance": np.repeat(np.eye(24, 32)[..., None] * 0.001 + 1e-9, 3, axis=2)}, "too dark"),
        ({"depth": np.pad(np.full((24, 24), 3.0), ((0, 0), (0, 8)), constant_values=100.0)}, "too far"),
    ],
)
def test_a_stage_with_a_defect_is_drawn_again(changes: dict, complaint: str):
    stage, photographs = facing_a_wall(**changes)
    assert complaint in (objection(stage, photographs) or "")


def test_a_stage_whose_cameras_see_different_things_is_drawn_again():
    stage, photographs = facing_a_wall()
    turned = [look_at(pose[:3, 3], pose[:3, 3] + np.array([0, -3.0, 0])) for pose in stage.poses[:1]]
    assert "too few other cameras" in (objection(replace(stage, poses=turned + stage.poses[1:]), photographs) or "")


def test_an_object_has_to_fill_some_of_each_picture_and_not_all():
    depth = np.zeros((24, 32))
    depth[10:12, 10:12] = 3.0
    stage, photographs = facing_a_wall(depth=depth, alpha=(depth > 0).astype(float))
    stage.open = True
    assert "of a picture is covered" in (objection(stage, photographs) or "")
    stage, photographs = facing_a_wall()
    stage.open = True
    assert "100% of a picture is covered" in (objection(stage, photographs) or "")


def test_colours_of_half_covered_pixels_are_the_things_own():
    stage, photographs = facing_a_wall(alpha=np.full((24, 32), 0.5))
    half = replace(photographs[0], radiance=photographs[0].radiance * 0.5)
    whole = facing_a_wall()[1][0]
    rgba = picture(half, exposure(stage, [whole]), keep_alpha=True)
    np.testing.assert_array_equal(rgba[..., 3], 128)
    np.testing.assert_array_equal(rgba[..., :3], picture(whole, exposure(stage, [whole]), keep_alpha=False))


# What it refuses


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["scenes", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--count", "0"], "--count 0: expected 1 to 100000"),
        (["--count", "2000000"], "--count 2000000: expected"),
        (["--count", "1", "--seed", "-1"], "--seed -1: expected 0 or more"),
        (["--count", "1", "--workers", "0"], "--workers 0: expected 1 to"),
        (["--count", "1", "--size", "8", "8"], "--size 8 8: expected 16 to 2048"),
        (["--count", "1", "--size", "32", "400"], "at most three times"),
    ],
)
def test_a_bad_setting_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
):
    assert reason in refusal(capsys, "make-factory", str(tmp_path / "f"), *arguments)
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["--seed", "1", "--size", "40", "32"], "seed 8, not 1"), (["--seed", "8"], "size [40, 32], not None")],
)
def test_another_factory_is_not_gone_on_with(
    made: Factory, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
):
    assert reason in refusal(capsys, "make-factory", str(made.folder), "--count", "9", *arguments)
    assert len(index_of(made)["scenes"]) == 3


def test_scenes_of_another_generator_are_not_mixed_in(
    made: Factory, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(factories, "GENERATOR", factories.GENERATOR + 1)
    command = ["make-factory", str(made.folder), "--count", "9", "--seed", "8", "--size", "40", "32"]
    assert "is a factory with generator" in refusal(capsys, *command)


def test_a_folder_with_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("mitsuba")
    (tmp_path / "holiday.jpg").write_bytes(b"")
    assert "holds something else" in refusal(capsys, "make-factory", str(tmp_path), "--count", "1")
    (tmp_path / "factory.json").write_text('{"format": "of another program"}')
    assert "is no index of a factory" in refusal(capsys, "make-factory", str(tmp_path), "--count", "1")
    (tmp_path / "factory.json").write_text("{")
    assert "is not JSON" in refusal(capsys, "contact-sheets", str(tmp_path))
    assert "is no factory" in refusal(capsys, "contact-sheets", str(tmp_path / "nowhere"))


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("mitsuba")
    (tmp_path / "file").write_text("")
    assert "cannot write to" in refusal(capsys, "make-factory", str(tmp_path / "file"), "--count", "1")
    assert "cannot write to" in refusal(capsys, "make-factory", str(tmp_path / "file" / "f"), "--count", "1")


def test_a_damaged_scene_is_named(made: Factory, tmp_path: Path):
    factory = copy_of(made, tmp_path / "copy")
    (factory.scene(2) / "scene.json").unlink()
    with pytest.raises(UserError, match=r"scene_00002 is damaged .*delete it"):
        make_factory(factory, 3)


def test_a_missing_mitsuba_is_told_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "mitsuba", None)
    error = refusal(capsys, "make-factory", str(tmp_path / "f"), "--count", "1")
    assert "needs mitsuba, which is not installed: pip install 'shiftadd3d[scenes]'" in error
    assert not (tmp_path / "f").exists()


def test_a_factory_opens_as_it_was_made(made: Factory):
    assert open_factory(made.folder) == made
