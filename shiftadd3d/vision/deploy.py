"""Classifiers as folders that run without torch: executable, weights and runtime (see `docs/compile.md`)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from shiftadd3d._errors import UserError
from shiftadd3d.kernels import Numerics
from shiftadd3d.kernels.runtime import kernel
from shiftadd3d.kernels.whole.deployment import Deployment, is_deployment
from shiftadd3d.nn.compiled import compile as compile_model
from shiftadd3d.vision.checkpoint import CONFIG_FILE, ClassifierConfig, load
from shiftadd3d.vision.distributed import choose_device


class DeployedClassifier(nn.Module):
    """A classifier from a folder that `export` wrote with ``--formats so``, for inference on this CPU.

    Args:
        folder: the folder. Code in it is run.

    Attributes:
        classifier_config: its description.
        numerics: the precision that it was compiled for.
        deployment: its program.

    Raises:
        UserError: if the folder is damaged, belongs to another user, or is for another machine.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.deployment = Deployment(folder)
        about = self.deployment.about
        self.numerics: Numerics = about["numerics"]
        self.classifier_config = ClassifierConfig.from_dict(about.get("classifier", {}))
        self.training = False

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, size, size] -> [B, classes]
        size = self.classifier_config.input.size
        if images.shape[1:] != (3, size, size) or images.dtype != torch.float32 or len(images) == 0:
            raise UserError(f"it takes [batch, 3, {size}, {size}] float32, not {list(images.shape)} {images.dtype}")
        return self.deployment(images.detach().contiguous())


def deploy(model: nn.Module, folder: Path, numerics: Numerics | None) -> DeployedClassifier:
    """Write a frozen classifier to a folder that runs without torch, and open that folder.

    Args:
        model: a packed classifier from `load`.
        folder: a new folder, or an earlier one, which is replaced.
        numerics: precision to compile for; None for that of the process.

    Raises:
        UserError: if it cannot be compiled, or the folder cannot be written.
    """
    config = cast(ClassifierConfig, model.classifier_config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        compiled = compile_model(model, torch.zeros(1, 3, config.input.size, config.input.size), numerics)
    try:
        if compiled.reason is not None:
            raise RuntimeError(compiled.reason)
        compiled.deploy(folder, {"classifier": config.as_dict()})
    except UserError:
        raise
    except kernel.FAILURES as error:
        raise UserError(f"--formats so: it cannot be compiled: {kernel.first_line(error)}") from None
    deployed = DeployedClassifier(folder)
    images = torch.randn(2, 3, config.input.size, config.input.size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        if not torch.equal(deployed(images), compiled(images)):
            raise RuntimeError(f"{folder} computes something else than what was written to it")
    return deployed


def device_for(folder: Path, device: str | None) -> torch.device:
    """The device for a classifier: as from `choose_device`, but always the CPU for an executable.

    Raises:
        UserError: no such device, or not one for this classifier.
    """
    if not is_deployment(folder):
        return choose_device(device)
    if device not in (None, "cpu"):
        raise UserError(f"--device {device}: {folder} is an executable for a CPU; expected --device cpu")
    return torch.device("cpu")


def open_classifier(folder: Path, device: torch.device) -> nn.Module:
    """A classifier that `finetune` or `export` wrote, ready to classify pictures.

    Args:
        folder: its folder.
        device: the device from `device_for`.

    Raises:
        UserError: there is no classifier, or it is damaged.
    """
    if is_deployment(folder):
        return DeployedClassifier(folder)
    if is_deployment(folder / "so") and not (folder / CONFIG_FILE).exists():
        raise UserError(f"{folder} holds what export wrote; expected one form of that, such as {folder / 'so'}")
    return load(folder, device)
