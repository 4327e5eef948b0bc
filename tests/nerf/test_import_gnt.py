"""`shiftadd3d import-gnt`: checkpoints of the released GNT code as nerfstudio runs."""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
import yaml
from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion
from nerfstudio.utils.eval_utils import eval_setup

from shiftadd3d import cli
from shiftadd3d.models.gnt import GNTConfig, GNTModel, load_official_checkpoint, render_rays
from shiftadd3d.nerf.runs import load_run
from shiftadd3d.nn import PackedShiftLinear

SIZES = GNTConfig(depth=2, width=16, feature_dim=8, feature_widths=(8, 12, 8), feature_blocks=(1, 2, 1))
TWO_NETWORKS = GNTConfig(
    depth=8, width=16, feature_dim=8, feature_widths=(8, 8, 8), feature_blocks=(1, 1, 1), single_net=False
)


def write_official(path: Path, sizes: GNTConfig = SIZES, prefix: str = "") -> Path:
    """What the released code saves of a network of these sizes, with random weights."""
    model = GNTModel(sizes)
    parts = {name: part.state_dict() for name, part in model.named_children()}
    state = {part: {prefix + name: value for name, value in tensors.items()} for part, tensors in parts.items()}
    torch.save({"optimizer": {"state": {}}, "scheduler": {"last_epoch": 7}, "net_fine": None, **state}, path)
    return path


def import_gnt(*words: str | Path) -> int:
    return cli.main(["import-gnt", *map(str, words)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the prefix of DataParallel."""
    return write_official(tmp_path_factory.mktemp("official") / "model_720000.pth", prefix="module.")


@pytest.fixture(scope="module")
def dense_run(checkpoint: Path, tiny_scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "run"
    assert import_gnt(checkpoint, "--data", tiny_scene, "--out", out) == 0
    return out / "config.yml"


def test_the_run_says_the_sizes_and_has_the_weights_of_the_checkpoint(checkpoint, dense_run, tiny_scene):
    run = load_run(dense_run)
    assert (run.config.method_name, run.step) == ("gnt", 720_000)
    assert run.config.pipeline.model.gnt == SIZES
    assert run.config.pipeline.datamanager.num_source_views == 8  # of the nine that are not held out
    assert run.pipeline.model.near_far.tolist() == [0.5, 2.0]  # in units of the scaled scene
    official, imported = load_official_checkpoint(checkpoint).state_dict(), run.pipeline.model.gnt.state_dict()
    assert official.keys() == imported.keys()
    assert all(torch.equal(official[name], imported[name]) for name in official)


def test_nerfstudio_opens_the_run_and_renders_with_it(dense_run):
    _, pipeline, path, step = eval_setup(dense_run)
    assert (path.name, step) == ("step-000720000.ckpt", 720_000)
    assert np.isfinite(pipeline.get_average_eval_image_metrics()["psnr"])


def test_two_networks_of_eight_blocks_become_the_big_method_with_samples_for_the_second(tiny_scene, tmp_path, capsys):
    path = write_official(tmp_path / "latest.pth", TWO_NETWORKS)
    assert import_gnt(path, "--data", tiny_scene, "--out", tmp_path / "run") == 0
    run = load_run(tmp_path / "run/config.yml")
    assert (run.config.method_name, run.step) == ("gnt-big", 0)
    assert run.config.pipeline.model.gnt == TWO_NETWORKS
    assert run.config.pipeline.model.num_importance > 0
    # What it says at the end trains the same network on.
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  ns-train"))
    words = shlex.split(line, comments=True)
    config = tyro.cli(AnnotatedBaseConfigUnion, args=words[1:])
    assert config.pipeline.model.gnt == TWO_NETWORKS
    assert config.pipeline.warm_start == path
    assert config.pipeline.datamanager.num_source_views == 8
    assert config.data == tiny_scene


@pytest.mark.slow
def test_a_recipe_is_calibrated_on_the_views_of_the_scene(checkpoint, dense_run, tiny_scene, tmp_path, capsys):
    out = tmp_path / "run"
    assert import_gnt(checkpoint, "--data", tiny_scene, "--out", out, "--recipe", "add+shift") == 0
    said = capsys.readouterr().out
    assert "layers of shifts, calibrated" in said and "needs fine-tuning" in said
    run = load_run(out / "config.yml")
    assert (run.config.method_name, run.config.pipeline.model.recipe) == ("shiftadd-gnt", "add+shift")
    gnt, dense = run.pipeline.model.gnt, load_run(dense_run).pipeline
    assert isinstance(gnt.net_coarse.view_selftrans[0].attn.q_fc, PackedShiftLinear)
    camera = dense.datamanager.eval_dataset.cameras[0:1]
    rgb = [pipeline.model.get_outputs_for_camera(camera)["rgb"] for pipeline in (dense, run.pipeline)]
    calibrated = float((rgb[0] - rgb[1]).square().mean())
    gnt = load_official_checkpoint(checkpoint)
    run.pipeline.model._reparameterized(gnt)  # every weight to the nearest power of two
    run.pipeline.model.gnt = gnt
    run.pipeline.model._forget_what_was_made()
    nearest = float((rgb[0] - run.pipeline.model.get_outputs_for_camera(camera)["rgb"]).square().mean())
    assert 0.0 < calibrated < nearest


def cut_short(path: Path, checkpoint: Path) -> None:
    path.write_bytes(checkpoint.read_bytes()[:5000])


def with_code(path: Path, _checkpoint: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (path.with_name("exploded"),))

    torch.save({"net_coarse": {}, "feature_net": {}, "optimizer": Bomb()}, path)


def of_another_shape(path: Path, checkpoint: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    for name in ("layer2.1.conv1.weight", "out_conv.bias"):
        state["feature_net"][f"module.{name}"] = torch.zeros(2, 2)
    torch.save(state, path)


def text(path: Path, _checkpoint: Path) -> None:
    path.write_text("no checkpoint")


def nothing(path: Path, _checkpoint: Path) -> None:
    """No file."""


@pytest.mark.parametrize(
    ("write", "complaint"),
    [
        (nothing, "no such file or folder; expected a checkpoint of the original code"),
        (text, "expected a checkpoint that the GNT code wrote"),
        (cut_short, "expected a checkpoint that the GNT code wrote"),
        (with_code, "more than tensors"),
        (of_another_shape, "`feature_net` are not those of a GNT: layer2.1.conv1.weight is [2, 2]"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(checkpoint, tiny_scene, tmp_path, capsys, write, complaint):
    path, out = tmp_path / "model.pth", tmp_path / "run"
    write(path, checkpoint)
    assert import_gnt(path, "--data", tiny_scene, "--out", out) == 1
    printed = capsys.readouterr().err
    assert complaint in printed and str(path) in printed and printed.count("\n") == 1
    assert not out.exists()
    assert not (tmp_path / "exploded").exists()


def test_a_missing_scene_an_unknown_recipe_and_a_place_with_something_are_refused(
    checkpoint, tiny_scene, tmp_path, capsys
):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "note.txt").write_text("mine")
    for words, complaint in (
        (["--data", tmp_path / "nowhere", "--out", tmp_path / "run"], "nowhere"),
        (["--data", tiny_scene, "--out", tmp_path / "run", "--recipe", "shfit"], "no recipe 'shfit'; the recipes are"),
        (["--data", tiny_scene, "--out", taken], f"{taken} holds something"),
        (["--data", tiny_scene, "--out", taken / "note.txt"], "a file is in the way"),
    ):
        assert import_gnt(checkpoint, *words) == 1
        printed = capsys.readouterr().err
        assert complaint in printed and printed.count("\n") == 1
        assert not (tmp_path / "run").exists()
        assert [file.name for file in taken.iterdir()] == ["note.txt"]


def test_the_run_renders_what_the_released_code_rendered(shared, tiny_scene, repository, tmp_path):
    spec = importlib.util.spec_from_file_location("golden", repository / "tests/models/gnt/test_golden.py")
    golden = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(golden)
    for file in golden.FILES:
        data = np.load(shared / "golden" / file)
        config = json.loads(str(data["config"]))
        path, out = tmp_path / "model_250000.pth", tmp_path / file
        torch.save(golden.refill(json.loads(str(data["keys"])), config["seed"]), path)
        assert import_gnt(path, "--data", tiny_scene, "--out", out) == 0
        near, far = map(float, data["near_far"])
        with torch.no_grad():
            rendered = render_rays(
                load_run(out / "config.yml").pipeline.model.gnt,
                torch.from_numpy(data["source_images"]),
                {"intrinsics": torch.from_numpy(data["intrinsics"]), "camera_to_world": data["source_c2w"]},
                {"intrinsics": data["intrinsics"], "camera_to_world": data["target_c2w"]},
                torch.from_numpy(data["pixels_xy"]),
                near,
                far,
                config["samples"],
                inverse_depth=config["inv_uniform"],
            )
        for key in {"rgb", "depth", "weights"} & set(data):
            np.testing.assert_allclose(rendered[key].numpy(), data[key], atol=golden.TOLERANCE, rtol=0)


def test_a_disk_that_is_full_leaves_nothing(checkpoint, tiny_scene, tmp_path, capsys, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(yaml, "dump", full)
    assert import_gnt(checkpoint, "--data", tiny_scene, "--out", tmp_path / "run") == 1
    assert "No space left" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
