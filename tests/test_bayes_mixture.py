"""Bayes under mixtures and over pools of tasks, against integration and enumeration in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from metadyn.domains.distributions import Pool
from metadyn.domains.fourier import FourierRegression, band
from metadyn.domains.linear import LinearRegression
from metadyn.errors import ConfigError
from metadyn.learners.bayes import bayes_fourier, bayes_linear, gaussian_fourier, gaussian_linear
from metadyn.learners.bayes_mixture import bayes_memorising, bayes_mixture


def answers(learner, x, y):
    """Returns the answer to each query, before its feedback [T, n_y]."""

    def step(state, pair):
        return learner.update(state, *pair), learner.predict(state, pair[0])

    pairs = jnp.float32(x), jnp.float32(y)
    return np.asarray(jax.lax.scan(step, learner.init(jax.random.key(0)), pairs)[1])


@pytest.mark.parametrize("scales", [(0.5, 4.0), (1.0,), (0.25, 1.0, 8.0)])
def test_the_mixture_is_numerical_integration_over_the_weight(scales):
    """With one input and one output, E[w | pairs] is by quadrature under the mixture's density."""
    domain = LinearRegression(1, 1, sigma=0.7)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 1)), rng.normal(size=(5, 1))
    mixture = bayes_mixture([gaussian_linear(domain.scaled(scale)) for scale in scales])
    answered = answers(mixture, x, y)
    for t in range(5):

        def posterior(w, t=t):
            error = (y[:t, 0] - w * x[:t, 0]) / domain.sigma
            prior = sum(np.exp(-0.5 * (w / s) ** 2) / s for s in scales)
            return prior * np.exp(-0.5 * (error**2).sum())

        ends = {"points": (-1.0, 0.0, 1.0), "limit": 200}
        numerator, mass = (
            quad(lambda w, power=power: w**power * posterior(w), -50, 50, **ends)[0]
            for power in (1, 0)
        )
        mean = numerator / mass
        np.testing.assert_allclose(answered[t, 0], mean * x[t, 0], atol=2e-5)


def test_the_mixture_weighs_by_the_joint_density_of_all_outputs():
    """With three inputs and two correlated outputs, the definition is computed in float64."""
    R = ((1.0, 0.6), (0.6, 2.0))
    base = LinearRegression(3, 2, sigma=0.3, row_covariance=R, mean=((1.0, 0, 0), (0, 0, -1.0)))
    domains = [base.scaled(scale) for scale in (0.5, 1.0, 3.0)]
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(6, 2))
    answered = answers(bayes_mixture([gaussian_linear(domain) for domain in domains]), x, y)
    for t in range(6):
        logs, means = [], []
        for domain in domains:
            A, prior = np.kron(x[:t], np.eye(2)), np.kron(domain.C, domain.R)
            S = A @ prior @ A.T + 0.3**2 * np.eye(2 * t)
            error, gain = y[:t].ravel() - A @ domain.M.T.ravel(), prior @ A.T @ np.linalg.inv(S)
            logs.append(-0.5 * (error @ np.linalg.solve(S, error) + np.linalg.slogdet(S)[1]))
            means.append((domain.M.T.ravel() + gain @ error).reshape(3, 2).T @ x[t])
        weights = np.exp(np.array(logs) - max(logs))
        np.testing.assert_allclose(answered[t], weights @ means / weights.sum(), atol=1e-4)


def test_a_mixture_of_bands_comes_to_the_band_that_the_function_is_of():
    base = FourierRegression((*band(1, 2), 0.0, 0.0), sigma=0.05, steps=30)
    high = dataclasses.replace(base, spectrum=band(3, 4))
    models = [gaussian_fourier(domain, (1, 2, 3, 4)) for domain in (base, high)]
    task = high.sample_task(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), (30, 2))
    pairs = [(x := high.query(task, a), high.feedback(task, x, None, b)) for a, b in keys]
    x, y = (np.array(arrays) for arrays in zip(*pairs, strict=True))
    mixed, right, wrong = (
        answers(learner, x, y)
        for learner in (bayes_mixture(models), bayes_fourier(high), bayes_fourier(base))
    )
    np.testing.assert_allclose(mixed[15:], right[15:], atol=1e-3)
    assert np.abs(wrong[15:] - right[15:]).max() > 0.1
    np.testing.assert_allclose(mixed[0], 0, atol=1e-6)


def test_the_memorising_bayes_is_enumeration_of_the_pool():
    domain = LinearRegression(2, 3, sigma=0.5)
    pool = Pool(domain, 20, seed=3)
    tasks = [np.float64(pool.task(jnp.int32(i)).W) for i in range(20)]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 2))
    y = x @ tasks[7].T + 0.5 * rng.normal(size=(8, 3))
    answered = answers(bayes_memorising(pool), x, y)
    for t in range(8):
        likelihood = [
            np.prod([np.exp(-((y[i] - W @ x[i]) ** 2).sum() / (2 * 0.5**2)) for i in range(t)])
            for W in tasks
        ]
        W = np.tensordot(likelihood, tasks, 1) / np.sum(likelihood)
        np.testing.assert_allclose(answered[t], W @ x[t], atol=1e-4)


def test_a_large_pool_is_the_prior_to_the_memorising_bayes():
    """With many tasks and a broad posterior, the sum over the pool is a Monte Carlo integral."""
    domain = LinearRegression(1, 1, sigma=1.0)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 1)), rng.normal(size=(5, 1))
    memorising = answers(bayes_memorising(Pool(domain, 20_000)), x, y)
    np.testing.assert_allclose(memorising, answers(bayes_linear(domain), x, y), atol=0.03)


def test_nothing_to_mix_is_refused():
    with pytest.raises(ConfigError, match="models"):
        bayes_mixture([])
