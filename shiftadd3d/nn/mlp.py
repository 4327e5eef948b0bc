"""Perceptrons of two layers in their form for inference, which runs as one fused kernel."""

from __future__ import annotations

import copy
import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn

from shiftadd3d.kernels.activations import Activation
from shiftadd3d.kernels.mlp import shift_mlp
from shiftadd3d.kernels.numerics import numerics, uses_kernels
from shiftadd3d.nn.shift import PackedShiftLinear


class FrozenMlp(nn.Module):
    """``fc2(act(fc1(x)))``: the layers of a perceptron, without what it has for training only.

    Without gradients, packed shift layers of one format run as one op: on CPUs as one kernel, which keeps what lies
    between them in the cache (see `shiftadd3d.kernels`).

    Args:
        mlp: whose layers it takes over, the very modules under the same names; one that `is_plain_mlp` accepts.

    Shapes: x [*, in_features] to [*, out_features].
    """

    fc1: nn.Linear | PackedShiftLinear
    act: nn.Module
    fc2: nn.Linear | PackedShiftLinear

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        for name in ("fc1", "act", "fc2"):
            self.add_module(name, mlp.get_submodule(name))
        self.training = mlp.training

    def forward(self, x: Tensor) -> Tensor:  # [*, in_features] -> [*, out_features]
        first, second, activation = self.fc1, self.fc2, activation_name(self.act)
        if (
            isinstance(first, PackedShiftLinear)
            and isinstance(second, PackedShiftLinear)
            and (first.bits, first.terms) == (second.bits, second.terms)
            and activation is not None
            and x.shape[-1:] == (first.in_features,)
            and uses_kernels("shift_mlp", x)
            and not is_watched(self)
        ):
            layers = (first.codes, first.offset, first.bias, second.codes, second.offset, second.bias)
            return shift_mlp(x, *layers, first.bits, activation)
        return second(self.act(first(x)))


def activation_name(module: nn.Module) -> Activation | None:
    """What kernels call this activation function; None if they do not have it."""
    if type(module) is nn.ReLU:
        return "relu"
    return "gelu" if type(module) is nn.GELU and module.approximate == "none" else None


def is_watched(module: nn.Module) -> bool:
    """Whether someone sees or changes what goes into and comes out of the parts of `module`."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules() if part is not module)


def is_plain_mlp(module: nn.Module) -> bool:
    """Whether a `FrozenMlp` may stand in for a module in evaluation.

    It has two linear or packed shift layers `fc1` and `fc2`, an activation `act` that kernels know, nothing else but
    what does nothing in evaluation, no hooks, and it takes one tensor. What its forward pass makes of them is tried
    out, on a copy with random weights.
    """
    first, second, act = (cast(Any, getattr(module, name, None)) for name in ("fc1", "fc2", "act"))
    if isinstance(module, FrozenMlp) or not isinstance(act, nn.Module) or activation_name(act) is None:
        return False
    if not all(type(layer) in (nn.Linear, PackedShiftLinear) for layer in (first, second)):
        return False
    rest = [child for name, child in module.named_children() if name not in ("fc1", "fc2", "act")]
    if not all(type(child) in (nn.Identity, nn.Dropout) for child in rest):
        return False
    if list(module.parameters(recurse=False)) or list(module.buffers(recurse=False)):
        return False
    if any(part._forward_hooks or part._forward_pre_hooks for part in module.modules()):
        return False
    if first.out_features != second.in_features:
        return False
    inputs = inspect.signature(module.forward).parameters.values()
    return len(inputs) == 1 and _computes_an_mlp(module)


def _computes_an_mlp(module: nn.Module) -> bool:
    with torch.random.fork_rng(devices=()), torch.no_grad(), numerics("twin"):
        torch.manual_seed(0)
        trial = copy.deepcopy(module).eval()
        for name in ("fc1", "fc2"):
            layer = cast(nn.Linear, trial.get_submodule(name))
            setattr(trial, name, nn.Linear(layer.in_features, layer.out_features))
        expected = FrozenMlp(trial)
        for shape in ((3,), (2, 3), (1, 2, 3)):
            x = torch.randn(*shape, expected.fc1.in_features)
            try:
                if not torch.equal(trial(x), expected(x)):
                    return False
            except Exception:  # whatever a module raises that wants something else
                return False
    return True
