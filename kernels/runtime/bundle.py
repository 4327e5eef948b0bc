"""Bundles: folders of kernels that were compiled elsewhere.

``shiftadd3d kernels build --out DIR`` makes one. If `SHIFTADD3D_BUNDLE` names it, kernels that are not in the cache
come from the bundle instead of from the compiler. The machine then needs torch, this package and ``apache-tvm-ffi`` (3
MB), but no TVM and no C compiler: the bundle contains the part of TVM that compiled code calls. As all new code, a
kernel from a bundle must pass its trial on the machine. Then it is copied into the cache.

A bundle is for one version of this package's kernels, of ``apache-tvm-ffi`` and of the processor architecture. Others
are not loaded. The driver runs code for GPUs. So a bundle with nothing else needs no ``apache-tvm-ffi`` and is for any
processor. Code in a bundle is run, so only name bundles from people whom you trust. Digests protect against damage, not
against attacks.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypedDict

from shiftadd3d._claim import claimed
from shiftadd3d._errors import UserError
from shiftadd3d._report import write_json
from shiftadd3d.kernels.runtime.cache import Record, digest_of, version_of

ENVIRONMENT_VARIABLE = "SHIFTADD3D_BUNDLE"
MANIFEST = "manifest.json"
_FORMAT = 1
_RUNTIME = "runtime"
_GPU_CODE = ".cubin"


@dataclass(frozen=True)
class Packed:
    """One library: its file, its sources, and the facts that the cache records with it."""

    file: Path
    identity: Mapping[str, object]
    facts: Record


class _Listed(TypedDict):
    """A library in the manifest."""

    file: str
    sha256: str
    identity: Record
    facts: Record


@dataclass(frozen=True)
class Bundle:
    """An opened bundle."""

    folder: Path
    libraries: list[_Listed]

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """Read the manifest.

        Raises:
            UserError: there is none, or the bundle is for another machine or another version.
        """
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is no bundle of kernels: {MANIFEST} cannot be read ({error})") from None
        stated = {"format": None, **manifest}
        differing = [
            f"{name} {stated[name]}, not {wanted}"
            for name, wanted in _versions().items()
            if name in stated and stated[name] != wanted  # what it does not state it does not depend on
        ]
        if differing:
            raise UserError(f"the bundle {folder} does not fit this machine: it has {'; '.join(differing)}")
        return cls(folder, manifest["libraries"])

    def find(self, **identity: object) -> Packed | None:
        """The library of this identity, checked.

        Raises:
            UserError: its file has changed.
        """
        asked = json.loads(json.dumps(identity))
        for one in self.libraries:
            if one["identity"] == asked:
                file = self.folder / one["file"]
                if not file.is_file() or digest_of(file) != one["sha256"]:
                    raise UserError(f"{file} is damaged or missing: build the bundle again")
                return Packed(file, identity, one["facts"])
        return None


def find(**identity: object) -> Packed | None:
    """The library of this identity in the bundle that the environment names; None without a bundle."""
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    return _open(name).find(**identity) if name else None


def runtime() -> Path | None:
    """TVM's runtime library in the bundle that the environment names."""
    packed = find(part=_RUNTIME)
    return packed.file if packed else None


def write(folder: Path, libraries: list[Packed], tvm_runtime: Path | None) -> None:
    """Copy libraries into a folder, which becomes a bundle.

    Args:
        folder: the folder, new or empty, or an earlier bundle.
        libraries: the libraries of the bundle.
        tvm_runtime: the library that code for CPUs calls while it runs.

    Raises:
        UserError: the folder holds something else, or cannot be written to.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} holds other files: name a new folder for the bundle")
    if tvm_runtime is not None:
        libraries = [Packed(tvm_runtime, {"part": _RUNTIME}, {}), *libraries]
    rows: list[_Listed] = []
    with claimed(folder, "--out"):
        try:
            for one in libraries:
                digest = digest_of(one.file)
                name = f"{one.identity.get('kernel', one.identity['part'])}-{digest[:16]}{one.file.suffix}"
                shutil.copyfile(one.file, folder / name)
                rows.append({"file": name, "sha256": digest, "identity": dict(one.identity), "facts": one.facts})
        except OSError as error:
            raise UserError(f"cannot write the bundle {folder}: {error.strerror or error}") from error
        on_cpu = any(one.file.suffix != _GPU_CODE for one in libraries)
        versions = _versions() if on_cpu else {"format": _FORMAT}
        write_json(folder / MANIFEST, {**versions, "libraries": rows})


@lru_cache(maxsize=4)
def _open(name: str) -> Bundle:
    return Bundle.open(Path(name))


def _versions() -> Record:
    return {"format": _FORMAT, "machine": platform.machine(), "tvm_ffi": version_of("apache-tvm-ffi")}
