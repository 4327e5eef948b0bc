"""Fixtures and rules that all tests share."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parents[1]

# Processes that share the tests share the cores, and so do the programs that tests start.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))

# The same examples in every run; `--hypothesis-profile=default` looks for others.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the repository (or `SHIFTADD3D_SHARED`); skips where there is none."""
    folder = Path(os.environ.get("SHIFTADD3D_SHARED") or REPOSITORY.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no reference data: {folder} does not exist (SHIFTADD3D_SHARED names another folder)")
    return folder


@pytest.fixture
def ctrl_c_interrupts() -> Iterator[None]:
    """As in a terminal; a process that a script starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def one_seed() -> None:
    """What fails once in a hundred runs should fail in every run, or in none."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)  # nerfstudio draws from it
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_target() -> Iterator[None]:
    """A test that leaves kernels of another CPU to those after it fails; which ones come after it is chance."""
    yield
    targets = sys.modules.get("shiftadd3d.kernels.runtime.targets")
    if targets is not None and targets.current.cache_info().currsize:
        left = targets.current()
        targets.current.cache_clear()
        assert left is targets.current(), f"the test leaves {left.name} as the target"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
