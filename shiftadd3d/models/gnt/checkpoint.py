"""Reading checkpoints written by the released GNT code."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.models.gnt.model import GNTConfig, GNTModel


def _state_dict(checkpoint: Mapping, key: str, path: Path) -> dict[str, Tensor]:
    state = checkpoint[key]
    if not isinstance(state, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise UserError(
            f"{path}: `{key}` is not a state dict of tensors; expected a checkpoint that the GNT code wrote"
        )
    return {name.removeprefix("module."): value for name, value in state.items()}


def _stage(state: Mapping[str, Tensor], stage: int) -> tuple[int, int]:
    """Width and number of blocks of an encoder stage."""
    blocks = {int(m[1]) for name in state if (m := re.match(rf"layer{stage}\.(\d+)\.", name))}
    return state[f"layer{stage}.0.conv1.weight"].shape[0], len(blocks)


def infer_config(coarse: Mapping[str, Tensor], feature_net: Mapping[str, Tensor], single_net: bool) -> GNTConfig:
    """Sizes of the model that fits these tensors.

    Raises:
        KeyError: a tensor that every GNT has is missing.
    """
    width, inputs = coarse["rgbfeat_fc.0.weight"].shape
    depth = len({name.split(".")[1] for name in coarse if name.startswith("view_crosstrans.")})
    stages = [_stage(feature_net, i) for i in (1, 2, 3)]
    return GNTConfig(
        depth=depth,
        width=width,
        feature_dim=inputs - 3,
        feature_widths=tuple(w for w, _ in stages),  # type: ignore[arg-type]
        feature_blocks=tuple(b for _, b in stages),  # type: ignore[arg-type]
        single_net=single_net,
    )


def load_official_checkpoint(path: str | Path) -> GNTModel:
    """A model with the weights of a checkpoint of the released GNT code, in evaluation mode, on the CPU.

    The file is what the released code saves: a `torch.save` of `net_coarse`, `feature_net` and, with two networks,
    `net_fine`; the optimizer's and scheduler's state are ignored. Depth, width and the number of networks are read off
    the tensors. Only tensors and plain containers are unpickled.

    Raises:
        UserError: no such file, not a torch checkpoint, one that holds more than tensors, or one of another model.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a checkpoint that the GNT code wrote, model_NNNNNN.pth")
    expected = "expected a checkpoint that the GNT code wrote, with `net_coarse`, `feature_net` and perhaps `net_fine`"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: not a checkpoint that can be read safely (damaged, or more than tensors in it); {expected}"
        ) from None
    except Exception as error:  # the unpickler meets foreign bytes with whatever its own code raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path}: torch cannot read it ({reason}); {expected}") from None
    if not isinstance(checkpoint, Mapping) or not {"net_coarse", "feature_net"} <= checkpoint.keys():
        found = ", ".join(map(str, checkpoint)) if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
        raise UserError(f"{path}: not a GNT checkpoint (found: {found[:200]}); {expected}")
    parts = {key: _state_dict(checkpoint, key, path) for key in ("net_coarse", "feature_net")}
    if checkpoint.get("net_fine") is not None:
        parts["net_fine"] = _state_dict(checkpoint, "net_fine", path)
    try:
        config = infer_config(parts["net_coarse"], parts["feature_net"], single_net="net_fine" not in parts)
    except KeyError as error:
        raise UserError(f"{path}: the tensors are not those of a GNT (no {error.args[0]}); {expected}") from None
    except (IndexError, ValueError) as error:
        raise UserError(f"{path}: the tensors are not those of a GNT ({error}); {expected}") from None
    try:
        model = GNTModel(config)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:160]
        raise UserError(f"{path}: no GNT has the sizes of these tensors ({reason})") from None
    for key, state in parts.items():
        part = getattr(model, key)
        misfit = _first_misfit(state, part.state_dict())
        if misfit is not None:
            raise UserError(f"{path}: the tensors of `{key}` are not those of a GNT: {misfit}")
        part.load_state_dict(state)
    return model.eval()


def _first_misfit(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    """The first tensor, in the order of the network, that keeps a state dict from being loaded; None if all fit."""
    for name, value in own.items():
        if name not in state:
            return f"{name} is missing"
        if state[name].shape != value.shape:
            return f"{name} is {list(state[name].shape)}; expected {list(value.shape)}"
    strange = next((name for name in state if name not in own), None)
    return None if strange is None else f"{strange} is no tensor of its"
