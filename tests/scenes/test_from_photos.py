"""Photos to a scene: poses against the true ones, what is refused, what an interrupted run leaves."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from shiftadd3d import UserError, cli
from shiftadd3d.scenes import poses as poses_module
from shiftadd3d.scenes import scene_path
from shiftadd3d.scenes.from_photos import scene_from_photos
from shiftadd3d.scenes.photo_options import FromPhotosOptions
from shiftadd3d.scenes.poses import pairs_to_match

pycolmap = pytest.importorskip("pycolmap")


def true_poses() -> dict[str, np.ndarray]:
    meta = json.loads((scene_path() / "transforms.json").read_text())
    return {Path(frame["file_path"]).name: np.array(frame["transform_matrix"]) for frame in meta["frames"]}


def still_life(folder: Path, step: int = 2) -> Path:
    """Every second picture (or so) of the embedded scene, without its poses."""
    folder.mkdir()
    for name in sorted(true_poses())[::step]:
        shutil.copy(scene_path() / "images" / name, folder)
    return folder


def poses_of(scene: Path) -> dict[str, np.ndarray]:
    meta = json.loads((scene / "transforms.json").read_text(encoding="utf-8"))
    return {frame["original"]: np.array(frame["transform_matrix"]) for frame in meta["frames"]}


def errors(found: dict[str, np.ndarray], true: dict[str, np.ndarray]) -> tuple[float, float]:
    """Largest rotation in degrees, and largest distance over the cameras' spread, after the best similarity (Umeyama,
    1991)."""
    a, b = (np.stack([poses[name] for name in sorted(found)]) for poses in (found, true))
    x, y = (poses[:, :3, 3] - poses[:, :3, 3].mean(0) for poses in (a, b))
    u, s, vt = np.linalg.svd(y.T @ x)
    flip = np.diag([1, 1, np.linalg.det(u @ vt)])
    rotation, scale = u @ flip @ vt, (s * np.diag(flip)).sum() / (x**2).sum()
    distance = np.linalg.norm(scale * x @ rotation.T - y, axis=1).max() / np.linalg.norm(y, axis=1).mean()
    cosines = (np.einsum("nij,nij->n", rotation @ a[:, :3, :3], b[:, :3, :3]) - 1) / 2
    return float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).max()), float(distance)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene from the embedded scene's pictures, some of which make trouble; its report is beside it."""
    root = tmp_path_factory.mktemp("from photos ü")
    folder = still_life(root / "photos")
    exif = Image.Exif()
    exif[0x112] = 6  # lying on its side, and said to be
    with Image.open(folder / "train_02.png") as image:
        image.convert("RGB").transpose(Image.Transpose.ROTATE_90).save(folder / "train_02.png", exif=exif)
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    with Image.open(folder / "train_04.png") as image:
        image.filter(ImageFilter.GaussianBlur(9)).save(folder / "blurred.png")
    assert (
        cli.main(["scenes", "from-photos", str(folder), "--out", str(root / "scene"), "--json", str(root / "r.json")])
        == 0
    )
    return root / "scene"


def test_poses_are_the_true_ones_up_to_a_similarity(made: Path):
    found, true = poses_of(made), true_poses()
    assert set(found) == set(sorted(true)[::2])
    degrees, distance = errors(found, true)
    assert degrees < 2.0
    assert distance < 0.04


def test_the_focal_length_is_the_true_one(made: Path):
    meta = json.loads((made / "transforms.json").read_text(encoding="utf-8"))
    true = json.loads((scene_path() / "transforms.json").read_text())
    assert meta["camera_model"] == "OPENCV"
    assert (meta["w"], meta["h"]) == (true["w"], true["h"])
    assert meta["fl_x"] == pytest.approx(true["fl_x"], rel=0.05)
    assert (meta["cx"], meta["cy"]) == (meta["w"] / 2, meta["h"] / 2)


def test_up_is_up(made: Path):
    found, true = poses_of(made), true_poses()
    for name, pose in found.items():
        # The elevation of each view's axis over the table, which no similarity that keeps up changes.
        assert abs(np.degrees(np.arcsin(pose[2, 2]) - np.arcsin(true[name][2, 2]))) < 12


def test_the_report_names_what_was_left_out_and_what_was_not_placed(made: Path):
    report = json.loads((made.parent / "r.json").read_text(encoding="utf-8"))
    assert report["registered"] == 25 and report["photos"] == 26
    assert report["unregistered"] == ["blurred.png"]
    assert list(report["skipped"]) == ["torn.jpg"]
    assert report["error"] < 1.0 and report["points"] > 100
    images = sorted(path.name for path in (made / "images").iterdir())
    meta = json.loads((made / "transforms.json").read_text(encoding="utf-8"))
    assert images == [Path(frame["file_path"]).name for frame in meta["frames"]]


def test_a_scene_that_is_there_is_not_made_again_and_nothing_else_is_overwritten(made: Path, tmp_path: Path):
    photos = made.parent / "photos"
    before = (made / "transforms.json").stat().st_mtime_ns
    assert scene_from_photos(photos, made).registered == 25
    assert (made / "transforms.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="exists, and is no scene of these photos with these options"):
        scene_from_photos(photos, made, FromPhotosOptions(seed=1))
    with pytest.raises(UserError, match="exists, and is no scene"):
        scene_from_photos(photos, photos)
    assert not list(made.parent.glob(".*"))


def test_the_next_command_can_be_typed_as_it_is_printed(made: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["scenes", "from-photos", str(made.parent / "photos"), "--out", str(made)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("train on it: "))
    words = shlex.split(line.removeprefix("train on it: "))
    assert " " in str(made) and words == ["ns-train", "shiftadd-gnt-tiny", "--data", str(made)]


@pytest.mark.slow
def test_nerfstudio_and_our_parser_read_the_scene(made: Path):
    # nerfstudio reads sparse points with it.
    pytest.importorskip("open3d", reason="open3d wants the system's libusb-1.0", exc_type=ImportError)
    from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

    from shiftadd3d.nerf.dataparsers import AutoDataParserConfig

    outputs = NerfstudioDataParserConfig(data=made, load_3D_points=True).setup().get_dataparser_outputs("train")
    points = outputs.metadata["points3D_xyz"]
    assert len(points) > 100 and outputs.metadata["points3D_rgb"].float().std() > 10
    # The points lie where the cameras look: in front of them, and projected into the picture.
    camera = outputs.cameras.camera_to_worlds[0]
    seen = (points - camera[:, 3]) @ camera[:, :3]
    assert (seen[:, 2] < 0).float().mean() > 0.9
    ours = AutoDataParserConfig(data=made).setup().get_dataparser_outputs("train")
    near, far = ours.metadata["near_far"]
    depths = -seen[:, 2]
    assert ((depths > near) & (depths < far)).float().mean() > 0.9


def test_an_interrupted_run_goes_on_from_its_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    photos, out = still_life(tmp_path / "photos"), tmp_path / "scene"

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pycolmap, "incremental_mapping", interrupted)
        with pytest.raises(KeyboardInterrupt):
            scene_from_photos(photos, out)
    assert not out.exists()
    assert (tmp_path / ".scene.from-photos" / "database.db").is_file()

    def again(*_: object, **__: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(pycolmap, "extract_features", again)
    monkeypatch.setattr(pycolmap, "match_image_pairs", again)
    assert scene_from_photos(photos, out).registered == 25
    assert not (tmp_path / ".scene.from-photos").exists()


def test_sigterm_after_poses_were_found_is_still_pythons_to_handle(tmp_path: Path):
    """pycolmap would show a stack and abort."""
    code = """
import os, signal, sys
from pathlib import Path
from shiftadd3d import UserError
from shiftadd3d.scenes import poses
signal.signal(signal.SIGTERM, lambda *_: sys.exit("as asked"))
work = Path(sys.argv[1])
try:
    poses.find_poses([], work, work, in_sequence=False, lens=None, threads=1, seed=0, console=None)
except Exception:  # without photos there is nothing to find
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()
"""
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, "as asked\n")


def test_a_damaged_database_is_made_again(tmp_path: Path):
    photos, out = still_life(tmp_path / "photos"), tmp_path / "scene"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pycolmap, "extract_features", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            scene_from_photos(photos, out)
    (tmp_path / ".scene.from-photos" / "database.db").write_bytes(b"no database" * 1000)
    assert scene_from_photos(photos, out).registered == 25


def test_two_runs_do_not_share_a_folder(tmp_path: Path):
    photos, work = still_life(tmp_path / "photos"), tmp_path / ".scene.from-photos"
    work.mkdir()
    (work / "process").write_text(str(os.getppid()))
    with pytest.raises(UserError, match="is already making this scene"):
        scene_from_photos(photos, tmp_path / "scene")


@pytest.mark.slow
def test_global_mapping_is_the_second_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pycolmap, "incremental_mapping", lambda *_, **__: {})
    report = scene_from_photos(still_life(tmp_path / "photos"), tmp_path / "scene")
    assert report.registered >= 20
    degrees, distance = errors(poses_of(tmp_path / "scene"), true_poses_of(tmp_path / "scene"))
    assert degrees < 3.0 and distance < 0.06


def true_poses_of(scene: Path) -> dict[str, np.ndarray]:
    true = true_poses()
    return {name: true[name] for name in poses_of(scene)}


def test_fewer_than_half_of_the_photos_says_what_to_do(tmp_path: Path):
    photos = still_life(tmp_path / "photos", step=2)
    rng = np.random.default_rng(0)
    for number in range(26):
        noise = Image.fromarray(rng.integers(0, 255, (15, 20, 3), dtype=np.uint8))
        noise.resize((160, 120)).save(photos / f"x{number}.png")
    report = scene_from_photos(photos, tmp_path / "scene")
    assert report.registered == 25 and len(report.unregistered) == 26
    assert any("fewer than half" in note and "overlapping" in note for note in report.notes)
    assert "not placed: x0.png" in str(report)


def textured(width: int, height: int) -> Image.Image:
    """Noise of many scales: features everywhere."""
    rng = np.random.default_rng(0)
    total = np.zeros((height, width, 3))
    for scale in (4, 8, 16, 32, 64):
        noise = Image.fromarray(rng.integers(0, 255, (height // scale, width // scale, 3), dtype=np.uint8))
        total += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), float) / 5
    return Image.fromarray(total.astype(np.uint8))


def save_panorama(folder: Path) -> None:
    """What a camera sees that turns on the spot: homographies of one picture."""
    scene, focal = textured(1600, 800), 1200.0
    full = np.array([[focal, 0, 800], [0, focal, 400], [0, 0, 1]])
    view = np.array([[200.0, 0, 100], [0, 200, 75], [0, 0, 1]])
    for number, angle in enumerate(np.radians(np.linspace(-12, 12, 5))):
        turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
        homography = full @ turn @ np.linalg.inv(view)
        coefficients = (homography / homography[2, 2]).ravel()[:8]
        turned = scene.transform((200, 150), Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC)
        turned.save(folder / f"{number}.png")


def save_resaved_copies(folder: Path) -> None:
    for quality in range(80, 84):
        textured(160, 120).save(folder / f"{quality}.jpg", quality=quality)


def save_different_things(folder: Path) -> None:
    for number in range(4):
        part = textured(640, 480).crop((160 * number, 0, 160 * number + 160, 120))
        part.save(folder / f"{number}.png")


def save_walls(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(rng.normal(200, 2, (240, 320, 3)).clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg")


def save_copies(folder: Path) -> None:
    for number in range(10):
        textured(320, 240).save(folder / f"{number}.png")


def save_one(folder: Path) -> None:
    textured(320, 240).save(folder / "a.png")


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda folder: None, r"no photos in"),
        (save_one, r"1 usable photo; expected 3 at least"),
        (save_copies, r"1 usable photo \(9 more left out, such as 1.png: a copy of 0.png\)"),
        (save_resaved_copies, r"no parallax.*step sideways"),
        (save_panorama, r"no parallax.*taken from one spot"),
        (save_different_things, r"no three of them show the same things"),
        (save_walls, r"hardly anything to recognise \(blurred, dark, or plain walls\)"),
    ],
)
def test_photos_that_make_no_scene_say_why(save, message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "photos").mkdir()
    save(tmp_path / "photos")
    arguments = ["scenes", "from-photos", str(tmp_path / "photos"), "--out", str(tmp_path / "scene")]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


def test_pictures_of_several_cameras_give_intrinsics_to_each_frame(tmp_path: Path):
    photos = still_life(tmp_path / "photos", step=2)
    for path in sorted(photos.iterdir())[::2]:
        with Image.open(path) as image:
            image.crop((20, 0, 140, 120)).save(path)
    report = scene_from_photos(photos, tmp_path / "scene")
    meta = json.loads((tmp_path / "scene" / "transforms.json").read_text())
    assert report.cameras == 2 and report.registered >= 20
    assert "fl_x" not in meta and "w" not in meta
    assert {(frame["w"], frame["h"]) for frame in meta["frames"]} == {(160, 120), (120, 120)}
    for frame in meta["frames"]:
        assert frame["fl_x"] == pytest.approx(198, rel=0.08)
        with Image.open(tmp_path / "scene" / frame["file_path"]) as image:
            assert image.size == (frame["w"], frame["h"])


def test_comparing_only_photos_that_look_alike_places_them_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compared = []
    match = pycolmap.match_image_pairs

    def counted(*args: object, pairing_options: object, **kwargs: object) -> None:
        compared.extend(Path(pairing_options.match_list_path).read_text().splitlines())
        match(*args, pairing_options=pairing_options, **kwargs)

    monkeypatch.setattr(pycolmap, "match_image_pairs", counted)
    for name, value in (("_ALL_PAIRS_UP_TO", 10), ("_SIMILAR", 6), ("_NEIGHBOURS", 1)):
        monkeypatch.setattr(poses_module, name, value)
    assert scene_from_photos(still_life(tmp_path / "photos"), tmp_path / "scene").registered >= 23
    assert 25 * 3 < len(compared) < 25 * 24 / 2 / 2


def test_what_cannot_be_written_and_wrong_options_are_refused(tmp_path: Path):
    photos = still_life(tmp_path / "photos")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*name a writable folder"):
        scene_from_photos(photos, tmp_path / "file" / "scene")
    with pytest.raises(UserError, match="does not exist; expected a folder of photos, or a video"):
        scene_from_photos(tmp_path / "nothing", tmp_path / "scene")
    with pytest.raises(UserError, match="--max-side 10: expected 64 or more"):
        scene_from_photos(photos, tmp_path / "scene", FromPhotosOptions(max_side=10))


def test_without_pycolmap_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs pycolmap, which is not installed: pip install 'shiftadd3d\[poses\]'"):
        scene_from_photos(tmp_path, tmp_path / "scene")


def test_few_photos_are_all_compared_and_many_with_those_that_look_alike():
    def none() -> np.ndarray:
        raise AssertionError("not needed")

    assert len(pairs_to_match(60, False, none)) == 60 * 59 // 2
    alike = np.zeros((300, 300))
    alike[7, 250] = alike[250, 7] = 50
    photos = pairs_to_match(300, False, lambda: alike)
    assert (7, 250) in photos and len(photos) < 300 * 25
    frames = pairs_to_match(300, True, lambda: alike)
    assert {(7, 250), (0, 1), (0, 10), (0, 16), (0, 256)} <= set(frames) and (0, 11) not in frames
    assert all(a < b for a, b in (*photos, *frames))
