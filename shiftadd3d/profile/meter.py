"""Energy that the processor itself counts (RAPL, through Linux's powercap), where the machine offers it.

It is that of whole packages: everything that runs on them, and what they take when idle, is in it. Virtual machines
rarely have it, and most systems let only root read it; then there is nothing to measure.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")


class PackageMeter:
    """The counters of all packages."""

    def __init__(self, packages: list[Path]) -> None:
        self._packages = packages

    @classmethod
    def find(cls, folder: Path | None = None) -> PackageMeter | None:
        """The meter of this machine; None where there is none, or it may not be read."""
        packages = sorted((POWERCAP if folder is None else folder).glob("intel-rapl:[0-9]*"))
        # Packages are numbered intel-rapl:0; their parts, intel-rapl:0:1, are in them already.
        meter = cls([package for package in packages if package.name.count(":") == 1])
        try:
            meter._read()
            meter._ranges()
        except (OSError, ValueError):
            return None
        return meter if meter._packages else None

    def joules(self, call: Callable[[], Any], seconds: float = 1.0) -> float:
        """What one call takes: the mean over calls for about so long, all else on the machine included."""
        calls, began, before = 0, time.perf_counter(), self._read()
        while not calls or time.perf_counter() - began < seconds:
            call()
            calls += 1
        after = self._read()
        # Counters start again at zero when they are full.
        used = [(b - a) % limit for a, b, limit in zip(before, after, self._ranges(), strict=True)]
        return sum(used) * 1e-6 / calls

    def _read(self) -> list[int]:
        return [int((package / "energy_uj").read_text()) for package in self._packages]

    def _ranges(self) -> list[int]:
        return [int((package / "max_energy_range_uj").read_text()) + 1 for package in self._packages]
