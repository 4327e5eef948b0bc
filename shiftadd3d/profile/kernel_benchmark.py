"""Kernels against torch: times measured in turns, and their ratios.

`measure` returns plain facts for JSON, and `tables` shows their ratios. Both need only torch and TVM. The command is
`shiftadd3d bench kernels`, or ``python benchmarks/kernels.py`` without tyro.
"""

from __future__ import annotations

import gc
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d._progress import Steps, progress
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
_MOST_SECONDS_A_CALL = 20.0


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
        threads: numbers of CPU threads to measure with, one after the other. They have no effect on CUDA.
        groups: groups of problems, keys of `CASES`; all if empty.
        report: called with a line of text for every problem.
        keep: called after every problem with the facts so far, because a whole run takes long and may be interrupted.

    Returns:
        Facts for JSON: the machine, its peaks, and ``rows``, one for each solution of each problem: group, case,
            threads, solution, whether it is ours, seconds (median, lower and upper quartile), and the relative error
            against float64 if it has a meaning. If a solution failed, the reason replaces the times.

    Raises:
        UserError: for an unknown device, number of threads or group.
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
    """The start of the facts of `measure`: the machine, without measurements."""
    facts: dict[str, Any] = {"device": device, "machine": machine_facts(), "target": _target(device)}
    return facts | {"peaks": [], "rows": [], "notes": []}


def parse_threads(text: str) -> list[int]:
    """Numbers from a text such as ``1,2``.

    Raises:
        UserError: if the text is not a list of numbers.
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
                facts["notes"] += sorted(set(notes_of(told)) - set(facts["notes"]))
                report(f"{threads} thread{'s' * (threads > 1)}, {group} {case.name}")
                keep(facts)
                if "torch._dynamo" in sys.modules:  # else nothing was compiled, and this would import the compiler
                    torch.compiler.reset()  # it compiles a function for eight problems, and no more after that
        gc.collect()


def notes_of(told: Iterable[warnings.WarningMessage]) -> list[str]:
    """Kernels that could not be used, and why. Their twins were measured instead, which readers must know."""
    return sorted({str(one.message) for one in told if str(one.message).startswith("kernel ")})


def measure_case(case: Case, device: str, seconds: float | None = None) -> list[dict[str, Any]]:
    """Time every solution of one problem, and show which one is at work.

    The rows are those of `measure`, without the number of threads. On CUDA, they also have ``peak_bytes``: the most
    memory of a call beyond what was allocated before. A rival whose calls take more than 20 s counts as failed. The
    first call does not count, because it may compile.

    Args:
        seconds: roughly how long the solutions take turns; 2 if None.
    """
    working: dict[str, Callable[[], Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    solutions = {**case.others, **case.ours}
    with _solutions_shown(case, len(solutions)) as shown:
        for name, run in solutions.items():
            shown.advance(0, status=name)
            facts = {"group": case.group, "case": case.name, "solution": name, "ours": name in case.ours}
            rows[name] = facts | {"operations": case.operations, "bytes": case.bytes}
            if case.rays is not None:
                rows[name]["rays"] = case.rays
            try:
                rows[name] |= _first_calls(case, name, run, device)
                working[name] = run
            except Exception as problem:
                rows[name]["failed"] = f"{type(problem).__name__}: {problem}".strip().splitlines()[0]
            shown.advance()
        shown.advance(0, status="taking turns")
        seconds = _SECONDS_A_CASE if seconds is None else seconds
        for name, spread in interleaved(working, device, seconds=seconds).items():
            rows[name]["seconds"] = [float(f"{t:.4g}") for t in (spread.median, spread.lower, spread.upper)]
    return list(rows.values())


def _solutions_shown(case: Case, count: int) -> AbstractContextManager[Steps]:
    """A bar of a problem's solutions on standard error; none if rich is not installed."""
    what = f"{case.group} {case.name}"
    if find_spec("rich") is None:
        return progress(what, count, disable=True)
    from rich.console import Console

    return progress(what, count, unit="solutions", console=Console(stderr=True))


def _first_calls(case: Case, name: str, run: Callable[[], Any], device: str) -> dict[str, Any]:
    """Call a solution twice, so that it is ready to be timed: its error, and its memory on CUDA.

    Raises:
        TimeoutError: if a rival takes too long to be called again and again.
    """
    facts: dict[str, Any] = {}
    outcome = run()
    if case.reference is not None and name not in case.inexact:
        facts["error"] = _relative_error(outcome, case.reference)
    began = time.monotonic()
    if device == "cuda":
        facts["peak_bytes"] = peak_bytes(run)
    else:
        run()
    taken = time.monotonic() - began
    if name in case.others and name != BASELINE and taken > _MOST_SECONDS_A_CALL:
        raise TimeoutError(f"a call takes {taken:.0f} s, and {_MOST_SECONDS_A_CALL:.0f} s is the most for a rival")
    return facts


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most memory of the current CUDA device that a call needs beyond what torch has allocated before."""
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
    """How many times faster a kernel should be than something else.

    Attributes:
        what: the goal in words.
        group: the group of problems.
        ours, other: names of solutions.
        least: the ratio of their times.
        over: whether the geometric mean over all problems of the group counts, or the smallest ratio.
        more_than: problems whose name begins with a number up to this are left out.
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
"""Goals for a CPU with AMX. On other CPUs, they show how far these are from them."""


@dataclass(frozen=True)
class Outcome:
    """A goal with its measurements: the ratio that counts, and the range over the problems."""

    goal: Goal
    threads: int
    measured: float
    lowest: float
    highest: float

    @property
    def is_reached(self) -> bool:
        return self.measured >= self.goal.least


def goals(facts: dict[str, Any], threads: int) -> list[Outcome]:
    """The outcomes of those goals for which there are measurements."""
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
    """The geometric mean of positive numbers."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def ratios(facts: dict[str, Any], group: str, over: str, threads: int) -> dict[str, dict[str, float]]:
    """How many times faster than the solution `over` each solution is, by names of solution and problem."""
    rows = [row for row in facts["rows"] if row["group"] == group and row["threads"] == threads and "seconds" in row]
    medians = {(row["solution"], row["case"]): row["seconds"][0] for row in rows}
    found: dict[str, dict[str, float]] = {}
    for (solution, case), seconds in medians.items():
        if (over, case) in medians:
            found.setdefault(solution, {})[case] = medians[over, case] / seconds
    return found


def tables(facts: dict[str, Any], threads: int) -> list[Table]:
    """All tables for measurements with this number of threads."""
    groups = list(dict.fromkeys(row["group"] for row in facts["rows"] if row["threads"] == threads))
    made = [
        table for group in groups for table in (ratio_table(facts, group, threads), rate_table(facts, group, threads))
    ]
    return [table for table in [*made, goal_table(facts, threads)] if table.rows]


def ratio_table(facts: dict[str, Any], group: str, threads: int) -> Table:
    """Speedup over torch in float32: one row for each solution, with the geometric mean in the last column and
    interquartile ranges.
    """
    found = ratios(facts, group, BASELINE, threads)
    problems = list(dict.fromkeys(case for by_case in found.values() for case in by_case))
    rows = []
    for solution, by_case in found.items():
        cells = [f"{by_case[case]:.2f}" if case in by_case else "-" for case in problems]
        rows.append([solution, *cells, f"{geometric_mean(by_case.values()):.2f}"])
    title = f"{group}: speedup over {BASELINE}, {_threads(facts, threads)}"
    return Table(title, ["solution", *problems, "mean"], rows)


def rate_table(facts: dict[str, Any], group: str, threads: int) -> Table:
    """Times with quartiles. For products also operations per second and their share of the measured peak."""
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
    """Goals and their outcomes."""
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
