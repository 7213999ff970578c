"""How a meta-learner's excess loss falls with outer steps and units, and what that predicts.

    metadyn sweep linear_regression --preset workstation --lstm.hidden 32 64 128 \\
        --outer.steps 2000 4000 8000 16000 --outer.checkpoints 1 --measure.tasks 64 \\
        --measure.updating-tasks 2 --measure.shifted-tasks 64 --measure.tracked-tasks 2 \\
        --measure.heldout-tasks 4096 --out DIR
    python -m benchmarks.power_law DIR [--at UNITS EPISODES] [--figure FILE]

Fits log excess = a - α log(episodes) - β log(units) to a sweep of any domain's own study. Episodes
are outer steps times batch, for each seed. Intervals are bootstrap intervals over the held-out
tasks and the seeds, which all settings share. `--at`, which may be repeated, evaluates the law at a
setting outside the sweep, to be compared with the excess that was measured there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from metadyn import dynamics, figures, trajectories
from metadyn.store import RunFolder
from metadyn.study import HELDOUT
from metadyn.sweep import SweepFolder


class Point(NamedTuple):
    """One setting of the sweep, and its results."""

    units: int
    episodes: int
    """Number of training episodes of each seed."""
    trained: xr.Dataset
    """Results on held-out tasks at the last outer step."""


def points(path: Path) -> tuple[list[Point], xr.Dataset]:
    """Returns every setting of a sweep, and Bayes on the held-out tasks that all of them share."""
    folder = SweepFolder(path)
    settings = []
    for i in range(len(folder.sweep.settings)):
        run = RunFolder(folder.setting(i))
        config, results = run.config["config"], run.results(run.outer_steps()[-1:])
        meta, outer = config["meta"], config["outer"]
        trained = results[HELDOUT, meta].isel(outer_step=-1)
        settings.append(Point(config[meta]["hidden"], outer["steps"] * outer["batch"], trained))
    return settings, results[HELDOUT, "bayes"]


class Law(NamedTuple):
    """The fitted law, with its intervals."""

    exponents: dynamics.Estimate
    """α and β."""
    misfit: float
    """Root-mean-square distance between the logarithms of the measured and the fitted excess."""
    at: dynamics.Estimate
    """The predicted excess loss of each setting that was asked for."""


def fitted(found: Sequence[Point], bayes: xr.Dataset, asked: Sequence[tuple[float, float]]) -> Law:
    """Fits the law to `found`, and predicts the excess at the (units, episodes) of `asked`."""
    floor = trajectories.about(bayes).loss_floor
    design_of = lambda pairs: np.array([[1.0, -np.log(e), -np.log(u)] for u, e in pairs])
    design = design_of([(point.units, point.episodes) for point in found])

    def fit(*mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        excess = dynamics.excess_loss(np.stack(mean[:-1], -1), mean[-1][..., None], floor)
        return (log := np.log(excess)), log @ np.linalg.pinv(design).T

    losses = [dynamics.episode_loss(data) for data in (*(p.trained for p in found), bayes)]
    exponents = dynamics.estimate(lambda *mean: fit(*mean)[1][..., 1:], *losses)
    predicted = dynamics.estimate(lambda *mean: np.exp(fit(*mean)[1] @ design_of(asked).T), *losses)
    log, coefficients = fit(*(loss.mean((0, 1)) for loss in losses))
    return Law(exponents, float(np.sqrt(np.mean((log - coefficients @ design.T) ** 2))), predicted)


@figures.styled
def drawn(found: Sequence[Point], bayes: xr.Dataset) -> Figure:
    """Draws the excess against episodes, one line per number of units, with the law beside it."""
    figure, (axis,) = figures.grid(1, width=6.6, height=4.4)
    unit_counts, longest = sorted({point.units for point in found}), max(p.episodes for p in found)
    for units, colour in zip(unit_counts, figures.colours(unit_counts), strict=True):
        line = sorted((p for p in found if p.units == units), key=lambda p: p.episodes)
        episodes = np.array([point.episodes for point in line])
        excess = dynamics.stacked(dynamics.excess_over_bayes(p.trained, bayes) for p in line)
        style = {"fmt": "o", "color": colour, "label": f"{units} units"}
        axis.errorbar(episodes, excess.value, figures.bars(excess), **style)
        x = np.geomspace(episodes[0], 10 * longest, 20)
        law = fitted(found, bayes, [(units, e) for e in x]).at
        axis.plot(x, law.value, color=colour, ls="--", lw=1.2)
        axis.fill_between(x, law.low, law.high, color=colour, alpha=0.15, lw=0)
    axis.set(xscale="log", yscale="log", xlabel="training episodes of each seed")
    axis.set_ylabel("excess loss over Bayes\n(held-out tasks)")
    figures.log_ticks(axis.yaxis)
    axis.legend(title="measured; dashed: the law")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", type=Path, metavar="DIR")
    options: Any = {"nargs": 2, "type": float, "metavar": ("UNITS", "EPISODES")}
    parser.add_argument("--at", action="append", default=[], **options)
    parser.add_argument("--figure", type=Path, help="where to draw it (PNG)")
    arguments = parser.parse_args(argv)
    settings, bayes = points(arguments.sweep)
    print("| units | episodes of each seed | excess loss |\n| --- | --- | --- |")
    for point in settings:
        excess = dynamics.text(dynamics.excess_over_bayes(point.trained, bayes), 3)
        print(f"| {point.units} | {point.episodes:,} | {excess} |")
    law = fitted(settings, bayes, arguments.at or [(1.0, 1.0)])
    of_episodes, of_units = law.exponents.split()
    print(f"episodes: exponent {dynamics.text(of_episodes)}; units: {dynamics.text(of_units)}")
    print(f"misfit of log excess, root-mean-square: {law.misfit:.3f}")
    for (units, episodes), excess in zip(arguments.at, law.at.split(), strict=False):
        print(f"{units:g} units, {episodes:,.0f} episodes: {dynamics.text(excess, 3)}")
    if arguments.figure:
        figures.picture(partial(drawn, settings, bayes))(arguments.figure)


if __name__ == "__main__":
    main()
