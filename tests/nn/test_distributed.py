"""Two processes train as one does on the whole batch. Run as a script, this file is one of the two."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shiftadd3d.nn import MoELinear, MoEMlp, ShiftConv2d, ShiftLinear, collect_moe_losses

pytestmark = pytest.mark.slow  # each process has torch to import

WORLD_SIZE = 2


def build() -> nn.Sequential:
    """All that is trained; the shift expert of the last mixture gets no tokens."""
    torch.manual_seed(0)
    lopsided = MoELinear(8, 4, noise=0.0)
    with torch.no_grad():
        lopsided.router.bias.copy_(torch.tensor([50.0, -50.0]))
    return nn.Sequential(
        ShiftConv2d(3, 8, 2),
        nn.Flatten(2),
        nn.Linear(4, 8),
        ShiftLinear(8, 8),
        ShiftLinear(8, 8, mode="PS"),
        MoEMlp(8, 16, noise=0.0, latencies=(3.0, 1.0)),
        lopsided,
    )


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 4, 4, generator=generator), torch.randn(6, 8, 4, generator=generator)


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int = 3) -> dict[str, Tensor]:
    """Gradients of the last step and the weights after it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    balance = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(x)
        balance = collect_moe_losses(model)
        (F.mse_loss(out, y) + balance).backward()
        optimizer.step()
    model = model.module if isinstance(model, DistributedDataParallel) else model
    seen = {"balance": balance.detach()}
    for name, parameter in model.named_parameters():
        seen[name], seen[f"gradient of {name}"] = parameter.detach(), parameter.grad
    return seen


def run_one_process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE)
    x, y = (part.chunk(WORLD_SIZE)[rank] for part in batch())
    seen: dict[str, object] = {"training": train(DistributedDataParallel(build()), x, y)}

    measuring = MoELinear(8, 8, latencies="measure")
    measuring(torch.randn(500 * rank, 8))  # one process has no tokens
    seen["latencies"] = measuring.latencies

    torch.manual_seed(2)
    layer, tokens = MoELinear(8, 8, noise=0.0, latencies=(2.0, 1.0)), torch.randn(10, 8)
    layer(tokens[: 10 * rank])
    seen["balance of all tokens"] = collect_moe_losses(layer).item()

    torch.save(seen, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(WORLD_SIZE)
    ]
    try:
        errors = [process.communicate(timeout=900)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD_SIZE)]


def test_gradients_and_weights_are_equal_on_all_ranks(ranks: list[dict]) -> None:
    first, second = (rank["training"] for rank in ranks)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value is not None and torch.equal(value, second[name]), name
    unused = "gradient of 6.experts.1.weight"
    assert unused in first and (first[unused] == 0).all()


def test_two_processes_train_as_one_does_on_the_whole_batch(ranks: list[dict]) -> None:
    alone = train(build(), *batch())
    assert alone["balance"] > 0
    for name, value in alone.items():
        torch.testing.assert_close(ranks[0]["training"][name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: n + m)


def test_all_ranks_take_the_latencies_to_be_the_same(ranks: list[dict]) -> None:
    first, second = (rank["latencies"] for rank in ranks)
    assert first == second and len(set(first)) == 2


def test_a_process_without_tokens_knows_the_balance_of_all(ranks: list[dict]) -> None:
    torch.manual_seed(2)
    layer, tokens = MoELinear(8, 8, noise=0.0, latencies=(2.0, 1.0)), torch.randn(10, 8)
    layer(tokens)
    balance = collect_moe_losses(layer).item()
    assert balance > 0
    assert [rank["balance of all tokens"] for rank in ranks] == pytest.approx([balance, balance])


if __name__ == "__main__":
    run_one_process(int(sys.argv[1]), Path(sys.argv[2]))
