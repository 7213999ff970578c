"""What a run says while it goes: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Column

LINE_EVERY = 4.0  # seconds, away from a terminal: no phase is silent for longer
MANY = 3  # meta-learners, beyond which a line does not name each
SAYS = {"excess_loss": "excess over Bayes"}  # what a line calls a metric


class Terminal(Console):
    """Standard output. A reader who has left is for the command to deal with, not for rich."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Progress:
    """Reports to a console; `Progress(None)` says nothing."""

    def __init__(self, console: Console | None):
        self.console = console
        self._place = ""
        self._bars = None
        if console is not None and console.is_terminal:
            cut = Column(ratio=1, no_wrap=True)  # what gives way where a terminal is narrow
            name = TextColumn("{task.description}", markup=False)
            facts = TextColumn("{task.fields[facts]}", markup=False, table_column=cut)
            columns = (name, BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), facts)
            self._bars = Bars(*columns, console=console, expand=True)

    def say(self, line: str) -> None:
        """Prints one line."""
        if self.console is not None:
            line = self._place + line
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def studies(
        self, names: Sequence[str], what: str = "studies"
    ) -> Iterator[Callable[[int], None]]:
        """Shows which of several studies is on. Yields begin(i), to be called before each."""
        if len(names) == 1:
            yield lambda i: None
            return

        def begin(i: int) -> None:
            self._place = f"[{i + 1}/{len(names)} {names[i]}] "
            advance(i, names[i])

        with self._bar(what, len(names), 0, lines=False) as advance:
            try:
                yield begin
            finally:
                self._place = ""

    @contextmanager
    def training(self, total: int, done: int) -> Iterator[Callable[..., None]]:
        """Shows how far training is: yields show(step, metrics, episodes), for each dispatch.

        Metrics are of each meta-learner by name, and episodes those that an outer step takes in
        all. Rates are counted from the first call, before which programs may have been compiled.
        """
        first: tuple[int, float] | None = None

        def show(step: int, metrics: Mapping[str, Mapping[str, Any]], episodes: int) -> None:
            nonlocal first
            left = rate = ""
            if first is None:
                first = step, time.monotonic()
            else:
                steps, seconds = step - first[0], max(time.monotonic() - first[1], 1e-9)
                left = _left(seconds, steps, total - step)
                rate = f"  {episodes * steps / seconds:,.0f} episodes/s"
            advance(step, left + _said(metrics) + rate)

        with self._bar("training", total, done) as advance:
            yield show

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[str], None]]:
        """Yields show(item), to be called before each of `total` items."""
        started, began = itertools.count(), time.monotonic()

        def show(item: str) -> None:
            done = next(started)
            advance(done, _left(time.monotonic() - began, done, total - done) + item)

        with self._bar(what, total, 0) as advance:
            yield show
            advance(total, "done")

    @contextmanager
    def _bar(
        self, what: str, total: int, done: int, lines: bool = True
    ) -> Iterator[Callable[[int, str], None]]:
        """Shows a bar on a terminal, below those that are there; elsewhere lines, if wanted."""
        bars = self._bars
        if bars is None:
            silent = self.console is None or not lines
            shown = nullcontext(lambda step, facts: None)
            with shown if silent else self._lines(what, total, done) as line:
                yield line
            return
        outermost = not bars.tasks
        if outermost:
            bars.start()
        task = bars.add_task(what, total=total, completed=done, facts="")
        try:
            yield lambda step, facts: bars.update(task, completed=step, facts=facts)
        finally:
            if outermost:  # and so left on the screen
                bars.stop()
            bars.remove_task(task)

    @contextmanager
    def _lines(self, what: str, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
        """Says where a phase stands, every `LINE_EVERY` seconds and at its end: also where it
        stands still, since one long call, such as compiling, may be all there is to it."""
        facts, over = "", threading.Event()
        moved = due = time.monotonic()

        def say(more: str = "") -> None:
            nonlocal due
            due = time.monotonic() + LINE_EVERY
            self.say(f"{what} {done}/{total}  {facts}{more}")

        def line(step: int, new: str) -> None:
            nonlocal done, facts, moved
            done, facts, moved = step, new, time.monotonic()
            if done >= total or moved >= due:
                say()

        def again() -> None:
            wait = LINE_EVERY
            with suppress(BrokenPipeError):  # which the phase itself meets too
                while not over.wait(wait):
                    if (now := time.monotonic()) >= due:
                        say(f"  (for {now - moved:.0f} s)")
                    wait = max(due - time.monotonic(), 0.01)

        thread = threading.Thread(target=again, daemon=True)
        thread.start()
        try:
            yield line
        finally:
            over.set()
            thread.join()


SILENT = Progress(None)


def _left(seconds: float, done: int, more: int) -> str:
    """How long what is left will take, at the rate of what is done."""
    return f"{seconds * more / done:,.0f} s left  " if done else ""


def _said(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The mean metrics of each meta-learner; of many only the range of their excess loss."""
    if len(metrics) > MANY:
        excess = [each["excess_loss"] for each in metrics.values() if "excess_loss" in each]
        ends = f"{min(excess):.3f} to {max(excess):.3f}" if excess else "none"
        return f"{len(metrics)} meta-learners: {SAYS['excess_loss']} {ends}"
    number = lambda name, value: f"{SAYS.get(name, name)} {np.mean(value):.4g}"
    text = lambda each: ", ".join(number(name, value) for name, value in each.items())
    return "; ".join(f"{name}: {text(each)}" for name, each in metrics.items())
