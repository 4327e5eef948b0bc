import io
import re
import threading
from types import SimpleNamespace

import pytest
from rich.console import Console

from shiftadd3d import _progress
from shiftadd3d._progress import clock_time, duration, progress, say_if_slow


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(_progress, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def lines_of(console):
    return console.file.getvalue().splitlines()


def plain_console():
    return Console(file=io.StringIO(), width=40)


def test_the_cost_is_said_before_the_first_step_and_after_the_fifth(clock):
    console = plain_console()
    with progress("stage 1", 65, announce=True, console=console) as steps:
        assert lines_of(console) == ["stage 1: 65 steps"]
        clock.seconds += 30  # the first step makes everything ready, and says nothing of the others
        steps.advance()
        for _ in range(4):
            assert len(lines_of(console)) == 1
            clock.seconds += 2
            steps.advance()
        for _ in range(10):
            steps.advance()
    assert len(lines_of(console)) == 2
    assert re.fullmatch(r"stage 1: steps take 2 s each; 2 min left, done at [0-9: on-]+", lines_of(console)[1])


def test_what_is_done_aside_counts_for_the_end_but_not_for_a_step(clock):
    with progress("stage 1", 21, overhead=0.5, disable=True) as steps:
        assert steps.seconds_left() is None
        steps.advance()
        assert steps.seconds_left() is None
        for _ in range(9):
            clock.seconds += 1
            steps.advance()
        assert steps.seconds_left() == 11 * 1.5  # as was foretold
        with steps.aside():
            clock.seconds += 20
        assert steps.seconds_a_step() == 1
        assert steps.seconds_left() == 11 * (1 + 20 / 10)  # as it was


def test_steps_that_were_done_earlier_are_neither_timed_nor_left(clock):
    console = plain_console()
    with progress("stage 1", 100, done=90, announce=True, console=console) as steps:
        assert lines_of(console) == ["stage 1: 10 steps of 100 are left"]
        for _ in range(5):
            clock.seconds += 3
            steps.advance()
        assert (steps.seconds_a_step(), steps.seconds_left()) == (3, 15)
        assert steps.line().startswith("stage 1: 95 of 100 steps, 15 s left, done at ")


def test_work_of_fewer_than_five_steps_says_its_cost_as_well(clock):
    console = plain_console()
    with progress("packing", 2, unit="layers", announce=True, console=console) as steps:
        steps.advance(2)
    assert lines_of(console) == ["packing: 2 layers"]  # when all is done, nobody asks


def test_without_a_terminal_a_line_comes_every_so_often_even_within_a_step():
    console = plain_console()
    told = threading.Event()
    console.print = lambda *args, _print=console.print, **kwargs: (_print(*args, **kwargs), told.set())
    with progress("[tuning]", 3, unit="kernels", status="matshift", console=console, every=0.01):
        assert told.wait(10)
    count = len(lines_of(console))
    assert lines_of(console)[0] == "[tuning]: 0 of 3 kernels, matshift"  # whole, brackets too, however narrow it is
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]
    assert len(lines_of(console)) == count


def test_short_work_says_nothing_without_a_terminal():
    console = plain_console()
    with progress("packing", 3, console=console) as steps:
        steps.advance(3)
    assert lines_of(console) == []


def test_a_terminal_has_one_bar_that_goes_when_the_work_is_done(clock):
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    with progress("stage [1]", 4, console=console) as steps:
        steps.advance(status="loss 1.2")
        clock.seconds += 60
        steps.advance()
        steps.bar.refresh()
        shown = console.file.getvalue()
        assert "stage [1]" in shown and "2/4" in shown and "loss 1.2" in shown and "2 min left, done at" in shown
    assert "\x1b[2K" in console.file.getvalue().replace(shown, "")  # lines are erased
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_what_goes_wrong_in_the_work_comes_through_and_ends_the_lines():
    with pytest.raises(KeyError, match="kernel"), progress("checks", 3, console=plain_console()):
        raise KeyError("kernel")
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_nothing_is_shown_where_nothing_shall_be(capsys):
    with progress("checks", 2, announce=True, disable=True) as steps:
        steps.advance(2)
    assert capsys.readouterr() == ("", "")
    assert steps.done == 2


def test_steps_do_not_go_back():
    with progress("checks", 2, disable=True) as steps, pytest.raises(ValueError, match="not -1"):
        steps.advance(-1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (0.4, "0 s"), (89, "89 s"), (91, "2 min"), (5300, "88 min"), (7800, "2 h 10 min")],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_clock_times_name_another_day():
    assert re.fullmatch(r"\d\d:\d\d on \d{4}-\d\d-\d\d", clock_time(3 * 86400))


def test_what_one_waits_for_is_said_only_if_it_takes_long():
    said = threading.Event()
    console = plain_console()
    console.print = lambda *args, **kwargs: said.set()
    with say_if_slow("compiling", console, after=0.0):
        assert said.wait(60.0)
    quick = plain_console()
    with say_if_slow("compiling", quick, after=3600.0):
        pass
    assert lines_of(quick) == []
