"""Modules that load when a package is imported, with packages made for the purpose."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

from shiftadd3d._on_import import load_with


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A package `trunk`, and a module `ivy` that needs it."""
    (tmp_path / "trunk").mkdir()
    (tmp_path / "trunk" / "__init__.py").write_text("height = 3\n")
    (tmp_path / "ivy.py").write_text("import trunk\nheight = trunk.height\n")
    (tmp_path / "broken_ivy.py").write_text("from trunk import leaves\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield tmp_path
    for name in ("trunk", "ivy", "broken_ivy"):
        sys.modules.pop(name, None)


def test_a_module_loads_with_the_package(packages: Path) -> None:
    load_with("trunk", "ivy")
    assert "ivy" not in sys.modules
    importlib.import_module("trunk")
    assert sys.modules["ivy"].height == 3


def test_a_module_loads_at_once_if_the_package_is_there(packages: Path) -> None:
    importlib.import_module("trunk")
    load_with("trunk", "ivy")
    assert sys.modules["ivy"].height == 3


def test_importing_the_module_itself_first_is_as_good(packages: Path) -> None:
    load_with("trunk", "ivy")
    assert importlib.import_module("ivy").height == 3


def test_asking_whether_the_package_is_there_loads_nothing(packages: Path) -> None:
    load_with("trunk", "ivy")
    assert importlib.util.find_spec("trunk") is not None
    assert "trunk" not in sys.modules and "ivy" not in sys.modules
    importlib.import_module("trunk")
    assert "ivy" in sys.modules


def test_the_package_is_as_it_would_be_without_us(packages: Path) -> None:
    finders = list(sys.meta_path)
    load_with("trunk", "ivy")
    trunk = importlib.import_module("trunk")
    assert sys.meta_path == finders
    assert type(trunk.__spec__.loader).__name__ == "SourceFileLoader" and "exec_module" not in vars(trunk.__loader__)
    assert importlib.reload(trunk) is trunk


def test_a_package_that_is_not_installed_stays_so() -> None:
    finders = list(sys.meta_path)
    try:
        load_with("no_such_trunk", "ivy")
        with pytest.raises(ModuleNotFoundError, match="no_such_trunk"):
            importlib.import_module("no_such_trunk")
    finally:
        sys.meta_path[:] = finders


def test_a_module_that_cannot_load_does_not_stop_the_package(packages: Path) -> None:
    load_with("trunk", "broken_ivy")
    with pytest.warns(UserWarning, match=r"broken_ivy cannot be loaded.*leaves"):
        trunk = importlib.import_module("trunk")
    assert trunk.height == 3
