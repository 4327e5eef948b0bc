"""Saving and loading classifiers: safetensors for weights, JSON for everything else.

A saved classifier is a folder with `model.safetensors` and `config.json`. The JSON file holds the name of the timm
model, its recipe, the order of its classes, and the input pictures that it expects. Neither file contains code.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from shiftadd3d._errors import UserError
from shiftadd3d.nn import Recipe, freeze_, reparameterize_
from shiftadd3d.vision.data import InputConfig
from shiftadd3d.vision.pretrained import fetch, first_line

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
_FORMAT = "shiftadd3d.classifier"
_FORMAT_VERSION = 1
_LISTED = 4  # names in an error message


@dataclass(frozen=True)
class ClassifierConfig:
    """The description of a classifier, without its weights."""

    architecture: str
    """timm's name of the model with multiplications."""
    classes: tuple[str, ...]
    """Names of the classes in the order of the outputs."""
    input: InputConfig = field(default_factory=InputConfig)
    model_args: dict[str, Any] = field(default_factory=dict)
    """Arguments for `timm.create_model` beyond the number of classes."""
    recipe: Recipe | None = None
    """The recipe that `reparameterize_` applied; None for none."""
    frozen: bool = False
    """Whether its shift layers are packed, for inference only."""

    def as_dict(self) -> dict[str, Any]:
        """The configuration in plain types, for JSON."""
        return {
            "format": _FORMAT,
            "version": _FORMAT_VERSION,
            **asdict(self),
            "classes": list(self.classes),
            "recipe": None if self.recipe is None else self.recipe.as_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ClassifierConfig:
        """The configuration from the outcome of `as_dict`, also after a round through JSON.

        Raises:
            UserError: it is no configuration, or of a later version.
        """
        if not isinstance(values, Mapping) or values.get("format") != _FORMAT:
            raise UserError(f"not the configuration of a classifier of ours (it has no format {_FORMAT!r})")
        if values.get("version") != _FORMAT_VERSION:
            raise UserError(f"of format version {values.get('version')}; this shiftadd3d reads {_FORMAT_VERSION}")
        try:
            picture = dict(values["input"])
            unknown = [str(name) for name in picture if name not in {option.name for option in fields(InputConfig)}]
            if unknown:
                raise UserError(f"not a configuration of this version (input has no {', '.join(unknown)})")
            return cls(
                architecture=str(values["architecture"]),
                classes=tuple(str(name) for name in values["classes"]),
                input=InputConfig(**{**picture, "mean": tuple(picture["mean"]), "std": tuple(picture["std"])}),
                model_args=dict(values["model_args"]),
                recipe=None if values["recipe"] is None else Recipe.from_dict(values["recipe"]),
                frozen=bool(values["frozen"]),
            )
        except KeyError as error:
            raise UserError(f"not a whole configuration of a classifier ({error} is missing)") from None
        except UserError:
            raise
        except (TypeError, ValueError) as error:
            raise UserError(f"not a configuration of a classifier ({first_line(error)})") from None


def create_dense(config: ClassifierConfig, pretrained: bool | Path = False) -> nn.Module:
    """The timm model in `config`, before any reparameterization.

    Args:
        config: the description of the model.
        pretrained: True for timm's pretrained weights, which are downloaded if they are not in the cache. A path for
            weights in a file, as timm publishes them. Position embeddings are interpolated. A classifier for another
            number of classes starts from random weights.

    Raises:
        UserError: timm has no such model, cannot make it with these arguments, or has no weights for it; or the file is
            damaged, or holds weights of another model.
    """
    import timm

    from shiftadd3d.models.vit import check_known

    name, args = config.architecture, dict(config.model_args)
    check_known(name)
    pretrained_config = timm.get_pretrained_cfg(name)
    if pretrained_config is not None and pretrained_config.fixed_input_size:
        args.setdefault("img_size", config.input.size)
    file = pretrained if isinstance(pretrained, Path) else None
    if pretrained is True:
        if pretrained_config is None or not pretrained_config.has_weights:
            raise UserError(f"timm has no pretrained weights for {name}; leave out --pretrained")
        try:
            file = fetch(name)
        except UserError as error:
            raise _no_weights(name, str(error)) from None
    if file is not None:
        # timm itself would ask the hub once more, for minutes if it is out of reach, and may unpickle what others made.
        args["pretrained_cfg_overlay"] = {"state_dict": read_weights(file), "source": ""}
    given = ", ".join(f"{key}={value}" for key, value in config.model_args.items()) or "no arguments"
    try:
        model = timm.create_model(name, pretrained=bool(pretrained), num_classes=len(config.classes), **args)
    except UserError:
        raise
    except (TypeError, AssertionError, ValueError, RuntimeError, KeyError) as error:
        if pretrained and isinstance(error, (RuntimeError, KeyError)):
            place = "timm's pretrained weights" if pretrained is True else f"--weights {pretrained}"
            raise UserError(f"{place}: not of {name} with {given} ({' '.join(str(error).split())[:200]})") from None
        raise UserError(f"timm cannot make {name} with {given}: {first_line(error)}") from None
    except OSError as error:
        raise _no_weights(name, first_line(error)) from None
    describe_in(model, config)
    return model


def _no_weights(name: str, reason: str) -> UserError:
    return UserError(
        f"the pretrained weights of {name} cannot be had ({reason}); are you online? Expected --weights FILE, or "
        "--no-pretrained"
    )


def describe_in(model: nn.Module, config: ClassifierConfig) -> None:
    """Store the description in the model: `pretrained_cfg` for timm's tools, and `classifier_config`."""
    pretrained_cfg = dict(getattr(model, "pretrained_cfg", None) or {})
    pretrained_cfg.pop("state_dict", None)  # weights that were loaded from there; they would stay in memory
    pretrained_cfg.update(
        input_size=(3, config.input.size, config.input.size),
        mean=config.input.mean,
        std=config.input.std,
        interpolation=config.input.interpolation,
        crop_pct=config.input.crop_pct,
        num_classes=len(config.classes),
        label_names=list(config.classes),
    )
    model.pretrained_cfg = pretrained_cfg  # type: ignore[assignment]
    model.classifier_config = config  # type: ignore[assignment]


def create_classifier(config: ClassifierConfig) -> nn.Module:
    """The model that `config` describes, with random weights.

    Raises:
        UserError: timm or the recipe cannot make it.
    """
    model = create_dense(replace(config, recipe=None, frozen=False))
    if config.recipe is not None:
        reparameterize_(model, config.recipe, verbose=False)
    if config.frozen:
        freeze_(model, verbose=False)
    describe_in(model, config)
    return model


def make_folder(folder: Path) -> None:
    """Make a folder and its parents if they do not exist.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            file = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
            raise UserError(f"cannot write into {folder}: {file} is a file; expected a folder") from None
        reason = error.strerror or error
        raise UserError(f"cannot make {folder} ({reason}): is the disk full, or the folder above not yours?") from None


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` write a file beside `path`, then rename it to `path`. So the file is there whole or not at all.

    Raises:
        UserError: it cannot be written. An earlier file is unchanged.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    make_folder(path.parent)
    try:
        # safetensors makes files that only their owner can read; this one is as the umask wants it.
        unfinished.unlink(missing_ok=True)
        unfinished.touch()
        mode = unfinished.stat().st_mode
        write(unfinished)
        unfinished.chmod(mode)
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        else:
            reason = first_line(error)
        kept = f"; the one from before is kept in {path}" if path.exists() else ""
        raise UserError(f"cannot write {path} ({reason}): is the disk full, or the folder not yours?{kept}") from None
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def write_json_atomically(path: Path, facts: Any) -> None:
    """Write `facts` as indented JSON, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def save_classifier(folder: Path, weights: Mapping[str, Tensor], config: ClassifierConfig) -> None:
    """Write `model.safetensors` and `config.json` into `folder`, each whole or not at all.

    Args:
        folder: made if it does not exist.
        weights: a state dict.
        config: the description of the classifier.

    Raises:
        UserError: they cannot be written.
    """
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
    metadata = {"format": "pt", "shiftadd3d": _FORMAT}
    write_json_atomically(folder / CONFIG_FILE, config.as_dict())
    write_atomically(folder / WEIGHTS_FILE, lambda file: safetensors.torch.save_file(tensors, file, metadata))


def read_config(folder: Path) -> ClassifierConfig:
    """The configuration of a saved classifier.

    Args:
        folder: the folder, or either file in it.

    Raises:
        UserError: there is no classifier, or none that this version reads.
    """
    file = _folder_of(folder) / CONFIG_FILE
    try:
        return ClassifierConfig.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        below = sorted(path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{CONFIG_FILE}"))
        expected = f"there is one in {', '.join(map(str, below[:_LISTED]))}" if below else _EXPECTED
        raise UserError(f"{folder}: no {CONFIG_FILE} there; {expected}") from None
    except NotADirectoryError:
        raise UserError(f"{folder}: not a file of a saved classifier; {_EXPECTED}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}); {_EXPECTED}") from None
    except UserError as error:
        raise UserError(f"{file}: {error}; {_EXPECTED}") from None
    except ValueError as error:  # not JSON, not UTF-8
        raise UserError(f"{file}: not JSON ({first_line(error)}); {_EXPECTED}") from None


_EXPECTED = "expected a folder that `shiftadd3d finetune` or `export` wrote"


def _folder_of(path: Path) -> Path:
    return path.parent if path.name in (WEIGHTS_FILE, CONFIG_FILE) else path


def load(path: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """A saved classifier, in evaluation mode.

    Its `classifier_config` describes it. Its `pretrained_cfg` tells timm's tools (`resolve_model_data_config`) how
    pictures become inputs.

    Args:
        path: a folder with `model.safetensors` and `config.json`, or either file.
        device: device for the model.

    Raises:
        UserError: there is no classifier, a file is damaged, or weights are of another architecture.
    """
    folder = _folder_of(Path(path))
    config = read_config(folder)
    model = create_classifier(config)
    load_weights(model, read_weights(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE)
    return model.to(device).eval()


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a state dict that torch saved (only tensors are unpickled).

    Raises:
        UserError: no such file, damaged, or not a file of weights.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected weights, such as {WEIGHTS_FILE}")
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler meets foreign bytes with whatever its own code raises
        raise UserError(
            f"{file}: damaged, or no weights that can be read safely ({first_line(error)[:160]}); "
            "expected .safetensors, or a state dict saved by torch"
        ) from None
    # timm's and others' training scripts put the weights beside other things.
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file}: no state dict in there; expected .safetensors, or a state dict saved by torch")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], file: Path) -> None:
    """Load a state dict that must fit.

    Args:
        model: the model to load it into.
        weights: the state dict.
        file: its file, for errors.

    Raises:
        UserError: it is of another architecture. The message says how it differs.
    """
    problems = mismatches(model, weights)
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise UserError(
            f"{file}: weights of another model than {_name_of(model)}: {'; '.join(problems[:_LISTED])}{more}"
        )
    model.load_state_dict(dict(weights))


def mismatches(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """How a state dict does not fit a model, one entry for each tensor."""
    own = model.state_dict()
    return [
        *(f"{name} is missing" for name in own if name not in weights),
        *(f"{name} is too much" for name in weights if name not in own),
        *(
            f"{name} is {list(weights[name].shape)}, not {list(tensor.shape)}"
            for name, tensor in own.items()
            if name in weights and weights[name].shape != tensor.shape
        ),
    ]


def _name_of(model: nn.Module) -> str:
    config = getattr(model, "classifier_config", None)
    return config.architecture if isinstance(config, ClassifierConfig) else type(model).__name__
