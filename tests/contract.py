"""What every meta-learner that is a network is held to, whatever it is made of."""

import dataclasses
import functools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np

from metadyn import inner
from metadyn.base import MetaLearner, indexed_keys
from metadyn.domains.bandit import ContextualBandit
from metadyn.domains.fourier import FourierRegression
from metadyn.domains.linear import LinearRegression
from metadyn.objectives import actor_critic, prediction_loss

DOMAINS = {
    "linear": LinearRegression(3, 2, steps=6),
    "one_step": LinearRegression(3, 2, steps=1),
    "fourier": FourierRegression(steps=40),
    "bandit": ContextualBandit(3, 4, steps=12),
}

observe = jax.jit(inner.observe, static_argnums=(0, 2))
"""`inner.observe` as one program, where otherwise each of its operations is compiled."""


@functools.cache
def made(config, name):
    """The meta-learner for a domain, with a critic's head where answers count.

    It is the same for all tests, so that they share its programs.
    """
    return config.make(DOMAINS[name], int(name == "bandit"))


def scattered(meta, scale=0.2):
    """Parameters large enough to answer, biases included.

    Not one program: those that draw single arrays are the same for all networks.
    """
    rng = np.random.default_rng(1)
    noisy = lambda leaf: jnp.float32(leaf + np.float32(scale * rng.standard_normal(leaf.shape)))
    return jax.tree.map(noisy, jax.tree.map(np.asarray, meta.init(jax.random.key(0))))


def episodes(name, learner=None):
    """Seven episodes of a domain, with a query after them, as a probe poses it.

    The learner acts in them where answers count.
    """
    longer = dataclasses.replace(DOMAINS[name], steps=DOMAINS[name].steps + 1)
    keys = jax.random.split(jax.random.key(2), 7)
    if name == "bandit":
        return jax.jit(jax.vmap(partial(inner.act, longer, learner), out_axes=-1))(keys)
    return observe(longer, keys)


def unroll(meta, params, queries, feedback):
    """Answers in whole episodes, by a program that all tests of a meta-learner share."""
    return np.asarray(_unroll(meta, params, queries, feedback))


_unroll = jax.jit(lambda meta, *given: meta.unroll(*given), static_argnums=0)


def stepped(learner, queries, feedback, keys=None):
    """The answers of a learner that is stepped through given episodes, time-major, [T, ..., B].

    It starts in each of them from its key, or in all from the same.
    """
    keys, each = (jax.random.key(0), None) if keys is None else (keys, 0)

    def one(key, queries, feedback):
        step = lambda state, pair: (learner.update(state, *pair), learner.predict(state, pair[0]))
        return jax.lax.scan(step, learner.init(key), (queries, feedback))[1]

    return np.asarray(jax.jit(jax.vmap(one, (each, -1, -1), -1))(keys, queries, feedback))


def step_by_step_is_whole(config, name, scale=0.2):
    """Both forms give the same numbers, a query after the episode included."""
    meta, heads = made(config, name), int(name == "bandit")
    assert isinstance(meta, MetaLearner)
    assert meta.heads == heads
    params = scattered(meta, scale=scale)
    learner = meta.learner(params)
    queries, feedback = episodes(name, learner)
    whole = unroll(meta, params, queries, feedback)
    n = meta.domain.answer_size
    assert whole.shape == (meta.domain.steps + 1, n + heads, 7)
    assert np.std(whole[1:], axis=(0, 2)).min() > 1e-2
    bound = 1e-5 * np.abs(whole).max()
    np.testing.assert_allclose(stepped(learner, queries, feedback), whole[:, :n], 1e-5, bound)


def the_future_is_not_read(config):
    """Answers do not change with what is fed back or asked later."""
    meta = made(config, "linear")
    params = scattered(meta)
    queries, feedback = map(np.asarray, episodes("linear"))
    from_on = lambda t: np.float32(np.arange(len(queries)) >= t)[:, None, None]
    before = unroll(meta, params, queries, feedback)
    after = unroll(meta, params, queries + from_on(4), feedback + from_on(3))
    np.testing.assert_allclose(after[:4], before[:4], 1e-5, 1e-5)
    assert np.abs(after[4:] - before[4:]).min(axis=(0, 1)).max() > 1e-3


def all_parameters_are_trained(config, name):
    """Every array has a finite gradient that is not zero, under the objective of a domain."""
    objective = actor_critic if name == "bandit" else prediction_loss
    meta = made(config, name)
    keys = indexed_keys(jax.random.key(3), jnp.arange(32))
    gradient = jax.jit(jax.grad(objective(meta.domain, meta).loss, has_aux=True))
    for leaf in jax.tree.leaves(gradient(scattered(meta), keys)[0]):
        assert np.all(np.isfinite(leaf))
        assert np.any(np.asarray(leaf) != 0)


def untrained_it_answers_zero(meta):
    """The prior mean is answered at first, and seeds start apart. For meta-learners of `linear`."""
    a, b, c = map(meta.init, map(jax.random.key, (0, 0, 1)))
    chex.assert_trees_all_equal(a, b)
    same = jax.tree.map(np.array_equal, a["body"], c["body"])
    assert not all(jax.tree.leaves(same))
    np.testing.assert_array_equal(unroll(meta, a, *episodes("linear")), 0)
