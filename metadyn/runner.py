"""Runs a study for `metadyn run`: checks, trains, measures, stores, draws, judges, and resumes."""

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

from metadyn import dynamics, inner, mesh, trajectories
from metadyn.base import Key, Params, TaskSet, weight_shapes
from metadyn.errors import ConfigError, ConfigWarning, check_seed, error_context
from metadyn.measuring import (
    calls,
    check_readings_fit,
    check_step,
    description,
    program_key,
    readings,
    training_bytes,
)
from metadyn.options import options_of
from metadyn.outer import OuterConfig, OuterLoop, TrainState
from metadyn.progress import Progress
from metadyn.store import Results, RunFolder, finite
from metadyn.study import Contender, Criterion, Measurement, Plan, Study
from metadyn.tensorboard import check_installed, scalars

CHECKPOINT_SECONDS = 300.0
"""Seconds of training after which the state is stored, even between planned checkpoints."""
PACKAGES = ("metadyn", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "xarray")


def stream(key: Key, name: str) -> Key:
    """Derives an independent key from the name of a purpose: "training" or "evaluation"."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


class Runner:
    """The run of one plan into one folder, alone or beside others that are trained with it."""

    def __init__(
        self,
        plan: Plan,
        run: RunFolder,
        seed: int,
        progress: Progress,
        tensorboard: bool = False,
        measure: Callable[..., Any] = inner.measure,
        label: str = "",
    ):
        self.plan, self.store, self.progress = plan, run, progress
        self.label = label  # the sweep's setting, for messages; "" outside a sweep
        self.tensorboard = run.tensorboard if tensorboard else None
        key = jax.random.key(seed)
        self.key, self._measure = stream(key, "evaluation"), measure
        self.loop = OuterLoop(plan.trained, plan.outer, stream(key, "training"))
        self.state: TrainState | None = None
        self.stored: list[int] = mesh.on_main_process(run.steps)
        """Outer steps whose state is stored."""
        self.at_checkpoints = [m for m in plan.measurements if m.at_checkpoints]
        """Measurements made at every checkpoint."""
        self.bayes: dict[str, tuple[float, float]] = {}
        """Bayes' loss and the loss floor, keyed by meta-learner (`measure_bayes`)."""

    def calls(self) -> Iterator[tuple[Measurement, bool, list[tuple[Any, ...]]]]:
        """Yields each measurement, whether it is stored, and the arguments of each of its calls.

        Shapes stand in for outer parameters.
        """
        for measurement in self.plan.measurements:
            names = measurement.tasks.name, measurement.contender.name
            arguments = measurement.arguments(self.loop.abstract.params, self.key)
            yield measurement, self.store.has_measurement(*names), calls(*arguments)

    def prepare(self) -> None:
        """Compiles every program that is still needed, using all CPU cores.

        Raises `ConfigError` if a program that trains cannot fit into the memory, by the compiler's
        own account. Several processes compile as they go: they would have to agree on an order.
        """
        if jax.process_count() > 1:
            return
        training = not {*self.plan.outer.checkpoint_steps} <= {*self.stored}
        programs: dict[Any, tuple[str, Callable[[], Any]]] = {}
        for name in self.loop.trained if training else ():
            programs[name] = name, partial(self.loop.compiled, name)
        for measurement, stored, (arguments, *_) in self.calls():
            if not stored and (training or not measurement.at_checkpoints):
                build = lambda arguments=arguments: inner.measure.lower(*arguments).compile()
                programs.setdefault(program_key(arguments), (measurement.label, build))
        if not programs:
            return
        pool = ThreadPoolExecutor(mesh.cores())
        try:
            futures = [(label, pool.submit(build)) for label, build in programs.values()]
            with self.progress.counting("compiling", len(futures)) as show:
                for label, future in futures:
                    show(label)
                    future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def train_alone(self) -> None:
        """Trains the plan's meta-learners, from the newest checkpoint or from the start."""
        as_lists = lambda dispatch: ([dispatch[0]], [dispatch[1]])
        run = lambda states, target: map(as_lists, self.loop.run(states[0], target))
        train([self], lambda: [self.loop.init()], run)

    def save(self, state: TrainState) -> None:
        """Stores the training state and, at planned outer steps, mode trajectories.

        States at other outer steps are deleted when a second later one is saved.
        """
        step = int(state.step)
        planned = self.plan.outer.checkpoint_steps
        for old in [s for s in self.stored[:-1] if s not in planned]:
            mesh.on_main_process(partial(self.store.forget, old))
            self.stored.remove(old)
        descriptions: dict[str, dict[str, Any]] = {}
        arrays: dict[str, dict[str, Any]] = {}
        for measurement in self.at_checkpoints:
            task_set, learner = measurement.tasks.name, measurement.contender.name
            labels = _description(measurement)
            labels["about"]["seconds"] = round(self.loop.seconds[measurement.meta], 3)
            descriptions.setdefault(task_set, {})[learner] = labels
            if step in planned:
                arrays.setdefault(task_set, {})[learner] = self.readings(measurement, state.params)
        self.store.save_checkpoint(step, state, arrays or None, descriptions)
        self.stored = sorted([*self.stored, step])
        self.state = state

    def at(self, step: int) -> TrainState:
        """Returns the state at a stored outer step, from memory or from its checkpoint.

        A checkpoint also gives the seconds that each meta-learner was trained.
        """
        if self.state is not None and int(self.state.step) == step:
            return self.state
        self.store.finish()
        descriptions = self.store.about(step) if self.at_checkpoints else {}
        for measurement in self.at_checkpoints:
            about = descriptions[measurement.tasks.name][measurement.contender.name]["about"]
            self.loop.seconds[measurement.meta] = about["seconds"]
        return self.store.restore_state(step, self.loop.abstract)

    def means(self, metrics: MetricsByLearner) -> dict[str, dict[str, float]]:
        """Returns the means over seeds of all metrics, and the excess loss over Bayes."""
        means = {
            name: {metric: float(np.mean(value)) for metric, value in values.items()}
            for name, values in metrics.items()
        }
        for name, values in means.items():
            if "loss" in values and name in self.bayes:
                excess = dynamics.excess_loss(values["loss"], *self.bayes[name])
                values["excess_loss"] = float(excess)
        return means

    def measure_bayes(self) -> None:
        """Measures Bayes on tracked and held-out tasks, to compare a run with while it trains.

        Sets `bayes`: its loss on the training distribution, and the loss floor, by meta-learner.
        """
        for measurement in self.plan.measurements:
            if not (measurement.after_training or measurement.at_checkpoints):
                self.measure(measurement, {})
        for comparison in self.plan.comparisons:
            if comparison.metas and comparison.measure.heldout_tasks:
                self.store.finish()
                measured = self.store.measurement(comparison.heldout.name, comparison.bayes.name)
                bayes_loss = float(dynamics.episode_loss(measured).mean())
                for meta in comparison.metas:
                    self.bayes[meta.name + comparison.suffix] = (
                        bayes_loss,
                        comparison.domain.loss_floor,
                    )

    def readings(self, wanted: Measurement, trained: Mapping[str, Params]) -> dict[str, Any]:
        """Measures one learner on one task set, given the outer parameters of all meta-learners."""
        return readings(*wanted.arguments(trained, self.key), self._measure)

    def measure(self, wanted: Measurement, trained: Mapping[str, Params]) -> None:
        """Makes and stores a measurement, unless it is stored already."""
        names = wanted.tasks.name, wanted.contender.name
        if not mesh.on_main_process(lambda: self.store.has_measurement(*names)):
            arrays = self.readings(wanted, trained)
            if jax.process_count() == 1:  # each of several processes has only some of the tasks
                diverged = ~np.isfinite(np.asarray(arrays["loss"])[..., 1:]).all(-1)
                if diverged.any():
                    setting = f"{self.label}: " if self.label else ""
                    counts = f"{diverged.sum():,} of {diverged.size:,} episodes"
                    message = f"{setting}the loss of {wanted.label} is not finite in {counts}"
                    warnings.warn(message, ConfigWarning, stacklevel=2)
            self.store.save_measurement(*names, arrays, _description(wanted))

    def measure_all(self) -> None:
        """Makes every measurement of the plan that is due after training and not yet stored."""
        params = self.at(self.plan.outer.steps).params if self.plan.trained else {}
        measurements = [m for m in self.plan.measurements if m.after_training]
        with self.progress.counting("measuring", len(measurements)) as show:
            for measurement in measurements:
                show(f"{measurement.contender.label} on {measurement.tasks.name}")
                self.measure(measurement, params)
        self.store.finish()


MetricsByLearner = Mapping[str, Mapping[str, Any]]
"""Metrics [seed], keyed by meta-learner and metric, on the devices or as NumPy arrays."""
Dispatches = Iterator[tuple[Sequence[TrainState], Sequence[MetricsByLearner]]]
"""States and metrics of each plan, after each dispatch."""


def train(
    runners: Sequence[Runner],
    start: Callable[[], Sequence[TrainState]],
    run: Callable[[Sequence[TrainState], int], Dispatches],
    lost: Callable[[int, ConfigError], None] | None = None,
    gone: Collection[int] = (),
) -> None:
    """Trains the meta-learners of a plan, or those of several plans side by side.

    Every checkpoint stores the training state and the mode trajectories. Training resumes from the
    newest checkpoint that all plans have. All have the same outer steps and checkpoints. `start()`
    returns the state of each plan at outer step 0. `run(states, step)` trains up to an outer step,
    and yields the states and metrics of all plans after each dispatch. When a metric of a plan is
    no longer finite, `lost(index, error)` is called and the other plans go on; without `lost`,
    training ends with that `ConfigError`. Plans in `gone` were lost before and are not trained.
    """
    outer, progress = runners[0].plan.outer, runners[0].progress
    active = {i: runner for i, runner in enumerate(runners) if i not in gone}
    if not active:
        return

    def common_steps() -> set[int]:
        return set.intersection(*(set(runner.stored) for runner in active.values()))

    def save(states: Sequence[TrainState]) -> None:
        for i, runner in active.items():
            if int(states[i].step) not in runner.stored:
                runner.save(states[i])

    def drop_diverged(step: int, metrics: Sequence[MetricsByLearner]) -> None:
        for i, runner in [*active.items()]:
            try:
                runner.loop.check_finite(step, metrics[i])
            except ConfigError as error:
                if lost is None:
                    raise
                lost(i, error)
                del active[i]

    with progress.counting("starting", 1 + len(active)) as show:
        show("outer step 0")
        if 0 not in common_steps():
            save(start())
        for runner in active.values():
            show("Bayes")
            runner.measure_bayes()
    missing = [step for step in outer.checkpoint_steps if step not in common_steps()]
    reached = max(step for step in common_steps() if step < min(missing, default=outer.steps + 1))
    episodes = sum(runner.loop.episodes for runner in runners)
    with (
        progress.training(outer.steps, reached) as advance,
        scalars(runners[0].tensorboard, max(common_steps())) as log,
        _interrupts_held() as interrupted,
    ):
        saved_at = time.monotonic()
        for target in missing:
            newest = max(step for step in common_steps() if step < target)
            starts = {i: runner.at(newest) for i, runner in active.items()}
            filler = next(iter(starts.values()))  # stands in for plans that are lost
            initial = [starts.get(i, filler) for i in range(len(runners))]
            for states, metrics in run(initial, target):
                step = int(states[0].step)
                drop_diverged(step, metrics)
                if not active:
                    break
                means = {i: runner.means(metrics[i]) for i, runner in active.items()}
                for rows in means.values():
                    log(step, {f"{m}/{n}": v for n, row in rows.items() for m, v in row.items()})
                flat = {f"{n}{i or ''}": r for i, rows in means.items() for n, r in rows.items()}
                advance(step, flat, episodes)
                overdue = time.monotonic() > saved_at + CHECKPOINT_SECONDS
                stop, due = mesh.any_process(interrupted(), overdue)
                if step == target or stop or due:
                    save(states)
                    saved_at = time.monotonic()
                if stop:
                    for runner in runners:
                        runner.store.finish()
                    mesh.shut_down()
                    raise KeyboardInterrupt
            if not active:
                break
    for runner in runners:
        runner.store.finish()


def _description(measurement: Measurement) -> dict[str, Any]:
    """Returns the description of a measurement, with the contender's place in figures."""
    comparison, tasks, contender, _ = measurement
    names = [c.name for c in comparison.contenders]
    place = names.index(contender.name) if contender.name in names else len(names)
    return description(tasks, contender, place, comparison.title, comparison.followed)


# Checks before training.


def check_memory(plan: Plan) -> None:
    """Raises `ConfigError`, naming the option to lower, if training or measuring lacks memory."""
    outer = plan.outer
    for contender in (meta for comparison in plan.comparisons for meta in comparison.metas):
        seed_bytes = training_bytes(contender.learner.init)
        default_fits = OuterConfig.seeds * seed_bytes <= mesh.memory(split=False)
        option = "outer.seeds" if default_fits else contender.option or "outer.seeds"
        what = f"weights, gradients and moments of {contender.name}"
        mesh.require_memory(what, outer.seeds * seed_bytes, option)
    for _, tasks, contender, _ in plan.measurements:
        check_readings_fit(tasks, contender, outer.seeds)


def plan_summary(plan: Plan) -> dict[str, Any]:
    """Summarises a plan as JSON, so that no run is resumed under a study edited since."""
    summary: dict[str, Any] = {
        name: {
            "parameters": sum(
                leaf.size for leaf in jax.tree.leaves(weight_shapes(training.meta.init))
            ),
            "own": training.own and dataclasses.asdict(training.own),
        }
        for name, training in plan.trained.items()
    }
    for measurement in plan.measurements:
        _, tasks, contender, _ = measurement
        times = contender.times_in(tasks.domain)
        summary[measurement.label] = {
            "label": contender.label,
            "kind": contender.kind,
            "domain": domain_summary(tasks.domain),
            "tasks": tasks.size_for(contender.clock),
            "times": [len(times), times[-1]],
            # Only the digits that every processor's LAPACK agrees on: a run may change machines.
            "modes": {
                name: [float(f"{value:.6g}") for value in probe.modes.values]
                for name, probe in tasks.probes.items()
            },
        }
    return summary


def domain_summary(domain: Any) -> dict[str, Any]:
    """Summarises a domain by its class name and those of its fields that are numbers or strings."""
    fields = dataclasses.fields(domain) if dataclasses.is_dataclass(domain) else ()
    values = {field.name: getattr(domain, field.name) for field in fields}
    plain = {name: value for name, value in values.items() if isinstance(value, int | float | str)}
    return {"kind": type(domain).__name__} | plain


def run_config(study: Study, preset: str, seed: int, config: Any, plan: Plan) -> dict[str, Any]:
    """Builds the contents of config.json, which a run must match to be resumed."""
    for option, value in options_of(config):
        with error_context(
            f"{option} = {value!r} cannot be stored: use numbers, strings or tuples"
        ):
            json.dumps(value)
    identity = {"study": study.name, "preset": preset, "seed": seed}
    return {**identity, "config": dataclasses.asdict(config), "plan": plan_summary(plan)}


def check_traced(plan: Plan) -> None:
    """Traces every learner's step and every objective. Raises `ConfigError` if one fails."""
    distinct: dict[Any, tuple[TaskSet, Contender]] = {}
    for _, tasks, contender, _ in plan.measurements:
        structure = jax.tree.structure(tasks.sample)
        with error_context(f"the domain of {tasks.name!r} must be hashable and comparable by =="):
            distinct.setdefault((tasks.domain, structure, contender.make), (tasks, contender))
    for pair in distinct.values():
        check_step(*pair)
    check_objectives(plan)


def check_objectives(plan: Plan) -> None:
    """Traces every objective. Raises `ConfigError` if one fails."""
    for name, training in plan.trained.items():
        training.check_traced(name)


def rehearse(study: Study, config: Any, plan: Plan) -> list[Criterion]:
    """Traces all learners, judges the criteria on made-up results, and draws all figures of them.

    Returns the criteria. Raises `ConfigError` if any of this fails.

    The results have the planned names and shapes, few tasks and made-up numbers. So a name that is
    not measured, or a figure that cannot be drawn, is found before training.
    """
    check_traced(plan)
    for name, training in plan.trained.items():
        training.check_run(name)
    last_steps = np.array(plan.outer.checkpoint_steps[-3:])
    sets: dict[str, list[str]] = {}
    planned = {}
    for measurement in plan.measurements:
        names = measurement.tasks.name, measurement.contender.name
        sets.setdefault(names[0], []).append(names[1])
        outer_steps = last_steps if measurement.at_checkpoints else None
        planned[names] = _description(measurement), min(4, measurement.tasks.size), outer_steps
    results = Results(sets, lambda *names: _made_up(*planned[names]))
    criteria = study.judged(config, results)
    from metadyn import figures

    every = figures.of_every_run(results, figures.by_probe(figures.histories(results)))
    for name, draw in every.items():
        with error_context(f"figure {name!r} cannot be drawn"):
            draw()
    for name, draw_own in study.own_figures().items():
        figure = draw_own(results)
        with error_context(f"study {study.name!r}: figure {name!r} cannot be drawn"):
            figure.draw_without_rendering()
    titles = [text for m in plan.measurements for text in (m.comparison.title, m.contender.label)]
    modes = [probe.modes for m in plan.measurements for probe in m.tasks.probes.values()]
    figures.check_words([*titles, *(text for m in modes for text in (m.axis, m.strength))])
    return criteria


def _made_up(description: dict[str, Any], tasks: int, steps: np.ndarray | None) -> xr.Dataset:
    """Makes up a measurement: strengths that rise in the order of the modes, and falling losses.

    With `steps` it has an axis of these outer steps.
    """
    rng = np.random.default_rng(0)
    axes, coords = description["axes"], description["coords"]
    sizes = {"seed": 2, "task": tasks} | {axis: len(values) for axis, values in coords.values()}
    if steps is not None:
        axes = {name: ["outer_step", *names] for name, names in axes.items()}
        coords = coords | {"outer_step": ["outer_step", steps]}
        sizes["outer_step"] = len(steps)
    arrays = {}
    for name, names in axes.items():
        value = 0.1 * rng.random([sizes.get(axis, 2) for axis in names])
        if "step" in names:
            shape = [sizes["step"] if axis == "step" else 1 for axis in names]
            rise = np.linspace(0, 1.2, sizes["step"]).reshape(shape)
            value += description["about"]["loss_floor"] + 1 - rise / 2 if name == "loss" else rise
        arrays[name] = value
    return trajectories.dataset(arrays, description | {"axes": axes, "coords": coords})


def run_study(
    study: Study,
    preset: str,
    seed: int,
    config: Any,
    out: str | Path,
    progress: Progress,
    tensorboard: bool = False,
) -> dict[str, Any]:
    """Runs a whole study into the folder `out`, or resumes it there, and returns its summary.

    The summary has the study, preset, seed and environment, the rows of `criteria`, and the rows
    `reported` without being judged. `Progress(None)` prints nothing. Damaged parts of a folder are
    made anew. Raises `ConfigError` for whatever can be known to fail, before DIR is made, and for
    a folder that is in use, foreign, of another configuration or not writable. Raises
    KeyboardInterrupt once the state of an interrupted run is stored.
    """
    from metadyn import figures, view

    check_seed(seed)
    if tensorboard:
        check_installed()
    plan = study.plan(config)
    with progress.counting("checking", 1) as show:
        show("criteria and figures")
        with error_context(f"study {study.name!r} cannot be run", ConfigError):
            identity = run_config(study, preset, int(seed), config, plan)
            check_memory(plan)
            rehearsal = _criteria_hash(rehearse(study, config, plan))
    with writing(out):
        mesh.on_main_process(lambda: RunFolder.create(out, identity).config)
        run = RunFolder(out)
        with ExitStack() as stack:
            mesh.on_main_process(lambda: stack.enter_context(run.locked()))
            mesh.on_main_process(run.set_aside_damaged)
            page = run.path / "report.html"
            previous = mesh.on_main_process(run.summary)
            if previous and previous.get("rehearsal", rehearsal) == rehearsal:
                progress.say("this run is already done: to repeat it, choose another DIR")
                mesh.on_main_process(lambda: page.exists() or bool(view.write(run, progress)))
                return previous
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
                    fields = {"rehearsal": rehearsal}
                    if previous:  # the run may have been done on another machine
                        fields |= {"environment": previous["environment"]}
                    summary = judge(study, config, run, results, run.seconds(), **fields)
                view.write(run, progress)
                return summary

            return mesh.on_main_process(conclude)


@contextmanager
def writing(out: str | Path) -> Iterator[None]:
    """Raises `ConfigError` if DIR, or a file in it, turns out not to be writable."""
    try:
        yield
    except BrokenPipeError:  # of the standard output, not of DIR
        raise
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror or error})") from error


def _criteria_hash(rehearsed: Sequence[Criterion]) -> str:
    """Hashes the rehearsed criteria. A finished run is judged anew if its study has others."""
    rows = [
        [f"{x:.3g}" if isinstance(x, float) else x for x in vars(c).values()] for c in rehearsed
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def judge(
    study: Study, config: Any, run: RunFolder, results: Results, seconds: float, **more: Any
) -> dict[str, Any]:
    """Judges a run's results, and writes and returns its summary, with the fields `more`."""
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
    """Returns the versions of packages, the platform and the devices, for the record."""
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
def _interrupts_held() -> Iterator[Callable[[], bool]]:
    """Holds Ctrl-C and SIGTERM back until the caller asks for them; a second one gets through."""
    received: list[int] = []

    def record(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    with ExitStack() as stack:
        with suppress(ValueError):  # not in the main thread, where signals never arrive
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.signal(number, record))
        yield lambda: bool(received)
    if received:  # after the caller last asked
        raise KeyboardInterrupt
