"""The routing of each mixture of experts: which patches of a picture, or samples of a ray, went to which expert.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 5 and its figure of token dispatch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from shiftadd3d.nn.moe import FrozenMoE, MoE


class RoutingMap(NamedTuple):
    """The expert of each patch of a picture in one layer: [rows, columns], the numbers of `experts`."""

    layer: str
    experts: tuple[str, ...]
    assignment: np.ndarray

    def share(self, expert: int) -> float:
        """Share of the patches that `expert` took."""
        return float((self.assignment == expert).mean())


def routing_maps(model: nn.Module) -> tuple[RoutingMap, ...]:
    """Routing maps of the first picture in the last forward pass: one for each mixture whose tokens are the patches of
    a square.

    Class tokens come first and are left out.
    """
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    maps = []
    for name, module in model.named_modules():
        if isinstance(module, (MoE, FrozenMoE)) and module.last_assignment is not None:
            grid = _as_square(module.last_assignment[0].cpu(), prefix)
            if grid is not None:
                maps.append(RoutingMap(name, module.expert_names, grid.numpy()))
    return tuple(maps)


def ray_shares(model: nn.Module, rays: int) -> dict[str, Tensor]:
    """The share of each ray's tokens that a mixture sent to its first expert, in the last forward pass.

    Args:
        model: a model whose mixtures see tokens [rays, ...]: samples, or source views at samples.
        rays: R. Mixtures with another number of rays are left out.

    Returns:
        By qualified name, [R] float32 from 0 to 1.
    """
    return {
        name: (module.last_assignment == 0).flatten(1).float().mean(1)
        for name, module in model.named_modules()
        if isinstance(module, (MoE, FrozenMoE)) and module.last_assignment is not None
        if module.last_assignment.dim() > 1 and len(module.last_assignment) == rays
    }


def keep_routing(model: nn.Module, *, keep: bool = True) -> None:
    """Switch on or off whether frozen mixtures record where they send tokens. Other mixtures always record it."""
    for module in model.modules():
        if isinstance(module, FrozenMoE):
            module.keep_assignment = keep
            module.last_assignment = module.last_assignment if keep else None


def _as_square(tokens: Tensor, prefix: int) -> Tensor | None:
    if tokens.dim() == 2:  # rows and columns already
        return tokens
    for skip in (prefix, 0):
        side = round((len(tokens) - skip) ** 0.5)
        if side > 0 and side * side == len(tokens) - skip:
            return tokens[skip:].reshape(side, side)
    return None
