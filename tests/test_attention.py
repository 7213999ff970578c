"""Attention against float64 NumPy, its own cache, and a step of gradient descent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import DOMAINS, observe, scattered, stepped
from flax import nnx

from metadyn.errors import ConfigError
from metadyn.learners.attention import (
    LinearAttention,
    LinearAttentionConfig,
    OneLayerAttentionConfig,
    TransformerConfig,
)

H, HEADS, T = 8, 2, 9
SMALL = {"hidden": H, "attention_heads": HEADS}
CONFIGS = {
    "transformer": TransformerConfig(**SMALL),
    "linear": LinearAttentionConfig(**SMALL),
}
ONE_LAYER = {
    "one_layer_separate": OneLayerAttentionConfig(3),
    "one_layer_merged": OneLayerAttentionConfig(3, merged=True),
    "one_layer_of_rank_2": OneLayerAttentionConfig(3, rank=2),
}


def softmax_attention(p, x):
    """Returns the output of softmax attention, computed head by head and token by token."""
    query, key, value = np.split(x @ p["project"]["kernel"] + p["project"]["bias"], 3, axis=1)
    d, mixed = H // HEADS, np.zeros_like(x)
    for head in range(HEADS):
        part = slice(head * d, (head + 1) * d)
        for t in range(len(x)):
            weights = np.exp(key[: t + 1, part] @ query[t, part] / np.sqrt(d))
            mixed[t, part] = weights / weights.sum() @ value[: t + 1, part]
    return mixed @ p["out"]["kernel"] + p["out"]["bias"]


def test_a_transformer_is_that_of_its_formulae():
    """Tokens hold two inputs; blocks are softmax attention and an MLP, pre-norm; in float64."""
    domain = DOMAINS["linear"]
    meta = CONFIGS["transformer"].make(domain)
    params = scattered(meta)
    queries, feedback = observe(domain, jax.random.split(jax.random.key(2), 1))
    answers = jax.jit(meta.unroll)(params, queries, feedback)[..., 0]
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x, y = (np.asarray(a[..., 0], np.float64) for a in (queries, feedback))
    shifted = lambda a: np.concatenate([np.zeros_like(a[:1]), a[:-1]])
    inputs = np.concatenate([x, shifted(y)], axis=1)
    body = p["body"]
    linear = lambda q, a: a @ q["kernel"] + q["bias"]
    norm = lambda q, a: q["scale"] * a / np.sqrt((a**2).mean(1, keepdims=True) + 1e-6)
    gelu = lambda a: a / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
    tokens = linear(body["embed"], np.concatenate([inputs, shifted(inputs)], axis=1))
    assert len(body["blocks"]) == 2
    for block in body["blocks"].values():
        tokens = tokens + softmax_attention(block["mixer"], norm(block["norms"][0], tokens))
        wide = gelu(linear(block["wide"], norm(block["norms"][1], tokens)))
        tokens = tokens + linear(block["narrow"], wide)
    np.testing.assert_allclose(answers, tokens @ p["readout"].T + p["offset"], 1e-4, 1e-4)


def test_linear_attention_is_a_sum_over_the_past():
    """Its output is (1/t) Σ v_s (k_s · q_t)."""
    mixer = LinearAttention(CONFIGS["linear"], T, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((T, H))
    kernel = lambda linear: np.asarray(linear.kernel[...], np.float64)
    heads = lambda a: a.reshape(T, HEADS, -1)
    query, value = heads(x @ kernel(mixer.query)), heads(x @ kernel(mixer.value))
    key = heads(x @ kernel(mixer.key))
    mixed = np.zeros_like(value)
    for t in range(T):
        for head in range(HEADS):
            for s in range(t + 1):
                score = key[s, head] @ query[t, head] / np.sqrt(key.shape[-1])
                mixed[t, head] += score * value[s, head] / (t + 1)
    expected = mixed.reshape(T, H) @ kernel(mixer.out)
    np.testing.assert_allclose(mixer(jnp.asarray(x, jnp.float32)), expected, 1e-4, 1e-5)


# One layer of linear attention, which has a theory.


def test_optimal_weights_take_one_step_of_gradient_descent():
    """V_h = I / H, U_h = η I (von Oswald et al. 2023); the gradient is by finite differences."""
    domain, rate = DOMAINS["linear"], 0.3
    meta = ONE_LAYER["one_layer_merged"].make(domain)
    eyes = lambda n: jnp.stack([jnp.eye(n)] * 3)
    params = {"value": eyes(2) / 3, "key_query": rate * eyes(3)}
    queries, feedback = observe(domain, jax.random.split(jax.random.key(2), 4))
    answers = jax.jit(meta.unroll)(params, queries, feedback)
    x, y = np.asarray(queries, np.float64), np.asarray(feedback, np.float64)
    for episode in range(4):
        np.testing.assert_array_equal(answers[0, :, episode], 0)
        for t in range(1, domain.steps):
            X, Y = x[:t, :, episode], y[:t, :, episode]
            loss = lambda W, X=X, Y=Y: ((X @ W.T - Y) ** 2).sum(1).mean() / 2
            descent = np.zeros((2, 3))
            for i, j in np.ndindex(2, 3):
                e = np.zeros((2, 3))
                e[i, j] = 1e-3
                descent[i, j] = -(loss(e) - loss(-e)) / 2e-3  # exact, as the loss is quadratic
            expected = rate * descent @ x[t, :, episode]
            np.testing.assert_allclose(answers[t, :, episode], expected, 1e-4, 1e-5)


@pytest.mark.parametrize("name", ONE_LAYER)
def test_one_layer_is_attention_to_a_matrix_of_tokens(name):
    """X + Σ_h W^V X Xᵀ W^KQ X / N is read where it completes the query's token (x; 0).

    Blocks that start at zero are zero, and those on which no answer depends are random.
    """
    domain, config, rng = DOMAINS["linear"], ONE_LAYER[name], np.random.default_rng(0)
    meta = config.make(domain)
    params = scattered(meta)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    queries, feedback = observe(domain, jax.random.split(jax.random.key(2), 1))
    x, y = (np.asarray(a[..., 0], np.float64) for a in (queries, feedback))
    answers = jax.jit(meta.unroll)(params, queries, feedback)[..., 0]
    for N in range(1, domain.steps):
        X = np.zeros((5, N + 1))
        X[:3], X[3:, :N] = x[: N + 1].T, y[:N].T
        attended = X.copy()
        for h in range(3):
            U = p["key_query"][h] if config.merged else p["key"][h].T @ p["query"][h]
            W_V, W_KQ = rng.standard_normal((2, 5, 5))
            W_V[3:, :3], W_V[3:, 3:] = 0, p["value"][h]
            W_KQ[3:, :3], W_KQ[:3, :3] = 0, U
            attended += W_V @ X @ X.T @ W_KQ @ X / N
        np.testing.assert_allclose(answers[N], attended[3:, N], 1e-4, 1e-5)


def test_training_starts_from_small_weights():
    meta = OneLayerAttentionConfig(200, scale=1e-3).make(DOMAINS["linear"])
    params = meta.init(jax.random.key(0))
    assert {name: leaf.shape for name, leaf in params.items()} == {
        "value": (200, 2, 2),
        "key": (200, 1, 3),
        "query": (200, 1, 3),
    }
    for leaf in params.values():
        assert np.std(leaf) == pytest.approx(1e-3, rel=0.1)


# Longer episodes and bad input.


def test_a_full_cache_answers_nan():
    """A cache for episodes of 6 steps is stepped through 12. Tokens beyond its room answer NaN."""
    long = dataclasses.replace(DOMAINS["linear"], steps=12)
    queries, feedback = observe(long, jax.random.split(jax.random.key(2), 3))
    meta = CONFIGS["transformer"].make(DOMAINS["linear"])
    params = scattered(meta)
    unrolled = jax.jit(meta.unroll)(params, queries, feedback)
    answers = stepped(meta.learner(params), queries, feedback)
    np.testing.assert_allclose(answers[:7], unrolled[:7], 1e-5, 1e-5)
    assert np.isnan(answers[7:]).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TransformerConfig(layers=0), "layers = 0"),
        (lambda: TransformerConfig(hidden=0), "hidden = 0"),
        (lambda: TransformerConfig(mlp=0), "mlp = 0"),
        (lambda: TransformerConfig(attention_heads=0), "attention_heads = 0"),
        (lambda: TransformerConfig(attention_heads=3), "= 3: must divide hidden = 64"),
        (lambda: LinearAttentionConfig(attention_heads=5), "= 5: must divide hidden = 64"),
        (lambda: OneLayerAttentionConfig(attention_heads=0), "attention_heads = 0"),
        (lambda: OneLayerAttentionConfig(rank=0), "rank = 0"),
        (lambda: OneLayerAttentionConfig(scale=0.0), "scale = 0.0"),
        (lambda: OneLayerAttentionConfig().make(DOMAINS["linear"], -1), "heads = -1"),
    ],
)
def test_bad_networks_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
