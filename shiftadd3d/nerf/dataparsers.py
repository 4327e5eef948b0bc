"""Scenes on disk to nerfstudio's `DataparserOutputs`: LLFF folders, and one parser that finds out what a folder is.

Every way in ends in `check_outputs`, so that a broken scene is refused in one line before anything is trained on it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras import camera_utils
from nerfstudio.cameras.cameras import CAMERA_MODEL_TO_TYPE, Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataParserConfig, DataparserOutputs
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.data.utils import colmap_parsing_utils
from nerfstudio.data.utils.dataparsers_utils import (
    get_train_eval_split_all,
    get_train_eval_split_filename,
    get_train_eval_split_fraction,
    get_train_eval_split_interval,
)
from nerfstudio.plugins.registry_dataparser import DataParserSpecification
from nerfstudio.utils.colors import get_color
from nerfstudio.utils.rich_utils import CONSOLE

from shiftadd3d._errors import UserError
from shiftadd3d.nerf.photos import MASK_MODES, PHOTO_MODES, UNREADABLE, photo_header, scale_crop_radius
from shiftadd3d.scenes import scene_path

MAX_AUTO_RESOLUTION = 1600
"""Longest image side in pixels that the automatic downscale factor accepts, as in nerfstudio's parsers."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

EvalMode = Literal["fraction", "filename", "interval", "all"]

_ACCEPTED = (
    "a folder with transforms.json (nerfstudio), transforms_train.json (Blender), "
    "sparse/0 or colmap/sparse/0 (COLMAP), or poses_bounds.npy (LLFF)"
)

_MODELS = sorted(
    name for name, kind in CAMERA_MODEL_TO_TYPE.items() if kind in (CameraType.PERSPECTIVE, CameraType.FISHEYE)
)

_EXPECTED_CONTENT = {
    "nerfstudio": "a transforms.json as ns-process-data writes it",
    "blender": "transforms_*.json as NeRF's synthetic scenes have them, and PNG images",
    "colmap": "whole files of cameras, images and points, with cameras of type SIMPLE_PINHOLE, PINHOLE, SIMPLE_RADIAL, "
    "RADIAL, OPENCV or OPENCV_FISHEYE",
    "llff": "poses_bounds.npy, and one image for each of its rows",
}


def _embedded_scene() -> Path:
    try:
        return scene_path()
    except UserError:
        # This default is made whenever nerfstudio lists its parsers: a source tree whose scene has not been made yet
        # must not take every other scene, and every other method, down with it.
        return Path()


# --------------------------------------------------------------------------------------------------------------------
# What a scene must satisfy
# --------------------------------------------------------------------------------------------------------------------


def _list_first(names: Sequence[Any], limit: int = 3) -> str:
    """`a, b, c and 4 more`."""
    shown = ", ".join(str(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _check_poses(poses: np.ndarray, names: Sequence[Any], origin: Any) -> None:
    """Refuses poses that are not finite rigid motions.

    Args:
        poses: camera-to-world matrices, [n, 3 or 4, 4].
        names: what to call each of them in the message.
        origin: the file or folder they come from, for the message.

    Raises:
        UserError: NaN or infinite entries, or a rotation part that is not orthonormal with determinant +1 (tolerance
            1e-2: files with three decimals pass, a scale or shear of one per cent does not).
    """
    poses = np.asarray(poses, dtype=np.float64)
    finite = [bool(np.isfinite(pose).all()) for pose in poses]
    if not all(finite):
        bad = [name for name, ok in zip(names, finite, strict=True) if not ok]
        raise UserError(
            f"{origin}: {_plural(len(bad), 'camera pose')} with NaN or infinity ({_list_first(bad)}); "
            "expected finite 4x4 camera-to-world matrices"
        )
    rotations = poses[:, :3, :3]
    deviation = np.abs(rotations @ rotations.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2))
    rigid = (deviation < 1e-2) & (np.linalg.det(rotations) > 0)
    if not rigid.all():
        bad = [name for name, ok in zip(names, rigid, strict=True) if not ok]
        raise UserError(
            f"{origin}: {_plural(len(bad), 'camera pose')} whose 3x3 part is not a rotation ({_list_first(bad)}); "
            "expected orthonormal axes, right-handed, without scale"
        )


def _check_spread(poses: np.ndarray, origin: Any) -> None:
    """Refuses a scene without parallax, which nerfstudio would scale by one over zero."""
    if len(poses) < 2:
        raise UserError(f"{origin} has {_plural(len(poses), 'view')}; expected several, from different places")
    if np.ptp(np.asarray(poses)[:, :3, 3], axis=0).max() == 0:
        raise UserError(f"{origin}: all {len(poses)} cameras stand at one point; expected views from different places")


def _read_sizes(
    paths: Sequence[Path],
    what: str,
    modes: Mapping[str, str] | None = None,
    expected: Sequence[tuple[int, int]] | None = None,
) -> list[tuple[int, int]]:
    """(width, height) of every image, from the headers alone.

    Args:
        paths: the files.
        what: what one of them is, for the message.
        modes: PIL's modes that are accepted, and what they are called; all if None.
        expected: sizes of the cameras, by which photos are turned where their EXIF data says so (`photo_header`).

    Raises:
        UserError: files that are missing, that PIL cannot open, or that are of another mode.
    """
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {_plural(len(paths), what)} not found ({_list_first(missing)}); "
            "expected every file that the camera file names"
        )
    sizes, unreadable, odd = [], [], []
    for index, path in enumerate(paths):
        try:
            width, height, mode = photo_header(path, None if expected is None else expected[index])
        except UNREADABLE:
            unreadable.append(path)
            continue
        sizes.append((width, height))
        if modes is not None and mode not in modes:
            odd.append(f"{path} is {mode}")
    if unreadable:
        raise UserError(
            f"{len(unreadable)} of {_plural(len(paths), what)} cannot be read ({_list_first(unreadable)}); "
            "expected PNG, JPEG or another format that PIL opens"
        )
    if odd and modes is not None:
        raise UserError(
            f"{len(odd)} of {_plural(len(paths), what)} in a pixel format whose numbers are no such colours "
            f"({_list_first(odd)}); expected one of: {', '.join(modes.values())}"
        )
    return sizes


def check_outputs(outputs: DataparserOutputs, split: str, min_train_views: int = 2) -> None:
    """Refuses a split of a scene that cannot be trained on or evaluated, in one line.

    Cheap: only the headers of images and masks are read.

    Args:
        outputs: what a data parser made of the split.
        split: "train", "val" or "test".
        min_train_views: the fewest views that a training split may have.

    Raises:
        UserError: an empty split or too few training views; images and masks that are missing, unreadable or in a pixel
            format that cannot be read (`shiftadd3d.nerf.photos`); image sizes that disagree with the cameras, masks'
            that disagree with the images'; poses that are not rigid; focal lengths that are not positive, principal
            points outside the image, distortion that is not six numbers.
    """
    paths = outputs.image_filenames
    if split == "train" and len(paths) < min_train_views:
        raise UserError(f"the train split has {_plural(len(paths), 'view')}; expected at least {min_train_views}")
    if not paths:
        raise UserError(
            f"the {split} split has no views; expected some held out: "
            "set eval-mode (interval holds out every eval-interval-th view), or list them in the camera file"
        )
    cameras = outputs.cameras
    poses = cameras.camera_to_worlds.cpu().numpy()
    _check_poses(poses, [path.name for path in paths], f"{split} split")
    if split == "train":
        _check_spread(poses, "train split")

    distortion = torch.zeros(len(paths), 6) if cameras.distortion_params is None else cameras.distortion_params
    if distortion.shape[-1] != 6 or not distortion.isfinite().all():
        raise UserError(
            f"{split} split: lens distortion {distortion.view(-1, distortion.shape[-1])[0].tolist()}; expected six "
            "finite numbers: k1, k2, k3, k4, p1, p2"
        )
    for name, side in (("fx", None), ("fy", None), ("cx", cameras.width), ("cy", cameras.height)):
        values = getattr(cameras, name).flatten()
        limit = torch.full_like(values, torch.inf) if side is None else side.flatten()
        good = (values > 0) & (values < limit)
        if not bool(good.all()):
            bad = [path.name for path, ok in zip(paths, good.tolist(), strict=True) if not ok]
            raise UserError(
                f"{split} split: camera parameter {name} is {values[~good][0].item():g} ({_list_first(bad)}); expected "
                + (
                    "a positive number of pixels"
                    if side is None
                    else f"a point inside the image, 0 < {name} < {int(limit[~good][0])}: are these numbers of the "
                    "full-size photos, and the images smaller ones?"
                )
            )

    expected = list(zip(cameras.width.flatten().tolist(), cameras.height.flatten().tolist(), strict=True))
    sizes = _read_sizes(paths, "image", PHOTO_MODES, expected)
    wrong = [(path, size, want) for path, size, want in zip(paths, sizes, expected, strict=True) if size != want]
    if wrong:
        path, (width, height), (want_w, want_h) = wrong[0]
        raise UserError(
            f"{len(wrong)} of {_plural(len(paths), 'image')} differ in size from the camera file: "
            f"{path} is {width}x{height}, its camera {want_w}x{want_h}; "
            "expected images of the cameras' size (or another downscale-factor)"
        )
    if outputs.mask_filenames is not None:
        mask_sizes = _read_sizes(outputs.mask_filenames, "mask", MASK_MODES)
        for mask, mask_size, size in zip(outputs.mask_filenames, mask_sizes, sizes, strict=True):
            # A pixel is rounding: `read_mask` fits the mask to its photo.
            if max(abs(mask_size[0] - size[0]), abs(mask_size[1] - size[1])) > 1:
                raise UserError(
                    f"mask {mask} is {mask_size[0]}x{mask_size[1]}, its image {size[0]}x{size[1]}; "
                    "expected masks of the images' size"
                )


def _adopt_rounded_sizes(outputs: DataparserOutputs) -> None:
    """Gives each camera its image's size where the two differ by the rounding of a downscale factor (one pixel).

    Programs that shrink images round 333.5 pixels up or down as they please; the focal length does not care.
    """
    cameras = outputs.cameras
    cameras.width, cameras.height = cameras.width.clone(), cameras.height.clone()  # one number seen n times, maybe
    for index, path in enumerate(outputs.image_filenames):
        try:
            width, height, _ = photo_header(path, (int(cameras.width[index]), int(cameras.height[index])))
        except UNREADABLE:
            continue  # check_outputs says it better
        if abs(width - int(cameras.width[index])) <= 1 and abs(height - int(cameras.height[index])) <= 1:
            cameras.width[index] = width
            cameras.height[index] = height


# --------------------------------------------------------------------------------------------------------------------
# Folders of images
# --------------------------------------------------------------------------------------------------------------------


def _image_files(folder: Path) -> list[Path]:
    """The image files directly in a folder, sorted by name."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))


def _downscaled_folders(folder: Path) -> dict[int, Path]:
    """{1: images, 2: images_2, 8: images_8, ...} for those that exist beside (or as) `folder`."""
    found = {1: folder} if folder.is_dir() else {}
    for path in sorted(folder.parent.glob(f"{folder.name}_*")):
        factor = path.name[len(folder.name) + 1 :]
        if path.is_dir() and factor.isdecimal() and int(factor) > 1:
            found[int(factor)] = path
    return found


def _choose_factor(requested: float | None, available: Sequence[int], longest_side: int, where: Path) -> int:
    """The downscale factor to read: the requested one, or the smallest whose images are <= 1600 px, or the largest.

    Raises:
        UserError: the requested factor has no folder, or there is no folder at all.
    """
    have = ", ".join(str(factor) for factor in sorted(available)) or "none"
    if not available:
        raise UserError(f"{where}: no folder with the scene's images; expected images or images_N (N times smaller)")
    if requested is not None:
        if requested != int(requested) or int(requested) not in available:
            raise UserError(f"downscale-factor {requested:g}: {where} has no such images; expected one of: {have}")
        return int(requested)
    small_enough = [factor for factor in sorted(available) if longest_side / factor <= MAX_AUTO_RESOLUTION]
    factor = small_enough[0] if small_enough else max(available)
    if not small_enough:
        CONSOLE.log(f"[yellow]{where}: the smallest images are {longest_side // factor} px wide; this will be slow")
    return factor


def _split_indices(config: Any, names: Sequence[Path], split: str) -> np.ndarray:
    """Indices of the views in a split, after nerfstudio's `eval_mode`s.

    Args:
        config: has `eval_mode`, `eval_interval` and `train_split_fraction`.
        names: the image files, sorted.
        split: "train", "val" or "test"; the last two are the same held-out views.

    Raises:
        UserError: an impossible setting, or file names that say neither train nor eval.
    """
    if config.eval_mode == "fraction":
        if not 0 < config.train_split_fraction <= 1:
            raise UserError(f"train-split-fraction {config.train_split_fraction}: expected a number in (0, 1]")
        train, held_out = get_train_eval_split_fraction(list(names), config.train_split_fraction)
    elif config.eval_mode == "filename":
        try:
            train, held_out = get_train_eval_split_filename(list(names))
        except ValueError as error:
            raise UserError(f"eval-mode filename: expected 'train' or 'eval' in every image name ({error})") from error
    elif config.eval_mode == "interval":
        if config.eval_interval < 2:
            raise UserError(f"eval-interval {config.eval_interval}: expected 2 or more")
        train, held_out = get_train_eval_split_interval(list(names), config.eval_interval)
    else:
        train, held_out = get_train_eval_split_all(list(names))
    return np.asarray(train if split == "train" else held_out, dtype=np.int64)


# --------------------------------------------------------------------------------------------------------------------
# LLFF
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class LLFFDataParserConfig(DataParserConfig):
    """LLFF folders: `poses_bounds.npy` with `images` or `images_N` (N times smaller), masks in `masks[_N]` if any."""

    _target: type = field(default_factory=lambda: LLFFDataParser)
    """target class to instantiate"""
    data: Path = Path()
    """Folder that holds poses_bounds.npy."""
    scale_factor: float = 1.0
    """How much to scale the camera origins by, after auto_scale_poses."""
    downscale_factor: int | None = None
    """Which images_N to read. If not set, the largest images of at most 1600 px that are there."""
    scene_scale: float = 1.0
    """Half the side of the scene box."""
    orientation_method: Literal["pca", "up", "vertical", "none"] = "up"
    """The method to use for orientation."""
    center_method: Literal["poses", "focus", "none"] = "poses"
    """The method to use to center the poses."""
    auto_scale_poses: bool = True
    """Whether to scale the poses to fit in a +/- 1 box; the depth bounds are scaled with them."""
    eval_mode: EvalMode = "interval"
    """How to hold out test views: every eval-interval-th, a fraction, by file names with train/eval, or all in both."""
    train_split_fraction: float = 0.9
    """The share of views to train on (eval-mode fraction)."""
    eval_interval: int = 8
    """Hold out every n-th view (eval-mode interval); the LLFF benchmark holds out every 8th."""
    alpha_color: str = "white"
    """The color behind transparent pixels."""


class LLFFDataParser(DataParser):
    """Reads `poses_bounds.npy`: one row per image (sorted by name) of a 3x5 matrix [R | t | (height, width, focal)] and
    the nearest and farthest depth.

    R's columns are the camera's [down, right, back] axes in the world, nerfstudio's are [right, up, back]. Height,
    width and focal length are those of the full-size photos, whichever images are read.

    The outputs' `metadata["bounds"]` is [n, 2] float32: each view's nearest and farthest z-depth, scaled as the poses.

    Raises:
        UserError: see `check_outputs`; also a missing or malformed `poses_bounds.npy` and a number of images other than
            its number of rows.
    """

    config: LLFFDataParserConfig

    def __init__(self, config: LLFFDataParserConfig):
        super().__init__(config)
        self.downscale_factor: int | None = config.downscale_factor

    def _generate_dataparser_outputs(self, split: str = "train", **kwargs) -> DataparserOutputs:
        data = _scene_folder(self.config.data)
        poses, intrinsics, bounds = _read_poses_bounds(data / "poses_bounds.npy")
        factor, images, masks = self._find_images(data, len(poses), longest_side=int(intrinsics[:, :2].max()))
        _check_poses(poses, [path.name for path in images], data / "poses_bounds.npy")
        _check_spread(poses, data / "poses_bounds.npy")

        oriented, transform = camera_utils.auto_orient_and_center_poses(
            torch.from_numpy(poses).float(),
            method=self.config.orientation_method,
            center_method=self.config.center_method,
        )
        scale = self.config.scale_factor
        if self.config.auto_scale_poses:
            scale /= float(oriented[:, :3, 3].abs().max())
        oriented[:, :3, 3] *= scale

        indices = _split_indices(self.config, images, split)
        images = [images[i] for i in indices]
        # The images' own size, since the programs that made images_N round it as they please.
        full = torch.from_numpy(intrinsics[indices])  # [n, 3] height, width, focal
        expected = [(round(w / factor), round(h / factor)) for h, w, _ in full.tolist()]
        sizes = torch.tensor(_read_sizes(images, "image", expected=expected), dtype=torch.int64).reshape(-1, 2)
        ratio = sizes.double() / full[:, [1, 0]]
        cameras = Cameras(
            camera_to_worlds=oriented[torch.from_numpy(indices), :3, :4],
            fx=(full[:, 2] * ratio[:, 0]).float(),
            fy=(full[:, 2] * ratio[:, 1]).float(),
            cx=(sizes[:, 0] / 2).float(),
            cy=(sizes[:, 1] / 2).float(),
            width=_expected_or_actual(full[:, 1] / factor, sizes[:, 0]),
            height=_expected_or_actual(full[:, 0] / factor, sizes[:, 1]),
            camera_type=CameraType.PERSPECTIVE,
        )
        box = self.config.scene_scale
        outputs = DataparserOutputs(
            image_filenames=images,
            cameras=cameras,
            alpha_color=get_color(self.config.alpha_color),
            scene_box=SceneBox(aabb=torch.tensor([[-box] * 3, [box] * 3], dtype=torch.float32)),
            mask_filenames=[masks[i] for i in indices] if masks else None,
            dataparser_scale=scale,
            dataparser_transform=transform,
            metadata={"bounds": torch.from_numpy(bounds[indices] * scale).float()},
        )
        check_outputs(outputs, split)
        return outputs

    def _find_images(self, data: Path, count: int, longest_side: int) -> tuple[int, list[Path], list[Path]]:
        """(downscale factor, images, masks or []) whose number is that of the poses."""
        folders = {factor: _image_files(folder) for factor, folder in _downscaled_folders(data / "images").items()}
        complete = [factor for factor, files in folders.items() if len(files) == count]
        if folders and not complete:
            have = ", ".join(f"{len(files)} in images{f'_{f}' if f > 1 else ''}" for f, files in folders.items())
            raise UserError(
                f"{data}: poses_bounds.npy has {count} poses, but there are {have}; expected one image each"
            )
        factor = _choose_factor(self.downscale_factor, complete, longest_side, data)
        if self.downscale_factor is None:
            CONSOLE.log(f"LLFF downscale factor of {factor}")
            self.downscale_factor = factor  # train and eval must agree

        images = folders[factor]
        masks = {path.stem: path for path in _image_files(_downscaled_folders(data / "masks").get(factor, data / "-"))}
        if not masks:
            return factor, images, []
        without = [path.name for path in images if path.stem not in masks]
        if without:
            raise UserError(
                f"{data}: {_plural(len(without), 'image')} without a mask ({_list_first(without)}); "
                "expected a mask of the same name for every image, or no masks"
            )
        return factor, images, [masks[path.stem] for path in images]


def _expected_or_actual(expected: Float[torch.Tensor, " n"], actual: torch.Tensor) -> torch.Tensor:
    """The actual size where it is the expected one up to rounding, else the expected one, to be refused."""
    return torch.where((expected - actual).abs() <= 1, actual, expected.round().long())


def _read_poses_bounds(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Poses [n, 4, 4] (camera-to-world, OpenGL axes), [n, 3] (height, width, focal in pixels), bounds [n, 2]."""
    if not path.is_file():
        raise UserError(f"{path} not found; expected an LLFF folder, with poses_bounds.npy and images or images_N")
    try:
        rows = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read as a .npy file ({error})") from error
    if rows.ndim != 2 or rows.shape[1] != 17 or len(rows) == 0 or rows.dtype.kind not in "fiu":
        raise UserError(
            f"{path} holds {rows.dtype} of shape {list(rows.shape)}; expected numbers of shape [images, 17]"
        )
    rows = rows.astype(np.float64)
    matrices = rows[:, :15].reshape(-1, 3, 5)
    down, right, back, centre = (matrices[:, :, i] for i in range(4))
    poses = np.tile(np.eye(4), (len(rows), 1, 1))
    poses[:, :3] = np.stack([right, -down, back, centre], axis=-1)
    intrinsics, bounds = matrices[:, :, 4], rows[:, 15:]
    if not (np.isfinite(intrinsics).all() and (intrinsics > 0).all()):
        raise UserError(
            f"{path}: height, width or focal length is not positive; expected pixels of the full-size photos"
        )
    if not (np.isfinite(bounds).all() and (bounds[:, 0] > 0).all() and (bounds[:, 0] < bounds[:, 1]).all()):
        raise UserError(f"{path}: depth bounds are not 0 < near < far; expected two positive depths in every row")
    return poses, intrinsics, bounds


# --------------------------------------------------------------------------------------------------------------------
# Any scene
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class AutoDataParserConfig(DataParserConfig):
    """Finds out what a scene folder holds: nerfstudio, Blender, COLMAP or LLFF data.

    These are the settings that the formats share. For anything finer, name the parser: nerfstudio-data, blender-data,
    colmap, shiftadd-llff.
    """

    _target: type = field(default_factory=lambda: AutoDataParser)
    """target class to instantiate"""
    data: Path = field(default_factory=_embedded_scene)
    """Scene folder (or its transforms.json). The default is the embedded scene."""
    downscale_factor: int | None = None
    """Which images_N to read. If not set, the largest images of at most 1600 px that are there."""
    scene_scale: float = 1.0
    """Half the side of the scene box."""
    eval_mode: EvalMode | None = None
    """How to hold out test views, where the scene has no list of its own: every eval-interval-th view, a fraction, by
    file names with train/eval, or all in both. If not set: a fraction for nerfstudio data (of ten views or more), every
    eval-interval-th for the rest."""
    train_split_fraction: float = 0.9
    """The share of views to train on (eval-mode fraction)."""
    eval_interval: int = 8
    """Hold out every n-th view (eval-mode interval)."""
    alpha_color: str = "white"
    """The color behind transparent pixels."""


class AutoDataParser(DataParser):
    """Delegates to nerfstudio's parsers, or to `LLFFDataParser`, by what the folder holds; never asks a question.

    Besides what those parsers give, the outputs' `metadata` has

    - `"near_far"`: (near, far) z-depths, if the camera file has a block `"shiftadd3d": {"near": ..., "far": ...}` in
      the units of its matrices, here scaled with the poses;
    - `"bounds"`: from LLFF data, see `LLFFDataParser`;
    - `"points3D_xyz"`: from COLMAP data, [n, 3] (nerfstudio's own key).

    Raises:
        UserError: a folder that is none of these, an unreadable camera file, and what `check_outputs` refuses.
    """

    config: AutoDataParserConfig

    def __init__(self, config: AutoDataParserConfig):
        super().__init__(config)
        self._parser: DataParser | None = None

    def _generate_dataparser_outputs(self, split: str = "train", **kwargs) -> DataparserOutputs:
        kind, data = find_scene(self.config.data)
        meta: dict[str, Any] = {}
        camera_file = data
        if kind == "nerfstudio":
            camera_file = self.config.data if self.config.data.suffix == ".json" else data / "transforms.json"
            meta = _read_transforms(camera_file, required=("fl_x", "fl_y", "cx", "cy", "w", "h"))
            listed = [name for name in ("train", "val", "test") if f"{name}_filenames" in meta]
            if listed and split not in listed:  # val and test stand in for each other
                split = {"val": "test", "test": "val"}.get(split, split)
        elif kind == "blender":
            camera_file = _blender_camera_file(data, split)
            meta = _read_transforms(camera_file, required=("camera_angle_x",))
            split = camera_file.stem.removeprefix("transforms_")
        if self._parser is None:  # kept, so that train and eval agree on the downscale factor
            self._parser = self._make_parser(kind, data, len(meta.get("frames", [])))
        try:
            outputs = self._parser.get_dataparser_outputs(split=split)
        except UserError:
            raise
        except (
            ArithmeticError,
            AssertionError,
            AttributeError,
            LookupError,
            OSError,
            RuntimeError,
            TypeError,
            ValueError,
            struct.error,
        ) as error:
            # Often the first image, which nerfstudio opens for its size: then say how many more are like it.
            suffix = ".png" if kind == "blender" else ""
            _read_sizes([data / (frame["file_path"] + suffix) for frame in meta.get("frames", [])], "image")
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"{data} cannot be read as a {kind} scene ({reason}); expected {_EXPECTED_CONTENT[kind]}"
            ) from error

        if outputs.alpha_color is None:
            outputs.alpha_color = get_color(self.config.alpha_color)
        hint = _near_far_hint(meta, camera_file)
        if hint is not None:
            # dataparser_scale also contains applied_scale, which the matrices in the file already have.
            scale = outputs.dataparser_scale / float(meta.get("applied_scale", 1.0))
            outputs.metadata["near_far"] = (hint[0] * scale, hint[1] * scale)
        if kind in ("nerfstudio", "colmap") and self._factor(kind) > 1:
            _adopt_rounded_sizes(outputs)
            scale_crop_radius(outputs.cameras, 1.0 / self._factor(kind))
        check_outputs(outputs, split)
        return outputs

    def _factor(self, kind: str) -> int:
        """The downscale factor that the delegate reads with."""
        parser = self._parser
        factor = getattr(parser, "downscale_factor" if kind == "nerfstudio" else "_downscale_factor", None)
        return int(factor or 1)

    def _make_parser(self, kind: str, data: Path, frames: int) -> DataParser:
        config = self.config
        if config.downscale_factor is not None and config.downscale_factor < 1:
            raise UserError(f"downscale-factor {config.downscale_factor:g}: expected 1 or more")
        split = {"train_split_fraction": config.train_split_fraction, "eval_interval": config.eval_interval}
        if kind == "llff":
            return LLFFDataParserConfig(
                data=data,
                downscale_factor=config.downscale_factor,
                scene_scale=config.scene_scale,
                eval_mode=config.eval_mode or "interval",
                alpha_color=config.alpha_color,
                **split,
            ).setup()
        if kind == "blender":
            if config.downscale_factor not in (None, 1):
                raise UserError(
                    f"downscale-factor {config.downscale_factor}: Blender scenes have one size; expected "
                    "--pipeline.datamanager.camera-res-scale-factor 0.5 or the like"
                )
            return BlenderDataParserConfig(data=data, alpha_color=config.alpha_color).setup()
        if kind == "colmap":
            return self._colmap_parser(data, split)
        # int: ns-render sets a float here, and the folder's name is made from it.
        factor = None if config.downscale_factor is None else int(config.downscale_factor)
        return NerfstudioDataParserConfig(
            data=self.config.data if self.config.data.suffix == ".json" else data,
            downscale_factor=factor,
            scene_scale=config.scene_scale,
            # A tenth of fewer than ten views is none.
            eval_mode=config.eval_mode or ("fraction" if frames >= 10 else "interval"),
            **split,
        ).setup()

    def _colmap_parser(self, data: Path, split: dict[str, Any]) -> DataParser:
        """nerfstudio's COLMAP parser with every choice made, since it would otherwise ask on the terminal."""
        model = _colmap_model(data)
        assert model is not None
        names = _colmap_image_names(model)
        folders = _downscaled_folders(data / "images")
        usable = [factor for factor, folder in folders.items() if (folder / names[0]).is_file()]
        if not usable:
            raise UserError(f"{data}: {names[0]}, of the COLMAP model {model}, is in no folder images or images_N")
        side = min(max(photo_header(folders[f] / names[0])[:2]) * f for f in usable)
        factor = _choose_factor(self.config.downscale_factor, usable, side, data)
        masks = data / "masks" if factor == 1 else data / f"masks_{factor}"
        return ColmapDataParserConfig(
            data=data,
            colmap_path=model.relative_to(data),
            images_path=Path("images"),
            masks_path=Path("masks") if masks.is_dir() else None,
            downscale_factor=factor,
            scene_scale=self.config.scene_scale,
            eval_mode=self.config.eval_mode or "interval",
            **split,
        ).setup()


def _scene_folder(data: Path) -> Path:
    if not data.exists():
        raise UserError(f"{data} does not exist; expected {_ACCEPTED}")
    if not data.is_dir():
        raise UserError(f"{data} is not a folder; expected {_ACCEPTED}")
    return data


def find_scene(data: Path) -> tuple[Literal["nerfstudio", "blender", "colmap", "llff"], Path]:
    """What a scene is, and its folder.

    Args:
        data: the scene's folder, or its `transforms.json` (`transforms_train.json`).

    Raises:
        UserError: nothing that is accepted was found there.
    """
    if data.suffix == ".json" and data.is_file():
        blender = data.name.startswith("transforms_")
        return ("blender" if blender else "nerfstudio"), data.parent
    data = _scene_folder(data)
    if (data / "transforms.json").is_file():
        return "nerfstudio", data
    if (data / "transforms_train.json").is_file():
        return "blender", data
    llff = (data / "poses_bounds.npy").is_file()
    model = _colmap_model(data)
    # LLFF folders often keep the COLMAP model they were made from, with images_N under other names than the model's.
    if model is not None and not (llff and _renamed_images(data, model)):
        return "colmap", data
    if llff:
        return "llff", data
    raise UserError(f"{data}: no scene found; expected {_ACCEPTED}")


def _colmap_model(data: Path) -> Path | None:
    for name in ("sparse/0", "colmap/sparse/0", "sparse"):
        if (data / name / "cameras.bin").is_file() or (data / name / "cameras.txt").is_file():
            return data / name
    return None


def _colmap_image_names(model: Path) -> list[str]:
    try:
        if (model / "cameras.txt").is_file():  # the order in which nerfstudio looks
            images = colmap_parsing_utils.read_images_text(model / "images.txt")
        else:
            images = colmap_parsing_utils.read_images_binary(model / "images.bin")
    except Exception as error:  # struct.error, IndexError, FileNotFoundError...: a damaged file fails in many ways
        raise UserError(
            f"{model}: images.bin or images.txt cannot be read ({type(error).__name__}: {error})"
        ) from error
    if not images:
        raise UserError(f"{model}: the COLMAP model has no images")
    return [images[key].name for key in sorted(images)]


def _renamed_images(data: Path, model: Path) -> bool:
    """Whether some images_N lacks the COLMAP model's file names (or there are no images of those names at all)."""
    name = _colmap_image_names(model)[0]
    folders = _downscaled_folders(data / "images").values()
    return not all((folder / name).is_file() for folder in folders)


def _blender_camera_file(data: Path, split: str) -> Path:
    """The split's `transforms_*.json`; val and test stand in for each other where one is missing."""
    candidates = [split, {"val": "test", "test": "val"}.get(split, split)]
    for name in candidates:
        path = data / f"transforms_{name}.json"
        if path.is_file():
            return path
    raise UserError(f"{data}: no transforms_{split}.json; expected transforms_{{train,val,test}}.json")


def _read_transforms(path: Path, required: Sequence[str]) -> dict[str, Any]:
    """A `transforms*.json` whose frames all have an image and a 4x4 pose.

    Args:
        path: the file.
        required: camera parameters that the file must have, once or in every frame.

    Raises:
        UserError: not JSON, or lacking any of that.
    """
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error
    frames = meta.get("frames") if isinstance(meta, dict) else None
    if not isinstance(frames, list) or not frames:
        raise UserError(f"{path} has no frames; expected a list of {{file_path, transform_matrix}}")
    for index, frame in enumerate(frames):
        if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str):
            raise UserError(f"{path}: frame {index} has no file_path; expected one in every frame")
    names = [frame["file_path"] for frame in frames]
    poses = []
    for name, frame in zip(names, frames, strict=True):
        try:
            pose = np.array(frame.get("transform_matrix"), dtype=np.float64)
        except (TypeError, ValueError):
            pose = np.empty(0)
        if pose.shape != (4, 4):
            raise UserError(f"{path}: transform_matrix of {name} is not a 4x4 matrix of numbers")
        poses.append(pose)
    _check_poses(np.stack(poses), names, path)
    if not path.stem.startswith("transforms_"):  # Blender's files are one split each, and may test on one view
        _check_spread(np.stack(poses), path)
    lacking = [key for key in required if key not in meta and any(key not in frame for frame in frames)]
    if lacking:
        raise UserError(f"{path} lacks {', '.join(lacking)}; expected them once for the file or in every frame")
    _check_values(meta, str(path))
    for name, frame in zip(names, frames, strict=True):
        _check_values(frame, f"{path}, {name}")
    return meta


_NUMBERS = ("fl_x", "fl_y", "cx", "cy", "w", "h", "k1", "k2", "k3", "k4", "p1", "p2", "camera_angle_x", "applied_scale")


def _check_values(values: Mapping[str, Any], where: str) -> None:
    """Refuses what nerfstudio would fail on without saying where, in a camera file or one of its frames.

    Raises:
        UserError: a number that is none, or anything else that is not what its name says.
    """
    for key, value in values.items():
        if key in _NUMBERS and _finite(value).shape != ():
            expected = "a number"
        elif key == "applied_scale" and float(value) <= 0:
            expected = "a positive number"
        elif key == "distortion_params" and _finite(value).shape != (6,):
            expected = "six numbers: k1, k2, k3, k4, p1, p2"
        elif key == "camera_model" and value not in _MODELS:
            expected = f"one of: {', '.join(_MODELS)}"
        elif key == "mask_path" and not isinstance(value, str):
            expected = "the name of a file"
        elif key in ("train_filenames", "val_filenames", "test_filenames") and not (
            isinstance(value, list) and all(isinstance(name, str) for name in value)
        ):
            expected = "a list of file names"
        else:
            continue
        raise UserError(f"{where}: {key} is {json.dumps(value)[:80]}; expected {expected}")


def _finite(value: Any) -> np.ndarray:
    """What a value from JSON is as numbers; of shape [0] where it is none, or not finite."""
    try:
        numbers = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return np.empty(0)
    return numbers if np.isfinite(numbers).all() else np.empty(0)


def _near_far_hint(meta: dict[str, Any], path: Path) -> tuple[float, float] | None:
    """(near, far) of the block `"shiftadd3d"`, in the units of the file's matrices."""
    block = meta.get("shiftadd3d")
    if block is None:
        return None
    try:
        near, far = float(block["near"]), float(block["far"])
    except (LookupError, TypeError, ValueError):
        raise UserError(
            f'{path}: "shiftadd3d" is {json.dumps(block)[:80]}; expected {{"near": ..., "far": ...}}'
        ) from None
    if not 0 < near < far < float("inf"):
        raise UserError(f'{path}: "shiftadd3d" has near {block["near"]}, far {block["far"]}; expected 0 < near < far')
    return near, far


auto_dataparser = DataParserSpecification(
    config=AutoDataParserConfig(),
    description="Finds out what the scene folder holds: nerfstudio, Blender, COLMAP or LLFF data",
)
llff_dataparser = DataParserSpecification(
    config=LLFFDataParserConfig(), description="LLFF folders: poses_bounds.npy with images or images_N"
)
