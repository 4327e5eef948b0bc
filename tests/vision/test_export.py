"""Exported files compute what the classifier computes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import shiftadd3d
from shiftadd3d import UserError, cli
from shiftadd3d.nn import PackedShiftLinear, recipe
from shiftadd3d.vision import export
from shiftadd3d.vision.checkpoint import (
    ClassifierConfig,
    create_classifier,
    save_classifier,
    write_json_atomically,
)
from shiftadd3d.vision.export import dense_equivalent, export_classifier
from shiftadd3d.vision.settings import FinetuneSettings

PVT = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 2, 4)}


def classifier(config: ClassifierConfig, architecture: str, name: str) -> nn.Module:
    torch.manual_seed(1)
    config = replace(config, recipe=recipe(name))
    if architecture == "pvt_v2_b0":
        config = replace(config, architecture=architecture, model_args=PVT, input=replace(config.input, size=32))
    return create_classifier(config).eval()


def save(model: nn.Module, folder: Path) -> Path:
    save_classifier(folder, model.state_dict(), model.classifier_config)
    return folder


@pytest.mark.parametrize("architecture", ["deit_tiny_patch16_224", "pvt_v2_b0"])
@pytest.mark.parametrize("name", ["add", "add+shift", "moe"])
def test_the_dense_equivalent_computes_the_same_with_ordinary_layers(
    architecture: str, name: str, config: ClassifierConfig
):
    model = classifier(config, architecture, name)
    dense = dense_equivalent(model)
    size = model.classifier_config.input.size
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        assert torch.allclose(dense(images), model(images), rtol=1e-4, atol=1e-5)
    kinds = {type(module).__name__ for module in dense.modules()}
    assert not [kind for kind in kinds if "Shift" in kind or kind.startswith("MoE")]


def test_a_mixture_that_scales_by_its_probability_is_exported_so(config: ClassifierConfig):
    model = create_classifier(replace(config, recipe=recipe("moe", gate="probability"))).eval()
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(dense_equivalent(model)(images), model(images), rtol=1e-4, atol=1e-5)


def test_a_program_gives_the_classifiers_outputs_for_any_batch(config: ClassifierConfig, tmp_path: Path):
    shallow = replace(config, model_args={**config.model_args, "depth": 1})
    model = classifier(shallow, "deit_tiny_patch16_224", "add+shift-attn+moe")
    export_classifier(save(model, tmp_path / "best"), tmp_path / "out", formats=["program"])
    program = torch.export.load(str(tmp_path / "out" / "model.pt2")).module()
    for batch in (1, 4):
        images = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            assert torch.allclose(program(images), model(images), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["deit_tiny_patch16_224", "pvt_v2_b0"])
def test_all_three_files_give_the_classifiers_outputs_for_any_batch(
    architecture: str, config: ClassifierConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = classifier(config, architecture, "add+shift-attn+moe")
    out, file = tmp_path / "export", tmp_path / "facts.json"
    assert cli.main(["export", str(save(model, tmp_path / "best")), "--out", str(out), "--json", str(file)]) == 0
    size = model.classifier_config.input.size
    for batch in (1, 5):
        images = torch.randn(batch, 3, size, size)
        with torch.no_grad():
            logits = model(images)
        packed = shiftadd3d.load(out / "packed")
        assert torch.equal(packed(images), logits)
        program = torch.export.load(str(out / "model.pt2")).module()
        assert torch.allclose(program(images), logits, rtol=1e-3, atol=1e-4)
        session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
        found = session.run(None, {"images": images.numpy()})[0]
        assert torch.allclose(torch.as_tensor(found), logits, rtol=1e-3, atol=1e-4)
    assert any(isinstance(module, PackedShiftLinear) for module in packed.modules())
    about = json.loads(session.get_modelmeta().custom_metadata_map["classifier"])
    assert about["classes"] == list(config.classes) and about["input"]["size"] == size
    facts = json.loads(file.read_text())
    assert [Path(entry["file"]).name for entry in facts["files"]] == [
        "model.pt2",
        "model.onnx",
        "model.safetensors",
        "config.json",
    ]
    assert "packed" in capsys.readouterr().out


def test_packed_weights_take_four_bits(config: ClassifierConfig, tmp_path: Path):
    wide = replace(config, model_args={"patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3})
    model = classifier(wide, "deit_tiny_patch16_224", "add+shift")
    export_classifier(save(model, tmp_path / "best"), tmp_path / "out", formats=["packed"])
    before = (tmp_path / "best" / "model.safetensors").stat().st_size
    after = (tmp_path / "out" / "packed" / "model.safetensors").stat().st_size
    assert after < before / 4  # the patch embedding, norms and the head stay in float32


def test_a_dense_classifier_is_converted_without_training(
    model: nn.Module, config: ClassifierConfig, settings: FinetuneSettings, tmp_path: Path
):
    save_classifier(tmp_path / "run" / "stage0-dense" / "best", model.state_dict(), config)
    write_json_atomically(tmp_path / "run" / "settings.json", settings.as_dict())
    arguments = [str(tmp_path / "run" / "stage0-dense" / "best"), "--out", str(tmp_path / "out")]
    assert cli.main(["export", *arguments, "--formats", "packed", "--recipe", "add+shift"]) == 0
    packed = shiftadd3d.load(tmp_path / "out" / "packed")
    assert packed.classifier_config.recipe.name == "add+shift" and packed.classifier_config.frozen
    with pytest.raises(UserError, match="of recipe add already"):
        export_classifier(save(classifier(config, "", "add"), tmp_path / "add"), tmp_path / "o", recipe_name="moe")


def test_what_cannot_be_exported(config: ClassifierConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    best = save(classifier(config, "", "add+shift"), tmp_path / "best")
    export_classifier(best, tmp_path / "out", formats=["packed"])
    with pytest.raises(UserError, match="exported already; expected a classifier that finetune saved"):
        export_classifier(tmp_path / "out" / "packed", tmp_path / "again", formats=["packed"])
    with pytest.raises(UserError, match="--formats: expected some of packed, onnx, program"):
        export_classifier(best, tmp_path / "none", formats=[])
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patched:
        patched.setattr(torch.export, "export", None)  # never reached
        for out in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(UserError, match=r"cannot write into .*file is a file; expected a folder"):
                export_classifier(best, out, formats=["program"])
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--formats onnx needs onnx"):
        export_classifier(best, tmp_path / "out")
