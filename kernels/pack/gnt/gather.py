"""Points and views, as the look-up reads them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

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


def pixels_of(images: Tensor, valid: Tensor | None) -> Tensor:
    """Images [V, H, W, 3] with a fourth channel: 1 where a pixel is valid, else 0; without `valid` all are."""
    known = torch.ones_like(images[..., :1]) if valid is None else valid[..., None].to(images.dtype)
    return torch.cat([images, known], dim=-1)


def beside_validity(weight: Tensor, groups: Sequence[int]) -> Tensor:
    """A weight [outputs, inputs] of what views show, with a column of zeros behind each colour.

    Args:
        groups: the inputs that colours begin at.
    """
    ends = [0, *(start + 3 for start in groups), weight.shape[1]]
    zeros = weight.new_zeros(weight.shape[0], 1)
    parts = [part for pair in itertools.pairwise(ends) for part in (weight[:, slice(*pair)], zeros)]
    return torch.cat(parts[:-1], dim=1)
