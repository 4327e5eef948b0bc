"""Models by name, each with an input of the size that it is made for.

Weights are random, because costs do not depend on them. Mixtures are the exception: their untrained routers send some
share of the tokens to each expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shiftadd3d._errors import UserError
from shiftadd3d._extras import need
from shiftadd3d.models.gnt import Cameras, GNTConfig, GNTModel
from shiftadd3d.models.gnt.presets import BASE, BIG, TINY, gnt_recipe, may_change
from shiftadd3d.nn import reparameterize_

GNT_MODELS: dict[str, tuple[GNTConfig, int, int, int]] = {
    "gnt-tiny": (TINY, 512, 8, 6),
    "gnt": (BASE, 1024, 16, 10),
    "gnt-big": (BIG, 512, 192, 10),
}
"""Sizes of the network, and of a training batch: rays, samples on each ray for the transformers, source views."""

# The feature network sees the source pictures once, not for each batch of rays: they are encoded beforehand, so that
# their size does not matter.
_SOURCE_SIZE = 32
_FOCAL = 32.0
_RAYS_OF_A_VIEW = 800


@dataclass(frozen=True)
class Subject:
    """A model with multiplications, and its input."""

    name: str
    make: Callable[[str], nn.Module]
    """Makes the model from the name of a recipe."""
    batch: Callable[[nn.Module], Any]
    """Makes the input for a model."""
    inputs: int
    unit: str
    """The unit of inputs, such as a picture or a ray."""
    setting: str
    recipes: tuple[str, ...] | None = None
    """The recipes that exist of it; None if it can be made in any recipe."""
    weights: str = "random weights"
    """Where the weights come from. Untrained routers send tokens anywhere."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the picture, if inputs are its rays, row by row."""


def picture_setting(size: tuple[int, ...]) -> str:
    """The input of a classifier in words, for pictures [C, H, W]."""
    return f"batch 1, {size[-2]} x {size[-1]} px"


def random_picture(size: tuple[int, ...]) -> Tensor:
    """One picture [1, C, H, W] of noise, the same each time."""
    return torch.randn(1, *size, generator=torch.Generator().manual_seed(0))


def ray_grid(height: int, width: int, rays: int | None = None) -> tuple[int, int]:
    """Rows and columns of about `rays` rays, spread evenly over a picture of this size. The default is 800 rays.

    Raises:
        UserError: fewer than one ray.
    """
    rays = _RAYS_OF_A_VIEW if rays is None else _at_least_one(rays)
    rows = min(height, max(1, round((rays * height / width) ** 0.5)))
    return rows, min(width, max(1, round(rays / rows)))


def subject(name: str, rays: int | None = None) -> Subject:
    """The model with this name: gnt-tiny, gnt or gnt-big, or a model of timm.

    Args:
        name: the name.
        rays: number of rays in a batch of a GNT; None for those of its training.

    Raises:
        UserError: no model has this name, or timm is not installed.
    """
    if name in GNT_MODELS:
        return _gnt(name, rays)
    need(f"{name}, a name of timm's,", "timm", extra="vision")
    from shiftadd3d.models.vit import create_model, input_size

    size = input_size(name, others=tuple(GNT_MODELS))

    def make(recipe: str) -> nn.Module:
        torch.manual_seed(0)
        model = create_model(name)
        reparameterize_(model, recipe, verbose=False)
        return model.eval()

    return Subject(name, make, lambda model: random_picture(size), 1, "picture", picture_setting(size))


def _at_least_one(rays: int) -> int:
    if rays < 1:
        raise UserError(f"--rays {rays}: expected 1 or more")
    return rays


def _gnt(name: str, rays: int | None) -> Subject:
    config, batch_rays, samples, views = GNT_MODELS[name]
    batch_rays = batch_rays if rays is None else _at_least_one(rays)

    def make(recipe: str) -> nn.Module:
        torch.manual_seed(0)
        model = GNTModel(config)
        reparameterize_(model, gnt_recipe(recipe), filter_fn=may_change, verbose=False)
        return model.eval()

    @torch.no_grad()
    def batch(model: nn.Module) -> dict[str, Any]:
        assert isinstance(model, GNTModel)
        generator = torch.Generator().manual_seed(0)
        cameras = _side_by_side(views)
        images = torch.rand(views, _SOURCE_SIZE, _SOURCE_SIZE, 3, generator=generator)
        pixels = torch.rand(batch_rays, 2, generator=generator) * (_SOURCE_SIZE - 1)
        centre = Cameras(cameras.intrinsics[0], cameras.camera_to_world[views // 2])
        origins, directions = centre.rays(pixels)
        return {
            "sources": model.encode(images, cameras),
            "origins": origins,
            "directions": directions,
            "near": 2.0,
            "far": 6.0,
            "num_samples": samples,
        }

    setting = f"{batch_rays} rays, {samples} samples a ray, {views} source views, features of these encoded beforehand"
    return Subject(name, make, batch, batch_rays, "ray", setting)


def _side_by_side(count: int) -> Cameras:
    """Cameras in a row that look the same way."""
    poses = torch.eye(4).repeat(count, 1, 1)
    poses[:, 0, 3] = 0.1 * (torch.arange(count) - (count - 1) / 2)
    middle = (_SOURCE_SIZE - 1) / 2
    intrinsics = torch.tensor([[_FOCAL, 0.0, middle], [0.0, _FOCAL, middle], [0.0, 0.0, 1.0]])
    return Cameras(intrinsics.repeat(count, 1, 1), poses)
