"""Normalised feedback: both forms agree, against NumPy, and what does and does not change."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import DOMAINS, observe, scattered, stepped

from metadyn.base import MetaLearner
from metadyn.learners.deltanet import DeltaNetConfig
from metadyn.learners.lstm import LSTMConfig
from metadyn.learners.normalised import Normalised

NETWORKS = {"lstm": LSTMConfig(hidden=5), "deltanet": DeltaNetConfig(hidden=8, layers=1)}


@pytest.fixture(params=NETWORKS)
def meta(request):
    """A normalised network in linear regression, with some parameters."""
    made = Normalised(DOMAINS["linear"], NETWORKS[request.param].make)
    assert isinstance(made, MetaLearner)
    return made, scattered(made)


def pairs(domain, scale=1.0):
    queries, feedback = observe(domain, jax.random.split(jax.random.key(1), 7))
    return queries, scale * feedback


@pytest.mark.parametrize("scale", [1.0, 16.0])
def test_step_by_step_is_whole(meta, scale):
    made, params = meta
    queries, feedback = pairs(made.domain, scale)
    whole = jax.jit(made.unroll)(params, queries, feedback)
    assert np.std(whole[1:]) > 1e-2 * scale
    found = stepped(made.learner(params), queries, feedback)
    np.testing.assert_allclose(found, whole, 1e-4, 1e-5 * scale)


def test_a_normalised_meta_learner_can_be_copied(meta):
    made, params = meta
    again = copy.deepcopy(made)
    assert again.inside.domain is not made.inside.domain
    queries, feedback = pairs(made.domain)
    found, whole = (each.unroll(params, queries, feedback) for each in (again, made))
    np.testing.assert_array_equal(found, whole)


def test_the_network_inside_reads_what_numpy_says(meta):
    """Feedback over r after; with queries 1 / r before and the log of its last change."""
    made, params = meta
    queries, feedback = pairs(made.domain)
    y = np.float64(feedback)
    squares = np.array([(y[:t] ** 2).mean((0, 1)) for t in range(1, len(y) + 1)])
    r = np.concatenate([np.ones((2, 7)), np.sqrt(np.maximum(2 * squares, 1))])  # from r_{-1} on
    assert 0 < (r[2:] == 1).mean() < 1
    last, before, after = r[:-2], r[1:-1], r[2:]
    read = jnp.float32(np.stack([1 / before, np.log(before / last)], axis=1))
    expected = jax.jit(made.inside.unroll)(params, (queries, read), jnp.float32(y / after[:, None]))
    found = jax.jit(made.unroll)(params, queries, feedback)
    np.testing.assert_allclose(found, expected * before[:, None], 1e-4, 1e-5)


def test_answers_do_not_depend_on_the_feedback_to_come(meta):
    made, params = meta
    queries, feedback = pairs(made.domain)
    before = jax.jit(made.unroll)(params, queries, feedback)
    after = jax.jit(made.unroll)(params, queries, feedback.at[3:].multiply(5.0))
    np.testing.assert_allclose(after[:4], before[:4], 1e-6)
    assert np.abs(after[4:] - before[4:]).max() > 1e-3


def test_small_feedback_is_left_as_it_is(meta):
    made, params = meta
    queries, feedback = pairs(made.domain, 0.01)
    read = jnp.zeros((len(feedback), 2, 7)).at[:, 0].set(1.0)
    expected = jax.jit(made.inside.unroll)(params, (queries, read), feedback)
    found = jax.jit(made.unroll)(params, queries, feedback)
    np.testing.assert_allclose(found, expected, 1e-5, 1e-6)


def test_but_for_what_is_read_of_the_size_answers_grow_as_large_feedback_does():
    """With no weight on what is read of r, answers from the second on are equivariant."""
    made = Normalised(DOMAINS["linear"], NETWORKS["lstm"].make)
    params = scattered(made)
    params["body"]["input"] = params["body"]["input"].at[:, 3:5].set(0.0)  # after the 3 of x
    queries, feedback = pairs(made.domain, 1000.0)
    one, tenfold = (jax.jit(made.unroll)(params, queries, k * feedback)[1:] for k in (1, 10))
    np.testing.assert_allclose(tenfold, 10 * one, 1e-4, 1e-5)


def test_no_feedback_but_zero_has_a_finite_gradient(meta):
    made, params = meta
    queries, feedback = pairs(made.domain, 0.0)
    answers = lambda params: made.unroll(params, queries, feedback).sum()
    gradient = jax.jit(jax.grad(answers))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
