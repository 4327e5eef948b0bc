"""The page "Reproduce the paper": its commands run in small, and its numbers are those of the measurements."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shiftadd3d import cli
from shiftadd3d.models.gnt import GNTModel
from shiftadd3d.models.gnt.presets import BIG
from shiftadd3d.nn import count_operations

CODE = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MOVED = ("input", "output", "elementwise")
# What makes a training of the page one of seconds. Options that come later count.
SMALL = (
    *("--no-pretrained", "--model-args", "patch_size=8", "embed_dim=16", "depth=1", "num_heads=2"),
    *("--image-size", "16", "--batch-size", "4", "--amp", "float32", "--ema", "None", "--workers", "0"),
)


@pytest.fixture(scope="module")
def page(repository: Path) -> str:
    return (repository / "docs/reproduce.md").read_text(encoding="utf-8")


def commands(page: str, verbs: set[str]) -> list[list[str]]:
    """The arguments of the page's commands of our own that have one of these verbs, in order."""
    found = []
    for line in "".join(CODE.findall(page)).replace("\\\n", "").splitlines():
        words = shlex.split(line, comments=True)
        ours = [index for index, word in enumerate(words) if word in ("shiftadd3d", "shiftadd3d.cli")]
        if ours and words[ours[0] + 1] in verbs:
            found.append(words[ours[0] + 1 :])
    return found


def write_pictures(folder: Path) -> None:
    """An ImageFolder of two classes, with training and validation pictures."""
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in ("n01440764", "n01443537"):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.JPEG")


@pytest.mark.slow
def test_the_commands_for_classification_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "imagenet")
    recipes = set()
    for words in commands(page, {"finetune", "evaluate", "export", "profile"}):
        if words[0] == "finetune":
            words = [re.sub("^100$", "1", word) for word in words] + list(SMALL)
            recipes.add(words[words.index("--recipe") + 1])
        assert cli.main(words) == 0, words
    assert recipes == {"mult", "add", "add+shift-attn", "add+shift", "add+shift-attn+moe", "moe"}
    for name in ("add+shift", "add+shift-int8", "add+shift-cost"):
        assert json.loads((tmp_path / f"{name}.json").read_text())


def test_what_it_costs_is_what_its_rule_makes_of_the_counts(page: str, repository: Path):
    row = r"^\| .* \| ([\d.]+) G products, (\d+) MB a (picture|ray|photo) \| .* \| (\d+) \|$"
    rows = re.findall(row, page, re.MULTILINE)
    counted: list[tuple[int, int]] = []
    for model in ("deit_tiny_patch16_224", "pvt_v2_b0", "gnt-big"):
        facts = json.loads((repository / f"docs/results/data/energy-{model}.json").read_text())
        dense = facts["rows"][0]
        assert dense["recipe"] == "mult"
        counted.append((dense["mult"], sum(dense["bytes"][f"{kind}_bytes"] for kind in MOVED)))
    with torch.no_grad():  # convolutions: as many products at every pixel
        feature_net = count_operations(GNTModel(BIG).feature_net.eval(), torch.zeros(1, 3, 96, 128))
    pixels = 1008 * 756 / (96 * 128)
    moved = sum(feature_net.moved_bytes[f"{kind}_bytes"] for kind in MOVED)
    counted.append((round(feature_net.mult * pixels), round(moved * pixels)))
    passes = {"picture": 1_281_167 * 100, "ray": 512 * 250_000, "photo": 10 * 250_000}
    for (mult, moved), (products, megabytes, unit, hours) in zip(counted, rows, strict=True):
        assert (products, megabytes) == (f"{mult / 1e9:.2f}", f"{moved / 1e6:.0f}"), unit
        seconds = 3 * max(2 * mult / 20e12, moved / 1e12)
        assert hours == f"{seconds * passes[unit] / 3600:.0f}", unit


def test_the_numbers_to_expect_are_those_that_were_measured(page: str, repository: Path):
    measured = (repository / "docs/results/classification.md").read_text(encoding="utf-8")
    tables = {}
    for name in ("cifar10, deit", "cifar10, pvt", "grocery_fruit, deit", "grocery_fruit, pvt"):
        table = measured.partition(f"| {name} | top-1")[2].partition("\n\n")[0]
        tables[name] = dict(re.findall(r"^\| `([^`]+)` \| [^|]+ \| ([+-][\d.]+) ±", table, re.MULTILINE))
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    for recipe, *differences in rows:
        assert differences == [table[recipe] for table in tables.values()], recipe
