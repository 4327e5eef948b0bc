"""The nerfstudio methods end to end: train, evaluate, render, interrupt, resume, and every kind of bad input."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nerfstudio")

import yaml
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.scripts import eval as ns_eval
from nerfstudio.scripts import render as ns_render
from nerfstudio.scripts.viewer import run_viewer
from nerfstudio.utils.eval_utils import eval_setup

from shiftadd3d import UserError
from shiftadd3d.models.gnt import GNTModel
from shiftadd3d.nerf.checkpoint import latest_checkpoint, read_checkpoint, scene_of, stage_of
from shiftadd3d.nerf.datamanager import GNTDataManager
from shiftadd3d.nerf.model import GNTNerfModel
from shiftadd3d.nerf.pipeline import GNTPipeline
from shiftadd3d.nerf.trainer import GNTTrainer
from shiftadd3d.nn import MoE

METHODS = ["gnt", "gnt-tiny", "gnt-big", "shiftadd-gnt", "shiftadd-gnt-tiny", "shiftadd-gnt-big"]
MODELS = "nerfstudio_models"


def one_line(error: BaseException) -> str:
    """The message of a refusal as the error hook prints it; it must be one to begin with."""
    message = str(error)
    assert isinstance(error, UserError)
    assert message and "\n" not in message
    return message


def scalars(run: Path) -> dict[str, list[float]]:
    """What tensorboard would plot, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_registered_under_its_name(method):
    config = all_methods[method]
    assert config.method_name == method
    assert config.machine.device_type in ("cuda", "cpu")
    recipe = config.pipeline.model.recipe
    assert (recipe == "mult") == (not method.startswith("shiftadd"))


def test_training_leaves_a_config_a_checkpoint_and_curves(tiny_run):
    run = tiny_run.parent
    assert [path.name for path in (run / MODELS).iterdir()] == ["step-000000003.ckpt"]
    assert not list(run.glob("*.unfinished"))
    config = yaml.load(tiny_run.read_text(), Loader=yaml.Loader)
    assert config.method_name == "shiftadd-gnt-tiny"
    curves = scalars(run)
    assert len(curves["Train Loss"]) == 4
    assert all(math.isfinite(value) for values in curves.values() for value in values)
    for tag in ("rgb_loss", "balance_loss", "proposal_loss"):
        assert f"Train Loss Dict/{tag}" in curves, sorted(curves)
    assert "Eval Images Metrics/psnr" in curves
    routers = [tag for tag in curves if tag.startswith("Train Metrics Dict/router/")]
    layers = {tag.rsplit("/", 1)[0] for tag in routers}
    assert len(layers) == 2  # the perceptrons of a view and a ray transformer
    for layer in layers:
        shares = np.sum([curves[tag] for tag in routers if tag.startswith(layer + "/")], axis=0)
        np.testing.assert_allclose(shares, 1.0, atol=1e-5)


def test_the_learning_rate_warms_up_and_is_down_when_the_run_ends(tiny_run):
    curves = scalars(tiny_run.parent)
    rates = next(values for tag, values in curves.items() if "learning_rate" in tag.lower() and "transformers" in tag)
    config = yaml.load(tiny_run.read_text(), Loader=yaml.Loader).optimizers["transformers"]
    initial, warmup = config["optimizer"].of_start(trained=False).lr, config["scheduler"].warmup_steps
    assert rates[-1] < initial * 4 / warmup < initial
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)

    schedule = dataclasses.replace(config["scheduler"], max_steps=1000).setup()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = schedule.get_scheduler(optimizer, 0.5)
    rates = []
    for _ in range(1001):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert all(later > earlier for earlier, later in itertools.pairwise(rates[: warmup // 2]))
    assert rates[warmup] > 0.95 * 0.5
    assert rates[1000] == pytest.approx(0.5 * config["scheduler"].final_fraction)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[warmup:]))


def test_ns_eval_writes_finite_metrics(tiny_run, tmp_path):
    ns_eval.ComputePSNR(tiny_run, tmp_path / "out.json", tmp_path / "pictures").main()
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert 0 < results["psnr"] < 60
    assert -1 <= results["ssim"] <= 1
    # One view is held out: its spread is no number.
    assert all(math.isfinite(value) for name, value in results.items() if not name.endswith("_std"))
    assert list((tmp_path / "pictures").iterdir())


@pytest.fixture
def ffmpeg_on_path(tmp_path, monkeypatch):
    """nerfstudio looks for it whatever it writes."""
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")


def pictures(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(folder.rglob("*")) if path.suffix in (".jpg", ".png")]


def camera_path(path: Path, count: int = 2) -> Path:
    """What the viewer's "render" tab saves."""
    pose = np.eye(4)
    cameras = []
    for x in np.linspace(-0.05, 0.05, count):
        pose[:3, 3] = [x, 0.0, 0.5]
        cameras.append({"camera_to_world": pose.flatten().tolist(), "fov": 50.0, "aspect": 4 / 3})
    path.write_text(
        json.dumps({"render_height": 24, "render_width": 32, "fps": 2, "seconds": 1, "camera_path": cameras})
    )
    return path


@pytest.mark.usefixtures("ffmpeg_on_path")
@pytest.mark.parametrize("mode", ["interpolate", "spiral", "camera-path", "dataset"])
def test_ns_render_works_in_every_mode(tiny_run, tmp_path, mode):
    out = tmp_path / "out"
    images = {"output_format": "images", "image_format": "png"}
    if mode == "interpolate":
        command = ns_render.RenderInterpolated(
            tiny_run, out, downscale_factor=2, pose_source="train", interpolation_steps=1, **images
        )
    elif mode == "spiral":
        command = ns_render.SpiralRender(tiny_run, out, downscale_factor=2, seconds=1, frame_rate=2, **images)
    elif mode == "camera-path":
        path = camera_path(tmp_path / "path.json")
        command = ns_render.RenderCameraPath(tiny_run, out, camera_path_filename=path, **images)
    else:
        command = ns_render.DatasetRender(tiny_run, out, image_format="png")
    command.main()
    frames = pictures(out)
    assert frames
    assert all(frame.std() > 1 for frame in frames if frame.ndim == 3)  # not blank
    assert all(frame.shape[1] * 3 == frame.shape[0] * 4 for frame in frames)


@pytest.mark.usefixtures("ffmpeg_on_path")
def test_ns_render_makes_a_video(tiny_run, tmp_path):
    ns_render.RenderCameraPath(
        tiny_run, tmp_path / "out.mp4", camera_path_filename=camera_path(tmp_path / "path.json")
    ).main()
    assert (tmp_path / "out.mp4").stat().st_size > 0


def test_a_render_does_not_depend_on_what_was_rendered_before(tiny_run):
    _, pipeline, _, _ = eval_setup(tiny_run)
    cameras = pipeline.datamanager.train_dataset.cameras
    with torch.no_grad():
        first = pipeline.model.get_outputs_for_camera(cameras[0:1])
        pipeline.model.get_outputs_for_camera(cameras[4:5])
        again = pipeline.model.get_outputs_for_camera(cameras[0:1])
    assert torch.equal(first["rgb"], again["rgb"])
    assert first["rgb"].shape == (48, 64, 3)
    assert first["depth"].shape == first["accumulation"].shape == (48, 64, 1)


def resumed(tiny_run: Path, make_config, tmp_path: Path, steps: int = 5, **changes):
    """A config that goes on from a copy of the run's checkpoints, to a run of so many steps in all."""
    config = yaml.load(tiny_run.read_text(), Loader=yaml.Loader)
    shutil.copytree(tiny_run.parent / MODELS, tmp_path / "models")
    new = make_config(config.data, tmp_path / "out", steps=steps)
    new.load_dir = tmp_path / "models"
    for name, value in changes.items():
        setattr(new, name, value)
    return new


def test_resuming_goes_on_at_the_next_step_with_optimizer_schedule_and_depth_range(
    tiny_run, make_config, ns_train, tmp_path, monkeypatch
):
    config = resumed(tiny_run, make_config, tmp_path, steps=6)
    (config.load_dir / "notes.txt").write_text("not a checkpoint")
    config.pipeline.datamanager.far = 3.0  # near is the checkpoint's
    before = read_checkpoint(latest_checkpoint(config.load_dir))
    seen = []
    iterate = GNTTrainer.train_iteration

    def watch(self, step):
        adam = next(iter(self.optimizers.optimizers["transformers"].state.values()))
        scheduler = self.optimizers.schedulers["transformers"]
        weight = self.pipeline.model.gnt.net_coarse.rgbfeat_fc[0].weight.detach().clone()
        seen.append((step, int(adam["step"]), scheduler.last_epoch, self.pipeline.model.near_far.tolist(), weight))
        return iterate(self, step)

    monkeypatch.setattr(GNTTrainer, "train_iteration", watch)
    run = ns_train(config)
    assert [entry[0] for entry in seen] == [4, 5]
    _, adam_steps, schedule, near_far, weight = seen[0]
    assert adam_steps == 4
    assert schedule == 4
    assert near_far == [float(before["pipeline"]["_model.near_far"][0]), 3.0] != before["pipeline"]["_model.near_far"]
    # What is kept is an average, and training goes on with the weights themselves.
    assert torch.equal(weight, before["training"]["weights"]["net_coarse.rgbfeat_fc.0.weight"])
    assert not torch.equal(weight, before["pipeline"]["_model.gnt.net_coarse.rgbfeat_fc.0.weight"])
    assert latest_checkpoint(run / MODELS).name == "step-000000005.ckpt"


def test_going_on_without_the_scene_is_refused_with_the_whole_command(tiny_run, tiny_scene, make_config, ns_train):
    config = make_config(tiny_scene, tiny_run.parent / "not written", steps=6)
    config.data = config.pipeline.datamanager.data = None  # the embedded scene
    config.load_dir = tiny_run.parent / MODELS
    with pytest.raises(UserError) as caught:
        ns_train(config)
    command = f"expected ns-train shiftadd-gnt-tiny --load-dir {config.load_dir} --data {tiny_scene}"
    assert one_line(caught.value).endswith(command)
    config.load_dir, config.load_checkpoint = None, latest_checkpoint(tiny_run.parent / MODELS)
    with pytest.raises(UserError, match=f"--load-checkpoint {config.load_checkpoint} --data {tiny_scene}$"):
        ns_train(config)


def test_going_on_with_another_data_parser_is_refused_with_the_whole_command(
    tiny_run, tiny_scene, make_config, ns_train
):
    config = make_config(tiny_scene, tiny_run.parent / "not written", steps=6)
    config.load_dir = tiny_run.parent / MODELS
    config.pipeline.datamanager.dataparser = NerfstudioDataParserConfig()
    with pytest.raises(UserError, match=f"--data {tiny_scene}$") as caught:
        ns_train(config)
    one_line(caught.value)


def test_going_on_with_a_scene_that_has_moved_is_said(tiny_run, tiny_scene, make_config, ns_train, tmp_path, capsys):
    config = make_config(shutil.copytree(tiny_scene, tmp_path / "moved"), tmp_path / "out", steps=5)
    config.load_dir = tiny_run.parent / MODELS
    ns_train(config)
    assert f"Going on with {tmp_path / 'moved'}; so far it was {tiny_scene}, whose" in capsys.readouterr().out


def test_the_scene_of_a_run_is_read_without_making_what_its_config_names(tiny_run, tiny_scene, tmp_path):
    assert scene_of(tiny_run) == (tiny_scene, "shiftadd3d.nerf.dataparsers.AutoDataParser")
    planted = tmp_path / "config.yml"
    code = "!!python/object/apply:exec [\"import os; os.environ['PLANTED'] = 'was run'\"]"
    planted.write_text(f"{tiny_run.read_text()}\nplanted: {code}\n")
    assert scene_of(planted) == scene_of(tiny_run)
    assert "PLANTED" not in os.environ
    planted.write_text("pipeline: [")
    assert scene_of(planted) is None


@pytest.mark.parametrize("load_scheduler", [True, False])
def test_the_learning_rate_of_a_resumed_run_is_down_at_the_new_end(
    tiny_run, make_config, ns_train, tmp_path, load_scheduler
):
    config = resumed(tiny_run, make_config, tmp_path, steps=12, load_scheduler=load_scheduler)
    for optimizer in config.optimizers.values():
        optimizer["scheduler"].warmup_steps = 1
    curves = scalars(ns_train(config))
    rates = next(values for tag, values in curves.items() if "learning_rate" in tag.lower() and "transformers" in tag)
    assert len(curves["Train Loss"]) == len(rates) == 8  # steps 4 to 11
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))
    schedule, optimizer = (config.optimizers["transformers"][part] for part in ("scheduler", "optimizer"))
    assert schedule.max_steps == (12 if load_scheduler else 8)
    assert rates[-1] == pytest.approx(schedule.final_fraction * optimizer.lr)


def primitives(model) -> set[str]:
    """What the linear layers of a network are."""
    kinds = {"Linear", "ShiftLinear", "MoEMlp", "PackedShiftLinear", "FrozenMoE"}
    return {type(module).__name__ for module in model.gnt.net_coarse.modules()} & kinds


def test_linear_layers_become_shifts_and_mixtures_half_way(tiny_scene, make_config, ns_train, tmp_path, monkeypatch):
    config = make_config(tiny_scene, tmp_path)
    seen = []
    iterate = GNTTrainer.train_iteration

    def watch(self, step):
        attention = self.pipeline.model.gnt.net_coarse.view_crosstrans[0].attn
        before = attention.q_fc.weight
        result = iterate(self, step)
        model, adam = self.pipeline.model, self.optimizers.optimizers["transformers"]
        seen.append((model.stage, primitives(model), attention.q_fc.weight is before))
        groups = model.get_param_groups()
        for name, optimizer in self.optimizers.optimizers.items():
            assert [id(x) for x in optimizer.param_groups[0]["params"]] == [id(x) for x in groups[name]]
        for mixture in (module for module in model.gnt.modules() if isinstance(module, MoE)):
            first, second = (list(expert.parameters()) for expert in mixture.experts)
            for original, copied in zip(first, second, strict=True):
                assert adam.state[copied]["step"] == adam.state[original]["step"] == step + 1
                assert not torch.equal(copied, original)  # each learns from its own tokens
        return result

    monkeypatch.setattr(GNTTrainer, "train_iteration", watch)
    ns_train(config)
    assert [stage for stage, _, _ in seen] == [1, 1, 2, 2]
    assert seen[1][1] == {"Linear"}
    assert seen[2][1] >= {"ShiftLinear", "MoEMlp"}
    assert all(same for _, _, same in seen)  # shift layers take over the very weights


def test_a_run_interrupted_in_its_first_stage_goes_on_in_it(tiny_scene, make_config, ns_train, tmp_path):
    config = make_config(tiny_scene, tmp_path / "first", steps=2)
    config.pipeline.model.second_stage_at = 0.9
    folder = ns_train(config)
    assert stage_of(read_checkpoint(latest_checkpoint(folder / MODELS))["pipeline"]) == 1
    _, pipeline, _, _ = eval_setup(folder / "config.yml")
    assert primitives(pipeline.model) == {"Linear"}

    going_on = make_config(tiny_scene, tmp_path / "second", steps=6)
    going_on.load_dir = folder / MODELS
    folder = ns_train(going_on)  # half of its steps are in the second stage
    assert stage_of(read_checkpoint(latest_checkpoint(folder / MODELS))["pipeline"]) == 2
    _, pipeline, _, _ = eval_setup(folder / "config.yml")
    assert primitives(pipeline.model) >= {"PackedShiftLinear", "FrozenMoE"}  # what is loaded to look at is frozen


def judged_as(qualities: list[float], monkeypatch) -> list[torch.Tensor]:
    """Let judgements come out so, one after the other; returns a weight as it is at each of them."""
    weights = []

    def judge(self) -> float:
        weights.append(self.model.gnt.net_coarse.rgbfeat_fc[0].weight.detach().clone())
        return qualities[len(weights) - 1]

    monkeypatch.setattr(GNTPipeline, "judge", judge)
    return weights


def weight_in(folder: Path) -> torch.Tensor:
    state = read_checkpoint(latest_checkpoint(folder / MODELS))["pipeline"]
    return state["_model.gnt.net_coarse.rgbfeat_fc.0.weight"]


def judged_config(make_config, *args, method: str = "gnt-tiny", **options):
    config = make_config(*args, method, **options)
    config.pipeline.datamanager.judged_views, config.steps_per_judgement = 1, 1
    return config


@pytest.mark.parametrize("best", [0, 2, 4])
def test_what_renders_judged_views_best_is_kept(best, tiny_scene, make_config, ns_train, tmp_path, monkeypatch):
    config = judged_config(make_config, tiny_scene, tmp_path)
    seen = judged_as([20.0 + (index == best) for index in range(5)], monkeypatch)
    folder = ns_train(config)
    assert len(seen) == 5  # before the first step, after each, and none twice
    assert not torch.equal(seen[0], seen[2]) and not torch.equal(seen[2], seen[4])
    assert torch.equal(weight_in(folder), seen[best])


def test_judged_views_are_rendered_as_held_out_ones_are(tiny_scene, make_config, tmp_path):
    pipeline = pipeline_of(judged_config(make_config, tiny_scene, tmp_path))
    quality = pipeline.judge()
    assert pipeline.training and pipeline.model.training
    (view,) = pipeline.datamanager.judged
    pipeline.eval()
    pipeline.model.config.chessboard = False  # single rays have no neighbours to take depths from
    rgb = pipeline.model.get_outputs_for_camera(pipeline.datamanager.train_dataset.cameras[view : view + 1])["rgb"]
    ((_, batch),) = pipeline.datamanager.judged_batches()
    error = (rgb[tuple(batch["indices"][:, 1:].T)] - batch["image"]).square().mean()
    assert quality == pytest.approx(-10 * math.log10(float(error)), abs=1e-3)


def test_the_second_stage_begins_with_the_best_of_the_first(tiny_scene, make_config, ns_train, tmp_path, monkeypatch):
    config = judged_config(make_config, tiny_scene, tmp_path, method="shiftadd-gnt-tiny")
    # Of steps 0, 1, 2 (the first stage's end); of the second stage at once, and after each of its steps.
    seen = judged_as([20.0, 25.0, 22.0, 10.0, 9.0, 8.0], monkeypatch)
    folder = ns_train(config)
    assert len(seen) == 6
    assert torch.equal(seen[3], seen[1]) and not torch.equal(seen[2], seen[1])
    assert torch.equal(weight_in(folder), seen[3])  # the best that is of the second stage


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_run_whose_best_is_kept_goes_on_from_its_last_weights(
    decay, tiny_scene, make_config, ns_train, tmp_path, monkeypatch
):
    config = judged_config(make_config, tiny_scene, tmp_path / "first", steps=2)
    config.average_weights = decay
    seen = judged_as([20.0, 25.0, 22.0], monkeypatch)
    folder = ns_train(config)
    state = read_checkpoint(latest_checkpoint(folder / MODELS))
    assert torch.equal(weight_in(folder), seen[1])
    assert state["training"]["best"] == 25.0

    going_on = judged_config(make_config, tiny_scene, tmp_path / "second", steps=3)
    going_on.average_weights, going_on.load_dir = decay, folder / MODELS
    again = judged_as([22.0, 24.0], monkeypatch)
    folder = ns_train(going_on)
    assert torch.equal(again[0], seen[2])  # what was judged last: the weights, or their average
    assert not torch.equal(again[1], again[0])
    assert torch.equal(weight_in(folder), seen[1])  # still the best


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c_during_the_switch_waits_until_it_is_done(tiny_scene, make_config, ns_train, tmp_path, monkeypatch):
    change = GNTNerfModel._reparameterized

    def interrupted(self, gnt):
        if self.stage == 2:
            signal.raise_signal(signal.SIGINT)
        return change(self, gnt)

    config = make_config(tiny_scene, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(GNTNerfModel, "_reparameterized", interrupted)
        with pytest.raises(SystemExit):
            ns_train(config)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    going_on = make_config(tiny_scene, tmp_path / "more", steps=4)
    going_on.load_dir = config.get_base_dir() / MODELS
    assert stage_of(read_checkpoint(latest_checkpoint(going_on.load_dir))["pipeline"]) == 2
    assert latest_checkpoint(ns_train(going_on) / MODELS).name == "step-000000003.ckpt"


@pytest.mark.parametrize("share", [1.0, -0.1])
def test_a_second_stage_outside_the_run_is_refused(tiny_scene, make_config, tmp_path, share):
    config = make_config(tiny_scene, tmp_path)
    config.pipeline.model.second_stage_at = share
    with pytest.raises(UserError, match="expected a share of the run") as caught:
        pipeline_of(config)
    one_line(caught.value)


@pytest.mark.parametrize("steps", [3, 4])
def test_a_run_that_is_as_long_already_trains_so_many_steps_more(tiny_run, make_config, ns_train, tmp_path, steps):
    run = ns_train(resumed(tiny_run, make_config, tmp_path, steps=steps))
    assert latest_checkpoint(run / MODELS).name == f"step-{3 + steps:09d}.ckpt"


def test_a_run_of_no_steps_is_refused(tiny_scene, make_config, ns_train, tmp_path):
    with pytest.raises(UserError, match="--max-num-iterations 0: expected at least 1") as caught:
        ns_train(make_config(tiny_scene, tmp_path, steps=0))
    one_line(caught.value)


@pytest.fixture(scope="module")
def dense_run(tiny_scene, make_config, ns_train, tmp_path_factory) -> Path:
    """The folder of a run of `gnt-tiny`."""
    return ns_train(make_config(tiny_scene, tmp_path_factory.mktemp("dense"), "gnt-tiny", steps=1))


def pipeline_of(config):
    """The pipeline as training starts with it."""
    return config.pipeline.setup(device="cpu", test_mode="val", world_size=1, local_rank=0)


@pytest.mark.parametrize("as_folder", [True, False], ids=["folder", "file"])
def test_a_trained_dense_network_is_a_warm_start(tiny_scene, dense_run, make_config, tmp_path, as_folder):
    checkpoint = latest_checkpoint(dense_run / MODELS)
    config = make_config(tiny_scene, tmp_path)
    config.pipeline.warm_start = checkpoint.parent if as_folder else checkpoint
    gnt = pipeline_of(config).model.gnt.state_dict()
    dense = read_checkpoint(checkpoint)["pipeline"]
    for name in ("feature_net.conv1.weight", "net_coarse.view_crosstrans.0.attn.q_fc.weight", "net_coarse.norm.bias"):
        assert torch.equal(gnt[name], dense[f"_model.gnt.{name}"]), name


def test_a_checkpoint_of_several_processes_is_a_warm_start_too(tiny_scene, dense_run, make_config, tmp_path):
    state = read_checkpoint(latest_checkpoint(dense_run / MODELS))
    state["pipeline"] = {name.replace("_model.", "_model.module.", 1): x for name, x in state["pipeline"].items()}
    torch.save(state, tmp_path / "step-000000000.ckpt")
    config = make_config(tiny_scene, tmp_path)
    config.pipeline.warm_start = tmp_path / "step-000000000.ckpt"
    pipeline_of(config)


def test_an_official_checkpoint_is_a_warm_start(tiny_scene, make_config, ns_train, tmp_path):
    config = make_config(tiny_scene, tmp_path / "out", steps=2)  # the heads start at zero: the first has no gradient
    config.pipeline.datamanager.judged_views = 0  # in two steps nothing gets better: what was there would be kept
    sizes = dataclasses.replace(config.pipeline.model.gnt, color_head=False, proposal_samples=0)
    official = GNTModel(sizes)
    parts = {part: getattr(official, part).state_dict() for part in ("net_coarse", "feature_net")}
    torch.save(parts, tmp_path / "model.pth")
    config.pipeline.warm_start = tmp_path / "model.pth"
    weight = official.feature_net.conv1.weight
    assert torch.equal(pipeline_of(config).model.gnt.feature_net.conv1.weight, weight)
    state = read_checkpoint(latest_checkpoint(ns_train(config) / MODELS))["pipeline"]
    after = state["_model.gnt.feature_net.conv1.weight"]
    assert 0 < float((after - weight).abs().max()) < 1e-2  # trained on from there


def test_a_warm_start_of_another_size_is_refused(tiny_scene, make_config, tmp_path):
    sizes = make_config(tiny_scene, tmp_path).pipeline.model.gnt
    official = GNTModel(dataclasses.replace(sizes, depth=3, color_head=False, proposal_samples=0))
    parts = {part: getattr(official, part).state_dict() for part in ("net_coarse", "feature_net")}
    torch.save(parts, tmp_path / "model.pth")
    config = make_config(tiny_scene, tmp_path)
    for path, complaint in ((tmp_path / "model.pth", "does not fit"), (tmp_path / "nothing", "no such")):
        config.pipeline.warm_start = path
        with pytest.raises(UserError, match=complaint) as caught:
            pipeline_of(config)
        assert str(path) in one_line(caught.value)


def test_a_shiftadd_network_is_no_warm_start(tiny_run, tiny_scene, make_config, tmp_path):
    config = make_config(tiny_scene, tmp_path)
    config.pipeline.warm_start = tiny_run.parent / MODELS
    with pytest.raises(UserError, match="expected a dense") as caught:
        pipeline_of(config)
    one_line(caught.value)


def interrupt_at(step: int, monkeypatch) -> None:
    """Ctrl-C in the middle of a step."""
    draw = GNTDataManager.next_train

    def next_train(self, now: int):
        if now == step:
            raise KeyboardInterrupt
        return draw(self, now)

    monkeypatch.setattr(GNTDataManager, "next_train", next_train)


@pytest.mark.parametrize("step", [1, 2])
def test_ctrl_c_saves_a_checkpoint_to_go_on_from(
    tiny_scene, make_config, ns_train, tmp_path, monkeypatch, capsys, step
):
    config = make_config(tiny_scene, tmp_path, steps=3)  # step 2 is the last
    config.steps_per_save = 100
    with monkeypatch.context() as patch:
        interrupt_at(step, patch)
        with pytest.raises(SystemExit) as exit_:
            ns_train(config)
    assert exit_.value.code == 130
    printed = capsys.readouterr()
    models = config.get_base_dir() / MODELS
    command = f"ns-train shiftadd-gnt-tiny --load-dir {models} --data {tiny_scene}"
    notice = f"Interrupted at step {step}. Nothing is lost: go on with {command}\n"
    assert printed.out.endswith(notice)
    assert "Traceback" not in printed.out + printed.err
    assert latest_checkpoint(models).name == f"step-{step:09d}.ckpt"
    going_on = make_config(tiny_scene, tmp_path / "more", steps=step + 2)
    going_on.load_dir = models
    assert latest_checkpoint(ns_train(going_on) / MODELS).name == f"step-{step + 1:09d}.ckpt"


def test_ctrl_c_while_images_are_read_is_one_line(tiny_scene, make_config, ns_train, tmp_path, monkeypatch, capsys):
    def interrupt(*_: object, **__: object):
        raise KeyboardInterrupt

    monkeypatch.setattr(GNTDataManager, "__init__", interrupt)
    with pytest.raises(SystemExit) as exit_:
        ns_train(make_config(tiny_scene, tmp_path))
    assert exit_.value.code == 130
    printed = capsys.readouterr()
    assert "Interrupted before the first step." in printed.out
    assert "Traceback" not in printed.out + printed.err


def test_ctrl_c_after_the_end_of_training_saves_nothing_twice(tiny_scene, make_config, ns_train, tmp_path, monkeypatch):
    saved = []
    save = GNTTrainer.save_checkpoint
    monkeypatch.setattr(GNTTrainer, "save_checkpoint", lambda self, step: (saved.append(step), save(self, step)))

    def wait_for_ctrl_c(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(GNTTrainer, "_train_complete_viewer", wait_for_ctrl_c)
    ns_train(make_config(tiny_scene, tmp_path, steps=1))
    assert saved == [0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tiny_scene, make_config, ns_train, tmp_path):
    config = make_config(tiny_scene, tmp_path, steps=5)  # saves at 2 and 4
    config.get_base_dir().mkdir(parents=True)
    (config.get_base_dir() / "step-000000004.ckpt.unfinished").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"\(No space left on device\): mend that, and go on from .*2\.ckpt") as caught:
        ns_train(config)
    one_line(caught.value)
    run = config.get_base_dir()
    assert [path.name for path in (run / MODELS).iterdir()] == ["step-000000002.ckpt"]
    assert read_checkpoint(latest_checkpoint(run / MODELS))["step"] == 2
    assert not list(run.glob("*.unfinished"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("file", ["config.yml", "dataparser_transforms.json"])
def test_a_disk_that_is_full_before_the_first_checkpoint_is_one_line(tiny_scene, make_config, ns_train, tmp_path, file):
    config = make_config(tiny_scene, tmp_path)
    config.get_base_dir().mkdir(parents=True)
    (config.get_base_dir() / file).symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left on device") as caught:
        ns_train(config)
    assert str(config.get_base_dir()) in one_line(caught.value)


def test_killed_while_saving_leaves_the_checkpoint_before(tiny_run, make_config, ns_train, tmp_path, monkeypatch):
    """What a SIGKILL leaves: an unfinished file beside the folder, which nothing reads."""
    shutil.copytree(tiny_run.parent, tmp_path / "run")
    (tmp_path / "run/step-000000009.ckpt.unfinished").write_bytes(b"PK half of a checkpoint")
    assert read_checkpoint(latest_checkpoint(tmp_path / "run" / MODELS))["step"] == 3
    assert [path.name for path in (tmp_path / "run" / MODELS).iterdir()] == ["step-000000003.ckpt"]


def damage(kind: str, folder: Path) -> None:
    """Make the run's only checkpoint one that must not be gone on from."""
    path = latest_checkpoint(folder)
    if kind == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "missing":
        path.unlink()
    else:
        state = read_checkpoint(path)
        if kind == "without optimizers":
            del state["optimizers"]
        elif kind == "of another method":
            state["pipeline"] = {"_model.field.weight": torch.zeros(3)}
        elif kind == "a tensor short":
            del state["pipeline"]["_model.gnt.net_coarse.norm.bias"]
        elif kind == "a bare state dict":
            state = state["pipeline"]
        elif kind == "code":
            state["step"] = Planted()
        torch.save(state, path)


DAMAGES = {
    "truncated": "damaged",
    "empty": "damaged",
    "missing": "no step-",
    "without optimizers": "optimizers",
    "of another method": "another network",
    "a tensor short": "net_coarse.norm.bias",
    "a bare state dict": "not a nerfstudio checkpoint",
    "code": "damaged, or not a checkpoint that can be read safely",
}


class Planted:
    """Shouts when it is unpickled."""

    def __reduce__(self):
        return exec, ("import os; os.environ['PLANTED'] = 'was run'",)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_bad_checkpoint_is_refused_in_one_line(tiny_run, make_config, ns_train, tmp_path, kind):
    config = resumed(tiny_run, make_config, tmp_path)
    damage(kind, config.load_dir)
    with pytest.raises(UserError, match=DAMAGES[kind]) as caught:
        ns_train(config)
    one_line(caught.value)
    assert "PLANTED" not in os.environ


COMMANDS = {"ns-eval": (ns_eval, []), "ns-render": (ns_render, ["dataset"]), "ns-viewer": (run_viewer, [])}


@pytest.fixture
def own_run(tiny_run, tmp_path) -> Path:
    """The config.yml of a copy of the run, which nerfstudio's commands find the checkpoints of."""
    config = yaml.load(tiny_run.read_text(), Loader=yaml.Loader)
    config.output_dir = tmp_path / "copy"
    config.save_config()
    shutil.copytree(tiny_run.parent / MODELS, config.get_base_dir() / MODELS)
    return config.get_base_dir() / "config.yml"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if kind != "without optimizers"])
def test_a_bad_checkpoint_is_one_line_under_every_command(command, kind, own_run, monkeypatch, capsys):
    damage(kind, own_run.parent / MODELS)
    script, arguments = COMMANDS[command]
    monkeypatch.setattr(sys, "argv", [command, *arguments, "--load-config", str(own_run)])
    with pytest.raises(UserError) as caught:
        script.entrypoint()
    capsys.readouterr()
    sys.excepthook(caught.type, caught.value, caught.tb)  # what the interpreter does next
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert DAMAGES[kind] in line
    assert line.count("\n") == 1
    assert "PLANTED" not in os.environ


def test_evaluation_takes_the_newest_checkpoint_of_the_run_itself(own_run):
    config = yaml.load(own_run.read_text(), Loader=yaml.Loader)
    config.load_dir, config.load_step = Path("another run"), 1  # which this one went on from
    config.save_config()
    (own_run.parent / MODELS / "notes.txt").write_text("not a checkpoint")
    _, _, checkpoint, step = eval_setup(own_run)
    assert checkpoint == own_run.parent / MODELS / "step-000000003.ckpt"
    assert step == 3


def test_a_dense_checkpoint_is_not_gone_on_from_with_shifts(tiny_scene, dense_run, make_config, ns_train, tmp_path):
    config = make_config(tiny_scene, tmp_path, steps=2)
    config.load_dir = dense_run / MODELS
    with pytest.raises(UserError, match="warm-start") as caught:
        ns_train(config)
    one_line(caught.value)


def test_a_checkpoint_of_another_recipe_is_refused_with_its_own(tiny_run, tiny_scene, make_config, ns_train, tmp_path):
    config = resumed(tiny_run, make_config, tmp_path)
    config.pipeline.model.recipe = "add+shift"
    with pytest.raises(UserError, match=r"expected --pipeline\.model\.recipe add\+shift-attn\+moe") as caught:
        ns_train(config)
    assert "warm-start" not in one_line(caught.value)
    dense = make_config(tiny_scene, tmp_path / "dense", "gnt-tiny", steps=6)
    dense.load_dir = config.load_dir
    with pytest.raises(UserError, match=r"expected --pipeline\.model\.recipe add\+shift-attn\+moe") as caught:
        ns_train(dense)
    assert "warm-start" not in one_line(caught.value)


def test_a_step_that_was_not_saved_is_refused(tiny_run, make_config, ns_train, tmp_path):
    with pytest.raises(UserError, match=r"step-000000099\.ckpt: no such"):
        ns_train(resumed(tiny_run, make_config, tmp_path, load_step=99))


def break_config(config, kind: str) -> None:
    """Ask for something that cannot be."""
    data, model = config.pipeline.datamanager, config.pipeline.model
    if kind == "recipe":
        model.recipe = "add+shif"
    elif kind == "bits":
        model.shift_bits = 9
    elif kind == "near beyond far":
        data.near, data.far = 3.0, 2.0
    elif kind == "near zero":
        data.near = 0.0
    elif kind == "too few views":
        data.num_source_views = 20
    elif kind == "no views":
        data.num_source_views = 0
    elif kind == "no scene":
        config.data = config.data / "nowhere"
    elif kind == "one sample":
        model.num_samples = 1
    elif kind == "no judgement":
        config.steps_per_judgement = 0


BROKEN = {
    "recipe": "add",
    "bits": "bits",
    "near beyond far": "near 3, far 2",
    "near zero": "near 0",
    "too few views": "num-source-views",
    "no views": "num-source-views",
    "no scene": "nowhere",
    "one sample": "num_samples",
    "no judgement": "steps-per-judgement 0",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_settings_that_cannot_be_are_refused_in_one_line(tiny_scene, make_config, ns_train, tmp_path, kind):
    config = make_config(tiny_scene, tmp_path, steps=1)
    break_config(config, kind)
    with pytest.raises(UserError) as caught:
        ns_train(config)
    assert BROKEN[kind] in one_line(caught.value)


def test_images_too_small_for_the_feature_network_are_refused(write_scene, make_config, ns_train, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path / "scene", shiftadd3d={"near": 2.0, "far": 6.0})
    with pytest.raises(UserError, match="24x16") as caught:
        ns_train(make_config(scene, tmp_path, steps=1))
    one_line(caught.value)


def test_a_loss_that_is_not_finite_stops_training_in_one_line(tiny_scene, make_config, ns_train, tmp_path, monkeypatch):
    draw = GNTDataManager.next_train

    def next_train(self, step: int):
        rays, batch = draw(self, step)
        return rays, {**batch, "image": batch["image"] * (float("nan") if step == 1 else 1.0)}

    monkeypatch.setattr(GNTDataManager, "next_train", next_train)
    with pytest.raises(UserError, match=r"not finite.*optimizers\.transformers\.optimizer\.lr") as caught:
        ns_train(make_config(tiny_scene, tmp_path, steps=3))
    one_line(caught.value)


@pytest.mark.parametrize("term", ["balance", "proposal"])
def test_a_term_of_the_loss_that_is_not_finite_is_named(tiny_scene, make_config, ns_train, tmp_path, term):
    config = make_config(tiny_scene, tmp_path, steps=3)
    setattr(config.pipeline.model, f"{term}_loss_mult", float("inf"))
    with pytest.raises(UserError, match=rf"not finite any more \({term}_loss is (inf|nan)\)") as caught:
        ns_train(config)
    one_line(caught.value)


@pytest.mark.slow
def test_ns_train_prints_one_line_for_bad_input_and_exits_with_1(tmp_path):
    command = [sys.executable, "-c", "from nerfstudio.scripts.train import entrypoint; entrypoint()"]
    arguments = ["shiftadd-gnt-tiny", "--vis", "tensorboard", "--output-dir", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, *arguments, "--data", str(tmp_path / "nowhere")],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert "nowhere" in lines[-1]
    assert "Traceback" not in done.stderr
