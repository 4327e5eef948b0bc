"""benchmarks/film.py times films from the command to the file."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from shiftadd3d.kernels.runtime import cache
from shiftadd3d.scenes import scene_path


@pytest.fixture(scope="module")
def film(load_benchmark) -> ModuleType:
    return load_benchmark("film")


def test_a_run_is_timed_from_the_command_to_the_file(film: ModuleType):
    """The embedded scene, small, with the kernels that other tests have compiled."""
    facts = film.Run("still_life", frames=2, size=64).run(scene_path("still_life"), str(cache.folder()))
    assert facts["size"] == [64, 48] and facts["frames"] == 2
    assert 0 < sum(facts["seconds"].values()) < facts["wall"] + 1


def test_a_film_is_written_and_shown(film: ModuleType, load_benchmark, tmp_path: Path, monkeypatch):
    walls, folders = iter([41.2, 26.9, 26.0, 30.0]), set()

    def run(self, folder: Path, kernels: str) -> dict[str, object]:
        folders.add(kernels)
        assert folder == scene_path("still_life") and Path(kernels).is_dir()
        seconds = {"start": 2.3, "poses": 0.0, "opening": 0.7, "rendering": 22.6}
        return {"size": [64, 48], "seconds": seconds, "wall": next(walls)}

    monkeypatch.setattr(film.Run, "run", run)
    film.Run("still_life", frames=2, size=64, out=tmp_path)()
    assert len(folders) == 1  # later runs find what the first has compiled
    facts = json.loads((tmp_path / "nerf-film-still_life.json").read_text(encoding="utf-8"))
    assert facts["command"] == "python benchmarks/film.py run --scene still_life --frames 2 --size 64 --runs 3"
    nerf = load_benchmark("nerf")
    assert nerf.read_results(tmp_path)["film"] == [facts]
    *_, row = nerf.film_table([facts]).splitlines()
    assert row == "| still_life, 2 frames of 64 x 48 | 41 | 27 | 2 | 0 | 1 | 23 |"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scene", "nowhere"], "--scene nowhere: expected one of still_life"),
        (["--scene", "still_life", "--runs", "0"], "--runs 0: expected 1 or more"),
    ],
)
def test_what_cannot_be_timed_is_one_line(film: ModuleType, words: list[str], message: str, monkeypatch):
    monkeypatch.setattr("sys.argv", ["film.py", "run", *words])
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        film.main()
