"""A factory of made-up scenes to train a renderer across: `shiftadd3d scenes make-factory`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console


@dataclass(frozen=True)
class Factory:
    """A folder of scenes, and what decides them.

    Attributes:
        folder: where they lie.
        seed: with a scene's number, decides what the scene shows.
        size: width and height of all pictures; if None, each scene draws its own.
    """

    folder: Path
    seed: int
    size: tuple[int, int] | None = None


def make_factory(factory: Factory, count: int, *, workers: int, console: Console) -> None:
    """Make the scenes that are missing."""
    raise NotImplementedError


def open_factory(folder: Path) -> Factory:
    """The factory that lies in a folder."""
    raise NotImplementedError


def draw_contact_sheets(factory: Factory, console: Console) -> None:
    """Draw pictures of all scenes."""
    raise NotImplementedError
