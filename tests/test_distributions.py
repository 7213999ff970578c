"""Mixtures and pools of tasks: their draws, and the loss of training on them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import observe, scattered

from metadyn.base import indexed_keys
from metadyn.domains.bandit import ContextualBandit
from metadyn.domains.distributions import Mixture, Pool
from metadyn.domains.linear import LinearRegression
from metadyn.errors import ConfigError
from metadyn.learners.bayes import bayes_linear, gaussian_linear
from metadyn.learners.bayes_mixture import bayes_mixture
from metadyn.learners.lstm import LSTMConfig
from metadyn.objectives import prediction_loss

DOMAIN = LinearRegression(3, 2, steps=5)
KEYS = indexed_keys(jax.random.key(0), jnp.arange(4000))


def test_a_mixture_draws_each_domain_equally_often_and_tells_which():
    mixture = Mixture((DOMAIN, DOMAIN.scaled(10.0)), (1.0, 0.01))
    tasks, component = jax.vmap(mixture)(KEYS), jax.vmap(mixture.component)(KEYS)
    size = np.asarray((tasks.W**2).mean((1, 2)))
    assert abs(np.mean(component) - 0.5) < 0.03  # four standard errors
    np.testing.assert_allclose(size[component == 0].mean(), 1 / 3, rtol=0.1)
    np.testing.assert_allclose(size[component == 1].mean(), 100 / 3, rtol=0.1)
    weights = jax.vmap(mixture.weight)(KEYS)
    np.testing.assert_array_equal(weights, np.where(component == 0, 1, np.float32(0.01)))


def test_the_domain_of_a_task_is_independent_of_its_draw():
    domain = ContextualBandit(1, 2, steps=2)
    mixture = Mixture((domain, dataclasses.replace(domain, p_high=0.9)))
    best = np.asarray(jax.jit(jax.vmap(mixture))(KEYS).best)[:, 0]
    joint = np.bincount(2 * best + np.asarray(jax.vmap(mixture.component)(KEYS)), minlength=4)
    np.testing.assert_allclose(joint / len(KEYS), 1 / 4, atol=0.05)


def test_a_pool_draws_only_its_own_tasks_and_each_equally_often():
    pool = Pool(DOMAIN, 8)
    pooled = np.asarray(jax.vmap(pool.task)(jnp.arange(8)).W)
    drawn = np.asarray(jax.vmap(pool)(KEYS).W)
    matches = (drawn[:, None] == pooled).all((2, 3))
    assert (matches.sum(1) == 1).all()
    assert np.abs(matches.mean(0) - 1 / 8).max() < 0.025  # five standard errors
    larger = jax.vmap(Pool(DOMAIN, 16).task)(jnp.arange(8)).W
    np.testing.assert_array_equal(larger, pooled)
    reseeded = jax.vmap(dataclasses.replace(pool, seed=1).task)(jnp.arange(8)).W
    assert not np.any(reseeded == pooled)


def test_a_scaled_domain_has_the_singular_values_of_the_scaled_prior():
    np.testing.assert_allclose(DOMAIN.scaled(4.0).spectrum(), DOMAIN.spectrum(4.0), rtol=1e-6)


def test_weighted_losses_are_the_weighted_mean_over_episodes():
    mixture = Mixture((DOMAIN, DOMAIN.scaled(10.0)), (1.0, 0.01))
    meta = LSTMConfig(hidden=4).make(DOMAIN)
    params, keys = scattered(meta), KEYS[:6]
    queries, feedback = observe(DOMAIN, keys, mixture)
    losses = ((jax.jit(meta.unroll)(params, queries, feedback) - feedback) ** 2).mean((0, 1))
    weights = [mixture.weight(jax.random.split(key)[0]) for key in keys]
    objective = prediction_loss(DOMAIN, meta, sample=mixture, weight=mixture.weight)
    loss, metrics = jax.jit(objective.loss)(params, keys)
    np.testing.assert_allclose(loss, np.mean(np.array(weights) * losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], losses.mean(), rtol=1e-5)
    assert len({float(weight) for weight in weights}) == 2


def test_a_mixtures_own_bayes_has_less_loss_on_it_than_bayes_of_one_part():
    scales = (0.5, 1.0, 8.0)
    domains = tuple(DOMAIN.scaled(scale) for scale in scales)
    queries, feedback = observe(DOMAIN, KEYS[:2000], Mixture(domains))

    def loss(learner):
        def episode(queries, feedback):
            step = lambda state, now: (learner.update(state, *now), learner.predict(state, now[0]))
            return jax.lax.scan(step, learner.init(KEYS[0]), (queries, feedback))[1]

        return ((jax.vmap(episode, -1, -1)(queries, feedback) - feedback) ** 2).mean()

    mixed = loss(bayes_mixture([gaussian_linear(domain) for domain in domains]))
    assert all(mixed < loss(bayes_linear(domain)) for domain in domains)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixture(()), "domains"),
        (lambda: Mixture((DOMAIN,), (1.0, 2.0)), "weights"),
        (lambda: Mixture((DOMAIN,), (0.0,)), "weights"),
        (lambda: Pool(DOMAIN, 0), "size"),
        (lambda: DOMAIN.scaled(0.0), "scale"),
    ],
)
def test_bad_mixtures_pools_and_scales_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
