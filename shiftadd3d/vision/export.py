"""A trained classifier in forms that other tools run.

- packed: `model.safetensors` with the packed codes and `config.json`, which `shiftadd3d.load` restores;
- onnx: `model.onnx`, the dense equivalent, for any runtime;
- program: `model.pt2`, the dense equivalent, which `torch.export.load` reads without this package;
- so: a folder with machine code for CPUs like this one and the packed weights, which runs without torch.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.console import Console
from torch import Tensor, nn

from shiftadd3d._errors import UserError
from shiftadd3d._extras import need
from shiftadd3d.kernels import Numerics
from shiftadd3d.kernels import numerics as in_numerics
from shiftadd3d.nn import FrozenMoE, MoE, Recipe, ShiftConv2d, ShiftLinear, calibrate_, freeze_
from shiftadd3d.vision.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    ClassifierConfig,
    describe_in,
    load,
    make_folder,
    save_classifier,
    write_atomically,
    write_json_atomically,
)
from shiftadd3d.vision.data import example_inputs, open_split
from shiftadd3d.vision.deploy import deploy
from shiftadd3d.vision.settings import DataSettings

Format = Literal["packed", "onnx", "program", "so"]
# Differences in the logits beyond this say that an exported file computes something else.
_TOLERANCE = 1e-3


class _AllExperts(nn.Module):
    """A mixture for tools that cannot run an expert on some of the tokens: each runs on all, and the router picks."""

    def __init__(self, mixture: MoE | FrozenMoE) -> None:
        super().__init__()
        self.experts, self.router = mixture.experts, mixture.router
        self.temperature, self.scales = mixture.temperature, mixture.gate == "probability"

    def forward(self, x: Tensor) -> Tensor:  # [*, dim] -> [*, dim']
        logits = self.router(x) / self.temperature
        choice = logits.argmax(-1, keepdim=True)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-2)  # [*, E, dim']
        index = choice.unsqueeze(-1).expand(*choice.shape, outputs.shape[-1])
        out = outputs.gather(-2, index).squeeze(-2)
        return out * logits.softmax(-1).gather(-1, choice) if self.scales else out


def dense_equivalent(model: nn.Module) -> nn.Module:
    """A copy of a model with the same outputs in evaluation, made of ordinary layers only.

    Shift layers become linear layers and convolutions with the quantised weights. Mixtures run every expert on every
    token and select. Parts that need no special layer stay, such as binary codes, which are comparisons.

    Args:
        model: reparameterized, not frozen.
    """
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ShiftLinear):
                setattr(parent, name, child.to_linear())
            elif isinstance(child, ShiftConv2d):
                setattr(parent, name, child.to_conv())
            elif isinstance(child, MoE):
                setattr(parent, name, _AllExperts(child))
    freeze_(twin, verbose=False)  # codes without gradients
    return twin.requires_grad_(False)


def export_classifier(
    checkpoint: Path,
    out: Path,
    *,
    formats: Sequence[Format] = ("packed", "onnx", "program"),
    recipe_name: str | None = None,
    data: DataSettings | None = None,
    numerics: Numerics | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write a classifier in other forms. The arguments are those of `shiftadd3d export`.

    Args:
        checkpoint: a classifier that `finetune` saved.
        out: a folder.
        formats: the forms to write.
        recipe_name: first convert a dense classifier to this recipe, without training, by calibration on pictures.
        data: these pictures.
        numerics: precision of the executable (format so); None for that of the process.
        console: shows progress; None is silent.

    Returns:
        The files with their bytes, and how far the logits of each one differ from those of the classifier.

    Raises:
        UserError: anything in the arguments that the user can mend.
    """
    if not formats:
        raise UserError("--formats: expected some of packed, onnx, program, so")
    if numerics is not None and "so" not in formats:
        raise UserError(f"--numerics {numerics}: only the format so has them; expected --formats so")
    if "onnx" in formats:
        need("--formats onnx", "onnx", "onnxscript", extra="vision")
    model = load(checkpoint)
    config = model.classifier_config
    assert isinstance(config, ClassifierConfig)
    if config.frozen and set(formats) != {"so"}:
        raise UserError(f"{checkpoint}: exported already; expected a classifier that finetune saved, or --formats so")
    make_folder(out)  # before the minutes that all else may take
    if recipe_name is not None:
        config = _calibrate(model, config, recipe_name, data or DataSettings(), console)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, config.input.size, config.input.size, generator=generator)
    with torch.no_grad():
        logits = model(images)
    facts: dict[str, Any] = {"checkpoint": str(checkpoint), "recipe": config.recipe and config.recipe.name, "files": []}

    def note(file: Path, difference: float, what: str) -> None:
        if not difference <= _TOLERANCE * (1 + float(logits.abs().max())):
            raise RuntimeError(f"{file} computes something else: its logits differ by {difference}")
        facts["files"].append({"file": str(file), "bytes": file.stat().st_size, "largest_difference": difference})
        if console is not None:
            size = f"{file.stat().st_size / 1e6:.2f} MB"
            console.print(f"{what:<8} {size:>10}  {file}", highlight=False, soft_wrap=True)

    if {"onnx", "program"} & set(formats):
        dense = dense_equivalent(model)
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(dense, (images,), dynamic_shapes=({0: batch},))
        if "program" in formats:
            file = out / "model.pt2"
            about = {"classifier.json": json.dumps(config.as_dict())}
            # torch tells the format by the suffix.
            write_atomically(file, lambda unfinished: _save_program(program, unfinished, about))
            restored = torch.export.load(str(file)).module()
            note(file, _difference(restored(images), logits), "program")
        if "onnx" in formats:
            file = out / "model.onnx"
            write_atomically(file, lambda unfinished: _save_onnx(program, images, config, unfinished))
            note(file, _onnx_difference(file, images, logits), "onnx")
    if "packed" in formats:
        freeze_(model, verbose=False)
        frozen = replace(config, frozen=True)
        describe_in(model, frozen)
        save_classifier(out / "packed", model.state_dict(), frozen)
        with torch.no_grad():
            difference = _difference(load(out / "packed")(images), logits)
        note(out / "packed" / WEIGHTS_FILE, difference, "packed")
        facts["files"].append({"file": str(out / "packed" / CONFIG_FILE)})
    if "so" in formats:
        facts["files"].append(_write_executable(model, out / "so", numerics, images, console))
    write_json_atomically(out / "export.json", facts)
    return facts


def _write_executable(
    model: nn.Module, folder: Path, numerics: Numerics | None, images: Tensor, console: Console | None
) -> dict[str, Any]:
    """The executable of a classifier, which may be packed already: its folder, and how far it is from that."""
    freeze_(model, verbose=False)
    describe_in(model, replace(cast(ClassifierConfig, model.classifier_config), frozen=True))
    deployed = deploy(model, folder, numerics)
    with torch.no_grad(), in_numerics(deployed.numerics):
        difference = _difference(deployed(images), model(images))
    size = sum(file.stat().st_size for file in folder.iterdir())
    if console is not None:
        console.print(f"{'so':<8} {size / 1e6:>7.2f} MB  {folder}", highlight=False, soft_wrap=True)
        console.print("It holds native code, for CPUs with the instructions of this one. predict runs it.")
    return {"file": str(folder), "bytes": size, "numerics": deployed.numerics, "largest_difference": difference}


def _calibrate(
    model: nn.Module, config: ClassifierConfig, recipe_name: str, data: DataSettings, console: Console | None
) -> ClassifierConfig:
    if config.recipe is not None:
        raise UserError(f"--recipe {recipe_name}: the classifier is of recipe {config.recipe.name} already")
    chosen = Recipe.parse(recipe_name)
    pictures, _ = open_split(data, "train", config.classes)
    report = calibrate_(model, example_inputs(pictures, config.input), chosen, verbose=False)
    if console is not None:
        console.print(report)
    return replace(config, recipe=chosen)


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _save_program(program: torch.export.ExportedProgram, file: Path, about: dict[str, str]) -> None:
    with file.open("wb") as stream:
        torch.export.save(program, stream, extra_files=dict(about))


def _save_onnx(program: torch.export.ExportedProgram, images: Tensor, config: ClassifierConfig, file: Path) -> None:
    onnx_program = torch.onnx.export(
        program,
        (images,),
        input_names=["images"],
        output_names=["logits"],
        dynamo=True,
        verbose=False,
    )
    assert onnx_program is not None
    onnx_program.model.metadata_props["classifier"] = json.dumps(config.as_dict())
    onnx_program.save(file)


def _onnx_difference(file: Path, images: Tensor, logits: Tensor) -> float:
    """How far the file's logits are from ours: by ONNX Runtime where it is installed, else by ONNX's own evaluator."""
    feed = {"images": images.numpy()}
    if importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        found = session.run(None, feed)[0]
    else:
        from onnx.reference import ReferenceEvaluator

        found = ReferenceEvaluator(str(file)).run(None, feed)[0]  # type: ignore[index]
    return _difference(torch.as_tensor(found), logits)
