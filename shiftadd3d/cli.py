"""Transformer NeRFs and vision transformers whose multiplications become shifts, adds and a mixture of experts.

Exit codes: 0 done, 1 failed, 2 wrong arguments.
"""

# A verb is a dataclass: its docstring and its fields' docstrings are the help, `run` does the work. Nothing heavy is
# imported up here (torch, nerfstudio and TVM load inside `run`), so that `--help` answers at once.

from __future__ import annotations

import importlib.util
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, cast

import tyro

from shiftadd3d._errors import UserError

__all__ = ["VERBS", "Demo", "Info", "Render", "Verb", "main"]

JsonFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]


class Verb(ABC):
    """What the command line turns into: parsed arguments that can be run."""

    @abstractmethod
    def run(self) -> None:
        """Do the work. Raises `UserError` for whatever the user can mend; anything else is a bug of this project."""


@dataclass(frozen=True)
class Info(Verb):
    """Show what this installation and this machine offer.

    Versions, processors and their instruction sets, compilers, nerfstudio methods and embedded scenes: what a bug
    report or a benchmark needs to say about its machine.
    """

    json: JsonFile = None
    """Write the same facts to this JSON file, too."""

    def run(self) -> None:
        """Print the facts as a table."""
        from shiftadd3d import _info
        from shiftadd3d._report import write_json

        facts = _info.collect()
        _info.show(facts)
        if self.json is not None:
            write_json(self.json, facts)


@dataclass(frozen=True)
class Render(Verb):
    """Render a trained run to a video or to frames.

    Open only a config.yml of your own: nerfstudio's configurations name Python objects, and reading one can run code.
    Ctrl-C keeps the frames rendered so far.
    """

    load_config: Annotated[Path, tyro.conf.arg(metavar="CONFIG.yml")]
    """The config.yml of a gnt or shiftadd-gnt run, in the folder that ns-train made for it."""
    out: Annotated[Path, tyro.conf.arg(metavar="PATH")]
    """Where to: a .mp4 or .gif file, or a folder (no suffix) for numbered PNG frames."""
    path: Literal["interpolate", "spiral", "test", "train"] = "interpolate"
    """From view to view, around the first view, or the test or training views themselves."""
    views: Literal["test", "train"] | None = None
    """Which views interpolate passes through, and spiral starts from. If not set, test, or train where there is only
    one test view."""
    camera_path: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """A camera path exported from nerfstudio's viewer, instead of --path."""
    frames: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """How many frames, 2 or more. If not set, 120, or all test or training views."""
    fps: Annotated[float | None, tyro.conf.arg(metavar="F")] = None
    """Frames per second. If not set, 24, or what the camera path says."""
    scale: float = 1.0
    """Pixels on a side, as a multiple of the photographs'."""
    outputs: tuple[str, ...] = ("rgb",)
    """What to show, side by side: rgb, depth, accumulation."""

    def run(self) -> None:
        """Load the run, render, write."""
        _need_nerfstudio()
        from shiftadd3d.nerf.render import render

        render(
            self.load_config,
            self.out,
            path=self.path,
            camera_path=self.camera_path,
            views=self.views,
            frames=self.frames,
            fps=self.fps,
            scale=self.scale,
            outputs=self.outputs,
        )


@dataclass(frozen=True)
class Demo(Verb):
    """Train on the embedded scene, evaluate, compare, and make a video.

    Trains shiftadd-gnt-tiny for some minutes on a laptop CPU, and leaves video.mp4, comparison.png and metrics.json in
    the folder demo of the output folder. Needs no download.
    """

    output_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("outputs")
    """Where to."""
    steps: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Training steps. If not set, the method's own number."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Another scene than the embedded one, in any format that ns-train reads."""
    frames: Annotated[int, tyro.conf.arg(metavar="N")] = 60
    """Frames of the video, 2 or more."""

    def run(self) -> None:
        """Do it all."""
        _need_nerfstudio()
        from shiftadd3d.configs.methods import shiftadd_gnt_tiny
        from shiftadd3d.nerf.demo import demo

        demo(shiftadd_gnt_tiny.config, self.output_dir, steps=self.steps, data=self.data, frames=self.frames)  # type: ignore[arg-type]


def _need_nerfstudio() -> None:
    # It meets newer libraries than it was written for, and each of them says so.
    warnings.filterwarnings("ignore", module=r"nerfstudio|torch\.jit|torch\.functional|viser|websockets")
    if importlib.util.find_spec("nerfstudio") is None:
        raise UserError("this needs nerfstudio, which is not installed; `make setup` installs it (see the README)")


VERBS: dict[str, type[Verb]] = {
    "demo": Demo,
    "render": Render,
    "info": Info,
}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        args: The arguments after the program's name; `sys.argv` by default.

    Raises:
        SystemExit: With 0 after printing help, with 2 for wrong arguments.
    """
    app = tyro.extras.SubcommandApp()
    for name, verb_class in VERBS.items():
        app.command(name=name)(verb_class)
    verb = cast(Verb, app.cli(prog="shiftadd3d", description=__doc__, args=args))
    try:
        verb.run()
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
