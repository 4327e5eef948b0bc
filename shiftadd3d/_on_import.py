"""Load one of our modules as soon as anyone imports the package that it extends, and not before."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def load_with(package: str, module: str) -> None:
    """Import `module` when `package` is imported; now, if it has been."""
    if package in sys.modules:
        _load(module)
    else:
        sys.meta_path.insert(0, _Finder(package, module))


class _Finder(MetaPathFinder):
    """Finds `package` as the other finders do, with a loader that goes on to import `module`."""

    def __init__(self, package: str, module: str) -> None:
        self._package, self._module = package, module

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # Also asked by those who only want to know whether the package is there: nothing happens before it is executed.
        if fullname != self._package:
            return None
        specs = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._extend(spec)
        return spec

    def _extend(self, spec: ModuleSpec) -> None:
        loader = spec.loader
        assert loader is not None
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # the loader's own method again, for whoever reloads the package
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _load(self._module)

        setattr(loader, "exec_module", exec_module)  # noqa: B010


def _load(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        # The package itself works: whoever imports it must not be stopped by what we add to it.
        warnings.warn(f"{module} cannot be loaded, so its layers are not known: {error}", stacklevel=2)
