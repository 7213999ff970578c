"""Ordinary learners: gradients against finite differences, learning curves against Saxe."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate

from metadyn import dynamics, inner
from metadyn.base import ConfigError
from metadyn.domains.linear import LinearRegression
from metadyn.learners.gradient import (
    balanced_deep_linear,
    deep_linear,
    gradient,
    named_optimizer,
    random_start,
    saxe_strength,
    updates_to_learn,
)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_one_update_is_a_step_along_the_float64_finite_difference_gradient(depth):
    rng = np.random.default_rng(depth)
    learner = gradient(deep_linear(3, 2, depth, width=4, scale=0.5), optax.sgd(0.1), batch=6)
    weights, moments = learner.init(jax.random.key(depth))
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(6, 2))
    after, _ = learner.update((weights, moments), jnp.float32(x), jnp.float32(y))
    layers = [np.asarray(W, np.float64) for W in weights]

    def loss(layers):
        product = x.T
        for W in layers:
            product = W @ product
        return 0.5 * np.sum((product.T - y) ** 2) / len(x)

    assert [W.shape[1] for W in layers] == [3, *[4] * (depth - 1)]
    for index, (W, new) in enumerate(zip(layers, after, strict=True)):
        slope = np.zeros_like(W)
        for entry in np.ndindex(W.shape):
            ends = []
            for sign in (1, -1):
                moved = [layer.copy() for layer in layers]
                moved[index][entry] += sign * 1e-6
                ends.append(loss(moved))
            slope[entry] = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose(new, W - 0.1 * slope, atol=1e-5)


def test_closed_form_solves_saxes_differential_equation():
    s, start, rate, times = np.array([2.0, 0.5]), 1e-3, 0.05, np.linspace(0, 400, 50)
    solution = scipy.integrate.solve_ivp(
        lambda t, a: 2 * rate * a * (s - a),
        (0, 400),
        np.full(2, start),
        t_eval=times,
        rtol=1e-10,
        atol=1e-12,
    )
    np.testing.assert_allclose(saxe_strength(times, s, start, rate), solution.y.T / s, rtol=1e-5)
    t = updates_to_learn(0.5, start, rate, strength=0.9)
    reached = saxe_strength(np.array([t - 1, t]), np.array([0.5]), start, rate)
    assert reached[0] < 0.9 <= reached[1]


def curve(domain, network, rate, batch, times, tasks, rotate):
    learner = gradient(network, optax.sgd(rate), batch)
    readings = inner.measure(
        domain,
        lambda params: learner,
        (),
        False,
        lambda key, s: domain.evaluation_task(key, s, rotate),
        jnp.array([1.5, 0.5]),
        jax.random.key(0),
        jnp.arange(tasks),
        times,
        domain.probe(8),
    )
    return np.asarray(readings["mode_strength"])


def test_balanced_start_keeps_to_saxes_learning_times():
    domain, s = LinearRegression(2, 3), np.array([1.5, 0.5])
    times = inner.log_spaced(updates_to_learn(s[-1], 1e-3, 0.02, 0.9), 60)
    mean = curve(domain, balanced_deep_linear(2, 3, strength=1e-3), 0.02, 20, times, 64, False)
    found = dynamics.learning_times(np.array(times), mean.mean(0))
    theory = dynamics.learning_times(np.array(times), saxe_strength(np.array(times), s, 1e-3, 0.02))
    np.testing.assert_allclose(found, theory, rtol=0.03)


def test_random_start_grows_from_half_its_squared_norm():
    domain, s = LinearRegression(2, 3), np.array([1.5, 0.5])
    start = random_start(width=64, scale=1e-3)
    times = inner.log_spaced(updates_to_learn(s[-1], start, 0.02, 0.9), 60)
    mean = curve(domain, deep_linear(2, 3, width=64, scale=1e-3), 0.02, 20, times, 64, True)
    found = dynamics.learning_times(np.array(times), mean.mean(0))
    theory = dynamics.learning_times(
        np.array(times), saxe_strength(np.array(times), s, start, 0.02)
    )
    np.testing.assert_allclose(found, theory, rtol=0.05)


def test_learners_at_once_equal_each_alone():
    domain = LinearRegression(3, 3)
    learner = gradient(deep_linear(3, 3, scale=0.1), optax.adam(0.01), 5)
    measured = lambda indices: inner.measure(  # noqa: E731
        domain, make, (), False, sample, None, jax.random.key(1), indices, (0, 3, 20)
    )
    make, sample = (lambda params: learner), (lambda key, _: domain.sample_task(key))
    together = np.asarray(measured(jnp.arange(8))["loss"])
    for i in range(8):
        alone = np.asarray(measured(jnp.array([i]))["loss"])[0]
        np.testing.assert_allclose(together[i], alone, rtol=1e-4)


@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop", "adamw"])
def test_optimisers_by_name(name):
    assert isinstance(named_optimizer(name, 0.1), optax.GradientTransformation)


@pytest.mark.parametrize("name", ["", "nonsense", "chain", "apply_updates", "__class__", "a.b"])
def test_names_that_are_no_optimiser(name):
    with pytest.raises(ConfigError, match="name an optimiser"):
        named_optimizer(name, 0.1)


def test_bad_networks_are_named():
    for fields in ({"depth": 0}, {"width": 0}, {"scale": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            deep_linear(2, 2, **fields)
    with pytest.raises(ConfigError, match="batch"):
        gradient(deep_linear(2, 2), optax.sgd(0.1), 0)
