"""Metrics and throughput of a saved classifier, through the command line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from bounds import network_bound
from shiftadd3d import cli, kernels
from shiftadd3d.kernels.cpu.forms import forms
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.nn import freeze_, recipe, reparameterize_
from shiftadd3d.vision.checkpoint import ClassifierConfig, create_dense, save_classifier, write_json_atomically
from shiftadd3d.vision.data import PictureData, decode_picture, eval_transform, seed_everything
from shiftadd3d.vision.evaluate import measure_throughput
from shiftadd3d.vision.settings import FinetuneSettings


@pytest.fixture
def checkpoint(model: nn.Module, config: ClassifierConfig, tmp_path: Path) -> Path:
    """A dense classifier, saved where a run would save it."""
    folder = tmp_path / "run" / "stage0-dense" / "best"
    save_classifier(folder, model.state_dict(), config)
    return folder


def test_evaluation_prints_and_writes_what_the_model_does(
    checkpoint: Path,
    model: nn.Module,
    data: PictureData,
    config: ClassifierConfig,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    file = tmp_path / "metrics.json"
    assert cli.main(["evaluate", str(checkpoint), "--data", str(folder), "--json", str(file), "--batch-size", "5"]) == 0
    facts = json.loads(file.read_text())
    transform = eval_transform(config.input)
    with torch.no_grad():
        files = sorted((folder / "val").glob("*/*"))
        predicted = model.eval()(torch.stack([transform(decode_picture(f)) for f in files])).argmax(-1).tolist()
    right = [config.classes[p] == f.parent.name for p, f in zip(predicted, files, strict=True)]
    assert facts["count"] == 12 and facts["top1"] == pytest.approx(sum(right) / 12)
    assert sum(map(sum, facts["confusion"])) == 12
    assert facts["throughput"]["pictures_per_second"] > 0 and facts["throughput"]["batch_size"] == 5
    printed = capsys.readouterr().out
    assert f"top-1 {facts['top1']:.2%}" in printed and "pictures a second at 16 px in batches of 5" in printed
    for name in config.classes:
        assert name in printed


def test_without_data_the_pictures_are_those_of_the_run(
    checkpoint: Path, settings: FinetuneSettings, tmp_path: Path, folder: Path
):
    write_json_atomically(tmp_path / "run" / "settings.json", settings.as_dict())
    file = tmp_path / "metrics.json"
    for path in (checkpoint, checkpoint / "model.safetensors"):
        assert cli.main(["evaluate", str(path), "--json", str(file), "--split", "train"]) == 0
        assert json.loads(file.read_text())["count"] == 36


def test_options_change_how_the_pictures_of_the_run_are_split(
    checkpoint: Path, settings: FinetuneSettings, tmp_path: Path
):
    settings = replace(settings, split_seed=3, val_fraction=0.25)
    write_json_atomically(tmp_path / "run" / "settings.json", settings.as_dict())
    file = tmp_path / "metrics.json"
    for options, count in (([], 9), (["--val-fraction", "0.5", "--split-seed", "4", "--no-check"], 18)):
        assert cli.main(["evaluate", str(checkpoint), "--json", str(file), *options]) == 0
        assert json.loads(file.read_text())["count"] == count


def test_what_is_wrong_is_one_line_and_exit_with_1(
    checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "val" / "red").rename(tmp_path / "other" / "val" / "orange")
    for arguments, complaint in (
        ([str(tmp_path / "nowhere"), "--data", str(folder)], "nowhere: no such file or folder; expected"),
        ([str(checkpoint), "--data", str(folder), "--numerics", "int8"], "is not packed, so no kernel runs"),
        (
            [str(checkpoint)],
            "no pictures are named, and this classifier is not in the folder of a run; expected --data",
        ),
        ([str(checkpoint), "--data", "nowhere"], "--data nowhere: no such file or folder"),
        ([str(checkpoint), "--data", str(tmp_path / "other")], "does not know the classes orange"),
        ([str(checkpoint), "--data", str(folder), "--split", "test"], "no test pictures; there are train, val"),
        ([str(checkpoint), "--data", str(folder), "--batch-size", "0"], "--batch-size 0: expected 1 or more"),
        ([str(checkpoint), "--data", str(folder), "--workers", "-2"], "--workers -2: expected 0 or more"),
        ([str(checkpoint), "--data", str(folder), "--device", "tpu9"], "--device tpu9"),
    ):
        assert cli.main(["evaluate", *arguments]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and complaint in error


def test_throughput_counts_every_picture_of_a_batch(config: ClassifierConfig):
    class Sleeper(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            import time

            time.sleep(0.01)
            return x

    measured = measure_throughput(Sleeper(), config.input, batch_size=8, seconds=0.05)
    assert measured["batch_seconds"] >= 0.01
    assert measured["pictures_per_second"] == pytest.approx(8 / measured["batch_seconds"])


def test_packed_classifiers_compute_as_exactly_as_asked(
    config: ClassifierConfig, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("tvm")
    packed = replace(config, recipe=recipe("add+shift"), frozen=True)
    seed_everything(0)
    model = create_dense(config)
    bound = network_bound(model)
    reparameterize_(model, packed.recipe, verbose=False)
    freeze_(model, verbose=False)
    save_classifier(tmp_path / "packed", model.state_dict(), packed)
    losses = {}
    for name, more in (("twin", []), ("exact", []), ("int8", []), ("exact", ["--no-compile"])):
        file = tmp_path / f"{name}.json"
        arguments = ["--data", str(folder), "--numerics", name, "--json", str(file), *more]
        assert cli.main(["evaluate", str(tmp_path / "packed"), *arguments]) == 0
        facts = json.loads(file.read_text())
        compiled = name != "twin" and not more
        said = f"packed, {name} numerics{', compiled' if compiled else ''}, val"
        assert facts["numerics"] == name and facts["compiled"] is compiled and said in capsys.readouterr().out
        losses[" ".join([name, *more])] = facts["loss"]
    assert losses["exact"] == pytest.approx(losses["twin"], rel=bound)
    assert losses["exact --no-compile"] == pytest.approx(losses["twin"], rel=bound)
    assert losses["int8"] == pytest.approx(losses["twin"], rel=0.1)
    exact, rounded = (forms(targets.current(), numerics, 4, 1, "float32")[0] for numerics in ("exact", "int8"))
    assert (losses["int8"] != losses["exact"]) == (rounded != exact)  # not every CPU has integers for it
    assert kernels.get_numerics() == "exact"
