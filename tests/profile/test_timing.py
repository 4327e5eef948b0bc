"""Functions that take turns, and what is made of their times."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from shiftadd3d import UserError
from shiftadd3d.profile.timing import Spread, copy_rate, interleaved, product_rate


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Seconds on the wall and of the thread, which calls alone move. So other work on the machine changes nothing."""
    now = SimpleNamespace(wall=0.0, thread=0.0)

    def sleep(seconds: float) -> None:
        now.wall += seconds

    clocks = {"perf_counter": lambda: now.wall, "thread_time": lambda: now.thread, "sleep": sleep}
    monkeypatch.setattr("shiftadd3d.profile.timing.time", SimpleNamespace(**clocks))
    return now


def work(clock: SimpleNamespace, seconds: float) -> None:
    clock.wall += seconds
    clock.thread += seconds


@pytest.fixture(params=[1, 2])
def torch_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_functions_take_turns_and_the_slower_one_is_found(clock: SimpleNamespace, torch_threads: int):
    order: list[str] = []

    def call(name: str, seconds: float) -> None:
        order.append(name)
        work(clock, seconds)

    times = interleaved({"short": lambda: call("short", 0.001), "long": lambda: call("long", 0.2)}, seconds=0.0)
    assert [times["short"].median, times["long"].median] == pytest.approx([0.001, 0.2])
    assert all(0 < spread.lower <= spread.median <= spread.upper for spread in times.values())
    rounds = "".join(name[0] for name in order).split("l")  # the short one is called again and again for a round
    assert len([calls for calls in rounds if calls]) >= 5


def test_rounds_may_be_counted_instead():
    order: list[str] = []
    interleaved({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3, seconds=0.0)
    turns = [name for name, _ in itertools.groupby(order)]
    assert turns == ["a", "b"] * (1 + 3)  # the first calls tell how often to call in a round


def test_waiting_counts_with_several_threads_only(clock: SimpleNamespace, torch_threads: int):
    def wait() -> None:
        work(clock, 0.002)
        clock.wall += 0.005

    times = interleaved({"waits": wait}, seconds=0.0)
    assert times["waits"].median == pytest.approx(0.002 if torch_threads == 1 else 0.007)


def test_other_devices_are_refused():
    with pytest.raises(UserError, match="device must be cpu or cuda, not 'tpu'"):
        interleaved({}, device="tpu")


def test_rates_are_those_of_the_fastest_quarter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "shiftadd3d.profile.timing.interleaved",
        lambda functions, device: {name: Spread(3.0, 2.0, 4.0) for name, run in functions.items() if run() is not None},
    )
    assert product_rate("cpu", torch.float32, size=256) == 2 * 256**3 / 2.0
    assert copy_rate("cpu", size=1 << 20) == 2 * (1 << 20) / 2.0


def test_engines_with_threads_of_their_own_rest_and_wake_up_before_what_counts(clock: SimpleNamespace):
    """Each call takes 10 ms, but 50 ms within 30 ms of a rest."""
    rested, expected = [-1.0], [0.0]

    def call() -> None:
        if clock.wall != expected[0]:  # someone has slept since the last call
            rested[0] = clock.wall
        clock.wall += 0.05 if clock.wall < rested[0] + 0.03 else 0.01
        expected[0] = clock.wall

    times = interleaved({"a": call, "b": call}, rounds=3, foreign=True)
    assert rested[0] > 0
    assert [times["a"].median, times["b"].upper] == pytest.approx([0.01, 0.01])
