"""Layers that a model uses in another way than by calling the module in their place.

The forward passes of timm's BEiT and Swin v2 and of torchvision's Swin compute with `self.qkv.weight` and never call
`self.qkv`. Other models keep a layer in a plain list, or keep one of its methods. A replacement of such a layer is not
used, or only in part, and nothing reports that.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_ABOUT_STORAGE = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_cuda", "is_meta"}
"""What code may ask of a weight without computing with it."""


def bypassed(model: nn.Module) -> dict[nn.Module, str]:
    """Modules of `model` that are used in another way than through their place in it, and how.

    Args:
        model: a model written in Python. Compiled code is not examined.
    """
    found: dict[nn.Module, str] = {}
    inside = dict.fromkeys(model.modules())
    for module in inside:
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for chain, where in _weights_computed_with(type(module)):
            layer = _resolve(module, chain)
            if layer is not None and layer is not module:
                found.setdefault(layer, f"{where} computes with its weight, past the layer")
        for name, value in vars(module).items():
            if name == "_modules":
                continue
            for held in _held(value):
                if held in inside and held is not module:
                    found.setdefault(held, f"{type(module).__name__}.{name} holds it past its place in the model")
    return found


@functools.cache
def _weights_computed_with(kind: type[nn.Module]) -> tuple[tuple[tuple[str, ...], str], ...]:
    """Names from `self` to each layer of whose weight the values are read in the forward pass, and what reads them."""
    if kind.__module__.startswith("torch.nn."):
        return ()  # a fast path of torch's, which surgery turns off
    found = []
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        name = waiting.pop()
        method = getattr(kind, name, None)
        if not isinstance(method, types.FunctionType) or method.__module__.startswith("torch.nn."):
            continue
        for chain in _chains(method):
            if chain[0] not in seen and isinstance(getattr(kind, chain[0], None), types.FunctionType):
                seen.add(chain[0])
                waiting.append(chain[0])
            if "weight" in chain[1:]:
                at = chain.index("weight", 1)
                if not set(chain[at + 1 : at + 2]) & _ABOUT_STORAGE:
                    found.append((chain[:at], f"{kind.__name__}.{name}"))
    return tuple(found)


def _chains(method: types.FunctionType) -> Iterator[tuple[str, ...]]:
    """`("qkv", "weight", "dtype")` for each `self.qkv.weight.dtype` in a method."""
    first = method.__code__.co_varnames[:1]
    names: list[str] | None = None
    for step in dis.get_instructions(method):
        if step.opname in ("CACHE", "PRECALL", "EXTENDED_ARG"):
            continue
        if names is not None and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            names.append(str(step.argval))
            continue
        if names:
            yield tuple(names)
        names = [] if step.opname.startswith("LOAD_FAST") and (step.argval,) == first else None


def _resolve(module: nn.Module, chain: tuple[str, ...]) -> nn.Module | None:
    for name in chain:
        found = module._modules.get(name)
        if found is None:
            return None
        module = found
    return module


def _held(value: Any) -> Iterator[nn.Module]:
    """Modules in a plain container or behind a bound method."""
    values = value.values() if type(value) is dict else value if type(value) in (list, tuple) else (value,)
    for one in values:
        if isinstance(one, types.MethodType) and isinstance(one.__self__, nn.Module):
            yield one.__self__
        elif isinstance(one, nn.Module):
            yield one
