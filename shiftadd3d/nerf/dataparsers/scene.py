"""All views of a scene as its files state them, in float64, and how they become nerfstudio's `DataparserOutputs`.

Poses stay in float64 until they are centred and scaled. Maps put their origin 5,000 km away, and there neighbours in
float32 are half a metre apart. Every format comes through here, so all are centred and scaled alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras import camera_utils
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs, transform_poses_to_original_space
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.data.utils.dataparsers_utils import (
    get_train_eval_split_all,
    get_train_eval_split_filename,
    get_train_eval_split_fraction,
    get_train_eval_split_interval,
)
from nerfstudio.utils.colors import get_color
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.nerf.dataparsers.checks import check_outputs, check_poses, check_spread, list_first, plural
from shiftadd3d.nerf.dataparsers.files import say, white_mask
from shiftadd3d.nerf.photos import UNREADABLE, photo_header

EvalMode = Literal["fraction", "filename", "interval", "all"]
Orientation = Literal["pca", "up", "vertical", "none"]
Centering = Literal["poses", "focus", "none"]


@dataclass
class Scene:
    """The views of a scene, n of them, in the units and axes of its files."""

    origin: Path
    """The file or folder that they come from, for messages."""
    images: list[Path]
    poses: np.ndarray
    """[n, 4, 4] float64, camera to world, OpenGL axes."""
    focal: np.ndarray
    """[n, 2] float64, pixels of the images."""
    centre: np.ndarray
    """[n, 2] float64, pixels of the images, 0 at the corner."""
    sizes: np.ndarray
    """[n, 2] int64, width and height that the images should have."""
    distortion: np.ndarray
    """[n, 6] float64, nerfstudio's k1, k2, k3, k4, p1, p2."""
    types: list[CameraType]
    sizes_may_be_rounded: bool = False
    """Whether an image may be a pixel larger or smaller than it should."""
    masks: list[Path | None] = field(default_factory=list)
    """As many as images, or none at all."""
    depths: list[Path] = field(default_factory=list)
    """Depth maps, as many as images, or none at all."""
    depth_unit: float = 1e-3
    """What a whole number in them stands for, in units of the user's own frame."""
    splits: dict[str, list[int]] = field(default_factory=dict)
    """Views by split, where the scene lists them."""
    reference: list[int] | None = None
    """The views that say where the middle of the scene is and how large it is; all if None."""
    orientation: Orientation = "up"
    default_eval_mode: EvalMode = "interval"
    bounds: np.ndarray | None = None
    """[n, 2] nearest and farthest depth."""
    points: dict[str, np.ndarray] = field(default_factory=dict)
    """nerfstudio's points3D_xyz [p, 3] in the frame of the poses, and what belongs to them."""
    near_far: tuple[float, float] | None = None
    """Hint of the camera file."""
    crop_radius: float | None = None
    """`fisheye_crop_radius`, pixels of the images."""
    applied_transform: np.ndarray = field(default_factory=lambda: np.eye(4))
    """What turned the user's own frame into that of the poses."""
    applied_scale: float = 1.0
    """What it was multiplied by then."""

    def __len__(self) -> int:
        return len(self.images)


@dataclass
class SceneOutputs(DataparserOutputs):
    """nerfstudio's outputs, their `dataparser_transform` in float64: it leads back to a frame far from its origin."""

    def transform_poses_to_original_space(
        self, poses: Float[Tensor, "n 3 4"], camera_convention: Literal["opengl", "opencv"] = "opencv"
    ) -> Float[Tensor, "n 3 4"]:
        """Poses of the scaled scene in the user's own frame, float64."""
        transform = self.dataparser_transform.to(poses.device, torch.float64)
        return transform_poses_to_original_space(poses.double(), transform, self.dataparser_scale, camera_convention)


def normalise(
    poses: np.ndarray, reference: np.ndarray, orientation: Orientation, centering: Centering, auto_scale: bool
) -> tuple[np.ndarray, np.ndarray, float]:
    """Centres, turns and scales poses, in float64 up to the last step.

    Args:
        poses: [n, 4, 4], camera to world.
        reference: those among them that decide.
        orientation: nerfstudio's orientation methods.
        centering: nerfstudio's centre methods.
        auto_scale: whether the reference cameras shall fit into a box of -1 to 1.

    Returns:
        Poses [n, 4, 4]; the transform [4, 4] that turned and moved them; the scale that followed.
    """
    middle = reference[:, :3, 3].mean(axis=0)
    extent = float(np.abs(reference[:, :3, 3] - middle).max()) or 1.0
    near_origin = reference.copy()
    near_origin[:, :3, 3] = (near_origin[:, :3, 3] - middle) / extent
    if orientation in ("up", "vertical") and np.linalg.norm(near_origin[:, :3, 1].mean(axis=0)) < 1e-3:
        orientation = "none"  # as many cameras stand on their heads as on their feet: no side is up
    # nerfstudio's own choice of axes, on numbers that float32 holds.
    _, found = camera_utils.auto_orient_and_center_poses(
        torch.from_numpy(near_origin).float(), method=orientation, center_method=centering
    )
    transform = np.eye(4)
    transform[:3] = found.double().numpy()
    # Orthonormal to the last digit: float32's rounding would be multiplied by the distance from the origin.
    u, _, v = np.linalg.svd(transform[:3, :3])
    transform[:3, :3] = u @ v
    turn = transform[:3, :3]
    if centering == "none":
        transform[:3, 3] = 0.0
    else:
        transform[:3, 3] = transform[:3, 3] * extent - turn @ middle
    moved = poses.copy()
    moved[:, :3, :3] = turn @ poses[:, :3, :3]
    # The difference first: both ends of it are large, and it is small.
    shift = turn @ middle + transform[:3, 3]
    moved[:, :3, 3] = (poses[:, :3, 3] - middle) @ turn.T + shift
    scale = 1.0
    if auto_scale:
        reach = float(np.abs((reference[:, :3, 3] - middle) @ turn.T + shift).max())
        scale = 1.0 / reach if reach > 0 else 1.0
    moved[:, :3, 3] *= scale
    return moved, transform, scale


def make_outputs(
    scene: Scene,
    split: str,
    config: Any,
    orientation: Orientation | None = None,
    centering: Centering = "poses",
    auto_scale: bool = True,
    scale_factor: float = 1.0,
) -> SceneOutputs:
    """A split of a scene, checked.

    Args:
        scene: all of its views.
        split: "train", "val" or "test".
        config: has `eval_mode`, `eval_interval`, `train_split_fraction`, `scene_scale` and `alpha_color`.
        orientation: instead of the scene's own.
        centering: nerfstudio's centre method.
        auto_scale: whether cameras shall fit into a box of -1 to 1.
        scale_factor: by how much to scale after that.

    Raises:
        UserError: see `check_outputs`; also poses that are not rigid, and settings that split nothing.
    """
    names = [path.name for path in scene.images]
    check_poses(scene.poses, names, scene.origin)
    reference = scene.poses if scene.reference is None else scene.poses[scene.reference]
    check_spread(reference, scene.origin)
    poses, transform, scale = normalise(scene.poses, reference, orientation or scene.orientation, centering, auto_scale)
    poses[:, :3, 3] *= scale_factor
    scale *= scale_factor

    index = split_views(scene, split, config)
    images = [scene.images[i] for i in index]
    sizes = scene.sizes[index]
    if scene.sizes_may_be_rounded:
        sizes = _rounded_sizes(images, sizes)
    metadata: dict[str, Any] = {}
    if scene.bounds is not None:
        metadata["bounds"] = torch.from_numpy(scene.bounds[index] * scale).float()
    if scene.near_far is not None:
        metadata["near_far"] = (scene.near_far[0] * scale, scene.near_far[1] * scale)
    if scene.depths:
        metadata["depth_filenames"] = [scene.depths[i] for i in index]
        metadata["depth_unit_scale_factor"] = scene.depth_unit
    for name, values in scene.points.items():
        if name == "points3D_xyz":
            middle = reference[:, :3, 3].mean(axis=0)
            turn = transform[:3, :3]
            values = ((values - middle) @ turn.T + (turn @ middle + transform[:3, 3])) * scale
            metadata[name] = torch.from_numpy(values).float()
        else:
            metadata[name] = torch.from_numpy(values)
    lens: dict[str, Any] | None = None
    if scene.crop_radius is not None:
        lens = {"fisheye_crop_radius": scene.crop_radius}
        metadata["fisheye_crop_radius"] = scene.crop_radius

    focal, centre = scene.focal[index], scene.centre[index]
    box = config.scene_scale
    outputs = SceneOutputs(
        image_filenames=images,
        cameras=Cameras(
            camera_to_worlds=torch.from_numpy(poses[index, :3]).float().reshape(-1, 3, 4),
            fx=torch.from_numpy(focal[:, 0]).float(),
            fy=torch.from_numpy(focal[:, 1]).float(),
            cx=torch.from_numpy(centre[:, 0]).float(),
            cy=torch.from_numpy(centre[:, 1]).float(),
            width=torch.from_numpy(sizes[:, 0]),
            height=torch.from_numpy(sizes[:, 1]),
            distortion_params=torch.from_numpy(scene.distortion[index]).float(),
            camera_type=torch.tensor([scene.types[i].value for i in index], dtype=torch.int64),
            metadata=lens,
        ),
        alpha_color=get_color(config.alpha_color),
        scene_box=SceneBox(aabb=torch.tensor([[-box] * 3, [box] * 3], dtype=torch.float32)),
        mask_filenames=_masks(scene, index, sizes),
        dataparser_scale=scale * scene.applied_scale,
        dataparser_transform=torch.from_numpy(_whole_transform(scene, transform)),
        metadata=metadata,
    )
    check_outputs(outputs, split)
    return outputs


def _whole_transform(scene: Scene, transform: np.ndarray) -> np.ndarray:
    """[3, 4] from the user's own frame, before `dataparser_scale` (which has the applied scale in it, too)."""
    own = transform.copy()
    own[:3, 3] /= scene.applied_scale  # the matrices had been scaled before they were moved here
    return (own @ scene.applied_transform)[:3]


def _rounded_sizes(images: Sequence[Path], expected: np.ndarray) -> np.ndarray:
    """The images' own sizes where they are those expected up to rounding (one pixel), else those expected.

    Some programs that shrink images round 333.5 pixels up, others down. The focal length is the same.
    """
    sizes = expected.copy()
    for row, path in enumerate(images):
        try:
            width, height = expected[row].tolist()
            size = photo_header(path, (width, height))[:2]
        except UNREADABLE:
            continue  # check_outputs says it better
        if np.abs(np.array(size) - expected[row]).max() <= 1:
            sizes[row] = size
    return sizes


def _masks(scene: Scene, index: np.ndarray, sizes: np.ndarray) -> list[Path] | None:
    masks = [scene.masks[i] for i in index] if scene.masks else []
    if not any(masks):
        return None
    return [white_mask(int(w), int(h)) if mask is None else mask for mask, (w, h) in zip(masks, sizes, strict=True)]


_FAR_AWAY = 30.0
"""Times the usual distance from the middle: no walk around anything has such a view."""


def say_what_stands_far_away(scene: Scene) -> None:
    """Print a line if some cameras stand very far away. Scaling then shrinks the rest to a point."""
    positions = scene.poses[:, :3, 3]
    distance = np.linalg.norm(positions - np.median(positions, axis=0), axis=1)
    far = distance > _FAR_AWAY * np.median(distance)
    if far.any() and np.median(distance) > 0:
        names = list_first([scene.images[view].name for view in np.flatnonzero(far)])
        say(
            f"{scene.origin}: {plural(int(far.sum()), 'camera')} of {len(scene)} stand more than {_FAR_AWAY:g} times "
            f"as far from the middle as most ({names}); the scene is scaled to them: are their poses right?"
        )


# --------------------------------------------------------------------------------------------------------------------
# Splits
# --------------------------------------------------------------------------------------------------------------------


def split_views(scene: Scene, split: str, config: Any) -> np.ndarray:
    """Which views are in a split: those that the scene lists, else by the eval mode.

    Validation and test views stand in for each other. If a scene lists training views only, some of them are held out.
    If it lists only others, all the rest are trained on.

    Args:
        scene: its views.
        split: "train", "val" or "test".
        config: has `eval_mode`, `eval_interval` and `train_split_fraction`.

    Raises:
        UserError: an impossible setting, or file names that say neither train nor eval.
    """
    listed = {name: views for name, views in scene.splits.items() if views}
    everything = list(range(len(scene)))
    if not listed:
        return _hold_out(everything, scene, split, config)
    held_out = listed.get("val", []) + listed.get("test", [])
    train = listed.get("train") or [view for view in everything if view not in set(held_out)]
    if not held_out:
        return _hold_out(train, scene, split, config)
    if split == "train":
        return np.asarray(train, dtype=np.int64)
    other = {"val": "test", "test": "val"}[split]
    return np.asarray(listed.get(split) or listed[other], dtype=np.int64)


def _hold_out(views: Sequence[int], scene: Scene, split: str, config: Any) -> np.ndarray:
    names = [scene.images[view] for view in views]
    # A tenth of fewer than ten views is none.
    mode = config.eval_mode or (scene.default_eval_mode if len(views) >= 10 else "interval")
    if mode == "fraction":
        if not 0 < config.train_split_fraction <= 1:
            raise UserError(f"train-split-fraction {config.train_split_fraction}: expected a number in (0, 1]")
        train, held_out = get_train_eval_split_fraction(names, config.train_split_fraction)
    elif mode == "filename":
        try:
            train, held_out = get_train_eval_split_filename(names)
        except ValueError as error:
            raise UserError(f"eval-mode filename: expected 'train' or 'eval' in every image name ({error})") from error
    elif mode == "interval":
        if config.eval_interval < 2:
            raise UserError(f"eval-interval {config.eval_interval}: expected 2 or more")
        train, held_out = get_train_eval_split_interval(names, config.eval_interval)
    else:
        train, held_out = get_train_eval_split_all(names)
    return np.asarray(views, dtype=np.int64)[np.asarray(train if split == "train" else held_out, dtype=np.int64)]


def say_what_is_held_out(scene: Scene, lists: Mapping[str, str]) -> None:
    """One line where a scene's lists leave a split empty and another takes its place.

    Args:
        scene: with its `splits`.
        lists: what the list of a split is called, by split.
    """
    listed = {name: views for name, views in scene.splits.items() if views}
    if not listed:
        return
    if "val" not in listed and "test" not in listed:
        say(f"{scene.origin}: {lists['val']} and {lists['test']} have no views; some of {lists['train']} are held out")
    elif "train" not in listed:
        say(
            f"{scene.origin}: {lists['train']} has no views; all that {lists['val']} and {lists['test']} leave are "
            "trained on"
        )
    if "train" in listed:
        left = len(scene) - len(set().union(*listed.values()))
        if left:
            say(f"{scene.origin}: {plural(left, 'view')} of {len(scene)} are in none of the lists and are left out")
    both = set(listed.get("train", [])) & set(listed.get("val", []) + listed.get("test", []))
    if both:
        say(f"{scene.origin}: {len(both)} held-out views are training views, too; they say nothing about new views")
