"""MatAdd: products with binary codes, as additions only, and the linear-angular attention made of them.

Codes are the signs of features, or come packed, a bit each.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4.2.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from shiftadd3d.kernels.reference import linear_angular

Codes = Literal["pm1", "01"]

LOW: dict[str, float] = {"pm1": -1.0, "01": 0.0}
"""The number that a cleared bit stands for; a set one stands for 1."""


def pack_signs(x: Tensor) -> Tensor:
    """The signs of [*, D] features, a bit each: [*, ceil(D / 8)] uint8, bit i of byte j set where x[8 j + i] >= 0."""
    bits = torch.nn.functional.pad((x >= 0).to(torch.uint8), (0, -x.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=x.device)).sum(-1, dtype=torch.uint8)


def features_of(x: Tensor, features: int | None) -> int:
    """How many features' signs x holds, where it is said or not."""
    return (8 * x.shape[-1] if x.dtype == torch.uint8 else x.shape[-1]) if features is None else features


def decode_signs(x: Tensor, codes: str, features: int, dtype: torch.dtype) -> Tensor:
    """Codes [*, features] as numbers, of features or of what `pack_signs` makes of them."""
    if x.dtype == torch.uint8:
        number = torch.arange(8, dtype=torch.uint8, device=x.device)
        bits = ((x.unsqueeze(-1) >> number) & 1).flatten(-2)[..., :features].bool()
    else:
        bits = x >= 0
    return torch.where(bits, 1.0, LOW[codes]).to(dtype)


def matadd_kv_twin(
    k: Tensor,  # [*, M, D], or [*, M, ceil(D / 8)] uint8
    v: Tensor,  # [*, M, E]
    mask: Tensor | None = None,  # [*, M] bool
    codes: str = "pm1",
    features: int | None = None,
) -> Tensor:  # [*, D, E]
    """What `matadd_kv` computes, in plain torch."""
    if mask is not None:
        v = torch.where(mask.unsqueeze(-1), v, 0)
    return decode_signs(k, codes, features_of(k, features), v.dtype).transpose(-2, -1) @ v


def matadd_q_twin(
    q: Tensor,  # [*, N, D], or [*, N, ceil(D / 8)] uint8
    kv: Tensor,  # [*, D, E]
    codes: str = "pm1",
) -> Tensor:  # [*, N, E]
    """What `matadd_q` computes, in plain torch."""
    return decode_signs(q, codes, kv.shape[-2], kv.dtype) @ kv


def matadd_twin(
    q: Tensor,  # [*, N, D], or [*, N, ceil(D / 8)] uint8
    k: Tensor,  # [*, M, D], or [*, M, ceil(D / 8)] uint8
    v: Tensor,  # [*, M, E]
    mask: Tensor | None = None,  # [*, M] bool
    codes: str = "pm1",
    features: int | None = None,
) -> Tensor:  # [*, N, E]
    """What `matadd` computes, in plain torch."""
    return matadd_q_twin(q, matadd_kv_twin(k, v, mask, codes, features), codes)


def add_attention_twin(
    q: Tensor,  # [*, N, D], or [*, N, ceil(D / 8)] uint8
    k: Tensor,  # [*, M, D], or [*, M, ceil(D / 8)] uint8
    v: Tensor,  # [*, M, E]
    mask: Tensor | None = None,  # [*, M] bool
    codes: str = "pm1",
    features: int | None = None,
    contrast: Tensor | None = None,  # [H]
) -> Tensor:  # [*, N, E]
    """What `add_attention` computes, in plain torch."""
    present = None if mask is None else mask.unsqueeze(-1)
    q, k = (decode_signs(x, codes, features_of(x, features), v.dtype) for x in (q, k))
    out = linear_angular.attend(q, k, v, present)
    if contrast is None:
        return out
    flat = linear_angular.attend(torch.zeros_like(q[..., :1, :]), torch.zeros_like(k), v, present)
    return torch.lerp(flat, out, contrast.to(out.dtype)[:, None, None])
