"""Linear regression: the prior, the evaluation tasks and the probe, against float64 NumPy."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metadyn.domains.linear import LinearRegression, LinearTask
from metadyn.errors import ConfigError

M = ((1.0, 0.0, -1.0), (0.5, 2.0, 0.0))
R = ((1.0, 0.6), (0.6, 2.0))
C = ((0.5, 0.1, 0.0), (0.1, 0.3, -0.1), (0.0, -0.1, 0.8))
GENERAL = LinearRegression(3, 2, mean=M, row_covariance=R, column_covariance=C)


def made(**fields):
    """Makes a domain without the checks of types, as in a notebook."""
    domain = object.__new__(LinearRegression)
    for field in dataclasses.fields(domain):
        object.__setattr__(domain, field.name, fields.get(field.name, field.default))
    domain.__post_init__()
    return domain


def test_matrices_may_be_arrays_and_sizes_must_be_whole_numbers():
    matrices = {"mean": np.array(M), "row_covariance": np.array(R), "column_covariance": [*C]}
    domain = made(n_x=3, n_y=2, **matrices)
    assert domain == GENERAL
    assert hash(domain) == hash(GENERAL)
    with pytest.raises(ConfigError, match=r"n_x = 2\.5: must be a whole number"):
        made(n_x=2.5)
    with pytest.raises(ConfigError, match="sigma = '1': must be a number"):
        made(sigma="1")


def test_prior_has_the_moments_of_a_matrix_normal():
    n = 40_000
    keys = jax.random.split(jax.random.key(0), n)
    W = np.float64(jax.jit(jax.vmap(GENERAL.sample_task))(keys).W)
    vec = W.transpose(0, 2, 1).reshape(n, -1)  # columns stacked
    covariance = np.kron(C, R)
    standard_error = np.sqrt(np.diag(covariance) / n)
    assert np.all(np.abs(vec.mean(0) - np.array(M).T.ravel()) < 4 * standard_error)
    scale = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    assert np.all(np.abs(np.cov(vec.T) - covariance) < 6 * scale / np.sqrt(n))


def test_default_prior_is_iid_of_variance_one_over_n_x():
    keys = jax.random.split(jax.random.key(1), 20_000)
    W = np.asarray(jax.jit(jax.vmap(LinearRegression(4, 2).sample_task))(keys).W)
    assert W.shape == (20_000, 2, 4)
    np.testing.assert_allclose(W.var(), 1 / 4, rtol=0.02)
    np.testing.assert_allclose(W.mean(), 0, atol=0.01)


def test_queries_and_feedback_have_their_distributions():
    domain = LinearRegression(3, 2, sigma=0.7)
    task = jax.jit(domain.sample_task)(jax.random.key(0))

    @jax.jit
    @jax.vmap
    def pose(key):
        x = domain.query(task, key)
        return x, domain.feedback(task, x, None, key)

    x, y = map(np.asarray, pose(jax.random.split(jax.random.key(1), 40_000)))
    np.testing.assert_allclose(np.cov(x.T), np.eye(3), atol=0.03)
    noise = y - x @ np.asarray(task.W).T
    np.testing.assert_allclose(np.cov(noise.T), 0.49 * np.eye(2), atol=0.02)
    assert domain.loss_floor == pytest.approx(0.49)


@pytest.mark.parametrize("domain", [LinearRegression(3, 3), LinearRegression(2, 5), GENERAL])
def test_spectrum_spans_the_central_95_percent_of_the_priors_singular_values(domain):
    keys = jax.random.split(jax.random.key(2), 20_000)
    W = np.asarray(jax.jit(jax.vmap(domain.sample_task))(keys).W)
    values = np.linalg.svd(W, compute_uv=False)
    s = domain.spectrum()
    assert len(s) == min(domain.n_x, domain.n_y)
    assert list(s) == sorted(s, reverse=True)
    assert np.mean(values < s[-1]) == pytest.approx(0.025, abs=0.004)
    assert np.mean(values > s[0]) == pytest.approx(0.025, abs=0.004)
    np.testing.assert_allclose(domain.spectrum(scale=4), 4 * np.array(s))
    np.testing.assert_allclose(domain.spectrum(outsize=8), [8 * s[0], *s[1:]])
    even = dataclasses.replace(domain, spread="even").spectrum()
    np.testing.assert_allclose(np.diff([*even, 0]), -even[-1])
    assert even[0] == s[0]


@pytest.mark.parametrize(("n_x", "n_y"), [(3, 3), (2, 5), (5, 2)])
def test_evaluation_tasks_have_the_given_spectrum_and_haar_vectors(n_x, n_y):
    domain = LinearRegression(n_x, n_y)
    s = np.float32([3.0, 2.0, 0.5][: domain.modes])
    keys = jax.random.split(jax.random.key(3), 4000)
    drawn = jax.jit(jax.vmap(domain.evaluation_task, (0, None)))(keys, s)
    tasks = LinearTask(*map(np.asarray, drawn))
    values = np.linalg.svd(tasks.W, compute_uv=False)
    np.testing.assert_allclose(values, np.broadcast_to(s, values.shape), rtol=1e-4)
    for vectors, n in ((tasks.U, n_y), (tasks.V, n_x)):
        gram = np.einsum("tik,til->tkl", vectors, vectors)
        np.testing.assert_allclose(
            gram, np.broadcast_to(np.eye(domain.modes), gram.shape), atol=1e-5
        )
        # Entries of a Haar-random orthogonal matrix have mean 0 and variance 1/n.
        np.testing.assert_allclose(np.mean(vectors, 0), 0, atol=0.05)
        np.testing.assert_allclose(np.var(vectors, 0), 1 / n, rtol=0.15)
    aligned = jax.jit(partial(domain.evaluation_task, rotate=False))(keys[0], s)
    np.testing.assert_allclose(aligned.W, np.eye(n_y, domain.modes) * s @ np.eye(domain.modes, n_x))


def planted_task(rng, n_x, n_y):
    """Returns a task with random singular vectors and values, made by NumPy."""
    modes = min(n_x, n_y)
    U, V = (np.linalg.qr(rng.normal(size=(n, n)))[0][:, :modes] for n in (n_y, n_x))
    s = rng.uniform(0.5, 2, modes)
    return LinearTask(*map(np.float32, ((U * s) @ V.T, U, s, V)))


@pytest.mark.parametrize(("n_x", "n_y"), [(3, 3), (2, 5), (5, 2)])
def test_probe_recovers_a_planted_linear_map(n_x, n_y):
    rng = np.random.default_rng(0)
    task = planted_task(rng, n_x, n_y)
    W_hat, b = rng.normal(size=(n_y, n_x)), rng.normal(size=n_y)
    probe = LinearRegression(n_x, n_y).probe(points=16)
    readings = jax.jit(probe.read)(task, np.float32(np.asarray(probe.queries) @ W_hat.T + b))
    rotated = task.U.T @ W_hat @ task.V
    np.testing.assert_allclose(readings["strength"], np.diag(rotated) / task.s, atol=2e-5)
    share = 1 - np.sum(np.diag(rotated) ** 2) / np.sum(W_hat**2)
    np.testing.assert_allclose(readings["off_diagonal"], share, atol=1e-5)
    np.testing.assert_allclose(readings["unexplained"], 0, atol=1e-6)


def test_probe_reads_the_task_itself_as_learned_in_full():
    task = planted_task(np.random.default_rng(1), 3, 4)
    probe = LinearRegression(3, 4).probe()
    readings = jax.jit(probe.read)(task, np.asarray(probe.queries) @ task.W.T)
    np.testing.assert_allclose(readings["strength"], np.ones(3), atol=1e-5)
    np.testing.assert_allclose(readings["off_diagonal"], 0, atol=1e-5)


def test_probe_reports_a_planted_nonlinearity_as_unexplained():
    rng = np.random.default_rng(2)
    task = planted_task(rng, 3, 2)
    probe = LinearRegression(3, 2).probe(points=64)
    x = np.asarray(probe.queries, np.float64)
    answers = x @ rng.normal(size=(3, 2)) + 0.8 * np.sin(3 * x[:, :2])
    readings = jax.jit(probe.read)(task, np.float32(answers))
    design = np.concatenate([x, np.ones((64, 1))], 1)
    _, residual, *_ = np.linalg.lstsq(design, answers, rcond=None)
    share = residual.sum() / np.sum((answers - answers.mean(0)) ** 2)
    assert share > 0.05
    np.testing.assert_allclose(readings["unexplained"], share, rtol=1e-4)


def test_the_probe_of_answers_of_zero_reads_zero():
    task = planted_task(np.random.default_rng(3), 3, 2)
    probe = LinearRegression(3, 2).probe()
    readings = jax.jit(probe.read)(task, np.zeros((32, 2), np.float32))
    assert all(np.all(np.asarray(value) == 0) for value in readings.values())
    assert set(readings) == {"strength", *probe.extras}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sigma": -0.1}, "sigma = -0.1"),
        ({"sigma": 0.0}, "sigma = 0.0"),
        ({"sigma": float("nan")}, "sigma = nan"),
        ({"steps": 0}, "steps = 0"),
        ({"n_x": 0}, "n_x = 0"),
        ({"mean": ((1.0, 2.0),)}, "mean"),
        ({"row_covariance": ((1.0, 0.0), (0.0, -1.0))}, "positive definite"),
        ({"row_covariance": ((1.0, 0.5), (0.0, 1.0))}, "symmetric"),
        ({"column_covariance": ((1.0, 2.0), (2.0, 1.0))}, "positive definite"),
        ({"column_covariance": ((float("inf"), 0.0), (0.0, 1.0))}, "finite"),
    ],
)
def test_bad_configurations_are_named(fields, message):
    with pytest.raises(ConfigError, match=message) as error:
        LinearRegression(**{"n_x": 2, "n_y": 2} | fields)
    assert "\n" not in str(error.value)


def test_bad_probes_and_spectra_are_named():
    domain = LinearRegression(3, 3)
    with pytest.raises(ConfigError, match="probe_points = 4: must be at least n_x \\+ 2 = 5"):
        domain.probe(points=4)
    with pytest.raises(ConfigError, match="scale"):
        domain.spectrum(scale=0)
    with pytest.raises(ConfigError, match="give 3 values"):
        domain.evaluation_task(jax.random.key(0), jnp.float32([1, 1]))
