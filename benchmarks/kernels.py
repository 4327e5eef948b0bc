"""The tables of docs/results/kernels.md: kernels against torch, and how soon they are there.

    python benchmarks/kernels.py [--device cpu] [--threads 1,2] [--groups matshift,starts] [--json FILE]
    python benchmarks/kernels.py report

The first measures, prints tables and writes FILE (if it is not given, docs/results/data/kernels-DEVICE[-GROUPS].json);
it needs torch and TVM only. The second makes docs/results/kernels.md from all such files in docs/results/data.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from reporting import (
    DATA,
    NOT_MEASURED,
    PICTURES,
    code_digest,
    command_block,
    git_commit,
    machine_list,
    markdown_table,
    refuse_old,
    write_page,
    write_result,
)

# --------------------------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------------------------

# What a process that runs a kernel spends before it has its first outcome, with a warm cache. Processor time, so that
# it makes no difference what else the machine does; what is read comes from memory then.
START = """
import time
began = time.process_time()
import torch
torch_there = time.process_time()
import shiftadd3d.kernels
kernels_there = time.process_time()
from shiftadd3d.kernels import power_of_two
torch.set_num_threads(1)
codes, offset, _ = power_of_two.encode(torch.randn(64, 64))
packed, x = power_of_two.pack(codes, 4), torch.randn(16, 64)
before = time.process_time()
shiftadd3d.kernels.matshift(x, packed, offset)
first = time.process_time()
shiftadd3d.kernels.matshift(x, packed, offset)
print(torch_there - began, kernels_there - torch_there, first - before, time.process_time() - first)
"""
STARTS = 5
START_GROUP = "starts"


def measure_starts() -> dict[str, list[float]]:
    """Seconds for importing torch, for importing kernels then, for the first call and for the second, sorted."""
    names = ("import torch", "import shiftadd3d.kernels after it", "first call", "second call")
    runs = []
    for _ in range(STARTS + 1):  # the first one fills the cache
        done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, check=True)
        runs.append([float(word) for word in done.stdout.split()])
    return {name: sorted(float(f"{run[i]:.4g}") for run in runs[1:]) for i, name in enumerate(names)}


def run(device: str, threads: str, groups: str, path: Path | None) -> None:
    from shiftadd3d.profile.kernel_benchmark import describe, measure, parse_threads, tables

    commit = git_commit()  # now: it may move on while this runs
    words = ["python", "benchmarks/kernels.py", "--device", device, "--threads", threads]
    facts = {
        "commit": commit,
        "code": code_digest(),
        "command": shlex.join([*words, *(["--groups", groups] if groups else [])]),
    }
    facts |= {"date": time.strftime("%Y-%m-%d"), "load": [round(os.getloadavg()[0], 1)], "starts": {}}
    names = [word for word in groups.split(",") if word]
    path = path or DATA / f"{'-'.join(['kernels', device, *names])}.json"

    def keep(measured: dict[str, Any]) -> None:
        write_result(path, facts | measured | {"load": [*facts["load"], round(os.getloadavg()[0], 1)]})

    timed = [name for name in names if name != START_GROUP]
    if timed or not names:
        facts |= measure(device, parse_threads(threads), timed, lambda line: print(line, flush=True), keep)
    else:
        facts |= describe(device)
    if START_GROUP in names or not names:
        facts["starts"] = measure_starts()
    keep({})
    for count in _thread_counts(facts):
        for table in tables(facts, count):
            print(f"\n{table}")


# --------------------------------------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------------------------------------


def read_results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("kernels-*.json"))]


def combined(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measurements of one machine in several files, as if they had been made in one go."""
    machines: dict[str, dict[str, Any]] = {}
    for facts in results:
        key = json.dumps([facts["device"], facts["target"], facts["machine"]])
        one = machines.setdefault(key, {**facts, "rows": [], "peaks": [], "starts": {}})
        one["rows"] = one["rows"] + facts["rows"]
        known = [peak["threads"] for peak in one["peaks"]]
        one["peaks"] = one["peaks"] + [peak for peak in facts["peaks"] if peak["threads"] not in known]
        one["starts"] = one["starts"] or facts["starts"]
    return list(machines.values())


def render_report(results: list[dict[str, Any]], template: str) -> str:
    """The text of docs/results/kernels.md."""
    whole = combined(results)
    slots = {
        "goals": _sections(whole, "goals"),
        "ratios": _sections(whole, "ratios"),
        "times": _sections(whole, "times"),
        "charts": _chart_list(whole),
        "peaks": _peaks(whole),
        "starts": _starts(whole),
        "notes": _notes(results),
        "commands": command_block("kernels", results) if results else NOT_MEASURED,
        "machines": machine_list(results),
    }
    for name, text in slots.items():
        template = template.replace(f"{{{{{name}}}}}", text)
    return template


def _thread_counts(facts: dict[str, Any]) -> list[int]:
    return list(dict.fromkeys(row["threads"] for row in facts["rows"]))


def _sections(results: list[dict[str, Any]], kind: str) -> str:
    from shiftadd3d.profile.kernel_benchmark import goal_table, rate_table, ratio_table

    texts = []
    for facts in results:
        groups = list(dict.fromkeys(row["group"] for row in facts["rows"]))
        for threads in _thread_counts(facts):
            if kind == "goals":
                made = [goal_table(facts, threads)]
            else:
                made = [(ratio_table if kind == "ratios" else rate_table)(facts, group, threads) for group in groups]
            for table in made:
                title = f"{table.title[0].upper()}{table.title[1:]} ({facts['target']})"
                texts.append(f"**{title}**\n\n{markdown_table(table.header, table.rows)}")
    return "\n\n".join(texts) or NOT_MEASURED


def _chart_list(results: list[dict[str, Any]]) -> str:
    names = [f"kernels-{facts['device']}-{facts['target']}.png" for facts in results]
    return "\n\n".join(f"![Speedup over torch float32](pictures/{name})" for name in names) or NOT_MEASURED


def _peaks(results: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"{facts['machine']['cpu'] if facts['device'] == 'cpu' else facts['machine']['device']}, {facts['target']}",
            str(peak["threads"]),
            f"{peak['float32'] / 1e9:.1f}",
            f"{peak['bfloat16'] / 1e9:.1f}",
            f"{peak['bytes'] / 1e9:.1f}",
        ]
        for facts in results
        for peak in facts["peaks"]
    ]
    return markdown_table(["machine", "threads", "float32 GFLOP/s", "bfloat16 GFLOP/s", "copy GB/s"], rows)


def _starts(results: list[dict[str, Any]]) -> str:
    rows = [
        [name, f"{times[len(times) // 2] * 1e3:.1f}", f"{times[0] * 1e3:.1f} to {times[-1] * 1e3:.1f}"]
        for facts in results
        for name, times in facts["starts"].items()
    ]
    return markdown_table(["what", "median ms", "range"], rows)


def _notes(results: list[dict[str, Any]]) -> str:
    lines = [f"- {note}" for facts in results for note in facts["notes"]]
    failed = dict.fromkeys(
        f"- {row['solution']} ({row['group']}) failed: `{row['failed']}`"
        for facts in results
        for row in facts["rows"]
        if "failed" in row
    )
    loads = [
        f"- `{facts['command']}`, {facts['date']}: load average {facts['load'][0]} at the beginning and "
        f"{facts['load'][-1]} at the end, this benchmark included"
        for facts in results
    ]
    return "\n".join([*loads, *lines, *failed]) or NOT_MEASURED


def draw_chart(facts: dict[str, Any], path: Path) -> None:
    """Bars of the geometric mean of speedups over torch float32, with the range over the problems."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from shiftadd3d.profile.kernel_benchmark import geometric_mean, ratios

    counts = _thread_counts(facts)
    groups = list(dict.fromkeys(row["group"] for row in facts["rows"]))
    ours = {row["solution"] for row in facts["rows"] if row["ours"]}
    bars = []
    for group in groups:
        found = ratios(facts, group, "torch float32", counts[0])
        bars += [(f"{group}: {name}", name, list(by_case.values())) for name, by_case in found.items()]
    figure, axes = plt.subplots(figsize=(8, 0.24 * len(bars) + 1.2))
    for place, (_, name, values) in enumerate(bars):
        mean = geometric_mean(values)
        axes.barh(place, mean, color="tab:orange" if name in ours else "tab:gray")
        axes.plot([min(values), max(values)], [place, place], color="black", linewidth=1)
        axes.annotate(
            f"{mean:.2f}", (max(values), place), xytext=(3, 0), textcoords="offset points", va="center", size=7
        )
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars], size=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.5)
    axes.set_xscale("log")
    axes.margins(x=0.08, y=0.01)  # room for the numbers beside the bars, none above them
    axes.set_xlabel("speedup over torch float32: geometric mean, and range over the problems")
    words = facts["machine"]["device"] if facts["device"] == "cuda" else f"{facts['target']}, {counts[0]} thread"
    axes.set_title(f"{words}; orange: kernels of this project", size=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def report() -> None:
    results = read_results(DATA)
    write_page("kernels", lambda template: render_report(results, template))
    for facts in combined(results):
        draw_chart(facts, PICTURES / f"kernels-{facts['device']}-{facts['target']}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=["measure", "report"], default="measure")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", default="1,2", help="numbers of CPU threads, with commas between")
    parser.add_argument("--groups", default="", help="groups of problems, with commas between; all by default")
    parser.add_argument("--old", action="store_true", help="report what was measured before the code changed, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write what was measured")
    arguments = parser.parse_args()
    from shiftadd3d._errors import UserError

    try:
        if arguments.action == "report":
            if not arguments.old:
                refuse_old(DATA.glob("kernels-*.json"))
            report()
        else:
            run(arguments.device, arguments.threads, arguments.groups, arguments.json)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
