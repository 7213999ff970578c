"""Text of `metadyn report`: the verdict of a finished run, or the progress of a live one."""

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
    """Yields lines on each criterion of a summary: value with interval, expectation and verdict."""
    yield f"{summary['study']}, preset {summary['preset']}, seed {summary['seed']}"
    for row in (*summary["criteria"], *summary["reported"]):
        mark = {True: "passed", False: "FAILED", None: ""}[row.get("passed")]
        yield f"{mark:7} {row['name']:28} {number(row)}"
        yield f"        {row['expected']}" + (f" ({row['verdict']})" if "verdict" in row else "")


def so_far(run: RunFolder) -> Iterator[str]:
    """Yields outer step, excess loss and learning times at the newest checkpoint of a live run."""
    config, steps, measured_steps = run.config, run.steps(), run.outer_steps()
    yield f"{config['study']}, preset {config['preset']}, seed {config['seed']}: not done"
    if steps:
        last, age, share = steps[-1], time.time() - run.saved_at(steps[-1]), ""
        with contextlib.suppress(KeyError, TypeError, ValueError, ZeroDivisionError):
            total = config["config"]["outer"]["steps"]  # a user's study may have no such field
            share = f" of {total:,} ({last / total:.0%})"
        yield f"outer step {last:,}{share}; {len(steps)} checkpoints, the newest {age:,.0f} s old"
    if measured_steps:
        for training in figures.histories(run.results(measured_steps[-1:])).values():
            trained, bayes = training.losses
            excess = dynamics.excess_over_bayes(trained.isel(outer_step=-1), bayes)
            text = f"{training.label}: excess loss over Bayes {dynamics.text(excess, 3)}"
            pair = training.trained.isel(outer_step=-1), training.bayes
            times = [dynamics.times_of(data)(dynamics.strength(data).mean((0, 1))) for data in pair]
            own, best = (" ".join("-" if np.isnan(t) else f"{t:.1f}" for t in ts) for ts in times)
            yield f"{text}; learning times by mode {own} (Bayes {best})"
    yield f"{sum(len(names) for names in run.measurements().values())} measurements stored"
