"""The weights of the position layer, in the panels that kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shiftadd3d.kernels.pack.panel import across, padded, row, stored
from shiftadd3d.kernels.reference.arguments import takes
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
    """The panels of weights and biases as `position_layer_twin` takes them."""
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
    """The shapes of the panels for C channels, D hidden units and E outputs."""
    deep, wide = padded(hidden, lanes), padded(outputs, lanes)
    first = (width, deep), (EMBEDDING_DIM, deep), (EMBEDDING_DIM, deep), (deep,)
    return [*first, (hidden, wide), (wide,)]


class PositionLayer(NamedTuple):
    """Telling samples where they are: see `shiftadd3d.kernels.reference.gnt.position_layer`.

    A kernel runs in float32 on CPUs with fused multiply-adds, and plain torch in all other cases. Coordinates may be up
    to 2000. Beyond that, sines of 512 times a coordinate lose more digits than torch's. The outcome is [R, S, E].
    Inference only. Raises `UserError` if shapes do not fit each other.

    Attributes:
        x: features of samples.
        points: positions of samples.
        directions: unit vectors of rays.
        panels: `Panels`.
        outputs: E.
    """

    x: Tensor  # [R, S, C]
    points: Tensor  # [R, S, 3]
    directions: Tensor  # [R, 3]
    panels: list[Tensor]
    outputs: int


@takes(PositionLayer)
def position_layer_of_panels(given: PositionLayer) -> Tensor:
    """The twin with the weights of panels. It runs where no kernel serves."""
    x, points, directions, panels, outputs = given
    of_x, of_point, of_direction, first_bias, second, second_bias = panels
    hidden = second.shape[0]
    first = torch.cat([of_x, of_point, of_direction])[:, :hidden].mT
    weights, biases = [first, second[:, :outputs].mT], [first_bias[:hidden], second_bias[:outputs]]
    return position_layer_twin(x, points, directions, weights, biases)
