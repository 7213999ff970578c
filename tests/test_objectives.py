"""Objectives: a teacher's answers as targets, against the feedback that they are the mean of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metadyn import inner
from metadyn.base import indexed_keys
from metadyn.domains.linear import LinearRegression
from metadyn.learners.bayes import bayes_linear
from metadyn.learners.lstm import LSTMConfig
from metadyn.objectives import predicting, prediction_loss

DOMAIN = LinearRegression(2, 2, sigma=0.5, steps=4)
META = LSTMConfig(hidden=4).make(DOMAIN)


@pytest.fixture(scope="module")
def gradients():
    """Of 64 batches of 128 episodes: [batch, parameters], with y and with Bayes' answers."""
    params = META.init(jax.random.key(0))
    noise = jax.random.normal(jax.random.key(1), params["readout"].shape)
    params = params | {"readout": 0.3 * noise}  # it is zero at first, and then teaches little
    bayes = bayes_linear(DOMAIN)
    found = []
    for target in ("feedback", "bayes"):
        loss = predicting(target, bayes)(DOMAIN, META).loss
        keys = indexed_keys(jax.random.key(2), jnp.arange(64 * 128)).reshape(64, 128)
        gradient = jax.jit(jax.grad(lambda p, k, f=loss: f(p, k)[0]))
        each = [gradient(params, batch) for batch in keys]
        flat = [np.concatenate([np.ravel(a) for a in jax.tree.leaves(g)]) for g in each]
        found.append(np.array(flat, np.float64))
    return found


def test_bayes_answers_have_the_same_expected_gradient_as_the_feedback(gradients):
    apart = gradients[0] - gradients[1]  # on the same episodes
    error = apart.std(0, ddof=1) / np.sqrt(len(apart))
    score = apart.mean(0) / np.maximum(error, 1e-12)
    assert np.sqrt(np.mean(score**2)) < 1.5  # about 1 if they are equal in expectation
    signal = gradients[1].mean(0) / (gradients[1].std(0, ddof=1) / np.sqrt(len(apart)))
    assert np.sqrt(np.mean(signal**2)) > 5  # so that a difference would have been seen


def test_bayes_answers_have_a_less_noisy_gradient(gradients):
    feedback, bayes = (np.sum(each.var(0)) for each in gradients)
    assert bayes < 0.8 * feedback


def test_the_loss_on_the_feedback_is_reported_whatever_is_taught():
    keys = indexed_keys(jax.random.key(3), jnp.arange(16))
    params = META.init(jax.random.key(0))
    taught = prediction_loss(DOMAIN, META, bayes_linear(DOMAIN)).loss(params, keys)
    plain = prediction_loss(DOMAIN, META).loss(params, keys)
    np.testing.assert_array_equal(taught[1]["loss"], plain[0])
    queries, feedback = inner.observe(DOMAIN, keys)
    assert queries.shape == feedback.shape == (4, 2, 16)
    assert float(taught[0]) < float(plain[0])  # there is no noise in what is taught


def test_an_unknown_target_is_named(refused):
    refused(["linear_regression", "--target", "y"], "--target y: choose from")
