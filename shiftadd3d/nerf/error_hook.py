"""One line for bad input and for Ctrl-C, also under nerfstudio's own commands."""

from __future__ import annotations

import sys
import traceback as tracebacks
from types import TracebackType

from shiftadd3d._errors import UserError

#: Commands of nerfstudio that assert another kind of method, by their classes, and what serves instead.
_OTHER_METHODS_ONLY = {
    "ExportMarchingCubesMesh": "ns-export marching-cubes needs a signed distance field, and this method has none; use "
    "ns-export tsdf, or ns-export poisson --normal-method open3d",
    "ExportGaussianSplat": "ns-export gaussian-splat needs Gaussians, and this method has none; use ns-export "
    "pointcloud --normal-method open3d",
}


def print_expected_errors_as_one_line() -> None:
    """Print an uncaught `UserError`, and Ctrl-C while a command works on a run of ours, as one line on stderr; likewise
    why a command of nerfstudio is for other methods only.

    The exit code stays what Python makes of it: 1, and 130 for Ctrl-C. Everything else keeps its traceback.
    """
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, UserError):
            print("error:", " ".join(str(error).split()), file=sys.stderr)
        elif isinstance(error, KeyboardInterrupt) and _is_ours(traceback):
            print("interrupted", file=sys.stderr)
        elif isinstance(error, AssertionError) and _is_ours(traceback) and (reason := _other_method(traceback)):
            print("error:", reason, file=sys.stderr)
        else:
            previous(kind, error, traceback)

    sys.excepthook = hook


def _other_method(traceback: TracebackType | None) -> str | None:
    """Why the command that asserted something is none for our methods, if that is what it found out."""
    *_, (frame, _) = tracebacks.walk_tb(traceback)
    return _OTHER_METHODS_ONLY.get(type(frame.f_locals.get("self")).__name__)


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
