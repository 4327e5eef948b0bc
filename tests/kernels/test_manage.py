"""`shiftadd3d kernels {list, build, check}`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shiftadd3d import cli
from shiftadd3d.kernels import manage
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime.kernel import KERNELS, Kernel
from shiftadd3d.kernels.runtime.targets import CpuTarget

pytest.importorskip("tvm")


def build_copy(target: CpuTarget, size: int) -> Any:
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def copy(x: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        X = T.match_buffer(x, (size,), "float32", align=4)
        Y = T.match_buffer(y, (size,), "float32", align=4)
        for i in T.parallel(size):
            Y[i] = X[i]

    return copy


def try_copy(function: Any, size: int) -> None:
    x, y = torch.randn(size), torch.zeros(size)
    function(x, y)
    assert torch.equal(x, y), "the copy differs"


@pytest.fixture
def copy_kernel(empty_cache: Path) -> Iterator[Kernel]:
    kernel = Kernel("test_copy", build_copy, try_copy, lambda target: [{"size": 8}, {"size": 9}])
    yield kernel
    del KERNELS["test_copy"]


def run(*args: str, file: Path) -> tuple[int, list[dict[str, Any]]]:
    code = cli.main(["kernels", *args, "--json", str(file)])
    return code, json.loads(file.read_text())["variants"]


def test_list_shows_what_is_there_and_what_is_built(copy_kernel: Kernel, tmp_path: Path, capsys):
    file = tmp_path / "kernels.json"
    copy_kernel.function(size=9)
    code, rows = run("list", "test_copy", file=file)
    assert code == 0
    target = targets.current().name
    assert rows == [
        {"kernel": "test_copy", "target": target, "spec": {"size": 8}, "cached": False},
        {"kernel": "test_copy", "target": target, "spec": {"size": 9}, "cached": True},
    ]
    text = capsys.readouterr().out
    assert "size 8" in text
    assert "yes" in text


def test_build_builds_what_is_missing(copy_kernel: Kernel, tmp_path: Path):
    file = tmp_path / "kernels.json"
    copy_kernel.function(size=9)
    code, rows = run("build", "test_copy", file=file)
    assert code == 0
    assert [row["built"] for row in rows] == [True, False]
    code, rows = run("build", "test_copy", file=file)
    assert [row["built"] for row in rows] == [False, False]


def test_check_passes_kernels_that_are_as_their_twins(copy_kernel: Kernel, tmp_path: Path):
    code, rows = run("check", "test_copy", file=tmp_path / "kernels.json")
    assert code == 0
    assert [row["error"] for row in rows] == [None, None]


def test_check_exits_with_1_and_says_what_differs(copy_kernel: Kernel, tmp_path: Path, capsys):
    copy_kernel.function(size=8)

    def fail(function: Any, size: int) -> None:
        if size == 8:
            raise AssertionError("the copy differs")

    copy_kernel.trial = fail
    code, rows = run("check", "test_copy", file=tmp_path / "kernels.json")
    assert code == 1
    assert [row["error"] for row in rows] == ["AssertionError: the copy differs", None]
    output = capsys.readouterr()
    assert "the copy differs" in output.out
    assert output.err.endswith("error: 1 of 2 variants failed (test_copy); plain torch runs instead of them\n")


def test_a_name_that_is_none_is_refused(capsys):
    assert cli.main(["kernels", "list", "matshit"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: no kernel 'matshit': expected some of ")
    assert "matshift" in error


def test_all_kernels_are_found_and_have_variants():
    found = {variant.kernel.name for variant in manage.all_variants()}
    assert found >= {"matshift", "view_attention"}
    assert found == set(KERNELS)


def test_a_new_process_knows_the_kernels_of_all_rooms():
    code = "from shiftadd3d.kernels import manage; print(*{v.kernel.name for v in manage.all_variants()})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    folder = Path(manage.__file__).parent / "cpu"
    written = re.findall(r'^[A-Z_]+ = Kernel\(\s*"(\w+)"', "\n".join(f.read_text() for f in folder.rglob("*.py")), re.M)
    assert set(done.stdout.split()) == set(written)
    assert len(written) >= 13
