"""The weights of the views' embedding, in the panels that kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from shiftadd3d.kernels.pack.panel import across, padded, row, stored
from shiftadd3d.kernels.reference.gnt.view_embedding import view_embedding_twin


class Panels(NamedTuple):
    """Weights [inputs, outputs] and biases, the outputs padded to whole vectors. Without moments the fifth is empty."""

    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor
    moments: Tensor
    moments_bias: Tensor


def panels(weights: Sequence[Tensor], biases: Sequence[Tensor], lanes: int) -> Panels:
    """What the kernel reads, of weights and biases as `view_embedding_twin` takes them."""
    pairs = [(across(weight, lanes=lanes), row(bias, lanes)) for weight, bias in zip(weights, biases, strict=True)]
    if len(pairs) < 3:
        pairs.append((pairs[1][0].new_empty(0), pairs[1][1]))
    (first, first_bias), (second, second_bias), (moments, moments_bias) = pairs
    return Panels(*map(stored, (first, first_bias, second, second_bias, moments.flatten(), moments_bias)))


def sizes(lanes: int, inputs: int, hidden: int, width: int, with_moments: bool) -> list[tuple[int, ...]]:
    """Of the panels of an embedding of so many inputs in so many channels."""
    deep, wide, moments = padded(hidden, lanes), padded(width, lanes), 2 * inputs + 1 if with_moments else 0
    return [(inputs, deep), (deep,), (hidden, wide), (wide,), (moments * wide,), (wide,)]


def view_embedding_of_panels(
    values: Tensor, mask: Tensor, panels: Sequence[Tensor], width: int
) -> tuple[Tensor, Tensor]:
    """The twin of the weights that panels hold: where no kernel serves."""
    first, first_bias, second, second_bias, moments, moments_bias = panels
    hidden = second.shape[0]
    weights, biases = [first[:, :hidden].mT, second[:, :width].mT], [first_bias[:hidden], second_bias[:width]]
    if moments.numel():
        weights.append(moments.view(-1, moments_bias.shape[0])[:, :width].mT)
        biases.append(moments_bias[:width])
    return view_embedding_twin(values, mask, weights, biases)
