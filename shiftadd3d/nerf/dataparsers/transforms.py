"""Camera files of the `transforms.json` kind, as nerfstudio, instant-ngp, Blender and many apps write them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from nerfstudio.cameras.cameras import CameraType

from shiftadd3d._errors import UserError
from shiftadd3d.nerf.dataparsers.checks import (
    check_poses,
    check_spread,
    list_first,
    plural,
    read_sizes,
    refuse_missing,
)
from shiftadd3d.nerf.dataparsers.files import Folder, choose_factor, image_files, is_map, say, side_of
from shiftadd3d.nerf.dataparsers.keys import refuse_keys, says_nothing, shown, unknown_keys, unknown_keys_line
from shiftadd3d.nerf.dataparsers.lens import CAMERA_MODELS, NUMBERS, Lens, lens_of, say_where_numbers_disagree
from shiftadd3d.nerf.dataparsers.scene import Scene, say_what_is_held_out

_AXES = {
    "opengl": np.diag([1.0, 1.0, 1.0, 1.0]),
    "opencv": np.diag([1.0, -1.0, -1.0, 1.0]),
    "mitsuba": np.diag([-1.0, 1.0, -1.0, 1.0]),
}
"""From a camera's axes in a file to OpenGL's."""
_POSE_KEYS = ("transform_matrix", "transform_matrix_start", "transform_matrix_end")
_CONVENTIONS = {
    "opengl": "opengl", "blender": "opengl", "nerf": "opengl", "nerfstudio": "opengl",
    "opencv": "opencv", "colmap": "opencv",
}  # fmt: skip

# --------------------------------------------------------------------------------------------------------------------
# JSON
# --------------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """What a JSON file holds. A byte-order mark, UTF-16 and UTF-32 are read.

    Raises:
        UserError: not JSON, with line, column and what is wrong there; a key that is there twice.
    """
    try:
        data = path.read_bytes()
        text = data.decode(json.detect_encoding(data)).removeprefix("\ufeff")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); expected a JSON file") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON: byte {error.start} is no {error.encoding}; expected UTF-8"
        ) from error
    if not text.strip():
        raise UserError(f"{path} is not valid JSON: it is empty")
    try:
        return json.loads(text, object_pairs_hook=_without_twins)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {_what_is_wrong(text, error)}"
        ) from error
    except _TwinError as error:
        raise UserError(
            f"{path}: the key {shown(error.key)} is there twice, with different values; expected it once"
        ) from error
    except (RecursionError, ValueError) as error:
        reason = "brackets nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise UserError(f"{path} is not valid JSON: {reason}") from error


class _TwinError(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise _TwinError(key)
        found[key] = value
    return found


def _what_is_wrong(text: str, error: json.JSONDecodeError) -> str:
    before, after = text[: error.pos].rstrip(), text[error.pos :].lstrip()
    if after[:1] in ("]", "}") and before.endswith(","):
        return f"a comma before {after[0]}; expected none after the last entry"
    if error.msg.startswith("Illegal trailing comma"):
        return "a comma after the last entry; expected none"
    if after[:2] in ("//", "/*") or after[:1] == "#":
        return "a comment; expected none in JSON"
    if after[:1] == "'":
        return "a name in single quotes; expected double ones"
    if not after:
        return f"the file ends too early ({error.msg})"
    return f"{error.msg}, found {shown(after.split(maxsplit=1)[0][:20])}"


# --------------------------------------------------------------------------------------------------------------------
# One file
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class CameraFile:
    """A camera file whose frames all have a name and a pose."""

    path: Path
    meta: dict[str, Any]
    """All but the frames."""
    frames: list[dict[str, Any]]
    poses: np.ndarray
    """[n, 4, 4] float64, camera to world, OpenGL axes."""

    def where(self, index: int) -> str:
        """What to call a frame in messages."""
        return f"{self.path}, {self.frames[index]['file_path']}"


def count_frames(path: Path) -> int | None:
    """How many frames a JSON file lists; None if it is no camera file (or none that can be read)."""
    try:
        meta = read_json(path)
    except UserError:
        return None
    frames = meta.get("frames") if isinstance(meta, dict) else None
    return len(frames) if isinstance(frames, list) else None


def read_camera_file(path: Path, may_be_empty: bool = False) -> CameraFile:
    """Reads and checks a camera file. Does not check lenses and pictures.

    Args:
        path: the file.
        may_be_empty: whether a file without frames is accepted. A split may be empty.

    Raises:
        UserError: not JSON; no frames; a frame without a name; a pose that is not a matrix; values of a wrong kind;
            keys that are not supported.
    """
    content = read_json(path)
    frames = content.get("frames") if isinstance(content, dict) else None
    if isinstance(content, dict) and may_be_empty and frames in ([], None):
        return CameraFile(path, {}, [], np.empty((0, 4, 4)))
    if not isinstance(frames, list) or not frames:
        raise UserError(f"{path} has no frames; expected a list of {{file_path, transform_matrix}}")
    meta = _without_nulls({key: value for key, value in content.items() if key != "frames"})
    refuse_keys(meta, str(path))
    _check_values(meta, str(path))
    for index, frame in enumerate(frames):
        if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str) or not frame["file_path"].strip():
            raise UserError(f"{path}: frame {index} has no file_path; expected one in every frame")
    frames = [_without_nulls(frame) for frame in frames]
    unknown = unknown_keys(frames, meta)
    bad = sum(frame.get("is_bad") is True for frame in frames)
    if bad:
        say(f"{path}: {bad} of {plural(len(frames), 'frame')} are marked is_bad and left out")
        frames = [frame for frame in frames if frame.get("is_bad") is not True]
    poses = []
    for frame in frames:
        where = f"{path}, {frame['file_path']}"
        frame = dict(frame)
        poses.append(_pose(path, frame))
        for name in _POSE_KEYS[1:]:
            frame.pop(name, None)
        refuse_keys(frame, where)
        _check_values(frame, where)
    stacked = np.stack(poses) if poses else np.empty((0, 4, 4))
    check_poses(stacked, [frame["file_path"] for frame in frames], path)
    _refuse_motion(path, frames)
    if unknown:
        say(unknown_keys_line(path, unknown))
    return CameraFile(path, meta, frames, stacked @ _AXES[_axes(path, meta)])


def _without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without keys whose value is null: programs write null for what they do not have."""
    return {key: value for key, value in values.items() if value is not None}


def _pose(path: Path, frame: Mapping[str, Any]) -> np.ndarray:
    name = frame["file_path"]
    stated = {key: frame[key] for key in _POSE_KEYS if key in frame}
    matrix = next(iter(stated.values()), None)
    if any(other != matrix for other in stated.values()):
        raise UserError(
            f"{path}: {', '.join(stated)} of {name} differ, which is not supported; expected one pose of every picture"
        )
    try:
        pose = np.array(matrix, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        pose = np.empty(0)
    if pose.shape == (3, 4):
        pose = np.concatenate([pose, [[0.0, 0.0, 0.0, 1.0]]])
    if pose.shape != (4, 4):
        raise UserError(f"{path}: transform_matrix of {name} is not a 4x4 matrix of numbers")
    return pose


def _axes(path: Path, meta: Mapping[str, Any]) -> str:
    said = {}
    for key in ("camera_convention", "coordinate_system"):
        if not says_nothing(meta.get(key)):
            value = meta[key]
            convention = _CONVENTIONS.get(value.lower()) if isinstance(value, str) else None
            if convention is None:
                raise UserError(f"{path}: {key} is {shown(value)}; expected opengl or opencv")
            said[key] = convention
    if not says_nothing(meta.get("from_na")):
        said["from_na"] = "opencv"
    if "normal_mts_args" in meta:
        said["normal_mts_args"] = "mitsuba"
    if len(set(said.values())) > 1:
        raise UserError(
            f"{path}: {' and '.join(said)} contradict each other on the axes of the matrices; expected one of them"
        )
    return next(iter(said.values()), "opengl")


def _refuse_motion(path: Path, frames: Sequence[Mapping[str, Any]]) -> None:
    """D-NeRF's `time` runs from 0 to 1 while the scene moves; a clock's seconds say nothing."""
    times = {
        float(numbers(frame["time"])) for frame in frames if "time" in frame and numbers(frame["time"]).shape == ()
    }
    if len(times) > 1 and min(times) >= 0 and max(times) <= 1:
        raise UserError(
            f"{path}: time is {min(times):g} to {max(times):g}, which is not supported; expected a scene that stands "
            "still, not another state of it in every picture"
        )


def _check_values(values: Mapping[str, Any], where: str) -> None:
    """Refuses values that are not what their key says, in a camera file or one of its frames.

    Raises:
        UserError: the key, its value, and what was expected.
    """
    for key, value in values.items():
        if key in NUMBERS and numbers(value).shape != ():
            expected = "a number"
        elif (key == "applied_scale" and float(value) <= 0) or (
            key == "depth_unit_scale_factor" and not _is_length(value)
        ):
            expected = "a positive number"
        elif key in ("w", "h", "width", "height") and not 1 <= float(value) < 1e6:
            expected = "a number of pixels"
        elif key == "distortion_params" and numbers(value).shape != (6,):
            expected = "six numbers: k1, k2, k3, k4, p1, p2"
        elif key == "camera_model" and not (isinstance(value, str) and value.upper() in CAMERA_MODELS):
            expected = f"one of: {', '.join(CAMERA_MODELS)}"
        elif key in ("is_fisheye", "from_na", "is_bad") and value not in (True, False, None):
            expected = "true or false"
        elif key == "mask_path" and not isinstance(value, str):
            expected = "the name of a file"
        elif key == "orientation_override" and value not in ("pca", "up", "vertical", "none"):
            expected = "one of: pca, up, vertical, none"
        elif key == "applied_transform" and not _is_motion(value):
            expected = "a 3x4 matrix of numbers whose 3x3 part is a rotation or a reflection"
        elif key == "fisheye_crop_radius" and value is not None and not _is_length(value):
            expected = "a positive number of pixels"
        elif key in ("train_filenames", "val_filenames", "test_filenames") and not (
            isinstance(value, list) and all(isinstance(name, str) for name in value)
        ):
            expected = "a list of file names"
        else:
            continue
        raise UserError(f"{where}: {key} is {shown(value)}; expected {expected}")


def _is_length(value: Any) -> bool:
    return not isinstance(value, bool) and numbers(value).shape == () and float(value) > 0


def numbers(value: Any) -> np.ndarray:
    """A value from JSON as an array of numbers. Of shape [0] if it is not numbers, or not finite."""
    try:
        found = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return np.empty(0)
    return found if np.isfinite(found).all() else np.empty(0)


def _is_motion(value: Any) -> bool:
    matrix = numbers(value)
    if matrix.shape not in ((3, 4), (4, 4)):
        return False
    return bool(np.abs(matrix[:3, :3] @ matrix[:3, :3].T - np.eye(3)).max() < 1e-2)


def _near_far_hint(meta: Mapping[str, Any], path: Path) -> tuple[float, float] | None:
    """(near, far) of the block `"shiftadd3d"`, in the units of the file's matrices.

    Raises:
        UserError: one of them is missing, or not 0 < near < far.
    """
    block = meta.get("shiftadd3d")
    if block is None:
        return None
    try:
        near, far = float(block["near"]), float(block["far"])
    except (LookupError, TypeError, ValueError, OverflowError):
        raise UserError(f'{path}: "shiftadd3d" is {shown(block)}; expected {{"near": ..., "far": ...}}') from None
    if not 0 < near < far < float("inf"):
        raise UserError(f'{path}: "shiftadd3d" has near {block["near"]}, far {block["far"]}; expected 0 < near < far')
    return near, far


# --------------------------------------------------------------------------------------------------------------------
# Scenes
# --------------------------------------------------------------------------------------------------------------------


def read_transforms(path: Path, requested_factor: float | None) -> Scene:
    """The scene of one camera file.

    Args:
        path: the file; names in it are relative to its folder.
        requested_factor: which images_N to read; the largest of at most 1600 px if None.

    Raises:
        UserError: what `read_camera_file`, `lens_of` and `choose_factor` refuse; pictures and masks that are not there;
            a picture that is listed twice with different poses; split lists that name no view.
    """
    file = read_camera_file(path)
    check_spread(file.poses, path)
    order = sorted(range(len(file.frames)), key=lambda i: _parts(file.frames[i]["file_path"]))
    file = CameraFile(path, file.meta, [file.frames[i] for i in order], file.poses[order])
    folder = Folder(path.parent)
    factor = _factor(file, folder, requested_factor)
    scene, _ = assemble([file], folder, factor)
    read_settings(scene, file)
    if "applied_transform" not in file.meta and (path.parent / "colmap/sparse/0").exists():
        # What ns-process-data did before it wrote it down.
        scene.applied_transform = np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1]], dtype=np.float64)
    scene.default_eval_mode = "fraction"  # as nerfstudio has it
    scene.splits = _listed_splits(file, scene, folder, factor)
    say_what_is_held_out(scene, {name: f"{name}_filenames" for name in ("train", "val", "test")})
    return scene


def read_settings(scene: Scene, file: CameraFile) -> None:
    """Take over what a file says of the whole scene: near and far, which side is up, earlier changes of the matrices.

    Raises:
        UserError: the block `"shiftadd3d"` does not hold what it should.
    """
    scene.near_far = _near_far_hint(file.meta, file.path)
    scene.orientation = file.meta.get("orientation_override", scene.orientation)
    scene.applied_scale = float(file.meta.get("applied_scale", 1.0))
    scene.depth_unit = float(file.meta.get("depth_unit_scale_factor", scene.depth_unit))
    if "applied_transform" in file.meta:
        scene.applied_transform = np.eye(4)
        scene.applied_transform[:3] = numbers(file.meta["applied_transform"])[:3]


def _parts(written: str) -> tuple[str, ...]:
    """A written name's folders and file, without `./`."""
    return PurePosixPath(written.replace("\\", "/")).parts


def _find(folder: Folder, written: str, factor: int, prefix: str) -> Path | None:
    """The file of a written name among those that are `factor` times smaller."""
    if factor == 1:
        return folder.find(written)
    parts = _parts(written)
    # Subfolders are kept, if they are; nerfstudio puts everything beside each other.
    tails = [parts[start:] for start in range(1, len(parts))] or [parts]
    for tail in tails:
        found = folder.find("/".join((f"{prefix}_{factor}", *tail)))
        if found is not None:
            return found
    return None


def _factor(file: CameraFile, folder: Folder, requested: float | None) -> int:
    names = [frame["file_path"] for frame in file.frames]
    first = {1: folder.find(names[0])}
    for path in folder.path.glob("images_*"):
        number = path.name.removeprefix("images_")
        if path.is_dir() and number.isdecimal() and int(number) > 1:
            first[int(number)] = _find(folder, names[0], int(number), "images")
    found = {factor: path for factor, path in first.items() if path is not None}
    if not found:
        missing = [folder.path / name for name in names if folder.find(name) is None]
        refuse_missing(missing, len(names), "image")
    factor, path = min(found.items())
    same = [p for p in (_find(folder, name, factor, "images") for name in names) if p is not None]
    return choose_factor(requested, list(found), side_of(path, same) * factor, folder.path)


def assemble(files: Sequence[CameraFile], folder: Folder, factor: int) -> tuple[Scene, list[list[int]]]:
    """The views of some camera files.

    Args:
        files: at least one of them with frames.
        folder: what names are relative to.
        factor: how many times smaller than the cameras the pictures to read are.

    Returns:
        The scene, and which of its views each file has.
    """
    images: list[Path] = []
    masks: list[Path | None] = []
    depths: list[Path | None] = []
    poses: list[np.ndarray] = []
    lenses: list[tuple[Lens, str]] = []
    missing: list[Path] = []
    missing_masks: list[Path] = []
    groups: list[list[int]] = []
    radii: set[float] = set()
    without_circle = count = masked = 0
    for file in files:
        seen: dict[Path, int] = {}
        twice = 0
        groups.append([])
        for index, frame in enumerate(file.frames):
            count += 1
            image = _find(folder, frame["file_path"], factor, "images")
            if image is None:
                missing.append(folder.path / frame["file_path"])
                continue
            if image in seen:
                if np.abs(poses[seen[image]] - file.poses[index]).max() > 1e-6 * max(
                    1.0, np.abs(file.poses[index]).max()
                ):
                    raise UserError(
                        f"{file.path}: {frame['file_path']} is listed twice with different poses; expected one"
                    )
                twice += 1
                continue
            seen[image] = len(images)
            groups[-1].append(len(images))
            where = file.where(index)
            lens = lens_of(file.meta, frame, where)
            lenses.append((lens, where))
            crop = frame.get("fisheye_crop_radius", file.meta.get("fisheye_crop_radius"))
            if crop is not None and lens.kind == CameraType.FISHEYE:
                radii.add(float(crop))
            elif crop is not None:
                without_circle += 1
            mask = None
            written = frame.get("mask_path", file.meta.get("mask_path")) or None
            if written is not None:
                masked += 1
                mask = _find(folder, written, factor, "masks") or folder.find(written)
                if mask is None:
                    missing_masks.append(folder.path / written)
            masks.append(mask)
            depth = frame.get("depth_file_path")
            depths.append(_find(folder, depth, factor, "depths") if isinstance(depth, str) else None)
            images.append(image)
            poses.append(file.poses[index])
        if twice:
            say(f"{file.path}: {plural(twice, 'frame')} listed twice; each is read once")
    refuse_missing(missing, count, "image")
    refuse_missing(missing_masks, masked, "mask")
    if 0 < masked < len(images):
        say(
            f"{files[0].path}: {len(images) - masked} of {plural(len(images), 'frame')} have no mask_path; all their "
            "pixels are used"
        )
    if without_circle:
        say(f"{files[0].path}: fisheye_crop_radius is not used where the lens is no fisheye")
    if len(radii) > 1:
        raise UserError(
            f"{files[0].path}: fisheye_crop_radius is {list_first(sorted(radii))}; expected one for all frames"
        )
    scene = _with_lenses(files[0].path, images, np.stack(poses), lenses, factor)
    scene.masks = masks if masked else []
    known = [depth for depth in depths if depth is not None]
    scene.depths = known if len(known) == len(images) else []
    scene.crop_radius = next(iter(radii), 0.0) / factor or None
    _look_beside(files[0], scene)
    return scene, groups


def _with_lenses(
    origin: Path, images: list[Path], poses: np.ndarray, lenses: Sequence[tuple[Lens, str]], factor: int
) -> Scene:
    unsized = [i for i, (lens, _) in enumerate(lenses) if lens.width is None or lens.height is None]
    sizes = dict(zip(unsized, read_sizes([images[i] for i in unsized], "image"), strict=True))
    full = np.empty((len(images), 2))
    focal, centre = np.empty((len(images), 2)), np.empty((len(images), 2))
    for i, (lens, where) in enumerate(lenses):
        width, height = sizes.get(i, (0, 0))
        full[i] = lens.width or width * factor, lens.height or height * factor
        focal[i] = lens.focal_lengths(float(full[i, 0]), float(full[i, 1]), where)
        centre[i] = (
            full[i, 0] / 2 if lens.cx is None else lens.cx,
            full[i, 1] / 2 if lens.cy is None else lens.cy,
        )
    if lenses:
        say_where_numbers_disagree(lenses[0][0], float(full[0, 0]), float(full[0, 1]), lenses[0][1])
    return Scene(
        origin=origin,
        images=images,
        poses=poses,
        focal=focal / factor,
        centre=centre / factor,
        sizes=np.floor(full / factor + 1e-6).astype(np.int64),
        distortion=np.stack([lens.distortion for lens, _ in lenses]),
        types=[lens.kind for lens, _ in lenses],
        sizes_may_be_rounded=factor > 1,
    )


def _look_beside(file: CameraFile, scene: Scene) -> None:
    """Print what lies beside the pictures and is not read. Refuse instant-ngp's files of rays."""
    if not scene.masks:
        for name in ("mask", "masks"):
            found = image_files(file.path.parent / name)
            if found and not set(found) & set(scene.images):
                say(
                    f"{file.path}: {plural(len(found), 'picture')} in {name} are not read; expected mask_path in the "
                    "frames, if they are masks"
                )
    folders = dict.fromkeys(image.parent for image in scene.images)
    known = {*scene.images, *scene.depths, *(mask for mask in scene.masks if mask is not None)}
    beside = [path for folder in folders for path in image_files(folder) if path not in known]
    others = [path for path in beside if not is_map(path)]
    if others:
        say(
            f"{file.path}: {len(others)} of {plural(len(others) + len(scene), 'photo')} beside each other are in no "
            f"frame and are left out ({list_first([path.name for path in others])})"
        )
    masks = [path for path in beside if path.name.startswith("dynamic_mask_")]
    if masks:
        say(
            f"{file.path}: instant-ngp's {plural(len(masks), 'dynamic_mask')} beside the pictures are not read; "
            "expected mask_path, white where a pixel may be used"
        )
    if not says_nothing(file.meta.get("enable_ray_loading", True)):
        rays = [image for image in scene.images if image.with_name(f"rays_{image.stem}.dat").is_file()]
        if rays:
            raise UserError(
                f"{file.path}: instant-ngp's rays_{rays[0].stem}.dat has rays of its own, which is not supported: "
                "expected a lens (enable_ray_loading false leaves the file alone)"
            )


def _listed_splits(file: CameraFile, scene: Scene, folder: Folder, factor: int) -> dict[str, list[int]]:
    """Views of `train_filenames` and so on.

    Raises:
        UserError: names that are of no frame.
    """
    found: dict[str, list[int]] = {}
    views = {path: index for index, path in enumerate(scene.images)}
    for split in ("train", "val", "test"):
        names = file.meta.get(f"{split}_filenames")
        if names is None:
            continue
        paths = [_find(folder, name, factor, "images") for name in names]
        strangers = [name for name, path in zip(names, paths, strict=True) if path is None or path not in views]
        if strangers:
            raise UserError(
                f"{file.path}: {split}_filenames lists {plural(len(strangers), 'name')} that no frame has "
                f"({list_first(strangers)}); expected file_path of frames"
            )
        found[split] = sorted({views[path] for path in paths if path is not None})
    return found
