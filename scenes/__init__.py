"""Embedded scenes: small multi-view data sets of this project's own making, ready for training.

Each scene is a folder in nerfstudio's format (`images/`, `transforms.json` with a train/test split), made by
`python -m shiftadd3d.scenes.make`.
"""

from __future__ import annotations

from pathlib import Path

from shiftadd3d._errors import UserError

__all__ = ["scene_names", "scene_path"]

_FOLDER = Path(__file__).parent


def scene_names() -> list[str]:
    """Names of the embedded scenes, sorted."""
    return sorted(path.parent.name for path in _FOLDER.glob("*/transforms.json"))


def scene_path(name: str = "still_life") -> Path:
    """The folder of an embedded scene, which holds `transforms.json` and `images/`.

    Raises:
        UserError: for a name that is not in `scene_names()`.
    """
    names = scene_names()
    if name not in names:
        raise UserError(f"no embedded scene {name!r}: expected one of {', '.join(names)}")
    return _FOLDER / name
