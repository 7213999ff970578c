"""The page of a run or a sweep: one HTML file to look at, and a server while it still goes on.

All numbers are worked out here, from what is stored, and go into the page as JSON; `view.html` is
the page itself, which draws them as SVG in a few hundred lines of its own. Plotly would add 4 MB to
every run for the three kinds of chart that there are, and uPlot draws on a canvas, where neither a
screen reader nor a test finds the numbers. The page's own policy forbids it to fetch anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib.colors
import numpy as np
import xarray as xr

from metadyn import dynamics, figures, sweep_results, trajectories
from metadyn.base import STRENGTH
from metadyn.errors import ConfigError, check
from metadyn.options import options_of
from metadyn.progress import SILENT, Progress
from metadyn.store import Results, RunFolder, write_whole
from metadyn.study import HELDOUT, TRACKED
from metadyn.sweep import SweepFolder

MOST_TIMES, MOST_STEPS = 150, 60
"""Times and outer steps beyond which some are left out. Our choice."""
MOST_SETTINGS, MOST_BYTES = 64, 5_000_000
"""Settings and size beyond which a sweep's page has no curves of the worst. Our choice."""
LOCAL = "127.0.0.1"


def write(of: RunFolder | SweepFolder, progress: Progress = SILENT) -> Path:
    """Writes DIR/report.html in one step, and returns its path."""
    path = of.path / "report.html"
    write_whole(path, page(collect(of, progress)))
    return path


def page(data: Mapping[str, Any]) -> str:
    """Makes the whole page of what `collect` found. Text of the run is escaped throughout."""
    template = (files("metadyn") / "view.html").read_text(encoding="utf-8")
    embedded = json.dumps({**data, "colours": figures.COLOURS}, allow_nan=False)
    for sign in "<>&":  # so that no text can end the script that it is in
        embedded = embedded.replace(sign, f"\\u{ord(sign):04x}")
    pieces = {"TITLE": html.escape(data["title"]), "DATA": embedded}
    return re.sub(r"\{\{(TITLE|DATA)\}\}", lambda found: pieces[found[1]], template)


Read = Callable[[RunFolder, Progress, int], dict[str, Any]]


def _run(run: RunFolder, progress: Progress, share: int) -> dict[str, Any]:
    """What is shown of a run, or of one of several that `share` a page: of many it is thinned."""
    about, summary, sets = run.config, run.summary() or {}, list(_sets(run.results()))
    rows = [*summary.get("criteria", []), *summary.get("reported", [])]
    environment = summary.get("environment", {})
    text = lambda value: value if isinstance(value, str) else json.dumps(value)
    groups: list[dict[str, Any]] = []
    losses: list[dict[str, Any]] = []
    with progress.counting("reading", len(sets)) as show:
        for name, measured in sets:
            show(name)
            if name.startswith(HELDOUT):
                losses += _losses(name, measured)
            else:
                groups += _groups(name, measured, share)
    return {
        "title": f"{about['study']}, preset {about['preset']}, seed {about['seed']}",
        "done": bool(summary),
        "criteria": rows,
        "groups": groups,
        "losses": losses,
        "config": {name: text(value) for name, value in options_of(about["config"])},
        "environment": {name: text(value) for name, value in options_of(environment, "")},
    }


def _sweep(folder: SweepFolder, progress: Progress, read: Read) -> dict[str, Any]:
    """What is shown of a sweep: figures of merit of all settings, and the runs of the best."""
    sweep, rows = folder.sweep, sweep_results.rows(folder, progress)
    places = range(len(sweep.settings))
    share, left = min(len(places), MOST_SETTINGS), MOST_BYTES - len(json.dumps(rows))
    best = dict.fromkeys([*(row["setting"] for row in sweep_results.ranked(rows)), *places])
    runs: dict[int, Any] = {}
    with progress.counting("reading", len(best)) as show:
        for i in best:
            show(sweep.called(i))
            run = folder.run(i)
            if run is not None and len(runs) < share and left > 0:
                runs[i] = read(run, SILENT, share)
                left -= len(json.dumps(runs[i]))
    merits: dict[int, list[sweep_results.Row]] = {}
    for row in rows:
        if not row["lost"]:
            merits.setdefault(row["setting"], []).append(row)
    return {
        "title": f"sweep of {sweep.study}, preset {sweep.preset}, seed {sweep.seed}",
        "sweep": {
            "grid": sweep.kind == "grid",
            "options": {name: sweep.options[name] for name in sweep.swept},
            "merits": {name: plain(label) for name, label in sweep_results.MERITS.items()},
            "settings": [
                {
                    "values": [sweep.typed(i)[name] for name in sweep.swept],
                    "folder": str(folder.setting(i).relative_to(folder.path)),
                    "lost": folder.lost(i),
                    "done": folder.ended(i),
                    "merits": merits.get(i, []),
                    "run": runs.get(i),
                }
                for i in places
            ],
        },
    }


def collect(
    of: RunFolder | SweepFolder, progress: Progress = SILENT, read: Read = _run
) -> dict[str, Any]:
    """Collects all that the page shows, as JSON: of what is done, stopped or still going.

    Raises `ConfigError` if what is stored is damaged.
    """
    return _sweep(of, progress, read) if isinstance(of, SweepFolder) else read(of, progress, 1)


def _sets(results: Results) -> Iterator[tuple[str, dict[str, xr.Dataset]]]:
    """Sets of tasks with their learners, tracked ones first and beside them those not trained."""
    for name in sorted(results.sets(), key=lambda name: not name.startswith(TRACKED)):
        measured = results.learners(name, drawn=True)
        if name == TRACKED:
            measured = results.learners("in_distribution", drawn=True) | measured
            place = lambda item: trajectories.about(item[1]).place
            measured = dict(sorted(measured.items(), key=place))
        if measured:
            yield name, measured


def _groups(name: str, measured: Mapping[str, xr.Dataset], share: int) -> Iterator[dict[str, Any]]:
    """The inner learning curves of all learners on one set of tasks, by each probe."""
    first = next(iter(measured.values()))
    for probe in trajectories.probes(first):
        of = trajectories.modes(first, probe)
        read = [data for data in measured.values() if probe in data]
        alike = [data for data in read if trajectories.modes(data, probe).values == of.values]
        what = "over outer training" if name.startswith(TRACKED) else name.replace("_", " ")
        parts = [trajectories.about(first).title, what, "" if probe == STRENGTH else probe]
        yield {
            "name": name if probe == STRENGTH else f"{name}_{probe}",
            "title": ": ".join(part for part in parts if part),
            "merit": dynamics.merit_name(first, probe),
            "values": _rounded(of.values),
            "p": of.p,
            "axis": plain(of.axis),
            "strength": plain(of.strength),
            "colours": [matplotlib.colors.to_hex(each) for each in figures.colours(of.values)],
            "learners": [_learner(data, probe, share) for data in alike],
        }


def _learner(data: xr.Dataset, probe: str, share: int) -> dict[str, Any]:
    """Mode strengths, learning times and their slope with intervals, at each outer step."""
    about, followed = trajectories.about(data), "outer_step" in data.dims
    data = data if followed else data.expand_dims(outer_step=[0])
    # A page of ten runs is as long as ten pages; one of more grows no further by steps and times.
    steps, times = (most // max(1, share // 10) for most in (MOST_STEPS, MOST_TIMES))
    data = data.isel(outer_step=figures.spread(data.sizes["outer_step"], steps))
    kept, strength = figures.spread(data.sizes["step"], times), dynamics.strength(data, probe)
    found = lambda f: [_rounded(part) for part in dynamics.estimate(f, strength)]
    return {
        "name": about.learner,
        "label": plain(about.label),
        "kind": about.kind,
        "clock": about.clock,
        "steps": data["outer_step"].to_numpy().tolist() if followed else None,
        "time": _rounded(data["time"].to_numpy()[kept]),
        "t": found(dynamics.times_of(data, probe)),
        "merit": found(dynamics.merit_of(data, probe)),
        "curve": found(lambda mean: mean[..., kept, :]),
    }


def _losses(name: str, measured: Mapping[str, xr.Dataset]) -> Iterator[dict[str, Any]]:
    """Excess loss over Bayes on tasks of the training distribution, against outer step."""
    best = next((d for d in measured.values() if trajectories.about(d).kind == "bayes"), None)
    if best is None:
        return
    for data in (data for data in measured.values() if "outer_step" in data.dims):
        found = dynamics.measured_excess(data, best)
        yield {
            "group": name.replace(HELDOUT, TRACKED, 1),
            "name": trajectories.about(data).learner,
            "label": plain(trajectories.about(data).label),
            "steps": data["outer_step"].to_numpy().tolist(),
            "excess": [_rounded(part) for part in found],
        }


def plain(text: str) -> str:
    """Takes the signs of mathematical typesetting off a label: "singular value $s_k$" is sₖ."""
    for sign, said in (("\n", " "), ("$", ""), ("\\", ""), ("_k", "ₖ"), ("{", ""), ("}", "")):
        text = text.replace(sign, said)
    return text


def _rounded(values: Any) -> Any:
    """Nested lists of six digits, which the page rounds to three; None for what is not finite."""
    if np.ndim(values):
        return [_rounded(each) for each in values]
    return float(f"{values:.6g}") if math.isfinite(values) else None


def _stored(of: RunFolder | SweepFolder) -> Any:
    """Returns what compares unequal once something more has been stored in a folder."""
    if isinstance(of, SweepFolder):
        places = range(len(of.sweep.settings))
        runs = [of.run(i) for i in places]
        return [run and _stored(run) for run in runs], [of.lost(i) for i in places]
    return of.steps(), of.measurements(), (of.path / "summary.json").exists()


class _Watched:
    """What a server shows of a run or a sweep: read anew once something has been stored."""

    def __init__(self, of: RunFolder | SweepFolder, progress: Progress = SILENT):
        self.of, self.lock = of, threading.Lock()
        self.seen: Any = None
        self.shown: tuple[dict[str, Any], str, str]
        self.kept: dict[Path, tuple[Any, dict[str, Any]]] = {}
        self.update(progress)

    def read(self, run: RunFolder, progress: Progress, share: int) -> dict[str, Any]:
        """Reads what is shown of a run: as it was, if nothing has been stored since."""
        seen = _stored(run)
        if run.path not in self.kept or self.kept[run.path][0] != seen:
            self.kept[run.path] = seen, _run(run, progress, share)
        return self.kept[run.path][1]

    def update(self, progress: Progress = SILENT) -> tuple[dict[str, Any], str, str]:
        """Reads what has changed since. Returns all that is shown, as JSON, and its entity tag."""
        with self.lock:
            seen = _stored(self.of)
            if seen != self.seen:
                data = collect(self.of, progress, self.read) | {"live": True}
                body = json.dumps(data, allow_nan=False)
                tag = f'"{hashlib.sha256(body.encode()).hexdigest()}"'
                self.shown, self.seen = (data, body, tag), seen
            return self.shown


def server(
    of: RunFolder | SweepFolder, port: int, progress: Progress = SILENT
) -> ThreadingHTTPServer:
    """Makes a server of the page on 127.0.0.1, which `serve_forever` starts.

    The page asks for data.json every two seconds; 304 says that nothing was stored since. Raises
    `ConfigError` for a port that cannot be had, and for what is damaged.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Host", "").partition(":")[0] not in (LOCAL, "localhost"):
                return self._answer(403, "text/plain", "this page is for its own machine")
            try:
                data, body, tag = watched.update()
            except ConfigError as error:
                return self._answer(500, "text/plain", str(error))
            if self.path == "/data.json":
                same = self.headers.get("If-None-Match") == tag
                code, text = (304, "") if same else (200, body)
                return self._answer(code, "application/json", text, tag)
            if self.path == "/":
                return self._answer(200, "text/html", page(data), tag)
            return self._answer(404, "text/plain", "there is / and /data.json")

        def _answer(self, code: int, kind: str, text: str, tag: str = "") -> None:
            with contextlib.suppress(ConnectionError):  # the reader has left
                self.send_response(code)
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.send_header("Content-Length", str(len(text.encode())))
                if tag:
                    self.send_header("ETag", tag)
                self.send_header("Cache-Control", "no-cache")
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, *args: Any) -> None:
            """Says nothing of each request."""

    try:
        check(0 <= port < 65536, "--serve", port, "must be from 0 (any port that is free) to 65535")
        served = ThreadingHTTPServer((LOCAL, port), Handler)
    except OSError as error:
        said = f"--serve {port}: {error.strerror}: choose another port"
        raise ConfigError(said) from error
    watched = _Watched(of, progress)
    return served
