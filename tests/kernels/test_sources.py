"""The key of compiled code follows the import statements of its sources, and nothing else that a process does."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shiftadd3d.kernels.runtime import sources
from shiftadd3d.kernels.runtime.sources import PACKAGE, imported_by, sources_digest, text_of

RUNTIME = f"{PACKAGE}.runtime"


def imports(node: ast.AST) -> Iterator[str]:
    """What Python's parser finds in statements, but not under ``if TYPE_CHECKING``."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
        for part in ast.iter_child_nodes(node):
            yield from imports(part)


@pytest.mark.parametrize("module", sorted(sources._FILES))
def test_import_statements_are_found_as_pythons_parser_finds_them(module: str) -> None:
    text = text_of(sources._FILES[module])
    found = {name if name in sources._FILES else name.rpartition(".")[0] for name in imports(ast.parse(text))}
    assert imported_by(text) == found & set(sources._FILES)


def test_import_statements_are_found_however_they_are_written() -> None:
    text = f"""
from typing import TYPE_CHECKING
import os, {RUNTIME}.cache as kept, {RUNTIME}.bundle
from {RUNTIME} import (
    memory,  # targets
    threads as team,
)
from {RUNTIME} import numerics as n, \\
    library
from {PACKAGE}.cpu.isa import *
if TYPE_CHECKING:
    from {PACKAGE}.cpu import tile
def build():

    from {RUNTIME}.tir import function
from .. import {PACKAGE}
"""
    names = ("cache", "bundle", "memory", "threads", "numerics", "library", "tir")
    assert imported_by(text.encode()) == {*(f"{RUNTIME}.{name}" for name in names), f"{PACKAGE}.cpu.isa"}


@pytest.mark.parametrize("package", sorted(name for name, file in sources._FILES.items() if file.stem == "__init__"))
def test_the_file_of_a_package_only_defines_things(package: str) -> None:
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for statement in ast.parse(text_of(sources._FILES[package])).body:
        is_docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        assert isinstance(statement, allowed) or is_docstring, ast.unparse(statement)


def test_a_kernel_depends_on_what_it_uses_and_not_on_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    read = text_of
    counted: set[str] = set()

    def note(file: Path) -> bytes:
        counted.add(file.relative_to(sources._ROOT).as_posix())
        return read(file)

    monkeypatch.setattr(sources, "text_of", note)
    sources_digest(f"{PACKAGE}.cpu.matadd_calls")
    assert {"cpu/sign_tables.py", "cpu/isa.py", "reference/matadd.py", "runtime/kernel.py"} <= counted
    assert not [name for name in counted if name.startswith(("ops/", "whole/", "cuda/", "cpu/gnt/", "cpu/forms/"))]


def test_nothing_that_a_process_imports_or_patches_changes_a_digest() -> None:
    ask = """
import sys
from shiftadd3d.kernels.runtime.sources import PACKAGE, sources_digest
if sys.argv[1:]:
    import shiftadd3d.models.gnt
    from shiftadd3d.kernels import manage
    list(manage.all_variants())  # imports all kernels
    for name, module in list(sys.modules.items()):
        if name.startswith(PACKAGE):
            module.patched = module.targets = module.Isa = manage.build_kernels
print(*(sources_digest(f"{PACKAGE}.{name}") for name in ("cpu.matshift", "cpu.gnt.gather", "whole.tokens")))
"""
    digests = [
        subprocess.run([sys.executable, "-c", ask, *more], check=True, capture_output=True, text=True).stdout.split()
        for more in ([], ["everything"])
    ]
    assert digests[0] == digests[1] and len(set(digests[0])) == 3


def test_a_kernel_of_another_project_depends_on_its_file_and_on_what_that_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    digests = set()
    for name, text in {"plain": "", "other": "x = 1", "with_kernels": f"import {PACKAGE}.cpu.isa\n"}.items():
        (tmp_path / f"{name}.py").write_text(text)
        __import__(name)
        digests.add(sources_digest(name))
    assert len(digests) == 3
    before, isa = sources_digest("with_kernels"), sources._FILES[f"{PACKAGE}.cpu.isa"]
    monkeypatch.setattr(sources, "text_of", lambda file: text_of(file) + (b"# changed" if file == isa else b""))
    assert sources_digest("with_kernels") != before
