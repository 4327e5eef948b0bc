"""Fixtures of the kernels' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from shiftadd3d.kernels import targets


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that the cache of compiled kernels lies in for the length of a test."""
    monkeypatch.setenv("SHIFTADD3D_CACHE", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture(params=[1, 2])
def torch_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run with one thread and with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def on_target(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Call it with a target's name to have kernels built for that one; skips if this CPU cannot run it."""

    def switch(name: str) -> None:
        if not targets.runs_here(targets.find(name)):
            pytest.skip(f"this CPU cannot run {name}")
        monkeypatch.setenv("SHIFTADD3D_TARGET", name)
        targets.current.cache_clear()

    yield switch
    targets.current.cache_clear()
