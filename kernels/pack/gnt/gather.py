"""Points and views, as the look-up reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd3d.kernels.reference.gnt.gather import Scene


def stored(scene: Scene) -> list[Tensor]:
    """The tensors of a scene without gaps: points one by one, and valid pixels as bytes, none where all are."""
    points, *views, valid = scene
    if valid is None:
        pixels = torch.empty(0, dtype=torch.uint8, device=points.device)
    else:
        pixels = valid.contiguous().view(-1).view(torch.uint8)
    return [points.reshape(-1, 3).contiguous(), *(tensor.contiguous() for tensor in views), pixels]
