"""Compiled kernels on disk, one folder per user.

An entry is two files: a library (``.so``, or ``.cubin`` for a GPU), whose name carries the SHA-256 of its content, and
a record ``<key>.json`` that names it. The record is renamed into place last, so an entry is there whole or not at all,
and processes may race. A library is loaded only from a folder and a file that belong to this user and that nobody else
can write to, and only if its content has the digest that its record states; anything else counts as missing and is
built again.

The folder is `SHIFTADD3D_CACHE`, else ``shiftadd3d/kernels`` in the platform's cache folder (`XDG_CACHE_HOME`). If it
cannot be used, for instance because others can write to it, kernels live in a temporary folder that goes with the
process.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import platform
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeAlias

ENVIRONMENT_VARIABLE = "SHIFTADD3D_CACHE"

# Entries of old versions are not found any more; those that nothing has used for so long go when one is added.
_SECONDS_UNUSED = 90 * 24 * 3600


Record: TypeAlias = dict[str, object]
"""The facts about an entry, as in JSON."""


def folder() -> Path:
    """The folder of compiled kernels. It is made if necessary, and only its owner may open it."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if not named:
        from platformdirs import user_cache_dir  # the layers do without it

        named = os.path.join(user_cache_dir("shiftadd3d"), "kernels")
    return _prepare(named)


def key(**facts: object) -> str:
    """A key that depends on all `facts`: numbers, strings, and lists and tuples of these."""
    return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:32]


def digest_of(file: Path) -> str:
    """The SHA-256 of a file's content."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def version_of(distribution: str) -> str:
    """The version of an installed distribution, ``"none"`` where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "none"


def find(entry: str, suffix: str = ".so") -> Path | None:
    """The library of the entry with this key, checked; None if there is none that can be trusted."""
    place = folder()
    record = read_record(entry)
    if record is None:
        return None
    library = place / f"{entry}-{record.get('sha256')}{suffix}"
    try:
        if _is_private(library) and digest_of(library) == record.get("sha256"):
            os.utime(place / f"{entry}.json")
            return library
    except OSError:
        pass
    return None


def read_record(entry: str) -> Record | None:
    """The facts recorded with an entry, or None."""
    file = folder() / f"{entry}.json"
    try:
        record = json.loads(file.read_bytes()) if _is_private(file) else None
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def store(entry: str, library: Path, facts: Mapping[str, object]) -> Path:
    """Move a library in the cache's folder into the cache, and record `facts` with it."""
    digest = digest_of(library)
    final = folder() / f"{entry}-{digest}{library.suffix}"
    library.chmod(0o600)
    library.replace(final)
    record = folder() / f"{entry}.json"
    with scratch_file(".json") as written:
        written.write_text(json.dumps({**facts, "sha256": digest}, indent=1))
        written.chmod(0o600)
        written.replace(record)
    for other in folder().glob(f"{entry}-*"):
        if other != final:
            other.unlink(missing_ok=True)
    _drop_unused()
    return final


def _drop_unused() -> None:
    for record in folder().glob("*.json"):
        with contextlib.suppress(OSError):
            if time.time() - record.stat().st_mtime > _SECONDS_UNUSED:
                record.unlink()
                for library in folder().glob(f"{record.stem}-*"):
                    library.unlink()


@contextlib.contextmanager
def scratch_file(suffix: str) -> Iterator[Path]:
    """A path in the cache's folder for an unfinished file. It is removed at the end unless it was renamed."""
    handle, name = tempfile.mkstemp(suffix=suffix, prefix="building-", dir=folder())
    os.close(handle)
    path = Path(name)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


_CONDEMNED = "\nnot again"
"""The end of a note, if its process must be the last one to run the code."""


@contextlib.contextmanager
def first_run(entry: str) -> Iterator[None]:
    """Guard the first run of new machine code, which may kill the process.

    Inside this context, a note in the cache names this process. If a later process finds the note of a process that has
    ended, the code may have killed it, or a user, or a system without memory. So it tries once more.

    Raises:
        RuntimeError: two processes have ended there.
    """
    note = folder() / f"{entry}.trial"
    ended = note.is_file() and not _is_running(note)
    if ended and note.read_text().endswith(_CONDEMNED):
        raise RuntimeError(f"its code crashed earlier processes; to try again, remove {note.name} from {note.parent}")
    with scratch_file(".trial") as written:  # nobody is to read half a note
        written.write_text(f"{os.getpid()} {_surroundings()}{_CONDEMNED if ended else ''}")
        written.replace(note)
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


def condemn(entry: str) -> None:
    """Let all later processes refuse to run this entry's code, as if it had killed two."""
    (folder() / f"{entry}.trial").write_text(_CONDEMNED)


def _surroundings() -> str:
    """Where the number of this process means this process: the machine, and its namespace in containers."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{platform.node()} {namespace}"


def _is_running(note: Path) -> bool:
    """Whether the process that wrote a note may be alive. Of those in other surroundings nobody knows."""
    try:
        number, _, surroundings = note.read_text().removesuffix(_CONDEMNED).partition(" ")
        if surroundings and surroundings != _surroundings():
            return True
        os.kill(int(number), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:
        return True
    return True


@lru_cache(maxsize=8)
def _prepare(name: str) -> Path:
    name = os.path.expanduser(name)
    place = Path(name).absolute()
    try:
        if name.startswith("~"):
            raise OSError("there is no such home folder")
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_private(place):
            problem = "it belongs to someone else, or others can write to it"
        elif not os.access(place, os.W_OK | os.X_OK):
            problem = "it cannot be written to"
        else:
            return place
    except OSError as error:
        problem = error.strerror or str(error)
    warnings.warn(
        f"compiled kernels cannot be kept in {place}: {problem}; they are built anew in each process "
        f"({ENVIRONMENT_VARIABLE} names another folder)",
        RuntimeWarning,
        stacklevel=2,
    )
    temporary = Path(tempfile.mkdtemp(prefix="shiftadd3d-"))
    owner = os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(temporary, ignore_errors=True))
    return temporary


def _is_private(path: Path) -> bool:
    """Whether only this user can change the file or folder: its owner, writable for nobody else, no link."""
    status = path.lstat()
    owned = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    return owned and not stat.S_ISLNK(status.st_mode) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
