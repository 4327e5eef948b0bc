"""From photos to a video in one command: their poses, a network that comes with the package, a camera path."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.engine.optimizers import Optimizers
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image
from torch.optim.lr_scheduler import LambdaLR

from shiftadd3d._claim import claimed
from shiftadd3d._errors import UserError
from shiftadd3d._progress import Steps, duration, progress
from shiftadd3d.models.gnt.feature_net import MIN_IMAGE_SIDE
from shiftadd3d.nerf.dataparsers import find_scene
from shiftadd3d.nerf.demo import train
from shiftadd3d.nerf.pictures import save_picture
from shiftadd3d.nerf.pipeline import GNTPipeline, GNTPipelineConfig
from shiftadd3d.nerf.pretrained import open_scene
from shiftadd3d.nerf.render import check_out, is_video, make_path, picture, scale_cameras, write_path
from shiftadd3d.nerf.runs import load_run
from shiftadd3d.nerf.schedulers import WarmupCosineSchedulerConfig
from shiftadd3d.nerf.trainer import GNTTrainer, GNTTrainerConfig
from shiftadd3d.scenes.from_photos import scene_from_photos
from shiftadd3d.scenes.photo_options import FromPhotosOptions
from shiftadd3d.scenes.photos import list_photos

MoviePath = Literal["interpolate", "spiral", "views"]

_ZOOM = 1.04
"""What lies at the very edge is seen by few views, or by none once they are undistorted and level."""
_PREVIEW_SIDE = 96
"""Pixels on the longer side of the first small frame."""


@dataclass(frozen=True)
class MovieOptions:
    """What a movie shall be."""

    scene: Path | None = None
    """Folder for the scene that is made of photos; beside the movie if None."""
    minutes: float = 0.0
    """How long to train on the scene first."""
    size: int = 252
    """Pixels on the longer side of a frame; never more than the photos have."""
    path: MoviePath = "interpolate"
    """`interpolate` passes views on a smooth way, `spiral` circles around the first one, `views` are the views
    themselves, in their order."""
    frames: int = 60
    """How many."""
    fps: float = 24.0
    """Frames a second."""
    outputs: Sequence[str] = ("rgb",)
    """Outputs of the model, side by side."""
    preview: bool = False
    """Write one small frame before anything else is rendered."""


def movie(config: GNTTrainerConfig, source: Path, out: Path, options: MovieOptions | None = None) -> dict[str, Any]:
    """Make a video from photos, from a video, or from a scene.

    Ctrl-C loses nothing: photos that were looked at, the scene, a trained network and the frames rendered so far stay,
    and what is printed says where.

    Args:
        config: the method whose weights come with the package.
        source: a folder of photos, a video file, or a scene in any format that ns-train reads.
        out: .mp4, .gif, or a folder for PNG frames.
        options: see `MovieOptions`.

    Returns:
        `movie`, `scene`, `run` (the config.yml of the training, or None), `preview` (or None), `frames`, and `seconds`,
        by step.

    Raises:
        UserError: whatever is wrong with the arguments, the photos or the scene.
    """
    options = options or MovieOptions()
    _check(options)
    check_out(out)
    with claimed(out, "--out", file=is_video(out)):
        return _movie(config, source, out, options)


def _check(options: MovieOptions) -> None:
    if options.frames < 2:
        raise UserError(f"--frames {options.frames}: expected 2 or more")
    if options.size < MIN_IMAGE_SIDE:
        raise UserError(f"--size {options.size}: expected {MIN_IMAGE_SIDE} pixels or more")
    if not 0.0 <= options.minutes < float("inf"):
        raise UserError(f"--minutes {options.minutes:g}: expected 0 or more")
    if not 0.0 < options.fps < float("inf"):
        raise UserError(f"--fps {options.fps:g}: expected a positive number")
    if not options.outputs:
        raise UserError("--outputs: expected at least one, such as rgb")


def _movie(config: GNTTrainerConfig, source: Path, out: Path, options: MovieOptions) -> dict[str, Any]:
    clock = _Clock()
    with clock.step("poses"):
        scene = _scene(source, out, options)
    run, preview = None, None
    with _kept(scene):
        with clock.step("opening"):
            pipeline = open_scene(config, scene, max_side=options.size)
            _check_sides(pipeline, scene, options.size)
            cameras = _path(pipeline, options)
        if options.preview:
            with clock.step("preview"):
                preview = _write_preview(pipeline, cameras[0:1], out, options.outputs)
        if options.minutes > 0:
            with clock.step("training"):
                run = _train(config, pipeline, out, options.minutes)
                pipeline = load_run(run).pipeline
                pipeline.model.use_own_view = True
        with clock.step("rendering"):
            write_path(pipeline, cameras, out, fps=options.fps, names=options.outputs)
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
    _show(facts, config, out, options)
    return facts


class _Clock:
    """How long each step took, on the wall and on all CPUs together."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        began, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 1)
        self.cpu_seconds[name] = round(time.process_time() - cpu, 1)


@contextlib.contextmanager
def _kept(scene: Path) -> Iterator[None]:
    """Say, when interrupted, that the scene stays."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        _say(f"The scene is in {scene}; the same command goes on from there")
        raise


# --------------------------------------------------------------------------------------------------------------------
# The scene
# --------------------------------------------------------------------------------------------------------------------


def _scene(source: Path, out: Path, options: MovieOptions) -> Path:
    """The folder (or camera file) of the scene; of photos or a video, a new one."""
    if not source.exists():
        raise UserError(f"{source} does not exist; expected a folder of photos, a video file, or a scene folder")
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


def _path(pipeline: GNTPipeline, options: MovieOptions) -> Cameras:
    pipeline.model.use_own_view = True
    if options.path == "views":
        return make_path(pipeline, "train", options.frames)
    cameras = make_path(pipeline, options.path, options.frames, views="train")
    cameras.fx, cameras.fy = _ZOOM * cameras.fx, _ZOOM * cameras.fy
    return cameras


def _check_sides(pipeline: GNTPipeline, scene: Path, size: int) -> None:
    """Whether the views serve the network.

    Raises:
        UserError: too small.
    """
    cameras = pipeline.datamanager.train_dataset.cameras
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


def _train(config: GNTTrainerConfig, opened: GNTPipeline, out: Path, minutes: float) -> Path:
    """Train on all views of a scene, from the weights that come with the package; returns the run's config.yml."""
    config = copy.deepcopy(config)
    config.pipeline.datamanager = copy.deepcopy(opened.datamanager.config)
    cast(GNTPipelineConfig, config.pipeline).warm_start = Path("pretrained")
    config.output_dir, config.experiment_name, config.vis = out.parent, f"{_stem(out)}-training", "tensorboard"
    config.max_num_iterations = GNTTrainerConfig.max_num_iterations  # the clock stops it
    for name in ("batch", "image", "all_images"):  # time that training would lose
        setattr(config, f"steps_per_eval_{name}", config.max_num_iterations)
    return train(config, functools.partial(_ClockedTrainer, seconds=60.0 * minutes))


class _ClockedTrainer(GNTTrainer):
    """Stops after some time; learning rates fall, and the second stage comes, with the share of it that has gone.

    Args:
        config: of the run.
        seconds: how long.
    """

    def __init__(self, config: GNTTrainerConfig, *args: Any, seconds: float, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._seconds, self._gone, self._began = seconds, 0.0, math.nan

    def setup_optimizers(self) -> Optimizers:
        optimizers = super().setup_optimizers()
        for name, scheduler in optimizers.schedulers.items():
            settings = self.config.optimizers[name]["scheduler"]
            if isinstance(settings, WarmupCosineSchedulerConfig):
                cast(LambdaLR, scheduler).lr_lambdas = [self._factor(settings)]
        return optimizers

    def _factor(self, settings: WarmupCosineSchedulerConfig) -> Callable[[int], float]:
        def factor(step: int) -> float:
            decay = 0.5 * (1.0 + math.cos(math.pi * self.share_done(step)))
            warmup = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
            return warmup * (settings.final_fraction + (1.0 - settings.final_fraction) * decay)

        return factor

    def train(self) -> None:
        with progress("Training", max(1, round(self._seconds)), unit="seconds", console=CONSOLE) as self._clock:
            super().train()

    def _show_progress(self) -> contextlib.AbstractContextManager[Steps]:
        return progress("steps", 0, disable=True)  # nobody knows how many there will be

    def share_done(self, step: int) -> float:
        return min(1.0, self._gone / self._seconds)

    def train_iteration(self, step: int) -> Any:
        if math.isnan(self._began):
            self._began = time.monotonic()
        result = super().train_iteration(step)
        self._gone = time.monotonic() - self._began
        self.stop_training = self._gone >= self._seconds
        gone = min(round(self._gone), self._clock.total) - self._clock.done
        if gone > 0:
            self._clock.advance(gone, status=f"step {step + 1}, loss {result[0].item():.4f}")
        return result


# --------------------------------------------------------------------------------------------------------------------
# What is shown
# --------------------------------------------------------------------------------------------------------------------


def _write_preview(pipeline: GNTPipeline, camera: Cameras, out: Path, names: Sequence[str]) -> Path:
    """The first frame, small, beside the movie."""
    longest = int(torch.maximum(camera.width, camera.height).max())
    near, far = pipeline.model.near_far.tolist()
    small = scale_cameras(camera, min(1.0, _PREVIEW_SIDE / longest))
    outputs = pipeline.model.get_outputs_for_camera(small.to(pipeline.device))
    path = out.parent / f"{_stem(out)}.preview.png"
    save_picture(Image.fromarray(picture(outputs, names, (near, far))), path)
    _say(f"A first small frame is in {path}")
    return path


def _stem(out: Path) -> str:
    return out.stem if is_video(out) else out.name


def _say(line: str) -> None:
    CONSOLE.print(line, soft_wrap=True, highlight=False, markup=False)


def _show(facts: dict[str, Any], config: GNTTrainerConfig, out: Path, options: MovieOptions) -> None:
    scene, run = facts["scene"], facts["run"]
    width, height = facts["size"]
    took = ", ".join(f"{step} {duration(value)}" for step, value in facts["seconds"].items())
    _say(f"Movie:   {out}, {facts['frames']} frames of {width}x{height} pixels")
    _say(f"Scene:   {scene}")
    if run is not None:
        _say(f"Network: {run}")
    _say(f"Took:    {took}")
    if (width >= height and width < options.size) or (height > width and height < options.size):
        _say(f"--size {options.size} is more than the photos have; frames are as large as these")
    _say("Go on with:")
    for words, what in _next_commands(facts, config, out, options):
        _say(f"  {shlex.join(words)}  # {what}")


def _next_commands(
    facts: dict[str, Any], config: GNTTrainerConfig, out: Path, options: MovieOptions
) -> Iterator[tuple[list[str], str]]:
    method, scene, run = str(config.method_name), facts["scene"], facts["run"]
    path = "interpolate" if options.path == "spiral" else "spiral"
    trained, elsewhere = (
        str(out.with_name(f"{_stem(out)}-{name}{out.suffix if is_video(out) else ''}")) for name in ("trained", path)
    )
    if run is None:
        yield ["shiftadd3d", "movie", scene, "--out", elsewhere, "--path", path], "another path"
        yield ["shiftadd3d", "movie", scene, "--out", trained, "--minutes", "10"], "train on the scene first"
        train_on = ["ns-train", method, "--data", scene]
        yield train_on, "train on, and look around in the browser meanwhile"
    else:
        render = ["shiftadd3d", "render", "--load-config", run, "--views", "train", "--path", path, "--out", elsewhere]
        yield render, "another path"
        yield ["ns-viewer", "--load-config", run], "look around in the browser"
        checkpoints = str(Path(run).parent / config.relative_model_dir)
        yield ["ns-train", method, "--load-dir", checkpoints, "--data", scene], "train on"
