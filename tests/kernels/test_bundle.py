"""Kernels that were compiled elsewhere: what a bundle holds, where it runs, and when it is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shiftadd3d import UserError, cli
from shiftadd3d.kernels.cpu.depthwise import DEPTHWISE_CONV
from shiftadd3d.kernels.runtime import bundle, targets
from shiftadd3d.kernels.runtime.bundle import Bundle
from shiftadd3d.kernels.runtime.kernel import KERNELS, Kernel

pytest.importorskip("tvm")

SPEC = {"dtype": "float32", "kernel_size": 3, "activation": "none", "added": False}


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bundle with one kernel in it, made by the command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DEPTHWISE_CONV, "variants", lambda target: [SPEC])
        folder = tmp_path_factory.mktemp("bundle") / "kernels"
        assert cli.main(["kernels", "build", "depthwise_conv", "--out", str(folder)]) == 0
        yield folder


@pytest.fixture
def copy(bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> Path:
    """A copy of it that the environment names, beside an empty cache."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for file in bundled.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    monkeypatch.setenv("SHIFTADD3D_BUNDLE", str(folder))
    bundle._open.cache_clear()
    monkeypatch.setattr(Kernel, "compile", lambda *args, **spec: pytest.fail("compiled"))
    return folder


def edit_manifest(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def test_it_says_what_it_holds(bundled: Path):
    manifest = json.loads((bundled / "manifest.json").read_text())
    parts = {row["identity"]["part"]: row for row in manifest["libraries"]}
    assert parts.keys() == {"kernel", "parallel_launch", "runtime"}
    assert parts["kernel"]["identity"]["spec"] == SPEC
    assert parts["kernel"]["identity"]["target"] == targets.current().name
    assert {row["file"] for row in manifest["libraries"]} | {"manifest.json"} == {f.name for f in bundled.iterdir()}


def test_without_tvm_and_without_a_compiler_its_kernels_run(tmp_path: Path, repository: Path, empty_cache: Path):
    """A process whose packages are all there but TVM's compiler, and whose search path is empty.

    Another process makes the bundle, as elsewhere: this one has the modules of all tests before, patched or not.
    """
    bundled = tmp_path / "bundle"
    make = f"""
import sys
from shiftadd3d import cli
from shiftadd3d.kernels.cpu.depthwise import DEPTHWISE_CONV
DEPTHWISE_CONV.variants = lambda target: [{SPEC}]
sys.exit(cli.main(["kernels", "build", "depthwise_conv", "--out", {str(bundled)!r}]))
"""
    with_compiler = {**os.environ, "SHIFTADD3D_CACHE": str(tmp_path / "elsewhere")}
    done = subprocess.run(
        [sys.executable, "-c", make], cwd=repository, env=with_compiler, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    packages = tmp_path / "packages"
    packages.mkdir()
    for place in Path(sysconfig.get_path("purelib")).iterdir():
        if not place.name.startswith(("tvm", "apache_tvm-")) or place.name.startswith("tvm_ffi"):
            (packages / place.name).symlink_to(place)
    code = """
import importlib.util, sys, warnings
warnings.simplefilter("error", RuntimeWarning)
assert importlib.util.find_spec("tvm") is None
import torch
from shiftadd3d.kernels.cpu.depthwise import DEPTHWISE_CONV
from shiftadd3d.kernels.ops.depthwise import depthwise_conv
from shiftadd3d.kernels.reference.depthwise import depthwise_conv_twin
given = torch.randn(2, 20, 48), torch.randn(48, 1, 3, 3), None, 4, 5
torch.testing.assert_close(depthwise_conv(*given), depthwise_conv_twin(*given))
assert DEPTHWISE_CONV.function(dtype="float32", kernel_size=3, activation="none", added=False) is not None
print("ran")
"""
    environment = {
        "PYTHONPATH": f"{repository}{os.pathsep}{packages}",
        "SHIFTADD3D_CACHE": str(empty_cache),
        "SHIFTADD3D_BUNDLE": str(bundled),
        "PATH": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-S", "-c", code]
    for _ in range(2):  # from the bundle, then from the cache
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout == "ran\n", done.stderr
    assert len(list(empty_cache.glob("*.so"))) == 1


def test_a_kernel_has_to_pass_its_trial_where_it_is_run(copy: Path, monkeypatch: pytest.MonkeyPatch):
    def trial(function: Any, **spec: Any) -> None:
        raise AssertionError("it computes nonsense here")

    monkeypatch.setattr(DEPTHWISE_CONV, "trial", trial)
    with pytest.raises(AssertionError, match="nonsense"):
        DEPTHWISE_CONV.load(targets.current(), **SPEC)


def test_without_tvm_what_the_bundle_lacks_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch):
    def compile(*args: Any, **spec: Any) -> None:
        raise ModuleNotFoundError("No module named 'tvm'")

    edit_manifest(copy, libraries=[])
    monkeypatch.setattr(Kernel, "compile", compile)
    target = targets.current()
    expected = f"the bundle has no such kernel for {target.name}, and to compile it: No module named 'tvm'"
    with pytest.raises(ImportError, match=expected):
        DEPTHWISE_CONV.load(target, **SPEC)


def test_a_check_refuses_a_bundle_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("SHIFTADD3D_BUNDLE", str(tmp_path / "nowhere"))
    assert cli.main(["kernels", "check", "depthwise_conv"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'nowhere'} is no bundle of kernels")


def test_a_damaged_library_is_not_loaded(copy: Path):
    (library,) = copy.glob("depthwise_conv-*.so")
    library.write_bytes(library.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"depthwise_conv-.*\.so is damaged or missing: build the bundle again"):
        DEPTHWISE_CONV.load(targets.current(), **SPEC)


def test_what_it_does_not_hold_is_compiled(copy: Path, monkeypatch: pytest.MonkeyPatch):
    for change in ({"sources_digest": lambda: "newer"}, {}):
        with monkeypatch.context() as patch:
            for name, value in change.items():
                patch.setattr(DEPTHWISE_CONV, name, value)
            spec = SPEC if change else SPEC | {"kernel_size": 5}
            with pytest.raises(pytest.fail.Exception, match="compiled"):
                DEPTHWISE_CONV.load(targets.current(), **spec)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"machine": "riscv64"}, "does not fit this machine: it has machine riscv64, not "),
        ({"tvm_ffi": "0.0.1"}, "it has tvm_ffi 0.0.1, not "),
        ({"format": 2}, "it has format 2, not 1"),
    ],
)
def test_a_bundle_for_something_else_is_refused(copy: Path, changes: dict[str, Any], complaint: str):
    edit_manifest(copy, **changes)
    with pytest.raises(UserError, match=complaint):
        Bundle.open(copy)


def test_code_for_gpus_alone_fits_any_processor_and_needs_no_tvm_ffi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(b"\x7fELF")
    identity = {"part": "kernel", "kernel": "k"}
    bundle.write(tmp_path / "bundle", [bundle.Packed(cubin, identity, {})], None)
    monkeypatch.setattr(bundle, "_versions", lambda: {"format": 1, "machine": "riscv64", "tvm_ffi": "none"})
    found = Bundle.open(tmp_path / "bundle").find(**identity)
    assert found is not None
    assert found.file.read_bytes() == b"\x7fELF"
    edit_manifest(tmp_path / "bundle", format=2)
    with pytest.raises(UserError, match="it has format 2, not 1"):
        Bundle.open(tmp_path / "bundle")


@pytest.mark.twin_may_stand_in
def test_a_folder_that_is_no_bundle_is_said_once_and_the_twin_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_cache: Path
):
    monkeypatch.setenv("SHIFTADD3D_BUNDLE", str(tmp_path))
    bundle._open.cache_clear()
    kernel = Kernel("test_bundle", DEPTHWISE_CONV.build, DEPTHWISE_CONV.trial, DEPTHWISE_CONV.variants)
    try:
        with pytest.warns(RuntimeWarning, match="is no bundle of kernels: manifest.json cannot be read"):
            assert kernel.function(**SPEC) is None
    finally:
        del KERNELS["test_bundle"]


def test_other_files_are_not_buried_in_libraries(tmp_path: Path):
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(UserError, match="holds other files: name a new folder for the bundle"):
        bundle.write(tmp_path, [], None)
