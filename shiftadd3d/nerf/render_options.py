"""What `movie` and `render` check before they import anything heavy, so that wrong arguments are told at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from shiftadd3d._errors import UserError

VIDEO_SUFFIXES = (".mp4", ".gif")

EXPECTED_CONFIG = "expected the config.yml that ns-train wrote for a gnt or shiftadd-gnt method"


def check_config_file(config: Path) -> None:
    """Whether there is a config.yml.

    Raises:
        UserError: there is nothing, or a folder.
    """
    if config.is_dir():
        raise UserError(f"{config}: a folder, not a file; {EXPECTED_CONFIG}")
    if not config.exists():
        raise UserError(f"{config}: no such file; {EXPECTED_CONFIG}")


def check_frames(
    frames: int | None = None, fps: float | None = None, scale: float | None = None, outputs: Sequence[str] = ("rgb",)
) -> None:
    """Whether there are frames to make. None stands for an option that is not set.

    Raises:
        UserError: fewer than two frames, no outputs, or a rate or scale that is not positive.
    """
    if not outputs:
        raise UserError("--outputs: expected at least one, such as rgb")
    if frames is not None and frames < 2:
        raise UserError(f"--frames {frames}: expected 2 or more")
    for option, value in (("--scale", scale), ("--fps", fps)):
        if value is not None and not 0.0 < value < float("inf"):
            raise UserError(f"{option} {value:g}: expected a positive number")


def check_out(out: Path) -> None:
    """Whether frames can be written to a place. Nothing is made there.

    Raises:
        UserError: a suffix other than .mp4, .gif or none, a file in place of a folder, a folder in place of a file, or
            a folder that cannot be made.
    """
    suffix = out.suffix.lower()
    if suffix and suffix not in VIDEO_SUFFIXES and not out.is_dir():
        raise UserError(f"--out {out}: unknown suffix {suffix}; expected .mp4, .gif, or a folder for PNG frames")
    if suffix in VIDEO_SUFFIXES and out.is_dir():
        raise UserError(f"--out {out}: a folder is in the way; expected a file name")
    if not suffix and out.is_file():
        raise UserError(f"--out {out}: a file is in the way; expected a folder, or a name that ends in .mp4 or .gif")
    folder = out.parent if suffix in VIDEO_SUFFIXES else out
    there = next((place for place in (folder, *folder.parents) if os.path.lexists(place)), Path())
    if not there.is_dir():
        raise UserError(f"--out {out}: cannot make the folder {folder}: {there} is a file; name a writable one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: cannot write to {there}: Permission denied; name a writable folder")


def is_video(out: Path) -> bool:
    """Whether `out` is a video file, not a folder."""
    return out.suffix.lower() in VIDEO_SUFFIXES and not out.is_dir()
