"""Layers as torch.fx sees them: one node each, like torch's own layers.

A tracer of torch.fx runs a model with stand-ins for tensors, which have no shapes, and enters every module that is not
torch's. It could not follow decisions that depend on shapes or on the machine.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.fx import Proxy, Tracer

from shiftadd3d._errors import UserError


def one_node(layer: nn.Module, x: Proxy, *args: Any, **kwargs: Any) -> Any:
    """Record the call of a layer for torch.fx.

    Raises:
        UserError: if the traced model is the layer itself.
    """
    tracer = cast(Tracer, x.tracer)
    if layer is tracer.root:
        raise UserError(f"to torch.fx a {type(layer).__name__} is one node: put it into a module, and trace that")
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (x, *args), kwargs)
