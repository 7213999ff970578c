"""The nonlinear-regression domain: priors, tasks, and the Fourier probe of planted answers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from metadyn import inner
from metadyn.base import Domain
from metadyn.domains.fourier import (
    FourierRegression,
    FourierTask,
    band,
    band_stop,
    coefficients,
    fourier_features,
    power_spectrum,
    uniform_grid,
)
from metadyn.errors import ConfigError
from metadyn.learners.bayes import bayes_fourier

SPECTRA = {
    "low_pass": band(1, 5),
    "band_pass": tuple(2.5 * v for v in band(3, 6)),
    "band_stop": band_stop(2, 3, 5),
    "with_a_constant": (0.5, 0.0, 0.25),
    "by_hand": (0.0, 2.0, 0.0, 0.01),
}


def f64(task, x):
    """Returns a task's target f(x) [points], in float64 NumPy."""
    k = np.arange(len(task.cosine))
    turns = 2 * np.pi * np.outer(x, k)
    cosine, sine = (np.asarray(c, np.float64) for c in task)
    return np.cos(turns) @ cosine + np.sin(turns) @ sine


def test_it_has_the_interface_of_a_domain():
    assert isinstance(FourierRegression(), Domain)


@pytest.mark.parametrize("name", SPECTRA)
def test_prior_spectra_have_the_variance_they_claim(name):
    v = np.array(SPECTRA[name])
    domain = FourierRegression(SPECTRA[name])
    draw = jax.jit(jax.vmap(domain.sample_task))
    tasks = FourierTask(*map(np.float64, draw(jax.random.split(jax.random.key(0), 40_000))))
    for coefficient in tasks:
        error = 5 * np.sqrt(2 / 40_000) * v
        assert np.all(np.abs(np.var(coefficient, axis=0) - v) <= error)
    x = np.array([-0.5, -0.21, 0.0, 0.3])
    values = np.stack([f64(FourierTask(*(c[i] for c in tasks)), x) for i in range(4000)])
    np.testing.assert_allclose(values.var(0), v.sum(), rtol=5 * np.sqrt(2 / 4000))
    np.testing.assert_allclose(values.mean(0), 0, atol=5 * np.sqrt(v.sum() / 4000))


def test_spectra_of_each_kind_are_even_over_their_bands():
    assert band(1, 4) == (0.0, 0.25, 0.25, 0.25, 0.25)
    assert band(2, 3) == (0.0, 0.0, 0.5, 0.5)
    assert band_stop(2, 3, 4) == (0.0, 0.5, 0.0, 0.0, 0.5)
    for spectrum in (band(0, 3), band_stop(1, 2, 7)):
        assert sum(spectrum) == pytest.approx(1)


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_pairs_are_those_of_the_target_with_noise(sigma):
    domain = FourierRegression(band(1, 3), sigma=sigma)
    task = jax.jit(domain.sample_task)(jax.random.key(1))
    keys = jax.random.split(jax.random.key(2), 8192)
    pose = lambda k: inner.interact(domain, task, lambda query: None, jax.random.split(k))
    x, _, y = jax.jit(jax.vmap(pose))(keys)
    x, y = np.asarray(x, np.float64)[:, 0], np.asarray(y, np.float64)[:, 0]
    assert x.min() >= -0.5
    assert x.max() < 0.5
    assert np.histogram(x, bins=8, range=(-0.5, 0.5))[0].min() > 900
    residual = y - f64(task, x)
    if sigma == 0:
        np.testing.assert_allclose(residual, 0, atol=2e-5)
    else:
        np.testing.assert_allclose(residual.std(), sigma, rtol=0.05)
        assert abs(np.corrcoef(residual, y - residual)[0, 1]) < 0.05


@pytest.mark.parametrize("frequencies", [None, (1, 6), (2, 3, 4, 7), (0, 2)])
def test_evaluation_tasks_have_fixed_amplitudes_and_random_phases(frequencies):
    domain = FourierRegression((0.0, 0.0, 0.5, 0.25, 0.25))
    A = np.array(domain.amplitudes(frequencies))
    present = list(frequencies or (2, 3, 4))
    assert np.flatnonzero(A).tolist() == present
    np.testing.assert_allclose(np.sum(A**2) / 2, 1.0)
    if frequencies is None:
        np.testing.assert_allclose(A[present], np.sqrt([1.0, 0.5, 0.5]))
    make = jax.jit(jax.vmap(domain.evaluation_task, (0, None)))
    drawn = make(jax.random.split(jax.random.key(0), 4000), np.float32(A))
    tasks = FourierTask(*map(np.asarray, drawn))
    modulus = np.hypot(*tasks)
    modulus[:, 0] *= np.sqrt(2)  # the constant has a sign in place of a phase
    np.testing.assert_allclose(modulus, np.broadcast_to(A, modulus.shape), atol=1e-5)
    turns = np.arctan2(tasks.sine, tasks.cosine)[:, present]
    np.testing.assert_allclose(np.exp(1j * turns).mean(0), 0, atol=5 / np.sqrt(4000))
    # Phases of different frequencies are independent, so their sums and differences are uniform.
    for combination in (turns[:, 0] - turns[:, 1], turns[:, 0] + turns[:, 1]):
        assert abs(np.exp(1j * combination).mean()) < 5 / np.sqrt(4000)


def test_frequencies_that_the_prior_lacks_have_its_greatest_variance():
    domain = FourierRegression((0.0, 0.5, 0.25, 0.25))
    A = np.array(domain.amplitudes((1, 2, 5)))
    np.testing.assert_allclose(A[[1, 2, 5]] ** 2, 2 * np.array([0.5, 0.25, 0.5]) / 1.25)


@pytest.mark.parametrize("points", [12, 13, 32])
def test_planted_amplitudes_and_phases_are_recovered_with_dc_and_nyquist(points):
    rng = np.random.default_rng(points)
    k = np.arange(points // 2 + 1)
    cosine, sine = rng.normal(size=(2, len(k)))
    sine[0] = 0
    if points % 2 == 0:
        sine[-1] = 0  # the sine at Nyquist's frequency is 0 on the grid
    values = f64(FourierTask(cosine, sine), uniform_grid(points))
    F = np.asarray(jax.jit(coefficients)(np.float32(values)))
    np.testing.assert_allclose(F, cosine - 1j * sine, atol=5e-6)
    np.testing.assert_allclose(np.abs(F), np.hypot(cosine, sine), atol=5e-6)


def test_power_spectrum_is_the_mean_square_of_each_frequency():
    rng = np.random.default_rng(0)
    power = jax.jit(lambda values: power_spectrum(coefficients(values), len(values)))
    for points in (9, 16):
        values = rng.normal(size=points)
        total = np.sum(power(np.float32(values)))
        np.testing.assert_allclose(total, np.mean(values**2), rtol=1e-5)


@pytest.mark.parametrize("points", [11, 16])
def test_probe_reads_the_strength_planted_at_each_frequency(points):
    domain = FourierRegression(band(1, 4))
    probe = domain.probe(domain.amplitudes((1, 3, 5)), points)
    read = jax.jit(probe.read)
    amplitudes = np.float32(domain.amplitudes((1, 3, 5)))
    task = jax.jit(domain.evaluation_task)(jax.random.key(3), amplitudes)
    x = np.asarray(probe.queries, np.float64)[:, 0]
    np.testing.assert_allclose(x, uniform_grid(points), atol=1e-7)
    gains, target = np.array([0.0, 0.8, 0, -0.3, 0, 1.1]), f64(task, x)
    planted = FourierTask(*(np.asarray(c) * gains for c in task))
    quadrature = FourierTask(np.asarray(task.sine), -np.asarray(task.cosine))  # 90° out of phase
    stray = 0.4 + 0.5 * np.sin(2 * np.pi * 2 * x + 0.3)
    answers = f64(planted, x) + 0.7 * f64(quadrature, x) + stray
    readings = read(task, np.float32(answers)[:, None])
    np.testing.assert_allclose(readings["strength"], gains[[1, 3, 5]], atol=1e-5)
    np.testing.assert_allclose(
        readings["outside"], np.mean(stray**2) / np.mean(target**2), rtol=1e-4
    )
    nothing = read(task, np.zeros((points, 1), np.float32))
    np.testing.assert_array_equal(nothing["strength"], 0)
    assert nothing["outside"] == 0


def test_power_at_nyquist_counts_as_outside():
    domain = FourierRegression(band(1, 3))
    probe = domain.probe(domain.amplitudes(), 8)
    amplitudes = np.float32(domain.amplitudes())
    task = jax.jit(domain.evaluation_task)(jax.random.key(3), amplitudes)
    nyquist = 0.5 * (-1.0) ** np.arange(8)
    answers = f64(task, uniform_grid(8)) + nyquist
    readings = jax.jit(probe.read)(task, np.float32(answers)[:, None])
    np.testing.assert_allclose(readings["strength"], 1, atol=1e-5)
    np.testing.assert_allclose(readings["outside"], 0.25, rtol=1e-4)


def test_the_grid_resolves_the_frequencies_of_the_prior_too():
    domain = FourierRegression(band(1, 5))
    with pytest.raises(ConfigError, match="probe_points = 10: must be at least 11"):
        domain.probe(domain.amplitudes((1, 2)), 10)


def test_every_task_and_step_is_probed_in_one_compiled_call():
    domain = FourierRegression(band(1, 3), steps=6)
    learner = bayes_fourier(domain)
    readings = inner.measure(
        domain,
        lambda params: learner,
        tuple(range(7)),
        (("mode_strength", domain.probe(domain.amplitudes(), 16)),),
        (),
        Partial(domain.evaluation_task, amplitudes=jnp.float32(domain.amplitudes())),
        jax.random.key(0),
        jnp.arange(32),
    )
    strength = np.asarray(readings["mode_strength"])
    assert strength.shape == (32, 7, 3)
    np.testing.assert_array_equal(strength[:, 0], 0)
    assert np.all(strength[:, -1].mean(0) > 0.3)


@pytest.mark.parametrize("embedding", ["raw", "standard", "angle", "circle", "fourier"])
def test_embeddings_are_those_of_their_formulae(embedding):
    domain = FourierRegression((0.5, 0.0, 0.5), embedding=embedding)
    x = np.linspace(-0.5, 0.5, 2001)[:, None]
    encoded = np.float64(jax.jit(jax.vmap(domain.encode_query))(np.float32(x)))
    t = 2 * np.pi * x
    expected = {
        "raw": x,
        "standard": x / np.std(x),
        "angle": t,
        "circle": np.concatenate([np.cos(t), np.sin(t)], 1),
        "fourier": np.concatenate([np.ones_like(t), np.cos(2 * t), np.sin(2 * t)], 1),
    }[embedding]
    np.testing.assert_allclose(encoded, expected, atol=2e-3)


def test_features_span_the_targets():
    task = FourierTask(np.array([0.3, 0.0, -1.0]), np.array([0.0, 0.0, 0.7]))
    x = np.array([0.17])
    features = jax.jit(partial(fourier_features, frequencies=(0, 2)))(np.float32(x))
    value = np.asarray(features) @ [0.3, -1.0, 0.7]
    np.testing.assert_allclose(value, f64(task, x)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FourierRegression(()), "spectrum = \\(\\)"),
        (lambda: FourierRegression((0.0, -1.0)), "spectrum = \\(0.0, -1.0\\)"),
        (lambda: FourierRegression((0.0, 0.0)), "above 0"),
        (lambda: FourierRegression((0.0, float("nan"))), "finite"),
        (lambda: FourierRegression(sigma=-0.1), "sigma = -0.1"),
        (lambda: FourierRegression(steps=0), "steps = 0"),
        (
            lambda: FourierRegression().probe(FourierRegression().amplitudes(), 10),
            "probe_points = 10: must be at least 11",
        ),
        (lambda: FourierRegression().amplitudes(()), "name at least one"),
        (lambda: FourierRegression().amplitudes((-1,)), "0 or more"),
        (lambda: band(3, 2), "0 <= low <= high"),
        (lambda: band_stop(1, 5, 5), "must leave a frequency"),
    ],
)
def test_bad_input_names_field_value_and_fix(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
