"""From pictures to a ShiftAdd classifier in the paper's stages.

Stage 0 trains the dense model (or loads it). Stage 1 turns attention's products into additions. Stage 2 turns linear
layers into shifts and mixtures of experts. Each stage starts from the best weights of the stage before. It has its own
folder and learning rate, and can be interrupted and resumed.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 5 and appendix: two-stage fine-tuning of pretrained models.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from shiftadd3d._claim import claimed
from shiftadd3d._errors import UserError
from shiftadd3d.nn import Recipe, fit_binarizers_, reparameterize_
from shiftadd3d.vision.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    ClassifierConfig,
    create_classifier,
    create_dense,
    describe_in,
    load_weights,
    read_config,
    read_weights,
    write_json_atomically,
)
from shiftadd3d.vision.data import PictureData, example_inputs, input_of, open_data, seed_everything
from shiftadd3d.vision.distributed import choose_device, connected, from_first_process, this_process
from shiftadd3d.vision.engine import BEST_FOLDER, STATE_FILE, TrainResult, train
from shiftadd3d.vision.metrics import ClassificationMetrics
from shiftadd3d.vision.pictures import save_confusion, save_curves
from shiftadd3d.vision.pretrained import describe_source, fetch
from shiftadd3d.vision.settings import (
    SETTINGS_FILE,
    DataSettings,
    FinetuneSettings,
    option_of,
    read_settings,
)

STAGE_FOLDERS = ("stage0-dense", "stage1-add", "stage2-shift")
_SHIFTADD_PREFIX = "shiftadd_"
_LISTED = 5  # pictures that were left out, before the rest is counted


@dataclass(frozen=True)
class StageResult:
    """A stage that ran: the folder of its best classifier, and its validation metrics."""

    name: str
    best: Path
    metrics: ClassificationMetrics


@dataclass(frozen=True)
class FinetuneResult:
    """The stages that ran, and the classifier of the last one in evaluation mode."""

    stages: tuple[StageResult, ...]
    model: nn.Module
    folder: Path


def finetune(
    settings: FinetuneSettings,
    *,
    resume: bool = False,
    fallback: FinetuneSettings | None = None,
    console: Console | None = None,
) -> FinetuneResult:
    """Run the stages. Under `torchrun` or `accelerate launch`, each of the processes calls this.

    Args:
        settings: all settings.
        fallback: settings that start from random weights, used if timm's pretrained weights are not available. They
            must be for the same pictures and the same folder. None makes that an error.
        resume: continue an unfinished run in the same folder. Settings may have changed if they do not change the
            model. Finished stages are not run again.
        console: shows progress; None is silent.

    Raises:
        UserError: anything in the settings, the pictures or the checkpoints that the user can mend.
        KeyboardInterrupt: Ctrl-C. The state has been saved.
    """
    from shiftadd3d.models.vit import check_known

    settings.validate()
    if fallback is not None:
        fallback.validate()
    # Going on from another working directory must find the same pictures.
    settings = replace(
        settings,
        data=settings.data and settings.data.resolve(),
        weights=settings.weights and settings.weights.resolve(),
        start_from=settings.start_from and settings.start_from.resolve(),
    )
    chosen = Recipe.parse(settings.recipe, **settings.parsed_recipe_args())
    check_known(_architecture(settings))  # opening the pictures can take minutes
    device = choose_device(settings.device)
    with connected(device), contextlib.ExitStack() as held:
        shown = console if this_process().is_first else None
        folder = run_folder(settings)
        from_first_process(lambda: _check_folder(folder, settings, resume, held))
        data = open_data(_data_settings(settings), from_first_process)
        if shown is not None:
            shown.print(data.describe(), highlight=False)
            for entry in data.skipped[:_LISTED]:
                shown.print(f"  skipped {entry}", highlight=False, markup=False, soft_wrap=True)
            if len(data.skipped) > _LISTED:
                shown.print(f"  and more, listed in {folder / 'skipped.json'}", highlight=False, soft_wrap=True)
        if fallback is not None and settings.pretrained and not resume:
            settings, chosen = _what_can_be_had(settings, fallback, chosen, shown)
        try:
            return _run_stages(settings, chosen, data, folder, shown)
        except Exception:
            if this_process().is_first and not resume and _first_begun(folder) is None:
                # Nothing was trained: the mended command may have the same name.
                with contextlib.suppress(OSError):
                    (folder / SETTINGS_FILE).unlink()
            raise


def _what_can_be_had(
    settings: FinetuneSettings, fallback: FinetuneSettings, chosen: Recipe, console: Console | None
) -> tuple[FinetuneSettings, Recipe]:
    """The settings that start from pretrained weights, or, without these, the others, and the recipe."""
    if console is not None:
        console.print(f"looking for the pretrained weights of {settings.model} ...", highlight=False)

    def why_not() -> str | None:
        try:
            fetch(_architecture(settings))
        except UserError as error:
            return str(error)
        return None

    reason = from_first_process(why_not)
    if reason is None:
        return settings, chosen
    if console is not None:
        console.print(
            f"starting from random weights, which gives worse results: those of {settings.model} cannot be had "
            f"({reason}); --weights FILE takes a file of them",
            highlight=False,
            soft_wrap=True,
        )
    fallback = replace(fallback, data=settings.data)
    return fallback, Recipe.parse(fallback.recipe, **fallback.parsed_recipe_args())


def _architecture(settings: FinetuneSettings) -> str:
    """timm's name of the model before any reparameterization."""
    return settings.model.removeprefix(_SHIFTADD_PREFIX)


def run_folder(settings: FinetuneSettings) -> Path:
    """The folder of a run with these settings."""
    data = settings.dataset.replace("/", "-") or ("digits" if settings.data is None else settings.data.stem)
    return settings.output_dir / (settings.name or f"{data}-{settings.model}-{settings.recipe}")


def _data_settings(settings: FinetuneSettings) -> DataSettings:
    return DataSettings(**{option.name: getattr(settings, option.name) for option in fields(DataSettings)})


# What makes it another model or other data, and so another run.
_FIXED = ("data", "dataset", "val_fraction", "split_seed", "model", "model_args", "image_size", "recipe", "recipe_args")


def _check_folder(folder: Path, settings: FinetuneSettings, resume: bool, held: contextlib.ExitStack) -> None:
    if (folder / SETTINGS_FILE).exists():
        if not resume:
            raise UserError(
                f"{folder} holds an earlier run: go on with `shiftadd3d finetune --resume {folder}`, or choose another "
                "--name"
            )
        before = read_settings(folder)
        changed = [name for name in _FIXED if getattr(before, name) != getattr(settings, name)]
        if changed and _first_begun(folder) is not None:
            options = ", ".join(map(option_of, changed))
            raise UserError(f"{folder} was begun with other {options}; choose another --name for a new run")
    elif resume:
        raise UserError(f"{folder}: no {SETTINGS_FILE} in there; expected the folder of an earlier run")
    held.enter_context(claimed(folder, "--output-dir or --name"))


def _first_begun(folder: Path) -> int | None:
    """The number of the first stage that has a state; None if nothing was trained yet."""
    begun = [number for number, name in enumerate(STAGE_FOLDERS) if (folder / name / STATE_FILE).exists()]
    return begun[0] if begun else None


def _begin_stage(folder: Path, number: int, settings: FinetuneSettings, data: PictureData) -> None:
    """Note what is about to be trained; what cannot be trained neither changes a run's settings nor takes its name."""
    later = [str(folder / name) for name in STAGE_FOLDERS[number + 1 :] if (folder / name / STATE_FILE).exists()]
    if later:
        raise UserError(
            f"--stage{number}.epochs: {folder / STAGE_FOLDERS[number]} would be trained further, but later stages came "
            f"from what it was before; expected no more epochs, or {' and '.join(later)} moved away to train them anew"
        )
    write_json_atomically(folder / SETTINGS_FILE, settings.as_dict())
    if data.skipped:
        skipped = [{"name": entry.name, "reason": entry.reason} for entry in data.skipped]
        write_json_atomically(folder / "skipped.json", skipped)


def _run_stages(
    settings: FinetuneSettings, chosen: Recipe, data: PictureData, folder: Path, console: Console | None
) -> FinetuneResult:
    architecture = _architecture(settings)
    config = ClassifierConfig(
        architecture=architecture,
        classes=data.classes,
        input=input_of(architecture, settings.image_size),
        model_args=settings.parsed_model_args(),
    )
    recipes = (None, *chosen.stages())
    if console is not None:
        console.print(_plan(settings, recipes, len(data.train)), highlight=False, soft_wrap=True)
    model, config, finished = _start(settings, config, recipes[1], folder, console)
    teacher: nn.Module | None = None
    results: list[StageResult] = []
    stages = zip(STAGE_FOLDERS, recipes, (settings.stage0, settings.stage1, settings.stage2), strict=True)
    for number, (name, stage_recipe, stage) in enumerate(stages):
        if number > 0 and stage_recipe is None:
            continue
        if number > finished and stage_recipe is not None:
            if config.recipe is None and settings.distill_weight > 0:
                teacher = copy.deepcopy(model).requires_grad_(False)
            seed_everything(settings.seed, number)  # routers are drawn: alike in every process, and on every way here
            report = reparameterize_(model, stage_recipe, verbose=False)
            if number == 1 and stage_recipe.binarizer == "hash" and not (folder / name / STATE_FILE).exists():
                # Hash functions that agree with the attention that they replace are what makes a good start.
                fitted = fit_binarizers_(model, example_inputs(data.train, config.input), verbose=False)
                if console is not None:
                    console.print(fitted)
            config = replace(config, recipe=stage_recipe)
            describe_in(model, config)
            if console is not None:
                console.print(f"{len(report.layers)} layers replaced by recipe {stage_recipe.name}", highlight=False)
        if number <= finished or stage.epochs == 0:
            continue
        if console is not None:
            console.rule(name)
        trained = train(
            model,
            data,
            config,
            stage,
            settings,
            folder=folder / name,
            teacher=teacher,
            before_training=lambda number=number: from_first_process(
                lambda: _begin_stage(folder, number, settings, data)
            ),
            console=console,
        )
        model = trained.model
        results.append(StageResult(name, folder / name / BEST_FOLDER, trained.metrics))
        from_first_process(lambda trained=trained, name=name: _draw(folder / name, name, trained))
    if not results:
        raise UserError("there is nothing to train: every stage has 0 epochs, or is finished already")
    from_first_process(lambda: write_json_atomically(folder / "summary.json", _summary(settings, data, results)))
    if console is not None:
        _show(console, results, folder)
    return FinetuneResult(tuple(results), model, folder)


def _plan(settings: FinetuneSettings, recipes: Sequence[Recipe | None], pictures: int) -> str:
    """How many steps the stages have."""
    stages = zip(STAGE_FOLDERS, recipes, (settings.stage0, settings.stage1, settings.stage2), strict=True)
    steps = [
        f"{stage.epochs * (pictures // settings.batch_size)} in {name}" + (" (head alone)" * stage.freeze_backbone)
        for name, stage_recipe, stage in stages
        if stage.epochs and (stage_recipe is not None or name == STAGE_FOLDERS[0])
    ]
    return f"{settings.model} at {settings.image_size} px, steps of {settings.batch_size} pictures: {', '.join(steps)}"


def _start(
    settings: FinetuneSettings,
    config: ClassifierConfig,
    additive: Recipe | None,
    folder: Path,
    console: Console | None,
) -> tuple[nn.Module, ClassifierConfig, int]:
    """The model to begin with, what it is, and the last stage that it has behind it (-1 for none)."""
    begun, gone = from_first_process(
        lambda: (_first_begun(folder), settings.start_from is not None and not settings.start_from.exists())
    )
    drawn_from = settings.pretrained or settings.weights is not None or gone
    unneeded = begun == 0 or (drawn_from and settings.distill_weight == 0)
    if begun is not None and unneeded and (settings.stage0, settings.stage1, settings.stage2)[begun].epochs > 0:
        # All weights are in the states. Those from before may be gone, and only a teacher would need them.
        behind = begun - 1 if gone else -1
        config = replace(config, recipe=additive if behind == 1 else None)
        return create_classifier(config), config, behind
    model, config, behind = _first_model(settings, config, additive, console)
    if begun is None:
        _check_patches(model, settings.image_size)
    return model, config, behind


def _first_model(
    settings: FinetuneSettings, config: ClassifierConfig, additive: Recipe | None, console: Console | None
) -> tuple[nn.Module, ClassifierConfig, int]:
    path = settings.start_from
    if path is None:
        # Weights that are drawn, not loaded, are part of what the seed decides.
        seed_everything(settings.seed)
        model = create_dense(config, settings.weights or settings.pretrained)
        if console is not None and (settings.weights or settings.pretrained):
            place = settings.weights or f"timm: {describe_source(config.architecture)}"
            console.print(f"pretrained weights from {place}", highlight=False, markup=False, soft_wrap=True)
        return model, config, -1
    if not path.exists():
        raise UserError(f"--start-from {path}: no such file or folder; expected a saved classifier, or weights")
    if path.is_dir() or path.name in (WEIGHTS_FILE, CONFIG_FILE):
        found = read_config(path)
        if found.frozen:
            raise UserError(f"--start-from {path}: frozen for inference; expected a classifier that can be trained")
        if (found.architecture, found.model_args) != (config.architecture, config.model_args):
            raise UserError(
                f"--start-from {path}: a {_describe(found)}, not a {_describe(config)}; "
                "expected the same --model and --model-args"
            )
        if found.classes == config.classes:
            if found.recipe not in (None, additive):
                raise UserError(
                    f"--start-from {path}: made by recipe {found.recipe.name}; "
                    "expected a dense classifier, or stage 1 of the same recipe"
                )
            if found.recipe is not None and settings.distill_weight > 0:
                raise UserError("--distill-weight needs the dense teacher: expected --start-from a dense classifier")
            config = replace(config, recipe=found.recipe)
            model = create_classifier(config)
            _load_start(model, _weights_file(path), console)
            return model, config, 0 if found.recipe is None else 1
        if found.recipe is not None:
            raise UserError(f"--start-from {path}: of other classes; expected a dense classifier to start from then")
        path = _weights_file(path)
    seed_everything(settings.seed)  # a head for other classes is drawn
    model = create_dense(config)
    _load_start(model, path, console)
    return model, config, -1


def _weights_file(path: Path) -> Path:
    """Of a saved classifier, named by its folder or by either file."""
    return path / WEIGHTS_FILE if path.is_dir() else path.with_name(WEIGHTS_FILE)


def _load_start(model: nn.Module, file: Path, console: Console | None) -> None:
    weights = read_weights(file)
    _drop_other_head(model, weights, console)
    _resample_positions(model, weights, console)
    load_weights(model, weights, file)


def _check_patches(model: nn.Module, size: int) -> None:
    """timm's patches leave the pixels at the edge out of account that fill no patch."""
    from timm.layers.patch_embed import PatchEmbed

    patches = getattr(model, "patch_embed", None)
    if not isinstance(patches, PatchEmbed) or patches.dynamic_img_pad:
        return
    for side in set(map(int, patches.patch_size)):
        if size % side:
            raise UserError(f"--image-size {size}: the model's patches have {side} px; expected a multiple of that")


def _describe(config: ClassifierConfig) -> str:
    args = " ".join(f"{key}={value}" for key, value in config.model_args.items())
    return f"{config.architecture} {args}".strip()


def _drop_other_head(model: nn.Module, weights: dict[str, Tensor], console: Console | None) -> None:
    """A head for another number of classes is left as the new model has it."""
    head = model.pretrained_cfg.get("classifier", ())  # type: ignore[union-attr]
    own = model.state_dict()
    for name in (head,) if isinstance(head, str) else head:
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in weights and key in own and weights[key].shape != own[key].shape:
                if console is not None:
                    console.print(f"{key} is for other classes: it starts anew", highlight=False)
                weights[key] = own[key]


def _resample_positions(model: nn.Module, weights: dict[str, Tensor], console: Console | None) -> None:
    """Embeddings of the positions in pictures of another size are interpolated."""
    from timm.layers.pos_embed import resample_abs_pos_embed
    from timm.models.vision_transformer import VisionTransformer

    found = weights.get("pos_embed")
    if not isinstance(model, VisionTransformer) or model.pos_embed is None or found is None:
        return
    grid = model.patch_embed.grid_size
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    # What is of another model, not of another size, `load_weights` refuses.
    alike = found.dim() == 3 and found.shape[::2] == model.pos_embed.shape[::2]
    tokens = found.shape[1] - prefix if alike else 0
    if tokens > 0 and found.shape[1] != model.pos_embed.shape[1] and math.isqrt(tokens) ** 2 == tokens:
        weights["pos_embed"] = resample_abs_pos_embed(found, list(grid), num_prefix_tokens=prefix)
        if console is not None:
            console.print(f"position embeddings interpolated to {grid[0]} x {grid[1]} patches", highlight=False)


def _draw(folder: Path, name: str, trained: TrainResult) -> None:
    save_curves(trained.history, name, folder / "curves.png")
    save_confusion(trained.metrics, name, folder / "confusion.png")


def _summary(settings: FinetuneSettings, data: PictureData, results: list[StageResult]) -> dict[str, Any]:
    return {
        "data": data.name,
        "model": settings.model,
        "recipe": settings.recipe,
        "classes": list(data.classes),
        "pictures": {"train": len(data.train), "val": len(data.val), "skipped": data.count_skipped()},
        "stages": [{"name": stage.name, "best": str(stage.best), **stage.metrics.as_dict()} for stage in results],
    }


def _show(console: Console, results: list[StageResult], folder: Path) -> None:
    from rich.table import Table

    table = Table("stage", "top-1", "top-5", "loss", "calibration error")
    for column in table.columns[1:]:
        column.justify = "right"
    for stage in results:
        metrics = stage.metrics
        table.add_row(
            stage.name,
            f"{metrics.top1:.2%}",
            f"{metrics.top5:.2%}",
            f"{metrics.loss:.4f}",
            f"{metrics.calibration_error:.2%}",
        )
    console.print(table)
    best = results[-1].best
    console.print(f"Curves:  tensorboard --logdir {folder}", soft_wrap=True, highlight=False)
    for command in (
        f"shiftadd3d evaluate {best}",
        f"shiftadd3d predict {best} PICTURE --show-routing",
        f"shiftadd3d export {best} --out {folder / 'export'}",
    ):
        console.print(f"  {command}", soft_wrap=True, highlight=False)
