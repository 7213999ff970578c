"""The claims of the paper, each with its verdict, from the summaries that runs left.

Summaries are kept beside the studies, in results/STUDY-PRESET.json, with the figures that claims
name, in figures/; the tables in README.md are made from these alone.
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
    """Copies the summaries of runs to `folder`, and the figures that are there or that it names.

    Raises `ConfigError` for a run that is not done, of none of the folder's studies, or of other
    settings than the preset's.
    """
    studies = {study.name: study for study in load_studies(str(folder))}
    for path in runs:
        run = RunFolder(path)
        study, preset = studies.get(run.config["study"]), run.config["preset"]
        if run.summary() is None:
            raise ConfigError(f"{path}: the run is not done; run it to its end first")
        if study is None:
            raise ConfigError(f"{path}: a run of a study that {folder} does not hold")
        asked = json.loads(json.dumps(dataclasses.asdict(study.config(preset))))
        if run.config["config"] != asked:
            raise ConfigError(f"{path}: overrides the preset {preset!r}, which claims are of")
        for part in ("results", "figures"):
            (folder / part).mkdir(exist_ok=True)
        summary = folder / "results" / f"{study.name}-{preset}.json"
        shutil.copyfile(run.path / "summary.json", summary)
        wanted = {*study.claims, *(table.figure for table in study.tables)}
        for source in run.figures.iterdir():
            copy = folder / _figure(study.name, preset, source.name)
            if source.stem in wanted or copy.exists():
                shutil.copyfile(source, copy)


def _figure(study: str, preset: str, file: str) -> str:
    return f"figures/{study}_{file}" if preset == "quick" else f"figures/{study}_{preset}_{file}"


def tables(folder: Path) -> str:
    """Writes Markdown: each claim with its verdict by preset, then the studies' own tables."""
    studies = load_studies(str(folder))
    runs: dict[tuple[str, str], dict[str, Any]] = {}
    lacking, measured, beside = [], [], []
    for name, preset in ((study.name, preset) for study in studies for preset in study.presets):
        path = folder / "results" / f"{name}-{preset}.json"
        if path.exists():
            runs[name, preset] = summary = read_summary(path)
            seed = f" --seed {summary['seed']}" * (summary["seed"] != 0)
            command = f"metadyn run {name}" + f" --preset {preset}" * (preset != "quick") + seed
            measured.append(f"`{command}` on {summary['environment']['processor']}")
        else:
            lacking.append(f"{name} {preset}")
    order = {"quick": 0, "workstation": 1, "paper": 2}
    shown = sorted({preset for _, preset in runs}, key=lambda each: (order.get(each, 3), each))
    head = "claim", "what its number is, and should be", "study", *shown
    claims = [f"| {' | '.join(head)} |", f"{'| --- ' * len(head)}|"]
    for study in studies:
        rows = {
            preset: {row["name"]: row for row in (*of["criteria"], *of["reported"])}
            for preset in shown
            if (of := runs.get((study.name, preset)))
        }
        of_all = [(fig, *each) for fig, says in study.claims.items() for each in says.items()]
        for figure, criterion, says in of_all if rows else ():
            cells = [_verdict(study, criterion, figure, p, rows.get(p)) for p in shown]
            asked = _joined([of[criterion]["expected"] for of in rows.values()])
            cells = [says, asked, f"{study.name}, {study.section}", *cells]
            claims.append(f"| {' | '.join(cells)} |")
        for table, preset in ((table, preset) for table in study.tables for preset in rows):
            figure = _figure(study.name, preset, f"{table.figure}.png")
            title = f"**{table.title}** ({preset}; [figure]({figure}))"
            beside += ["", title, "", *_table(table, rows[preset])]
    if measured:
        claims += ["", f"Measured: {'; '.join(measured)}."]
    if lacking:
        claims += ["", f"Not measured: {', '.join(lacking)}."]
    return "\n".join([*claims, *beside])


def write(folder: Path) -> Path:
    """Puts the tables into the folder's README.md, between the marks. Returns its path.

    Raises `ConfigError` if it is not there or has no marks.
    """
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    around = re.fullmatch(f"(.*{BEGIN}).*({END}.*)", text, re.DOTALL)
    if not around:
        raise ConfigError(f"{path}: needs the lines {BEGIN!r} and {END!r}")
    write_whole(path, f"{around[1]}\n\n{tables(folder)}\n\n{around[2]}")
    return path


def _verdict(
    study: Study, criterion: str, figure: str, preset: str, rows: Mapping[str, Any] | None
) -> str:
    """One cell of the table: the verdict in bold if it is not that the claim holds."""
    if rows is None:
        return "not measured"
    row = rows.get(criterion)
    if row is None or "verdict" not in row:
        raise ConfigError(f"{study.name}-{preset}: its summary lacks a verdict of {criterion!r}")
    found, _, would_decide = row["verdict"].partition(": ")
    said = f"{found if found == 'holds' else f'**{found}**'}: {number(row)}"
    said += f"; {would_decide}" * bool(would_decide)
    return f"{said} ([{figure}]({_figure(study.name, preset, f'{figure}.png')}))"


def _joined(texts: Sequence[str]) -> str:
    """Texts of several presets as one, in which only what differs stands for each: 0.3 / 0.2."""
    words = [[*dict.fromkeys(each)] for each in zip(*map(str.split, texts), strict=False)]
    differing = [word for each in words if len(each) > 1 for word in each]
    alike = len({len(text.split()) for text in texts}) == 1
    if not alike or any(re.search(r"\d", word) is None for word in differing):
        return "; ".join(dict.fromkeys(texts))
    return " ".join(" / ".join(each) for each in words)


def _table(table: Table, rows: dict[str, Any]) -> Iterator[str]:
    yield f"| | {' | '.join(table.columns.values())} |"
    yield "| --- " * (1 + len(table.columns)) + "|"
    for name, label in table.rows.items():
        cells = [rows.get(f"{name}_{column}") for column in table.columns]
        if any(cells):  # else it is of another preset
            yield f"| {label} | {' | '.join('' if c is None else number(c) for c in cells)} |"


def number(row: Mapping[str, Any]) -> str:
    """Returns the figure of merit in a row of a summary as text: value [low, high]."""
    parts = (row[k] for k in ("value", "low", "high"))
    value, low, high = ("–" if v is None else f"{v:.3g}".replace("-", "−") for v in parts)
    return value if value == low == high else f"{value} [{low}, {high}]"
