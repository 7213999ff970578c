"""What `metadyn run` does with a study: check, train, measure, store, draw, judge; and resume."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import signal
import time
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xarray as xr

from metadyn import dynamics, inner, mesh, program_cost, trajectories
from metadyn.base import Key, Params, TaskSet
from metadyn.errors import ConfigError, ConfigWarning, check_seed, error_context
from metadyn.measuring import (
    bytes_needed,
    calls,
    check_step,
    described,
    program_key,
    readings,
    require_memory,
    training_bytes,
    weights,
)
from metadyn.options import options_of
from metadyn.outer import OuterConfig, OuterLoop, TrainState
from metadyn.progress import Progress
from metadyn.store import Results, RunFolder, finite
from metadyn.study import Contender, Criterion, Measurement, Plan, Study
from metadyn.tensorboard import check_installed, scalars

CHECKPOINT_SECONDS = 300.0
"""Seconds of training after which the state is stored, whatever checkpoints are planned."""
PACKAGES = ("metadyn", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "xarray")


def stream(key: Key, name: str) -> Key:
    """Derives an independent key for a purpose: "training" or "evaluation"."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


class Runner:
    """One plan being run into one folder, alone or beside others that are trained with it."""

    def __init__(
        self,
        plan: Plan,
        run: RunFolder,
        seed: int,
        progress: Progress,
        tensorboard: bool = False,
        measure: Callable[..., Any] = inner.measure,
        called: str = "",
    ):
        self.plan, self.store, self.progress = plan, run, progress
        self.called = called  # what messages call the setting that it is of a sweep
        self.tensorboard = run.tensorboard if tensorboard else None
        key = jax.random.key(seed)
        self.key, self._measure = stream(key, "evaluation"), measure
        self.loop = OuterLoop(plan.trained, plan.outer, stream(key, "training"))
        self.state: TrainState | None = None
        self.stored: list[int] = mesh.on_main_process(run.steps)
        """The outer steps whose state is stored."""
        self.at_checkpoints = [
            (each, _described(each)) for each in plan.every if each.at_checkpoints
        ]
        """What is measured at every checkpoint, and its description."""
        self.bayes: dict[str, tuple[float, float]] = {}

    def calls(self) -> Iterator[tuple[Measurement, bool, list[tuple[Any, ...]]]]:
        """Yields each measurement, whether it is stored, and the arguments of each of its calls.

        In the place of parameters are their shapes.
        """
        for each in self.plan.every:
            stored = self.store.has_measurement(each.tasks.name, each.contender.name)
            yield each, stored, calls(*each.arguments(self.loop.abstract.params, self.key))

    def prepare(self) -> None:
        """Compiles all programs that are still needed, each once, on every core.

        Raises `ConfigError` if one that trains cannot fit into the memory, by the compiler's own
        account. Several processes would have to agree on an order: they compile as they go.
        """
        if jax.process_count() > 1:
            return
        training = not {*self.plan.outer.checkpoint_steps} <= {*self.stored}
        wanted: dict[Any, tuple[str, Callable[[], Any]]] = {}
        for name in self.loop.trained if training else ():
            wanted[name] = name, partial(check_compiled, self.loop, name)
        for each, stored, (given, *_) in self.calls():
            if not stored and (training or not each.at_checkpoints):
                compiled = lambda given=given: inner.measure.lower(*given).compile()
                wanted.setdefault(program_key(given), (each.called, compiled))
        if not wanted:
            return
        pool = ThreadPoolExecutor(mesh.cores())
        try:
            futures = [(called, pool.submit(make)) for called, make in wanted.values()]
            with self.progress.counting("compiling", len(futures)) as show:
                for called, future in futures:
                    show(called)
                    future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def train_alone(self) -> None:
        """Trains its meta-learners, from the newest checkpoint or from the start."""
        alone = lambda found: ([found[0]], [found[1]])
        run = lambda states, target: map(alone, self.loop.run(states[0], target))
        train([self], lambda: [self.loop.init()], run)

    def save(self, state: TrainState) -> None:
        """Stores the state and, at outer steps for which they are planned, mode trajectories.

        States at other outer steps are forgotten once there are two later ones.
        """
        step = int(state.step)
        planned = self.plan.outer.checkpoint_steps
        for old in [each for each in self.stored[:-1] if each not in planned]:
            mesh.on_main_process(partial(self.store.forget, old))
            self.stored.remove(old)
        about: dict[str, dict[str, Any]] = {}
        found: dict[str, dict[str, Any]] = {}
        for each, description in self.at_checkpoints:
            task_set, learner = each.tasks.name, each.contender.name
            timed = description["about"] | {"seconds": round(self.loop.seconds[each.meta], 3)}
            about.setdefault(task_set, {})[learner] = description | {"about": timed}
            if step in planned:
                found.setdefault(task_set, {})[learner] = self.readings(each, state.params)
        self.store.save_checkpoint(step, state, found or None, about)
        self.stored = sorted([*self.stored, step])
        self.state = state

    def at(self, step: int) -> TrainState:
        """Returns the state at a stored outer step: the one at hand, or one that is read."""
        if self.state is not None and int(self.state.step) == step:
            return self.state
        self.store.finish()
        stored = self.store.about(step) if self.at_checkpoints else {}
        for each, _ in self.at_checkpoints:
            about = stored[each.tasks.name][each.contender.name]["about"]
            self.loop.seconds[each.meta] = about["seconds"]
        return self.store.restore_state(step, self.loop.abstract)

    def means(self, metrics: Reported) -> dict[str, dict[str, float]]:
        """Means over seeds of what training reports, with excess loss over Bayes."""
        shown = {
            name: {what: float(np.mean(value)) for what, value in each.items()}
            for name, each in metrics.items()
        }
        for name, each in shown.items():
            if "loss" in each and name in self.bayes:
                each["excess_loss"] = float(dynamics.excess_loss(each["loss"], *self.bayes[name]))
        return shown

    def measure_bayes(self) -> None:
        """Measures Bayes on tracked and held-out tasks, so that a live run can be compared.

        Keeps Bayes' loss on the training distribution and its floor, by the meta-learner's name.
        """
        for each in self.plan.every:
            if each.watched and not each.at_checkpoints:
                self.measure(each, {})
        for part in self.plan.comparisons:
            if part.metas and part.measure.heldout_tasks:
                self.store.finish()
                measured = self.store.measurement(part.heldout.name, part.bayes.name)
                best = float(dynamics.episode_loss(measured).mean())
                for meta in part.metas:
                    self.bayes[meta.name + part.suffix] = best, part.domain.loss_floor

    def readings(self, wanted: Measurement, trained: Mapping[str, Params]) -> dict[str, Any]:
        """Measures one learner on one set of tasks, given all outer parameters."""
        return readings(*wanted.arguments(trained, self.key), self._measure)

    def measure(self, wanted: Measurement, trained: Mapping[str, Params]) -> None:
        """Makes and stores a measurement, unless it is stored already."""
        names = wanted.tasks.name, wanted.contender.name
        if not mesh.on_main_process(lambda: self.store.has_measurement(*names)):
            found = self.readings(wanted, trained)
            if jax.process_count() == 1:  # else each process has some of the tasks
                lost = ~np.isfinite(np.asarray(found["loss"])[..., 1:]).all(-1)
                if lost.any():
                    said = f"is not finite in {lost.sum():,} of {lost.size:,} episodes"
                    said = f"the loss of {wanted.called} {said}"
                    said = f"{self.called}: {said}" if self.called else said
                    warnings.warn(said, ConfigWarning, stacklevel=2)
            self.store.save_measurement(*names, found, _described(wanted))

    def measure_all(self) -> None:
        """Makes every measurement of the plan that is not stored yet, once it is trained."""
        params = self.at(self.plan.outer.steps).params if self.plan.trained else {}
        wanted = [each for each in self.plan.every if not each.watched]
        with self.progress.counting("measuring", len(wanted)) as show:
            for each in wanted:
                show(f"{each.contender.label} on {each.tasks.name}")
                self.measure(each, params)
        self.store.finish()


Reported = Mapping[str, Mapping[str, Any]]
"""Metrics of each seed by meta-learner, on the devices or as NumPy arrays."""
Dispatches = Iterator[tuple[Sequence[TrainState], Sequence[Reported]]]


def train(
    runners: Sequence[Runner],
    start: Callable[[], Sequence[TrainState]],
    run: Callable[[Sequence[TrainState], int], Dispatches],
    lost: Callable[[int, ConfigError], None] | None = None,
    gone: Collection[int] = (),
) -> None:
    """Trains the meta-learners of a plan, or those of several plans side by side.

    At every checkpoint it stores the state of training and the mode trajectories. It goes on from
    the newest checkpoint that all plans have; all have the same outer steps and checkpoints.
    `start()` returns the state of each plan at outer step 0. `run(states, step)` trains up to an
    outer step, and yields the states and metrics of all plans after each dispatch. Where a metric
    of a plan is no longer finite, `lost(which, error)` is called and the other plans go on; without
    it training ends with that `ConfigError`. Plans in `gone` were lost before, and not trained.
    """
    outer, progress = runners[0].plan.outer, runners[0].progress
    going = {i: each for i, each in enumerate(runners) if i not in gone}
    if not going:
        return

    def stored() -> set[int]:
        return set.intersection(*(set(each.stored) for each in going.values()))

    def save(states: Sequence[TrainState]) -> None:
        for i, each in going.items():
            if int(states[i].step) not in each.stored:
                each.save(states[i])

    def finite(step: int, metrics: Sequence[Reported]) -> None:
        for i, each in [*going.items()]:
            try:
                each.loop.check_finite(step, metrics[i])
            except ConfigError as error:
                if lost is None:
                    raise
                lost(i, error)
                del going[i]

    with progress.counting("starting", 1 + len(going)) as show:
        show("outer step 0")
        if 0 not in stored():
            save(start())
        for each in going.values():
            show("Bayes")
            each.measure_bayes()
    missing = [step for step in outer.checkpoint_steps if step not in stored()]
    reached = max(step for step in stored() if step < min(missing, default=outer.steps + 1))
    episodes = sum(each.loop.episodes for each in runners)
    with (
        progress.training(outer.steps, reached) as advance,
        scalars(runners[0].tensorboard, max(stored())) as log,
        _held() as held,
    ):
        saved = time.monotonic()
        for target in missing:
            newest = max(step for step in stored() if step < target)
            at = {i: each.at(newest) for i, each in going.items()}
            spare = next(iter(at.values()))  # stands in for those that are lost
            for states, metrics in run([at.get(i, spare) for i in range(len(runners))], target):
                step = int(states[0].step)
                finite(step, metrics)
                if not going:
                    break
                shown = {i: each.means(metrics[i]) for i, each in going.items()}
                for values in shown.values():
                    log(step, {f"{w}/{n}": v for n, of in values.items() for w, v in of.items()})
                named = {f"{n}{i or ''}": of for i, each in shown.items() for n, of in each.items()}
                advance(step, named, episodes)
                stop, due = mesh.any_process(held(), time.monotonic() > saved + CHECKPOINT_SECONDS)
                if step == target or stop or due:
                    save(states)
                    saved = time.monotonic()
                if stop:
                    for each in runners:
                        each.store.finish()
                    mesh.shut_down()
                    raise KeyboardInterrupt
            if not going:
                break
    for each in runners:
        each.store.finish()


def _described(measurement: Measurement) -> dict[str, Any]:
    """The description of a measurement, with the contender's place in the comparison's figures."""
    part, tasks, contender, _ = measurement
    names = [each.name for each in part.contenders]
    place = names.index(contender.name) if contender.name in names else len(names)
    return described(tasks, contender, place, part.title, part.followed)


# What is checked before training.


def check_memory(plan: Plan) -> None:
    """Raises `ConfigError`, naming the option to lower, for what cannot fit into the memory."""
    outer = plan.outer
    for contender in (meta for part in plan.comparisons for meta in part.metas):
        each = training_bytes(contender.learner.init)
        many = OuterConfig.seeds * each <= mesh.memory(split=False)  # the usual number fits
        option = "outer.seeds" if many else contender.option or "outer.seeds"
        what = f"the weights of {contender.name} and what trains them"
        require_memory(what, outer.seeds * each, option)
    for _, tasks, contender, _ in plan.every:
        needed = 2 * bytes_needed(tasks, contender, outer.seeds)  # with a copy
        times, size = len(contender.times_in(tasks.domain)), tasks.size_for(contender.clock)
        what = f"{contender.name} on {size:,} tasks of {tasks.name!r} at {times:,} times"
        by_time = times > size and contender.times is None
        option = "measure.updating_tasks" if size < tasks.size else tasks.option
        field = "steps" if by_time else option or "size"
        require_memory(what, needed, field, tasks.domain.steps if by_time else None, split=True)


def plan_summary(plan: Plan) -> dict[str, Any]:
    """Summarises a plan as JSON, so that a run does not go on under a study edited since."""
    asked: dict[str, Any] = {
        name: {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(weights(each.meta.init))),
            "own": each.own and dataclasses.asdict(each.own),
        }
        for name, each in plan.trained.items()
    }
    for _, tasks, contender, _ in plan.every:
        times = contender.times_in(tasks.domain)
        asked[f"{contender.name} on {tasks.name}"] = {
            "label": contender.label,
            "kind": contender.kind,
            "domain": domain_summary(tasks.domain),
            "tasks": tasks.size_for(contender.clock),
            "times": [len(times), times[-1]],
            # No more digits than every processor's LAPACK agrees on: a run may change machines.
            "modes": {
                name: [float(f"{value:.6g}") for value in probe.modes.values]
                for name, probe in tasks.probes.items()
            },
        }
    return asked


def domain_summary(domain: Any) -> dict[str, Any]:
    """Summarises a domain by its kind, and those of its fields that are a number or a word."""
    fields = dataclasses.fields(domain) if dataclasses.is_dataclass(domain) else ()
    found = {field.name: getattr(domain, field.name) for field in fields}
    plain = {name: value for name, value in found.items() if isinstance(value, int | float | str)}
    return {"kind": type(domain).__name__} | plain


def run_config(study: Study, preset: str, seed: int, config: Any, plan: Plan) -> dict[str, Any]:
    """Builds the contents of config.json, by which a run is known that can be gone on with."""
    for option, value in options_of(config):
        with error_context(
            f"{option} = {value!r} cannot be stored: use numbers, words, tuples of them"
        ):
            json.dumps(value)
    identity = {"study": study.name, "preset": preset, "seed": seed}
    return {**identity, "config": dataclasses.asdict(config), "plan": plan_summary(plan)}


def check_compiled(loop: OuterLoop, name: str) -> None:
    """Compiles an outer step of a meta-learner. Raises `ConfigError` if it cannot fit in memory."""
    with error_context(f"an outer step of {name} cannot be compiled", jax.errors.JaxRuntimeError):
        used = program_cost.memory(loop.compiled(name))
    option = loop.trained[name].option("batch")
    require_memory(f"an outer step of {name}", used, option)


def check_traced(plan: Plan) -> None:
    """Raises `ConfigError` unless every learner can take a step, and every objective be had."""
    alike: dict[Any, tuple[TaskSet, Contender]] = {}
    for _, tasks, who, _ in plan.every:
        form = jax.tree.structure(tasks.sample)
        with error_context(f"the domain of {tasks.name!r} cannot be compared with others"):
            alike.setdefault((tasks.domain, form, who.make), (tasks, who))
    for pair in alike.values():
        check_step(*pair)
    check_objectives(plan)


def check_objectives(plan: Plan) -> None:
    """Raises `ConfigError` unless every objective can be had."""
    for name, each in plan.trained.items():
        each.check_traced(name, weights(each.meta.init))


def rehearse(study: Study, config: Any, plan: Plan) -> list[Criterion]:
    """Judges the criteria on made-up numbers, returns them, and draws the figures.

    Raises `ConfigError` if they cannot be had of the plan.

    What is run is traced. Criteria and figures are made of measurements of the shapes
    planned, with few tasks and made-up numbers: so a name that is not measured, or a figure that
    cannot be drawn, is found before training.
    """
    check_traced(plan)
    steps = np.array(plan.outer.checkpoint_steps[-3:])
    sets: dict[str, list[str]] = {}
    planned = {}
    for each in plan.every:
        names = each.tasks.name, each.contender.name
        sets.setdefault(names[0], []).append(names[1])
        at = steps if each.at_checkpoints else None
        planned[names] = _described(each), min(4, each.tasks.size), at
    results = Results(sets, lambda *names: _made_up(*planned[names]))
    criteria = study.judged(config, results)
    from metadyn import figures

    every = figures.of_every_run(results, figures.by_probe(figures.histories(results)))
    for name, figure in every.items():
        with error_context(f"figure {name!r} cannot be drawn"):
            figure()
    for name, draw in study.own_figures().items():
        drawn = draw(results)
        with error_context(f"study {study.name!r}: figure {name!r} cannot be drawn"):
            drawn.draw_without_rendering()
    parts = [word for each in plan.every for word in (each.part.title, each.contender.label)]
    modes = [probe.modes for each in plan.every for probe in each.tasks.probes.values()]
    figures.check_words([*parts, *(word for each in modes for word in (each.axis, each.strength))])
    return criteria


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
    return trajectories.dataset(arrays, about)


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

    That has the study, preset, seed and environment, and the rows of `criteria` and of what is
    `reported` beside them. `Progress(None)` says nothing while it goes. What is damaged in a folder
    is made anew. Raises `ConfigError` for what can be known not to work before DIR is made; for a
    folder that is in use, foreign, of another configuration or cannot be written; and
    KeyboardInterrupt once what was interrupted is stored.
    """
    from metadyn import figures, view

    check_seed(seed)
    if tensorboard:
        check_installed()
    plan = study.plan(config)
    with progress.counting("checking", 1) as show:
        show("criteria and figures")
        with error_context(f"study {study.name!r} cannot be run", ConfigError):
            asked = run_config(study, preset, int(seed), config, plan)
            check_memory(plan)
            rehearsal = _criteria_hash(rehearse(study, config, plan))
    with writing(out):
        mesh.on_main_process(lambda: RunFolder.create(out, asked).config)
        run = RunFolder(out)
        with ExitStack() as stack:
            mesh.on_main_process(lambda: stack.enter_context(run.locked()))
            mesh.on_main_process(run.set_aside_damaged)
            page = run.path / "report.html"
            done = mesh.on_main_process(run.summary)
            if done and done.get("rehearsal", rehearsal) == rehearsal:
                progress.say("this run was done before: to do it anew, choose another DIR")
                mesh.on_main_process(lambda: page.exists() or bool(view.write(run, progress)))
                return done
            runner = Runner(plan, run, seed, progress, tensorboard and mesh.is_main_process())
            runner.prepare()
            if plan.trained:
                runner.train_alone()
            runner.measure_all()

            def conclude() -> dict[str, Any]:
                page.unlink(missing_ok=True)
                results = run.results()
                figures.draw(run.figures, results, study.own_figures(), progress)
                with progress.counting("judging", 1) as show:
                    show("criteria")
                    found = {"rehearsal": rehearsal}  # what was run elsewhere says so still
                    found |= {"environment": done["environment"]} if done else {}
                    summary = judge(study, config, run, results, run.seconds(), **found)
                view.write(run, progress)
                return summary

            return mesh.on_main_process(conclude)


@contextmanager
def writing(out: str | Path) -> Iterator[None]:
    """Raises `ConfigError` where DIR, or what is in it, turns out not to be writable."""
    try:
        yield
    except BrokenPipeError:  # of our output, not of DIR
        raise
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror or error})") from error


def _criteria_hash(rehearsed: Sequence[Criterion]) -> str:
    """Hashes the rehearsed criteria: a run that is done is judged anew if its study has others."""
    rows = [
        [f"{x:.3g}" if isinstance(x, float) else x for x in vars(c).values()] for c in rehearsed
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def judge(
    study: Study, config: Any, run: RunFolder, results: Results, seconds: float, **more: Any
) -> dict[str, Any]:
    """Judges what is measured, and writes the summary of a run, with some `more` fields of it."""
    criteria = study.judged(config, results)
    summary = {
        **{name: run.config[name] for name in ("study", "preset", "seed")},
        "environment": environment() | {"seconds": round(seconds, 1)},
        "criteria": [_as_json(c) for c in criteria if c.passed is not None],
        "reported": [_as_json(c) for c in criteria if c.passed is None],
        **more,
    }
    run.write_summary(summary)
    return summary


def environment() -> dict[str, Any]:
    """Versions and devices, for the record."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": mesh.processor(),
        **{name: _version(name) for name in PACKAGES},
        **mesh.describe(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout that is on the path
        return "not installed"


def _as_json(criterion: Criterion) -> dict[str, Any]:
    row = finite(dataclasses.asdict(criterion))
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
