"""The claims of the paper, each with its verdict, from the summaries that runs left.

Summaries are kept beside the studies, in results/STUDY-PRESET.json, with the figures that claims
name, in figures/; the tables in README.md are made from these alone.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from metadyn.errors import ConfigError
from metadyn.store import RunFolder, read_summary
from metadyn.study import Claim, Study, Table, load_studies

BEGIN, END = "<!-- made by `metadyn claims`: -->", "<!-- end -->"
Rows = Mapping[str, Mapping[str, Any]]


def collect(folder: Path, runs: Sequence[str]) -> None:
    """Copies the summaries of runs that are done to `folder`, and those of their figures that are
    there already or that a claim or a table names.

    Raises `ConfigError` for a run that is not done, of none of the folder's studies, or of other
    settings than the preset's.
    """
    studies = {study.name: study for study in load_studies(str(folder))}
    for path in runs:
        run = RunFolder(path)
        name, preset = run.config["study"], run.config["preset"]
        if run.summary() is None:
            raise ConfigError(f"{path}: the run is not done; run it to its end first")
        if name not in studies:
            raise ConfigError(f"{path}: a run of {name!r}, which {folder} does not hold")
        asked = json.loads(json.dumps(dataclasses.asdict(studies[name].presets[preset])))
        if run.config["config"] != asked:
            raise ConfigError(
                f"{path}: the run overrides the preset {preset!r}, which claims are of"
            )
        for part in ("results", "figures"):
            (folder / part).mkdir(exist_ok=True)
        shutil.copyfile(run.path / "summary.json", folder / "results" / f"{name}-{preset}.json")
        study = studies[name]
        wanted = {claim.figure for claim in study.claims} | {t.figure for t in study.tables}
        for source in run.figures.iterdir():
            copy = folder / _figure(name, preset, source.name)
            if source.stem in wanted or copy.exists():
                shutil.copyfile(source, copy)


def _figure(study: str, preset: str, file: str) -> str:
    return f"figures/{study}_{file}" if preset == "quick" else f"figures/{study}_{preset}_{file}"


def tables(folder: Path) -> str:
    """Markdown: each claim with its verdict and interval, then the studies' own tables."""
    claims = [
        "| claim | study | command | verdict [95 % interval] | figure | measured on |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    beside: list[str] = []
    lacking: list[str] = []
    for study in load_studies(str(folder)):
        for preset in study.presets:
            path = folder / "results" / f"{study.name}-{preset}.json"
            if not path.exists():
                lacking.append(f"{study.name} {preset}")
                continue
            summary = read_summary(path)
            claims += [_claim(study, preset, claim, summary) for claim in study.claims]
            for table in study.tables:
                figure = _figure(study.name, preset, f"{table.figure}.png")
                title = f"**{table.title}** ({preset}; [figure]({figure}))"
                beside += ["", title, "", *_table(table, summary)]
    if lacking:
        claims += ["", f"Not measured: {', '.join(lacking)}."]
    return "\n".join([*claims, *beside])


def write(folder: Path) -> Path:
    """Puts the tables into the folder's README.md, between the marks. Returns its path.

    Raises `ConfigError` if it is not there or has no marks.
    """
    path = folder / "README.md"
    text = path.read_text() if path.exists() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ConfigError(f"{path}: needs the lines {BEGIN!r} and {END!r}")
    path.write_text(f"{before}{BEGIN}\n\n{tables(folder)}\n\n{END}{after}")
    return path


def _claim(study: Study, preset: str, claim: Claim, summary: Mapping[str, Any]) -> str:
    command = f"metadyn run {study.name}"
    command += "" if preset == "quick" else f" --preset {preset}"
    command += f" --seed {seed}" if (seed := summary["seed"]) else ""
    row = _rows(summary).get(claim.criterion)
    if row is None:
        raise ConfigError(f"{study.name}-{preset}: its summary lacks {claim.criterion!r}")
    verdict = f"{'holds' if row.get('passed') else '**not shown**'}: {_number(row)}"
    figure = f"[{claim.figure}]({_figure(study.name, preset, f'{claim.figure}.png')})"
    device = f"{summary['environment']['processor']}, {preset}"
    cells = (claim.says, f"{study.name}, {study.section}", f"`{command}`", verdict, figure, device)
    return f"| {' | '.join(cells)} |"


def _table(table: Table, summary: Mapping[str, Any]) -> Iterator[str]:
    rows = _rows(summary)
    yield f"| | {' | '.join(table.columns.values())} |"
    yield "| --- " * (1 + len(table.columns)) + "|"
    for name, label in table.rows.items():
        cells = [rows.get(f"{name}_{column}") for column in table.columns]
        if not any(cells):  # of another preset
            continue
        yield f"| {label} | {' | '.join('' if c is None else _number(c) for c in cells)} |"


def _rows(summary: Mapping[str, Any]) -> Rows:
    return {row["name"]: row for row in (*summary["criteria"], *summary["reported"])}


def _number(row: Mapping[str, Any]) -> str:
    parts = (row[k] for k in ("value", "low", "high"))
    value, low, high = ("–" if v is None else f"{v:.3g}".replace("-", "−") for v in parts)
    return value if value == low == high else f"{value} [{low}, {high}]"
