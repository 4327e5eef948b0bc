"""Videos and frames from a model: camera paths, the contents of frames, and complete files.

Modules that a video does not need are imported where they are used, because nerfstudio's pipeline alone takes seconds.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import imageio.v2 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from nerfstudio.cameras.camera_paths import get_path_from_json
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from shiftadd3d._claim import claimed
from shiftadd3d._errors import UserError
from shiftadd3d._progress import progress
from shiftadd3d.nerf.model import GNTNerfModel
from shiftadd3d.nerf.render_options import check_config_file, check_frames, check_out, is_video
from shiftadd3d.nerf.smooth_path import smooth_path

if TYPE_CHECKING:
    from shiftadd3d.nerf.kept_frames import KeptFrames
    from shiftadd3d.nerf.pipeline import GNTPipeline

PathName = Literal["interpolate", "spiral", "test", "train"]
SplitName = Literal["test", "train"]

_DEFAULT_FRAMES = 120
_SPIRAL_TURNS = 2
_SPIRAL_RADIUS = 0.1
"""In units of the distance looked at: a swing of about six degrees to each side."""

# --------------------------------------------------------------------------------------------------------------------
# Camera paths
# --------------------------------------------------------------------------------------------------------------------


def interpolated_path(cameras: Cameras, frames: int) -> Cameras:
    """A smooth, level path through the views at an even speed; see `smooth_path`.

    Args:
        cameras: the views to pass through, at least two. All frames have the lens (without distortion) and size of the
            first view with the most frequent size.
        frames: N, at least 2.

    Returns:
        [N] cameras. The first and the last are at views.

    Raises:
        UserError: fewer than two views.
    """
    if len(cameras) < 2:
        raise UserError(
            f"{len(cameras)} view cannot be interpolated; expected at least 2: choose --views train, or --path spiral"
        )
    poses, _ = smooth_path(cameras.camera_to_worlds.cpu().numpy(), frames)
    sizes = torch.cat([cameras.width.reshape(-1, 1), cameras.height.reshape(-1, 1)], dim=1)
    same = (sizes[:, None] == sizes[None]).all(dim=-1)
    usual = int(same.sum(dim=1).argmax())
    return _pinhole_path(cameras[usual : usual + 1], torch.from_numpy(poses).float())


def spiral_path(camera: Cameras, focus: float, frames: int) -> Cameras:
    """A spiral around a view. All frames look at the same point as the view.

    nerfstudio's own spiral uses the focal length in pixels as the distance of that point, and the camera's backward
    axis as up, which makes it roll.

    Args:
        camera: [1], the centre of the spiral.
        focus: distance of the point, in units of the scaled scene.
        frames: N, at least 2.

    Returns:
        [N] cameras, a closed loop.
    """
    theta = 2 * torch.pi * torch.arange(frames, dtype=torch.float32) / frames
    radius = _SPIRAL_RADIUS * focus
    turns = _SPIRAL_TURNS * theta
    centres = radius * torch.stack([turns.cos(), -turns.sin(), -theta.sin()], dim=-1)
    back = F.normalize(centres - torch.tensor([0.0, 0.0, -focus]), dim=-1)
    right = F.normalize(torch.linalg.cross(torch.tensor([[0.0, 1.0, 0.0]]).expand_as(back), back), dim=-1)
    local = torch.stack([right, torch.linalg.cross(back, right), back, centres], dim=-1)
    pose = camera.camera_to_worlds[0].cpu().float()
    poses = pose[:, :3] @ local
    poses[..., 3] += pose[:, 3]
    return _pinhole_path(camera, poses)


def _pinhole_path(like: Cameras, poses: Float[Tensor, "n 3 4"]) -> Cameras:
    first = like.flatten()[0:1].to("cpu")
    return Cameras(
        camera_to_worlds=poses,
        fx=first.fx[0].float(),
        fy=first.fy[0].float(),
        cx=first.cx[0].float(),
        cy=first.cy[0].float(),
        # Given, because nerfstudio would take them for twice the principal point.
        width=int(first.width),
        height=int(first.height),
        camera_type=CameraType.PERSPECTIVE,
    )


def read_camera_path(path: Path) -> tuple[Cameras, float | None]:
    """A camera path from nerfstudio's viewer (`camera_paths/*.json`).

    Returns:
        The cameras, and the frames per second in the file, if there are any.

    Raises:
        UserError: no such file, not a camera path, or cameras that are neither perspective nor fisheye, have no pixels,
            or have numbers that are not finite.
    """
    expected = "expected a camera path exported from nerfstudio's viewer"
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {expected}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {expected}") from None
    try:
        cameras = get_path_from_json(content)
        seconds, fps = content.get("seconds"), content.get("fps")
        rate = len(cameras) / float(seconds) if seconds else float(fps) if fps else None
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: not a camera path ({type(error).__name__}: {error}); {expected}") from None
    if rate is not None and not 0.0 < rate < float("inf"):
        raise UserError(f"{path}: {rate:g} frames a second; expected a positive number")
    kinds = set(cameras.camera_type.flatten().tolist())
    if not kinds <= {CameraType.PERSPECTIVE.value, CameraType.FISHEYE.value}:
        raise UserError(f"{path}: cameras of type {content['camera_type']}; expected perspective or fisheye")
    cameras.camera_to_worlds = cameras.camera_to_worlds.float()
    if int(torch.minimum(cameras.width, cameras.height).min()) < 1:
        raise UserError(
            f"{path}: pictures of {int(cameras.width[0])}x{int(cameras.height[0])} pixels; expected render_width and "
            "render_height of at least 1"
        )
    finite = cameras.camera_to_worlds.flatten(1).isfinite().all(dim=1)
    for name, good, right in (
        ("camera_to_world", finite, "finite numbers"),
        ("fov", cameras.fx[:, 0].isfinite() & (cameras.fx[:, 0] > 0), "0 < degrees < 180"),
    ):
        if not good.all():
            raise UserError(f"{path}: {name} of camera {int((~good).nonzero()[0])} is impossible; expected {right}")
    return cameras, rate


def make_path(
    pipeline: GNTPipeline, path: PathName = "interpolate", frames: int | None = None, views: SplitName | None = None
) -> Cameras:
    """The cameras of a path, on the CPU.

    Args:
        pipeline: its datamanager holds the views.
        path: `interpolate` passes through views, `spiral` circles around the first of them, and `test` and `train` are
            the views themselves.
        frames: number of frames; 120 by default, or all `test` or `train` views.
        views: the views for `interpolate` and `spiral`; by default the test views, or the training views if there is
            only one test view.

    Raises:
        UserError: fewer than two frames, or too few views.
    """
    check_frames(frames)
    datamanager = pipeline.datamanager
    if views is None:
        views = "test" if len(datamanager.eval_dataset) > 1 else "train"
    split = path if path in ("test", "train") else views
    dataset = datamanager.train_dataset if split == "train" else datamanager.eval_dataset
    return path_past(dataset.cameras, pipeline.model, path, frames)


def path_past(
    cameras: Cameras, model: GNTNerfModel, path: PathName | Literal["views"], frames: int | None = None
) -> Cameras:
    """The cameras of a path, on the CPU.

    Args:
        cameras: the views.
        model: gives the range of depths.
        path: `interpolate` passes through the views, `spiral` circles around the first of them, and anything else is
            the views themselves.
        frames: number of frames, 2 or more; 120 by default, or all views.

    Raises:
        UserError: too few views.
    """
    cameras = cameras.to("cpu")
    if path == "interpolate":
        return interpolated_path(cameras, frames or _DEFAULT_FRAMES)
    if path == "spiral":
        near, far = model.near_far.tolist()
        # The middle of the range in inverse depth: where half of the parallax lies before and half behind.
        return spiral_path(cameras[0:1], 2.0 / (1.0 / near + 1.0 / far), frames or _DEFAULT_FRAMES)
    if frames is None or frames >= len(cameras):
        return cameras
    return cameras[torch.linspace(0, len(cameras) - 1, frames).round().long()]


def scale_cameras(cameras: Cameras, scale: float) -> Cameras:
    """The same cameras with this many times the pixels on each side.

    Raises:
        UserError: no pixel is left.
    """
    if scale == 1.0:
        return cameras
    scaled = copy.deepcopy(cameras)
    scaled.rescale_output_resolution(scale)
    if int(torch.minimum(scaled.width, scaled.height).min()) < 1:
        raise UserError(
            f"--scale {scale:g}: no pixel is left of {int(cameras.width[0])}x{int(cameras.height[0])}; expected more"
        )
    return scaled


# --------------------------------------------------------------------------------------------------------------------
# What a frame shows
# --------------------------------------------------------------------------------------------------------------------


def to_bytes(image: Float[Tensor, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """RGB in 0..1 as 8-bit values."""
    return (image.detach().clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).cpu().numpy()


def picture(
    outputs: dict[str, Tensor], names: Sequence[str], near_far: tuple[float, float]
) -> UInt8[np.ndarray, "h w 3"]:
    """Some outputs of the model, side by side.

    Args:
        outputs: outputs of `get_outputs_for_camera`, each [h, w, 1 or 3].
        names: names of outputs, from left to right.
        near_far: depths at the ends of the colour scale. They are the same in every frame, so that a video does not
            flicker.

    Raises:
        UserError: an output that the model does not have.
    """
    for name in names:
        if name not in outputs:
            why = "a run without mixtures of experts has no such output" if name == "routing" else "no such output"
            raise UserError(f"--outputs {name}: {why}; expected some of {', '.join(sorted(outputs))}")
    return np.concatenate([to_bytes(_colours(name, outputs[name], near_far)) for name in names], axis=1)


def _colours(name: str, value: Tensor, near_far: tuple[float, float]) -> Float[Tensor, "h w 3"]:
    if value.shape[-1] == 3:
        return value
    from nerfstudio.utils import colormaps

    if name == "depth":
        return colormaps.apply_depth_colormap(value, near_plane=near_far[0], far_plane=near_far[1])
    return colormaps.apply_colormap(value)


def render_frames(
    model: GNTNerfModel, cameras: Cameras, names: Sequence[str] = ("rgb",), done: int = 0
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Pictures along a path, one after the other.

    Args:
        model: in evaluation mode.
        cameras: the path.
        names: outputs of the model, side by side.
        done: number of frames that are there already. The first picture is the one after them.

    Raises:
        UserError: an output that the model does not have.
    """
    near, far = model.near_far.tolist()
    routed = contextlib.nullcontext() if "routing" in names else model.without_routing()
    with routed, progress("Rendering", len(cameras), unit="frames", done=done, console=CONSOLE) as shown:
        for index in range(done, len(cameras)):
            outputs = model.get_outputs_for_camera(cameras[index : index + 1].to(model.device))
            shown.advance()
            yield picture(outputs, names, (near, far))


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


class FrameWriter(ABC):
    """Writes frames one by one.

    `close` completes the file, `interrupt` keeps the frames so far, and `discard` removes an unfinished file.
    """

    @abstractmethod
    def write(self, frame: UInt8[np.ndarray, "h w 3"]) -> None:
        """Add a frame."""

    @abstractmethod
    def close(self) -> None:
        """Complete the file after the last frame."""

    @abstractmethod
    def interrupt(self) -> Path:
        """Stop early. Returns the path of the frames written so far."""

    def discard(self) -> None:
        """Remove an unfinished file after an error. Complete frames stay."""
        return


class VideoWriter(FrameWriter):
    """An .mp4 (H.264) or .gif, written beside its place and renamed when it is complete."""

    def __init__(self, path: Path, fps: float, size: tuple[int, int]) -> None:
        self._path = path
        # The suffix last: it is what tells the format.
        self._unfinished = path.with_name(f"{path.stem}.unfinished{path.suffix}")
        # Chroma is stored at half the resolution: both sides have to be even.
        step = 2 if path.suffix.lower() == ".mp4" else 1
        self._height, self._width = (-(-side // step) * step for side in size)
        if step == 2:
            # imageio would resize to multiples of 16 if it were left to it.
            options: dict[str, Any] = {
                "fps": fps,
                "codec": "libx264",
                "quality": 8,
                "pixelformat": "yuv420p",
                "macro_block_size": 1,
            }
        else:
            options = {"mode": "I", "duration": 1000.0 / fps, "loop": 0}
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._unfinished.touch()
            self._writer: Any = imageio.get_writer(self._unfinished, **options)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error).splitlines()[0]
            raise UserError(f"cannot write {self._path}: {reason}; name a file in a writable folder") from None

    def write(self, frame: UInt8[np.ndarray, "h w 3"]) -> None:
        below, right = self._height - frame.shape[0], self._width - frame.shape[1]
        # One line to reach an even size repeats the edge; views of other sizes get a black margin.
        how = "edge" if max(below, right) <= 1 else "constant"
        with self._explained():
            self._writer.append_data(np.pad(frame, ((0, below), (0, right), (0, 0)), mode=how))

    def close(self) -> None:
        with self._explained():
            self._writer.close()
            self._unfinished.replace(self._path)

    def interrupt(self) -> Path:
        with self._explained():
            self._writer.close()
        return self._unfinished

    def discard(self) -> None:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            self._writer.close()
        with contextlib.suppress(OSError):
            self._unfinished.unlink(missing_ok=True)


class FolderWriter(FrameWriter):
    """`frame_00000.png` and so on. Each is there whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".unfinished").touch()
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror or error}; name a writable folder") from None
        (folder / ".unfinished").unlink()

    def write(self, frame: UInt8[np.ndarray, "h w 3"]) -> None:
        path = self._folder / f"frame_{self._count:05d}.png"
        unfinished = self._folder / f".{path.name}.unfinished"
        try:
            imageio.imwrite(unfinished, frame, format="PNG")  # type: ignore[call-overload]
            unfinished.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                unfinished.unlink(missing_ok=True)
            raise UserError(f"cannot write {path}: {error.strerror or error}; is the disk full?") from None
        self._count += 1

    def close(self) -> None:
        # Frames of an earlier, longer path would play on after ours.
        for path in self._folder.glob("frame_*.png"):
            number = re.fullmatch(r"frame_(\d{5,})\.png", path.name)
            if number and int(number[1]) >= self._count:
                path.unlink()

    def interrupt(self) -> Path:
        return self._folder


def open_writer(out: Path, fps: float, size: tuple[int, int]) -> FrameWriter:
    """A writer for a video (.mp4, .gif) or a folder (no suffix).

    Args:
        out: the file or folder.
        fps: frames per second.
        size: (height, width) of the largest frame in pixels.

    Raises:
        UserError: see `check_out`; also if it cannot be written.
    """
    check_out(out)
    if is_video(out):
        return VideoWriter(out, fps, size)
    return FolderWriter(out)


def write_path(
    model: GNTNerfModel,
    cameras: Cameras,
    out: Path,
    *,
    fps: float = 24.0,
    names: Sequence[str] = ("rgb",),
    kept: KeptFrames | None = None,
) -> None:
    """Render a path into a video or a folder of frames.

    After an interrupt, the frames so far are kept: in the folder, or as a shorter `NAME.unfinished.mp4`, which plays.

    Args:
        model: in evaluation mode.
        cameras: the path.
        out: .mp4, .gif, or a folder.
        fps: frames per second.
        names: outputs of the model, side by side.
        kept: frames of an earlier command, which are not rendered again. New frames are added. At the end, all of them
            are removed.

    Raises:
        UserError: an unknown output, or a place that cannot be written to.
    """
    size = (int(cameras.height.max()), int(cameras.width.max()) * len(names))
    writer = open_writer(out, fps, size)
    done = 0
    try:
        for frame in () if kept is None else kept.read():
            writer.write(frame)
            done += 1
        if done:
            CONSOLE.print(f"Going on after {done} frames, which an earlier command has rendered", highlight=False)
        for frame in render_frames(model, cameras, names, done):
            writer.write(frame)
            done += 1
            if kept is not None:
                kept.add(frame)
        writer.close()
        if kept is not None:
            kept.remove()
    except KeyboardInterrupt:
        if done == 0:
            writer.discard()
        else:
            where = writer.interrupt()
            CONSOLE.print(f"Interrupted after {done} of {len(cameras)} frames. They are in {where}", soft_wrap=True)
        raise
    except BaseException:
        writer.discard()
        raise


def render(
    config: Path,
    out: Path,
    *,
    path: PathName = "interpolate",
    camera_path: Path | None = None,
    views: SplitName | None = None,
    frames: int | None = None,
    fps: float | None = None,
    scale: float = 1.0,
    outputs: Sequence[str] = ("rgb",),
    compile: bool = True,
) -> None:
    """Render a trained run; the arguments are those of `shiftadd3d render`.

    Raises:
        UserError: anything in the arguments or in the run that the user can mend.
    """
    from shiftadd3d.nerf.runs import load_run

    check_config_file(config)
    check_frames(frames, fps, scale, outputs)
    check_out(out)
    with claimed(out, "--out", file=is_video(out)):
        chosen, rate = (None, None) if camera_path is None else read_camera_path(camera_path)
        if fps is None:
            fps = 24.0 if rate is None else rate
        run = load_run(config)
        run.pipeline.model.config.compile &= compile
        cameras = make_path(run.pipeline, path, frames, views) if chosen is None else chosen
        write_path(run.pipeline.model, scale_cameras(cameras, scale), out, fps=fps, names=outputs)
    CONSOLE.print(f"{len(cameras)} frames of step {run.step} in {out}", soft_wrap=True)
