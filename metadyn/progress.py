"""What a run says while it goes: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars

LINE_EVERY = 10.0  # seconds, away from a terminal
MANY = 3  # meta-learners, beyond which a line does not name each
SAYS = {"excess_loss": "excess over Bayes"}  # what a line calls a metric


class Progress:
    """Reports to a console; `Progress(None)` says nothing."""

    def __init__(self, console: Console | None):
        self.console = console
        self._bars: Bars | None = None
        self._place = ""

    def say(self, line: str) -> None:
        """One line."""
        if self.console is not None:
            line = self._place + line
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def studies(self, names: Sequence[str]) -> Iterator[Callable[[int], None]]:
        """One display over several studies. Yields begin(i), to be called before each."""

        def begin(i: int) -> None:
            self._place = f"[{i + 1}/{len(names)} {names[i]}] "
            advance(i, names[i])

        with self._bar("studies", len(names), 0) as advance:
            try:
                yield begin
            finally:
                self._place = ""

    @contextmanager
    def training(self, total: int, done: int) -> Iterator[Callable[..., None]]:
        """Yields show(step, metrics, episodes): the metrics of each meta-learner by name, and the
        episodes that an outer step takes in all."""
        began, first = time.monotonic(), done

        def facts(step: int, metrics: Mapping[str, Mapping[str, float]], episodes: int) -> str:
            seconds = max(time.monotonic() - began, 1e-9)
            rate = episodes * (step - first) / seconds
            left = seconds * (total - step) / max(step - first, 1)
            if len(metrics) <= MANY:
                said = "; ".join(
                    f"{name}: "
                    + ", ".join(
                        f"{SAYS.get(what, what)} {value:.4g}" for what, value in each.items()
                    )
                    for name, each in metrics.items()
                )
            else:
                excess = [each["excess_loss"] for each in metrics.values() if "excess_loss" in each]
                ends = f"{min(excess):.3f} to {max(excess):.3f}" if excess else "none"
                said = f"{len(metrics)} meta-learners: {SAYS['excess_loss']} {ends}"
            return f"{said}  {rate:,.0f} episodes/s  {left:,.0f} s left"

        with self._steps("training", total, done) as advance:
            yield lambda step, metrics, episodes: advance(step, facts(step, metrics, episodes))

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[str], None]]:
        """Yields show(item), to be called before each of `total` items."""
        started = -1

        def show(item: str) -> None:
            nonlocal started
            started += 1
            advance(started, item)

        with self._steps(what, total, 0) as advance:
            yield show
            advance(total, "done")

    @contextmanager
    def _steps(self, what: str, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
        last = -LINE_EVERY

        def line(step: int, facts: str) -> None:
            nonlocal last
            if step >= total or time.monotonic() - last >= LINE_EVERY:
                last = time.monotonic()
                self.say(f"{what} {step}/{total}  {facts}")

        with self._bar(what, total, done) as advance:
            yield advance if self._bars is not None else line

    @contextmanager
    def _bar(self, what: str, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
        """A bar on a terminal, below those that are there; elsewhere nothing."""
        if self.console is None or not self.console.is_terminal:
            yield lambda step, facts: None
            return
        bars, outermost = self._bars, self._bars is None
        if bars is None:
            columns: list[Any] = [TextColumn("{task.description}"), BarColumn()]
            columns += [MofNCompleteColumn(), TextColumn("{task.fields[facts]}")]
            bars = self._bars = Bars(*columns, console=self.console)
            bars.start()
        task = bars.add_task(what, total=total, completed=done, facts="")
        try:
            yield lambda step, facts: bars.update(task, completed=step, facts=facts)
        finally:
            if outermost:
                bars.stop()
                self._bars = None
            else:
                bars.remove_task(task)
