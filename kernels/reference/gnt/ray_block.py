"""A transformer block along rays: norm, attention, residual, and if wanted norm, perceptron, residual.

Two attentions (GNT's ray transformer, and what a recipe makes of it)::

    "softmax"       softmax(q k^T / sqrt(d)) v
    "pm1", "01"     the linear-angular form over signs b(.) of queries and keys, -1 and 1 or 0 and 1:
                    (1/2 sum_j v_j + b(q) sum_j b(k_j) v_j^T / (pi d)) / (the same with 1 for v_j),
                    plus a convolution of the values along the ray

Source: Varma T. et al., "Is Attention All That NeRF Needs?" (ICLR 2023), section 3.3; You et al., ShiftAddViT (NeurIPS
2023), section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.reference import linear_angular
from shiftadd3d.kernels.reference.layers import Layer, linear
from shiftadd3d.kernels.reference.trials import Draw

Attention = Literal["softmax", "pm1", "01"]

#: The layers of the weights and biases of `ray_block`, in this order. Without a perceptron, the last three are left
#: out. A layer without a bias has None.
LAYERS = ("norm", "q", "k", "v", "out", "perceptron's norm", "first", "second")


def ray_attention(
    x: Tensor,  # [R, S, C]
    q: Layer,
    k: Layer,
    v: Layer,
    out: Layer,
    num_heads: int,
    attention: str = "softmax",
    conv: Tensor | None = None,  # [heads, kernel], an odd kernel; None: no convolution
    return_weights: bool = False,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """The attention of the block, with any layers. `dropout` is the rate at which entries of a softmax's map are
    dropped.

    Returns:
        [R, S, C]. If wanted, also the attention of the first sample of each ray, averaged over the heads, [R, S]. GNT
        uses it as the weights of volume rendering.
    """
    queries, keys, values = (
        layer(x).unflatten(-1, (num_heads, -1)).transpose(1, 2) for layer in (q, k, v)
    )  # [R, heads, S, C / heads]
    first = None
    if attention == "softmax":
        attended = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout)
        if return_weights:
            scores = torch.einsum("rhc,rhsc->rhs", queries[:, :, 0], keys) / math.sqrt(queries.shape[-1])
            first = torch.softmax(scores, dim=-1)
    else:
        low = -1.0 if attention == "pm1" else 0.0
        queries, keys = (torch.where(code >= 0, 1.0, low).to(x.dtype) for code in (queries, keys))
        attended = linear_angular.attend(queries, keys, values)
        if return_weights:
            first = linear_angular.first_row(queries, keys)
    if conv is not None:
        kernel = conv.to(x.dtype)[:, None, :, None]
        attended = attended + F.conv2d(values, kernel, padding=(conv.shape[1] // 2, 0), groups=num_heads)
    return out(attended.transpose(1, 2).flatten(-2)), None if first is None else first.mean(dim=1)


def ray_block_twin(
    x: Tensor,  # [R, S, C]
    weights: list[Tensor],  # of LAYERS
    biases: list[Tensor | None],  # of LAYERS
    conv: Tensor | None,  # [heads, kernel], an odd kernel; None: no convolution
    num_heads: int,
    attention: str,
    eps: float,
    return_weights: bool,
) -> tuple[Tensor, Tensor]:
    """The block with linear layers of these weights.

    Returns:
        [R, S, C], and how the first sample of each ray attends, the mean over the heads, [R, S] (empty unless
        `return_weights`).
    """
    layers: list[Layer] = [linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    for number in range(0, len(layers), 5):
        layers[number] = norm(weights[number], biases[number], eps)
    return ray_block(x, layers, conv, num_heads, attention, return_weights)


def ray_block(
    x: Tensor,  # [R, S, C]
    layers: Sequence[Layer],  # of LAYERS
    conv: Tensor | None,
    num_heads: int,
    attention: str,
    return_weights: bool,
) -> tuple[Tensor, Tensor]:
    """The block with any layers; see `ray_block_twin`."""
    q, k, v, out = layers[1:5]
    attended, first = ray_attention(layers[0](x), q, k, v, out, num_heads, attention, conv, return_weights)
    x = x + attended
    if len(layers) > 5:
        x = x + layers[7](F.relu(layers[6](layers[5](x))))
    return x, x.new_empty(0) if first is None else first


def norm(weight: Tensor, bias: Tensor | None, eps: float) -> Layer:
    """A layer norm in the dtype of its input."""
    return lambda x: F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)


def random_block(
    seed: int, *, rays: int, samples: int, width: int, heads: int, hidden: int, kernel: int
) -> tuple[Tensor, list[Tensor], list[Tensor | None], Tensor | None, int]:
    """The tensors of `ray_block` and its number of heads, for a trial."""
    draw = Draw(seed)
    weights = [1.0 + 0.1 * draw.normal(width), *draw.weights([(width, width)] * 4)]
    biases: list[Tensor | None] = [draw.normal(width), None, None, None, draw.normal(width)]
    if hidden:
        weights += [1.0 + 0.1 * draw.normal(width), *draw.weights(((hidden, width), (width, hidden)))]
        biases += [draw.normal(size) for size in (width, hidden, width)]
    x, conv = draw.normal(rays, samples, width), draw.normal(heads, kernel) if kernel else None
    return x, weights, biases, conv, heads


def samples_of_certain_codes(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], eps: float) -> Tensor:
    """Samples, [R, S] bool, whose outcome cannot change much by rounding, for attentions over signs.

    If a query or key is almost zero, rounding decides its sign. A query affects its own sample, and a key affects all
    samples of its ray.

    Sums of n float32 products are off by less than ``5 sqrt(n) u`` times the sum of their sizes, except for one in
    100,000 (Higham and Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41, 2019).
    n includes the sums of the norm.
    """
    share = 5 * math.sqrt(2 * x.shape[-1]) * torch.finfo(torch.float32).eps / 2
    scale, *projections = (weight.double() for weight in weights[:3])
    offset, *shifts = (x.new_zeros((), dtype=torch.float64) if bias is None else bias.double() for bias in biases[:3])
    scaled = F.layer_norm(x.double(), x.shape[-1:], eps=eps) * scale
    of_query, of_key = (
        ((scaled + offset) @ weight.mT + shift).abs()
        > share * ((scaled.abs() + offset.abs()) @ weight.abs().mT + shift.abs())
        for weight, shift in zip(projections, shifts, strict=True)
    )
    return of_query.all(-1) & of_key.all(-1).all(-1, keepdim=True)
