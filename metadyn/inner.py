"""The inner loop: one scan over an episode's steps that also probes the learner, mapped over tasks.

At each step t the domain poses a query, the learner answers, the domain gives feedback, and the
learner updates its state. Probes query a copy of that state, so they never change later steps.
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
"""Decorator under which matrix products do not round their float32 inputs, as GPUs and TPUs
otherwise do. All measurements use it, and so do all draws of a domain, in training too."""
MAX_TIMES = 1_000_000  # maximum number of times at which readings are recorded: our choice
Probes = tuple[tuple[str, Probe], ...]
"""Probes with the names their readings are stored under, as hashable (name, probe) pairs."""


def interact(
    domain: Domain, task: Task, answer: Callable[[Query], Answer], keys: Keys
) -> tuple[Query, Answer, Feedback]:
    """Draws a query with `keys[0]`, calls `answer` on it, and draws the feedback with `keys[1]`.

    Returns the query, the answer and the feedback.
    """
    query = full_precision(domain.query)(task, keys[0])
    reply = answer(query)
    return query, reply, full_precision(domain.feedback)(task, query, reply, keys[1])


@full_precision
def observe(domain: Domain, keys: Keys, sample: Sample | None = None) -> tuple[Query, Feedback]:
    """Draws the T query-feedback pairs of one training episode per key: leaves [T, ..., B].

    For domains whose feedback does not depend on the answers. Under the same key `measure` draws
    the same task and pairs. `sample(key)` draws the tasks; the default is `domain.sample_task`.
    """
    T, B = domain.steps, len(keys)
    sample = sample or domain.sample_task
    key_task, key_episode = jax.vmap(jax.random.split)(keys).T
    _, key_steps = jax.vmap(jax.random.split)(key_episode).T

    # All T·B pairs lie along one axis, because on a CPU XLA draws more slowly along two short ones.
    repeat = lambda leaf: jnp.broadcast_to(leaf, (T, *leaf.shape)).reshape(-1, *leaf.shape[1:])
    tasks = jax.tree.map(repeat, jax.vmap(sample)(key_task))
    keys = jax.vmap(jax.random.fold_in)(repeat(key_steps), jnp.repeat(jnp.arange(T), B))
    draw_pair = lambda task, two_keys: interact(domain, task, lambda query: None, two_keys)
    query, _, feedback = jax.vmap(draw_pair)(tasks, jax.vmap(jax.random.split)(keys))
    split_axes = lambda leaf: jnp.moveaxis(leaf.reshape(T, B, *leaf.shape[1:]), 1, -1)
    return jax.tree.map(split_axes, (query, feedback))


def act(domain: Domain, learner: Learner, key: Key) -> tuple[Query, Feedback]:
    """Runs a learner through one training episode; returns the queries and feedback [T, ...].

    For domains whose feedback depends on the answers. Under the same key `measure` draws the same
    task, and the same learner acts identically in it.
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
    """Runs one learner through one episode of one task, with readings at the given `times`.

    Times count completed steps and increase strictly from 0. Returns arrays with a leading axis
    over times: the probes' readings (named by `reading_name`), the learner's diagnostics, and
    `loss`, the mean loss of the answers since the previous time (NaN at t = 0). Each answer is
    scored before the learner sees its feedback.
    """
    times = checked_times(times)
    key_init, key_steps = jax.random.split(key)

    def step(t, carry):
        state, total = carry
        state, loss = episode_step(domain, learner, task, key_steps, t, state)
        return state, total + loss

    def read_probes(state) -> dict[str, Array]:
        readings = dict(learner.diagnose(state) if learner.diagnose else {})
        for name, probe in probes:
            answers = jax.vmap(learner.predict, (None, 0))(state, probe.queries)
            values = probe.read(task, answers)
            readings |= {reading_name(name, reading): value for reading, value in values.items()}
        return readings

    def segment(state, span):
        start, stop = span
        state, total = jax.lax.fori_loop(start, stop, step, (state, jnp.zeros(())))
        return state, read_probes(state) | {"loss": total / (stop - start)}  # 0 / 0 at t = 0

    spans = np.append(times[:1], times[:-1]), times
    return jax.lax.scan(segment, learner.init(key_init), spans)[1]


def episode_step(
    domain: Domain, learner: Learner, task: Task, key: Key, t: Int[Array, ""], state: Any
) -> tuple[Any, Float[Array, ""]]:
    """Runs step t of an episode; returns the learner's next state and its (batch's mean) loss."""
    exchange = lambda state, keys: interact(domain, task, partial(learner.predict, state), keys)
    if learner.batch is None:
        query, answer, feedback = exchange(state, jax.random.split(jax.random.fold_in(key, t)))
        loss = domain.loss(answer, feedback)
    else:
        keys = _batch_keys(learner.batch, learner.points, key, t)
        query, answer, feedback = jax.vmap(exchange, (None, 0))(state, keys)
        loss = jnp.mean(jax.vmap(domain.loss)(answer, feedback))
    return learner.update(state, query, feedback), loss


def _batch_keys(
    batch: int, points: int | None, key: Key, t: Int[Array, ""]
) -> jaxtyping.Key[Array, "batch 2"]:
    """Returns two keys per pair of batch t: fresh keys, or those of pairs in a fixed dataset."""
    key_t = jax.random.fold_in(key, t)
    if points is None:
        return jax.random.split(key_t, (batch, 2))
    pair_indices = jnp.arange(batch)
    if points != batch:  # fold in 2, for a key that no pair uses
        pair_indices = jax.random.permutation(jax.random.fold_in(key_t, 2), points)[:batch]
    return jax.vmap(jax.random.split)(indexed_keys(key, pair_indices))


@partial(jax.jit, static_argnums=range(4))  # the other four are pytrees of arrays
@full_precision
def measure(
    domain: Domain,
    make_learner: Callable[[Params], Learner],
    times: tuple[int, ...],
    probes: Probes,
    params: Params,
    sample: Partial,
    key: Key,
    indices: Int[Array, " tasks"],
) -> dict[str, Array]:
    """Runs the learner `make_learner(params)` on many tasks in one compiled call.

    Returns readings [task, time, ...], for empty params. Otherwise the leaves of params have a
    leading seed axis, and readings are [seed, task, time, ...]. Task i is `sample(key_i)`; it and
    every draw in its episode come from `key` folded with its global index i. Tasks are sharded over
    the devices, each of which runs `mesh.task_chunk` of them at a time. Every backend computes in
    full float32.
    """

    def run_task(replicated, index):
        params, sample, key = replicated
        key_task, key_episode = jax.random.split(jax.random.fold_in(key, index))
        task, learner = sample(key_task), make_learner(params)
        return run(domain, learner, task, key_episode, times, probes)

    key = prng.fast(key)
    weights = jax.tree.leaves(params)
    seeds = len(weights[0]) if weights else 1

    def run_seed(params):
        task_bytes = _bytes_per_task(make_learner(params), probes)
        chunk = mesh.task_chunk(task_bytes, seeds, bool(weights))
        return mesh.map_tasks(run_task, (params, sample, key), indices, chunk)

    return mesh.map_seeds(run_seed, params) if weights else run_seed(params)


def _bytes_per_task(learner: Learner, probes: Probes) -> int:
    """Estimates the bytes that one task needs: the state, and the largest array in a probe."""
    state = jax.eval_shape(learner.init, jax.random.key(0))
    state_bytes = max(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)), 1)
    trace = jax.make_jaxpr(jax.vmap(learner.predict, (None, 0)))
    probe_bytes = [largest(trace(state, probe.queries).jaxpr) for _, probe in probes]
    return state_bytes + max(probe_bytes, default=0)


def reading_name(probe: str, reading: str) -> str:
    """Returns the name under which a probe's reading is stored.

    Mode strengths are stored under the probe's own name. Extras of the main probe ("mode_strength")
    keep their names; those of other probes get the probe's name as a prefix. The same holds for the
    probe's axis "mode" and its coordinate.
    """
    if reading == "strength":
        return probe
    return reading if probe == STRENGTH else f"{probe}_{reading}"


def log_spaced(steps: int, count: int) -> tuple[int, ...]:
    """Returns log-spaced whole numbers: 0, then up to `count` more, of which the last is `steps`.

    Raises `ConfigError` unless `steps` is at least 1 and `count` from 1 to `MAX_TIMES`.
    """
    check(steps >= 1, "steps", steps, "must be at least 1")
    check(1 <= count <= MAX_TIMES, "count", count, f"must be from 1 to {MAX_TIMES:,}")
    spaced = np.geomspace(1, steps, count) if count > 1 else np.array([steps])
    return (0, *(int(t) for t in np.unique(np.round(spaced)).astype(int)))


def checked_times(times: Sequence[int] | np.ndarray) -> Any:
    """Returns times as int32. Raises `ConfigError` unless they are integers that rise from 0."""
    array = np.asarray(times)
    integral = array.ndim == 1 and len(array) > 1 and array.dtype.kind in "iu"
    increasing = integral and array[0] == 0 and bool((np.diff(array) > 0).all())
    check(increasing, "times", times, "must be whole numbers that increase strictly from 0")
    check(array[-1] < 2**31, "times", int(array[-1]), f"must be below {2**31}")
    return array.astype(np.int32)
