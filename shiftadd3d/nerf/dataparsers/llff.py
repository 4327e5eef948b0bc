"""LLFF's scenes: `poses_bounds.npy` with `images` or `images_N`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from nerfstudio.cameras.cameras import CameraType

from shiftadd3d._errors import UserError
from shiftadd3d.nerf.dataparsers.checks import check_poses, check_spread, plural, read_sizes
from shiftadd3d.nerf.dataparsers.files import choose_factor, downscaled_folders, image_files, is_map, say
from shiftadd3d.nerf.dataparsers.scene import Scene


def read_llff(data: Path, requested_factor: float | None) -> Scene:
    """One row of `poses_bounds.npy` per image (sorted by name): a 3x5 matrix [R | t | (height, width, focal)] and the
    nearest and farthest depth.

    R's columns are the camera's [down, right, back] axes in the world, nerfstudio's are [right, up, back]. Height,
    width and focal length are those of the full-size photos, whichever images are read.

    Args:
        data: the scene's folder.
        requested_factor: which images_N to read; the largest of at most 1600 px if None.

    Raises:
        UserError: a missing or malformed `poses_bounds.npy`; a number of images other than its number of rows.
    """
    path = data / "poses_bounds.npy"
    poses, intrinsics, bounds = _read_poses_bounds(path)
    factor, images = _find_images(data, len(poses), int(intrinsics[:, :2].max()), requested_factor)
    check_poses(poses, [image.name for image in images], path)
    check_spread(poses, path)
    # The images' own size, since the programs that made images_N round it as they please.
    full = intrinsics[:, [1, 0]]
    expected = [(round(width / factor), round(height / factor)) for width, height in full.tolist()]
    sizes = np.array(read_sizes(images, "image", expected=expected), dtype=np.float64).reshape(-1, 2)
    return Scene(
        origin=path,
        images=images,
        poses=poses,
        focal=intrinsics[:, 2:] * sizes / full,
        centre=sizes / 2,
        sizes=np.round(full / factor).astype(np.int64),
        distortion=np.zeros((len(images), 6)),
        types=[CameraType.PERSPECTIVE] * len(images),
        sizes_may_be_rounded=True,
        masks=_find_masks(data, images, factor),
        bounds=bounds,
    )


def _find_images(data: Path, count: int, longest_side: int, requested: float | None) -> tuple[int, list[Path]]:
    """(downscale factor, images) whose number is that of the poses."""
    folders = {factor: image_files(folder) for factor, folder in downscaled_folders(data / "images").items()}
    for factor, files in folders.items():
        pictures = [path for path in files if not is_map(path)]
        if len(files) != count == len(pictures):  # depth maps beside the pictures
            folders[factor] = pictures
    complete = [factor for factor, files in folders.items() if len(files) == count]
    if folders and not complete:
        have = ", ".join(f"{len(files)} in images{f'_{f}' if f > 1 else ''}" for f, files in folders.items())
        raise UserError(f"{data}: poses_bounds.npy has {count} poses, but there are {have}; expected one image each")
    factor = choose_factor(requested, complete, longest_side, data)
    if requested is None:
        say(f"LLFF downscale factor of {factor}")
    return factor, folders[factor]


def _find_masks(data: Path, images: list[Path], factor: int) -> list[Path | None]:
    folders = downscaled_folders(data / "masks")
    folder = folders.get(factor) or folders.get(1)  # those of the full-size photos
    masks = {} if folder is None else {path.stem: path for path in image_files(folder)}
    if not masks:
        return []
    found = [masks.get(path.stem) for path in images]
    without = sum(mask is None for mask in found)
    if without:
        say(f"{data}: {without} of {plural(len(images), 'image')} have no mask; all their pixels are used")
    return found


def _read_poses_bounds(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Poses [n, 4, 4] (camera-to-world, OpenGL axes), [n, 3] (height, width, focal in pixels), bounds [n, 2]."""
    if not path.is_file():
        raise UserError(f"{path} not found; expected an LLFF folder, with poses_bounds.npy and images or images_N")
    try:
        rows = np.load(path, allow_pickle=False)
        if not isinstance(rows, np.ndarray):
            raise ValueError("it is an archive of several arrays")
    except Exception as error:  # numpy reads the header with Python's own tokenizer, which fails in ways of its own
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} cannot be read as a .npy file ({reason}); expected an array of numbers") from error
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
    if not (np.isfinite(intrinsics).all() and (intrinsics > 0).all() and (intrinsics < 1e6).all()):
        raise UserError(
            f"{path}: height, width or focal length is not positive; expected pixels of the full-size photos"
        )
    if not (np.isfinite(bounds).all() and (bounds[:, 0] > 0).all() and (bounds[:, 0] < bounds[:, 1]).all()):
        raise UserError(f"{path}: depth bounds are not 0 < near < far; expected two positive depths in every row")
    return poses, intrinsics, bounds
