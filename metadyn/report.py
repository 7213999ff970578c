"""What `metadyn report` prints: the verdict of a run that is done, or how far it has come."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from metadyn import dynamics, figures
from metadyn.claims import number
from metadyn.store import RunFolder


def verdict(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yields each criterion with its interval, and what it says."""
    yield f"{summary['study']}, preset {summary['preset']}, seed {summary['seed']}"
    for row in (*summary["criteria"], *summary["reported"]):
        mark = {True: "passed", False: "FAILED", None: ""}[row.get("passed")]
        yield f"{mark:7} {row['name']:28} {number(row)}"
        yield f"        {row['expected']}" + (f" ({row['verdict']})" if "verdict" in row else "")


def so_far(run: RunFolder) -> Iterator[str]:
    """Yields outer step, excess loss and learning times at the newest checkpoint of a live run."""
    about, steps, measured = run.config, run.steps(), run.outer_steps()
    yield f"{about['study']}, preset {about['preset']}, seed {about['seed']}: not done"
    if steps:
        last, age, of = steps[-1], time.time() - run.written(steps[-1]), ""
        with contextlib.suppress(KeyError, TypeError, ValueError, ZeroDivisionError):
            total = about["config"]["outer"]["steps"]  # where a study keeps them as ours do
            of = f" of {total:,} ({last / total:.0%})"
        yield f"outer step {last:,}{of}; {len(steps)} checkpoints, the newest {age:,.0f} s old"
    if measured:
        for training in figures.histories(run.results(measured[-1:])).values():
            trained, bayes = training.losses
            excess = dynamics.measured_excess(trained.isel(outer_step=-1), bayes)
            now = f"{training.called}: excess loss over Bayes {dynamics.text(excess, 3)}"
            both = training.trained.isel(outer_step=-1), training.bayes
            times = [dynamics.times_of(each)(dynamics.strength(each).mean((0, 1))) for each in both]
            own, best = (" ".join("-" if np.isnan(t) else f"{t:.1f}" for t in ts) for ts in times)
            yield f"{now}; learning times by mode {own} (Bayes {best})"
    yield f"{sum(len(names) for names in run.measurements().values())} measurements stored"
