"""`shiftadd3d movie`: from photos or a scene to a video, and every way in which that can go wrong."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from nerfstudio.engine.trainer import Trainer
from nerfstudio.utils import writer
from PIL import Image

from shiftadd3d import UserError, cli
from shiftadd3d.configs import methods, pretrained
from shiftadd3d.kernels import numerics
from shiftadd3d.nerf import movie as module
from shiftadd3d.nerf import timed_training
from shiftadd3d.nerf.kept_frames import KeptFrames, fingerprint
from shiftadd3d.nerf.movie_options import MovieOptions, default_out
from shiftadd3d.nerf.pretrained import open_scene
from shiftadd3d.nerf.runs import load_run
from shiftadd3d.nerf.smooth_path import smooth_path
from shiftadd3d.scenes import poses as poses_module

# The path


def look_at(centres: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Cameras in OpenGL axes that look at a point, z up."""
    back = centres - target
    back /= np.linalg.norm(back, axis=1, keepdims=True)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    return np.stack([right, np.cross(back, right), back, centres], axis=-1)


def rolled(poses: np.ndarray, degrees: np.ndarray) -> np.ndarray:
    """The same cameras, turned about their axes."""
    cos, sin = np.cos(np.deg2rad(degrees))[:, None], np.sin(np.deg2rad(degrees))[:, None]
    right, up, back, centre = np.moveaxis(poses, -1, 0)
    return np.stack([cos * right + sin * up, cos * up - sin * right, back, centre], axis=-1)


def capture(kind: str) -> np.ndarray:
    """Views as people take them: unevenly, not quite level, in no order."""
    random = np.random.default_rng(0)
    if kind == "grid":
        x, z = (axis.ravel() for axis in np.meshgrid(np.arange(5.0), np.arange(4.0)))
        places = np.stack([x, 0 * x, z], axis=1) + 0.1 * random.normal(size=(20, 3))
        poses = look_at(places, np.array([2.0, 30.0, 1.5]))
    elif kind == "dome":
        places = random.normal(size=(100, 3))
        places[:, 2] = np.abs(places[:, 2])
        return look_at(4 * places / np.linalg.norm(places, axis=1, keepdims=True), np.zeros(3))
    else:
        angle = np.arange(40) * 2 * np.pi / 40
        ring = np.stack([4 * np.cos(angle), 4 * np.sin(angle), 1 + 0.1 * random.normal(size=40)], axis=1)
        poses = look_at(ring, np.zeros(3))
    return random.permutation(rolled(poses, 5 * random.normal(size=len(poses))))


@pytest.mark.parametrize(("kind", "frames"), [("ring", 60), ("ring", 240), ("grid", 60), ("grid", 240), ("dome", 60)])
def test_a_path_is_even_smooth_and_level_and_begins_and_ends_at_views(kind: str, frames: int):
    views = capture(kind)
    path, keys = smooth_path(views, frames)
    assert path.shape == (frames, 3, 4)
    rotation, centres = path[:, :, :3], path[:, :, 3]
    assert np.allclose(np.swapaxes(rotation, 1, 2) @ rotation, np.eye(3), atol=1e-9)
    assert (np.linalg.det(rotation) > 0).all()
    assert np.allclose(centres[[0, -1]], views[keys[[0, -1]], :, 3], atol=1e-6)
    steps = np.diff(centres, axis=0)
    speed = np.linalg.norm(steps, axis=1)
    # Where it turns within a frame, the step is cut short.
    assert 0.5 * speed.mean() < speed.min() and speed.max() < 1.2 * speed.mean()
    # A frame's step is like the one before: no turns on the spot. 2.0 would be a way straight back.
    assert np.linalg.norm(np.diff(steps, axis=0), axis=1).max() < 1.6 * speed.mean()
    turns = np.rad2deg(np.linalg.norm(np.diff(path[:, :, 2], axis=0), axis=1))
    assert np.abs(np.diff(turns)).max() < 3.0
    assert np.abs(np.arcsin(path[:, 2, 0])).max() < np.deg2rad(6.0)  # views are tilted by five, up to ten


@pytest.mark.parametrize("frames", [120, 240, 600])
def test_a_path_over_a_dome_never_turns_back(frames: int):
    path, keys = smooth_path(capture("dome"), frames)
    steps = np.diff(path[:, :, 3], axis=0)
    steps /= np.linalg.norm(steps, axis=1, keepdims=True)
    # From frame to frame; and from view to view.
    assert (steps[1:] * steps[:-1]).sum(axis=1).min() > 0.0
    assert len(keys) > 0.5 * frames / 8 or len(keys) > 30


def test_a_path_through_a_ring_goes_once_around_it_and_closes():
    views = capture("ring")
    path, keys = smooth_path(views, 150)
    assert keys[0] == keys[-1] and len(set(keys[:-1])) == len(keys) - 1
    around = np.unwrap(np.arctan2(path[:, 1, 3], path[:, 0, 3]))
    assert abs(around[-1] - around[0]) == pytest.approx(2 * np.pi, abs=1e-6)
    assert (np.diff(around) > 0).all() or (np.diff(around) < 0).all()
    assert np.linalg.norm(path[:, :, 3], axis=1).min() > 3.9  # not straight from view to view, through the scene


def test_few_frames_go_along_a_part_instead_of_rushing_through_all():
    path, keys = smooth_path(capture("ring"), 30)
    assert keys[0] != keys[-1]
    around = np.unwrap(np.arctan2(path[:, 1, 3], path[:, 0, 3]))
    # Nine degrees are the way to the view next door.
    assert np.rad2deg(np.abs(np.diff(around)).max()) < 6.0


def test_views_that_agree_on_no_horizon_keep_their_own():
    views = rolled(capture("ring"), np.arange(40) * 90.0)
    path, keys = smooth_path(views, 60)
    assert np.allclose(path[0], views[keys[0]], atol=1e-6)


def test_two_views_or_copies_of_one_make_a_path_too():
    views = capture("ring")
    path, _ = smooth_path(views[:2], 10)
    assert np.allclose(path[[0, -1], :, 3], views[:2, :, 3], atol=1e-6)
    still, _ = smooth_path(np.repeat(views[:1], 4, axis=0), 10)
    assert np.allclose(still, views[0])


# The movie


@pytest.fixture(autouse=True)
def _no_writers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer, "EVENT_WRITERS", [])  # not those of a run before, in this process


def make(source: Path, out: Path, *more: str) -> int:
    return cli.main(["movie", str(source), "--out", str(out), "--frames", "3", *more])


def commands_in(text: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in text.partition("Go on with:\n")[2].splitlines()]


@pytest.mark.slow
def test_a_scene_becomes_a_movie_and_what_is_said_to_come_next_works(
    tiny_scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out, facts_file = tmp_path / "my movie.mp4", tmp_path / "facts.json"
    more = ("--preview", "--outputs", "rgb", "depth", "--fps", "10", "--json", str(facts_file))
    assert make(tiny_scene, out, *more) == 0
    video = imageio.get_reader(out)
    assert video.count_frames() == 3
    assert video.get_meta_data()["size"] == (128, 48)
    assert video.get_meta_data()["fps"] == 10
    assert Image.open(tmp_path / "my movie.preview.png").size == (128, 48)
    facts = json.loads(facts_file.read_text())
    assert facts["scene"] == str(tiny_scene) and facts["run"] is None
    assert {"start", "poses", "opening", "preview", "rendering"} == set(facts["seconds"]) == set(facts["cpu_seconds"])
    text = capsys.readouterr().out
    assert str(out) in text and str(tiny_scene) in text
    assert "--size 252 is more than the photos have" in text
    spiral, trained, train_on = commands_in(text)
    assert trained[trained.index("--minutes") + 1] == "10"
    assert train_on[:2] == ["ns-train", "shiftadd-gnt-tiny"] and train_on[-1] == str(tiny_scene)
    assert cli.main(spiral[1:]) == 0
    video = imageio.get_reader(tmp_path / "my movie-spiral.mp4")
    assert (video.count_frames(), video.get_meta_data()["size"], video.get_meta_data()["fps"]) == (3, (128, 48), 10)


def test_frames_at_views_are_made_of_those_views_too(tiny_scene: Path, tmp_path: Path):
    """Pictures of noise: nothing but the view itself can show them."""
    assert make(tiny_scene, tmp_path / "frames", "--path", "views", "--frames", "2") == 0
    frame = np.asarray(Image.open(tmp_path / "frames/frame_00000.png"), dtype=float)
    photo = np.asarray(Image.open(tiny_scene / "images/000.png"), dtype=float)
    opened = open_scene(pretrained.shiftadd_gnt_tiny, tiny_scene)
    camera = opened.views.cameras[0:1]
    judged = opened.model.get_outputs_for_camera(camera)["rgb"].numpy() * 255
    assert np.square(frame - photo).mean() < 0.5 * np.square(judged - photo).mean()


def test_a_movie_without_training_needs_neither_nerfstudios_trainer_nor_torchs_compiler(
    tiny_scene: Path, tmp_path: Path
):
    """They would take ten seconds before the first frame."""
    facts = tmp_path / "facts.json"
    options = [str(tiny_scene), "--out", str(tmp_path / "a.mp4"), "--frames", "2", "--json", str(facts)]
    code = (
        "import sys; from shiftadd3d import cli; "
        f"assert cli.main(['movie', *{options!r}]) == 0; print('imported:', *sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(result.stdout.rpartition("imported: ")[2].split())
    slow = {
        "nerfstudio.engine.trainer",
        "nerfstudio.pipelines.base_pipeline",
        "torch._dynamo",
        "torchvision",
        "matplotlib",
    }
    assert "nerfstudio.models.base_model" in imported and not slow & imported
    seconds = json.loads(facts.read_text())["seconds"]
    assert list(seconds) == ["start", "poses", "opening", "rendering"]
    assert seconds["start"] > 0, "importing counts"
    assert re.search(r"^Took: +\d+ s: start \d+ s, poses \d+ s, opening", result.stdout, re.MULTILINE)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method with few rays a step, and nothing to measure before the first."""
    config: Any = copy.deepcopy(methods.shiftadd_gnt_tiny.config)
    config.machine.device_type = "cpu"
    config.pipeline.datamanager.train_num_rays_per_batch = 32
    config.pipeline.model.expert_latencies = (1.0, 1.0)
    monkeypatch.setattr(methods.shiftadd_gnt_tiny, "config", config)


@pytest.mark.usefixtures("quick")
def test_minutes_train_on_the_scene_first_and_no_longer_than_that(
    tiny_scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    # A clock that goes on by a quarter of a second for each step, however long a step takes on this machine.
    monkeypatch.setattr(timed_training, "time", SimpleNamespace(monotonic=itertools.count(0.0, 0.25).__next__))
    assert make(tiny_scene, tmp_path / "a.mp4", "--minutes", "0.05") == 0
    render, viewer, train_on = commands_in(capsys.readouterr().out)
    run = Path(viewer[-1])
    assert run.is_relative_to(tmp_path / "a-training") and run.name == "config.yml"
    assert viewer[0] == "ns-viewer" and train_on[0] == "ns-train" and Path(train_on[3]).is_dir()
    assert render[:4] == ["shiftadd3d", "render", "--load-config", str(run)]
    opened = load_run(run)
    assert opened.config.pipeline.warm_start == Path("pretrained")
    assert opened.step == 12 and len(opened.pipeline.datamanager.train_dataset) == 10
    assert opened.pipeline.model.stage == 2  # the clock brought it, half way
    assert imageio.get_reader(tmp_path / "a.mp4").count_frames() == 3


@pytest.mark.slow
def test_photos_become_a_scene_beside_the_movie_that_serves_again(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("pycolmap")
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in sorted((repository / "scenes/still_life/images").glob("train_*.png"))[:10]:
        shutil.copy(path, photos)
    assert make(photos, tmp_path / "a.mp4", "--size", "64") == 0
    assert (tmp_path / "a-scene/transforms.json").is_file()
    assert imageio.get_reader(tmp_path / "a.mp4").get_meta_data()["size"][0] == 64
    assert "10 of 10 photos placed" in capsys.readouterr().out
    monkeypatch.setattr(poses_module, "find_poses", None)  # not wanted again
    assert make(photos, tmp_path / "b.gif", "--size", "64", "--scene", str(tmp_path / "a-scene")) == 0
    assert (tmp_path / "b.gif").is_file() and not (tmp_path / "b-scene").exists()


# Bad input


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (
            ["{missing}", "--out", "a.mp4"],
            "does not exist; expected a folder of photos, a video file, or a scene folder",
        ),
        (["{empty}", "--out", "a.mp4"], "no photos in"),
        (["{texts}", "--out", "a.mp4"], "or, of a scene with cameras, a folder with transforms.json"),
        (["{nested}", "--out", "a.mp4"], "there are some in"),
        (["{text}", "--out", "a.mp4"], "cannot be read as a video"),
        (["{scene}", "--out", "a.avi"], "unknown suffix .avi; expected .mp4, .gif, or a folder"),
        (["{scene}", "--out", "{text}/a.mp4"], "name a writable one"),
        (["{scene}", "--out", "a.mp4", "--frames", "1"], "--frames 1: expected 2 or more"),
        (["{scene}", "--out", "a.mp4", "--size", "31"], "--size 31: expected 32 pixels or more"),
        (["{scene}", "--out", "a.mp4", "--size", "40"], "would be 40x30 pixels, and the network needs 32"),
        (["{scene}", "--out", "a.mp4", "--minutes", "-1"], "--minutes -1: expected 0 or more"),
        (["{scene}", "--out", "a.mp4", "--fps", "0"], "--fps 0: expected a positive number"),
        (["{scene}", "--out", "a.mp4", "--outputs"], "--outputs: expected at least one"),
        (["{missing}"], "does not exist"),
        (["{missing}", "--fps", "0", "--out", "a.avi"], "does not exist"),
        (["{scene}", "--out", "a.mp4", "--scene", "b"], "is a scene already; leave --scene out"),
    ],
)
def test_what_cannot_be_is_explained_in_one_line(
    args: list[str],
    complaint: str,
    tiny_scene: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "texts", "nested/inside"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "texts/a.txt").write_text("a")
    (tmp_path / "text").write_text("a")
    Image.new("RGB", (64, 48)).save(tmp_path / "nested/inside/a.png")
    places = {name: str(tmp_path / name) for name in ("missing", "empty", "texts", "nested", "text")}
    assert cli.main(["movie", *(word.format(scene=tiny_scene, **places) for word in args)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert complaint in error
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize(
    "args",
    [
        ["nowhere"],
        ["{scene}", "--fps", "0"],
        ["{scene}", "--frames", "-1"],
        ["{scene}", "--out", "b.txt"],
        ["{scene}", "--minutes", "nan"],
    ],
)
def test_wrong_arguments_are_told_before_anything_heavy_is_imported(args: list[str], tiny_scene: Path, tmp_path: Path):
    words = ["movie", *(word.format(scene=tiny_scene) for word in args)]
    code = (
        "import sys; from shiftadd3d import cli; "
        f"code = cli.main({words!r}); print(code, {{'torch', 'numpy', 'nerfstudio'}} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout == "1 set()\n" and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_out_the_movie_is_named_after_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "walk.mp4").touch()
    assert default_out(tmp_path / "photos") == Path("photos-movie.mp4")
    assert default_out(tmp_path / "walk.mp4") == Path("walk-movie.mp4")
    monkeypatch.chdir(tmp_path / "photos")
    assert default_out(Path()) == Path("photos-movie.mp4")


def test_without_pycolmap_it_is_said_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pycolmap" else object())
    assert make(tmp_path, tmp_path / "out/a.mp4") == 1
    assert "pip install 'shiftadd3d[poses]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("step", "left"),
    [
        ("scene_from_photos", "kept beside"),
        ("open_scene", "The scene is in"),
        ("path_past", "The scene is in"),
    ],
)
def test_ctrl_c_at_any_step_says_what_is_kept(
    step: str,
    left: str,
    tiny_scene: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, step, interrupt)
    source = tiny_scene / "images" if step == "scene_from_photos" else tiny_scene
    assert make(source, tmp_path / "a.mp4") == 130
    assert left in capsys.readouterr().out


def test_ctrl_c_while_rendering_keeps_the_frames_so_far(
    tiny_scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from shiftadd3d.nerf.model import GNTNerfModel

    real, count = GNTNerfModel.get_outputs_for_camera, iter((0, 1))

    def twice(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        if next(count, None) is None:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(GNTNerfModel, "get_outputs_for_camera", twice)
    assert make(tiny_scene, tmp_path / "a.mp4") == 130
    text = capsys.readouterr().out
    assert f"They are in {tmp_path / 'a.unfinished.mp4'}" in text and f"The scene is in {tiny_scene}" in text
    assert imageio.get_reader(tmp_path / "a.unfinished.mp4").count_frames() == 2

    rendered: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        rendered.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(GNTNerfModel, "get_outputs_for_camera", counted)
    assert make(tiny_scene, tmp_path / "a.mp4") == 0
    assert "Going on after 2 frames" in capsys.readouterr().out and len(rendered) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert imageio.get_reader(tmp_path / "a.mp4").count_frames() == 3


def test_frames_of_another_movie_are_not_used_again(tiny_scene: Path, tmp_path: Path):
    opened = open_scene(pretrained.shiftadd_gnt_tiny, tiny_scene)
    cameras = opened.views.cameras
    frame = np.zeros((4, 4, 3), dtype=np.uint8)
    first = fingerprint(opened.model, opened.bank, cameras, ("rgb",))
    assert first == fingerprint(opened.model, opened.bank, cameras, ("rgb",))
    others = {
        fingerprint(opened.model, opened.bank, cameras[1:], ("rgb",)),
        fingerprint(opened.model, opened.bank, cameras, ("depth",)),
    }
    with torch.no_grad():
        next(opened.model.gnt.parameters()).add_(1.0)
    others.add(fingerprint(opened.model, opened.bank, cameras, ("rgb",)))
    with numerics("twin"):
        others.add(fingerprint(opened.model, opened.bank, cameras, ("rgb",)))
    assert len({first, *others}) == 5

    folder = tmp_path / "a.unfinished"
    kept = KeptFrames(folder, first)
    assert not folder.exists(), "there is no frame to keep yet"
    kept.add(frame)
    assert KeptFrames(folder, first).count == 1
    assert KeptFrames(folder, others.pop()).count == 0 and not folder.exists()


def test_commands_to_go_on_with_have_the_same_options(tmp_path: Path):
    options = MovieOptions(size=160, frames=8, fps=12.5, outputs=("rgb", "depth"))
    facts: dict = {"scene": "scene", "run": None}
    commands = module._next_commands(facts, pretrained.shiftadd_gnt_tiny, tmp_path / "a.mp4", options)
    another, trained, _ = (shlex.join(words) for words, _ in commands)
    for command in (another, trained):
        assert "--size 160 --frames 8 --fps 12.5 --outputs rgb depth" in command and "--numerics" not in command


def test_a_folder_of_other_things_is_not_used_for_frames(tmp_path: Path):
    (tmp_path / "frame_00000.png").write_text("somebody's")
    with pytest.raises(UserError, match="holds something else"):
        KeptFrames(tmp_path, "1")
    assert (tmp_path / "frame_00000.png").read_text() == "somebody's"


@pytest.mark.usefixtures("quick")
def test_ctrl_c_while_training_keeps_a_checkpoint_and_says_where(
    tiny_scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupt(self: Trainer, step: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train_iteration", interrupt)
    with pytest.raises(SystemExit) as exit_:
        make(tiny_scene, tmp_path / "a.mp4", "--minutes", "1")
    assert exit_.value.code == 130
    assert list((tmp_path / "a-training").glob("**/step-*.ckpt"))
    text = capsys.readouterr().out
    assert "Nothing is lost: go on with ns-train" in text and f"The scene is in {tiny_scene}" in text


@pytest.mark.usefixtures("quick")
def test_the_same_command_goes_on_with_a_training_that_was_interrupted_and_does_not_repeat_one_that_ended(
    tiny_scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(timed_training, "time", SimpleNamespace(monotonic=itertools.count(0.0, 0.25).__next__))
    real, steps = Trainer.train_iteration, []

    def until_the_sixth(self: Trainer, step: int) -> Any:
        if len(steps) == 5:
            steps.append(step)
            raise KeyboardInterrupt
        steps.append(step)
        return real(self, step)

    monkeypatch.setattr(Trainer, "train_iteration", until_the_sixth)
    command = (tiny_scene, tmp_path / "a.mp4", "--minutes", "0.05")
    with pytest.raises(SystemExit):
        make(*command)
    capsys.readouterr()
    (damaged := tmp_path / "a-training/shiftadd-gnt-tiny/zzz/nerfstudio_models").mkdir(parents=True)
    (damaged / "step-000000009.ckpt").write_bytes(b"no checkpoint")

    assert make(*command) == 0
    text = capsys.readouterr().out
    assert re.search(r"Going on with \S+a-training/\S+, after 1 s of 3 s", text.replace("\n", ""))
    assert len(steps) == 6 + 7, "twelve steps in all, one of them interrupted"
    (run,) = (tmp_path / "a-training/shiftadd-gnt-tiny").glob("*/config.yml")
    opened = load_run(run)
    assert opened.step == steps[-1] + 1 and opened.pipeline.model.stage == 2

    assert make(*command) == 0
    assert "Trained already, in" in capsys.readouterr().out and len(steps) == 13
    assert make(*command[:-1], "0.1") == 0
    assert "Trained already" not in capsys.readouterr().out and len(steps) == 13 + 24, "another length is another run"
