"""Attention: the transformer, its linear relative, and one layer whose training has a theory."""

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
from metadyn.learners.residual_blocks import HeadedConfig, by_token, joined, queries_keys_values

Cache = tuple[Float[Array, "room heads d"], Float[Array, "room heads d"], Int[Array, ""]]
Sums = tuple[Float[Array, "heads d d"], Int[Array, ""]]
Pairs = tuple[Float[Array, "m n"], Int[Array, ""]]


class SoftmaxAttention(nnx.Module):
    """Causal self-attention of several heads (Vaswani et al. 2017), stepped from a cache.

    The cache holds the keys and the values so far, and their number. A token beyond its room is
    answered with NaN, since one that silently went unread would pass for an answer.
    """

    def __init__(self, config: HeadedConfig, steps: int, *, rngs: nnx.Rngs):
        H = config.hidden
        self.heads, self.d = config.attention_heads, config.head_size
        self.project: Any = nnx.Linear(H, 3 * H, rngs=rngs)
        self.out: Any = nnx.Linear(H, H, rngs=rngs)

    def __call__(self, x: Float[Array, "*B T H"]) -> Float[Array, "*B T H"]:
        """The attention of each token to those up to it."""
        T = x.shape[-2]
        projected = queries_keys_values(self.project, x, self.heads)
        query, key, value = (each.swapaxes(-2, -3) for each in projected)
        scores = products.similarities(query, key) / jnp.sqrt(self.d)
        past = jnp.tril(jnp.ones((T, T), bool))
        weights = jax.nn.softmax(jnp.where(past, scores, -jnp.inf))
        return by_token(self.out, joined(products.times(weights, value)))

    def start(self, steps: int) -> Cache:
        """Makes an empty cache."""
        nothing = jnp.zeros((steps, self.heads, self.d))
        return nothing, nothing, jnp.int32(0)

    def step(self, memory: Cache, x: Float[Array, " H"]) -> tuple[Cache, Float[Array, " H"]]:
        """Computes the attention of one token to those in the cache and to itself."""
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
    """A causal transformer, such as learns regression in context in Garg et al. (2022)."""

    label = "transformer"
    mixer = SoftmaxAttention


class LinearAttention(nnx.Module):
    """Causal linear self-attention: (1/t) Σ_{s≤t} v_s (k_s · q_t) / √d, head by head.

    The memory is Σ v kᵀ.
    """

    def __init__(self, config: HeadedConfig, steps: int, *, rngs: nnx.Rngs):
        self.heads, self.d = config.attention_heads, config.head_size
        linear = lambda: nnx.Linear(config.hidden, config.hidden, use_bias=False, rngs=rngs)
        self.query, self.value, self.out, self.key = (linear() for _ in range(4))

    def _projected(self, x: Float[Array, "*T H"]) -> tuple[Array, Array, Array]:
        split = lambda layer: by_token(layer, x).reshape(*x.shape[:-1], self.heads, -1)
        return split(self.query) / jnp.sqrt(self.d), split(self.key), split(self.value)

    def __call__(self, x: Float[Array, "*B T H"]) -> Float[Array, "*B T H"]:
        """The attention of each token to those up to it."""
        query, key, value = (each.swapaxes(-2, -3) for each in self._projected(x))
        scores = jnp.tril(products.similarities(query, key))
        mixed = products.times(scores, value) / jnp.arange(1, x.shape[-2] + 1)[:, None]
        return by_token(self.out, joined(mixed))

    def start(self, steps: int) -> Sums:
        """Makes the sums of no tokens yet: zero."""
        return jnp.zeros((self.heads, self.d, self.d)), jnp.int32(0)

    def step(self, memory: Sums, x: Float[Array, " H"]) -> tuple[Sums, Float[Array, " H"]]:
        """Returns the attention of one token to those in the sums and to itself."""
        sums, t = memory
        query, key, value = self._projected(x)
        own = (query * key).sum(-1, keepdims=True) * value
        mixed = (jnp.einsum("hdk,hk->hd", sums, query) + own) / (t + 1)
        return (sums + value[:, :, None] * key[:, None], t + 1), self.out(mixed.reshape(-1))


@dataclasses.dataclass(frozen=True)
class LinearAttentionConfig(HeadedConfig):
    """A transformer whose attention is linear: its memory is of one size however long the episode.

    Scores are qᵀk / √d without a softmax (after Schlag et al. 2021), and their sum is divided by
    the number of tokens, as Zhang et al. (2025) divide it.
    """

    label = "linear attention"
    mixer = LinearAttention


@dataclasses.dataclass(frozen=True)
class OneLayerAttentionConfig:
    """Linear attention of one layer, as Zhang, Singh, Latham & Saxe (2025, arXiv:2501.16265) do it.

    Trained by small steps of gradient descent from small weights, its loss falls once, abruptly, if
    keys and queries are merged; if they are separate it goes down a staircase, one principal
    component of the inputs at a time.
    """

    label = "one-layer linear attention"
    attention_heads: int = 8
    """Heads."""
    merged: bool = False
    """Whether a head has one matrix W^KQ in place of keys and queries of its own."""
    rank: int = 1
    """Numbers in a key where they are separate: the theory is of 1."""
    scale: float = 1e-2
    """Standard deviation of the initial weights. The theory is of small ones."""

    def __post_init__(self) -> None:
        check_positive(self, "attention_heads", "rank", "scale")

    def make(self, domain: Domain, heads: int = 0) -> OneLayerAttention:
        """Makes the meta-learner for a domain."""
        return OneLayerAttention(domain, self, heads)


class OneLayerAttention:
    """The meta-learner that answers x with Σ_h V_h (1/t) Σ_{s≤t} y_s x_sᵀ U_h x over the t pairs.

    That is Zhang et al.'s attention to tokens (x_s; y_s), the query's token (x; 0) last and the
    answer read there. V_h is the block of the value matrix between y and answers; U_h is the block
    of W^KQ between inputs, or K_hᵀ Q_h. Blocks that no answer depends on, and those that the
    authors start at zero and that stay there, have no place. Every step of an episode is a query,
    with the pairs before it in context.

    With V_h = I / H and U_h = η I the answers are those of one step of gradient descent from zero,
    at rate η, on half the mean squared error over the pairs (von Oswald et al. 2023,
    arXiv:2212.07677).
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
        drawn = lambda key, shape: jax.random.normal(key, (config.attention_heads, *shape))
        return {
            name: config.scale * drawn(key, shape)
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    def _outputs(
        self, params: Params, pairs: Float[Array, "m n *B"], x: Float[Array, " n *B"]
    ) -> Float[Array, " outputs *B"]:
        """The outputs at x, given the mean of y xᵀ over the pairs."""
        if self.config.merged:
            key_query = params["key_query"]
        else:
            key_query = jnp.einsum("hri,hrj->hij", params["key"], params["query"])
        return jnp.einsum("hom,mi...,hij,j...->o...", params["value"], pairs, key_query, x)

    def learner(self, params: Params) -> Learner:
        """Makes the step-by-step form, whose memory is Σ y xᵀ and the number of pairs."""
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
        """Answers whole episodes: [T, answer_size, B], and below them the heads."""
        x, y = encoded_episodes(self.domain, queries, feedback)
        total = jnp.cumsum(y[:, :, None] * x[:, None], axis=0)
        means = total / jnp.arange(1, len(x) + 1)[:, None, None, None]
        before = jnp.concatenate([jnp.zeros_like(means[:1]), means[:-1]])
        return jax.vmap(lambda pairs, x: self._outputs(params, pairs, x))(before, x)
