"""Exact Bayes against float64 NumPy posteriors, and against its known learning curve."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Kernel, StationaryKernelMixin

from metadyn import inner
from metadyn.domains.bandit import ContextualBandit
from metadyn.domains.fourier import FourierRegression, band, function_value
from metadyn.domains.linear import LinearRegression
from metadyn.errors import ConfigError
from metadyn.learners.bayes import (
    bayes_bandit,
    bayes_fourier,
    bayes_linear,
    ridge,
)


def positive_definite(rng, n):
    root = rng.normal(size=(n, n))
    return tuple(map(tuple, (root @ root.T / n + 0.1 * np.eye(n)).tolist()))


def answers(learner, x, y, queries):
    """Returns answers to queries before the first pair and after each [T + 1, queries, n_y]."""

    @jax.jit
    def run(key, x, y, queries):
        answer = lambda state: jax.vmap(learner.predict, (None, 0))(state, queries)
        step = lambda state, pair: (learner.update(state, *pair), answer(state))
        state, before = jax.lax.scan(step, learner.init(key), (x, y))
        return jnp.concatenate([before, answer(state)[None]])

    return np.asarray(run(jax.random.key(0), *map(np.float32, (x, y, queries))))


def learned_weights(learner, x, y):
    """Returns the weight matrix before the first pair and after each [T + 1, n_y, n_x]."""
    return answers(learner, x, y, np.eye(x.shape[1])).swapaxes(1, 2)


@pytest.mark.parametrize(("n_x", "n_y"), [(3, 3), (2, 4), (5, 2)])
@pytest.mark.parametrize("sigma", [1e-3, 0.1, 3.0])
def test_posterior_mean_matches_float64_numpy_on_random_priors(n_x, n_y, sigma):
    rng = np.random.default_rng(n_x * 10 + n_y)
    R, C = positive_definite(rng, n_y), positive_definite(rng, n_x)
    M = tuple(map(tuple, rng.normal(size=(n_y, n_x)).tolist()))
    domain = LinearRegression(
        n_x, n_y, sigma, mean=M, row_covariance=R, column_covariance=C, steps=8
    )
    W = np.array(M) + np.linalg.cholesky(R) @ rng.normal(size=(n_y, n_x)) @ np.linalg.cholesky(C).T
    x = rng.normal(size=(8, n_x))
    y = x @ W.T + sigma * rng.normal(size=(8, n_y))
    weights = learned_weights(bayes_linear(domain), x, y)
    # With columns stacked, vec(W) has prior N(vec M, C ⊗ R); y_t = (x_tᵀ ⊗ I) vec(W) + noise.
    prior, mean = np.kron(C, R), np.array(M).T.ravel()
    for t in range(9):
        A = np.kron(x[:t], np.eye(n_y))
        S = A @ prior @ A.T + sigma**2 * np.eye(t * n_y)
        posterior = mean + prior @ A.T @ np.linalg.solve(S, y[:t].ravel() - A @ mean)
        expected = posterior.reshape(n_x, n_y).T
        np.testing.assert_allclose(weights[t], expected, atol=2e-3 * np.abs(W).max())


def test_posterior_stays_exact_over_a_long_episode():
    rng = np.random.default_rng(0)
    domain = LinearRegression(4, 4, sigma=0.01, steps=500)
    W, x = rng.normal(size=(4, 4)) / 2, rng.normal(size=(500, 4))
    y = x @ W.T + 0.01 * rng.normal(size=(500, 4))
    gram = x.T @ x + 0.01**2 * 4 * np.eye(4)
    expected = np.linalg.solve(gram, x.T @ y).T
    np.testing.assert_allclose(learned_weights(bayes_linear(domain), x, y)[-1], expected, atol=1e-4)


SPECTRA = {"low_pass": band(1, 4), "band_pass": band(3, 5), "with_a_constant": (0.5, 0.25, 0, 1.0)}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("sigma", [0.01, 0.1, 1.0])
def test_fourier_bayes_is_scikit_learns_gaussian_process(spectrum, sigma):
    """The GP, in float64, has the stationary kernel of the same spectrum."""
    v = np.array(SPECTRA[spectrum])

    class Stationary(StationaryKernelMixin, Kernel):
        def __init__(self):
            """Has no parameters to fit."""

        def __call__(self, X, Y=None, eval_gradient=False):
            lag = X - (X if Y is None else Y).T
            return sum(v_k * np.cos(2 * np.pi * k * lag) for k, v_k in enumerate(v))

        def diag(self, X):
            return np.full(len(X), v.sum())

    rng = np.random.default_rng(0)
    domain = FourierRegression(SPECTRA[spectrum], sigma)
    x = rng.uniform(-0.5, 0.5, size=(30, 1))
    y = np.sin(7 * x) + sigma * rng.normal(size=x.shape)
    grid = np.linspace(-0.5, 0.5, 40)[:, None]
    answered = answers(bayes_fourier(domain), x, y, grid)[..., 0]
    np.testing.assert_array_equal(answered[0], 0)
    for t in (1, 5, 15, 30):
        process = GaussianProcessRegressor(Stationary(), alpha=sigma**2, optimizer=None)
        expected = process.fit(x[:t], y[:t]).predict(grid)
        np.testing.assert_allclose(answered[t], expected, atol=2e-3)


def test_fourier_bayes_without_noise_finds_the_function():
    domain = FourierRegression(band(1, 4), sigma=0.0)
    task = jax.jit(domain.sample_task)(jax.random.key(0))
    x = jax.jit(jax.vmap(partial(domain.query, task)))(jax.random.split(jax.random.key(1), 40))
    f = jax.jit(jax.vmap(partial(function_value, task)))
    grid = np.float32(np.linspace(-0.5, 0.5, 50))
    answered = answers(bayes_fourier(domain), x, f(x), grid[:, None])[-1]
    np.testing.assert_allclose(answered, f(grid[:, None]), atol=2e-3)


def test_fourier_bayes_learns_every_frequency_by_the_known_share_from_one_pair():
    """As f̂(x) = Σ_k v_k cos 2πk(x − x₁) y₁ / (Σ v + σ²), E a_k is ½ v_k / (Σ v + σ²)."""
    domain = FourierRegression((0.0, 0.1, 0.6, 0.3), sigma=0.5, steps=20)
    learner = bayes_fourier(domain)
    strength = np.asarray(
        inner.measure(
            domain,
            lambda params: learner,
            (0, 1, 20),
            (("mode_strength", domain.probe(domain.amplitudes(), 16)),),
            (),
            Partial(domain.evaluation_task, amplitudes=jnp.float32(domain.amplitudes())),
            jax.random.key(0),
            jnp.arange(4096),
        )["mode_strength"]
    )
    mean, error = strength.mean(0), strength.std(0) / 64
    expected = 0.5 * np.array([0.1, 0.6, 0.3]) / 1.25
    assert np.all(np.abs(mean[1] - expected) < 4 * error[1])
    assert np.all(mean[2] > 0.4)


def test_ridge_and_its_limit_least_squares_match_numpy():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(7, 4)), rng.normal(size=(7, 2))
    ridged, limit = (learned_weights(ridge(4, 2, p), x, y) for p in (0.3, 1e-5))
    for t in range(1, 8):
        expected = np.linalg.solve(x[:t].T @ x[:t] + 0.3 * np.eye(4), x[:t].T @ y[:t]).T
        np.testing.assert_allclose(ridged[t], expected, atol=1e-5)
        least_norm = np.linalg.lstsq(x[:t], y[:t], rcond=None)[0].T
        np.testing.assert_allclose(limit[t], least_norm, atol=2e-3 * np.abs(least_norm).max())
    with pytest.raises(ConfigError, match="penalty"):
        ridge(4, 2, 0.0)


def test_bayes_learns_every_mode_at_the_same_known_rate():
    """With little noise the posterior mean is W projected on t inputs, so that E a_k = t / n."""
    n, tasks = 4, 4096
    domain = LinearRegression(n, n, sigma=1e-3, steps=n)
    strength = inner.measure(
        domain,
        lambda params: bayes_linear(domain),
        tuple(range(n + 1)),
        (("mode_strength", domain.probe(8)),),
        (),
        Partial(domain.evaluation_task, spectrum=jnp.float32(domain.spectrum())),
        jax.random.key(0),
        jnp.arange(tasks),
    )["mode_strength"]
    strength = np.asarray(strength)
    mean, error = strength.mean(0), strength.std(0) / np.sqrt(tasks)
    expected = np.broadcast_to(np.arange(n + 1)[:, None] / n, mean.shape)
    # After n pairs W is known, but nearly singular inputs leave some of it to the prior.
    assert np.all(np.abs(mean - expected)[:n] < 4 * error[:n] + 2e-3)
    assert np.all(mean[n] > 0.97)


def test_a_cached_learner_whose_first_call_is_traced_keeps_values():
    """`functools.cache` would otherwise keep a tracer, which no later call could use."""
    makers = {
        "ridge": lambda: ridge(3, 2, 0.125),
        "linear": lambda: bayes_linear(LinearRegression(3, 2, sigma=0.125)),
        "fourier": lambda: bayes_fourier(FourierRegression(sigma=0.125)),
        "bandit": lambda: bayes_bandit(ContextualBandit(2, 3, p_high=0.875)),
        "permutations": lambda: bayes_bandit(
            ContextualBandit(2, 3, permutation=True, p_high=0.875)
        ),
    }
    for make in makers.values():
        jax.eval_shape(lambda key, make=make: make().init(key), jax.random.key(0))
        for leaf in jax.tree.leaves(make().init(jax.random.key(0))):
            np.asarray(leaf)


def test_a_cached_probe_that_is_made_while_tracing_keeps_values():
    makers = {
        "linear": lambda: LinearRegression(3, 2, sigma=0.375).probe(),
        "fourier": lambda: FourierRegression(sigma=0.375).evaluation(16).probes["mode_strength"],
        "bandit": lambda: ContextualBandit(2, 3, p_high=0.625).probe(),
    }
    for make in makers.values():
        jax.eval_shape(lambda make=make: make().queries)
        np.asarray(make().queries)
