"""Photos or a video to a scene that one can train on: `shiftadd3d scenes from-photos`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from shiftadd3d._errors import UserError
from shiftadd3d._report import RichReport
from shiftadd3d.scenes.photo_options import FromPhotosOptions
from shiftadd3d.scenes.photos import Photo, Prepared, list_photos, prepare_photos, prepare_video
from shiftadd3d.scenes.poses import Lens, Poses, find_poses, need_pycolmap

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["FromPhotosReport", "scene_from_photos"]

_FEWEST = 3
"""Photos: two give one model of two views, which nothing can be trained on and tested."""

_DEPTH_MARGINS = (0.85, 1.2)
"""Allowed for beyond the 1 and 99 percentiles of the points' depths: surfaces reach beyond them."""


@dataclass(frozen=True)
class FromPhotosReport(RichReport):
    """Which photos were placed, and which were not."""

    scene: Path
    """The folder with transforms.json, images and sparse_pc.ply."""
    photos: int
    """Number of usable photos."""
    registered: int
    """Number of photos with a pose, which are in the scene."""
    unregistered: tuple[str, ...]
    """Names of photos without a pose."""
    skipped: dict[str, str]
    """Names of photos that were left out before that, and why."""
    cameras: int
    """Number of cameras, judged by EXIF data and sizes."""
    points: int
    """Number of triangulated points."""
    error: float
    """Mean reprojection error in pixels."""
    notes: tuple[str, ...] = ()
    """Further notes for the user."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds for reading the photos and for finding their poses."""

    def as_dict(self) -> dict[str, Any]:
        """The report in plain types, for JSON."""
        return {**asdict(self), "scene": str(self.scene)}

    def __rich__(self) -> RenderableType:
        from rich.text import Text

        lines = [
            f"{self.scene}: {self.registered} of {self.photos} photos placed, {_plural(self.cameras, 'camera')}, "
            f"{self.points} points, {self.error:.2f} px off on average, {sum(self.seconds.values()):.0f} s"
        ]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"left out, {reason}: {', '.join(names)}" for reason, names in reasons.items()]
        if self.unregistered:
            lines.append(f"not placed: {', '.join(self.unregistered)}")
        return Text("\n".join([*lines, *self.notes]))


def scene_from_photos(
    source: Path, out: Path, options: FromPhotosOptions | None = None, console: Console | None = None
) -> FromPhotosReport:
    """Find the camera poses of photos, and write the photos as a scene in nerfstudio's format.

    `out` appears when it is complete. Until then everything is in a hidden folder beside it. After an interruption, the
    same call continues from there. If the scene already exists, made from the same photos and options, it is not made
    again.

    Args:
        source: a folder of photos, or a video file. It is never written to.
        out: the scene's folder.
        options: see `FromPhotosOptions`.
        console: shows progress and messages; None is silent.

    Returns:
        The report.

    Raises:
        UserError: there are no photos, no video or too few usable photos; photos show no parallax or nothing in common;
            `out` holds something else or cannot be written; or pycolmap is missing.
    """
    need_pycolmap()
    options = options or FromPhotosOptions()
    _check(options)
    if not source.exists():
        raise UserError(f"{source} does not exist; expected a folder of photos, or a video file")
    files = list_photos(source) if source.is_dir() else [source]
    fingerprint = _fingerprint(files, options)
    made = _already_made(out, fingerprint)
    if made is not None:
        return made
    threads = options.threads or (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    work = out.absolute().parent / f".{out.name}.from-photos"
    try:
        with _only_one(work):
            began = time.monotonic()
            prepared = _prepared(source, files, work, fingerprint, options, threads, console)
            read = time.monotonic()
            try:
                poses = _find_poses(prepared.photos, source, work, options, threads, console)
            except UserError:
                shutil.rmtree(work, ignore_errors=True)  # with other photos nothing of it would serve
                raise
            seconds = {"reading": round(read - began, 1), "poses": round(time.monotonic() - read, 1)}
            report = _report(out, prepared, poses, seconds)
            _write_scene(work, out, prepared, poses, report, fingerprint)
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or out}: {error.strerror or error}; name a writable folder"
        ) from None
    shutil.rmtree(work, ignore_errors=True)
    return report


def _check(options: FromPhotosOptions) -> None:
    for name, value, least in (
        ("--max-side", options.max_side, 64),
        ("--frames", options.frames, _FEWEST),
        ("--threads", options.threads, 1),
        ("--seed", options.seed, 0),
    ):
        if value is not None and value < least:
            raise UserError(f"{name} {value}: expected {least} or more")


def _fingerprint(files: list[Path], options: FromPhotosOptions) -> str:
    """Changes with whatever the scene depends on."""
    facts: list[Any] = [{**asdict(options), "threads": None}]
    for path in files:
        status = path.stat()
        facts.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _already_made(out: Path, fingerprint: str) -> FromPhotosReport | None:
    """The report of a scene that is there already, from these very photos.

    Raises:
        UserError: something else is there.
    """
    if not (out.exists() or out.is_symlink()) or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        meta = json.loads((out / "transforms.json").read_text(encoding="utf-8"))["from_photos"]
        if meta["fingerprint"] == fingerprint:
            facts = meta["report"]
            facts.update(scene=out, unregistered=tuple(facts["unregistered"]), notes=tuple(facts["notes"]))
            return FromPhotosReport(**facts)
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise UserError(
        f"{out} exists, and is no scene of these photos with these options; name another folder, or remove it"
    )


@contextmanager
def _only_one(work: Path) -> Iterator[None]:
    """Refuses to work where another process does.

    Raises:
        UserError: it does.
    """
    import psutil

    work.mkdir(parents=True, exist_ok=True)
    mark = work / "process"
    try:
        other = int(mark.read_text())
    except (OSError, ValueError):
        other = 0
    if other not in (0, os.getpid()) and psutil.pid_exists(other):
        raise UserError(f"process {other} is already making this scene; if it is not, remove {work}")
    mark.write_text(str(os.getpid()))
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)


def _prepared(
    source: Path,
    files: list[Path],
    work: Path,
    fingerprint: str,
    options: FromPhotosOptions,
    threads: int,
    console: Console | None,
) -> Prepared:
    """The prepared photos, of an earlier run if it got that far.

    Raises:
        UserError: too few of them.
    """
    record = work / "prepared.json"
    try:
        facts = json.loads(record.read_text(encoding="utf-8"))
        if facts["fingerprint"] == fingerprint:
            prepared = Prepared(
                tuple(Photo(**photo) for photo in facts["photos"]), facts["skipped"], tuple(facts["notes"])
            )
            if console is not None:
                console.print(
                    f"going on where an earlier run stopped ({work})", highlight=False, markup=False, soft_wrap=True
                )
            return prepared
    except (OSError, ValueError, LookupError, TypeError):
        pass
    for path in work.iterdir():
        if path.name != "process":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    images = work / "images"
    try:
        if source.is_dir():
            prepared = prepare_photos(files, images, options.max_side, threads, console)
        else:
            prepared = prepare_video(source, images, options.max_side, options.frames, console)
        _check_count(source, prepared)
    except UserError:
        shutil.rmtree(work, ignore_errors=True)
        raise
    if options.own_cameras and source.is_dir():
        photos = tuple(Photo(**{**asdict(photo), "camera": photo.file}) for photo in prepared.photos)
        prepared = Prepared(photos, prepared.skipped, prepared.notes)
    facts = {"fingerprint": fingerprint, **asdict(prepared)}
    unfinished = record.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(facts), encoding="utf-8")
    unfinished.replace(record)
    return prepared


def _check_count(source: Path, prepared: Prepared) -> None:
    count = len(prepared.photos)
    if count >= _FEWEST:
        return
    kind = "photo" if source.is_dir() else "frame"
    left_out = ""
    if prepared.skipped:
        name, reason = next(iter(prepared.skipped.items()))
        left_out = f" ({len(prepared.skipped)} more left out, such as {name}: {reason})"
    raise UserError(
        f"{source} has {_plural(count, f'usable {kind}')}{left_out}; expected {_FEWEST} at least, better 20 or more, "
        "of one scene from different places"
    )


def _find_poses(
    photos: tuple[Photo, ...],
    source: Path,
    work: Path,
    options: FromPhotosOptions,
    threads: int,
    console: Console | None,
) -> Poses:
    """`find_poses`, again from the start if an earlier run left a database that cannot be read."""
    resumed = (work / "database.db").exists()
    for attempt in range(2):
        try:
            return find_poses(
                photos,
                work / "images",
                work,
                in_sequence=source.is_file(),
                lens=options.lens,
                threads=threads,
                seed=options.seed,
                console=console,
            )
        except RuntimeError:
            if attempt or not resumed:
                raise
            for path in work.glob("database.db*"):
                path.unlink()
    raise AssertionError


def _report(out: Path, prepared: Prepared, poses: Poses, seconds: dict[str, float]) -> FromPhotosReport:
    total, registered = len(prepared.photos), len(poses.camera_to_world)
    notes = list(prepared.notes)
    if 2 * registered < total:
        notes.append(
            "fewer than half of the photos could be placed: photograph with smaller steps, each photo overlapping the "
            "one before by two thirds, and keep to one scene where nothing moves"
        )
    return FromPhotosReport(
        scene=out,
        photos=total,
        registered=registered,
        unregistered=tuple(photo.name for photo in prepared.photos if photo.file not in poses.camera_to_world),
        skipped=prepared.skipped,
        cameras=len(set(poses.lenses.values())),
        points=poses.points,
        error=round(poses.error, 3),
        notes=tuple(notes),
        seconds=seconds,
    )


def _write_scene(
    work: Path, out: Path, prepared: Prepared, poses: Poses, report: FromPhotosReport, fingerprint: str
) -> None:
    """Writes the scene beside `out`, then renames it."""
    scene = work / "scene"
    shutil.rmtree(scene, ignore_errors=True)
    (scene / "images").mkdir(parents=True)
    lenses = set(poses.lenses.values())
    frames = []
    for photo in prepared.photos:
        pose = poses.camera_to_world.get(photo.file)
        if pose is None:
            continue
        shutil.copyfile(work / "images" / photo.file, scene / "images" / photo.file)
        frame: dict[str, Any] = {"file_path": f"images/{photo.file}", "original": photo.name}
        if len(lenses) > 1:
            frame.update(_intrinsics(poses.lenses[photo.file]))
        # OpenCV's axes to OpenGL's, which transforms.json has: y up, z backward.
        frame["transform_matrix"] = (pose @ np.diag([1.0, -1.0, -1.0, 1.0])).tolist()
        frames.append(frame)
    low, high = np.percentile(poses.depths, [1.0, 99.0])
    meta: dict[str, Any] = {"camera_model": "OPENCV"}
    if len(lenses) == 1:
        meta.update(_intrinsics(next(iter(lenses))))
    meta.update(
        ply_file_path=poses.point_cloud.name,
        shiftadd3d={"near": float(low) * _DEPTH_MARGINS[0], "far": float(high) * _DEPTH_MARGINS[1]},
        from_photos={"fingerprint": fingerprint, "report": report.as_dict()},
        frames=frames,
    )
    shutil.copyfile(poses.point_cloud, scene / poses.point_cloud.name)
    (scene / "transforms.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if out.is_dir():
        out.rmdir()  # empty, or we would not be here
    scene.replace(out)


def _intrinsics(lens: Lens) -> dict[str, float]:
    facts = asdict(lens)
    return {"w": facts.pop("width"), "h": facts.pop("height"), **facts}


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
