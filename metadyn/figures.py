"""Figures of measurements: their common style, and the figures that every run has.

Each mode has one colour in all panels, from greatest to least along a colour-blind-safe scale.
Bands and bars are 95 % bootstrap intervals. The argument `measured` holds the data of one or
several learners: a dataset as `metadyn.measure` and `metadyn.load` return it, or one dataset per
learner, keyed by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib import cbook
from matplotlib.artist import setp
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.mathtext import MathTextParser
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator
from PIL import Image

from metadyn import dynamics, trajectories
from metadyn.base import STRENGTH
from metadyn.dynamics import Estimate
from metadyn.errors import check, error_context
from metadyn.progress import Progress
from metadyn.store import NotMeasured, Results

MARKERS = "osD^vP"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
STYLE: dict[Any, Any] = {
    "axes.formatter.min_exponent": 4,  # 6 and 0.01 are not shown as powers of ten
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "errorbar.capsize": 3,
    "grid.alpha": 0.25,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.title_fontsize": 9,
    "figure.dpi": 150,
    "lines.linewidth": 2,
}
MODES = 30  # most panels of modes in one figure; with more modes, those shown are spread evenly
STRENGTH_LIMITS = (-0.1, 1.15)  # limits of a strength axis: a learned mode has strength 1
LEVEL_STYLE = {"color": "grey", "lw": 0.8, "zorder": 0}  # style of a line that marks a level
Measured = xr.Dataset | Mapping[str, xr.Dataset]
StudyFigures = Mapping[str, Callable[[Results], Figure]]
styled = matplotlib.rc_context(STYLE)  # a decorator


def line_colour(i: int) -> str:
    """Returns the colour of the i-th line of a panel, cycling through `COLOURS`."""
    return COLOURS[i % len(COLOURS)]


@styled
def draw(folder: Path, results: Results, own: StudyFigures, progress: Progress) -> list[Path]:
    """Draws the figures of every run, and a study's `own`, into a folder; returns their paths.

    In a run that was stopped, figures of what has not been measured yet are left out.
    """
    folder.mkdir(exist_ok=True)
    trained, writes = by_probe(histories(results)), {}
    figures = of_every_run(results, trained)
    figures |= {name: partial(figure, results) for name, figure in own.items()}
    files = {f"inner_curves{name}.gif": partial(animation, t) for name, t in trained.items()}
    files |= {f"{name}.png": partial(picture, figure) for name, figure in figures.items()}
    counter = progress.counting("drawing", len(files))
    with counter as show, ThreadPoolExecutor(1) as pool:  # encodes one file as the next is drawn
        for name, make_writer in files.items():
            show(name)
            with contextlib.suppress(NotMeasured):
                writes[folder / name] = pool.submit(make_writer(), folder / name)
        for write in writes.values():
            write.result()
    return [*writes]


def picture(figure: Callable[[], Figure]) -> Callable[[Path], None]:
    """Draws a figure and returns the function that writes it to a path, as a PNG."""
    canvas = FigureCanvasAgg(figure())
    canvas.draw()
    dpi = canvas.figure.dpi
    return partial(Image.fromarray(np.asarray(canvas.buffer_rgba())).save, dpi=(dpi, dpi))


def checked(figure: Callable[[Results], Figure]) -> Callable[[Results], Figure]:
    """Makes a figure function raise `ConfigError` unless its result is a figure of valid text."""

    def draw(results: Results) -> Figure:
        drawn = figure(results)
        check(isinstance(drawn, Figure), "figure", type(drawn).__name__, "must be a `Figure`")
        check_words(text.get_text() for text in drawn.findobj(Text))
        return drawn

    return draw


def check_words(texts: Iterable[str]) -> None:
    """Raises `ConfigError` if the mathematics between a text's dollar signs cannot be typeset."""
    for line in {line for text in texts for line in text.splitlines()}:
        if cbook.is_math_text(line):
            with error_context(f"{line!r} cannot be typeset"):
                MathTextParser("path").parse(line)


def of_every_run(
    results: Results, trained: dict[str, LearningHistory]
) -> dict[str, Callable[[], Figure]]:
    """Returns the functions that draw the figures of every run, keyed by the figures' names."""
    measured = results.learners("in_distribution", drawn=True)
    figures: dict[str, Callable[[], Figure]] = {}
    first = next(iter(measured.values()), xr.Dataset())
    for probe in trajectories.probes(first):
        exchangeable = trajectories.modes(first, probe).exchangeable
        for figure in (mode_strength, single_runs if exchangeable else learning_times):
            figures[figure.__name__ + ending(probe)] = partial(figure, measured, probe)
    for suffix, training in trained.items():
        for outer_figure in (inner_curves, outer_learning, distance_to_bayes):
            figures[outer_figure.__name__ + suffix] = partial(outer_figure, training)
    if trained:
        figures["orders"] = partial(orders, list(trained.values()))
    return figures


@styled
def mode_strength(measured: Measured, probe: str = STRENGTH, one_run: bool = False) -> Figure:
    """Draws mode strength against inner step, one panel per learner, with its staggering.

    The curves are means over runs with their bands or, with `one_run`, the one run whose time to
    learn all modes is the median.
    """
    learners = _learners(measured)
    first = trajectories.modes(learners[0], probe)
    figure, axes = grid(len(learners), first.strength, width=4.1, height=3.7, sharey=True)
    for axis, data in zip(axes, learners, strict=True):
        about, modes = trajectories.about(data), trajectories.modes(data, probe)
        start = 1 if about.clock == "updates" else 0  # a log axis has no zero
        times, strength = data["time"].to_numpy()[start:], dynamics.strength(data, probe)
        if one_run:
            last = dynamics.times_of(data, probe)(strength[0]).max(-1)
            median = np.argsort(last, kind="stable")[len(last) // 2]  # NaN (never) is sorted last
            strength, subtitle = strength[:1, [median]], "run of median time to learn all"
        else:
            merit = dynamics.text(dynamics.merit(data, probe))
            subtitle = f"{dynamics.merit_name(data, probe)} {merit}"
        curves(axis, times, dynamics.estimate(np.asarray, strength[:, :, start:]), _labels(modes))
        if "closed_form" in data and probe == STRENGTH:
            curve = data["closed_form"].transpose("step", "mode").to_numpy()[start:]
            axis.plot(times, curve, color="black", ls=":", lw=1.4)[-1].set_label("closed form")
        axis.axhline(modes.p, **LEVEL_STYLE)
        clock = "optimiser updates" if start else "observations in the episode"
        axis.set(title=f"{about.label}\n{subtitle}", xlabel=clock, ylim=STRENGTH_LIMITS)
        axis.set_xscale("log" if start else "linear")
    axes[0].legend(title=first.axis, loc="best" if one_run else "upper left")
    return figure


def strengths_on(task_set: str, *kinds: str) -> Callable[[Results], Figure]:
    """Makes the function that draws mode strength on a set of tasks, for `Study.figures`.

    It shows learners of these kinds or, if no kind is named, all that have a place in figures.
    """

    def draw(results: Results) -> Figure:
        measured = results.learners(task_set, *kinds, drawn=not kinds)
        hint = f"has no {' or '.join(kinds) or 'drawn'} learner: choose from {results.sets()}"
        check(len(measured) > 0, "task_set", task_set, hint)
        return mode_strength(measured)

    return draw


def single_runs(measured: Measured, probe: str = STRENGTH) -> Figure:
    """Draws each learner's run of median time to learn all modes: averages would hide plateaus."""
    return mode_strength(measured, probe, one_run=True)


@styled
def learning_times(measured: Measured, probe: str = STRENGTH) -> Figure:
    """Draws learning times against the values of the modes on log axes, with the fitted slopes.

    A hollow triangle at the last time marks a mode that never reached p.
    """
    figure, (axis,) = grid(1, width=6.6, height=4.4)
    for data, marker in zip(_learners(measured), cycle(MARKERS), strict=False):
        about, modes = trajectories.about(data), trajectories.modes(data, probe)
        scale, slope = np.array(modes.values), dynamics.merit(data, probe)
        scale[scale <= 0] = np.nan  # a log axis cannot show these
        t = dynamics.estimate(dynamics.times_of(data, probe), dynamics.strength(data, probe))
        for k, colour in enumerate(colours(scale)):
            axis.errorbar(scale[k], t.value[k], bars(t)[:, [k]], fmt=marker, color=colour, ms=8)
            if np.isnan(t.value[k]):
                axis.plot(scale[k], data["time"][-1], "^", mfc="none", color=colour, ms=10)
        fitted = np.isfinite(t.value) & (t.value > 0) & (scale > 0)
        if fitted.sum() > 1:
            x, y = np.log(scale), np.log(t.value[fitted])
            line = np.exp(y.mean() + slope.value * (x - x[fitted].mean()))
            label = f"{about.label} ({about.clock}): slope {dynamics.text(slope)}"
            style = {"color": "grey", "lw": 1.2, "mfc": "none", "zorder": 0}
            axis.plot(scale, line, marker=marker, label=label, **style)
        else:
            label = f"{about.label} ({about.clock}): too few learned for a slope"
            axis.plot([], [], marker=marker, ls="", color="grey", mfc="none", label=label)
    if not (scale > 0).any():  # a log axis of nothing cannot be drawn
        axis.set(xlim=(0.1, 10), ylim=(0.1, 10))
    axis.set(xscale="log", yscale="log", xlabel=modes.axis)
    ticks = {value: name for value, name in zip(scale, _labels(modes), strict=True) if value > 0}
    axis.set_xticks([*ticks], ticks.values())
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_ylabel(f"learning time $t_k({modes.p:g})$, own steps")
    figure.legend(loc="outside lower center", fontsize=10)
    return figure


@styled
def final_strength(
    results: Results, titles: Mapping[str, str], shaded: Sequence[int | float] = ()
) -> Figure:
    """Draws the strength of each mode at the end of the episode, one panel per set of tasks.

    `titles` are the panels' titles, keyed by the names of the sets. Modes with values in `shaded`
    are marked as those of the training distribution. The learners shown are those measured on all
    of the sets.
    """
    shown = {s: results.learners(s, drawn=True) for s in titles if s in results.sets()}
    names = [n for n in next(iter(shown.values()), ()) if all(n in m for m in shown.values())]
    label = "strength $a_k$ at the last step\n(0 nothing, 1 learned)"
    figure, axes = grid(len(shown) if names else 0, label, 2.9, 3.2, 5, sharey=True)
    for axis, (task_set, measured) in zip(axes, shown.items(), strict=True):
        modes = trajectories.modes(measured[names[0]])
        last = lambda data: dynamics.estimate(np.asarray, dynamics.strength(data)[:, :, -1])
        pairs = [(trajectories.about(measured[name]).label, last(measured[name])) for name in names]
        grouped_bars(axis, _labels(modes), pairs)
        for k in np.flatnonzero(np.isin(modes.values, shaded)):
            axis.axvspan(k - 0.5, k + 0.5, color="grey", alpha=0.2, lw=0)
        axis.axhline(1, **LEVEL_STYLE)
        axis.tick_params("x", labelsize=12 if len(modes.values) <= 3 else 9)
        axis.set(title=titles[task_set], xlabel=modes.axis, ylim=(-0.2, 1.4))  # bars may be longer
    legend_below(axes[0], fontsize=11)
    return figure


@dataclasses.dataclass(frozen=True)
class LearningHistory:
    """The measurements of a meta-learner at every checkpoint, and of Bayes on the same tasks."""

    label: str
    """Name of the meta-learner in figures."""
    trained: xr.Dataset
    """Its mode trajectories over outer training."""
    bayes: xr.Dataset
    """The mode trajectories of Bayes, which have no outer steps."""
    losses: tuple[xr.Dataset, xr.Dataset]
    """The measurements of both on held-out tasks of the training distribution, Bayes' second."""
    probe: str = STRENGTH
    """Name of the probe that read the modes."""

    @property
    def modes(self) -> trajectories.Modes:
        """Returns the modes whose strengths the probe reads."""
        return trajectories.modes(self.trained, self.probe)

    @functools.cached_property
    def strengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns strengths [seed, task, outer_step, step, mode]; Bayes' [1, task, step, mode]."""
        strength = partial(dynamics.strength, probe=self.probe)
        return strength(self.trained), strength(self.bayes)


def histories(results: Results) -> dict[str, LearningHistory]:
    """Collects the meta-learners followed over outer training, keyed by their figures' suffixes.

    The first meta-learner of a comparison has the suffix of its set of tasks. The others have that
    suffix and their name.
    """
    by_suffix = {}
    for tracked in (name for name in results.sets() if name.startswith("tracked")):
        heldout = tracked.replace("tracked", "heldout", 1)
        metas = {
            name: data
            for name, data in results.learners(tracked, "meta").items()
            if "outer_step" in data.dims and (heldout, name) in results
        }
        bayes = [[*results.learners(s, "bayes").values()] for s in (tracked, heldout)]
        for i, (name, data) in enumerate(metas.items()):
            about = trajectories.about(data)
            if about.followed and all(bayes):
                joint = about.title and len(metas) > 1
                label = f"{about.title}, {about.label}" if joint else about.title or about.label
                suffix = tracked.removeprefix("tracked") + (f"_{name}" if i else "")
                losses = results[heldout, name], bayes[1][0]
                by_suffix[suffix] = LearningHistory(label, data, bayes[0][0], losses)
    return by_suffix


def by_probe(trained: Mapping[str, LearningHistory]) -> dict[str, LearningHistory]:
    """Makes one history per meta-learner and probe, keyed by the figures' suffix.

    Unless it is the history's main probe, the probe's name is appended to that suffix (`ending`)
    and to the meta-learner's name in figures.
    """
    by_suffix = dict(trained)
    for suffix, training in trained.items():
        for probe in sorted({*trajectories.probes(training.trained)} - {training.probe}):
            label = f"{training.label}, {probe}"
            history = dataclasses.replace(training, probe=probe, label=label)
            by_suffix[suffix + ending(probe)] = history
    return by_suffix


def ending(probe: str) -> str:
    """Returns the suffix of a probe's figures: "_" and its name, or "" for the main probe."""
    return "" if probe == STRENGTH else f"_{probe}"


@styled
def inner_curves(training: LearningHistory) -> Figure:
    """Draws inner learning curves over outer training, and Bayes' curves, one panel per mode."""
    modes, (strength, bayes) = training.modes, training.strengths
    times, steps = (training.trained[name].to_numpy() for name in ("time", "outer_step"))
    shown_steps, shown_modes = spread(len(steps), 9), spread(len(modes.values), MODES)
    mean = dynamics.estimate(np.asarray, strength[:, :, shown_steps][..., shown_modes])
    labels, names = [f"{step:,}" for step in steps[shown_steps]], _labels(modes)
    figure, axes = grid(len(shown_modes), modes.strength, 2.6, 2.9, 5, sharex=True, sharey=True)
    label = modes.label.replace("\n", " ")
    for i, (axis, k) in enumerate(zip(axes, shown_modes, strict=True)):
        by_step = Estimate(*(part[:, :, i].T for part in mean))
        curves(axis, times, by_step, labels, "plasma", lw=1.6)
        axis.plot(times, bayes.mean((0, 1))[:, k], "k--", lw=1.5, label="Bayes")
        axis.axhline(modes.p, **LEVEL_STYLE)
        axis.set_title(f"{label}: {names[k]}", fontsize=10)
        axis.set(xlabel="observations", ylim=STRENGTH_LIMITS)
        axis.label_outer()
    figure.suptitle(f"{training.label}: inner learning curves over outer training")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, title="outer step", loc="outside right center")
    return figure


@styled
def outer_learning(training: LearningHistory) -> Figure:
    """Draws inner learning times, and each mode's way from untrained to Bayes, by outer step."""
    modes, (strength, bayes), trained = training.modes, training.strengths, training.trained
    inner, outer = dynamics.times_of(trained, training.probe), dynamics.outer_times_of(trained)
    figure, left, right, steps = _over_outer_training(training, "learning of each mode")
    strengths = dynamics.over_outer_training(trained, training.bayes, training.probe)
    outer_times = outer(*(samples.mean((0, 1)) for samples in strengths))
    halfway = [f"{name}: {n:,.0f}" for name, n in zip(_labels(modes), outer_times, strict=True)]
    curves(left, steps, dynamics.estimate(inner, strength), _labels(modes), marker="o", ms=3)
    share = dynamics.estimate(dynamics.share_of_bayes, *strengths)
    curves(right, steps, share, halfway, marker="o", ms=3)
    for colour, t, n in zip(colours(halfway), inner(bayes.mean((0, 1))), outer_times, strict=True):
        left.axhline(t, color=colour, ls="--", lw=1.2)
        right.plot(n, 0.5, "s", color=colour, ms=7, mec="black", zorder=5)
    left.plot([], [], "--", color="grey", label="Bayes")
    left.set_ylabel(f"inner learning time $t_k$ (to {modes.p:g})\nin observations")
    left.set_ylim(0, trained["time"][-1])
    right.axhline(1, **LEVEL_STYLE | {"ls": "--", "lw": 1.2})
    right.axhline(0.5, **LEVEL_STYLE)
    right.set(ylim=(-0.2, 2.1), ylabel="mean strength over the episode\n(0 untrained, 1 as Bayes)")
    label, exchangeable = modes.label.replace("\n", " "), modes.exchangeable
    left.legend(title=label + " within each episode" * exchangeable, ncols=2)
    label += " over outer training,\neach seed its own" * exchangeable
    label += ": half-way at outer step $n_k$"
    right.legend(title=label, ncols=2, loc="upper left", alignment="left")
    return figure


@styled
def distance_to_bayes(training: LearningHistory) -> Figure:
    """Draws excess loss over Bayes, and each mode's distance to Bayes' curve, by outer step."""
    figure, left, right, steps = _over_outer_training(training, "distance to Bayes")
    floor, modes = trajectories.about(training.losses[0]).loss_floor, training.modes
    loss, best = (dynamics.episode_loss(data) for data in training.losses)
    excess = dynamics.excess_over_bayes(*training.losses)
    by_seed = np.asarray(dynamics.excess_loss(loss.mean(1), best.mean(), floor))
    style = {"color": COLOURS[0], "lw": 0.8, "alpha": 0.6}
    left.plot(steps, by_seed.T, **style)[0].set_label("each seed")
    left.fill_between(steps, excess.low, excess.high, color=COLOURS[0], alpha=0.25, lw=0)
    left.plot(steps, excess.value, "o-", color=COLOURS[0], ms=4, label="mean of seeds")
    left.text(steps[-1], excess.value[-1], f"  {excess.value[-1]:.2f}", va="center")
    if not np.isfinite([excess.value, *by_seed]).any():  # a log axis of nothing cannot be drawn
        left.set_ylim(0.1, 10)
    left.set(yscale="log", ylabel="excess loss over Bayes\n" r"$(L - L_B)\,/\,(L_B - L_{\min})$")
    log_ticks(left.yaxis)
    left.legend()
    distance = dynamics.estimate(dynamics.distance_to_bayes, *training.strengths)
    curves(right, steps, distance, _labels(modes), marker="o", ms=3)
    right.set(ylim=(0, None), ylabel="distance of the mean inner curve\nto Bayes' (1 untrained)")
    right.legend(title=modes.axis)
    return figure


def _over_outer_training(
    training: LearningHistory, subject: str
) -> tuple[Figure, Any, Any, np.ndarray]:
    """Makes a figure of two panels over outer step; returns it, both axes and the steps' places."""
    figure, axes = grid(2, width=5.2, height=4.0)
    steps, _ = (outer_axis(axis, training.trained) for axis in axes)
    figure.suptitle(f"{training.label}: {subject} over outer training")
    return figure, *axes, steps


def animation(training: LearningHistory) -> Callable[[Path], None]:
    """Draws the inner learning curves of all modes beside Bayes', one frame per checkpoint.

    Returns the function that writes the frames to a path, as a GIF.
    """
    modes, (mean, bayes) = training.modes, (s.mean((0, 1)) for s in training.strengths)
    times, steps = (training.trained[name].to_numpy() for name in ("time", "outer_step"))
    figure = Figure(figsize=(5.6, 4.2), dpi=80, layout="constrained")
    axis, canvas = figure.subplots(), FigureCanvasAgg(figure)
    axis.set_prop_cycle(color=colours(modes.values))
    axis.plot(times, bayes, "--", lw=1.2)
    lines = axis.plot(times, mean[-1], label=_labels(modes))
    axis.plot([], [], "--", color="grey", lw=1.2, label="Bayes")
    axis.set(xlim=(0, times[-1]), ylim=STRENGTH_LIMITS, xlabel="observations in the episode")
    axis.set_ylabel(modes.strength)
    axis.legend(title=modes.axis, loc="upper left", bbox_to_anchor=(1, 1))
    titles = [f"{training.label}: outer step {step:,}" for step in steps]
    title = axis.set_title(titles[-1])
    canvas.draw()
    figure.set_layout_engine("none")  # laid out once, for the longest title
    moving: Any = [*lines, title]
    setp(moving, animated=True)
    canvas.draw()  # the background is drawn once for all frames
    background, frames = canvas.copy_from_bbox(figure.bbox), []
    for text, strength in zip(titles, mean, strict=True):
        canvas.restore_region(background)
        title.set_text(text)
        for line, values in zip(lines, strength.T, strict=True):
            line.set_ydata(values)
        for artist in moving:
            axis.draw_artist(artist)
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    durations = [250] * (len(frames) - 1) + [1250]  # in ms: the last frame stays for a while
    options: Any = {"append_images": frames[1:], "duration": durations, "loop": 0}
    return partial(frames[0].save, save_all=True, **options)


@styled
def orders(trainings: Sequence[LearningHistory]) -> Figure:
    """Draws each mode's outer learning time against its inner one, one panel per meta-learner."""
    label = "outer learning time $n_k$\n(outer step half-way to Bayes)"
    figure, axes = grid(len(trainings), label, width=4.4, height=4.3)
    for axis, training in zip(axes, trainings, strict=True):
        modes, trained, probe = training.modes, training.trained, training.probe
        times_of = dynamics.times_of(trained, probe)
        inner = lambda mean, times_of=times_of: times_of(mean[..., -1, :, :])
        title = "modes by their rank in either order"
        if not modes.exchangeable:
            ranks = dynamics.outer_correlation(trained, training.bayes, probe)
            title = f"rank correlation {dynamics.text(ranks)}"
        x = dynamics.estimate(inner, training.strengths[0])
        y = dynamics.outer_times(trained, training.bayes, probe)
        styles = zip(colours(modes.values), cycle(MARKERS), _labels(modes), strict=False)
        for k, (colour, marker, name) in enumerate(styles):
            errors = {"yerr": bars(y)[:, [k]], "xerr": bars(x)[:, [k]], "lw": 1.2}
            style = {"fmt": marker, "color": colour, "ms": 8, "label": name}
            axis.errorbar(x.value[k], y.value[k], **errors, **style)
        axis.set(yscale="log", xlabel="inner learning time $t_k$\n(observations; once trained)")
        log_ticks(axis.yaxis)
        axis.set_title(f"{training.label}\n{title}", fontsize=10)
        axis.legend(title=modes.axis)
    return figure


def curves(
    axis: Any, x: np.ndarray, y: Estimate, labels: list[str], palette: str = "viridis", **style: Any
) -> None:
    """Draws estimates [x, curve] as lines with bands, each with its own colour and label."""
    for part, label, colour in zip(y.split(), labels, colours(labels, palette), strict=True):
        curve(axis, x, part, label, colour, **style)


def curve(axis: Any, x: np.ndarray, y: Estimate, label: str, colour: Any, **style: Any) -> None:
    """Draws an estimate [x] as a line with its interval as a band."""
    axis.fill_between(x, y.low, y.high, color=colour, alpha=0.2, lw=0)
    axis.plot(x, y.value, color=colour, label=label, **style)


def legend_below(axis: Any, ncols: int = 4, **style: Any) -> None:
    """Draws the legend of one panel below the whole figure, for panels that share their entries."""
    entries = axis.get_legend_handles_labels()
    axis.figure.legend(*entries, loc="outside lower center", ncols=ncols, **style)


def grouped_bars(axis: Any, names: Sequence[str], found: Sequence[tuple[str, Estimate]]) -> None:
    """Draws labelled estimates [name] as bars, one group per name with a bar for each label."""
    width = 0.8 / len(found)
    for i, (label, estimate) in enumerate(found):
        x = np.arange(len(names)) + (i - (len(found) - 1) / 2) * width
        style = {"color": line_colour(i), "label": label, "error_kw": {"lw": 1.2}}
        axis.bar(x, estimate.value, width, yerr=bars(estimate), **style)
    axis.set_xticks(range(len(names)), names)


def panels(
    shown: Mapping[str, tuple[np.ndarray, Mapping[str, Estimate]]], label: str, **axes: Any
) -> Figure:
    """Draws estimates [x] as labelled curves, one panel per title, with one legend for all.

    `shown` maps titles to x and the estimates keyed by label; all panels have the same labels.
    `label` is the label of the vertical axes and `axes` are properties that all panels have.
    """
    figure, all_axes = grid(len(shown), label, 3.8, 3.4, sharey=True)
    for axis, (title, (x, estimates)) in zip(all_axes, shown.items(), strict=True):
        curves(axis, x, dynamics.stacked(estimates.values()), [*estimates], marker="o", ms=3)
        axis.set(**axes)
        axis.set_title(title, fontsize=10)
    legend_below(all_axes[0], min(3, 2 * len(shown) - 1))
    return figure


def spread(n: int, most: int) -> np.ndarray:
    """Returns at most `most` of the indices 0 … n − 1, spread evenly from first to last."""
    return np.unique(np.linspace(0, n - 1, most).round().astype(int))


def colours(values: Sequence[Any] | np.ndarray, palette: str = "viridis") -> list:
    """Returns one colour of a palette per mode, in order from the first mode to the last."""
    return list(matplotlib.colormaps[palette](np.linspace(0.0, 0.85, len(values))))


def log_ticks(axis: Axis) -> None:
    """Labels a finished log axis at 1, 2, 5 of each decade, or only at 1 if it spans many."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,), numticks=30))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def outer_axis(axis: Axes, data: xr.Dataset) -> np.ndarray:
    """Makes x a log axis of outer steps with 0 at its left; returns the steps' places on it."""
    steps = np.maximum(data["outer_step"].to_numpy(), 0.5)
    axis.set(xscale="log", xlabel="outer step (leftmost: 0)", xlim=(0.4, 1.4 * steps[-1]))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    return steps


def bars(of: Estimate) -> np.ndarray:
    """Computes the lengths of an estimate's error bars [2, ...], first below it, then above."""
    return np.nan_to_num(np.maximum([of.value - of.low, of.high - of.value], 0))


class Shown(Figure):
    """A figure that a notebook displays as the last value of a cell, even without pyplot."""

    def _repr_png_(self) -> bytes:
        FigureCanvasAgg(self).print_png(picture := io.BytesIO())
        return picture.getvalue()


def grid(
    panels: int, label: str = "", width: float = 4, height: float = 4, columns: int = 4, **more: Any
) -> tuple[Figure, list]:
    """Makes a figure and a list of its axes, each `width` × `height` inches, in rows of one length.

    Rows have at most `columns` panels, to be readable at the width of a page, and `label` stands
    beside each row. `more` is passed to `subplots`. Raises `NotMeasured` for no panels: there is
    nothing to draw yet.
    """
    if panels == 0:
        raise NotMeasured("nothing that the figure shows is measured yet")
    rows = -(-panels // columns)
    columns = -(-panels // rows)
    figure = Shown(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **more)
    setp(axes.flat[panels:], visible=False)
    setp(axes[:, 0], ylabel=label)
    return figure, list(axes.flat[:panels])


def _learners(measured: Measured) -> list[xr.Dataset]:
    """Returns one dataset per learner, at its last outer step. Raises `NotMeasured` for none."""
    parts = trajectories.split(measured).values()
    if not parts:
        raise NotMeasured("nothing that the figure shows is measured yet")
    return [data.isel(outer_step=-1, missing_dims="ignore") for data in parts]


def _labels(modes: trajectories.Modes) -> list[str]:
    """Returns the value of each mode as text."""
    return [f"{value:.3g}" for value in modes.values]
