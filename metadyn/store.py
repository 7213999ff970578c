"""The run folder: the one module that knows its layout.

    DIR/config.json             the configuration; written first, compared on every later run
    DIR/checkpoints/STEP/       Orbax: training state, and at log-spaced steps mode trajectories
    DIR/measurements/SET/NAME/  Orbax: one learner measured on one task set
    DIR/figures/*.png
    DIR/report.html             a page to look at (view.py)
    DIR/summary.json            criteria with intervals, and the environment
    DIR/seconds                 seconds that the run has worked, summed over its parts

Orbax stores the arrays, with a JSON description of their axes beside them. Nothing is pickled, and
nothing in a folder is ever executed. A folder of arrays is named STEP or NAME only once it is
complete and holds the SHA256SUMS of its files (as `sha256sum -c` reads them), which are compared
before it is read. A damaged folder is made again and kept as STEP.damaged or NAME.damaged.
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
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import xarray as xr

from metadyn import mesh
from metadyn.base import LearnerKind
from metadyn.errors import ConfigError, ConfigWarning, check, check_choice
from metadyn.trajectories import about, dataset, merge

Arrays = Mapping[str, Any]
T = TypeVar("T", bound="OutputFolder")
SUMS, PART, DAMAGED = "SHA256SUMS", ".part", ".damaged"
IGNORED_FILES = re.compile(r"\._|\.nfs|\.DS_Store|Thumbs\.db|desktop\.ini")
_writer = ThreadPoolExecutor(1)
"""The thread that saves in the background, of all runs of a process. Orbax's threads signal each
other by names that all saves share: two at once can wait for ever (orbax-checkpoint 0.12.8)."""


class NotMeasured(ConfigError):
    """Error about a measurement that is not stored, because it is not planned or not done yet."""


class Results:
    """Measurements, as criteria and figures read them: `results[task_set, learner]`.

    A measurement made at every checkpoint has a dimension outer_step. Each is read only once.
    """

    def __init__(self, stored: Mapping[str, Sequence[str]], read: Callable[[str, str], xr.Dataset]):
        """`stored` lists learners by task set. `read(task_set, learner)` reads one measurement."""
        self._stored = stored
        self._read = functools.cache(read)

    def __getitem__(self, key: tuple[str, str]) -> xr.Dataset:
        if key not in self:
            raise NotMeasured(f"{key[1]!r} on {key[0]!r} is not measured in this run")
        return self._read(*key)

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key[1] in self._stored.get(key[0], ())

    def sets(self) -> list[str]:
        """Returns the names of the task sets."""
        return list(self._stored)

    def learners(self, task_set: str, *kinds: str, drawn: bool = False) -> dict[str, xr.Dataset]:
        """Returns the measurements on a task set by learner, in the order of the learners' places.

        If `kinds` are given, only of learners of these kinds; if `drawn`, only of those in figures.
        """
        for kind in kinds:
            check_choice("kinds", kind, LearnerKind)
        datasets = [self[task_set, name] for name in self._stored.get(task_set, ())]
        described = sorted(((about(data), data) for data in datasets), key=lambda x: x[0].place)
        return {
            description.learner: data
            for description, data in described
            if (not kinds or description.kind in kinds) and (description.drawn or not drawn)
        }


@contextmanager
def lock(folder: Path, wait: bool = True) -> Iterator[None]:
    """Holds a folder's lock until the block ends, or the process.

    Raises `BlockingIOError` if another holds it and `wait` is False.
    """
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


class OutputFolder:
    """A DIR of metadyn: one that holds, as a JSON file, the configuration it was made with.

    `OutputFolder(path)` opens it for reading, and `create` makes it or resumes what it holds.
    """

    kind: ClassVar[str]
    """What DIR holds, for messages."""
    file: ClassVar[str]
    """Name of the JSON file."""
    format: ClassVar[int]
    """Version of the layout."""

    def __init__(self, path: str | os.PathLike[str]):
        """Raises `ConfigError` unless `path` holds a DIR of this kind and version."""
        self.path = Path(path).absolute()
        self.figures = self.path / "figures"
        complaint = f"{self.path} holds no {self.kind} of metadyn"
        self.config = read_json(self.path / self.file, complaint)
        if missing := {"study", "preset", "seed"} - set(self.config):
            problem = f"lacks {sorted(missing)}; not a {self.kind} of metadyn"
            raise ConfigError(f"{path}/{self.file}: {problem}")
        if self.config.get("format") != self.format:
            problem = f"holds a {self.kind} of another version of metadyn"
            hint = "which this version does not read: run it anew in another DIR"
            raise ConfigError(f"{path} {problem}, {hint}")

    @classmethod
    def create(cls: type[T], path: str | os.PathLike[str], config: Mapping[str, Any]) -> T:
        """Opens DIR for writing, and creates it if it is new or empty.

        Several processes may call this at once. Raises `ConfigError` if DIR cannot be written,
        holds anything else, or was made with another configuration.
        """
        folder, hint = Path(path).absolute(), "choose another DIR"
        file = folder / cls.file
        if "://" in os.fspath(path):
            raise ConfigError(f"--out {path} is a URL, not a folder: {hint}")
        if {*"[]*?"} & {*str(folder)}:  # Orbax looks for its files by a pattern
            raise ConfigError(f"--out {path} cannot have any of [ ] * ? in it: {hint}")
        asked = json.loads(json.dumps({"format": cls.format, **config}))
        try:
            if not os.path.exists(file):  # also False for a text that cannot be a path
                folder.mkdir(parents=True, exist_ok=True)
                unfinished = {".lock", cls.file + PART}  # of another process, or a killed one
                names = {entry.name for entry in folder.iterdir()}
                if names - unfinished and cls.file not in names:  # another may have just made it
                    problem = f"is not empty and holds no {cls.kind} of metadyn"
                    raise ConfigError(f"--out {path} {problem}: {hint}")
                with lock(folder):
                    if not file.exists():
                        write_json(file, asked)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"--out {path} cannot be written ({reason}): {hint}") from error
        opened = cls(path)
        for name, *values in differing(opened.config, asked):
            theirs, ours = map(reprlib.repr, values)
            raise ConfigError(
                f"--out {path} holds a {cls.kind} with {name} = {theirs}, not {ours}: "
                f"{hint}, or give that value to go on with it"
            )
        if not os.access(folder, os.W_OK):
            raise ConfigError(f"--out {path} cannot be written: {hint}")
        return opened


class RunFolder(OutputFolder):
    """One run's DIR. `RunFolder(path)` opens it for reading, and `create` makes or resumes it."""

    kind, file, format = "run", "config.json", 3

    def __init__(self, path: str | os.PathLike[str]):
        """Raises `ConfigError` unless `path` holds a run."""
        super().__init__(path)
        self.tensorboard = self.path / "tensorboard"
        self._pending: Future[None] | None = None
        self._verified: set[Path] = set()
        self._opened_at = time.monotonic()
        if not isinstance(self.config.get("config"), dict):
            raise ConfigError(f"{path}/config.json: is not as metadyn writes it")

    def seconds(self) -> float:
        """Returns the seconds since DIR was opened, added to those of earlier parts of the run.

        A part that was killed is not counted, since it stored no time.
        """
        earlier = 0.0
        with suppress(OSError, ValueError):
            earlier = float((self.path / "seconds").read_text())
        return earlier + time.monotonic() - self._opened_at

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds DIR for one writer until the block ends, or the process.

        The end of the block stores `seconds()`. Raises `ConfigError` if another process holds DIR.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(lock(self.path, wait=False))
            except BlockingIOError:
                raise ConfigError(
                    f"--out {self.path} is in use by another run: "
                    "wait for it, or choose another DIR"
                ) from None
            for folder in ("checkpoints", "measurements/*"):
                for part in self.path.glob(f"{folder}/*{PART}*"):  # left by a killed run
                    shutil.rmtree(part)
            was_done = (self.path / "summary.json").exists()
            try:
                yield
            finally:  # whatever ended the run, its last save is complete before another run begins
                _writer.submit(lambda: None).result()  # comes after every earlier save
                with suppress(OSError):  # of a full disk, which is reported already
                    # The time of a run that was done before stays, even if it was repaired now.
                    if not (was_done and (self.path / "summary.json").exists()):
                        write_whole(self.path / "seconds", f"{self.seconds():.1f}\n")

    # Folders of arrays: all processes save one together, and each process reads alone.

    def _save(self, folder: Path, **items: ocp.args.CheckpointArgs) -> None:
        self.finish()
        if jax.process_count() == 1:
            self._pending = _writer.submit(self._write, folder, items)
        else:
            self._write(folder, items)

    def finish(self) -> None:
        """Waits for the save in progress, if any. Raises `OSError` if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, folder: Path, items: Mapping[str, ocp.args.CheckpointArgs]) -> None:
        part = folder.with_name(folder.name + PART)
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                checkpointer.save(part, args=ocp.args.Composite(**items))
        except ValueError as error:  # TensorStore raises it for a file that cannot be written
            if match := re.search(r"os_error_code='(\d+)'", str(error)):
                raise OSError(int(match[1]), os.strerror(int(match[1]))) from error
            raise

        def complete() -> None:
            (part / SUMS).write_bytes(_sums(part))
            part.rename(folder)
            self._verified.add(folder)

        mesh.on_main_process(complete)

    def _restore(self, folder: Path, **items: ocp.args.CheckpointArgs) -> Any:
        self._check(folder)
        i = jax.process_index()
        this_process = ocp.options.MultiprocessingOptions(primary_host=i, active_processes={i})
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(multiprocessing_options=this_process)
        )
        with ocp.Checkpointer(handler, multiprocessing_options=this_process) as checkpointer:
            return checkpointer.restore(folder, args=ocp.args.Composite(**items))

    def _arrays(self, folder: Path, name: str, part: Any = None) -> Any:
        """Reads all arrays, or the tree `part`, as NumPy arrays, whatever devices wrote them."""
        self._check(folder)
        tree = part or ocp.StandardCheckpointHandler().metadata(folder / name).tree
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        request = ocp.args.PyTreeRestore(part, restore_args=numpy, partial_restore=part is not None)
        return self._restore(folder, **{name: request})[name]

    def _about(self, folder: Path) -> dict[str, Any]:
        """Reads the description that is stored beside the arrays of a folder."""
        return self._restore(folder, about=ocp.args.JsonRestore())["about"]

    def _check(self, folder: Path) -> None:
        """Raises `ConfigError` unless a folder is as it was written. Checks an intact one once."""
        if folder in self._verified:
            return
        if not folder.exists():
            raise NotMeasured(f"{folder} is not stored")
        try:
            stored, actual = (folder / SUMS).read_bytes(), _sums(folder)
            if stored == actual:
                self._verified.add(folder)
                return
            lines = {*stored.splitlines()} ^ {*actual.splitlines()}
            names = {line.split(b"  ")[-1].decode(errors="replace") for line in lines}
            problem = f"{min(names, default=SUMS)} does not match its sum in {SUMS}"
        except OSError as error:
            problem = f"{error.strerror}: {error.filename}"
        raise ConfigError(
            f"{folder} is damaged ({problem}): metadyn run, with the same arguments, makes it anew"
        )

    def damage(self) -> dict[Path, str]:
        """Returns the damaged checkpoints and measurements, each with a message that says why.

        Intact folders are checked only once.
        """
        folders = [self._checkpoint(step) for step in self.steps()]
        for task_set, names in self.measurements().items():
            folders += [self._measurement(task_set, name) for name in names]
        messages = {}
        for folder in folders:
            try:
                self._check(folder)
            except ConfigError as error:
                messages[folder] = str(error)
        return messages

    def set_aside_damaged(self) -> None:
        """Renames each damaged folder, with a warning, so that it is made anew.

        Deletes the summary first, since the run is not done until the folders are made anew.
        """
        messages = self.damage()
        if messages:
            (self.path / "summary.json").unlink(missing_ok=True)
        for folder, message in messages.items():
            warnings.warn(message, ConfigWarning, stacklevel=2)
            endings = itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
            paths = (folder.with_name(folder.name + DAMAGED + ending) for ending in endings)
            folder.rename(next(path for path in paths if not path.exists()))

    # Training: state and trajectories at outer steps.

    def _checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / str(step)

    def save_checkpoint(
        self, step: int, state: Any, trajectories: Arrays | None, about: Mapping[str, Any]
    ) -> None:
        """Stores training state, and trajectories if given, as copies and in the background.

        Call `finish` before reading the checkpoint. It also raises the error of a save that failed.
        """
        items: dict[str, Any] = {"state": ocp.args.StandardSave(_to_numpy(state))}
        if trajectories is not None:
            items["trajectories"] = ocp.args.StandardSave(_to_numpy(trajectories))
        self._save(self._checkpoint(step), **items, about=ocp.args.JsonSave(about))

    def forget(self, step: int) -> None:
        """Removes the checkpoint of an outer step, once all later ones are complete."""
        self.finish()
        folder = self._checkpoint(step)
        shutil.rmtree(folder.rename(folder.with_name(folder.name + PART)))

    def about(self, step: int) -> dict[str, dict[str, Any]]:
        """Reads descriptions at an outer step by task set and learner (`trajectories.describe`)."""
        return self._about(self._checkpoint(step))

    def steps(self) -> list[int]:
        """Returns the outer steps of all checkpoints, in order."""
        names = (folder.name for folder in (self.path / "checkpoints").glob("*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def state(self, step: int) -> Any:
        """Reads the training state at an outer step, as NumPy arrays in dictionaries and lists.

        Its "params" holds the outer parameters, keyed by meta-learner, with a leading axis of
        seeds. The rest is what training needs to resume (`outer.TrainState`).
        """
        return self._arrays(self._checkpoint(step), "state")

    def restore_state(self, step: int, abstract: Any) -> Any:
        """Reads the state at an outer step, with the shapes and shardings of `abstract`."""
        state = ocp.args.StandardRestore(abstract)
        return self._restore(self._checkpoint(step), state=state)["state"]

    # Measurements: one learner on one task set.

    def _measurement(self, task_set: str, learner: str) -> Path:
        return self.path / "measurements" / task_set / learner

    def has_measurement(self, task_set: str, learner: str) -> bool:
        """Tells whether the measurement of a learner on a task set is stored."""
        return self._measurement(task_set, learner).exists()

    def save_measurement(
        self, task_set: str, learner: str, arrays: Arrays, about: Mapping[str, Any]
    ) -> None:
        """Stores one measurement in the background (see `finish`). It appears once complete."""
        folder = self._measurement(task_set, learner)
        items = ocp.args.StandardSave(_to_numpy(arrays))
        self._save(folder, arrays=items, about=ocp.args.JsonSave(about))

    def measurement(self, task_set: str, learner: str) -> xr.Dataset:
        """Reads the measurement of a learner on a task set.

        Its dimensions are [seed,] task, step, and the reading's own axes. Raises `ConfigError` if
        it is damaged.
        """
        folder = self._measurement(task_set, learner)
        return dataset(self._arrays(folder, "arrays"), self._about(folder))

    def measurements(self) -> dict[str, list[str]]:
        """Returns the names of the learners measured so far, keyed by task set."""
        learners: dict[str, list[str]] = {}
        for folder in sorted((self.path / "measurements").glob("*/*")):
            if folder.is_dir() and PART not in folder.name and DAMAGED not in folder.name:
                learners.setdefault(folder.parent.name, []).append(folder.name)
        return learners

    def outer_steps(self) -> list[int]:
        """Returns the outer steps whose mode trajectories are stored, in order.

        Raises `ConfigError` if one is damaged.
        """
        has_trajectories = lambda step: (self._checkpoint(step) / "trajectories").exists()
        steps = [*filter(has_trajectories, self.steps())]
        for step in steps:
            self._check(self._checkpoint(step))
        return steps

    def saved_at(self, step: int) -> float:
        """Returns when the checkpoint of an outer step was stored, in seconds since the epoch."""
        return self._checkpoint(step).stat().st_mtime

    def trajectories(
        self, task_set: str, learner: str, steps: Sequence[int] | None = None
    ) -> xr.Dataset:
        """Reads a meta-learner's trajectories on a task set: outer_step, seed, task, step, …

        Takes all stored outer steps, or only `steps`. A run may be writing at the same time.
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
        for field, (name, names) in tracked.items():
            check(name in names, field, name, f"{self.path} tracks {', '.join(names)}")
        description = described[task_set][learner]
        part = {task_set: {learner: dict.fromkeys(description["axes"], 0)}}
        trees = [self._arrays(folder, "trajectories", part) for folder in folders]
        datasets = [dataset(tree[task_set][learner], description) for tree in trees]
        return xr.concat(datasets, xr.Variable("outer_step", steps), combine_attrs="override")

    def results(self, steps: Sequence[int] | None = None) -> Results:
        """Returns the stored measurements, at all outer steps or only at `steps`."""
        steps = self.outer_steps() if steps is None else list(steps)  # a run may add more
        tracked, stored = self.about(steps[0]) if steps else {}, self.measurements()
        learners = {n: [*tracked.get(n, ()), *stored.get(n, ())] for n in {**tracked, **stored}}

        def read(task_set: str, learner: str) -> xr.Dataset:
            if learner in tracked.get(task_set, ()):
                return self.trajectories(task_set, learner, steps)
            return self.measurement(task_set, learner)

        return Results(learners, read)

    # Results.

    def summary(self) -> dict[str, Any] | None:
        """Reads summary.json; None until the run is done. Raises `ConfigError` if it is damaged."""
        path = self.path / "summary.json"
        return read_summary(path) if path.exists() else None

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json atomically."""
        write_json(self.path / "summary.json", summary)


def read_summary(path: Path) -> dict[str, Any]:
    """Reads a summary.json. Raises `ConfigError` if it is damaged."""
    summary = read_json(path, f"{path} cannot be read")
    base: dict[str, Any] = {"name": str, "expected": str}
    base |= dict.fromkeys(("value", "low", "high"), (int, float, type(None)))
    for name, types in (("criteria", {**base, "passed": bool, "verdict": str}), ("reported", base)):
        rows = summary.get(name, [])
        if not isinstance(rows, list) or not all(
            isinstance(r, dict) and all(k in r and isinstance(r[k], t) for k, t in types.items())
            for r in rows
        ):
            raise ConfigError(f"{path}: {name} is not as metadyn writes it; remove the file")
    defaults: dict[str, Any] = {"study": "?", "preset": "?", "seed": "?", "environment": {}}
    return defaults | {"criteria": [], "reported": []} | summary


def load(path: str | os.PathLike[str], task_set: str = "tracked") -> xr.Dataset:
    """Loads the mode trajectories of a run or a sweep as one labelled dataset.

    `task_set` "tracked" (the default) gives the fixed evaluation tasks probed throughout outer
    training, with dimensions (learner, outer_step, seed, task, mode, step). "heldout" gives the
    losses on held-out tasks of the training distribution, likewise throughout training. In a study
    of several comparisons, each has its own, such as "tracked_bandit" and "heldout_bandit". Other
    sets ("in_distribution", "x4", …; `RunFolder(path).results().sets()` lists them) give every
    learner measured on them after training, with dimensions (learner, seed, task, mode, step).
    `trajectories.merge` says which values are repeated and padded. In a sweep, the swept options
    are dimensions too (`sweep_results.load`). Raises `ConfigError` if the folder holds no run, or
    not the set.
    """
    check(isinstance(path, str | os.PathLike), "path", path, "must be the path of a folder")
    if (Path(path) / "sweep.json").exists():
        from metadyn import sweep_results

        return sweep_results.load(Path(path), task_set)
    results = RunFolder(path).results()
    measurements = results.learners(task_set)
    names = ", ".join(sorted(results.sets())) or "nothing yet"
    check(measurements, "task_set", task_set, f"{path} holds {names}")
    return merge(measurements)


def _to_numpy(tree: Any) -> Any:
    """Copies arrays to NumPy, which Orbax stores faster, unless they are spread over processes."""
    return jax.tree.map(np.array, tree) if jax.process_count() == 1 else tree


def _sums(folder: Path) -> bytes:
    """Returns the SHA-256 sums and names of a folder's files, as the sha256sum command writes them.

    Leaves out files that file managers and network file systems put there.
    """
    lines = []
    is_ours = lambda path: (
        path.is_file() and path != folder / SUMS and not IGNORED_FILES.match(path.name)
    )
    for path in sorted(filter(is_ours, folder.rglob("*"))):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"{digest}  {path.relative_to(folder)}\n")
    return "".join(lines).encode()


def differing(theirs: Any, ours: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields the differences between two JSON trees: a dotted name and the two values."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted({*theirs, *ours}):
            yield from differing(theirs.get(key), ours.get(key), f"{name}.{key}")
    elif theirs != ours and (theirs == theirs or ours == ours):  # NaN equals NaN here
        yield name.removeprefix(".config").removeprefix("."), theirs, ours


def write_whole(path: Path, text: str) -> None:
    """Writes a text file atomically: a reader sees the old file or the new one, never a part."""
    part = path.with_name(path.name + PART)
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically (`write_whole`)."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def finite(value: Any) -> Any:
    """Replaces NaN and infinities, which JSON lacks, by None, in nested mappings and lists."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path, complaint: str) -> dict[str, Any]:
    """Reads the JSON object in a file. Raises `ConfigError`, beginning with `complaint`."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{complaint} ({type(error).__name__} reading {path.name})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{complaint} ({path.name} is not a JSON object)")
    return value
