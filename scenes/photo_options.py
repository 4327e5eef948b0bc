"""Options for turning photos into a scene. This imports nothing heavy, because the command line's help reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["FromPhotosOptions", "LensModel"]

LensModel = Literal["radial", "opencv", "pinhole"]


@dataclass(frozen=True)
class FromPhotosOptions:
    """How photos become a scene. The docstrings are the help of the command line."""

    max_side: int = 1600
    """Largest length of the longer side in pixels. Larger photos are shrunk."""
    frames: int | None = None
    """Number of frames to take from a video. If not set: three a second, at least 20 and at most 100."""
    lens: LensModel = "radial"
    """Distortion terms to fit: one (radial, for few photos), four (opencv) or none (pinhole)."""
    own_cameras: bool = False
    """Give every photo its own camera, for photos from many devices without EXIF."""
    threads: int | None = None
    """CPU threads. If not set: as many as there are cores."""
    seed: int = 0
    """Seed of the samples that robust estimators draw."""
