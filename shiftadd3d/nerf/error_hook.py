"""One line for bad input, also under nerfstudio's own commands."""

from __future__ import annotations

import sys
from types import TracebackType

from shiftadd3d._errors import UserError


def print_user_errors_as_one_line() -> None:
    """Print an uncaught `UserError` as one line on stderr, exit code 1. Everything else keeps its traceback."""
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, UserError):
            print("error:", " ".join(str(error).split()), file=sys.stderr)
        else:
            previous(kind, error, traceback)

    sys.excepthook = hook
