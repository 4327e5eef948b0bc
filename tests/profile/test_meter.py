"""What hardware counts, read from a folder that looks like Linux's and from functions that look like the driver's."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from shiftadd3d.profile.latency import measure_latencies
from shiftadd3d.profile.meter import CardMeter, PackageMeter


def zone(folder: Path, number: str, microjoules: int, name: str = "package-0", largest: int = 999_999) -> Path:
    place = folder / f"intel-rapl:{number}"
    place.mkdir()
    (place / "name").write_text(f"{name}\n")
    (place / "max_energy_range_uj").write_text(f"{largest}\n")
    (place / "energy_uj").write_text(f"{microjoules}\n")
    return place / "energy_uj"


def test_the_packages_are_summed_and_nothing_is_counted_twice(tmp_path: Path) -> None:
    first, second = zone(tmp_path, "0", 100), zone(tmp_path, "1", 999_990, "package-1")
    part, platform = zone(tmp_path, "0:0", 0, "core"), zone(tmp_path, "2", 0, "psys")
    meter = PackageMeter.find(tmp_path)
    assert meter is not None

    def call() -> None:
        first.write_text(str(int(first.read_text()) + 30))
        second.write_text("20\n")  # it was full, and began again: 30 more
        part.write_text("500000\n")
        platform.write_text("500000\n")  # of a laptop: the packages and all around them

    assert meter.joules(call, seconds=0.0) == pytest.approx(60e-6)


def test_one_call_is_the_mean_of_many(tmp_path: Path) -> None:
    counter, calls = zone(tmp_path, "0", 0), 0
    meter = PackageMeter.find(tmp_path)
    assert meter is not None

    def call() -> None:
        nonlocal calls
        calls += 1
        counter.write_text(str(7 * calls))

    assert meter.joules(call, seconds=0.02) == pytest.approx(7e-6) and calls > 1


@pytest.mark.parametrize("content", [None, "", "many"])
def test_a_machine_that_offers_nothing_has_no_meter(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        zone(tmp_path, "0", 0).write_text(content)
    assert PackageMeter.find(tmp_path) is None
    assert PackageMeter.find(tmp_path / "missing") is None


def test_a_counter_that_only_root_may_read_is_no_meter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = zone(tmp_path, "0", 0)
    read = Path.read_text

    def refuse(path: Path, *args: str, **options: str) -> str:
        if path == secret:  # root, who may run these tests, reads it whatever its mode says
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert PackageMeter.find(tmp_path) is None


class Driver:
    """NVML's functions, as C calls them, for one card."""

    def __init__(self, uuid: bytes, counts: bool = True, starts: bool = True) -> None:
        self.millijoules = 1 << 40  # more than 32 bits hold
        self.asked: list[int] = []
        handle = 0x5EED

        def find(name: bytes, card: ctypes._Pointer) -> int:
            card[0] = handle
            return 0 if name == uuid else 6

        def energy(card: int, millijoules: ctypes._Pointer) -> int:
            self.asked.append(card)
            millijoules[0] = self.millijoules
            return 0 if counts and card == handle else 3

        self.nvmlInit_v2 = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0 if starts else 9)
        self.nvmlDeviceGetHandleByUUID = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p)
        )(find)
        self.nvmlDeviceGetTotalEnergyConsumption = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_ulonglong)
        )(energy)


def test_a_card_counts_millijoules() -> None:
    driver = Driver(b"GPU-12ab")
    meter = CardMeter.find("12ab", driver)
    assert meter is not None

    def call() -> None:
        driver.millijoules += 250

    assert meter.joules(call, seconds=0.0) == pytest.approx(0.25)
    assert set(driver.asked) == {0x5EED}


@pytest.mark.parametrize(
    "driver",
    [
        Driver(b"GPU-other"),
        Driver(b"GPU-12ab", counts=False),
        Driver(b"GPU-12ab", starts=False),
        SimpleNamespace(nvmlInit_v2=lambda: 0),  # too old a driver to know the others
    ],
)
def test_a_card_that_cannot_be_asked_has_no_meter(driver: object) -> None:
    assert CardMeter.find("12ab", driver) is None


def test_a_machine_without_the_driver_has_no_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shiftadd3d.profile.meter.NVML", "libno-such-driver.so.1")
    assert CardMeter.find("12ab") is None


def test_measured_energy_stands_beside_the_times_and_is_that_of_one_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = zone(tmp_path, "0", 0)

    class Model(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            counter.write_text(str((int(counter.read_text()) + 12) % 1_000_000))
            return super().forward(input)

    monkeypatch.setattr("shiftadd3d.profile.meter.POWERCAP", tmp_path)
    model = Model(4, 4).eval()
    found = measure_latencies({"mult": (model, torch.randn(2, 4))}, ("eager",), inputs=2, depth=1, seconds=0.0)
    assert found["mult"]["eager"].joules == pytest.approx(6e-6)
    counter.unlink()
    found = measure_latencies({"mult": (nn.Linear(4, 4), torch.ones(2, 4))}, ("eager",), inputs=2, depth=1, seconds=0.0)
    assert found["mult"]["eager"].joules is None
