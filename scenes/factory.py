"""A factory of made-up scenes to train a renderer across: `shiftadd3d scenes make-factory`.

A factory is a folder. `factory.json` holds the settings that decide its scenes, and lists them. `scene_00000/` and so
on are data sets in nerfstudio's format, each with

- `transforms.json`: cameras (conventions as in `shiftadd3d.scenes.make`), a train/test split, and in the block
`shiftadd3d` the range `near` to `far` of z-depths;
- `images/*.png`: 8-bit sRGB, with an alpha channel if there is nothing behind the things of the scene;
- `depths/*.png`: true z-depth at pixel centres, 16-bit, thousandths of a unit (nerfstudio's `depth_file_path` and its
default unit); 0 where there is nothing;
- `scene.json`: the scene's entry in `factory.json`.

Scene i of seed s depends only on (s, i), the requested size and `GENERATOR`.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from shiftadd3d._errors import UserError
from shiftadd3d._report import write_json

from ._photograph import Photograph, Studio, exposure, objection, picture
from ._random_scene import Stage, draw_stage
from .make import load_mitsuba

__all__ = ["GENERATOR", "Factory", "draw_contact_sheets", "make_factory", "open_factory", "scenes_of"]

GENERATOR = 1
"""Version of the generator. It changes whenever the same seed would give other scenes."""

_FORMAT = "shiftadd3d scene factory"
_INDEX = "factory.json"
_SHEETS = "contact-sheets"
_MOST = 100_000  # what five digits count
_ATTEMPTS = 60
_DEPTH_UNIT = 1e-3  # nerfstudio's default
_SHEET_SCENES = 60


@dataclass(frozen=True)
class Factory:
    """A folder of scenes, and the settings that decide them.

    Attributes:
        folder: the folder.
        seed: decides, together with a scene's number, what the scene shows.
        size: width and height of all pictures; if None, each scene has a random size.
    """

    folder: Path
    seed: int
    size: tuple[int, int] | None = None

    def scene(self, index: int) -> Path:
        """The folder of scene `index`, whether it exists or not."""
        return self.folder / f"scene_{index:05d}"

    def identity(self) -> dict[str, Any]:
        """Settings that two factories with the same scenes share."""
        return {"generator": GENERATOR, "seed": self.seed, "size": None if self.size is None else list(self.size)}


def open_factory(folder: Path) -> Factory:
    """The factory in a folder.

    Raises:
        UserError: there is none, or its index cannot be read.
    """
    index = _read_index(folder)
    size = index["size"]
    return Factory(folder, int(index["seed"]), None if size is None else (int(size[0]), int(size[1])))


def scenes_of(factory: Factory) -> Iterator[dict[str, Any]]:
    """The entries of all finished scenes, in order, from the folder itself.

    Raises:
        UserError: the folder of a scene has no `scene.json`.
    """
    for path in sorted(factory.folder.glob("scene_*")):
        yield _read_facts(path)


def _read_facts(scene: Path) -> dict[str, Any]:
    try:
        return json.loads((scene / "scene.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{scene} is damaged ({error}); delete it, and make-factory makes it again") from error


def make_factory(factory: Factory, count: int, *, workers: int = 1, console: Console | None = None) -> Path:
    """Make the missing ones of the scenes 0 to `count` - 1, and draw contact sheets.

    After Ctrl-C, finished scenes stay, and the same call continues.

    Args:
        factory: the folder and the settings.
        count: number of scenes in the folder. Further existing scenes stay.
        workers: number of processes, each on one core.
        console: shows progress.

    Returns:
        The path of `factory.json`.

    Raises:
        UserError: a wrong setting, a folder that holds something else or cannot be written to, or a missing mitsuba.
    """
    console = console or Console()
    _check(factory, count, workers)
    load_mitsuba()
    _begin(factory, console)
    missing = [index for index in range(count) if not factory.scene(index).exists()]
    if missing:
        _make(factory, missing, min(workers, len(missing)), count, console)
    draw_contact_sheets(factory, console)
    scenes = list(scenes_of(factory))
    _write_index(factory, scenes)
    console.print(f"{factory.folder / _INDEX}: {len(scenes)} scenes, {sum(scene['views'] for scene in scenes)} views")
    return factory.folder / _INDEX


def _check(factory: Factory, count: int, workers: int) -> None:
    if not 1 <= count <= _MOST:
        raise UserError(f"--count {count}: expected 1 to {_MOST}")
    if factory.seed < 0:
        raise UserError(f"--seed {factory.seed}: expected 0 or more")
    cores = os.cpu_count() or 1
    if not 1 <= workers <= 4 * cores:
        raise UserError(f"--workers {workers}: expected 1 to {4 * cores}, four times this machine's {cores} cores")
    if factory.size is not None:
        width, height = factory.size
        if not (
            min(width, height) >= 16 and max(width, height) <= 2048 and max(width, height) <= 3 * min(width, height)
        ):
            raise UserError(
                f"--size {width} {height}: expected 16 to 2048 pixels, the longer side at most three times the other"
            )


def _begin(factory: Factory, console: Console) -> None:
    """Make the folder a factory, or see that it is this one."""
    folder = factory.folder
    try:
        if not (folder / _INDEX).exists():
            if folder.exists() and any(folder.iterdir()):
                raise UserError(
                    f"{folder} holds something else; name a new or empty folder, or a factory to go on with"
                )
            folder.mkdir(parents=True, exist_ok=True)
            _write_index(factory, [])
            return
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror or error}; name a folder in a writable place"
        ) from error
    index = _read_index(folder)
    for name, wanted in factory.identity().items():
        if index[name] != wanted:
            raise UserError(
                f"{folder} is a factory with {name} {index[name]}, not {wanted}; name another folder, or repeat the "
                "options that it was begun with"
            )
    for name, begun in index["versions"].items():
        if version(name) != begun:
            console.print(f"begun with {name} {begun}, goes on with {version(name)}: scenes may differ in detail")
    _clear(folder)


def _clear(folder: Path) -> None:
    """Remove the halves of scenes whose makers are no more."""
    for leftover in folder.glob(".scene_*-*-*"):
        _, host, process = leftover.name.rsplit("-", 2)
        if host == _host() and not psutil.pid_exists(int(process)):
            shutil.rmtree(leftover, ignore_errors=True)


def _host() -> str:
    return platform.node().replace("-", "_") or "here"


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / _INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{folder} is no factory: {path}: {error.strerror or error}; expected a folder that make-factory wrote"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); expected what make-factory wrote") from error
    keys = {"format", "generator", "seed", "size", "versions", "scenes"}
    if not isinstance(index, dict) or index.get("format") != _FORMAT or not keys <= index.keys():
        raise UserError(f"{path} is no index of a factory; expected what make-factory wrote")
    return index


def _write_index(factory: Factory, scenes: list[dict[str, Any]]) -> None:
    path = factory.folder / _INDEX
    versions = {name: version(name) for name in ("shiftadd3d", "mitsuba", "numpy", "pillow")}
    if path.exists():
        versions = _read_index(factory.folder)["versions"]
    beside = path.with_name(f".{_INDEX}-{os.getpid()}")
    write_json(beside, {"format": _FORMAT, **factory.identity(), "versions": versions, "scenes": scenes})
    beside.replace(path)


# In several processes


def _make(factory: Factory, missing: list[int], workers: int, count: int, console: Console) -> None:
    context = multiprocessing.get_context("spawn")
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=console) as progress,
        ProcessPoolExecutor(workers, mp_context=context, initializer=_be_worker) as pool,
    ):
        task = progress.add_task("making scenes", total=count, completed=count - len(missing))
        done = {scene["name"]: scene for scene in scenes_of(factory)}
        try:
            for future in as_completed([pool.submit(make_scene, factory, index) for index in missing]):
                scene = future.result()
                done[scene["name"]] = scene
                _write_index(factory, [done[name] for name in sorted(done)])
                progress.advance(task)
        except BrokenProcessPool as error:
            raise UserError(
                "a worker was killed, perhaps because memory ran out; the same command continues, with fewer --workers "
                "if necessary"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
                process.join()
            _clear(factory.folder)
            console.print(f"{len(done)} scenes are finished; the same command continues")
            raise


def _be_worker() -> None:
    """Leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _renderer() -> Any:
    """The mitsuba module, on one core: with several, samples depend on which thread took which part of a picture."""
    mi = load_mitsuba()
    import drjit

    drjit.set_thread_count(1)
    return mi


def make_scene(factory: Factory, index: int) -> dict[str, Any]:
    """Draw, photograph and write one scene. It appears in the folder when it is complete.

    Returns:
        Its entry in `factory.json`.

    Raises:
        UserError: the disk is full, or no scene of this size can be drawn.
    """
    target = factory.scene(index)
    if target.exists():
        return _read_facts(target)
    begun = time.process_time()
    stage, studio, surveyed, attempt = _fit_stage(factory, index)
    factor = exposure(stage, surveyed)
    beside = factory.folder / f".{target.name}-{_host()}-{os.getpid()}"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        for name in ("images", "depths"):
            (beside / name).mkdir(parents=True)
        near, far = _photograph_all(stage, studio, factor, beside)
        write_json(beside / "transforms.json", _transforms(stage, near, far))
        width, height = stage.size
        facts = {
            "name": target.name,
            "kind": stage.kind,
            "views": len(stage.poses),
            "width": width,
            "height": height,
            "alpha": stage.open,
            "near": near,
            "far": far,
            "attempt": attempt,
            "seconds": round(time.process_time() - begun, 2),
        }
        write_json(beside / "scene.json", facts)
        beside.rename(target)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        if target.exists():  # another process was faster, with the same scene
            return _read_facts(target)
        raise UserError(f"cannot write {target}: {error.strerror or error}; the same command continues") from error
    return facts


def _fit_stage(factory: Factory, index: int) -> tuple[Stage, Studio, list[Photograph], int]:
    """The first stage of this number's that nothing speaks against."""
    mi, complaint = _renderer(), None
    for attempt in range(_ATTEMPTS):
        stage = draw_stage(np.random.default_rng([factory.seed, index, attempt]), factory.size)
        studio = Studio(mi, stage)
        surveyed = [studio.survey(pose) for pose in stage.poses]
        complaint = objection(stage, surveyed)
        if complaint is None:
            return stage, studio, surveyed, attempt
    raise UserError(
        f"scene {index}: none of {_ATTEMPTS} attempts succeeded (the last: {complaint}); try another --size or --seed"
    )


def _photograph_all(stage: Stage, studio: Studio, factor: float, folder: Path) -> tuple[float, float]:
    """Write pictures and depths; returns the range of depths, with a tenth to spare."""
    depths = []
    for k, pose in enumerate(stage.poses):
        seen = studio.photograph(pose, stage.size, seed=k)
        Image.fromarray(picture(seen, factor, stage.open)).save(folder / "images" / f"{k:02d}.png")
        steps = np.rint(seen.depth / _DEPTH_UNIT)
        Image.fromarray(np.where(steps < 2**16, steps, 0).astype(np.uint16)).save(folder / "depths" / f"{k:02d}.png")
        depths.append(seen.depth[seen.depth > 0])
    near, far = np.percentile(np.concatenate(depths), [0.3, 99.7])
    return round(0.9 * float(near), 4), round(1.1 * float(far), 4)


def _transforms(stage: Stage, near: float, far: float) -> dict[str, Any]:
    width, height = stage.size
    focal = max(width, height) / 2 / math.tan(math.radians(stage.fov) / 2)
    tests = _test_views(np.stack(stage.poses))
    names = [f"images/{k:02d}.png" for k in range(len(stage.poses))]
    held_out = [name for k, name in enumerate(names) if k in tests]
    return {
        "camera_model": "OPENCV",
        "w": width,
        "h": height,
        "fl_x": focal,
        "fl_y": focal,
        "cx": width / 2,
        "cy": height / 2,
        "shiftadd3d": {"near": near, "far": far, "made_by": "shiftadd3d scenes make-factory"},
        "train_filenames": [name for name in names if name not in held_out],
        "val_filenames": held_out,
        "test_filenames": held_out,
        "frames": [
            {
                "file_path": name,
                "depth_file_path": name.replace("images", "depths"),
                "transform_matrix": np.round(pose, 9).tolist(),
            }
            for name, pose in zip(names, stage.poses, strict=True)
        ],
    }


def _test_views(poses: np.ndarray) -> set[int]:
    """An eighth of the views, at least one: those whose neighbours lie on all sides, none the next of another."""
    at = poses[:, :3, 3]
    away = at[None] - at[:, None]
    distance = np.linalg.norm(away, axis=2)
    order = np.argsort(distance, axis=1)  # first comes the view itself
    neighbours = order[:, 1:6]
    towards = np.take_along_axis(away / np.maximum(distance, 1e-9)[..., None], neighbours[..., None], axis=1)
    lopsided = np.linalg.norm(towards.mean(axis=1), axis=1)
    chosen: list[int] = []
    for k in np.argsort(lopsided, kind="stable").tolist():
        if len(chosen) < max(1, round(len(poses) / 8)) and not any(k in order[j, :2] for j in chosen):
            chosen.append(k)
    return set(chosen)


# Contact sheets


def draw_contact_sheets(factory: Factory, console: Console | None = None) -> list[Path]:
    """Draw pictures of all finished scenes, sixty to a sheet: three views each, and the depth of the last.

    Returns:
        The sheets' paths.
    """
    scenes = list(scenes_of(factory))
    written = []
    try:
        (factory.folder / _SHEETS).mkdir(exist_ok=True)
        for first in range(0, len(scenes), _SHEET_SCENES):
            page = scenes[first : first + _SHEET_SCENES]
            path = factory.folder / _SHEETS / f"{page[0]['name'][6:]}.png"
            _sheet(factory.folder, page).save(path)
            written.append(path)
    except OSError as error:
        raise UserError(f"cannot draw contact sheets of {factory.folder}: {error}") from error
    if console is not None and written:
        console.print(f"contact sheets: {written[0].parent}")
    return written


def _sheet(folder: Path, scenes: list[dict[str, Any]]) -> Image.Image:
    width, height, caption, across = 128, 128, 12, 3
    rows = math.ceil(len(scenes) / across)
    sheet = Image.new("RGB", (across * (4 * width + 8), rows * (height + caption)), "white")
    draw = ImageDraw.Draw(sheet)
    for k, scene in enumerate(scenes):
        x, y = (k % across) * (4 * width + 8), (k // across) * (height + caption)
        text = f"{scene['name'][6:]} {scene['kind']} {scene['views']} x {scene['width']}x{scene['height']}"
        draw.text((x, y), f"{text} depth {scene['near']:.2g}-{scene['far']:.2g}", fill="black")
        names = [f"{j:02d}.png" for j in np.linspace(0, scene["views"] - 1, 3).astype(int)]
        for column, name in enumerate(names):
            with Image.open(folder / scene["name"] / "images" / name) as image:
                tile = image.convert("RGBA")
            tile.thumbnail((width, height))
            sheet.paste(tile, (x + column * width, y + caption), tile)
        with Image.open(folder / scene["name"] / "depths" / names[-1]) as image:
            depth = np.asarray(image, dtype=float) * _DEPTH_UNIT
        nearness = np.where(depth > 0, scene["near"] / np.maximum(depth, scene["near"]), 0)
        tile = Image.fromarray(np.rint(255 * nearness).astype(np.uint8))
        tile.thumbnail((width, height))
        sheet.paste(tile, (x + 3 * width, y + caption))
    return sheet
