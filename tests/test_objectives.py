"""Objectives: a teacher's answers as targets, against feedback, of which they are the mean."""

import jax
import jax.numpy as jnp
import numpy as np
from contract import observe
from jax.flatten_util import ravel_pytree

from metadyn.base import indexed_keys
from metadyn.domains.linear import LinearRegression
from metadyn.learners.attention import OneLayerAttentionConfig
from metadyn.learners.bayes import bayes_linear
from metadyn.learners.lstm import LSTMConfig
from metadyn.objectives import predicting, prediction_loss

DOMAIN = LinearRegression(2, 2, sigma=0.5, steps=4)
META = LSTMConfig(hidden=4).make(DOMAIN)


BAYES = bayes_linear(DOMAIN)
# A teacher that is wrong by a fifth, which the test of Bayes must detect.
SHRUNK = BAYES._replace(predict=lambda state, x: 0.8 * BAYES.predict(state, x))


def gradients(meta, params, teacher=None):
    """Returns the gradients [batch, parameters] of 64 batches of 1 024 episodes."""
    loss = prediction_loss(DOMAIN, meta, teacher).loss
    gradient = jax.jit(jax.grad(lambda p, batch: loss(p, batch)[0]))
    keys = indexed_keys(jax.random.key(2), jnp.arange(64 * 1024)).reshape(64, 1024)
    return np.array([ravel_pytree(gradient(params, batch))[0] for batch in keys], np.float64)


def distance(a, b):
    """Returns the distance of mean gradients in standard errors, root mean square; 1 by chance."""
    difference = a - b  # both are on the same episodes
    error = difference.std(0, ddof=1) / np.sqrt(len(difference))
    return np.sqrt(np.mean((difference.mean(0) / np.maximum(error, 1e-12)) ** 2))


def test_bayes_answers_have_the_same_expected_gradient_as_the_feedback():
    # A step of gradient descent has answers that vary with Bayes', so that a wrong teacher shows.
    meta = OneLayerAttentionConfig(1, merged=True).make(DOMAIN)
    params = {"value": jnp.eye(2)[None], "key_query": 0.5 * jnp.eye(2)[None]}
    feedback, bayes, shrunk = (gradients(meta, params, t) for t in (None, BAYES, SHRUNK))
    assert distance(feedback, bayes) < 1.5
    assert distance(feedback, shrunk) > 5


def test_bayes_answers_have_a_less_noisy_gradient():
    params = META.init(jax.random.key(0))
    noise = jax.random.normal(jax.random.key(1), params["readout"].shape)
    params = params | {"readout": 0.3 * noise}  # it is zero at first, which teaches little
    feedback, bayes = (np.sum(gradients(META, params, t).var(0)) for t in (None, BAYES))
    assert bayes < 0.8 * feedback


def test_the_loss_on_the_feedback_is_reported_whatever_the_targets():
    keys = indexed_keys(jax.random.key(3), jnp.arange(16))
    params = META.init(jax.random.key(0))
    taught = jax.jit(prediction_loss(DOMAIN, META, bayes_linear(DOMAIN)).loss)(params, keys)
    plain = jax.jit(prediction_loss(DOMAIN, META).loss)(params, keys)
    np.testing.assert_array_equal(taught[1]["loss"], plain[0])
    queries, feedback = observe(DOMAIN, keys)
    assert queries.shape == feedback.shape == (4, 2, 16)
    assert float(taught[0]) < float(plain[0])  # the teacher's answers are without noise


def test_predicting_compares_with_the_target_of_that_name():
    assert predicting("bayes", BAYES).keywords["teacher"] is BAYES
    assert predicting("feedback", BAYES).keywords["teacher"] is None


def test_an_unknown_target_is_named(refused):
    refused(["linear_regression", "--target", "y"], "--target y: choose from")
