"""What processors count, read from a folder that looks like Linux's."""

from __future__ import annotations

from pathlib import Path

import pytest

from shiftadd3d.profile.meter import PackageMeter


def package(folder: Path, name: str, microjoules: int, largest: int = 999_999) -> Path:
    (folder / name).mkdir()
    (folder / name / "max_energy_range_uj").write_text(f"{largest}\n")
    (folder / name / "energy_uj").write_text(f"{microjoules}\n")
    return folder / name / "energy_uj"


def test_the_packages_are_summed_and_their_parts_are_not(tmp_path: Path) -> None:
    first, second = package(tmp_path, "intel-rapl:0", 100), package(tmp_path, "intel-rapl:1", 999_990)
    part = package(tmp_path, "intel-rapl:0:0", 0)
    meter = PackageMeter.find(tmp_path)
    assert meter is not None

    def call() -> None:
        first.write_text(str(int(first.read_text()) + 30))
        second.write_text("20\n")  # it was full, and began again: 30 more
        part.write_text("500000\n")

    assert meter.joules(call, seconds=0.0) == pytest.approx(60e-6)


@pytest.mark.parametrize("content", [None, "", "many"])
def test_a_machine_that_offers_nothing_has_no_meter(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        package(tmp_path, "intel-rapl:0", 0).write_text(content)
    assert PackageMeter.find(tmp_path) is None
    assert PackageMeter.find(tmp_path / "missing") is None
