"""The page of a run: one HTML file to look at, and a server for runs that are still going.

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
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib.colors
import numpy as np
import xarray as xr

from metadyn import dynamics, figures, labelled
from metadyn.base import STRENGTH
from metadyn.errors import ConfigError, check
from metadyn.progress import Progress
from metadyn.store import Results, RunFolder, write_whole
from metadyn.study import HELDOUT, TRACKED

MOST_TIMES, MOST_STEPS = 150, 60
"""Times and outer steps beyond which some are left out. Our choice."""
LOCAL, SILENT = "127.0.0.1", Progress(None)


def write(run: RunFolder, progress: Progress = SILENT) -> Path:
    """Writes DIR/report.html in one step, and returns its path."""
    path = run.path / "report.html"
    write_whole(path, page(collect(run, progress)))
    return path


def page(data: Mapping[str, Any]) -> str:
    """The whole page of what `collect` found. Text of the run is escaped wherever it stands."""
    template = (files("metadyn") / "view.html").read_text(encoding="utf-8")
    embedded = json.dumps(data, allow_nan=False, ensure_ascii=True)
    for sign in "<>&":  # so that no text can end the script that it is in
        embedded = embedded.replace(sign, f"\\u{ord(sign):04x}")
    pieces = {"TITLE": html.escape(data["title"]), "DATA": embedded}
    return re.sub(r"\{\{(TITLE|DATA)\}\}", lambda found: pieces[found[1]], template)


def collect(run: RunFolder, progress: Progress = SILENT) -> dict[str, Any]:
    """All that the page shows, as JSON: of a run that is done, stopped or still going.

    Raises `ConfigError` if what is stored is damaged.
    """
    about, summary, sets = run.config, run.summary() or {}, list(_sets(run.results()))
    rows = [*summary.get("criteria", []), *summary.get("reported", [])]
    groups: list[dict[str, Any]] = []
    losses: list[dict[str, Any]] = []
    with progress.counting("reading", len(sets)) as show:
        for name, measured in sets:
            show(name)
            if name.startswith(HELDOUT):
                losses += _losses(name, measured)
            else:
                groups += _groups(name, measured)
    return {
        "title": f"{about['study']}, preset {about['preset']}, seed {about['seed']}",
        "done": bool(summary),
        "criteria": rows,
        "groups": groups,
        "losses": losses,
        "colours": list(figures.COLOURS),
        "config": dict(_options(about["config"])),
        "environment": dict(_options(summary.get("environment"), "")),
    }


def _sets(results: Results) -> Iterator[tuple[str, dict[str, xr.Dataset]]]:
    """Sets of tasks with their learners, tracked ones first and beside them those not trained."""
    for name in sorted(results.sets(), key=lambda name: not name.startswith(TRACKED)):
        measured = results.learners(name, drawn=True)
        if name == TRACKED:
            measured = results.learners("in_distribution", drawn=True) | measured
            measured = dict(sorted(measured.items(), key=lambda it: labelled.about(it[1]).place))
        if measured:
            yield name, measured


def _groups(name: str, measured: Mapping[str, xr.Dataset]) -> Iterator[dict[str, Any]]:
    """The inner learning curves of all learners on one set of tasks, by each probe."""
    first = next(iter(measured.values()))
    for probe in labelled.probes(first):
        of = labelled.modes(first, probe)
        read = [data for data in measured.values() if probe in data]
        alike = [data for data in read if labelled.modes(data, probe).values == of.values]
        what = "over outer training" if name.startswith(TRACKED) else name.replace("_", " ")
        parts = [labelled.about(first).title, what, "" if probe == STRENGTH else probe]
        yield {
            "name": name if probe == STRENGTH else f"{name}_{probe}",
            "title": ": ".join(part for part in parts if part),
            "merit": dynamics.merit_name(first, probe),
            "values": _rounded(of.values),
            "p": of.p,
            "axis": plain(of.axis),
            "strength": plain(of.strength),
            "colours": [matplotlib.colors.to_hex(each) for each in figures.colours(of.values)],
            "learners": [_learner(data, probe) for data in alike],
        }


def _learner(data: xr.Dataset, probe: str) -> dict[str, Any]:
    """Mode strengths, learning times and their slope with intervals, at each outer step."""
    about, followed = labelled.about(data), "outer_step" in data.dims
    data = data if followed else data.expand_dims(outer_step=[0])
    data = data.isel(outer_step=_thinned(data.sizes["outer_step"], MOST_STEPS))
    kept, strength = _thinned(data.sizes["step"], MOST_TIMES), dynamics.strength(data, probe)
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
    best = next((d for d in measured.values() if labelled.about(d).kind == "bayes"), None)
    trained = [data for data in measured.values() if "outer_step" in data.dims]
    if best is None or not trained:
        return
    floor, bayes = labelled.about(best).loss_floor, dynamics.episode_loss(best)
    excess = lambda mean, best: dynamics.excess_loss(mean, best[..., None], floor)
    for data in trained:
        found = dynamics.estimate(excess, dynamics.episode_loss(data), bayes)
        yield {
            "group": name.replace(HELDOUT, TRACKED, 1),
            "name": labelled.about(data).learner,
            "label": plain(labelled.about(data).label),
            "steps": data["outer_step"].to_numpy().tolist(),
            "excess": [_rounded(part) for part in found],
        }


def _options(config: Any, prefix: str = "--") -> Iterator[tuple[str, str]]:
    """Every option as a user would type it, with its value."""
    for name, value in config.items() if isinstance(config, dict) else ():
        if isinstance(value, dict):
            yield from _options(value, f"{prefix}{name.replace('_', '-')}.")
        else:
            said = value if isinstance(value, str) else json.dumps(value)
            yield prefix + name.replace("_", "-"), said


def plain(text: str) -> str:
    """A label without the signs of mathematical typesetting: "singular value $s_k$" is sₖ."""
    for sign, said in (("\n", " "), ("$", ""), ("\\", ""), ("_k", "ₖ"), ("{", ""), ("}", "")):
        text = text.replace(sign, said)
    return text


def _thinned(n: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int))


def _rounded(values: Any) -> Any:
    """Nested lists of six digits, which the page rounds to three; None for what is not finite."""
    if np.ndim(values):
        return [_rounded(each) for each in values]
    return None if values is None or not math.isfinite(values) else float(f"{values:.6g}")


class _Watched:
    """What a server shows of a run: read anew once something has been stored."""

    def __init__(self, run: RunFolder):
        self.run, self.lock = run, threading.Lock()
        self.seen: Any = None
        self.update()

    def update(self) -> None:
        """Reads the run if it has changed since."""
        steps = {path.name for path in self.run.path.glob("checkpoints/*")}
        seen = (steps, self.run.measurements(), (self.run.path / "summary.json").exists())
        with self.lock:
            if seen != self.seen:
                self.data = collect(self.run) | {"live": True}
                self.body, self.seen = json.dumps(self.data, allow_nan=False), seen
                self.tag = f'"{hashlib.sha256(self.body.encode()).hexdigest()}"'


def server(run: RunFolder, port: int) -> ThreadingHTTPServer:
    """A server of a run's page on 127.0.0.1, which `serve_forever` starts.

    The page asks for data.json every two seconds; 304 says that nothing was stored since. Raises
    `ConfigError` for a port that cannot be had, and for what is damaged.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Host", "").rpartition(":")[0] not in (LOCAL, "localhost"):
                return self._answer(403, "text/plain", "this page is for its own machine")
            try:
                watched.update()
            except ConfigError as error:
                return self._answer(500, "text/plain", str(error))
            if self.path == "/data.json":
                same = self.headers.get("If-None-Match") == watched.tag
                body = "" if same else watched.body
                return self._answer(304 if same else 200, "application/json", body)
            if self.path == "/":
                return self._answer(200, "text/html", page(watched.data))
            return self._answer(404, "text/plain", "there is / and /data.json")

        def _answer(self, code: int, kind: str, text: str) -> None:
            with contextlib.suppress(ConnectionError):  # the reader has left
                self.send_response(code)
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.send_header("Content-Length", str(len(text.encode())))
                self.send_header("ETag", watched.tag)
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
    watched = _Watched(run)
    return served
