"""DeltaNet against a loop of the delta rule and a sum of outer products in float64 NumPy."""

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
    """Returns q, k and v [T, heads, d] and β [T, heads], in float64."""
    kernel = lambda linear: np.asarray(linear.kernel[...], np.float64)
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    qkv = (x @ kernel(mixer.project)).reshape(len(x), 3, HEADS, D)
    silu = qkv * sigmoid(qkv)
    unit = silu / np.sqrt((silu**2).sum(-1, keepdims=True) + 1e-6)
    rate = sigmoid(x @ kernel(mixer.rate) + np.asarray(mixer.rate.bias[...], np.float64))
    return unit[:, 0], unit[:, 1], qkv[:, 2], rate


@pytest.mark.parametrize("T", [1, 2, 21, 128, 200])
def test_fast_weights_are_corrected_by_the_delta_rule(T, mixer):
    """One token after another, S ← S + β (v − S k) kᵀ, which is read by S q."""
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
    mixed = jax.jit(lambda x: mixer(x))(np.float32(x))
    np.testing.assert_allclose(mixed, expected, 1e-4, 1e-5)


def test_fast_weights_are_a_sum_of_outer_products(mixer):
    """Stepping leaves Σ_s β_s v_s k_sᵀ Π_{r>s} (I − β_r k_r k_rᵀ)."""
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
    """The episode has two chunks, the second of which is padded."""
    rng, T = np.random.default_rng(0), CHUNK + 6
    x, direction = (np.float32(rng.standard_normal((T, H))) for _ in range(2))
    stepped = lambda x: jax.lax.scan(lambda S, token: mixer.step(S, token), mixer.start(T), x)[1]
    gradient, expected = (
        jax.jit(jax.grad(lambda x, f=f: jnp.vdot(direction, f(x))))(x) for f in (mixer, stepped)
    )
    np.testing.assert_allclose(gradient, expected, 1e-4, 1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("T", [20, CHUNK + 6])
def test_many_episodes_at_once_give_the_values_and_gradients_of_single_ones(T, mixer):
    rng = np.random.default_rng(0)
    x, direction = (np.float32(rng.standard_normal((3, T, H))) for _ in range(2))
    evaluate = lambda f: jax.jit(jax.value_and_grad(lambda x: jnp.vdot(direction, f(x))))(x)
    single = evaluate(lambda x: jnp.stack([mixer(episode) for episode in x]))
    for result, expected in zip(evaluate(mixer), single, strict=True):
        np.testing.assert_allclose(result, expected, 1e-4, 1e-4)


def test_bad_networks_are_named():
    with pytest.raises(ConfigError, match="attention_heads = 3: must divide hidden = 64"):
        DeltaNetConfig(attention_heads=3)
    with pytest.raises(ConfigError, match="layers = 0"):
        DeltaNetConfig(layers=0)
