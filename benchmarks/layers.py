"""The tables of docs/results/layers.md: what a model loses when its layers become shifts, additions and mixtures.

    python benchmarks/layers.py classifier --data PATH/TO/cifar10_jpeg/train.zip --val-fraction 0.2
    python benchmarks/layers.py classifier --data PATH/TO/grocery_fruit --model pvt_v2_b0 --val-fraction 0.3
    python benchmarks/layers.py nerf --run PATH/TO/gnt-tiny/config.yml
    python benchmarks/layers.py report

The first three train a model with multiplications (or load it) and measure each recipe three times: rounded to the
nearest powers of two, calibrated, and fine-tuned from there. They write JSON files into docs/results/data/; the last
one makes docs/results/layers.md from these alone.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from reporting import (
    DATA,
    NOT_MEASURED,
    OUTPUTS,
    command_block,
    git_commit,
    machine_facts,
    machine_list,
    markdown_table,
    run_command,
    write_page,
    write_result,
)

if TYPE_CHECKING:  # these take seconds to import, and `report` needs none of them
    from torch import nn

    from shiftadd3d.nn import OperationReport, Recipe


# --------------------------------------------------------------------------------------------------------------------
# What is measured of every model
# --------------------------------------------------------------------------------------------------------------------


def recipes(*, dwconv: int) -> list[Recipe]:
    """The rows of the tables. `dwconv`: kernel size of the convolution on the values of additive attention."""
    from shiftadd3d.nn import Recipe, recipe

    shift = Recipe("shift", attention_linear="shift", mlp="shift", other_linear="shift")
    return [
        shift,
        replace(shift, name="shift, 3 bits", bits=3),
        replace(shift, name="shift, two terms", terms=2),
        recipe("add", dwconv=dwconv, binarizer="hash"),
        recipe("add+shift", dwconv=dwconv, binarizer="hash"),
        recipe("add+shift-attn+moe", dwconv=dwconv, binarizer="hash"),
    ]


SEARCHED_BUDGET = 0.5
"""Energy of the searched recipe, as a share of the model's with multiplications."""


@dataclass
class Subject:
    """A trained model with multiplications, and all that measuring it takes."""

    model: nn.Module
    """Maps batches to outputs by `forward`."""
    batches: list[Any]
    """What calibration sees; taken from the training set."""
    forward: Callable[[nn.Module, Any], Any]
    exclude: tuple[str, ...]
    """Names of layers that keep their multiplications, as in `Recipe`."""
    score: Callable[[nn.Module], float]
    """How good a model is, on held-out data."""
    divergence: Callable[[nn.Module], float] | None
    """How far its outputs there are from those of `model`, where that says more than the score."""
    finetune: Callable[[nn.Module, Recipe], nn.Module]
    """Trains a reparameterized model a little further."""
    inputs: int
    """Inputs in a batch."""
    dwconv: int

    def operations(self, model: nn.Module) -> OperationReport:
        """Counted on the first batch."""
        from shiftadd3d.nn import count_operations

        return count_operations(model, self.batches[0], forward=self.forward, inputs=self.inputs)


def measure(subject: Subject, on_row: Callable[[dict[str, Any]], None], times: bool = True) -> None:
    """Measure every recipe; `on_row` gets the facts so far after each.

    Args:
        subject: what to measure.
        on_row: called after each recipe.
        times: whether facts say how long calibration and the search took. On a machine that does other work, too, they
            would say something else.
    """
    from shiftadd3d.nn import Recipe, Rule, sensitivity
    from shiftadd3d.profile.timing import clock

    baseline = subject.operations(subject.model)
    facts: dict[str, Any] = {
        "float": {
            "score": subject.score(subject.model),
            "bytes": baseline.bytes,
            "mult": round(baseline.mult / baseline.inputs),
            "energy_pj": round(baseline.cost()),
        },
        "calibration_inputs": subject.inputs * len(subject.batches),
        "rows": [],
    }
    print(f"float: {facts['float']}", flush=True)
    for row in recipes(dwconv=subject.dwconv):
        facts["rows"].append(measured_row(subject, row, baseline, times))
        on_row(facts)
    now = clock()
    began = now()
    report = sensitivity(
        subject.model,
        subject.batches,
        (Rule("*", "shift", 4, 1), Rule("*", "shift", 4, 2)),
        base=Recipe(exclude=subject.exclude),
        forward=subject.forward,
        inputs=subject.inputs * len(subject.batches),
        verbose=False,
    )
    searched = report.best_recipe(SEARCHED_BUDGET)
    facts["search"] = {
        **({"seconds": round(now() - began, 1)} if times else {}),
        "estimated_error": round(searched.error, 5),
        "energy_share": round(searched.cost / report.float_cost, 4),
    }
    facts["rows"].append(measured_row(subject, replace(searched.recipe, name="searched"), baseline, times))
    on_row(facts)


def measured_row(subject: Subject, row: Recipe, baseline: OperationReport, times: bool = True) -> dict[str, Any]:
    """What one recipe makes of the model, nearest, calibrated and fine-tuned."""
    from shiftadd3d.nn import calibrate_, reparameterize_
    from shiftadd3d.profile.timing import clock

    row = replace(row, exclude=subject.exclude)
    nearest = copy.deepcopy(subject.model)
    reparameterize_(nearest, row, verbose=False)
    calibrated = copy.deepcopy(subject.model)
    now = clock()
    began = now()
    calibrate_(calibrated, subject.batches, row, forward=subject.forward, verbose=False)
    seconds = now() - began
    operations = subject.operations(calibrated)
    untuned = {"nearest": nearest, "calibrated": calibrated}
    found = {
        "name": row.name,
        "recipe": row.as_dict(),
        "nearest": subject.score(nearest),
        "calibrated": subject.score(calibrated),
        "finetuned": subject.score(subject.finetune(calibrated, row)),
        "multiplications_removed": round(operations.multiplications_removed(baseline), 4),
        "energy_share": round(operations.cost() / baseline.cost(), 4),
        "bytes": operations.bytes,
        **({"calibration_seconds": round(seconds, 1)} if times else {}),
        "divergence": subject.divergence
        and {name: round(subject.divergence(each), 6) for name, each in untuned.items()},
    }
    print({key: value for key, value in found.items() if key != "recipe"}, flush=True)
    return found


def own_options(command: Any, options: tuple[str, ...]) -> list[str]:
    """Those of a command's options that have not their default value, as words of its command line."""
    words: list[str] = []
    for option in options:
        value, name = getattr(command, option), option.replace("_", "-")
        if value == type(command).__dataclass_fields__[option].default:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def use_threads(threads: int) -> None:
    os.environ.setdefault("TVM_NUM_THREADS", str(threads))
    import torch

    torch.set_num_threads(threads)


# --------------------------------------------------------------------------------------------------------------------
# Classifiers
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Classifier:
    """Train a timm classifier from random weights, and measure what each recipe makes of it."""

    data: Path
    """An ImageFolder, or a .zip of one."""
    model: str = "deit_tiny_patch16_224"
    """timm's name of the model."""
    model_args: tuple[str, ...] = ()
    """Arguments for the model, as KEY=VALUE."""
    image_size: int = 32
    """Pixels on a side of what the model sees."""
    val_fraction: float = 0.2
    """Share of the training pictures that is held out and scores are taken on."""
    epochs: int = 8
    """Passes over the training pictures."""
    lr: float = 1e-3
    """Learning rate of the training."""
    finetune_epochs: int = 2
    """Passes over the training pictures after calibration."""
    finetune_lr: float = 2e-4
    """Learning rate of the fine-tuning."""
    calibration_pictures: int = 256
    """Training pictures that calibration sees."""
    times: bool = True
    """Say how long calibration and the search took, too. `--no-times` where other programs run meanwhile."""
    threads: int = 1
    """CPU threads to compute with."""
    out: Path = DATA
    """Folder for the JSON file."""

    def __call__(self) -> None:
        commit = git_commit()  # now: it may move on while this runs
        use_threads(self.threads)
        import torch
        import torch.nn.functional as F

        from shiftadd3d.vision.checkpoint import ClassifierConfig, create_dense
        from shiftadd3d.vision.data import InputConfig, PictureSet, eval_loader, open_data, seed_everything
        from shiftadd3d.vision.distributed import choose_device, this_process
        from shiftadd3d.vision.engine import evaluate, train
        from shiftadd3d.vision.settings import DataSettings, StageSettings, TrainSettings, parse_key_values

        data = open_data(DataSettings(data=self.data, val_fraction=self.val_fraction))
        args = parse_key_values("--model-args", self.model_args)
        config = ClassifierConfig(self.model, data.classes, InputConfig(self.image_size, crop_pct=1.0), args)
        settings = TrainSettings(batch_size=64, min_scale=0.5, color_jitter=0.2, workers=0)
        name = f"{self.data.parent.name if self.data.suffix == '.zip' else self.data.name}-{self.model}"
        # A training that was interrupted goes on there: other settings, another folder.
        folder = OUTPUTS / "layers" / "-".join((name, *self.model_args, f"{self.image_size}px", f"{self.epochs}epochs"))
        seed_everything(0)
        trained = train(
            create_dense(config), data, config, StageSettings(self.epochs, self.lr), settings, folder=folder
        )
        device = choose_device(settings.device)
        step = max(1, len(data.train) // self.calibration_pictures)
        seen = PictureSet(data.train.source, data.train.indices[::step][: self.calibration_pictures], data.classes)

        def finetune(model: nn.Module, recipe: Recipe) -> nn.Module:
            stage = StageSettings(self.finetune_epochs, self.finetune_lr, warmup_epochs=0.5)
            return train(copy.deepcopy(model), data, config, stage, settings).model

        def probabilities(model: nn.Module) -> list[torch.Tensor]:
            loader = eval_loader(data.val, config.input, 64, 0, device, *this_process())
            with torch.no_grad():
                return [model.eval()(images).log_softmax(-1) for images, _ in loader]

        expected = probabilities(trained.model)

        def divergence(model: nn.Module) -> float:
            pairs = zip(probabilities(model), expected, strict=True)
            sums = [F.kl_div(found, wanted, reduction="sum", log_target=True).item() for found, wanted in pairs]
            return sum(sums) / len(data.val)

        subject = Subject(
            model=trained.model,
            batches=[images for images, _ in eval_loader(seen, config.input, 64, 0, device, *this_process())],
            forward=lambda model, images: model(images),
            exclude=(),
            score=lambda model: round(evaluate(model, data.val, config.input, workers=0).top1, 4),
            divergence=divergence,
            finetune=finetune,
            inputs=64,
            dwconv=3,
        )
        words = ["python", "benchmarks/layers.py", "classifier", "--data", f"PATH/TO/{'/'.join(self.data.parts[-2:])}"]
        words += own_options(
            self, ("model", "model_args", "image_size", "val_fraction", "epochs", "finetune_epochs", "times")
        )
        about = {
            "kind": "classifier",
            "metric": "top-1",
            "data": name.removesuffix(f"-{self.model}"),
            "model": " ".join((self.model, *self.model_args)),
            "parameters": sum(parameter.numel() for parameter in trained.model.parameters()),
            "image_size": self.image_size,
            "pictures": {"train": len(data.train), "val": len(data.val)},
            "epochs": self.epochs,
            "finetune": f"{self.finetune_epochs} epochs",
            "machine": machine_facts(),
            "commit": commit,
            "command": shlex.join(words),
        }
        measure(subject, lambda facts: write_result(self.out / f"layers-{name}.json", {**about, **facts}), self.times)


# --------------------------------------------------------------------------------------------------------------------
# NeRF
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Nerf:
    """Measure what each recipe makes of a trained `gnt-tiny`, on the test views of its scene."""

    run: Path
    """config.yml of a trained `gnt-tiny`: of `ns-train`, or of benchmarks/nerf.py in outputs/benchmarks."""
    finetune_steps: int = 150
    """Training steps after calibration."""
    finetune_lr: float = 3e-4
    """Learning rate of the fine-tuning; a cosine ends at 1% of it."""
    calibration_views: int = 8
    """Training views that calibration sees rays of, as many of each as a training step."""
    test_views: int | None = None
    """Test views that scores are taken on, evenly spread; None for all."""
    times: bool = True
    """Say how long calibration and the search took, too. `--no-times` where other programs run meanwhile."""
    threads: int = 1
    """CPU threads to compute with."""
    out: Path = DATA
    """Folder for the JSON file."""

    def __call__(self) -> None:
        commit = git_commit()  # now: it may move on while this runs
        use_threads(self.threads)
        import torch
        from nerf import evaluate, seed_everything

        from shiftadd3d.models.gnt import GNTModel
        from shiftadd3d.models.gnt.presets import KEPT_IN_FLOAT
        from shiftadd3d.nerf.pipeline import GNTPipelineConfig
        from shiftadd3d.nerf.runs import load_run
        from shiftadd3d.nerf.warm_start import load_dense_weights
        from shiftadd3d.nn import collect_moe_losses

        run = load_run(self.run)
        pipeline = run.pipeline
        nerf = pipeline.model
        nerf.gnt = GNTModel(nerf.config.gnt).eval()  # the run's own is frozen: there is no way back from that
        load_dense_weights(nerf.gnt, run.checkpoint)
        seed_everything(0)
        layers = [name for name, _ in nerf.gnt.named_modules()]
        kept = tuple(pattern for pattern in KEPT_IN_FLOAT if fnmatch.filter(layers, pattern))

        def rays() -> dict[str, Any]:
            bundle, _ = pipeline.datamanager.next_train(0)
            with torch.no_grad():
                sources = nerf._sources(bundle.metadata["source_ids"][0])
            directions = bundle.directions * bundle.metadata["directions_norm"]
            return {"sources": sources, "origins": bundle.origins, "directions": directions}

        def forward(gnt: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
            near, far = nerf.near_far.tolist()
            config = nerf.config
            return gnt(**batch, near=near, far=far, num_samples=config.num_samples, inverse_depth=config.inverse_depth)[
                "rgb"
            ]

        def score(gnt: nn.Module) -> float:
            nerf.gnt = cast(GNTModel, copy.deepcopy(gnt))
            nerf.freeze()  # as whatever loads a run to render with
            return evaluate(pipeline, OUTPUTS / "layers" / "last-nerf.png", views=self.test_views)["psnr"]

        def finetune(gnt: nn.Module, recipe: Recipe) -> nn.Module:
            tuned = nerf.gnt = cast(GNTModel, copy.deepcopy(gnt))
            seed_everything(0)
            optimizer = torch.optim.Adam(nerf.gnt.parameters(), lr=self.finetune_lr)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
                optimizer, self.finetune_steps, eta_min=self.finetune_lr / 100
            )
            pipeline.train()
            for step in range(self.finetune_steps):
                _, losses, _ = pipeline.get_train_loss_dict(step)
                balance = nerf.config.balance_loss_mult * collect_moe_losses(nerf.gnt)
                optimizer.zero_grad()
                (torch.stack(list(losses.values())).sum() + balance).backward()
                optimizer.step()
                schedule.step()
            pipeline.eval()
            return tuned

        dense, held_out = nerf.gnt, len(pipeline.datamanager.eval_dataset)
        subject = Subject(
            model=dense,
            batches=[rays() for _ in range(self.calibration_views)],
            forward=forward,
            exclude=kept,
            score=score,
            divergence=None,
            finetune=finetune,
            inputs=pipeline.datamanager.get_train_rays_per_batch(),
            dwconv=3,
        )
        words = ["python", "benchmarks/layers.py", "nerf", "--run", "PATH/TO/gnt-tiny/config.yml"]
        scene, start = run.config.experiment_name, cast(GNTPipelineConfig, run.config.pipeline).warm_start
        about = {
            "kind": "nerf",
            "metric": "PSNR",
            "data": scene,
            "model": run.config.method_name,
            "parameters": sum(parameter.numel() for parameter in dense.parameters()),
            "image_size": None,
            "views": {"train": len(pipeline.datamanager.train_dataset), "test": self.test_views or held_out},
            "steps": run.step + 1,  # the first one is step 0
            "start": start.name if start else "none",
            "finetune": f"{self.finetune_steps} steps",
            "machine": machine_facts(),
            "commit": commit,
            "command": shlex.join(
                [*words, *own_options(self, ("finetune_steps", "calibration_views", "test_views", "times"))]
            ),
        }
        path = self.out / f"layers-{scene}-{run.config.method_name}.json"
        measure(subject, lambda facts: write_result(path, {**about, **facts}), self.times)


# --------------------------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """Make docs/results/layers.md from the JSON files."""

    def __call__(self) -> None:
        write_page("layers", lambda template: render_report(read_results(DATA), template))


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder, sorted by file name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("layers-*.json"))]


def render_report(results: list[dict[str, Any]], template: str) -> str:
    """Fill a template's `{{name}}` fields in from the results.

    Raises:
        KeyError: the template has a field that there is no table for.
    """
    classifiers = [facts for facts in results if facts["kind"] == "classifier"]
    fields = {
        "classifiers": "\n\n".join(subject_section(facts) for facts in classifiers) or NOT_MEASURED,
        "nerf": "\n\n".join(subject_section(facts) for facts in results if facts["kind"] == "nerf") or NOT_MEASURED,
        "kept": kept_table(results),
        "searches": search_table(results),
        "commands": command_block("layers", results),
        "machines": machine_list(results),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match.group(1)], template)


def score_text(facts: dict[str, Any], score: float) -> str:
    return f"{score:.1%}" if facts["metric"] == "top-1" else f"{score:.2f} dB"


def loss_text(facts: dict[str, Any], score: float) -> str:
    """How much worse than the model with multiplications; negative if better."""
    lost = facts["float"]["score"] - score
    return f"{100 * lost:.1f}" if facts["metric"] == "top-1" else f"{lost:.2f}"


def subject_section(facts: dict[str, Any]) -> str:
    """What one model is, and its table."""
    before = facts["float"]
    if facts["kind"] == "classifier":
        pictures = facts["pictures"]
        about = (
            f"{facts['image_size']} px, {pictures['train']:,} pictures for training over {facts['epochs']} epochs from "
            f"random weights, "
            f"{pictures['val']:,} held out"
        )
    else:
        views = facts["views"]
        start = "the weights that come with the package" if facts["start"] == "pretrained" else "random weights"
        about = (
            f"{facts['steps']:,} steps of training from {start} on {views['train']} views, {views['test']} test views"
        )
    lines = [
        f"### `{facts['model']}` on {facts['data']}",
        f"{facts['parameters']:,} parameters; {about}. Calibrated on {facts['calibration_inputs']:,} "
        f"{'pictures' if facts['kind'] == 'classifier' else 'rays'}; fine-tuned for {facts['finetune']}.",
    ]
    rows = [["with multiplications", "", score_text(facts, before["score"]), "", "", "", f"{before['bytes']:,}"]]
    rows += [
        [
            f"`{row['name']}`" if row["recipe"]["attention"] == "add" else row["name"],
            *(score_text(facts, row[stage]) for stage in ("nearest", "calibrated", "finetuned")),
            f"{row['multiplications_removed']:.1%}",
            f"{row['energy_share']:.1%}",
            f"{row['bytes']:,}",
        ]
        for row in facts["rows"]
    ]
    header = [facts["metric"], "nearest", "calibrated", "fine-tuned", "multiplications removed", "energy", "bytes"]
    return "\n\n".join([*lines, markdown_table(header, rows)])


def kept_table(results: list[dict[str, Any]]) -> str:
    """How much of what nearest rounding loses calibration keeps, for the recipes that need no fine-tuning."""
    rows = []
    for facts in results:
        unit = "points" if facts["metric"] == "top-1" else "dB"
        for row in facts["rows"]:
            if row["recipe"]["attention"] == "add":
                continue
            losses = [loss_text(facts, row[stage]) for stage in ("nearest", "calibrated", "finetuned")]
            divergence = row["divergence"] or {}
            moved = [f"{1000 * divergence[stage]:.2f}" if divergence else "" for stage in ("nearest", "calibrated")]
            rows.append([f"`{facts['model']}` on {facts['data']}, {row['name']}", *losses, unit, *moved])
    header = ["lost", "nearest", "calibrated", "fine-tuned", "in", "divergence, nearest", "divergence, calibrated"]
    return markdown_table(header, rows)


def search_table(results: list[dict[str, Any]]) -> str:
    """What the searches chose, promised, and took."""
    rows = []
    for facts in results:
        for row in facts["rows"]:
            if row["name"] != "searched":
                continue
            terms = [sum(rule["terms"] == count for rule in row["recipe"]["rules"]) for count in (1, 2)]
            rows.append(
                [
                    f"`{facts['model']}` on {facts['data']}",
                    *map(str, terms),
                    f"{facts['search']['estimated_error']:.1%}",
                    f"{facts['search']['energy_share']:.1%}",
                    f"{facts['search']['seconds']:.0f}" if "seconds" in facts["search"] else "",
                ]
            )
    header = ["model", "layers with one term", "with two", "estimated output error", "promised energy", "seconds"]
    return markdown_table(header, rows)


def main() -> None:
    run_command(
        {"classifier": Classifier, "nerf": Nerf, "report": Report},
        __doc__,
    )


if __name__ == "__main__":
    main()
