"""How long a film takes, from the command to the file, for the table in docs/results/nerf.md.

    python benchmarks/film.py run --scene PATH/TO/fern
    python benchmarks/film.py run --scene PATH/TO/photos --name photos
    python benchmarks/nerf.py report

The first two write docs/results/data/nerf-film-NAME.json, the last one makes the page from it.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nerf import find_scene_folder
from reporting import DATA, code_digest, git_commit, machine_facts, run_command, write_result


@dataclass
class Run:
    """Time `shiftadd3d movie`, each run in a process of its own, on all CPU cores.

    The first run begins with an empty cache of kernels. The later ones find in it what the first has left.
    """

    scene: str
    """What to film: an embedded scene, a folder with a scene or photos, or the name of one under $SHIFTADD3D_SCENES."""
    name: str | None = None
    """Name of the film in the table and of the JSON file. If not set, the scene's."""
    frames: int = 60
    """Frames of the film."""
    size: int = 252
    """Longer side of a frame in pixels."""
    runs: int = 3
    """Runs after the first, 1 or more. The median counts."""
    out: Path = DATA
    """Folder for the JSON file."""

    def command(self, scene_name: str, embedded: bool) -> str:
        """The command that repeats this measurement, without this machine's paths."""
        scene = scene_name if embedded else f"PATH/TO/{scene_name}"
        words = ["python", "benchmarks/film.py", "run", "--scene", scene]
        if self.name is not None:
            words += ["--name", self.name]
        return shlex.join([*words, "--frames", f"{self.frames}", "--size", f"{self.size}", "--runs", f"{self.runs}"])

    def __call__(self) -> None:
        from shiftadd3d._errors import UserError

        if self.runs < 1:
            raise UserError(f"--runs {self.runs}: expected 1 or more")
        commit = git_commit()
        scene_name, folder, embedded = find_scene_folder(self.scene)
        with tempfile.TemporaryDirectory() as kernels:
            runs = [self.run(folder, kernels) for _ in range(1 + self.runs)]
        facts = {
            "kind": "film",
            "film": self.name or scene_name,
            "frames": self.frames,
            "size": runs[0]["size"],
            "first": runs[0]["wall"],
            "later": [run["wall"] for run in runs[1:]],
            "steps": {step: _median([run["seconds"][step] for run in runs[1:]]) for step in runs[0]["seconds"]},
            "machine": machine_facts(),
            "commit": commit,
            "code": code_digest(),
            "command": self.command(scene_name, embedded),
        }
        write_result(self.out / f"nerf-film-{facts['film']}.json", facts)

    def run(self, folder: Path, kernels: str) -> dict[str, Any]:
        """What `shiftadd3d movie --json` writes, and as `wall` the seconds from its start to its end."""
        with tempfile.TemporaryDirectory() as out:
            words = [sys.executable, "-m", "shiftadd3d.cli", "movie", str(folder), "--out", f"{out}/film.mp4"]
            words += ["--json", f"{out}/film.json", "--frames", str(self.frames), "--size", str(self.size)]
            start = time.perf_counter()
            done = subprocess.run(words, env={**os.environ, "SHIFTADD3D_CACHE": kernels})
            wall = time.perf_counter() - start
            if done.returncode != 0:
                sys.exit(f"{shlex.join(words)} ended with {done.returncode}")
            facts = json.loads(Path(out, "film.json").read_text(encoding="utf-8"))
        print(f"{wall:.1f} s", flush=True)
        return {**facts, "wall": round(wall, 1)}


def _median(seconds: Sequence[float]) -> float:
    return round(statistics.median(seconds), 1)


def main() -> None:
    run_command({"run": Run}, __doc__)


if __name__ == "__main__":
    main()
