"""What tuning found: kept by problem, the user's before the package's, and followed by kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from shiftadd3d import cli
from shiftadd3d.kernels import dense, matshift, power_of_two, records, targets, tune


@pytest.fixture(autouse=True)
def no_records(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package without records, and a user without any."""
    monkeypatch.setattr(records, "PACKAGED", tmp_path / "packaged")
    records.forget()
    yield tmp_path / "packaged"
    records.forget()


def record(choice: dict, **problem: object) -> dict:
    return {"kernel": "matshift", "problem": problem, "choice": choice}


def test_the_users_records_go_before_the_packages(no_records: Path):
    records.write(no_records, "avx2", [record({"rows": 6}, form="int16"), record({"rows": 12}, form="float32")])
    records.write(records.user_folder(), "avx2", [record({"rows": 24}, form="int16")])
    assert records.choice("avx2", "matshift", form="int16") == {"rows": 24}
    assert records.choice("avx2", "matshift", form="float32") == {"rows": 12}
    assert records.choice("amx", "matshift", form="float32") is None


def test_a_new_record_takes_the_place_of_the_old_one_and_leaves_the_others(no_records: Path):
    records.write(no_records, "avx2", [record({"rows": 6}, a=1, b=2), record({"rows": 12}, a=2, b=2)])
    path = records.write(no_records, "avx2", [record({"rows": 24}, b=2, a=1)])
    assert [one["choice"]["rows"] for one in json.loads(path.read_text())] == [24, 12]


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"kernel": "matshift"}', '[{"kernel": "matshift"}]'])
def test_a_damaged_file_holds_nothing(no_records: Path, text: str):
    no_records.mkdir()
    (no_records / "avx2.json").write_text(text)
    assert records.choice("avx2", "matshift", form="int16") is None


def test_what_is_tried_goes_before_all_records(no_records: Path):
    records.write(no_records, "avx2", [record({"rows": 6}, form="int16")])
    with records.trying("matshift", {"rows": 1}, form="int16"):
        assert records.choice("avx2", "matshift", form="int16") == {"rows": 1}
        with records.trying("matshift", None, form="int16"):
            assert records.choice("avx2", "matshift", form="int16") is None
    assert records.choice("avx2", "matshift", form="int16") == {"rows": 6}


def test_matshift_divides_its_rows_as_the_record_says_and_computes_the_same():
    codes, offset, _ = power_of_two.encode(torch.randn(24, 64))
    packed, x = power_of_two.pack(codes, 4), torch.randn(1000, 64)
    before = matshift(x, packed, offset)
    target = targets.current()
    form = "float32" if not target.has_amx else "bfloat16x3"
    records.write(records.user_folder(), target.name, [record({"bytes": 96 << 10, "rows": 96}, form=form)])
    assert torch.equal(matshift(x, packed, offset), before)


def test_what_comes_with_the_package_can_be_read(repository: Path):
    for file in (repository / "kernels" / "records").glob("*.json"):
        targets.find(file.stem)
        rows = json.loads(file.read_text())
        assert records.read(file.parent, file.stem) == rows
        assert all(row["kernel"] in tune.TUNABLE for row in rows)


def test_the_command_searches_and_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def blocks(trials: int):
        yield {"form": "int16"}, {"bytes": 1, "rows": trials}, 1.5
        yield {"form": "float32"}, {"bytes": 1, "rows": 1}, 1.01

    monkeypatch.setitem(tune.TUNABLE, "matshift", blocks)
    file = tmp_path / "found.json"
    assert cli.main(["kernels", "tune", "matshift", "--trials", "3", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "matshift, form int16: 1.50 times as fast" in out
    assert "matshift, form float32: nothing better found" in out
    assert [one["gain"] for one in json.loads(file.read_text())["found"]] == [1.5, 1.01]
    name = targets.current().name
    assert records.choice(name, "matshift", form="int16") == {"bytes": 1, "rows": 3}
    assert records.choice(name, "matshift", form="float32") is None


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["gather"], "kernel 'gather' cannot be tuned: expected some of matshift, dense"),
        (["--trials", "0"], "trials must be 1 or more, not 0"),
        (["--threads", "0"], "threads must be 1 or more, not 0"),
    ],
)
def test_what_cannot_be_tuned_is_refused(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture):
    assert cli.main(["kernels", "tune", *arguments]) == 1
    assert complaint in capsys.readouterr().err


def test_block_sizes_are_really_measured(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tvm")
    monkeypatch.setattr(tune, "SHAPES", ((64, 32, 32),))
    monkeypatch.setattr(tune, "_BLOCKS", tune._BLOCKS[:2])
    path, found = tune.tune(["matshift"], 1)
    assert {one["problem"]["form"] for one in found} >= {"float32"} or targets.current().has_amx
    assert all(0.2 < one["gain"] < 5 for one in found)
    assert path.is_file()


@pytest.mark.slow
def test_metaschedule_finds_a_schedule_that_computes_the_product(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tvm")
    monkeypatch.setattr(tune, "_LEAST_GAIN", 0.0)
    monkeypatch.setattr(tune, "SHAPES", ((32, 48, 64),))
    ((kernel, choice),) = [(one["kernel"], one["choice"]) for one in tune.tune(["dense"], 2)[1]]
    assert kernel == "dense"
    assert dense.specification(targets.current(), 32, 48, 64)["trace"] == json.dumps(choice["trace"])
    x, weight = torch.randn(32, 48), torch.randn(48, 64)
    torch.testing.assert_close(dense.dense(x, weight), x @ weight, rtol=1e-4, atol=1e-4)
