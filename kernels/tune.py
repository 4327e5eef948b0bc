"""Finding out what suits this machine best, and writing it down (see `shiftadd3d.kernels.records`).

Two kernels for CPUs leave something to choose: how MatShift divides its rows into blocks, which is decided with every
call and costs no compilation to try; and the float32 product of `shiftadd3d.kernels.dense`, whose schedule TVM's
MetaSchedule searches for. Kernels whose instructions are chosen by hand have no other schedule to search.

MetaSchedule's own builder and runner start processes that import TVM, and torch with it, again and again, and give up
after 30 seconds, which is less than that takes on a busy machine. Here candidates are compiled and timed in this
process instead. Its cost model is xgboost's where that is installed (the dependency group ``bench``); else it guesses.
"""

from __future__ import annotations

import inspect
import itertools
import math
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from shiftadd3d._errors import UserError
from shiftadd3d.kernels import cache, dense, power_of_two, records, targets
from shiftadd3d.kernels.kernel import link, load_library
from shiftadd3d.kernels.numerics import COMPILED, Numerics
from shiftadd3d.kernels.shift_product import forms
from shiftadd3d.kernels.timing import interleaved

__all__ = ["SHAPES", "TUNABLE", "tune"]

#: Rows, inputs, outputs: linear layers of PVT and GNT.
SHAPES = ((3136, 64, 512), (784, 1024, 128), (196, 192, 768), (4096, 256, 64))

# What MatShift's blocks may take up of the second-level cache, and how many rows they may have.
_BLOCKS = tuple(
    {"bytes": kib << 10, "rows": rows} for kib, rows in itertools.product((96, 192, 384, 768), (96, 192, 384))
)
# A choice is put on record if it gains so much: less is noise.
_LEAST_GAIN = 1.03

Report = Callable[[str], None]


def tune(
    kernels: list[str], trials: int, out: Path | None = None, report: Report = lambda line: None
) -> tuple[Path, list[dict[str, Any]]]:
    """Search, with as many threads as torch uses now, for this process's target.

    Args:
        kernels: keys of `TUNABLE`; all if empty.
        trials: schedules that MetaSchedule may measure for each shape.
        out: the folder of the records; the user's own if None.
        report: called with a line of text for everything found.

    Returns:
        The file, and what has been found: kernel, problem, choice (None where nothing beats what is done anyway), and
        how many times faster that makes it.

    Raises:
        UserError: for kernels that are not there, and numbers of trials below 1.
    """
    for name in kernels:
        if name not in TUNABLE:
            raise UserError(f"kernel {name!r} cannot be tuned: expected some of {', '.join(TUNABLE)}")
    if trials < 1:
        raise UserError(f"trials must be 1 or more, not {trials}")
    found = []
    for name in kernels or TUNABLE:
        for problem, choice, gain in TUNABLE[name](trials):
            gained = choice if gain >= _LEAST_GAIN else None
            found.append({"kernel": name, "problem": problem, "choice": gained, "gain": round(gain, 3)})
            report(f"{name}, {_words(problem)}: {f'{gain:.2f} times as fast' if gained else 'nothing better found'}")
    kept = [{**one, "threads": torch.get_num_threads()} for one in found if one["choice"] is not None]
    return records.write(out or records.user_folder(), targets.current().name, kept), found


def _words(problem: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in problem.items())


def _tune_matshift(trials: int) -> Iterator[tuple[dict[str, Any], dict[str, Any], float]]:
    """The geometric mean over `SHAPES` decides; `trials` plays no part, as there are few blocks to choose from."""
    chosen: dict[str, Numerics] = {}
    for numerics in COMPILED:
        chosen.setdefault(forms(targets.current(), numerics, 4, 1, "float32")[0], numerics)
    for form, numerics in chosen.items():
        gains = [0.0] * len(_BLOCKS)
        for shape in SHAPES:
            for i, gain in enumerate(_gains_of_blocks(form, numerics, *shape)):
                gains[i] += math.log(gain) / len(SHAPES)
        best = max(range(len(_BLOCKS)), key=gains.__getitem__)
        yield {"form": form}, _BLOCKS[best], math.exp(gains[best])


def _gains_of_blocks(form: str, numerics: Numerics, rows: int, inputs: int, outputs: int) -> list[float]:
    x = torch.randn(rows, inputs)
    codes, offset, _ = power_of_two.encode(torch.randn(outputs, inputs))
    packed = power_of_two.pack(codes, 4)

    def run(choice: dict[str, Any] | None) -> Callable[[], Any]:
        def call() -> Any:
            with records.trying("matshift", choice, form=form):
                return torch.ops.shiftadd3d.matshift(x, packed, offset, None, 4, "none", numerics)

        return call

    runs = {"as it is": run(None), **{str(i): run(block) for i, block in enumerate(_BLOCKS)}}
    for one in runs.values():
        one()
    times = interleaved(runs, seconds=1.0)
    return [times["as it is"].median / times[str(i)].median for i in range(len(_BLOCKS))]


def _tune_dense(trials: int) -> Iterator[tuple[dict[str, Any], dict[str, Any], float]]:
    for rows, inputs, outputs in SHAPES:
        problem = {"rows": rows, "inputs": inputs, "outputs": outputs}
        trace = search_schedule(trials, **problem)
        x, weight = torch.randn(rows, inputs), torch.randn(inputs, outputs)

        def run(
            choice: dict[str, Any] | None,
            problem: dict[str, int] = problem,
            x: torch.Tensor = x,
            weight: torch.Tensor = weight,
        ) -> Callable[[], Any]:
            with records.trying("dense", choice, **problem):
                spec = dense.specification(targets.current(), **problem)
            function = dense.DENSE.load(targets.current(), **spec)
            return lambda: dense.outcome(function, x, weight)

        times = interleaved({"by hand": run(None), "found": run({"trace": trace})}, seconds=1.0)
        yield problem, {"trace": trace}, times["by hand"].median / times["found"].median


def search_schedule(trials: int, rows: int, inputs: int, outputs: int) -> Any:
    """Have MetaSchedule search for a schedule of `dense`.

    Returns:
        The trace of the best one it measured, as plain types.

    Raises:
        RuntimeError: if not one of the trials worked.
    """
    import tvm

    _import_intrinsics()
    from tvm.s_tir import meta_schedule

    target = targets.current()
    tvm_target = tvm.target.Target({**dict(target.tvm_target().export()), "num-cores": torch.get_num_threads()})
    module = dense.module(rows, inputs, outputs)
    x, weight = torch.randn(rows, inputs), torch.randn(inputs, outputs)
    with tempfile.TemporaryDirectory(dir=cache.folder()) as work:
        builder, runner = _in_this_process(Path(work), lambda function: dense.outcome(function, x, weight))
        database = meta_schedule.tir_integration.tune_tir(
            mod=module,
            target=tvm_target,
            work_dir=work,
            max_trials_global=trials,
            num_trials_per_iter=min(trials, 16),
            builder=builder,
            runner=runner,
            strategy=meta_schedule.search_strategy.EvolutionarySearch(
                # For few trials, no more candidates than they choose from: most of the time goes into making them.
                population_size=min(512, 16 * trials),
                init_min_unmeasured=min(50, trials),
            ),
            cost_model="xgb" if find_spec("xgboost") else "random",
            num_tuning_cores=torch.get_num_threads(),
            seed=0,
        )
        best = database.query_tuning_record(module, tvm_target, "main")
    if best is None:
        raise RuntimeError(f"none of {trials} schedules could be compiled and run")
    return _plain(best.trace.as_json())


def _import_intrinsics() -> None:
    """Import what MetaSchedule imports first of all, in seconds.

    Each of TVM's 250 intrinsics asks `inspect.stack` for the source of all frames it is defined within. Those of
    Python's import system have none, and where they might come from is looked for in all modules, thousands of them
    beside torch: two minutes. TVM needs to know the frames, and no source, of functions that no class is around.
    """

    def frames(context: int = 1) -> list[inspect.FrameInfo]:
        return [
            inspect.FrameInfo(frame, frame.f_code.co_filename, line, frame.f_code.co_name, None, None)
            for frame, line in traceback.walk_stack(sys._getframe(1))
        ]

    with mock.patch.object(inspect, "stack", frames):
        import tvm.s_tir.tensor_intrin  # noqa: F401


def _in_this_process(work: Path, run: Callable[[Any], Any]) -> tuple[Any, Any]:
    """A builder and a runner for MetaSchedule; `run` calls a compiled function."""
    import tvm
    from tvm.ir.utils import derived_object
    from tvm.s_tir.meta_schedule.builder import BuilderResult, PyBuilder
    from tvm.s_tir.meta_schedule.runner import PyRunner, PyRunnerFuture, RunnerResult

    numbers = itertools.count()

    @derived_object
    class Builder(PyBuilder):
        def build(self, build_inputs: list[Any]) -> list[Any]:
            return [self._build(one) for one in build_inputs]

        def _build(self, one: Any) -> Any:
            # MetaSchedule removes the folder of what it has timed.
            library = work / str(next(numbers)) / "candidate.so"
            library.parent.mkdir()
            try:
                link(tvm.compile(one.mod, target=one.target).mod, library)
            except Exception as error:
                return BuilderResult(None, str(error))
            return BuilderResult(str(library), None)

    @derived_object
    class Future(PyRunnerFuture):
        def __init__(self, seconds: list[float] | None, error: str | None) -> None:
            super().__init__()
            self.outcome = RunnerResult(seconds, error)

        def done(self) -> bool:
            return True

        def result(self) -> Any:
            return self.outcome

    @derived_object
    class Runner(PyRunner):
        def run(self, runner_inputs: list[Any]) -> list[Any]:
            return [self._run(one) for one in runner_inputs]

        def _run(self, one: Any) -> Any:
            try:
                function = load_library(Path(one.artifact_path))["main"]
                run(function)
                return Future([interleaved({"": lambda: run(function)}, seconds=0.0)[""].median], None)
            except Exception as error:
                return Future(None, str(error))

    return Builder(), Runner()


def _plain(value: Any) -> Any:
    """TVM's containers and numbers as those of Python."""
    if isinstance(value, (str, bool)) or value is None:
        return str(value) if isinstance(value, str) else value
    if isinstance(value, (int, float)):
        return value
    if hasattr(value, "value"):
        return _plain(value.value)
    return [_plain(one) for one in value]


#: Functions that yield problem, best choice and gain, given a number of trials.
TUNABLE: dict[str, Callable[[int], Iterator[tuple[dict[str, Any], dict[str, Any], float]]]] = {
    "matshift": _tune_matshift,
    "dense": _tune_dense,
}
