"""Samples of a ray drawn from a density by inverting its cumulative sum (NeRF, Mildenhall et al. 2020, sec. 5.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: This is added to each bin's weight, so that a ray without any weight is sampled evenly.
LEAST_WEIGHT = 1e-5
#: A bin with less mass counts as mass 1, so that nothing is divided by almost zero.
LEAST_MASS = 1e-5
#: The mass that stays even around planes: a sweep can be wrong, and the transformers must be able to say so.
EVEN_SHARE = 0.1


def invert(
    edges: Tensor,  # [R, M + 1] of bins, increasing
    weights: Tensor,  # [R, M], not negative; need not sum to one
    quantiles: Tensor,  # [R, N], 0 to 1
) -> Tensor:  # [R, N]
    """The quantiles of a piecewise constant density."""
    weights = weights + LEAST_WEIGHT
    cdf = torch.cumsum(weights / weights.sum(dim=-1, keepdim=True), dim=-1)
    cdf = torch.cat([torch.zeros_like(cdf[:, :1]), cdf], dim=-1)  # [R, M + 1]
    # The last edge is left out of the search: rounding may put it below u = 1, and u = 1 belongs to the last bin.
    above = torch.searchsorted(cdf[:, :-1].contiguous(), quantiles.contiguous(), right=True)
    below = (above - 1).clamp(min=0)
    cdf_below, cdf_above = cdf.gather(-1, below), cdf.gather(-1, above)
    edge_below, edge_above = edges.gather(-1, below), edges.gather(-1, above)
    mass = cdf_above - cdf_below
    mass = torch.where(mass < LEAST_MASS, torch.ones_like(mass), mass)
    return edge_below + (quantiles - cdf_below) / mass * (edge_above - edge_below)


def samples_around(
    planes: Tensor,  # [R, P], increasing
    weights: Tensor,  # [R, P]
    quantiles: Tensor,  # [R, S]
) -> Tensor:  # [R, S], increasing
    """Depths from the weights of planes. The bin of each plane reaches halfway to its neighbours."""
    middles = 0.5 * (planes[:, 1:] + planes[:, :-1])
    edges = torch.cat([planes[:, :1], middles, planes[:, -1:]], dim=-1)
    weights = (1.0 - EVEN_SHARE) * weights + EVEN_SHARE / planes.shape[1]
    return torch.sort(invert(edges, weights, quantiles), dim=-1).values


def chessboard(rays: int, columns: int) -> Tensor:  # [R] bool
    """The rays of a picture with this many columns, row by row, that lie on one colour of a chessboard, beginning with
    the first.
    """
    number = torch.arange(rays)
    return (number // columns + number % columns) % 2 == 0


def between_fields(
    values: Tensor,  # [R / 2 rounded up, P], of the fields of a chessboard
    rays: int,
    columns: int,
) -> Tensor:  # [R, P]
    """Values of all rays of a picture. Rays between those of the chessboard get the mean of their neighbours."""
    on = chessboard(rays, columns).to(values.device)
    spread = values.new_zeros(rays, values.shape[1] + 1)
    spread[on] = F.pad(values, (0, 1), value=1.0)  # the last number counts the neighbours
    grid = F.pad(spread.view(-1, columns, spread.shape[1]), (0, 0, 1, 1, 1, 1))
    around = grid[:-2, 1:-1] + grid[2:, 1:-1] + grid[1:-1, :-2] + grid[1:-1, 2:]
    mean = around[..., :-1] / around[..., -1:].clamp(min=1.0)
    return torch.where(on[:, None], spread[:, :-1], mean.view(rays, -1))
