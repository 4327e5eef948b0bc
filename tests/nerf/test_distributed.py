"""Two processes train one network on a CPU. As a script, this is one of two: it trains a pickled configuration."""

from __future__ import annotations

import faulthandler
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shiftadd3d import UserError
from shiftadd3d.nerf.trainer import GNTTrainer, GNTTrainerConfig
from shiftadd3d.nerf.warm_start import PRETRAINED
from shiftadd3d.nerf.weights import TINY

WORLD_SIZE, STEPS = 2, 4
TIMEOUT = 1200  # seconds; a busy machine may take minutes to import everything


def train_one_of_several(config: GNTTrainerConfig, seen_by: Path) -> None:
    from nerfstudio.scripts import train

    seen: list[dict] = []
    step = GNTTrainer.train_iteration

    def watched(self: GNTTrainer, number: int):
        result = step(self, number)
        parameters = self.pipeline.model.named_parameters()
        gradients = {name: p.grad.clone() for name, p in parameters if p.grad is not None}
        losses = {name: float(loss) for name, loss in result[1].items()}
        weights = {name: p.detach().clone() for name, p in self.pipeline.model.named_parameters()}
        drawn = self.pipeline.datamanager.drawn
        found = {"gradients": gradients, "losses": losses, "weights": weights, "stage": self.pipeline.model.stage}
        seen.append(found | {"sources": None if drawn is None else drawn.views.images})
        return result

    GNTTrainer.train_iteration = watched
    train.main(config)
    torch.save(seen, f"{seen_by}.{torch.distributed.get_rank()}")


@pytest.fixture(scope="module")
def config(
    make_config: Callable[..., GNTTrainerConfig], tiny_scene: Path, tmp_path_factory: pytest.TempPathFactory
) -> GNTTrainerConfig:
    return make_config(tiny_scene, tmp_path_factory.mktemp("outputs"), steps=STEPS)


@pytest.fixture(scope="module")
def ranks(config: GNTTrainerConfig) -> list[list[dict]]:
    """What each process saw, step by step."""
    return train_in_processes(config)


def train_in_processes(config: GNTTrainerConfig) -> list[list[dict]]:
    seen_by = config.output_dir / "seen"
    (config.output_dir / "config.pickle").write_bytes(pickle.dumps(config))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD_SIZE}"]
    command = [*torchrun, __file__, str(config.output_dir / "config.pickle"), str(seen_by)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    return [torch.load(f"{seen_by}.{rank}", weights_only=True) for rank in range(WORLD_SIZE)]


@pytest.mark.slow
def test_gradients_and_balance_losses_are_equal_in_both_stages_while_rays_differ(ranks: list[list[dict]]):
    assert [step["stage"] for step in ranks[0]] == [1, 1, 2, 2]
    for one, other in zip(*ranks, strict=True):
        assert one["gradients"] and one["gradients"].keys() == other["gradients"].keys()
        assert all(torch.equal(gradient, other["gradients"][name]) for name, gradient in one["gradients"].items())
        assert one["losses"]["rgb_loss"] != other["losses"]["rgb_loss"]
    balance = [[step["losses"]["balance_loss"] for step in steps if step["stage"] == 2] for steps in ranks]
    assert balance[0] == balance[1] and min(balance[0]) > 0


@pytest.mark.slow
def test_across_scenes_each_process_draws_its_own_and_weights_stay_equal(
    make_config: Callable[..., GNTTrainerConfig],
    tiny_scene: Path,
    tmp_path: Path,
    write_scene: dict[str, Callable[..., Path]],
):
    scenes = [write_scene["nerfstudio"](tmp_path / f"scenes/{width}", size=(width, 48)) for width in (64, 80, 96, 112)]
    config = make_config(tiny_scene, tmp_path, steps=STEPS)
    # From the weights that come with the package, mixtures and all from the first step.
    config.pipeline.model.gnt, config.pipeline.warm_start = TINY, PRETRAINED
    config.pipeline.model.second_stage_at = 0.0
    config.pipeline.datamanager.train_scenes = tuple(scenes)
    ranks = train_in_processes(config)
    widths = [[step["sources"].shape[2] for step in steps] for steps in ranks]
    assert widths[0] != widths[1] and set(widths[0] + widths[1]) <= {64, 80, 96, 112}
    for one, other in zip(*ranks, strict=True):
        assert one["weights"].keys() == other["weights"].keys()
        assert all(torch.equal(weight, other["weights"][name]) for name, weight in one["weights"].items())


@pytest.mark.slow
def test_one_process_goes_on_where_two_ended(
    ranks: list[list[dict]],
    config: GNTTrainerConfig,
    make_config: Callable[..., GNTTrainerConfig],
    ns_train: Callable[[GNTTrainerConfig], Path],
):
    run = config.get_base_dir()
    assert [path.name for path in run.glob("*.yml")] == ["config.yml"]  # of the first process alone
    further = make_config(config.data, config.output_dir, steps=STEPS + 2)
    further.timestamp, further.load_dir = "further", run / "nerfstudio_models"
    checkpoints = ns_train(further) / "nerfstudio_models"
    assert [path.name for path in checkpoints.glob("*.ckpt")] == [f"step-{STEPS + 1:09d}.ckpt"]


def test_processes_that_nerfstudio_cannot_start_are_refused_with_what_can(
    make_config: Callable[..., GNTTrainerConfig],
    tiny_scene: Path,
    tmp_path: Path,
    ns_train: Callable[[GNTTrainerConfig], Path],
):
    config = make_config(tiny_scene, tmp_path)
    config.machine.num_devices = 2
    with pytest.raises(UserError, match="use torchrun --nproc-per-node 2 --no-python ns-train"):
        ns_train(config)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(TIMEOUT - 20, exit=True)  # where they wait for each other, if they do
    torch.set_num_threads(1)
    train_one_of_several(pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2]))
