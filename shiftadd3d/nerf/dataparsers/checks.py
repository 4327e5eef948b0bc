"""What a scene must satisfy before training. Every refusal is one line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs

from shiftadd3d._errors import UserError
from shiftadd3d.nerf.photos import MASK_MODES, PHOTO_MODES, UNREADABLE, photo_header

_SHORTEST_FOCAL = 0.1
"""Focal length in picture widths below which numbers are none of a lens: a perspective view of 157 degrees."""
_MIDDLE = (0.25, 0.75)
"""Where in the picture the optical axis of an uncropped lens can be, as a share of width or height."""


def list_first(names: Sequence[Any], limit: int = 3) -> str:
    """`a, b, c and 4 more`."""
    shown = ", ".join(str(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def plural(count: int, noun: str) -> str:
    """`1 view`, `2 views`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def check_poses(poses: np.ndarray, names: Sequence[Any], origin: Any) -> None:
    """Refuses poses that are not finite rigid motions.

    Args:
        poses: camera-to-world matrices, [n, 3 or 4, 4].
        names: what to call each of them in the message.
        origin: the file or folder they come from, for the message.

    Raises:
        UserError: NaN, infinite or astronomic entries, a last row other than 0 0 0 1, or a rotation part that is not
            orthonormal with determinant +1 (tolerance 1e-2: files with three decimals pass, a scale or shear of one per
            cent does not).
    """
    poses = np.asarray(poses, dtype=np.float64)
    # 1e12: what a float64 still tells apart to a tenth of a millimetre, if the units are metres.
    finite = [bool(np.isfinite(pose).all() and np.abs(pose).max() < 1e12) for pose in poses]
    if not all(finite):
        bad = [name for name, ok in zip(names, finite, strict=True) if not ok]
        raise UserError(
            f"{origin}: {plural(len(bad), 'camera pose')} with NaN, infinity or numbers beyond 1e12 "
            f"({list_first(bad)}); expected finite 4x4 camera-to-world matrices"
        )
    rotations = poses[:, :3, :3]
    deviation = np.abs(rotations @ rotations.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2))
    rigid = (deviation < 1e-2) & (np.linalg.det(rotations) > 0)
    if not rigid.all():
        bad = [name for name, ok in zip(names, rigid, strict=True) if not ok]
        raise UserError(
            f"{origin}: {plural(len(bad), 'camera pose')} whose 3x3 part is not a rotation ({list_first(bad)}); "
            "expected orthonormal axes, right-handed, without scale"
        )
    if poses.shape[1] == 4:
        last = np.abs(poses[:, 3] - [0.0, 0.0, 0.0, 1.0]).max(axis=1) < 1e-6
        if not last.all():
            bad = [name for name, ok in zip(names, last, strict=True) if not ok]
            row = ", ".join(f"{value:g}" for value in poses[~last][0, 3])
            raise UserError(
                f"{origin}: {plural(len(bad), 'camera pose')} whose last row is {row} ({list_first(bad)}); expected "
                "0, 0, 0, 1: are the matrices transposed?"
            )


def check_spread(poses: np.ndarray, origin: Any) -> None:
    """Refuses a scene without parallax, which would be scaled by one over zero.

    Raises:
        UserError: fewer than two views, or all from one point.
    """
    if len(poses) < 2:
        raise UserError(f"{origin} has {plural(len(poses), 'view')}; expected several, from different places")
    if np.ptp(np.asarray(poses)[:, :3, 3], axis=0).max() == 0:
        raise UserError(f"{origin}: all {len(poses)} cameras stand at one point; expected views from different places")


def read_sizes(
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
    refuse_missing([path for path in paths if not path.is_file()], len(paths), what)
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
            f"{len(unreadable)} of {plural(len(paths), what)} cannot be read ({list_first(unreadable)}); "
            "expected PNG, JPEG or another format that PIL opens"
        )
    if odd and modes is not None:
        raise UserError(
            f"{len(odd)} of {plural(len(paths), what)} in a pixel format whose numbers are no such colours "
            f"({list_first(odd)}); expected one of: {', '.join(modes.values())}"
        )
    return sizes


def refuse_missing(missing: Sequence[Any], count: int, what: str) -> None:
    """Refuses if files are missing.

    Args:
        missing: their names.
        count: how many there should be.
        what: what one of them is.

    Raises:
        UserError: some are missing.
    """
    if missing:
        raise UserError(
            f"{len(missing)} of {plural(count, what)} not found ({list_first(missing)}); "
            "expected every file that the camera file names"
        )


def check_lenses(cameras: Cameras, names: Sequence[str], where: str) -> None:
    """Refuses impossible numbers.

    Args:
        cameras: batch shape [n].
        names: what to call each of them.
        where: what they belong to, for the message.

    Raises:
        UserError: distortion that is not six finite numbers; a focal length below a tenth of the picture's width (of
            its height, in y), zero, or not a number; a principal point outside the middle half of the picture.
    """
    distortion = torch.zeros(len(names), 6) if cameras.distortion_params is None else cameras.distortion_params
    if distortion.shape[-1] != 6 or not distortion.isfinite().all():
        raise UserError(
            f"{where}: lens distortion {distortion.view(-1, distortion.shape[-1])[0].tolist()}; expected six "
            "finite numbers: k1, k2, k3, k4, p1, p2"
        )
    sides = {"fx": cameras.width, "fy": cameras.height, "cx": cameras.width, "cy": cameras.height}
    for name, side in sides.items():
        values, side = getattr(cameras, name).flatten().double(), side.flatten().double()
        if name[0] == "f":
            good = (values >= _SHORTEST_FOCAL * side) & (values < torch.inf)
        else:
            good = (values > _MIDDLE[0] * side) & (values < _MIDDLE[1] * side)
        if bool(good.all()):
            continue
        bad = [path for path, ok in zip(names, good.tolist(), strict=True) if not ok]
        value, length = values[~good][0].item(), side[~good][0].item()
        kind = cameras.camera_type.flatten()[~good][0].item()
        raise UserError(
            f"{where}: camera parameter {name} is {value:g} ({list_first(bad)}); {_right(name, value, length, kind)}"
        )


def _right(name: str, value: float, side: float, kind: float) -> str:
    """What would be right instead of an impossible number."""
    shares = 0 < value < 4 and side > 16  # of the picture: focal lengths are one or two, centres a half
    hint = ": is this a share of the picture? expected pixels" if shares else ""
    if name[0] == "c":
        if value > _MIDDLE[0] * side and not hint:
            hint = ": are these numbers of the full-size photos, and the images smaller ones?"
        low, high = (f"{share * side:g}" for share in _MIDDLE)
        return f"expected a point in the middle half of the image, {low} < {name} < {high}{hint}"
    if not 0 < value < math.inf:
        return "expected a positive number of pixels"
    view = ""
    if kind == CameraType.PERSPECTIVE.value:
        view = f", a view of {math.degrees(2 * math.atan(side / (2 * value))):.0f} degrees"
    words = "width" if name == "fx" else "height"
    return f"expected {_SHORTEST_FOCAL * side:g} pixels or more, a tenth of the image's {words} of {side:g}{view}{hint}"


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
            that disagree with the images'; poses that are not rigid; and what `check_lenses` refuses.
    """
    paths = outputs.image_filenames
    if split == "train" and len(paths) < min_train_views:
        raise UserError(f"the train split has {plural(len(paths), 'view')}; expected at least {min_train_views}")
    if not paths:
        raise UserError(
            f"the {split} split has no views; expected some held out: "
            "set eval-mode (interval holds out every eval-interval-th view), or list them in the camera file"
        )
    cameras = outputs.cameras
    poses = cameras.camera_to_worlds.cpu().numpy()
    check_poses(poses, [path.name for path in paths], f"{split} split")
    if split == "train":
        check_spread(poses, "train split")
    check_lenses(cameras, [path.name for path in paths], f"{split} split")

    expected = list(zip(cameras.width.flatten().tolist(), cameras.height.flatten().tolist(), strict=True))
    sizes = read_sizes(paths, "image", PHOTO_MODES, expected)
    wrong = [(path, size, want) for path, size, want in zip(paths, sizes, expected, strict=True) if size != want]
    if wrong:
        path, (width, height), (want_w, want_h) = wrong[0]
        raise UserError(
            f"{len(wrong)} of {plural(len(paths), 'image')} differ in size from the camera file: "
            f"{path} is {width}x{height}, its camera {want_w}x{want_h}; "
            "expected images of the cameras' size (or another downscale-factor)"
        )
    if outputs.mask_filenames is not None:
        mask_sizes = read_sizes(outputs.mask_filenames, "mask", MASK_MODES)
        for mask, mask_size, size in zip(outputs.mask_filenames, mask_sizes, sizes, strict=True):
            if not _fits(mask_size, size):
                raise UserError(
                    f"mask {mask} is {mask_size[0]}x{mask_size[1]}, its image {size[0]}x{size[1]}; "
                    "expected masks of the images' size, or a whole number of times as large"
                )


def _fits(mask: tuple[int, int], image: tuple[int, int]) -> bool:
    """Whether `read_mask` may fit a mask to its photo: it is of its size, or of the full-size photo's, but for rounding
    to whole pixels of the smaller one.
    """
    times = max(1, round(mask[0] / image[0]))
    return max(abs(mask[0] - times * image[0]), abs(mask[1] - times * image[1])) <= times
