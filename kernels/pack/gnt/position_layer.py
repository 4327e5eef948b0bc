"""The weights of the position layer, in the panels that kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shiftadd3d.kernels.pack.panel import across, padded, row, stored
from shiftadd3d.kernels.reference.gnt.position_layer import EMBEDDING_DIM, position_layer_twin


class Panels(NamedTuple):
    """Weights [inputs, outputs], the outputs padded to whole vectors: D hidden ones, E of the layer.

    Attributes:
        x: [C, D], of the features.
        point: [63, D], of the embedded position.
        direction: [63, D], of the embedded direction.
        first_bias: [D].
        second: [D, E], its rows not padded.
        second_bias: [E].
    """

    x: Tensor
    point: Tensor
    direction: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor


def panels(weights: Sequence[Tensor], biases: Sequence[Tensor], lanes: int) -> Panels:
    """What the kernel reads, of weights and biases as `position_layer_twin` takes them."""
    first, second = weights
    inputs = first.shape[1]
    of_x, of_point, of_direction = first.split([inputs - 2 * EMBEDDING_DIM, EMBEDDING_DIM, EMBEDDING_DIM], dim=1)
    packed = Panels(
        x=across(of_x, lanes=lanes),
        point=across(of_point, lanes=lanes),
        direction=across(of_direction, lanes=lanes),
        first_bias=row(biases[0], lanes),
        second=across(second, lanes=lanes),
        second_bias=row(biases[1], lanes),
    )
    return Panels(*map(stored, packed))


def sizes(lanes: int, width: int, hidden: int, outputs: int) -> list[tuple[int, ...]]:
    """Of the panels of a layer from so many channels to so many."""
    deep, wide = padded(hidden, lanes), padded(outputs, lanes)
    first = (width, deep), (EMBEDDING_DIM, deep), (EMBEDDING_DIM, deep), (deep,)
    return [*first, (hidden, wide), (wide,)]


def position_layer_of_panels(
    x: Tensor, points: Tensor, directions: Tensor, panels: Sequence[Tensor], outputs: int
) -> Tensor:
    """The twin of the weights that panels hold: where no kernel serves."""
    of_x, of_point, of_direction, first_bias, second, second_bias = panels
    hidden = second.shape[0]
    first = torch.cat([of_x, of_point, of_direction])[:, :hidden].mT
    weights, biases = [first, second[:, :outputs].mT], [first_bias[:hidden], second_bias[:outputs]]
    return position_layer_twin(x, points, directions, weights, biases)
