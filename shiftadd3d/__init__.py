"""Transformer NeRFs and vision transformers whose multiplications become shifts, additions and a mixture of experts.

Importing this package is cheap: torch and the optional parts (nerfstudio, TVM, timm) load with the submodule that needs
them.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from shiftadd3d._errors import UserError
from shiftadd3d._on_import import load_with

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

__all__ = ["UserError", "__version__", "load"]

try:
    __version__ = version("shiftadd3d")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def load(path: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """An image classifier that `shiftadd3d finetune` or `shiftadd3d export` saved, in evaluation mode.

    Its `pretrained_cfg` tells timm's tools how pictures become inputs and what the classes are called.

    Args:
        path: a folder with `model.safetensors` and `config.json`, or either file.
        device: where to.

    Raises:
        UserError: nothing there, damaged, or weights of another architecture.
    """
    from shiftadd3d.vision import checkpoint

    return checkpoint.load(path, device)


# What extends timm takes effect where timm is in use, whether it was imported before or comes later.
load_with("timm", "shiftadd3d.models.vit")
