"""The table of docs/results/peers.md: frozen models as one executable, beside what else runs fast on a CPU.

    make peers                      # OpenVINO and NNCF, into .venv
    python benchmarks/peers.py run
    python benchmarks/peers_rays.py run
    python benchmarks/peers.py report

The first installs what to compare with. The second writes docs/results/data/peers-SET.json, where SET are the
instructions that our kernels use on this CPU, and the third rays-SET.json beside it. With `--instructions SET`, names
are peers-SET-held.json and rays-SET-held.json. The last makes docs/results/peers.md from all of these files.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from energy import MODELS
from reporting import (
    DATA,
    NOT_MEASURED,
    code_digest,
    command_block,
    git_commit,
    machine_facts,
    machine_list,
    markdown_table,
    refuse_old,
    run_command,
    write_page,
    write_result,
)

if TYPE_CHECKING:
    from torch import Tensor

FILES = "peers-{}.json"
"""One for each set of instructions that our kernels use (`shiftadd3d.kernels.runtime.targets`), and one for each that a
CPU with more was held to."""
RAYS_FILES = "rays-{}.json"
"""The like, of `benchmarks/peers_rays.py`."""
EAGER = "torch, float32, eager"
OPENVINO = "OpenVINO, "
OURS = "shiftadd3d, "
RECIPES = ("mult", "add", "add+shift", "add+shift-attn+moe")
NUMERICS = ("exact", "fast", "int8")
Solution = Callable[[], Any]
SAME = (f"{OPENVINO}f32", "ONNX Runtime, float32")
"""What computes the dense original in float32, and has to come to the same logits."""


@dataclass
class Measurement:
    """Options of all measurements beside other engines, and the form of their JSON files."""

    threads: tuple[int, ...] = (1, 2)
    """CPU threads to compute with."""
    rounds: int = 11
    """Rounds in which all take turns, 2 or more. The median counts."""
    instructions: str | None = None
    """Limit our kernels to this target of `SHIFTADD3D_TARGET`, and the other engines to the like."""
    out: Path = DATA
    """Folder for the JSON file."""

    def write(
        self, script: str, files: str, options: dict[str, tuple[Any, ...]], rows: Callable[[], list[dict[str, Any]]]
    ) -> None:
        """Measure, and write the JSON file.

        Args:
            script: name of the script, for the command in the file.
            files: name of the file, with `{}` for the instructions.
            options: options of the command, besides those of all measurements.
            rows: measures.
        """
        hold_to(self.instructions)
        from shiftadd3d.kernels.runtime import targets

        check_installed()
        commit, instructions = git_commit(), targets.current().name
        measured = rows()
        options = {**options, "--threads": self.threads, "--rounds": (self.rounds,)}
        if self.instructions is not None:
            options["--instructions"] = (self.instructions,)
        words = [word for name, values in options.items() for word in (name, *map(str, values))]
        write_result(
            self.out / name_of(files, instructions, held=self.instructions is not None),
            {
                "rows": measured,
                "rounds": self.rounds,
                "instructions": instructions,
                "held": self.instructions is not None,
                "versions": versions(),
                "machine": machine_facts(),
                "commit": commit,
                "code": code_digest(),
                "command": shlex.join(["python", f"benchmarks/{script}", "run", *words]),
            },
        )


@dataclass
class Run(Measurement):
    """Time models of random weights, all solutions in turns: timm's original in other engines, ours frozen."""

    models: tuple[str, ...] = ("deit_tiny_patch16_224", "pvt_v2_b0")
    """timm's names."""
    batches: tuple[int, ...] = (1, 16)
    """Pictures at once, of 224 px."""

    def __call__(self) -> None:
        """Write the JSON file."""
        self.write("peers.py", FILES, {"--models": self.models, "--batches": self.batches}, self.rows)

    def rows(self) -> list[dict[str, Any]]:
        """Milliseconds of all solutions, for each model, number of threads and batch."""
        rows = []
        for model in self.models:
            with tempfile.TemporaryDirectory() as folder:
                dense = {batch: write_onnx(model, batch, Path(folder)) for batch in self.batches}
                for threads in self.threads:
                    for batch in self.batches:
                        ms = measure(model, batch, threads, dense[batch], self.rounds)
                        rows.append({"model": model, "batch": batch, "threads": threads, "ms": ms})
        return rows


def name_of(files: str, instructions: str, *, held: bool) -> str:
    """The name of a file of results. What a CPU was held to must not replace what another CPU has measured."""
    return files.format(f"{instructions}-held" if held else instructions)


ONEDNN_LIMIT = "ONEDNN_MAX_CPU_ISA"
LIMITS = {"avx512_vnni": "AVX512_CORE_VNNI", "avx512": "AVX512_CORE", "avx2": "AVX2"}
"""What oneDNN, which torch and OpenVINO compute products with, calls the instructions of our targets."""
ATEN_LIMIT = "ATEN_CPU_CAPABILITY"
"""Of torch's own loops. It knows only `avx512` and `avx2`."""


def hold_to(instructions: str | None) -> None:
    """Have this process use no more than these instructions, as far as engines can be told. Before any computes.

    Raises:
        UserError: if the engines have no name for them.
    """
    from shiftadd3d._errors import UserError
    from shiftadd3d.kernels.runtime import targets

    if instructions is None:
        return
    if instructions not in LIMITS:
        raise UserError(f"--instructions {instructions}: expected one of {', '.join(LIMITS)}")
    os.environ[targets.ENVIRONMENT_VARIABLE] = instructions
    os.environ[ONEDNN_LIMIT] = LIMITS[instructions]
    os.environ[ATEN_LIMIT] = "avx2" if instructions == "avx2" else "avx512"


def is_held() -> bool:
    """Whether this process uses no more than some instructions."""
    return bool(os.environ.get(ONEDNN_LIMIT))


def check_installed() -> None:
    """Raise `UserError` unless the other engines are there."""
    from shiftadd3d._errors import UserError

    missing = [name for name in ("openvino", "nncf", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)}: not installed; expected what `make peers` brings")


def versions() -> dict[str, str]:
    """Of what is compared."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "timm", "openvino", "nncf", "onnxruntime", "apache-tvm")}


def images_of(batch: int) -> Tensor:
    """[batch, 3, 224, 224]."""
    import torch

    return torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def write_onnx(name: str, batch: int, folder: Path) -> Path:
    """timm's original as an ONNX file, for one size of batch: engines do best with what they know."""
    import timm
    import torch

    torch.manual_seed(0)
    path = folder / f"{name}-{batch}.onnx"
    model = timm.create_model(name, exportable=True).eval()
    torch.onnx.export(model, (images_of(batch),), path, dynamo=True, external_data=False, verbose=False)
    return path


def measure(name: str, batch: int, threads: int, dense: Path, rounds: int) -> dict[str, float]:
    """Milliseconds a call of each solution, in turns."""
    import torch

    from shiftadd3d.profile.timing import interleaved

    torch.set_num_threads(threads)
    images = images_of(batch)
    with torch.inference_mode():
        solutions: dict[str, Solution] = {}
        for solution, run in [
            *torch_solutions(name, images),
            *openvino_solutions(dense, images, threads),
            *onnxruntime_solutions(dense, images, threads),
            *our_solutions(name, images),
        ]:
            outcome = run()
            if solution in SAME:
                check_same(solution, outcome, solutions[EAGER]())
            solutions[solution] = run
        found = interleaved(solutions, rounds=rounds, foreign=True)
    ms = {solution: float(f"{1000 * times.median:.4g}") for solution, times in found.items()}
    print(f"{name}, batch {batch}, {threads} threads: {ms}", flush=True)
    del solutions, run
    gc.collect()  # pools of threads end with their engines
    return ms


def check_same(solution: str, outcome: Any, logits: Tensor) -> None:
    """Raise where an engine computes something else than torch."""
    import numpy as np

    found = np.asarray(outcome[0])
    scale = float(logits.abs().max())
    if found.shape != logits.shape or not np.allclose(found, logits.numpy(), atol=1e-3 * scale, rtol=0.0):
        raise AssertionError(f"{solution} does not compute what torch does")


def torch_solutions(name: str, images: Tensor) -> Iterator[tuple[str, Solution]]:
    """timm's original as everyone runs it."""
    import timm
    import torch

    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    yield EAGER, lambda: model(images)


def openvino_solutions(dense: Path, images: Tensor, threads: int) -> Iterator[tuple[str, Solution]]:
    """float32, bfloat16 where the CPU multiplies in it, and 8-bit integers by NNCF."""
    import nncf
    import openvino
    from nncf import Dataset, ModelType, quantize

    nncf.set_log_level(logging.ERROR)
    core, array = openvino.Core(), images.numpy()
    forms = openvino_forms(core)

    def compiled(model: Any, form: str) -> Solution:
        request = core.compile_model(model, "CPU", openvino_settings(form, threads)).create_infer_request()
        return lambda: request.infer({0: array})

    for form in forms:
        yield f"{OPENVINO}{form}", compiled(core.read_model(dense), form)
    quantized = quantize(
        core.read_model(dense),
        Dataset([images_of(len(images)).numpy() for _ in range(4)]),
        model_type=ModelType.TRANSFORMER,
        subset_size=4,
    )
    for form in forms:
        yield f"{OPENVINO}NNCF int8, {form}", compiled(quantized, form)


def openvino_forms(core: Any) -> list[str]:
    """Number formats that OpenVINO multiplies in on this CPU."""
    # If oneDNN is held to less, bfloat16 is emulated, and slow.
    has_bfloat16 = not is_held() and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ["f32"] + ["bf16"] * has_bfloat16


def openvino_settings(form: str, threads: int) -> dict[str, Any]:
    """For the least time of a call."""
    return {
        "INFERENCE_PRECISION_HINT": form,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }


def onnxruntime_solutions(dense: Path, images: Tensor, threads: int) -> Iterator[tuple[str, Solution]]:
    """float32, and 8-bit integers whose scales are found on the way. None if held: it takes what the CPU has."""
    if is_held():
        return
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    small = dense.with_name(f"{dense.stem}-int8.onnx")
    if not small.exists():
        model = onnx.load(dense)
        del model.graph.value_info[
            :
        ]  # it infers shapes itself, and takes what torch wrote of weights for a contradiction
        quantize_dynamic(model, small, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])
    for form, path in (("float32", dense), ("dynamic int8", small)):
        session = onnxruntime.InferenceSession(path, session_options(threads), providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: images.numpy()}
        yield f"ONNX Runtime, {form}", lambda session=session, feed=feed: session.run(None, feed)


def session_options(threads: int) -> Any:
    """Of ONNX Runtime, whose threads do not spin between calls."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def our_solutions(name: str, images: Tensor) -> Iterator[tuple[str, Solution]]:
    """Each recipe compiled, in each of the numerics; `add+shift` op by op as well."""
    import timm
    import torch

    import shiftadd3d
    from shiftadd3d.kernels import numerics
    from shiftadd3d.nn import freeze_

    for recipe in RECIPES:
        torch.manual_seed(0)
        model = timm.create_model(f"shiftadd_{name}", recipe=recipe).eval()
        freeze_(model, verbose=False)
        for form in NUMERICS:
            compiled = shiftadd3d.compile(model, images[:1], numerics=form)
            if compiled.reason is not None:
                raise AssertionError(f"{name}, {recipe}: not compiled: {compiled.reason}")
            yield f"{OURS}{recipe}, {form}", lambda compiled=compiled: compiled(images)
            if recipe == "add+shift":
                apart = numerics(form)(model)
                yield f"{OURS}{recipe}, {form}, op by op", lambda apart=apart: apart(images)


@dataclass
class Report:
    """Make docs/results/peers.md from the JSON files."""

    old: bool = False
    """Show speeds of code that has changed since, too."""

    def __call__(self) -> None:
        """Write the page."""
        if not self.old:
            refuse_old([*DATA.glob(FILES.format("*")), *DATA.glob(RAYS_FILES.format("*"))])
        write_page("peers", lambda template: render_report(*read_results(DATA), template))


def read_results(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Of pictures and of rays, what was written on each kind of machine, sorted by its instructions."""

    def read(files: str) -> list[dict[str, Any]]:
        return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(files.format("*")))]

    return read(FILES), read(RAYS_FILES)


def best_peer(ms: dict[str, float]) -> tuple[str, float]:
    """The fastest that is not ours, and its milliseconds."""
    return min(((name, time) for name, time in ms.items() if not name.startswith(OURS)), key=lambda pair: pair[1])


def render_report(results: list[dict[str, Any]], rays: list[dict[str, Any]], template: str) -> str:
    """The page: its template with the tables filled in."""
    everything = [*results, *rays]
    versions = dict.fromkeys(", ".join(map(" ".join, facts["versions"].items())) for facts in everything)
    filled = {
        "SUMMARY": by_machine(results, lambda facts: summary_table(facts["rows"])),
        "TABLES": by_machine(results, lambda facts: "\n\n".join(map(full_table, facts["rows"]))),
        "RAYS": by_machine(rays, lambda facts: "\n\n".join(map(rays_table, facts["rows"]))),
        "VERSIONS": "; ".join(versions) or NOT_MEASURED,
        "COMMANDS": command_block("peers", everything),
        "MACHINES": machine_list(everything),
    }
    for name, text in filled.items():
        template = template.replace("{{" + name + "}}", text)
    return template


def heading_of(facts: dict[str, Any]) -> str:
    """The instructions that our kernels used, and the CPU."""
    held = ", held to these instructions" if facts.get("held") else ""
    return f"**`{facts['instructions']}`**, {facts['machine']['cpu']}{held}"


def by_machine(results: list[dict[str, Any]], tables: Callable[[dict[str, Any]], str]) -> str:
    """Tables of each machine, below its CPU and the instructions that our kernels use there."""
    parts = [f"{heading_of(facts)}\n\n{tables(facts)}" for facts in results]
    return "\n\n".join(parts) or NOT_MEASURED


def summary_table(rows: list[dict[str, Any]]) -> str:
    """`add+shift` compiled, and how many times faster than others it is."""
    shown = []
    for row in rows:
        ms = row["ms"]
        name, time = best_peer(ms)
        int8, exact = ms[f"{OURS}add+shift, int8"], ms[f"{OURS}add+shift, exact"]
        shown.append(
            [
                place_of(row),
                f"{int8:,.1f}",
                f"{ms[EAGER] / int8:.2f}",
                f"{time / int8:.2f}",
                short_name(name),
                f"{exact:,.1f}",
                f"{ms[f'{OPENVINO}f32'] / exact:.2f}",
            ]
        )
    header = ["add+shift", "int8, ms", "torch / int8", "fastest peer / int8", "that peer", "exact, ms"]
    return markdown_table([*header, "OpenVINO f32 / exact"], shown)


def short_name(solution: str) -> str:
    """Of a peer: its engine, and what numbers it multiplies its weights as."""
    engine, numbers = solution.split(", ")[:2]
    return f"{engine} {numbers.removeprefix('NNCF ')}"


def pictures_of(row: dict[str, Any]) -> str:
    """The model of a row, and how many pictures at once."""
    return f"{MODELS.get(row['model'], row['model'])}, {row['batch']} picture{'s' * (row['batch'] > 1)}"


def place_of(row: dict[str, Any]) -> str:
    """What a row is about."""
    return f"{pictures_of(row)}, {row['threads']} thread{'s' * (row['threads'] > 1)}"


def full_table(row: dict[str, Any]) -> str:
    """All solutions of a row, the slowest first."""
    header = [place_of(row), "ms", "times faster than torch"]
    pairs = sorted(row["ms"].items(), key=lambda pair: -pair[1])
    return markdown_table(header, [[name, f"{ms:,.1f}", f"{row['ms'][EAGER] / ms:.2f}"] for name, ms in pairs])


def rays_table(row: dict[str, Any]) -> str:
    """All solutions of a chunk of rays, the slowest first."""
    threads = f"1,024 rays, {row['threads']} thread{'s' * (row['threads'] > 1)}"
    pairs = sorted(row["ms"].items(), key=lambda pair: -pair[1])
    rows = [
        [name, f"{ms:,.1f}", f"{row['ms'][EAGER] / ms:.2f}", f"{row['off'][name]:.4f}" if name in row["off"] else ""]
        for name, ms in pairs
    ]
    return markdown_table([threads, "ms", "times faster than torch", "colours off by"], rows)


def main() -> None:
    run_command({"run": Run, "report": Report}, __doc__)


if __name__ == "__main__":
    main()
