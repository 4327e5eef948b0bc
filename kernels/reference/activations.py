"""Activation functions that layers apply to a product."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from shiftadd3d._errors import UserError

Activation = Literal["none", "relu", "gelu"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


def check_activation(name: str) -> None:
    """Raise `UserError` unless `name` is one of `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise UserError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {name!r}")


def apply(name: Activation, x: Tensor) -> Tensor:
    """The activation in torch, elementwise: ``"gelu"`` is the exact one, with erf."""
    if name == "relu":
        return F.relu(x)
    return F.gelu(x) if name == "gelu" else x
