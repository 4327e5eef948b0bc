"""The inputs of a GNT's transformers: an embedding of each view's values at a point, and the point's first query.

For each point, with the values x_v of view v::

    e_v = W_2 relu(W_1 x_v + b_1) + b_2
    query = max_v e_v + W_c [mean_v x_v, deviation_v x_v, share of views that see the point] + b_c

where mean and standard deviation are over the views that see the point, and the second summand is there for networks
with a colour head only. The maximum is over all views, as in the original code, those that do not see the point among
them. The weights that come with the package have learned with that: leaving these views out loses 0.08 dB on
ethiopian_head, whose photos are masked, and 0.07 dB on the chair (`shiftadd-gnt-tiny`, 252 pixels, untrained).

Source: Varma T. et al., "Is Attention All That NeRF Needs?" (ICLR 2023), section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd3d.kernels.reference.layers import Layer, linear, perceptron
from shiftadd3d.kernels.reference.trials import Draw

MAX_VIEWS = 32
LEAST_VARIANCE = 1e-6


def view_moments(
    values: Tensor,  # [*, V, K]
    mask: Tensor,  # [*, V] bool
) -> Tensor:  # [*, 2 K + 1]
    """Mean and standard deviation over the views that see a point, and the share of these among all."""
    seen = mask.unsqueeze(-1).to(values.dtype)
    count = seen.sum(dim=-2).clamp(min=1.0)
    mean = (values * seen).sum(dim=-2) / count
    variance = ((values - mean.unsqueeze(-2)).square() * seen).sum(dim=-2) / count
    return torch.cat([mean, (variance + LEAST_VARIANCE).sqrt(), seen.mean(dim=-2)], dim=-1)


def view_embedding(
    values: Tensor,  # [*, V, K]
    mask: Tensor,  # [*, V] bool
    embed: Layer,  # of K inputs
    consistency: Layer | None,  # of 2 K + 1 inputs
) -> tuple[Tensor, Tensor]:
    """The embeddings [*, V, C], and the queries [*, C], with any layers; without `consistency`, queries are maxima."""
    embedding = embed(values)
    query = embedding.amax(dim=-2)
    return embedding, query if consistency is None else query + consistency(view_moments(values, mask))


def view_embedding_twin(
    values: Tensor,
    mask: Tensor,
    weights: list[Tensor],  # [D, K], [C, D] and, with consistency, [C, 2 K + 1]
    biases: list[Tensor],  # [D], [C], [C]
) -> tuple[Tensor, Tensor]:
    """`view_embedding` with linear layers of these weights."""
    first, second, *consistency = map(linear, weights, biases)
    return view_embedding(values, mask, perceptron(first, second), consistency[0] if consistency else None)


def random_views(
    seed: int, *, points: int, views: int, inputs: int, hidden: int, width: int, with_moments: bool
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Arguments of `view_embedding` for a trial."""
    sizes = [(hidden, inputs), (width, hidden), (width, 2 * inputs + 1)][: 3 if with_moments else 2]
    draw = Draw(seed)
    mask = draw.uniform(points, views) > 0.3
    mask[0] = False
    weights, biases = draw.weights(sizes), [draw.normal(size[0]) for size in sizes]
    return draw.normal(points, views, inputs), mask, weights, biases
