"""The parts of a model that have a row in a report: its blocks and stages, not each of its hundreds of modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MOST_PARTS = 20
"""The most rows that readers can take in at a glance."""

ROOT = "(root)"
"""Name for the work of a model itself, in none of its parts."""


def part_depth(names: Iterable[str], most: int = MOST_PARTS) -> int:
    """How many components of qualified names make a part: as many as give at most `most` parts, but at least one."""
    names = [name for name in names if name != ROOT]
    longest = max((name.count(".") + 1 for name in names), default=1)
    depth = 1
    while depth < longest and len({part_of(name, depth + 1) for name in names}) <= most:
        depth += 1
    return depth


def part_of(name: str, depth: int) -> str:
    """The part that the module called `name` belongs to: the first `depth` components of its name."""
    return ".".join(name.split(".")[:depth])


def parts_of(names: Sequence[str], depth: int) -> list[str]:
    """The parts, in the order of their first modules, each once."""
    return list(dict.fromkeys(part_of(name, depth) for name in names))
