"""Several processes for one model. `torchrun` or `accelerate launch` starts them, and torch.distributed connects them.

Each process holds a whole copy of the model ("ddp": `DistributedDataParallel`), or a part of each block ("fsdp":
`fully_shard`) for models that do not fit otherwise. In both cases, states are saved whole and by name, so that any
number of processes can continue. In a single process, every function here does what that process needs.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shiftadd3d._errors import UserError

_Made = TypeVar("_Made")
# The first process alone reads a data set through before the others go on.
_TIMEOUT = timedelta(hours=2)


class Process(NamedTuple):
    """The number of this process, and of all processes."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def this_process() -> Process:
    """This process, as torch.distributed knows it."""
    if dist.is_available() and dist.is_initialized():
        return Process(dist.get_rank(), dist.get_world_size())
    return Process()


def choose_device(device: str | None) -> torch.device:
    """The device called `device`, or the GPU of this process, or the CPU.

    Raises:
        UserError: no such device here.
    """
    if device is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {device}: no such device here; expected cpu, cuda or cuda:1") from None
    return chosen


# The launcher's store, kept: a process that served it itself must not leave before the others are done with it.
@functools.cache
def _launcher_store() -> tuple[dist.Store, int, int]:
    return next(dist.rendezvous("env://", timeout=_TIMEOUT))


_connections = itertools.count()


@contextmanager
def connected(device: torch.device) -> Iterator[Process]:
    """Connect the processes that a launcher started, if one did: NCCL between GPUs, gloo between CPUs.

    Processes may connect several times, one after the other, if all of them do.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield this_process()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, world_size = _launcher_store()
    # Each connection under keys of its own: under the same ones, a process could read where another listened the time
    # before, and both would wait for ever.
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"shiftadd3d/{next(_connections)}", store),
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
    )
    try:
        yield this_process()
    finally:
        dist.destroy_process_group()


def from_first_process(make: Callable[[], _Made]) -> _Made:
    """Call `make` in the first process. All processes return its result, or raise its `UserError`."""
    process = this_process()
    if process.world_size == 1:
        return make()
    made: list[Any] = [None, None]
    if process.is_first:
        try:
            made[0] = make()
        except UserError as error:
            made[1] = str(error)
    dist.broadcast_object_list(made, src=0)
    if made[1] is not None:
        raise UserError(made[1])
    return made[0]


def add_up(*tensors: Tensor, device: torch.device) -> None:
    """Replace each tensor by its sum over the processes."""
    if this_process().world_size == 1:
        return
    for tensor in tensors:
        total = tensor.to(device)
        dist.all_reduce(total)
        tensor.copy_(total)


def shard_(model: nn.Module, device: torch.device) -> None:
    """Leave each process a part of every parameter of `model`. Blocks are gathered one at a time to compute.

    Raises:
        UserError: this torch is too old for it.
    """
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        raise UserError("--parallel fsdp: expected torch 2.6 or later") from None
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.data, src=0)  # as DistributedDataParallel does: parts of different wholes fit no model
    mesh = dist.init_device_mesh(device.type, (this_process().world_size,))
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "blocks":
            for block in module.children():
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_` was applied. All processes have to run such a model together."""
    return dist.is_available() and any(type(p).__name__ == "DTensor" for p in model.parameters())


def whole_model_state(model: nn.Module) -> dict[str, Any]:
    """The state dict of a model, gathered on the CPU of the first process. Others may get an empty one."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    return get_model_state_dict(model, options=_whole_states())


def load_whole_model_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Load a whole state dict, which every process has, into a model of whatever kind."""
    from torch.distributed.checkpoint.state_dict import set_model_state_dict

    set_model_state_dict(model, state, options=_whole_states(cpu_offload=False))


def whole_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state by the names of the parameters, gathered like the model's."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return dict(get_optimizer_state_dict(model, optimizer, options=_whole_states()))


def load_whole_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `whole_optimizer_state` gave."""
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    set_optimizer_state_dict(model, optimizer, state, options=_whole_states(cpu_offload=False))


def _whole_states(cpu_offload: bool = True) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload)
