"""Programs compiled by another process, while this one goes on without them.

No thread does it: compiling holds a lock that kernels need on their first call, LLVM cannot be interrupted, and a
thread inside it would hold up, or crash, a process that wants to end. The other process compiles into the cache. When
this one ends, it tells the other one to end, too, which removes what is not finished once LLVM returns.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from typing import IO

from shiftadd3d.kernels.runtime import cache, kernel, targets
from shiftadd3d.kernels.whole import executable
from shiftadd3d.kernels.whole.program import Exactness, Program

_SERVE = f"import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); from {__name__} import serve; serve()"


class Compilation:
    """Programs on their way into the cache.

    Args:
        programs: by name, compiled together. Their functions are found by name in the other process, so they may stand
            in any module but ``__main__``.
        exactness: what for.

    Raises:
        Exception: one of `kernel.FAILURES`, if there is no way to compile.
    """

    def __init__(self, programs: Mapping[str, Program], exactness: Exactness) -> None:
        if not sys.executable:
            raise RuntimeError("no Python is known that could compile beside this one")
        self._programs = programs
        self._exactness: Exactness = exactness
        self._owner, self._said = os.getpid(), tempfile.TemporaryFile()  # noqa: SIM115 it lives as long as this does
        # The other process asks the same cache, even if that is this process's own, and compiles for the same CPU.
        places = {cache.ENVIRONMENT_VARIABLE: str(cache.folder()), targets.ENVIRONMENT_VARIABLE: targets.current().name}
        with tempfile.TemporaryFile() as request:
            request.write(pickle.dumps(sys.path) + _request(programs, exactness))
            request.seek(0)
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SERVE],
                env=os.environ | places,
                stdin=request,
                stdout=self._said,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this process, which may go on
            )
        weakref.finalize(self, _end, self._process, self._owner)

    def poll(self) -> executable.Executable | None:
        """The compiled programs, once they are there; until then None.

        Raises:
            Exception: one of `kernel.FAILURES`, which kept them from being compiled.
        """
        if os.getpid() != self._owner:  # a fork of the process that waits for it
            return None
        status = self._process.poll()
        if status is None:
            return None
        if status != 0:
            raise RuntimeError(_last_line(self._said) or f"the process that compiled it ended with status {status}")
        return executable.load(self._programs, self._exactness)

    def wait(self, seconds: float | None = None) -> None:
        """Wait until `poll` has something to say, or for so long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)


class Supply:
    """Executables of a model, each made when it is first asked for.

    Args:
        background: by another process, where the cache does not have it; until that is done there is none.
    """

    def __init__(self, background: bool) -> None:
        self.background = background
        self._begun: dict[Exactness, Compilation] = {}

    def executable(self, programs: Mapping[str, Program], exactness: Exactness) -> executable.Executable | None:
        """Programs compiled together; None as long as they are being compiled.

        Raises:
            Exception: one of `kernel.FAILURES`.
        """
        begun = self._begun.get(exactness)
        if begun is not None:
            found = begun.poll()
            if found is not None:
                del self._begun[exactness]
            return found
        if not self.background or is_cached(programs, exactness):
            return executable.load(programs, exactness)
        self._begun[exactness] = Compilation(programs, exactness)
        return None

    def wait(self) -> None:
        """Wait for what is being compiled."""
        for compilation in list(self._begun.values()):
            compilation.wait()


def is_cached(programs: Mapping[str, Program], exactness: Exactness) -> bool:
    """Whether programs need not be compiled any more."""
    return cache.find(executable.entry(programs, exactness)) is not None


def _request(programs: Mapping[str, Program], exactness: Exactness) -> bytes:
    functions = {call.function for program in programs.values() for call in program.calls if call.function}
    own = sorted(function.name for function in functions if function.build.__module__ == "__main__")
    if own:
        raise RuntimeError(f"{own[0]} stands in the script that runs, where another process cannot find it")
    try:
        return pickle.dumps(({name: program.without_weights() for name, program in programs.items()}, exactness))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise RuntimeError(f"it cannot be handed to another process: {kernel.first_line(error)}") from None


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner and process.poll() is None:
        process.terminate()


def _last_line(said: IO[bytes]) -> str:
    said.seek(0)
    return next(reversed(said.read().decode(errors="replace").strip().splitlines()), "")


def serve() -> None:
    """What the other process does: compile what it is sent on its standard input. It ends with a line if it cannot."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))  # not at once: first remove what is unfinished
    programs, exactness = pickle.load(sys.stdin.buffer)
    try:
        executable.load(programs, exactness)
    except kernel.FAILURES as error:
        sys.exit(kernel.first_line(error))
    if not is_cached(programs, exactness):
        sys.exit("there is no C compiler to link with, which other processes need")
