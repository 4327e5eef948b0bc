"""Transformer NeRFs and vision transformers whose multiplications become shifts, adds and a mixture of experts.

Exit codes: 0 done, 1 failed, 2 wrong arguments.
"""

# A verb is a dataclass: its docstring and its fields' docstrings are the help, `run` does the work. Nothing heavy is
# imported up here (torch, nerfstudio and TVM load inside `run`), so that `--help` answers at once.

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import tyro

from shiftadd3d._errors import UserError

__all__ = ["VERBS", "Info", "Verb", "main"]

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


VERBS: dict[str, type[Verb]] = {
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
