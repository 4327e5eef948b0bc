"""Saved classifiers as one executable each."""

from __future__ import annotations

import warnings

import torch
from rich.console import Console
from torch import nn

from shiftadd3d._errors import UserError
from shiftadd3d.kernels import get_numerics
from shiftadd3d.nn.compiled import compile as compile_model
from shiftadd3d.vision.checkpoint import ClassifierConfig


def compiled_where_it_can_be(model: nn.Module, console: Console | None = None) -> nn.Module:
    """A classifier as one executable, in the numerics of the process; itself where that cannot be, and a line says why.

    Nothing is said of classifiers that run no kernels: those that are not packed, on GPUs, or in numerics ``"twin"``.

    Args:
        model: what `load` made.
        console: where to print the line.
    """
    config = model.classifier_config
    assert isinstance(config, ClassifierConfig)
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    if not config.frozen or device.type != "cpu" or get_numerics() == "twin":
        return model
    size = config.input.size
    try:
        with warnings.catch_warnings():
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
