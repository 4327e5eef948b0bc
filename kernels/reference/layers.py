"""Layers as arguments of the specifications: functions of a tensor, which are modules or made from weights.

So a network's own forward pass and the reference for its kernel are the same function.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Layer = Callable[[Tensor], Tensor]


def linear(weight: Tensor, bias: Tensor | None = None) -> Layer:
    """``x W^T + b`` in the dtype of x, with W [outputs, inputs] and b [outputs]."""

    def layer(x: Tensor) -> Tensor:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    return layer


def perceptron(first: Layer, second: Layer) -> Layer:
    """Two layers with a ReLU between."""
    return lambda x: second(F.relu(first(x)))
