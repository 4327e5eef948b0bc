"""Pixels that count, as the look-up reads them."""

from __future__ import annotations

import torch
from torch import Tensor


def as_bytes(valid: Tensor | None, device: torch.device | None = None) -> Tensor:
    """The valid pixels as the functions take them; none, on `device`, where all are."""
    return (
        torch.empty(0, dtype=torch.uint8, device=device)
        if valid is None
        else valid.contiguous().view(-1).view(torch.uint8)
    )
