"""The learned optimiser: steps against NumPy, its estimator against quadrature and sampling."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import observe, scattered, stepped, unroll
from jax.flatten_util import ravel_pytree

import metadyn
from metadyn import inner
from metadyn.base import MetaLearner, indexed_keys
from metadyn.domains.bandit import ContextualBandit
from metadyn.domains.fourier import FourierRegression, band
from metadyn.domains.linear import LinearRegression
from metadyn.errors import ConfigError
from metadyn.learners.learned_optimizer import (
    DECAYS,
    LearnedOptimizerConfig,
    antithetic,
    evolution_strategies,
)

LINEAR = LinearRegression(3, 2, steps=5)
FOURIER = FourierRegression(band(1, 2), steps=5)


def made(domain, **fields):
    return LearnedOptimizerConfig(**{"inner_steps": 2, "width": 4, "scale": 0.3, **fields}).make(
        domain
    )


def start_key(b):
    """Returns the key of which whole episodes make the start of episode b."""
    return indexed_keys(jax.random.key(0), jnp.array([b]))[0]


@pytest.mark.parametrize("domain", [LINEAR, FOURIER])
def test_step_by_step_and_whole_episode_give_the_same_numbers(domain):
    meta = made(domain)
    params = scattered(meta)
    queries, feedback = observe(domain, jax.random.split(jax.random.key(2), 3))
    unrolled = unroll(meta, params, queries, feedback)
    assert isinstance(meta, MetaLearner)
    assert np.std(unrolled[0] - unrolled[-1]) > 0.02  # it learns something in between
    keys = indexed_keys(jax.random.key(0), jnp.arange(3))
    answers = stepped(meta.learner(params), queries, feedback, keys)
    np.testing.assert_allclose(answers, unrolled, atol=1e-5)


def test_answers_are_those_of_updates_derived_by_hand():
    """The updates are of a two-layer linear network, by a loop over weights in float64 NumPy."""
    meta = made(LINEAR, clip=0.5)
    params = scattered(meta)
    queries, feedback = observe(LINEAR, jax.random.split(jax.random.key(2), 1))
    p = {name: np.float64(value) for name, value in params.items()}
    x, y = (np.float64(leaf)[..., 0] for leaf in (queries, feedback))
    W = [np.float64(leaf) for leaf in jax.jit(meta.network.init)(start_key(0))]
    momenta = [[np.zeros_like(w) for w in W] for _ in DECAYS]
    answers, steps = [], 0
    for t in range(len(x)):
        answers.append(W[1] @ W[0] @ x[t])
        for _ in range(2):
            error = x[: t + 1] @ (W[1] @ W[0]).T - y[: t + 1]
            d = error.T @ x[: t + 1] / (t + 1)
            gradient = [W[1].T @ d, d @ W[0].T]
            norm = np.sqrt(sum((g**2).sum() for g in gradient))
            gradient = [g * min(1.0, 0.5 / norm) for g in gradient]
            for layer in (0, 1):
                for decay, m in zip(DECAYS, momenta, strict=True):
                    m[layer] = decay * m[layer] + (1 - decay) * gradient[layer]
                read = [gradient[layer], momenta[0][layer], momenta[1][layer], W[layer]]
                rms = [np.sqrt((a**2).mean()) for a in read]
                updated = W[layer].copy()
                for entry in np.ndindex(updated.shape):
                    inputs = [a[entry] / r for a, r in zip(read, rms, strict=True)]
                    shared = [*(np.log(r) / 10 for r in rms[:3]), np.log(1 + steps) / 5, layer]
                    hidden = np.tanh(p["hidden"] @ [*inputs, *shared] + p["bias"])
                    out = p["out"] @ hidden + p["offset"]
                    updated[entry] -= np.exp(p["log_rate"] + out[1]) * (inputs[2] + out[0])
                W[layer] = updated
            steps += 1
    unrolled = unroll(meta, params, queries, feedback)[..., 0]
    np.testing.assert_allclose(unrolled, answers, atol=2e-5)


def test_untrained_it_is_momentum_of_constant_speed():
    """At the first step every array of weights moves by the rate, as a root mean square."""
    meta = made(LINEAR, inner_steps=1, learning_rate=0.01)

    @jax.jit
    def change_of(key_init, key):
        learner = meta.learner(meta.init(key_init))
        before = learner.init(key)
        after = learner.update(before, jnp.ones(3), jnp.ones(2))
        return jax.tree.map(jnp.subtract, after.descent.weights, before.descent.weights)

    for change in change_of(jax.random.key(0), jax.random.key(1)):
        np.testing.assert_allclose(np.sqrt(np.mean(np.square(change))), 0.01, rtol=1e-4)


def cubic(theta):
    a, b = theta
    return 2 * a - b + a * b + a**2 * b - b**3


def test_the_estimator_is_the_gradient_of_the_smoothed_loss_by_enumeration():
    """All pairs of Gauss–Hermite nodes are enumerated, which is exact for a cubic of two Gaussians.

    E (a + σε)² (b + σδ) = (a² + σ²) b and E (b + σδ)³ = b³ + 3σ² b give the smoothed loss.
    """
    (a, b), sigma = (0.3, -0.7), 0.4
    nodes, weights = np.polynomial.hermite_e.hermegauss(6)
    weights = weights / weights.sum()
    noise = np.float32(list(itertools.product(nodes, repeat=2)))
    estimate = lambda noise: antithetic(cubic, jnp.array([a, b], jnp.float32), noise, sigma)
    values, estimates = map(np.float64, jax.jit(jax.vmap(estimate))(noise))
    mean, gradient = (np.outer(weights, weights).ravel() @ array for array in (values, estimates))
    slope = [2 + b + 2 * a * b, -1 + a + a**2 - 3 * b**2 - 2 * sigma**2]
    np.testing.assert_allclose(mean, cubic((a, b)) - 2 * sigma**2 * b, atol=1e-5)
    np.testing.assert_allclose(gradient, slope, atol=1e-5)


def test_the_objectives_gradient_is_unbiased():
    """It is compared, for a tiny learned optimiser, with differences of the smoothed loss."""
    domain, sigma, h, n = LinearRegression(1, 1, steps=3), 0.1, 0.02, 20_000
    meta = made(domain, hidden=1, learning_rate=0.05)
    flat, unravel = ravel_pytree(scattered(meta, scale=0.05))
    objective = evolution_strategies(domain, meta, sigma)
    gradient = jax.grad(lambda flat, key: objective.loss(unravel(flat), key[None])[0])
    estimate = jax.jit(jax.vmap(lambda key: gradient(flat, key)))
    estimates = np.asarray(estimate(jax.random.split(jax.random.key(3), n)), np.float64)
    mean, error = estimates.mean(0), estimates.std(0) / np.sqrt(n)

    @jax.jit
    def smoothed(flat, keys):
        def episode(key):
            noise_key, task_key, key = jax.random.split(key, 3)
            noise = jax.random.normal(noise_key, flat.shape)
            learner = meta.learner(unravel(flat + sigma * noise))
            readings = inner.run(domain, learner, domain.sample_task(task_key), key, (0, 3))
            return readings["loss"][1]

        return jnp.mean(jax.vmap(episode)(keys))

    keys = jax.random.split(jax.random.key(4), n)
    differences = [
        (smoothed(flat + h * e, keys) - smoothed(flat - h * e, keys)) / (2 * h)
        for e in np.eye(len(flat), dtype=np.float32)
    ]
    assert np.abs(mean / error).max() > 20  # the gradient is well above the noise
    assert np.all(np.abs(mean - differences) < 5 * error + 0.002)


def test_training_by_evolution_strategies_lowers_the_loss():
    domain, config = LinearRegression(1, 1, steps=6), LearnedOptimizerConfig(width=4)
    meta = config.make(domain)
    trained = metadyn.train(
        meta, domain, steps=100, seeds=1, learning_rate=2e-2, objective=config.objective,
        progress=False, seed=3,
    )  # fmt: skip
    x, y = map(np.asarray, observe(domain, jax.random.split(jax.random.key(5), 1000)))
    before, after = (
        float(((unroll(meta, params, x, y) - y) ** 2).mean())
        for params in (
            jax.jit(meta.init)(jax.random.key(3)),
            jax.tree.map(lambda leaf: np.asarray(leaf)[0], trained.params),
        )
    )
    assert after < 0.8 * before


@pytest.mark.parametrize(("domain", "heads"), [(ContextualBandit(), 0), (LINEAR, 1)])
def test_domains_that_it_cannot_serve_are_refused_when_it_is_made(domain, heads):
    with pytest.raises(ConfigError, match="learned optimiser"):
        LearnedOptimizerConfig().make(domain, heads)


def test_sigma_must_be_positive():
    with pytest.raises(ConfigError, match="sigma = 0"):
        LearnedOptimizerConfig(sigma=0)
