"""Several processes train one network.

On GPUs, nerfstudio starts them itself: `ns-train shiftadd-gnt --machine.num-devices 8`. On CPUs it refuses. There,
torchrun starts an ns-train in each process, and this module connects them.
"""

from __future__ import annotations

import atexit
import itertools
import os
import random

import numpy as np
import torch
import torch.distributed as dist
from nerfstudio.configs.base_config import MachineConfig
from nerfstudio.utils import comms
from torch import nn

from shiftadd3d._errors import UserError


def is_first_process() -> bool:
    """Whether this is the first of torchrun's processes, which writes files; True for a single process."""
    return os.environ.get("RANK", "0") == "0"


def from_first_process(value: str) -> str:
    """The value from the first of the connected processes; the own value in a single process."""
    if not dist.is_initialized():
        return value
    said = [value]
    dist.broadcast_object_list(said, src=0)
    return said[0]


@torch.no_grad()
def take_from_first_process(module: nn.Module) -> None:
    """Overwrite a module's parameters and buffers with those of the first process. In a single process, do nothing."""
    if not dist.is_initialized():
        return
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        dist.broadcast(tensor, src=0)


def check_processes(machine: MachineConfig) -> None:
    """Check whether nerfstudio can start the processes in the options, before it tries.

    Raises:
        UserError: it cannot. The message says what can.
    """
    if machine.num_devices * machine.num_machines > 1 and machine.device_type != "cuda":
        raise UserError(
            f"--machine.num-devices {machine.num_devices}: nerfstudio starts several processes on GPUs only; on CPUs "
            f"use torchrun --nproc-per-node {machine.num_devices} --no-python ns-train ..., without that option"
        )


def join_processes(machine: MachineConfig) -> dict[str, int]:
    """Connect with the other processes of torchrun, if there are any: gloo between CPUs, NCCL between GPUs.

    Returns:
        `local_rank` and `world_size` for the trainer; empty in a single process, or in processes of nerfstudio.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return {}
    on_gpus = machine.device_type == "cuda"
    local_rank = int(os.environ["LOCAL_RANK"])
    if on_gpus:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    atexit.register(dist.destroy_process_group)
    comms.LOCAL_PROCESS_GROUP = dist.group.WORLD
    # Each process draws rays of its own. nerfstudio seeded all of them as the first one.
    seed = machine.seed + dist.get_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return {"local_rank": local_rank, "world_size": dist.get_world_size()}
