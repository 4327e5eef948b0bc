"""The weights of the views' embedding, in the panels that kernels read."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Panels(NamedTuple):
    """Weights [inputs, outputs] and biases, the outputs padded to whole vectors. Without moments the third is empty."""

    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor
    moments: Tensor
    moments_bias: Tensor


def panels(weights: list[Tensor], biases: list[Tensor], lanes: int) -> Panels:
    def across(x: Tensor) -> Tensor:
        return F.pad(x.detach().float(), (0, -x.shape[-1] % lanes)).contiguous()

    pairs = [(across(weight.mT), across(bias)) for weight, bias in zip(weights, biases, strict=True)]
    if len(pairs) < 3:
        pairs.append((pairs[1][0].new_empty(0), pairs[1][1]))
    (first, first_bias), (second, second_bias), (moments, moments_bias) = pairs
    return Panels(first, first_bias, second, second_bias, moments.flatten(), moments_bias)
