"""What one can choose when photos become a scene. Light to import, as the command line reads it for its help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["FromPhotosOptions", "LensModel"]

LensModel = Literal["radial", "opencv", "pinhole"]


@dataclass(frozen=True)
class FromPhotosOptions:
    """How photos become a scene. The docstrings are the command line's help."""

    max_side: int = 1600
    """Pixels of the longer side; larger photos are shrunk."""
    frames: int | None = None
    """Frames to take from a video. If not set, three a second, but 20 at least and 100 at most."""
    lens: LensModel = "radial"
    """Distortion to look for: one radial term, which few photos can tell; opencv's four; or none, pinhole."""
    own_cameras: bool = False
    """Let every photo have a camera of its own, for photos from many devices without EXIF."""
    threads: int | None = None
    """CPU threads. If not set, as many as there are cores."""
    seed: int = 0
    """Of the samples that robust estimators draw."""
