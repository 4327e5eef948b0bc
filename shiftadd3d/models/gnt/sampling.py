"""Depths of samples along a ray: stratified, inverse-depth and importance sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.reference.gnt import sampling as reference_sampling


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
    return reference_sampling.invert(edges, weights, _quantiles(edges, num_samples, stratified=stratified))


def _quantiles(like: Tensor, num_samples: int, *, stratified: bool) -> Tensor:
    """[R, N], evenly from 0 to 1, or at random."""
    if stratified:
        return torch.rand(like.shape[0], num_samples, device=like.device, dtype=like.dtype)
    return torch.linspace(0.0, 1.0, num_samples, device=like.device, dtype=like.dtype).expand(like.shape[0], -1)


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


def sample_around(
    planes: Tensor, weights: Tensor, num_samples: int, *, stratified: bool = False, board: tuple[int, int] | None = None
) -> Tensor:
    """Samples near the surfaces that a plane sweep sees, and a few everywhere else.

    Args:
        planes: [R, P], depths of the sweep, increasing.
        weights: [R, P], weights from the sweep; no gradient flows through them.
        num_samples: S, at least 2.
        board: number of rays of a picture, and its columns, if the sweep only looked along the rays on one colour of a
            chessboard. R is then half of all rays, rounded up. The rays between get the mean of their neighbours.

    Returns:
        [R, S], increasing, for all rays of the picture.

    Raises:
        UserError: fewer than two samples.
    """
    _check_count(num_samples)
    weights = weights.detach()
    if board is not None:
        planes, weights = (reference_sampling.between_fields(x, *board) for x in (planes, weights))
    quantiles = _quantiles(planes, num_samples, stratified=stratified)
    return reference_sampling.samples_around(planes, weights, quantiles)
