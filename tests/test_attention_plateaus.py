"""The study of plateaus in training linear attention: its theory and a rehearsal."""

import sys
from collections import ChainMap

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import xarray as xr

from metadyn.base import indexed_keys
from metadyn.errors import ConfigError
from metadyn.runner import rehearse
from metadyn.study import load_study

STUDY = load_study("attention_plateaus")
MODULE = sys.modules["metadyn_study_attention_plateaus"]
DOMAIN = MODULE.Config((1.5, 0.6, 0.2), steps=6, sigma=0.5).domain


@pytest.mark.parametrize("kind", ["separate", "merged"])
def test_the_expected_loss_is_the_mean_over_many_episodes_and_so_is_its_gradient(kind):
    meta = getattr(STUDY.presets["quick"], kind).make(DOMAIN)
    flat, unravel = jax.flatten_util.ravel_pytree(meta.init(jax.random.key(0)))
    params = unravel(0.5 * jax.random.normal(jax.random.key(1), flat.shape))
    grad_of = lambda objective: jax.value_and_grad(objective(DOMAIN, meta).loss, has_aux=True)
    (exact, metrics), exact_gradient = grad_of(MODULE.expected)(
        params, indexed_keys(jax.random.key(0), jnp.arange(1))
    )
    sampled, samples = jax.jit(grad_of(MODULE.last_answer)), []
    for i in range(64):
        keys = indexed_keys(jax.random.key(2), jnp.arange(2048) + 2048 * i)
        (value, _), gradient = sampled(params, keys)
        samples.append(np.append(jax.flatten_util.ravel_pytree(gradient)[0], value))
    mean, error = np.mean(samples, 0), np.std(samples, 0) / np.sqrt(len(samples))
    expected = np.append(jax.flatten_util.ravel_pytree(exact_gradient)[0], exact)
    assert np.abs((mean - expected) / error).max() < 4.5  # in standard errors, of some 30 numbers
    assert error[-1] / exact < 0.02
    assert float(metrics["loss"]) == pytest.approx(2 * float(exact), rel=1e-6)


def test_plateaus_are_the_least_losses_with_so_many_components():
    """The least mean squared error of bᵀ A x over the leading blocks of A is found in float64."""
    moments, power = DOMAIN.moments()
    for d, level in enumerate(DOMAIN.plateaus()):

        def loss(block, d=d):
            A = np.zeros((3, 3))
            A[:d, :d] = block.reshape(d, d)
            squares = np.trace(A.T @ np.diag(power) @ A @ np.diag(moments))
            return moments.sum() + DOMAIN.sigma**2 - 2 * (A.diagonal() * moments**2).sum() + squares

        least = (
            scipy.optimize.minimize(loss, np.zeros(d * d), tol=1e-12).fun
            if d
            else loss(np.zeros(0))
        )
        assert least == pytest.approx(level, rel=1e-8)


def test_a_network_that_never_reaches_the_end_has_no_number_of_plateaus():
    """Of four seeds one drops at once, one rests at half its loss, and two stay at 4 and at 8."""
    steps = np.array([1, 10, 100, 1000, 10_000])
    loss = np.array([[8, 1, 1, 1, 1], [8, 4, 4, 4, 1], [8, 4, 4, 4, 4], [8, 8, 8, 8, 8.0]])
    data = xr.Dataset(
        {"loss": (("seed", "task", "outer_step", "step"), loss[:, None, :, None])},
        {"outer_step": steps},
    )
    plateaus = MODULE.rested(data, np.array([0.55]), np.array([0.45]), np.array([0.3]))
    np.testing.assert_array_equal(plateaus, [0, 1, np.nan, np.nan])


def test_the_study_is_rehearsed_without_complaint():
    quick = STUDY.presets["quick"]
    criteria = {criterion.name for criterion in rehearse(STUDY, quick, STUDY.plan(quick))}
    assert {*ChainMap(*STUDY.claims.values())} <= criteria


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variances": ()}, "variances = .*give positive numbers in decreasing"),
        ({"variances": (0.5, 1.0, 2.0)}, "variances"),
        ({"variances": (1.0, 0.5, 0.0)}, "variances"),
        ({"steps": 1}, "steps = 1: must be at least 2"),
    ],
)
def test_bad_domains_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        MODULE.Config(**fields)
