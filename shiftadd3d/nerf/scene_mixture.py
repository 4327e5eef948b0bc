"""Training across scenes: many scenes on disk, one of which is drawn for each step."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.data.utils.data_utils import get_depth_image_from_path
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.nerf.dataparsers import find_scene
from shiftadd3d.nerf.source_bank import SourceBank
from shiftadd3d.nerf.target_pixels import TargetPixels

#: What near and far are multiplied by, at random: a network that has seen only tight ranges relies on them.
_NEAR_JITTER, _FAR_JITTER = (0.8, 1.1), (0.9, 1.4)


@dataclass(frozen=True)
class ListedScene:
    """A scene to train on."""

    path: Path
    weight: float = 1.0
    """How often it is drawn, beside the others'."""


@dataclass
class TrainScene:
    """A scene in memory."""

    dataset: InputDataset
    bank: SourceBank
    pixels: TargetPixels
    near: float
    far: float
    depths: list[Float[Tensor, "h w"] | None]
    """z depths of each view, 0 where unknown; None for views without a depth map."""

    @property
    def num_bytes(self) -> int:
        """Memory that its pictures take."""
        tensors = [self.bank.images, self.bank.valid, *self.depths]
        if not self.bank.pristine:
            tensors += self.pixels.images
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def list_scenes(entries: Sequence[Path], option: str = "--pipeline.datamanager.train-scenes") -> list[ListedScene]:
    """The scenes that a user names.

    Args:
        entries: scene folders, folders of such (a scene factory's, say), and list files. A list file (`.txt`) has a
            path a line, relative to itself, and a weight after it where that is not 1; `#` begins a comment.
        option: where they were named, for messages.

    Raises:
        UserError: an entry that is none of these, a list with nothing in it, or a weight that is not positive.
    """
    scenes: list[ListedScene] = []
    for entry in entries:
        if entry.suffix == ".txt":
            scenes += _read_list(entry, option)
        else:
            scenes += _scenes_at(entry, 1.0, option)
    return scenes


def _scenes_at(path: Path, weight: float, option: str) -> list[ListedScene]:
    if _is_scene(path):
        return [ListedScene(path, weight)]
    inside = sorted(p for p in path.iterdir() if not p.name.startswith(".") and p.is_dir()) if path.is_dir() else []
    found = [ListedScene(p, weight) for p in inside if _is_scene(p)]
    if not found:
        raise UserError(
            f"{option} {path}: neither a scene nor a folder of scenes; expected scene "
            "folders, folders of such, or a .txt file with a path a line"
        )
    return found


def _is_scene(path: Path) -> bool:
    try:
        find_scene(path)
    except UserError:
        return False
    return True


def _read_list(path: Path, option: str) -> list[ListedScene]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); expected a text file with a scene's path a line") from None
    scenes = []
    for number, line in enumerate(lines, start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        name, _, last = line.rpartition(" ")
        try:
            weight = float(last) if name else 1.0
        except ValueError:
            name, weight = "", 1.0
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"{path}, line {number}: weight {last}; expected a positive number")
        scenes += _scenes_at(path.parent / (name.strip() or line), weight, option)
    if not scenes:
        raise UserError(f"{path} lists no scene; expected a path a line")
    return scenes


def read_depths(dataset: InputDataset) -> list[Float[Tensor, "h w"] | None]:
    """The z depths of a dataset's views in the units of its poses, from the depth maps that its camera file names."""
    metadata, cameras = dataset.metadata, dataset.cameras
    names = metadata.get("depth_filenames")
    if names is None:
        return [None] * len(dataset)
    unit = metadata["depth_unit_scale_factor"] * dataset._dataparser_outputs.dataparser_scale
    return [
        get_depth_image_from_path(name, int(cameras.height[i]), int(cameras.width[i]), unit)[..., 0].float()
        for i, name in enumerate(names)
    ]


class SceneMixture:
    """Scenes to draw from; those drawn last are kept in memory, up to a bound.

    Args:
        scenes: what there is.
        load: reads one.
        max_bytes: bound on the memory of the pictures that are kept. One scene is always kept.

    Raises:
        UserError: not one of them can be read.
    """

    def __init__(self, scenes: Sequence[ListedScene], load: Callable[[Path], TrainScene], max_bytes: int) -> None:
        self._scenes = list(scenes)
        self._weights = torch.tensor([scene.weight for scene in scenes], dtype=torch.float64)
        self._load, self._max_bytes = load, max_bytes
        self._kept: OrderedDict[Path, TrainScene] = OrderedDict()
        self.skipped: dict[Path, str] = {}
        """Scenes that turned out not to load, and why."""

    def __len__(self) -> int:
        return len(self._scenes)

    def draw(self, generator: torch.Generator | None = None) -> TrainScene:
        """A scene, drawn by weight.

        Args:
            generator: to draw from; torch's global one if None.

        Raises:
            UserError: none is left that can be read.
        """
        while float(self._weights.sum()) > 0:
            index = int(torch.multinomial(self._weights, 1, generator=generator))
            path = self._scenes[index].path
            try:
                return self._get(path)
            except UserError as error:
                self.skipped[path] = str(error)
                self._weights[index] = 0.0
                CONSOLE.print(
                    f"[yellow]Scene {len(self.skipped)} of {len(self)} left out: {error}",
                    soft_wrap=True,
                    highlight=False,
                )
        raise UserError(f"none of the {len(self)} training scenes can be read; expected scenes as ns-train reads them")

    def _get(self, path: Path) -> TrainScene:
        scene = self._kept.pop(path, None) or self._load(path)
        self._kept[path] = scene
        total = sum(kept.num_bytes for kept in self._kept.values())
        while total > self._max_bytes and len(self._kept) > 1:
            total -= self._kept.popitem(last=False)[1].num_bytes
        return scene


@dataclass(frozen=True)
class Photometric:
    """One change of colours for a target and its sources: a gain, a gamma and, half of the time, other channels."""

    gain: Float[Tensor, "3"]
    gamma: float
    channels: list[int]

    @classmethod
    def draw(cls) -> Photometric:
        """From torch's global generator."""
        return cls(
            gain=torch.empty(3).uniform_(0.75, 1.2),
            gamma=float(torch.empty(()).uniform_(0.8, 1.25)),
            channels=torch.randperm(3).tolist() if torch.rand(()) < 0.5 else [0, 1, 2],
        )

    def __call__(self, colors: Float[Tensor, "*any 3"]) -> Float[Tensor, "*any 3"]:
        changed = colors[..., self.channels].pow(self.gamma) * self.gain.to(colors)
        return changed.clamp_(0.0, 1.0)


def jittered(near: float, far: float) -> tuple[float, float]:
    """Near and far of one step, from torch's global generator."""
    a = float(torch.empty(()).uniform_(*_NEAR_JITTER))
    b = float(torch.empty(()).uniform_(*_FAR_JITTER))
    return near * a, far * b
