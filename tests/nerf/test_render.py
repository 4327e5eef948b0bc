"""`shiftadd3d render`: paths, files, and every way in which it can be asked for the impossible."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
import yaml
from nerfstudio.cameras.cameras import Cameras

from shiftadd3d import UserError, cli
from shiftadd3d.kernels import numerics
from shiftadd3d.nerf import render as rendering
from shiftadd3d.nerf.model import GNTNerfModel
from shiftadd3d.nerf.runs import Run, load_run
from shiftadd3d.nn import FrozenModule, FrozenMoE, MoEMlp, PackedShiftLinear, ShiftLinear

SMALL = ("--scale", "0.5")
RAYS = ("origins", "directions", "near", "far")


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> Run:
    return load_run(tiny_run)


def error_of(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a failing command prints."""
    capsys.readouterr()
    assert cli.main(args) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def centres(cameras: Cameras) -> np.ndarray:
    return cameras.camera_to_worlds[:, :, 3].numpy()


def test_a_network_that_is_only_to_render_is_frozen_and_shows_the_same_picture(
    run: Run, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(GNTNerfModel, "freeze", lambda _: None)
    monkeypatch.setattr(GNTNerfModel, "_network", lambda model: model.gnt)
    trainable = load_run(tiny_run).pipeline.model
    frozen = run.pipeline.model
    assert {ShiftLinear, MoEMlp} <= {type(module) for module in trainable.modules()}
    kinds = {type(module) for module in frozen.modules()}
    assert {PackedShiftLinear, FrozenMoE} <= kinds and not {ShiftLinear, MoEMlp} & kinds
    camera = run.pipeline.datamanager.train_dataset.cameras[:1]
    with torch.no_grad(), numerics("twin"):
        shown, expected = (model.eval().get_outputs_for_camera(camera)["rgb"] for model in (frozen, trainable))
    assert torch.equal(shown, expected)


def test_routing_is_the_share_of_samples_at_the_multiplying_expert(
    run: Run, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
):
    model = run.pipeline.model
    monkeypatch.setattr(model.config, "chessboard", False)  # on which a ray's samples depend on its neighbours
    camera = run.pipeline.datamanager.train_dataset.cameras[:1]
    shown = model.get_outputs_for_camera(camera)["routing"]
    assert shown.shape == (int(camera.height), int(camera.width), 1)
    assert 0 <= shown.min() < shown.max() <= 1
    # One ray by itself, and what each mixture was seen to do with its samples.
    inputs = model.network_inputs(camera, shown.shape[:2])
    at = int((shown.flatten() - 0.5).abs().argmax())
    with torch.no_grad():
        model.gnt(**{name: x[at : at + 1] if name in RAYS else x for name, x in inputs.items()})
    shares = [
        (module.last_assignment == 0).float().mean() for module in model.gnt.modules() if isinstance(module, FrozenMoE)
    ]
    assert len(shares) > 1
    assert float(shown.flatten()[at]) == pytest.approx(float(torch.stack(shares).mean()), abs=0.05)


def test_a_film_keeps_no_account_of_routing_unless_it_shows_it(run: Run):
    model, cameras = run.pipeline.model, run.pipeline.datamanager.train_dataset.cameras[:1]
    mixtures = [module for module in model.gnt.modules() if isinstance(module, FrozenMoE)]
    for names in (["rgb"], ["rgb", "routing"]):
        for mixture in mixtures:
            mixture.last_assignment = None
        frames = rendering.render_frames(model, cameras, names)
        next(frames)
        noted = [module.last_assignment is not None for module in mixtures]
        assert noted == [names[-1] == "routing"] * len(mixtures)
        frames.close()
    with model.without_routing():
        assert "routing" not in model.get_outputs_for_camera(cameras)
    assert "routing" in model.get_outputs_for_camera(cameras)


def test_a_network_without_mixtures_has_no_routing(run: Run):
    with pytest.raises(UserError, match="--outputs routing: a run without mixtures of experts has no such output"):
        rendering.picture({"rgb": torch.zeros(2, 2, 3)}, ["routing"], (1.0, 2.0))


@torch.no_grad()
def test_photos_of_other_exposures_are_brought_to_one(run: Run, monkeypatch: pytest.MonkeyPatch):
    model, counted = run.pipeline.model, []
    find = GNTNerfModel._exposure_gains
    monkeypatch.setattr(GNTNerfModel, "_exposure_gains", lambda *given: counted.append(1) or find(*given))
    cameras = run.pipeline.datamanager.train_dataset.cameras
    bank = model._get_bank()
    ids = bank.nearest(bank.camera_to_world[0], 4, exclude=0)
    monkeypatch.setattr(bank, "images", bank.images.clone())
    model._forget_what_was_made()
    plain = model._sources(ids).images.mean(dim=(1, 2, 3))
    bank.images[ids[1]] = (0.7 * bank.images[ids[1]].float()).to(torch.uint8)
    model._forget_what_was_made()
    darker = bank.gather(ids).images.mean(dim=(1, 2, 3))
    found = model._sources(ids).images.mean(dim=(1, 2, 3))
    apart = [float((x / x.mean())[1]) for x in (plain, darker, found)]
    assert abs(apart[2] - apart[0]) < 0.5 * abs(apart[1] - apart[0]), apart
    model.get_outputs_for_camera(cameras[:1])
    model._sources(ids)
    assert len(counted) == 3, "once for each set of views"
    model.config.match_exposure = False
    model._forget_what_was_made()
    assert torch.equal(model._sources(ids).images, bank.gather(ids).images)
    model.config.match_exposure = True


def test_while_a_network_trains_a_frozen_copy_of_it_renders(run: Run, tiny_run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(GNTNerfModel, "freeze", lambda _: None)
    model = load_run(tiny_run).pipeline.model
    names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    camera = run.pipeline.datamanager.train_dataset.cameras[:1]
    for one in (model, run.pipeline.model):  # an exposure that is found a little differently changes all pixels
        monkeypatch.setattr(one.config, "match_exposure", False)
        one._forget_what_was_made()

    def evaluate() -> torch.Tensor:
        model.train()
        model.eval()
        return model.get_outputs_for_camera(camera)["rgb"]

    before = evaluate()
    torch.testing.assert_close(before, run.pipeline.model.get_outputs_for_camera(camera)["rgb"])
    with torch.no_grad():
        renderer = model._network()
        assert any(isinstance(module, FrozenModule) for module in renderer.modules())
        assert model._network() is renderer
        model.gnt.net_coarse.color_head.sample_logit_fc.weight += 0.1
    assert not torch.equal(evaluate(), before), "the copy is of the weights as they are"
    assert list(model.state_dict()) == names and [type(module) for module in model.modules()] == kinds
    assert model._network() is model.gnt, "gradients run through the network itself"


# Paths


def test_interpolation_starts_and_ends_at_views_and_moves_evenly(run: Run):
    views = run.pipeline.datamanager.train_dataset.cameras
    path = rendering.interpolated_path(views, 40)
    assert len(path) == 40
    for end in centres(path)[[0, -1]]:
        assert np.abs(centres(views) - end).sum(axis=1).min() < 1e-4
    steps = np.linalg.norm(np.diff(centres(path), axis=0), axis=1)
    assert steps.min() > 0.5 * np.median(steps)
    assert steps.max() < 1.6 * np.median(steps)
    assert path.width.unique().item() == 64
    assert path.height.unique().item() == 48


def test_interpolation_keeps_the_size_of_a_camera_whose_centre_is_not_in_the_middle(run: Run):
    views = run.pipeline.datamanager.train_dataset.cameras
    moved = dataclasses.replace(views, cx=views.cx + 3, cy=views.cy - 2)
    path = rendering.interpolated_path(moved, 5)
    assert (int(path.width[0]), int(path.height[0])) == (64, 48)
    assert float(path.cx[0]) == float(moved.cx[0])


def test_spiral_keeps_looking_at_one_point_upright(run: Run):
    view = run.pipeline.datamanager.train_dataset.cameras[0:1]
    path = rendering.spiral_path(view, focus=2.0, frames=12)
    rotation, centre = view.camera_to_worlds[0, :, :3], view.camera_to_worlds[0, :, 3]
    focus = centre - 2.0 * rotation[:, 2]
    to_focus = torch.nn.functional.normalize(focus - path.camera_to_worlds[:, :, 3], dim=-1)
    assert torch.allclose(to_focus, -path.camera_to_worlds[:, :, 2], atol=1e-5)
    assert (path.camera_to_worlds[:, :, 1] @ rotation[:, 1] > 0.98).all()
    rotations = path.camera_to_worlds[:, :, :3]
    assert torch.allclose(rotations @ rotations.mT, torch.eye(3).expand(12, 3, 3), atol=1e-5)
    assert torch.det(rotations).min() > 0


def test_views_of_a_split_are_rendered_as_they_are_or_thinned_out(run: Run):
    dataset = run.pipeline.datamanager.train_dataset
    assert torch.equal(rendering.make_path(run.pipeline, "train").camera_to_worlds, dataset.cameras.camera_to_worlds)
    some = rendering.make_path(run.pipeline, "train", frames=3)
    assert torch.equal(some.camera_to_worlds[[0, -1]], dataset.cameras.camera_to_worlds[[0, -1]])
    assert len(some) == 3


def test_one_test_view_alone_is_not_interpolated_unless_asked_for(run: Run):
    datamanager = run.pipeline.datamanager
    assert len(datamanager.eval_dataset) == 1
    path = rendering.make_path(run.pipeline, "interpolate", 4)
    assert np.abs(centres(datamanager.train_dataset.cameras) - centres(path)[0]).sum(axis=1).min() < 1e-4


def test_scaling_leaves_the_original_cameras_alone(run: Run):
    cameras = run.pipeline.datamanager.train_dataset.cameras
    half = rendering.scale_cameras(cameras, 0.5)
    assert (int(half.width[0]), int(half.height[0]), int(cameras.width[0])) == (32, 24, 64)
    assert torch.allclose(half.fx * 2, cameras.fx)


def write_camera_path(path: Path, view: Cameras, frames: int = 3, **extra: object) -> Path:
    pose = torch.cat([view.camera_to_worlds[0], torch.tensor([[0.0, 0.0, 0.0, 1.0]])]).flatten().tolist()
    frame = {"camera_to_world": pose, "fov": 50.0, "aspect": 1.5}
    content = {"render_height": 24, "render_width": 33, "camera_path": [frame] * frames, **extra}
    path.write_text(json.dumps(content))
    return path


def test_a_path_exported_from_the_viewer_is_followed(tiny_run: Path, run: Run, tmp_path: Path):
    file = write_camera_path(tmp_path / "path.json", run.pipeline.datamanager.eval_dataset.cameras, seconds=0.3)
    cameras, rate = rendering.read_camera_path(file)
    assert (len(cameras), rate) == (3, pytest.approx(10.0))
    out = tmp_path / "path.mp4"
    assert cli.main(["render", "--load-config", str(tiny_run), "--out", str(out), "--camera-path", str(file)]) == 0
    video = imageio.get_reader(out)
    assert video.get_meta_data()["fps"] == pytest.approx(10.0)
    # An odd width gains one column; nothing is resized.
    assert video.get_meta_data()["size"] == (34, 24)
    assert video.count_frames() == 3


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"render_height": 0, "render_width": 0}, "0x0 pixels; expected render_width"),
        ({"camera_to_world": float("nan")}, "camera_to_world of camera 1 is impossible; expected finite"),
        ({"fov": float("nan")}, "fov of camera 1 is impossible; expected 0 < degrees < 180"),
    ],
)
def test_a_path_of_no_pixels_or_no_numbers_is_refused(run: Run, tmp_path: Path, change: dict, complaint: str):
    file = write_camera_path(tmp_path / "path.json", run.pipeline.datamanager.eval_dataset.cameras)
    content = json.loads(file.read_text())
    for name, value in change.items():
        if name in content:
            content[name] = value
        elif name == "fov":
            content["camera_path"][1][name] = value
        else:
            content["camera_path"][1][name][3] = value
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=complaint):
        rendering.read_camera_path(file)


def test_a_fisheye_path_has_no_hole_in_the_middle(run: Run, tmp_path: Path):
    size = {"camera_type": "fisheye", "render_height": 17, "render_width": 25}
    file = write_camera_path(tmp_path / "path.json", run.pipeline.datamanager.eval_dataset.cameras, **size)
    outputs = run.pipeline.model.get_outputs_for_camera(rendering.read_camera_path(file)[0][:1])
    assert all(value.isfinite().all() for value in outputs.values())
    assert float(outputs["accumulation"][8, 12]) > 0.5


# Files


def test_outputs_stand_side_by_side_in_png_frames_and_stale_ones_go(tiny_run: Path, tmp_path: Path):
    out = tmp_path / "new" / "frames"
    out.mkdir(parents=True)
    (out / "frame_00007.png").write_text("of an earlier, longer path")
    (out / "notes.txt").write_text("mine")
    args = ["render", "--load-config", str(tiny_run), "--out", str(out), "--path", "train", "--frames", "2"]
    assert cli.main([*args, "--outputs", "rgb", "depth", "routing", *SMALL]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["frame_00000.png", "frame_00001.png", "notes.txt"]
    frame = imageio.imread(out / "frame_00001.png")
    assert frame.shape == (24, 3 * 32, 3)
    assert frame.dtype == np.uint8
    assert frame[:, :32].std() > 1


def test_a_gif_is_written_under_its_name_only_when_it_is_complete(tiny_run: Path, tmp_path: Path):
    out = tmp_path / "a.gif"
    args = ["render", "--load-config", str(tiny_run), "--out", str(out), "--path", "spiral", "--frames", "2"]
    assert cli.main([*args, *SMALL]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]
    assert imageio.mimread(out)[0].shape[:2] == (24, 32)


def frames_until(error: BaseException, count: int) -> Iterator[np.ndarray]:
    for value in range(count):
        yield np.full((24, 33, 3), 40 * value, dtype=np.uint8)
    raise error


@pytest.mark.parametrize("name", ["v.mp4", "v.gif"])
def test_an_interrupt_keeps_a_shorter_video_beside(
    name: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(rendering, "render_frames", lambda *args: frames_until(KeyboardInterrupt(), 5))
    out = tmp_path / name
    with pytest.raises(KeyboardInterrupt):
        rendering.write_path(run.pipeline.model, rendering.make_path(run.pipeline, frames=9), out)
    unfinished = tmp_path / name.replace(".", ".unfinished.")
    assert [path.name for path in tmp_path.iterdir()] == [unfinished.name]
    assert len(imageio.mimread(unfinished)) == 5
    assert "Interrupted after 5 of 9 frames" in capsys.readouterr().out


def test_an_interrupt_keeps_the_frames_of_a_folder(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rendering, "render_frames", lambda *args: frames_until(KeyboardInterrupt(), 3))
    with pytest.raises(KeyboardInterrupt):
        rendering.write_path(run.pipeline.model, rendering.make_path(run.pipeline, frames=9), tmp_path / "frames")
    assert sorted(path.name for path in (tmp_path / "frames").iterdir()) == [f"frame_0000{i}.png" for i in range(3)]


def test_a_failure_leaves_no_unfinished_file_and_the_old_video(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "v.mp4"
    out.write_bytes(b"the old one")
    monkeypatch.setattr(rendering, "render_frames", lambda *args: frames_until(RuntimeError("a bug"), 2))
    with pytest.raises(RuntimeError, match="a bug"):
        rendering.write_path(run.pipeline.model, rendering.make_path(run.pipeline, frames=9), out)
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]
    assert out.read_bytes() == b"the old one"


# Runs


@pytest.fixture
def moved_run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the run elsewhere, to be damaged."""
    return Path(shutil.copytree(tiny_run.parent, tmp_path / "moved")) / "config.yml"


def test_a_run_is_found_where_it_was_moved_to(moved_run: Path):
    assert load_run(moved_run).checkpoint.is_relative_to(moved_run.parent)


def test_a_missing_config_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    error = error_of(["render", "--load-config", str(tmp_path / "no.yml"), "--out", str(tmp_path / "a.mp4")], capsys)
    assert "no.yml: no such file; expected the config.yml" in error


@pytest.mark.parametrize(
    "content",
    ["a: b", "{", "!!python/object:no.such.module {}", "- 1", "", yaml.dump(Path("x")), "\0\1", "a: 1\n b: 2\n"],
)
def test_a_file_that_is_no_config_of_ours_is_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.yml").write_text(content)
    args = ["render", "--load-config", str(tmp_path / "config.yml"), "--out", str(tmp_path / "a.mp4")]
    assert "not a configuration" in error_of(args, capsys)


def test_another_methods_config_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from nerfstudio.engine.trainer import TrainerConfig

    (tmp_path / "config.yml").write_text(yaml.dump(TrainerConfig(method_name="nerfacto")))
    args = ["render", "--load-config", str(tmp_path / "config.yml"), "--out", str(tmp_path / "a.mp4")]
    assert "of method 'nerfacto'; expected the config.yml" in error_of(args, capsys)


def test_a_missing_and_a_damaged_checkpoint_are_named(moved_run: Path, capsys: pytest.CaptureFixture[str]):
    args = ["render", "--load-config", str(moved_run), "--out", str(moved_run.parent / "a.mp4")]
    checkpoint = next(moved_run.parent.glob("nerfstudio_models/*.ckpt"))
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert f"{checkpoint.name}: damaged" in error_of(args, capsys)
    checkpoint.unlink()
    assert "no step-*.ckpt in there" in error_of(args, capsys)


# Arguments


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        (["--frames", "1"], "--frames 1: expected 2 or more"),
        (["--frames", "-3"], "--frames -3: expected 2 or more"),
        (["--scale", "0"], "--scale 0: expected a positive number"),
        (["--scale", "nan"], "--scale nan: expected a positive number"),
        (["--scale", "0.001"], "--scale 0.001: no pixel is left of 64x48"),
        (["--views", "test"], "1 view cannot be interpolated; expected at least 2"),
        (["--fps", "0"], "--fps 0: expected a positive number"),
        (["--outputs", "rgb", "normals", *SMALL], "no such output; expected some of accumulation, depth, rgb"),
        (["--outputs"], "--outputs: expected at least one"),
        (["--camera-path", "no.json"], "no.json: no such file"),
    ],
)
def test_an_impossible_argument_is_explained(
    extra: list[str], complaint: str, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "a.mp4"
    assert complaint in error_of(["render", "--load-config", str(tiny_run), "--out", str(out), *extra], capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "cannot be read"),
        ("[]", "not a camera path"),
        ('{"render_height": 4, "render_width": 4, "camera_path": []}', "not a camera path"),
        ('{"render_height": 4, "render_width": 4, "camera_path": [{"fov": 3}]}', "not a camera path"),
    ],
)
def test_a_file_that_is_no_camera_path_is_refused(
    content: str, complaint: str, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "path.json").write_text(content)
    args = ["render", "--load-config", str(tiny_run), "--out", str(tmp_path / "a.mp4")]
    assert complaint in error_of([*args, "--camera-path", str(tmp_path / "path.json")], capsys)


def test_a_panorama_is_refused(run: Run, tmp_path: Path):
    view = run.pipeline.datamanager.eval_dataset.cameras
    file = write_camera_path(tmp_path / "path.json", view, camera_type="equirectangular")
    with pytest.raises(ValueError, match="cameras of type equirectangular; expected perspective or fisheye"):
        rendering.read_camera_path(file)


def test_a_place_that_cannot_be_written_to_is_named(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    args = ["render", "--load-config", str(tiny_run), "--out"]
    assert "unknown suffix .avi; expected .mp4, .gif, or a folder" in error_of([*args, str(tmp_path / "a.avi")], capsys)
    assert "a file is in the way" in error_of([*args, str(tmp_path / "file")], capsys)
    assert "a folder is in the way" in error_of([*args, str(tmp_path / "folder.mp4")], capsys)
    assert "cannot make the folder" in error_of([*args, str(tmp_path / "file" / "a.mp4")], capsys)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tmp_path.chmod(0o500)
    args = ["render", "--load-config", str(tiny_run), "--out", str(tmp_path / "a.mp4")]
    assert "cannot write" in error_of(args, capsys)
    tmp_path.chmod(0o700)


@pytest.mark.skipif(sys.platform == "win32", reason="locks of its own")
@pytest.mark.parametrize("out", ["frames", "video.mp4"])
def test_a_place_that_another_process_renders_to_is_refused(
    out: str, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    import fcntl

    held = tmp_path / (".video.mp4.being-written" if out == "video.mp4" else "frames/.being-written")
    held.parent.mkdir(exist_ok=True)
    with held.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # of another opening of the file, as another process's is
        error = error_of(["render", "--load-config", str(tiny_run), "--out", str(tmp_path / out)], capsys)
    assert f"another process is writing to {tmp_path / out}" in error
