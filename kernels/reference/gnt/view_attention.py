"""Subtraction attention of points over source views (GNT's view transformer).

For each point, with x_v what view v shows and d_v how its ray differs::

    k_v = W_k x_v        p_v = P_2 relu(P_1 d_v + b_1) + b_2
    s_v = A_2 relu(A_1 (k_v - W_q query + p_v) + a_1) + a_2        one score a channel, -1e9 where the view is masked
    out = W_o sum_v softmax_v(s)_v (W_v k_v + p_v) + b_o

Source: Varma T. et al., "Is Attention All That NeRF Needs?" (ICLR 2023), section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.reference.layers import Layer, linear, perceptron
from shiftadd3d.kernels.reference.trials import Draw

MAX_VIEWS = 32
WEIGHTS = ("q", "k", "v", "position 1", "position 2", "attention 1", "attention 2", "out")
BIASES = ("position 1", "position 2", "attention 1", "attention 2", "out")


def view_attention(
    query: Tensor,  # [*, C]
    views: Tensor,  # [*, V, C]
    ray_diff: Tensor,  # [*, V, 4]
    mask: Tensor,  # [*, V] bool; where no view is left, all weigh the same
    *,
    q: Layer,
    k: Layer,
    v: Layer,
    position: Layer,
    score: Layer,
    out: Layer,
    dropout: float = 0.0,
) -> Tensor:  # [*, C]
    """The attention, with any layers; `dropout` is the rate at which shares of views are dropped."""
    queries = q(query)
    keys = k(views)
    values = v(keys)  # of the keys, not of the views: so it is in the released network
    place = position(ray_diff)
    scores = score(keys - queries.unsqueeze(-2) + place)
    return out(blend_views(scores, values + place, mask, dropout))


def blend_views(
    scores: Tensor,  # [*, V, C]
    values: Tensor,  # [*, V, C]
    mask: Tensor,  # [*, V] bool
    dropout: float = 0.0,
) -> Tensor:  # [*, C]
    """The values' mean over the views, weighed in each channel by a softmax of its scores."""
    lowest = max(-1e9, torch.finfo(scores.dtype).min)  # float16 ends at -65504
    share = torch.softmax(scores.masked_fill(~mask.unsqueeze(-1), lowest), dim=-2)
    return (values * F.dropout(share, dropout)).sum(-2)


def view_attention_twin(
    query: Tensor,
    views: Tensor,
    ray_diff: Tensor,
    mask: Tensor,
    weights: list[Tensor],  # of WEIGHTS
    biases: list[Tensor],  # of BIASES
) -> Tensor:  # [*, C]
    """`view_attention` with linear layers of these weights."""
    w_q, w_k, w_v, w_p1, w_p2, w_a1, w_a2, w_o = weights
    b_p1, b_p2, b_a1, b_a2, b_o = biases
    return view_attention(
        query,
        views,
        ray_diff,
        mask,
        q=linear(w_q),
        k=linear(w_k),
        v=linear(w_v),
        position=perceptron(linear(w_p1, b_p1), linear(w_p2, b_p2)),
        score=perceptron(linear(w_a1, b_a1), linear(w_a2, b_a2)),
        out=linear(w_o, b_o),
    )


def random_attention(
    seed: int, *, points: int, views: int, width: int, hidden: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Arguments of the twin for a trial; one point is seen by no view."""
    draw, sizes = Draw(seed), weight_sizes(width, hidden)
    inputs = (draw.normal(points, width), draw.normal(points, views, width), draw.normal(points, views, 4))
    mask = draw.uniform(points, views) > 0.3
    mask[3] = False
    return *inputs, mask, draw.weights(sizes), [draw.normal(size[0]) for size in sizes[3:]]


def compare_with_twin(run: Callable[..., Tensor], device: torch.device, width: int, hidden: int) -> None:
    """Raise `AssertionError` unless `run`, given the twin's arguments on `device`, computes what the twin does."""
    query, views, ray_diff, mask, weights, biases = random_attention(0, points=37, views=5, width=width, hidden=hidden)
    inputs = query, views, ray_diff, mask
    on_device = (
        *(x.to(device) for x in inputs),
        [weight.to(device) for weight in weights],
        [bias.to(device) for bias in biases],
    )
    torch.testing.assert_close(
        run(*on_device).cpu(), view_attention_twin(*inputs, weights, biases), rtol=1e-4, atol=1e-5
    )


def weight_sizes(width: int, hidden: int) -> tuple[tuple[int, int], ...]:
    square, up, down = (width, width), (width, hidden), (hidden, width)
    return (square, square, square, (hidden, 4), up, down, up, square)
