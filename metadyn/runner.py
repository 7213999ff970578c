"""What `metadyn run` does with a study: check, train, measure, store, draw, judge; and resume."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import signal
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xarray as xr

from metadyn import dynamics, inner, labelled, mesh
from metadyn.base import Key, Params, TaskSet
from metadyn.errors import ConfigError
from metadyn.measuring import bytes_needed, calls, described, fits, readings
from metadyn.outer import OuterLoop, TrainState
from metadyn.progress import Progress
from metadyn.scalars import scalars
from metadyn.store import Results, RunFolder
from metadyn.study import Comparison, Contender, Criterion, Plan, Study

PACKAGES = ("metadyn", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "xarray")


def stream(key: Key, name: str) -> Key:
    """An independent key for each named purpose: "training" and "evaluation"."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


class _Runner:
    """One plan being run into one folder."""

    def __init__(
        self, plan: Plan, run: RunFolder, seed: int, progress: Progress, tensorboard: bool
    ):
        self.plan, self.store, self.progress = plan, run, progress
        self.tensorboard = run.tensorboard if tensorboard else None
        self.key = jax.random.key(seed)
        self.chunk = plan.comparisons[0].measure.chunk
        self.places = _places(plan)
        self.names = {id(c): c.name + part.suffix for part, _, c in plan.every}
        self.compiling = ThreadPoolExecutor(os.cpu_count())

    def readings(self, tasks: TaskSet, contender: Contender, params: Params) -> dict[str, Any]:
        """[seed,] task, time, ...; of tasks that are the same whatever the set is called."""
        return readings(tasks, contender, params, stream(self.key, "evaluation"), self.chunk)

    def prepare(self, loop: OuterLoop) -> None:
        """Begins to compile all programs, on every core, and waits for that of the outer step.

        Raises `ConfigError` if that cannot fit into the memory, by the compiler's own account.
        """
        if jax.process_count() > 1:
            return
        key = stream(self.key, "evaluation")

        def compiled(tasks: TaskSet, contender: Contender) -> None:
            params = loop.abstract.params[self.names[id(contender)]] if contender.trained else ()
            given = calls(tasks, contender, params, key, self.chunk)[0]
            inner.measure.lower(*given).compile()

        outer_step = self.compiling.submit(check_compiled, loop)
        for _, tasks, contender in self.plan.every:
            if not self.store.has_measurement(tasks.name, contender.name):
                self.compiling.submit(compiled, tasks, contender)
        outer_step.result()

    def described(self, tasks: TaskSet, contender: Contender) -> dict[str, Any]:
        """The description of those readings."""
        return described(tasks, contender, *self.places[tasks.name, contender.name])

    def train(self) -> Mapping[str, Params]:
        """Trains from the newest checkpoint, or from the start; stores as it goes."""
        plan, store = self.plan, self.store
        trained = plan.trained
        if not trained:
            return {}
        loop = OuterLoop(trained, plan.outer, stream(self.key, "training"))
        watched = [
            (tasks, contender, contender.name + part.suffix)
            for part in plan.comparisons
            for contender in part.metas
            for tasks in (part.tracked, part.heldout)
        ]
        about = _nested((t.name, c.name, self.described(t, c)) for t, c, _ in watched)

        def save(state: TrainState, scheduled: bool = True) -> None:
            trajectories = None
            if scheduled:
                trajectories = _nested(
                    (t.name, c.name, self.readings(t, c, state.params[name]))
                    for t, c, name in watched
                )
            store.save_checkpoint(int(state.step), state, trajectories, about)

        mesh.by_first(lambda: store.set_aside_unscheduled(plan.outer.checkpoint_steps))
        sound = mesh.by_first(store.sound_steps)

        def before(target: int) -> int:
            """The last sound checkpoint before an outer step."""
            return max(step for step in sound if step < target)

        first, *schedule = plan.outer.checkpoint_steps
        if not {first, *schedule} <= set(sound):
            self.prepare(loop)
        if first not in sound:
            save(loop.init())
            store.finish()
            sound.append(first)
        excess_over: dict[str, Callable[[float], float]] = {}
        for part in plan.comparisons:  # Bayes first, so that a live run can be compared with it
            if part.metas:
                self.measure(part.tracked, part.bayes)
                excess_over |= dict.fromkeys(
                    (c.name + part.suffix for c in part.metas), self.excess(part)
                )
        episodes = plan.outer.batch * plan.outer.seeds * len(trained)
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
                start = state or store.restore_state(before(target), loop.abstract)
                for state, metrics in loop.run(start, [target]):
                    step = int(state.step)
                    shown = {
                        name: {what: float(np.mean(value)) for what, value in each.items()}
                        for name, each in metrics.items()
                    }
                    for name, each in shown.items():
                        if "loss" in each:
                            each["excess_loss"] = excess_over[name](each["loss"])
                        log(step, {f"{what}/{name}": value for what, value in each.items()})
                    show(step, shown, episodes)
                    stop = mesh.anywhere(held())
                    if step == target or stop:
                        save(state, scheduled=step == target)
                    if stop:
                        store.finish()
                        mesh.leave()
                        raise KeyboardInterrupt
        store.finish()
        return (state or store.restore_state(end, loop.abstract)).params

    def excess(self, part: Comparison) -> Callable[[float], float]:
        """What turns a loss on the training distribution into the excess over Bayes."""
        self.measure(part.heldout, part.bayes)
        self.store.finish()
        losses = self.store.measurement(part.heldout.name, part.bayes.name)["loss"]
        best, floor = float(losses.isel(step=slice(1, None)).mean()), part.domain.loss_floor
        return lambda loss: float(dynamics.excess_loss(loss, best, floor))

    def measure(self, tasks: TaskSet, contender: Contender, params: Params = ()) -> None:
        """Makes and stores a measurement, unless it is stored already."""
        if mesh.by_first(lambda: self.store.has_measurement(tasks.name, contender.name)):
            return
        arrays: dict[str, Any] = dict(self.readings(tasks, contender, params))
        about = self.described(tasks, contender)
        if "closed_form" in about["axes"]:
            arrays["closed_form"] = contender.curve
        self.store.save_measurement(tasks.name, contender.name, arrays, about)

    def measure_all(self, params: Mapping[str, Params]) -> None:
        """Every measurement of the plan that is not stored yet."""
        wanted = [
            (tasks, contender, params.get(contender.name + part.suffix, ()))
            for part in self.plan.comparisons
            for tasks, contender in part.measurements
        ]
        with self.progress.counting("measuring", len(wanted)) as show:
            for tasks, contender, own in wanted:
                show(f"{contender.label} on {tasks.name}")
                self.measure(tasks, contender, own)
        self.store.finish()


def _places(plan: Plan) -> dict[tuple[str, str], tuple[int, str, bool]]:
    """The place in figures of each learner on each set, with its comparison's title."""
    places = {}
    for part, tasks, contender in plan.every:
        known = [each.name for each in part.contenders]
        place = known.index(contender.name) if contender.name in known else len(known)
        places[tasks.name, contender.name] = place, part.title, part.followed
    return places


def _nested(rows: Any) -> dict[str, dict[str, Any]]:
    nested: dict[str, dict[str, Any]] = {}
    for task_set, learner, value in rows:
        nested.setdefault(task_set, {})[learner] = value
    return nested


# What is checked before training.


def check_memory(plan: Plan) -> None:
    """Raises `ConfigError`, naming the option to lower, for what cannot fit into the memory."""
    outer = plan.outer
    for part in plan.comparisons:
        for contender in part.metas:
            weights = jax.eval_shape(contender.learner.init, jax.random.key(0))
            size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
            what = f"the weights of {contender.name} and what trains them"  # moments, gradient
            field = contender.option.removeprefix("--") or "outer.seeds"
            fits(what, 4 * outer.seeds * size * mesh.copies(), field)
    for _, tasks, contender in plan.every:
        needed = bytes_needed(tasks, contender, outer.seeds) // mesh.splits()
        times, size = len(contender.times_in(tasks.domain)), tasks.size_for(contender.clock)
        what = f"{contender.name} on {size:,} tasks of {tasks.name!r} at {times:,} times"
        by_time = times > size and contender.times is None
        option = "measure.updating_tasks" if size < tasks.size else tasks.option.removeprefix("--")
        field = "steps" if by_time else option or "size"
        fits(what, 2 * needed, field, tasks.domain.steps if by_time else None)  # and a copy


def outline(plan: Plan) -> dict[str, Any]:
    """What a plan asks for, in short: kept with a run, which no other plan is to go on with."""
    shapes = jax.eval_shape(
        lambda key: {n: t.meta.init(key) for n, t in plan.trained.items()}, jax.random.key(0)
    )
    asked: dict[str, Any] = {
        name: {"parameters": sum(leaf.size for leaf in jax.tree.leaves(of))}
        for name, of in shapes.items()
    }
    for _, tasks, contender in plan.every:
        times, probes = contender.times_in(tasks.domain), tasks.probes.items()
        asked[f"{contender.name} on {tasks.name}"] = {
            "label": contender.label,
            "kind": contender.kind,
            "tasks": tasks.size_for(contender.clock),
            "times": [len(times), times[-1]],
            "modes": {name: list(probe.modes.values) for name, probe in probes},
        }
    return asked


def check_compiled(loop: OuterLoop) -> None:
    """Compiles the outer step, and raises `ConfigError` if by its own account it cannot fit."""
    compiled = loop.advance.lower(loop.abstract, jax.numpy.int32(1)).compile()
    account = compiled.memory_analysis()
    if account is not None:
        used = account.temp_size_in_bytes + account.argument_size_in_bytes
        fits("an outer step", used * mesh.copies(), "outer.batch")


def rehearse(study: Study, config: Any, plan: Plan) -> None:
    """Raises `ConfigError` unless the criteria and the study's figures can be had of the plan.

    They are made of measurements of the shapes planned, with few tasks and made-up numbers: so a
    name that is not measured, or a figure that cannot be drawn, is found before training.
    """
    places = _places(plan)
    planned = {(t.name, c.name): (t, c) for _, t, c in plan.every}
    watched = {tasks.name for part in plan.comparisons for tasks in (part.tracked, part.heldout)}
    sets: dict[str, list[str]] = {}
    for task_set, learner in planned:
        sets.setdefault(task_set, []).append(learner)
    about = {pair: described(t, c, *places[pair]) for pair, (t, c) in planned.items()}
    steps = np.array(plan.outer.checkpoint_steps[-3:])

    def read(task_set: str, learner: str) -> xr.Dataset:
        tasks, contender = planned[task_set, learner]
        tracked = contender.trained and task_set in watched
        return _made_up(about[task_set, learner], min(4, tasks.size), steps if tracked else None)

    results = Results(sets, read)
    try:
        criteria = list(study.criteria(config, results))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"study {study.name!r}: its criteria cannot be had ({_said(error)})"
        ) from error
    names = [each.name for each in criteria]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"study {study.name!r}: two criteria are called {name!r}: rename one")
    for name, draw in study.figures.items():
        try:
            draw(results)
        except Exception as error:
            said = f"figure {name!r} cannot be drawn"
            raise ConfigError(f"study {study.name!r}: {said} ({_said(error)})") from error


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _made_up(about: dict[str, Any], tasks: int, outer_steps: np.ndarray | None) -> xr.Dataset:
    """Measurements as described: strengths that rise in the order of the modes, falling losses."""
    rng = np.random.default_rng(0)
    coords = about["coords"].values()
    sizes = {"seed": 2, "task": tasks} | {axis: len(values) for axis, values in coords}
    if outer_steps is not None:
        about = about | {"axes": {n: ["outer_step", *a] for n, a in about["axes"].items()}}
        about = about | {"coords": about["coords"] | {"outer_step": ["outer_step", outer_steps]}}
        sizes["outer_step"] = len(outer_steps)
    arrays = {}
    for name, axes in about["axes"].items():
        value = 0.1 * rng.random([sizes.get(axis, 2) for axis in axes])
        if "step" in axes:
            shape = [sizes["step"] if axis == "step" else 1 for axis in axes]
            rise = np.linspace(0, 1.2, sizes["step"]).reshape(shape)
            value += about["about"]["loss_floor"] + 1 - rise / 2 if name == "loss" else rise
        arrays[name] = value
    return labelled.labelled(arrays, about)


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

    What is damaged in a folder is made anew. Raises `ConfigError` for what can be known not to work
    before DIR is made; for a folder that is in use, foreign, of another configuration or cannot be
    written; and KeyboardInterrupt once what was interrupted is stored.
    """
    from metadyn import figures, view

    plan = study.plan(config)
    asked = {
        "study": study.name,
        "preset": preset,
        "seed": seed,
        "config": dataclasses.asdict(config),
        "plan": outline(plan),
    }
    check_memory(plan)
    rehearse(study, config, plan)
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
            stack.callback(runner.compiling.shutdown, wait=False, cancel_futures=True)
            runner.measure_all(runner.train())

            def conclude() -> dict[str, Any]:
                results = run.results()
                criteria = list(study.criteria(config, results))
                figures.draw(run.figures, results, study.figures)
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
                view.write(run)
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
    if came:  # after the caller last asked
        raise KeyboardInterrupt
