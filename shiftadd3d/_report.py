"""What every command that prints a table does besides: write the same to a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shiftadd3d._errors import UserError


def write_json(path: Path, facts: Any) -> None:
    """Write `facts` to `path` as indented JSON and a final newline; missing folders are made.

    Raises:
        UserError: When the file cannot be written.
    """
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; name a file in a writable folder") from error
