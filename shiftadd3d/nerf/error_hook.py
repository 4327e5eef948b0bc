"""Under nerfstudio's own commands, one line for wrong input, for Ctrl-C, for names that two packages share, and for
methods that are spelt almost as ours.
"""

from __future__ import annotations

import atexit
import difflib
import multiprocessing
import sys
import traceback as tracebacks
from pathlib import Path
from types import FrameType, TracebackType

from shiftadd3d._entry_points import GROUPS, own_names, shared_names
from shiftadd3d._errors import UserError

#: Where nerfstudio's commands give up without saying what would do: an error's kind, the innermost class or function of
#: theirs that was at work, and what to do instead.
_WHAT_TO_DO: tuple[tuple[type[Exception], str, str], ...] = (
    (
        AssertionError,
        "ExportMarchingCubesMesh",
        "ns-export marching-cubes needs a signed distance field, and this method has none; use ns-export tsdf, or "
        "ns-export poisson --normal-method open3d",
    ),
    (
        AssertionError,
        "ExportGaussianSplat",
        "ns-export gaussian-splat needs Gaussians, and this method has none; use ns-export pointcloud --normal-method "
        "open3d",
    ),
    (
        ValueError,
        "get_interpolated_poses_many",
        "there is one view, and ns-render interpolate needs two or more; use --pose-source train",
    ),
    (OSError, "DatasetRender", "ns-render cannot write this as JPEG, which knows no alpha; use --image-format png"),
    (
        OSError,
        "_render_trajectory_video",
        "ns-render cannot write this as JPEG, which knows no alpha; use --image-format png",
    ),
    (AttributeError, "apply_colormap", "this output is no picture; expected rgb, depth, accumulation, rgba or gt-rgb"),
)


def print_expected_errors_as_one_line() -> None:
    """Print some uncaught exceptions as one line on stderr.

    These are `UserError`, a config.yml that cannot be opened, Ctrl-C while a command works on one of our runs, and
    errors for things that nerfstudio's commands cannot do with such a run. The exit code is Python's: 1, and 130 for
    Ctrl-C. All other exceptions keep their traceback.
    """
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, UserError):
            print("error:", " ".join(str(error).split()), file=sys.stderr)
        elif isinstance(error, OSError) and _opens_config(traceback):
            reason = error.strerror or str(error)
            print(f"error: {error.filename}: {reason}; expected the config.yml that ns-train wrote", file=sys.stderr)
        elif isinstance(error, KeyboardInterrupt) and _is_ours(traceback):
            print("interrupted", file=sys.stderr)
        elif _is_ours(traceback) and (reason := _what_to_do(error, traceback)):
            print("error:", reason, file=sys.stderr)
        else:
            previous(kind, error, traceback)

    sys.excepthook = hook


def warn_of_shared_names() -> None:
    """Under nerfstudio's commands, name in one line on stderr our names that another package has registered, too."""
    if Path(sys.argv[0]).name.startswith("ns-") and multiprocessing.parent_process() is None:
        shared = "; ".join(map(str, shared_names()))
        if shared:
            print("warning:", shared, file=sys.stderr)


def name_similar_methods() -> None:
    """When ns-train ends because there is no such method, name ours that are spelt alike, in one line on stderr."""
    if Path(sys.argv[0]).name == "ns-train" and multiprocessing.parent_process() is None:
        atexit.register(_name_similar_methods, sys.argv[1:2])


def _name_similar_methods(given: list[str]) -> None:
    # By now it knows all methods; when it asked for ours, it knew only some.
    configs = sys.modules.get("nerfstudio.configs.method_configs")
    for method in given:
        if not method.startswith("-") and method not in getattr(configs, "all_methods", (method,)):
            similar = difflib.get_close_matches(method, sorted(own_names(GROUPS[0])), n=3, cutoff=0.7)
            if similar:
                print(f"error: no method {method}; perhaps {', '.join(similar)}", file=sys.stderr)


def _opens_config(traceback: TracebackType | None) -> bool:
    """Whether nerfstudio was opening a run's config.yml, of whatever method."""
    frames = [frame for frame, _ in tracebacks.walk_tb(traceback)]
    callers = [frame for frame in frames if _package(frame) != "pathlib"]
    if not callers or callers[-1] is frames[-1]:
        return False
    place = (callers[-1].f_globals.get("__name__"), callers[-1].f_code.co_name)
    return place in {("nerfstudio.utils.eval_utils", "eval_setup"), ("nerfstudio.scripts.train", "main")}


def _what_to_do(error: BaseException, traceback: TracebackType | None) -> str | None:
    """What the user can do about an error of nerfstudio's own, if that is known."""
    theirs = [frame for frame, _ in tracebacks.walk_tb(traceback) if _package(frame) == "nerfstudio"]
    if not theirs or (isinstance(error, OSError) and "as JPEG" not in str(error)):
        return None
    at_work = {theirs[-1].f_code.co_name, type(theirs[-1].f_locals.get("self")).__name__}
    return next((text for kind, place, text in _WHAT_TO_DO if isinstance(error, kind) and place in at_work), None)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]


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
