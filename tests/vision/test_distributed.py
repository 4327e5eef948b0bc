"""Two processes fine-tune as one does, and one goes on where two were interrupted. As a script, this is one of two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shiftadd3d.vision import engine
from shiftadd3d.vision.checkpoint import load
from shiftadd3d.vision.finetune import finetune
from shiftadd3d.vision.settings import FinetuneSettings, StageSettings

pytestmark = [
    pytest.mark.slow,  # each process has torch and timm to import
    pytest.mark.skipif(
        "SHIFTADD3D_TEST_TORCHRUN" not in os.environ,
        reason="two gloo processes once waited for each other without end: set SHIFTADD3D_TEST_TORCHRUN to run it",
    ),
]

WORLD_SIZE = 2
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


def run_one_process(folder: Path, outputs: Path) -> None:
    torch.set_num_threads(1)
    steps = {"count": 0}
    step = engine._Training._step
    seen: dict = {"gradients": [], "balance": []}

    def watched(self, *args):
        steps["count"] += 1
        # Only one of the two hears of it.
        if steps["count"] == INTERRUPTED_STEP + 9 and self.process.rank == 1:
            self.interrupted = True
        loss, moe = step(self, *args)
        seen["gradients"].append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})
        seen["balance"].append(moe)
        return loss, moe

    engine._Training._step = watched
    result = finetune(make_settings(folder, outputs, "together"))
    seen["weights"] = result.model.state_dict()
    try:
        finetune(make_settings(folder, outputs, "interrupted"))
    except KeyboardInterrupt:
        seen["stopped after"] = steps["count"] - 9
    torch.save(seen, outputs / f"{os.environ['RANK']}.pt")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """The output folder of two processes, and of one that does the same alone."""
    outputs = tmp_path_factory.mktemp("outputs")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD_SIZE}"]
    done = subprocess.run([*command, __file__, str(folder), str(outputs)], capture_output=True, text=True, timeout=1500)
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
    assert len(first["gradients"]) == len(second["gradients"]) == 9 + INTERRUPTED_STEP
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


def test_one_process_goes_on_where_two_were_interrupted(outputs: Path, ranks: list[dict], folder: Path):
    assert [rank["stopped after"] for rank in ranks] == [INTERRUPTED_STEP] * 2
    state = torch.load(outputs / "interrupted" / "stage2-shift" / "state.pt", weights_only=True)
    assert (state["epoch"], state["batch"]) == (0, 2)
    resumed = finetune(make_settings(folder, outputs, "interrupted"), resume=True)
    assert_close(resumed.model.state_dict(), ranks[0]["weights"])


if __name__ == "__main__":
    run_one_process(Path(sys.argv[1]), Path(sys.argv[2]))
