"""Options of a movie. This imports nothing heavy, because wrong options are told before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shiftadd3d._errors import UserError
from shiftadd3d.nerf.render_options import check_frames, check_out

MoviePath = Literal["interpolate", "spiral", "views"]


@dataclass(frozen=True)
class MovieOptions:
    """Options of a movie."""

    scene: Path | None = None
    """Folder for the scene made from photos; beside the movie if None."""
    minutes: float = 0.0
    """Minutes of training on the scene before rendering."""
    size: int = 252
    """Pixels on the longer side of a frame, at most those of the photos."""
    path: MoviePath = "interpolate"
    """`interpolate` is a smooth path past the views, `spiral` circles around the first one, and `views` are the views
    themselves in their order."""
    frames: int = 60
    """Number of frames."""
    fps: float = 24.0
    """Frames a second."""
    outputs: Sequence[str] = ("rgb",)
    """Outputs of the model, side by side."""
    preview: bool = False
    """Write one small frame before anything else is rendered."""
    compile: bool = True
    """Render with the network as one executable, on a CPU."""
    numerics: Literal["exact", "fast", "int8"] = "int8"
    """Precision of the kernels. Frames have 8 bits, so the difference cannot be seen."""


def check_movie(source: Path, out: Path, options: MovieOptions) -> None:
    """Whether the arguments of a movie make sense, before anything is read or made.

    Raises:
        UserError: there is no such source, an option is out of its range, or nothing can be written to `out`.
    """
    if not source.exists():
        raise UserError(f"{source} does not exist; expected a folder of photos, a video file, or a scene folder")
    check_frames(options.frames, options.fps, outputs=options.outputs)
    if not 0.0 <= options.minutes < float("inf"):
        raise UserError(f"--minutes {options.minutes:g}: expected 0 or more")
    check_out(out)


def default_out(source: Path) -> Path:
    """The movie of a source if none is named: NAME-movie.mp4 in the current folder."""
    place = source.resolve()
    return Path(f"{place.stem if place.is_file() else place.name}-movie.mp4")
