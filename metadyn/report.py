"""What `metadyn report` prints: the verdict of a run that is done, or how far it has come."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from metadyn import dynamics, figures
from metadyn.store import RunFolder


def verdict(summary: Mapping[str, Any]) -> Iterator[str]:
    """Each criterion with its interval, and what it says."""
    yield f"{summary['study']}, preset {summary['preset']}, seed {summary['seed']}"
    number = lambda v: "-" if v is None else f"{v:.3g}"
    for row in (*summary["criteria"], *summary["reported"]):
        mark = {True: "passed", False: "FAILED", None: ""}[row.get("passed")]
        interval = f"{number(row['value'])} [{number(row['low'])}, {number(row['high'])}]"
        yield f"{mark:7} {row['name']:28} {interval}"
        yield f"        {row['expected']}"


def so_far(run: RunFolder) -> Iterator[str]:
    """Outer step, excess loss and learning times at the newest checkpoint. For live runs too."""
    about, steps = run.config, run.outer_steps()
    yield f"{about['study']}, preset {about['preset']}, seed {about['seed']}: not done"
    if steps:
        last, age = steps[-1], time.time() - run.written(steps[-1])
        total = _outer_steps_asked(about)
        of = f" of {total:,} ({last / total:.0%})" if total else ""
        yield f"outer step {last:,}{of}; {len(steps)} checkpoints, the newest {age:,.0f} s old"
        for training in figures.trainings(run.results([last])).values():
            yield _now(training)
    yield f"{sum(len(names) for names in run.measurements().values())} measurements stored"


def _now(training: figures.OuterTraining) -> str:
    """One meta-learner at its last outer step, beside Bayes."""
    trained, bayes = training.losses
    excess = dynamics.measured_excess(trained.isel(outer_step=-1), bayes, draws=300)
    times = (
        " ".join("-" if np.isnan(t) else f"{t:.1f}" for t in dynamics.times_of(each)(mean))
        for each in (training.trained.isel(outer_step=-1), training.bayes)
        for mean in [dynamics.strength(each).mean((0, 1))]
    )
    return (
        f"{training.called}: excess loss over Bayes {dynamics.text(excess, 3)}; "
        f"learning times by mode {next(times)} (Bayes {next(times)})"
    )


def _outer_steps_asked(about: Mapping[str, Any]) -> int | None:
    """Of the run's configuration, where a study keeps them as ours do."""
    outer = about["config"].get("outer") if isinstance(about["config"], dict) else None
    steps = outer.get("steps") if isinstance(outer, dict) else None
    return steps if isinstance(steps, int) and steps > 0 else None
