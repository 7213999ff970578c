"""The report page of a run or a sweep: one HTML file, or a server while the run still goes on.

This module computes all numbers from stored arrays and embeds them in the page as JSON. `view.html`
is the page itself, which draws them as SVG in a few hundred lines of its own. Plotly would add 4 MB
to every run for three kinds of chart, and uPlot draws on a canvas, where neither a screen reader
nor a test finds the numbers. The page's content security policy forbids it to fetch anything.
"""

from __future__ import annotations

import contextlib
import functools
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

from metadyn import dynamics, figures, sweep_results, trajectories
from metadyn.base import STRENGTH
from metadyn.errors import ConfigError, check
from metadyn.options import options_of
from metadyn.progress import SILENT, Progress
from metadyn.store import Results, RunFolder, write_whole
from metadyn.study import HELDOUT, TRACKED
from metadyn.sweep import SweepFolder

MOST_TIMES, MOST_STEPS = 150, 60
"""Number of times and of outer steps that a curve shows at most. Our choice."""
MOST_SETTINGS, MOST_BYTES = 64, 5_000_000
"""Settings and bytes beyond which a sweep's page leaves out the worst runs. Our choice."""
LOCAL = "127.0.0.1"


def write(of: RunFolder | SweepFolder, progress: Progress = SILENT) -> Path:
    """Writes DIR/report.html atomically, and returns its path."""
    path = of.path / "report.html"
    write_whole(path, page(collect(of, progress)))
    return path


def page(data: Mapping[str, Any]) -> str:
    """Returns the page for the data that `collect` returns. All text of the run is escaped."""
    template = (files("metadyn") / "view.html").read_text(encoding="utf-8")
    embedded = json.dumps({**data, "colours": figures.COLOURS}, allow_nan=False)
    for character in "<>&":  # so that no text can end the script element around it
        embedded = embedded.replace(character, f"\\u{ord(character):04x}")
    pieces = {"TITLE": html.escape(data["title"]), "DATA": embedded}
    return re.sub(r"\{\{(TITLE|DATA)\}\}", lambda match: pieces[match[1]], template)


def _run(run: RunFolder, progress: Progress, page_runs: int) -> dict[str, Any]:
    """Returns the data of one of `page_runs` runs on a page. Those of many runs are thinned."""
    config, summary, sets = run.config, run.summary() or {}, list(_sets(run.results()))
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
                groups += _groups(name, measured, page_runs)
    return {
        "title": f"{config['study']}, preset {config['preset']}, seed {config['seed']}",
        "done": bool(summary),
        "criteria": rows,
        "groups": groups,
        "losses": losses,
        "config": {name: text(value) for name, value in options_of(config["config"])},
        "environment": {name: text(value) for name, value in options_of(environment, "")},
    }


@functools.lru_cache(2 * MOST_SETTINGS)  # the best ones may change between two reads
def _setting_run(folder: SweepFolder, i: int, page_runs: int, stored: str) -> dict[str, Any]:
    """Returns the data of a setting's run. `stored` is an argument so that the cache depends on it.

    A server of the page thus reads only the runs that have stored more.
    """
    return _run(RunFolder(folder.setting(i)), SILENT, page_runs)


def _sweep(folder: SweepFolder, progress: Progress) -> dict[str, Any]:
    """Returns the page's data of a sweep: figures of merit of all settings, runs of the best."""
    sweep, rows = folder.sweep, sweep_results.rows(folder, progress)
    indices = range(len(sweep.settings))
    page_runs, bytes_left = min(len(indices), MOST_SETTINGS), MOST_BYTES - len(json.dumps(rows))
    ranking = dict.fromkeys([*(row["setting"] for row in sweep_results.ranked(rows)), *indices])
    runs: dict[int, Any] = {}
    with progress.counting("reading", len(ranking)) as show:
        for i in ranking:
            show(sweep.label(i))
            run = folder.run(i)
            if run is not None and len(runs) < page_runs and bytes_left > 0:
                runs[i] = _setting_run(folder, i, page_runs, _stored(run))
                bytes_left -= len(json.dumps(runs[i]))
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
                for i in indices
            ],
        },
    }


def collect(of: RunFolder | SweepFolder, progress: Progress = SILENT) -> dict[str, Any]:
    """Returns all data that the page shows, as JSON, of a run or a sweep that may still go on.

    Raises `ConfigError` if a stored file is damaged.
    """
    return _sweep(of, progress) if isinstance(of, SweepFolder) else _run(of, progress, 1)


def _sets(results: Results) -> Iterator[tuple[str, dict[str, xr.Dataset]]]:
    """Yields each task set with its measurements by learner, tracked sets first.

    To the set `TRACKED` it adds the learners that are not trained, as measured in distribution.
    """
    for name in sorted(results.sets(), key=lambda name: not name.startswith(TRACKED)):
        measured = results.learners(name, drawn=True)
        if name == TRACKED:
            measured = results.learners("in_distribution", drawn=True) | measured
            by_place = lambda item: trajectories.about(item[1]).place
            measured = dict(sorted(measured.items(), key=by_place))
        if measured:
            yield name, measured


def _groups(
    name: str, measured: Mapping[str, xr.Dataset], page_runs: int
) -> Iterator[dict[str, Any]]:
    """Yields, for each probe, the inner learning curves of all learners on a task set."""
    first = next(iter(measured.values()))
    for probe in trajectories.probes(first):
        modes = trajectories.modes(first, probe)
        probed = [data for data in measured.values() if probe in data]
        alike = [data for data in probed if trajectories.modes(data, probe).values == modes.values]
        set_title = "over outer training" if name.startswith(TRACKED) else name.replace("_", " ")
        parts = [trajectories.about(first).title, set_title, "" if probe == STRENGTH else probe]
        yield {
            "name": name + figures.ending(probe),
            "task_set": name,
            "title": ": ".join(part for part in parts if part),
            "merit": dynamics.merit_name(first, probe),
            "values": _rounded(modes.values),
            "p": modes.p,
            "axis": plain(modes.axis),
            "strength": plain(modes.strength),
            "colours": [matplotlib.colors.to_hex(rgba) for rgba in figures.colours(modes.values)],
            "learners": [_learner(data, probe, page_runs) for data in alike],
        }


def _learner(data: xr.Dataset, probe: str, page_runs: int) -> dict[str, Any]:
    """Returns mode strengths, learning times and their slope, with intervals, by outer step."""
    about, is_tracked = trajectories.about(data), "outer_step" in data.dims
    data = data if is_tracked else data.expand_dims(outer_step=[0])
    # Where tens of runs share a page, each gets fewer steps and times: the page grows no further.
    steps, times = (most // max(1, page_runs // 10) for most in (MOST_STEPS, MOST_TIMES))
    data = data.isel(outer_step=figures.spread(data.sizes["outer_step"], steps))
    shown, strength = figures.spread(data.sizes["step"], times), dynamics.strength(data, probe)
    estimate = lambda f: [_rounded(values) for values in dynamics.estimate(f, strength)]
    return {
        "name": about.learner,
        "label": plain(about.label),
        "kind": about.kind,
        "clock": about.clock,
        "steps": data["outer_step"].to_numpy().tolist() if is_tracked else None,
        "time": _rounded(data["time"].to_numpy()[shown]),
        "t": estimate(dynamics.times_of(data, probe)),
        "merit": estimate(dynamics.merit_of(data, probe)),
        "curve": estimate(lambda mean: mean[..., shown, :]),
    }


def _losses(name: str, measured: Mapping[str, xr.Dataset]) -> Iterator[dict[str, Any]]:
    """Yields each meta-learner's excess loss over Bayes on held-out tasks, by outer step."""
    bayes = next((d for d in measured.values() if trajectories.about(d).kind == "bayes"), None)
    if bayes is None:
        return
    for data in (data for data in measured.values() if "outer_step" in data.dims):
        excess = dynamics.excess_over_bayes(data, bayes)
        yield {
            "task_set": name.replace(HELDOUT, TRACKED, 1),
            "name": trajectories.about(data).learner,
            "label": plain(trajectories.about(data).label),
            "steps": data["outer_step"].to_numpy().tolist(),
            "excess": [_rounded(values) for values in excess],
        }


def plain(text: str) -> str:
    """Removes TeX markup from a label: "singular value $s_k$" becomes "singular value sₖ"."""
    for old, new in (("\n", " "), ("$", ""), ("\\", ""), ("_k", "ₖ"), ("{", ""), ("}", "")):
        text = text.replace(old, new)
    return text


def _rounded(values: Any) -> Any:
    """Rounds nested numbers to six digits (the page shows three). Non-finite ones become None."""
    if np.ndim(values):
        return [_rounded(value) for value in values]
    return float(f"{values:.6g}") if math.isfinite(values) else None


def _stored(folder: RunFolder | SweepFolder) -> str:
    """Returns a text that changes when anything more is stored in a folder."""
    if isinstance(folder, SweepFolder):
        indices = range(len(folder.sweep.settings))
        return repr([((run := folder.run(i)) and _stored(run), folder.lost(i)) for i in indices])
    is_done = (folder.path / "summary.json").exists()
    return repr((folder.steps(), folder.measurements(), is_done))


def server(
    of: RunFolder | SweepFolder, port: int, progress: Progress = SILENT
) -> ThreadingHTTPServer:
    """Returns a server of the page on 127.0.0.1, which `serve_forever` starts.

    The page requests data.json every two seconds. Status 304 says that nothing was stored since.
    Raises `ConfigError` if the port is not available, or a stored file is damaged.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Host", "").partition(":")[0] not in (LOCAL, "localhost"):
                return self._answer(403, "text/plain", "open this on the serving machine")
            try:
                data, body, tag = current()
            except ConfigError as error:
                return self._answer(500, "text/plain", str(error))
            if self.path == "/data.json":
                unchanged = self.headers.get("If-None-Match") == tag
                code, text = (304, "") if unchanged else (200, body)
                return self._answer(code, "application/json", text, tag)
            if self.path == "/":
                return self._answer(200, "text/html", page(data))
            return self._answer(404, "text/plain", "not found: there are / and /data.json")

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
            """Prints nothing, where the base class prints a line for each request."""

    try:
        check(0 <= port < 65536, "--serve", port, "must be from 0 (any port that is free) to 65535")
        http_server = ThreadingHTTPServer((LOCAL, port), Handler)
    except OSError as error:
        message = f"--serve {port}: {error.strerror}: choose another port"
        raise ConfigError(message) from error
    stored, reading = _stored(of), threading.Lock()

    def read(progress: Progress = SILENT) -> tuple[dict[str, Any], str, str]:
        data = collect(of, progress) | {"live": True}
        body = json.dumps(data, allow_nan=False)
        return data, body, f'"{hashlib.sha256(body.encode()).hexdigest()}"'

    shown = read(progress)

    def current() -> tuple[dict[str, Any], str, str]:
        """Returns the page's data, their JSON and its entity tag, read again if more is stored."""
        nonlocal stored, shown
        with reading:
            if stored != (now := _stored(of)):
                shown, stored = read(), now
            return shown

    return http_server
