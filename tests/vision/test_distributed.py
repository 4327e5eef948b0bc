"""Two processes fine-tune as one does, and one goes on where two were interrupted. As a script, this is one of two."""

from __future__ import annotations

import faulthandler
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch.distributed.tensor import DTensor

from shiftadd3d.vision import engine
from shiftadd3d.vision.checkpoint import load
from shiftadd3d.vision.data import InputConfig, PictureSet, open_data
from shiftadd3d.vision.distributed import connected, shard_
from shiftadd3d.vision.engine import evaluate
from shiftadd3d.vision.finetune import finetune
from shiftadd3d.vision.metrics import ClassificationMetrics
from shiftadd3d.vision.settings import DataSettings, FinetuneSettings, StageSettings

pytestmark = pytest.mark.slow  # each process has torch and timm to import

WORLD_SIZE = 2
TIMEOUT = 1200  # seconds; a busy machine may take minutes to import everything
INTERRUPTED_STEP = 8  # of three a stage: the second one of the last stage


def make_settings(folder: Path, outputs: Path, name: str) -> FinetuneSettings:
    """Three stages of three steps that depend on nothing random but the pictures' own augmentation."""
    stage = StageSettings(epochs=1, lr=0.05)
    return FinetuneSettings(
        data=folder,
        model_args=("patch_size=8", "embed_dim=16", "depth=2", "num_heads=2"),
        image_size=16,
        batch_size=12,
        # Plain gradients: Adam would blow the noise of summation up wherever a gradient is zero.
        opt="sgd",
        recipe="moe",
        recipe_args=("latencies=(3.0,1.0)", "router_noise=0.0"),
        moe_weight=1.0,
        stage0=stage,
        stage1=stage,
        stage2=stage,
        output_dir=outputs,
        name=name,
    )


def odd_pictures(folder: Path) -> PictureSet:
    """Eleven: in batches of five, one process of two has a batch more than the other."""
    pictures = open_data(DataSettings(data=folder)).val
    return PictureSet(pictures.source, pictures.indices[:11], pictures.classes)


def run_one_process(folder: Path, outputs: Path) -> None:
    """Connect three times: to train with whole models, to train with parts of one, and to evaluate one."""
    steps = {"count": 0}
    step = engine._Training._step
    seen: dict = {"gradients": [], "balance": []}

    def watched(self, *args):
        steps["count"] += 1
        # Only one of the two hears of it.
        if steps["count"] == 9 + INTERRUPTED_STEP and self.process.rank == 1:
            self.interrupted = True
        loss, moe = step(self, *args)
        if not self.sharded:
            gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
            seen["gradients"].append(gradients)
            seen["balance"].append(moe)
        return loss, moe

    engine._Training._step = watched
    seen["weights"] = finetune(make_settings(folder, outputs, "together")).model.state_dict()
    try:
        finetune(replace(make_settings(folder, outputs, "interrupted"), parallel="fsdp"))
    except KeyboardInterrupt:
        seen["stopped after"] = steps["count"] - 9
    model = load(outputs / "together" / "stage2-shift" / "best")
    with connected(torch.device("cpu")) as process:
        shard_(model, torch.device("cpu"))
        seen["parts"] = sum(cast(DTensor, parameter).to_local().numel() for parameter in model.parameters())
        seen["evaluated"] = evaluate(model, odd_pictures(folder), InputConfig(size=16), batch_size=5).as_dict()
    torch.save(seen, outputs / f"{process.rank}.pt")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """The output folder of two processes, and of one that does the same alone."""
    outputs = tmp_path_factory.mktemp("outputs")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD_SIZE}"]
    done = subprocess.run(
        [*command, __file__, str(folder), str(outputs)], capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stderr
    finetune(make_settings(folder, outputs, "alone"))
    return outputs


@pytest.fixture(scope="module")
def ranks(outputs: Path) -> list[dict]:
    return [torch.load(outputs / f"{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_gradients_balance_losses_and_weights_are_equal_on_both(ranks: list[dict]):
    first, second = ranks
    assert len(first["gradients"]) == len(second["gradients"]) == 9
    for one, other in zip(first["gradients"], second["gradients"], strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert first["balance"] == second["balance"] and first["balance"][8] > 0
    assert all(torch.equal(tensor, second["weights"][name]) for name, tensor in first["weights"].items())


def test_two_processes_do_what_one_does_alone(outputs: Path):
    for stage in ("stage0-dense", "stage1-add", "stage2-shift"):
        alone, together = (
            json.loads((outputs / name / stage / "history.json").read_text())["epochs"][0]
            for name in ("alone", "together")
        )
        for key in ("train_loss", "moe_loss", "val_loss"):
            assert together[key] == pytest.approx(alone[key], rel=1e-3, abs=1e-6), (stage, key)
        assert_close(
            load(outputs / "together" / stage / "best").state_dict(),
            load(outputs / "alone" / stage / "best").state_dict(),
        )


def test_a_sharded_model_is_in_parts_and_does_what_the_whole_one_does(outputs: Path, ranks: list[dict], folder: Path):
    model = load(outputs / "together" / "stage2-shift" / "best")
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert sum(rank["parts"] for rank in ranks) == whole and all(rank["parts"] < 0.6 * whole for rank in ranks)
    metrics = evaluate(model, odd_pictures(folder), InputConfig(size=16))
    for rank in ranks:
        evaluated = ClassificationMetrics.from_dict(rank["evaluated"])
        assert evaluated.count == 11 and evaluated.confusion == metrics.confusion
        assert evaluated.loss == pytest.approx(metrics.loss, rel=1e-4)


def test_one_process_goes_on_where_two_with_parts_were_interrupted(outputs: Path, ranks: list[dict], folder: Path):
    assert [rank["stopped after"] for rank in ranks] == [INTERRUPTED_STEP] * 2
    state = torch.load(outputs / "interrupted" / "stage2-shift" / "state.pt", weights_only=True)
    assert (state["epoch"], state["batch"]) == (0, 2)
    resumed = finetune(make_settings(folder, outputs, "interrupted"), resume=True)
    assert_close(resumed.model.state_dict(), ranks[0]["weights"])


if __name__ == "__main__":
    faulthandler.dump_traceback_later(TIMEOUT - 20, exit=True)  # where they wait for each other, if they do
    torch.set_num_threads(1)
    run_one_process(Path(sys.argv[1]), Path(sys.argv[2]))
