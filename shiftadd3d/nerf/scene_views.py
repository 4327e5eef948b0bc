"""The views of a scene as a dataset of photos, and the range of depths that they show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.utils.rich_utils import CONSOLE

from shiftadd3d.nerf.near_far import scene_near_far
from shiftadd3d.nerf.photos import PhotoDataset, is_cut_out, unlit_border
from shiftadd3d.nerf.source_bank import SourceBank


def scale_to(outputs: DataparserOutputs, max_side: int | None) -> float:
    """What the sides of all views are multiplied by so that none has more pixels than `max_side`; at most 1."""
    longest = int(max(outputs.cameras.width.max(), outputs.cameras.height.max()))
    if max_side is None or max_side >= longest:
        return 1.0
    # A little more, as cameras round float32 products down, and half of these lie just below `max_side`.
    return max_side / longest * (1.0 + 2.0**-22)


def all_photos(outputs: DataparserOutputs, scale: float, cut_out: bool) -> PhotoDataset:
    """A dataset of all views of a scene, which say themselves what a lens leaves black."""
    return photos(outputs, scale, cut_out, unlit_border(outputs.cameras, outputs.image_filenames, scale))


def say_whether_cut_out(paths: Sequence[Path]) -> bool:
    """`is_cut_out`; where photos look as if it were, but for large parts, say what becomes of them."""
    cut_out = is_cut_out(paths)
    if not cut_out:
        CONSOLE.log(
            "[yellow]The photos are partly transparent over large parts: their colours are taken as they are, and "
            "only what is wholly transparent is left out"
        )
    return cut_out


def photos(outputs: DataparserOutputs, scale: float, cut_out: bool, unlit: np.ndarray | None) -> PhotoDataset:
    """A dataset of some views; see `is_cut_out` and `unlit_border` for what all of a scene's views have to say."""
    if outputs.alpha_color is None:
        # One background for sources, targets and metrics: without it RGBA images would reach the model.
        outputs.alpha_color = torch.ones(3)
    dataset = PhotoDataset(outputs, scale, cut_out, unlit)
    _make_float32(dataset.cameras)
    return dataset


def _make_float32(cameras: Cameras) -> None:
    """Casts cameras in place: nerfstudio's Blender parser leaves float64 focal lengths, which ns-render trips over."""
    for name in ("camera_to_worlds", "fx", "fy", "cx", "cy", "distortion_params"):
        value = getattr(cameras, name)
        if value is not None:
            setattr(cameras, name, value.float())


def near_and_far(
    dataset: InputDataset, bank: SourceBank, near: float | None = None, far: float | None = None
) -> tuple[float, float]:
    """Nearest and farthest z depth to sample; see `scene_near_far`.

    Args:
        dataset: the views.
        bank: the same as source views.
        near, far: what is given already.
    """
    metadata = dataset.metadata
    points = metadata.get("points3D_xyz")
    if points is not None and "points3D_num_points2D" in metadata:
        # Points that two views agree on may still be false matches; three rarely are.
        points = points[metadata["points3D_num_points2D"] >= 3]
    return scene_near_far(
        bank, hint=metadata.get("near_far"), bounds=metadata.get("bounds"), points=points, near=near, far=far
    )
