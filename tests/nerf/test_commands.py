"""nerfstudio's other commands on runs of ours: exporters, every kind of camera, and runs that were copied."""

from __future__ import annotations

import copy
import datetime
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.configs import experiment_config
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.model_components.renderers import background_color_override_context
from nerfstudio.scripts import render as ns_render
from nerfstudio.scripts import train
from nerfstudio.scripts.viewer import run_viewer
from nerfstudio.utils.eval_utils import eval_setup

from shiftadd3d import UserError
from shiftadd3d.nerf import error_hook
from shiftadd3d.nerf.pipeline import GNTPipeline
from shiftadd3d.nerf.runs import load_run
from shiftadd3d.nerf.trainer import GNTTrainerConfig

MODELS = "nerfstudio_models"


@pytest.fixture(scope="module")
def pipeline(tiny_run: Path) -> GNTPipeline:
    return load_run(tiny_run).pipeline


# Rays that others made


def test_the_rays_of_a_training_view_show_what_its_camera_shows(pipeline: GNTPipeline, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipeline.model.config, "chessboard", False)  # these rays might be no picture's
    cameras = pipeline.datamanager.train_dataset.cameras
    expected = pipeline.model.get_outputs_for_camera(cameras[3:4])
    rays = cameras.generate_rays(camera_indices=3)  # as ns-export tsdf does
    shown = pipeline.model.get_outputs_for_camera_ray_bundle(rays)
    rays.camera_indices = None  # then the view itself is one of those that it is rendered from
    otherwise = pipeline.model.get_outputs_for_camera_ray_bundle(rays)
    for name in ("rgb", "depth"):
        assert shown[name].shape == expected[name].shape
        # A rounding error in a ray's direction may send a token to another expert: not every pixel is the same.
        assert (shown[name] - expected[name]).abs().mean() < 1e-3
        assert (otherwise[name] - expected[name]).abs().mean() > 1e-2


def test_a_ray_with_nothing_but_origin_and_direction_is_rendered(pipeline: GNTPipeline):
    origins, ones = torch.zeros(1, 3), torch.ones(1, 3)
    outputs = pipeline.model(RayBundle(origins=origins, directions=ones, pixel_area=ones[:, :1]))
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "rgb": (1, 3),
        "depth": (1, 1),
        "accumulation": (1, 1),
        "routing": (1, 1),
    }
    assert all(value.isfinite().all() for value in outputs.values())


def test_more_rays_than_a_chunk_are_the_same_in_parts(pipeline: GNTPipeline, monkeypatch: pytest.MonkeyPatch):
    rays, _ = pipeline.datamanager.next_train(0)
    with torch.no_grad():
        whole = pipeline.model(rays)
        monkeypatch.setattr(pipeline.model.config, "eval_num_rays_per_chunk", 7)
        parts = pipeline.model(rays)
    assert all(torch.allclose(whole[name], parts[name], atol=1e-5) for name in whole)


@pytest.mark.parametrize("rows", [1000, 3, 0])  # of a chunk; a single row is not divided
def test_of_a_picture_the_sweep_looks_along_every_other_ray(
    pipeline: GNTPipeline, monkeypatch: pytest.MonkeyPatch, rows: int
):
    camera = pipeline.datamanager.train_dataset.cameras[3:4]
    monkeypatch.setattr(pipeline.model.config, "chessboard", False)
    everywhere = pipeline.model.get_outputs_for_camera(camera)
    monkeypatch.setattr(pipeline.model.config, "chessboard", True)
    monkeypatch.setattr(pipeline.model.config, "eval_num_rays_per_chunk", rows * int(camera.width) or 1)
    monkeypatch.setattr("shiftadd3d.nerf.model._CHUNKS_OF_AN_EXECUTABLE", 1)
    shown = pipeline.model.get_outputs_for_camera(camera)
    assert {name: value.shape for name, value in shown.items()} == {
        name: value.shape for name, value in everywhere.items()
    }
    row, column = (torch.arange(int(size)) for size in (camera.height, camera.width))
    fields = (row[:, None] % max(rows, 1) + column) % 2 == 0
    apart = (shown["rgb"] - everywhere["rgb"]).abs().mean(-1)
    # A rounding error may send a token to another expert: not every pixel is the same.
    assert apart[fields].mean() < 1e-3 < apart[~fields].mean()


def panorama(kind: CameraType) -> Cameras:
    pose = torch.eye(4)[None, :3]
    return Cameras(pose, fx=24.0, fy=12.0, cx=12.0, cy=6.0, width=24, height=12, camera_type=kind)


@pytest.mark.parametrize("kind", ["EQUIRECTANGULAR", "OMNIDIRECTIONALSTEREO_L", "VR180_L", "ORTHOPHOTO"])
def test_cameras_that_look_everywhere_are_rendered(pipeline: GNTPipeline, kind: str):
    outputs = pipeline.model.get_outputs_for_camera(panorama(CameraType[kind]))
    assert outputs["rgb"].shape == (12, 24, 3)
    assert all(value.isfinite().all() for value in outputs.values())
    assert outputs["rgb"].std() > 0.01


def test_a_crop_leaves_what_lies_inside_and_background(pipeline: GNTPipeline):
    camera = pipeline.datamanager.train_dataset.cameras[0:1]
    whole = pipeline.model.get_outputs_for_camera(camera)
    rays = camera.generate_rays(camera_indices=0, keep_shape=True)
    points = (rays.origins + rays.directions * whole["depth"]).view(-1, 3)
    middle = points.median(dim=0).values
    box = OrientedBox.from_params(tuple(middle.tolist()), (0.0, 0.0, 0.0), (1e3, 1e3, 2 * 0.3))
    inside = ((points - middle)[:, 2].abs() < 0.3).view(48, 64)
    assert inside.any() and not inside.all()
    red = torch.tensor([1.0, 0.0, 0.0])
    with background_color_override_context(red):
        cropped = pipeline.model.get_outputs_for_camera(camera, obb_box=box)
    assert torch.equal(cropped["rgb"][inside], whole["rgb"][inside])
    assert (cropped["rgb"][~inside] == red).all()
    assert (cropped["accumulation"][~inside] == 0).all()


# ns-export


@pytest.fixture(scope="module")
def exporter():
    pytest.importorskip("open3d", reason="open3d wants the system's libusb-1.0", exc_type=ImportError)
    from nerfstudio.scripts import exporter

    return exporter


def test_a_point_cloud_lies_where_the_cameras_look(exporter, tiny_run: Path, pipeline: GNTPipeline, tmp_path: Path):
    import open3d

    exporter.ExportPointCloud(
        tiny_run, tmp_path, num_points=200, num_rays_per_batch=100, normal_method="open3d", remove_outliers=False
    ).main()
    cloud = open3d.io.read_point_cloud(tmp_path / "point_cloud.ply")
    points = torch.from_numpy(np.asarray(cloud.points)).float()
    assert len(points) >= 200 and len(cloud.colors) == len(points) == len(cloud.normals)
    near, far = pipeline.model.near_far.tolist()
    centres = pipeline.datamanager.train_dataset.cameras.camera_to_worlds[:, :, 3]
    distance = torch.cdist(points, centres)
    assert (distance.min(dim=1).values <= 2 * far).all() and (distance.max(dim=1).values >= near).all()


@pytest.mark.parametrize(
    ("command", "instead"),
    [("ExportMarchingCubesMesh", "ns-export tsdf"), ("ExportGaussianSplat", "ns-export pointcloud")],
)
def test_an_export_for_other_methods_is_one_line_with_what_serves_instead(
    exporter, command: str, instead: str, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(AssertionError) as caught:
        getattr(exporter, command)(tiny_run, tmp_path).main()
    capsys.readouterr()
    sys.excepthook(caught.type, caught.value, caught.tb)
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and instead in line


@pytest.mark.parametrize("kind", ["one view", "jpeg", "no picture"])
def test_what_ns_render_cannot_do_is_one_line(
    kind: str,
    tiny_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(ns_render.install_checks, "check_ffmpeg_installed", lambda: None)
    command, instead = {
        "one view": (ns_render.RenderInterpolated(tiny_run, tmp_path, output_format="images"), "--pose-source train"),
        "jpeg": (ns_render.DatasetRender(tiny_run, tmp_path, rendered_output_names=["rgba"]), "--image-format png"),
        "no picture": (
            ns_render.DatasetRender(tiny_run, tmp_path, rendered_output_names=["gt-image_idx"]),
            "expected rgb, depth",
        ),
    }[kind]
    with pytest.raises(Exception) as caught:  # noqa: PT011 whatever nerfstudio meets first
        command.main()
    capsys.readouterr()
    sys.excepthook(caught.type, caught.value, caught.tb)
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and instead in line


def test_an_assertion_of_ours_keeps_its_traceback(pipeline: GNTPipeline, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(AssertionError) as caught:
        assert pipeline is None
    sys.excepthook(caught.type, caught.value, caught.tb)
    assert "Traceback" in capsys.readouterr().err


# A run belongs where its config.yml lies


def test_a_copied_run_is_taken_for_itself(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    copied = shutil.copytree(tiny_run.parent, tmp_path / "copied")
    (copied / MODELS / "step-000000003.ckpt").rename(copied / MODELS / "step-000000002.ckpt")
    config, _, checkpoint, step = eval_setup(copied / "config.yml")
    assert (checkpoint, step) == (copied / MODELS / "step-000000002.ckpt", 2)
    assert config.get_base_dir() == copied  # where ns-viewer logs, and what its exports name
    monkeypatch.chdir(copied)
    assert eval_setup(Path("config.yml"))[2] == copied / MODELS / "step-000000002.ckpt"


def test_ns_viewer_names_the_copy_in_its_exports(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    copied = shutil.copytree(tiny_run.parent, tmp_path / "copied")
    seen = []
    monkeypatch.setattr(run_viewer, "_start_viewer", lambda config, *_: seen.append(config.get_base_dir()))
    run_viewer.RunViewer(copied / "config.yml").main()
    assert seen == [copied]


def test_a_config_without_checkpoints_beside_it_is_that_of_the_run_it_names_and_that_is_said(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copy(tiny_run, tmp_path)
    for load in (eval_setup, load_run):
        capsys.readouterr()
        assert tiny_run.parent / MODELS / "step-000000003.ckpt" in load(tmp_path / "config.yml")
        assert f"taking what lies in {tiny_run.parent}" in capsys.readouterr().out


# Two runs in one folder


@pytest.fixture
def standing_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return datetime.datetime(2030, 1, 1, 12, tzinfo=tz)

    monkeypatch.setattr(experiment_config, "datetime", Clock)


@pytest.mark.usefixtures("standing_clock")
def test_runs_of_one_second_get_a_folder_each(
    make_config: Callable[..., GNTTrainerConfig], tiny_scene: Path, tmp_path: Path
):
    folders = []
    for _ in range(3):
        config = make_config(tiny_scene, tmp_path)
        config.timestamp = "{timestamp}"
        config.set_timestamp()
        config.save_config()
        folders.append(config.get_base_dir())
    assert [folder.name for folder in folders] == [f"2030-01-01_120000{end}" for end in ("", "-2", "-3")]
    assert all((folder / "config.yml").is_file() for folder in folders)


def test_a_run_is_not_trained_over_but_can_be_gone_on_from_in_its_folder(
    tiny_run: Path, tiny_scene: Path, make_config: Callable[..., GNTTrainerConfig], tmp_path: Path
):
    config = make_config(tiny_scene, tmp_path)
    models = config.get_base_dir() / MODELS
    shutil.copytree(tiny_run.parent, models.parent)
    with pytest.raises(UserError, match=rf"holds a run: choose another --timestamp .*--load-dir {models}"):
        copy.deepcopy(config).set_timestamp()
    config.load_dir = models
    config.set_timestamp()
    assert config.get_base_dir() / MODELS == models


def test_an_output_folder_that_is_a_file_is_refused(
    make_config: Callable[..., GNTTrainerConfig], tiny_scene: Path, tmp_path: Path
):
    (tmp_path / "file").write_text("")
    for timestamp in ("{timestamp}", "run"):
        config = make_config(tiny_scene, tmp_path / "file")
        config.timestamp = timestamp
        with pytest.raises(UserError, match="cannot write"):
            config.set_timestamp()


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"scene": "nowhere"}, "nowhere does not exist; expected a folder with transforms.json"),
        ({"scene": "empty"}, "empty: no scene found; expected"),
        ({"load_dir": Path("nowhere")}, "nowhere: no step-*.ckpt in there"),
        ({"load_checkpoint": Path("nowhere")}, "--load-checkpoint nowhere: no such file"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_printed_or_made(
    wrong: dict[str, Any],
    complaint: str,
    make_config: Callable[..., GNTTrainerConfig],
    ns_train: Callable[[GNTTrainerConfig], Path],
    tiny_scene: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    config = make_config(Path(wrong.pop("scene", tiny_scene)), Path("outputs"))
    for name, value in wrong.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=re.escape(complaint)):
        ns_train(config)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert "Config" not in capsys.readouterr().out.replace("Using --data", "")


def load_for_training(path: Path) -> None:
    train.main(TrainerConfig(load_config=path))


@pytest.mark.parametrize("load", [eval_setup, load_for_training])
@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_config_that_cannot_be_opened_is_one_line_whatever_the_method(
    kind: str, load: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "config.yml"
    if kind == "folder":
        path.mkdir()
    with pytest.raises(OSError, match=re.escape(str(path))) as caught:
        load(path)
    capsys.readouterr()
    sys.excepthook(caught.type, caught.value, caught.tb)
    line = capsys.readouterr().err
    assert line.startswith(f"error: {path}: ") and line.count("\n") == 1
    assert "expected the config.yml that ns-train wrote" in line


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("shiftad-gnt", "error: no method shiftad-gnt; perhaps shiftadd-gnt, "),
        ("gnt_tiny", "error: no method gnt_tiny; perhaps gnt-tiny"),
        ("nerfact", ""),
        ("nerfacto", ""),
        ("--help", ""),
    ],
)
def test_a_method_that_is_spelt_almost_as_ours_is_answered_with_ours(
    argument: str, line: str, capsys: pytest.CaptureFixture[str]
):
    error_hook._name_similar_methods([argument])
    printed = capsys.readouterr().err
    assert printed.startswith(line) and printed.count("\n") == bool(line)


# What it costs


def test_training_says_what_it_costs(
    make_config: Callable[..., GNTTrainerConfig],
    ns_train: Callable[[GNTTrainerConfig], Path],
    tiny_scene: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    ns_train(make_config(tiny_scene, tmp_path, method="gnt-tiny", steps=8))
    said = capsys.readouterr().out
    assert "gnt-tiny: 8 steps" in said
    assert "gnt-tiny: steps take" in said and "done at" in said
    assert "Step (% Done)" not in said
