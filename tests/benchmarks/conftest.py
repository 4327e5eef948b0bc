"""Benchmarks are scripts in a folder, and no package."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def load_benchmark() -> Callable[[str], ModuleType]:
    """load_benchmark(name): benchmarks/NAME.py as a module."""

    def load(name: str) -> ModuleType:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.syspath_prepend(BENCHMARKS)  # as when it is run
            spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # dataclasses look their annotations up there
            spec.loader.exec_module(module)
        return module

    return load
