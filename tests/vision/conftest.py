"""A folder of pictures that a small model learns in seconds, and that model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shiftadd3d.vision.checkpoint import ClassifierConfig, create_dense
from shiftadd3d.vision.data import InputConfig, PictureData, open_data, seed_everything
from shiftadd3d.vision.files import picture_suffixes
from shiftadd3d.vision.settings import DataSettings, FinetuneSettings, StageSettings

COLORS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}
TINY = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


SavePicture = Callable[..., None]
MakeFolder = Callable[..., Path]


def _save_picture(path: Path, color: tuple[int, int, int] = (0, 0, 0), seed: int = 0, size: int = 20) -> None:
    noise = np.random.default_rng(seed).normal(0, 25, (size, size, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((noise + color).clip(0, 255).astype(np.uint8)).save(path)


def _make_folder(root: Path, train: int = 12, val: int = 4) -> Path:
    for split, count in (("train", train), ("val", val)):
        for number, (name, color) in enumerate(COLORS.items()):
            for index in range(count):
                _save_picture(root / split / name / f"{index:03d}.png", color, 1000 * number + index)
    return root


@pytest.fixture(scope="session")
def save_picture() -> SavePicture:
    """save_picture(path, color, seed, size): a noisy square of one colour."""
    return _save_picture


@pytest.fixture(scope="session")
def make_folder() -> MakeFolder:
    """make_folder(root, train, val): `root`/{train,val}/{blue,green,red}/NUMBER.png."""
    return _make_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder with train and val, three colours."""
    return _make_folder(tmp_path_factory.mktemp("pictures") / "colors")


@pytest.fixture(scope="session")
def data(folder: Path) -> PictureData:
    """The pictures of `folder`, opened."""
    return open_data(DataSettings(data=folder))


@pytest.fixture
def config(data: PictureData) -> ClassifierConfig:
    """A vision transformer of two blocks for `data`."""
    return ClassifierConfig("deit_tiny_patch16_224", data.classes, InputConfig(size=16), TINY)


@pytest.fixture
def model(config: ClassifierConfig) -> torch.nn.Module:
    """The model of `config`, dense, the same in every test."""
    seed_everything(0)
    return create_dense(config)


@pytest.fixture
def settings(folder: Path, tmp_path: Path) -> FinetuneSettings:
    """One epoch for each stage of the model of `config`."""
    return FinetuneSettings(
        data=folder,
        model_args=tuple(f"{key}={value}" for key, value in TINY.items()),
        image_size=16,
        batch_size=12,
        hflip=0.0,
        color_jitter=0.0,
        min_scale=0.8,
        stage0=StageSettings(epochs=1, lr=3e-3),
        stage1=StageSettings(epochs=1, lr=1e-3),
        stage2=StageSettings(epochs=1, lr=1e-3),
        output_dir=tmp_path / "outputs",
        name="run",
    )


@pytest.fixture
def no_heif(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No package that reads HEIC, and none that has been registered."""
    for name in ("pi_heif", "pillow_heif"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    monkeypatch.setattr(Image, "OPEN", {name: value for name, value in Image.OPEN.items() if name != "HEIF"})
    monkeypatch.setattr(Image, "EXTENSION", {key: name for key, name in Image.EXTENSION.items() if name != "HEIF"})
    picture_suffixes.cache_clear()
    yield
    picture_suffixes.cache_clear()
