"""Tables for people, and the same facts in a file: what everything that reports something has in common."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

from shiftadd3d._errors import UserError


def write_json(path: Path, facts: Any) -> None:
    """Write `facts` to `path` as indented JSON and a final newline; missing folders are made.

    Raises:
        UserError: When the file cannot be written.
    """
    write_text(path, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all; missing folders are made.

    Raises:
        UserError: When the file cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # a pipe, or /dev/stdout: nothing can take its place
            path.write_text(text, encoding="utf-8")
            return
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        reason = "a file is in the way" if isinstance(error, FileExistsError) else error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; name a file in a writable folder") from error


class RichReport:
    """For dataclasses of facts: `__rich__` says how they look, and this makes text and plain types of them."""

    def __rich__(self) -> RenderableType:
        raise NotImplementedError

    def as_dict(self) -> dict[str, Any]:
        """The report in plain types, for JSON."""
        return asdict(self)  # pyright: ignore[reportArgumentType]

    def show(self) -> None:
        """Print it: as a table, or as JSON where rich is not installed, which the layers do without."""
        if find_spec("rich") is None:
            print(json.dumps(self.as_dict(), indent=2, default=str))
            return
        from rich.console import Console

        Console().print(self)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()
