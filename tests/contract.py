"""What every meta-learner that is a network is held to, whatever it is made of."""

import dataclasses
from functools import partial

import jax
import jax.flatten_util
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


def scattered(meta, seed=1, scale=0.2):
    """Parameters large enough to answer, biases included."""

    @jax.jit
    def scatter(key, noise):
        flat, unravel = jax.flatten_util.ravel_pytree(meta.init(key))
        return unravel(flat + scale * jax.random.normal(noise, flat.shape))

    return scatter(jax.random.key(0), jax.random.key(seed))


def stepped(learner, queries, feedback, keys=None):
    """The answers of a learner that is stepped through given episodes, time-major, [T, ..., B].

    It starts in each of them from its key, or in all from the same.
    """
    if keys is None:
        keys = jnp.repeat(jax.random.key(0)[None], jax.tree.leaves(feedback)[0].shape[-1])

    def one(key, queries, feedback):
        step = lambda state, pair: (learner.update(state, *pair), learner.predict(state, pair[0]))
        return jax.lax.scan(step, learner.init(key), (queries, feedback))[1]

    return jax.jit(jax.vmap(one, (0, -1, -1), -1))(keys, queries, feedback)


def step_by_step_is_whole(config, name, scale=0.2):
    """Both forms give the same numbers, a query after the episode included, as a probe poses it."""
    domain = DOMAINS[name]
    heads = 1 if name == "bandit" else 0
    meta = config.make(domain, heads)
    assert isinstance(meta, MetaLearner)
    assert meta.heads == heads
    params = scattered(meta, scale=scale)
    learner = meta.learner(params)
    longer = dataclasses.replace(domain, steps=domain.steps + 1)
    keys = jax.random.split(jax.random.key(2), 7)
    act = jax.jit(jax.vmap(partial(inner.act, longer, learner), out_axes=-1))
    queries, feedback = act(keys)
    whole = np.asarray(jax.jit(meta.unroll)(params, queries, feedback))
    n = domain.answer_size
    assert whole.shape == (longer.steps, n + heads, 7)
    assert np.std(whole[1:], axis=(0, 2)).min() > 1e-2
    bound = 1e-5 * np.abs(whole).max()
    np.testing.assert_allclose(stepped(learner, queries, feedback), whole[:, :n], 1e-5, bound)


def the_future_is_not_read(config):
    """Answers do not change with what is fed back or asked later."""
    domain = DOMAINS["linear"]
    meta = config.make(domain)
    params = scattered(meta)
    queries, feedback = observe(domain, jax.random.split(jax.random.key(2), 5))
    unroll = jax.jit(meta.unroll)
    before = unroll(params, queries, feedback)
    after = unroll(params, queries.at[4:].add(1.0), feedback.at[3:].add(1.0))
    np.testing.assert_allclose(after[:4], before[:4], 1e-5, 1e-5)
    assert np.abs(after[4:] - before[4:]).min(axis=(0, 1)).max() > 1e-3


def all_parameters_are_trained(config):
    """Every array has a finite gradient that is not zero, under both objectives."""
    for domain, objective in (
        (DOMAINS["linear"], prediction_loss),
        (DOMAINS["bandit"], actor_critic),
    ):
        meta = config.make(domain, heads=int(objective is actor_critic))
        keys = indexed_keys(jax.random.key(3), jnp.arange(32))
        gradient = jax.jit(jax.grad(objective(domain, meta).loss, has_aux=True))
        for leaf in jax.tree.leaves(gradient(scattered(meta), keys)[0]):
            assert np.all(np.isfinite(leaf))
            assert np.any(np.asarray(leaf) != 0)


def untrained_it_answers_zero(meta):
    """The prior mean is answered at first, and seeds start apart."""
    a, b, c = map(jax.jit(meta.init), map(jax.random.key, (0, 0, 1)))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    same = jax.tree.map(lambda a, c: bool(jnp.array_equal(a, c)), a["body"], c["body"])
    assert not all(jax.tree.leaves(same))
    queries, feedback = observe(meta.domain, jax.random.split(jax.random.key(2), 5))
    np.testing.assert_array_equal(jax.jit(meta.unroll)(a, queries, feedback), 0)
