"""All options of fine-tuning, as dataclasses: the arguments of `shiftadd3d finetune`, and of the functions behind it.

Nothing heavy is imported here, so that the command line can show its help at once.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from shiftadd3d._errors import UserError

_Path = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]
_KeyValues = Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE")]


@dataclass(frozen=True)
class DataSettings:
    """Which pictures to use."""

    data: _Path = None
    """An ImageFolder (class folders, alone or in train/ and val/), a .zip of one, or a Hugging Face datasets folder.
    The latter is saved to disk or consists of Parquet files. Metadata beside pictures is not read.
    If not set: scikit-learn's digits."""
    dataset: str = ""
    """A torchvision data set by timm's name, such as torch/cifar10. Its files are in the folder --data."""
    val_fraction: float | None = None
    """Hold out this share of the training pictures, the same ones in every run.
    If not set: the data's own held-out pictures, or 0.1 if there are none."""
    split_seed: int = 0
    """Seed that decides which pictures are held out."""
    check: bool = True
    """Read every picture before training, and leave out and list unreadable ones. Turn it off for millions."""

    def validate(self) -> None:
        """Raise `UserError` for an impossible value."""
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise UserError(f"--val-fraction {self.val_fraction:g}: expected a number between 0 and 1")
        if self.dataset and not self.dataset.startswith("torch/"):
            raise UserError(
                f"--dataset {self.dataset}: expected a torchvision set by timm's name, such as torch/cifar10"
            )


@dataclass(frozen=True)
class StageSettings:
    """How one stage trains."""

    epochs: int = 10
    """Passes over the training pictures. 0 leaves the stage out."""
    lr: float = 1e-3
    """Highest learning rate. It falls to 1% of this along a cosine."""
    warmup_epochs: float = 1.0
    """Epochs in which the learning rate rises."""
    layer_decay: float | None = None
    """Learning rate of each block as a share of that of the block after it. If not set: the same for all blocks."""
    freeze_backbone: bool = False
    """Train only the classifier (the head)."""

    def validate(self) -> None:
        """Raise `UserError` for an impossible value."""
        if self.epochs < 0:
            raise UserError(f"epochs {self.epochs}: expected 0 or more")
        if not 0 < self.lr < float("inf"):
            raise UserError(f"lr {self.lr:g}: expected a positive number")
        if not 0 <= self.warmup_epochs < float("inf"):
            raise UserError(f"warmup-epochs {self.warmup_epochs:g}: expected 0 or more")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise UserError(f"layer-decay {self.layer_decay:g}: expected a number above 0 and at most 1")


@dataclass(frozen=True)
class TrainSettings:
    """Settings that all stages of a training share."""

    batch_size: int = 64
    """Pictures in a step, over all processes together."""
    opt: str = "adamw"
    """timm's name of an optimizer."""
    weight_decay: float = 0.05
    """Weight decay. Biases, norms, and the shifts and signs of shift layers have none."""
    clip_grad: float | None = 1.0
    """Largest norm of a step's gradient."""
    label_smoothing: float = 0.1
    """Share of the target that is spread evenly over all classes."""
    mixup: float = 0.0
    """Mix pairs of pictures, with weights from Beta(x, x) for this x. 0 turns it off. The paper uses 0.8."""
    cutmix: float = 0.0
    """Paste a part of one picture into another. 0 turns it off. The paper uses 1."""
    hflip: float = 0.5
    """Probability of mirroring a picture."""
    min_scale: float = 0.08
    """Smallest share of a picture that a random crop keeps."""
    color_jitter: float = 0.4
    """Strength of random brightness, contrast and saturation."""
    auto_augment: str | None = None
    """timm's description of an augmentation policy, such as rand-m9-mstd0.5-inc1."""
    random_erase: float = 0.0
    """Probability of erasing a rectangle."""
    ema: float | None = None
    """Evaluate and save a moving average of the weights with this decay, such as 0.9998."""
    amp: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the computation. Weights stay float32."""
    moe_weight: float = 0.01
    """Weight of the mixtures' latency-aware balance losses."""
    distill_weight: float = 0.0
    """Share of the loss in stages 1 and 2 that compares with the dense teacher's predictions. 0 turns it off."""
    distill_temperature: float = 2.0
    """Temperature of that comparison."""
    seed: int = 0
    """Seed of all random numbers."""
    workers: int | None = None
    """Processes that read pictures. If not set: 0 on a CPU, up to 8 with a GPU."""
    device: str | None = None
    """Where to train: cpu, cuda, cuda:1. If not set: a GPU if there is one."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes, each holds the whole model (ddp), or a part of it (fsdp, for large models)."""

    def validate(self) -> None:
        """Raise `UserError` for an impossible value."""
        if self.parallel == "fsdp" and (self.ema is not None or self.amp == "float16"):
            raise UserError("--parallel fsdp: expected no --ema, and --amp float32 or bfloat16")
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: expected 1 or more")
        for name in ("distill_weight", "hflip", "random_erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{option_of(name)} {getattr(self, name):g}: expected a number from 0 to 1")
        for name in ("weight_decay", "mixup", "cutmix", "color_jitter", "moe_weight", "clip_grad"):
            if not 0 <= (getattr(self, name) or 0) < float("inf"):
                raise UserError(f"{option_of(name)} {getattr(self, name):g}: expected 0 or more")
        if not 0 < self.min_scale <= 1:
            raise UserError(f"--min-scale {self.min_scale:g}: expected a number above 0 and at most 1")
        if not 0 < self.distill_temperature < float("inf"):
            raise UserError(f"--distill-temperature {self.distill_temperature:g}: expected a positive number")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"--label-smoothing {self.label_smoothing:g}: expected a number from 0 to less than 1")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"--ema {self.ema:g}: expected a number between 0 and 1")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: expected 0 or more")
        check_workers(self.workers)
        if (self.mixup > 0 or self.cutmix > 0) and self.batch_size % 2:
            raise UserError(f"--batch-size {self.batch_size}: mixup and cutmix mix pairs; expected an even number")


@dataclass(frozen=True)
class FinetuneSettings(TrainSettings, DataSettings):
    """All settings of a run, from pictures to a ShiftAdd classifier."""

    model: str = "deit_tiny_patch16_224"
    """timm's name of the model."""
    model_args: _KeyValues = ()
    """Arguments for the model beyond timm's own: embed_dim=96 depth=6 drop_path_rate=0.1."""
    image_size: int = 224
    """Width and height in pixels of the pictures that the model sees."""
    pretrained: bool = False
    """Start from timm's pretrained weights, which are downloaded once."""
    weights: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Start from pretrained weights in this file, as timm publishes them.
    It is a .safetensors file, or a state dict saved by torch."""
    start_from: _Path = None
    """Start from a saved classifier. A dense one replaces stage 0, an additive one stages 0 and 1.
    Or start stage 0 from weights of timm's training script, .pth.tar or .safetensors."""
    recipe: str = "add+shift-attn+moe"
    """What the model becomes: mult, add, add+shift-attn, add+shift, add+shift-attn+moe or moe."""
    recipe_args: _KeyValues = ()
    """Changes to the recipe, such as bits=5 terms=2 mode=PS binarizer=hash."""
    stage0: StageSettings = field(default_factory=StageSettings)
    """Stage 0 trains the dense model, which has multiplications."""
    stage1: StageSettings = field(default_factory=StageSettings)
    """Stage 1 turns attention's products into additions."""
    stage2: StageSettings = field(default_factory=StageSettings)
    """Stage 2 turns linear layers into shifts and mixtures of experts."""
    output_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("outputs")
    """Folder in which the run gets its own folder."""
    name: str | None = None
    """Name of the run's folder. If not set: made of the names of data, model and recipe."""

    def validate(self) -> None:
        """Raise `UserError` for an impossible value."""
        DataSettings.validate(self)
        TrainSettings.validate(self)
        for name in ("stage0", "stage1", "stage2"):
            try:
                getattr(self, name).validate()
            except UserError as error:
                raise UserError(f"--{name}.{error}") from None
        if self.image_size < 8:
            raise UserError(f"--image-size {self.image_size}: expected 8 or more")
        if self.pretrained and self.start_from is not None:
            raise UserError("--pretrained and --start-from: expected one of the two")
        if self.weights is not None and self.start_from is not None:
            raise UserError("--weights and --start-from: expected one of the two")
        self.parsed_model_args()
        self.parsed_recipe_args()

    def parsed_model_args(self) -> dict[str, Any]:
        """`model_args` by name, with Python's values."""
        return parse_key_values("--model-args", self.model_args)

    def parsed_recipe_args(self) -> dict[str, Any]:
        """`recipe_args` by name, with Python's values."""
        return parse_key_values("--recipe-args", self.recipe_args)

    def as_dict(self) -> dict[str, Any]:
        """The settings in plain types, for JSON."""
        values = asdict(self)  # of a subclass, perhaps
        own = {option.name: values[option.name] for option in fields(FinetuneSettings)}
        return {key: str(value) if isinstance(value, Path) else value for key, value in own.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FinetuneSettings:
        """The settings from the outcome of `as_dict`, also after a round through JSON.

        Raises:
            UserError: `values` has a name that is not a setting.
        """
        known = {option.name for option in fields(FinetuneSettings)}
        unknown = [key for key in values if key not in known]
        if unknown:
            raise UserError(f"unknown settings {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")
        values = dict(values)
        for key in ("data", "weights", "start_from", "output_dir"):
            if values.get(key) is not None:
                values[key] = Path(values[key])
        for key in ("model_args", "recipe_args"):
            values[key] = tuple(values.get(key, ()))
        for key in ("stage0", "stage1", "stage2"):
            if key in values:
                values[key] = StageSettings(**values[key])
        return cls(**values)


def check_workers(workers: int | None) -> None:
    """Raise `UserError` for a negative number of processes."""
    if workers is not None and workers < 0:
        raise UserError(f"--workers {workers}: expected 0 or more")


def option_of(name: str) -> str:
    """The option for a setting on the command line: `--batch-size` for `batch_size`."""
    return "--" + name.replace("_", "-")


SETTINGS_FILE = "settings.json"


def read_settings(run: Path) -> FinetuneSettings:
    """The settings of an earlier run, from its folder.

    Raises:
        UserError: it is not the folder of a run, or the run is of another version.
    """
    file = run / SETTINGS_FILE
    try:
        return FinetuneSettings.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(
            f"{run}: no {SETTINGS_FILE} in there ({error.strerror or error}); expected the folder of an earlier run"
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not the settings of a run of this version ({error})") from None


def parse_key_values(option: str, words: tuple[str, ...]) -> dict[str, Any]:
    """Values by name from words such as ("depth=6", "act_layer=gelu"). Values are Python literals, or else strings.

    Raises:
        UserError: a word without `=`.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"{option} {word}: expected KEY=VALUE")
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[key] = text
    return values
