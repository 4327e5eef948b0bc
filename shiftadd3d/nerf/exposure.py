"""Photos with different exposures or white balances: how bright each view shows the same surfaces.

A network that blends source views assumes photos with one exposure. Phones and cameras on automatic change it from
photo to photo. Blending such photos makes blotches, and a plane sweep finds no depth at which they agree.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

#: Rows and columns of the surface points that views are compared at.
GRID = (30, 40)
#: Colours below count as this: their logarithms are noise.
_DARKEST = 0.02
#: The largest factor, as a logarithm: more is taken for a mistake.
_LARGEST = 0.5
#: Points that two views or more have to show, for a view to be changed.
_FEWEST = 50
_ROUNDS = 8


def exposure_gains(
    colors: Float[Tensor, "points views 3"], mask: Bool[Tensor, "points views"]
) -> Float[Tensor, "views 3"]:
    """How much brighter each view shows points than the mean of the views: natural logarithms, for each channel.

    It is the median over points. So points that some views do not see, or see as highlights, do not count.

    Args:
        colors: colours of the points in each view, 0..1.
        mask: whether the view can see the point.
    """
    logs = colors.clamp(min=_DARKEST).log()
    share = mask.to(logs).unsqueeze(-1)
    compared = mask & (mask.sum(dim=1, keepdim=True) >= 2)
    gains = logs.new_zeros(logs.shape[1:])
    told = (compared.sum(dim=0) >= _FEWEST).unsqueeze(-1)
    for _ in range(_ROUNDS):
        rest = logs - gains
        apart = rest - (rest * share).sum(dim=1, keepdim=True) / share.sum(dim=1, keepdim=True).clamp(min=1.0)
        middle = apart.masked_fill(~compared.unsqueeze(-1), math.nan).nanmedian(dim=0).values
        gains = gains + torch.where(told, middle, 0.0)
        gains = gains - gains.mean(dim=0)
    return gains.clamp(-_LARGEST, _LARGEST)
