"""Linear-angular attention of binary codes: no softmax, so that keys and values can be summed up first.

``out_i = sum_j s_ij v_j / sum_j s_ij`` with ``s_ij = 1/2 + q_i . k_j / (pi D)`` for codes of length D, the angular
kernel ``1 - angle(q, k) / pi`` to first order.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4.2; You et al., Castling-ViT (CVPR 2023).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Similarities are at least 1/2 - 1/pi = 0.18, so a row sum below this has no key at all. With a bias added to them
# there is no such bound.
LEAST_ROW_SUM = 0.1
_LEAST_BIASED_ROW_SUM = 1e-6


def attend(
    q: Tensor,  # [*, N, D] codes
    k: Tensor,  # [*, M, D] codes
    v: Tensor,  # [*, M, E]
    present: Tensor | None = None,  # [*, M, 1] bool, True where a key counts
) -> Tensor:  # [*, N, E]
    """Attention in linear order, ``q (k^T v)``. A query without any key gives zeros."""
    scale = 1 / (math.pi * q.shape[-1])
    if present is None:
        count = k.shape[-2]
    else:
        k, v = torch.where(present, k, 0), torch.where(present, v, 0)
        count = present.expand(*k.shape[:-1], 1).sum(-2, keepdim=True)
    numerator = (q @ (k.transpose(-2, -1) @ v)) * scale + v.sum(-2, keepdim=True) * 0.5
    row_sum = (q @ k.sum(-2).unsqueeze(-1)) * scale + count * 0.5
    return numerator / row_sum.clamp(min=LEAST_ROW_SUM)


def attention_map(
    q: Tensor,  # [*, N, D] codes
    k: Tensor,  # [*, M, D] codes
    mask: Tensor | None = None,  # bool, broadcasts to [*, N, M]
    bias: Tensor | None = None,  # added to the similarities, which stay at least zero; broadcasts to [*, N, M]
) -> Tensor:  # [*, N, M]
    """The attention map, for the quadratic order. Rows sum to one, or to zero for a query without any key."""
    return _normalize((q @ k.transpose(-2, -1)) * (1 / (math.pi * q.shape[-1])) + 0.5, mask, bias)


def first_row(q: Tensor, k: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:  # [*, M]
    """The first row of `attention_map`, computed without the others."""
    similarity = (k @ q[..., 0, :].unsqueeze(-1)).squeeze(-1) / (math.pi * q.shape[-1]) + 0.5
    return _normalize(similarity, None if mask is None else mask[..., 0, :], None if bias is None else bias[..., 0, :])


def _normalize(similarity: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    least = LEAST_ROW_SUM
    if bias is not None:
        similarity = (similarity + bias).relu()
        least = _LEAST_BIASED_ROW_SUM
    if mask is not None:
        similarity = similarity * mask
    return similarity / similarity.sum(-1, keepdim=True).clamp(min=least)
