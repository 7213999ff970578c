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
from contextlib import ExitStack, contextmanager, suppress
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
from metadyn.store import Results, RunFolder
from metadyn.study import Comparison, Contender, Criterion, Plan, Study
from metadyn.tensorboard import check_installed, scalars

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
        self.key, chunk = jax.random.key(seed), plan.comparisons[0].measure.chunk
        self.given: dict[str, Any] = {"key": stream(self.key, "evaluation"), "chunk": chunk}
        self.compiling = ThreadPoolExecutor(os.cpu_count())

    def prepare(self, loop: OuterLoop) -> None:
        """Begins to compile all programs, on every core, and waits for that of the outer step.

        Raises `ConfigError` if that cannot fit into the memory, by the compiler's own account.
        """
        if jax.process_count() > 1:
            return

        def compiled(part: Comparison, tasks: TaskSet, contender: Contender) -> None:
            params = loop.abstract.params.get((contender.of or contender.name) + part.suffix, ())
            inner.measure.lower(*calls(tasks, contender, params, **self.given)[0]).compile()

        outer_steps = [self.compiling.submit(check_compiled, loop, name) for name in loop.trained]
        for part, tasks, contender in self.plan.every:
            if not self.store.has_measurement(tasks.name, contender.name):
                self.compiling.submit(compiled, part, tasks, contender)
        with self.progress.counting("compiling", len(outer_steps)) as show:
            for name, each in zip(loop.trained, outer_steps, strict=True):
                show(name)
                each.result()

    def train(self) -> Mapping[str, Params]:
        """Trains from the newest checkpoint, or from the start; stores as it goes."""
        plan, store = self.plan, self.store
        if not plan.trained:
            return {}
        loop = OuterLoop(plan.trained, plan.outer, stream(self.key, "training"))
        watched = [(part, tasks) for part in plan.comparisons for tasks in part.watched]
        described = {
            (tasks.name, meta.name): (meta.name + part.suffix, _described(part, tasks, meta))
            for part, tasks in watched
            for meta in part.metas
        }
        scheduled, end = plan.outer.checkpoint_steps, plan.outer.steps
        stored = mesh.by_first(store.steps)
        state: TrainState | None = None

        def save(state: TrainState) -> None:
            step, trajectories = int(state.step), None
            if step in scheduled:
                trajectories = {
                    tasks.name: {
                        meta.name: readings(
                            tasks, meta, state.params[meta.name + part.suffix], **self.given
                        )
                        for meta in part.metas
                    }
                    for part, tasks in watched
                }
            about: dict[str, dict[str, Any]] = {}
            for (task_set, learner), (name, each) in described.items():
                taken = {"seconds": round(loop.seconds[name], 3)}
                about.setdefault(task_set, {})[learner] = each | {"about": each["about"] | taken}
            store.save_checkpoint(step, state, trajectories, about)
            stored.append(step)

        def newest(before: int) -> TrainState:
            """The last stored state before an outer step: the one at hand, or one that is read."""
            step = max(each for each in stored if each < before)
            if state is not None and int(state.step) == step:
                return state
            store.finish()
            for (task_set, learner), (name, _) in described.items():
                loop.seconds[name] = store.about(step)[task_set][learner]["about"]["seconds"]
            return store.restore_state(step, loop.abstract)

        if not set(scheduled) <= set(stored):
            self.prepare(loop)
        if 0 not in stored:
            state = loop.init()
            save(state)
        bayes = self.measure_bayes()
        missing = [step for step in scheduled if step not in stored]
        reached = max(step for step in stored if step < min(missing, default=end + 1))
        batches = [(each.own or plan.outer).batch for each in plan.trained.values()]
        episodes = sum(batches) * plan.outer.seeds
        with (
            self.progress.training(end, reached) as show,
            scalars(self.tensorboard, max(stored)) as log,
            _held() as held,
        ):
            for target in missing:
                for state, metrics in loop.run(newest(target), [target]):
                    step = int(state.step)
                    shown = {
                        name: {what: float(np.mean(value)) for what, value in each.items()}
                        for name, each in metrics.items()
                    }
                    for name, each in shown.items():
                        if "loss" in each:
                            excess = dynamics.excess_loss(each["loss"], *bayes[name])
                            each["excess_loss"] = float(excess)
                        log(step, {f"{what}/{name}": value for what, value in each.items()})
                    show(step, shown, episodes)
                    stop = mesh.anywhere(held())
                    if step == target or stop:
                        save(state)
                    if stop:
                        store.finish()
                        mesh.leave()
                        raise KeyboardInterrupt
        store.finish()
        return newest(end + 1).params

    def measure_bayes(self) -> dict[str, tuple[float, float]]:
        """Measures Bayes where meta-learners are followed, so that a live run can be compared.

        Returns Bayes' loss on the training distribution and its floor, by the meta-learner's name.
        """
        found = {}
        for part in self.plan.comparisons:
            for tasks in part.watched:
                self.measure(part, tasks, part.bayes)
            if part.metas:
                self.store.finish()
                losses = self.store.measurement(part.heldout.name, part.bayes.name)["loss"]
                best = float(losses.isel(step=slice(1, None)).mean())
                for meta in part.metas:
                    found[meta.name + part.suffix] = best, part.domain.loss_floor
        return found

    def measure(
        self, part: Comparison, tasks: TaskSet, contender: Contender, params: Params = ()
    ) -> None:
        """Makes and stores a measurement, unless it is stored already."""
        names = tasks.name, contender.name
        if not mesh.by_first(lambda: self.store.has_measurement(*names)):
            arrays = readings(tasks, contender, params, **self.given)
            self.store.save_measurement(*names, arrays, _described(part, tasks, contender))

    def measure_all(self, params: Mapping[str, Params]) -> None:
        """Makes every measurement of the plan that is not stored yet."""
        wanted = [(part, *pair) for part in self.plan.comparisons for pair in part.measurements]
        with self.progress.counting("measuring", len(wanted)) as show:
            for part, tasks, contender in wanted:
                show(f"{contender.label} on {tasks.name}")
                name = (contender.of or contender.name) + part.suffix
                self.measure(part, tasks, contender, params.get(name, ()))
        self.store.finish()


def _described(part: Comparison, tasks: TaskSet, contender: Contender) -> dict[str, Any]:
    """The description of a measurement, with the contender's place in the comparison's figures."""
    names = [each.name for each in part.contenders]
    place = names.index(contender.name) if contender.name in names else len(names)
    return described(tasks, contender, place, part.title, part.followed)


# What is checked before training.


def _weights(meta: Any) -> list[jax.ShapeDtypeStruct]:
    return jax.tree.leaves(jax.eval_shape(meta.init, jax.random.key(0)))


def check_memory(plan: Plan) -> None:
    """Raises `ConfigError`, naming the option to lower, for what cannot fit into the memory."""
    outer = plan.outer
    for contender in (meta for part in plan.comparisons for meta in part.metas):
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in _weights(contender.learner))
        what = f"the weights of {contender.name} and what trains them"  # moments, gradient
        fits(what, 4 * outer.seeds * size, contender.option or "outer.seeds")
    for _, tasks, contender in plan.every:
        needed = 2 * bytes_needed(tasks, contender, outer.seeds)  # with a copy
        times, size = len(contender.times_in(tasks.domain)), tasks.size_for(contender.clock)
        what = f"{contender.name} on {size:,} tasks of {tasks.name!r} at {times:,} times"
        by_time = times > size and contender.times is None
        option = "measure.updating_tasks" if size < tasks.size else tasks.option
        field = "steps" if by_time else option or "size"
        fits(what, needed, field, tasks.domain.steps if by_time else None, split=True)


def outline(plan: Plan) -> dict[str, Any]:
    """What a plan asks for, in short: kept with a run, which no other plan is to go on with."""
    asked: dict[str, Any] = {
        name: {"parameters": sum(leaf.size for leaf in _weights(each.meta))}
        for name, each in plan.trained.items()
    }
    for _, tasks, contender in plan.every:
        times = contender.times_in(tasks.domain)
        asked[f"{contender.name} on {tasks.name}"] = {
            "label": contender.label,
            "kind": contender.kind,
            "tasks": tasks.size_for(contender.clock),
            "times": [len(times), times[-1]],
            "modes": {name: list(probe.modes.values) for name, probe in tasks.probes.items()},
        }
    return asked


def check_compiled(loop: OuterLoop, name: str) -> None:
    """Compiles the outer step of a meta-learner; raises `ConfigError` if by its account it cannot
    fit into the memory."""
    compiled = loop.advance.lower(loop.abstract.only(name), jax.numpy.int32(1)).compile()
    account = compiled.memory_analysis()
    if account is not None:
        used = account.temp_size_in_bytes + account.argument_size_in_bytes
        own = loop.trained[name].own
        field = "outer.batch" if own is None or own.batch == loop.config.batch else "outer_batch"
        fits(f"an outer step of {name}", used, field)


def rehearse(study: Study, config: Any, plan: Plan) -> None:
    """Raises `ConfigError` unless the criteria and the study's figures can be had of the plan.

    They are made of measurements of the shapes planned, with few tasks and made-up numbers: so a
    name that is not measured, or a figure that cannot be drawn, is found before training.
    """
    steps = np.array(plan.outer.checkpoint_steps[-3:])
    sets: dict[str, list[str]] = {}
    planned = {}
    for part, tasks, contender in plan.every:
        sets.setdefault(tasks.name, []).append(contender.name)
        at = steps if contender.trained and tasks in part.watched else None
        made_of = _described(part, tasks, contender), min(4, tasks.size), at
        planned[tasks.name, contender.name] = made_of
    results = Results(sets, lambda *names: _made_up(*planned[names]))
    study.judged(config, results)
    for draw in study.own_figures().values():
        draw(results)


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

    if tensorboard:
        check_installed()
    plan = study.plan(config)
    identity = {"study": study.name, "preset": preset, "seed": seed}
    asked = {**identity, "config": dataclasses.asdict(config), "plan": outline(plan)}
    check_memory(plan)
    rehearse(study, config, plan)
    try:
        mesh.by_first(lambda: RunFolder.create(out, asked).config)
        run = RunFolder(out)
        with ExitStack() as stack:
            mesh.by_first(lambda: stack.enter_context(run.locked()))
            done = mesh.by_first(run.summary)
            if mesh.by_first(run.set_aside_damaged) and done:
                return done
            begun = time.monotonic()
            runner = _Runner(plan, run, seed, progress, tensorboard and mesh.first())
            stack.callback(runner.compiling.shutdown, wait=False, cancel_futures=True)
            runner.measure_all(runner.train())

            def conclude() -> dict[str, Any]:
                results = run.results()
                with progress.counting("judging", 1) as show:
                    show("criteria")
                    criteria = study.judged(config, results)
                figures.draw(run.figures, results, study.own_figures(), progress)
                seconds = round(time.monotonic() - begun, 1)
                summary = {
                    **identity,
                    "environment": environment() | {"seconds": seconds},
                    "criteria": [_as_json(c) for c in criteria if c.passed is not None],
                    "reported": [_as_json(c) for c in criteria if c.passed is None],
                }
                run.write_summary(summary)
                view.write(run)
                return summary

            return mesh.by_first(conclude)
    except BrokenPipeError:  # of our output, not of DIR
        raise
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
    row = dataclasses.asdict(criterion)
    for name in ("value", "low", "high"):
        row[name] = row[name] if math.isfinite(row[name]) else None
    if criterion.passed is None:
        del row["passed"], row["verdict"]
    return row


@contextmanager
def _held() -> Iterator[Callable[[], bool]]:
    """Holds Ctrl-C back until the caller asks whether it came; a second one gets through."""
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    with ExitStack() as stack:
        with suppress(ValueError):  # not in the main thread, where signals never arrive
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.signal(number, note))
        yield lambda: bool(came)
    if came:  # after the caller last asked
        raise KeyboardInterrupt
