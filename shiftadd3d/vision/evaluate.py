"""How good a saved classifier is, and how fast."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from shiftadd3d._errors import UserError
from shiftadd3d._progress import progress
from shiftadd3d.kernels import Numerics, get_numerics
from shiftadd3d.kernels import numerics as in_numerics
from shiftadd3d.nn import CompiledModel
from shiftadd3d.vision.checkpoint import ClassifierConfig
from shiftadd3d.vision.compiled import compiled_where_it_can_be
from shiftadd3d.vision.data import InputConfig, open_split
from shiftadd3d.vision.deploy import DeployedClassifier, device_for, open_classifier
from shiftadd3d.vision.engine import evaluate, explain_memory_errors
from shiftadd3d.vision.settings import DataSettings, check_workers

_LISTED = 5


def measure_throughput(
    model: nn.Module, input_config: InputConfig, batch_size: int, seconds: float = 2.0
) -> dict[str, float]:
    """How many pictures a model classifies in a second. The time for making inputs of pictures is not included.

    Args:
        model: in evaluation mode.
        input_config: gives the size of inputs.
        batch_size: pictures in a batch.
        seconds: about how long to measure.

    Returns:
        `batch_size`, `pictures_per_second` and `batch_seconds`, the median over the batches.
    """
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    images = torch.randn(batch_size, 3, input_config.size, input_config.size, device=device)

    def once() -> float:
        start = time.perf_counter()
        model(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    with torch.inference_mode():
        once()  # compiles, allocates
        times = [once()]
        while sum(times) < seconds:
            times.append(once())
    median = statistics.median(times)
    return {"batch_size": batch_size, "pictures_per_second": batch_size / median, "batch_seconds": median}


def evaluate_classifier(
    checkpoint: Path,
    data: DataSettings,
    *,
    split: str = "val",
    batch_size: int = 64,
    workers: int | None = None,
    device: str | None = None,
    numerics: Numerics | None = None,
    compile: bool = True,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure a saved classifier on a split of some pictures; the arguments are those of `shiftadd3d evaluate`.

    Returns:
        The facts that are printed, in plain types: the metrics, `throughput`, and `skipped` pictures.

    Raises:
        UserError: anything in the arguments that the user can mend.
    """
    check_workers(workers)
    chosen = device_for(checkpoint, device)
    model = open_classifier(checkpoint, chosen)
    config = model.classifier_config
    assert isinstance(config, ClassifierConfig)
    if isinstance(model, DeployedClassifier):
        if numerics not in (None, model.numerics):
            raise UserError(
                f"--numerics {numerics}: {checkpoint} is an executable for {model.numerics}; "
                "expected that, or no --numerics"
            )
        numerics = model.numerics
    if numerics is not None and not config.frozen:
        raise UserError(
            f"--numerics {numerics}: {checkpoint} is not packed, so no kernel runs; expected what `shiftadd3d export` "
            "wrote"
        )
    pictures, skipped = open_split(data, split, config.classes)
    if console is not None:
        for entry in skipped[:_LISTED]:
            console.print(f"skipped {entry}", highlight=False, markup=False, soft_wrap=True)
        if len(skipped) > _LISTED:
            console.print(f"skipped {len(skipped) - _LISTED} more", highlight=False)
    as_exactly = get_numerics() if numerics is None else numerics
    if compile:
        with in_numerics(as_exactly):
            model = compiled_where_it_can_be(model, console)
    bar = progress("evaluating", len(pictures), unit="pictures", console=console, disable=console is None)
    with bar as steps, explain_memory_errors(chosen, batch_size, config.input.size), in_numerics(as_exactly):
        metrics = evaluate(
            model,
            pictures,
            config.input,
            batch_size=batch_size,
            workers=workers,
            on_batch=steps.advance,
        )
        throughput = measure_throughput(model, config.input, batch_size)
    facts = {
        "checkpoint": str(checkpoint),
        "architecture": config.architecture,
        "recipe": None if config.recipe is None else config.recipe.name,
        "frozen": config.frozen,
        "numerics": as_exactly if config.frozen else None,
        "compiled": isinstance(model, (CompiledModel, DeployedClassifier)),
        "split": split,
        **metrics.as_dict(),
        "throughput": {"device": str(chosen), "threads": torch.get_num_threads(), **throughput},
        "skipped": [{"name": entry.name, "reason": entry.reason} for entry in skipped],
    }
    if console is not None:
        frozen = f", packed, {as_exactly} numerics" if config.frozen else ""
        frozen += ", compiled" if facts["compiled"] else ""
        console.print(f"{config.architecture}, recipe {facts['recipe'] or 'mult'}{frozen}, {split}", highlight=False)
        console.print(metrics, highlight=False)
        console.print(
            f"{throughput['pictures_per_second']:.1f} pictures a second at {config.input.size} px in batches of "
            f"{batch_size} ({chosen}, {torch.get_num_threads()} threads)",
            highlight=False,
        )
    return facts
