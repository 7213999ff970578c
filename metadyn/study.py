"""What a study is, and what `metadyn run` does with one.

A study names a domain, a meta-learner, the learners to compare it with, the tasks to measure them
on, and the criteria that the science sets. Everything else (training, probing, storing, resuming,
drawing) is the same for all.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import platform
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.machinery import SourceFileLoader
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from metadyn import dynamics, figures, inner, mesh
from metadyn.base import (
    ConfigError,
    Domain,
    Key,
    Learner,
    Params,
    Probe,
    Task,
    check,
    check_positive,
)
from metadyn.outer import OuterConfig, Trainee, Trainer, TrainState
from metadyn.progress import Progress
from metadyn.scalars import scalars
from metadyn.store import RunFolder, describe

PACKAGES = ("metadyn", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "xarray")


@dataclasses.dataclass(frozen=True)
class MeasureConfig:
    """How many tasks each measurement takes. All of it is our choice."""

    tasks: int = 16_384
    """Evaluation tasks on which every learner that counts observations is measured."""
    updating_tasks: int = 256
    """Evaluation tasks on which every learner that counts updates is measured."""
    shifted_tasks: int = 2048
    """Evaluation tasks of each set that is out of distribution."""
    tracked_tasks: int = 128
    """Evaluation tasks probed at every checkpoint."""
    heldout_tasks: int = 2048
    """Tasks of the training distribution on which the excess loss is measured."""
    probe_points: int = 32
    """Queries in a probe."""
    chunk: int = 4096
    """Tasks held in memory at a time on each device."""

    def __post_init__(self) -> None:
        check_positive(self, *(field.name for field in dataclasses.fields(self)))
        halves = self.tracked_tasks >= 2
        check(
            halves, "tracked_tasks", self.tracked_tasks, "must be at least 2: halves are compared"
        )


@dataclasses.dataclass(frozen=True)
class TaskSet:
    """Tasks that learners are measured on: `sample(key_i, argument)` for i below `size`."""

    name: str
    domain: Domain
    sample: Callable[[Key, Any], Task]
    size: int
    argument: Any = None
    probe: Probe | None = None
    coords: Mapping[str, tuple[str, Sequence[float]]] = dataclasses.field(default_factory=dict)
    """Labels of the probe's axes: name: (axis, values)."""
    attrs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What figures need to know of the set."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """A learner to measure, at the given times of its own clock."""

    name: str
    label: str
    make: Callable[[Params], Learner]
    """`make(params)`; a learner without outer parameters is given an empty tuple."""
    times: tuple[int, ...]
    trained: bool = False
    """Whether its params come from training, with a leading seed axis."""
    panel: int | None = None
    """Its place in the figures, from the left. None: measured, not drawn."""


def plain(
    name: str, label: str, learner: Learner, times: Sequence[int], panel: int | None = None
) -> Contender:
    """A contender without outer parameters."""
    return Contender(name, label, lambda params: learner, tuple(times), panel=panel)


@dataclasses.dataclass(frozen=True)
class Training:
    """A meta-learner, how it is trained, and what is measured of it at every checkpoint."""

    learner: Contender
    """The meta-learner as a contender."""
    trainee: Trainee
    """The meta-learner, and the objective that it is trained on."""
    bayes: Contender
    """What excess loss is over."""
    tracked: TaskSet
    """Fixed evaluation tasks: mode trajectories."""
    heldout: TaskSet
    """Tasks of the training distribution: excess loss."""

    def named(self, name: str, **attrs: Any) -> Training:
        """This as one of several in a plan: its learner and its sets are called ..._name.

        `attrs` are added to those of the tracked set.
        """
        rename = lambda each: dataclasses.replace(each, name=f"{each.name}_{name}")  # noqa: E731
        tracked = rename(self.tracked)
        return dataclasses.replace(
            self,
            learner=rename(self.learner),
            tracked=dataclasses.replace(tracked, attrs={**tracked.attrs, **attrs}),
            heldout=rename(self.heldout),
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that one configuration of a study asks for."""

    outer: OuterConfig
    trainings: Sequence[Training]
    """The meta-learners trained side by side; the first is the one the study is about."""
    measurements: Sequence[tuple[TaskSet, Contender]]
    """What is measured once training is done."""
    curves: Mapping[tuple[str, str], np.ndarray] = dataclasses.field(default_factory=dict)
    """Closed forms [step, mode] to store beside a measurement, by (task set, contender)."""
    chunk: int = 4096

    def __post_init__(self) -> None:
        self.outer.check_batch(training.trainee for training in self.trainings)


@dataclasses.dataclass(frozen=True)
class Criterion:
    """One claim of the science, measured."""

    name: str
    value: float
    low: float
    high: float
    expected: str
    """What the science says, in words and numbers."""
    passed: bool | None
    """None: reported beside the criteria, with nothing to pass."""


def criterion(
    name: str,
    estimate: dynamics.Estimate,
    expected: str,
    at_most: float = math.inf,
    at_least: float = -math.inf,
    surely: bool = False,
) -> Criterion:
    """Passed when the value lies within the bounds, or `surely` when its whole interval does too.

    A value that does not exist (NaN) passes nothing.
    """
    value, low, high = (float(np.asarray(part)) for part in estimate)
    bounded = math.isfinite(at_most) or math.isfinite(at_least)
    judged = (low, value, high) if surely else (value,)
    passed = all(at_least <= each <= at_most for each in judged) if bounded else None
    return Criterion(name, value, low, high, expected, passed)


def censored(name: str, data: xr.Dataset) -> Criterion:
    """Reports how many modes of a measurement never come to be learned: a slope leaves them out."""
    t = dynamics.times_of(data)(dynamics.strength(data).mean((0, 1)))
    count = np.asarray(np.isnan(t).sum(), np.float64)
    said = f"modes that never reach {data.attrs['p']:g}: a slope is of the others"
    return criterion(f"{name}_censored_modes", dynamics.Estimate(count, count, count), said)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper that a study tests."""

    says: str
    criterion: str
    """The criterion that judges it, by name."""
    figure: str
    """The figure that shows it, by name."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Figures of merit to be set side by side: criteria called ROW_COLUMN."""

    title: str
    rows: Mapping[str, str]
    """Name: what the table calls it."""
    columns: Mapping[str, str]
    figure: str
    """The figure that shows it, by name."""


@dataclasses.dataclass(frozen=True)
class Study:
    """A study, as the module-level name `study` of a file in experiments/ defines it."""

    name: str
    presets: Mapping[str, Any]
    """Configurations by name, "quick" among them: frozen dataclasses of one type."""
    plan: Callable[[Any], Plan]
    criteria: Callable[[Any, RunFolder], Iterable[Criterion]]
    """`criteria(config, run)` from what is stored."""
    section: str = ""
    """Where the paper has it: the order in which a folder of studies is run and reported."""
    claims: Sequence[Claim] = ()
    """Of the paper, for `metadyn claims`."""
    tables: Sequence[Table] = ()

    def changed(self, **fields: Any) -> Plan:
        """What the quick preset plans with some fields of its configuration changed."""
        return self.plan(dataclasses.replace(self.presets["quick"], **fields))

    def beside(self, name: str, contender: Callable[[Any], Contender]) -> Study:
        """This study, called `name`, with one more learner, `contender(config)`, in every figure.

        It is measured on each set of tasks that Bayes is measured on.
        """

        def plan(config: Any) -> Plan:
            base = self.plan(config)
            sets = [tasks for tasks, other in base.measurements if other is base.trainings[0].bayes]
            more = [(tasks, contender(config)) for tasks in sets]
            return dataclasses.replace(base, measurements=[*base.measurements, *more])

        return dataclasses.replace(self, name=name, plan=plan)


def load_study(path: str) -> Study:
    """The study a Python file defines. Raises `ConfigError` if there is none."""
    if not os.path.isfile(path):  # False too for what cannot be a path
        raise ConfigError(f"study = {path!r}: there is no such file")
    name = f"metadyn_study_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path, loader=SourceFileLoader(name, path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and their docstrings are looked up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise ConfigError(f"study = {path!r}: cannot be imported ({said})") from error
    found = getattr(module, "study", None)
    if not isinstance(found, Study):
        raise ConfigError(f"study = {path!r}: defines no `study = metadyn.Study(...)`")
    return found


def load_studies(folder: str) -> list[Study]:
    """The studies that the Python files of a folder define, in the paper's order.

    Raises `ConfigError` if one of them defines none, or there is none.
    """
    studies = [load_study(str(path)) for path in sorted(Path(folder).glob("*.py"))]
    if not studies:
        raise ConfigError(f"study = {folder!r}: the folder holds no studies")
    return sorted(studies, key=lambda study: (study.section or "~", study.name))


def stream(key: Key, name: str) -> Key:
    """An independent key for each named purpose."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


class _Runner:
    """One study being run into one folder."""

    def __init__(
        self, plan: Plan, run: RunFolder, seed: int, progress: Progress, tensorboard: bool
    ):
        self.plan, self.store, self.progress = plan, run, progress
        self.tensorboard = run.tensorboard if tensorboard else None
        self.key = jax.random.key(seed)
        self.trainings = {t.learner.name: t for t in plan.trainings}

    def arrays(
        self, tasks: TaskSet, contender: Contender, params: Mapping[str, Params]
    ) -> dict[str, jax.Array]:
        """[seed,] task, time, ..."""
        return inner.measure(
            tasks.domain,
            contender.make,
            params[contender.name] if contender.trained else (),
            contender.trained,
            tasks.sample,
            tasks.argument,
            stream(self.key, tasks.name),
            jnp.arange(tasks.size),
            contender.times,
            tasks.probe,
            self.plan.chunk,
        )

    def about(self, tasks: TaskSet, contender: Contender) -> dict[str, Any]:
        """The description of those arrays."""
        lead: tuple[str, ...] = ()
        params: Params = ()
        if contender.trained:
            lead = ("seed",)
            shapes = jax.eval_shape(self.trainings[contender.name].trainee.meta.init, self.key)
            params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        learner = contender.make(params)
        axes = inner.reading_axes(learner, tasks.probe)
        return describe(
            {name: (*lead, "task", "step", *rest) for name, rest in axes.items()},
            {"time": ("step", contender.times), **tasks.coords},
            {
                "learner": contender.name,
                "label": contender.label,
                "clock": learner.clock,
                "panel": contender.panel,
                "loss_floor": tasks.domain.loss_floor,
                **tasks.attrs,
            },
        )

    def train(self) -> Mapping[str, Params]:
        """Trains from the newest checkpoint, or from the start; stores as it goes."""
        plan, store = self.plan, self.store
        trainees = {name: t.trainee for name, t in self.trainings.items()}
        trainer = Trainer(trainees, plan.outer, stream(self.key, "training"))
        watched = [(s, t.learner) for t in plan.trainings for s in (t.tracked, t.heldout)]
        about = {tasks.name: self.about(tasks, learner) for tasks, learner in watched}

        def save(state: TrainState, scheduled: bool = True) -> None:
            trajectories = None
            if scheduled:
                trajectories = {
                    tasks.name: self.arrays(tasks, learner, state.params)
                    for tasks, learner in watched
                }
            store.save_checkpoint(int(state.step), state, trajectories, about)

        mesh.by_first(lambda: store.set_aside_unscheduled(plan.outer.checkpoint_steps))
        sound = mesh.by_first(store.sound_steps)

        def before(target: int) -> int:
            """The last sound checkpoint before an outer step."""
            return max(step for step in sound if step < target)

        first, *schedule = plan.outer.checkpoint_steps
        if first not in sound:
            save(trainer.init())
            store.finish()
            sound.append(first)
        for each in plan.trainings:  # first, so that a live run can be compared with it
            self.measure(each.tracked, each.bayes)
        excess_over = {name: self.excess(t) for name, t in self.trainings.items()}
        episodes = plan.outer.batch * plan.outer.seeds * len(trainees)
        end = plan.outer.steps
        reached = before(next((step for step in schedule if step not in sound), end + 1))
        state: TrainState | None = None
        with (
            self.progress.training(end, reached) as show,
            scalars(self.tensorboard, reached) as log,
            _held() as held,
        ):
            for target in schedule:
                if target in sound:  # while an earlier one, damaged, was not
                    store.finish()
                    state = None
                    continue
                start = state or store.restore_state(before(target), trainer.abstract)
                for state, loss in trainer.run(start, [target]):
                    step = int(state.step)
                    mean = {name: float(np.mean(each)) for name, each in loss.items()}
                    excess = {name: excess_over[name](value) for name, value in mean.items()}
                    show(step, loss=mean, excess=excess, episodes=step * episodes)
                    log(step, {f"loss/{name}": value for name, value in mean.items()})
                    log(step, {f"excess_loss/{name}": value for name, value in excess.items()})
                    stop = mesh.anywhere(held())
                    if step == target or stop:
                        save(state, scheduled=step == target)
                    if stop:
                        store.finish()
                        mesh.leave()
                        raise KeyboardInterrupt
        store.finish()
        return (state or store.restore_state(end, trainer.abstract)).params

    def excess(self, training: Training) -> Callable[[float], float]:
        """What turns a loss on the training distribution into the excess over Bayes."""
        tasks, bayes = training.heldout, training.bayes
        self.measure(tasks, bayes)
        losses = self.store.measurement(tasks.name, bayes.name)["loss"]
        best, floor = float(losses.isel(step=slice(1, None)).mean()), tasks.domain.loss_floor
        return lambda loss: float(dynamics.excess_loss(loss, best, floor))

    def measure(
        self,
        tasks: TaskSet,
        contender: Contender,
        params: Mapping[str, Params] = MappingProxyType({}),
    ) -> None:
        """Makes and stores a measurement, unless it is stored already."""
        if mesh.by_first(lambda: self.store.has_measurement(tasks.name, contender.name)):
            return
        arrays: dict[str, Any] = dict(self.arrays(tasks, contender, params))
        about = self.about(tasks, contender)
        curve = self.plan.curves.get((tasks.name, contender.name))
        if curve is not None:
            arrays["closed_form"] = curve
            about["axes"]["closed_form"] = ["step", "mode"]
        self.store.save_measurement(tasks.name, contender.name, arrays, about)

    def measure_all(self, params: Mapping[str, Params]) -> None:
        """Every measurement of the plan that is not stored yet."""
        wanted = self.plan.measurements
        with self.progress.counting("measuring", len(wanted)) as show:
            for tasks, contender in wanted:
                show(f"{contender.label} on {tasks.name}")
                self.measure(tasks, contender, params)


def run_study(
    study: Study,
    preset: str,
    seed: int,
    config: Any,
    out: str | Path,
    progress: Progress,
    tensorboard: bool = False,
) -> dict[str, Any]:
    """Does the whole study into `out`, or what is left of it, and returns its summary.

    What is damaged in a folder is made anew. Raises `ConfigError` for a folder that is in use,
    foreign, of another configuration or cannot be written, and KeyboardInterrupt once what was
    interrupted is stored.
    """
    plan = study.plan(config)
    asked = {
        "study": study.name,
        "preset": preset,
        "seed": seed,
        "config": dataclasses.asdict(config),
    }
    try:
        mesh.by_first(lambda: RunFolder.create(out, asked).config)
        run = RunFolder(out)
        with ExitStack() as stack:
            mesh.by_first(lambda: stack.enter_context(run.locked()))
            done = mesh.by_first(run.summary)
            if done and mesh.by_first(run.is_sound):
                return done
            begun = time.monotonic()
            runner = _Runner(plan, run, seed, progress, tensorboard and mesh.first())
            runner.measure_all(runner.train())

            def conclude() -> dict[str, Any]:
                criteria = list(study.criteria(config, run))
                figures.draw(run)
                seconds = round(time.monotonic() - begun, 1)
                summary = {
                    "study": study.name,
                    "preset": preset,
                    "seed": seed,
                    "environment": environment() | {"seconds": seconds},
                    "criteria": [_as_json(c) for c in criteria if c.passed is not None],
                    "reported": [_as_json(c) for c in criteria if c.passed is None],
                }
                run.write_summary(summary)
                return summary

            return mesh.by_first(conclude)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror})") from error


def environment() -> dict[str, Any]:
    """Versions and devices, for the record."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": mesh.processor(),
        **{name: version(name) for name in PACKAGES},
        **mesh.describe(),
    }


def _as_json(criterion: Criterion) -> dict[str, Any]:
    fields = dataclasses.asdict(criterion)
    fields = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()
    }
    if fields["passed"] is None:
        del fields["passed"]
    return fields


@contextmanager
def _held() -> Iterator[Callable[[], bool]]:
    """Holds Ctrl-C back until the caller asks whether it came; a second one gets through."""
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    try:
        before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where signals never arrive
        before = {}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
