"""Normalised feedback: steps against whole episodes and NumPy, causality and equivariance."""

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
    net = Normalised(DOMAINS["linear"], NETWORKS[request.param].make)
    assert isinstance(net, MetaLearner)
    return net, scattered(net)


def pairs(domain, scale=1.0):
    queries, feedback = observe(domain, jax.random.split(jax.random.key(1), 7))
    return queries, scale * feedback


@pytest.mark.parametrize("scale", [1.0, 16.0])
def test_step_by_step_is_whole(meta, scale):
    net, params = meta
    queries, feedback = pairs(net.domain, scale)
    unrolled = jax.jit(net.unroll)(params, queries, feedback)
    assert np.std(unrolled[1:]) > 1e-2 * scale
    answers = stepped(net.learner(params), queries, feedback)
    np.testing.assert_allclose(answers, unrolled, 1e-4, 1e-5 * scale)


def test_a_normalised_meta_learner_can_be_copied(meta):
    net, params = meta
    copied = copy.deepcopy(net)
    assert copied.inside.domain is not net.inside.domain
    queries, feedback = pairs(net.domain)
    answers, expected = (m.unroll(params, queries, feedback) for m in (copied, net))
    np.testing.assert_array_equal(answers, expected)


def test_the_network_inside_reads_the_inputs_that_numpy_computes(meta):
    """It reads feedback over the new r, and with queries 1 / r and the log of r's last change."""
    net, params = meta
    queries, feedback = pairs(net.domain)
    y = np.float64(feedback)
    squares = np.array([(y[:t] ** 2).mean((0, 1)) for t in range(1, len(y) + 1)])
    r = np.concatenate([np.ones((2, 7)), np.sqrt(np.maximum(2 * squares, 1))])  # from r_{-1} on
    assert 0 < (r[2:] == 1).mean() < 1
    last, before, after = r[:-2], r[1:-1], r[2:]
    read = jnp.float32(np.stack([1 / before, np.log(before / last)], axis=1))
    expected = jax.jit(net.inside.unroll)(params, (queries, read), jnp.float32(y / after[:, None]))
    answers = jax.jit(net.unroll)(params, queries, feedback)
    np.testing.assert_allclose(answers, expected * before[:, None], 1e-4, 1e-5)


def test_answers_do_not_depend_on_the_feedback_to_come(meta):
    net, params = meta
    queries, feedback = pairs(net.domain)
    before = jax.jit(net.unroll)(params, queries, feedback)
    after = jax.jit(net.unroll)(params, queries, feedback.at[3:].multiply(5.0))
    np.testing.assert_allclose(after[:4], before[:4], 1e-6)
    assert np.abs(after[4:] - before[4:]).max() > 1e-3


def test_small_feedback_is_left_as_it_is(meta):
    net, params = meta
    queries, feedback = pairs(net.domain, 0.01)
    read = jnp.zeros((len(feedback), 2, 7)).at[:, 0].set(1.0)
    expected = jax.jit(net.inside.unroll)(params, (queries, read), feedback)
    answers = jax.jit(net.unroll)(params, queries, feedback)
    np.testing.assert_allclose(answers, expected, 1e-5, 1e-6)


def test_without_inputs_of_its_size_answers_scale_with_large_feedback():
    """With no weight on the inputs that tell r, answers from the second on are equivariant."""
    net = Normalised(DOMAINS["linear"], NETWORKS["lstm"].make)
    params = scattered(net)
    params["body"]["input"] = params["body"]["input"].at[:, 3:5].set(0.0)  # the two inputs after x
    queries, feedback = pairs(net.domain, 1000.0)
    answers, tenfold = (jax.jit(net.unroll)(params, queries, k * feedback)[1:] for k in (1, 10))
    np.testing.assert_allclose(tenfold, 10 * answers, 1e-4, 1e-5)


def test_feedback_of_only_zeros_has_a_finite_gradient(meta):
    net, params = meta
    queries, feedback = pairs(net.domain, 0.0)
    answers = lambda params: net.unroll(params, queries, feedback).sum()
    gradient = jax.jit(jax.grad(answers))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
