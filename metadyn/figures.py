"""Figures of measurements: the style of all, and those that every run has.

One colour a mode in all panels, from greatest to least along a colour-blind-safe scale; bands and
bars are 95 % bootstrap intervals. What is called `measured` is the data of one or several learners:
a dataset as `metadyn.measure` and `metadyn.load` give it, or one for each learner by name.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from metadyn import dynamics, labelled
from metadyn.base import STRENGTH
from metadyn.store import NotMeasured, Results

MARKERS = "osD^vP"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.title_fontsize": 9,
    "figure.dpi": 150,
    "lines.linewidth": 2,
}
COLUMNS = 4  # panels in a row, beyond which figures are unreadable at the width of a page

Measured = xr.Dataset | Mapping[str, xr.Dataset]


def styled(figure: Callable[..., Figure]) -> Callable[..., Figure]:
    """A function that draws a figure, in the style of all."""

    @functools.wraps(figure)
    def draw(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(STYLE):
            return figure(*args, **kwargs)

    return draw


def draw(
    folder: Path, results: Results, own: Mapping[str, Callable[[Results], Figure]]
) -> list[Path]:
    """Draws what every run has, and a study's own figures, into a folder; returns their paths.

    What has not been measured yet is left out.
    """
    folder.mkdir(exist_ok=True)
    paths = []
    with matplotlib.rc_context(STYLE):
        trained = trainings(results)
        for name, figure in (*of_every_run(results, trained), *_own(results, own)):
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1])
        for name, training in trained.items():
            paths.append(folder / f"inner_curves{name}.gif")
            animation(training, paths[-1])
    return paths


def _own(
    results: Results, own: Mapping[str, Callable[[Results], Figure]]
) -> Iterator[tuple[str, Figure]]:
    for name, figure in own.items():
        try:
            yield name, figure(results)
        except NotMeasured:  # in a run that was stopped
            continue


def of_every_run(
    results: Results, trained: Mapping[str, OuterTraining]
) -> Iterator[tuple[str, Figure]]:
    """The figures that every run has, by name."""
    measured = results.learners("in_distribution", drawn=True)
    for probe in probes(measured):
        suffix = "" if probe == STRENGTH else f"_{probe}"
        yield f"mode_strength{suffix}", mode_strength(measured, probe)
        alike = labelled.modes(next(iter(measured.values())), probe).exchangeable
        name, figure = ("single_runs", single_runs) if alike else ("learning_times", learning_times)
        yield name + suffix, figure(measured, probe)
    for name, training in trained.items():
        yield f"inner_curves{name}", inner_curves(training)
        yield f"outer_learning{name}", outer_learning(training)
        yield f"distance_to_bayes{name}", distance_to_bayes(training)
    if trained:
        yield "orders", orders(list(trained.values()))


def probes(measured: Measured) -> list[str]:
    """The names of the probes that measurements are of."""
    for data in labelled.split(measured).values():
        return [str(name) for name in data if "values" in data[name].attrs]
    return []


@styled
def mode_strength(measured: Measured, probe: str = STRENGTH) -> Figure:
    """Draws mode strength against inner step, one panel a learner, with its staggering."""
    panels = _each(measured)
    figure, axes = grid(len(panels), width=4.1, height=3.7, sharey=True)
    for axis, data in zip(axes, panels, strict=True):
        about, modes, times = labelled.about(data), labelled.modes(data, probe), _times(data)
        start = 1 if about.clock == "updates" else 0  # a log axis has no zero
        band = dynamics.estimate(lambda mean: mean, dynamics.strength(data, probe), draws=300)
        for k, colour in enumerate(colours(modes.values)):
            axis.fill_between(
                times[start:], band.low[start:, k], band.high[start:, k], color=colour, alpha=0.25
            )
            label = f"{modes.values[k]:.3g}"
            axis.plot(times[start:], band.value[start:, k], color=colour, label=label)
            if "closed_form" in data and probe == STRENGTH:
                curve = data["closed_form"].to_numpy()[start:, k]
                last = "closed form" if k == len(modes.values) - 1 else None
                axis.plot(times[start:], curve, color="black", ls=":", lw=1.4, label=last)
        axis.axhline(modes.p, color="grey", lw=0.8, zorder=0)
        merit = dynamics.text(dynamics.measured(dynamics.merit_of(data, probe), data, probe))
        axis.set_title(f"{about.label}\n{dynamics.merit_name(data, probe)} {merit}")
        axis.set_xlabel(_clock(data))
        axis.set_xscale("log" if start else "linear")
        axis.set_ylim(-0.1, 1.15)
    first = labelled.modes(panels[0], probe)
    for axis in axes:
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel(first.strength)
    axes[0].legend(title=first.axis, fontsize=9, loc="upper left")
    return figure


@styled
def learning_times(measured: Measured, probe: str = STRENGTH) -> Figure:
    """Draws learning time against what orders the modes on log axes, with the fitted slopes."""
    figure, (axis,) = grid(1, width=6.6, height=4.4)
    for data, marker in zip(_each(measured), cycle(MARKERS), strict=False):
        modes = labelled.modes(data, probe)
        scale = np.array(modes.values)
        t = dynamics.measured(dynamics.times_of(data, probe), data, probe)
        slope = dynamics.measured(dynamics.merit_of(data, probe), data, probe)
        for k, colour in enumerate(colours(scale)):
            if np.isfinite(t.value[k]):
                bars = [[t.value[k] - t.low[k]], [t.high[k] - t.value[k]]]
                axis.errorbar(scale[k], t.value[k], np.maximum(bars, 0), color=colour, capsize=3)
                axis.plot(scale[k], t.value[k], marker, color=colour, ms=8)
            else:
                axis.plot(scale[k], _times(data)[-1], "^", mfc="none", color=colour, ms=10)
        there = np.isfinite(t.value) & (t.value > 0)
        if there.sum() > 1:
            centre = np.log(t.value[there]).mean() - slope.value * np.log(scale[there]).mean()
            line = np.exp(centre + slope.value * np.log(scale))
            about = labelled.about(data)
            label = f"{about.label} ({about.clock}): slope {dynamics.text(slope)}"
            style = {"color": "grey", "lw": 1.2, "mfc": "none", "zorder": 0}
            axis.plot(scale, line, marker=marker, label=label, **style)
    axis.set(xscale="log", yscale="log", xlabel=modes.axis)
    axis.set_xticks(scale, [f"{value:.3g}" for value in scale])
    axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axis.set_ylabel(f"learning time $t_k({modes.p:g})$, own steps")
    if axis.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", fontsize=10)
    return figure


@styled
def single_runs(measured: Measured, probe: str = STRENGTH) -> Figure:
    """Draws one run of each learner, that of median time to learn all: averages hide plateaus."""
    panels = _each(measured)
    figure, axes = grid(len(panels), width=4.1, height=3.4, sharey=True)
    for axis, data in zip(axes, panels, strict=True):
        times, strength = _times(data), dynamics.strength(data, probe)[0]
        modes, start = labelled.modes(data, probe), int(labelled.about(data).clock == "updates")
        last = dynamics.times_of(data, probe)(strength)[:, -1]
        run = np.argsort(np.nan_to_num(last, nan=np.inf), kind="stable")[len(last) // 2]
        for k, colour in enumerate(colours(modes.values)):
            label = f"{modes.values[k]:g}"
            axis.plot(times[start:], strength[run, start:, k], color=colour, label=label)
        axis.axhline(modes.p, color="grey", lw=0.8, zorder=0)
        axis.set_title(f"{labelled.about(data).label}\nrun of median time to learn all")
        axis.set_xlabel(_clock(data))
        axis.set_xscale("log" if start else "linear")
        axis.set_ylim(-0.05, 1.05)
    axes[0].set_ylabel(modes.strength)
    axes[0].legend(title=modes.axis, fontsize=9)
    return figure


@styled
def final_strength(
    results: Results, titles: Mapping[str, str], shaded: Sequence[int | float] = ()
) -> Figure:
    """Draws the strength of each mode at the end of the episode, one panel a set of tasks.

    `titles` are what the sets are called, by name; modes of the values in `shaded` are marked as
    those of the training distribution. The learners shown are those measured on all of the sets.
    """
    sets = [name for name in titles if name in results.sets()]
    shown = [results.learners(name, drawn=True) for name in sets]
    names = [name for name in (shown[0] if shown else ()) if all(name in each for each in shown)]
    figure, axes = grid(len(sets) if names else 0, columns=5, width=2.9, height=3.2, sharey=True)
    for axis, title, measured in zip(axes, (titles[name] for name in sets), shown, strict=True):
        for i, (name, colour) in enumerate(zip(names, cycle(COLOURS), strict=False)):
            data, width = measured[name], 0.8 / len(names)
            end = dynamics.estimate(lambda m: m, dynamics.strength(data)[:, :, -1], draws=300)
            at = np.arange(len(end.value)) + (i - (len(names) - 1) / 2) * width
            axis.bar(at, end.value, width, color=colour, label=labelled.about(data).label)
            style = {"fmt": "none", "color": "black", "capsize": 3, "lw": 1.2}
            axis.errorbar(at, end.value, bars(end), **style)
        modes = labelled.modes(measured[names[0]])
        for k, value in enumerate(modes.values):
            if value in shaded:
                axis.axvspan(k - 0.5, k + 0.5, color="grey", alpha=0.2, lw=0)
        axis.axhline(1, color="grey", lw=0.8, zorder=0)
        axis.set(title=title, xlabel=modes.axis)
        axis.set_xticks(range(len(modes.values)), [f"{value:.3g}" for value in modes.values])
        axis.set_ylim(-0.2, 1.4)  # intervals may run beyond
    axes[0].set_ylabel("strength $a_k$ at the last step\n(0 nothing, 1 learned)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


@dataclasses.dataclass(frozen=True)
class OuterTraining:
    """A meta-learner at every checkpoint, and Bayes on the same tasks."""

    trained: xr.Dataset
    """Mode trajectories over outer training."""
    bayes: xr.Dataset
    losses: tuple[xr.Dataset, xr.Dataset]
    """The two of them on held-out tasks of the training distribution."""
    only: bool = True
    """Whether it is the only one of its comparison: else its own name goes into titles."""

    @functools.cached_property
    def strengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Mode strengths [seed, task, outer_step, step, mode] and [1, task, step, mode]."""
        return dynamics.strength(self.trained), dynamics.strength(self.bayes)

    @functools.cached_property
    def over(self) -> tuple[np.ndarray, np.ndarray]:
        """The same in the order that outer training has, where modes are exchangeable."""
        return dynamics.over_outer_training(self.trained, self.bayes)

    @property
    def modes(self) -> labelled.Modes:
        """What is followed."""
        return labelled.modes(self.trained)

    @property
    def called(self) -> str:
        """What figures call it."""
        about = labelled.about(self.trained)
        if not about.title:
            return about.label
        return about.title if self.only else f"{about.title}, {about.label}"

    def title(self, what: str) -> str:
        """`what`, of which domain or learner."""
        return f"{self.called}: {what}"


def trainings(results: Results) -> dict[str, OuterTraining]:
    """Each meta-learner that is followed over outer training, by the ending of its figures' names.

    The first of a comparison has the ending of its set of tasks; others have their name after it.
    """
    found = {}
    for tracked in (name for name in results.sets() if name.startswith("tracked")):
        heldout = tracked.replace("tracked", "heldout", 1)
        metas = results.learners(tracked, "meta")
        best, floor = ([*results.learners(s, "bayes").values()] for s in (tracked, heldout))
        metas = {name: data for name, data in metas.items() if "outer_step" in data.dims}
        if not (best and floor and all((heldout, name) in results for name in metas)):
            continue
        for i, (name, data) in enumerate(metas.items()):
            if labelled.about(data).followed:
                losses = results[heldout, name], floor[0]
                suffix = tracked.removeprefix("tracked") + (f"_{name}" if i else "")
                found[suffix] = OuterTraining(data, best[0], losses, len(metas) == 1)
    return found


@styled
def inner_curves(training: OuterTraining) -> Figure:
    """Draws the inner learning curve of each mode (panels) over outer training, and Bayes'."""
    trained = training.trained
    times, scale, steps = trained["time"].to_numpy(), dynamics.scale(trained), trained["outer_step"]
    shown = np.unique(np.linspace(0, len(steps) - 1, 9).round().astype(int))
    strength, best = training.strengths
    band = dynamics.estimate(lambda mean: mean, strength[:, :, shown], draws=300)
    colours = matplotlib.colormaps["plasma"](np.linspace(0.0, 0.9, len(shown)))
    columns = min(len(scale), 5)
    rows = -(-len(scale) // columns)
    figure, axes = subplots(rows, columns, width=2.6, height=2.9, sharex=True, sharey=True)
    for axis in axes.flat[len(scale) :]:
        axis.set_visible(False)
    label = training.modes.label.replace("\n", " ")
    for k, axis in enumerate(axes.flat[: len(scale)]):
        for i, colour in enumerate(colours):
            axis.fill_between(
                times, band.low[i, :, k], band.high[i, :, k], color=colour, alpha=0.2, lw=0
            )
            at = f"{int(steps[shown[i]]):,}"
            axis.plot(times, band.value[i, :, k], color=colour, lw=1.6, label=at)
        axis.plot(times, best.mean((0, 1))[:, k], "k--", lw=1.5, label="Bayes")
        axis.axhline(training.modes.p, color="grey", lw=0.8, zorder=0)
        axis.set_title(f"{label}: {scale[k]:.3g}", fontsize=10)
        axis.set_ylim(-0.1, 1.15)
    for axis in axes[-1]:
        axis.set_xlabel("observations")
    for axis in axes[:, 0]:
        axis.set_ylabel(training.modes.strength)
    figure.suptitle(training.title("inner learning curves over outer training"))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, title="outer step", loc="outside right center", fontsize=9)
    return figure


@styled
def outer_learning(training: OuterTraining) -> Figure:
    """Draws inner learning times, and how near each mode is to Bayes, against outer step."""
    trained, (strength, best) = training.trained, training.strengths
    inner, scale, steps = dynamics.times_of(trained), dynamics.scale(trained), _outer_steps(trained)
    figure, (left, right) = grid(2, width=5.2, height=4.0)
    t = dynamics.estimate(inner, strength, draws=300)
    share = dynamics.estimate(dynamics.share_of_bayes, *training.over, draws=300)
    reached = dynamics.outer_times_of(trained)(*(each.mean((0, 1)) for each in training.over))
    for k, colour in enumerate(colours(scale)):
        for axis, (value, low, high) in ((left, t), (right, share)):
            axis.fill_between(steps, low[:, k], high[:, k], color=colour, alpha=0.2, lw=0)
            label = f"{scale[k]:.3g}" + (f": {reached[k]:,.0f}" if axis is right else "")
            axis.plot(steps, value[:, k], "o-", color=colour, ms=3, label=label)
        left.axhline(inner(best.mean((0, 1)))[k], color=colour, ls="--", lw=1.2)
        right.plot(reached[k], 0.5, "s", color=colour, ms=7, mec="black", zorder=5)
    left.plot([], [], "--", color="grey", label="Bayes")
    left.set_ylabel(f"inner learning time $t_k$ (to {training.modes.p:g})\nin observations")
    left.set_ylim(0, trained["time"].to_numpy()[-1])
    right.axhline(1, color="grey", ls="--", lw=1.2, zorder=0)
    right.axhline(0.5, color="grey", lw=0.8, zorder=0)
    right.set_ylabel("mean strength over the episode\n(0 untrained, 1 as Bayes)")
    label = training.modes.label.replace("\n", " ")
    by = ("", "")
    if training.modes.exchangeable:
        by = (" within each episode", " over outer training,\neach seed its own")
    left.legend(title=label + by[0], ncols=2, fontsize=9)
    right.set_ylim(-0.2, 2.1)
    about = {"title": f"{label}{by[1]}: half-way at outer step $n_k$", "loc": "upper left"}
    right.legend(**about, ncols=2, fontsize=9, alignment="left")
    for axis in (left, right):
        _outer_axis(axis, steps)
    figure.suptitle(training.title("learning of each mode over outer training"))
    return figure


@styled
def distance_to_bayes(training: OuterTraining) -> Figure:
    """Draws excess loss over Bayes, and the distance of each mode's curve, against outer step."""
    figure, (left, right) = grid(2, width=5.2, height=4.0)
    trained, bayes = training.losses
    steps, floor = _outer_steps(trained), labelled.about(trained).loss_floor
    loss, best = dynamics.episode_loss(trained), dynamics.episode_loss(bayes)
    statistic = lambda mean, best: dynamics.excess_loss(mean, best[..., None], floor)
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
    for k, colour in enumerate(colours(scale)):
        right.fill_between(steps, apart.low[:, k], apart.high[:, k], color=colour, alpha=0.2, lw=0)
        right.plot(steps, apart.value[:, k], "o-", color=colour, ms=3, label=f"{scale[k]:.3g}")
    right.set_ylabel("distance of the mean inner curve\nto Bayes' (1 untrained)")
    right.set_ylim(0)
    right.legend(title=training.modes.axis, fontsize=9)
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
    for k, colour in enumerate(colours(scale)):
        lines += axis.plot([], [], color=colour, label=f"{scale[k]:.3g}")
        axis.plot(times, bayes[:, k], "--", color=colour, lw=1.2)
    axis.plot([], [], "--", color="grey", lw=1.2, label="Bayes")
    axis.set(xlim=(0, times[-1]), ylim=(-0.1, 1.15), xlabel="observations in the episode")
    axis.set_ylabel(training.modes.strength)
    place = {"title": training.modes.axis, "fontsize": 9}
    axis.legend(**place, loc="upper left", bbox_to_anchor=(1, 1))
    title = axis.set_title(training.title(f"outer step {int(steps[-1]):,}"))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    figure.set_layout_engine("none")  # laid out once, for the longest title
    moving = [*lines, title]
    for artist in moving:
        artist.set_animated(True)
    canvas.draw()  # what stays: drawn once for all frames
    still, frames = canvas.copy_from_bbox(figure.bbox), []
    for i, step in enumerate(steps.to_numpy()):
        canvas.restore_region(still)
        title.set_text(training.title(f"outer step {step:,}"))
        for k, line in enumerate(lines):
            line.set_data(times, mean[i, :, k])
        for artist in moving:
            axis.draw_artist(artist)
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    lasts = [250] * (len(frames) - 1) + [1250]  # ms: the last stays for a while
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=lasts, loop=0)


@styled
def orders(trainings: Sequence[OuterTraining]) -> Figure:
    """Draws when the outer loop comes to learn each mode, against its inner learning time."""
    figure, axes = grid(len(trainings), width=4.4, height=4.3)
    for axis, training in zip(axes, trainings, strict=True):
        _order(axis, training)
    axes[0].set_ylabel("outer learning time $n_k$\n(outer step half-way to Bayes)")
    return figure


def _order(axis: Any, training: OuterTraining) -> None:
    trained, outer = training.trained, dynamics.outer_times_of(training.trained)
    inner = lambda mean: dynamics.times_of(trained)(mean[..., -1, :, :])
    found = (
        dynamics.estimate(inner, training.strengths[0], draws=300),
        dynamics.estimate(outer, *training.over, draws=300),
    )
    value = np.array([each.value for each in found])  # [inner or outer, mode]
    bars = [np.maximum([v - low, high - v], 0) for v, low, high in found]  # [side, mode] each
    title = "contexts by their rank in either order"
    if not training.modes.exchangeable:
        correlation = dynamics.estimate(
            lambda a, b: dynamics.rank_correlation(inner(a), outer(a, b)), *training.over
        )
        title = f"rank correlation {dynamics.text(correlation)}"
    scale = dynamics.scale(trained)
    for k, (colour, marker) in enumerate(zip(colours(scale), cycle(MARKERS), strict=False)):
        (x, y), label = value[:, k], f"{scale[k]:.3g}"
        style = {"color": colour, "ms": 8, "capsize": 3, "lw": 1.2, "label": label}
        axis.errorbar(x, y, bars[1][:, [k]], bars[0][:, [k]], marker, **style)
    axis.set_yscale("log")
    number = matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:,.0f}")
    axis.yaxis.set_major_formatter(number)
    axis.yaxis.set_minor_formatter(number)
    axis.tick_params(axis="y", which="both", labelsize=9)
    axis.set_xlabel("inner learning time $t_k$\n(observations; once trained)")
    axis.set_title(f"{training.called}\n{title}", fontsize=10)
    axis.legend(title=training.modes.axis, fontsize=9)


def _outer_steps(trained: xr.Dataset) -> np.ndarray:
    """Outer steps for a log axis, step 0 at its left edge."""
    return np.maximum(trained["outer_step"].to_numpy(), 0.5)


def _outer_axis(axis: Any, steps: np.ndarray) -> None:
    axis.set(xscale="log", xlabel="outer step (leftmost: 0)", xlim=(0.4, 1.4 * steps[-1]))
    axis.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def colours(values: Sequence[float] | np.ndarray) -> list:
    """A colour for each mode, from the first to the last."""
    return list(matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(values))))


def bars(estimate: dynamics.Estimate) -> np.ndarray:
    """The lengths of the error bars of an estimate, below and above [2, ...]."""
    value, low, high = estimate
    return np.nan_to_num(np.maximum([value - low, high - value], 0))


def subplots(rows: int, columns: int, *, width: float, height: float, **options: Any) -> Any:
    """A figure and its axes [rows, columns], each of a width and height in inches."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def grid(panels: int, columns: int = COLUMNS, **options: Any) -> Any:
    """A figure and a list of axes, in as many rows as keep it readable.

    Raises `NotMeasured` for no panels: there is nothing to draw yet.
    """
    if panels == 0:
        raise NotMeasured("nothing that the figure shows is measured yet")
    rows = -(-panels // columns)
    figure, axes = subplots(rows, -(-panels // rows), **options)
    for axis in axes.flat[panels:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:panels])


def _each(measured: Measured) -> list[xr.Dataset]:
    """The learners, one by one; over outer training, at its end."""
    parts = labelled.split(measured).values()
    return [data.isel(outer_step=-1) if "outer_step" in data.dims else data for data in parts]


def _times(data: xr.Dataset) -> np.ndarray:
    return data["time"].to_numpy()


def _clock(data: xr.Dataset) -> str:
    updates = labelled.about(data).clock == "updates"
    return "optimiser updates" if updates else "observations in the episode"
