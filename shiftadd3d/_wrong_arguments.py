"""Wrong arguments of a command in one line: what is wrong, what would be right, and where the help is.

tyro draws a box, often of dozens of lines, around the help of every option that is missing or spelt alike. The line is
made of the words in that box. A box with other words is printed as it is.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

_SIMILAR = 4  # options that are suggested for an unknown one
_FRAME = "│╭╮╰╯─- "
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_KINDS = {
    "INT": "a whole number",
    "FLOAT": "a number",
    "{INT INT}": "two whole numbers",
    "{None}": "None",
}
_REASONS = {
    "invalid literal for int": "a whole number",
    "could not convert string to float": "a number",
}


@contextlib.contextmanager
def one_line_for_wrong_arguments(program: str, args: Sequence[str]) -> Iterator[None]:
    """Print what tyro says about wrong arguments as one line on stderr.

    Args:
        program: The program, and the command if it is a known one: `shiftadd3d render`.
        args: The arguments that tyro reads inside.

    Raises:
        SystemExit: As tyro raises it: with 2 for wrong arguments, and with 0 or None after printing help.
    """
    said = io.StringIO()
    columns = os.environ.get("COLUMNS")
    if not {"-h", "--help"} & set(args):
        os.environ["COLUMNS"] = "100000"  # a box that wide breaks no line
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as end:
        if end.code == 2 and (line := in_one_line(said.getvalue(), program)):
            said = io.StringIO(f"error: {line}\n")
        raise
    finally:
        if columns is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = columns
        sys.stderr.write(said.getvalue())


def in_one_line(box: str, program: str) -> str | None:
    """The words of tyro's box as one line; None if it is no box, or says what no box is known to say."""
    said = _Box(_sections(box), program)
    if said.sections:
        text = " ".join(said.sections[0])
        for pattern, line in _LINES.items():
            if found := re.match(pattern, text):
                return line(said, *found.groups())
    return None


class _Box(NamedTuple):
    """What a box says."""

    sections: list[list[str]]
    """Its lines without frame and title, cut at rules and empty lines. Indents are kept."""
    program: str

    @property
    def see(self) -> str:
        return f"see {self.program} --help"


def _sections(box: str) -> list[list[str]]:
    sections: list[list[str]] = [[]]
    for line in _COLOR.sub("", box).splitlines()[1:]:
        if line.strip(_FRAME):
            sections[-1].append(line[2:].rstrip(" │"))
        else:
            sections.append([])
    return [section for section in sections if section]


def _invalid_choice(box: _Box, value: str, argument: str, choices: str) -> str:
    return f"{_name(argument)} {value}: expected {_one_of(choices)}; {box.see}"


def _invalid_value(box: _Box, argument: str, reason: str) -> str:
    if words := re.match(r"no type matching (.+) could be instantiated from \[(.*)\]\.", reason):
        kinds = sorted(words[1].split("|"), key=lambda kind: kind == "{None}")
        expected = " or ".join(_KINDS.get(kind, kind) for kind in kinds)
        given = " ".join([_name(argument), *re.findall(r"'([^']*)'", words[2])])
        return f"{given}: expected {expected}; {box.see}"
    for start, kind in _REASONS.items():
        if reason.startswith(start):
            value = reason.partition(": ")[2].strip("'")
            return f"{_name(argument)} {value}: expected {kind}; {box.see}"
    return f"{_name(argument)}: {reason}; {box.see}"


def _no_value(box: _Box, argument: str, count: str) -> str:
    return f"{_name(argument)}: expected {'a value' if count == '1' else f'{count} values'}; {box.see}"


def _no_command(box: _Box, choices: str) -> str:
    return f"no command: expected {_one_of(choices)}; {box.see}"


def _missing(box: _Box) -> str:
    names = [line.strip() for line in box.sections[0] if re.match(r" {4}\S", line)]
    unknown = next((section[1:] for section in box.sections if section[0].startswith("Unrecognized")), [])
    return f"missing {', '.join(names)}" + (f"; {_not_known(unknown)}" if unknown else "") + f"; {box.see}"


def _unknown(box: _Box) -> str:
    first, *rest = box.sections[0]
    tokens = [line.partition(" (applied to ")[0] for line in rest] or first.partition(": ")[2].split(", ")
    line = _not_known(tokens)
    for first, *rest in box.sections[1:]:
        if first.startswith("Available subcommands: "):
            return f"{line}: expected {_one_of(first.partition(': ')[2])}"
        if first.startswith("Perhaps you meant") and (similar := _similar(rest, box.program)):
            return f"{line}: perhaps {', '.join(similar)}; {box.see}"
    return f"{line}; {box.see}"


def _similar(lines: Sequence[str], program: str) -> list[str]:
    """The options of `program` among all those that tyro finds in any command."""
    found: list[str] = []
    option = ""
    for line in lines:
        if re.match(r" {4}\S", line):
            option = line.split()[0].rstrip(",")
        elif line.strip() == f"in {program} --help" and option not in found:
            found.append(option)
    return found[:_SIMILAR]


def _not_known(tokens: Sequence[str]) -> str:
    """The options among the tokens, or else all of them: what follows an unknown option is perhaps its value."""
    tokens = [token.strip() for token in tokens]
    options = [token for token in tokens if token.startswith("-")]
    return f"unknown option {', '.join(options)}" if options else f"unexpected {' '.join(tokens)}"


def _name(argument: str) -> str:
    """What the help calls an argument: `--fps`, or `OUT` for the positional one that tyro calls `action.out`."""
    return argument if argument.startswith("-") else argument.rpartition(".")[2].upper()


def _one_of(choices: str) -> str:
    names = re.findall(r"[^'\",\s]+", choices)
    if "None" in names:  # then tyro keeps them in no order
        names = [*sorted(set(names) - {"None"}), "None"]
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"


_LINES: dict[str, Callable[..., str]] = {
    r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)\.": _invalid_choice,
    r"Error parsing (\S+): (.*)": _invalid_value,
    r"Missing value for argument '(.*)'\. Expected (\d+) values?\.": _no_value,
    r"Expected one of \{(.*)\}\.": _no_command,
    r"Missing from ": _missing,
    r"Unrecognized (?:or misplaced )?options:": _unknown,
}
"""From the first words of a box to what makes a line of it and of the words in parentheses."""
