"""What every kernel has to stand: many threads, forks, smaller CPUs, and being called for ever.

Each kernel's own trial, which compares it with its twin, serves as the work to do: a new kernel is held to all of this
without a line written for it.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch

import shiftadd3d.kernels
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime.kernel import KERNELS, Kernel

pytest.importorskip("tvm")

for module in pkgutil.iter_modules(shiftadd3d.kernels.__path__):
    importlib.import_module(f"{shiftadd3d.kernels.__name__}.{module.name}")

every_kernel = pytest.mark.parametrize(
    "kernel",
    [kernel for name, kernel in sorted(KERNELS.items()) if next(iter(kernel.variants(targets.TARGETS[0])), None)],
)


def example(kernel: Kernel) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The first variant that is built ahead, compiled, and what it was compiled for."""
    specs = [dict(spec) for spec in kernel.variants(targets.current())]
    if not specs:
        pytest.skip(f"{kernel.name} has no variant for {targets.current().name}")
    spec = specs[0]
    function = kernel.function(**spec)
    assert function is not None
    return function, spec


@every_kernel
def test_eight_python_threads_at_once(kernel: Kernel, torch_threads: int):
    function, spec = example(kernel)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(3):
                kernel.trial(function, **spec)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


@every_kernel
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_computes_the_same(kernel: Kernel):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    function, spec = example(kernel)
    calls = recorded(kernel, function, spec)
    expected = [[argument.clone() for argument in call if isinstance(argument, torch.Tensor)] for call in calls]
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # as workers of data loaders do: torch's own threads have not come along either
            for call in calls:
                function(*call)
            found = [[argument for argument in call if isinstance(argument, torch.Tensor)] for call in calls]
            same = all(
                torch.equal(*(tensor.flatten().view(torch.uint8) for tensor in (a, b)))
                for one, other in zip(found, expected, strict=True)
                for a, b in zip(one, other, strict=True)
            )
            os._exit(0 if same else 3)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    torch.set_num_threads(before)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0
            return
        time.sleep(0.1)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


@every_kernel
@pytest.mark.slow
def test_ten_thousand_calls_do_not_grow_memory(kernel: Kernel):
    function, spec = example(kernel)
    call = recorded(kernel, function, spec)[0]
    process = psutil.Process()
    for _ in range(500):
        function(*call)
    before = process.memory_info().rss
    for _ in range(10_000):
        function(*call)
    assert process.memory_info().rss - before < 2 << 20


@every_kernel
@pytest.mark.slow
@pytest.mark.parametrize("name", ["generic", "avx2"])
def test_a_smaller_cpu_gets_a_kernel_that_passes_its_trial(kernel: Kernel, name: str, on_target: Callable[[str], None]):
    on_target(name)
    function, spec = example(kernel)
    kernel.trial(function, **spec)


def recorded(kernel: Kernel, function: Callable[..., Any], spec: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The arguments of the calls that a trial makes."""
    calls: list[tuple[Any, ...]] = []

    def recording(*arguments: Any) -> Any:
        calls.append(arguments)
        return function(*arguments)

    kernel.trial(recording, **spec)
    assert calls
    return calls
