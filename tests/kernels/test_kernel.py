"""The life of a kernel: compiled, tried, kept, loaded again; and what happens when each of these fails."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shiftadd3d.kernels import get_numerics, manage, matshift, numerics, set_numerics
from shiftadd3d.kernels.ops.define import TWINS
from shiftadd3d.kernels.reference import power_of_two
from shiftadd3d.kernels.runtime import cache, sources, targets
from shiftadd3d.kernels.runtime import kernel as kernel_module
from shiftadd3d.kernels.runtime.kernel import KERNELS, Kernel
from shiftadd3d.kernels.runtime.numerics import NUMERICS
from shiftadd3d.kernels.runtime.targets import CpuTarget

pytest.importorskip("tvm")

names = (f"test_scale_{number}" for number in itertools.count())


def build_scale(target: CpuTarget, factor: int) -> Any:
    from tvm.script import tirx as T

    lanes = target.lanes

    @T.prim_func(s_tir=True)
    def scale(x: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        X = T.match_buffer(x, (rows, lanes), "float32", align=4)
        Y = T.match_buffer(y, (rows, lanes), "float32", align=4)
        for row in T.parallel(rows):
            Y[row, T.ramp(0, 1, lanes)] = X[row, T.ramp(0, 1, lanes)] * T.broadcast(T.float32(factor), lanes)

    return scale


def try_scale(function: Any, factor: int) -> None:
    x = torch.randn(5, targets.current().lanes)
    y = torch.empty_like(x)
    function(x, y)
    torch.testing.assert_close(y, x * factor)


@pytest.fixture
def new_kernel() -> Iterator[Any]:
    made = []

    def new(name: str | None = None, build=build_scale, trial=try_scale) -> Kernel:
        made.append(Kernel(name or next(names), build, trial, variants=lambda target: [{"factor": 3}]))
        return made[-1]

    yield new
    for one in made:
        KERNELS.pop(one.name, None)


def apply(function: Any, rows: int = 1000) -> None:
    x = torch.randn(rows, targets.current().lanes)
    y = torch.empty_like(x)
    function(x, y)
    assert torch.equal(y, x * 3)


def test_a_kernel_is_compiled_once_and_then_loaded_from_the_cache(empty_cache: Path, new_kernel: Any, monkeypatch):
    name = next(names)
    apply(new_kernel(name).function(factor=3))
    monkeypatch.setattr(Kernel, "compile", lambda *args, **kwargs: pytest.fail("compiled again"))
    apply(new_kernel(name).function(factor=3))


def test_the_cache_is_private_and_says_what_it_holds(empty_cache: Path, new_kernel: Any):
    kernel = new_kernel()
    apply(kernel.function(factor=3))
    assert empty_cache.stat().st_mode & 0o777 == 0o700
    records = [json.loads(file.read_text()) for file in empty_cache.glob("*.json")]
    (record,) = [record for record in records if record["kernel"] == kernel.name]
    assert record["spec"] == {"factor": 3}
    assert record["target"] == targets.current().name
    assert all(file.stat().st_mode & 0o077 == 0 for file in empty_cache.iterdir())
    assert not list(empty_cache.glob("building-*"))
    assert not list(empty_cache.glob("*.trial"))


def test_another_specialisation_source_or_target_is_another_entry(new_kernel: Any, monkeypatch):
    kernel = new_kernel()
    avx2, generic = targets.find("avx2"), targets.find("generic")
    entries = {kernel.entry(avx2, factor=3), kernel.entry(avx2, factor=4), kernel.entry(generic, factor=3)}
    monkeypatch.setattr(kernel_module, "sources_digest", lambda *modules: "other")
    entries.add(kernel.entry(avx2, factor=3))
    monkeypatch.setattr(kernel_module, "versions", lambda: {"tvm": "0.0"})
    entries.add(kernel.entry(avx2, factor=3))
    assert len(entries) == 5


def test_the_next_process_finds_what_this_one_has_built(empty_cache: Path):
    code = """
import sys, torch
from shiftadd3d import kernels
from shiftadd3d.kernels.reference import power_of_two
codes = power_of_two.encode(torch.ones(8, 8))
assert kernels.matshift(torch.ones(1, 8), power_of_two.pack(codes.codes, 4), codes.offset).sum() == 64
print("tvm" in sys.modules)
"""
    compiled = [
        subprocess.run([sys.executable, "-c", code], env=os.environ, check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    ]
    assert compiled == ["True\n", "False\n"]


def test_what_nobody_has_used_for_months_goes(empty_cache: Path, new_kernel: Any):
    kernel = new_kernel()
    kernel.function(factor=3)
    entry = kernel.entry(targets.current(), factor=3)
    (library,) = empty_cache.glob(f"{entry}-*.so")
    os.utime(empty_cache / f"{entry}.json", (0, 0))
    kernel.load(targets.current(), factor=3)  # a use
    kernel.function(factor=4)
    assert library.exists()
    os.utime(empty_cache / f"{entry}.json", (0, 0))
    kernel.function(factor=5)
    assert not library.exists()
    assert not (empty_cache / f"{entry}.json").exists()


def replace(file: Path, content: bytes) -> None:
    """Put another file in its place: this process has the old one mapped and would die of a change to that."""
    file.with_suffix(".new").write_bytes(content)
    file.with_suffix(".new").replace(file)


def damage_truncate(library: Path, record: Path) -> None:
    replace(library, library.read_bytes()[:1000])


def damage_one_bit(library: Path, record: Path) -> None:
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    replace(library, content)


def damage_remove(library: Path, record: Path) -> None:
    library.unlink()


def damage_record(library: Path, record: Path) -> None:
    record.write_text('{"kernel"')


def damage_make_writable_by_others(library: Path, record: Path) -> None:
    library.chmod(0o666)


def damage_link(library: Path, record: Path) -> None:
    elsewhere = library.parent.parent / "elsewhere.so"
    library.rename(elsewhere)
    library.symlink_to(elsewhere)


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncate,
        damage_one_bit,
        damage_remove,
        damage_record,
        damage_make_writable_by_others,
        damage_link,
    ],
)
def test_a_damaged_entry_is_built_again_and_never_loaded(damage: Any, empty_cache: Path, new_kernel: Any, monkeypatch):
    name = next(names)
    kernel = new_kernel(name)
    kernel.function(factor=3)
    entry = kernel.entry(targets.current(), factor=3)
    (library,) = empty_cache.glob(f"{entry}-*.so")
    damage(library, empty_cache / f"{entry}.json")
    compiled = []
    real = Kernel.compile
    monkeypatch.setattr(Kernel, "compile", lambda *args, **spec: compiled.append(spec) or real(*args, **spec))
    apply(new_kernel(name).function(factor=3))
    assert compiled == [{"factor": 3}]
    assert len(list(empty_cache.glob(f"{entry}-*.so"))) == 1
    apply(new_kernel(name).function(factor=3))
    assert len(compiled) == 1


def test_a_folder_that_others_can_write_to_is_not_used(empty_cache: Path, new_kernel: Any):
    empty_cache.mkdir()
    empty_cache.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="others can write to it"):
        apply(new_kernel().function(factor=3))
    assert not list(empty_cache.iterdir())


def test_a_cache_that_cannot_be_made_is_done_without(tmp_path: Path, new_kernel: Any, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SHIFTADD3D_CACHE", str(tmp_path / "file" / "kernels"))
    with pytest.warns(RuntimeWarning, match="built anew in each process"):
        apply(new_kernel().function(factor=3))


@pytest.mark.twin_may_stand_in
def test_a_kernel_that_computes_something_else_than_its_twin_is_not_used(empty_cache: Path, new_kernel: Any):
    def trial(function: Any, factor: int) -> None:
        try_scale(function, factor + 1)

    kernel = new_kernel(trial=trial)
    with pytest.warns(RuntimeWarning, match=f"kernel {kernel.name}: .*plain torch stands in"):
        assert kernel.function(factor=3) is None
    assert not list(empty_cache.glob(f"{kernel.entry(targets.current(), factor=3)}*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel.function(factor=3) is None


@pytest.mark.twin_may_stand_in
def test_a_kernel_that_does_not_compile_is_not_used(empty_cache: Path, new_kernel: Any):
    def build(target: CpuTarget, factor: int) -> Any:
        raise RuntimeError("no such instruction")

    with pytest.warns(RuntimeWarning, match="no such instruction"):
        assert new_kernel(build=build).function(factor=3) is None


@pytest.mark.twin_may_stand_in
@pytest.mark.parametrize("part", ["build", "trial"])
def test_a_bug_is_no_reason_for_a_twin_to_stand_in(empty_cache: Path, new_kernel: Any, part: str):
    def fail(*_: Any, factor: int) -> Any:
        raise TypeError("a bug")

    kernel = new_kernel(**{part: fail})
    for _ in range(2):
        with pytest.raises(TypeError, match="a bug"):
            kernel.function(factor=3)


def test_tests_of_kernels_fail_where_a_twin_stands_in(empty_cache: Path, new_kernel: Any):
    def build(target: CpuTarget, factor: int) -> Any:
        raise RuntimeError("no such instruction")

    kernel = new_kernel(build=build)
    for _ in range(2):
        with pytest.raises(pytest.fail.Exception, match="no such instruction"):
            kernel.function(factor=3)


def test_a_kernel_that_another_process_tries_is_tried_all_the_same(empty_cache: Path, new_kernel: Any, monkeypatch):
    """Whether that one is alive nobody can tell where it ran on another machine, with the same folder."""
    kernel = new_kernel()
    note = cache.folder() / f"{kernel.entry(targets.current(), factor=3)}.trial"
    note.write_text(f"{2**22 + 1} elsewhere")  # more than any process has for a number
    apply(kernel.function(factor=3))
    with cache.first_run("mine"):
        pid, _, surroundings = (empty_cache / "mine.trial").read_text().partition(" ")
        assert int(pid) == os.getpid() and surroundings == cache._surroundings()
        with cache.first_run("mine"):
            pass


@pytest.mark.parametrize("name", ["~nobody-of-this-name/kernels", "~"])
def test_home_folders_are_found_or_not_made_up(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, name)
    if name == "~":
        assert cache.folder() == tmp_path / "home"
    else:
        with pytest.warns(RuntimeWarning, match="no such home folder"):
            assert cache.folder() != tmp_path / name
    assert not (tmp_path / "~").exists() and not list(tmp_path.glob("~*"))


def test_blocks_of_numerics_in_two_threads_leave_what_was_before():
    before, first, second = get_numerics(), numerics("fast"), numerics("int8")
    first.__enter__()  # as two threads may: neither ends within the other
    second.__enter__()
    first.__exit__(None, None, None)
    assert get_numerics() == "int8"
    set_numerics("twin")
    second.__exit__(None, None, None)
    assert get_numerics() == before


def test_code_is_kept_under_the_text_that_was_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, name = tmp_path / "edited.py", next(names)
    text = (
        f"from {kernel_module.__name__} import Kernel\nK = Kernel({name!r}, lambda target: None, print, lambda _: [])\n"
    )
    file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    edited = importlib.import_module("edited").K
    before = edited.entry(targets.current())
    file.write_text(text + "# what is compiled now is still the code above\n")
    assert edited.entry(targets.current()) == before
    sources.text_of.cache_clear()  # as in the next process
    assert edited.entry(targets.current()) != before
    KERNELS.pop(name)


def test_no_source_of_ours_is_read_after_it_is_imported(monkeypatch: pytest.MonkeyPatch):
    list(manage.all_variants())
    expected = KERNELS["matshift"].sources_digest()
    monkeypatch.setattr(Path, "read_bytes", lambda file: pytest.fail(f"{file} is read"))
    assert KERNELS["matshift"].sources_digest() == expected


def test_no_op_has_numerics_for_an_argument():
    list(manage.all_variants())  # imports all ops
    ops = [getattr(torch.ops.shiftadd3d, name).default for name in TWINS]
    assert len(ops) > 10
    assert not [op for op in ops if any(argument.name == "numerics" for argument in op._schema.arguments)]


def test_an_exported_program_computes_in_the_numerics_that_it_is_run_in():
    codes, offset, _ = power_of_two.encode(torch.randn(24, 48))
    layer, x = Packed(power_of_two.pack(codes, 4), offset), torch.randn(5, 48)
    program = torch.export.export(layer, (x,)).module()
    for name in NUMERICS:
        with numerics(name):
            assert torch.equal(program(x), layer(x))


class Packed(torch.nn.Module):
    def __init__(self, codes: torch.Tensor, offset: torch.Tensor) -> None:
        super().__init__()
        self.codes, self.offset = codes, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return matshift(x, self.codes, self.offset)


def kill_in_trial(entry: str) -> None:
    """Another process begins to try an entry's code, and is killed."""
    code = (
        "import os, signal, sys; from shiftadd3d.kernels.runtime import cache\n"
        "with cache.first_run(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, entry], check=False).returncode == -signal.SIGKILL


@pytest.mark.twin_may_stand_in
def test_a_kernel_that_killed_two_processes_is_not_run_again(empty_cache: Path, new_kernel: Any):
    kernel = new_kernel()
    kernel.function(factor=3)
    entry = kernel.entry(targets.current(), factor=4)
    for _ in range(2):
        kill_in_trial(entry)
    with pytest.warns(RuntimeWarning, match=r"crashed earlier processes; to try again, remove .*\.trial"):
        assert kernel.function(factor=4) is None
    (empty_cache / f"{entry}.trial").unlink()
    assert new_kernel(kernel.name).function(factor=4) is not None


def test_a_process_that_was_killed_once_may_have_been_killed_by_others(empty_cache: Path, new_kernel: Any):
    kernel = new_kernel()
    entry = kernel.entry(targets.current(), factor=3)
    kill_in_trial(entry)
    assert (empty_cache / f"{entry}.trial").is_file()
    apply(kernel.function(factor=3))
    assert not (empty_cache / f"{entry}.trial").is_file()


def test_without_a_c_compiler_kernels_work_and_are_not_kept(empty_cache: Path, new_kernel: Any, monkeypatch):
    kernel = new_kernel()
    kernel.function(factor=4)  # the launcher is there now
    monkeypatch.setenv("PATH", "")
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    kernel_module._said.clear()
    with pytest.warns(RuntimeWarning, match="no C compiler"):
        apply(kernel.function(factor=3))
    assert not list(empty_cache.glob(f"{kernel.entry(targets.current(), factor=3)}*"))


def test_kernels_run_on_torchs_threads(empty_cache: Path, new_kernel: Any, torch_threads: int):
    function = new_kernel().function(factor=3)
    apply(function)
    before = len(os.listdir("/proc/self/task"))
    for _ in range(20):
        apply(function)
    assert len(os.listdir("/proc/self/task")) == before


def test_kernels_run_from_eight_python_threads_at_once(empty_cache: Path, new_kernel: Any, torch_threads: int):
    function = new_kernel().function(factor=3)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(50):
                apply(function, rows=101)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_a_forked_child_goes_on_alone(empty_cache: Path, new_kernel: Any):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    function = new_kernel().function(factor=3)
    apply(function)
    child = os.fork()
    if child == 0:
        try:
            x = torch.ones(1000, targets.current().lanes)
            y = torch.zeros_like(x)
            function(x, y)
            os._exit(int((y.numpy() != 3).any()))
        finally:
            os._exit(1)
    torch.set_num_threads(before)
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0
            return
        threading.Event().wait(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")
