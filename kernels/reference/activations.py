"""Activation functions that layers apply to a product."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

Activation = Literal["none", "relu", "gelu"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


def apply(name: Activation, x: Tensor) -> Tensor:
    """The activation in torch, elementwise: ``"gelu"`` is the exact one, with erf."""
    if name == "relu":
        return F.relu(x)
    return F.gelu(x) if name == "gelu" else x
