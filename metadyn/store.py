"""The run folder: the one module that knows its layout.

    DIR/config.json             what was asked for; written first, compared on every later run
    DIR/checkpoints/STEP/       Orbax: training state, and at log-spaced steps mode trajectories
    DIR/measurements/SET/NAME/  Orbax: one learner measured on one set of tasks
    DIR/figures/*.png
    DIR/report.html             a page to look at (view.py)
    DIR/summary.json            criteria with intervals, and the environment
    DIR/seconds                 for how long the run was at work, all of its parts together

Arrays are stored by Orbax with a JSON description of their axes beside them; nothing is pickled
and nothing in a folder is ever executed. What Orbax writes is named STEP or NAME only once all of
it is there, with the SHA256SUMS of its files (as `sha256sum -c` reads them), which are compared
before it is read. What is damaged is made again, and kept as STEP.damaged or NAME.damaged.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import re
import reprlib
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import xarray as xr

from metadyn import mesh
from metadyn.base import LearnerKind
from metadyn.errors import ConfigError, ConfigWarning, check, check_choice
from metadyn.trajectories import about, dataset, merge

Arrays = Mapping[str, Any]
SUMS, PART, DAMAGED = "SHA256SUMS", ".part", ".damaged"
STRAY = re.compile(r"\._|\.nfs|\.DS_Store|Thumbs\.db|desktop\.ini")
FORMAT = 3
"""Of the layout."""
_one_save = threading.Lock()
"""Orbax's threads signal each other by names that all saves of a process share: two at once, as in
a sweep, can wait for ever (orbax-checkpoint 0.12.8)."""


class NotMeasured(ConfigError):
    """A learner was not measured on a set of tasks: it is not planned, or not done yet."""


class Results:
    """What was measured, as criteria and figures read it: `results[task_set, learner]`.

    What was measured at every checkpoint has a dimension outer_step. Each is read once.
    """

    def __init__(self, stored: Mapping[str, Sequence[str]], read: Callable[[str, str], xr.Dataset]):
        """`stored` names the learners of each set of tasks; `read(task_set, learner)` gets one."""
        self._stored = stored
        self._read = functools.cache(read)

    def __getitem__(self, key: tuple[str, str]) -> xr.Dataset:
        if key not in self:
            raise NotMeasured(f"{key[1]!r} on {key[0]!r} is not among what is measured")
        return self._read(*key)

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key[1] in self._stored.get(key[0], ())

    def sets(self) -> list[str]:
        """Returns the names of the sets of tasks."""
        return list(self._stored)

    def learners(self, task_set: str, *kinds: str, drawn: bool = False) -> dict[str, xr.Dataset]:
        """Returns those measured on a set, in their places: of some kinds, or only those drawn."""
        for kind in kinds:
            check_choice("kinds", kind, LearnerKind)
        found = [self[task_set, name] for name in self._stored.get(task_set, ())]
        placed = sorted(((about(data), data) for data in found), key=lambda x: x[0].place)
        return {
            who.learner: data
            for who, data in placed
            if (not kinds or who.kind in kinds) and (who.drawn or not drawn)
        }


@contextmanager
def lock(folder: Path, wait: bool = True) -> Iterator[None]:
    """Holds a folder's lock until left or killed. Raises `BlockingIOError` if it may not wait."""
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def claimed(
    opened: Callable[[Any], Any], path: str | os.PathLike[str], file: str, asked: Any, what: str
) -> Any:
    """Makes DIR, with what was asked for in a JSON file, or opens one in which the same was asked.

    `opened(path)` opens it, and its `config` is what the file holds. Several processes may come at
    the same time. Raises `ConfigError` if DIR cannot be written, or holds anything else.
    """
    folder, other = Path(path).absolute(), "choose another DIR"
    if "://" in os.fspath(path):
        raise ConfigError(f"--out {path} is no folder of this machine: {other}")
    if {*"[]*?"} & {*str(folder)}:  # Orbax looks for its files by a pattern
        raise ConfigError(f"--out {path} cannot have any of [ ] * ? in it: {other}")
    asked = json.loads(json.dumps(asked))
    try:
        if not os.path.exists(folder / file):  # False too for what cannot be a path
            folder.mkdir(parents=True, exist_ok=True)
            begun = {".lock", file + PART}  # by another process, or by one that was killed
            names = {each.name for each in folder.iterdir()}
            if names - begun and file not in names:  # it may have come since it was looked for
                fix = f"is not empty and holds no {what} of metadyn: {other}"
                raise ConfigError(f"--out {path} {fix}")
            with lock(folder):
                if not (folder / file).exists():
                    write_json(folder / file, asked)
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigError(f"--out {path} cannot be written ({said}): {other}") from error
    found: Any = opened(path)
    for name, *both in differing(found.config, asked):
        theirs, ours = map(reprlib.repr, both)
        raise ConfigError(
            f"--out {path} holds a {what} with {name} = {theirs}, not {ours}: "
            f"{other}, or give that value to go on with it"
        )
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--out {path} cannot be written: {other}")
    return found


class RunFolder:
    """One run's DIR. `RunFolder(path)` opens one for reading; `create` makes or resumes one."""

    def __init__(self, path: str | os.PathLike[str]):
        """Raises `ConfigError` unless `path` holds a run."""
        self.path = Path(path).absolute()
        self.figures, self.tensorboard = self.path / "figures", self.path / "tensorboard"
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._sound: set[Path] = set()
        self.seconds: Callable[[], float] = self._taken
        self.config = read_json(self.path / "config.json", f"{self.path} holds no run of metadyn")
        if missing := {"study", "preset", "seed", "config"} - set(self.config):
            raise ConfigError(f"{path}/config.json: lacks {sorted(missing)}; not a run of metadyn")
        if self.config.get("format") != FORMAT:
            fix = "which this version does not read: run it anew in another DIR"
            raise ConfigError(f"{path} holds a run of another version of metadyn, {fix}")
        if not isinstance(self.config["config"], dict):
            raise ConfigError(f"{path}/config.json: is not as metadyn writes it")

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: Mapping[str, Any]) -> RunFolder:
        """Opens DIR to write, making it if it is new or empty.

        Raises `ConfigError` if it cannot be written, holds anything else, or holds a run of
        another configuration.
        """
        return claimed(cls, path, "config.json", {"format": FORMAT, **config}, "run")

    def _taken(self) -> float:
        """Seconds that a run which is gone on with took so far; 0 if that is not known."""
        with suppress(OSError, ValueError):
            return float((self.path / "seconds").read_text())
        return 0.0

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds DIR for one writer, until left or killed. Raises `ConfigError` if it is held.

        Inside, `seconds()` says for how long it was held, all parts of a run together; a part that
        was killed, and had no time to say, is not counted.
        """
        with ExitStack() as held:
            try:
                held.enter_context(lock(self.path, wait=False))
            except BlockingIOError:
                raise ConfigError(
                    f"--out {self.path} is in use by another run: "
                    "wait for it, or choose another DIR"
                ) from None
            for folder in ("checkpoints", "measurements/*"):
                for part in self.path.glob(f"{folder}/*{PART}*"):  # a killed run's
                    shutil.rmtree(part)
            begun, before = time.monotonic(), self._taken()
            done = (self.path / "summary.json").exists()
            self.seconds = lambda: before + time.monotonic() - begun
            try:
                yield
            finally:  # whatever ended the run, what it was writing is whole before another begins
                self._writer.shutdown()
                with suppress(OSError):  # of a full disk, which is complained of already
                    if not (done and (self.path / "summary.json").exists()):  # as in a repair
                        write_whole(self.path / "seconds", f"{self.seconds():.1f}\n")

    # Folders of arrays: all processes save together, each reads alone.

    def _save(self, folder: Path, **items: ocp.args.CheckpointArgs) -> None:
        self.finish()
        if jax.process_count() == 1:
            self._writing = self._writer.submit(self._write, folder, items)
        else:
            self._write(folder, items)

    def finish(self) -> None:
        """Waits for what is still being written. Raises `OSError` if it could not be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, folder: Path, items: Mapping[str, ocp.args.CheckpointArgs]) -> None:
        part = folder.with_name(folder.name + PART)
        try:
            with _one_save, ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                checkpointer.save(part, args=ocp.args.Composite(**items))
        except ValueError as error:  # TensorStore's way to say that a file cannot be written
            if code := re.search(r"os_error_code='(\d+)'", str(error)):
                raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
            raise

        def complete() -> None:
            (part / SUMS).write_bytes(_sums(part))
            part.rename(folder)
            self._sound.add(folder)

        mesh.on_main_process(complete)

    def _restore(self, folder: Path, **items: ocp.args.CheckpointArgs) -> Any:
        self._check(folder)
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(multiprocessing_options=alone)
        )
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            return checkpointer.restore(folder, args=ocp.args.Composite(**items))

    def _arrays(self, folder: Path, name: str, part: Any = None) -> Any:
        """Arrays as NumPy's, whatever devices they were written from; or those of a tree alone."""
        self._check(folder)
        tree = part or ocp.StandardCheckpointHandler().metadata(folder / name).tree
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        wanted = ocp.args.PyTreeRestore(part, restore_args=numpy, partial_restore=part is not None)
        return self._restore(folder, **{name: wanted})[name]

    def _about(self, folder: Path) -> dict[str, Any]:
        """Their description."""
        return self._restore(folder, about=ocp.args.JsonRestore())["about"]

    def _check(self, folder: Path) -> None:
        """Raises `ConfigError` unless a folder is as it was written; looks once."""
        if folder in self._sound:
            return
        if not folder.exists():
            raise NotMeasured(f"{folder} is not stored")
        try:
            written, found = (folder / SUMS).read_bytes(), _sums(folder)
            if written == found:
                self._sound.add(folder)
                return
            lines = {*written.splitlines()} ^ {*found.splitlines()}
            names = {line.split(b"  ")[-1].decode(errors="replace") for line in lines}
            what = f"{min(names, default=SUMS)} is not as {SUMS} says"
        except OSError as error:
            what = f"{error.strerror}: {error.filename}"
        raise ConfigError(
            f"{folder} is damaged ({what}): metadyn run, with the same arguments, makes it anew"
        )

    def damage(self) -> dict[Path, str]:
        """Finds the checkpoints and measurements that are damaged, and says of each what is wrong.

        It looks once at each that is not.
        """
        folders = [self._checkpoint(step) for step in self.steps()]
        for task_set, names in self.measurements().items():
            folders += [self._measurement(task_set, name) for name in names]
        found = {}
        for folder in folders:
            try:
                self._check(folder)
            except ConfigError as error:
                found[folder] = str(error)
        return found

    def set_aside_damaged(self) -> None:
        """Renames what is damaged, with a warning, so that it is made anew.

        Until it is, the run is not done: so its summary goes first.
        """
        found = self.damage()
        if found:
            (self.path / "summary.json").unlink(missing_ok=True)
        for folder, said in found.items():
            warnings.warn(said, ConfigWarning, stacklevel=2)
            endings = itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
            aside = (folder.with_name(folder.name + DAMAGED + ending) for ending in endings)
            folder.rename(next(path for path in aside if not path.exists()))

    # Training: state and trajectories at outer steps.

    def _checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / str(step)

    def save_checkpoint(
        self, step: int, state: Any, trajectories: Arrays | None, about: Mapping[str, Any]
    ) -> None:
        """Stores training state, and trajectories if given; in the background, as copies.

        Before it is read `finish` must be called, which also raises what went wrong.
        """
        items: dict[str, Any] = {"state": ocp.args.StandardSave(_fetched(state))}
        if trajectories is not None:
            items["trajectories"] = ocp.args.StandardSave(_fetched(trajectories))
        self._save(self._checkpoint(step), **items, about=ocp.args.JsonSave(about))

    def forget(self, step: int) -> None:
        """Removes the checkpoint of an outer step, once those that came later are whole."""
        self.finish()
        folder = self._checkpoint(step)
        shutil.rmtree(folder.rename(folder.with_name(folder.name + PART)))

    def about(self, step: int) -> dict[str, dict[str, Any]]:
        """Descriptions at an outer step, by set of tasks and learner (`trajectories.describe`)."""
        return self._about(self._checkpoint(step))

    def steps(self) -> list[int]:
        """Returns the outer steps of all checkpoints, in order."""
        names = (folder.name for folder in (self.path / "checkpoints").glob("*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def state(self, step: int) -> Any:
        """Reads the training state at an outer step, as NumPy arrays in dictionaries and lists.

        Its "params" are the outer parameters by the name of the meta-learner, with a leading axis
        of seeds; the rest is what training goes on from (`outer.TrainState`).
        """
        return self._arrays(self._checkpoint(step), "state")

    def restore_state(self, step: int, abstract: Any) -> Any:
        """Reads the state at an outer step, placed by `abstract` (shapes and shardings)."""
        state = ocp.args.StandardRestore(abstract)
        return self._restore(self._checkpoint(step), state=state)["state"]

    # Measurements: one learner on one set of tasks.

    def _measurement(self, task_set: str, learner: str) -> Path:
        return self.path / "measurements" / task_set / learner

    def has_measurement(self, task_set: str, learner: str) -> bool:
        """Tells whether one learner's measurement on one set of tasks is stored."""
        return self._measurement(task_set, learner).exists()

    def save_measurement(
        self, task_set: str, learner: str, arrays: Arrays, about: Mapping[str, Any]
    ) -> None:
        """Stores one measurement, appearing only when whole; in the background (see `finish`)."""
        folder = self._measurement(task_set, learner)
        stored = ocp.args.StandardSave(_fetched(arrays))
        self._save(folder, arrays=stored, about=ocp.args.JsonSave(about))

    def measurement(self, task_set: str, learner: str) -> xr.Dataset:
        """Reads one learner on one set of tasks: [seed,] task, step, and the reading's own axes.

        Raises `ConfigError` if it is damaged.
        """
        folder = self._measurement(task_set, learner)
        return dataset(self._arrays(folder, "arrays"), self._about(folder))

    def measurements(self) -> dict[str, list[str]]:
        """Names of the learners measured so far, by set of tasks."""
        found: dict[str, list[str]] = {}
        for folder in sorted((self.path / "measurements").glob("*/*")):
            if folder.is_dir() and PART not in folder.name and DAMAGED not in folder.name:
                found.setdefault(folder.parent.name, []).append(folder.name)
        return found

    def outer_steps(self) -> list[int]:
        """Returns the outer steps whose mode trajectories are stored, in order.

        Raises `ConfigError` if one is damaged.
        """
        having = lambda step: (self._checkpoint(step) / "trajectories").exists()
        for step in (steps := [*filter(having, self.steps())]):
            self._check(self._checkpoint(step))
        return steps

    def written(self, step: int) -> float:
        """Says when the checkpoint of an outer step was stored, in seconds since the epoch."""
        return self._checkpoint(step).stat().st_mtime

    def trajectories(
        self, task_set: str, learner: str, steps: Sequence[int] | None = None
    ) -> xr.Dataset:
        """Reads a meta-learner over outer training on one set: outer_step, seed, task, step, …

        At all outer steps that are stored, or some of them. Readable while a run is writing.
        Raises `ConfigError` if nothing is stored yet, a checkpoint is damaged, or there is no such
        measurement.
        """
        steps = self.outer_steps() if steps is None else list(steps)
        if not steps:
            raise ConfigError(f"{self.path}: no mode trajectories are stored yet")
        folders = [self._checkpoint(step) for step in steps]
        described = self.about(steps[-1])
        tracked = {
            "task_set": (task_set, described),
            "learner": (learner, described.get(task_set, {})),
        }
        for field, (name, known) in tracked.items():
            check(name in known, field, name, f"{self.path} tracks {', '.join(known)}")
        own = described[task_set][learner]
        part = {task_set: {learner: dict.fromkeys(own["axes"], 0)}}
        read = [self._arrays(folder, "trajectories", part)[task_set][learner] for folder in folders]
        datasets = [dataset(arrays, own) for arrays in read]
        return xr.concat(datasets, xr.Variable("outer_step", steps), combine_attrs="override")

    def results(self, steps: Sequence[int] | None = None) -> Results:
        """Returns what is stored, for criteria and figures: at all outer steps, or some of them."""
        steps = self.outer_steps() if steps is None else list(steps)  # a run may go on meanwhile
        tracked, stored = self.about(steps[0]) if steps else {}, self.measurements()
        both = {n: [*tracked.get(n, ()), *stored.get(n, ())] for n in {**tracked, **stored}}

        def read(task_set: str, learner: str) -> xr.Dataset:
            if learner in tracked.get(task_set, ()):
                return self.trajectories(task_set, learner, steps)
            return self.measurement(task_set, learner)

        return Results(both, read)

    # Results.

    def summary(self) -> dict[str, Any] | None:
        """Reads summary.json; None before the run is done. `ConfigError` if it is damaged."""
        path = self.path / "summary.json"
        return read_summary(path) if path.exists() else None

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json in one step."""
        write_json(self.path / "summary.json", summary)


def read_summary(path: Path) -> dict[str, Any]:
    """Reads a summary.json. Raises `ConfigError` if it is damaged."""
    summary = read_json(path, f"{path} cannot be read")
    row: dict[str, Any] = {"name": str, "expected": str}
    row |= dict.fromkeys(("value", "low", "high"), (int, float, type(None)))
    for name, kinds in (("criteria", {**row, "passed": bool, "verdict": str}), ("reported", row)):
        rows = summary.get(name, [])
        if not isinstance(rows, list) or not all(
            isinstance(r, dict) and all(k in r and isinstance(r[k], t) for k, t in kinds.items())
            for r in rows
        ):
            raise ConfigError(f"{path}: {name} is not as metadyn writes it; remove the file")
    lacking: dict[str, Any] = {"study": "?", "preset": "?", "seed": "?", "environment": {}}
    return lacking | {"criteria": [], "reported": []} | summary


def load(path: str | os.PathLike[str], task_set: str = "tracked") -> xr.Dataset:
    """Loads the mode trajectories of a run or a sweep as one labelled dataset.

    `task_set` "tracked" (the default) gives the fixed evaluation tasks probed throughout outer
    training, with dimensions (learner, outer_step, seed, task, mode, step); "heldout" the losses on
    held-out tasks of the training distribution, likewise. Where a study has several comparisons
    there is one of each, such as "tracked_bandit" and "heldout_bandit". Any other
    ("in_distribution", "x4", …; `RunFolder(path).results().sets()` lists them) gives every learner
    measured on it once training was done, (learner, seed, task, mode, step). `trajectories.merge`
    says what is repeated and padded. Of a sweep, what is swept are dimensions too
    (`sweep_results.load`). Raises `ConfigError` for a folder that holds no run and a set that it
    does not hold.
    """
    check(isinstance(path, str | os.PathLike), "path", path, "must be that of a folder")
    if (Path(path) / "sweep.json").exists():
        from metadyn import sweep_results

        return sweep_results.load(Path(path), task_set)
    results = RunFolder(path).results()
    parts = results.learners(task_set)
    held = ", ".join(sorted(results.sets())) or "nothing yet"
    check(parts, "task_set", task_set, f"{path} holds {held}")
    return merge(parts)


def _fetched(tree: Any) -> Any:
    """Copies as NumPy arrays, which Orbax stores sooner; of several processes none has them all."""
    return jax.tree.map(np.array, tree) if jax.process_count() == 1 else tree


def _sums(folder: Path) -> bytes:
    """The names and SHA-256 of the files in a folder, as the sha256sum command writes them.

    But for what file managers and network file systems leave there.
    """
    lines = []
    ours = lambda path: path.is_file() and path != folder / SUMS and not STRAY.match(path.name)
    for path in sorted(filter(ours, folder.rglob("*"))):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"{digest}  {path.relative_to(folder)}\n")
    return "".join(lines).encode()


def differing(theirs: Any, ours: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields where two trees of JSON differ: by which name, and the two values."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted({*theirs, *ours}):
            yield from differing(theirs.get(key), ours.get(key), f"{name}.{key}")
    elif theirs != ours and (theirs == theirs or ours == ours):  # both are not NaN
        yield name.removeprefix(".config").removeprefix("."), theirs, ours


def write_whole(path: Path, text: str) -> None:
    """Writes a text so that a reader sees the old file or the new one, never a part."""
    part = path.with_name(path.name + PART)
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON, as `write_whole` writes."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def finite(value: Any) -> Any:
    """Replaces NaN and infinities, which JSON does not have, by None."""
    if isinstance(value, Mapping):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path, complaint: str) -> dict[str, Any]:
    """Reads the JSON object in a file. Raises `ConfigError` that begins with `complaint`."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{complaint} ({type(error).__name__} reading {path.name})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{complaint} ({path.name} is not a JSON object)")
    return value
