"""The three accounts, and what the command shows of them."""

# pyright: reportArgumentType=false

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from shiftadd3d import UserError, cli
from shiftadd3d.nn import OperationReport, PackedShiftLinear, Rule, calibrate_, count_operations, search_recipe
from shiftadd3d.nn.counting import Product
from shiftadd3d.profile.accelerator import DEFAULT_FILE, Accelerator, load_accelerator
from shiftadd3d.profile.authors import authors_energy
from shiftadd3d.profile.energy import ACCOUNTS, AccountCosts, energy, with_activation_bits, with_shift_data_bits
from shiftadd3d.profile.model_report import profile
from shiftadd3d.profile.subjects import Subject


@pytest.fixture(scope="module")
def chip() -> Accelerator:
    return load_accelerator()


@pytest.fixture(scope="module")
def operations() -> OperationReport:
    model = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), PackedShiftLinear(16, 8))
    return count_operations(model, torch.randn(10, 24))


def test_arithmetic_is_that_of_the_table(operations: OperationReport, chip: Accelerator) -> None:
    report = energy(operations, "arithmetic", chip)
    assert report.pj["arithmetic"] == pytest.approx(24 * 16 * 4.6 + 16 * 8 * 1.03)
    assert report.pj["elementwise"] == pytest.approx(16 * 0.9)  # the comparisons of the activation function
    assert report.total == pytest.approx(sum(report.pj.values())) and report.pj["dram"] == 0


def test_the_accelerator_pays_for_the_same_arithmetic_and_for_data(
    operations: OperationReport, chip: Accelerator
) -> None:
    arithmetic, whole = energy(operations, "arithmetic", chip), energy(operations, "accelerator", chip)
    assert whole.pj["arithmetic"] == pytest.approx(arithmetic.pj["arithmetic"])
    assert whole.pj["elementwise"] == arithmetic.pj["elementwise"]
    # Everything fits into the buffer: each byte comes from DRAM once, and the outcome goes there.
    dense = (24 * 16 + 10 * 24 + 10 * 16) * 32
    shifts = 16 * 8 * 4 + (10 * 16 + 10 * 8) * 32
    assert whole.pj["dram"] == pytest.approx((dense + shifts) * 12.5 / 10)


def matrix(primitive: str, outputs: int, inputs: int, rows: int) -> Product:
    return Product(primitive, 1, 1, outputs, inputs, (rows, 1))


def test_the_authors_move_data_of_shifts_at_ten_bits_and_that_of_additions_for_free() -> None:
    dense, shift, add = (authors_energy(matrix(kind, 16, 8, 16)) for kind in ("mult", "shift", "add"))
    for level in ("dram", "buffer", "noc", "register"):
        assert shift[level] == pytest.approx(dense[level] * 10 / 32)
    assert "dram" not in add and "buffer" not in add and add["register"] == pytest.approx(dense["register"])
    products = 16 * 8 * 16
    assert [each["arithmetic"] for each in (dense, shift, add)] == pytest.approx(
        [products * 3.7, products * 0.13, products * 0.9]
    )


def test_the_authors_accounting_of_a_small_layer_by_hand() -> None:
    # One output, one input, one row: a single tiling. Three words from DRAM at 2 x 200 pJ; input and sum in the buffer
    # at 2 x 22.2; input and weight on the network at 2 x 7.4, the sum at 2 x 3.7; in registers input and sum at
    # 2 x 3.7 and the weight at 4 x 3.7.
    found = authors_energy(matrix("mult", 1, 1, 1))
    assert found == pytest.approx(
        {"dram": 1200, "buffer": 88.8, "noc": 37, "register": 29.6, "arithmetic": 3.7}, rel=1e-9
    )


def test_narrower_data_is_narrower_everywhere() -> None:
    shift = replace(matrix("shift", 16, 8, 16), weight_bits=4)
    eight = with_activation_bits(8)(shift)
    assert (eight.weight_bits, eight.input_bits, eight.output_bits) == (4, 8, 8)
    scores = with_activation_bits(8)(replace(matrix("mult", 16, 8, 16), is_weight=False))
    assert (scores.weight_bits, scores.input_bits, scores.output_bits) == (8, 8, 8)
    ten = with_shift_data_bits(10)
    assert (ten(shift).weight_bits, ten(shift).input_bits, ten(shift).output_bits) == (10, 10, 10)
    assert ten(matrix("mult", 16, 8, 16)) == matrix("mult", 16, 8, 16)


def test_arrays_of_equal_area_have_more_elements_that_do_less(chip: Accelerator) -> None:
    arrays = chip.arrays
    assert arrays["mult"] == chip.pes < arrays["shift"] <= arrays["add"]
    registers = 8 * chip.register_file_bytes * chip.area.register_bit
    area = chip.area
    assert arrays["shift"] * (area.shift + area.add + registers) <= chip.pes * (area.mult + area.add + registers)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("dram = 12.5", "dram = -1", r"energy_per_bit.dram must be a number that is not negative, not -1"),
        ("dram = 12.5", "dram = nan", r"energy_per_bit.dram must be a number that is not negative, not nan"),
        ("dram = 12.5", 'dram = "much"', "energy_per_bit.dram must be a number"),
        ("dram = 12.5", "drum = 12.5", r"unknown key energy_per_bit.drum; expected one of register, noc, buffer, dram"),
        ("dram = 12.5", "", "energy_per_bit.dram is missing"),
        ("pes = 192", "pes = 0", "pes must be a whole number of at least 1, not 0"),
        ("pes = 192", "pes = 1.5", "pes must be a whole number of at least 1, not 1.5"),
        ("[area]", "[room]", "unknown key room"),
        ("[area]", "[area", "not TOML"),
        ("clock_mhz = 250", "clock_mhz = 250\narea = 3", "not TOML|area must be a table"),
    ],
)
def test_accelerators_that_cannot_be(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = tmp_path / "mine.toml"
    text = DEFAULT_FILE.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message):
        load_accelerator(file)


def small(name: str, make, setting: str = "ten rows") -> Subject:
    return Subject(name, make, lambda model: torch.randn(10, 24), 10, "row", setting)


def dense(recipe: str) -> nn.Module:
    return nn.Sequential(
        nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8) if recipe == "mult" else PackedShiftLinear(16, 8)
    )


def test_the_report_says_what_is_saved_and_its_json_says_the_same(chip: Accelerator) -> None:
    report = profile([small("mine", dense)], ("mult", "add+shift"), accelerator=chip)
    facts = json.loads(json.dumps(report.as_dict()))
    text = str(report)
    first, second = facts["profiles"]
    for account in ACCOUNTS:
        found, base = second["energy"][account], first["energy"][account]
        assert found["saved"] == pytest.approx(1 - found["total_pj"] / base["total_pj"]) and found["saved"] > 0
        assert found["total_pj"] == pytest.approx(sum(found["pj"].values()))
        by_layer = sum(sum(layer["pj"].values()) for layer in found["layers"]) / 10
        assert found["total_pj"] == pytest.approx(by_layer)
        assert f"{found['saved']:.1%}" in text
    assert second["operations"]["shift"] == 10 * 16 * 8 and "mine" in text and "add+shift" in text


def test_models_that_cannot_be_compared_or_fail(chip: Accelerator) -> None:
    with pytest.raises(UserError, match="one sees ten rows, but other five rows: profile models beside each other"):
        profile([small("one", dense), small("other", dense, "five rows")], ("mult",), accelerator=chip)
    with pytest.raises(UserError, match=r"narrow in recipe mult fails with ten rows: .*mat1 and mat2"):
        profile([small("narrow", lambda recipe: nn.Linear(5, 2))], ("mult",), accelerator=chip)
    with pytest.raises(UserError, match="nothing to profile"):
        profile([], ("mult",), accelerator=chip)


def test_the_command_writes_what_it_shows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "out" / "gnt.json"
    words = ["profile", "gnt-tiny", "--rays", "2", "--recipes", "mult", "add+shift", "--json", str(file)]
    assert cli.main(words) == 0
    facts = json.loads(file.read_text())
    assert [each["recipe"] for each in facts["profiles"]] == ["mult", "add+shift"]
    shown = capsys.readouterr().out
    assert f"{facts['profiles'][1]['energy']['accelerator']['saved']:.1%}" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such-model"], "timm knows no model 'no-such-model'"),
        (["gnt-tiny", "--recipes", "less"], "there is no recipe 'less'"),
        (
            ["gnt-tiny", "--accelerator", "missing.toml"],
            "--accelerator missing.toml: no such file or folder; expected",
        ),
        (["gnt-tiny", "--quality", "missing.json"], "cannot read the evaluation missing.json"),
        (["runs/config.yml"], "runs/config.yml: no such file or folder; expected a folder of a classifier"),
        (
            [__file__],
            f"{__file__}: not a file of a model; expected a folder of a classifier, or a folder or config.yml",
        ),
        (["gnt-tiny", "--rays", "0"], "--rays 0: expected 1 or more"),
        (["gnt-tiny", "--recipes"], "there is nothing to profile: name at least one model and one recipe"),
        (["gnt-tiny", "gnt-tiny"], "gnt-tiny in recipe mult is named twice"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["profile", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_models_of_timm_that_see_something_else_are_not_compared(capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("timm")
    assert cli.main(["profile", "vit_tiny_patch16_224", "vit_tiny_patch16_384"]) == 1
    seen = "vit_tiny_patch16_224 sees batch 1, 224 x 224 px, but vit_tiny_patch16_384 batch 1, 384 x 384 px"
    assert seen in capsys.readouterr().err
    assert cli.main(["profile", "vit_tiny_patch16_224", "--rays", "4"]) == 1
    assert "vit_tiny_patch16_224 takes a picture, not rays; leave out --rays" in capsys.readouterr().err


def test_recipes_are_looked_up_before_any_is_counted(chip: Accelerator) -> None:
    def make(recipe: str) -> nn.Module:
        raise AssertionError(f"{recipe} was made")

    with pytest.raises(UserError, match="there is no recipe 'less'; the recipes are mult, add"):
        profile([small("mine", make)], ("mult", "less"), accelerator=chip)


def test_an_accelerator_that_cannot_be_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(DEFAULT_FILE.read_text().replace("dram = 12.5", "dram = -1"))
    out = tmp_path / "out" / "a.json"
    assert cli.main(["profile", "gnt-tiny", "--accelerator", str(file), "--json", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "energy_per_bit.dram must be a number that is not negative, not -1" in error
    assert not out.parent.exists()


def test_a_saved_classifier_stands_beside_the_same_with_multiplications(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    from shiftadd3d.nn import Recipe
    from shiftadd3d.vision.checkpoint import ClassifierConfig, create_classifier, save_classifier
    from shiftadd3d.vision.data import InputConfig

    args = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    config = ClassifierConfig("vit_tiny_patch16_224", ("a", "b"), InputConfig(16), args, Recipe.parse("add+shift"))
    save_classifier(tmp_path / "mine", create_classifier(config).state_dict(), config)
    file = tmp_path / "out.json"
    assert cli.main(["profile", str(tmp_path / "mine"), "--json", str(file)]) == 0
    dense, own = json.loads(file.read_text())["profiles"]
    assert (dense["recipe"], own["recipe"]) == ("mult", "add+shift")
    assert dense["operations"]["shift"] == 0 < own["operations"]["shift"]
    assert cli.main(["profile", str(tmp_path)]) == 1  # a folder, but of no classifier


@pytest.mark.parametrize("account", ACCOUNTS)
def test_a_search_keeps_to_a_budget_by_any_account(account: str, chip: Accelerator) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 8))
    batches = [torch.randn(16, 24) for _ in range(2)]
    costs = AccountCosts(account, chip)
    before = energy(count_operations(model, batches[0]), account, chip).total
    assert count_operations(model, batches[0]).cost(costs) == pytest.approx(before)
    found = search_recipe(model, batches, 0.95, candidates=[Rule("*", "shift")], costs=costs, verbose=False)
    assert found.rules  # something had to change
    calibrate_(model, batches, found, verbose=False)
    after = energy(count_operations(model, batches[0]), account, chip).total
    assert 0.5 * before < after <= 0.95 * before


def test_costs_that_nobody_can_price_are_refused(chip: Accelerator) -> None:
    with pytest.raises(UserError, match="the account must be one of arithmetic, authors, accelerator, not 'all'"):
        AccountCosts("all", chip)
    with pytest.raises(UserError, match="must be one of 'latency', 'compiled latency', or have a unit and a price"):
        search_recipe(nn.Linear(4, 4), [torch.randn(2, 4)], 0.5, costs="energy", verbose=False)
