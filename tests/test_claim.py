"""Places that one process at a time writes to."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shiftadd3d import UserError, cli
from shiftadd3d._claim import claim, claimed, release, try_claim

HOLD = """
import sys
from pathlib import Path
from shiftadd3d._claim import try_claim
print(try_claim(Path(sys.argv[1]), file=sys.argv[2] == "file"), flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process(place: Path, kind: str = "folder") -> Iterator[subprocess.Popen[str]]:
    """One that has claimed the place, or could not."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(place), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        yield holder


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_place_that_another_process_writes_to_is_refused_until_that_ends(tmp_path: Path, kind: str):
    place = tmp_path / "out.mp4"
    with another_process(place, kind) as holder:
        assert said(holder) == "True"
        with pytest.raises(UserError, match=r"another process is writing to .*out\.mp4: .*choose another --out"):
            claim(place, "--out", file=kind == "file")
        holder.kill()  # without a chance to tidy up
    with claimed(place, "--out", file=kind == "file"):
        pass
    assert not [path.name for path in tmp_path.rglob("*") if "being-written" in path.name]


def test_only_one_of_many_gets_a_folder(tmp_path: Path):
    place = tmp_path / "deep/folder"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(place), "folder"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(6)
    ]
    try:
        assert sorted(said(process) for process in processes) == ["False"] * 5 + ["True"]
    finally:
        for process in processes:
            process.communicate()


def test_a_process_may_claim_a_place_again_and_keeps_it_until_the_last_release(tmp_path: Path):
    assert try_claim(tmp_path) and try_claim(tmp_path)
    release(tmp_path)
    with another_process(tmp_path) as other:
        assert said(other) == "False"
        assert other.stdin is not None
        other.stdin.close()
    release(tmp_path)
    with another_process(tmp_path) as other:
        assert said(other) == "True"


def test_two_files_of_a_folder_are_two_places(tmp_path: Path):
    with another_process(tmp_path / "a.mp4", "file") as other:
        assert said(other) == "True"
        with claimed(tmp_path / "b.mp4", "--out", file=True):
            pass


def test_a_process_that_ends_well_leaves_no_trace(tmp_path: Path):
    with another_process(tmp_path) as holder:
        assert said(holder) == "True"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "verb",
    [
        ["export", "OUT", "--out"],
        ["predict", "OUT", "nothing.png", "--out"],
        ["finetune", "--output-dir", "OUT", "--name"],
    ],
    ids=lambda verb: verb[0],
)
def test_a_command_that_comes_second_is_one_line(verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    place = tmp_path / "place"
    arguments = [str(tmp_path) if word == "OUT" else word for word in verb]
    with another_process(place) as other:
        assert said(other) == "True"
        assert cli.main([*arguments, "place" if verb[0] == "finetune" else str(place)]) == 1
        other.kill()
    error = capsys.readouterr().err
    assert error.startswith("error: another process is writing to ") and error.count("\n") == 1


def make_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file/out"


def make_read_only(folder: Path) -> Path:
    folder.chmod(0o500)
    return folder / "out"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(make_file, r"file is a file; expected a folder \(--out\)"), (make_read_only, "Permission denied; name a place")],
)
def test_a_place_that_cannot_be_made_is_refused_with_why(tmp_path: Path, spoil: Callable[[Path], Path], reason: str):
    if spoil is make_read_only and os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    with pytest.raises(UserError, match=reason):
        claim(spoil(tmp_path), "--out")
