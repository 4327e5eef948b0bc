"""What tuning found out: choices for kernels, in files that people can read, keep and pass on.

There is one file a target, ``<target>.json``: those in this package's folder ``records`` come with it, and those in the
folder ``records`` of the user's cache, which `shiftadd3d kernels tune` writes, go before them. A choice is for one
problem of one kernel; where there is none, kernels go by their own rules.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from shiftadd3d._report import write_json
from shiftadd3d.kernels import cache

__all__ = ["PACKAGED", "choice", "forget", "read", "trying", "user_folder", "write"]

PACKAGED = Path(__file__).parent / "records"


def user_folder() -> Path:
    """Where the user's own records are."""
    return cache.folder() / "records"


# What is tried out at the moment: it goes before all records.
_tried: dict[str, dict[str, Any] | None] = {}


@lru_cache(maxsize=256)  # kernels ask with every call
def choice(target: str, kernel: str, **problem: Any) -> dict[str, Any] | None:
    """What was found best for a problem of a kernel on a target, or None. Files are read once in a process."""
    key = _key(kernel, problem)
    return _tried[key] if key in _tried else _choices(cache.folder(), target).get(key)


@contextlib.contextmanager
def trying(kernel: str, tried: dict[str, Any] | None, **problem: Any) -> Iterator[None]:
    """Have a choice count, or None as if there were none, for the length of a ``with`` block."""
    before = dict(_tried)
    _tried[_key(kernel, problem)] = tried
    choice.cache_clear()
    try:
        yield
    finally:
        _tried.clear()
        _tried.update(before)
        choice.cache_clear()


def read(folder: Path, target: str) -> list[dict[str, Any]]:
    """The records of a file: kernel, problem, choice, and what was measured. None where there is no readable file."""
    try:
        records = json.loads((folder / f"{target}.json").read_bytes())
    except (OSError, ValueError):
        return []
    expected = {"kernel", "problem", "choice"}
    return (
        [one for one in records if isinstance(one, dict) and expected <= one.keys()]
        if isinstance(records, list)
        else []
    )


def write(folder: Path, target: str, found: list[dict[str, Any]]) -> Path:
    """Put records into a file, in place of those of the same problems.

    Raises:
        UserError: if the file cannot be written.
    """
    kept = {_key(one["kernel"], one["problem"]): one for one in [*read(folder, target), *found]}
    path = folder / f"{target}.json"
    write_json(path, [kept[key] for key in sorted(kept)])
    forget()
    return path


def forget() -> None:
    """Have files read anew."""
    choice.cache_clear()
    _choices.cache_clear()


@lru_cache(maxsize=8)
def _choices(cached: Path, target: str) -> dict[str, dict[str, Any]]:
    records = [*read(PACKAGED, target), *read(cached / "records", target)]
    return {_key(one["kernel"], one["problem"]): one["choice"] for one in records}


def _key(kernel: str, problem: dict[str, Any]) -> str:
    return f"{kernel} {json.dumps(problem, sort_keys=True)}"
