"""Sizes that go by a name, and which layers of a GNT a recipe may change."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from shiftadd3d.models.gnt.model import GNTConfig
from shiftadd3d.nn import Recipe

#: Everything a laptop CPU can learn in minutes: a small feature network, and a plane sweep that leaves the transformers
#: only a few samples to look at.
TINY = GNTConfig(
    depth=2,
    width=32,
    dropout=0.0,
    feature_widths=(32, 48, 64),
    feature_blocks=(1, 1, 1),
    color_head=True,
    proposal_samples=48,
    canonical=True,
    angle_spread=0.03,
)
#: The released network's sizes, with a colour head and a plane sweep in front. For the same minutes 16 samples behind a
#: sweep reach what 64 alone do, at half the time a step (docs/results/nerf.md, "Samples of a ray").
BASE = GNTConfig(depth=4, color_head=True, canonical=True, proposal_samples=48, angle_spread=0.03)
#: The paper's network: eight blocks, colours regressed.
BIG = GNTConfig(depth=8)

#: What the `shiftadd-` methods turn a GNT into.
SHIFTADD_RECIPE = "add+shift-attn+moe"

#: The feature network's convolutions; and layers with one or three outputs: next to no multiplications, and what they
#: put out is a colour or a logit itself. A network may be without some of them.
KEPT_IN_FLOAT = ("feature_net.*", "*.rgb_fc", "*_logit_fc", "proposal.score.2")


def may_change(_module: nn.Module, name: str) -> bool:
    """Whether a recipe may change a layer of a GNT: all but `KEPT_IN_FLOAT`."""
    return not any(fnmatchcase(name, pattern) for pattern in KEPT_IN_FLOAT)


def gnt_recipe(name: str, **changes: Any) -> Recipe:
    """The recipe `name` for GNTs, with a convolution on the values along the ray.

    The networks that embed features and positions are as wide as the attention layers, and follow the same rule.

    Raises:
        UserError: as `Recipe.parse`.
    """
    chosen = Recipe.parse(name, **{"dwconv": 3, **changes})
    return chosen if chosen.attention_linear == "mult" else replace(chosen, other_linear="shift")
