"""MAML against gradient steps in NumPy, finite differences and a closed form; its refusals."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from contract import observe, scattered, stepped, unroll

import metadyn
from metadyn.base import MetaLearner, indexed_keys
from metadyn.domains.bandit import ContextualBandit
from metadyn.domains.fourier import FourierRegression, band
from metadyn.domains.linear import LinearRegression
from metadyn.errors import ConfigError
from metadyn.learners.gradient import deep_linear
from metadyn.learners.maml import MAML, MAMLConfig, clipped, ordinary_network

LINEAR = LinearRegression(3, 2, steps=5)
FOURIER = FourierRegression(band(1, 2), steps=5)


def made(domain, inner_steps=2, clip=0.5, width=4):
    """Makes a small one, whose gradients are clipped more often than not."""
    return MAMLConfig(inner_steps, width=width, clip=clip).make(domain)


def episodes(domain, count=3):
    return tuple(map(np.asarray, observe(domain, jax.random.split(jax.random.key(2), count))))


def in_numpy(params, x, y, clip):
    """Returns a two-layer linear network's answers in one episode [T, n_y], in float64, by hand."""
    W1, W2 = (np.float64(W) for W in params["start"])
    rates, x, y = np.exp(np.float64(params["log_rate"])), np.float64(x), np.float64(y)
    answers = []
    for t in range(len(x)):
        answers.append(W2 @ W1 @ x[t])
        for first, second in rates:
            error = x[: t + 1] @ (W2 @ W1).T - y[: t + 1]
            d = error.T @ x[: t + 1] / (t + 1)  # the gradient by W2 W1
            d1, d2 = W2.T @ d, d @ W1.T
            scale = min(1.0, clip / np.sqrt((d1**2).sum() + (d2**2).sum()))
            W1, W2 = W1 - first * scale * d1, W2 - second * scale * d2
    return np.array(answers)


def test_answers_are_those_of_gradient_steps_derived_by_hand():
    meta = made(LINEAR)
    params = scattered(meta, scale=0.3)
    x, y = episodes(LINEAR)
    answers = unroll(meta, params, x, y)
    assert answers.shape == (5, 2, 3)
    for b in range(3):
        expected = in_numpy(params, x[..., b], y[..., b], clip=0.5)
        np.testing.assert_allclose(answers[..., b], expected, atol=1e-5)


@pytest.mark.parametrize("domain", [LINEAR, FOURIER])
def test_step_by_step_and_whole_episode_give_the_same_numbers(domain):
    meta = made(domain, inner_steps=3)
    params, (queries, feedback) = scattered(meta, scale=0.3), episodes(domain)
    unrolled = unroll(meta, params, queries, feedback)
    assert isinstance(meta, MetaLearner)
    assert np.std(unrolled[0] - unrolled[-1]) > 0.02  # it learns something in between
    keys = jax.random.split(jax.random.key(9), 3)  # the learned start ignores keys
    answers = stepped(meta.learner(params), queries, feedback, keys)
    np.testing.assert_allclose(answers, unrolled, atol=1e-5)


def test_beyond_the_pairs_it_has_room_for_it_answers_nan():
    """Otherwise it would silently leave pairs out."""
    meta, room = made(LINEAR), LINEAR.steps
    ones = lambda n: np.ones((room + 2, n, 1), np.float32)
    answers = stepped(meta.learner(scattered(meta, scale=0.3)), ones(3), ones(2))
    assert np.isfinite(answers[: room + 1]).all()
    assert np.isnan(answers[room + 1 :]).all()


@pytest.mark.parametrize("domain", [LINEAR, FOURIER])
def test_the_outer_gradient_is_that_of_finite_differences(domain):
    """The comparison is in float64, through clipped and unclipped inner steps."""
    meta = made(domain, width=3)
    params, pairs = scattered(meta, scale=0.3), episodes(domain)
    with jax.enable_x64(True):
        flat, unravel = jax.flatten_util.ravel_pytree(
            jax.tree.map(lambda leaf: jnp.asarray(np.float64(leaf)), params)
        )
        queries, feedback = (jnp.asarray(np.float64(leaf)) for leaf in pairs)

        def loss(flat):
            return jnp.mean((meta.unroll(unravel(flat), queries, feedback) - feedback) ** 2)

        gradient, h = np.asarray(jax.jit(jax.grad(loss))(flat)), 1e-6
        assert gradient.dtype == np.float64
        moved = np.asarray(flat) + h * np.concatenate([np.eye(len(flat)), -np.eye(len(flat))])
        above, below = np.split(np.asarray(jax.jit(jax.vmap(loss))(moved)), 2)
        differences = (above - below) / (2 * h)
        assert np.all(np.abs(gradient[: params["log_rate"].size]) > 1e-6)  # those by the rates
        np.testing.assert_allclose(gradient, differences, rtol=1e-5, atol=1e-8)


def test_one_step_of_one_layer_is_the_closed_form():
    """After the first pair, ŷ(x) = (W − η (W x₁ − y₁) x₁ᵀ) x."""
    meta = MAML(LINEAR, deep_linear(3, 2, depth=1, scale=1.0), MAMLConfig(inner_steps=1, clip=1e6))
    params = scattered(meta, scale=0.3)
    x, y = (leaf[..., 0] for leaf in episodes(LINEAR))
    W, rate = np.float64(params["start"][0]), np.exp(np.float64(params["log_rate"]))
    updated = W - rate * np.outer(W @ x[0] - y[0], x[0])
    answers = unroll(meta, params, x[..., None], y[..., None])[..., 0]
    np.testing.assert_allclose(answers[0], W @ x[0], atol=1e-5)
    np.testing.assert_allclose(answers[1], updated @ x[1], atol=1e-5)


def test_a_gradient_of_zero_can_be_clipped_and_differentiated():
    derivative = jax.jit(jax.grad(lambda g: clipped([g], 2.0)[0].sum()))(jnp.zeros(3))
    np.testing.assert_array_equal(derivative, np.ones(3))
    shortened = jax.jit(lambda *gradient: clipped(gradient, 2.0))(
        np.float32([3, 0]), np.float32([4])
    )
    np.testing.assert_allclose(np.concatenate(shortened), [1.2, 0.0, 1.6], rtol=1e-6)


def test_the_networks_start_at_an_ordinary_size():
    """Weights have a variance of 1/fan-in, so that outputs are about as large as inputs."""
    keys = indexed_keys(jax.random.key(0), jnp.arange(100))

    def sizes(**scale):
        network = ordinary_network(LinearRegression(5, 4), depth=3, width=50, **scale)
        return [np.std(W) for W in jax.jit(jax.vmap(network.init))(keys)]

    np.testing.assert_allclose(sizes(), [5**-0.5, 50**-0.5, 50**-0.5], rtol=0.05)
    np.testing.assert_allclose(sizes(scale=0.1), 0.1, rtol=0.05)


def test_training_brings_it_nearer_to_bayes():
    """With one input and one output, ridge is the posterior mean of a weight that is N(0, 1)."""
    domain = LinearRegression(1, 1, steps=6)
    meta = MAMLConfig(width=4).make(domain)
    trained = metadyn.train(
        meta, domain, steps=150, seeds=1, learning_rate=2e-2, progress=False, seed=3
    )
    x, y = map(np.asarray, observe(domain, jax.random.split(jax.random.key(5), 2000)))
    ridge = np.zeros_like(y)
    for t in range(1, len(y)):
        ridge[t] = x[t] * (x[:t] * y[:t]).sum(0) / ((x[:t] ** 2).sum(0) + domain.sigma**2)
    best = float(((ridge - y) ** 2).mean())

    def excess(params):
        loss = float(((unroll(meta, params, x, y) - y) ** 2).mean())
        return (loss - best) / (best - domain.loss_floor)

    before = jax.jit(meta.init)(jax.random.key(3))
    after = jax.tree.map(lambda a: np.asarray(a)[0], trained.params)
    assert -0.01 < excess(after) < 0.4
    assert excess(before) > 3 * excess(after)


@pytest.mark.parametrize(("domain", "heads"), [(ContextualBandit(), 0), (LINEAR, 1)])
def test_domains_that_it_cannot_serve_are_refused_when_it_is_made(domain, heads):
    with pytest.raises(ConfigError, match="MAML"):
        MAMLConfig().make(domain, heads)


@pytest.mark.parametrize("field", ["inner_steps", "width", "learning_rate", "clip"])
def test_fields_must_be_positive(field):
    with pytest.raises(ConfigError, match=f"{field} = 0"):
        MAMLConfig(**{field: 0})


STUDY = """
import metadyn
from metadyn.learners.maml import MAMLConfig

def maml(comparison):
    meta = MAMLConfig(inner_steps={steps}).make(comparison.domain, comparison.heads)
    return metadyn.Contender("maml", "MAML", meta, option="--maml.inner-steps")

study = metadyn.load_study("{study}").beside("with_maml", maml)
"""


@pytest.mark.parametrize(
    ("study", "steps", "message"),
    [
        ("contextual_bandit", 1, "MAML learns regressions only"),
        ("linear_regression", 10**9, "maml.inner-steps"),
    ],
)
def test_a_study_that_cannot_be_run_with_it_says_so_in_one_line(
    study, steps, message, refused, tmp_path
):
    file = tmp_path / "with_maml.py"
    file.write_text(STUDY.format(study=study, steps=steps))
    refused([str(file)], message)
