"""Scenes on disk to nerfstudio's `DataparserOutputs`: LLFF folders, and one parser that finds out what a folder is.

A reader per format (`transforms`, `blender`, `colmap`, `llff`) turns files into a `Scene`, all of it in float64;
`scene` centres, scales and splits it, whatever it came from; `checks` refuses a broken one in one line before anything
is trained on it. `keys` is the list of what camera files may say.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataParserConfig, DataparserOutputs
from nerfstudio.plugins.registry_dataparser import DataParserSpecification

from shiftadd3d._errors import UserError
from shiftadd3d.nerf.dataparsers.blender import SPLITS, read_blender, split_file
from shiftadd3d.nerf.dataparsers.checks import check_outputs, plural
from shiftadd3d.nerf.dataparsers.colmap import count_photos, find_models, has_renamed_images, read_colmap
from shiftadd3d.nerf.dataparsers.files import IMAGE_SUFFIXES, say
from shiftadd3d.nerf.dataparsers.llff import read_llff
from shiftadd3d.nerf.dataparsers.scene import (
    Centering,
    EvalMode,
    Orientation,
    Scene,
    make_outputs,
    say_what_stands_far_away,
)
from shiftadd3d.nerf.dataparsers.transforms import count_frames, read_transforms
from shiftadd3d.scenes import scene_path

__all__ = [
    "IMAGE_SUFFIXES",
    "AutoDataParser",
    "AutoDataParserConfig",
    "LLFFDataParser",
    "LLFFDataParserConfig",
    "auto_dataparser",
    "check_outputs",
    "find_scene",
    "llff_dataparser",
]

_ACCEPTED = (
    "a folder with transforms.json (nerfstudio, instant-ngp), transforms_train.json (Blender), "
    "sparse/0 or colmap/sparse/0 (COLMAP), or poses_bounds.npy (LLFF)"
)

Kind = Literal["nerfstudio", "blender", "colmap", "llff"]


def _embedded_scene() -> Path:
    try:
        return scene_path()
    except UserError:
        # This default is made whenever nerfstudio lists its parsers: a source tree whose scene has not been made yet
        # must not take every other scene, and every other method, down with it.
        return Path()


def _checked_factor(factor: float | None) -> float | None:
    if factor is not None and factor < 1:
        raise UserError(f"downscale-factor {factor:g}: expected 1 or more")
    return factor


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
    orientation_method: Orientation = "up"
    """The method to use for orientation."""
    center_method: Centering = "poses"
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
    """Reads `poses_bounds.npy`; see `read_llff`.

    The outputs' `metadata["bounds"]` is [n, 2] float32: each view's nearest and farthest z-depth, scaled as the poses.

    Raises:
        UserError: see `read_llff` and `check_outputs`.
    """

    config: LLFFDataParserConfig

    def __init__(self, config: LLFFDataParserConfig):
        super().__init__(config)
        self._scene: Scene | None = None

    def _generate_dataparser_outputs(self, split: str = "train", **kwargs) -> DataparserOutputs:
        config = self.config
        if self._scene is None:  # kept, so that train and eval agree
            self._scene = read_llff(_scene_folder(config.data), _checked_factor(config.downscale_factor))
        return make_outputs(
            self._scene,
            split,
            config,
            orientation=config.orientation_method,
            centering=config.center_method,
            auto_scale=config.auto_scale_poses,
            scale_factor=config.scale_factor,
        )


@dataclass
class AutoDataParserConfig(DataParserConfig):
    """Finds out what a scene folder holds: nerfstudio, instant-ngp, Blender, COLMAP or LLFF data.

    These are the settings that the formats share. For anything finer, name the parser: nerfstudio-data, blender-data,
    colmap, shiftadd-llff.
    """

    _target: type = field(default_factory=lambda: AutoDataParser)
    """target class to instantiate"""
    data: Path = field(default_factory=_embedded_scene)
    """Scene folder (or its camera file, e.g. transforms.json). The default is the embedded scene."""
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
    """Reads whatever the folder holds. Never asks a question.

    Poses are centred at the mean of the (training) cameras and scaled to a box of -1 to 1; `dataparser_transform` (in
    float64) and `dataparser_scale` lead back. The outputs' `metadata` has

    - `"near_far"`: (near, far) z-depths, if the camera file has a block `"shiftadd3d": {"near": ..., "far": ...}` in
      the units of its matrices, here scaled with the poses;
    - `"bounds"`: from LLFF data, see `LLFFDataParser`;
    - `"points3D_xyz"`: from COLMAP data with points, [n, 3] (nerfstudio's own key);
    - `"fisheye_crop_radius"`: pixels of the images, also in the cameras' own metadata, as nerfstudio has it.

    Raises:
        UserError: a folder that is none of these, an unreadable camera file, and what `check_outputs` refuses.
    """

    config: AutoDataParserConfig

    def __init__(self, config: AutoDataParserConfig):
        super().__init__(config)
        self._scene: Scene | None = None

    def _generate_dataparser_outputs(self, split: str = "train", **kwargs) -> DataparserOutputs:
        if self._scene is None:  # kept, so that train and eval agree, and that what is to be said is said once
            self._scene = self._read()
            say_what_stands_far_away(self._scene)
        return make_outputs(self._scene, split, self.config)

    def _read(self) -> Scene:
        factor = _checked_factor(self.config.downscale_factor)
        kind, data, camera_file, others = _look(self.config.data)
        if others:
            say(f"{data}: reads {camera_file.name if camera_file else kind}; also there: {', '.join(others)}")
        if kind == "llff":
            return read_llff(data, factor)
        if kind == "colmap":
            return read_colmap(data, factor)
        if kind == "blender":
            return read_blender(data, factor)
        assert camera_file is not None
        return read_transforms(camera_file, factor)


def _scene_folder(data: Path) -> Path:
    if not data.exists():
        raise UserError(f"{data} does not exist; expected {_ACCEPTED}")
    if not data.is_dir():
        raise UserError(f"{data} is not a folder; expected {_ACCEPTED}")
    return data


def find_scene(data: Path) -> tuple[Kind, Path]:
    """What a scene is, and its folder.

    Args:
        data: the scene's folder or its camera file. `transforms_train.json` means a Blender scene. Any other file is
            read alone.

    Raises:
        UserError: nothing that is accepted was found there.
    """
    return _look(data)[:2]


def _look(data: Path) -> tuple[Kind, Path, Path | None, list[str]]:
    """Kind, folder, camera file, and a few words on each other format that was found."""
    if data.suffix.lower() == ".json" and data.is_file():
        return ("blender" if data.name == "transforms_train.json" else "nerfstudio"), data.parent, data, []
    data = _scene_folder(data)
    files = {path: count_frames(path) for path in sorted(data.glob("transforms*.json"))}
    single, train = data / "transforms.json", split_file(data, "train")
    of_blender = {split_file(data, split) for split in SPLITS} if train in files else set()
    blender = sum(files.get(path) or 0 for path in of_blender)
    models = find_models(data)
    llff = (data / "poses_bounds.npy").is_file()

    # The one with most photos, of the two that have names of their own; any other file is for those who name it.
    if single in files and (train not in files or (files[single] or 0) >= blender):
        kind, camera_file = "nerfstudio", single
    elif train in files:
        kind, camera_file = "blender", train
    elif models or llff:
        # LLFF folders often keep the COLMAP model they were made from, with images_N under other names than its own.
        colmap = bool(models) and not (llff and has_renamed_images(data))
        return ("colmap" if colmap else "llff"), data, None, _others(files, set())
    else:
        views = {path: count for path, count in files.items() if count}
        if not views:
            raise UserError(f"{data}: no scene found; expected {_ACCEPTED}{_below(data)}")
        kind, camera_file = "nerfstudio", max(views, key=lambda path: views[path])
    others = _others(files, {camera_file} | of_blender)
    read = blender if kind == "blender" else files[camera_file] or 0
    counts = {folder: count_photos(folder, suffix) for folder, suffix in models}
    others += [f"{folder.relative_to(data)} ({n} photos)" for folder, n in counts.items() if n > read]
    if kind == "nerfstudio" and of_blender:
        others.insert(0, f"transforms_*.json ({plural(blender, 'photo')})")
    return kind, data, camera_file, others


def _below(data: Path) -> str:
    """A hint at a scene one or two folders further down. Archives and COLMAP's workspaces have it there."""
    for folder in sorted(path for pattern in ("*/", "*/*/") for path in data.glob(pattern) if path.is_dir()):
        llff = (folder / "poses_bounds.npy").is_file()
        if llff or any(map(count_frames, folder.glob("transforms*.json"))) or find_models(folder):
            return f"; there is a scene in {folder.relative_to(data)}"
    return ""


def _others(files: dict[Path, int | None], read: set[Path]) -> list[str]:
    """Other camera files, and how many photos they list. Files that list none are left out."""
    return [
        f"{path.name} ({'cannot be read' if count is None else plural(count, 'photo')})"
        for path, count in files.items()
        if count != 0 and path not in read
    ]


auto_dataparser = DataParserSpecification(
    config=AutoDataParserConfig(),
    description="Finds out what the scene folder holds: nerfstudio, instant-ngp, Blender, COLMAP or LLFF data",
)
llff_dataparser = DataParserSpecification(
    config=LLFFDataParserConfig(), description="LLFF folders: poses_bounds.npy with images or images_N"
)
