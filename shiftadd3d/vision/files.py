"""Which files are pictures: those that Pillow reads, judged by suffix, or by content if there is no known suffix."""

from __future__ import annotations

import functools
import io
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from PIL import Image

from shiftadd3d._heif import HEIF_REMEDY, HEIF_SUFFIXES, heif_is_readable

# What Pillow knows the suffix of, but does not decode by itself (EPS would run Ghostscript), or what is no picture.
_NO_PICTURE_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PALM", "PDF", "WMF"}
# Known by their first bytes alone, and no container that others keep something else in, as cameras do in TIFF.
_SNIFFED_FORMATS = {"AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "WEBP"}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_ARCHIVES = {".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zip"}
# What stands beside pictures and says something about them. A folder of nothing else never was a class.
_NOTES = {
    *(".cfg", ".csv", ".db", ".doc", ".docx", ".htm", ".html", ".ini", ".ipynb", ".json", ".jsonl", ".lnk", ".log"),
    *(".md", ".ods", ".py", ".rst", ".sh", ".sqlite", ".toml", ".tsv", ".txt", ".url", ".xls", ".xlsx", ".xml"),
    *(".yaml", ".yml"),
}
_DESKTOP_FILES = {"desktop.ini", "icon\r", "thumbs.db"}  # written by desktops, not by people
_LISTED = 5


@functools.cache
def picture_suffixes() -> frozenset[str]:
    """The suffixes of pictures, in small letters with their dot: those that Pillow reads, HEIC if it was taught to."""
    heif_is_readable()
    known = Image.registered_extensions()  # loads all of Pillow's formats
    return frozenset(suffix for suffix, name in known.items() if name in _readable() or name == "MPO")


def picture_formats(names: Iterable[str] | None = None) -> list[str]:
    """Pillow's names of the formats that are pictures; of `names`, if given."""
    picture_suffixes()
    return sorted(_readable() if names is None else _readable() & set(names))


def _readable() -> set[str]:
    return set(Image.OPEN) - _NO_PICTURE_FORMATS


def usual_suffixes() -> str:
    """Some suffixes, for errors."""
    return ".jpg, .png, .webp or whatever else Pillow reads"


def is_heif(start: bytes) -> bool:
    """Whether a file that begins with these bytes is HEIC, as iPhones write it, whatever its suffix."""
    return start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS


def how_to_read(suffix: str) -> str:
    """How to make files with this suffix readable; empty if unknown."""
    if suffix in HEIF_SUFFIXES:
        return HEIF_REMEDY
    if suffix in (".avif", ".avifs"):
        return "pip install --upgrade pillow"
    if suffix in _ARCHIVES:
        return "unpack them"
    return "" if suffix in _NOTES else "convert them to .jpg or .png if they are pictures"


class Files(NamedTuple):
    """Files of a folder, as paths with slashes: the pictures, and all others but hidden ones."""

    pictures: list[str]
    others: list[str]


def sort_out(names: Iterable[str], open_file: Callable[[str], BinaryIO]) -> Files:
    """Find out which files are pictures.

    Args:
        names: paths with slashes. Hidden files, and files that desktops leave in folders, are in neither result.
        open_file: opens a file to look at its first bytes. After an OSError, the file counts as no picture.
    """
    files = Files([], [])
    for name in sorted(names):
        path = PurePosixPath(name)
        if any(part.startswith((".", "__MACOSX")) for part in path.parts) or path.name.lower() in _DESKTOP_FILES:
            continue
        (files.pictures if _is_picture(path, lambda name=name: open_file(name)) else files.others).append(name)
    return files


def _is_picture(path: PurePosixPath, open_file: Callable[[], BinaryIO]) -> bool:
    suffix = path.suffix.lower()
    if suffix in picture_suffixes():
        return True
    if suffix in _NOTES or suffix in _ARCHIVES or suffix in HEIF_SUFFIXES:
        return False
    # No suffix, or one such as in photo.jpg_large or J.Smith: what is within says it.
    try:
        with open_file() as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(file.read(1 << 16)), formats=picture_formats(_SNIFFED_FORMATS)):
                return True
    except Exception:  # formats meet foreign bytes with whatever their own code raises
        return False


def find_files(root: Path) -> Files:
    """The files below a folder, as paths relative to it. Links are followed, but not in circles.

    Raises:
        OSError: a folder cannot be read.
    """
    return sort_out(_walk(root), lambda name: (root / name).open("rb"))


def _walk(root: Path) -> Iterator[str]:
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_raise):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for file in files:
            path = Path(folder) / file
            if path.is_file():  # neither a pipe nor a link to nowhere
                yield path.relative_to(root).as_posix()


def _raise(error: OSError) -> None:
    raise error


def is_note(name: str) -> bool:
    """Whether a file that is no picture is text or a table: information about pictures, not an unreadable picture."""
    return PurePosixPath(name).suffix.lower() in _NOTES


def count_by_suffix(names: Iterable[str]) -> list[tuple[str, int]]:
    """Suffixes and how many files have them, most frequent first."""
    counted = Counter(PurePosixPath(name).suffix.lower() for name in names)
    return sorted(counted.items(), key=lambda item: (-item[1], item[0]))


def describe_unread(names: Iterable[str]) -> str:
    """`8 files of .heic (pip install pi-heif), 1 file of .txt`: files that are not read, by suffix."""
    words = []
    counted = count_by_suffix(names)
    for suffix, count in counted[:_LISTED]:
        hint = how_to_read(suffix)
        words.append(f"{count} {files_of(suffix, count)}" + (f" ({hint})" if hint else ""))
    return ", ".join(words) + (f" and {len(counted) - _LISTED} more suffixes" if len(counted) > _LISTED else "")


def files_of(suffix: str, count: int) -> str:
    """`files of .heic`, `file without a suffix`."""
    return ("file" if count == 1 else "files") + (f" of {suffix}" if suffix else " without a suffix")
