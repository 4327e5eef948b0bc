"""One line for bad input and for Ctrl-C, also under nerfstudio's own commands."""

from __future__ import annotations

import sys
import traceback as tracebacks
from types import TracebackType

from shiftadd3d._errors import UserError


def print_expected_errors_as_one_line() -> None:
    """Print an uncaught `UserError`, and Ctrl-C while a command works on a run of ours, as one line on stderr.

    The exit code stays what Python makes of it: 1, and 130 for Ctrl-C. Everything else keeps its traceback.
    """
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, UserError):
            print("error:", " ".join(str(error).split()), file=sys.stderr)
        elif isinstance(error, KeyboardInterrupt) and _is_ours(traceback):
            print("interrupted", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    sys.excepthook = hook


def _is_ours(traceback: TracebackType | None) -> bool:
    """Whether something on the stack, such as a command's configuration or its pipeline, is an object of this package.

    The hook is there under every method's commands, and Ctrl-C is how people find out where another one hangs.
    """
    package = __name__.partition(".")[0]
    return any(
        type(value).__module__.partition(".")[0] == package
        for frame, _ in tracebacks.walk_tb(traceback)
        for value in frame.f_locals.values()
    )
