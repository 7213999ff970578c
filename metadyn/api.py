"""The two functions for notebooks: train a meta-learner, measure learners. No study, no folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from numbers import Integral
from typing import Any, NamedTuple

import jax
import numpy as np
import xarray as xr
from rich.console import Console

from metadyn import inner, mesh, trajectories
from metadyn.base import Domain, Learner, MetaLearner, Params, TaskSet, weight_shapes
from metadyn.errors import check, check_seed, did_you_mean, error_context
from metadyn.measuring import (
    check_readings_fit,
    check_step,
    description,
    readings,
    training_bytes,
)
from metadyn.objectives import Objective, ObjectiveOf, prediction_loss
from metadyn.outer import MetaTraining, OuterConfig, OuterLoop
from metadyn.progress import Progress
from metadyn.study import Contender, MeasureConfig


class Trained(NamedTuple):
    """A meta-learner and its trained outer parameters."""

    meta: MetaLearner
    params: Params
    """Leaves have a leading axis over the outer seeds."""
    losses: Mapping[int, np.ndarray]
    """Mean loss [seed] over each dispatch of outer steps, by the dispatch's last step."""


def train(
    meta: MetaLearner,
    domain: Domain,
    *,
    steps: int = 3000,
    seeds: int = 4,
    objective: ObjectiveOf = prediction_loss,
    seed: int = 0,
    progress: bool = True,
    **outer: Any,
) -> Trained:
    """Trains a meta-learner on a domain's tasks, and returns it with its outer parameters.

    `steps` counts outer steps. Several `seeds` are trained at once, each from its own initial
    weights on its own episodes. `objective(domain, meta)` makes the `Objective` to minimise.
    `outer` are further fields of `OuterConfig`, such as `batch` and `learning_rate`; `warmup` is
    by default a tenth of the steps, at most 200. Nothing is written to disk, and mode trajectories
    are not kept: `metadyn run` does both. Raises `ConfigError` for invalid settings, for training
    that does not fit into the memory, and for a loss that is no longer finite.
    """
    hint = "give a meta-learner, such as LSTMConfig().make(domain)"
    check(isinstance(meta, MetaLearner), "meta", meta, hint)
    check_seed(seed)
    known = [field.name for field in dataclasses.fields(OuterConfig)]
    for name, value in outer.items():
        hint = f"is no field of `OuterConfig`{did_you_mean(name, known)}"
        check(name in known, name, value, hint)
    check(isinstance(steps, Integral), "steps", steps, "must be a whole number")
    config = OuterConfig(steps=steps, seeds=seeds, **{"warmup": min(200, steps // 10), **outer})
    _check_domain(domain)
    minimised = objective(domain, meta) if callable(objective) else objective
    hint = "give a function of a domain and a meta-learner that makes an `Objective`"
    check(isinstance(minimised, Objective), "objective", objective, hint)
    training = MetaTraining(meta, minimised)
    training.check_traced("a meta-learner on this domain")
    mesh.require_memory(
        "their weights, gradients and moments", seeds * training_bytes(meta.init), "seeds", seeds
    )
    training.check_run(type(meta).__name__)
    loop = OuterLoop({"meta": training}, config, jax.random.key(seed))
    losses: dict[int, np.ndarray] = {}
    with Progress(Console() if progress else None).training(steps, 0) as show:
        for state, metrics in loop.run(loop.init(), steps):
            step, values = int(state.step), metrics["meta"]
            losses[step] = np.asarray(values.get("loss", np.full(seeds, np.nan)))
            show(step, {"training": values}, loop.episodes)
    return Trained(meta, state.params["meta"], losses)


def _check_domain(domain: Domain) -> None:
    hint = "give an object, such as LinearRegression()"
    valid = not isinstance(domain, type) and hasattr(domain, "sample_task")
    check(valid, "domain", domain, hint)
    check(isinstance(domain, Hashable), "domain", domain, "must be hashable: freeze its dataclass")
    check(isinstance(domain.steps, Integral), "steps", domain.steps, "must be a whole number")
    check(hasattr(domain, "loss_floor"), "domain", domain, "must have a loss_floor")


def _check_trained(name: str, trained: Trained) -> None:
    expected, params = weight_shapes(trained.meta.init), trained.params
    expected_tree, tree = jax.tree.structure(expected), jax.tree.structure(params)
    same_tree: bool = expected_tree == tree  # type: ignore[operator]
    shapes = [(1 + leaf.ndim, leaf.shape) for leaf in jax.tree.leaves(expected)]
    valid = shapes == [(np.ndim(leaf), np.shape(leaf)[1:]) for leaf in jax.tree.leaves(params)]
    hint = "its parameters must be those of its meta-learner, with a leading axis over seeds"
    check(same_tree and valid, "learners", name, hint)


def measure(
    domain: Domain,
    learners: Mapping[str, Trained | Learner | Contender],
    *,
    tasks: TaskSet | int = 1024,
    points: int = 32,
    updating_tasks: int = 256,
    updates: int = 3000,
    seed: int = 0,
    chunk: int = MeasureConfig.chunk,
    progress: bool = True,
) -> xr.Dataset:
    """Measures learners on the same tasks and returns one labelled dataset.

    Its dimensions are learner, seed (if a learner was trained), task, mode, step;
    `trajectories.merge` says what is repeated and padded. `learners` maps names to trained
    meta-learners, plain learners ("bayes": the one that others are compared with) or, to choose
    labels and times, contenders. `tasks` counts the domain's evaluation tasks, with `points`
    queries to a probe, or is a whole set, with sizes and probes of its own. Learners that count
    updates take `updates` of them, on `updating_tasks` of the tasks. At most `chunk` tasks are
    measured at a time. Raises `ConfigError` for sizes below 1, contenders that are not trained or
    cannot take a step, probes whose readings differ from their declaration, and for readings that
    do not fit into the memory.
    """
    positive = lambda n: isinstance(n, Integral) and int(n) >= 1
    sizes = {"points": points, "updates": updates, "updating_tasks": updating_tasks, "chunk": chunk}
    for name, n in sizes.items():
        check(positive(n), name, n, "must be a whole number, at least 1")
    check_seed(seed)
    _check_domain(domain)
    if not isinstance(tasks, TaskSet):
        hint = "must be a whole number, at least 1, or a set of tasks"
        check(positive(tasks), "tasks", tasks, hint)
        with error_context("the domain's `evaluation` fails"):
            evaluation = domain.evaluation(points)
        tasks = dataclasses.replace(
            evaluation, size=tasks, updating_size=updating_tasks, option="tasks"
        )
    check(tasks.domain == domain, "domain", domain, "must be the domain of `tasks`")
    hint = "must map at least one name to a learner"
    check(isinstance(learners, Mapping) and learners, "learners", learners, hint)
    hint = "must be a `Learner`, or the result of `metadyn.train`"
    contenders: dict[str, tuple[Contender, Params]] = {}
    for name, learner in learners.items():
        if isinstance(learner, Contender):
            check(not learner.seeded, "learners", name, hint)
            contenders[name] = learner, ()
        elif isinstance(learner, Learner):
            times = inner.log_spaced(updates, 60) if learner.clock == "updates" else None
            kind = "bayes" if name == "bayes" else "ordinary"
            contender = Contender(name, name, learner, kind, times)  # type: ignore[arg-type]
            contenders[name] = contender, ()
        else:
            check(isinstance(learner, Trained), "learners", name, hint)
            _check_trained(name, learner)
            contenders[name] = Contender(name, name, learner.meta), learner.params
    for contender, params in contenders.values():
        check_step(tasks, contender)
        seeds = max((len(leaf) for leaf in jax.tree.leaves(params)), default=1)
        check_readings_fit(tasks, contender, seeds)
    parts = {}
    with Progress(Console() if progress else None).counting("measuring", len(contenders)) as show:
        for place, (name, (contender, params)) in enumerate(contenders.items()):
            show(str(name))
            arrays = readings(tasks, contender, params, jax.random.key(seed), chunk)
            labels = description(tasks, contender, place)
            parts[name] = trajectories.dataset(arrays, labels)
    return trajectories.merge(parts)
