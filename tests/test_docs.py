"""The code in the documentation runs, and prints what the documentation says it prints."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

from shiftadd3d import cli
from shiftadd3d.kernels.runtime import kernel

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page",
    [
        "calibration",
        "classification",
        "compile",
        "index",
        "kernels",
        "movie",
        "own-model",
        "photos",
        "profile",
        "recipes",
    ],
)
def test_the_code_of_a_page_runs_from_top_to_bottom(
    page: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    page = f"docs/{page}.md"
    text = (repository / page).read_text(encoding="utf-8")
    module = ModuleType("page")  # whose functions can be read again, as compilers do
    module.__file__ = str(repository / page)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(kernel, "KERNELS", dict(kernel.KERNELS))
    namespace = vars(module)
    ran, printed = 0, ""
    for block in BLOCK.finditer(text):
        language, code = block.groups()
        if language == "python":
            line = text.count("\n", 0, block.start()) + 1
            exec(compile("\n" * line + code, str(repository / page), "exec"), namespace)
            ran += 1
            printed = capsys.readouterr().out
        elif not language:  # what the code before it prints
            assert code.rstrip() == printed.rstrip()
    assert ran == text.count("```python") > 0


def test_the_code_of_the_readme_runs(repository: Path, capsys: pytest.CaptureFixture) -> None:
    blocks = [code for language, code in BLOCK.findall((repository / "README.md").read_text("utf-8")) if language]
    for code in blocks:
        exec(code, {})
    assert "MoEMlp" in capsys.readouterr().out


def test_the_commands_of_the_pages_are_such_that_the_command_line_takes(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    for verb in cli.VERBS.values():
        monkeypatch.setattr(verb, "run", lambda self: ran.append(self))
    commands = 0
    for page in sorted((repository / "docs").glob("*.md")):
        blocks = [code for language, code in BLOCK.findall(page.read_text(encoding="utf-8")) if language == "sh"]
        for line in "".join(blocks).replace("\\\n", "").splitlines():
            words = shlex.split(line, comments=True)
            if "shiftadd3d" in words or "shiftadd3d.cli" in words:
                start = words.index("shiftadd3d" if "shiftadd3d" in words else "shiftadd3d.cli")
                if "--help" not in words:
                    assert cli.main(words[start + 1 :]) == 0, line
                    commands += 1
    assert len(ran) == commands > 0
