"""The minLSTM's associative scan against a plain loop in float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metadyn.errors import ConfigError
from metadyn.learners.linear_recurrent import MinLSTM, MinLSTMConfig

H = 8
CONFIG = MinLSTMConfig(hidden=H)


@pytest.mark.parametrize("T", [1, 2, 21, 300])
def test_the_scan_is_a_loop(T):
    """h ← f / (f + i) h + i / (f + i) (W x + b), with gates of x only, is read through a SiLU."""
    mixer = MinLSTM(CONFIG, T, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((T, H))
    kernel, bias = (
        np.asarray(a[...], np.float64) for a in (mixer.project.kernel, mixer.project.bias)
    )
    forget, take, new, read = np.split(x @ kernel + bias, 4, axis=1)
    f, i = 1 / (1 + np.exp(-forget)), 1 / (1 + np.exp(-take))
    h, states = np.zeros(H), []
    for t in range(T):
        h = f[t] / (f[t] + i[t]) * h + i[t] / (f[t] + i[t]) * new[t]
        states.append(h * read[t] / (1 + np.exp(-read[t])))
    expected = np.stack(states) @ np.asarray(mixer.out.kernel[...], np.float64)
    np.testing.assert_allclose(mixer(jnp.asarray(x, jnp.float32)), expected, 1e-4, 1e-5)


def test_untrained_units_remember_for_up_to_an_episode():
    """At an input of zero f / (f + i) is 1 − 1 / (1 + span), with spans uniform from 1 to T − 1."""
    mixer = MinLSTM(MinLSTMConfig(hidden=2000), 40, rngs=nnx.Rngs(0))
    forget, take, *_ = np.split(np.asarray(mixer.project.bias[...], np.float64), 4)
    f, i = 1 / (1 + np.exp(-forget)), 1 / (1 + np.exp(-take))
    kept = f / (f + i)
    span = kept / (1 - kept)
    np.testing.assert_allclose(
        np.quantile(span, [0, 0.25, 0.5, 0.75, 1]), [1, 10.5, 20, 29.5, 39], rtol=0.06
    )


def test_gates_that_both_vanish_are_still_finite():
    mixer = MinLSTM(CONFIG, 5, rngs=nnx.Rngs(0))
    mixer.project.bias[...] = jnp.full(4 * H, -200.0)
    assert np.isfinite(mixer(jnp.ones((5, H)))).all()


def test_bad_networks_are_named():
    with pytest.raises(ConfigError, match="layers = 0"):
        MinLSTMConfig(layers=0)
