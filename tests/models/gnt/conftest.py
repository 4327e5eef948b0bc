"""A model small enough to build and run in milliseconds, and cameras around the origin."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from shiftadd3d.models.gnt import Cameras, GNTConfig, GNTModel, SourceViews

WIDTH, HEIGHT, FOCAL = 40, 36, 40.0


def small_config(**changes: object) -> GNTConfig:
    """Two blocks of 16 channels."""
    sizes = {"depth": 2, "width": 16, "feature_dim": 8, "feature_widths": (8, 12, 16), "feature_blocks": (1, 1, 1)}
    return GNTConfig(**{**sizes, "dropout": 0.0, **changes})  # type: ignore[arg-type]


def orbit_cameras(count: int, radius: float = 4.0) -> Cameras:
    """OpenCV cameras a few degrees apart on a circle in the x-z plane; all look at the origin."""
    poses = torch.eye(4).repeat(count, 1, 1)
    for pose, angle in zip(poses, (torch.arange(count) - (count - 1) / 2) * 0.1, strict=True):
        forward = torch.stack([-torch.sin(angle), torch.zeros(()), torch.cos(angle)])
        down = torch.tensor([0.0, 1.0, 0.0])
        pose[:3, :3] = torch.stack([torch.linalg.cross(down, forward), down, forward], dim=1)
        pose[:3, 3] = -radius * forward
    intrinsics = torch.tensor([[FOCAL, 0.0, (WIDTH - 1) / 2], [0.0, FOCAL, (HEIGHT - 1) / 2], [0.0, 0.0, 1.0]])
    return Cameras(intrinsics.repeat(count, 1, 1), poses)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def config() -> Callable[..., GNTConfig]:
    """`small_config`."""
    return small_config


@pytest.fixture
def cameras() -> Callable[..., Cameras]:
    """`orbit_cameras`."""
    return orbit_cameras


@pytest.fixture
def views() -> Callable[..., SourceViews]:
    """Encoded source views of noise, or of `images`: `views(model, count)`."""

    def make(model: GNTModel, count: int = 4, images: torch.Tensor | None = None) -> SourceViews:
        if images is None:
            images = torch.rand(count, HEIGHT, WIDTH, 3)
        return model.encode(images, orbit_cameras(len(images)))

    return make
