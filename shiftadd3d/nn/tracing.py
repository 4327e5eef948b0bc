"""Layers as torch.fx sees them: one node each, as it sees torch's own.

A tracer of torch.fx runs a model with stand-ins for tensors, which have no shapes, and goes into every module that is
not torch's. What is decided by shapes and by the machine could not be followed there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import nn
from torch.fx import Proxy

from shiftadd3d._errors import UserError

_Forward = TypeVar("_Forward", bound=Callable[..., Any])


def one_node(forward: _Forward) -> _Forward:
    """A layer's forward pass, of which torch.fx sees the call only.

    Raises:
        UserError: if the layer is the model that is traced.
    """

    @functools.wraps(forward)
    def traceable(self: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, Proxy):
            return forward(self, x, *args, **kwargs)
        if self is x.tracer.root:
            raise UserError(f"to torch.fx a {type(self).__name__} is one node: put it into a module, and trace that")
        return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x, *args), kwargs)

    return cast(_Forward, traceable)
