"""The inner loop: one scan over steps, probing as it goes, mapped over tasks.

Per step t the domain poses a query, the learner answers, the domain gives feedback, the learner
updates. The probe asks a copy of the learner's state, so it never changes what comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from metadyn import mesh, prng
from metadyn.base import (
    STRENGTH,
    Answer,
    Domain,
    Feedback,
    Key,
    Keys,
    Learner,
    Params,
    Probe,
    Query,
    Sample,
    Task,
    indexed_keys,
)
from metadyn.errors import check
from metadyn.program_cost import largest

full_precision = jax.default_matmul_precision("highest")
"""Products of float32 numbers as they are, which GPUs and TPUs would round first: for all that
measures, and for all that a domain says, in training too."""
MOST_TIMES = 1_000_000  # at which anything is recorded: our choice
Probes = tuple[tuple[str, Probe], ...]
"""Probes by the name under which they are recorded, hashable."""


def interact(
    domain: Domain, task: Task, answer: Callable[[Query], Answer], keys: Keys
) -> tuple[Query, Answer, Feedback]:
    """Poses a query drawn with `keys[0]`, has it answered, and draws feedback with `keys[1]`.

    Returns all three.
    """
    query = full_precision(domain.query)(task, keys[0])
    answered = answer(query)
    return query, answered, full_precision(domain.feedback)(task, query, answered, keys[1])


@full_precision
def observe(domain: Domain, keys: Keys, sample: Sample | None = None) -> tuple[Query, Feedback]:
    """Poses the T pairs of an episode for each key, on tasks of training: leaves [T, ..., B].

    For domains whose feedback ignores the answers. `measure` poses the same task and pairs under
    the same key. `sample(key)` draws the tasks; by default the domain does.
    """
    T, B = domain.steps, len(keys)
    sample = sample or domain.sample_task
    key_task, key_episode = jax.vmap(jax.random.split)(keys).T
    _, key_steps = jax.vmap(jax.random.split)(key_episode).T

    # All pairs along one axis: on a CPU XLA draws more slowly along two short ones.
    repeated = lambda leaf: jnp.broadcast_to(leaf, (T, *leaf.shape)).reshape(-1, *leaf.shape[1:])
    tasks = jax.tree.map(repeated, jax.vmap(sample)(key_task))
    keys = jax.vmap(jax.random.fold_in)(repeated(key_steps), jnp.repeat(jnp.arange(T), B))
    pose = lambda task, pair: interact(domain, task, lambda query: None, pair)
    query, _, feedback = jax.vmap(pose)(tasks, jax.vmap(jax.random.split)(keys))
    apart = lambda leaf: jnp.moveaxis(leaf.reshape(T, B, *leaf.shape[1:]), 1, -1)
    return jax.tree.map(apart, (query, feedback))


def act(domain: Domain, learner: Learner, key: Key) -> tuple[Query, Feedback]:
    """Acts out an episode in which answers count: gives T queries and the feedback [T, ...].

    `measure` poses the same task under the same key, and the same learner does the same in it.
    """
    key_task, key_episode = jax.random.split(key)
    task = full_precision(domain.sample_task)(key_task)
    key_init, key_steps = jax.random.split(key_episode)

    def step(state, t):
        key = jax.random.fold_in(key_steps, t)
        answer = partial(learner.predict, state)
        query, _, feedback = interact(domain, task, answer, jax.random.split(key))
        return learner.update(state, query, feedback), (query, feedback)

    return jax.lax.scan(step, learner.init(key_init), jnp.arange(domain.steps))[1]


@full_precision
def run(
    domain: Domain,
    learner: Learner,
    task: Task,
    key: Key,
    times: Sequence[int],
    probes: Probes = (),
) -> dict[str, Array]:
    """Runs one learner through one episode of one task.

    Returns, with a leading axis over `times` (steps done; increasing, from 0), the probes' readings
    (see `recorded`), the learner's own diagnoses, and `loss`: the mean loss of its answers since
    the time before, each scored before its feedback was seen (NaN at t = 0).
    """
    times = checked(times)
    key_init, key_steps = jax.random.split(key)

    def step(t, carry):
        state, loss = stepped(domain, learner, task, key_steps, t, carry[0])
        return state, carry[1] + loss

    def look(state) -> dict[str, Array]:
        readings = dict(learner.diagnose(state) if learner.diagnose else {})
        for name, probe in probes:
            answers = jax.vmap(learner.predict, (None, 0))(state, probe.queries)
            found = probe.read(task, answers)
            readings |= {recorded(name, each): value for each, value in found.items()}
        return readings

    def segment(state, span):
        start, stop = span
        state, total = jax.lax.fori_loop(start, stop, step, (state, jnp.zeros(())))
        return state, look(state) | {"loss": total / (stop - start)}  # 0 / 0 at t = 0

    spans = np.append(times[:1], times[:-1]), times
    return jax.lax.scan(segment, learner.init(key_init), spans)[1]


def stepped(
    domain: Domain, learner: Learner, task: Task, key: Key, t: Int[Array, ""], state: Any
) -> tuple[Any, Float[Array, ""]]:
    """Takes step t of an episode: gives the learner's state after it, and its answer's loss."""
    pose = lambda state, keys: interact(domain, task, partial(learner.predict, state), keys)
    if learner.batch is None:
        query, answer, feedback = pose(state, jax.random.split(jax.random.fold_in(key, t)))
        loss = domain.loss(answer, feedback)
    else:
        keys = _batch_keys(learner.batch, learner.points, key, t)
        query, answer, feedback = jax.vmap(pose, (None, 0))(state, keys)
        loss = jnp.mean(jax.vmap(domain.loss)(answer, feedback))
    return learner.update(state, query, feedback), loss


def _batch_keys(
    batch: int, points: int | None, key: Key, t: Int[Array, ""]
) -> jaxtyping.Key[Array, "batch 2"]:
    """Two keys for each pair in batch t: fresh ones, or those of some of a fixed set of pairs."""
    key_t = jax.random.fold_in(key, t)
    if points is None:
        return jax.random.split(key_t, (batch, 2))
    chosen = jnp.arange(batch)
    if points != batch:  # from a key that no pair has
        chosen = jax.random.permutation(jax.random.fold_in(key_t, 2), points)[:batch]
    return jax.vmap(jax.random.split)(indexed_keys(key, chosen))


@partial(jax.jit, static_argnums=range(5))  # all but the four arrays, or trees of them
@full_precision
def measure(
    domain: Domain,
    make_learner: Callable[[Params], Learner],
    seeded: bool,
    times: tuple[int, ...],
    probes: Probes,
    params: Params,
    sample: Partial,
    key: Key,
    indices: Int[Array, " tasks"],
) -> dict[str, Array]:
    """Runs learner `make_learner(params)` on many tasks in one compiled call: [task, time, ...].

    If `seeded`, params have a leading seed axis and so do the results: [seed, task, time, ...].

    Task i, `sample(key_i)`, and all that happens in it come from `key` folded with
    its global index i. Tasks are spread over the devices and taken as many at a time on each as
    `mesh.task_chunk` says. All of it is computed in float32 proper on every backend.
    """

    def one(everywhere, index):
        params, sample, key = everywhere
        key_task, key_episode = jax.random.split(jax.random.fold_in(key, index))
        task, learner = sample(key_task), make_learner(params)
        return run(domain, learner, task, key_episode, times, probes)

    key = prng.fast(key)
    seeds = len(jax.tree.leaves(params)[0]) if seeded else 1

    def one_seed(params):
        taken, shared = _taken(make_learner(params), probes), bool(jax.tree.leaves(params))
        here = mesh.task_chunk(taken, seeds, shared)
        return mesh.map_tasks(one, (params, sample, key), indices, here)

    return mesh.map_seeds(one_seed, params) if seeded else one_seed(params)


def _taken(learner: Learner, probes: Probes) -> int:
    """Estimates the bytes that one task takes: the state, and the greatest array in a probe."""
    state = jax.eval_shape(learner.init, jax.random.key(0))
    size = max(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)), 1)
    answer = jax.make_jaxpr(jax.vmap(learner.predict, (None, 0)))
    answered = [largest(answer(state, probe.queries).jaxpr) for _, probe in probes]
    return size + max(answered, default=0)


def recorded(probe: str, reading: str) -> str:
    """Returns the name under which a reading of a probe is stored.

    The strengths of a probe have its own name. Its extras have theirs, if it is the main probe
    ("mode_strength"); otherwise the probe's name goes before it. So with its axis "mode" and its
    coordinate.
    """
    if reading == "strength":
        return probe
    return reading if probe == STRENGTH else f"{probe}_{reading}"


def log_spaced(steps: int, count: int) -> tuple[int, ...]:
    """Spaces whole numbers evenly in logarithm: 0, and up to `count` more, the last `steps`.

    Raises `ConfigError` for numbers below 1, and for more than `MOST_TIMES`.
    """
    check(steps >= 1, "steps", steps, "must be at least 1")
    check(1 <= count <= MOST_TIMES, "count", count, f"must be from 1 to {MOST_TIMES:,}")
    spaced = np.geomspace(1, steps, count) if count > 1 else np.array([steps])
    return (0, *(int(t) for t in np.unique(np.round(spaced)).astype(int)))


def checked(times: Sequence[int] | np.ndarray) -> Any:
    """Returns times as an array. Raises `ConfigError` unless they increase strictly from 0."""
    array = np.asarray(times)
    whole = array.ndim == 1 and len(array) > 1 and array.dtype.kind in "iu"
    increasing = whole and array[0] == 0 and bool((np.diff(array) > 0).all())
    check(increasing, "times", times, "must be whole numbers that increase strictly from 0")
    check(array[-1] < 2**31, "times", int(array[-1]), f"must be below {2**31}")
    return array.astype(np.int32)
