"""What only a GPU can tell: whether the CUDA kernels compute what their twins do, and how fast they are.

    python benchmarks/gpu_check.py pack --arch sm_90 --out gpu_check.zip

makes, where there is TVM and nvcc but no GPU, all that a machine with torch and timm lacks: this script, this package
and its kernels, compiled. There it needs no network, no compiler and no TVM:

    python -m zipfile -e gpu_check.zip gpu_check
    python gpu_check/gpu_check.py run --out results.json

Each section runs in a process of its own and is saved as it ends, so a kernel that breaks the device loses nothing.
Sections for which no time is left are dropped, and the results say so. With --dry-run, a CPU does all that a CPU can,
on tiny problems: cubins are opened and not run, and twins or kernels for CPUs take the places of those for GPUs.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shiftadd3d._errors import UserError
from shiftadd3d._report import write_json

if TYPE_CHECKING:
    from shiftadd3d.profile.kernel_cases import Case, Run, Setup

HERE = Path(__file__).resolve().parent
MANIFEST, BUNDLE = "pack.json", "bundle"
PARTS = ("kernels", "models", "nn", "profile")
"""Of this package, what the check needs besides the modules at its top."""
MOST_BYTES = 60 << 20
SECONDS = 450
GRAPH = ", CUDA graph"
Row = dict[str, Any]
Job = tuple[str, Callable[[], list[Row]]]
Sizes = tuple[tuple[int, ...], ...]

# --------------------------------------------------------------------------------------------------------------------
# Packing
# --------------------------------------------------------------------------------------------------------------------


def pack(out: Path, arch: str, most_bytes: int = MOST_BYTES) -> None:
    """Write the folder, or the zip file if `out` ends so.

    Raises:
        UserError: no such GPU, a kernel that cannot be compiled, something at `out` already, or too many bytes.
    """
    from reporting import git_commit

    from shiftadd3d.kernels import manage
    from shiftadd3d.kernels.runtime import targets

    targets.find(f"cuda-{arch}")
    if out.exists():
        raise UserError(f"{out} exists already: name a new folder or zip file")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "gpu_check"
        _copy_package(folder / "shiftadd3d")
        shutil.copyfile(__file__, folder / Path(__file__).name)
        manage.build_kernels(target=f"cuda-{arch}", out=folder / BUNDLE)
        write_json(folder / MANIFEST, {"arch": arch, "commit": git_commit()})
        made = folder
        if out.suffix == ".zip":
            made = Path(shutil.make_archive(str(folder), "zip", folder))
        size = sum(file.stat().st_size for file in ([made] if made.is_file() else made.rglob("*")) if file.is_file())
        if size > most_bytes:
            raise UserError(f"{out} would have {_mib(size)}, more than the {_mib(most_bytes)} that it may have")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(made, out)
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    print(f"wrote {out}: {_mib(size)}")


def _copy_package(to: Path) -> None:
    """The modules of this package that the check needs, as an import of them finds them."""
    top = Path(_folder_of("shiftadd3d"))
    to.mkdir(parents=True)
    for file in top.glob("*.py"):
        shutil.copyfile(file, to / file.name)
    for part in PARTS:
        source = _folder_of(f"shiftadd3d.{part}")
        shutil.copytree(source, to / part, ignore=shutil.ignore_patterns("__pycache__"))


def _folder_of(package: str) -> str:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return spec.submodule_search_locations[0]


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


# --------------------------------------------------------------------------------------------------------------------
# Sections
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """One part of the check.

    Attributes:
        jobs: of a setup and the arch of the packed kernels: what to do, by name, and how.
        seconds: that it may take at most on a GPU.
        sizes: of its problems.
        tiny: the same for a dry run.
    """

    jobs: Callable[[Setup, str], Iterator[Job]]
    seconds: int
    sizes: Sizes = ()
    tiny: Sizes = ()


def machine_jobs(setup: Setup, arch: str) -> Iterator[Job]:
    """What the machine is, and what it has been seen to do."""
    yield "machine", partial(_machine, setup)


def _machine(setup: Setup) -> list[Row]:
    import torch

    from shiftadd3d.profile.kernel_cases import name_of
    from shiftadd3d.profile.machine import machine_facts
    from shiftadd3d.profile.timing import copy_rate, product_rate

    on_cuda = setup.device == "cuda"
    size = {} if on_cuda else {"size": 64}
    rates = {name_of(dtype): product_rate(setup.device, dtype, **size) for dtype in (torch.float32, *setup.narrow)}
    missing = [name for name in ("tvm", "tvm_ffi", "nerfstudio", "tyro") if importlib.util.find_spec(name) is None]
    facts = machine_facts() | {"cuda": torch.version.cuda, "missing": missing}
    if on_cuda:
        facts["memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    return [facts | {"operations_per_second": rates, "copied_bytes_per_second": copy_rate(setup.device, **size)}]


def kernel_jobs(setup: Setup, arch: str) -> Iterator[Job]:
    """Each CUDA kernel on its trial, beside its twin."""
    from shiftadd3d.kernels import manage

    for variant in manage.all_variants(target=f"cuda-{arch}"):
        yield f"{variant.kernel.name} {variant.spec}", partial(_try_kernel, variant)


def _try_kernel(variant: Any) -> list[Row]:
    began = time.perf_counter()
    function = variant.kernel.load(variant.target, **variant.spec)
    outcome = "opened, not run" if function is None else "as its twin"
    return [{**variant.facts(), "outcome": outcome, "seconds": round(time.perf_counter() - began, 3)}]


def case_jobs(make: Callable[[Setup], Iterator[Case]], setup: Setup, arch: str) -> Iterator[Job]:
    """Each problem, all solutions in turns."""
    for case in make(setup):
        yield case.name, partial(_time, case, setup)


def group_cases(group: str, setup: Setup) -> Iterator[Case]:
    """Those of `shiftadd3d bench kernels`."""
    from shiftadd3d.profile.kernel_cases import cases

    return cases(group, setup)


def _time(case: Case, setup: Setup) -> list[Row]:
    import torch

    from shiftadd3d.profile.kernel_benchmark import measure_case

    with torch.inference_mode():
        if setup.device == "cuda":
            case = with_graphs(case)
        return measure_case(case, setup.device, seconds=1.0 if setup.device == "cuda" else 0.0)


def with_graphs(case: Case) -> Case:
    """Every solution a second time, as a CUDA graph: what is left is the GPU's work, without Python and launches."""

    def also(solutions: dict[str, Run]) -> dict[str, Run]:
        return solutions | {f"{name}{GRAPH}": captured(run) for name, run in solutions.items()}

    inexact = case.inexact | {f"{name}{GRAPH}" for name in case.inexact}
    return replace(case, ours=also(case.ours), others=also(case.others), inexact=inexact)


def captured(run: Run) -> Run:
    """What replays a call, captured the first time; the call has been made before, so that all code is loaded."""
    import torch

    from shiftadd3d.profile.kernel_cases import late

    def capture() -> Run:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outcome = run()

        def replay() -> Any:
            graph.replay()
            return outcome

        return replay

    return late(capture)


def classifier_cases(name: str, setup: Setup) -> Iterator[Case]:
    """A classifier of timm's, dense in torch and `add+shift`, frozen, on kernels; random weights."""
    import timm
    import torch

    from shiftadd3d.nn import freeze_

    for batch, pixels in setup.sizes or ():
        # A ViT is made for pictures of one size, a PVT takes any.
        options: dict[str, Any] = {"img_size": pixels} if name.startswith("deit") else {}
        torch.manual_seed(0)
        dense = timm.create_model(name, **options).eval().to(setup.device)
        frozen = timm.create_model(f"shiftadd_{name}", recipe="add+shift", **options).eval()
        freeze_(frozen, verbose=False)
        frozen.to(setup.device)
        images = torch.randn(batch, 3, pixels, pixels, device=setup.device)
        yield _classifier_case(name, dense, frozen, images, setup)


def _classifier_case(name: str, dense: Any, frozen: Any, images: Any, setup: Setup) -> Case:
    import torch

    from shiftadd3d.kernels import numerics
    from shiftadd3d.profile.kernel_cases import Case, name_of, rivals

    def ours(form: Any, dtype: torch.dtype = torch.float32) -> Run:
        def classify() -> torch.Tensor:
            narrow = torch.autocast(setup.device, dtype, enabled=dtype != torch.float32)
            with numerics(form), narrow:
                return frozen(images)

        return classify

    with torch.inference_mode():
        reference = ours("twin")().double()
    others = rivals(dense, (images,), setup)
    return Case(
        group=name,
        name=f"{len(images)} x {images.shape[-1]} px",
        operations=None,
        bytes=4 * images.numel(),
        ours={"add+shift exact": ours("exact"), "add+shift fast": ours("fast")}
        | {f"add+shift fast, {name_of(dtype)}": ours("fast", dtype) for dtype in setup.narrow},
        others=others,
        reference=reference,
        inexact=frozenset(others),
    )


def _groups(name: str, seconds: int, sizes: Sizes, tiny: Sizes) -> Section:
    return Section(partial(case_jobs, partial(group_cases, name)), seconds, sizes, tiny)


def _classifier(name: str, seconds: int) -> Section:
    return Section(partial(case_jobs, partial(classifier_cases, name)), seconds, ((64, 224), (1, 224)), ((2, 32),))


# What matters most comes first: it is the last that is dropped.
SECTIONS: dict[str, Section] = {
    "machine": Section(machine_jobs, 60),
    "kernels": Section(kernel_jobs, 150),
    "matshift": _groups(
        "matshift",
        60,
        ((25088, 128, 1024), (12608, 192, 768), (12608, 768, 3072), (32000, 64, 256)),
        ((8, 16, 32),),
    ),
    "matadd": _groups("matadd", 45, ((64, 3, 197, 64), (64, 1, 3136, 32), (1, 3, 197, 64)), ((1, 2, 9, 8),)),
    "view-attention": _groups("view-attention", 45, ((32000, 10, 64),), ((16, 3, 32),)),
    "deit": _classifier("deit_tiny_patch16_224", 100),
    "gnt": _groups("gnt", 80, ((500, 64, 10),), ((2, 4, 3),)),
    "moe": _groups("moe", 45, ((12608, 192, 768), (65536, 64, 256)), ((16, 16, 32),)),
    "mlp": _groups("mlp", 45, ((12608, 192, 768), (32000, 64, 256)), ((16, 16, 32),)),
    "pvt": _classifier("pvt_v2_b0", 110),
    "gather": _groups("gather", 30, ((500, 64, 10),), ((2, 4, 3),)),
}


# --------------------------------------------------------------------------------------------------------------------
# A process that works on one section
# --------------------------------------------------------------------------------------------------------------------


def work(name: str, arch: str, dry: bool, after: int, seconds: float, file: Path) -> None:
    """Do the jobs of a section from a number on, and append what they are and what they find to a file, line by line.

    Args:
        seconds: after so many no job begins.
    """
    import torch

    from shiftadd3d.profile.kernel_benchmark import notes_of

    began, setup = time.monotonic(), setup_of(SECTIONS[name], dry)
    with file.open("a", encoding="utf-8") as lines:

        def tell(**facts: Any) -> None:
            lines.write(json.dumps(facts) + "\n")
            lines.flush()

        for number, (job, do) in enumerate(SECTIONS[name].jobs(setup, arch)):
            if number < after:
                continue
            if time.monotonic() - began > seconds:
                tell(cut=job)
                return
            tell(number=number, job=job)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always", RuntimeWarning)
                try:
                    rows = do()
                except Exception as problem:
                    rows = [{"case": job, "failed": f"{type(problem).__name__}: {problem}".strip().splitlines()[0]}]
            tell(number=number, rows=rows, notes=notes_of(told))
            del do
            if setup.device == "cuda":
                torch.cuda.synchronize()  # a broken device stays broken: another process does the next job
            if "torch._dynamo" in sys.modules:
                torch.compiler.reset()  # it compiles a function for eight problems, and no more after that
            gc.collect()


def setup_of(section: Section, dry: bool) -> Setup:
    """On a GPU with torch.compile's ordinary mode: its search for the best takes longer than there is."""
    import torch

    from shiftadd3d.profile.kernel_cases import Setup

    if dry:
        return Setup("cpu", section.tiny, (torch.bfloat16, torch.float16), {"backend": "eager"})
    both = torch.cuda.get_device_capability() >= (8, 0)
    return Setup("cuda", section.sizes, (torch.bfloat16, torch.float16) if both else (torch.float16,), {})


# --------------------------------------------------------------------------------------------------------------------
# Running all of them
# --------------------------------------------------------------------------------------------------------------------


def run(out: Path, dry: bool, seconds: float, names: Sequence[str] = ()) -> dict[str, Any]:
    """Run sections, all if none is named, and write what they find to `out` after each.

    Raises:
        UserError: there is no such section or no GPU, kernels were packed for another one, or the file cannot be
            written.
    """
    if unknown := [name for name in names if name not in SECTIONS]:
        raise UserError(f"no section {unknown[0]!r}: expected some of {', '.join(SECTIONS)}")
    began, packed = time.monotonic(), HERE / MANIFEST
    manifest = json.loads(packed.read_text(encoding="utf-8")) if packed.is_file() else None
    arch = check_machine(manifest, dry)
    results: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": manifest["commit"] if manifest else "unknown",
        "arch": arch,
        "dry_run": dry,
        "seconds": 0.0,
        "sections": {},
    }
    write_json(out, results)
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "SHIFTADD3D_CACHE": str(Path(scratch, "kernels"))}
        if manifest:
            environment["SHIFTADD3D_BUNDLE"] = str(HERE / BUNDLE)
        for name in names or SECTIONS:
            left = seconds - (time.monotonic() - began)
            # Sections share the time of a GPU. A dry run may be on a slow or busy CPU.
            limit = left if dry else min(left, SECTIONS[name].seconds)
            facts = run_section(name, arch, dry, limit, Path(scratch), environment)
            results["sections"][name] = facts
            results["seconds"] = round(time.monotonic() - began, 1)
            write_json(out, results)
            print(f"{name}: {summary(facts)}", flush=True)
    return results


def check_machine(manifest: dict[str, Any] | None, dry: bool) -> str:
    """The arch that kernels are for.

    Raises:
        UserError: there is no GPU, or kernels were packed for another one.
    """
    import torch

    from shiftadd3d.kernels.runtime import targets

    if dry:
        if manifest is None:
            raise UserError("a dry run is one of what `pack` made: run the gpu_check.py in there")
        return manifest["arch"]
    if not torch.cuda.is_available():
        raise UserError("there is no GPU here that torch can use (--dry-run does what a CPU can do)")
    arch = targets.of_gpu(torch.device("cuda", torch.cuda.current_device())).arch
    if manifest and manifest["arch"] != arch:
        raise UserError(
            f"kernels were packed for {manifest['arch']}, and this GPU is {arch}: pack them with --arch {arch}"
        )
    return arch


def run_section(
    name: str, arch: str, dry: bool, seconds: float, scratch: Path, environment: dict[str, str]
) -> dict[str, Any]:
    """Have processes work on a section until it is done or the time is over; one that breaks is followed by another.

    Returns:
        ``rows`` and ``notes`` of its jobs, ``seconds``, and ``cut`` where time has run out, or ``failed`` where a
        process did not even begin.
    """
    began, after = time.monotonic(), 0
    facts: dict[str, Any] = {"rows": [], "notes": []}
    command = [sys.executable, str(Path(__file__).resolve()), "work", name, "--arch", arch]
    command += ["--dry-run"] if dry else []
    while True:
        left = seconds - (time.monotonic() - began)
        if left < 1:
            facts["cut"] = "no time left"
            break
        file = scratch / f"{name}-{after}.jsonl"
        limits = ["--after", str(after), "--seconds", str(0.8 * left), "--file", str(file)]
        # A file: a pipe would be waited for, as long as processes of the compiler hold it.
        log = scratch / f"{name}-{after}.log"
        try:
            with log.open("w") as said:
                done = subprocess.run([*command, *limits], env=environment, stdout=said, stderr=said, timeout=left)
            status = done.returncode
            broken = "" if status == 0 else f"exit status {status}: {_last_line(log.read_text(errors='replace'))}"
        except subprocess.TimeoutExpired:
            broken = "stopped: it took too long"
        reached = collect(file, facts, broken)
        if not broken or "cut" in facts:
            break
        if reached is None:
            facts["failed"] = broken
            break
        after = reached + 1
    return {**facts, "seconds": round(time.monotonic() - began, 1)}


def collect(file: Path, facts: dict[str, Any], broken: str) -> int | None:
    """Take over what a process has written.

    Returns:
        The number of the last job that it began, or None.
    """
    reached, unfinished = None, None
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            told = json.loads(line)
        except ValueError:  # the process ended in the middle of it
            break
        if "cut" in told:
            facts["cut"] = f"no time left from {told['cut']} on"
        elif "rows" in told:
            facts["rows"] += told["rows"]
            facts["notes"] += [note for note in told["notes"] if note not in facts["notes"]]
            unfinished = None
        else:
            reached, unfinished = told["number"], told["job"]
    if unfinished is not None:
        facts["rows"].append({"case": unfinished, "failed": broken})
    return reached


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def summary(facts: dict[str, Any]) -> str:
    """A section in a line."""
    failed = [row for row in facts["rows"] if "failed" in row]
    text = f"{len(facts['rows'])} rows, {len(failed)} failed, {facts['seconds']:.0f} s"
    told = [facts[key] for key in ("failed", "cut") if key in facts]
    return "; ".join([text, *told, *facts["notes"]])


def show(results: dict[str, Any]) -> None:
    """Print what failed, and how many times faster than torch in float32 everything is."""
    from shiftadd3d.profile.kernel_benchmark import ratio_table

    sections = results["sections"]
    for row in (row for facts in sections.values() for row in facts["rows"] if "failed" in row):
        words = [str(row[key]) for key in ("group", "case", "solution") if key in row]
        print(f"failed: {', '.join(words)}: {row['failed']}")
    device = "cpu" if results["dry_run"] else "cuda"
    machine = (sections.get("machine", {}).get("rows") or [{}])[0]
    for facts in sections.values():
        rows = [{**row, "threads": 1} for row in facts["rows"] if "solution" in row]
        if any("seconds" in row for row in rows):
            given = {"device": device, "machine": {"device": "GPU", **machine}, "rows": rows}
            print(f"\n{ratio_table(given, rows[0]['group'], 1)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    packing = verbs.add_parser("pack", help="make what the machine with the GPU lacks")
    packing.add_argument("--out", type=Path, default=Path("gpu_check.zip"), help="a new folder, or a file named *.zip")
    packing.add_argument("--arch", default="sm_90", help="of the GPU: sm_75, sm_80, sm_89, sm_90 or later")
    running = verbs.add_parser("run", help="check and measure")
    running.add_argument("--out", type=Path, default=Path("results.json"), metavar="FILE", help="what was found")
    running.add_argument("--dry-run", action="store_true", help="what a CPU can do of it, on tiny problems")
    running.add_argument("--seconds", type=float, default=SECONDS, help="sections that take longer are dropped")
    running.add_argument("--sections", default="", help="some of them, with commas between; all by default")
    working = verbs.add_parser("work", help="one section in this process; `run` calls this")
    working.add_argument("section", choices=list(SECTIONS))
    working.add_argument("--arch", required=True)
    working.add_argument("--dry-run", action="store_true")
    working.add_argument("--after", type=int, default=0, help="number of the first job")
    working.add_argument("--seconds", type=float, required=True)
    working.add_argument("--file", type=Path, required=True)
    given = parser.parse_args()
    try:
        if given.verb == "pack":
            pack(given.out, given.arch)
        elif given.verb == "run":
            names = [name for name in given.sections.split(",") if name]
            show(run(given.out, given.dry_run, given.seconds, names))
        else:
            work(given.section, given.arch, given.dry_run, given.after, given.seconds, given.file)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
