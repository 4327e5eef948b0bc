"""Programs as a folder that runs on machines with neither torch nor this package.

The folder holds compiled code, TVM's runtime, and the weights in the form that this reads (`WEIGHTS`). `ABOUT` says
what it is and what it needs. `SUMS` has the SHA-256 of every other file, as ``sha256sum`` writes it. Compiled code is
run: open only a folder whose maker you trust. The digests guard against damage, not against him.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import stat
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.runtime import cache, kernel, library, targets
from shiftadd3d.kernels.runtime.numerics import Numerics
from shiftadd3d.kernels.runtime.threads import follow_torch
from shiftadd3d.kernels.whole import executable
from shiftadd3d.kernels.whole.program import Exactness, Program

ABOUT, SUMS = "executable.json", "SHA256SUMS"
WEIGHTS, _SHARD = "tensor-cache.json", "params_shard_0.bin"
_MAIN, _SAFE, _LAUNCHER = "program.so", "safe.so", "parallel_launch.so"
_FORMAT, _VERSION = "shiftadd3d.executable", 1
_CARE = "holds native code, which runs when it is opened: open it only if you trust whoever made it"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def write(folder: Path, program: Program, numerics: Numerics, about: Mapping[str, Any]) -> None:
    """Write a program of one name, ``main``, with its weights; the folder is there whole or not at all.

    Where an activation can be beyond what the numerics express, the program in which none is comes along.

    Args:
        folder: new, or an earlier one, which is replaced.
        about: what else `ABOUT` is to say, in plain types.

    Raises:
        UserError: if the folder holds something else, or cannot be written.
        Exception: one of `kernel.FAILURES`, if it cannot be compiled.
    """
    if folder.exists() and not (folder / ABOUT).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds something else: name a new folder for the executable")
    unfinished = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        unfinished.mkdir(parents=True)
        unfinished.chmod(unfinished.stat().st_mode & ~_OTHERS_WRITE)
        facts = _facts(about, numerics, _copy_code(unfinished, program, numerics))
        _write_weights(unfinished, program.weights)
        _write_text(unfinished / ABOUT, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        sums = {file.name: cache.digest_of(file) for file in sorted(unfinished.iterdir())}
        _write_text(unfinished / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))
        _take_place(unfinished, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _copy_code(folder: Path, program: Program, numerics: Numerics) -> list[str]:
    """Put all libraries into a folder; the names of those of programs, in the order in which they are to be tried."""
    target = targets.current()
    wanted: dict[Exactness, str] = {numerics: _MAIN}
    if program.description(target, numerics) != program.description(target, "safe"):
        wanted["safe"] = _SAFE
    for exactness, name in wanted.items():
        executable.load({"main": program}, exactness)
        compiled = cache.find(executable.entry({"main": program}, exactness))
        if compiled is None:
            raise RuntimeError("there is no C compiler to link with")
        _copy(compiled, folder / name)
    _copy(library.packed_launcher().file, folder / _LAUNCHER)
    for file in (library.runtime_library(), library.ffi_library()):
        if file is None:
            raise RuntimeError("TVM's runtime library is not installed")
        _copy(file, folder / file.name)
    return list(wanted.values())


def _facts(about: Mapping[str, Any], numerics: Numerics, programs: list[str]) -> dict[str, Any]:
    target = targets.current()
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "care": _CARE,
        **about,
        "numerics": numerics,
        "programs": programs,
        "machine": platform.machine(),
        "cpu": sorted(target.flags),
        "made_with": kernel.versions(),
    }


def _write_weights(folder: Path, weights: list[Tensor]) -> None:
    """In the form of TVM's tensor cache, which its runtime reads by itself."""
    records, offset = [], 0
    with (folder / _SHARD).open("wb") as shard:
        for number, tensor in enumerate(weights):
            content = tensor.detach().contiguous().numpy().tobytes()
            shape, dtype = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
            where = {"format": "raw", "nbytes": len(content), "byteOffset": offset}
            records.append({"name": f"param_{number}", "shape": shape, "dtype": dtype, **where})
            offset += shard.write(content)
    whole = {"dataPath": _SHARD, "format": "raw-shard", "nbytes": offset, "records": records}
    _write_text(folder / WEIGHTS, json.dumps({"metadata": {"ParamSize": len(records)}, "records": [whole]}) + "\n")


def _take_place(unfinished: Path, folder: Path) -> None:
    """Rename a folder; what was there in its place before goes."""
    if not folder.exists():
        unfinished.replace(folder)
        return
    before = folder.with_name(f"{unfinished.name}-before")
    folder.replace(before)
    try:
        unfinished.replace(folder)
    except OSError:
        before.replace(folder)
        raise
    shutil.rmtree(before, ignore_errors=True)


def _copy(source: Path, file: Path) -> None:
    file.touch()  # with the mode that the umask gives, not that of the source
    shutil.copyfile(source, file)
    file.chmod(file.stat().st_mode & ~_OTHERS_WRITE)


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    file.chmod(file.stat().st_mode & ~_OTHERS_WRITE)


# Opening


def is_deployment(folder: Path) -> bool:
    """Whether a folder claims to be what `write` made."""
    return (folder / ABOUT).is_file() or (folder / SUMS).is_file()


_weights_lock = threading.Lock()


class Deployment:
    """A program from a folder, ready to be called.

    Args:
        folder: what `write` made.

    Attributes:
        about: what `ABOUT` says.
        overflows: how many calls met an activation that the numerics cannot express, and were done again without.

    Raises:
        UserError: if it is damaged, could have been written to by others, or is for another machine than this one.
    """

    def __init__(self, folder: Path) -> None:
        folder = folder.resolve()
        self.about, self.overflows = _checked(folder), 0
        self._lock, self._control = threading.Lock(), executable.Control()
        try:
            library.install_launcher(library=folder / _LAUNCHER)
            self._programs = [executable.open_library(folder / name)["main"] for name in self.about["programs"]]
            self._weights = _read_weights(folder)
        except kernel.FAILURES as error:
            raise UserError(f"{folder} cannot be opened: {kernel.first_line(error)}") from None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What the program makes of its inputs, contiguous and of the shapes that it was compiled for."""
        first, *others = self._programs
        with self._lock:
            y = self._run(first, inputs)
            for other in others if self._control.overflowed else ():
                self.overflows += 1
                y = self._run(other, inputs)
        return y

    def _run(self, main: Any, inputs: Sequence[Tensor]) -> Tensor:
        follow_torch()
        self._control.reset(torch.get_num_threads())
        return torch.from_dlpack(main(*inputs, self._control.tensor, self._weights))


def _checked(folder: Path) -> dict[str, Any]:
    """What a folder says about itself, once all is as it was written and fits this machine."""
    damaged = f"{folder} is damaged, or not an executable that `shiftadd3d export` wrote"
    reading = SUMS
    try:
        lines = [line.split("  ", 1) for line in (folder / reading).read_text(encoding="utf-8").splitlines()]
        sums = {name: digest for digest, name in lines}
        files = [folder / name for name in sums if Path(name).name == name]
        for path in (folder, folder / SUMS, *files):
            _refuse_if_others_write(path)
        changed = [file.name for file in files if cache.digest_of(file) != sums[file.name]]
        if len(files) != len(sums) or changed:
            raise UserError(f"{damaged}: {', '.join(changed) or SUMS} is not what was written")
        reading = ABOUT
        about = json.loads((folder / reading).read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{damaged}: {Path(str(error.filename)).name} is missing") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or error}") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{damaged}: {reading} cannot be read: {kernel.first_line(error)}") from None
    if not _is_whole(about, set(sums)):
        raise UserError(f"{damaged}: {ABOUT} does not say all that it should")
    if about.get("version") != _VERSION:
        raise UserError(f"{folder} is of format version {about.get('version')}; this shiftadd3d reads {_VERSION}")
    _refuse_other_machines(folder, about)
    return about


def _is_whole(about: Any, files: set[str]) -> bool:
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        return False
    told = {"version", "numerics", "programs", "machine", "cpu", "made_with"} <= set(about)
    return told and {ABOUT, WEIGHTS, _SHARD, _LAUNCHER, *about["programs"]} <= files


def _refuse_if_others_write(path: Path) -> None:
    status = path.lstat()
    others_own = hasattr(os, "getuid") and status.st_uid not in (0, os.getuid())
    if others_own or stat.S_ISLNK(status.st_mode) or status.st_mode & _OTHERS_WRITE:
        raise UserError(
            f"{path} belongs to someone else, is a link, or can be written to by others, and it would be run; expected "
            "one that only you or root can write to"
        )


def _refuse_other_machines(folder: Path, about: dict[str, Any]) -> None:
    if about["machine"] != platform.machine():
        raise UserError(f"{folder} is for {about['machine']}, and this is {platform.machine()}")
    lacking = targets.lacking(frozenset(about["cpu"]))
    if lacking:
        raise UserError(f"{folder} is for another CPU: this one lacks {', '.join(lacking)}")
    made, here = about["made_with"], kernel.versions()
    if made != here:
        apart = ", ".join(
            f"{name} {made.get(name)}, not {found}" for name, found in here.items() if made.get(name) != found
        )
        raise UserError(f"{folder} was made with another version of TVM than is installed: {apart}; export again")


def _read_weights(folder: Path) -> Any:
    import tvm_ffi

    load, take, clear = (
        tvm_ffi.get_global_func(f"vm.builtin.{name}")
        for name in ("tensor_cache.load", "param_array_from_cache", "tensor_cache.clear")
    )
    with _weights_lock:  # the runtime has one such cache for the process
        load(str(folder), 1, 0)  # the CPU
        weights = take("param", -1)
        clear()
    return weights
