"""The run folder: the one module that knows its layout.

    DIR/config.json             what was asked for; written first, compared on every later run
    DIR/checkpoints/STEP/       Orbax: training state, and at log-spaced steps mode trajectories
    DIR/measurements/SET/NAME/  Orbax: one learner measured on one set of tasks
    DIR/figures/*.png
    DIR/summary.json            criteria with intervals, and the environment

Arrays are stored by Orbax with a JSON description of their axes beside them; nothing is pickled
and nothing in a folder is ever executed.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import xarray as xr

from metadyn import mesh
from metadyn.base import ConfigError

Arrays = Mapping[str, Any]
_Number = (int, float, type(None))
TRACKED, HELDOUT = "tracked", "heldout"
"""The two sets of tasks on which a study's main meta-learner is measured at every checkpoint; those
of others have names that begin with these."""


def describe(
    axes: Mapping[str, Sequence[str]],
    coords: Mapping[str, tuple[str, Sequence[float]]],
    attrs: Mapping[str, Any],
) -> dict[str, Any]:
    """What is needed beside the arrays to label them: axes of each, coordinates (name: (axis,
    values)), attributes. JSON."""
    return {
        "axes": {name: list(names) for name, names in axes.items()},
        "coords": {name: [axis, [float(v) for v in vs]] for name, (axis, vs) in coords.items()},
        "attrs": dict(attrs),
    }


def labelled(arrays: Arrays, about: Mapping[str, Any]) -> xr.Dataset:
    """The `xarray.Dataset` that arrays and their description make."""
    data = {name: (about["axes"][name], np.asarray(value)) for name, value in arrays.items()}
    coords = {name: (axis, values) for name, (axis, values) in about["coords"].items()}
    return xr.Dataset(data, coords, about["attrs"])


class RunFolder:
    """One run's DIR. `RunFolder(path)` opens one for reading; `create` makes or resumes one."""

    def __init__(self, path: str | os.PathLike[str]):
        """Raises `ConfigError` unless `path` holds a run."""
        self.path = Path(path).absolute()
        self.config = _read_json(self.path / "config.json", f"{path} holds no run of metadyn")
        missing = {"study", "preset", "seed", "config"} - set(self.config)
        if missing:
            raise ConfigError(f"{path}/config.json: lacks {sorted(missing)}; not a run of metadyn")

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: Mapping[str, Any]) -> RunFolder:
        """Opens DIR to write, making it if it is new or empty.

        Raises `ConfigError` if it cannot be written, holds anything else, or holds a run of
        another configuration.
        """
        folder = Path(path).absolute()
        config = json.loads(json.dumps(config))
        if (folder / "config.json").exists():
            run = cls(path)
            for name, theirs, ours in _differences(run.config, config):
                raise ConfigError(
                    f"--out {path} holds a run with {name} = {theirs!r}, not {ours!r}: "
                    "choose another DIR, or run with that value to resume it"
                )
            _check_writable(folder, path)
            return run
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise ConfigError(
                    f"--out {path} is not empty and holds no run of metadyn: choose another DIR"
                )
            write_json(folder / "config.json", config)
        except OSError as error:
            raise ConfigError(
                f"--out {path} cannot be written ({error.strerror}): choose another DIR"
            ) from error
        return cls(path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds DIR for one writer, until left or killed. Raises `ConfigError` if it is held."""
        with open(self.path / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"--out {self.path} is in use by another run: "
                    "wait for it, or choose another DIR"
                ) from None
            yield

    # Training: state and trajectories at outer steps.

    @cached_property
    def _checkpoints(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.path / "checkpoints",
            item_names=("state", "trajectories", "about"),
            options=ocp.CheckpointManagerOptions(create=True, max_to_keep=None),
        )

    def save_checkpoint(
        self, step: int, state: Any, trajectories: Arrays | None, about: Mapping[str, Any]
    ) -> None:
        """Stores training state, and trajectories if given, in the background."""
        items: dict[str, Any] = {"state": ocp.args.StandardSave(state)}
        if trajectories is not None:
            items["trajectories"] = ocp.args.StandardSave(trajectories)
            items["about"] = ocp.args.JsonSave(about)
        self._checkpoints.save(step, args=ocp.args.Composite(**items), force=True)

    def latest_step(self) -> int | None:
        """The outer step of the newest complete checkpoint."""
        return self._checkpoints.latest_step()

    def restore_state(self, step: int, abstract: Any) -> Any:
        """The training state at an outer step, placed as `abstract` (shapes and shardings) says."""
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._checkpoints.restore(step, args=items)["state"]

    def close(self) -> None:
        """Waits for background saves."""
        if "_checkpoints" in self.__dict__:
            self._checkpoints.wait_until_finished()
            self._checkpoints.close()
            del self.__dict__["_checkpoints"]

    # Measurements: one learner on one set of tasks.

    def _measurement(self, task_set: str, learner: str) -> Path:
        return self.path / "measurements" / task_set / learner

    def has_measurement(self, task_set: str, learner: str) -> bool:
        """Whether it is stored, whole."""
        return self._measurement(task_set, learner).exists()

    def save_measurement(
        self, task_set: str, learner: str, arrays: Arrays, about: Mapping[str, Any]
    ) -> None:
        """Stores one measurement, appearing only when whole."""
        items = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about)
        )
        with _composite() as checkpointer:
            checkpointer.save(self._measurement(task_set, learner), args=items)

    def measurement(self, task_set: str, learner: str) -> xr.Dataset:
        """One learner on one set of tasks: [seed,] task, step, and the reading's own axes."""
        items = ocp.args.Composite(arrays=_arrays(), about=ocp.args.JsonRestore())
        with _composite() as checkpointer:
            stored = checkpointer.restore(self._measurement(task_set, learner), args=items)
        return labelled(stored["arrays"], stored["about"])

    def measurements(self) -> dict[str, list[str]]:
        """Names of the learners measured so far, by set of tasks."""
        folders = sorted((self.path / "measurements").glob("*/*"))
        found: dict[str, list[str]] = {}
        for folder in folders:
            whole = ".orbax-checkpoint-tmp" not in folder.name
            if whole and (folder / "_CHECKPOINT_METADATA").exists():
                found.setdefault(folder.parent.name, []).append(folder.name)
        return found

    def outer_steps(self) -> list[int]:
        """The outer steps whose mode trajectories are stored, in order."""
        folders = (self.path / "checkpoints").glob("*/trajectories/_METADATA")
        names = (folder.parent.parent.name for folder in folders)
        return sorted(int(name) for name in names if name.isdigit())

    def written(self, step: int) -> float:
        """When the trajectories of an outer step were stored, in seconds since the epoch."""
        return (self.path / "checkpoints" / str(step)).stat().st_mtime

    def trainings(self) -> list[tuple[str, str]]:
        """Of each meta-learner, the sets on which it is tracked and on which its loss is held out.

        Their names are `TRACKED` and `HELDOUT` with the same ending.
        """
        sets = [name for name in self.trajectory_sets() if name.startswith(TRACKED)]
        return [(name, HELDOUT + name.removeprefix(TRACKED)) for name in sets]

    def trajectory_sets(self) -> list[str]:
        """The sets of tasks measured at every checkpoint."""
        items = ocp.args.Composite(about=ocp.args.JsonRestore())
        with _composite() as checkpointer:
            for step in self.outer_steps()[:1]:
                stored = checkpointer.restore(self.path / "checkpoints" / str(step), args=items)
                return list(stored["about"])
        return []

    def trajectories(
        self, task_set: str = TRACKED, steps: Sequence[int] | None = None
    ) -> xr.Dataset:
        """The meta-learner over outer training on one set: outer_step, seed, task, step, …

        At all outer steps that are stored, or some of them. Readable while a run is writing.
        Raises `ConfigError` if nothing is stored yet.
        """
        steps = self.outer_steps() if steps is None else list(steps)
        if not steps:
            raise ConfigError(f"{self.path}: no mode trajectories are stored yet")
        folders = [self.path / "checkpoints" / str(step) for step in steps]
        items = ocp.args.Composite(about=ocp.args.JsonRestore())
        with _composite() as checkpointer:
            about = checkpointer.restore(folders[0], args=items)["about"][task_set]
            part = {task_set: dict.fromkeys(about["axes"], 0)}
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), part)
            only = ocp.args.PyTreeRestore(part, restore_args=as_numpy, partial_restore=True)
            items = ocp.args.Composite(trajectories=only)
            read = [checkpointer.restore(folder, args=items)["trajectories"] for folder in folders]
        datasets = [labelled(arrays[task_set], about) for arrays in read]
        return xr.concat(datasets, xr.Variable("outer_step", steps), combine_attrs="override")

    # Results.

    @property
    def tensorboard(self) -> Path:
        """Where scalars for TensorBoard are, if they were asked for."""
        return self.path / "tensorboard"

    @property
    def figures(self) -> Path:
        """Where the figures are."""
        return self.path / "figures"

    def summary(self) -> dict[str, Any] | None:
        """summary.json, or None before the run is done. Raises `ConfigError` if it is damaged."""
        path = self.path / "summary.json"
        if not path.exists():
            return None
        return read_summary(path)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json in one step."""
        write_json(self.path / "summary.json", summary)


def read_summary(path: Path) -> dict[str, Any]:
    """A summary.json. Raises `ConfigError` if it is damaged."""
    summary = _read_json(path, f"{path} cannot be read")
    row: dict[str, Any] = {
        "name": str,
        "expected": str,
        "value": _Number,
        "low": _Number,
        "high": _Number,
    }
    for name in ("criteria", "reported"):
        rows = summary.get(name, [])
        kinds = row | ({"passed": bool} if name == "criteria" else {})
        if not isinstance(rows, list) or not all(
            isinstance(r, dict) and all(isinstance(r.get(k), t) for k, t in kinds.items())
            for r in rows
        ):
            raise ConfigError(f"{path}: {name} is not as metadyn writes it; remove the file")
    return {"study": "?", "preset": "?", "seed": "?", "criteria": [], "reported": [], **summary}


def load(path: str | os.PathLike[str], task_set: str = TRACKED) -> xr.Dataset:
    """Mode trajectories of a run as one labelled dataset.

    `task_set` "tracked" (the default) gives the fixed evaluation tasks probed throughout outer
    training, with dimensions (learner, outer_step, seed, task, mode, step); "heldout" the losses on
    held-out tasks of the training distribution, likewise. Any other set ("in_distribution",
    "x4", …; `RunFolder(path).measurements()` lists them) gives every learner measured on it once
    training was done, (learner, seed, task, mode, step). What does not depend on a dimension is
    repeated along it (Bayes has no outer step); what is shorter is padded with NaN, and `time`
    [learner, step] says what step means to each learner. Raises `ConfigError` for a folder that
    holds no run and a set that it does not hold.
    """
    run = RunFolder(path)
    names = run.measurements().get(task_set, [])
    parts = {name: run.measurement(task_set, name) for name in names}
    if task_set in (TRACKED, *run.trajectory_sets()):
        trained = run.trajectories(task_set)
        parts[trained.attrs["learner"]] = trained
    if not parts:
        known = sorted({*run.measurements(), *run.trajectory_sets()})
        raise ConfigError(f"task_set = {task_set!r}: {path} holds {', '.join(known)}")
    whole: dict[str, int] = {}
    for part in parts.values():
        whole |= {d: part.sizes[d] for d in ("outer_step", "seed") if d in part.dims}
    coords = {d: p[d] for p in parts.values() for d in whole if d in p.coords}

    def complete(part: xr.Dataset) -> xr.Dataset:
        part = part.expand_dims({d: n for d, n in whole.items() if d not in part.dims})
        numbered = {d: np.arange(n) for d, n in part.sizes.items() if d not in part.coords}
        return part.assign_coords(numbered | coords).reset_coords("time")

    labels = xr.Variable("learner", list(parts))
    merged = xr.concat(
        [complete(part) for part in parts.values()],
        labels,
        data_vars="all",
        coords="different",
        compat="equals",
        join="outer",
        combine_attrs="drop_conflicts",
    )
    order = [
        d for d in ("learner", "outer_step", "seed", "task", "mode", "step") if d in merged.dims
    ]
    return merged.set_coords("time").transpose(*order, ...)


def _composite() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def _arrays() -> ocp.args.StandardRestore:
    """Reads arrays whatever devices they were written from."""
    return ocp.args.StandardRestore(fallback_sharding=mesh.here())


def _differences(theirs: Any, ours: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return [
            difference
            for key in sorted({*theirs, *ours})
            for difference in _differences(
                theirs.get(key), ours.get(key), f"{name}.{key}" if name else key
            )
        ]
    return [] if theirs == ours else [(name.removeprefix("config."), theirs, ours)]


def _check_writable(folder: Path, path: str | os.PathLike[str]) -> None:
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--out {path} cannot be written: choose another DIR")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    part.replace(path)


def _read_json(path: Path, complaint: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{complaint} ({type(error).__name__} reading {path.name})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{complaint} ({path.name} is not a JSON object)")
    return value
