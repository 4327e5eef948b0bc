"""Starting from a trained dense GNT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.models.gnt import GNTModel, load_official_checkpoint
from shiftadd3d.nerf.checkpoint import latest_checkpoint, read_checkpoint

#: Where the network stands in the state dict of a nerfstudio pipeline.
_PREFIX = "_model.gnt."


def load_dense_weights(gnt: GNTModel, path: Path) -> None:
    """Load a dense network, not yet reparameterized, from a checkpoint.

    Args:
        gnt: the network to fill.
        path: a `gnt` run's `nerfstudio_models` folder or one of its `step-*.ckpt` files, or an official GNT checkpoint
            (`.pth`). Parts that an official checkpoint does not have (colour head, proposal) keep their initial values.

    Raises:
        UserError: unreadable, or of another network.
    """
    official = path.suffix == ".pth"
    state: Mapping[str, Tensor]
    if official:
        state = load_official_checkpoint(path).state_dict()
    else:
        path = latest_checkpoint(path) if path.is_dir() else path
        pipeline = read_checkpoint(path)["pipeline"]
        plain = {name.replace("_model.module.", "_model.", 1): value for name, value in pipeline.items()}  # DDP's
        state = {name.removeprefix(_PREFIX): value for name, value in plain.items() if name.startswith(_PREFIX)}
    own = gnt.state_dict()
    fits = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    strange = [name for name in state if name not in fits]
    missing = [name for name in own if name not in fits]
    if official:
        missing = [name for name in missing if not name.startswith("proposal.") and ".color_head." not in name]
    if strange or missing or not fits:
        example = (strange or missing or ["everything"])[0]
        raise UserError(
            f"{path} does not fit this network ({len(missing)} tensors missing, {len(strange)} strange or of another "
            f"size, such as {example}); expected a dense `gnt` checkpoint with the same --pipeline.model.gnt sizes"
        )
    gnt.load_state_dict(fits, strict=False)
