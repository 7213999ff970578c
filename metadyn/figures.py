"""The figures of a study, drawn from what its run folder holds.

One colour a mode in all panels, from greatest to least along a colour-blind-safe scale; bands and
bars are 95 % bootstrap intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from metadyn import dynamics
from metadyn.store import HELDOUT, RunFolder

IN_DISTRIBUTION = "in_distribution"
MARKERS = "osD^vP"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
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

STRENGTH = "mode strength $a_k$\n(0 nothing, 1 learned)"

Measured = Mapping[str, xr.Dataset]


def draw(run: RunFolder) -> list[Path]:
    """Draws every figure that the stored measurements allow; returns their paths.

    What a set of tasks is good for is said by its attributes (`study.TaskSet.attrs`).
    """
    stored = {
        name: {learner: run.measurement(name, learner) for learner in learners}
        for name, learners in run.measurements().items()
    }

    def marked(attribute: str) -> dict[str, Measured]:
        """The sets that carry an attribute."""
        return {name: each for name, each in stored.items() if attribute in _attrs(each)}

    with matplotlib.rc_context(STYLE):
        drawn: dict[str, Figure] = {}
        if IN_DISTRIBUTION in stored:
            drawn["mode_strength"] = mode_strength(stored[IN_DISTRIBUTION])
            if _attrs(stored[IN_DISTRIBUTION]).get("ordered"):
                drawn["single_runs"] = single_runs(stored[IN_DISTRIBUTION])
            else:
                drawn["learning_times"] = learning_times(stored[IN_DISTRIBUTION])
        for name, measured in marked("compared").items():
            drawn[f"mode_strength_{name}"] = mode_strength(measured)
        heldout = [name for name in run.trajectory_sets() if name.startswith(HELDOUT)]
        pairs = [
            (run.trajectories(name), next(iter(stored[name].values())))
            for name in heldout
            if name in stored
        ]
        if pairs:
            drawn["excess_loss"] = excess_loss(pairs)
        if len(marked("shift")) > 1:
            drawn["learned_spectrum"] = learned_spectrum(marked("shift"))
        for name, measured in marked("curves").items():
            drawn[name] = curves(measured)
        if len(marked("grown")) > 1:
            drawn["growth"] = growth(marked("grown"))
        if marked("targets"):
            drawn["band_gain"] = band_gain(marked("targets"))
        paths = []
        run.figures.mkdir(exist_ok=True)
        for name, figure in drawn.items():
            paths.append(run.figures / f"{name}.png")
            figure.savefig(paths[-1], bbox_inches="tight")
    return paths


def mode_strength(measured: Measured) -> Figure:
    """Mode strength against inner step, one panel a learner, with its staggering."""
    panels = _panels(measured)
    figure, axes = _row(len(panels), width=4.1, height=3.7, sharey=True)
    for axis, data in zip(axes, panels, strict=True):
        times, scale, p = data["time"].to_numpy(), dynamics.scale(data), data.attrs["p"]
        updates = data.attrs["clock"] == "updates"
        start = 1 if updates else 0  # a log axis has no zero
        band = dynamics.estimate(lambda mean: mean, dynamics.strength(data), draws=300)
        for k, colour in enumerate(_colours(scale)):
            axis.fill_between(
                times[start:], band.low[start:, k], band.high[start:, k], color=colour, alpha=0.25
            )
            axis.plot(times[start:], band.value[start:, k], color=colour, label=f"{scale[k]:.3g}")
            if "closed_form" in data:
                curve = data["closed_form"].to_numpy()[start:, k]
                label = "closed form" if k == len(scale) - 1 else None
                axis.plot(times[start:], curve, color="black", ls=":", lw=1.4, label=label)
        axis.axhline(p, color="grey", lw=0.8, zorder=0)
        axis.set_title(f"{data.attrs['label']}\n{_staggering(data)}")
        axis.set_xlabel(_clock(data))
        axis.set_xscale("log" if updates else "linear")
        axis.set_ylim(-0.1, 1.15)
    axes[0].set_ylabel(panels[0].attrs.get("strength_label", STRENGTH))
    handles, labels = axes[0].get_legend_handles_labels()
    title = panels[0].attrs["mode_label"]
    axes[0].legend(handles, labels, title=title, fontsize=9, title_fontsize=9, loc="upper left")
    return figure


def learning_times(measured: Measured) -> Figure:
    """Learning time against the modes' scale on log axes, with the fitted slopes."""
    figure, (axis,) = _row(1, width=6.6, height=4.4)
    for data, marker in zip(_panels(measured), MARKERS, strict=False):
        times, scale, p = data["time"].to_numpy(), dynamics.scale(data), data.attrs["p"]
        t = dynamics.measured(dynamics.times_of, data)
        slope = dynamics.measured(dynamics.slope_of, data)
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
    axis.set_xticks(scale, [f"{value:.3g}" for value in scale])
    axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axis.set_ylabel(f"learning time $t_k({p:g})$, own steps")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=10)
    return figure


def excess_loss(pairs: Sequence[tuple[xr.Dataset, xr.Dataset]]) -> Figure:
    """Excess loss over Bayes against outer step, each seed and their mean.

    Of each pair the first is a meta-learner over outer training, the second Bayes on its tasks.
    """
    figure, (axis,) = _row(1, width=6.6, height=3.9)
    lowest, highest = np.inf, 0.0
    for (trained, bayes), colour, marker in zip(pairs, COLOURS, MARKERS, strict=False):
        steps = trained["outer_step"].to_numpy()
        floor = trained.attrs["loss_floor"]
        reference = dynamics.samples(bayes, "loss")[:, :, 1:].mean(-1)
        excess = partial(dynamics.excess_loss, floor=floor)
        each = [
            dynamics.samples(trained.sel(outer_step=s), "loss")[:, :, 1:].mean(-1) for s in steps
        ]
        mean = [dynamics.estimate(excess, loss, reference, draws=300) for loss in each]
        value, low, high = (np.array([e[i] for e in mean]) for i in range(3))
        x = np.maximum(steps, 0.5)  # step 0 at the left edge of a log axis
        for seed in range(each[0].shape[0]):
            by_seed = [excess(e[seed].mean(), reference.mean()) for e in each]
            axis.plot(x, by_seed, color=colour, lw=0.8, alpha=0.6)
        axis.fill_between(x, low, high, color=colour, alpha=0.25)
        label = f"{trained.attrs['label']}, mean of seeds"
        axis.plot(x, value, marker + "-", color=colour, ms=4, label=label)
        axis.annotate(
            f"{value[-1]:.2f}",
            (x[-1], value[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
        )
        lowest, highest = min(lowest, low.min()), max(highest, high.max())
    axis.plot([], [], color="grey", lw=0.8, label="each seed")
    axis.set(xscale="log", yscale="log", xlabel="outer step (leftmost: 0)")
    axis.set_ylabel(r"excess loss over Bayes" "\n" r"$(L - L_B)\,/\,(L_B - L_{\min})$")
    for side in (axis.yaxis, axis.xaxis):
        side.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    ticks = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
    axis.set_yticks([t for t in ticks if lowest / 1.5 < t < highest * 1.5])
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
    figure, (left, right) = _row(2, width=5.4, height=4.2)
    for learner, marker, line in zip(
        (data.attrs["learner"] for data in drawn), MARKERS, LINES, strict=False
    ):
        points = []
        for measured in by_shift:
            data = measured[learner]
            end = dynamics.samples(data.isel(step=[-1]), "mode_strength")[:, :, 0]
            strength = dynamics.estimate(lambda mean: mean, end, draws=300)
            scale = dynamics.scale(data)
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


def curves(measured: Measured) -> Figure:
    """Example functions (rows) and the answers of each learner (columns) at a few inner steps."""
    panels = _panels(measured)
    rows = panels[0].sizes["task"]
    figure, axes = _subplots(rows, len(panels), width=4.1, height=2.6, sharex=True, sharey="row")
    for column, data in zip(axes.T, panels, strict=True):
        x, times = data["x"].to_numpy(), data["time"].to_numpy()[1:]
        answer, target = (dynamics.samples(data, name)[0] for name in ("answer", "target"))
        for axis, answers, f in zip(column, answer, target, strict=True):
            for t, colour, now in zip(times, _colours(times)[::-1], answers[1:], strict=True):
                axis.plot(x, now, color=colour, label=f"{t:g}")
            axis.plot(x, f[0], color="black", ls="--", lw=1.5, label="target $f(x)$")
        column[0].set_title(data.attrs["label"])
        column[-1].set_xlabel("input $x$")
        unit = "updates" if data.attrs["clock"] == "updates" else "observations"
        column[-1].legend(
            title=f"answer after … {unit}",
            fontsize=9,
            title_fontsize=9,
            ncols=3,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.25),
        )
    for axis in axes[:, 0]:
        axis.set_ylabel("answer")
    return figure


def single_runs(measured: Measured) -> Figure:
    """One run of each learner, that of median learning time of the last mode: averages hide it."""
    panels = _panels(measured)
    figure, axes = _row(len(panels), width=4.1, height=3.4, sharey=True)
    for axis, data in zip(axes, panels, strict=True):
        times, strength = data["time"].to_numpy(), dynamics.strength(data)[0]
        start = 1 if data.attrs["clock"] == "updates" else 0
        last = dynamics.times_of(data)(strength)[:, -1]
        run = np.argsort(np.nan_to_num(last, nan=np.inf), kind="stable")[len(last) // 2]
        for k, colour in enumerate(_colours(dynamics.scale(data))):
            axis.plot(times[start:], strength[run, start:, k], color=colour)
        axis.axhline(data.attrs["p"], color="grey", lw=0.8, zorder=0)
        axis.set_title(data.attrs["label"])
        axis.set_xlabel(_clock(data))
        axis.set_xscale("log" if start else "linear")
        axis.set_ylim(-0.05, 1.05)
    axes[0].set_ylabel(panels[0].attrs.get("strength_label", STRENGTH))
    return figure


def growth(measured_by_set: Mapping[str, Measured]) -> Figure:
    """Median time until the last mode is learned, against the number of modes, on a log axis.

    Sets carry that number in the attribute `grown`. A triangle: the median run was not done.
    """
    sets = sorted(measured_by_set.values(), key=lambda measured: _attrs(measured)["grown"])
    figure, (axis,) = _row(1, width=6.6, height=4.4)
    numbers = np.array([_attrs(measured)["grown"] for measured in sets])
    for name, colour, marker in zip(sorted(sets[0]), COLOURS, MARKERS, strict=False):
        runs = [dynamics.last_times(measured[name]) for measured in sets]
        found = [dynamics.estimate_over_runs(np.median, each, draws=300) for each in runs]
        value, low, high = (np.array([e[i] for e in found]) for i in range(3))
        done = np.isfinite(value)
        bars = np.maximum([(value - low)[done], (high - value)[done]], 0)
        factor = dynamics.growth(numbers[done], value[done]).factor
        label = f"{sets[0][name].attrs['label']}: × {factor:.2f} for each context"
        axis.errorbar(
            numbers[done], value[done], bars, marker=marker, color=colour, capsize=3, label=label
        )
        end = [measured[name]["time"].to_numpy()[-1] for measured in sets]
        axis.plot(numbers[~done], np.array(end)[~done], "^", mfc="none", color=colour, ms=10)
    axis.set(yscale="log", xlabel=_attrs(sets[0])["grown_label"])
    axis.set_ylabel("updates until the last is learned\n(median run)")
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=10)
    return figure


def band_gain(measured_by_set: Mapping[str, Measured]) -> Figure:
    """Gain at the end of the episode of each frequency that the targets contain.

    One panel a set of targets, named by the attribute `targets`; `band` gives the frequencies
    of the training distribution, shaded.
    """
    sets = sorted(measured_by_set.values(), key=lambda measured: _attrs(measured)["order"])
    figure, axes = _row(len(sets), width=4.1, height=3.7, sharey=True, sharex=True)
    for axis, measured in zip(axes, sets, strict=True):
        learners = sorted(measured.values(), key=lambda data: data.attrs["learner"], reverse=True)
        band = _attrs(measured)["band"]
        for k in band:
            label = "training band" if k == band[0] else None
            axis.axvspan(k - 0.5, k + 0.5, color="grey", alpha=0.2, lw=0, label=label)
        axis.axhline(1, color="grey", lw=0.8, zorder=0)
        axis.axhline(0, color="grey", lw=0.8, zorder=0)
        width = 0.8 / len(learners)
        for i, (data, colour) in enumerate(zip(learners, COLOURS, strict=False)):
            gain = dynamics.samples(data.isel(step=[-1]), "mode_strength")[:, :, 0]
            value, low, high = dynamics.estimate(lambda mean: mean, gain, draws=300)
            at = dynamics.scale(data) + (i - (len(learners) - 1) / 2) * width
            bars = np.maximum([value - low, high - value], 0)
            axis.bar(at, value, width, color=colour, label=data.attrs["label"])
            axis.errorbar(at, value, bars, fmt="none", color="black", capsize=3, lw=1.2)
        axis.set_title(_attrs(measured)["targets"])
        axis.set_xlabel(_attrs(measured)["mode_label"])
    axes[0].xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes[0].set_ylabel("gain $a_k$ at the last step\n(0 suppressed, 1 learned)")
    axes[1].legend(loc="upper center", fontsize=9)
    return figure


def _attrs(measured: Measured) -> Mapping[str, Any]:
    return next(iter(measured.values())).attrs


def _place(k: int, modes: int) -> str:
    note = ", the greatest" if k == 0 else ", the least" if k == modes - 1 else ""
    return f"mode {k + 1}{note}"


def _staggering(data: xr.Dataset) -> str:
    """The figure of merit of a panel, with its interval."""
    if not data.attrs.get("ordered"):
        return f"slope {_interval(dynamics.measured(dynamics.slope_of, data))}"
    return f"staggering {_interval(dynamics.measured(dynamics.staggering_of, data))}"


def _clock(data: xr.Dataset) -> str:
    updates = data.attrs["clock"] == "updates"
    return "optimiser updates" if updates else "observations in the episode"


def _panels(measured: Measured) -> list[xr.Dataset]:
    """The measurements that have a place in the figures, in its order."""
    shown = [data for data in measured.values() if data.attrs["panel"] is not None]
    return sorted(shown, key=lambda data: data.attrs["panel"])


def _colours(scale: np.ndarray) -> list:
    return list(matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(scale))))


def _interval(estimate: dynamics.Estimate) -> str:
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def _subplots(rows: int, columns: int, *, width: float, height: float, **options):
    """A figure and its axes [rows, columns]."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _row(columns: int, **options):
    figure, axes = _subplots(1, columns, **options)
    return figure, list(axes[0])
