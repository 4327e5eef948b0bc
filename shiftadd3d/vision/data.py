"""Pictures and their classes: from folders, zip files, Hugging Face datasets, torchvision sets, or scikit-learn.

Whatever the source, pictures become 8-bit RGB as viewers show them. Only the training pictures decide the numbers of
classes. Unreadable pictures are left out, counted and listed. Random changes of a picture depend only on the seed, the
epoch and the picture. They do not depend on the number of workers or processes, nor on where a training was resumed.

timm's folder readers are not used. They cannot read zip files, lose classes without any readable picture, and do not
list what they leave out.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
import random
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from shiftadd3d._errors import UserError
from shiftadd3d._extras import need
from shiftadd3d._heif import HEIF_REMEDY
from shiftadd3d.vision.files import (
    Files,
    count_by_suffix,
    describe_unread,
    files_of,
    find_files,
    how_to_read,
    is_heif,
    is_note,
    picture_formats,
    sort_out,
    usual_suffixes,
)
from shiftadd3d.vision.settings import DataSettings, TrainSettings

_TRAIN_NAMES = ("train", "training")
_VAL_NAMES = ("val", "validation", "valid", "dev")
_TEST_NAMES = ("test", "testing", "eval", "evaluation")
_SPLIT_NAMES = (*_TRAIN_NAMES, *_VAL_NAMES, *_TEST_NAMES)
_DEFAULT_VAL_FRACTION = 0.1
_LISTED = 5  # names in an error message


# --------------------------------------------------------------------------------------------------------------------
# One picture
# --------------------------------------------------------------------------------------------------------------------


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any kind as 8-bit RGB, upright, as a viewer would show it.

    Animations give their first frame, 16-bit values are divided by 257, and transparent pixels become white. CMYK,
    palettes and grey are converted.
    """
    image.load()  # so that what is wrong with the pixels is not taken for damaged EXIF data
    with contextlib.suppress(Exception):  # damaged EXIF data, which say nothing: the picture is as it lies
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        if image.mode == "F":  # floating-point TIFFs hold 0..1 or 0..255
            values = values * 255 if np.nanmax(values, initial=0.0) <= 1 else values
        else:
            values = values / 257
        image = Image.fromarray(np.nan_to_num(values).clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def decode_picture(data: bytes | Path) -> Image.Image:
    """A picture file, or its bytes, as 8-bit RGB; see `to_rgb`.

    Raises:
        UserError: it cannot be decoded. The message says why.
    """
    try:
        with warnings.catch_warnings():
            # A picture of more than 89 million pixels is unusual, not wrong; one of twice that PIL refuses.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=picture_formats()) as image:
                return to_rgb(image)
    except Exception as error:  # decoders meet damaged bytes with whatever their own code raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "not a picture in a format that Pillow knows"
            if is_heif(_start_of(data)):
                reason = f"HEIC, whatever its suffix: {HEIF_REMEDY}"
        raise UserError(f"cannot be read as a picture ({reason})") from None


def _start_of(data: bytes | Path) -> bytes:
    if isinstance(data, bytes):
        return data[:16]
    with data.open("rb") as file:
        return file.read(16)


# --------------------------------------------------------------------------------------------------------------------
# Sources
# --------------------------------------------------------------------------------------------------------------------


class Source(Protocol):
    """Pictures by number."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the pictures, for reports."""
        ...

    @property
    def labels(self) -> Sequence[str]:
        """The names of the pictures' classes."""
        ...

    def read(self, index: int) -> Image.Image:
        """A picture as 8-bit RGB.

        Raises:
            UserError: it cannot be read.
        """
        ...


class _FolderSource:
    def __init__(self, root: Path, files: Sequence[tuple[str, str]]) -> None:
        self.root = root
        self.names = [name for name, _ in files]
        self.labels = [label for _, label in files]

    def read(self, index: int) -> Image.Image:
        return decode_picture(self.root / self.names[index])


class _ZipSource:
    def __init__(self, path: Path, files: Sequence[tuple[str, str]], members: Mapping[str, str]) -> None:
        self.path = path
        self.names = [name for name, _ in files]
        self.members = [members[name] for name in self.names]
        self.labels = [label for _, label in files]
        self._archives: dict[int, zipfile.ZipFile] = {}

    def read(self, index: int) -> Image.Image:
        # One handle a process: a forked worker that shared ours would move our place in the file.
        archive = self._archives.get(os.getpid())
        if archive is None:
            archive = self._archives[os.getpid()] = zipfile.ZipFile(self.path)
        try:
            data = archive.read(self.members[index])
        except Exception as error:  # every method of compression has its own for damaged bytes
            raise UserError(f"cannot be unpacked ({error or type(error).__name__})") from None
        return decode_picture(data)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_archives": {}}


class _ArraySource:
    def __init__(self, images: np.ndarray, labels: Sequence[str], name: str) -> None:
        self.images, self.labels = images, labels
        self.names = [f"{name}/{index:05d}" for index in range(len(labels))]

    def read(self, index: int) -> Image.Image:
        return to_rgb(Image.fromarray(self.images[index]))


class _DatasetSource:
    """A torchvision set: something with a length that gives (PIL picture, class number)."""

    def __init__(self, dataset: Any, classes: Sequence[str], targets: Sequence[int], name: str) -> None:
        self.dataset = dataset
        self.labels = [classes[target] for target in targets]
        self.names = [f"{name}/{index:07d}" for index in range(len(self.labels))]

    def read(self, index: int) -> Image.Image:
        try:
            return to_rgb(self.dataset[index][0])
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"cannot be read as a picture ({error})") from None


class _HuggingFaceSource:
    """Rows of a dataset, given with their labels."""

    def __init__(self, dataset: Any, column: str, rows: Sequence[tuple[int, str]], name: str) -> None:
        self.dataset, self.column = dataset, column
        self.rows = [row for row, _ in rows]
        self.labels = [label for _, label in rows]
        self.names = [f"{name}/{row:07d}" for row in self.rows]

    def read(self, index: int) -> Image.Image:
        cell = self.dataset[self.rows[index]][self.column]
        if cell is None:
            raise UserError("cannot be read as a picture (the cell is empty)")
        return decode_picture(cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]))


class Skipped(NamedTuple):
    """A picture that was left out, or several with one reason: the name, the reason, and the number."""

    name: str
    reason: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class PictureSet:
    """Some pictures of a source, with class numbers.

    Args:
        source: the source.
        indices: numbers of the pictures in the source.
        classes: names of the classes in the order of their numbers.
    """

    def __init__(self, source: Source, indices: Sequence[int], classes: Sequence[str]) -> None:
        number = {name: i for i, name in enumerate(classes)}
        self.source, self.indices, self.classes = source, list(indices), tuple(classes)
        self.targets = [number[source.labels[i]] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, position: int) -> str:
        """The name of the picture at `position` in reports."""
        return self.source.names[self.indices[position]]

    def read(self, position: int) -> Image.Image:
        """The picture at `position` as 8-bit RGB.

        Raises:
            UserError: it cannot be read. The message names it.
        """
        try:
            return self.source.read(self.indices[position])
        except UserError as error:
            raise UserError(f"{self.name(position)}: {error}") from None


@dataclass(frozen=True)
class PictureData:
    """Training and validation pictures with one numbering of classes, and what was left out."""

    name: str
    classes: tuple[str, ...]
    train: PictureSet
    val: PictureSet
    skipped: tuple[Skipped, ...] = ()

    def describe(self) -> str:
        """One line about the pictures."""
        text = f"{self.name}: {len(self.classes)} classes, {len(self.train)} training and {len(self.val)} validation"
        missing = [name for number, name in enumerate(self.classes) if number not in set(self.val.targets)]
        if missing:
            text += f" pictures; none of {_list(missing)} in validation"
        else:
            text += " pictures"
        count = self.count_skipped()
        return text + (f"; {count} skipped" if count else "")

    def count_skipped(self) -> int:
        """Number of files that were left out."""
        return sum(entry.count for entry in self.skipped)


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(str(name) for name in names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"


# --------------------------------------------------------------------------------------------------------------------
# Finding them
# --------------------------------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    """Pictures by split, and what of a split is not among them because nobody can say which class it is of."""

    splits: dict[str, Source]
    skipped: dict[str, list[Skipped]]

    def why_none(self, split: str) -> str:
        """What to say about a split that is not there."""
        return "".join(f" ({entry})" for entry in self.skipped.get(split, ())[:1])


def open_data(settings: DataSettings, broadcast: Callable[[Any], Any] = lambda made: made()) -> PictureData:
    """The pictures in `settings`, split, numbered and checked.

    Args:
        settings: options for the data.
        broadcast: gives the result of a function to all processes; see `distributed.from_first_process`.

    Raises:
        UserError: there are no pictures or fewer than two classes, validation has classes that training lacks, or a
            class has no readable training picture.
    """
    name, found = _open_splits(settings)
    train = found.splits.get("train")
    if train is None:
        raise UserError(
            f"{name}: no training pictures{found.why_none('train')}; expected a folder called train, or class folders "
            "alone"
        )
    classes = _check_classes(name, train)
    skipped = list(found.skipped.get("train", ()))
    own_val = None
    if settings.val_fraction is None:
        for split in ("val", "test"):
            skipped += found.skipped.get(split, ())
            own_val = found.splits.get(split)
            if own_val is not None:
                break
    everything = list(range(len(train.names)))
    if own_val is not None:
        unknown = sorted(set(own_val.labels) - set(classes))
        if unknown:
            raise UserError(
                f"{name}: validation has classes that training lacks: {_list(unknown)}; training has {_list(classes)}"
            )
        train_set = PictureSet(train, everything, classes)
        val_set = PictureSet(own_val, range(len(own_val.names)), classes)
    else:
        fraction = _DEFAULT_VAL_FRACTION if settings.val_fraction is None else settings.val_fraction
        kept, held_out = split_by_class(train.names, train.labels, fraction, settings.split_seed)
        train_set, val_set = PictureSet(train, kept, classes), PictureSet(train, held_out, classes)
    unreadable: list[Skipped] = []
    if settings.check:
        train_set, skipped_in_train = leave_out(train_set, broadcast(lambda: find_unreadable(train_set)))
        val_set, skipped_in_val = leave_out(val_set, broadcast(lambda: find_unreadable(val_set)))
        unreadable = [*skipped_in_train, *skipped_in_val]
    empty = sorted(set(range(len(classes))) - set(train_set.targets))
    if empty:
        reason = f"; the first of {len(unreadable)} that cannot be read: {unreadable[0]}" if unreadable else ""
        raise UserError(f"{name}: no readable training picture of {_list([classes[i] for i in empty])}{reason}")
    if not len(val_set):
        raise UserError(f"{name}: no validation pictures are left; hold some out with --val-fraction 0.1")
    return PictureData(name, classes, train_set, val_set, (*skipped, *unreadable))


def open_split(settings: DataSettings, split: str, classes: Sequence[str]) -> tuple[PictureSet, tuple[Skipped, ...]]:
    """The pictures of one split, with the class numbers of a trained model, and what was left out.

    Args:
        settings: options for the data.
        split: "train", "val" or "test". Without a folder val, "val" is the held-out part, and "train" the rest.
        classes: the classes of the model.

    Raises:
        UserError: there is no such split, the model does not know a class, or no pictures are named for a model that
            was not trained on the digits.
    """
    name, found = _open_splits(settings)
    if settings.data is None and not set(found.splits["train"].labels) <= set(classes):
        raise UserError(
            "no pictures are named, and this classifier is not in the folder of a run; expected --data with pictures "
            f"of {_list(classes)}"
        )
    source = found.splits.get(split)
    if split == "test" and source is None:
        raise UserError(f"{name}: no test pictures{found.why_none('test')}; there are {', '.join(found.splits)}")
    held_out = settings.val_fraction is not None or set(found.splits) == {"train"}
    if source is None or (held_out and split != "test"):
        data = open_data(settings)
        chosen = data.train if split == "train" else data.val
        _check_known(name, [data.classes[target] for target in chosen.targets], classes)
        return PictureSet(chosen.source, chosen.indices, classes), data.skipped
    _check_known(name, source.labels, classes)
    pictures = PictureSet(source, range(len(source.names)), classes)
    pictures, skipped = leave_out(pictures, find_unreadable(pictures) if settings.check else {})
    if not len(pictures):
        raise UserError(f"{name}: no readable pictures in {split}")
    return pictures, (*found.skipped.get(split, ()), *skipped)


def _check_known(name: str, labels: Sequence[str], classes: Sequence[str]) -> None:
    unknown = sorted(set(labels) - set(classes))
    if unknown:
        raise UserError(f"{name}: the model does not know the classes {_list(unknown)}; it knows {_list(classes)}")


def _open_splits(settings: DataSettings) -> tuple[str, _Found]:
    settings.validate()
    path = settings.data
    if settings.dataset:
        return settings.dataset, _open_torchvision(settings.dataset, path)
    if path is None:
        return "digits", _Found({"train": _open_digits()}, {})
    if not path.exists():
        raise UserError(f"--data {path}: no such file or folder; expected an ImageFolder, a .zip of one, or datasets")
    if path.is_file():
        return path.name, _open_zip(path)
    if _is_hugging_face(path):
        return path.name, _open_hugging_face(path)
    try:
        files = find_files(path)
    except OSError as error:
        raise UserError(
            f"--data {path}: cannot be read ({error.strerror or error}); expected a readable folder"
        ) from None
    return path.name, _arrange(files, f"--data {path}", lambda found: _FolderSource(path, found))


def _arrange(files: Files, what: str, make_source: Callable[[Sequence[tuple[str, str]]], Source]) -> _Found:
    """Which split and class each file belongs to, from its path: [train|val|test/]class/.../file.

    Folders around all of that, as zip files often have, do not count. Beside train/ and val/ or test/, other folders
    are left out. So are files that are no pictures, unless a class has no others.

    Args:
        files: pictures and others, as paths with slashes.
        what: how errors call their place.
        make_source: of the pictures of a split, with their classes.
    """
    if not files.pictures:
        there = f"; found {describe_unread(files.others)}" if files.others else ""
        raise UserError(f"{what}: no pictures in there; expected class folders with files of {usual_suffixes()}{there}")
    least = min(name.count("/") for name in files.pictures)
    unread = [name for name in files.others if not is_note(name) and name.count("/") >= least]
    depth, with_splits = _layout([*files.pictures, *unread])
    arranged: dict[str, list[tuple[str, str]]] = defaultdict(list)
    without_class = []
    beside: dict[str, int] = defaultdict(int)
    for file in files.pictures:
        split, label = _place_of(file, depth, with_splits)
        if split is None:
            beside[label] += 1
        elif not label:
            without_class.append(file)
        else:
            arranged[split].append((file, label))
    if without_class:
        raise UserError(
            f"{what}: {len(without_class)} of {len(files.pictures)} pictures are in no class folder "
            f"({without_class[0]}); expected CLASS/PICTURE, or train/CLASS/PICTURE and val/CLASS/PICTURE; files of "
            "metadata are not read"
        )
    skipped: dict[str, list[Skipped]] = defaultdict(list)
    for folder, count in beside.items():
        skipped["train"].append(Skipped(f"{folder}/", f"beside the splits, with {count} of the pictures", count))
    others: dict[str, list[str]] = defaultdict(list)
    for file in files.others:
        split, _ = _place_of(file, depth, with_splits)
        others[split or "train"].append(file)
    for split, names in others.items():
        lost = _lost_classes(names, arranged.get(split, ()), depth, with_splits)
        # In validation a class may be missing, and `PictureData.describe` says so; but not all of them.
        needed = split == "train" or (split not in arranged and (split == "val" or "val" not in arranged))
        if lost and needed:
            raise UserError(
                f"{what}: no picture of {_list(sorted(lost))} in {split} can be read: "
                f"{describe_unread(itertools.chain(*lost.values()))}; expected files of {usual_suffixes()}, or these "
                "folders moved away"
            )
        skipped[split] += skipped_files(names)
    return _Found({split: make_source(found) for split, found in arranged.items()}, skipped)


def skipped_files(names: Iterable[str]) -> list[Skipped]:
    """Files that are probably no pictures, one entry for each suffix."""
    entries = []
    for suffix, count in count_by_suffix(names):
        hint = how_to_read(suffix)
        reason = f"{count} {files_of(suffix, count)}, not read" + (f" ({hint})" if hint else "")
        entries.append(Skipped(f"*{suffix}", reason, count))
    return entries


def _layout(files: Sequence[str]) -> tuple[int, bool]:
    """How many folders stand around everything, and whether there are folders of splits within these."""
    paths = [PurePosixPath(file).parts for file in files]
    depth = 0
    while len({parts[depth] for parts in paths}) == 1 and all(len(parts) > depth + 2 for parts in paths):
        if paths[0][depth].lower() in _TRAIN_NAMES:
            break
        depth += 1
    top = {parts[depth].lower() for parts in paths if len(parts) > depth + 1}
    # A folder called train may be full of locomotives, but not one with a folder called val beside it.
    return depth, bool(top & set(_TRAIN_NAMES)) and (
        top <= set(_TRAIN_NAMES) or bool(top & {*_VAL_NAMES, *_TEST_NAMES})
    )


def _place_of(file: str, depth: int, with_splits: bool) -> tuple[str | None, str]:
    """The split and the class of a file; no class for one outside of class folders, and no split, but the folder, for
    one in a folder beside those of the splits."""
    parts = PurePosixPath(file).parts
    rest, split = parts[depth:], "train"
    if with_splits and len(rest) > 1:
        if rest[0].lower() not in _SPLIT_NAMES:
            return None, "/".join(parts[: depth + 1])
        rest, split = rest[1:], _split_of(rest[0].lower())
    return split, rest[0] if len(rest) > 1 else ""


def _lost_classes(
    others: Sequence[str], pictures: Sequence[tuple[str, str]], depth: int, with_splits: bool
) -> dict[str, list[str]]:
    """Classes of a split that have files, of which none is read, and these files. Notes about pictures are no class."""
    there = {label for _, label in pictures}
    lost: dict[str, list[str]] = defaultdict(list)
    for file in others:
        split, label = _place_of(file, depth, with_splits)
        if split is not None and label and label not in there and not is_note(file):
            lost[label].append(file)
    return lost


def _split_of(name: str) -> str:
    return "train" if name in _TRAIN_NAMES else "val" if name in _VAL_NAMES else "test"


def _open_zip(path: Path) -> _Found:
    what = f"--data {path}"
    try:
        with zipfile.ZipFile(path) as archive:
            # Some programs of Windows write backslashes.
            members = {
                name: info.filename
                for info in archive.infolist()
                if not (name := info.filename.replace("\\", "/")).endswith("/")
            }
            files = sort_out(members, lambda name: cast(BinaryIO, archive.open(members[name])))
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(
            f"{what}: not a zip file that can be read ({error}); expected a .zip of an ImageFolder"
        ) from None
    return _arrange(files, what, lambda found: _ZipSource(path, found, members))


def _open_digits() -> Source:
    """scikit-learn's 1,797 pictures of hand-written digits, 8x8 grey: what needs no download."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    return _ArraySource(images, [str(target) for target in digits.target], "digits")


def _open_torchvision(name: str, root: Path | None) -> _Found:
    from timm.data import create_dataset

    if root is None:
        raise UserError(f"--dataset {name}: expected --data FOLDER, where the set lies")
    splits: dict[str, Source] = {}
    for split in ("train", "val"):
        try:
            dataset: Any = create_dataset(name, root=str(root), split="train" if split == "train" else "validation")
        except (AssertionError, RuntimeError, OSError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"--dataset {name} in --data {root}: {reason}") from None
        targets = getattr(dataset, "targets", None)
        if targets is None:
            targets = getattr(dataset, "labels", None)
        if targets is None:
            raise UserError(f"--dataset {name}: it does not list its targets; expected a set such as torch/cifar10")
        targets = [int(target) for target in targets]
        # Zeros in front, so that names sort as the set's own numbers do.
        classes = getattr(dataset, "classes", None) or [f"{i:04d}" for i in range(max(targets) + 1)]
        splits[split] = _DatasetSource(dataset, list(classes), targets, f"{name}/{split}")
    return _Found(splits, {})


def _is_hugging_face(path: Path) -> bool:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return True
    return bool(_parquet_files(path))


def _open_hugging_face(path: Path) -> _Found:
    need(f"--data {path}: this folder", "datasets", extra="vision")
    import datasets

    try:
        parquet_files = _parquet_files(path)
        if parquet_files and not (path / "dataset_dict.json").is_file():
            opened: Any = datasets.load_dataset("parquet", data_files=parquet_files)
        else:
            opened = datasets.load_from_disk(str(path))
    except Exception as error:  # it meets foreign files with whatever its own code raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--data {path}: datasets cannot open it ({reason})") from None
    if not isinstance(opened, dict):
        opened = {"train": opened}
    found = _Found({}, defaultdict(list))
    for name, dataset in opened.items():
        if name.lower() not in _SPLIT_NAMES:
            continue
        split, title = _split_of(name.lower()), f"{path.name}/{name}"
        try:
            image, label = _picture_and_label_columns(path, dataset.features, datasets)
        except UserError as error:
            if split == "train":
                raise
            found.skipped[split].append(Skipped(title, str(error), len(dataset)))  # tests often come without labels
            continue
        feature = dataset.features[label]
        rows = []
        for row, value in enumerate(dataset[label]):
            # The hub says -1 for what has no label.
            if value is None or value != value or (isinstance(feature, datasets.ClassLabel) and value == -1):
                found.skipped[split].append(Skipped(f"{title}/{row:07d}", "it has no label"))
            else:
                rows.append((row, feature.int2str(value) if isinstance(feature, datasets.ClassLabel) else str(value)))
        if rows:
            dataset = dataset.cast_column(image, datasets.Image(decode=False))
            found.splits[split] = _HuggingFaceSource(dataset, image, rows, title)
        else:
            found.skipped[split] = [Skipped(title, f"none of its {len(dataset)} pictures has a label", len(dataset))]
    return found


def _parquet_files(path: Path) -> dict[str, list[str]]:
    """Parquet files by split: the hub writes data/train-00000-of-00001.parquet.

    One called metadata.parquet stands beside pictures and says more about them.
    """
    files: dict[str, list[str]] = defaultdict(list)
    for file in sorted(path.glob("**/*.parquet")):
        if file.stem == "metadata":
            continue
        word = file.stem.split("-")[0].lower()
        word = word if word in _SPLIT_NAMES else file.parent.name.lower()
        files[_split_of(word) if word in _SPLIT_NAMES else "train"].append(str(file))
    return dict(files)


def _picture_and_label_columns(path: Path, features: Any, datasets: Any) -> tuple[str, str]:
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels += [name for name in ("label", "labels", "class") if name in features and name not in labels]
    if not images or not labels:
        raise UserError(
            f"--data {path}: expected a column of pictures and one of labels; it has "
            + ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
        )
    return images[0], labels[0]


def _check_classes(name: str, train: Source) -> tuple[str, ...]:
    classes = tuple(sorted(set(train.labels)))
    if len(classes) < 2:
        only = f"only one class, {classes[0]}" if classes else "no classes"
        raise UserError(f"{name}: {only}; expected two or more class folders")
    return classes


def split_by_class(
    names: Sequence[str], labels: Sequence[str], fraction: float, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Hold out a share of each class.

    The choice depends only on names and seed. It does not depend on the order of files, nor (except for pictures at the
    edge of the share) on other pictures.

    Args:
        names: names of the pictures.
        labels: classes of the pictures.
        fraction: share of each class to hold out, rounded. At least one picture of each class is kept.
        seed: another seed gives another choice.

    Returns:
        The indices that are kept and those that are held out, both ascending.
    """
    by_class: dict[str, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        by_class[label].append(index)
    held_out: set[int] = set()
    for members in by_class.values():
        members.sort(key=lambda index: hashlib.sha256(f"{seed}:{names[index]}".encode()).digest())
        held_out.update(members[: min(round(fraction * len(members)), len(members) - 1)])
    return [index for index in range(len(names)) if index not in held_out], sorted(held_out)


def find_unreadable(pictures: PictureSet) -> dict[int, str]:
    """Read every picture. Returns the positions of unreadable ones, with reasons."""
    if isinstance(pictures.source, _ArraySource):
        return {}

    def why_not(position: int) -> str | None:
        try:
            pictures.source.read(pictures.indices[position])
        except UserError as error:
            return str(error)
        return None

    # Decoding lets go of Python's lock; a zip file and a datasets table are not for several threads at once.
    parallel = isinstance(pictures.source, _FolderSource)
    with ThreadPoolExecutor((os.cpu_count() or 1) if parallel else 1) as pool:
        reasons = pool.map(why_not, range(len(pictures)))
        return {position: reason for position, reason in enumerate(reasons) if reason is not None}


def leave_out(pictures: PictureSet, unreadable: dict[int, str]) -> tuple[PictureSet, tuple[Skipped, ...]]:
    """The pictures without those at the given positions, and the names of the latter with reasons."""
    skipped = tuple(Skipped(pictures.name(position), reason) for position, reason in unreadable.items())
    keep = [index for position, index in enumerate(pictures.indices) if position not in unreadable]
    return PictureSet(pictures.source, keep, pictures.classes), skipped


# --------------------------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InputConfig:
    """How a picture becomes the input of a model, with timm's names."""

    size: int = 224
    """Width and height in pixels."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.9
    """Share of the shorter side in the centre crop for evaluation."""


def input_of(architecture: str, size: int) -> InputConfig:
    """The input of a timm model, normalised like the pictures for its pretrained weights. This differs between models.

    Args:
        architecture: timm's name. A model without pretrained weights gets the mean and deviation of ImageNet.
        size: width and height in pixels.
    """
    import timm

    found = timm.get_pretrained_cfg(architecture)
    return InputConfig(size) if found is None else InputConfig(size, tuple(found.mean), tuple(found.std))


def seed_everything(*words: int) -> None:
    """Seed the generators of Python, numpy and torch by some numbers, so that results depend on these only."""
    state = np.random.SeedSequence([word & 0xFFFFFFFF for word in words]).generate_state(4)
    random.seed(int(state[0]))
    np.random.seed(state[1])
    seed = int(state[2]) << 32 | int(state[3])
    # Not torch.manual_seed: where no GPU is in use, it stores a stack trace in case one will be, which takes
    # milliseconds, here for every picture.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


Transform = Callable[[Image.Image], Tensor]
"""A picture as a model's input [3, size, size]."""


def eval_transform(config: InputConfig) -> Transform:
    """timm's transform for evaluation: resize, centre crop, normalise."""
    from timm.data import create_transform

    made: Any = create_transform(
        config.size,
        is_training=False,
        interpolation=config.interpolation,
        mean=config.mean,
        std=config.std,
        crop_pct=config.crop_pct,
    )
    made.transforms.insert(0, _without_ends)
    return cast(Transform, made)


def _without_ends(image: Image.Image) -> Image.Image:
    """The middle of a picture that is very long or high, which is all that a centre crop sees.

    Resizing it whole by its shorter side can take minutes and gigabytes.
    """
    longest = 8 * min(image.size)
    if max(image.size) <= longest:
        return image
    left, top = (max(0, side - longest) // 2 for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top))


def train_transform(config: InputConfig, settings: TrainSettings) -> Transform:
    """timm's transform for training: random crop, mirror, colour, policy, erasing; normalise.

    Raises:
        UserError: timm does not know the policy.
    """
    from timm.data import create_transform

    try:
        made = create_transform(
            config.size,
            is_training=True,
            scale=(settings.min_scale, 1.0),
            hflip=settings.hflip,
            color_jitter=settings.color_jitter,
            auto_augment=settings.auto_augment,
            interpolation=config.interpolation,
            mean=config.mean,
            std=config.std,
            re_prob=settings.random_erase,
            re_mode="pixel",
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(
            f"--auto-augment {settings.auto_augment}: timm does not understand it ({error}); "
            "expected something like rand-m9-mstd0.5-inc1, augmix-m5 or original"
        ) from None
    return cast(Transform, made)


class TransformedPictures(Dataset):
    """Pictures with a transform. An index is a position, or (epoch, position) if the transform is random."""

    def __init__(self, pictures: PictureSet, transform: Transform, seed: int | None = None) -> None:
        self.pictures, self.transform, self.seed = pictures, transform, seed

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, int]:
        epoch, position = index if isinstance(index, tuple) else (0, index)
        image = self.pictures.read(position)
        if self.seed is not None:
            seed_everything(self.seed, epoch, position)
        return self.transform(image), self.pictures.targets[position]


class TrainBatches(Sampler):
    """Batches of one process, as (epoch, position). Their order does not depend on the number of processes.

    Every epoch is a permutation, cut into batches of `batch_size`. The rest is left out. Each process takes its part of
    each batch, so that all together do what one process would do alone.

    Args:
        length: number of pictures.
        batch_size: pictures in a step, over all processes together.
        seed: seed of the permutations.
        rank, world_size: number of this process, and of all processes.

    Raises:
        UserError: a batch is larger than the set, or cannot be shared evenly.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if batch_size > length:
            raise UserError(f"--batch-size {batch_size}: there are only {length} training pictures; expected fewer")
        if batch_size % world_size:
            raise UserError(f"--batch-size {batch_size}: expected a multiple of the {world_size} processes")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        share = batch_size // world_size
        self._part = slice(rank * share, (rank + 1) * share)
        self.epoch, self.first_batch = 0, 0

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """Start the next iteration at batch number `batch` of `epoch`."""
        self.epoch, self.first_batch = epoch, batch

    def __len__(self) -> int:
        return self.length // self.batch_size - self.first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        for number in range(self.first_batch, self.length // self.batch_size):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size][self._part]
            yield [(self.epoch, int(position)) for position in batch]


def train_loader(
    pictures: PictureSet, batches: TrainBatches, config: InputConfig, settings: TrainSettings, device: torch.device
) -> DataLoader:
    """Augmented batches in the order of `batches`: images [B, 3, size, size] float32, targets [B] int64."""
    dataset = TransformedPictures(pictures, train_transform(config, settings), settings.seed)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=count_workers(settings.workers, device),
        pin_memory=device.type == "cuda",
        worker_init_fn=_one_thread,
    )


def eval_loader(
    pictures: PictureSet,
    config: InputConfig,
    batch_size: int,
    workers: int | None,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Every `world_size`-th picture from `rank` on, in order: images [B, 3, size, size] float32, targets [B] int64."""
    positions = list(range(rank, len(pictures), world_size))
    return DataLoader(
        TransformedPictures(pictures, eval_transform(config)),
        batch_sampler=[positions[i : i + batch_size] for i in range(0, len(positions), batch_size)],
        num_workers=count_workers(workers, device),
        pin_memory=device.type == "cuda",
        worker_init_fn=_one_thread,
    )


def example_inputs(pictures: PictureSet, config: InputConfig, count: int = 256, batch_size: int = 32) -> list[Tensor]:
    """Some of the pictures as inputs [B, 3, size, size], without augmentation.

    They are spread evenly over the set, so that all classes are included.
    """
    transform = eval_transform(config)
    positions = range(0, len(pictures), max(1, len(pictures) // count))[:count]
    images = [transform(pictures.read(position)) for position in positions]
    return list(torch.stack(images).split(batch_size))


def count_workers(workers: int | None, device: torch.device) -> int:
    """The number of workers in the settings. If not set: 0 on a CPU, which computes itself, and up to 8 with a GPU."""
    if workers is not None:
        return workers
    return min(8, os.cpu_count() or 1) if device.type == "cuda" else 0


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
