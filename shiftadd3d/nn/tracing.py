"""Layers as torch.fx sees them: one node each, as it sees torch's own.

A tracer of torch.fx runs a model with stand-ins for tensors, which have no shapes, and goes into every module that is
not torch's. What is decided by shapes and by the machine could not be followed there.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.fx import Proxy, Tracer

from shiftadd3d._errors import UserError


def one_node(layer: nn.Module, x: Proxy, *args: Any, **kwargs: Any) -> Any:
    """The call of a layer, for torch.fx to note down.

    Raises:
        UserError: if the layer is itself the model that is traced.
    """
    tracer = cast(Tracer, x.tracer)
    if layer is tracer.root:
        raise UserError(f"to torch.fx a {type(layer).__name__} is one node: put it into a module, and trace that")
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (x, *args), kwargs)
