"""From photos to a video in one command: it finds poses, uses a network that comes with the package, and makes a camera
path.
"""

# What trains is imported where training begins: without it, a film needs a third of the imports.

from __future__ import annotations

import contextlib
import copy
import math
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image

from shiftadd3d._claim import claimed
from shiftadd3d._errors import UserError
from shiftadd3d._progress import duration
from shiftadd3d.kernels import numerics as in_numerics
from shiftadd3d.models.gnt.feature_net import MIN_IMAGE_SIDE
from shiftadd3d.nerf.dataparsers import AutoDataParserConfig, find_scene
from shiftadd3d.nerf.kept_frames import KeptFrames, fingerprint
from shiftadd3d.nerf.model import GNTNerfModel
from shiftadd3d.nerf.movie_options import MovieOptions, check_movie
from shiftadd3d.nerf.pictures import save_picture
from shiftadd3d.nerf.pretrained import OpenScene, PretrainedMethod, open_scene
from shiftadd3d.nerf.render import path_past, picture, scale_cameras, write_path
from shiftadd3d.nerf.render_options import is_video
from shiftadd3d.scenes.from_photos import scene_from_photos
from shiftadd3d.scenes.photo_options import FromPhotosOptions
from shiftadd3d.scenes.photos import list_photos

if TYPE_CHECKING:
    from shiftadd3d.nerf.datamanager import GNTDataManagerConfig

_ZOOM = 1.04
"""What lies at the very edge is seen by few views, or by none once they are undistorted and level."""
_PREVIEW_SIDE = 96
"""Pixels on the longer side of the first small frame."""


def movie(
    method: PretrainedMethod,
    source: Path,
    out: Path,
    options: MovieOptions | None = None,
    began: float | None = None,
) -> dict[str, Any]:
    """Make a video from photos, from a video, or from a scene.

    After Ctrl-C nothing is lost: results about the photos, the scene, a trained network and the frames rendered so far
    are kept, and a message says where.

    Args:
        method: a method such as `shiftadd3d.configs.pretrained.shiftadd_gnt_tiny`.
        source: a folder of photos, a video file, or a scene in any format that ns-train reads.
        out: .mp4, .gif, or a folder for PNG frames.
        options: see `MovieOptions`.
        began: `time.time()` at the start of the command, so that its start-up time counts; None for now.

    Returns:
        `movie`, `scene`, `run` (the config.yml of the training, or None), `preview` (or None), `frames`, `size`, and
        `seconds` and `cpu_seconds` of each step, which sum to the total.

    Raises:
        UserError: whatever is wrong with the arguments, the photos or the scene.
    """
    options = options or MovieOptions()
    check_movie(source, out, options)
    if options.size < MIN_IMAGE_SIDE:
        raise UserError(f"--size {options.size}: expected {MIN_IMAGE_SIDE} pixels or more")
    with claimed(out, "--out", file=is_video(out)):
        return _movie(method, source, out, options, _Clock(began))


def _movie(method: PretrainedMethod, source: Path, out: Path, options: MovieOptions, clock: _Clock) -> dict[str, Any]:
    with clock.step("poses"):
        scene = _scene(source, out, options)
    run, preview = None, None
    with _kept(scene):
        with clock.step("opening"):
            opened = open_scene(method, scene, max_side=options.size)
            _check_sides(opened.views.cameras, scene, options.size)
            cameras, model = _path(opened, options), opened.model
            model.config.compile = options.compile
        if options.preview:
            with clock.step("preview"), in_numerics(options.numerics):
                preview = _write_preview(model, cameras[0:1], out, options.outputs)
        if options.minutes > 0:
            with clock.step("training"):
                run = _train(method, scene, opened, out, options.minutes)
                model = _trained(run)
                model.config.compile = options.compile
        with clock.step("rendering"), in_numerics(options.numerics):
            frames = KeptFrames(
                out.with_name(f"{_stem(out)}.unfinished"), fingerprint(model, opened.bank, cameras, options.outputs)
            )
            write_path(model, cameras, out, fps=options.fps, names=options.outputs, kept=frames)
    facts = {
        "movie": str(out),
        "scene": str(scene),
        "run": None if run is None else str(run),
        "preview": None if preview is None else str(preview),
        "frames": len(cameras),
        "size": [int(cameras.width[0]), int(cameras.height[0])],
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
    }
    _show(facts, method, out, options)
    return facts


class _Clock:
    """How long each step took, on the wall and on all CPUs together; what lies between steps belongs to the later one.

    Args:
        began: `time.time()` before the first step, which is then called "start"; None if there is nothing before.
    """

    def __init__(self, began: float | None) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self._last, self._last_cpu = time.perf_counter(), time.process_time()
        if began is not None:
            self.seconds["start"] = round(time.time() - began, 1)
            self.cpu_seconds["start"] = round(self._last_cpu, 1)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        yield
        now, cpu = time.perf_counter(), time.process_time()
        self.seconds[name], self.cpu_seconds[name] = round(now - self._last, 1), round(cpu - self._last_cpu, 1)
        self._last, self._last_cpu = now, cpu


@contextlib.contextmanager
def _kept(scene: Path) -> Iterator[None]:
    """Say, when interrupted, that the scene stays."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        _say(f"The scene is in {scene}; the same command goes on")
        raise


# --------------------------------------------------------------------------------------------------------------------
# The scene
# --------------------------------------------------------------------------------------------------------------------


def _scene(source: Path, out: Path, options: MovieOptions) -> Path:
    """The folder (or camera file) of the scene; of photos or a video, a new one."""
    if _is_scene(source):
        if options.scene is not None:
            raise UserError(f"--scene {options.scene}: {source} is a scene already; leave --scene out")
        return source
    scene = out.parent / f"{_stem(out)}-scene" if options.scene is None else options.scene
    try:
        report = scene_from_photos(source, scene, FromPhotosOptions(), CONSOLE)
    except KeyboardInterrupt:
        _say(f"What was found out about the photos is kept beside {scene}; the same command goes on from there")
        raise
    CONSOLE.print(report, soft_wrap=True)
    return scene


def _is_scene(source: Path) -> bool:
    """Whether there are cameras already.

    Raises:
        UserError: there are none, and no photos either.
    """
    if source.is_file():
        return source.suffix.lower() == ".json"
    try:
        find_scene(source)
    except UserError as no_scene:
        try:
            list_photos(source)
        except UserError as no_photos:
            expected = str(no_scene).partition("expected ")[2]
            raise UserError(f"{no_photos}; or, of a scene with cameras, {expected}") from None
        return False
    return True


def _path(opened: OpenScene, options: MovieOptions) -> Cameras:
    opened.model.use_own_view = True
    cameras = path_past(opened.views.cameras, opened.model, options.path, options.frames)
    if options.path == "views":
        return cameras
    cameras.fx, cameras.fy = _ZOOM * cameras.fx, _ZOOM * cameras.fy
    return cameras


def _check_sides(cameras: Cameras, scene: Path, size: int) -> None:
    """Whether the views serve the network.

    Raises:
        UserError: too small.
    """
    width, height = int(cameras.width.max()), int(cameras.height.max())
    if min(width, height) < MIN_IMAGE_SIDE:
        least = math.ceil((MIN_IMAGE_SIDE + 1) * max(width, height) / min(width, height))
        raise UserError(
            f"--size {size}: the views of {scene} would be {width}x{height} pixels, and the network needs "
            f"{MIN_IMAGE_SIDE} on each side; expected {least} or more, and photos as large as that"
        )


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


def _train(method: PretrainedMethod, scene: Path, opened: OpenScene, out: Path, minutes: float) -> Path:
    """Train on all views of a scene, from the weights that come with the package; returns the run's config.yml."""
    from shiftadd3d.nerf.timed_training import train_for

    config = copy.deepcopy(method.training())
    manager = cast("GNTDataManagerConfig", config.pipeline.datamanager)
    manager.data, manager.dataparser = scene, AutoDataParserConfig(data=scene, eval_mode="all")
    manager.num_source_views = min(manager.num_source_views, len(opened.bank) - 1)
    manager.camera_res_scale_factor = opened.scale
    config.output_dir, config.experiment_name = out.parent, f"{_stem(out)}-training"
    return train_for(60.0 * minutes, config)


def _trained(run: Path) -> GNTNerfModel:
    from shiftadd3d.nerf.runs import load_run

    model = load_run(run).pipeline.model
    model.use_own_view = True
    return model


# --------------------------------------------------------------------------------------------------------------------
# What is shown
# --------------------------------------------------------------------------------------------------------------------


def _write_preview(model: GNTNerfModel, camera: Cameras, out: Path, names: Sequence[str]) -> Path:
    """The first frame, small, beside the movie."""
    longest = int(torch.maximum(camera.width, camera.height).max())
    near, far = model.near_far.tolist()
    small = scale_cameras(camera, min(1.0, _PREVIEW_SIDE / longest))
    outputs = model.get_outputs_for_camera(small.to(model.device))
    path = out.parent / f"{_stem(out)}.preview.png"
    save_picture(Image.fromarray(picture(outputs, names, (near, far))), path)
    _say(f"A first small frame is in {path}")
    return path


def _stem(out: Path) -> str:
    return out.stem if is_video(out) else out.name


def _say(line: str) -> None:
    CONSOLE.print(line, soft_wrap=True, highlight=False, markup=False)


def _took(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600.0 else duration(seconds)


def _show(facts: dict[str, Any], method: PretrainedMethod, out: Path, options: MovieOptions) -> None:
    scene, run = facts["scene"], facts["run"]
    width, height = facts["size"]
    steps = ", ".join(f"{step} {_took(value)}" for step, value in facts["seconds"].items())
    took = f"{_took(sum(facts['seconds'].values()))}: {steps}"
    _say(f"Movie:   {out}, {facts['frames']} frames of {width}x{height} pixels")
    _say(f"Scene:   {scene}")
    if run is not None:
        _say(f"Network: {run}")
    _say(f"Took:    {took}")
    if (width >= height and width < options.size) or (height > width and height < options.size):
        _say(f"--size {options.size} is more than the photos have; frames are as large as these")
    _say("Go on with:")
    for words, what in _next_commands(facts, method, out, options):
        _say(f"  {shlex.join(words)}  # {what}")


def _words(options: MovieOptions, *names: str) -> list[str]:
    """The words of a command for those options that are not as by default."""
    words: list[str] = []
    for name in names:
        value = getattr(options, name)
        if value != getattr(MovieOptions(), name):
            values = [f"{value:g}"] if isinstance(value, float) else [value] if isinstance(value, str | int) else value
            words += [f"--{name}", *map(str, values)]
    return words


def _next_commands(
    facts: dict[str, Any], method: PretrainedMethod, out: Path, options: MovieOptions
) -> Iterator[tuple[list[str], str]]:
    scene, run = facts["scene"], facts["run"]
    path = "interpolate" if options.path == "spiral" else "spiral"
    trained, elsewhere = (
        str(out.with_name(f"{_stem(out)}-{name}{out.suffix if is_video(out) else ''}")) for name in ("trained", path)
    )
    alike = _words(options, "size", "frames", "fps", "outputs", "numerics")
    if run is None:
        yield ["shiftadd3d", "movie", scene, "--out", elsewhere, "--path", path, *alike], "another path"
        yield ["shiftadd3d", "movie", scene, "--out", trained, "--minutes", "10", *alike], "train on the scene first"
        train_on = ["ns-train", method.name, "--data", scene]
        yield train_on, "train on, and look around in the browser meanwhile"
    else:
        render = ["shiftadd3d", "render", "--load-config", run, "--views", "train", "--path", path, "--out", elsewhere]
        yield [*render, *_words(options, "frames", "fps", "outputs")], "another path"
        yield ["ns-viewer", "--load-config", run], "look around in the browser"
        checkpoints = str(Path(run).parent / method.training().relative_model_dir)
        yield ["ns-train", method.name, "--load-dir", checkpoints, "--data", scene], "train on"
