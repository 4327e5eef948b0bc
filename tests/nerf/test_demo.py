"""`shiftadd3d demo`: from a scene to video, pictures and numbers."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
from nerfstudio.engine.trainer import Trainer
from nerfstudio.utils import writer
from PIL import Image

from shiftadd3d import cli
from shiftadd3d.configs import methods
from shiftadd3d.nerf.pictures import grid, save_picture
from shiftadd3d.nerf.runs import read_config
from shiftadd3d.nerf.trainer import GNTTrainerConfig
from shiftadd3d.nerf.warm_start import PRETRAINED
from shiftadd3d.nerf.weights import TINY


@pytest.fixture
def config(make_config: Callable[..., GNTTrainerConfig], tiny_scene: Path, tmp_path: Path) -> GNTTrainerConfig:
    """Of the network whose weights come with the package, on a tiny scene."""
    config = make_config(tiny_scene, tmp_path)
    config.pipeline.model.gnt, config.pipeline.warm_start = TINY, PRETRAINED
    return config


@pytest.mark.slow
def test_demo_leaves_a_video_a_comparison_and_numbers(
    config: GNTTrainerConfig,
    tiny_scene: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(methods.shiftadd_gnt_tiny, "config", config)
    monkeypatch.setattr(writer, "EVENT_WRITERS", [])  # not those of a run before, in this process
    out = tmp_path / "my out"
    args = ["demo", "--output-dir", str(out), "--steps", "2", "--data", str(tiny_scene), "--frames", "3"]
    assert cli.main(args) == 0
    facts = json.loads((out / "demo/metrics.json").read_text())
    assert facts["steps"] == 2
    for renderer in ("untrained", "model", "nearest", "mean"):
        assert 0 < facts[renderer]["psnr"] < 40
        assert -1 <= facts[renderer]["ssim"] <= 1
    video = imageio.get_reader(out / "demo/video.mp4")
    assert video.count_frames() == 3
    assert video.get_meta_data()["size"] == (128, 48)
    assert facts["untrained"]["psnr"] != facts["model"]["psnr"]
    assert Image.open(out / "demo/comparison.png").width > 5 * 64
    for file in facts["files"].values():
        assert Path(file).exists()
    text = capsys.readouterr().out
    assert "copy of the nearest source view" in text
    for network in ("untrained", "model"):
        assert f"{facts[network]['psnr']:.2f}" in text
    commands = [shlex.split(line) for line in text.rpartition("Go on with:")[2].splitlines() if line.strip()]
    assert [words[0] for words in commands] == ["ns-viewer", "ns-eval", "shiftadd3d", "ns-train"]
    assert all(facts["files"]["config"] in words for words in commands[:3]), "typed as printed, spaces and all"
    assert str(Path(facts["files"]["checkpoint"]).parent) in commands[3] and str(tiny_scene) in commands[3]
    # Reading nothing from the network is the demo's choice, not the run's.
    assert "LPIPS" not in text
    assert read_config(Path(facts["files"]["config"])).pipeline.model.lpips


def test_an_interrupted_demo_ends_with_130_instead_of_going_on(
    config: GNTTrainerConfig, tiny_scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(self: Trainer, step: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(methods.shiftadd_gnt_tiny, "config", config)
    monkeypatch.setattr(Trainer, "train_iteration", interrupt)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["demo", "--output-dir", str(tmp_path), "--data", str(tiny_scene)])
    assert exit_.value.code == 130
    assert not (tmp_path / "demo/metrics.json").exists()


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        (["--steps", "0"], "--steps 0: expected 1 or more"),
        (["--frames", "1"], "--frames 1: expected 2 or more"),
        (["--output-dir", "{file}"], "is a file; expected a folder (--output-dir)"),
    ],
)
def test_an_impossible_argument_is_explained(
    extra: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", *(value.format(file=tmp_path / "file") for value in extra)]) == 1
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_a_grid_keeps_pixels_and_enlarges_small_pictures_by_a_whole_factor(tmp_path: Path):
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 9, 9]]], dtype=np.uint8)
    pictures = [[np.full((10, 50, 3), colour, dtype=np.uint8) for colour in row] for row in colours]
    sheet = np.asarray(grid(pictures, ["one", "two"], [["a", "b"], ["c", "d"]]))
    for colour in colours.reshape(-1, 3):
        # 50 pixels are fewer than a caption needs: four times as many on each side.
        assert (sheet == colour).all(axis=-1).sum() == pytest.approx(200 * 40, abs=30)
    save_picture(Image.fromarray(sheet), tmp_path / "new/grid.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["grid.png"]
    with pytest.raises(ValueError, match="cannot write"):
        save_picture(Image.fromarray(sheet), tmp_path / "new/grid.png/grid.png")
