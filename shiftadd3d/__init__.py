"""Transformer NeRFs and vision transformers whose multiplications become shifts, additions and a mixture of experts.

Importing this package is cheap: torch and the optional parts (nerfstudio, TVM, timm) load with the submodule that needs
them.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from shiftadd3d._errors import UserError
from shiftadd3d._extras import need
from shiftadd3d._on_import import load_with

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from torch import nn

    from shiftadd3d.kernels import Numerics

__all__ = ["UserError", "__version__", "compile", "load"]

try:
    __version__ = version("shiftadd3d")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def load(path: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """An image classifier that `shiftadd3d finetune` or `shiftadd3d export` saved, in evaluation mode.

    Its `pretrained_cfg` tells timm's tools how pictures become inputs, and the names of the classes.

    Args:
        path: a folder with `model.safetensors` and `config.json`, or either file.
        device: device for the model.

    Raises:
        UserError: there is no classifier, a file is damaged, weights are of another architecture, or timm is not
            installed.
    """
    need("a classifier", "timm", extra="vision")
    from shiftadd3d.vision import checkpoint

    return checkpoint.load(path, device)


def compile(
    model: nn.Module,
    example: torch.Tensor | Sequence[torch.Tensor] | None = None,
    numerics: Numerics | None = None,
    background: bool = False,
) -> Any:
    """A frozen model as one executable, compiled or found in the cache: see `shiftadd3d.nn.compiled.compile`.

    Args:
        model: a model that `freeze_` has frozen, in float32 on the CPU.
        example: an input of the model, or a list of all its inputs. A GNT needs none.
        numerics: precision: ``"exact"``, ``"fast"`` or ``"int8"``; None for that of the process.
        background: return at once. Another process compiles the model, and until then the frozen model runs.

    Raises:
        UserError: the model is not frozen, or does not take the example.
    """
    from shiftadd3d.nn import compiled

    return compiled.compile(model, example, numerics, background)


# What extends timm takes effect where timm is in use, whether it was imported before or comes later.
load_with("timm", "shiftadd3d.models.vit")
