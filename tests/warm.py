"""What a frozen model does in a forward pass once everything is packed and compiled: it only reads its weights."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

WORK = {
    f"aten::{name}"
    for name in ("cat", "_to_copy", "mm", "addmm", "matmul", "linear", "constant_pad_nd", "bmm", "sin", "cos", "exp")
}
"""What torch would do inside an op if that packed weights, or computed something in front of its kernel."""


class OpsOnWeights(TorchDispatchMode):
    """Notes the operators that read weights, and those that make numbers of 64 bits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        self.on_weights: set[str] = set()
        self.of_double: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.untyped_storage().data_ptr() in self.weights for tensor in tensors if tensor.numel()):
            self.on_weights.add(func._schema.name)
        if any(leaf.dtype == torch.float64 for leaf in pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)):
            self.of_double.add(func._schema.name)
        return out


def work_inside(ops: Set[str], run: Callable[[], object]) -> list[Any]:
    """The profiler's events inside ops of these names, which `OpsOnWeights` does not see."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        run()
    return [event for event in profiler.events() or () if ops & set(_ancestors(event))]


def _ancestors(event: Any) -> list[str]:
    """The names of the ops that an event happened in, without their namespace."""
    names = []
    while event.cpu_parent is not None:
        event = event.cpu_parent
        names.append(event.name.removeprefix("shiftadd3d::"))
    return names
