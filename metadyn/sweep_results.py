"""Results of a sweep: one dataset, figures of merit against the swept options, a ranking."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from metadyn import dynamics, figures, trajectories
from metadyn.claims import number
from metadyn.errors import check, error_context
from metadyn.progress import SILENT, Progress
from metadyn.store import finite, read_json, write_json
from metadyn.sweep import SweepFolder, value_of

MERITS = {
    "staggering": "staggering",
    "excess": "excess loss over Bayes\n(held-out tasks)",
    "seconds": "seconds of training\n(the setting's share)",
}
"""Figures of merit that are drawn of each setting, and their axis labels."""
SETTING = {"setting", "folder", "options", "lost"}
MEASURED = {"learner", "ending", "merit", *MERITS}
"""Fields in the row of every setting (`SETTING`), and further ones if it has figures of merit."""
MOST_LINES = 8  # in one panel, and most labelled ticks on a log axis: our choice

Row = Mapping[str, Any]
"""Figures of merit of one meta-learner in one setting, or the reason why the setting has none."""


def field(option: str) -> str:
    """Converts an option to its name in datasets: --domain.sigma to "domain.sigma"."""
    return option.removeprefix("--").replace("-", "_")


def load(path: str | Path, task_set: str) -> xr.Dataset:
    """Loads what all settings measured on one set of tasks as one dataset, along swept dimensions.

    The dimensions of a grid are the options that have several values, such as "domain.sigma". Other
    sweeps have one dimension, "setting", with the options' values (`coordinate`) along it. Entries
    are NaN where a setting has nothing stored, was lost, or has fewer seeds, modes or steps than
    another. An option whose name the dataset already uses, such as "loss", becomes "option_loss".
    Raises `ConfigError` if no setting has anything stored.
    """
    folder, parts = SweepFolder(path), {}
    sweep = folder.sweep
    for i in range(len(sweep.settings)):
        run = folder.run(i)
        learners = run.results().learners(task_set) if run and not folder.lost(i) else {}
        if learners:
            parts[i] = trajectories.merge(learners)
    check(parts, "task_set", task_set, f"no setting in {path} has measurements on it yet")
    data = trajectories.concatenate(parts.values(), "setting", [*parts])
    data = data.reindex(setting=range(len(sweep.settings)))
    used = {*data.variables, *data.dims}
    names = {o: f"option_{field(o)}" if field(o) in used else field(o) for o in sweep.swept}
    if sweep.kind != "grid":
        typed = [*map(sweep.typed, range(len(sweep.settings)))]
        column = lambda option: ("setting", coordinate([values[option] for values in typed]))
        return data.assign_coords({name: column(option) for option, name in names.items()})
    grid = {name: coordinate(sweep.options[option]) for option, name in names.items()}
    if not grid:
        return data.isel(setting=0, drop=True)
    indices = xr.Dataset(coords={name: range(len(values)) for name, values in grid.items()})
    coords = indices.stack(setting=[*grid]).coords
    data = data.drop_vars("setting").assign_coords(coords).unstack("setting")
    return data.assign_coords(grid).transpose(*grid, ...)


def coordinate(texts: Sequence[str]) -> list[Any]:
    """Returns the typed values of an option: as numbers, with NaN for "None", or all as text."""
    values = [math.nan if text == "None" else value_of(text) for text in texts]
    return [*texts] if any(isinstance(value, str) for value in values) else values


def rows(folder: SweepFolder, progress: Progress = SILENT) -> list[Row]:
    """Returns the figures of merit (`measured`): from summary.json, or those so far without one.

    None stands for NaN. Raises `ConfigError` if summary.json is damaged.
    """
    path = folder.path / "summary.json"
    if not path.exists():
        return measured(folder, progress)
    summary = read_json(path, f"{path} cannot be read")
    with error_context(f"{path} is not as metadyn writes it; remove the file"):
        table = summary["settings"]
        for row in table:
            required = SETTING if row["lost"] else SETTING | MEASURED
            check(required <= {*row}, "rows", [*row], f"must be of {sorted(required)}")
        return table


def measured(folder: SweepFolder, progress: Progress = SILENT) -> list[Row]:
    """Computes the figures of merit of each setting, in one row per meta-learner that is followed.

    They are how far it staggers once trained, its excess loss on held-out tasks, and the seconds
    its training took. Estimates are [value, low, high]. A setting that has none has one row, whose
    "lost" says why.
    """
    sweep = folder.sweep
    table: list[Row] = []
    with progress.counting("estimating", len(sweep.settings)) as show:
        for i in range(len(sweep.settings)):
            show(sweep.label(i))
            table += _setting_rows(folder, i, folder.ended(i))
    return table


@functools.cache  # the table, the page and a live server all need them
def _setting_rows(folder: SweepFolder, i: int, ended: bool) -> list[Row]:
    """Returns the rows of one setting. `ended` is an argument so that the cache depends on it."""
    sweep = folder.sweep
    values = {name: (text, finite(value_of(text))) for name, text in sweep.typed(i).items()}
    options = {field(n): text if x is None else x for n, (text, x) in values.items()}  # "inf"
    row = {"setting": i, "folder": folder.setting(i).name, "options": options, "lost": None}
    run = folder.run(i)
    if message := folder.lost(i):
        return [row | {"lost": message}]
    if run is None or not ended:
        return [row | {"lost": "not done"}]
    learner_rows = []
    for ending, history in figures.histories(run.results(run.outer_steps()[-1:])).items():
        trained, (loss, bayes) = history.trained.isel(outer_step=-1), history.losses
        estimates: dict[str, Any] = {
            "staggering": dynamics.merit(trained),
            "excess": dynamics.excess_over_bayes(loss.isel(outer_step=-1), bayes),
            "seconds": [trajectories.about(history.trained).seconds] * 3,
        }
        merits = {name: [float(x) for x in estimate] for name, estimate in estimates.items()}
        labels = {"learner": history.label, "ending": ending}
        learner_rows.append(row | labels | {"merit": dynamics.merit_name(trained)} | finite(merits))
    return learner_rows or [
        row | {"lost": "no excess loss: no meta-learner is measured on tracked and held-out tasks"}
    ]


def conclude(folder: SweepFolder, progress: Progress = SILENT) -> None:
    """Draws the figures of a sweep that has ended and writes its page and its summary.json.

    The summary comes last: its existence says that the sweep is complete.
    """
    from metadyn import view

    sweep, table = folder.sweep, measured(folder, progress)
    identity = {"study": sweep.study, "preset": sweep.preset, "seed": sweep.seed}
    draw(folder, table, progress)
    view.write(folder, progress)
    write_json(folder.path / "summary.json", {**identity, "settings": table})


def report(folder: SweepFolder, progress: Progress = SILENT) -> Iterator[str]:
    """Yields the lines of a report that ranks all settings by excess loss, with lost ones last."""
    sweep, table = folder.sweep, rows(folder, progress)
    yield f"sweep of {sweep.study}, preset {sweep.preset}, seed {sweep.seed}"
    complete = ranked(table)
    done = sum(folder.ended(i) and not folder.lost(i) for i in range(len(sweep.settings)))
    yield f"{done} of {len(sweep.settings)} settings done"
    multiple = len({row["learner"] for row in complete}) > 1
    for rank, row in enumerate(complete, 1):
        estimates = (dynamics.Estimate(*row[name])._asdict() for name in ("excess", "staggering"))
        excess, merit = map(number, estimates)
        merits = f"excess loss {excess}  {row['merit']} {merit}"
        learner = f"  {row['learner']}" if multiple else ""
        yield f"{rank:4}  {row['folder']}  {_swept_values(folder, row)}{learner}  {merits}"
        yield f"{'':6}{row['seconds'][0]:,.0f} s of training"
    for row in table:
        if row["lost"]:
            yield f"   -  {row['folder']}  {_swept_values(folder, row)}  {row['lost']}"


def ranked(table: Sequence[Row]) -> list[Row]:
    """Sorts the rows of settings that were not lost by excess loss, least first and NaN last."""
    excess = lambda row: math.inf if (value := row["excess"][0]) is None else value
    return sorted((row for row in table if not row["lost"]), key=excess)


def _swept_values(folder: SweepFolder, row: Row) -> str:
    """Writes a row's values of the swept options, such as "domain.sigma=0.1"."""
    return " ".join(f"{name}={row['options'][name]}" for name in map(field, folder.sweep.swept))


def draw(folder: SweepFolder, table: Sequence[Row], progress: Progress = SILENT) -> list[Path]:
    """Draws the figures of merit against each swept option, and as heat maps for a grid of two."""
    folder.figures.mkdir(exist_ok=True)
    names, paths = [field(name) for name in folder.sweep.swept], []
    complete = [row for row in table if not row["lost"]]
    drawings = {}
    for ending in dict.fromkeys(row["ending"] for row in complete):
        compared = [row for row in complete if row["ending"] == ending]
        for name in names:
            drawings[f"against_{name}{ending}"] = partial(against, compared, name, names)
        if len(names) == 2 and folder.sweep.kind == "grid":
            drawings[f"map{ending}"] = partial(heat_map, compared, *names)
    with progress.counting("drawing", len(drawings)) as show:
        for name, figure in drawings.items():
            show(name)
            paths.append(folder.figures / f"{name}.png")
            figures.picture(figure)(paths[-1])
    return paths


@figures.styled
def against(table: Sequence[Row], option: str, options: Sequence[str]) -> Figure:
    """Draws each figure of merit against one option, with a line for each choice of the others.

    Points without lines are drawn if there would be more than `MOST_LINES` lines. Seconds are left
    out where they are equal in all rows, as settings trained side by side share them evenly.
    """
    values = _values(table, option)
    numeric = not any(isinstance(value, str) for value in values)
    others = [name for name in options if name != option]
    lines: dict[str, list[Row]] = {}
    for row in table:
        label = ", ".join(f"{name} = {row['options'][name]}" for name in others)
        lines.setdefault(label, []).append(row)
    crowded = len(lines) > MOST_LINES
    equal_seconds = len({row["seconds"][0] for row in table}) == 1 and len(table) > 1
    shown = {n: label for n, label in MERITS.items() if n != "seconds" or not equal_seconds}
    figure, axes = figures.grid(len(shown), width=4.2, height=3.8)
    for axis, (name, label) in zip(axes, shown.items(), strict=True):
        ylabel = table[0]["merit"] if name == "staggering" else label
        for i, (others_label, line) in enumerate(lines.items()):
            line = sorted(line, key=lambda row: values.index(row["options"][option]))
            x = [row["options"][option] for row in line]
            positions = np.array(x if numeric else [values.index(value) for value in x], float)
            merit = dynamics.Estimate(*np.array([row[name] for row in line], float).T)
            style = {
                "color": "grey" if crowded else figures.line_colour(i),
                "fmt": "o" if crowded else "o-",
                "ms": 5,
                "label": None if crowded else others_label,
            }
            axis.errorbar(positions, merit.value, figures.bars(merit), **style)
        axis.set(xlabel=option, ylabel=ylabel)
        if name != "staggering":  # amounts: show 0, so that differences are seen in proportion
            low, high = axis.get_ylim()
            axis.set_ylim(min(0, low), max(0, 1.05 * high))
        if not numeric:
            axis.set_xticks(range(len(values)), values)
        elif values[0] > 0 and values[-1] / values[0] >= 4:
            axis.set_xscale("log")
            if len(values) <= MOST_LINES:
                axis.set_xticks(values, [f"{value:g}" for value in values])
                axis.minorticks_off()
    if others and not crowded:
        figures.legend_below(axes[0])
    figure.suptitle(" / ".join(dict.fromkeys(row["learner"] for row in table)))
    return figure


def _values(table: Sequence[Row], option: str) -> list[Any]:
    """Returns the distinct values of an option: numbers in increasing order, then sorted words."""
    values = {row["options"][option] for row in table}
    return sorted(values, key=lambda value: (isinstance(value, str), value))


@figures.styled
def heat_map(table: Sequence[Row], across: str, down: str) -> Figure:
    """Draws each figure of merit of a grid of two options as a heat map with its numbers."""
    x_values, y_values = _values(table, across), _values(table, down)
    figure, axes = figures.grid(len(MERITS), width=1.6 + 0.9 * len(x_values), height=3.8)
    for axis, (name, label) in zip(axes, MERITS.items(), strict=True):
        values = np.full((len(y_values), len(x_values)), np.nan)
        for row in table:
            cell = y_values.index(row["options"][down]), x_values.index(row["options"][across])
            values[cell] = np.array(row[name][0], float)  # None becomes NaN
        axis.imshow(values, cmap="viridis", aspect="auto")
        for (i, k), value in np.ndenumerate(values):
            box = {"facecolor": "white", "alpha": 0.7, "lw": 0, "pad": 1}
            text = f"{value:.3g}" if np.isfinite(value) else "–"
            axis.text(k, i, text, ha="center", va="center", fontsize=9, bbox=box)
        axis.set_xticks(range(len(x_values)), x_values)
        axis.set_yticks(range(len(y_values)), y_values)
        axis.set(xlabel=across, ylabel=down)
        axis.set_title(table[0]["merit"] if name == "staggering" else label, fontsize=10)
        axis.grid(False)
    figure.suptitle(" / ".join(dict.fromkeys(row["learner"] for row in table)))
    return figure
