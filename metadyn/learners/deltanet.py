"""DeltaNet: fast weights that are corrected, within the episode, by the delta rule."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from metadyn.kernels import products
from metadyn.learners.residual_blocks import HeadedConfig, by_token, joined, queries_keys_values

FastWeights = Float[Array, "*B heads d d"]
TOGETHER = 64
"""Tokens whose corrections are solved for at once: our choice."""


class DeltaRule(nnx.Module):
    """Fast weights S_t = S_{t−1} + β_t (v_t − S_{t−1} k_t) k_tᵀ, read as S_t q_t, head by head.

    One step of gradient descent, at rate β_t between 0 and 1, on ½|S k_t − v_t|² with |k_t| = 1.
    """

    def __init__(self, config: HeadedConfig, steps: int, *, rngs: nnx.Rngs):
        H = config.hidden
        self.heads, self.d = config.attention_heads, config.head_size
        self.project = nnx.Linear(H, 3 * H, use_bias=False, rngs=rngs)
        self.rate = nnx.Linear(H, self.heads, rngs=rngs)
        self.out = nnx.Linear(H, H, use_bias=False, rngs=rngs)

    def _projected(self, x: Float[Array, "*T H"]) -> tuple[Array, Array, Array, Array]:
        query, key, value = queries_keys_values(self.project, x, self.heads)
        return _unit(query), _unit(key), value, jax.nn.sigmoid(by_token(self.rate, x))[..., None]

    def __call__(self, x: Float[Array, "*B T H"]) -> Float[Array, "*B T H"]:
        """What is read at each token of whole episodes, some tokens at a time.

        Yang et al.: the corrections e_t = β_t (v_t − S_{t−1} k_t) of several tokens, of which each
        depends on those before, solve a triangular system, and all else is products.
        """
        T = x.shape[-2]
        size = min(T, TOGETHER)

        def parts(a: Float[Array, "*B T heads n"]) -> Float[Array, "part *B heads size n"]:
            padding = [(0, -T % size), (0, 0), (0, 0)]  # where β = 0 nothing is corrected
            padded = jnp.pad(a, [(0, 0)] * (a.ndim - 3) + padding).swapaxes(-2, -3)
            cut = padded.reshape(*padded.shape[:-2], -1, size, padded.shape[-1])
            return jnp.moveaxis(cut, -3, 0)

        tokens = [parts(each) for each in self._projected(x)]
        memory, first = _part(None, [each[0] for each in tokens])
        read = [first]
        if size < T:
            read.extend(jax.lax.scan(_part, memory, [each[1:] for each in tokens])[1])
        return by_token(self.out, joined(jnp.concatenate(read, axis=-2)[..., :T, :]))

    def start(self, steps: int) -> FastWeights:
        """Makes fast weights of zero."""
        return jnp.zeros((self.heads, self.d, self.d))

    def step(self, memory: FastWeights, x: Float[Array, " H"]) -> tuple[FastWeights, Array]:
        """Makes one correction, and reads what is there after it."""
        query, key, value, rate = self._projected(x)
        error = rate * (value - jnp.einsum("hvk,hk->hv", memory, key))
        own = error * (key * query).sum(-1, keepdims=True)
        mixed = jnp.einsum("hvk,hk->hv", memory, query) + own
        return memory + error[:, :, None] * key[:, None], self.out(mixed.reshape(-1))


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig(HeadedConfig):
    """Residual blocks whose memory is a linear map, trained online by the delta rule.

    After Schlag et al. (2021) and Yang et al. (2024, arXiv:2406.06484).
    """

    label = "DeltaNet"
    mixer = DeltaRule


def _part(memory: FastWeights | None, tokens: list[Array]) -> tuple[FastWeights, Array]:
    """The fast weights after the corrections of some tokens, and what is read at each of them.

    Without a memory they are zero before. Axes: *B, heads, and of tokens size and d.
    """
    query, key, value, rate = tokens
    recalled = lambda a: 0.0 if memory is None else products.similarities(a, memory)
    before = jnp.tril(rate * products.similarities(key, key), -1)
    error = jax.lax.custom_linear_solve(
        lambda error: error + before @ error,
        rate * (value - recalled(key)),
        lambda _, right: _substituted(before, right),
        lambda _, right: _substituted(before, right, transposed=True),
    )
    read = products.times(jnp.tril(products.similarities(query, key)), error) + recalled(query)
    more = error.mT @ key
    return more if memory is None else memory + more, read


def _substituted(
    before: Float[Array, "*B m m"], right: Float[Array, "*B m d"], transposed: bool = False
) -> Float[Array, "*B m d"]:
    """Solves (I + before) e = right, or with its transpose, row by row.

    It is not left to a library, whose calls on several CPU devices at once can wait for each
    other's threads for ever.
    """

    def row(found: Array, now: tuple[Array, Array, Array]) -> tuple[Array, None]:
        t, coefficients, one = now
        known = jnp.einsum("...s,...sd->...d", coefficients, found)
        return found.at[..., t, :].set(one - known), None

    coefficients = jnp.moveaxis(before, -1 if transposed else -2, 0)
    rows = jnp.arange(len(coefficients)), coefficients, jnp.moveaxis(right, -2, 0)
    return jax.lax.scan(row, jnp.zeros_like(right), rows, reverse=transposed)[0]


def _unit(a: Float[Array, "*T d"]) -> Float[Array, "*T d"]:
    """SiLU, then unit length (zero stays zero), as Yang et al. make keys and queries."""
    a = jax.nn.silu(a)
    return a * jax.lax.rsqrt((a**2).sum(-1, keepdims=True) + 1e-6)
