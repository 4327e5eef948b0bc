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

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d._errors import UserError

ATTENTIONS = ("softmax", "pm1", "01")

#: What the weights and biases of `ray_block` belong to, in this order; the last three are left out where there is no
#: perceptron. A bias that is not there is None.
LAYERS = ("norm", "q", "k", "v", "out", "perceptron's norm", "first", "second")

# Similarities are at least 1/2 - 1/pi = 0.18, so that no row sum lies below this.
_LEAST_ROW_SUM = 0.1


def ray_block_twin(
    x: Tensor,  # [R, S, C]
    weights: list[Tensor],  # of LAYERS
    biases: list[Tensor | None],  # of LAYERS
    conv: Tensor | None,  # [heads, kernel], an odd kernel; None: no convolution
    num_heads: int,
    attention: str,  # one of ATTENTIONS
    eps: float,
    return_weights: bool,
) -> tuple[Tensor, Tensor]:
    """What `ray_block` computes, in plain torch.

    Returns:
        [R, S, C], and how the first sample of each ray attends, the mean over the heads, [R, S] (empty unless
        `return_weights`).
    """
    weights = [weight.to(x.dtype) for weight in weights]
    biases = [bias if bias is None else bias.to(x.dtype) for bias in biases]
    normed = F.layer_norm(x, x.shape[-1:], weights[0], biases[0], eps)
    q, k, v = (
        F.linear(normed, weights[i], biases[i]).unflatten(-1, (num_heads, -1)).transpose(1, 2) for i in (1, 2, 3)
    )  # [R, heads, S, d]
    width = q.shape[-1]
    first = x.new_empty(0)
    if attention == "softmax":
        attended = F.scaled_dot_product_attention(q, k, v)
        if return_weights:
            first = torch.softmax(torch.einsum("rhc,rhsc->rhs", q[:, :, 0], k) / math.sqrt(width), dim=-1).mean(dim=1)
    else:
        low = -1.0 if attention == "pm1" else 0.0
        q, k = (torch.where(code >= 0, 1.0, low).to(x.dtype) for code in (q, k))
        scale = 1.0 / (math.pi * width)
        numerator = (q @ (k.transpose(-2, -1) @ v)) * scale + 0.5 * v.sum(-2, keepdim=True)
        row_sum = (q @ k.sum(-2).unsqueeze(-1)) * scale + 0.5 * k.shape[-2]
        attended = numerator / row_sum.clamp(min=_LEAST_ROW_SUM)
        if return_weights:
            first = (k @ q[..., 0, :].unsqueeze(-1)).squeeze(-1) * scale + 0.5
            first = (first / first.sum(-1, keepdim=True).clamp(min=_LEAST_ROW_SUM)).mean(dim=1)
    if conv is not None:
        kernel = conv.to(x.dtype)[:, None, :, None]
        attended = attended + F.conv2d(v, kernel, padding=(conv.shape[1] // 2, 0), groups=num_heads)
    x = x + F.linear(attended.transpose(1, 2).flatten(-2), weights[4], biases[4])
    if len(weights) > 5:
        normed = F.layer_norm(x, x.shape[-1:], weights[5], biases[5], eps)
        x = x + F.linear(F.relu(F.linear(normed, weights[6], biases[6])), weights[7], biases[7])
    return x, first


def random_block(
    seed: int, *, rays: int, samples: int, width: int, heads: int, hidden: int, kernel: int
) -> tuple[Tensor, list[Tensor], list[Tensor | None], Tensor | None, int]:
    """The tensors of `ray_block` and its number of heads, for a trial."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def linear(outputs: int, inputs: int) -> Tensor:
        return draw(outputs, inputs) / inputs**0.5

    weights: list[Tensor] = [1.0 + 0.1 * draw(width), *(linear(width, width) for _ in range(4))]
    biases: list[Tensor | None] = [draw(width), None, None, None, draw(width)]
    if hidden:
        weights += [1.0 + 0.1 * draw(width), linear(hidden, width), linear(width, hidden)]
        biases += [draw(width), draw(hidden), draw(width)]
    return draw(rays, samples, width), weights, biases, draw(heads, kernel) if kernel else None, heads


def samples_of_certain_codes(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], eps: float) -> Tensor:
    """The samples, [R, S] bool, whose outcome no rounding can change much, for attentions over signs.

    A query or key that is all but zero gets whichever sign rounding leaves it. A query decides its sample's outcome, a
    key that of all samples of its ray.

    Sums of n float32 products are off by less than ``5 sqrt(n) u`` times the sum of their sizes, but for one in 100,000
    (Higham and Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41, 2019); n
    counts the norm's sums as well.
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


def check(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    conv: Tensor | None,
    num_heads: int,
    attention: str,
) -> None:
    if attention not in ATTENTIONS:
        raise UserError(f"attention must be one of {', '.join(ATTENTIONS)}, not {attention!r}")
    if x.dim() != 3:
        raise UserError(f"x must be [rays, samples, channels], not {list(x.shape)}")
    width = x.shape[-1]
    if num_heads < 1 or width % num_heads:
        raise UserError(f"{num_heads} heads do not share {width} channels evenly")
    if len(weights) not in (5, len(LAYERS)) or len(biases) != len(weights):
        raise UserError(f"ray_block takes weights and biases of {', '.join(LAYERS)}, the last three or none of them")
    square, norm = (width, width), (width,)
    hidden = weights[6].shape[0] if len(weights) > 5 else 0
    sizes = (norm, square, square, square, square, norm, (hidden, width), (width, hidden))
    for name, weight, bias, size in zip(LAYERS, weights, biases, sizes, strict=False):
        if weight.shape != size:
            raise UserError(f"the weight of {name} must be {list(size)}, not {list(weight.shape)}")
        if bias is not None and bias.shape != size[:1]:
            raise UserError(f"the bias of {name} must be [{size[0]}], not {list(bias.shape)}")
    if conv is not None and (conv.dim() != 2 or conv.shape[0] != num_heads or conv.shape[1] % 2 == 0):
        raise UserError(f"conv must be [{num_heads}, an odd number], not {list(conv.shape)}")
