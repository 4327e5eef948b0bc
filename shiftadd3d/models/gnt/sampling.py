"""Where along a ray the network looks: stratified, inverse-depth and importance sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd3d._errors import UserError


def _check_count(num_samples: int) -> None:
    if num_samples < 2:
        raise UserError(f"num_samples is {num_samples}: at least 2 samples a ray are needed")


def sample_depths(
    near: Tensor, far: Tensor, num_samples: int, *, inverse_depth: bool = False, stratified: bool = False
) -> Tensor:
    """Depths from near to far, evenly spaced in depth or in inverse depth.

    Args:
        near, far: [R], depths along the ray, 0 < near < far.
        num_samples: S, at least 2.
        inverse_depth: space the samples evenly in 1 / depth (more of them close by).
        stratified: draw each depth uniformly from its stratum (training) instead of taking the grid.

    Returns:
        [R, S], increasing.

    Raises:
        UserError: near or far out of order, not positive or not finite, or fewer than two samples.
    """
    _check_count(num_samples)
    if not bool(torch.all((near > 0) & (far > near) & torch.isfinite(far))):
        raise UserError(
            f"near = {float(near.min()):g} and far = {float(far.max()):g} do not bound a ray: 0 < near < far is needed"
        )
    t = torch.linspace(0.0, 1.0, num_samples, device=near.device, dtype=near.dtype)
    if inverse_depth:
        depths = 1.0 / torch.lerp(1.0 / near[:, None], 1.0 / far[:, None], t)
    else:
        depths = torch.lerp(near[:, None], far[:, None], t)
    if stratified:
        middles = 0.5 * (depths[:, 1:] + depths[:, :-1])
        lower = torch.cat([depths[:, :1], middles], dim=-1)
        upper = torch.cat([middles, depths[:, -1:]], dim=-1)
        depths = lower + (upper - lower) * torch.rand_like(depths)
    return depths


def sample_pdf(edges: Tensor, weights: Tensor, num_samples: int, *, stratified: bool = False) -> Tensor:
    """Draw from a piecewise constant density by inverting its cumulative sum (NeRF, Mildenhall et al. 2020, sec. 5.2).

    Args:
        edges: [R, M + 1], edges of the bins, increasing.
        weights: [R, M], mass of each bin, not negative; need not sum to one.
        num_samples: N.
        stratified: draw the quantiles at random (training) instead of evenly from 0 to 1.

    Returns:
        [R, N].
    """
    weights = weights + 1e-5  # a ray without any weight is sampled evenly
    cdf = torch.cumsum(weights / weights.sum(dim=-1, keepdim=True), dim=-1)
    cdf = torch.cat([torch.zeros_like(cdf[:, :1]), cdf], dim=-1)  # [R, M + 1]
    if stratified:
        u = torch.rand(cdf.shape[0], num_samples, device=cdf.device, dtype=cdf.dtype)
    else:
        u = torch.linspace(0.0, 1.0, num_samples, device=cdf.device, dtype=cdf.dtype).expand(cdf.shape[0], -1)
    # The last edge is left out of the search: rounding may put it below u = 1, and u = 1 belongs to the last bin.
    above = torch.searchsorted(cdf[:, :-1].contiguous(), u.contiguous(), right=True)
    below = (above - 1).clamp(min=0)
    cdf_below, cdf_above = cdf.gather(-1, below), cdf.gather(-1, above)
    edge_below, edge_above = edges.gather(-1, below), edges.gather(-1, above)
    width = cdf_above - cdf_below
    width = torch.where(width < 1e-5, torch.ones_like(width), width)
    return edge_below + (u - cdf_below) / width * (edge_above - edge_below)


def sample_importance(
    depths: Tensor, weights: Tensor, num_importance: int, *, inverse_depth: bool = False, stratified: bool = False
) -> Tensor:
    """More samples where the coarse pass put its weight, merged with the coarse ones.

    Args:
        depths: [R, S], increasing, S at least 4.
        weights: [R, S], the coarse pass's; no gradient flows through them.
        num_importance: N further samples a ray.
        inverse_depth: interpolate in 1 / depth, as the coarse samples were spaced.

    Returns:
        [R, S + N], increasing.

    Raises:
        UserError: fewer than 4 coarse samples: the outermost two have no bin of their own.
    """
    if depths.shape[-1] < 4:
        raise UserError(f"importance sampling needs at least 4 coarse samples a ray, not {depths.shape[-1]}")
    weights = weights.detach()[:, 1:-1]
    if inverse_depth:
        inverse = 1.0 / depths
        middles = 0.5 * (inverse[:, 1:] + inverse[:, :-1])
        new = 1.0 / sample_pdf(middles.flip(-1), weights.flip(-1), num_importance, stratified=stratified)
    else:
        middles = 0.5 * (depths[:, 1:] + depths[:, :-1])
        new = sample_pdf(middles, weights, num_importance, stratified=stratified)
    return torch.sort(torch.cat([depths, new], dim=-1), dim=-1).values


def sample_around(planes: Tensor, weights: Tensor, num_samples: int, *, stratified: bool = False) -> Tensor:
    """A few samples where a plane sweep sees surfaces, and a few everywhere.

    Args:
        planes: [R, P], depths that were looked at, increasing.
        weights: [R, P], what was seen there; no gradient flows through them.
        num_samples: S, at least 2.

    Returns:
        [R, S], increasing.

    Raises:
        UserError: fewer than two samples.
    """
    _check_count(num_samples)
    middles = 0.5 * (planes[:, 1:] + planes[:, :-1])
    edges = torch.cat([planes[:, :1], middles, planes[:, -1:]], dim=-1)
    # A tenth of the mass stays even: the sweep can be wrong, and the transformers must be able to say so.
    weights = 0.9 * weights.detach() + 0.1 / planes.shape[1]
    return torch.sort(sample_pdf(edges, weights, num_samples, stratified=stratified), dim=-1).values
