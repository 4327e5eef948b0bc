"""Energy that the hardware itself measures, if the machine can do that.

Processors count the energy of whole packages (RAPL, through Linux's powercap), and graphics cards that of the whole
card (NVML, the library of NVIDIA's driver). Both include everything that runs on them, and their idle power. Virtual
machines rarely have RAPL, and on most systems only root may read it. Then nothing is measured.
"""

from __future__ import annotations

import ctypes
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"


class Meter(ABC):
    """Energy counters of a processor or a card."""

    def joules(self, call: Callable[[], Any], seconds: float = 1.0) -> float:
        """Joules of one call: the mean over calls for about this time, including everything else on the hardware."""
        calls, began, before = 0, time.perf_counter(), self._read()
        while not calls or time.perf_counter() - began < seconds:
            call()
            calls += 1
        return self._used(before, self._read()) / calls

    @abstractmethod
    def _read(self) -> list[int]:
        """What the counters say."""

    @abstractmethod
    def _used(self, before: list[int], after: list[int]) -> float:
        """Joules between two readings."""


class PackageMeter(Meter):
    """The counters of all packages of the processor."""

    def __init__(self, packages: list[Path]) -> None:
        self._packages = packages

    @classmethod
    def find(cls, folder: Path | None = None) -> PackageMeter | None:
        """The meter of this machine; None if there is none, or it may not be read."""
        zones = sorted((POWERCAP if folder is None else folder).glob("intel-rapl:[0-9]*"))
        try:
            # Their parts (intel-rapl:0:1), and the whole platform of a laptop (psys), would count the same again.
            packages = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
            meter = cls(packages)
            meter._read()
            meter._ranges()
        except (OSError, ValueError):
            return None
        return meter if packages else None

    def _read(self) -> list[int]:
        return [int((package / "energy_uj").read_text()) for package in self._packages]

    def _ranges(self) -> list[int]:
        return [int((package / "max_energy_range_uj").read_text()) + 1 for package in self._packages]

    def _used(self, before: list[int], after: list[int]) -> float:
        # Counters start again at zero when they are full.
        used = [(b - a) % limit for a, b, limit in zip(before, after, self._ranges(), strict=True)]
        return sum(used) * 1e-6


class CardMeter(Meter):
    """The counter of one NVIDIA graphics card, Volta or newer."""

    def __init__(self, nvml: Any, card: ctypes.c_void_p) -> None:
        self._nvml, self._card = nvml, card

    @classmethod
    def find(cls, uuid: str, nvml: Any = None) -> CardMeter | None:
        """The meter of a card; None if there is none, or it may not be read.

        Args:
            uuid: UUID of the card from torch's device properties. Numbers of cards can differ between CUDA and NVML.
            nvml: the driver's library; looked for if not given.
        """
        card = ctypes.c_void_p()
        try:
            nvml = ctypes.CDLL(NVML) if nvml is None else nvml
            found = not nvml.nvmlInit_v2() and not nvml.nvmlDeviceGetHandleByUUID(
                f"GPU-{uuid}".encode(), ctypes.byref(card)
            )
            meter = cls(nvml, card)
            if found:
                meter._read()
        except (OSError, AttributeError):  # no driver, one too old, or a card that does not count
            return None
        return meter if found else None

    def _read(self) -> list[int]:
        millijoules = ctypes.c_ulonglong()
        if error := self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._card, ctypes.byref(millijoules)):
            raise OSError(f"NVML cannot read the energy of the card: error {error}")
        return [millijoules.value]

    def _used(self, before: list[int], after: list[int]) -> float:
        return (after[0] - before[0]) * 1e-3  # 64 bits are never full
