"""Weights that come with the package: networks trained across scenes that this project makes.

`README.md` beside them says what they were trained on and how well they render scenes that they have never seen.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.models.gnt import GNTModel
from shiftadd3d.models.gnt.presets import SHIFTADD_RECIPE, TINY, gnt_recipe, may_change
from shiftadd3d.nn import freeze_, reparameterize_

__all__ = ["TINY", "load_network", "pretrained_file", "pretrained_methods", "read_weights"]

_FOLDER = Path(__file__).parent


def pretrained_methods() -> list[str]:
    """The methods whose weights come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.safetensors"))


def pretrained_file(method: str) -> Path:
    """Where the weights of a method are.

    Raises:
        UserError: none come with the package.
    """
    path = _FOLDER / f"{method}.safetensors"
    if not path.is_file():
        raise UserError(
            f"no weights of {method} come with this package; expected one of: {', '.join(pretrained_methods())}"
        )
    return path


def load_network(method: str = "shiftadd-gnt-tiny") -> GNTModel:
    """A method's network with the weights that come with the package, frozen: `models.gnt.render_rays` takes it.

    Needs no nerfstudio.

    Args:
        method: one of `pretrained_methods`.

    Raises:
        UserError: no weights of that method come with the package.
    """
    weights, facts = read_weights(pretrained_file(method))
    network = GNTModel(TINY)
    if method.startswith("shiftadd-"):
        # What the experts cost matters in training only.
        recipe = gnt_recipe(SHIFTADD_RECIPE, latencies=(1.0, 1.0))
        reparameterize_(network, recipe, filter_fn=may_change, verbose=False)
    if facts.get("packed") == "true":
        freeze_(network, verbose=False)
    network.load_state_dict(weights)
    if facts.get("packed") != "true":
        freeze_(network, verbose=False)
    return network


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and what its header says.

    Raises:
        UserError: no such file, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
        return load_file(path), facts
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read ({reason}); expected weights in a safetensors file") from None
