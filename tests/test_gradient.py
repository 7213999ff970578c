"""Ordinary learners: gradients against finite differences, learning curves against Saxe."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate
import scipy.stats
from jax.tree_util import Partial

from metadyn import dynamics, inner
from metadyn.base import Learner
from metadyn.domains.fourier import FourierRegression, band
from metadyn.domains.linear import LinearRegression
from metadyn.errors import ConfigError
from metadyn.learners.gradient import (
    balanced_deep_linear,
    deep_linear,
    gradient,
    mlp,
    random_start,
    saxe_strength,
    updates_to_learn,
)
from metadyn.optimizers import named_optimizer
from metadyn.outer import OuterConfig


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_one_update_is_a_step_along_the_float64_finite_difference_gradient(depth):
    rng = np.random.default_rng(depth)
    learner = gradient(deep_linear(3, 2, depth, width=4, scale=0.5), optax.sgd(0.1), batch=6)
    weights, moments = jax.jit(learner.init)(jax.random.key(depth))
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(6, 2))
    after, _ = jax.jit(learner.update)((weights, moments), np.float32(x), np.float32(y))
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
                shifted = [layer.copy() for layer in layers]
                shifted[index][entry] += sign * 1e-6
                ends.append(loss(shifted))
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
    strengths = saxe_strength(np.array([t - 1, t]), np.array([0.5]), start, rate)
    assert strengths[0] < 0.9 <= strengths[1]


def curve(domain, network, rate, batch, times, tasks, rotate):
    """Returns strengths of modes, measured on tasks, of a network trained by gradient descent."""
    learner = gradient(network, optax.sgd(rate), batch)
    readings = inner.measure(
        domain,
        lambda params: learner,
        times,
        (("mode_strength", domain.probe(8)),),
        (),
        Partial(partial(domain.evaluation_task, rotate=rotate), spectrum=jnp.array([1.5, 0.5])),
        jax.random.key(0),
        jnp.arange(tasks),
    )
    return np.asarray(readings["mode_strength"])


def test_balanced_start_has_saxes_learning_times():
    domain, s = LinearRegression(2, 3), np.array([1.5, 0.5])
    times = inner.log_spaced(updates_to_learn(s[-1], 1e-3, 0.02, 0.9), 60)
    strengths = curve(domain, balanced_deep_linear(2, 3, strength=1e-3), 0.02, 20, times, 64, False)
    measured = dynamics.learning_times(np.array(times), strengths.mean(0))
    theory = dynamics.learning_times(np.array(times), saxe_strength(np.array(times), s, 1e-3, 0.02))
    np.testing.assert_allclose(measured, theory, rtol=0.03)


def test_random_start_grows_from_half_its_squared_norm():
    domain, s = LinearRegression(2, 3), np.array([1.5, 0.5])
    start = random_start(width=64, scale=1e-3)
    times = inner.log_spaced(updates_to_learn(s[-1], start, 0.02, 0.9), 60)
    strengths = curve(domain, deep_linear(2, 3, width=64, scale=1e-3), 0.02, 20, times, 64, True)
    measured = dynamics.learning_times(np.array(times), strengths.mean(0))
    theory = dynamics.learning_times(
        np.array(times), saxe_strength(np.array(times), s, start, 0.02)
    )
    np.testing.assert_allclose(measured, theory, rtol=0.05)


def test_learners_measured_together_equal_each_measured_alone():
    domain = LinearRegression(3, 3)
    learner = gradient(deep_linear(3, 3, scale=0.1), optax.adam(0.01), 5)
    measure = lambda indices: inner.measure(
        domain, make, (0, 3, 20), (), (), sample, jax.random.key(1), indices
    )
    make, sample = (lambda params: learner), Partial(domain.sample_task)
    together = np.asarray(measure(jnp.arange(8))["loss"])
    for i in range(8):
        alone = np.asarray(measure(jnp.array([i]))["loss"])[0]
        np.testing.assert_allclose(together[i], alone, rtol=1e-4)


@pytest.mark.parametrize("depth", [1, 3])
def test_an_mlp_update_is_a_step_along_the_float64_finite_difference_gradient(depth):
    rng = np.random.default_rng(depth)
    learner = gradient(mlp(2, 1, depth, width=5), optax.sgd(0.1), batch=6)
    weights, moments = jax.jit(learner.init)(jax.random.key(depth))
    x, y = rng.normal(size=(6, 2)), rng.normal(size=(6, 1))
    updated, _ = jax.jit(learner.update)((weights, moments), np.float32(x), np.float32(y))
    flat, after = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (weights, updated)
    )

    def loss(layers):
        h = x
        for index, (W, b) in enumerate(layers):
            h = h @ W.T + b
            h = np.maximum(h, 0) if index < depth else h
        return 0.5 * np.sum((h - y) ** 2) / len(x)

    shapes = [(np.shape(W), np.shape(b)) for W, b in weights]
    assert shapes == [((5, 2), (5,)), *[((5, 5), (5,))] * (depth - 1), ((1, 5), (1,))]

    def layers(flat):
        rows, position = [], 0
        for W, b in shapes:
            w_end = position + W[0] * W[1]
            rows.append((flat[position:w_end].reshape(W), flat[w_end : w_end + b[0]]))
            position = w_end + b[0]
        return rows

    start = np.asarray(flat, np.float64)
    bumps = 1e-6 * np.eye(len(start))
    slope = [(loss(layers(start + b)) - loss(layers(start - b))) / 2e-6 for b in bumps]
    np.testing.assert_allclose(after, start - 0.1 * np.array(slope), atol=1e-5)


def test_an_mlp_starts_from_the_same_distribution_as_in_pytorch():
    (W, b), (V, _) = jax.jit(mlp(4, 1, depth=1, width=20_000).init)(jax.random.key(0))
    for values, bound in ((W, 0.5), (b, 0.5), (V, 20_000**-0.5)):
        values = np.asarray(values).ravel() / bound
        assert np.abs(values).max() <= 1
        assert scipy.stats.kstest(values, scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-3


@pytest.mark.parametrize("points", [None, 30])  # full batches are tested below
def test_mlps_measured_together_equal_each_measured_alone(points):
    domain = FourierRegression(band(1, 2))
    learner = gradient(mlp(1, 1, 3, 16), optax.adam(1e-2), 12, points=points)
    probes = (("mode_strength", domain.probe(domain.amplitudes(), 8)),)
    make, amplitudes = (lambda params: learner), jnp.float32(domain.amplitudes())
    sample = Partial(domain.evaluation_task, amplitudes=amplitudes)
    measure = lambda indices: inner.measure(
        domain, make, (0, 3, 40), probes,
        (), sample, jax.random.key(1), indices,
    )  # fmt: skip
    together = jax.tree.map(np.asarray, measure(jnp.arange(8)))
    assert np.ptp(together["mode_strength"][:, -1]) > 0.1
    for i in range(8):
        alone = jax.tree.map(np.asarray, measure(jnp.array([i])))
        for name in together:
            np.testing.assert_allclose(together[name][i], alone[name][0], rtol=1e-3, atol=1e-4)


def batches_of_inputs(batch, points, updates):
    """Returns the inputs of each update [updates, batch]."""
    domain = FourierRegression(band(1, 2))
    learner = Learner(
        lambda key: (jnp.zeros((updates, batch)), 0),
        lambda state, x: jnp.zeros(1),
        lambda state, x, y: (state[0].at[state[1]].set(x[:, 0]), state[1] + 1),
        batch=batch,
        points=points,
        diagnose=lambda state: {"seen": state[0]},
    )
    task = jax.jit(domain.sample_task)(jax.random.key(0))
    run = jax.jit(partial(inner.run, domain, learner, times=(0, updates)))
    return np.asarray(run(task, jax.random.key(1))["seen"])[-1]


def test_full_batch_shows_the_same_pairs_and_fresh_minibatches_never_do():
    full = batches_of_inputs(6, 6, 5)
    np.testing.assert_array_equal(full, np.broadcast_to(full[0], full.shape))
    assert len(np.unique(full)) == 6
    assert len(np.unique(batches_of_inputs(6, None, 5))) == 30


def test_minibatches_are_drawn_from_the_points_without_repetition():
    batches = batches_of_inputs(6, 10, 200)
    points, counts = np.unique(batches, return_counts=True)
    assert len(points) == 10
    assert all(len(np.unique(batch)) == 6 for batch in batches)
    assert counts.min() > 120 - 5 * np.sqrt(200 * 0.6 * 0.4)
    np.testing.assert_array_equal(np.isin(batches_of_inputs(10, 10, 1)[0], points), True)


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        ("sgd", (1, 1)),
        ("momentum", (1, 1.9)),
        ("adam", (1 / 3, 1 / 3)),  # bias correction makes its moments those of the one gradient
        ("rmsprop", (1 / (3 * 0.1**0.5), 1 / (3 * 0.19**0.5))),
    ],
)
def test_optimisers_are_found_by_name(name, factors):
    """Each takes its textbook's first two steps under a gradient of 3 at the rate 0.1."""
    optimizer, gradient = named_optimizer(name, 0.1), jnp.full(1, 3.0)
    state = optimizer.init(jnp.zeros(1))
    for factor in factors:
        update, state = optimizer.update(gradient, state, jnp.zeros(1))
        np.testing.assert_allclose(update, -0.1 * 3 * factor, rtol=1e-5)


NO_OPTIMISERS = ["", "nonsense", "chain", "apply_updates", "__class__", "a.b"]
NO_OPTIMISERS += ["lbfgs", "polyak_sgd"]  # they need the loss beside its gradient
NO_OPTIMISERS += ["scale_by_adam", "trace", "ema", "add_decayed_weights"]  # they would ascend


@pytest.mark.parametrize("name", NO_OPTIMISERS)
def test_names_of_no_optimiser_are_refused(name):
    with pytest.raises(ConfigError, match="name an optimiser"):
        named_optimizer(name, 0.1)


def test_an_optimiser_that_takes_no_schedule_is_refused_before_training():
    named_optimizer("rprop", 0.1)
    with pytest.raises(ConfigError, match=r"optimizer = 'momentum': .*takes a b2"):
        named_optimizer("momentum", 0.1, b2=0.9)
    for name in ("rprop", "noisy_sgd"):  # the state of `noisy_sgd` has a random key
        with pytest.raises(ConfigError, match="name an optimiser"):
            OuterConfig(optimizer=name)
    with pytest.raises(ConfigError, match=r"'adamm': name an optimiser .*did you mean 'adam.?'\?"):
        named_optimizer("adamm", 0.1, b2=0.9)
    with pytest.raises(ConfigError, match="give its name in optax"):
        named_optimizer.__wrapped__.__wrapped__(optax.adam(0.1), 0.1)


def test_a_balanced_start_needs_a_unit_for_each_mode():
    with pytest.raises(ConfigError, match="width = 3: must be at least 4"):
        balanced_deep_linear(4, 5, width=3)
    with pytest.raises(ConfigError, match="strength = 0: must be positive"):
        balanced_deep_linear(4, 5, strength=0)


@pytest.mark.parametrize("sizes", [(3, 3), (5, 3), (3, 5)])
def test_a_balanced_start_is_balanced_whatever_the_numbers_of_inputs_and_outputs(sizes):
    first, second = balanced_deep_linear(*sizes, width=8, strength=0.01).init(jax.random.key(0))
    np.testing.assert_allclose(second.T @ second, first @ first.T)
    np.testing.assert_allclose(second @ first, 0.01 * np.eye(*sizes[::-1]), rtol=1e-6)


def test_bad_networks_are_named():
    for fields in ({"depth": 0}, {"width": 0}, {"scale": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            deep_linear(2, 2, **fields)
    with pytest.raises(ConfigError, match="batch"):
        gradient(deep_linear(2, 2), optax.sgd(0.1), 0)
    with pytest.raises(ConfigError, match="points = 5: must be no fewer than the batch of 6"):
        gradient(deep_linear(2, 2), optax.sgd(0.1), 6, points=5)
