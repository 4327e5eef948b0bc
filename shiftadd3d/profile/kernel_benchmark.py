"""Kernels against torch: measured in turns, told as ratios.

`measure` makes plain facts, which JSON can hold, and `tables` makes ratios of them; neither needs more than torch and
TVM. The command is `shiftadd3d bench kernels`, or ``python benchmarks/kernels.py`` where there is no tyro.
"""

from __future__ import annotations

import gc
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.profile.kernel_cases import BASELINE, CASES, Case, Setup, cases
from shiftadd3d.profile.machine import machine_facts
from shiftadd3d.profile.timing import copy_rate, interleaved, product_rate

__all__ = [
    "GOALS",
    "Goal",
    "Outcome",
    "Table",
    "describe",
    "goals",
    "measure",
    "measure_case",
    "notes_of",
    "parse_threads",
    "peak_bytes",
    "ratio_table",
    "ratios",
    "tables",
]

_SECONDS_A_CASE = 2.0


# --------------------------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------------------------


def measure(
    device: str = "cpu",
    threads: Sequence[int] = (1,),
    groups: Iterable[str] = (),
    report: Callable[[str], None] = lambda line: None,
    keep: Callable[[dict[str, Any]], None] = lambda facts: None,
) -> dict[str, Any]:
    """Time every solution of every problem.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        threads: numbers of CPU threads to measure with, one after the other; has no meaning on CUDA.
        groups: of problems, keys of `CASES`; all if empty.
        report: called with a line of text for every problem.
        keep: called with the facts so far after every problem, since all of them take long.

    Returns:
        Facts for JSON: the machine, its peaks, and ``rows``, one for each solution of each problem: group, case,
        threads, solution, whether it is ours, seconds (median, lower and upper quartile), the relative error against
        float64 where that means something, or instead of times why it failed.

    Raises:
        UserError: for a device, a number of threads or a group that is not there.
    """
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(
            f"--device {device}: no such device here; expected cpu" + " or cuda" * torch.cuda.is_available()
        )
    if not threads or min(threads) < 1:
        raise UserError(f"--threads {','.join(map(str, threads))}: expected numbers of 1 or more, such as 1,2")
    groups = list(groups) or list(CASES)
    for group in groups:
        cases(group, Setup(device))
    facts = describe(device)
    before = torch.get_num_threads()
    try:
        for count in threads if device == "cpu" else (before,):
            torch.set_num_threads(count)
            _measure_with(count, device, groups, report, keep, facts)
    finally:
        torch.set_num_threads(before)
    return facts


def describe(device: str) -> dict[str, Any]:
    """What `measure` begins with: the machine, and no measurement yet."""
    facts: dict[str, Any] = {"device": device, "machine": machine_facts(), "target": _target(device)}
    return facts | {"peaks": [], "rows": [], "notes": []}


def parse_threads(text: str) -> list[int]:
    """Numbers with commas between.

    Raises:
        UserError: if it is something else.
    """
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--threads {text}: expected numbers of 1 or more, such as 1,2") from None


def _target(device: str) -> str:
    if device == "cpu":
        return targets.current().name
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def _measure_with(
    threads: int,
    device: str,
    groups: Iterable[str],
    report: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None],
    facts: dict[str, Any],
) -> None:
    rates = {
        str(dtype).removeprefix("torch."): product_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)
    }
    facts["peaks"].append({"threads": threads, **rates, "bytes": copy_rate(device)})
    for group in groups:
        with warnings.catch_warnings(record=True) as told, torch.inference_mode():
            warnings.simplefilter("always", RuntimeWarning)
            for case in cases(group, Setup(device)):
                rows = measure_case(case, device)
                facts["rows"] += [{"threads": threads, **row} for row in rows]
                report(f"{threads} thread{'s' * (threads > 1)}, {group} {case.name}")
                keep(facts)
                if "torch._dynamo" in sys.modules:  # else nothing was compiled, and this would import the compiler
                    torch.compiler.reset()  # it compiles a function for eight problems, and no more after that
        facts["notes"] += sorted(set(notes_of(told)) - set(facts["notes"]))
        gc.collect()


def notes_of(told: Iterable[warnings.WarningMessage]) -> list[str]:
    """Which kernels gave up, and why: their twins have been measured, and that has to be known."""
    return sorted({str(one.message) for one in told if str(one.message).startswith("kernel ")})


def measure_case(case: Case, device: str, seconds: float | None = None) -> list[dict[str, Any]]:
    """Time every solution of one problem: the rows of `measure`, without the number of threads; on CUDA, with
    ``peak_bytes``, the most that a call takes at once on top of what was there.

    Args:
        seconds: roughly how long they take turns; 2 if None.
    """
    working: dict[str, Callable[[], Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, run in {**case.others, **case.ours}.items():
        facts = {"group": case.group, "case": case.name, "solution": name, "ours": name in case.ours}
        rows[name] = facts | {"operations": case.operations, "bytes": case.bytes}
        if case.rays is not None:
            rows[name]["rays"] = case.rays
        try:
            outcome = run()
            if case.reference is not None and name not in case.inexact:
                rows[name]["error"] = _relative_error(outcome, case.reference)
            if device == "cuda":
                rows[name]["peak_bytes"] = peak_bytes(run)
            else:
                run()
            working[name] = run
        except Exception as problem:
            rows[name]["failed"] = f"{type(problem).__name__}: {problem}".strip().splitlines()[0]
    seconds = _SECONDS_A_CASE if seconds is None else seconds
    for name, spread in interleaved(working, device, seconds=seconds).items():
        rows[name]["seconds"] = [float(f"{t:.4g}") for t in (spread.median, spread.lower, spread.upper)]
    return list(rows.values())


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most memory of the current CUDA device that a call takes at once, on top of what torch holds before it."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def _relative_error(outcome: Tensor, reference: Tensor) -> float:
    difference = outcome.double().view(-1) - reference.view(-1)
    return float(f"{(difference.norm() / reference.norm()).item():.3g}")


# --------------------------------------------------------------------------------------------------------------------
# Goals
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """How much faster than something else a kernel is meant to be.

    Attributes:
        what: in words.
        group: of problems.
        ours, other: names of solutions.
        least: the ratio of their times.
        over: of all problems of the group, the geometric mean of the ratios, or the smallest one.
        more_than: problems whose name begins with no larger number are left out.
    """

    what: str
    group: str
    ours: str
    other: str
    least: float
    over: Literal["mean", "smallest"] = "mean"
    more_than: int = 0


GOALS = (
    Goal("MatShift fast, float32 in and out", "matshift", "MatShift fast", BASELINE, 5.0),
    Goal("MatShift exact", "matshift", "MatShift exact", BASELINE, 2.5),
    Goal("MatShift fast, bfloat16 in and out", "matshift", "MatShift fast, bfloat16", "torch bfloat16", 1.2),
    Goal("MatShift int8", "matshift", "MatShift int8", "torch int8 dynamic", 3.0),
    Goal("MatShift int8", "matshift", "MatShift int8", "torchao int8 dynamic", 3.0),
    Goal("MatAdd, signs fused, against products of ready signs", "matadd", "MatAdd, signs fused", BASELINE, 2.0),
    Goal("MatAdd, signs fused", "matadd", "MatAdd, signs fused", "torch.compile float32, signs taken", 3.0),
    Goal("fused MLP, fast", "mlp", "MLP fast", BASELINE, 6.0, "smallest"),
    Goal(
        "fused MLP, fast, bfloat16 in and out", "mlp", "MLP fast, bfloat16", "torch.compile bfloat16", 1.3, "smallest"
    ),
    Goal("fused view attention", "view-attention", "view attention", BASELINE, 10.0),
    Goal("fused view attention", "view-attention", "view attention", "torch.compile bfloat16", 3.0),
    Goal("GNT, add+shift int8", "gnt", "GNT add+shift, int8", "GNT dense, exact", 2.0),
    Goal("MoE fast, more than 1024 tokens, against the dense MLP", "moe", "MoE fast", BASELINE, 1.0, "smallest", 1024),
)
"""What the project set out to reach on a CPU with AMX; on others they show how far these are."""


@dataclass(frozen=True)
class Outcome:
    """A goal beside what was measured: the ratio that counts, and the range over the problems."""

    goal: Goal
    threads: int
    measured: float
    lowest: float
    highest: float

    @property
    def is_reached(self) -> bool:
        return self.measured >= self.goal.least


def goals(facts: dict[str, Any], threads: int) -> list[Outcome]:
    """What became of those goals that the measurements have an answer to."""
    outcomes = []
    for goal in GOALS:
        found = [
            ratio
            for case, ratio in ratios(facts, goal.group, goal.other, threads).get(goal.ours, {}).items()
            if int(case.split()[0]) > goal.more_than or not goal.more_than
        ]
        if found:
            counted = min(found) if goal.over == "smallest" else geometric_mean(found)
            outcomes.append(Outcome(goal, threads, counted, min(found), max(found)))
    return outcomes


# --------------------------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column is a name, the others are numbers."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]

        def line(cells: list[str]) -> str:
            first = cells[0].ljust(widths[0])
            return "  ".join([first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))])

        return "\n".join([self.title, *(line(cells) for cells in [self.header, *self.rows])])


def geometric_mean(values: Iterable[float]) -> float:
    """The root of their product."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def ratios(facts: dict[str, Any], group: str, over: str, threads: int) -> dict[str, dict[str, float]]:
    """How many times faster than the solution `over` each solution is, by its name and the problem's."""
    rows = [row for row in facts["rows"] if row["group"] == group and row["threads"] == threads and "seconds" in row]
    medians = {(row["solution"], row["case"]): row["seconds"][0] for row in rows}
    found: dict[str, dict[str, float]] = {}
    for (solution, case), seconds in medians.items():
        if (over, case) in medians:
            found.setdefault(solution, {})[case] = medians[over, case] / seconds
    return found


def tables(facts: dict[str, Any], threads: int) -> list[Table]:
    """Everything about measurements with so many threads."""
    groups = list(dict.fromkeys(row["group"] for row in facts["rows"] if row["threads"] == threads))
    made = [
        table for group in groups for table in (ratio_table(facts, group, threads), rate_table(facts, group, threads))
    ]
    return [table for table in [*made, goal_table(facts, threads)] if table.rows]


def ratio_table(facts: dict[str, Any], group: str, threads: int) -> Table:
    """Speedup over torch in float32, one row a solution, the geometric mean last; interquartile ranges in between."""
    found = ratios(facts, group, BASELINE, threads)
    problems = list(dict.fromkeys(case for by_case in found.values() for case in by_case))
    rows = []
    for solution, by_case in found.items():
        cells = [f"{by_case[case]:.2f}" if case in by_case else "-" for case in problems]
        rows.append([solution, *cells, f"{geometric_mean(by_case.values()):.2f}"])
    title = f"{group}: speedup over {BASELINE}, {_threads(facts, threads)}"
    return Table(title, ["solution", *problems, "mean"], rows)


def rate_table(facts: dict[str, Any], group: str, threads: int) -> Table:
    """Times with quartiles, and for products operations a second and their share of the measured peak."""
    peak = next((peak for peak in facts["peaks"] if peak["threads"] == threads), None)
    rows = []
    for row in facts["rows"]:
        if row["group"] != group or row["threads"] != threads or "seconds" not in row:
            continue
        if not (row["ours"] or row["solution"] == BASELINE):
            continue
        median, lower, upper = row["seconds"]
        cells = [f"{median * 1e6:.0f}", f"{lower * 1e6:.0f} to {upper * 1e6:.0f}"]
        rate = row["operations"] / median if row["operations"] else None
        cells.append(f"{rate / 1e9:.1f}" if rate else "-")
        cells.append(f"{rate / peak['float32']:.0%}" if rate and peak else "-")
        cells.append(f"{row['bytes'] / median / peak['bytes']:.0%}" if peak else "-")
        cells.append(f"{row['error']:.1e}" if "error" in row else "-")
        cells.append(f"{row['rays'] / median:.0f}" if "rays" in row else "-")
        rows.append([f"{row['case']}, {row['solution']}", *cells])
    header = ["problem, solution", "us", "quartiles", "GFLOP/s", "of the peak", "of the copy rate", "error", "rays/s"]
    return Table(f"{group}: times, {_threads(facts, threads)}", header, rows)


def goal_table(facts: dict[str, Any], threads: int) -> Table:
    """What was to be reached, beside what was."""
    rows = [
        [
            outcome.goal.what,
            outcome.goal.other,
            f"{outcome.goal.least:.1f}",
            f"{outcome.measured:.2f}",
            f"{outcome.lowest:.2f} to {outcome.highest:.2f}",
            "yes" if outcome.is_reached else "no",
        ]
        for outcome in goals(facts, threads)
    ]
    header = ["what", "against", "at least", "measured", "from problem to problem", "reached"]
    return Table(f"goals, {_threads(facts, threads)}", header, rows)


def _threads(facts: dict[str, Any], threads: int) -> str:
    if facts["device"] == "cuda":
        return facts["machine"]["device"]
    return f"{threads} thread{'s' * (threads > 1)}"
