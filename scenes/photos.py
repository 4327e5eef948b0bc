"""Prepare photos and videos for finding poses: upright, RGB, of limited size, numbered.

The originals are only read. Prepared images are in a folder `images`, as `0001.jpg` and so on. So names with blanks or
umlauts, and files whose names differ only in the suffix, cause no trouble.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps
from rich.console import Console

from shiftadd3d._errors import UserError
from shiftadd3d._extras import need
from shiftadd3d._heif import HEIF_REMEDY, HEIF_SUFFIXES, heif_is_readable
from shiftadd3d._progress import progress

__all__ = ["Photo", "Prepared", "choose_frames", "list_photos", "prepare_photos", "prepare_video"]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".mpo", ".avif")

_FULL_FRAME_DIAGONAL = 43.267
"""Millimetres: what EXIF's focal length "in 35 mm film" refers to, by its diagonal."""

_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
"""What PIL raises for files that are damaged, cut off, or no pictures."""

_LOOK = 480
"""Side in pixels of the squares that frames of a video are compared as."""


@dataclass(frozen=True)
class Photo:
    """A photo, or a frame of a video, prepared for finding its pose."""

    name: str
    """Its name for the user."""
    file: str
    """Its name in the folder of prepared images."""
    width: int
    """Pixels, of the prepared image."""
    height: int
    """Pixels, of the prepared image."""
    camera: str
    """The same for photos of one camera with one setting of its lens, judged by EXIF data and size."""
    focal: float | None
    """Focal length from EXIF, in pixels of the prepared image."""


@dataclass(frozen=True)
class Prepared:
    """The prepared photos of a folder, or frames of a video."""

    photos: tuple[Photo, ...]
    """Photos in the order of names, or frames in the order of time."""
    skipped: dict[str, str]
    """Photos that were left out, by name, and why."""
    notes: tuple[str, ...] = ()
    """Further notes for the user."""


# --------------------------------------------------------------------------------------------------------------------
# Photos
# --------------------------------------------------------------------------------------------------------------------


def list_photos(folder: Path) -> list[Path]:
    """The photos directly in a folder, in the order people count in: 2 before 10.

    Raises:
        UserError: there are none.
    """
    try:
        files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    except OSError as error:
        raise UserError(
            f"cannot read {folder}: {error.strerror or error}; name a folder of photos or a video"
        ) from None
    photos = [path for path in files if path.suffix.lower() in {*_SUFFIXES, *HEIF_SUFFIXES}]
    if not photos:
        suffixes = (*_SUFFIXES, *HEIF_SUFFIXES)
        inside = sorted(path.parent.name for path in folder.glob("*/*") if path.suffix.lower() in suffixes)
        hint = f"; there are some in {folder / inside[0]}" if inside else ""
        raise UserError(f"no photos in {folder}: expected JPEG, PNG, HEIC, WebP or TIFF files, or a video file{hint}")
    return sorted(photos, key=lambda path: _counting(path.name))


def _counting(name: str) -> tuple[Any, ...]:
    parts = re.split(r"(\d+)", name.lower())
    return (*(int(part) if index % 2 else part for index, part in enumerate(parts)), name)


def prepare_photos(
    files: Sequence[Path], images: Path, max_side: int, threads: int, console: Console | None
) -> Prepared:
    """Write each photo upright, in RGB and with at most `max_side` pixels on a side into `images`.

    A JPEG or PNG file that already meets this is copied byte for byte. Unreadable photos, and copies of earlier ones,
    are left out and named.

    Args:
        files: the photos.
        images: the folder to write to; made if missing.
        max_side: in pixels.
        threads: number of photos at once.
        console: shows progress; None shows none.

    Raises:
        UserError: no photo is of a kind that can be read here.
    """
    heif = [path for path in files if path.suffix.lower() in HEIF_SUFFIXES]
    no_heif = f"HEIC, which needs another package: {HEIF_REMEDY} (or let the phone save JPEG)"
    blind = bool(heif) and not heif_is_readable()
    if blind and len(heif) == len(files):
        raise UserError(f"{len(files)} of {len(files)} photos are {no_heif}")
    images.mkdir(parents=True, exist_ok=True)

    def prepare(numbered: tuple[int, Path]) -> tuple[Photo, str] | str:
        number, path = numbered
        if blind and path in heif:
            return no_heif
        try:
            return _prepare(path, images, f"{number:04d}", max_side)
        except _UNREADABLE as error:
            # A full disk or a folder that may not be written to is no photo's fault.
            if isinstance(error, OSError) and error.filename is not None and Path(error.filename) != path:
                raise
            return "cannot be read: damaged, cut off, or no picture"

    photos: list[Photo] = []
    skipped: dict[str, str] = {}
    first: dict[str, str] = {}
    with (
        progress("reading photos", len(files), unit="photos", console=console, disable=console is None) as steps,
        ThreadPoolExecutor(threads) as pool,
    ):
        for path, result in zip(files, pool.map(prepare, enumerate(files, start=1)), strict=True):
            steps.advance()
            if isinstance(result, str):
                skipped[path.name] = result
                continue
            photo, content = result
            if content in first:
                skipped[path.name] = f"a copy of {first[content]}"
                (images / photo.file).unlink()
                continue
            first[content] = path.name
            photos.append(photo)
    return Prepared(tuple(photos), skipped)


def _prepare(path: Path, images: Path, stem: str, max_side: int) -> tuple[Photo, str]:
    """The prepared photo, and a digest of its pixels."""
    with Image.open(path) as original:
        original.load()
        exif = original.getexif()
        details = exif.get_ifd(ExifTags.IFD.Exif)
        plain = (
            original.format in ("JPEG", "PNG")
            and original.mode == "RGB"
            and exif.get(ExifTags.Base.Orientation, 1) == 1
            and max(original.size) <= max_side
        )
        picture = ImageOps.exif_transpose(original)
        full = picture.size
        if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA"):
            picture = Image.alpha_composite(Image.new("RGBA", full, "white"), picture.convert("RGBA"))
        if picture.mode.startswith(("I", "F")):
            picture = _eight_bits(picture)
        picture = picture.convert("RGB")
        if max(full) > max_side:
            picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        if min(picture.size) < 32:
            raise ValueError("smaller than any feature")
        if plain:
            file = f"{stem}.{'png' if original.format == 'PNG' else 'jpg'}"
            shutil.copyfile(path, images / file)
        else:
            file = f"{stem}.jpg"
            picture.save(images / file, quality=95, subsampling=0)
    width, height = picture.size
    camera = [
        full[0],
        full[1],
        *(str(exif.get(tag, "")).strip("\0 ") for tag in (ExifTags.Base.Make, ExifTags.Base.Model)),
    ]
    lens = (
        ExifTags.Base.LensModel,
        ExifTags.Base.FocalLength,
        ExifTags.Base.FocalLengthIn35mmFilm,
        ExifTags.Base.DigitalZoomRatio,
    )
    camera += [str(details.get(tag, "")).strip("\0 ") for tag in lens]
    photo = Photo(
        name=path.name,
        file=file,
        width=width,
        height=height,
        camera=" ".join(str(part) for part in camera if part != ""),
        focal=_focal(details, full, max(picture.size) / max(full)),
    )
    return photo, hashlib.sha1(picture.tobytes() + bytes(str(picture.size), "ascii")).hexdigest()


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or of floats, stretched over 8: PIL alone would cut off what is above 255."""
    values = np.asarray(picture, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    return Image.fromarray(((values - low) * (255 / max(high - low, 1e-9))).astype(np.uint8))


def _focal(details: Any, size: tuple[int, int], scale: float) -> float | None:
    """Focal length in pixels of a photo shrunk by `scale`, from its EXIF details; None where they tell none."""
    try:
        equivalent = float(details.get(ExifTags.Base.FocalLengthIn35mmFilm, 0))
        focal = equivalent / _FULL_FRAME_DIAGONAL * float(np.hypot(*size))
        if not focal > 0:
            unit = {2: 25.4, 3: 10.0, 4: 1.0}.get(int(details.get(ExifTags.Base.FocalPlaneResolutionUnit, 2)), 25.4)
            density = float(details.get(ExifTags.Base.FocalPlaneXResolution, 0)) / unit
            # The density is that of the photo as taken; an edited one of another size makes it void.
            taken = int(details.get(ExifTags.Base.ExifImageWidth, 0))
            focal = float(details.get(ExifTags.Base.FocalLength, 0)) * density if taken in size else 0.0
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    # From fisheye to telescope; anything else is a slip of the file.
    return focal * scale if 0.2 < focal / max(size) < 20 else None


# --------------------------------------------------------------------------------------------------------------------
# Videos
# --------------------------------------------------------------------------------------------------------------------


def prepare_video(video: Path, images: Path, max_side: int, frames: int | None, console: Console | None) -> Prepared:
    """Choose sharp frames that are spread over a video, and write them upright into `images`.

    The video is read twice: small and grey for choosing, then again to write the chosen frames. If the file is
    truncated, the part that can be read is used, and a note says so.

    Args:
        video: a file that ffmpeg reads.
        images: the folder to write to; made if missing.
        max_side: in pixels.
        frames: number of frames; None for three a second, but at least 20 and at most 100.
        console: shows progress; None shows none.

    Raises:
        UserError: it is not a video, or has no frame.
    """
    need("reading a video", "imageio_ffmpeg", extra="poses")
    import imageio_ffmpeg

    unreadable = UserError(
        f"{video} cannot be read as a video; expected a folder of photos, or a whole file of MP4, MOV, MKV, WebM or "
        "another kind that ffmpeg reads (an MP4 that breaks off may have lost its index, and all is lost with it)"
    )
    logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)  # it warns of videos that are rotated
    try:
        reader = imageio_ffmpeg.read_frames(str(video.resolve()))
        meta: dict[str, Any] = next(reader)  # type: ignore[assignment]
        reader.close()
    except (OSError, RuntimeError, StopIteration, IndexError, KeyError, ValueError):
        raise unreadable from None
    fps, duration = float(meta.get("fps") or 30), float(meta.get("duration") or 0)
    expected = max(1, round(fps * duration))

    sharpness: list[float] = []
    motion: list[float] = []
    before: np.ndarray | None = None
    with progress("looking at the video", expected, unit="frames", console=console, disable=console is None) as steps:
        stream = _Grey(video)
        for frame in stream:
            sharpness.append(_sharpness(frame))
            small = frame.reshape(_LOOK // 8, 8, _LOOK // 8, 8).mean(axis=(1, 3))
            motion.append(0.0 if before is None else float(np.abs(small - before).mean()))
            before = small
            steps.advance()
    count = len(sharpness)
    if count == 0:
        raise unreadable
    notes = []
    # Durations are rounded, and frames of phones come irregularly: a tenth is no loss.
    if stream.failed or count < 0.9 * expected - 2:
        notes.append(f"{video.name} breaks off: {count} of about {max(expected, count)} frames can be read, and serve")
    wanted = min(100, max(20, round(3 * count / fps))) if frames is None else frames
    chosen = choose_frames(np.array(sharpness), np.array(motion), wanted)

    images.mkdir(parents=True, exist_ok=True)
    _write_frames(video, chosen, images, max_side)
    photos = []
    for number, frame in enumerate(chosen, start=1):
        file = images / f"{number:04d}.jpg"
        if not file.is_file():
            raise unreadable
        with Image.open(file) as picture:
            width, height = picture.size
        photos.append(Photo(f"frame {frame} ({frame / fps:.1f} s)", file.name, width, height, "video", None))
    notes.append(f"{len(photos)} of {count} frames chosen, the sharpest of each passage")
    return Prepared(tuple(photos), {}, tuple(notes))


def _input(video: Path) -> tuple[str, ...]:
    # As a file: a name may look like an option, or like an address.
    return "-i", f"file:{video.resolve()}", "-map", "0:v:0"


class _Grey(Iterator[np.ndarray]):
    """The frames of a video as squares of `_LOOK` pixels, grey, float32. `failed`: ffmpeg complained."""

    def __init__(self, video: Path) -> None:
        import imageio_ffmpeg

        self.failed = False
        self._process = subprocess.Popen(
            [
                *(imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", *_input(video)),
                *("-vf", f"scale={_LOOK}:{_LOOK}:flags=area,format=gray", "-fps_mode", "passthrough"),
                *("-f", "rawvideo", "-"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def __next__(self) -> np.ndarray:
        assert self._process.stdout is not None
        data = self._process.stdout.read(_LOOK * _LOOK)
        if len(data) < _LOOK * _LOOK:
            self._process.stdout.close()
            self.failed = self._process.wait() != 0
            raise StopIteration
        return np.frombuffer(data, dtype=np.uint8).reshape(_LOOK, _LOOK).astype(np.float32)

    def __del__(self) -> None:
        self._process.kill()
        self._process.wait()


def _sharpness(grey: np.ndarray) -> float:
    """Variance of the Laplacian: motion and a lens out of focus take it away."""
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    return float(laplacian.var())


def choose_frames(sharpness: np.ndarray, motion: np.ndarray, wanted: int) -> list[int]:
    """Indices of frames to use: the video is cut into passages, and each gives its sharpest frame.

    Half of a passage's length is time, and half is how much the picture changes. So a resting camera does not give the
    same view again and again.

    Args:
        sharpness: sharpness of each frame, [n].
        motion: how much each frame differs from the one before, [n].
        wanted: number of frames. The outcome has fewer if the video has fewer.
    """
    count = len(sharpness)
    if count <= wanted:
        return list(range(count))
    moved = np.cumsum(motion) / max(float(motion.sum()), 1e-9)
    passed = (np.arange(count) / count + moved) / 2
    passage = np.minimum((passed / max(float(passed[-1]), 1e-9) * wanted).astype(int), wanted - 1)
    return [
        int(index[np.argmax(sharpness[index])])
        for index in (np.flatnonzero(passage == p) for p in range(wanted))
        if len(index)
    ]


def _write_frames(video: Path, chosen: Sequence[int], images: Path, max_side: int) -> None:
    import imageio_ffmpeg

    select = "+".join(f"eq(n,{frame})" for frame in chosen)
    wide, high = f"if(gt(iw,ih),min({max_side},iw),-2)", f"if(gt(iw,ih),-2,min({max_side},ih))"
    subprocess.run(
        [
            *(imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-y", "-v", "error", *_input(video)),
            *("-vf", f"select='{select}',scale='{wide}':'{high}'", "-fps_mode", "passthrough"),
            *("-q:v", "2", "%04d.jpg"),
        ],
        cwd=images,  # a name with a per cent sign would be part of the pattern
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,  # a video that breaks off ends with an error, and the frames before it are there
    )
