"""The figures of a study, drawn from what its run folder holds.

One colour a mode in all panels, from greatest to least along a colour-blind-safe scale; bands and
bars are 95 % bootstrap intervals.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from metadyn import dynamics
from metadyn.store import HELDOUT, RunFolder, samples

IN_DISTRIBUTION = "in_distribution"
MARKERS = "osD^vP"
LINES = ("-", "--", ":", "-.")
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.dpi": 150,
    "lines.linewidth": 2,
}

Measured = Mapping[str, xr.Dataset]


def draw(run: RunFolder) -> list[Path]:
    """Draws every figure that the stored measurements allow; returns their paths."""
    stored = run.measurements()
    read = lambda name: {c: run.measurement(name, c) for c in stored.get(name, [])}  # noqa: E731
    with matplotlib.rc_context(STYLE):
        drawn: dict[str, Figure] = {}
        measured = read(IN_DISTRIBUTION)
        if measured:
            drawn["mode_strength"] = mode_strength(measured)
            drawn["learning_times"] = learning_times(measured)
        if run.outer_steps() and stored.get(HELDOUT):
            (bayes,) = read(HELDOUT).values()
            drawn["excess_loss"] = excess_loss(run.trajectories(HELDOUT), bayes)
        shifted = {name: read(name) for name in stored}
        shifted = {
            name: data
            for name, data in shifted.items()
            if data and "shift" in next(iter(data.values())).attrs
        }
        if len(shifted) > 1:
            drawn["learned_spectrum"] = learned_spectrum(shifted)
        paths = []
        run.figures.mkdir(exist_ok=True)
        for name, figure in drawn.items():
            paths.append(run.figures / f"{name}.png")
            figure.savefig(paths[-1], bbox_inches="tight")
    return paths


def mode_strength(measured: Measured) -> Figure:
    """Mode strength against inner step, one panel a learner, with its staggering slope."""
    panels = _panels(measured)
    figure, axes = _subplots(1, len(panels), width=4.1, height=3.7, sharey=True)
    for axis, data in zip(axes, panels, strict=True):
        times, scale, p = data["time"].to_numpy(), _scale(data), data.attrs["p"]
        updates = data.attrs["clock"] == "updates"
        start = 1 if updates else 0  # a log axis has no zero
        band = dynamics.estimate(lambda mean: mean, samples(data, "mode_strength"), draws=300)
        for k, colour in enumerate(_colours(scale)):
            axis.fill_between(
                times[start:], band.low[start:, k], band.high[start:, k], color=colour, alpha=0.25
            )
            axis.plot(times[start:], band.value[start:, k], color=colour, label=f"{scale[k]:.3g}")
            if "closed_form" in data:
                curve = data["closed_form"].to_numpy()[start:, k]
                label = "closed form" if k == len(scale) - 1 else None
                axis.plot(times[start:], curve, color="black", ls=":", lw=1.4, label=label)
        slope = _slope(data)
        axis.axhline(p, color="grey", lw=0.8, zorder=0)
        axis.set_title(f"{data.attrs['label']}\nslope {_interval(slope)}")
        axis.set_xlabel("optimiser updates" if updates else "observations in the episode")
        axis.set_xscale("log" if updates else "linear")
        axis.set_ylim(-0.1, 1.15)
    axes[0].set_ylabel("mode strength $a_k$\n(0 nothing, 1 learned)")
    handles, labels = axes[0].get_legend_handles_labels()
    title = panels[0].attrs["mode_label"]
    axes[0].legend(handles, labels, title=title, fontsize=9, title_fontsize=9, loc="upper left")
    return figure


def learning_times(measured: Measured) -> Figure:
    """Learning time against the modes' scale on log axes, with the fitted slopes."""
    figure, (axis,) = _subplots(1, 1, width=6.6, height=4.4)
    for data, marker in zip(_panels(measured), MARKERS, strict=False):
        times, scale, p = data["time"].to_numpy(), _scale(data), data.attrs["p"]
        t = _learning_times(data)
        slope = _slope(data)
        for k, colour in enumerate(_colours(scale)):
            if np.isfinite(t.value[k]):
                bars = [[t.value[k] - t.low[k]], [t.high[k] - t.value[k]]]
                axis.errorbar(scale[k], t.value[k], np.maximum(bars, 0), color=colour, capsize=3)
                axis.plot(scale[k], t.value[k], marker, color=colour, ms=8)
            else:
                axis.plot(scale[k], times[-1], "^", mfc="none", color=colour, ms=10)
        there = np.isfinite(t.value)
        if there.sum() > 1:
            centre = np.log(t.value[there]).mean() - slope.value * np.log(scale[there]).mean()
            line = np.exp(centre + slope.value * np.log(scale))
            unit = data.attrs["clock"]
            label = f"{data.attrs['label']} ({unit}): slope {_interval(slope)}"
            axis.plot(
                scale, line, color="grey", lw=1.2, marker=marker, mfc="none", label=label, zorder=0
            )
    axis.set(xscale="log", yscale="log", xlabel=data.attrs["mode_label"])
    axis.set_ylabel(f"learning time $t_k({p:g})$, own steps")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=10)
    return figure


def excess_loss(trained: xr.Dataset, bayes: xr.Dataset) -> Figure:
    """Excess loss over Bayes against outer step, each seed and their mean."""
    steps = trained["outer_step"].to_numpy()
    floor = trained.attrs["loss_floor"]
    reference = samples(bayes, "loss")[:, :, 1:].mean(-1)
    excess = lambda loss, best: dynamics.excess_loss(loss, best, floor)  # noqa: E731
    each = [samples(trained.sel(outer_step=s), "loss")[:, :, 1:].mean(-1) for s in steps]
    mean = [dynamics.estimate(excess, loss, reference, draws=300) for loss in each]
    value, low, high = (np.array([e[i] for e in mean]) for i in range(3))
    figure, (axis,) = _subplots(1, 1, width=6.6, height=3.9)
    x = np.maximum(steps, 0.5)  # step 0 at the left edge of a log axis
    for seed in range(each[0].shape[0]):
        axis.plot(x, [excess(e[seed].mean(), reference.mean()) for e in each], color="grey", lw=0.8)
    axis.fill_between(x, low, high, color="#0072b2", alpha=0.25)
    axis.plot(
        x, value, "o-", color="#0072b2", ms=4, label=f"{trained.attrs['label']}, mean of seeds"
    )
    axis.plot([], [], color="grey", lw=0.8, label="each seed")
    axis.set(xscale="log", yscale="log", xlabel="outer step (leftmost: 0)")
    axis.set_ylabel(r"excess loss over Bayes" "\n" r"$(L - L_B)\,/\,(L_B - \sigma^2)$")
    axis.annotate(
        f"{value[-1]:.2f}",
        (x[-1], value[-1]),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
    )
    for side in (axis.yaxis, axis.xaxis):
        side.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_yticks(
        [
            t
            for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
            if low.min() / 1.5 < t < high.max() * 1.5
        ]
    )
    axis.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axis.legend()
    return figure


def learned_spectrum(shifted: Mapping[str, Measured]) -> Figure:
    """What is learned by the end of the episode, in and out of distribution.

    Sets of tasks carry `shift`, the factor by which their spectrum exceeds the training
    distribution's; those whose greatest mode alone is shifted carry `outsize` too. The learners
    shown are those measured on every set.
    """
    everywhere = set.intersection(*(set(measured) for measured in shifted.values()))
    drawn = _panels({name: next(iter(shifted.values()))[name] for name in everywhere})
    by_shift = sorted(
        shifted.values(), key=lambda measured: next(iter(measured.values())).attrs["shift"]
    )
    figure, (left, right) = _subplots(1, 2, width=5.4, height=4.2)
    for learner, marker, line in zip(
        (data.attrs["learner"] for data in drawn), MARKERS, LINES, strict=False
    ):
        points = []
        for measured in by_shift:
            data = measured[learner]
            end = samples(data.isel(step=[-1]), "mode_strength")[:, :, 0]
            strength = dynamics.estimate(lambda mean: mean, end, draws=300)
            scale = _scale(data)
            for k, colour in enumerate(_colours(scale)):
                at = (scale[k], scale[k] * strength.value[k])
                face = colour if line == "-" else "none"
                left.plot(*at, marker, color=colour, mfc=face, ms=7)
            if "outsize" not in data.attrs:
                points.append((data.attrs["shift"], *strength))
        x, value, low, high = (np.array(column) for column in zip(*points, strict=True))
        for k, colour in enumerate(_colours(scale)):
            right.fill_between(x, low[:, k], high[:, k], color=colour, alpha=0.2)
            right.plot(x, value[:, k], line, marker=marker, color=colour, ms=5)
        label = data.attrs["label"]
        left.plot([], [], marker, color="grey", mfc="grey" if line == "-" else "none", label=label)
        right.plot([], [], line, marker=marker, color="grey", label=label)
    for k, colour in enumerate(_colours(scale)):
        right.plot([], [], color=colour, label=_place(k, len(scale)))
    name = data.attrs["mode_label"]
    left.set(xscale="log", yscale="log", xlabel=f"true {name}", ylabel="learned by the last step")
    ends = (left.get_xlim()[0], left.get_xlim()[1])
    left.plot(ends, ends, color="grey", lw=0.8, zorder=0, label="learned in full")
    left.legend()
    right.set(xscale="log", xlabel="spectrum, as a multiple of in distribution")
    right.set_xticks(x, [f"{factor:g}" for factor in x])
    right.minorticks_off()
    right.set(ylabel="mode strength $a_k$ at the last step", ylim=(-0.1, 1.15))
    right.legend(fontsize=9)
    return figure


def _place(k: int, modes: int) -> str:
    note = ", the greatest" if k == 0 else ", the least" if k == modes - 1 else ""
    return f"mode {k + 1}{note}"


def _learning_times(data: xr.Dataset) -> dynamics.Estimate:
    times, p = data["time"].to_numpy(), data.attrs["p"]
    return dynamics.estimate(
        lambda mean: dynamics.learning_times(times, mean, p), samples(data, "mode_strength")
    )


def _slope(data: xr.Dataset) -> dynamics.Estimate:
    times, scale, p = data["time"].to_numpy(), _scale(data), data.attrs["p"]
    return dynamics.estimate(
        lambda mean: dynamics.staggering_slope(scale, dynamics.learning_times(times, mean, p)),
        samples(data, "mode_strength"),
    )


def _panels(measured: Measured) -> list[xr.Dataset]:
    """The measurements that have a place in the figures, in its order."""
    shown = [data for data in measured.values() if data.attrs["panel"] is not None]
    return sorted(shown, key=lambda data: data.attrs["panel"])


def _scale(data: xr.Dataset) -> np.ndarray:
    return data[data.attrs["mode_coordinate"]].to_numpy()


def _colours(scale: np.ndarray) -> list:
    return list(matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(scale))))


def _interval(estimate: dynamics.Estimate) -> str:
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def _subplots(rows: int, columns: int, *, width: float, height: float, **options):
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)
