"""Layers as the specifications take them: functions of a tensor, whether they are modules or made of weights.

So a network's own forward pass and what its kernel is compared with are one function.
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
