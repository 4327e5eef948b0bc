"""MatAdd: products with binary codes, as additions only, and the linear-angular attention made of them.

Codes are the signs of features, or come packed, a bit each.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4.2.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shiftadd3d.kernels.reference import linear_angular
from shiftadd3d.kernels.reference.arguments import takes

Codes = Literal["pm1", "01"]

LOW: dict[Codes, float] = {"pm1": -1.0, "01": 0.0}
"""The number for a cleared bit. A set bit stands for 1."""


class MatAddKV(NamedTuple):
    """``K^T V`` with K the codes of features k.

    Attributes:
        k: features in any floating dtype, of which the signs count (either zero is positive, NaN negative), or the
            outcome of `pack_signs`.
        v: values. Compiled code serves float32 and bfloat16; the twin, everything else.
        mask: True where a key counts; dimensions may be 1 to repeat. The values of other keys are not even read.
        codes: what the signs stand for, "pm1" for +1 and -1, "01" for 1 and 0.
        features: D, where k is packed and D is not a multiple of 8.
    """

    k: Tensor  # [*, M, D], or [*, M, ceil(D / 8)] uint8
    v: Tensor  # [*, M, E]
    mask: Tensor | None = None  # [*, M] bool
    codes: Codes = "pm1"
    features: int | None = None


class MatAddQ(NamedTuple):
    """``Q S`` with Q the codes of features q and S = kv; the rest as in `MatAddKV`."""

    q: Tensor  # [*, N, D], or [*, N, ceil(D / 8)] uint8
    kv: Tensor  # [*, D, E]
    codes: Codes = "pm1"


class AddAttention(NamedTuple):
    """Linear-angular attention of binary codes, in linear order. Other fields are those of `MatAddKV`.

    ``out_i = sum_j s_ij v_j / sum_j s_ij`` with ``s_ij = 1/2 + q_i . k_j / (pi D)``, where q and k are codes. A query
    without any key gives zeros.

    q, k and v [B, H, tokens, width] may have any strides and are not copied. If the heads of q are side by side in
    memory, as a projection leaves them, so are those of the outcome.

    Attributes:
        contrast: a factor for each head (the dimension before the last two), which multiplies the difference of an
            outcome from the mean of the values. It costs next to nothing, because ``K^T V`` takes it up by an outer
            product.
        attention: False for the two products only, ``Q (K^T V)``, without contrast.
    """

    q: Tensor  # [*, N, D], or [*, N, ceil(D / 8)] uint8
    k: Tensor  # [*, M, D], or [*, M, ceil(D / 8)] uint8
    v: Tensor  # [*, M, E]
    mask: Tensor | None = None  # [*, M] bool
    codes: Codes = "pm1"
    features: int | None = None
    contrast: Tensor | None = None  # [H]
    attention: bool = True


def pack_signs(x: Tensor) -> Tensor:
    """The signs of [*, D] features, a bit each: [*, ceil(D / 8)] uint8, bit i of byte j set where x[8 j + i] >= 0."""
    bits = torch.nn.functional.pad((x >= 0).to(torch.uint8), (0, -x.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=x.device)).sum(-1, dtype=torch.uint8)


def features_of(x: Tensor, features: int | None) -> int:
    """The number of features whose signs x holds."""
    return (8 * x.shape[-1] if x.dtype == torch.uint8 else x.shape[-1]) if features is None else features


def decode_signs(x: Tensor, codes: Codes, features: int, dtype: torch.dtype) -> Tensor:
    """Codes [*, features] as numbers, from features or from the outcome of `pack_signs`."""
    if x.dtype == torch.uint8:
        number = torch.arange(8, dtype=torch.uint8, device=x.device)
        bits = ((x.unsqueeze(-1) >> number) & 1).flatten(-2)[..., :features].bool()
    else:
        bits = x >= 0
    return torch.where(bits, 1.0, LOW[codes]).to(dtype)


@takes(MatAddKV)
def matadd_kv_twin(given: MatAddKV) -> Tensor:
    """What `matadd_kv` computes, in plain torch: [*, D, E]."""
    k, v, mask, codes, features = given
    if mask is not None:
        v = torch.where(mask.unsqueeze(-1), v, 0)
    return decode_signs(k, codes, features_of(k, features), v.dtype).transpose(-2, -1) @ v


@takes(MatAddQ)
def matadd_q_twin(given: MatAddQ) -> Tensor:
    """What `matadd_q` computes, in plain torch: [*, N, E]."""
    q, kv, codes = given
    return decode_signs(q, codes, kv.shape[-2], kv.dtype) @ kv


@takes(AddAttention)
def add_attention_twin(given: AddAttention) -> Tensor:
    """`add_attention` in plain torch; without `attention`, `matadd`."""
    q, k, v, mask, codes, features, contrast, attention = given
    if not attention:
        return matadd_q_twin(q, matadd_kv_twin(k, v, mask, codes, features), codes)
    present = None if mask is None else mask.unsqueeze(-1)
    q, k = (decode_signs(x, codes, features_of(x, features), v.dtype) for x in (q, k))
    out = linear_angular.attend(q, k, v, present)
    if contrast is None:
        return out
    flat = linear_angular.attend(torch.zeros_like(q[..., :1, :]), torch.zeros_like(k), v, present)
    return torch.lerp(flat, out, contrast.to(out.dtype)[:, None, None])
