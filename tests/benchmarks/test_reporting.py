"""What benchmarks share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def reporting(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("reporting")


class Replaced(Exception):
    """Where this process would end, and another one begin."""


def test_memory_is_kept_from_the_start_of_a_process(reporting: ModuleType, monkeypatch: pytest.MonkeyPatch):
    def execve(program: str, arguments: list[str], environment: dict[str, str]) -> None:
        assert (program, arguments) == (sys.executable, [sys.executable, *sys.argv])
        assert environment.items() >= {"KEPT": "1", **reporting.KEEP_MEMORY}.items()
        raise Replaced

    monkeypatch.setattr(reporting.os, "execve", execve)
    monkeypatch.setenv("KEPT", "1")
    for name in reporting.KEEP_MEMORY:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Replaced):
        reporting.start_again_keeping_memory()
    for name, value in reporting.KEEP_MEMORY.items():
        monkeypatch.setenv(name, value)
    reporting.start_again_keeping_memory()  # it goes on, and does not raise
