"""Starting from a trained dense GNT."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from shiftadd3d._errors import UserError
from shiftadd3d.models.gnt import GNTConfig, GNTModel, load_official_checkpoint
from shiftadd3d.nerf.checkpoint import latest_checkpoint, list_misfits, misfits, network_of, read_checkpoint
from shiftadd3d.nerf.weights import TINY, load_network, pretrained_file, read_weights

#: `--pipeline.warm-start pretrained`: the weights that come with the package.
PRETRAINED = Path("pretrained")


def load_dense_weights(gnt: GNTModel, path: Path) -> None:
    """Load a dense network, not yet reparameterized, from a checkpoint.

    Args:
        gnt: the network to fill.
        path: a `gnt` run's `nerfstudio_models` folder or one of its `step-*.ckpt` files, an official GNT checkpoint
            (`.pth`), a file of safetensors, or `pretrained`: the weights of `gnt-tiny` that come with the package.
            Parts that an official checkpoint does not have (colour head, proposal) keep their initial values.

    Raises:
        UserError: unreadable, or of another network.
    """
    official = path.suffix == ".pth"
    state: Mapping[str, Tensor]
    if path == PRETRAINED:
        _check_sizes(gnt.config)
        path = pretrained_file("gnt-tiny")
    if official:
        state = load_official_checkpoint(path).state_dict()
    elif path.suffix == ".safetensors":
        state = read_weights(path)[0]
    else:
        path = latest_checkpoint(path) if path.is_dir() else path
        state = network_of(read_checkpoint(path)["pipeline"])
    missing, strange = misfits(state, gnt.state_dict())
    if official:
        missing = [name for name in missing if not name.startswith("proposal.") and ".color_head." not in name]
    if strange or missing:
        raise UserError(
            f"{path} does not fit this network ({list_misfits(missing, strange)}); expected a dense `gnt` checkpoint "
            "with the same --pipeline.model.gnt sizes"
        )
    gnt.load_state_dict(state, strict=False)


def take_calibrated_weights(gnt: GNTModel) -> None:
    """Give layers the weights that they have in the packed network that comes with the package.

    Calibration has fitted those to additive attention. The dense network's own are not: on a scene whose views lie far
    apart, training would start 0.6 dB below what rendering without training reaches.

    Args:
        gnt: a network of the same sizes after `SHIFTADD_RECIPE`, or its first stage. Perceptrons that are no mixtures
            yet stay as they are.
    """
    calibrated = dict(load_network("shiftadd-gnt-tiny").named_modules())
    with torch.no_grad():
        for name, layer in gnt.named_modules():
            for field in ("weight", "bias"):
                own, value = getattr(layer, field, None), getattr(calibrated.get(name), field, None)
                if isinstance(own, Parameter) and isinstance(value, Tensor) and own.shape == value.shape:
                    own.copy_(value)


def _check_sizes(own: GNTConfig) -> None:
    """Whether the weights that come with the package mean the same in this network. Not all settings show in shapes.

    Raises:
        UserError: they do not; it names what was altered.
    """
    # A sweep of more or fewer planes has the same weights, and dropout has none.
    planes = TINY.proposal_samples if own.proposal_samples else 0
    same = dataclasses.replace(own, dropout=TINY.dropout, proposal_samples=planes)
    altered = [
        f"--pipeline.model.gnt.{field.name.replace('_', '-')} {_typed(old)}, not {_typed(new)}"
        for field in dataclasses.fields(GNTConfig)
        if (old := getattr(TINY, field.name)) != (new := getattr(same, field.name))
    ]
    if altered:
        raise UserError(
            f"--pipeline.warm-start {PRETRAINED}: the weights that come with the package are of a network with "
            f"{'; '.join(altered)}; expected that, or --pipeline.warm-start none to start from random weights"
        )


def _typed(value: object) -> str:
    """As on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
