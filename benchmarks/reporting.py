"""What the benchmarks of this folder share: where results go, what each says about itself, how reports show them."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from shiftadd3d.profile.machine import machine_facts as machine_facts

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "docs" / "results"
DATA = RESULTS / "data"
PICTURES = RESULTS / "pictures"
OUTPUTS = REPOSITORY / "outputs" / "benchmarks"


# To glibc: neither return memory to the system nor map large tensors one by one.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2 << 30), "MALLOC_MMAP_THRESHOLD_": str(2 << 30)}


def start_again_keeping_memory() -> None:
    """Have the C library (glibc) keep memory for large tensors, as other allocators do.

    Else it returns it to the system each time, which clears it before it hands it out again. It makes up its mind when
    a process starts, so this one starts again, unless it has been.
    """
    if not KEEP_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})


def run_command(commands: dict[str, Callable[..., Any]], description: str | None) -> None:
    """Call what the command line names; what the user can mend is one line, `error: ...`."""
    import tyro

    from shiftadd3d._errors import UserError

    command = tyro.extras.subcommand_cli_from_dict(commands, description=description)
    try:
        command()
    except UserError as error:
        sys.exit(f"error: {error}")


def git_commit() -> str:
    """The commit of the source tree, with `+` behind it if files have been changed since."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", "shiftadd3d", "kernels", "configs", "benchmarks"
    )
    return commit + ("+" if changed else "")


def write_result(path: Path, facts: dict[str, Any]) -> None:
    """Write one measurement, and say where."""
    from shiftadd3d._report import write_json

    write_json(path, facts)
    print(f"wrote {path}")


MEASURED = ("kernels", "shiftadd3d/nn", "shiftadd3d/models")
"""Folders of the code whose speed and memory are measured."""


def code_digest() -> str:
    """Of the code of `MEASURED`: what was measured is the code of today if it has the same.

    Comments, docstrings and blank lines do not count. Whoever mends a sentence has nothing to measure again.
    """
    digest = hashlib.sha256()
    for path in sorted(path for folder in MEASURED for path in (REPOSITORY / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(REPOSITORY).as_posix()}\n".encode())
        digest.update(without_prose(path.read_text(encoding="utf-8")).encode())
    return digest.hexdigest()[:16]


def without_prose(source: str) -> str:
    """Python source without its comments, docstrings and blank lines."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines[node.lineno - 1 : node.end_lineno] = [""] * len(lines[node.lineno - 1 : node.end_lineno])
    return "\n".join(line.rstrip() for line in lines if line.strip())


def refuse_old(paths: Iterable[Path]) -> None:
    """Let no page describe code that was not measured.

    Args:
        paths: files of results, with a `code_digest` as `code`. Those that are not there need not be of today.

    Raises:
        UserError: if code has changed since one of them was written.
    """
    from shiftadd3d._errors import UserError

    today, old = code_digest(), []
    for path in paths:
        if path.is_file():
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts.get("code") != today:
                old.append(f"{path.name} (commit {facts['commit']}): {facts['command']}")
    if old:
        raise UserError(
            "measured before the code changed: expected new measurements, or --old to show what there is:\n"
            + "\n".join(f"  {line}" for line in old)
        )


def write_page(name: str, fill_in: Callable[[str], str]) -> None:
    """Make the page docs/results/NAME.md: what `fill_in` makes of its template."""
    page = RESULTS / f"{name}.md"
    template = (RESULTS / f"{name}.template.md").read_text(encoding="utf-8")
    page.write_text(fill_in(template), encoding="utf-8")
    print(f"wrote {page}")


NOT_MEASURED = "*Not measured yet.*"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    if not rows:
        return NOT_MEASURED
    alignment = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, alignment, *rows])


def command_block(benchmark: str, results: list[dict[str, Any]]) -> str:
    """The commands that made the results, and the one that made the report of `benchmarks/BENCHMARK.py` from them."""
    commands = dict.fromkeys(facts["command"] for facts in results)
    return "\n".join(["```", *commands, f"python benchmarks/{benchmark}.py report", "```"])


def machine_list(results: list[dict[str, Any]]) -> str:
    """Machines and versions that the results come from, one a line."""
    lines = {}
    for facts in results:
        m = facts["machine"]
        device = "no GPU used" if m["device"] == "cpu" else m["device"]
        line = f"{m['cpu']}, {m['cores']} cores, {device}; Python {m['python']}, torch {m['torch']}"
        lines.setdefault(line, set()).add(facts["commit"])
    texts = [f"- {line}; commit {', '.join(sorted(commits))}" for line, commits in lines.items()]
    return "\n".join(texts) or NOT_MEASURED
