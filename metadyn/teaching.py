"""Teaching: a teacher who knows the task chooses examples for a learner who does not.

After Zhu (2013), "Machine teaching for Bayesian learners in the exponential family", and Liu & Zhu
(2015): which few examples bring a learner, whose inner workings the teacher knows, nearest to the
truth? Here the teacher chooses the inputs, and the domain answers them with noise as usual.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Real

from metadyn import dynamics
from metadyn.base import Key, Learner, Probe, Sample, TaskSet, as_subclass
from metadyn.domains.bandit import BanditTask, ContextualBandit, Outcome
from metadyn.domains.linear import LinearRegression, LinearTask

Lesson = Float[Array, "m n_x"]
"""Inputs of the first m examples shown to a learner; NaN leaves the domain's input in place."""
Teacher = Callable[[LinearTask], Lesson]


class Taught(NamedTuple):
    """A task, with the index of the teacher that chooses its examples."""

    task: LinearTask
    teacher: Int[Array, ""]


class TaughtFeedback(NamedTuple):
    """A target, with the task for the teacher to use."""

    y: Float[Array, "*batch n_y"]
    task: Taught


class OpenRegression(LinearRegression):
    """Linear regression whose feedback also contains the task, for `taught` learners only.

    Its tasks are `Taught`. Losses are those of the answers to the domain's own inputs, whatever
    inputs are taught.
    """

    def query(self, task: Any, key: Key) -> Array:
        """Draws an input as in linear regression."""
        return super().query(task.task, key)

    def feedback(self, task: Any, query: Array, answer: object, key: Key) -> Any:
        """Draws the target as in linear regression; returns it with the task."""
        return TaughtFeedback(super().feedback(task.task, query, answer, key), task)

    def loss(self, answer: Float[Array, " n_y"], feedback: Any) -> Array:
        """Returns the mean squared error over outputs."""
        return super().loss(answer, feedback.y)


def taught_sets(tasks: TaskSet, *names: str) -> list[TaskSet]:
    """Copies a linear-regression task set once per name, for the learner's teachers in order.

    The probes of the copies also read `error`, ‖Ŵ − W‖² / ‖W‖².
    """
    domain = as_subclass(tasks.domain, OpenRegression)
    probes = {name: _with_error(probe) for name, probe in tasks.probes.items()}
    template = dataclasses.replace(tasks, domain=domain, probes=probes)
    # The teacher's index is an array, so that all copies share compiled programs.
    sample = lambda i: Partial(_with_teacher, tasks.sample, np.int32(i))
    return [dataclasses.replace(template, name=n, sample=sample(i)) for i, n in enumerate(names)]


def _with_teacher(sample: Sample, teacher: Array, key: Key) -> Taught:
    return Taught(sample(key), teacher)


def taught(
    learner: Learner, teachers: Sequence[Teacher], n_x: int, examples: int, each: int = 1
) -> Learner:
    """Wraps a learner so that it first sees a teacher's examples, then those of the domain.

    For the task sets that `taught_sets` makes. Each example is shown for `each` updates,
    with new noise every time. The teacher chooses its lesson once per task.
    """

    def init(key: Key) -> tuple[Array, Lesson, Any]:
        return jnp.int32(0), jnp.zeros((examples, n_x)), learner.init(key)

    def predict(state: tuple, query: Array) -> Array:
        return learner.predict(state[2], query)

    def update(state: tuple, query: Float[Array, "*batch n_x"], seen: TaughtFeedback) -> tuple:
        t, lesson, inner_state = state
        first = (lambda leaf: leaf) if learner.batch is None else (lambda leaf: leaf[0])
        task, teacher = jax.tree.map(first, seen.task)
        choose = lambda: jax.lax.switch(teacher, teachers, task)
        lesson = jax.lax.cond(t == 0, choose, lambda: lesson)
        example = lesson[jnp.minimum(t // each, examples - 1)]
        x = jnp.where((t < examples * each) & ~jnp.isnan(example), example, query)
        y = seen.y + (x - query) @ task.W.T  # W x with the noise of the domain's own target
        return t + 1, lesson, learner.update(inner_state, x, y)

    return learner._replace(init=init, predict=predict, update=update, diagnose=None)


def no_lesson(task: LinearTask, examples: int) -> Lesson:
    """Stands for no teacher: returns a lesson of NaNs, which keeps the domain's own inputs."""
    return jnp.full((examples, task.W.shape[1]), jnp.nan)


def for_bayes(task: LinearTask, examples: int, least_first: bool = False) -> Lesson:
    """Returns inputs of norm √n_x along the right singular vectors, greatest mode first, in cycles.

    After one input x, the posterior mean under an iid prior is a fraction of W x̂ x̂ᵀ plus noise. It
    is therefore nearest to W for the x̂ that W stretches most, its first right singular vector.
    """
    assert task.V is not None
    V = task.V[:, ::-1] if least_first else task.V
    n_x, K = V.shape
    return (n_x**0.5 * V.T)[jnp.arange(examples) % K]


def through(
    learner: Learner, task: LinearTask, start: Lesson, queries: Array, steps: int, rate: float
) -> Lesson:
    """Optimises the inputs of a lesson by gradient descent through a learner's own updates.

    The descent minimises the learner's error on `queries` [q, n_x] after the lesson, which is
    taught without noise; every input has norm √n_x. It begins at `start` and takes `steps` steps,
    whose length falls linearly from `rate` times the norm of all inputs to zero. Returns the best
    lesson among the iterates.
    """
    input_norm = start.shape[1] ** 0.5

    def error(lesson: Lesson) -> Array:
        def learn(state: Any, x: Array) -> tuple[Any, None]:
            return learner.update(state, x, task.W @ x), None

        state, _ = jax.lax.scan(learn, learner.init(jax.random.key(0)), lesson)
        answers = jax.vmap(learner.predict, (None, 0))(state, queries)
        return jnp.mean((answers - queries @ task.W.T) ** 2)

    def step(carry: tuple, i: Int[Array, ""]) -> tuple[tuple, None]:
        lesson, best, lowest = carry
        loss, gradient = jax.value_and_grad(error)(lesson)
        best, lowest = jnp.where(loss < lowest, lesson, best), jnp.minimum(loss, lowest)
        length = rate * (1 - i / steps) * jnp.linalg.norm(lesson)
        lesson = lesson - length * gradient / jnp.maximum(jnp.linalg.norm(gradient), 1e-12)
        lesson = input_norm * lesson / jnp.linalg.norm(lesson, axis=1, keepdims=True)
        return (lesson, best, lowest), None

    initial = start, start, jnp.asarray(jnp.inf)
    return jax.lax.scan(step, initial, jnp.arange(steps + 1))[0][1]


def _with_error(probe: Probe) -> Probe:
    """Adds the reading `error` to a probe.

    It is computed from the answers themselves, so it also counts their nonlinear part. For
    isotropic tasks it is the expected squared error at inputs N(0, I) over ‖W‖².
    """

    def read(taught: Taught, answers: Float[Array, "P n_y"]) -> dict[str, Array]:
        X, W = probe.queries, taught.task.W
        squared_error = jnp.sum((answers - X @ W.T) ** 2)
        error = squared_error / (jnp.sum(W**2) * jnp.sum(X**2) / X.shape[1])
        return {**probe.read(taught.task, answers), "error": error}

    return dataclasses.replace(probe, read=read, extras={**probe.extras, "error": ()})


def gain(
    times: Real[np.ndarray, " time"],
    end: float,
    random: Float[np.ndarray, "*batch time"],
    taught: Float[np.ndarray, "*batch time"],
) -> Float[np.ndarray, "*batch"] | np.floating:
    """Computes the teaching gain: the ratio of random to taught examples needed for equal error.

    `random` and `taught` are errors over `times`. The error to reach is the taught one at time
    `end`, after the lesson. Errors of random examples are the lowest so far, linearly interpolated.
    If they never reach it, the last time counts instead, so the result is a lower bound.
    """
    margin = taught[..., np.searchsorted(times, end), None] - np.minimum.accumulate(random, -1)
    steps = dynamics.learning_times(times, margin[..., None], p=0.0)[..., 0]
    return np.where(np.isnan(steps), times[-1], steps) / end


class DemonstratedBandit(ContextualBandit):
    """Contextual bandit whose feedback is the correct action's outcome, whatever the answer.

    After Ho et al. (2018): communication instead of reinforcement. Losses are those of the answers.
    """

    def feedback(
        self, task: BanditTask, query: Int[Array, ""], answer: object, key: Key
    ) -> Outcome:
        """Returns the correct action of the context and draws its reward."""
        correct = jnp.arange(self.actions) == task.best[query]
        return super().feedback(task, query, jnp.where(correct, 0.0, -jnp.inf), key)
