"""The tables of README.md, made from the JSON files in docs/results/data.

python benchmarks/readme.py report    # fills in what stands between `<!-- table NAME -->` and `<!-- end -->`
"""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import dataclass
from typing import Any

import peers
from classification import BITS, bits_of, by_cell, points, spread
from energy import MODELS, saved
from nerf import from_random_weights
from reporting import DATA, REPOSITORY, markdown_table, run_command

README = REPOSITORY / "README.md"
ENERGY_MODELS = ("pvt_v2_b0", "deit_tiny_patch16_224", "gnt-big")
PEERS_FORM = f"{peers.OURS}add+shift, int8"
FRAME_FORM = "executable-int8"
FRAME_PEERS = {"torch": "torch", "compile": "torch.compile"}
"""Forms of the dense network that others offer, and what they are called."""
CPUS = {"amx": "AMX", "avx512_vnni": "AVX-512 VNNI", "avx512": "AVX-512", "avx2": "AVX2"}
"""What instructions of `shiftadd3d.kernels.runtime.targets` are called elsewhere."""
CLASSIFIERS = {"deit": "small DeiT", "pvt": "small PVT v2"}
SCENES = {
    "still_life": "still life (in the package)",
    "chair": "chair (Blender, RGBA)",
    "fern": "fern (20 photos)",
    "fox": "fox (50 photos of a phone)",
    "chess_colmap": "chess (23 photos, far apart)",
}


def read(pattern: str) -> list[dict[str, Any]]:
    """The results of some name, sorted by it."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(DATA.glob(pattern))]


def quality_table() -> str:
    """Rows: scenes; columns: PSNR of the test views without training on the scene, and after minutes of it."""
    untrained = {
        facts["scene"]: facts["psnr"] for facts in read("untrained-*.json") if facts["method"] == "shiftadd-gnt-tiny"
    }
    trained: dict[tuple[str, str], float] = {}
    for facts in read("nerf-train-*.json"):
        if facts["kind"] == "train":
            started = not from_random_weights(facts["method"], facts.get("warm_start", "none"))
            # Of two runs of one method, the one from the weights of the package.
            if started or (facts["scene"], facts["method"]) not in trained:
                trained[facts["scene"], facts["method"]] = facts["psnr"]
    nearest = {facts["scene"]: facts["renderers"]["nearest"]["psnr"] for facts in read("nerf-trivial-*.json")}
    rows = [
        [
            label,
            *(
                f"{value:.1f}" if value is not None else ""
                for value in (
                    nearest.get(scene),
                    untrained.get(scene),
                    *(trained.get((scene, method)) for method in ("shiftadd-gnt-tiny", "gnt-tiny", "nerfacto")),
                )
            ),
        ]
        for scene, label in SCENES.items()
    ]
    header = ["PSNR in dB", "nearest photo", "no training", "trained", "dense, trained", "nerfacto, trained"]
    return markdown_table(header, rows)


def gain_over_frames_of_others(threads: int) -> tuple[float, str]:
    """How many times faster a frame is than in the fastest of what others offer, and the name of that.

    Both keep memory, or neither does. Where both were measured, the smaller gain counts.
    """
    gains = []
    for facts in read("nerf-speed*.json"):
        if facts["threads"] == threads:
            seconds = {(row["method"], row["form"]): row["seconds"][0] for row in facts["rows"]}
            peer, form = min((seconds["gnt-tiny", form], form) for form in FRAME_PEERS if ("gnt-tiny", form) in seconds)
            name = FRAME_PEERS[form] + ", memory kept by both" * facts["keep_memory"]
            gains.append((peer / seconds["shiftadd-gnt-tiny", FRAME_FORM], name))
    return min(gains)


def speed_table() -> str:
    """Rows: what runs; columns: its time, how many times faster it is than torch and than the fastest other engine."""
    frames = [facts for facts in read("nerf-speed*.json") if not facts["keep_memory"]]
    frames.sort(key=lambda facts: facts["threads"])
    seconds = [{(row["method"], row["form"]): row["seconds"][0] for row in facts["rows"]} for facts in frames]
    ours = [times["shiftadd-gnt-tiny", FRAME_FORM] for times in seconds]
    width, height = frames[0]["frame"]

    pairs = list(zip(seconds, ours, strict=True))
    best = [gain_over_frames_of_others(facts["threads"]) for facts in frames]
    rows = [
        [
            f"`shiftadd-gnt-tiny`, a frame of {width} x {height} (processor / wall time)",
            " / ".join(f"{1000 * time:,.0f}" for time in ours),
            " / ".join(f"{times['gnt-tiny', 'torch'] / time:.1f}" for times, time in pairs),
            " / ".join(f"{gain:.2f}" for gain, _ in best),
            " / ".join(dict.fromkeys(name for _, name in best)),
        ]
    ]
    machines, _ = peers.read_results(DATA)
    for facts in machines:
        if facts.get("held"):  # no CPU that anybody has
            continue
        cells: dict[str, list[dict[str, float]]] = {}
        one_picture = [row for row in facts["rows"] if row["batch"] == 1]  # the page of peers has larger batches
        for row in sorted(one_picture, key=lambda row: row["threads"]):
            cells.setdefault(peers.pictures_of(row), []).append(row["ms"])
        for pictures, times in cells.items():
            ours = [ms[PEERS_FORM] for ms in times]
            best = [peers.best_peer(ms) for ms in times]
            rows.append(
                [
                    f"{pictures}, {CPUS[facts['instructions']]}",
                    " / ".join(f"{time:,.{0 if time >= 10 else 1}f}" for time in ours),
                    " / ".join(f"{ms[peers.EAGER] / time:.1f}" for ms, time in zip(times, ours, strict=True)),
                    " / ".join(f"{peer / time:.2f}" for (_, peer), time in zip(best, ours, strict=True)),
                    " / ".join(dict.fromkeys(peers.short_name(name) for name, _ in best)),
                ]
            )
    header = ["one thread / two threads", "ms", "times faster than torch", "than the fastest other", "that is"]
    return markdown_table(header, rows)


def accuracy_table() -> str:
    """Rows: small classifiers trained in the paper's stages; columns: what recipes lose against the dense ones."""
    results = [facts for facts in read("classification-*-*.json") if facts["kind"] == "train"]
    rows = []
    for (data, model), recipes in by_cell([facts for facts in results if bits_of(facts) == BITS]).items():
        dense = recipes["mult"]
        rows.append(
            [
                f"{CLASSIFIERS[model]}, {data}",
                f"{100 * statistics.mean(facts['top1'] for facts in dense):.1f}",
                *(spread(points(recipes[name], dense), 1, sign=True) for name in ("add", "add+shift")),
                f"{statistics.mean(facts['multiplications_removed'] for facts in recipes['add+shift']):.0%}",
            ]
        )
    return markdown_table(
        ["top-1, three seeds", "dense, %", "`add`, points", "`add+shift`, points", "multiplications gone"], rows
    )


def energy_table() -> str:
    """Rows: models; columns: energy that `add+shift` saves by each account."""
    rows = []
    for facts in read("energy-*.json"):
        if facts["model"] in ENERGY_MODELS:
            row = next(row for row in facts["rows"] if row["recipe"] == "add+shift")
            cells = [f"{saved(facts, row, account):.0%}" for account in ("arithmetic", "authors", "accelerator")]
            rows.append([MODELS[facts["model"]], *cells])
    header = ["energy saved by `add+shift`", "arithmetic alone", "the authors' account", "with all data movement"]
    return markdown_table(header, rows)


TABLES = {"quality": quality_table, "speed": speed_table, "accuracy": accuracy_table, "energy": energy_table}


def fill_in(text: str) -> str:
    """The README with its tables made anew.

    Raises:
        KeyError: there is a mark for a table that there is not.
    """
    return re.sub(
        r"(<!-- table (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


@dataclass
class Report:
    """Make the tables of README.md anew."""

    def __call__(self) -> None:
        README.write_text(fill_in(README.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote {README}")


if __name__ == "__main__":
    run_command({"report": Report}, __doc__)
