"""DeltaNet: fast weights that are corrected, within the episode, by the delta rule."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from metadyn.base import Domain
from metadyn.learners.blocks import HeadedConfig

FastWeights = Float[Array, "heads d d"]
TOGETHER = 64
"""Tokens whose corrections are solved for at once: our choice."""


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig(HeadedConfig):
    """Residual blocks whose memory is a linear map, trained online by the delta rule.

    After Schlag et al. (2021) and Yang et al. (2024, arXiv:2406.06484).
    """

    label = "DeltaNet"

    def mixer(self, domain: Domain, rngs: nnx.Rngs) -> DeltaRule:
        """The delta rule."""
        return DeltaRule(self, rngs=rngs)


class DeltaRule(nnx.Module):
    """Fast weights S_t = S_{t−1} + β_t (v_t − S_{t−1} k_t) k_tᵀ, read as S_t q_t, head by head.

    One step of gradient descent, at rate β_t between 0 and 1, on ½|S k_t − v_t|² with |k_t| = 1.
    """

    def __init__(self, config: DeltaNetConfig, *, rngs: nnx.Rngs):
        H = config.hidden
        self.heads, self.d = config.attention_heads, config.head_size
        self.project = nnx.Linear(H, 3 * H, use_bias=False, rngs=rngs)
        self.rate = nnx.Linear(H, self.heads, rngs=rngs)
        self.out = nnx.Linear(H, H, use_bias=False, rngs=rngs)

    def _projected(self, x: Float[Array, "*T H"]) -> tuple[Array, Array, Array, Array]:
        query, key, value = jnp.moveaxis(
            self.project(x).reshape(*x.shape[:-1], 3, self.heads, self.d), -3, 0
        )
        return _unit(query), _unit(key), value, jax.nn.sigmoid(self.rate(x))[..., None]

    def __call__(self, x: Float[Array, "T H"]) -> Float[Array, "T H"]:
        """What is read at each token of a whole episode, some tokens at a time.

        Yang et al.: the corrections e_t = β_t (v_t − S_{t−1} k_t) of several tokens, of which each
        depends on those before, solve a triangular system, and all else is products.
        """
        T, size = len(x), min(len(x), TOGETHER)

        def parts(a: Float[Array, "T heads n"]) -> Float[Array, "part heads size n"]:
            padded = jnp.pad(a, ((0, -T % size), (0, 0), (0, 0)))  # β = 0: nothing is corrected
            return padded.reshape(-1, size, *a.shape[1:]).swapaxes(1, 2)

        read = jax.lax.scan(_part, self.start(T), [*map(parts, self._projected(x))])[1]
        return self.out(read.swapaxes(1, 2).reshape(-1, self.heads * self.d)[:T])

    def start(self, steps: int) -> FastWeights:
        """Fast weights of zero."""
        return jnp.zeros((self.heads, self.d, self.d))

    def step(self, memory: FastWeights, x: Float[Array, " H"]) -> tuple[FastWeights, Array]:
        """One correction, and what is read after it."""
        query, key, value, rate = self._projected(x)
        error = rate * (value - jnp.einsum("hvk,hk->hv", memory, key))
        own = error * (key * query).sum(-1, keepdims=True)
        mixed = jnp.einsum("hvk,hk->hv", memory, query) + own
        return memory + error[:, :, None] * key[:, None], self.out(mixed.reshape(-1))


def _part(memory: FastWeights, tokens: list[Array]) -> tuple[FastWeights, Array]:
    """The fast weights after the corrections of some tokens, and what is read at each of them."""
    query, key, value, rate = tokens
    right = rate * (value - jnp.einsum("hvk,htk->htv", memory, key))
    before = jnp.tril(rate * jnp.einsum("htk,hsk->hts", key, key), -1)
    error = jax.lax.custom_linear_solve(
        lambda error: error + before @ error,
        right,
        lambda _, right: _substituted(before, right),
        lambda _, right: _substituted(before[:, ::-1, ::-1].mT, right[:, ::-1])[:, ::-1],
    )
    scores = jnp.tril(jnp.einsum("htk,hsk->hts", query, key))
    read = scores @ error + jnp.einsum("hvk,htk->htv", memory, query)
    return memory + jnp.einsum("htv,htk->hvk", error, key), read


def _substituted(
    before: Float[Array, "heads m m"], right: Float[Array, "heads m d"]
) -> Float[Array, "heads m d"]:
    """Solves (I + before) e = right, before strictly lower triangular, row by row.

    It is not left to a library, whose calls on several CPU devices at once can wait for each
    other's threads for ever.
    """

    def row(found: Array, now: tuple[Array, Array, Array]) -> tuple[Array, None]:
        t, coefficients, one = now
        return found.at[:, t].set(one - jnp.einsum("hs,hsd->hd", coefficients, found)), None

    rows = jnp.arange(right.shape[1]), before.swapaxes(0, 1), right.swapaxes(0, 1)
    return jax.lax.scan(row, jnp.zeros_like(right), rows)[0]


def _unit(a: Float[Array, "*T d"]) -> Float[Array, "*T d"]:
    """SiLU, then unit length (zero stays zero), as Yang et al. make keys and queries."""
    a = jax.nn.silu(a)
    return a * jax.lax.rsqrt((a**2).sum(-1, keepdims=True) + 1e-6)
