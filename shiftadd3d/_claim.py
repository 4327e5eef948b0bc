"""One process at a time writes to a folder or file. A second process is refused, so that results do not mix."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from shiftadd3d._errors import UserError

_NAME = ".being-written"
# Some network filesystems know no locks; there, nobody is kept out.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_held: dict[Path, tuple[int, int, int]] = {}
"""By lock file: its descriptor, the process that opened it (a forked one has it, too), and how often it was claimed."""
_made: dict[Path, list[Path]] = {}
"""By lock file: the folders that were made for it, innermost first."""


def try_claim(out: Path, *, file: bool = False) -> bool:
    """Make this process the only one that writes to a folder (which is made) or to a file (whose folder is made).

    This lasts until `release`, or until the process ends in any way. A process may claim a place several times, and
    then releases it as often.

    Args:
        out: the folder or file.
        file: whether it is a file.

    Returns:
        False if another process writes there.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    lock = _lock_file(out, file)
    if lock in _held:
        handle, owner, times = _held[lock]
        _held[lock] = (handle, owner, times + 1)
        return True
    made = [folder for folder in (lock.parent, *lock.parent.parents) if not folder.exists()]
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(handle)
                return False
        # Whoever had it may have removed the file between opening it here and locking it.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), lock.stat()):
                break
        os.close(handle)
    _held[lock], _made[lock] = (handle, os.getpid(), 1), made
    return True


def claim(out: Path, option: str, *, file: bool = False) -> None:
    """`try_claim`, with an error if it fails.

    Args:
        out: the folder or file.
        option: the option that chose it, such as `--out`.
        file: whether it is a file.

    Raises:
        UserError: another process writes there, or it cannot be written to.
    """
    try:
        if try_claim(out, file=file):
            return
    except (FileExistsError, NotADirectoryError):
        way = next((path for path in (out, *out.parents) if os.path.lexists(path)), out)
        raise UserError(f"cannot write into {out}: {way} is a file; expected a folder ({option})") from None
    except OSError as error:
        raise UserError(
            f"cannot write to {out}: {error.strerror or error}; name a place of your own with {option}"
        ) from None
    raise UserError(f"another process is writing to {out}: wait until it is done, or choose another {option}")


def release(out: Path, *, file: bool = False) -> None:
    """Give up a place from `try_claim` or `claim`. Folders that were made for it are removed if they are empty.

    For places of others, or in a child process, do nothing.
    """
    lock = _lock_file(out, file)
    handle, owner, times = _held.get(lock, (-1, -1, 0))
    if owner != os.getpid():
        return
    if times > 1:
        _held[lock] = (handle, owner, times - 1)
    else:
        _give_back(lock)


def _give_back(lock: Path) -> None:
    handle, owner, _ = _held.pop(lock)
    if owner != os.getpid():
        return
    if sys.platform == "win32":  # an open file cannot be removed there
        os.close(handle)
    with contextlib.suppress(OSError):
        lock.unlink()
    if sys.platform != "win32":
        os.close(handle)
    with contextlib.suppress(OSError):
        for folder in _made.pop(lock, []):
            folder.rmdir()  # not where there is anything in it


@atexit.register
def _give_all_back() -> None:
    for lock in list(_held):
        _give_back(lock)


@contextlib.contextmanager
def claimed(out: Path, option: str, *, file: bool = False) -> Iterator[None]:
    """`claim` it for as long as the context lasts. Raises `UserError` as that does."""
    claim(out, option, file=file)
    try:
        yield
    finally:
        release(out, file=file)


def _lock_file(out: Path, file: bool) -> Path:
    return out.parent.resolve() / f".{out.name}{_NAME}" if file else out.resolve() / _NAME


def _lock(handle: int) -> None:
    """Lock an open file, or raise `OSError`; closing it, also by dying, unlocks it."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
