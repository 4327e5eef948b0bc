"""The tables of docs/results/energy.md: what recipes save in energy, by three accounts.

    python benchmarks/energy.py measure --model pvt_v2_b0
    python benchmarks/energy.py pareto --results docs/results/data/layers-grocery_fruit-pvt_v2_b0.json
    python benchmarks/energy.py counting
    python benchmarks/energy.py report

The first counts and writes a JSON file into docs/results/data/; the second prices the recipes whose quality
`benchmarks/layers.py` has measured, on the same sizes; the third times counting and the search for tilings; the last
makes docs/results/energy.md from these alone.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reporting import (
    DATA,
    NOT_MEASURED,
    PICTURES,
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
    from collections.abc import Callable

    from torch import nn

    from shiftadd3d.nn import OperationReport, Recipe
    from shiftadd3d.nn.counting import Product
    from shiftadd3d.profile.accelerator import Accelerator
    from shiftadd3d.profile.subjects import Subject

CLAIM = 0.429
"""What the paper saves at most."""
MODELS = {
    "pvt_v2_b0": "PVT v2-b0",
    "pvt_v2_b1": "PVT v2-b1",
    "pvt_v2_b2": "PVT v2-b2",
    "deit_tiny_patch16_224": "DeiT-tiny",
    "gnt-big": "GNT",
}
RECIPES = ("mult", "add", "add+shift-attn", "add+shift", "add+shift-attn+moe", "moe")
SENSITIVE = ("add", "add+shift", "add+shift-attn+moe")
"""Recipes of the table of assumptions."""
ACCOUNTS = ("arithmetic", "authors", "accelerator")
LEVELS = ("arithmetic", "register", "noc", "buffer", "dram", "elementwise")


@dataclass
class Measure:
    """Count a model in all recipes, and price that by all accounts."""

    model: str = "pvt_v2_b0"
    """A name that `shiftadd3d profile` takes."""
    rays: int | None = None
    """Rays in a batch of a GNT; None for those of a training step."""
    assumptions: bool = False
    """Look at what other assumptions would make of it, too."""
    out: Path = DATA
    """Folder for the JSON file."""

    def __call__(self) -> None:
        commit = git_commit()
        from shiftadd3d.profile.accelerator import load_accelerator
        from shiftadd3d.profile.energy import energy
        from shiftadd3d.profile.model_report import count
        from shiftadd3d.profile.subjects import subject

        accelerator = load_accelerator()
        found = subject(self.model, self.rays)
        operations: dict[str, OperationReport] = {}
        rows = []
        for recipe in RECIPES:
            done = operations[recipe] = count(found, recipe)
            accounts = {account: energy(done, account, accelerator) for account in ACCOUNTS}
            rows.append(
                {
                    "recipe": recipe,
                    **{kind: round(getattr(done, kind) / done.inputs) for kind in ("mult", "shift", "add")},
                    "bytes": {name: round(count / done.inputs) for name, count in done.moved_bytes.items()},
                    "mult_share": mult_share(done),
                    "pj": {account: round(report.total) for account, report in accounts.items()},
                    "levels": {
                        account: {level: round(value) for level, value in report.pj.items()}
                        for account, report in accounts.items()
                    },
                }
            )
            print(f"{self.model}, {recipe}: {rows[-1]['pj']}", flush=True)
        words = ["python", "benchmarks/energy.py", "measure", "--model", self.model]
        words += [] if self.rays is None else ["--rays", str(self.rays)]
        words += ["--assumptions"] if self.assumptions else []
        facts = {
            "model": self.model,
            "setting": found.setting,
            "unit": found.unit,
            "rows": rows,
            "variants": variants(operations, accelerator) if self.assumptions else [],
            "machine": machine_facts(),
            "commit": commit,
            "command": shlex.join(words),
        }
        write_result(self.out / f"energy-{self.model}.json", facts)


def mult_share(operations: OperationReport) -> float | None:
    """Share of the products in mixtures that went to the expert that multiplies; None without mixtures."""
    by_expert = {0: 0, 1: 0}
    for layer in operations.layers:
        expert = re.search(r"\.experts\.(\d)", layer.name)
        if expert:
            by_expert[int(expert[1])] += layer.products
    total = sum(by_expert.values())
    return round(by_expert[0] / total, 4) if total else None


@dataclass
class Assumption:
    """What one row of the table assumes."""

    name: str
    chip: Accelerator
    change: Callable[[Product], Product] | None = None
    """What becomes of each product."""
    shift_chip: Accelerator | None = None
    """Where shift layers run, if not where all others do."""
    free_adds: bool = False
    """Products with codes pay for their additions only."""
    no_sums: bool = False
    """No addition follows a multiplication or shift."""

    def picojoules(self, operations: OperationReport) -> float:
        """Of one input."""
        from shiftadd3d.profile.energy import energy
        from shiftadd3d.profile.tiling import best_mapping

        total = energy(operations, "arithmetic", self.chip).pj["elementwise"] * operations.inputs
        for layer in operations.layers:
            for product, times in layer.loops:
                chip = self.shift_chip if self.shift_chip and product.primitive == "shift" else self.chip
                mapping = best_mapping(product if self.change is None else self.change(product), chip)
                one = mapping.energy["arithmetic"] if product.primitive == "add" and self.free_adds else mapping.total
                if product.primitive != "add" and self.no_sums:
                    one -= product.add * chip.operation("add", product.dtype)
                total += times * one
        return total / operations.inputs


def variants(operations: dict[str, OperationReport], chip: Accelerator) -> list[dict[str, Any]]:
    """What recipes save on the accelerator if one thing, and in the end several, were otherwise."""
    from shiftadd3d.profile.energy import with_activation_bits, with_shift_data_bits

    prices = chip.energy_per_bit
    narrow, ten = replace(chip, accumulator_bits=10), with_shift_data_bits(10)
    assumptions = (
        Assumption("as it is", chip),
        Assumption("DRAM at half", replace(chip, energy_per_bit=replace(prices, dram=prices.dram / 2))),
        Assumption("8-bit activations everywhere", chip, with_activation_bits(8)),
        Assumption("twice the buffer", replace(chip, buffer_kib=2 * chip.buffer_kib)),
        Assumption("add layers pay for no data", chip, free_adds=True),
        Assumption("no addition after a product", chip, no_sums=True),
        Assumption("all data of shift layers at 10 bits", chip, ten, shift_chip=narrow),
        Assumption("the last three together", chip, ten, shift_chip=narrow, free_adds=True, no_sums=True),
    )
    rows = []
    for each in assumptions:
        totals = {recipe: each.picojoules(operations[recipe]) for recipe in ("mult", *SENSITIVE)}
        saved = {recipe: round(1 - totals[recipe] / totals["mult"], 4) for recipe in SENSITIVE}
        rows.append({"assumption": each.name, "pj": round(totals["mult"]), "saved": saved})
        print(f"{each.name}: {saved}", flush=True)
    return rows


CLASSES = {"cifar10_jpeg": 10, "grocery_fruit": 19}
"""How many classes the data of `benchmarks/layers.py` have."""


@dataclass
class Pareto:
    """Price recipes whose quality has been measured, by all accounts, on models of the same sizes."""

    results: tuple[Path, ...]
    """What `benchmarks/layers.py` wrote."""
    out: Path = DATA
    """Folder for the JSON files."""

    def __call__(self) -> None:
        commit = git_commit()
        for path in self.results:
            facts = priced(json.loads(path.read_text(encoding="utf-8")))
            facts |= {
                "machine": machine_facts(),
                "commit": commit,
                "command": f"python benchmarks/energy.py pareto --results docs/results/data/{path.name}",
            }
            write_result(self.out / f"pareto-{path.stem.removeprefix('layers-')}.json", facts)


def priced(quality: dict[str, Any]) -> dict[str, Any]:
    """What `benchmarks/layers.py` measured of each recipe, with the energy of one input by each account."""
    from shiftadd3d.nn import Recipe, count_operations
    from shiftadd3d.profile.accelerator import load_accelerator
    from shiftadd3d.profile.energy import energy

    accelerator = load_accelerator()
    scores: list[tuple[str, dict[str, Any], float]] = [("mult", {"name": "mult"}, quality["float"]["score"])]
    scores += [(row["name"], row["recipe"], row["finetuned"]) for row in quality["rows"]]
    rows, setting = [], ""
    for name, recipe, score in scores:
        model, batch, inputs, setting = trained_sizes(quality, Recipe.from_dict(recipe))
        done = count_operations(model, batch, inputs=inputs)
        pj = {account: energy(done, account, accelerator).total for account in ACCOUNTS}
        rows.append({"recipe": name, "score": score, "pj": pj, "mult_share": mult_share(done)})
        print(f"{quality['model']}, {name}: {score}, { ({each: round(pj[each]) for each in ACCOUNTS}) }", flush=True)
    about = {key: quality[key] for key in ("model", "data", "metric")}
    return {**about, "setting": setting, "rows": rows}


def trained_sizes(quality: dict[str, Any], recipe: Recipe) -> tuple[nn.Module, Any, int, str]:
    """A model as large as the one that was trained, with random weights, its input, how many that are, and of what.

    Raises:
        UserError: it has not as many parameters.
    """
    import torch

    from shiftadd3d import UserError
    from shiftadd3d.nn import reparameterize_
    from shiftadd3d.profile.subjects import picture_setting, random_picture, subject

    torch.manual_seed(0)
    if quality["kind"] == "nerf":
        found = subject(quality["model"], RAYS_OF_PARETO)
        model = found.make("mult")
        batch, inputs, setting = found.batch(model), found.inputs, found.setting
    else:
        from shiftadd3d.vision.checkpoint import ClassifierConfig, create_dense
        from shiftadd3d.vision.data import InputConfig
        from shiftadd3d.vision.settings import parse_key_values

        name, *words = quality["model"].split()
        classes = tuple(map(str, range(CLASSES[quality["data"]])))
        args = parse_key_values("--model-args", tuple(words))
        model = create_dense(ClassifierConfig(name, classes, InputConfig(quality["image_size"]), args))
        size = (3, quality["image_size"], quality["image_size"])
        batch, inputs, setting = random_picture(size), 1, picture_setting(size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters != quality["parameters"]:
        raise UserError(f"{quality['model']} has {parameters} parameters; {quality['parameters']} were trained")
    reparameterize_(model, recipe, verbose=False)
    return model.eval(), batch, inputs, setting


RAYS_OF_PARETO = 64


COUNTED = ("deit_tiny_patch16_224", "deit_small_patch16_224", "pvt_v2_b0", "gnt-tiny")
COUNTED_RECIPES = ("mult", "add+shift", "add+shift-attn+moe")


@dataclass
class Counting:
    """Time counting beside the forward pass that it watches, and the search for the best tilings of a whole model."""

    models: tuple[str, ...] = COUNTED
    """Names that `shiftadd3d profile` takes."""
    recipes: tuple[str, ...] = COUNTED_RECIPES
    """What becomes of their layers."""
    rounds: int = 9
    """How often forward passes and counts take turns."""
    threads: int = 1
    """CPU threads to compute with."""
    out: Path = DATA
    """Folder for the JSON file."""

    def __call__(self) -> None:
        commit = git_commit()
        import torch

        from shiftadd3d.profile.subjects import subject

        torch.set_num_threads(self.threads)
        rows = []
        for name in self.models:
            found = subject(name)
            for recipe in self.recipes:
                rows.append({"model": name, "recipe": recipe, **counting_times(found, recipe, self.rounds)})
                print(rows[-1], flush=True)
        facts = {
            "rows": rows,
            "rounds": self.rounds,
            "threads": self.threads,
            "machine": machine_facts(),
            "commit": commit,
            "command": "python benchmarks/energy.py counting",
        }
        write_result(self.out / "counting-cpu.json", facts)


def counting_times(subject: Subject, recipe: str, rounds: int) -> dict[str, Any]:
    """Seconds of a forward pass, of the first count and of later ones, and of the search for tilings that were never
    looked for; with one thread those of the processor.
    """
    import torch

    from shiftadd3d.nn import count_operations
    from shiftadd3d.nn.activations import call_model
    from shiftadd3d.profile.accelerator import load_accelerator
    from shiftadd3d.profile.energy import energy
    from shiftadd3d.profile.tiling import best_mapping
    from shiftadd3d.profile.timing import clock, interleaved

    now, model = clock(), subject.make(recipe)
    batch = subject.batch(model)

    def count() -> OperationReport:
        return count_operations(model, batch, inputs=subject.inputs)

    began = now()
    operations = count()
    first = now() - began
    with torch.no_grad():
        functions = {"forward": lambda: call_model(model, batch), "count": count}
        functions["forward"]()
        taken = interleaved(functions, rounds=rounds)
    best_mapping.cache_clear()
    began = now()
    energy(operations, "accelerator", load_accelerator())
    search = now() - began
    return {
        "forward": asdict(taken["forward"]),
        "count": asdict(taken["count"]),
        "first_count": first,
        "search": search,
        "searched": best_mapping.cache_info().misses,
    }


@dataclass
class Report:
    """Make docs/results/energy.md and its picture from the JSON files."""

    def __call__(self) -> None:
        if fronts := read_fronts(DATA):
            draw_fronts(fronts, PICTURES / "energy-pareto.png")
        write_page("energy", lambda template: render_report(read_results(DATA), fronts, read_counts(DATA), template))


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder, in the order of `MODELS`."""
    paths = [folder / f"energy-{model}.json" for model in MODELS]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def read_fronts(folder: Path) -> list[dict[str, Any]]:
    """What `pareto` wrote into a folder, sorted by file name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("pareto-*.json"))]


def read_counts(folder: Path) -> list[dict[str, Any]]:
    """What `counting` wrote into a folder, sorted by file name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("counting-*.json"))]


def front_of(facts: dict[str, Any], account: str) -> list[str]:
    """Recipes that no other one beats in both quality and energy, the cheapest first."""
    from shiftadd3d.profile.charts import pareto_front

    rows = facts["rows"]
    return [rows[at]["recipe"] for at in pareto_front([(row["pj"][account], row["score"]) for row in rows])]


def front_tables(fronts: list[dict[str, Any]]) -> str:
    """One table a model; stars mark who is on the front of an account."""
    parts = []
    for facts in fronts:
        on_front = {account: front_of(facts, account) for account in ACCOUNTS}
        rows = []
        for row in sorted(facts["rows"], key=lambda row: row["pj"]["accelerator"]):
            score = f"{row['score']:.1%}" if facts["metric"] == "top-1" else f"{row['score']:.2f} dB"
            cells = [
                f"{row['pj'][account] / 1e6:,.2f}{' *' if row['recipe'] in on_front[account] else ''}"
                for account in ACCOUNTS
            ]
            rows.append([row["recipe"], score, *cells])
        table = markdown_table(["recipe", facts["metric"], "(a), uJ", "(b), uJ", "(c), uJ"], rows)
        parts.append(f"{facts['model']} on {facts['data']}, {facts['setting']}:\n\n{table}")
    return "\n\n".join(parts) or NOT_MEASURED


def draw_fronts(fronts: list[dict[str, Any]], path: Path) -> None:
    """Quality against energy by (a) and (c), a column a model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from shiftadd3d.profile.charts import label_points

    shown = {"arithmetic": "(a) arithmetic", "accelerator": "(c) accelerator"}
    figure = Figure(figsize=(4.2 * max(1, len(fronts)), 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes, labels = figure.subplots(len(shown), max(1, len(fronts)), squeeze=False), []
    for (account, label), row in zip(shown.items(), axes, strict=True):
        for facts, axis in zip(fronts, row, strict=False):
            scale = 100 if facts["metric"] == "top-1" else 1
            places = {each["recipe"]: (each["pj"][account] / 1e6, scale * each["score"]) for each in facts["rows"]}
            axis.plot(*zip(*(places[name] for name in front_of(facts, account)), strict=True), color="0.6", zorder=1)
            for name, place in places.items():
                axis.plot(*place, "o", color="#c4501b" if name in front_of(facts, account) else "#1f6fb4")
            axis.set(
                title=f"{facts['model'].split()[0]} on {facts['data']}",
                xlabel=f"{label}, uJ",
                ylabel="top-1, %" if facts["metric"] == "top-1" else "PSNR, dB",
            )
            axis.margins(0.2, 0.15)
            axis.grid(alpha=0.3)
            labels.append((axis, [(*place, name) for name, place in places.items()]))
    for axis, points in labels:
        label_points(axis, points, 7)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    print(f"wrote {path}")


def counting_table(counts: list[dict[str, Any]]) -> str:
    """How many forward passes a count takes, and how many seconds the search."""
    rows = []
    for row in (row for facts in counts for row in facts["rows"]):
        forward = row["forward"]["median"]
        passes = [f"{seconds / forward:.1f}" for seconds in (row["count"]["median"], row["first_count"])]
        rows.append([row["model"], row["recipe"], *passes, str(row["searched"]), f"{row['search']:.1f}"])
    header = ["model", "recipe", "forward passes a count takes", "the first one", "different products"]
    return markdown_table([*header, "seconds to search for their tilings"], rows)


def render_report(
    results: list[dict[str, Any]], fronts: list[dict[str, Any]], counts: list[dict[str, Any]], template: str
) -> str:
    """Fill a template's `{{name}}` fields in from the results.

    Raises:
        KeyError: the template has a field that there is no table for.
    """
    fields = {
        "savings": savings_table(results),
        "levels": levels_table(results),
        "assumptions": assumptions(results),
        "nearest": nearest(results),
        "deciding": deciding(results),
        "settings": "\n".join(f"- {MODELS[facts['model']]}: {facts['setting']}." for facts in results),
        "fronts": front_tables(fronts),
        "counting": counting_table(counts),
        "commands": command_block("energy", results + fronts + counts),
        "machines": machine_list(results + fronts + counts),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match.group(1)], template)


def saved(facts: dict[str, Any], row: dict[str, Any], account: str) -> float:
    """Share of the energy of the first recipe."""
    return 1 - row["pj"][account] / facts["rows"][0]["pj"][account]


def savings_table(results: list[dict[str, Any]]) -> str:
    rows = []
    for facts in results:
        for row in facts["rows"]:
            if row["recipe"] == "mult":
                cells = [f"{row['pj'][account] / 1e6:,.1f} uJ" for account in ACCOUNTS]
            else:
                cells = [f"{saved(facts, row, account):.1%}" for account in ACCOUNTS]
            share = "" if row["mult_share"] is None else f"{row['mult_share']:.0%}"
            rows.append([MODELS[facts["model"]], row["recipe"], *cells, share])
    return markdown_table(["model", "recipe", "(a)", "(b)", "(c)", "products of mixtures that multiply"], rows)


def levels_table(results: list[dict[str, Any]]) -> str:
    rows = []
    for facts in results:
        for row in facts["rows"]:
            if row["recipe"] in ("mult", "add+shift"):
                levels = row["levels"]["accelerator"]
                cells = [f"{levels[level] / 1e6:,.1f}" for level in LEVELS]
                rows.append([MODELS[facts["model"]], row["recipe"], *cells])
    return markdown_table(["model", "recipe", *LEVELS], rows)


def assumptions(results: list[dict[str, Any]]) -> str:
    parts = []
    for facts in results:
        if facts["variants"]:
            rows = [
                [
                    variant["assumption"],
                    f"{variant['pj'] / 1e6:,.1f}",
                    *(f"{variant['saved'][recipe]:.1%}" for recipe in SENSITIVE),
                ]
                for variant in facts["variants"]
            ]
            table = markdown_table(["assumption", "mult, uJ", *SENSITIVE], rows)
            parts.append(f"{MODELS[facts['model']]}:\n\n{table}")
    return "\n\n".join(parts) or NOT_MEASURED


def nearest(results: list[dict[str, Any]]) -> str:
    """Which recipe of each model saves the most by each account, and whether that is what the paper claims."""
    lines = []
    for facts in results:
        best = {
            account: max(facts["rows"][1:], key=lambda row, account=account: saved(facts, row, account))
            for account in ACCOUNTS
        }
        texts = [
            f"({'abc'[i]}) {saved(facts, best[a], a):.1%} in `{best[a]['recipe']}`" for i, a in enumerate(ACCOUNTS)
        ]
        reached = saved(facts, best["accelerator"], "accelerator") >= CLAIM
        verdict = "reached" if reached else "not reached"
        lines.append(f"- {MODELS[facts['model']]}: {', '.join(texts)}; {CLAIM:.1%} by (c) {verdict}.")
    return "\n".join(lines) or NOT_MEASURED


def deciding(results: list[dict[str, Any]], recipe: str = "add+shift") -> str:
    """Which single assumption changes the most what a recipe saves by (c)."""
    lines = []
    for facts in results:
        if facts["variants"]:
            first, *others = (variant for variant in facts["variants"] if "together" not in variant["assumption"])
            before = first["saved"][recipe]
            most = max(others, key=lambda variant: abs(variant["saved"][recipe] - before))
            lines.append(
                f"- {MODELS[facts['model']]}: {most['assumption']}, with which `{recipe}` saves "
                f"{most['saved'][recipe]:.1%} instead of {before:.1%}."
            )
    return "\n".join(lines) or NOT_MEASURED


def main() -> None:
    """The command line."""
    run_command({"measure": Measure, "pareto": Pareto, "counting": Counting, "report": Report}, __doc__)


if __name__ == "__main__":
    main()
