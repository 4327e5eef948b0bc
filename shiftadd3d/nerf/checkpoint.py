"""Read nerfstudio's checkpoints and configurations without running code in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from shiftadd3d._errors import UserError

#: Where the network stands in the state dict of a nerfstudio pipeline.
_NETWORK = "_model.gnt."


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A nerfstudio checkpoint, on the CPU. Only tensors and plain containers are unpickled.

    Raises:
        UserError: no such file, a damaged file, or not a nerfstudio checkpoint.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; expected a nerfstudio_models/step-*.ckpt of an earlier run")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler meets foreign bytes with whatever its own code raises
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: damaged, or not a checkpoint that can be read safely ({reason}); "
            "expected a nerfstudio_models/step-*.ckpt of an earlier run"
        ) from None
    if (
        not isinstance(state, dict)
        or not isinstance(state.get("step"), int)
        or not isinstance(state.get("pipeline"), dict)
    ):
        raise UserError(
            f"{path}: not a nerfstudio checkpoint (it has no `step` and `pipeline`); "
            "expected a nerfstudio_models/step-*.ckpt of an earlier run"
        )
    return state


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name, `step-<step>.ckpt`."""
    return int(checkpoint.stem.removeprefix("step-"))


def latest_checkpoint(folder: Path) -> Path:
    """The checkpoint of the highest step in a run's `nerfstudio_models` folder.

    Raises:
        UserError: the folder does not exist or holds none.
    """
    checkpoints = sorted((path for path in folder.glob("step-*.ckpt") if path.stem[5:].isdecimal()), key=step_of)
    if not checkpoints:
        raise UserError(f"{folder}: no step-*.ckpt in there; expected the nerfstudio_models folder of an earlier run")
    return checkpoints[-1]


def extra_of(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The extra state in a pipeline's state dict (`GNTNerfModel.get_extra_state`); empty if there is none."""
    extra = state.get("_model._extra_state", state.get("_model.module._extra_state"))
    return extra if isinstance(extra, dict) else {}


def stage_of(state: Mapping[str, Any]) -> int:
    """The stage of a pipeline's state dict, of the paper's two; 1 for another network."""
    return extra_of(state).get("stage", 1)


def network_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of the network in a pipeline's state dict, by their names in the network itself."""
    plain = {name.replace("_model.module.", "_model.", 1): value for name, value in state.items()}  # DDP's
    return {name.removeprefix(_NETWORK): value for name, value in plain.items() if name.startswith(_NETWORK)}


def misfits(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Names of tensors that prevent loading a state dict: (missing, unknown or of another size)."""
    fits = {name for name, value in state.items() if name in own and value.shape == own[name].shape}
    return [name for name in own if name not in fits], [name for name in state if name not in fits]


def list_misfits(missing: list[str], strange: list[str]) -> str:
    """`2 tensors missing, 1 strange or of another size, such as norm.bias`."""
    told = f"{len(missing)} tensors missing, {len(strange)} strange or of another size"
    return ", such as ".join([told, *(strange or missing)[:1]])


class RunScene(NamedTuple):
    """What a run was trained on."""

    data: Path
    parser: str
    """Module and name of the data parser's class."""


def scene_of(run_config: Path) -> RunScene | None:
    """The scene in a run's config.yml; None if there is no such file, or no scene in it."""
    try:
        config = yaml.load(run_config.read_text(encoding="utf-8"), Loader=_ObjectsAsData)  # a safe loader
        datamanager = config["pipeline"]["datamanager"]
        parser = datamanager["dataparser"]
        data = datamanager["data"] or parser["data"]
        return RunScene(Path(*data) if isinstance(data, list) else Path(data), parser["_target"].removeprefix("name:"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, LookupError, TypeError, AttributeError):
        return None


class _ObjectsAsData(yaml.SafeLoader):
    """Reads what objects would be made from, and makes none: any file may be beside a checkpoint."""

    def construct_described(self, what: str, node: yaml.Node) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self.construct_mapping(node, deep=True)
        return self.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else what


_ObjectsAsData.add_multi_constructor("tag:yaml.org,2002:python/", _ObjectsAsData.construct_described)
