"""COLMAP's models, text and binary: https://colmap.github.io/format.html.

nerfstudio's reader splits file names at blanks and needs all files of a model. This one does not. `rigs` and `frames`
files (COLMAP 3.12 and later) repeat what `images` says of each photo. They are not read.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from nerfstudio.cameras.cameras import CameraType
from nerfstudio.data.utils.colmap_parsing_utils import qvec2rotmat

from shiftadd3d._errors import UserError
from shiftadd3d.nerf.dataparsers.checks import list_first, plural, refuse_missing
from shiftadd3d.nerf.dataparsers.files import (
    IMAGE_SUFFIXES,
    Folder,
    choose_factor,
    downscaled_folders,
    is_map,
    say,
    side_of,
)
from shiftadd3d.nerf.dataparsers.scene import Scene, say_what_is_held_out

#: From COLMAP's world, in which y is down if anything is, to nerfstudio's, in which z is up.
WORLD = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]], dtype=np.float64)

_MODELS: dict[str, tuple[int, str]] = {
    # name: (number in binary files, what its parameters are)
    "SIMPLE_PINHOLE": (0, "f cx cy"),
    "PINHOLE": (1, "fx fy cx cy"),
    "SIMPLE_RADIAL": (2, "f cx cy k1"),
    "RADIAL": (3, "f cx cy k1 k2"),
    "OPENCV": (4, "fx fy cx cy k1 k2 p1 p2"),
    "OPENCV_FISHEYE": (5, "fx fy cx cy k1 k2 k3 k4"),
    "FULL_OPENCV": (6, "fx fy cx cy k1 k2 p1 p2 k3 d1 d2 d3"),  # d: in the denominator
    "FOV": (7, "fx fy cx cy omega"),
    "SIMPLE_RADIAL_FISHEYE": (8, "f cx cy k1"),
    "RADIAL_FISHEYE": (9, "f cx cy k1 k2"),
    "THIN_PRISM_FISHEYE": (10, "fx fy cx cy k1 k2 p1 p2 k3 k4 sx1 sy1"),
}
_READABLE = (
    "SIMPLE_PINHOLE, PINHOLE, SIMPLE_RADIAL, RADIAL, OPENCV, OPENCV_FISHEYE, SIMPLE_RADIAL_FISHEYE or RADIAL_FISHEYE"
)
_EXPECTED = f"expected whole files of cameras and images, with cameras of type {_READABLE}"
_DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")


Content = TypeVar("Content")


@dataclass
class ColmapCamera:
    """One camera of a model: its COLMAP name, size in pixels and parameters."""

    model: str
    width: int
    height: int
    parameters: tuple[float, ...]


@dataclass
class ColmapImage:
    """One photo of a model, world to camera."""

    number: int
    quaternion: tuple[float, ...]
    """w, x, y, z."""
    translation: tuple[float, ...]
    camera: int
    name: str


@dataclass
class ColmapModel:
    """A model without its points."""

    folder: Path
    suffix: str
    """.txt or .bin."""
    cameras: dict[int, ColmapCamera]
    images: list[ColmapImage]
    """Sorted by number."""


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def read_model(folder: Path, suffix: str) -> ColmapModel:
    """Reads `cameras` and `images`.

    Args:
        folder: e.g. sparse/0.
        suffix: ".txt" or ".bin".

    Raises:
        UserError: files that are missing, break off, or hold something else; a model without photos.
    """
    text = suffix == ".txt"
    cameras = _guarded(folder / f"cameras{suffix}", _cameras_text if text else _cameras_binary)
    images = _guarded(folder / f"images{suffix}", _images_text if text else _images_binary)
    if not images:
        raise UserError(f"{folder}: the COLMAP model has no images; expected some in images{suffix}")
    lost = [image.name for image in images if image.camera not in cameras]
    if lost:
        raise UserError(
            f"{folder}: {plural(len(lost), 'image')} of a camera that is not in cameras{suffix} ({list_first(lost)}); "
            + _EXPECTED
        )
    return ColmapModel(folder, suffix, cameras, sorted(images, key=lambda image: image.number))


def _guarded(path: Path, read: Callable[[Path], Content]) -> Content:
    try:
        return read(path)
    except UserError:
        raise
    except (OSError, ValueError, IndexError, OverflowError, MemoryError, struct.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as a colmap scene ({reason[:120]}); {_EXPECTED}") from error


def _lines(path: Path) -> list[str]:
    """Lines without comments. Blank lines stay: they mean something in images.txt."""
    text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    return [line for line in text.replace("\r\n", "\n").split("\n") if not line.lstrip().startswith("#")]


def _cameras_text(path: Path) -> dict[int, ColmapCamera]:
    cameras = {}
    for line in _lines(path):
        if not line.strip():
            continue
        number, model, width, height, *parameters = line.split()
        cameras[int(number)] = _camera(path, model, int(width), int(height), tuple(map(float, parameters)))
    return cameras


def _cameras_binary(path: Path) -> dict[int, ColmapCamera]:
    names = {number: name for name, (number, _) in _MODELS.items()}
    cameras = {}
    with path.open("rb") as file:
        for _ in range(_count(file, least=24)):
            number, model, width, height = _unpack(file, "<iiQQ")
            if model not in names:
                raise ValueError(f"camera {number} is of type number {model}")
            parameters = _unpack(file, f"<{len(_MODELS[names[model]][1].split())}d")
            cameras[number] = _camera(path, names[model], width, height, parameters)
    return cameras


def _camera(path: Path, model: str, width: int, height: int, parameters: tuple[float, ...]) -> ColmapCamera:
    if model not in _MODELS:
        raise ValueError(f"a camera is of type {model}")
    expected = _MODELS[model][1]
    if len(parameters) != len(expected.split()):
        raise ValueError(f"a camera of type {model} has {len(parameters)} parameters, not {expected}")
    if not np.isfinite(parameters).all():
        raise ValueError(f"a camera of type {model} has parameters that are not finite")
    if not (0 < width < 1_000_000 and 0 < height < 1_000_000):
        raise ValueError(f"a camera is of {width}x{height} pixels")
    return ColmapCamera(model, width, height, parameters)


def _images_text(path: Path) -> list[ColmapImage]:
    images = []
    lines = iter(_lines(path))
    line = next(lines, None)
    while line is not None:
        if not line.strip():
            line = next(lines, None)
            continue
        # A name may have blanks in it, also at its end.
        head = line.lstrip().split(maxsplit=9)
        if len(head) != 10:
            raise ValueError(f"{line.strip()[:40]!r} is no image")
        number, *pose, camera, name = head
        values = tuple(map(float, pose))
        images.append(ColmapImage(int(number), values[:4], values[4:], int(camera), name))
        line = next(lines, None)
        if line is not None and not _is_image_line(line):
            line = next(lines, None)  # the points seen in it
    return images


def _is_image_line(line: str) -> bool:
    """Whether this is an image's line where a line of points was due. Models of known poses may lack those lines.
    Points are numbers only."""
    head = line.split(maxsplit=9)
    if len(head) != 10:
        return False
    try:
        [float(value) for value in head[9].split()]
    except ValueError:
        return True
    return False


def _images_binary(path: Path) -> list[ColmapImage]:
    images = []
    size = path.stat().st_size
    with path.open("rb") as file:
        for _ in range(_count(file, least=73)):
            number, *pose, camera = _unpack(file, "<i7di")
            name = bytearray()
            while (letter := file.read(1)) != b"\0":
                if not letter:
                    raise ValueError("it breaks off in a name")
                name += letter
            (points,) = _unpack(file, "<Q")
            if points * 24 > size - file.tell():
                raise ValueError(f"it breaks off in the points of {name[:40].decode(errors='replace')}")
            file.seek(points * 24, os.SEEK_CUR)
            text = bytes(name).decode("utf-8", errors="surrogateescape")
            images.append(ColmapImage(number, tuple(pose[:4]), tuple(pose[4:]), camera, text))
    return images


def _count(file: BinaryIO, least: int) -> int:
    """The number of entries that starts a binary file. That many must fit into the rest, of `least` bytes or more."""
    (count,) = _unpack(file, "<Q")
    rest = os.fstat(file.fileno()).st_size - file.tell()
    if count * least > rest:
        raise ValueError(f"it says {count} entries and has {rest} bytes")
    return count


def _unpack(file: BinaryIO, form: str) -> tuple:
    data = file.read(struct.calcsize(form))
    if len(data) < struct.calcsize(form):
        raise ValueError("it breaks off")
    return struct.unpack(form, data)


def read_points(folder: Path) -> dict[str, np.ndarray]:
    """`points3D` as nerfstudio's metadata has them: COLMAP's frame, float64. Empty without such a file.

    A file that cannot be read counts as missing, and a line says so. Near and far are then found without points.

    Args:
        folder: of the model.
    """
    path = next((p for p in (folder / "points3D.bin", folder / "points3D.txt") if p.is_file()), None)
    if path is None:
        return {}
    try:
        rows = list(_points_binary(path) if path.suffix == ".bin" else _points_text(path))
    except (OSError, ValueError, IndexError, OverflowError, MemoryError, struct.error) as error:
        say(f"{path} cannot be read ({' '.join(str(error).split())[:120]}); near and far come from the pictures")
        return {}
    table = np.array(rows, dtype=np.float64).reshape(-1, 8)
    table = table[np.isfinite(table).all(axis=1)]
    if not len(table):
        return {}
    return {
        "points3D_xyz": table[:, :3],
        "points3D_rgb": table[:, 3:6].clip(0, 255).astype(np.uint8),
        "points3D_error": table[:, 6].astype(np.float32),
        "points3D_num_points2D": table[:, 7].astype(np.int64),
    }


def _points_text(path: Path) -> Iterator[tuple[float, ...]]:
    for line in _lines(path):
        if line.strip():
            values = line.split()
            if len(values) < 8:
                raise ValueError(f"{line.strip()[:40]!r} is no point")
            yield (*map(float, values[1:8]), (len(values) - 8) / 2)


def _points_binary(path: Path) -> Iterator[tuple[float, ...]]:
    with path.open("rb") as file:
        for _ in range(_count(file, least=51)):
            _, *values, track = _unpack(file, "<Q3d3BdQ")
            if track * 8 > os.fstat(file.fileno()).st_size - file.tell():
                raise ValueError("it breaks off")
            file.seek(track * 8, os.SEEK_CUR)
            yield (*values, track)


# --------------------------------------------------------------------------------------------------------------------
# Scenes
# --------------------------------------------------------------------------------------------------------------------


def find_models(data: Path) -> list[tuple[Path, str]]:
    """Folders of the scene that hold a model, and the model's form. A folder with both forms is there twice."""
    folders = [data]
    for parent in (data / "sparse", data / "colmap/sparse", data / "colmap"):
        folders += [parent, *(sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else [])]
    return [
        (folder, suffix)
        for folder in dict.fromkeys(folders)
        for suffix in (".txt", ".bin")  # the order in which nerfstudio looks
        if (folder / f"cameras{suffix}").is_file() and (folder / f"images{suffix}").is_file()
    ]


def count_photos(folder: Path, suffix: str) -> int:
    """How many photos a model has. 0 if it cannot be read."""
    try:
        return len(read_model(folder, suffix).images)
    except UserError:
        return 0


def choose_model(data: Path) -> ColmapModel:
    """The model with the most photos. A line names the others.

    Args:
        data: the scene's folder.

    Raises:
        UserError: there is none that can be read.
    """
    read, failed = _read_models(data)
    best = _largest(read)
    names = {image.name for image in best.images}
    others = [
        f"{_called(model, read, data)} ({plural(len(model.images), 'photo')})"
        for model in read
        if model is not best and not (model.folder == best.folder and {image.name for image in model.images} == names)
    ]
    others += [f"{path.relative_to(data)} (cannot be read)" for path in failed]
    if others:
        say(
            f"{data}: reads the COLMAP model {_called(best, read, data)} ({plural(len(best.images), 'photo')}); "
            f"also there: {list_first(others, 5)}"
        )
    return best


def _read_models(data: Path) -> tuple[list[ColmapModel], list[Path]]:
    """The models that can be read, at least one, and the images files of those that cannot."""
    read: list[ColmapModel] = []
    failed: dict[Path, UserError] = {}
    for folder, suffix in find_models(data):
        try:
            read.append(read_model(folder, suffix))
        except UserError as error:
            failed[folder / f"images{suffix}"] = error
    if not read:
        raise next(iter(failed.values()))
    return read, list(failed)


def _largest(models: Sequence[ColmapModel]) -> ColmapModel:
    return max(models, key=lambda model: len(model.images))  # the first of them


def _called(model: ColmapModel, models: Sequence[ColmapModel], data: Path) -> str:
    twice = sum(other.folder == model.folder for other in models) > 1
    path = model.folder / f"images{model.suffix}" if twice else model.folder
    return str(path.relative_to(data))


def has_renamed_images(data: Path) -> bool:
    """Whether some images_N lacks the model's file names (or there are no images of those names, or no whole model)."""
    try:
        name = _largest(_read_models(data)[0]).images[0].name
    except UserError:
        return True
    folders = downscaled_folders(data / "images").values()
    return not all(Folder(folder).find(name, ()) for folder in folders)


def read_colmap(data: Path, requested_factor: float | None) -> Scene:
    """The scene of the COLMAP model with the most photos.

    Args:
        data: holds the model (sparse/0 and so on) and the photos.
        requested_factor: which images_N to read; the largest of at most 1600 px if None.

    Raises:
        UserError: no model that can be read, photos that are missing, lenses that are not supported.
    """
    model = choose_model(data)
    twins = len(model.images) - len({image.name for image in model.images})
    if twins:
        raise UserError(f"{model.folder}: {plural(twins, 'name')} of photos are there twice; expected every photo once")
    names = [image.name for image in model.images]
    folders = _photo_folders(data, names)
    found = {factor: [Folder(folder).find(name, ()) for name in names] for factor, folder in folders.items()}
    counts = {factor: sum(path is not None for path in paths) for factor, paths in found.items()}
    usable = [factor for factor, count in counts.items() if count == max(counts.values()) > 0]
    if not usable:
        raise UserError(f"{data}: {names[0]}, of the COLMAP model {model.folder}, is in no folder images or images_N")
    best = [path for path in found[usable[0]] if path is not None]
    factor = choose_factor(requested_factor, usable, side_of(best[0], best) * usable[0], data)
    paths = found[factor]
    refuse_missing(
        [folders[factor] / n for n, path in zip(names, paths, strict=True) if path is None], len(names), "image"
    )
    images = [path for path in paths if path is not None]

    lenses = [_lens(model.folder, model.cameras[image.camera]) for image in model.images]
    sizes = np.array([[c.width, c.height] for c in (model.cameras[image.camera] for image in model.images)])
    scene = Scene(
        origin=model.folder,
        images=images,
        poses=np.stack([_pose(model.folder, image) for image in model.images]),
        focal=np.array([lens[0] for lens in lenses]) / factor,
        centre=np.array([lens[1] for lens in lenses]) / factor,
        sizes=np.floor(sizes / factor + 1e-6).astype(np.int64),
        distortion=np.stack([lens[2] for lens in lenses]),
        types=[lens[3] for lens in lenses],
        sizes_may_be_rounded=factor > 1,
        masks=_find_masks(data, names, factor),
        points=read_points(model.folder),
        applied_transform=WORLD,
    )
    if scene.points:
        scene.points["points3D_xyz"] = scene.points["points3D_xyz"] @ WORLD[:3, :3].T
    else:
        say(f"{model.folder}: no 3D points; near and far come from the pictures")
    _say_what_is_left_out(model, folders[factor], set(images))
    scene.splits = _listed_splits(data, names)
    say_what_is_held_out(scene, {"train": "train_list.txt", "val": "val_list.txt", "test": "test_list.txt"})
    return scene


def _pose(folder: Path, image: ColmapImage) -> np.ndarray:
    """Camera to world, OpenGL axes, z up; [4, 4] float64."""
    length = float(np.linalg.norm(image.quaternion))
    if not 1e-6 < length < 1e6:
        raise UserError(f"{folder}: the quaternion of {image.name} has length {length:g}; expected 1")
    rotation = qvec2rotmat(np.array(image.quaternion) / length)  # world to camera
    pose = np.eye(4)
    pose[:3, :3] = rotation.T
    pose[:3, 3] = -rotation.T @ np.array(image.translation)
    pose[:3, 1:3] *= -1
    return WORLD @ pose


def _lens(
    folder: Path, camera: ColmapCamera
) -> tuple[tuple[float, float], tuple[float, float], np.ndarray, CameraType]:
    """Focal lengths, centre, nerfstudio's distortion and kind."""
    values = dict(zip(_MODELS[camera.model][1].split(), camera.parameters, strict=True))
    fisheye = "FISHEYE" in camera.model
    extra = {
        key: value for key, value in values.items() if key in ("d1", "d2", "d3", "omega", "sx1", "sy1") and value != 0
    }
    if fisheye:
        extra |= {key: values[key] for key in ("p1", "p2") if values.get(key, 0.0) != 0}
    if extra:
        raise UserError(
            f"{folder}: a camera is of type {camera.model} with {', '.join(extra)}, which is not supported; expected "
            f"{_READABLE}: undistort the pictures (colmap image_undistorter)"
        )
    distortion = np.array([values.get(key, 0.0) for key in _DISTORTION])
    focal = (values.get("fx", values.get("f", 0.0)), values.get("fy", values.get("f", 0.0)))
    return focal, (values["cx"], values["cy"]), distortion, CameraType.FISHEYE if fisheye else CameraType.PERSPECTIVE


def _photo_folders(data: Path, names: Sequence[str]) -> dict[int, Path]:
    """The folder with most of the photos, and its images_N by factor. A line names other folders with photos.

    Names begin with the folder's own name if COLMAP was given the scene's folder. Then the scene's folder is the root.
    """
    skipped = ("sparse", "colmap", "mask", "depth", "normal", "distorted", "stereo")
    others = sorted(
        path
        for path in data.iterdir()
        if path.is_dir() and not path.name.startswith((".", *skipped)) and not _is_downscaled(path)
    )
    roots = dict.fromkeys([data / "images", *others, data])
    found: dict[Path, tuple[int, dict[int, Path]]] = {}
    for root in roots:
        folders = {1: data} if root == data else downscaled_folders(root)
        counts = [sum(Folder(folder).find(name, ()) is not None for name in names) for folder in folders.values()]
        if counts and max(counts):
            found[root] = (max(counts), folders)
    if not found:
        return downscaled_folders(data / "images")
    best = max(found, key=lambda root: found[root][0])  # the first of the fullest
    more = [
        f"{root.relative_to(data)} ({found[root][0]})"
        for root in found
        if root != best and root != data and best != data
    ]
    if more:
        say(f"{data}: reads the photos in {best.relative_to(data)} ({found[best][0]}); also there: {', '.join(more)}")
    return found[best][1]


def _is_downscaled(path: Path) -> bool:
    name, _, factor = path.name.rpartition("_")
    return name == "images" or (bool(name) and factor.isdecimal() and (path.parent / name).is_dir())


def _find_masks(data: Path, names: Sequence[str], factor: int) -> list[Path | None]:
    """masks/name.png, as nerfstudio has them, or masks/name.jpg.png, as COLMAP does; those of the images' size, or of
    the full-size photos where there are no such.
    """
    folders = downscaled_folders(data / "masks")
    folder = folders.get(factor) or folders.get(1)
    if folder is None:
        return []
    masks = Folder(folder)
    found = []
    for name in names:
        stem = name.rpartition(".")[0] or name
        found.append(masks.find(f"{stem}.png", ()) or masks.find(f"{name}.png", ()) or masks.find(name, ()))
    without = sum(mask is None for mask in found)
    if without:
        say(f"{folder}: {without} of {plural(len(found), 'photo')} have no mask; all their pixels are used")
    return found


def _say_what_is_left_out(model: ColmapModel, folder: Path, used: set[Path]) -> None:
    photos = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and not is_map(path)
        and path.is_file()
    ]
    left = [path.name for path in photos if path not in used]
    if left:
        say(
            f"{folder}: {len(left)} of {plural(len(photos), 'photo')} are not in the COLMAP model {model.folder.name} "
            f"and are left out ({list_first(left)})"
        )


def _listed_splits(data: Path, names: Sequence[str]) -> dict[str, list[int]]:
    """Views of train_list.txt and so on, as nerfstudio reads them: one name a line.

    Raises:
        UserError: names that are of no photo.
    """
    views = {name: index for index, name in enumerate(names)}
    found: dict[str, list[int]] = {}
    for split, files in (("train", ["train"]), ("val", ["val", "validation"]), ("test", ["test"])):
        path = next((p for p in (data / f"{file}_list.txt" for file in files) if p.is_file()), None)
        if path is None:
            continue
        listed = [
            line for line in path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines() if line.strip()
        ]
        strangers = [name for name in listed if name not in views]
        if strangers:
            raise UserError(
                f"{path} lists {plural(len(strangers), 'name')} not in the COLMAP model "
                f"({list_first(strangers)}); expected names of its photos"
            )
        found[split] = sorted({views[name] for name in listed})
    return found
