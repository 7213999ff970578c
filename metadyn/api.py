"""The two calls of a notebook: train a meta-learner, measure learners. No study, no folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from numbers import Integral
from typing import Any, NamedTuple

import jax
import numpy as np
import xarray as xr
from rich.console import Console

from metadyn import inner, trajectories
from metadyn.base import Domain, Learner, MetaLearner, Params, TaskSet
from metadyn.errors import check, check_seed, error_context, meant
from metadyn.measuring import (
    bytes_needed,
    check_step,
    described,
    readings,
    require_memory,
    training_bytes,
    weights,
)
from metadyn.objectives import Objective, ObjectiveOf, prediction_loss
from metadyn.outer import MetaTraining, OuterConfig, OuterLoop
from metadyn.progress import Progress
from metadyn.study import Contender, MeasureConfig


class Trained(NamedTuple):
    """A meta-learner, and the outer parameters that training came to."""

    meta: MetaLearner
    params: Params
    """Leaves have a leading axis over the outer seeds."""
    losses: Mapping[int, np.ndarray]
    """Mean loss [seed] over each dispatch of outer steps, by the last outer step of it."""


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

    `steps` are outer steps. Several `seeds` are trained at once, each from its own initial weights
    on its own episodes. `objective(domain, meta)` makes what is minimised. `outer` are further
    fields of `OuterConfig`, such as `batch` and `learning_rate`; its `warmup` is a tenth of the
    steps here, at most 200. Nothing is stored, and mode trajectories are not kept: `metadyn run`
    does that. Raises `ConfigError` for settings that do not fit, for what cannot fit into the
    memory, and for a loss that is no longer finite.
    """
    fix = "give a meta-learner, such as LSTMConfig().make(domain)"
    check(isinstance(meta, MetaLearner), "meta", meta, fix)
    check_seed(seed)
    known = [field.name for field in dataclasses.fields(OuterConfig)]
    for name, value in outer.items():
        check(name in known, name, value, f"is no field of `OuterConfig`{meant(name, known)}")
    check(isinstance(steps, Integral), "steps", steps, "must be a whole number")
    config = OuterConfig(steps=steps, seeds=seeds, **{"warmup": min(200, steps // 10), **outer})
    _check_domain(domain)
    found = objective(domain, meta) if callable(objective) else objective
    fix = "give a function of a domain and a meta-learner that makes an `Objective`"
    check(isinstance(found, Objective), "objective", objective, fix)
    training = MetaTraining(meta, found)
    training.check_traced("a meta-learner on this domain", weights(meta.init))
    require_memory(
        "their weights and what trains them", seeds * training_bytes(meta.init), "seeds", seeds
    )
    loop = OuterLoop({"meta": training}, config, jax.random.key(seed))
    losses: dict[int, np.ndarray] = {}
    with Progress(Console() if progress else None).training(steps, 0) as show:
        for state, metrics in loop.run(loop.init(), steps):
            step, now = int(state.step), metrics["meta"]
            losses[step] = np.asarray(now.get("loss", np.full(seeds, np.nan)))
            show(step, {"training": now}, loop.episodes)
    return Trained(meta, state.params["meta"], losses)


def _check_domain(domain: Domain) -> None:
    fix = "give an object, such as LinearRegression()"
    made = not isinstance(domain, type) and hasattr(domain, "sample_task")
    check(made, "domain", domain, fix)
    check(isinstance(domain, Hashable), "domain", domain, "must be hashable: freeze its dataclass")
    check(isinstance(domain.steps, Integral), "steps", domain.steps, "must be a whole number")
    check(hasattr(domain, "loss_floor"), "domain", domain, "has no loss_floor: say it")


def _check_trained(name: str, trained: Trained) -> None:
    needed, found = weights(trained.meta.init), trained.params
    alike: bool = jax.tree.structure(needed) == jax.tree.structure(found)  # type: ignore[operator]
    shapes = [(1 + leaf.ndim, leaf.shape) for leaf in jax.tree.leaves(needed)]
    right = shapes == [(np.ndim(leaf), np.shape(leaf)[1:]) for leaf in jax.tree.leaves(found)]
    fix = "its parameters must be those of its meta-learner, with a leading axis over seeds"
    check(alike and right, "learners", name, fix)


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
    """Measures learners on the same tasks, as one labelled dataset.

    Its dimensions are learner, seed (if one was trained), task, mode, step; `trajectories.merge`
    says what is repeated and padded. `learners` are trained meta-learners and plain learners by
    name ("bayes" is what the others are compared with), or contenders, for labels and times of
    one's own. Tasks are the domain's evaluation tasks with `points` queries to a probe, or a set
    given whole, whose own sizes and probes count. Learners that count updates take `updates` of
    them, on `updating_tasks` of the tasks. At most `chunk` tasks are measured at a time. Raises
    `ConfigError` for sizes below 1, contenders that are not trained or cannot take a step, probes
    that read other than they say, and for what cannot fit into the memory.
    """
    whole = lambda n: isinstance(n, Integral) and int(n) >= 1
    sizes = {"points": points, "updates": updates, "updating_tasks": updating_tasks}
    for name, n in {**sizes, "chunk": chunk}.items():
        check(whole(n), name, n, "must be a whole number, at least 1")
    check_seed(seed)
    _check_domain(domain)
    if not isinstance(tasks, TaskSet):
        fix = "must be a whole number, at least 1, or a set of tasks"
        check(whole(tasks), "tasks", tasks, fix)
        with error_context("the domain's evaluation tasks cannot be had"):
            evaluation = domain.evaluation(points)
        tasks = dataclasses.replace(evaluation, size=tasks, updating_size=updating_tasks)
    check(tasks.domain == domain, "domain", domain, "is not that of the set of tasks")
    check(isinstance(learners, Mapping) and learners, "learners", learners, "give some, by name")
    fix = "is not trained: give what `metadyn.train` returns, under a name"
    each: dict[str, tuple[Contender, Params]] = {}
    for name, learner in learners.items():
        if isinstance(learner, Contender):
            check(not learner.seeded, "learners", name, fix)
            each[name] = learner, ()
        elif isinstance(learner, Learner):
            times = inner.log_spaced(updates, 60) if learner.clock == "updates" else None
            kind = "bayes" if name == "bayes" else "ordinary"
            each[name] = Contender(name, name, learner, kind, times), ()  # type: ignore[arg-type]
        else:
            check(isinstance(learner, Trained), "learners", name, fix)
            _check_trained(name, learner)
            each[name] = Contender(name, name, learner.meta), learner.params
    for contender, params in each.values():
        check_step(tasks, contender)
        seeds = max((len(leaf) for leaf in jax.tree.leaves(params)), default=1)
        needed = 2 * bytes_needed(tasks, contender, seeds)  # with a copy
        size = tasks.size_for(contender.clock)
        field = "updating_tasks" if size < tasks.size else "tasks"
        require_memory(f"what {contender.name} does on them", needed, field, size, split=True)
    parts = {}
    with Progress(Console() if progress else None).counting("measuring", len(each)) as show:
        for place, (name, (contender, params)) in enumerate(each.items()):
            show(str(name))
            arrays = readings(tasks, contender, params, jax.random.key(seed), chunk)
            about = described(tasks, contender, place)
            parts[name] = trajectories.dataset(arrays, about)
    return trajectories.merge(parts)
