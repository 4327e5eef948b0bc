"""Progress of some work and when it will be done: one bar in a terminal, one line a minute elsewhere."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the layers show progress, too, and work without rich
    from rich.console import Console
    from rich.progress import Progress

_MEASURED_STEPS = 5  # from these the cost of the rest is estimated
_EVERY = 60.0  # seconds between two lines where there is no terminal


class Steps:
    """Steps of some work, counted and timed. `progress` makes them.

    Args:
        description: the work.
        total: number of steps.
        unit: name of steps, in the plural.
        done: number of earlier steps, which cost nothing now.
        overhead: seconds in `aside` for each second in steps, until it has been measured.
    """

    def __init__(self, description: str, total: int, unit: str, done: int = 0, overhead: float = 0.0) -> None:
        self.description, self.total, self.unit, self.done, self.overhead = description, total, unit, done, overhead
        self.status = ""
        self._first = done
        self._began = time.monotonic()
        self._aside = 0.0
        self._done_at_last_aside = done
        self._first_step: tuple[int, float] | None = None  # how many were done then, and when in time for steps

    def advance(self, steps: int = 1, *, status: str | None = None) -> None:
        """Count finished steps. `status` is a text to show, such as the loss."""
        if steps < 0:
            raise ValueError(f"steps must not be negative, not {steps}")
        self.done += steps
        if status is not None:
            self.status = status
        if self._first_step is None and steps:
            self._first_step = self.done, self._seconds_in_steps()
        self._changed()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """A context for work between steps, such as a validation or a checkpoint.

        Its time does not count as that of a step.
        """
        began = time.monotonic()
        try:
            yield
        finally:
            self._aside += time.monotonic() - began
            self._done_at_last_aside = self.done

    def seconds_a_step(self) -> float | None:
        """The mean so far without the first step, which prepares the others; None before the second step."""
        if self._first_step is None:
            return None
        first, then = self._first_step
        return (self._seconds_in_steps() - then) / (self.done - first) if self.done > first else None

    def seconds_left(self) -> float | None:
        """Seconds for the remaining steps and the work between them; None as long as they are unknown."""
        seconds = self.seconds_a_step()
        if seconds is None:
            return None
        aside = seconds * self.overhead
        if self._done_at_last_aside > self._first:
            aside = self._aside / (self._done_at_last_aside - self._first)
        return (seconds + aside) * max(0, self.total - self.done)

    def when(self) -> str:
        """`4 min left, done at 15:42`; empty as long as that is unknown."""
        left = self.seconds_left()
        return "" if left is None else f"{duration(left)} left, done at {clock_time(left)}"

    def line(self) -> str:
        """The whole line: steps done, their total, and when the rest will be done."""
        parts = [f"{self.description}: {self.done} of {self.total} {self.unit}", self.status, self.when()]
        return ", ".join(part for part in parts if part)

    def _seconds_in_steps(self) -> float:
        return time.monotonic() - self._began - self._aside

    def _changed(self) -> None:
        """Called after every `advance`."""


class _Shown(Steps):
    """Steps that print what they cost, once, and keep a bar up to date if there is one."""

    console: Console
    announce = False
    bar: Progress | None = None

    def _changed(self) -> None:
        if self.announce and self.done - self._first >= min(_MEASURED_STEPS, self.total - self._first):
            self.announce = False
            seconds = self.seconds_a_step()
            if seconds is not None and self.done < self.total:
                cost = f"{seconds:.2g} s" if seconds < 10 else duration(seconds)
                _say(self.console, f"{self.description}: {self.unit} take {cost} each; {self.when()}")
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done, status=self.status, when=self.when())


@contextlib.contextmanager
def progress(
    description: str,
    total: int,
    *,
    unit: str = "steps",
    status: str = "",
    done: int = 0,
    overhead: float = 0.0,
    announce: bool = False,
    console: Console | None = None,
    disable: bool = False,
    every: float = _EVERY,
) -> Iterator[Steps]:
    """Show the progress of the work in this context.

    In a terminal, this is one bar, which disappears at the end. Elsewhere, it is one line a minute, also during long
    steps.

    ``with progress("stage 1", total=640) as steps: ...; steps.advance(status="loss 1.2")``

    Args:
        description: the work.
        total: number of steps.
        unit: name of steps, in the plural.
        status: first text to show.
        done: number of steps that were done earlier, for instance before an interruption.
        overhead: seconds of `Steps.aside` for each second in steps, until it has been measured.
        announce: print the number of steps before the first one; after the fifth, also the time of a step and when all
            will be done.
        console: the console; None is standard output.
        disable: show nothing.
        every: seconds between two lines without a terminal.
    """
    if disable:
        yield Steps(description, total, unit, done, overhead)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = console or Console()
    steps = _Shown(description, total, unit, done, overhead)
    steps.console, steps.announce, steps.status = console, announce, status
    if announce:
        _say(console, f"{description}: {total - done} {unit}" + (f" of {total} are left" if done else ""))
    if console.is_terminal and not console.is_dumb_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            TextColumn("{task.fields[when]}", markup=False),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            bar.add_task(description, total=total, completed=done, status=status, when="")
            steps.bar = bar
            yield steps
        return
    over = threading.Event()

    def tell() -> None:
        while not over.wait(every):
            _say(console, steps.line())

    teller = threading.Thread(target=tell, name="progress", daemon=True)
    teller.start()
    try:
        yield steps
    finally:
        over.set()
        teller.join()


@contextlib.contextmanager
def say_if_slow(text: str, console: Console | None = None, after: float = 2.0) -> Iterator[None]:
    """Print a line if the work in this context takes longer than some seconds.

    Args:
        text: what one waits for.
        console: the console; None is standard output.
        after: seconds.
    """
    from rich.console import Console

    timer = threading.Timer(after, _say, (console or Console(), text))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _NoBar:
    """Takes what a bar is told, and shows nothing."""

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def add_task(self, description: str, *, total: float | None = None) -> Any:
        return None

    def update(self, task: Any, **changes: Any) -> None:
        pass

    def advance(self, task: Any) -> None:
        pass


def passing_bar(show: bool) -> Any:
    """A bar of rich for some seconds, which goes when it is done. If it is not to show, or rich is not installed, what
    takes the same calls and shows nothing."""
    if not show or find_spec("rich") is None:
        return _NoBar()
    from rich.progress import Progress

    return Progress(transient=True)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """`40 s`, `4 min`, `2 h 10 min`."""
    if seconds < 90:
        return f"{max(0.0, seconds):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def clock_time(seconds: float) -> str:
    """What a clock on the wall shows so many seconds from now: `15:42`, with the day if that is not today."""
    now = datetime.now()
    then = now + timedelta(seconds=seconds)
    return f"{then:%H:%M}" if then.date() == now.date() else f"{then:%H:%M on %Y-%m-%d}"
