"""The figures of a study, drawn from what its run folder holds.

One colour a mode in all panels, from greatest to least along a colour-blind-safe scale; bands and
bars are 95 % bootstrap intervals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
import xarray as xr
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure

from metadyn import dynamics
from metadyn.store import TRACKED, RunFolder

IN_DISTRIBUTION, BAYES = "in_distribution", "bayes"
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
    """Draws every figure that the stored measurements allow; returns their paths."""
    run.figures.mkdir(exist_ok=True)
    paths = []
    with matplotlib.rc_context(STYLE):
        drawn, trained = of_run(run)
        for name, figure in drawn.items():
            paths.append(run.figures / f"{name}.png")
            figure.savefig(paths[-1], bbox_inches="tight")
        for name, training in trained.items():
            paths.append(run.figures / f"inner_curves{name}.gif")
            animation(training, paths[-1])
    return paths


def of_run(run: RunFolder) -> tuple[dict[str, Figure], dict[str, OuterTraining]]:
    """The figures that the stored measurements allow, by name; and the trainings they show.

    What a set of tasks is good for is said by its attributes (`study.TaskSet.attrs`).
    """
    stored = {
        name: {learner: run.measurement(name, learner) for learner in learners}
        for name, learners in run.measurements().items()
    }

    def marked(attribute: str) -> dict[str, Measured]:
        """The sets that carry an attribute."""
        return {name: each for name, each in stored.items() if attribute in _attrs(each)}

    drawn: dict[str, Figure] = {}
    if IN_DISTRIBUTION in stored:
        drawn["mode_strength"] = mode_strength(stored[IN_DISTRIBUTION])
        if _attrs(stored[IN_DISTRIBUTION]).get("ordered"):
            drawn["single_runs"] = single_runs(stored[IN_DISTRIBUTION])
        else:
            drawn["learning_times"] = learning_times(stored[IN_DISTRIBUTION])
    for name, measured in marked("compared").items():
        drawn[f"mode_strength_{name}"] = mode_strength(measured)
    trained = _over_outer_training(run, stored)
    for name, training in trained.items():
        drawn[f"inner_curves{name}"] = inner_curves(training)
        drawn[f"outer_learning{name}"] = outer_learning(training)
        drawn[f"distance_to_bayes{name}"] = distance_to_bayes(training)
    if trained:
        drawn["orders"] = orders(list(trained.values()))
    varied = {**marked("varied"), **_varied(run, stored)}
    if varied:
        drawn["robustness"] = robustness(varied)
    if len(marked("shift")) > 1:
        drawn["learned_spectrum"] = learned_spectrum(marked("shift"))
    for name, measured in marked("curves").items():
        drawn[name] = curves(measured)
    if len(marked("grown")) > 1:
        drawn["growth"] = growth(marked("grown"))
    if marked("targets"):
        drawn["band_gain"] = band_gain(marked("targets"))
    return drawn, trained


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
    for data, marker in zip(_panels(measured), cycle(MARKERS), strict=False):
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


@dataclasses.dataclass(frozen=True)
class OuterTraining:
    """A meta-learner at every checkpoint, and Bayes on the same tasks."""

    trained: xr.Dataset
    """Mode trajectories over outer training."""
    bayes: xr.Dataset
    losses: tuple[xr.Dataset, xr.Dataset]
    """The two of them on held-out tasks of the training distribution."""

    @cached_property
    def strengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Mode strengths [seed, task, outer_step, step, mode] and [1, task, step, mode]."""
        return dynamics.strength(self.trained), dynamics.strength(self.bayes)

    @cached_property
    def over(self) -> tuple[np.ndarray, np.ndarray]:
        """The same in the order that outer training has, where modes are exchangeable."""
        return dynamics.over_outer_training(self.trained, self.bayes)

    def title(self, what: str) -> str:
        """`what`, of which domain or learner."""
        return f"{_called(self.trained)}: {what}"


def _over_outer_training(
    run: RunFolder, stored: Mapping[str, Measured]
) -> dict[str, OuterTraining]:
    """By suffix of its sets: each training whose dynamics are what the study is about."""
    return {
        tracked.removeprefix(TRACKED): OuterTraining(
            run.trajectories(tracked),
            next(iter(stored[tracked].values())),
            (run.trajectories(heldout), next(iter(stored[heldout].values()))),
        )
        for tracked, heldout in run.trainings()
        if {tracked, heldout} <= set(stored) and "varied" not in _attrs(stored[tracked])
    }


def inner_curves(training: OuterTraining) -> Figure:
    """Inner learning curve of each mode (panels) at successive outer steps, and Bayes'."""
    trained = training.trained
    times, scale, steps = trained["time"].to_numpy(), dynamics.scale(trained), trained["outer_step"]
    shown = np.unique(np.linspace(0, len(steps) - 1, 9).round().astype(int))
    strength, best = training.strengths
    band = dynamics.estimate(lambda mean: mean, strength[:, :, shown], draws=300)
    colours = matplotlib.colormaps["plasma"](np.linspace(0.0, 0.9, len(shown)))
    columns = min(len(scale), 5)
    rows = -(-len(scale) // columns)
    figure, axes = _subplots(rows, columns, width=2.6, height=2.9, sharex=True, sharey=True)
    for axis in axes.flat[len(scale) :]:
        axis.set_visible(False)
    label = trained.attrs["mode_label"].replace("\n", " ")
    for k, axis in enumerate(axes.flat[: len(scale)]):
        for i, colour in enumerate(colours):
            axis.fill_between(
                times, band.low[i, :, k], band.high[i, :, k], color=colour, alpha=0.2, lw=0
            )
            at = f"{int(steps[shown[i]]):,}"
            axis.plot(times, band.value[i, :, k], color=colour, lw=1.6, label=at)
        axis.plot(times, best.mean((0, 1))[:, k], "k--", lw=1.5, label="Bayes")
        axis.axhline(trained.attrs["p"], color="grey", lw=0.8, zorder=0)
        axis.set_title(f"{label}: {scale[k]:.3g}", fontsize=10)
        axis.set_ylim(-0.1, 1.15)
    for axis in axes[-1]:
        axis.set_xlabel("observations")
    for axis in axes[:, 0]:
        axis.set_ylabel(trained.attrs.get("strength_label", STRENGTH))
    figure.suptitle(training.title("inner learning curves over outer training"))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, title="outer step", loc="outside right center", fontsize=9)
    return figure


def outer_learning(training: OuterTraining) -> Figure:
    """Inner learning time of each mode, and how near to Bayes it is, against outer step."""
    trained, (strength, best) = training.trained, training.strengths
    inner, scale, steps = dynamics.times_of(trained), dynamics.scale(trained), _outer_steps(trained)
    figure, (left, right) = _row(2, width=5.2, height=4.0)
    t = dynamics.estimate(inner, strength, draws=300)
    share = dynamics.estimate(dynamics.share_of_bayes, *training.over, draws=300)
    reached = dynamics.outer_times_of(trained)(*(each.mean((0, 1)) for each in training.over))
    for k, colour in enumerate(_colours(scale)):
        for axis, (value, low, high) in ((left, t), (right, share)):
            axis.fill_between(steps, low[:, k], high[:, k], color=colour, alpha=0.2, lw=0)
            label = f"{scale[k]:.3g}" + (f": {reached[k]:,.0f}" if axis is right else "")
            axis.plot(steps, value[:, k], "o-", color=colour, ms=3, label=label)
        left.axhline(inner(best.mean((0, 1)))[k], color=colour, ls="--", lw=1.2)
        right.plot(reached[k], 0.5, "s", color=colour, ms=7, mec="black", zorder=5)
    left.plot([], [], "--", color="grey", label="Bayes")
    left.set_ylabel(f"inner learning time $t_k$ (to {trained.attrs['p']:g})\nin observations")
    left.set_ylim(0, trained["time"].to_numpy()[-1])
    right.axhline(1, color="grey", ls="--", lw=1.2, zorder=0)
    right.axhline(0.5, color="grey", lw=0.8, zorder=0)
    right.set_ylabel("mean strength over the episode\n(0 untrained, 1 as Bayes)")
    label = trained.attrs["mode_label"].replace("\n", " ")
    by = ("", "")
    if trained.attrs.get("ordered"):
        by = (" within each episode", " over outer training,\neach seed its own")
    left.legend(title=label + by[0], ncols=2, fontsize=9, title_fontsize=9)
    right.set_ylim(-0.2, 2.1)
    about = {"title": f"{label}{by[1]}: half-way at outer step $n_k$", "loc": "upper left"}
    right.legend(**about, ncols=2, fontsize=9, title_fontsize=9, alignment="left")
    for axis in (left, right):
        _outer_axis(axis, steps)
    figure.suptitle(training.title("learning of each mode over outer training"))
    return figure


def distance_to_bayes(training: OuterTraining) -> Figure:
    """Excess loss over Bayes, each seed and their mean, and mode by mode, against outer step."""
    figure, (left, right) = _row(2, width=5.2, height=4.0)
    trained, bayes = training.losses
    steps, floor = _outer_steps(trained), trained.attrs["loss_floor"]
    loss, best = dynamics.episode_loss(trained), dynamics.episode_loss(bayes)
    statistic = lambda mean, best: dynamics.excess_loss(mean, best[..., None], floor)  # noqa: E731
    value, low, high = dynamics.estimate(statistic, loss, best, draws=300)
    for each in loss.mean(1):
        left.plot(steps, statistic(each, best.mean((0, 1))), color=COLOURS[0], lw=0.8, alpha=0.6)
    left.fill_between(steps, low, high, color=COLOURS[0], alpha=0.25, lw=0)
    left.plot(steps, value, "o-", color=COLOURS[0], ms=4, label="mean of seeds")
    left.plot([], [], color=COLOURS[0], lw=0.8, alpha=0.6, label="each seed")
    beside = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
    left.annotate(f"{value[-1]:.2f}", (steps[-1], value[-1]), **beside)
    left.set_yscale("log")
    left.set_ylabel(r"excess loss over Bayes" "\n" r"$(L - L_B)\,/\,(L_B - L_{\min})$")
    left.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    ticks = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
    left.set_yticks([y for y in ticks if low.min() / 1.5 < y < high.max() * 1.5])
    left.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    scale, steps = dynamics.scale(training.trained), _outer_steps(training.trained)
    apart = dynamics.estimate(dynamics.distance_to_bayes, *training.strengths, draws=300)
    for k, colour in enumerate(_colours(scale)):
        right.fill_between(steps, apart.low[:, k], apart.high[:, k], color=colour, alpha=0.2, lw=0)
        right.plot(steps, apart.value[:, k], "o-", color=colour, ms=3, label=f"{scale[k]:.3g}")
    right.set_ylabel("distance of the mean inner curve\nto Bayes' (1 untrained)")
    right.set_ylim(0)
    right.legend(title=training.trained.attrs["mode_label"], fontsize=9, title_fontsize=9)
    left.legend(fontsize=9)
    for axis in (left, right):
        _outer_axis(axis, steps)
    figure.suptitle(training.title("distance to Bayes over outer training"))
    return figure


def animation(training: OuterTraining, path: Path) -> None:
    """Writes a GIF of all inner learning curves, one frame a checkpoint, Bayes' beside them."""
    trained, (strength, best) = training.trained, training.strengths
    times, scale, steps = trained["time"].to_numpy(), dynamics.scale(trained), trained["outer_step"]
    mean, bayes = strength.mean((0, 1)), best.mean((0, 1))
    figure = Figure(figsize=(5.6, 4.2), dpi=80, layout="constrained")
    axis = figure.subplots()
    lines = []
    for k, colour in enumerate(_colours(scale)):
        lines += axis.plot([], [], color=colour, label=f"{scale[k]:.3g}")
        axis.plot(times, bayes[:, k], "--", color=colour, lw=1.2)
    axis.plot([], [], "--", color="grey", lw=1.2, label="Bayes")
    axis.set(xlim=(0, times[-1]), ylim=(-0.1, 1.15), xlabel="observations in the episode")
    axis.set_ylabel(trained.attrs.get("strength_label", STRENGTH))
    place = {"title": trained.attrs["mode_label"], "title_fontsize": 9, "fontsize": 9}
    axis.legend(**place, loc="upper left", bbox_to_anchor=(1, 1))
    axis.set_title(training.title(f"outer step {int(steps[-1]):,}"))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, for the longest title
    writer = PillowWriter(fps=4)
    with writer.saving(figure, str(path), dpi=80):
        frames = [*range(len(steps)), *[len(steps) - 1] * 4]  # the last stays for a while
        for i in frames:
            for k, line in enumerate(lines):
                line.set_data(times, mean[i, :, k])
            axis.set_title(training.title(f"outer step {int(steps[i]):,}"))
            writer.grab_frame()


def orders(trainings: Sequence[OuterTraining]) -> Figure:
    """When the outer loop comes to learn each mode, against when the trained learner learns it."""
    figure, axes = _row(len(trainings), width=4.4, height=4.3)
    for axis, training in zip(axes, trainings, strict=True):
        _order(axis, training)
    axes[0].set_ylabel("outer learning time $n_k$\n(outer step half-way to Bayes)")
    return figure


def _order(axis: Any, training: OuterTraining) -> None:
    trained, outer = training.trained, dynamics.outer_times_of(training.trained)
    inner = lambda mean: dynamics.times_of(trained)(mean[..., -1, :, :])  # noqa: E731
    found = (
        dynamics.estimate(inner, training.strengths[0], draws=300),
        dynamics.estimate(outer, *training.over, draws=300),
    )
    value = np.array([each.value for each in found])  # [inner or outer, mode]
    bars = [np.maximum([v - low, high - v], 0) for v, low, high in found]  # [side, mode] each
    title = "contexts by their rank in either order"
    if not trained.attrs.get("ordered"):
        correlation = dynamics.estimate(
            lambda a, b: dynamics.rank_correlation(inner(a), outer(a, b)), *training.over
        )
        title = f"rank correlation {_interval(correlation)}"
    scale = dynamics.scale(trained)
    for k, (colour, marker) in enumerate(zip(_colours(scale), cycle(MARKERS), strict=False)):
        (x, y), label = value[:, k], f"{scale[k]:.3g}"
        style = {"color": colour, "ms": 8, "capsize": 3, "lw": 1.2, "label": label}
        axis.errorbar(x, y, bars[1][:, [k]], bars[0][:, [k]], marker, **style)
    axis.set_yscale("log")
    number = matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:,.0f}")
    axis.yaxis.set_major_formatter(number)
    axis.yaxis.set_minor_formatter(number)
    axis.tick_params(axis="y", which="both", labelsize=9)
    axis.set_xlabel("inner learning time $t_k$\n(observations; trained LSTM)")
    axis.set_title(f"{_called(trained)}\n{title}", fontsize=10)
    axis.legend(title=trained.attrs["mode_label"], fontsize=9, title_fontsize=9)


def _varied(run: RunFolder, stored: Mapping[str, Measured]) -> dict[str, Measured]:
    """Tracked sets that stand for one value of what is varied, at the last outer step."""
    return {
        name: {
            BAYES: next(iter(stored[name].values())),
            "trained": run.trajectories(name, run.outer_steps()[-1:]).isel(outer_step=0),
        }
        for name, _ in run.trainings()
        if name in stored and "varied" in _attrs(stored[name])
    }


def robustness(varied: Mapping[str, Measured]) -> Figure:
    """How far each learner staggers, as one thing at a time is varied: a row each.

    Sets carry `title` (the domain, a panel each) and `varied` (what it is and its value). Where
    Bayes was measured on the same tasks, it is how far a learner staggers beyond that.
    """
    titles = list(dict.fromkeys(_attrs(each)["title"] for each in varied.values()))
    rows = [sum(_attrs(each)["title"] == t for each in varied.values()) for t in titles]
    figure, axes = _row(len(titles), width=5.4, height=1.2 + 0.32 * max(rows))
    for axis, title in zip(axes, titles, strict=True):
        labels: list[str] = []
        for measured in varied.values():
            if _attrs(measured)["title"] != title:
                continue
            found = _attrs(measured)
            ordered = found.get("ordered")
            of = dynamics.staggering_of if ordered else dynamics.slope_of
            trained = "trained" in measured
            data = next(each for name, each in measured.items() if name != BAYES)
            if BAYES in measured:
                value, low, high = dynamics.difference(of, data, measured[BAYES])
            else:
                value, low, high = dynamics.measured(of, data)
            bars = [[max(value - low, 0)], [max(high - value, 0)]]
            colour, marker = (COLOURS[0], "o") if trained else (COLOURS[1], "D")
            axis.errorbar(value, len(labels), xerr=bars, fmt=marker, color=colour, capsize=3)
            if np.isnan(value):
                note = {"va": "center", "fontsize": 9, "color": colour}
                few = "not all contexts are" if ordered else "fewer than two modes are"
                axis.text(0, len(labels), f" {few} ever learned", **note)
            labels.append(found["varied"])
        axis.axvline(0, color="grey", lw=0.8, zorder=0)
        axis.set_yticks(range(len(labels)), labels, fontsize=9)
        axis.set_ylim(len(labels) - 0.5, -0.5)
        what = (
            "bandit staggering, minus Bayes'"
            if ordered
            else "staggering slope (LSTM: minus Bayes')"
        )
        axis.set(title=title, xlabel=what)
    axes[0].plot([], [], "D", color=COLOURS[1], label="ordinary learner")
    axes[0].plot([], [], "o", color=COLOURS[0], label="meta-trained LSTM")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _called(trained: xr.Dataset) -> str:
    return trained.attrs.get("title", trained.attrs["label"])


def _outer_steps(trained: xr.Dataset) -> np.ndarray:
    """Outer steps for a log axis, step 0 at its left edge."""
    return np.maximum(trained["outer_step"].to_numpy(), 0.5)


def _outer_axis(axis: Any, steps: np.ndarray) -> None:
    axis.set(xscale="log", xlabel="outer step (leftmost: 0)", xlim=(0.4, 1.4 * steps[-1]))
    axis.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())


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
        (data.attrs["learner"] for data in drawn), cycle(MARKERS), cycle(LINES), strict=False
    ):
        points = []
        for measured in by_shift:
            data = measured[learner]
            end = dynamics.samples(data.isel(step=[-1]), "mode_strength")[:, :, 0]
            strength = dynamics.estimate(lambda mean: mean, end, draws=300)
            scale = dynamics.scale(data)
            outsize = "outsize" in data.attrs
            for k, colour in enumerate(_colours(scale)):
                value, low, high = (scale[k] * each[k] for each in strength)
                style = {"mfc": colour if line == "-" else "none", "mec": colour, "ms": 7}
                style |= {"mec": "black", "mew": 1.5} if outsize else {}
                bars = np.maximum([[value - low], [high - value]], 0)
                left.errorbar(scale[k], value, bars, fmt=marker, color=colour, capsize=2, **style)
            if not outsize:
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
    if any("outsize" in _attrs(measured) for measured in by_shift):
        edged = {"mfc": "none", "mec": "black", "mew": 1.5, "label": "greatest mode alone shifted"}
        left.plot([], [], "s", **edged)
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
        scale = dynamics.scale(data)
        for k, colour in enumerate(_colours(scale)):
            axis.plot(times[start:], strength[run, start:, k], color=colour, label=f"{scale[k]:g}")
        axis.axhline(data.attrs["p"], color="grey", lw=0.8, zorder=0)
        axis.set_title(f"{data.attrs['label']}\nrun of median time to learn all")
        axis.set_xlabel(_clock(data))
        axis.set_xscale("log" if start else "linear")
        axis.set_ylim(-0.05, 1.05)
    axes[0].set_ylabel(panels[0].attrs.get("strength_label", STRENGTH))
    axes[0].legend(title=panels[0].attrs["mode_label"], fontsize=9, title_fontsize=9)
    return figure


def growth(measured_by_set: Mapping[str, Measured]) -> Figure:
    """Median time until the last mode is learned, against the number of modes, on a log axis.

    Sets carry that number in the attribute `grown`. A triangle: the median run was not done.
    """
    sets = sorted(measured_by_set.values(), key=lambda measured: _attrs(measured)["grown"])
    figure, (axis,) = _row(1, width=6.6, height=4.4)
    numbers = np.array([_attrs(measured)["grown"] for measured in sets])
    names = sorted(set.intersection(*(set(measured) for measured in sets)))
    for name, colour, marker in zip(names, cycle(COLOURS), cycle(MARKERS), strict=False):
        runs = [dynamics.last_times(measured[name]) for measured in sets]
        found = [dynamics.estimate_over_runs(np.median, each, draws=300) for each in runs]
        value, low, high = (np.array([e[i] for e in found]) for i in range(3))
        done = np.isfinite(value)
        bars = np.maximum([(value - low)[done], (high - value)[done]], 0)
        factor = dynamics.growth(numbers[done], value[done]).factor
        label = f"{sets[0][name].attrs['label']}: × {factor:.2f} for each context"
        never = np.isinf(runs[-1]).mean()
        label += f"; {never:.0%} of runs not done at {numbers[-1]}" if never else ""
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
        for i, (data, colour) in enumerate(zip(learners, cycle(COLOURS), strict=False)):
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
    axes[len(axes) // 2].legend(loc="upper center", fontsize=9)
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
