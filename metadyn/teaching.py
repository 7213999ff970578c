"""Teaching: examples chosen by a teacher who knows the task, for a learner who does not.

After Zhu (2013), "Machine teaching for Bayesian learners in the exponential family", and Liu & Zhu
(2015): which few examples bring a learner, whose inner workings the teacher knows, nearest to the
truth? Here inputs are chosen, and answered as ever, with noise.
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
"""The inputs of the first examples that a learner is shown; NaN in place of one that is posed."""
Teacher = Callable[[LinearTask], Lesson]


class Taught(NamedTuple):
    """A task, and which of a learner's teachers chooses examples of it."""

    task: LinearTask
    teacher: Int[Array, ""]


class Shown(NamedTuple):
    """A target, and beside it the task, which is there for teachers."""

    y: Float[Array, "*batch n_y"]
    task: Taught


class OpenRegression(LinearRegression):
    """Linear regression whose feedback shows the task too: for `taught` learners alone.

    Its tasks are `Taught`. Losses are those of answers to the inputs that the domain poses,
    whatever is taught.
    """

    def query(self, task: Any, key: Key) -> Array:
        """Draws an input, as ever."""
        return super().query(task.task, key)

    def feedback(self, task: Any, query: Array, answer: object, key: Key) -> Any:
        """Gives the target as ever, and the task."""
        return Shown(super().feedback(task.task, query, answer, key), task)

    def loss(self, answer: Float[Array, " n_y"], feedback: Any) -> Array:
        """Computes the squared error, mean over outputs."""
        return super().loss(answer, feedback.y)


def sets(tasks: TaskSet, *names: str) -> list[TaskSet]:
    """Copies a set of tasks of linear regression once for each of a learner's teachers, by name.

    What `error` is read of them is ‖Ŵ − W‖² / ‖W‖².
    """
    domain = as_subclass(tasks.domain, OpenRegression)
    probes = {name: _with_error(probe) for name, probe in tasks.probes.items()}
    same = dataclasses.replace(tasks, domain=domain, probes=probes)
    sample = lambda i: Partial(_with_teacher, tasks.sample, np.int32(i))  # all of one program
    return [dataclasses.replace(same, name=n, sample=sample(i)) for i, n in enumerate(names)]


def _with_teacher(sample: Sample, teacher: Array, key: Key) -> Taught:
    return Taught(sample(key), teacher)


def taught(
    learner: Learner, teachers: Sequence[Teacher], n_x: int, examples: int, each: int = 1
) -> Learner:
    """Wraps a learner so that it is first shown a teacher's examples, then the posed ones.

    It is for the tasks that `sets` makes. Each example is shown for `each` updates, with noise of
    its own each time. The teacher is asked once for each task.
    """

    def init(key: Key) -> tuple[Array, Lesson, Any]:
        return jnp.int32(0), jnp.zeros((examples, n_x)), learner.init(key)

    def predict(state: tuple, query: Array) -> Array:
        return learner.predict(state[2], query)

    def update(state: tuple, query: Float[Array, "*batch n_x"], seen: Shown) -> tuple:
        t, lesson, own = state
        one = (lambda leaf: leaf) if learner.batch is None else (lambda leaf: leaf[0])
        task, teacher = jax.tree.map(one, seen.task)
        ask = lambda: jax.lax.switch(teacher, teachers, task)
        lesson = jax.lax.cond(t == 0, ask, lambda: lesson)
        now = lesson[jnp.minimum(t // each, examples - 1)]
        x = jnp.where((t < examples * each) & ~jnp.isnan(now), now, query)
        y = seen.y + (x - query) @ task.W.T  # as posed, with the same noise
        return t + 1, lesson, learner.update(own, x, y)

    return learner._replace(init=init, predict=predict, update=update, diagnose=None)


def none(task: LinearTask, examples: int) -> Lesson:
    """Stands for no teacher: inputs stay as they are posed."""
    return jnp.full((examples, task.W.shape[1]), jnp.nan)


def for_bayes(task: LinearTask, examples: int, least_first: bool = False) -> Lesson:
    """Inputs of norm √n_x along the right singular vectors, the greatest mode first, over and over.

    After one input x the posterior mean under an iid prior is a share of W x̂ x̂ᵀ, and noise: so it
    is nearest to W for the x̂ along which W is longest, its first right singular vector.
    """
    assert task.V is not None
    V = task.V[:, ::-1] if least_first else task.V
    n_x, K = V.shape
    return (n_x**0.5 * V.T)[jnp.arange(examples) % K]


def through(
    learner: Learner, task: LinearTask, start: Lesson, queries: Array, steps: int, rate: float
) -> Lesson:
    """Optimises the inputs of a lesson by gradient descent through a learner's own updates.

    What is minimised is the learner's error on given queries [q, n_x] after the lesson, which is
    taught without noise; every input has norm √n_x. The descent begins at `start` and takes `steps`
    steps, whose length falls from `rate` times the norm of all inputs to zero. Returns the best
    lesson met on the way.
    """
    size = start.shape[1] ** 0.5

    def error(lesson: Lesson) -> Array:
        def read(state: Any, x: Array) -> tuple[Any, None]:
            return learner.update(state, x, task.W @ x), None

        state, _ = jax.lax.scan(read, learner.init(jax.random.key(0)), lesson)
        answers = jax.vmap(learner.predict, (None, 0))(state, queries)
        return jnp.mean((answers - queries @ task.W.T) ** 2)

    def step(carry: tuple, i: Int[Array, ""]) -> tuple[tuple, None]:
        lesson, best, least = carry
        found, slope = jax.value_and_grad(error)(lesson)
        best, least = jnp.where(found < least, lesson, best), jnp.minimum(found, least)
        length = rate * (1 - i / steps) * jnp.linalg.norm(lesson)
        lesson = lesson - length * slope / jnp.maximum(jnp.linalg.norm(slope), 1e-12)
        lesson = size * lesson / jnp.linalg.norm(lesson, axis=1, keepdims=True)
        return (lesson, best, least), None

    first = start, start, jnp.asarray(jnp.inf)
    return jax.lax.scan(step, first, jnp.arange(steps + 1))[0][1]


def _with_error(probe: Probe) -> Probe:
    # From the answers themselves, so it counts what is not linear in them too: for isotropic tasks,
    # the expected squared error at inputs N(0, I) over ‖W‖².

    def read(taught: Taught, answers: Float[Array, "P n_y"]) -> dict[str, Array]:
        X, W = probe.queries, taught.task.W
        wrong = jnp.sum((answers - X @ W.T) ** 2)
        error = wrong / (jnp.sum(W**2) * jnp.sum(X**2) / X.shape[1])
        return {**probe.read(taught.task, answers), "error": error}

    return dataclasses.replace(probe, read=read, extras={**probe.extras, "error": ()})


def gain(
    times: Real[np.ndarray, " time"],
    end: float,
    random: Float[np.ndarray, "*batch time"],
    taught: Float[np.ndarray, "*batch time"],
) -> Float[np.ndarray, "*batch"] | np.floating:
    """Computes the teaching gain: steps of random examples over taught ones, to equal error.

    The error is that after the examples taught, at time `end`; errors of random examples are the
    lowest so far, linearly interpolated. Where they never come down to it, the steps that there are
    of them count, so that the gain is at least this.
    """
    below = taught[..., np.searchsorted(times, end), None] - np.minimum.accumulate(random, -1)
    steps = dynamics.learning_times(times, below[..., None], p=0.0)[..., 0]
    return np.where(np.isnan(steps), times[-1], steps) / end


class DemonstratedBandit(ContextualBandit):
    """A bandit whose feedback is what the correct action led to, whatever the learner chose.

    After Ho et al. (2018): communication in place of reinforcement. Losses are those of answers.
    """

    def feedback(
        self, task: BanditTask, query: Int[Array, ""], answer: object, key: Key
    ) -> Outcome:
        """Shows the correct action of the context, and draws its reward."""
        correct = jnp.arange(self.actions) == task.best[query]
        return super().feedback(task, query, jnp.where(correct, 0.0, -jnp.inf), key)
