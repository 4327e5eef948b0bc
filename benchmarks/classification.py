"""The tables of docs/results/classification.md: what image classifiers lose, and gain, by becoming shifts and adds.

    python benchmarks/classification.py train --data grocery_fruit --model deit --recipe moe --seed 0
    python benchmarks/classification.py all
    python benchmarks/classification.py rounding --data grocery_fruit --model deit
    python benchmarks/classification.py speed
    python benchmarks/classification.py report

The first measures one cell of accuracy, the second every cell that no JSON file in docs/results/data/ holds yet. The
third measures what rounded activations cost a model that `train` left in outputs/. The fourth measures how long frozen
models take on this CPU. The last makes docs/results/classification.md from these files alone.
Pictures are looked for in the folders that $SHIFTADD3D_PICTURES names.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reporting import (
    DATA,
    NOT_MEASURED,
    OUTPUTS,
    code_digest,
    command_block,
    git_commit,
    machine_facts,
    machine_list,
    markdown_table,
    refuse_old,
    run_command,
    start_again_keeping_memory,
    write_page,
    write_result,
)

from shiftadd3d._errors import UserError
from shiftadd3d.vision.settings import DataSettings, FinetuneSettings, StageSettings

if TYPE_CHECKING:  # it takes seconds to import, and `report` needs none of it
    from torch import Tensor

PICTURES_VARIABLE = "SHIFTADD3D_PICTURES"

DataName = Literal["digits", "grocery_fruit", "cifar10"]
ModelName = Literal["deit", "pvt"]
RecipeName = Literal["mult", "add", "add+shift-attn", "add+shift", "add+shift-attn+moe", "moe"]
DATA_NAMES: tuple[DataName, ...] = ("digits", "grocery_fruit", "cifar10")
MODEL_NAMES: tuple[ModelName, ...] = ("deit", "pvt")
RECIPE_NAMES: tuple[RecipeName, ...] = ("mult", "add", "add+shift-attn", "add+shift", "add+shift-attn+moe", "moe")
SEEDS = (0, 1, 2)
BITS = 4  # of a shift's code, unless it says otherwise: what the recipes have


# --------------------------------------------------------------------------------------------------------------------
# What is measured: sizes that one core trains in minutes
# --------------------------------------------------------------------------------------------------------------------

#: DeiT-tiny's shape, narrower and shallower. Initialisation and pooling suit training from random weights.
_DEIT = ("num_heads=3", "weight_init=jax", "global_pool=avg", "class_token=False")
#: PVT v2-b0's four stages with fewer blocks and channels. Its own spatial reduction, made for 224 px, would leave a
#: single key, or four, and attention to one key is the same whatever it is made of.
_PVT = ("embed_dims=(16,32,80,128)", "depths=(1,1,2,1)")
_PVT_32, _PVT_64 = (*_PVT, "sr_ratios=(2,1,1,1)"), (*_PVT, "sr_ratios=(4,2,1,1)")


def _stage(epochs: int, lr: float) -> StageSettings:
    return StageSettings(epochs=epochs, lr=lr, warmup_epochs=min(2.0, epochs / 4))


def _experiment(
    model: str, args: tuple[str, ...], image_size: int, epochs: tuple[int, int, int], lr: float = 5e-4, **changes
):
    """`lr` is that of stages 1 and 2."""
    return FinetuneSettings(
        model=model,
        model_args=args,
        image_size=image_size,
        batch_size=32,
        stage0=_stage(epochs[0], 1e-3),
        stage1=_stage(epochs[1], lr),
        stage2=_stage(epochs[2], lr),
        **{"min_scale": 0.35, **changes},
    )


EXPERIMENTS: dict[tuple[DataName, ModelName], FinetuneSettings] = {
    ("digits", "deit"): _experiment(
        "deit_tiny_patch16_224", ("patch_size=4", "embed_dim=48", "depth=3", *_DEIT), 16, (16, 6, 6),
        hflip=0.0, min_scale=0.8, color_jitter=0.0,
    ),
    ("digits", "pvt"): _experiment("pvt_v2_b0", _PVT_32, 32, (12, 4, 4), hflip=0.0, min_scale=0.8, color_jitter=0.0),
    ("grocery_fruit", "deit"): _experiment(
        "deit_tiny_patch16_224", ("patch_size=8", "embed_dim=96", "depth=4", *_DEIT), 64, (24, 24, 16), 1e-3,
        val_fraction=0.25,
    ),
    ("grocery_fruit", "pvt"): _experiment("pvt_v2_b0", _PVT_64, 64, (24, 24, 16), 1e-3, val_fraction=0.25),
    ("cifar10", "deit"): _experiment(
        "deit_tiny_patch16_224", ("patch_size=4", "embed_dim=48", "depth=3", *_DEIT), 32, (10, 8, 6), 1e-3,
        val_fraction=0.2,
    ),
    ("cifar10", "pvt"): _experiment("pvt_v2_b0", _PVT_32, 32, (10, 8, 6), 1e-3, val_fraction=0.2),
}  # fmt: skip

#: Where each set lies below a folder of $SHIFTADD3D_PICTURES.
PLACES: dict[DataName, tuple[str, ...]] = {
    "grocery_fruit": ("grocery_fruit",),
    "cifar10": ("cifar10_jpeg/train.zip", "cifar10/train.zip", "cifar10"),
}


def find_pictures(name: DataName) -> Path | None:
    """Where a set lies; None for the embedded one.

    Raises:
        UserError: it is nowhere.
    """
    if name not in PLACES:
        return None
    folders = [Path(folder) for folder in os.environ.get(PICTURES_VARIABLE, "").split(os.pathsep) if folder]
    for folder in folders:
        for place in PLACES[name]:
            if (folder / place).exists():
                return folder / place
    raise UserError(f"--data {name}: no {PLACES[name][0]} in a folder that ${PICTURES_VARIABLE} names")


def with_bits(recipe: str, bits: int) -> str:
    """A name of the recipe with codes of so many bits: `moe`, or `moe-2bits`."""
    return recipe if bits == BITS else f"{recipe}-{bits}bits"


def trained_folder(data: str, model: str, seed: int) -> Path:
    """Where `train` leaves the models of all recipes that share one dense model."""
    return OUTPUTS / "classification" / f"{data}-{model}-{seed}"


def result_path(folder: Path, data: str, model: str, recipe: str, seed: int, bits: int = BITS) -> Path:
    return folder / f"classification-{data}-{model}-{with_bits(recipe, bits)}-{seed}.json"


@dataclass
class Train:
    """Measure one cell: a dense model that all recipes of a seed share, then as many epochs for every recipe."""

    data: DataName = "digits"
    """The pictures."""
    model: ModelName = "deit"
    """The model."""
    recipe: RecipeName = "add+shift-attn+moe"
    """What it becomes; mult goes on training the dense one."""
    seed: int = 0
    """Seed of weights, order and augmentation. The validation pictures are the same for every seed."""
    bits: int = BITS
    """Bits of a shift's code, for recipes with shifts."""
    threads: int = 1
    """CPU threads to compute with."""
    out: Path = DATA
    """Folder for the JSON file."""

    def __call__(self) -> None:
        import torch
        from rich.console import Console

        from shiftadd3d.nn import Recipe, count_operations, reparameterize_
        from shiftadd3d.vision.checkpoint import ClassifierConfig, create_dense, load
        from shiftadd3d.vision.data import InputConfig, open_data, seed_everything
        from shiftadd3d.vision.engine import train

        if self.bits != BITS and self.recipe in ("mult", "add"):
            raise UserError(f"--bits {self.bits}: recipe {self.recipe!r} has no shifts; take one that has")
        commit = git_commit()  # now: it may move on while this runs
        torch.set_num_threads(self.threads)
        settings = replace(EXPERIMENTS[self.data, self.model], data=find_pictures(self.data), seed=self.seed)
        pictures = open_data(DataSettings(settings.data, val_fraction=settings.val_fraction))
        console = Console()
        console.print(pictures.describe(), highlight=False)
        config = ClassifierConfig(
            settings.model, pictures.classes, InputConfig(settings.image_size), settings.parsed_model_args()
        )
        folder = trained_folder(self.data, self.model, self.seed)

        seed_everything(self.seed)
        start = train(
            create_dense(config),
            pictures,
            config,
            settings.stage0,
            settings,
            folder=folder / "stage0-dense",
            console=console,
        )
        dense = load(folder / "stage0-dense" / "best")
        model = load(folder / "stage0-dense" / "best")

        first, second = Recipe.parse(self.recipe, bits=self.bits).stages()
        both = replace(settings.stage1, epochs=settings.stage1.epochs + settings.stage2.epochs)
        if first is None or second is None:  # all epochs at once
            stages = [(f"{self.recipe}-stage1", first or second, both)]
        else:  # the first stage is the same for all: whoever comes first trains it
            stages = [
                ("stage1-add", first, settings.stage1),
                (f"{with_bits(self.recipe, self.bits)}-stage2", second, settings.stage2),
            ]
        result = start
        for name, recipe, stage in stages:
            if recipe is not None:
                reparameterize_(model, recipe, verbose=False)
                config = replace(config, recipe=recipe)
            console.rule(f"{with_bits(self.recipe, self.bits)}, {name}")
            result = train(
                model,
                pictures,
                config,
                stage,
                settings,
                folder=folder / name,
                console=console,
            )
            model = result.model

        example = torch.zeros(1, 3, settings.image_size, settings.image_size)
        before = count_operations(dense, example)
        shares = list(result.history[-1]["mult_shares"].values())
        after = count_operations(model, example)
        metrics = result.metrics
        facts = {
            "kind": "train",
            "data": self.data,
            "pictures": {"train": len(pictures.train), "val": len(pictures.val)},
            "classes": len(pictures.classes),
            "model": self.model,
            "architecture": settings.model,
            "model_args": list(settings.model_args),
            "image_size": settings.image_size,
            "recipe": self.recipe,
            "bits": self.bits,
            "seed": self.seed,
            "epochs": [settings.stage0.epochs, settings.stage1.epochs, settings.stage2.epochs],
            "start": {"top1": start.metrics.top1, "loss": start.metrics.loss},
            "top1": metrics.top1,
            "top5": metrics.top5,
            "loss": metrics.loss,
            "calibration_error": metrics.calibration_error,
            "history": result.history,
            "mult_share": sum(shares) / len(shares) if shares else None,
            "multiplications_removed": after.multiplications_removed(before),
            "bytes": after.bytes,
            "bytes_dense": before.bytes,
            "threads": self.threads,
            "machine": machine_facts(),
            "commit": commit,
            "command": self._command(),
        }
        write_result(result_path(self.out, self.data, self.model, self.recipe, self.seed, self.bits), facts)
        name = with_bits(self.recipe, self.bits)
        print(f"{self.data}, {self.model}, {name}, seed {self.seed}: top-1 {metrics.top1:.2%}")

    def _command(self) -> str:
        words = ["--data", self.data, "--model", self.model, "--recipe", self.recipe, "--seed", str(self.seed)]
        words += [] if self.bits == BITS else ["--bits", str(self.bits)]
        return shlex.join(["python", "benchmarks/classification.py", "train", *words, "--threads", str(self.threads)])


@dataclass
class All:
    """Measure every cell that has no JSON file yet, one after the other."""

    data: tuple[DataName, ...] = DATA_NAMES
    """The pictures."""
    models: tuple[ModelName, ...] = MODEL_NAMES
    """The models."""
    recipes: tuple[RecipeName, ...] = RECIPE_NAMES
    """The recipes."""
    seeds: tuple[int, ...] = SEEDS
    """The seeds."""
    bits: int = BITS
    """Bits of a shift's code. With others than the recipes have, give recipes with shifts."""
    threads: int = 1
    """CPU threads to compute with."""
    out: Path = DATA
    """Folder for the JSON files."""

    def __call__(self) -> None:
        for seed in self.seeds:  # a first seed of everything comes before a second of anything
            for data in self.data:
                for model in self.models:
                    for recipe in self.recipes:
                        if not result_path(self.out, data, model, recipe, seed, self.bits).exists():
                            Train(data, model, recipe, seed, self.bits, self.threads, self.out)()


# --------------------------------------------------------------------------------------------------------------------
# Rounding
# --------------------------------------------------------------------------------------------------------------------

ROUNDINGS: tuple[Literal["exact", "fast", "int8"], ...] = ("exact", "fast", "int8")


@dataclass
class Rounding:
    """Measure what rounding costs a trained model: top-1 of its executable in float32 and with rounded activations.

    `train` with the same arguments comes first. It leaves the model in outputs/.
    """

    data: DataName = "grocery_fruit"
    """The pictures."""
    model: ModelName = "deit"
    """The model."""
    recipe: RecipeName = "add+shift"
    """What it became, in two stages."""
    seed: int = 0
    """Seed that it was trained with."""
    out: Path = DATA
    """Folder for the JSON file."""

    def __call__(self) -> None:
        from rich.console import Console

        from shiftadd3d.vision.evaluate import evaluate_classifier
        from shiftadd3d.vision.export import export_classifier

        commit, settings = git_commit(), EXPERIMENTS[self.data, self.model]
        folder = trained_folder(self.data, self.model, self.seed)
        trained = folder / f"{self.recipe}-stage2" / "best"
        if not trained.exists():
            raise UserError(
                f"no {trained}; first run `python benchmarks/classification.py train` with these arguments, and a "
                "recipe of two stages"
            )
        packed = folder / f"{self.recipe}-packed"
        export_classifier(trained, packed, formats=["packed"])
        pictures = DataSettings(find_pictures(self.data), val_fraction=settings.val_fraction)
        console = Console()
        measured = {
            kind: evaluate_classifier(packed / "packed", pictures, numerics=kind, console=console) for kind in ROUNDINGS
        }
        if not all(facts["compiled"] for facts in measured.values()):
            raise UserError(f"{packed}: some numerics could not be compiled; expected an executable for each of them")
        words = ["--data", self.data, "--model", self.model, "--recipe", self.recipe, "--seed", str(self.seed)]
        facts = {
            "kind": "rounding",
            "data": self.data,
            "pictures": measured["exact"]["count"],
            "model": self.model,
            "recipe": self.recipe,
            "seed": self.seed,
            "top1": {kind: facts["top1"] for kind, facts in measured.items()},
            "loss": {kind: facts["loss"] for kind, facts in measured.items()},
            "machine": machine_facts(),
            "commit": commit,
            "command": shlex.join(["python", "benchmarks/classification.py", "rounding", *words]),
        }
        write_result(self.out / f"rounding-{self.data}-{self.model}-{self.recipe}-{self.seed}.json", facts)
        print(", ".join(f"{kind}: top-1 {top1:.2%}" for kind, top1 in facts["top1"].items()))


# --------------------------------------------------------------------------------------------------------------------
# Speed
# --------------------------------------------------------------------------------------------------------------------

SPEED_MODELS = ("deit_tiny_patch16_224", "pvt_v2_b0")
SPEED_RECIPES: tuple[RecipeName, ...] = ("add+shift", "add+shift-attn+moe")
SPEED_FILES = {False: "classification-speed.json", True: "classification-speed-kept-memory.json"}
Baseline = Literal["eager", "compile", "bfloat16", "int8"]
BASELINES: dict[Baseline, str] = {
    "eager": "timm, float32, eager",
    "compile": "timm, float32, torch.compile",
    "bfloat16": "timm, bfloat16, torch.compile",
    "int8": "timm, torchao int8, torch.compile",
}
COMPILED: tuple[Baseline, ...] = ("compile", "bfloat16", "int8")
OPERATIONS = 12  # that a breakdown names


@dataclass
class Speed:
    """Measure how long frozen models take, against timm's originals. Weights are random: they cost what others do."""

    models: tuple[str, ...] = SPEED_MODELS
    """timm's names."""
    batches: tuple[int, ...] = (1, 32)
    """Pictures at once, of 224 px."""
    recipes: tuple[RecipeName, ...] = SPEED_RECIPES
    """What the models become."""
    against: tuple[Baseline, ...] = tuple(BASELINES)
    """Which of timm's forms to compare with. Compiling takes a minute for each model and batch."""
    numerics: tuple[Literal["exact", "fast", "int8"], ...] = ("exact",)
    """What the kernels compute in: float32 throughout, or activations rounded on the way in."""
    rounds: int = 7
    """Rounds that all take turns in, 2 or more, after untimed runs; the median counts."""
    threads: int = 1
    """CPU threads to compute with."""
    keep_memory: bool = False
    """Let the C library (glibc) keep memory for large tensors, as other allocators do."""
    out: Path = DATA
    """Folder for the JSON file."""

    def __call__(self) -> None:
        if self.keep_memory:
            start_again_keeping_memory()
        import torch

        commit = git_commit()  # now: it may move on while this runs
        torch.set_num_threads(self.threads)
        rows = [self._measure(model, batch) for model in self.models for batch in self.batches]
        options = {
            "--models": self.models,
            "--batches": self.batches,
            "--recipes": self.recipes,
            "--against": self.against,
            "--numerics": self.numerics,
            "--rounds": (self.rounds,),
            "--threads": (self.threads,),
        }
        words = [word for name, values in options.items() for word in (name, *map(str, values))]
        words += ["--keep-memory"] if self.keep_memory else []
        facts = {
            "kind": "speed",
            "rows": rows,
            "threads": self.threads,
            "keep_memory": self.keep_memory,
            "rounds": self.rounds,
            "machine": machine_facts(),
            "commit": commit,
            "code": code_digest(),
            "command": shlex.join(["python", "benchmarks/classification.py", "speed", *words]),
        }
        write_result(self.out / SPEED_FILES[self.keep_memory], facts)

    def _measure(self, name: str, batch: int) -> dict[str, Any]:
        import torch

        from shiftadd3d.profile.timing import interleaved

        images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        solutions = speed_solutions(name, self.against, self.recipes, self.numerics)
        with torch.inference_mode():
            for solution, run in solutions.items():
                run(images)
                print(f"{name}, batch {batch}: {solution} is ready", flush=True)
            ready = {solution: partial(run, images) for solution, run in solutions.items()}
            times = interleaved(ready, rounds=self.rounds)
            compiled = [BASELINES[form] for form in COMPILED]  # a profiler sees next to nothing of them
            breakdowns = {
                solution: operation_times(run, images)
                for solution, run in solutions.items()
                if solution not in compiled
            }
        median = {solution: float(f"{1000 * found.median:.4g}") for solution, found in times.items()}
        print(median, flush=True)
        return {"model": name, "batch": batch, "ms": median, "breakdown": breakdowns}


def speed_solutions(
    name: str, against: tuple[Baseline, ...], recipes: tuple[RecipeName, ...], numerics: tuple[str, ...]
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Ways to run a model, by name, each from images [B, 3, 224, 224] in float32 to logits."""
    import timm
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    from shiftadd3d.kernels import numerics as in_numerics
    from shiftadd3d.nn import freeze_

    solutions: dict[str, Callable[[Tensor], Tensor]] = {}
    for baseline in against:
        model = timm.create_model(name).eval()
        if baseline == "int8":
            quantize_(model, Int8DynamicActivationInt8WeightConfig())
        if baseline == "bfloat16":
            model = model.bfloat16()
        if baseline in COMPILED:
            model = torch.compile(model, dynamic=False)
        dtype = torch.bfloat16 if baseline == "bfloat16" else torch.float32
        solutions[BASELINES[baseline]] = lambda images, model=model, dtype=dtype: model(images.to(dtype))
    for recipe in recipes:
        torch.manual_seed(0)
        model = timm.create_model(f"shiftadd_{name}", recipe=recipe).eval()
        freeze_(model, verbose=False)
        for name_of_numerics in numerics:
            suffix = "" if name_of_numerics == "exact" else f", {name_of_numerics}"
            solutions[f"shiftadd, {recipe}{suffix}"] = in_numerics(name_of_numerics)(model)
    return solutions


def operation_times(run: Callable[[Tensor], Tensor], images: Tensor) -> list[dict[str, Any]]:
    """Where the processor time of one run goes: share and calls of the operations that take most, and the rest."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run(images)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    shares = [
        {"name": event.key, "share": round(event.self_cpu_time_total / total, 4), "calls": event.count}
        for event in events
    ]
    rest = shares[OPERATIONS:]
    share, calls = (sum(other[key] for other in rest) for key in ("share", "calls"))
    return [*shares[:OPERATIONS], {"name": "the rest", "share": round(share, 4), "calls": calls}]


# --------------------------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """Make docs/results/classification.md from the JSON files."""

    old: bool = False
    """Show speeds of code that has changed since, too."""

    def __call__(self) -> None:
        if not self.old:
            refuse_old(DATA / name for name in SPEED_FILES.values())
        results, speeds = read_results(DATA), read_speeds(DATA)
        roundings = read_roundings(DATA)
        write_page("classification", lambda template: render_report(results, template, speeds, roundings))


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The results of training in a folder, in the order of the report."""
    paths = [path for path in folder.glob("classification-*.json") if path.name not in SPEED_FILES.values()]
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    order = (DATA_NAMES, MODEL_NAMES, RECIPE_NAMES)

    def place(facts: dict[str, Any]) -> tuple[int, ...]:
        keys = (facts["data"], facts["model"], facts["recipe"])
        ranks = (names.index(key) for names, key in zip(order, keys, strict=True))
        return (*ranks, -bits_of(facts), facts["seed"])

    return sorted(results, key=place)


def read_roundings(folder: Path) -> list[dict[str, Any]]:
    """What `rounding` wrote into a folder."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("rounding-*.json"))]


def bits_of(facts: dict[str, Any]) -> int:
    """Bits of a shift's code in a result of training; the older ones do not say."""
    return facts.get("bits", BITS)


def read_speeds(folder: Path) -> dict[bool, dict[str, Any]]:
    """What `speed` wrote into a folder, without and with `keep_memory`."""
    paths = {kept: folder / name for kept, name in SPEED_FILES.items()}
    return {kept: json.loads(path.read_text(encoding="utf-8")) for kept, path in paths.items() if path.exists()}


def render_report(
    results: list[dict[str, Any]],
    template: str,
    speeds: Mapping[bool, dict[str, Any]] | None = None,
    roundings: Sequence[dict[str, Any]] = (),
) -> str:
    """Fill a template's `{{name}}` fields in from the results of training, of rounding and of speed.

    Raises:
        KeyError: the template has a field that there is no table for.
    """
    speeds = speeds or {}
    measured = [*results, *roundings, *speeds.values()]
    fields = {
        "accuracy": accuracy_tables([facts for facts in results if bits_of(facts) == BITS]),
        "coarse_codes": coarse_tables(results),
        "rounding": rounding_table(roundings),
        "experiments": experiment_table(results),
        "speed": speed_table(speeds.get(False)),
        "speed_kept_memory": speed_table(speeds.get(True)),
        "breakdown": breakdown_tables(speeds.get(False)),
        "commands": command_block("classification", measured),
        "machines": machine_list(measured),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match.group(1)], template)


def by_cell(results: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, list[dict[str, Any]]]]:
    """Results by (data, model), then by recipe: one for each seed."""
    cells: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for facts in results:
        cells.setdefault((facts["data"], facts["model"]), {}).setdefault(facts["recipe"], []).append(facts)
    return cells


def coarse_tables(results: list[dict[str, Any]]) -> str:
    """The tables of codes with other numbers of bits, beside the dense models that they started from."""
    blocks = []
    for bits in sorted({bits_of(facts) for facts in results} - {BITS}, reverse=True):
        coarse = [facts for facts in results if bits_of(facts) == bits]
        cells = by_cell(coarse)
        dense = [facts for facts in results if facts["recipe"] == "mult" and (facts["data"], facts["model"]) in cells]
        blocks.append(accuracy_tables([*dense, *coarse], f", {bits} bits"))
    return "\n\n".join(blocks) or NOT_MEASURED


def accuracy_tables(results: list[dict[str, Any]], suffix: str = "") -> str:
    """A table for each (data, model); `suffix` is added to their titles."""
    blocks = []
    for (data, model), recipes in by_cell(results).items():
        rows = [accuracy_row(recipe, seeds, recipes.get("mult", [])) for recipe, seeds in recipes.items()]
        header = [
            f"{data}, {model}{suffix}",
            "top-1, %",
            "against dense, points",
            "loss",
            "seeds",
            "multiplications removed",
            "MB frozen",
            "tokens to mult",
        ]
        blocks.append(markdown_table(header, rows) + verdict(recipes))
    return "\n\n".join(blocks) or NOT_MEASURED


def accuracy_row(recipe: str, seeds: list[dict[str, Any]], dense: list[dict[str, Any]]) -> list[str]:
    shares = [facts["mult_share"] for facts in seeds if facts["mult_share"] is not None]
    return [
        "`mult` (dense)" if recipe == "mult" else f"`{recipe}`",
        spread([100 * facts["top1"] for facts in seeds], 1),
        "" if recipe == "mult" or not dense else spread(points(seeds, dense), 1, sign=True),
        spread([facts["loss"] for facts in seeds], 3),
        str(len(seeds)),
        f"{statistics.mean(facts['multiplications_removed'] for facts in seeds):.1%}",
        f"{statistics.mean(facts['bytes'] for facts in seeds) / 1e6:.2f}",
        f"{statistics.mean(shares):.0%}" if shares else "",
    ]


def differences(seeds: list[dict[str, Any]], others: list[dict[str, Any]], measure: str) -> list[float]:
    """What each seed gains in a measure over the other model of the same seed, where both were trained."""
    baseline = {facts["seed"]: facts[measure] for facts in others}
    return [facts[measure] - baseline[facts["seed"]] for facts in seeds if facts["seed"] in baseline]


def points(seeds: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[float]:
    """Differences of top-1 in points."""
    return [100 * difference for difference in differences(seeds, others, "top1")]


def spread(values: list[float], digits: int, sign: bool = False) -> str:
    """Mean, and the standard deviation over the seeds where there are several."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):{'+' if sign else ''}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def verdict(recipes: dict[str, list[dict[str, Any]]]) -> str:
    """Which changed model comes nearest to the dense one, and whether mixtures beat shifts, within common seeds."""
    from shiftadd3d.nn import RECIPES

    dense, shifts = recipes.get("mult", []), recipes.get("add+shift", [])
    gains = {recipe: points(seeds, dense) for recipe, seeds in recipes.items() if recipe != "mult"}
    gains = {recipe: gain for recipe, gain in gains.items() if gain}
    if not gains:
        return ""
    best = max(gains, key=lambda recipe: statistics.mean(gains[recipe]))
    text = f"\n\nBest: `{best}`, {statistics.mean(gains[best]):+.1f} points against dense."
    found = [
        f"`{recipe}` {spread(points(seeds, shifts), 1, sign=True)} points"
        f" and {spread(differences(seeds, shifts, 'loss'), 3, sign=True)} loss"
        for recipe, seeds in recipes.items()
        if RECIPES[recipe].has_mixtures and points(seeds, shifts)
    ]
    return text + (f" Mixtures against `add+shift`: {', '.join(found)}." if found else "")


def rounding_table(roundings: Sequence[dict[str, Any]]) -> str:
    """Rows: trained models; columns: top-1 in float32, and what rounded activations change, in points and pictures."""
    rows = []
    for facts in roundings:
        exact = facts["top1"]["exact"]
        changes = [facts["top1"][kind] - exact for kind in ROUNDINGS[1:]]
        rows.append(
            [
                f"{facts['data']}, {facts['model']}, `{facts['recipe']}`, seed {facts['seed']}",
                f"{facts['pictures']:,}",
                f"{100 * exact:.2f}",
                *(f"{100 * change:+.2f} ({round(change * facts['pictures']):+d})" for change in changes),
            ]
        )
    header = ["", "pictures", "exact, %", *(f"{kind}, points (pictures)" for kind in ROUNDINGS[1:])]
    return markdown_table(header, rows) if rows else NOT_MEASURED


def experiment_table(results: list[dict[str, Any]]) -> str:
    """The sizes of each experiment."""
    rows = []
    for (data, model), recipes in by_cell(results).items():
        facts = next(run for runs in recipes.values() for run in runs)
        rows.append(
            [
                f"{data}, {model}: `{facts['architecture']}` {' '.join(facts['model_args'])}",
                f"{facts['pictures']['train']:,} / {facts['pictures']['val']:,}",
                str(facts["classes"]),
                str(facts["image_size"]),
                " + ".join(str(epochs) for epochs in facts["epochs"]),
            ]
        )
    header = ["experiment", "pictures, train / val", "classes", "px", "epochs"]
    return markdown_table(header, rows)


def speed_table(speed: dict[str, Any] | None) -> str:
    """Milliseconds of each solution, and how many times faster than timm's each of ours is."""
    if speed is None:
        return NOT_MEASURED
    baselines = [solution for solution in BASELINES.values() if solution in speed["rows"][0]["ms"]]
    rows = []
    for row in speed["rows"]:
        for solution, ms in row["ms"].items():
            ratios = ["" if solution in baselines else f"{row['ms'][baseline] / ms:.2f}" for baseline in baselines]
            rows.append([f"{row['model']}, batch {row['batch']}: {solution}", f"{ms:,.1f}", *ratios])
    return markdown_table(["", "ms", *(f"times faster than {baseline}" for baseline in baselines)], rows)


def breakdown_tables(speed: dict[str, Any] | None) -> str:
    """Where the time goes: one table a model, batch and solution."""
    if speed is None:
        return NOT_MEASURED
    blocks = []
    for row in speed["rows"]:
        for solution, operations in row["breakdown"].items():
            header = [f"{row['model']}, batch {row['batch']}: {solution}", "share", "calls"]
            lines = [
                [f"`{operation['name']}`" if ":" in operation["name"] else operation["name"],
                 f"{operation['share']:.1%}", f"{operation['calls']:,}"]
                for operation in operations
            ]  # fmt: skip
            blocks.append(markdown_table(header, lines))
    return "\n\n".join(blocks)


def main() -> None:
    run_command(
        {"train": Train, "all": All, "rounding": Rounding, "speed": Speed, "report": Report},
        __doc__,
    )


if __name__ == "__main__":
    main()
