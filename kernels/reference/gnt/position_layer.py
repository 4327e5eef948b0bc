"""Telling samples where they are: a perceptron over features and the sine-cosine embedding of position and direction.

``out = W_2 relu(W_1 [x, embedding(point), embedding(direction)] + b_1) + b_2``.

Source: Mildenhall et al., "NeRF" (ECCV 2020), eq. 4; Varma T. et al., "Is Attention All That NeRF Needs?" (ICLR 2023),
section 3.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.reference.layers import Layer, linear, perceptron
from shiftadd3d.kernels.reference.trials import Draw

#: Octaves of the sine-cosine embedding of positions and directions, and its width: the value itself, sines, cosines.
NUM_FREQUENCIES = 10
EMBEDDING_DIM = 3 + 3 * 2 * NUM_FREQUENCIES


def sinusoidal_embedding(x: Tensor) -> Tensor:
    """[..., 3] to [..., 63]: x, sin x, cos x, sin 2x, cos 2x, ... up to 2^9 x (NeRF, eq. 4, without pi)."""
    octaves = [x * 2.0**i for i in range(NUM_FREQUENCIES)]
    return torch.cat([x, *(f(octave) for octave in octaves for f in (torch.sin, torch.cos))], dim=-1)


def position_layer(
    x: Tensor,  # [R, S, C]
    points: Tensor,  # [R, S, 3] world
    directions: Tensor,  # [R, 3], unit vectors
    layers: Layer,  # of C + 126 inputs
) -> Tensor:  # [R, S, E]
    """The perceptron, with any layers."""
    along = sinusoidal_embedding(directions)[:, None].expand(-1, x.shape[1], -1)
    return layers(torch.cat([x, sinusoidal_embedding(points), along], dim=-1))


def position_layer_twin(
    x: Tensor,
    points: Tensor,
    directions: Tensor,
    weights: list[Tensor],  # [D, C + 126], [E, D]
    biases: list[Tensor],  # [D], [E]
) -> Tensor:  # [R, S, E]
    """`position_layer` with linear layers of these weights."""
    return position_layer(x, points, directions, perceptron(*map(linear, weights, biases)))


def random_samples(
    seed: int, *, rays: int, samples: int, width: int, hidden: int, outputs: int
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Arguments of `position_layer` for a trial."""
    draw = Draw(seed)
    weights = draw.weights(((hidden, width + 2 * EMBEDDING_DIM), (outputs, hidden)))
    biases = [draw.normal(hidden), draw.normal(outputs)]
    x, points, directions = draw.normal(rays, samples, width), 3.0 * draw.normal(rays, samples, 3), draw.normal(rays, 3)
    return x, points, F.normalize(directions, dim=-1), weights, biases
