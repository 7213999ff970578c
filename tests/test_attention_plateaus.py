"""The study of linear attention's outer loop: its theory, and a rehearsal of the study."""

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
    of = lambda objective: jax.value_and_grad(objective(DOMAIN, meta).loss, has_aux=True)
    (exact, metrics), slope = of(MODULE.expected)(
        params, indexed_keys(jax.random.key(0), jnp.arange(1))
    )
    sampled, found = jax.jit(of(MODULE.last_answer)), []
    for i in range(64):
        keys = indexed_keys(jax.random.key(2), jnp.arange(2048) + 2048 * i)
        (value, _), gradient = sampled(params, keys)
        found.append(np.append(jax.flatten_util.ravel_pytree(gradient)[0], value))
    mean, error = np.mean(found, 0), np.std(found, 0) / np.sqrt(len(found))
    expected = np.append(jax.flatten_util.ravel_pytree(slope)[0], exact)
    assert np.abs((mean - expected) / error).max() < 4.5  # of some 30 numbers
    assert error[-1] / exact < 0.02
    assert float(metrics["loss"]) == pytest.approx(2 * float(exact), rel=1e-6)


def test_plateaus_are_the_least_losses_with_so_many_components():
    """By minimising the mean squared error of bᵀ A x over the leading blocks of A, in float64."""
    each, power = DOMAIN.moments()
    for d, level in enumerate(DOMAIN.plateaus()):

        def loss(free, d=d):
            A = np.zeros((3, 3))
            A[:d, :d] = free.reshape(d, d)
            answered = np.trace(A.T @ np.diag(power) @ A @ np.diag(each))
            return each.sum() + DOMAIN.sigma**2 - 2 * (A.diagonal() * each**2).sum() + answered

        least = (
            scipy.optimize.minimize(loss, np.zeros(d * d), tol=1e-12).fun
            if d
            else loss(np.zeros(0))
        )
        assert least == pytest.approx(level, rel=1e-8)


def test_a_network_that_never_comes_to_the_end_has_no_number_of_plateaus():
    """Of four seeds one drops at once, one rests at half its loss, one stays there, one at 8."""
    steps = np.array([1, 10, 100, 1000, 10_000])
    loss = np.array([[8, 1, 1, 1, 1], [8, 4, 4, 4, 1], [8, 4, 4, 4, 4], [8, 8, 8, 8, 8.0]])
    data = xr.Dataset(
        {"loss": (("seed", "task", "outer_step", "step"), loss[:, None, :, None])},
        {"outer_step": steps},
    )
    found = MODULE.rested(data, np.array([0.55]), np.array([0.45]), np.array([0.3]))
    np.testing.assert_array_equal(found, [0, 1, np.nan, np.nan])


def test_the_study_is_rehearsed_without_complaint():
    quick = STUDY.presets["quick"]
    named = {each.name for each in rehearse(STUDY, quick, STUDY.plan(quick))}
    assert {*ChainMap(*STUDY.claims.values())} <= named


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"variances": ()}, "variances = .*give positive numbers in decreasing"),
        ({"variances": (0.5, 1.0, 2.0)}, "variances"),
        ({"variances": (1.0, 0.5, 0.0)}, "variances"),
        ({"steps": 1}, "steps = 1: must be at least 2"),
    ],
)
def test_bad_domains_are_named(fields, says):
    with pytest.raises(ConfigError, match=says):
        MODULE.Config(**fields)
