"""Optional parts of this package, and what to install for them."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import PackageNotFoundError, requires, version

from shiftadd3d._errors import UserError

# Where a package is imported by another name than it is installed by.
_DISTRIBUTIONS = {"sklearn": "scikit-learn", "imageio_ffmpeg": "imageio-ffmpeg"}


class MissingExtra(UserError, ImportError):
    """A package that an optional part needs is not installed, or too old."""


def install(extra: str) -> str:
    """The command that installs an extra of this package."""
    return f"pip install 'shiftadd3d[{extra}]'"


def need(what: str, *packages: str, extra: str) -> None:
    """Check that the packages of an optional part are installed, without importing them.

    Args:
        what: the part, as the message names it.
        packages: the packages that it imports.
        extra: the extra of this package that installs them.

    Raises:
        MissingExtra: one of them is not installed, or older than the extra requires.
    """
    missing = [_DISTRIBUTIONS.get(name, name) for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        *others, last = missing
        listed, verb = (f"{', '.join(others)} and {last}", "are") if others else (last, "is")
        raise MissingExtra(f"{what} needs {listed}, which {verb} not installed: {install(extra)}")
    for name in packages:
        distribution = _DISTRIBUTIONS.get(name, name)
        found, least = installed_version(distribution), _least(distribution)
        if found is not None and least is not None and _numbers(found) < _numbers(least):
            raise MissingExtra(f"{what} needs {distribution} {least} or newer, not {found}: {install(extra)}")


def installed_version(distribution: str) -> str | None:
    """The version of an installed package; None for a module of that name from elsewhere."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _least(distribution: str) -> str | None:
    """The oldest version that this package's own metadata asks for."""
    try:
        lines = requires("shiftadd3d") or []
    except PackageNotFoundError:  # a source tree that was never installed
        return None
    found = (re.match(rf"{re.escape(distribution)}\s*>=\s*([\d.]+)", line) for line in lines)
    return next((match[1] for match in found if match), None)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:3]))
