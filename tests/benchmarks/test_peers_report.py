"""docs/results/peers.md says what data/peers-*.json say."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from shiftadd3d._errors import UserError


@pytest.fixture(scope="module")
def benchmark(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("peers")


def test_the_page_is_what_the_results_make_of_the_template(benchmark, repository: Path):
    folder = repository / "docs" / "results"
    made = benchmark.render_report(
        *benchmark.read_results(folder / "data"), (folder / "peers.template.md").read_text(encoding="utf-8")
    )
    assert (folder / "peers.md").read_text(encoding="utf-8") == made, "run: python benchmarks/peers.py report"


def test_each_kind_of_machine_has_its_tables(benchmark, repository: Path):
    results, _ = benchmark.read_results(repository / "docs" / "results" / "data")
    page = benchmark.render_report(results, [], "{{SUMMARY}}{{TABLES}}{{COMMANDS}}{{MACHINES}}")
    assert len(results) > 1
    for facts in results:
        assert page.count(f"{benchmark.heading_of(facts)}\n\n") == 2
        assert facts["command"] in page
        for row in facts["rows"]:
            assert benchmark.full_table(row) in page


def test_what_a_cpu_was_held_to_has_its_own_file_and_heading(benchmark):
    names = {benchmark.name_of(benchmark.FILES, "avx2", held=held) for held in (False, True)}
    assert names == {"peers-avx2.json", "peers-avx2-held.json"}
    facts = {"instructions": "avx2", "machine": {"cpu": "A CPU"}}
    assert benchmark.heading_of(facts) == "**`avx2`**, A CPU"
    assert benchmark.heading_of({**facts, "held": True}) == "**`avx2`**, A CPU, held to these instructions"


def test_what_no_machine_has_measured_is_said_so(benchmark):
    page = benchmark.render_report([], [], "{{SUMMARY}} {{RAYS}} {{TABLES}}")
    assert page == " ".join(3 * ["*Not measured yet.*"])


def test_rays_say_how_far_engines_are_off(benchmark):
    ms = {"torch, float32, eager": 200.0, "OpenVINO, bf16": 80.0, "shiftadd3d, gnt-tiny, exact": 40.0}
    table = benchmark.rays_table({"threads": 1, "ms": ms, "off": {"OpenVINO, bf16": 0.0132}})
    assert table.splitlines()[0] == "| 1,024 rays, 1 thread | ms | times faster than torch | colours off by |"
    assert table.splitlines()[2:] == [
        "| torch, float32, eager | 200.0 | 1.00 |  |",
        "| OpenVINO, bf16 | 80.0 | 2.50 | 0.0132 |",
        "| shiftadd3d, gnt-tiny, exact | 40.0 | 5.00 |  |",
    ]


def test_what_onnx_is_given_computes_what_the_network_does(load_benchmark):
    rays = load_benchmark("peers_rays")
    chunk, (origins, directions, depths) = rays.dense_chunk()
    network, (plain_origins, plain_directions) = chunk.network, rays.camera_rays()
    with torch.no_grad():
        rgb, weights = chunk(origins, directions, depths)
        sources = rays.source_views(network)
        arguments = (sources, plain_origins, plain_directions, rays.NEAR, rays.FAR, rays.SAMPLES)
        whole = network(*arguments, inverse_depth=True)
    torch.testing.assert_close(weights, whole["proposal"]["weights"], rtol=1e-3, atol=1e-4)
    assert rgb.shape == whole["rgb"].shape and bool(rgb.isfinite().all())


def test_ratios_are_against_the_fastest_of_the_others(benchmark):
    ms = {"torch, float32, eager": 30.0, "OpenVINO, f32": 20.0, "OpenVINO, NNCF int8, f32": 12.0}
    ms |= {"shiftadd3d, add+shift, int8": 6.0, "shiftadd3d, add+shift, exact": 16.0, "shiftadd3d, add, exact": 1.0}
    table = benchmark.summary_table([{"model": "m", "batch": 1, "threads": 2, "ms": ms}])
    assert "| m, 1 picture, 2 threads | 6.0 | 5.00 | 2.00 | OpenVINO int8 | 16.0 | 1.25 |" in table


@pytest.mark.skipif(
    importlib.util.find_spec("openvino") is not None, reason="says what is missing only where it is missing"
)
def test_what_is_missing_is_one_line(benchmark, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["peers.py", "run"])
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    assert str(stopped.value) == "error: openvino, nncf: not installed; expected what `make peers` brings"


def test_instructions_hold_our_kernels_and_other_engines(benchmark, monkeypatch):
    monkeypatch.setenv("SHIFTADD3D_TARGET", "")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "")
    benchmark.hold_to(None)
    assert os.environ["SHIFTADD3D_TARGET"] == ""
    benchmark.hold_to("avx512_vnni")
    assert os.environ["SHIFTADD3D_TARGET"] == "avx512_vnni"
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == "AVX512_CORE_VNNI"
    assert os.environ["ATEN_CPU_CAPABILITY"] == "avx512"


def test_an_engine_that_cannot_be_held_does_not_take_part(load_benchmark, monkeypatch, tmp_path: Path):
    """ONNX Runtime takes the instructions that the CPU has."""
    benchmark, rays = load_benchmark("peers"), load_benchmark("peers_rays")
    for name in ("SHIFTADD3D_TARGET", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.setenv(name, "")
    assert not benchmark.is_held()
    benchmark.hold_to("avx2")
    assert benchmark.is_held()
    assert os.environ["ATEN_CPU_CAPABILITY"] == "avx2"
    assert list(benchmark.onnxruntime_solutions(tmp_path / "no.onnx", torch.zeros(1, 3, 224, 224), 1)) == []
    assert list(rays.onnxruntime_solutions(tmp_path / "no.onnx", (), 1)) == []


def test_instructions_that_engines_have_no_name_for_are_refused(benchmark):
    with pytest.raises(UserError, match="--instructions generic: expected one of avx512_vnni, avx512, avx2"):
        benchmark.hold_to("generic")


def test_a_page_says_that_a_cpu_was_held_to_less(benchmark, repository: Path):
    (facts, *_), _ = benchmark.read_results(repository / "docs" / "results" / "data")
    assert ", held to these instructions\n" in benchmark.by_machine([facts | {"held": True}], lambda _: "")
    assert "held" not in benchmark.by_machine([facts | {"held": False}], lambda _: "")


def test_both_measurements_write_the_same_facts_and_their_own_command(
    load_benchmark, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    written = []
    for name, own in (("peers", {"models": ("m",), "batches": (4,)}), ("peers_rays", {})):
        run = load_benchmark(name).Run
        for function in ("hold_to", "check_installed", "versions"):  # these need the other engines
            monkeypatch.setitem(run.write.__globals__, function, lambda *_: None)
        monkeypatch.setattr(run, "rows", lambda self: [{"threads": 2}])
        run(threads=(2,), rounds=3, instructions="avx512_vnni", out=tmp_path / name, **own)()
        (file,) = (tmp_path / name).iterdir()
        written.append(json.loads(file.read_text(encoding="utf-8")))
    pictures, rays = written
    assert pictures.keys() == rays.keys()
    assert pictures["rows"] == [{"threads": 2}] and pictures["held"]
    options = "--threads 2 --rounds 3 --instructions avx512_vnni"
    assert pictures["command"] == f"python benchmarks/peers.py run --models m --batches 4 {options}"
    assert rays["command"] == f"python benchmarks/peers_rays.py run {options}"
