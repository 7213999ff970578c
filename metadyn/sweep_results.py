"""What a sweep came to: one dataset, figures of merit against what is swept, a ranking."""

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
"""What figures show of each setting, and what they call it."""
SETTING = {"setting", "folder", "options", "lost"}
MEASURED = {"learner", "ending", "merit", *MERITS}
"""What is said of each setting, and of one that was not lost."""
MOST_LINES = 8  # our choice

Row = Mapping[str, Any]


def field(option: str) -> str:
    """Names an option as datasets do: "domain.sigma" for --domain.sigma."""
    return option.removeprefix("--").replace("-", "_")


def load(path: str | Path, task_set: str) -> xr.Dataset:
    """Loads a sweep as one dataset: that of each setting, along dimensions of what is swept.

    The dimensions of a grid are the options that have several values, such as "domain.sigma". Other
    sweeps have one dimension, "setting", with the options' values along it. Where a setting has
    nothing stored, was lost, or has fewer seeds, modes or steps than another, there is NaN. An
    option that is called as something in the dataset is, such as "loss", is "option_loss". Raises
    `ConfigError` if none has anything stored.
    """
    folder, parts = SweepFolder(path), {}
    sweep = folder.sweep
    for i in range(len(sweep.settings)):
        run = folder.run(i)
        measured = run.results().learners(task_set) if run and not folder.lost(i) else {}
        if measured:
            parts[i] = trajectories.merge(measured)
    check(parts, "task_set", task_set, f"no setting of {path} has any yet")
    whole = trajectories.concatenate(parts.values(), "setting", [*parts])
    whole = whole.reindex(setting=range(len(sweep.settings)))
    taken = {*whole.variables, *whole.dims}
    named = {n: f"option_{field(n)}" if field(n) in taken else field(n) for n in sweep.swept}
    if sweep.kind != "grid":
        typed = [*map(sweep.typed, range(len(sweep.settings)))]
        column = lambda name: ("setting", [value_of(each[name]) for each in typed])
        return whole.assign_coords({called: column(name) for name, called in named.items()})
    grid = {called: [*map(value_of, sweep.options[name])] for name, called in named.items()}
    if not grid:
        return whole.isel(setting=0, drop=True)
    places = xr.Dataset(coords={name: range(len(of)) for name, of in grid.items()})
    coords = places.stack(setting=[*grid]).coords
    whole = whole.drop_vars("setting").assign_coords(coords).unstack("setting")
    return whole.assign_coords(grid).transpose(*grid, ...)


def rows(folder: SweepFolder, progress: Progress = SILENT) -> list[Row]:
    """Returns the figures of merit of every setting (`measured`), as written, or those so far.

    In the place of NaN is None. Raises `ConfigError` if what is written is damaged.
    """
    path = folder.path / "summary.json"
    if not path.exists():
        return measured(folder, progress)
    written, fix = read_json(path, f"{path} cannot be read"), "is not as metadyn writes it"
    with error_context(f"{path} {fix}; remove the file"):
        found = written["settings"]
        for row in found:
            named = SETTING if row["lost"] else SETTING | MEASURED
            check(named <= {*row}, "rows", [*row], f"must be of {sorted(named)}")
        return found


def measured(folder: SweepFolder, progress: Progress = SILENT) -> list[Row]:
    """Gives the figures of merit of each setting, a row for each meta-learner that is followed.

    They are how far it staggers once trained, its excess loss on held-out tasks, and the seconds
    its training took. Estimates are [value, low, high]. A setting that has none has one row, with
    what it lacks.
    """
    sweep = folder.sweep
    found: list[Row] = []
    with progress.counting("estimating", len(sweep.settings)) as show:
        for i in range(len(sweep.settings)):
            show(sweep.called(i))
            found += _measured(folder, i, folder.ended(i))
    return found


@functools.cache  # the table, the page and a live server all ask for them
def _measured(folder: SweepFolder, i: int, ended: bool) -> list[Row]:
    sweep = folder.sweep
    values = {name: (text, finite(value_of(text))) for name, text in sweep.typed(i).items()}
    settings = {field(n): text if x is None else x for n, (text, x) in values.items()}  # "inf"
    row = {"setting": i, "folder": folder.setting(i).name, "options": settings, "lost": None}
    run = folder.run(i)
    if said := folder.lost(i):
        return [row | {"lost": said}]
    if run is None or not ended:
        return [row | {"lost": "not done"}]
    found = []
    for name, training in figures.histories(run.results(run.outer_steps()[-1:])).items():
        trained, (loss, bayes) = training.trained.isel(outer_step=-1), training.losses
        estimates: dict[str, Any] = {
            "staggering": dynamics.merit(trained),
            "excess": dynamics.measured_excess(loss.isel(outer_step=-1), bayes),
            "seconds": [trajectories.about(training.trained).seconds] * 3,
        }
        merits = {n: [float(part) for part in e] for n, e in estimates.items()}
        called = {"learner": training.called, "ending": name}
        found.append(row | called | {"merit": dynamics.merit_name(trained)} | finite(merits))
    return found or [
        row | {"lost": "no excess loss: no meta-learner is measured on tracked and held-out tasks"}
    ]


def conclude(folder: SweepFolder, progress: Progress = SILENT) -> None:
    """Draws the figures of a sweep that has ended, writes its page, and last its summary.json.

    The summary says that all is done.
    """
    from metadyn import view

    sweep, found = folder.sweep, measured(folder, progress)
    about = {"study": sweep.study, "preset": sweep.preset, "seed": sweep.seed}
    draw(folder, found, progress)
    view.write(folder, progress)
    write_json(folder.path / "summary.json", {**about, "settings": found})


def report(folder: SweepFolder, progress: Progress = SILENT) -> Iterator[str]:
    """Yields the settings, best first: by the excess loss of their meta-learner."""
    sweep, found = folder.sweep, rows(folder, progress)
    yield f"sweep of {sweep.study}, preset {sweep.preset}, seed {sweep.seed}"
    there = [row for row in found if not row["lost"]]
    done = sum(folder.ended(i) and not folder.lost(i) for i in range(len(sweep.settings)))
    yield f"{done} of {len(sweep.settings)} settings done"
    several = len({row["learner"] for row in there}) > 1
    for place, row in enumerate(ranked(there), 1):
        both = (dynamics.Estimate(*row[name])._asdict() for name in ("excess", "staggering"))
        excess, merit = map(number, both)
        said = f"excess loss {excess}  {row['merit']} {merit}"
        who = f"  {row['learner']}" if several else ""
        yield f"{place:4}  {row['folder']}  {_said(folder, row)}{who}  {said}"
        yield f"{'':6}{row['seconds'][0]:,.0f} s of training"
    for row in found:
        if row["lost"]:
            yield f"   -  {row['folder']}  {_said(folder, row)}  {row['lost']}"


def ranked(found: Sequence[Row]) -> list[Row]:
    """Ranks the settings that were not lost, best first: by excess loss, NaN at the end."""
    excess = lambda row: math.inf if (value := row["excess"][0]) is None else value
    return sorted((row for row in found if not row["lost"]), key=excess)


def _said(folder: SweepFolder, row: Row) -> str:
    return " ".join(f"{name}={row['options'][name]}" for name in map(field, folder.sweep.swept))


def draw(folder: SweepFolder, found: Sequence[Row], progress: Progress = SILENT) -> list[Path]:
    """Draws the figures of merit against each swept option; of two, heat maps too."""
    folder.figures.mkdir(exist_ok=True)
    names, paths = [field(name) for name in folder.sweep.swept], []
    there = [row for row in found if not row["lost"]]
    wanted = {}
    for ending in dict.fromkeys(row["ending"] for row in there):
        those = [row for row in there if row["ending"] == ending]
        for name in names:
            wanted[f"against_{name}{ending}"] = partial(against, those, name, names)
        if len(names) == 2 and folder.sweep.kind == "grid":
            wanted[f"map{ending}"] = partial(heat_map, those, *names)
    with progress.counting("drawing", len(wanted)) as show:
        for name, figure in wanted.items():
            show(name)
            paths.append(folder.figures / f"{name}.png")
            figures.picture(figure)(paths[-1])
    return paths


@figures.styled
def against(found: Sequence[Row], option: str, options: Sequence[str]) -> Figure:
    """Draws each figure of merit against one option, with a line for each choice of the others.

    Where these lines would be too many, points are drawn. Seconds that are one for all, as settings
    trained side by side share them evenly, are left out.
    """
    values = _values(found, option)
    numeric = not any(isinstance(value, str) for value in values)
    others = [name for name in options if name != option]
    lines: dict[str, list[Row]] = {}
    for row in found:
        label = ", ".join(f"{name} = {row['options'][name]}" for name in others)
        lines.setdefault(label, []).append(row)
    many = len(lines) > MOST_LINES
    one_share = len({row["seconds"][0] for row in found}) == 1 and len(found) > 1
    shown = {n: label for n, label in MERITS.items() if n != "seconds" or not one_share}
    figure, axes = figures.grid(len(shown), width=4.2, height=3.8)
    for axis, (name, label) in zip(axes, shown.items(), strict=True):
        of = found[0]["merit"] if name == "staggering" else label
        for i, (called, several) in enumerate(lines.items()):
            several = sorted(several, key=lambda row: values.index(row["options"][option]))
            x = [row["options"][option] for row in several]
            at = np.array(x if numeric else [values.index(each) for each in x], float)
            merit = dynamics.Estimate(*np.array([row[name] for row in several], float).T)
            style = {
                "color": "grey" if many else figures.line_colour(i),
                "fmt": "o" if many else "o-",
                "ms": 5,
            }
            axis.errorbar(
                at, merit.value, figures.bars(merit), label=None if many else called, **style
            )
        axis.set(xlabel=option, ylabel=of)
        if name != "staggering":  # amounts, whose differences are to be seen against the whole
            low, high = axis.get_ylim()
            axis.set_ylim(min(0, low), max(0, 1.05 * high))
        if not numeric:
            axis.set_xticks(range(len(values)), values)
        elif values[0] > 0 and values[-1] / values[0] >= 4:
            axis.set_xscale("log")
            if len(values) <= MOST_LINES:
                axis.set_xticks(values, [f"{value:g}" for value in values])
                axis.minorticks_off()
    if others and not many:
        figures.legend_below(axes[0])
    figure.suptitle(" / ".join(dict.fromkeys(row["learner"] for row in found)))
    return figure


def _values(found: Sequence[Row], option: str) -> list[Any]:
    """The values of an option: numbers in their order, then words in theirs."""
    each = {row["options"][option] for row in found}
    return sorted(each, key=lambda value: (isinstance(value, str), value))


@figures.styled
def heat_map(found: Sequence[Row], across: str, down: str) -> Figure:
    """Draws each figure of merit of a grid of two options as a map, with the numbers."""
    columns, lines = (_values(found, option) for option in (across, down))
    figure, axes = figures.grid(len(MERITS), width=1.6 + 0.9 * len(columns), height=3.8)
    for axis, (name, label) in zip(axes, MERITS.items(), strict=True):
        values = np.full((len(lines), len(columns)), np.nan)
        for row in found:
            place = lines.index(row["options"][down]), columns.index(row["options"][across])
            values[place] = np.array(row[name][0], float)  # None: NaN
        axis.imshow(values, cmap="viridis", aspect="auto")
        for (i, k), value in np.ndenumerate(values):
            box = {"facecolor": "white", "alpha": 0.7, "lw": 0, "pad": 1}
            text = f"{value:.3g}" if np.isfinite(value) else "–"
            axis.text(k, i, text, ha="center", va="center", fontsize=9, bbox=box)
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(lines)), lines)
        axis.set(xlabel=across, ylabel=down)
        axis.set_title(found[0]["merit"] if name == "staggering" else label, fontsize=10)
        axis.grid(False)
    figure.suptitle(" / ".join(dict.fromkeys(row["learner"] for row in found)))
    return figure
