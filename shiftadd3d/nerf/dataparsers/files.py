"""Finding the files that a camera file means, whichever machine wrote their names."""

from __future__ import annotations

import atexit
import functools
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image

from shiftadd3d._errors import UserError
from shiftadd3d.nerf.dataparsers.checks import read_sizes
from shiftadd3d.nerf.photos import UNREADABLE, photo_header

MAX_AUTO_RESOLUTION = 1600
"""Longest image side in pixels that the automatic downscale factor accepts, as in nerfstudio's parsers."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".jfif", ".avif", ".jp2", ".ppm")

_MAP = re.compile(r"(^|[._-])(depth|normal|normals|mask|alpha|dynamic_mask)([._-]?\d+)?$|^dynamic_mask_", re.IGNORECASE)
"""Stems of what is no picture of the scene but lies beside one: r_0_depth_0001, 3.depth, dynamic_mask_r_0."""


def say(line: str) -> None:
    """Print one line on the console. It is not wrapped, and brackets in it are no markup."""
    CONSOLE.print(line, style="yellow", soft_wrap=True, markup=False, highlight=False, emoji=False)


def is_map(path: Path) -> bool:
    """Whether a file's name says that it is a depth map, a map of normals or a mask."""
    return _MAP.search(path.stem) is not None


def image_files(folder: Path) -> list[Path]:
    """The image files directly in a folder, sorted by name."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))


def downscaled_folders(folder: Path) -> dict[int, Path]:
    """{1: images, 2: images_2, 8: images_8, ...} for those that exist beside (or as) `folder`."""
    found = {1: folder} if folder.is_dir() else {}
    for path in sorted(folder.parent.glob(f"{folder.name}_*")):
        factor = path.name[len(folder.name) + 1 :]
        if path.is_dir() and factor.isdecimal() and int(factor) > 1:
            found[int(factor)] = path
    return found


def choose_factor(requested: float | None, available: Sequence[int], longest_side: int, where: Path) -> int:
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
        say(f"{where}: the smallest images are {longest_side // factor} px wide; this will be slow")
    return factor


def side_of(path: Path, others: Iterable[Path]) -> int:
    """The longer side of an image in pixels.

    Args:
        path: the image.
        others: more of its kind, to say how many are like it if it cannot be read.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return max(photo_header(path)[:2])
    except UNREADABLE:
        return max(read_sizes(list(others), "image")[0])


class Folder:
    """Finds files in a scene's folder by the names that programs on other machines gave them.

    Windows' separators, `./`, a suffix that is left out, the other Unicode normal form (macOS decomposes umlauts),
    other capitals (Windows and macOS do not tell them apart) and absolute paths of a machine where the folder stood
    elsewhere are all the same file. An exact match wins.

    Args:
        path: the folder that names are relative to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listings: dict[Path, dict[str, str | None]] = {}

    def find(self, name: str, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> Path | None:
        """The file of a name, or None.

        Args:
            name: as it is written in a camera file.
            suffixes: those to try, in this order, if there is no file of that very name.
        """
        if "\0" in name or not name.strip():
            return None
        exact = self.path / name
        if _is_file(exact):
            return exact
        parts = PurePosixPath(name.replace("\\", "/")).parts
        absolute = bool(parts) and (parts[0] == "/" or re.fullmatch(r"[A-Za-z]:/?", parts[0]) is not None)
        if not absolute:
            return self._walk(parts, suffixes)
        for start in range(1, len(parts)):  # the longest tail of it that is here
            found = self._walk(parts[start:], suffixes)
            if found is not None:
                return found
        return None

    def _walk(self, parts: Sequence[str], suffixes: Sequence[str]) -> Path | None:
        folder = self.path
        for part in parts[:-1]:
            folder = folder / part if part == ".." else self._entry(folder, part)
            if folder is None:
                return None
        if not parts:
            return None
        for suffix in ("", *suffixes):
            found = self._entry(folder, parts[-1] + suffix)
            if found is not None and _is_file(found):
                return found
        return None

    def _entry(self, folder: Path, name: str) -> Path | None:
        listing = self._listings.get(folder)
        if listing is None:
            listing = {}
            try:
                names = sorted(path.name for path in folder.iterdir())
            except OSError:
                names = []
            for entry in names:
                key = _plain(entry)
                listing[key] = None if key in listing else entry  # two that differ in capitals: neither is meant
            listing.update({entry: entry for entry in names})
            self._listings[folder] = listing
        entry = listing.get(name) or listing.get(_plain(name))
        return None if entry is None else folder / entry


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or that no file can have
        return False


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def white_mask(width: int, height: int) -> Path:
    """A mask that keeps every pixel, for a view without one where other views have one. In a folder of this process."""
    path = _white_masks() / f"white_{width}x{height}.png"
    if not path.is_file():
        Image.new("L", (width, height), 255).save(path)
    return path


@functools.cache
def _white_masks() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="shiftadd3d-masks-")
    atexit.register(folder.cleanup)
    return Path(folder.name)
