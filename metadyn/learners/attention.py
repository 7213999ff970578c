"""Attention: the transformer, linear attention, and one layer with a theory of its training."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from metadyn.base import (
    Domain,
    Feedback,
    Key,
    Learner,
    Params,
    Query,
    encoded_episodes,
    encoded_shapes,
)
from metadyn.errors import check, check_positive
from metadyn.kernels import products
from metadyn.learners.residual_blocks import (
    HeadedConfig,
    by_token,
    merge_heads,
    queries_keys_values,
)

Cache = tuple[Float[Array, "room heads d"], Float[Array, "room heads d"], Int[Array, ""]]
Sums = tuple[Float[Array, "heads d d"], Int[Array, ""]]
Pairs = tuple[Float[Array, "m n"], Int[Array, ""]]


class SoftmaxAttention(nnx.Module):
    """Mixer by causal multi-head self-attention (Vaswani et al. 2017), stepped from a cache.

    The cache holds the keys and the values so far, and their number. The output at a token for
    which the cache has no room is NaN: otherwise a dropped token would go unnoticed.
    """

    def __init__(self, config: HeadedConfig, steps: int, *, rngs: nnx.Rngs):
        H = config.hidden
        self.heads, self.d = config.attention_heads, config.head_size
        self.project: Any = nnx.Linear(H, 3 * H, rngs=rngs)
        self.out: Any = nnx.Linear(H, H, rngs=rngs)

    def __call__(self, x: Float[Array, "*B T H"]) -> Float[Array, "*B T H"]:
        """Returns the attention of each token to the tokens up to it."""
        T = x.shape[-2]
        projected = queries_keys_values(self.project, x, self.heads)
        query, key, value = (a.swapaxes(-2, -3) for a in projected)
        scores = products.similarities(query, key) / jnp.sqrt(self.d)
        past = jnp.tril(jnp.ones((T, T), bool))
        weights = jax.nn.softmax(jnp.where(past, scores, -jnp.inf))
        return by_token(self.out, merge_heads(products.times(weights, value)))

    def start(self, steps: int) -> Cache:
        """Returns an empty cache with room for `steps` tokens."""
        empty = jnp.zeros((steps, self.heads, self.d))
        return empty, empty, jnp.int32(0)

    def step(self, memory: Cache, x: Float[Array, " H"]) -> tuple[Cache, Float[Array, " H"]]:
        """Returns the cache with x added, and the attention of x to cached tokens and itself."""
        keys, values, t = memory
        query, key, value = queries_keys_values(self.project, x, self.heads)
        past = jnp.where(jnp.arange(len(keys)) < t, jnp.einsum("hd,shd->hs", query, keys), -jnp.inf)
        scores = jnp.concatenate([past, (query * key).sum(-1, keepdims=True)], axis=1)
        weights = jax.nn.softmax(scores / jnp.sqrt(self.d))
        mixed = jnp.einsum("hs,shd->hd", weights[:, :-1], values) + weights[:, -1:] * value
        mixed = jnp.where(t < len(keys), mixed, jnp.nan)
        return (keys.at[t].set(key), values.at[t].set(value), t + 1), self.out(mixed.reshape(-1))


@dataclasses.dataclass(frozen=True)
class TransformerConfig(HeadedConfig):
    """Options of a causal transformer; in Garg et al. (2022) one learns regression in context."""

    label = "transformer"
    mixer = SoftmaxAttention


class LinearAttention(nnx.Module):
    """Mixer by causal linear self-attention: (1/t) Σ_{s≤t} v_s (k_s · q_t) / √d in each head.

    The memory is Σ v kᵀ over the tokens so far, and their number.
    """

    def __init__(self, config: HeadedConfig, steps: int, *, rngs: nnx.Rngs):
        self.heads, self.d = config.attention_heads, config.head_size
        linear = lambda: nnx.Linear(config.hidden, config.hidden, use_bias=False, rngs=rngs)
        self.query, self.value, self.out, self.key = (linear() for _ in range(4))

    def _projected(self, x: Float[Array, "*T H"]) -> tuple[Array, Array, Array]:
        split = lambda layer: by_token(layer, x).reshape(*x.shape[:-1], self.heads, -1)
        return split(self.query) / jnp.sqrt(self.d), split(self.key), split(self.value)

    def __call__(self, x: Float[Array, "*B T H"]) -> Float[Array, "*B T H"]:
        """Returns the attention of each token to the tokens up to it."""
        query, key, value = (a.swapaxes(-2, -3) for a in self._projected(x))
        scores = jnp.tril(products.similarities(query, key))
        mixed = products.times(scores, value) / jnp.arange(1, x.shape[-2] + 1)[:, None]
        return by_token(self.out, merge_heads(mixed))

    def start(self, steps: int) -> Sums:
        """Returns the empty memory: a sum of zero over zero tokens."""
        return jnp.zeros((self.heads, self.d, self.d)), jnp.int32(0)

    def step(self, memory: Sums, x: Float[Array, " H"]) -> tuple[Sums, Float[Array, " H"]]:
        """Returns the memory with x added, and the attention of x to earlier tokens and itself."""
        sums, t = memory
        query, key, value = self._projected(x)
        to_itself = (query * key).sum(-1, keepdims=True) * value
        mixed = (jnp.einsum("hdk,hk->hd", sums, query) + to_itself) / (t + 1)
        return (sums + value[:, :, None] * key[:, None], t + 1), self.out(mixed.reshape(-1))


@dataclasses.dataclass(frozen=True)
class LinearAttentionConfig(HeadedConfig):
    """Options of a transformer with linear attention, whose memory does not grow with the episode.

    Scores are qᵀk / √d without a softmax (after Schlag et al. 2021), and the sum over tokens is
    divided by their number, as Zhang et al. (2025) do.
    """

    label = "linear attention"
    mixer = LinearAttention


@dataclasses.dataclass(frozen=True)
class OneLayerAttentionConfig:
    """Options of one-layer linear attention (Zhang, Singh, Latham & Saxe 2025, arXiv:2501.16265).

    Trained from small weights by gradient descent in small steps, its loss falls once, abruptly, if
    keys and queries are merged. If they are separate, its loss descends a staircase, one principal
    component of the inputs at a time.
    """

    label = "one-layer linear attention"
    attention_heads: int = 8
    """Number of heads."""
    merged: bool = False
    """Whether each head has one matrix W^KQ in place of separate key and query matrices."""
    rank: int = 1
    """Size of a key if keys and queries are separate. The theory is for 1."""
    scale: float = 1e-2
    """Standard deviation of the initial weights. The theory is for small ones."""

    def __post_init__(self) -> None:
        check_positive(self, "attention_heads", "rank", "scale")

    def make(self, domain: Domain, heads: int = 0) -> OneLayerAttention:
        """Returns the meta-learner for a domain."""
        return OneLayerAttention(domain, self, heads)


class OneLayerAttention:
    """Meta-learner that answers x with Σ_h V_h (1/t) Σ_{s≤t} y_s x_sᵀ U_h x, given t pairs.

    This is the attention of Zhang et al. to tokens (x_s; y_s), in which the query's token (x; 0) is
    the last and gives the answer. V_h is the block of head h's value matrix from y to answers. U_h
    is the block of W^KQ between inputs, or K_hᵀ Q_h. Left out are blocks that no answer depends on
    and blocks that the authors initialise at zero and that stay there. Every step of an episode is
    a query, with the pairs before it in context.

    With V_h = I / H for H heads and U_h = η I, the answers are those of one step of gradient
    descent from zero, at rate η, on half the mean squared error over the pairs (von Oswald et al.
    2023, arXiv:2212.07677).
    """

    def __init__(self, domain: Domain, config: OneLayerAttentionConfig, heads: int = 0):
        check(heads >= 0, "heads", heads, "must be 0 or more")
        self.domain, self.config, self.heads = domain, config, heads
        (self._n,), (self._m,) = encoded_shapes(domain)

    def init(self, key: Key) -> Params:
        """Draws the blocks V_h, and U_h or K_h and Q_h, of all heads."""
        config, n = self.config, self._n
        shapes = {"value": (self.domain.answer_size + self.heads, self._m)}
        if config.merged:
            shapes |= {"key_query": (n, n)}
        else:
            shapes |= {"key": (config.rank, n), "query": (config.rank, n)}
        keys = jax.random.split(key, len(shapes))
        draw = lambda key, shape: jax.random.normal(key, (config.attention_heads, *shape))
        return {
            name: config.scale * draw(key, shape)
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    def _outputs(
        self, params: Params, pairs: Float[Array, "m n *B"], x: Float[Array, " n *B"]
    ) -> Float[Array, " outputs *B"]:
        """Returns the outputs at x, where `pairs` is the mean of y xᵀ over the pairs in context."""
        if self.config.merged:
            key_query = params["key_query"]
        else:
            key_query = jnp.einsum("hri,hrj->hij", params["key"], params["query"])
        return jnp.einsum("hom,mi...,hij,j...->o...", params["value"], pairs, key_query, x)

    def learner(self, params: Params) -> Learner:
        """Returns the step-by-step learner, whose memory is Σ y xᵀ and the number of pairs."""
        domain = self.domain

        def init(key: Key) -> Pairs:
            return jnp.zeros((self._m, self._n)), jnp.int32(0)

        def predict(memory: Pairs, query: Query) -> Array:
            total, t = memory
            outputs = self._outputs(params, total / jnp.maximum(t, 1), domain.encode_query(query))
            return outputs[: domain.answer_size]

        def update(memory: Pairs, query: Query, feedback: Feedback) -> Pairs:
            total, t = memory
            x, y = domain.encode_query(query), domain.encode_feedback(feedback)
            return total + y[:, None] * x, t + 1

        return Learner(init, predict, update)

    def unroll(
        self, params: Params, queries: Query, feedback: Feedback
    ) -> Float[Array, "T outputs B"]:
        """Runs whole episodes: gives the answers [T, answer_size, B], then the heads on axis 1."""
        x, y = encoded_episodes(self.domain, queries, feedback)
        total = jnp.cumsum(y[:, :, None] * x[:, None], axis=0)
        means = total / jnp.arange(1, len(x) + 1)[:, None, None, None]
        contexts = jnp.concatenate([jnp.zeros_like(means[:1]), means[:-1]])
        return jax.vmap(lambda pairs, x: self._outputs(params, pairs, x))(contexts, x)
