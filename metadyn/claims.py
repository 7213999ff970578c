"""Tables of the paper's claims, each with its verdict, made from stored summaries of runs.

Summaries are stored in results/STUDY-PRESET.json beside the studies, and the figures that claims
name in figures/. The tables in README.md are made from these files alone.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from metadyn.errors import ConfigError
from metadyn.store import RunFolder, read_summary, write_whole
from metadyn.study import Study, Table, load_studies

BEGIN, END = "<!-- made by `metadyn claims`: -->", "<!-- end -->"


def collect(folder: Path, runs: Sequence[str]) -> None:
    """Copies the summaries of runs to `folder`, with figures that claims or tables name.

    A figure that was copied before is updated too. Raises `ConfigError` for a run that is not done,
    is of none of the folder's studies, or has other settings than its preset.
    """
    studies = {study.name: study for study in load_studies(str(folder))}
    for path in runs:
        run = RunFolder(path)
        study, preset = studies.get(run.config["study"]), run.config["preset"]
        if run.summary() is None:
            raise ConfigError(f"{path}: the run is not done; run it to its end first")
        if study is None:
            raise ConfigError(f"{path}: its study, {run.config['study']!r}, is not in {folder}")
        preset_config = json.loads(json.dumps(dataclasses.asdict(study.config(preset))))
        if run.config["config"] != preset_config:
            raise ConfigError(f"{path}: differs from preset {preset!r}: run it without overrides")
        for subfolder in ("results", "figures"):
            (folder / subfolder).mkdir(exist_ok=True)
        summary = folder / "results" / f"{study.name}-{preset}.json"
        shutil.copyfile(run.path / "summary.json", summary)
        figures = {*study.claims, *(table.figure for table in study.tables)}
        for source in run.figures.iterdir():
            copy = folder / _figure_path(study.name, preset, source.name)
            if source.stem in figures or copy.exists():
                shutil.copyfile(source, copy)


def _figure_path(study: str, preset: str, file: str) -> str:
    """Returns the path of a figure's copy, relative to the folder of the studies."""
    return f"figures/{study}_{file}" if preset == "quick" else f"figures/{study}_{preset}_{file}"


def tables(folder: Path) -> str:
    """Returns Markdown: each claim with its verdict per preset, then the studies' own tables."""
    studies = load_studies(str(folder))
    runs: dict[tuple[str, str], dict[str, Any]] = {}
    missing, measured, own_tables = [], [], []
    for name, preset in ((study.name, preset) for study in studies for preset in study.presets):
        path = folder / "results" / f"{name}-{preset}.json"
        if path.exists():
            runs[name, preset] = summary = read_summary(path)
            seed = f" --seed {summary['seed']}" * (summary["seed"] != 0)
            command = f"metadyn run {name}" + f" --preset {preset}" * (preset != "quick") + seed
            measured.append(f"`{command}` on {summary['environment']['processor']}")
        else:
            missing.append(f"{name} {preset}")
    order = {"quick": 0, "workstation": 1, "paper": 2}
    presets = sorted({preset for _, preset in runs}, key=lambda p: (order.get(p, 3), p))
    header = "claim", "measured quantity; expected value", "study", *presets
    lines = [f"| {' | '.join(header)} |", f"{'| --- ' * len(header)}|"]
    for study in studies:
        rows = {
            preset: {row["name"]: row for row in (*stored["criteria"], *stored["reported"])}
            for preset in presets
            if (stored := runs.get((study.name, preset)))
        }
        claims = [(fig, *claim) for fig, texts in study.claims.items() for claim in texts.items()]
        for figure, criterion, text in claims if rows else ():
            verdicts = [_verdict(study, criterion, figure, p, rows.get(p)) for p in presets]
            expected = _joined([by_name[criterion]["expected"] for by_name in rows.values()])
            cells = [text, expected, f"{study.name}, {study.section}", *verdicts]
            lines.append(f"| {' | '.join(cells)} |")
        for table, preset in ((table, preset) for table in study.tables for preset in rows):
            figure = _figure_path(study.name, preset, f"{table.figure}.png")
            title = f"**{table.title}** ({preset}; [figure]({figure}))"
            own_tables += ["", title, "", *_table(table, rows[preset])]
    if measured:
        lines += ["", f"Measured: {'; '.join(measured)}."]
    if missing:
        lines += ["", f"Not measured: {', '.join(missing)}."]
    return "\n".join([*lines, *own_tables])


def write(folder: Path) -> Path:
    """Writes the tables into the folder's README.md, between the marks. Returns its path.

    Raises `ConfigError` if the file does not exist or lacks the marks.
    """
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    match = re.fullmatch(f"(.*{BEGIN}).*({END}.*)", text, re.DOTALL)
    if not match:
        raise ConfigError(f"{path}: must have the lines {BEGIN!r} and {END!r}")
    write_whole(path, f"{match[1]}\n\n{tables(folder)}\n\n{match[2]}")
    return path


def _verdict(
    study: Study, criterion: str, figure: str, preset: str, rows: Mapping[str, Any] | None
) -> str:
    """Returns a table cell: the verdict, in bold unless the claim holds, with number and figure."""
    if rows is None:
        return "not measured"
    row = rows.get(criterion)
    if row is None or "verdict" not in row:
        raise ConfigError(f"{study.name}-{preset}: has no verdict on {criterion!r}: run it again")
    outcome, _, would_decide = row["verdict"].partition(": ")
    text = f"{outcome if outcome == 'holds' else f'**{outcome}**'}: {number(row)}"
    text += f"; {would_decide}" * bool(would_decide)
    return f"{text} ([{figure}]({_figure_path(study.name, preset, f'{figure}.png')}))"


def _joined(texts: Sequence[str]) -> str:
    """Joins the presets' texts into one, in which only differing numbers are listed: 0.3 / 0.2."""
    variants = [[*dict.fromkeys(words)] for words in zip(*map(str.split, texts), strict=False)]
    differing = [word for words in variants if len(words) > 1 for word in words]
    same_length = len({len(text.split()) for text in texts}) == 1
    if not same_length or any(re.search(r"\d", word) is None for word in differing):
        return "; ".join(dict.fromkeys(texts))
    return " ".join(" / ".join(words) for words in variants)


def _table(table: Table, rows: dict[str, Any]) -> Iterator[str]:
    """Yields the lines of a study's own table in Markdown, from the criteria by name."""
    yield f"| | {' | '.join(table.columns.values())} |"
    yield "| --- " * (1 + len(table.columns)) + "|"
    for name, label in table.rows.items():
        cells = [rows.get(f"{name}_{column}") for column in table.columns]
        if any(cells):  # a row may exist in other presets only
            yield f"| {label} | {' | '.join('' if c is None else number(c) for c in cells)} |"


def number(row: Mapping[str, Any]) -> str:
    """Formats the figure of merit in a row of a summary as text: value [low, high]."""
    estimate = (row[k] for k in ("value", "low", "high"))
    value, low, high = ("–" if v is None else f"{v:.3g}".replace("-", "−") for v in estimate)
    return value if value == low == high else f"{value} [{low}, {high}]"
