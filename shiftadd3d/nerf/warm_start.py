"""Starting from a trained dense GNT."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.models.gnt import GNTConfig, GNTModel, load_official_checkpoint
from shiftadd3d.nerf.checkpoint import latest_checkpoint, list_misfits, misfits, network_of, read_checkpoint
from shiftadd3d.nerf.weights import TINY, pretrained_file, read_weights

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
