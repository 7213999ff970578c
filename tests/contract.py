"""Checks that every meta-learner that is a network must pass, whatever it is made of."""

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
"""`inner.observe` as one program. Otherwise each of its operations would be compiled by itself."""


@functools.cache
def made(config, name):
    """Returns the meta-learner for a domain, with a critic's head where answers affect feedback.

    It is cached for all tests, so that they share its programs.
    """
    return config.make(DOMAINS[name], int(name == "bandit"))


def scattered(meta, scale=0.2):
    """Returns parameters, biases included, that are large enough for answers to differ.

    `init` is not jitted: the programs that draw single arrays are the same for all networks.
    """
    rng = np.random.default_rng(1)
    noisy = lambda leaf: jnp.float32(leaf + np.float32(scale * rng.standard_normal(leaf.shape)))
    return jax.tree.map(noisy, jax.tree.map(np.asarray, meta.init(jax.random.key(0))))


def episodes(name, learner=None):
    """Returns seven episodes of a domain, each followed by a query, as a probe poses it.

    Where answers affect feedback, the learner acts in the episodes.
    """
    longer = dataclasses.replace(DOMAINS[name], steps=DOMAINS[name].steps + 1)
    keys = jax.random.split(jax.random.key(2), 7)
    if name == "bandit":
        return jax.jit(jax.vmap(partial(inner.act, longer, learner), out_axes=-1))(keys)
    return observe(longer, keys)


def unroll(meta, params, queries, feedback):
    """Returns answers in whole episodes, by a program that all tests of a meta-learner share."""
    return np.asarray(_unroll(meta, params, queries, feedback))


_unroll = jax.jit(lambda meta, *arguments: meta.unroll(*arguments), static_argnums=0)


def stepped(learner, queries, feedback, keys=None):
    """Steps a learner through given episodes, time-major, and returns its answers [T, ..., B].

    It starts each episode from that episode's key, or without `keys` all from the same key.
    """
    keys, key_axis = (jax.random.key(0), None) if keys is None else (keys, 0)

    def episode(key, queries, feedback):
        step = lambda state, pair: (learner.update(state, *pair), learner.predict(state, pair[0]))
        return jax.lax.scan(step, learner.init(key), (queries, feedback))[1]

    return np.asarray(jax.jit(jax.vmap(episode, (key_axis, -1, -1), -1))(keys, queries, feedback))


def step_by_step_is_whole(config, name, scale=0.2):
    """Checks that stepping and unrolling give the same numbers, a later query included."""
    meta, heads = made(config, name), int(name == "bandit")
    assert isinstance(meta, MetaLearner)
    assert meta.heads == heads
    params = scattered(meta, scale=scale)
    learner = meta.learner(params)
    queries, feedback = episodes(name, learner)
    unrolled = unroll(meta, params, queries, feedback)
    n = meta.domain.answer_size
    assert unrolled.shape == (meta.domain.steps + 1, n + heads, 7)
    assert np.std(unrolled[1:], axis=(0, 2)).min() > 1e-2
    bound = 1e-5 * np.abs(unrolled).max()
    np.testing.assert_allclose(stepped(learner, queries, feedback), unrolled[:, :n], 1e-5, bound)


def the_future_is_not_read(config):
    """Checks that answers do not depend on later feedback or queries."""
    meta = made(config, "linear")
    params = scattered(meta)
    queries, feedback = map(np.asarray, episodes("linear"))
    added_from = lambda t: np.float32(np.arange(len(queries)) >= t)[:, None, None]
    before = unroll(meta, params, queries, feedback)
    after = unroll(meta, params, queries + added_from(4), feedback + added_from(3))
    np.testing.assert_allclose(after[:4], before[:4], 1e-5, 1e-5)
    assert np.abs(after[4:] - before[4:]).min(axis=(0, 1)).max() > 1e-3


def all_parameters_are_trained(config, name):
    """Checks that the domain's objective gives each array a finite gradient that is not zero."""
    objective = actor_critic if name == "bandit" else prediction_loss
    meta = made(config, name)
    keys = indexed_keys(jax.random.key(3), jnp.arange(32))
    gradient = jax.jit(jax.grad(objective(meta.domain, meta).loss, has_aux=True))
    for leaf in jax.tree.leaves(gradient(scattered(meta), keys)[0]):
        assert np.all(np.isfinite(leaf))
        assert np.any(np.asarray(leaf) != 0)


def untrained_it_answers_zero(meta):
    """Checks that first answers are zero, the prior mean, and that seeds differ; for `linear`."""
    a, b, c = map(meta.init, map(jax.random.key, (0, 0, 1)))
    chex.assert_trees_all_equal(a, b)
    equal = jax.tree.map(np.array_equal, a["body"], c["body"])
    assert not all(jax.tree.leaves(equal))
    np.testing.assert_array_equal(unroll(meta, a, *episodes("linear")), 0)
