"""The names that packages register with nerfstudio, and whose registration it uses."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import NamedTuple

GROUPS = ("nerfstudio.method_configs", "nerfstudio.dataparser_configs")
_OURS = "shiftadd3d."


class SharedName(NamedTuple):
    """A name that this package and others have registered."""

    name: str
    packages: tuple[str, ...]
    """As they are installed, in the order in which they are found."""
    taken: str
    """The package whose method or data parser nerfstudio runs by this name."""

    def __str__(self) -> str:
        *others, last = self.packages
        return (
            f"{self.name} is registered by {', '.join(others)} and {last}; nerfstudio takes that of {self.taken}: "
            "uninstall the package that is not wanted"
        )


def own_names(group: str) -> set[str]:
    """The names that this package has registered in a group."""
    return {entry.name for entry in entry_points(group=group) if entry.value.startswith(_OURS)}


def shared_names() -> list[SharedName]:
    """Those of this package's names that other installed packages have registered as well."""
    found = []
    for group in GROUPS:
        entries = entry_points(group=group)
        for name in sorted(own_names(group)):
            packages = tuple(entry.dist.name if entry.dist else entry.value for entry in entries.select(name=name))
            if len(packages) > 1:
                # What nerfstudio asks for, too.
                taken = entries[name]
                found.append(SharedName(name, packages, taken.dist.name if taken.dist else taken.value))
    return found
