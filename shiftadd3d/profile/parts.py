"""The parts of a model that a report has a row for: its blocks and stages, not each of its hundreds of modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MOST_PARTS = 20
"""More rows than these are not taken in at a glance."""

ROOT = "(root)"
"""What a model does itself, in none of its parts."""


def part_depth(names: Iterable[str], most: int = MOST_PARTS) -> int:
    """How many components of qualified names tell parts apart: as many as leave `most` of these, and one at least."""
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
