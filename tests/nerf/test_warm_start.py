"""What training starts from: the weights that come with the package, random ones, or those of a checkpoint."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from nerfstudio.configs.method_configs import all_methods

from shiftadd3d import UserError
from shiftadd3d.models.gnt import GNTModel
from shiftadd3d.nerf.checkpoint import latest_checkpoint, read_checkpoint
from shiftadd3d.nerf.datamanager import GNTDataManager
from shiftadd3d.nerf.optimizers import StartAdamConfig
from shiftadd3d.nerf.trainer import GNTTrainer
from shiftadd3d.nerf.warm_start import PRETRAINED
from shiftadd3d.nerf.weights import TINY, load_network, pretrained_file, read_weights
from shiftadd3d.nn.shift import PackedShiftLinear

MODELS = "nerfstudio_models"


@pytest.fixture
def shipped_config(make_config, tiny_scene, tmp_path):
    """Of a method whose weights come with the package, as ns-train has it but for scene and steps."""

    def make(method: str = "shiftadd-gnt-tiny", steps: int = 2):
        config = make_config(tiny_scene, tmp_path / "out", method, steps)
        config.pipeline.model.gnt = TINY
        config.pipeline.warm_start = all_methods[method].pipeline.warm_start
        return config

    return make


def network(config) -> GNTModel:
    """As training begins with it."""
    return config.pipeline.setup(device="cpu", test_mode="val", world_size=1, local_rank=0).model.gnt


def test_the_tiny_methods_alone_start_from_the_weights_that_come_with_the_package():
    starts = {name: all_methods[name].pipeline.warm_start for name in all_methods if name.endswith(("gnt-tiny", "gnt"))}
    assert {name for name, start in starts.items() if start == PRETRAINED} == {"gnt-tiny", "shiftadd-gnt-tiny"}
    assert {starts["gnt"], starts["shiftadd-gnt"]} == {None}
    assert all_methods["gnt-tiny"].pipeline.model.gnt == TINY


def test_training_starts_from_the_weights_that_come_with_the_package_unless_it_is_told_not_to(shipped_config):
    shipped = read_weights(pretrained_file("gnt-tiny"))[0]
    gnt = network(shipped_config("gnt-tiny")).state_dict()
    for name, value in shipped.items():
        assert torch.equal(gnt[name], value.float()), name
    config = shipped_config("gnt-tiny")
    config.pipeline.warm_start = Path("none")
    random = network(config).state_dict()
    assert random.keys() == gnt.keys()
    assert not torch.equal(random["feature_net.conv1.weight"], gnt["feature_net.conv1.weight"])


@pytest.mark.parametrize("second_stage_at", [0.5, 0.0])
def test_layers_that_become_shifts_start_from_the_packed_network_and_all_others_from_the_dense(
    shipped_config, second_stage_at
):
    config = shipped_config()
    config.pipeline.model.second_stage_at = second_stage_at
    gnt = dict(network(config).named_modules())
    dense = read_weights(pretrained_file("gnt-tiny"))[0]
    packed = {name: layer for name, layer in load_network().named_modules() if isinstance(layer, PackedShiftLinear)}
    shared = packed.keys() & gnt.keys()
    assert {"net_coarse.q_fcs.0.0", "net_coarse.view_selftrans.1.attn.q_fc", "proposal.score.0"} <= shared
    for name in shared:
        assert torch.equal(gnt[name].weight, packed[name].weight), name
        own = dense.get(f"{name}.weight")
        assert own is None or not torch.equal(gnt[name].weight, own.float()), name
    assert torch.equal(gnt["feature_net.conv1"].weight, dense["feature_net.conv1.weight"].float())
    if second_stage_at:
        perceptron = "net_coarse.view_selftrans.0.ff.fc1"
        assert torch.equal(gnt[perceptron].weight, dense[f"{perceptron}.weight"].float())


def test_another_recipe_starts_from_the_dense_weights_alone(shipped_config):
    config = shipped_config()
    config.pipeline.model.recipe = "add"
    gnt, dense = network(config).state_dict(), read_weights(pretrained_file("gnt-tiny"))[0]
    for name, value in dense.items():
        assert torch.equal(gnt[name], value.float()), name


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"width": 48}, "--pipeline.model.gnt.width 32, not 48"),
        ({"feature_widths": (32, 48, 65)}, "--pipeline.model.gnt.feature-widths 32 48 64, not 32 48 65"),
        ({"proposal_samples": 0}, "--pipeline.model.gnt.proposal-samples 48, not 0"),
        # These two do not show in the shapes of the weights.
        ({"canonical": False}, "--pipeline.model.gnt.canonical True, not False"),
        ({"num_heads": 8, "depth": 3}, "depth 2, not 3; --pipeline.model.gnt.num-heads 4, not 8"),
    ],
)
def test_a_network_that_they_do_not_fit_is_refused_by_the_setting_that_was_altered(shipped_config, changes, named):
    config = shipped_config()
    config.pipeline.model.gnt = dataclasses.replace(TINY, **changes)
    with pytest.raises(UserError) as caught:
        network(config)
    message = str(caught.value)
    assert named in message and "--pipeline.warm-start none" in message and "\n" not in message
    assert message.count(", not ") == len(changes)


def test_planes_and_dropout_may_be_altered(shipped_config):
    config = shipped_config()
    config.pipeline.model.gnt = dataclasses.replace(TINY, proposal_samples=32, dropout=0.1)
    assert network(config).config.proposal_samples == 32


def test_a_checkpoint_to_go_on_from_wins(tiny_run, make_config, ns_train, tiny_scene, tmp_path, monkeypatch, capsys):
    config = make_config(tiny_scene, tmp_path, steps=5)  # of a network that the weights do not fit
    config.pipeline.warm_start = PRETRAINED
    config.load_dir = tiny_run.parent / MODELS
    before = read_checkpoint(latest_checkpoint(config.load_dir))["training"]["weights"]
    began = []
    iterate = GNTTrainer.train_iteration

    def watch(self, step):
        began.append({name: value.clone() for name, value in self.pipeline.model.gnt.state_dict().items()})
        return iterate(self, step)

    monkeypatch.setattr(GNTTrainer, "train_iteration", watch)
    ns_train(config)
    assert len(began) == 1
    assert all(torch.equal(began[0][name], value) for name, value in before.items())
    assert "Starting from" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("start", "lr", "expected"), [("pretrained", None, 0.03), ("none", None, 0.05), ("pretrained", 0.07, 0.07)]
)
def test_the_learning_rate_is_that_of_the_start_unless_one_is_set(
    shipped_config, ns_train, monkeypatch, capsys, start, lr, expected
):
    config = shipped_config("gnt-tiny", steps=1)
    config.pipeline.warm_start = Path(start)
    for optimizer in config.optimizers.values():
        optimizer["optimizer"] = StartAdamConfig(lr=lr, lr_from_random=0.05, lr_from_trained=0.03)
    rates = []
    setup = GNTTrainer.setup_optimizers

    def watch(self):
        optimizers = setup(self)
        rates.extend(optimizer.param_groups[0]["initial_lr"] for optimizer in optimizers.optimizers.values())
        raise KeyboardInterrupt  # that was it

    monkeypatch.setattr(GNTTrainer, "setup_optimizers", watch)
    with pytest.raises(SystemExit):
        ns_train(config)
    assert rates == [expected, expected]


def test_a_run_across_scenes_goes_on_with_the_scenes_that_it_would_have_had(
    make_config, ns_train, tiny_scene, tmp_path, write_scene, monkeypatch
):
    scenes = tuple(
        write_scene["nerfstudio"](tmp_path / f"scenes/{width}", size=(width, 48)) for width in (64, 80, 96, 112)
    )
    draw = GNTDataManager.next_train
    seen: dict[int, int] = {}
    interrupted = itertools.count(1)

    def watch(self, step):
        rays = draw(self, step)
        seen[step] = self.drawn.views.images.shape[2]
        return rays

    def run(name: str, load_dir: Path | None = None) -> Path:
        config = make_config(tiny_scene, tmp_path / name, "gnt-tiny", steps=12)
        config.steps_per_save = config.steps_per_eval_batch = config.steps_per_eval_image = 100
        config.pipeline.datamanager.train_scenes, config.load_dir = scenes, load_dir
        return ns_train(config)

    monkeypatch.setattr(GNTDataManager, "next_train", watch)
    run("whole")
    whole, seen = seen, {}
    assert len(set(whole.values())) > 1

    def interrupt(self, step):
        if step == 5 and next(interrupted) == 1:
            raise KeyboardInterrupt
        return watch(self, step)

    monkeypatch.setattr(GNTDataManager, "next_train", interrupt)
    with pytest.raises(SystemExit):
        run("half")
    run("rest", tmp_path / "half/scene/gnt-tiny/run" / MODELS)
    assert seen == {step: width for step, width in whole.items() if step != 5}  # that one was lost
