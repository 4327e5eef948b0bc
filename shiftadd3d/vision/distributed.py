"""Several processes, one model: what `torchrun` or `accelerate launch` start, torch.distributed connects.

Alone, every function here does what one process needs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from shiftadd3d._errors import UserError

_Made = TypeVar("_Made")
# The first process alone reads a data set through before the others go on.
_TIMEOUT = timedelta(hours=2)


class Process(NamedTuple):
    """Which process this is, and of how many."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def this_process() -> Process:
    """As torch.distributed knows it."""
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
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}; expected cpu, cuda or cuda:1") from None
    return chosen


@contextmanager
def connected(device: torch.device) -> Iterator[Process]:
    """Join the processes that a launcher started, if one did: NCCL between GPUs, gloo between CPUs."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield this_process()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield this_process()
    finally:
        dist.destroy_process_group()


def from_first_process(make: Callable[[], _Made]) -> _Made:
    """What `make` returns in the first process, in all of them; a `UserError` that it raises there, too."""
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
