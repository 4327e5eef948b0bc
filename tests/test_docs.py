"""The code in the documentation runs, and prints what the documentation says it prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

BLOCK = re.compile(r"^```(python)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["docs/calibration.md", "docs/recipes.md"])
def test_the_code_of_a_page_runs_from_top_to_bottom(
    page: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (repository / page).read_text(encoding="utf-8")
    namespace: dict = {}
    ran = 0
    for block in BLOCK.finditer(text):
        language, code = block.groups()
        if language == "python":
            line = text.count("\n", 0, block.start()) + 1
            exec(compile("\n" * line + code, str(repository / page), "exec"), namespace)
            ran += 1
            printed = capsys.readouterr().out
        else:  # what the code before it prints
            assert code.rstrip() == printed.rstrip()
    assert ran == text.count("```python") > 0
