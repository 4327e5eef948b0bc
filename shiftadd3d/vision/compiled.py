"""Saved classifiers as one executable each."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from shiftadd3d._errors import UserError
from shiftadd3d._progress import say_if_slow
from shiftadd3d.kernels import Numerics, get_numerics
from shiftadd3d.nn.compiled import compile as compile_model
from shiftadd3d.vision.checkpoint import ClassifierConfig, create_classifier, read_config
from shiftadd3d.vision.deploy import DeployedClassifier

_WAIT = "Compiling the classifier. This takes up to some minutes, once: the result is kept"


def compiled_where_it_can_be(model: nn.Module, console: Console | None = None) -> nn.Module:
    """A classifier as one executable in the numerics of the process. If it cannot be compiled, the classifier itself,
    and a line says why.

    There is no line for executables, nor for classifiers without kernels: those that are not packed, on GPUs, or with
    numerics ``"twin"``.

    Args:
        model: a classifier from `load`.
        console: prints the line.
    """
    config = model.classifier_config
    assert isinstance(config, ClassifierConfig)
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    is_one = isinstance(model, DeployedClassifier)
    if is_one or not config.frozen or device.type != "cpu" or get_numerics() == "twin":
        return model
    size = config.input.size
    try:
        waiting = contextlib.nullcontext() if console is None else say_if_slow(_WAIT, console)
        with warnings.catch_warnings(), waiting:
            warnings.simplefilter("ignore", RuntimeWarning)
            compiled = compile_model(model, torch.zeros(1, 3, size, size))
    except UserError as error:
        reason = str(error)
    else:
        if compiled.is_compiled:
            compiled.classifier_config = config
            return compiled
        reason = str(compiled.reason)
    if console is not None:
        console.print(f"not compiled: {reason}", highlight=False, markup=False, soft_wrap=True)
    return model


def build_ahead(
    folders: Sequence[Path], numerics: Sequence[Numerics], console: Console | None = None
) -> list[dict[str, Any]]:
    """Put the executables of packed classifiers into the cache, so that nobody has to wait for them later.

    Args:
        folders: folders that `shiftadd3d export` packed. Weights are not read, because the code does not depend on
            them.
        numerics: numerics to compile for; if empty, those of the process.
        console: prints a line for each executable.

    Returns:
        The seconds for each folder and numerics.

    Raises:
        UserError: if a folder has no packed classifier, or one that cannot be compiled.
    """
    configs = {folder: read_config(folder) for folder in folders}
    for folder, config in configs.items():
        if not config.frozen:
            raise UserError(f"{folder}: not packed, so nothing of it is compiled; expected what `export` packed")
    rows: list[dict[str, Any]] = []
    for folder, config in configs.items():
        model = create_classifier(config).eval()
        example = torch.zeros(1, 3, config.input.size, config.input.size)
        for exactness in numerics or [get_numerics()]:
            start = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                compiled = compile_model(model, example, exactness)
                if compiled.is_compiled and exactness != "exact":
                    compiled.load("safe")  # for activations beyond what rounded ones can express
            if not compiled.is_compiled:
                raise UserError(f"{folder} cannot be compiled: {compiled.reason}")
            seconds = round(time.perf_counter() - start, 3)
            rows.append({"model": str(folder), "numerics": exactness, "seconds": seconds})
            if console is not None:
                console.print(f"{folder}, {exactness}: {seconds:.1f} s", highlight=False, markup=False, soft_wrap=True)
    return rows
