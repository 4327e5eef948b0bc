"""Comparable times of functions that do the same thing.

The speed of a machine changes: clocks change, and other processes use it. So functions take turns, round after round,
and medians are compared. Each round begins with a call that is not timed. It brings the function's code and data into
the caches, as if the function were called again and again.

With one thread, the processor time of that thread counts. So other work on a busy machine disturbs caches but not
clocks. With more threads, wall time counts, because they have to wait for one another.

`torch.utils.benchmark` finishes one statement before it starts the next one. It does not take turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from shiftadd3d._errors import UserError

__all__ = ["Spread", "clock", "copy_rate", "interleaved", "product_rate"]
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 25
# A round calls a short function again and again for so long: clocks tick in fractions of a microsecond.
_SECONDS_OF_A_ROUND = 0.004
# What takes longer has no use for caches that are warm.
_SECONDS_OF_A_LONG_CALL = 0.1
# Threads of OpenMP and of other engines' pools wait actively for some hundredths of a second after a call.
_SECONDS_OF_A_REST = 0.1
# A processor that has rested is slow at first: for milliseconds its clock is low and its wide units are off.
_SECONDS_TO_WAKE_UP = 0.05
_SECONDS_OF_A_FOREIGN_ROUND = 0.1
# More than the second-level cache of a graphics card holds: what the last call left there is gone.
_BYTES_TO_FLUSH = 256 << 20


@dataclass(frozen=True)
class Spread:
    """Seconds for one call: the median over the rounds, and the quartiles."""

    median: float
    lower: float
    upper: float


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    device: str = "cpu",
    seconds: float = 2.0,
    rounds: int | None = None,
    foreign: bool = False,
) -> dict[str, Spread]:
    """Time functions in turns.

    Args:
        functions: by name. Each has been called before, so that nothing is compiled or allocated now.
        device: ``"cpu"`` or ``"cuda"``. On CUDA, events of the current stream time each call, with cold caches.
        seconds: roughly how long to measure. There are at least 5 rounds and at most 25.
        rounds: exactly this many rounds instead, 2 or more.
        foreign: some functions compute in threads of their own. Then wall time counts on a CPU. Such threads wait
            actively for a while after a call, so there is a rest before each turn. A processor wakes up slowly from a
            rest, so calls of the first twentieth of a second are not timed, and those of a tenth are.

    Raises:
        UserError: for another device.
    """
    if device not in ("cpu", "cuda"):
        raise UserError(f"device must be cpu or cuda, not {device!r}")
    sample = _cpu_sampler(functions, foreign) if device == "cpu" else _cuda_sampler()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    began = time.perf_counter()
    for done in range(rounds or _MOST_ROUNDS):
        if rounds is None and done >= _LEAST_ROUNDS and time.perf_counter() - began > seconds:
            break
        for name, function in functions.items():
            samples[name].append(sample(name, function))
    return {name: _spread(values) for name, values in samples.items()}


def clock() -> Callable[[], float]:
    """The clock for a CPU: that of this thread if there is only one thread, else the wall clock."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def _cpu_sampler(
    functions: Mapping[str, Callable[[], Any]], foreign: bool = False
) -> Callable[[str, Callable[[], Any]], float]:
    now = time.perf_counter if foreign else clock()

    def seconds(function: Callable[[], Any], calls: int) -> float:
        began = now()
        for _ in range(calls):
            function()
        return (now() - began) / calls

    once = {name: seconds(function, 1) for name, function in functions.items()}
    of_a_round = _SECONDS_OF_A_FOREIGN_ROUND if foreign else _SECONDS_OF_A_ROUND
    calls = {name: max(1, round(of_a_round / max(first, 1e-7))) for name, first in once.items()}

    def sample(name: str, function: Callable[[], Any]) -> float:
        if foreign:
            time.sleep(_SECONDS_OF_A_REST)
            awake = now() + _SECONDS_TO_WAKE_UP
            while now() < awake:
                function()
        elif once[name] < _SECONDS_OF_A_LONG_CALL:
            function()
        return seconds(function, calls[name])

    return sample


def _cuda_sampler() -> Callable[[str, Callable[[], Any]], float]:
    flush = torch.empty(_BYTES_TO_FLUSH, dtype=torch.int8, device="cuda")

    def sample(name: str, function: Callable[[], Any]) -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        function()
        flush.zero_()
        began.record()
        function()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3

    return sample


def _spread(values: list[float]) -> Spread:
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper)


def product_rate(device: str, dtype: torch.dtype, size: int | None = None) -> float:
    """Operations per second (additions and multiplications) of torch's product of two large matrices.

    "Share of the peak" refers to this measured rate, not to the rate that the maker states.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        dtype: number format.
        size: rows and columns of the matrices; by default 1024 on a CPU and 8192 on a graphics card.
    """
    size = size or (8192 if device == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)  # once, untimed
    return 2 * size**3 / interleaved({"product": lambda: a @ b}, device)["product"].lower


def copy_rate(device: str, size: int = 128 << 20) -> float:
    """Bytes per second, read and written, when torch copies a large tensor."""
    a = torch.zeros(size, dtype=torch.int8, device=device)
    b = torch.zeros_like(a)
    return 2 * size / interleaved({"copy": lambda: b.copy_(a)}, device)["copy"].lower
