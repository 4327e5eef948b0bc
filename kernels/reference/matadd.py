"""MatAdd: products with binary codes, as additions only, and the linear-angular attention made of them.

Codes are the signs of features, or come packed, a bit each.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.reference import linear_angular

# The number that a cleared bit stands for; a set one stands for 1.
LOW = {"pm1": -1.0, "01": 0.0}


def pack_signs(x: Tensor) -> Tensor:
    """The signs of [*, D] features, a bit each: [*, ceil(D / 8)] uint8, bit i of byte j set where x[8 j + i] >= 0."""
    bits = torch.nn.functional.pad((x >= 0).to(torch.uint8), (0, -x.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=x.device)).sum(-1, dtype=torch.uint8)


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
    features = check_codes(k, v, mask, codes, features)
    if mask is not None:
        v = torch.where(mask.unsqueeze(-1), v, 0)
    return decode_signs(k, codes, features, v.dtype).transpose(-2, -1) @ v


def matadd_q_twin(
    q: Tensor,  # [*, N, D], or [*, N, ceil(D / 8)] uint8
    kv: Tensor,  # [*, D, E]
    codes: str = "pm1",
) -> Tensor:  # [*, N, E]
    """What `matadd_q` computes, in plain torch."""
    check_codes(q, kv, None, codes, kv.shape[-2], rows=False)
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
    features = check_codes(k, v, mask, codes, features)
    check_contrast(contrast, v)
    check_codes(q, v, None, codes, features, rows=False)
    present = None if mask is None else mask.unsqueeze(-1)
    q, k = (decode_signs(x, codes, features, v.dtype) for x in (q, k))
    out = linear_angular.attend(q, k, v, present)
    if contrast is None:
        return out
    flat = linear_angular.attend(torch.zeros_like(q[..., :1, :]), torch.zeros_like(k), v, present)
    return torch.lerp(flat, out, contrast.to(out.dtype)[:, None, None])


def check_codes(
    x: Tensor, values: Tensor, mask: Tensor | None, codes: str, features: int | None, *, rows: bool = True
) -> int:
    """The number of features whose signs x holds.

    Raises:
        UserError: for arguments that do not go together.
    """
    if codes not in LOW:
        raise UserError(f"codes must be one of {', '.join(LOW)}, not {codes!r}")
    if x.dim() < 2 or x.shape[:-2] != values.shape[:-2]:
        raise UserError(
            f"queries, keys and values must have the same dimensions before the last two, not {list(x.shape)} and "
            f"{list(values.shape)}"
        )
    if rows and x.shape[-2] != values.shape[-2]:
        raise UserError(f"every key needs a value: there are {x.shape[-2]} keys and {values.shape[-2]} values")
    packed = x.dtype == torch.uint8
    if not (packed or x.is_floating_point()):
        raise UserError(f"codes are the signs of floating-point features, or packed in uint8, not {x.dtype}")
    width = 8 * x.shape[-1] if packed else x.shape[-1]
    features = width if features is None else features
    if not (width - 8 < features <= width if packed else features == width):
        raise UserError(f"{'packed signs' if packed else 'features'} {list(x.shape)} are not {features} a token")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise UserError(f"the mask must be bool (True where a key counts), not {mask.dtype}")
        if mask.dim() != x.dim() - 1 or any(m not in (1, n) for m, n in zip(mask.shape, x.shape, strict=False)):
            raise UserError(f"the mask must be {list(x.shape[:-1])}, or 1 where it repeats, not {list(mask.shape)}")
    return features


def check_contrast(contrast: Tensor | None, v: Tensor) -> None:
    if contrast is not None and (v.dim() < 3 or contrast.shape != v.shape[-3:-2]):
        raise UserError(
            f"contrast must be [H], one for each head of values [*, H, M, E], not {list(contrast.shape)} for "
            f"{list(v.shape)}"
        )
