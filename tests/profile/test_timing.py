"""Functions that take turns, and what is made of their times."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace

import pytest
import torch

from shiftadd3d import UserError
from shiftadd3d.profile.timing import copy_rate, interleaved, product_rate


def spin(seconds: float) -> None:
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        pass


@pytest.mark.parametrize("torch_threads", [1, 2])
def test_functions_take_turns_and_the_slower_one_is_found(torch_threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(torch_threads)
    order: list[str] = []

    def work(name: str, size: int) -> None:
        order.append(name)
        torch.ones(size, size).mm(torch.ones(size, size))

    try:
        times = interleaved({"short": lambda: work("short", 50), "long": lambda: work("long", 600)}, seconds=0.0)
    finally:
        torch.set_num_threads(before)
    assert times["long"].median > 4 * times["short"].median  # it has more than a thousand times the work
    assert all(0 < spread.lower <= spread.median <= spread.upper for spread in times.values())
    rounds = "".join(name[0] for name in order).split("l")  # the short one is called again and again for a round
    assert len([calls for calls in rounds if calls]) >= 5


def test_rounds_may_be_counted_instead():
    order: list[str] = []
    interleaved({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3, seconds=0.0)
    turns = [name for name, _ in itertools.groupby(order)]
    assert turns == ["a", "b"] * (1 + 3)  # the first calls tell how often to call in a round


def test_with_one_thread_waiting_does_not_count():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = interleaved({"waits": lambda: time.sleep(0.005), "works": lambda: spin(0.002)}, seconds=0.0)
    finally:
        torch.set_num_threads(before)
    assert times["waits"].median < 0.001


def test_other_devices_are_refused():
    with pytest.raises(UserError, match="device must be cpu or cuda, not 'tpu'"):
        interleaved({}, device="tpu")


def test_rates_are_those_of_a_machine():
    assert 1e8 < product_rate("cpu", torch.float32, size=256) < 1e14
    assert 1e7 < copy_rate("cpu", size=1 << 20) < 1e13


def test_engines_with_threads_of_their_own_rest_and_wake_up_before_what_counts(monkeypatch):
    """A clock that calls alone move: each takes 10 ms, but 50 ms within 30 ms of a rest."""
    clock = SimpleNamespace(now=0.0, rested=-1.0)

    def rest(seconds: float) -> None:
        clock.now += seconds
        clock.rested = clock.now

    def call() -> None:
        clock.now += 0.05 if clock.now < clock.rested + 0.03 else 0.01

    monkeypatch.setattr("shiftadd3d.profile.timing.time", SimpleNamespace(perf_counter=lambda: clock.now, sleep=rest))
    times = interleaved({"a": call, "b": call}, rounds=3, foreign=True)
    assert clock.rested > 0
    assert [times["a"].median, times["b"].upper] == pytest.approx([0.01, 0.01])
