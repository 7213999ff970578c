"""DeltaNet against a loop of the delta rule and a sum of outer products, in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metadyn.errors import ConfigError
from metadyn.learners.deltanet import CHUNK, DeltaNetConfig, DeltaRule

H, HEADS, D = 8, 2, 4
CONFIG = DeltaNetConfig(hidden=H, attention_heads=HEADS)


@pytest.fixture(scope="module")
def mixer():
    return DeltaRule(CONFIG, 20, rngs=nnx.Rngs(0))


def projected(mixer, x):
    """q, k, v [T, heads, d] and β [T, heads], in float64."""
    kernel = lambda linear: np.asarray(linear.kernel[...], np.float64)
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    each = (x @ kernel(mixer.project)).reshape(len(x), 3, HEADS, D)
    silu = each * sigmoid(each)
    unit = silu / np.sqrt((silu**2).sum(-1, keepdims=True) + 1e-6)
    rate = sigmoid(x @ kernel(mixer.rate) + np.asarray(mixer.rate.bias[...], np.float64))
    return unit[:, 0], unit[:, 1], each[:, 2], rate


@pytest.mark.parametrize("T", [1, 2, 21, 128, 200])
def test_fast_weights_are_corrected_by_the_delta_rule(T, mixer):
    """S ← S + β (v − S k) kᵀ, one token after another, read by S q."""
    x = np.random.default_rng(0).standard_normal((T, H))
    query, key, value, rate = projected(mixer, x)
    read = np.zeros((T, HEADS, D))
    for head in range(HEADS):
        S = np.zeros((D, D))
        for t in range(T):
            error = value[t, head] - S @ key[t, head]
            S += rate[t, head] * np.outer(error, key[t, head])
            read[t, head] = S @ query[t, head]
    expected = read.reshape(T, H) @ np.asarray(mixer.out.kernel[...], np.float64)
    found = jax.jit(lambda x: mixer(x))(np.float32(x))
    np.testing.assert_allclose(found, expected, 1e-4, 1e-5)


def test_fast_weights_are_a_sum_of_outer_products(mixer):
    """Σ_s β_s v_s k_sᵀ Π_{r>s} (I − β_r k_r k_rᵀ), as stepping leaves them."""
    T = 12
    x = np.random.default_rng(0).standard_normal((T, H))
    _, key, value, rate = projected(mixer, x)
    step = lambda S, token: mixer.step(S, token)
    S = np.asarray(jax.jit(lambda x: jax.lax.scan(step, mixer.start(T), x)[0])(np.float32(x)))
    for head in range(HEADS):
        expected = np.zeros((D, D))
        for s in range(T):
            part = rate[s, head] * np.outer(value[s, head], key[s, head])
            for r in range(s + 1, T):
                part = part @ (np.eye(D) - rate[r, head] * np.outer(key[r, head], key[r, head]))
            expected += part
        np.testing.assert_allclose(S[head], expected, 1e-4, 1e-5)


def test_the_gradient_of_whole_episodes_is_that_of_stepping(mixer):
    """Through two parts, the second of which is padded."""
    rng, T = np.random.default_rng(0), CHUNK + 6
    x, direction = (np.float32(rng.standard_normal((T, H))) for _ in range(2))
    stepping = lambda x: jax.lax.scan(lambda S, one: mixer.step(S, one), mixer.start(T), x)[1]
    whole, stepped = (
        jax.jit(jax.grad(lambda x, f=f: jnp.vdot(direction, f(x))))(x) for f in (mixer, stepping)
    )
    np.testing.assert_allclose(whole, stepped, 1e-4, 1e-4 * np.abs(stepped).max())


@pytest.mark.parametrize("T", [20, CHUNK + 6])
def test_many_episodes_at_once_are_each_alone_and_so_is_their_gradient(T, mixer):
    rng = np.random.default_rng(0)
    x, direction = (np.float32(rng.standard_normal((3, T, H))) for _ in range(2))
    both = lambda f: jax.jit(jax.value_and_grad(lambda x: jnp.vdot(direction, f(x))))(x)
    each = both(lambda x: jnp.stack([mixer(one) for one in x]))
    for found, expected in zip(both(mixer), each, strict=True):
        np.testing.assert_allclose(found, expected, 1e-4, 1e-4)


def test_bad_networks_are_named():
    with pytest.raises(ConfigError, match="attention_heads = 3: must divide hidden = 64"):
        DeltaNetConfig(attention_heads=3)
    with pytest.raises(ConfigError, match="layers = 0"):
        DeltaNetConfig(layers=0)
