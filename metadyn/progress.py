"""Progress reports of a run: bars on a terminal, plain lines elsewhere."""

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

LINE_EVERY = 4.0  # seconds after which a phase prints a line, away from a terminal
MANY = 3  # the number of meta-learners above which a line gives a range instead of naming each
SAYS = {"excess_loss": "excess over Bayes"}  # names of metrics in a line


class Terminal(Console):
    """Console on standard output that leaves a broken pipe to the command, not to rich."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Progress:
    """Reports progress on a console. `Progress(None)` prints nothing."""

    def __init__(self, console: Console | None):
        self.console = console
        self._prefix = ""
        self._bars = None
        if console is not None and console.is_terminal:
            cut = Column(ratio=1, no_wrap=True)  # the column that a narrow terminal cuts off
            name = TextColumn("{task.description}", markup=False)
            facts = TextColumn("{task.fields[facts]}", markup=False, table_column=cut)
            columns = (name, BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), facts)
            self._bars = Bars(*columns, console=console, expand=True)

    def say(self, line: str) -> None:
        """Prints one line."""
        if self.console is not None:
            line = self._prefix + line
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def studies(
        self, names: Sequence[str], what: str = "studies"
    ) -> Iterator[Callable[[int], None]]:
        """Shows which of several studies is running. Yields begin(i), to call before study i."""
        if len(names) == 1:
            yield lambda i: None
            return

        def begin(i: int) -> None:
            self._prefix = f"[{i + 1}/{len(names)} {names[i]}] "
            advance(i, names[i])

        with self._bar(what, len(names), 0, lines=False) as advance:
            try:
                yield begin
            finally:
                self._prefix = ""

    @contextmanager
    def training(self, total: int, done: int) -> Iterator[Callable[..., None]]:
        """Shows the progress of training. Yields show(step, metrics, episodes), for each dispatch.

        `metrics` are keyed by meta-learner, and `episodes` is the number that one outer step uses
        in total. Rates count from the first call, so that compilation before it is left out.
        """
        first_call: tuple[int, float] | None = None

        def show(step: int, metrics: Mapping[str, Mapping[str, Any]], episodes: int) -> None:
            nonlocal first_call
            remaining = rate = ""
            if first_call is None:
                first_call = step, time.monotonic()
            else:
                steps, seconds = step - first_call[0], max(time.monotonic() - first_call[1], 1e-9)
                remaining = _time_left(seconds, steps, total - step)
                rate = f"  {episodes * steps / seconds:,.0f} episodes/s"
            advance(step, remaining + _metrics_text(metrics) + rate)

        with self._bar("training", total, done) as advance:
            yield show

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[str], None]]:
        """Yields show(item), to call before each of `total` items."""
        calls, start = itertools.count(), time.monotonic()

        def show(item: str) -> None:
            done = next(calls)
            advance(done, _time_left(time.monotonic() - start, done, total - done) + item)

        with self._bar(what, total, 0) as advance:
            yield show
            advance(total, "done")

    @contextmanager
    def _bar(
        self, what: str, total: int, done: int, lines: bool = True
    ) -> Iterator[Callable[[int, str], None]]:
        """Shows a bar on a terminal, below earlier bars. Elsewhere prints lines, if `lines`."""
        bars = self._bars
        if bars is None:
            is_silent = self.console is None or not lines
            no_lines = nullcontext(lambda step, facts: None)
            with no_lines if is_silent else self._lines(what, total, done) as update:
                yield update
            return
        outermost = not bars.tasks
        if outermost:
            bars.start()
        task = bars.add_task(what, total=total, completed=done, facts="")
        try:
            yield lambda step, facts: bars.update(task, completed=step, facts=facts)
        finally:
            if outermost:  # it stays on the screen
                bars.stop()
            bars.remove_task(task)

    @contextmanager
    def _lines(self, what: str, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
        """Prints the progress of a phase every `LINE_EVERY` seconds, and at its end.

        A thread prints between updates, since a phase may be one long call, such as compiling.
        """
        facts, finished = "", threading.Event()
        last_update = due = time.monotonic()

        def say(suffix: str = "") -> None:
            nonlocal due
            due = time.monotonic() + LINE_EVERY
            self.say(f"{what} {done}/{total}  {facts}{suffix}")

        def update(step: int, new_facts: str) -> None:
            nonlocal done, facts, last_update
            done, facts, last_update = step, new_facts, time.monotonic()
            if done >= total or last_update >= due:
                say()

        def repeat() -> None:
            wait = LINE_EVERY
            with suppress(BrokenPipeError):  # the phase itself meets this error too
                while not finished.wait(wait):
                    if (now := time.monotonic()) >= due:
                        say(f"  (for {now - last_update:.0f} s)")
                    wait = max(due - time.monotonic(), 0.01)

        thread = threading.Thread(target=repeat, daemon=True)
        thread.start()
        try:
            yield update
        finally:
            finished.set()
            thread.join()


SILENT = Progress(None)


def _time_left(seconds: float, done: int, remaining: int) -> str:
    """Estimates how long the remaining items take, at the rate of those done in `seconds`."""
    return f"{seconds * remaining / done:,.0f} s left  " if done else ""


def _metrics_text(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Writes the mean metrics of each meta-learner, or only the range of excess loss of many."""
    if len(metrics) > MANY:
        losses = [values["excess_loss"] for values in metrics.values() if "excess_loss" in values]
        span = f"{min(losses):.3f} to {max(losses):.3f}" if losses else "none"
        return f"{len(metrics)} meta-learners: {SAYS['excess_loss']} {span}"
    number = lambda name, value: f"{SAYS.get(name, name)} {np.mean(value):.4g}"
    text = lambda values: ", ".join(number(name, value) for name, value in values.items())
    return "; ".join(f"{learner}: {text(values)}" for learner, values in metrics.items())
