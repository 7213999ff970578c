"""DeltaNet: fast weights that the delta rule corrects within the episode."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from metadyn.kernels import products
from metadyn.learners.residual_blocks import (
    HeadedConfig,
    by_token,
    merge_heads,
    queries_keys_values,
)

FastWeights = Float[Array, "*B heads d d"]
CHUNK = 64
"""Number of tokens whose corrections are solved for at once: our choice."""


class DeltaRule(nnx.Module):
    """Mixer with fast weights S_t = S_{t−1} + β_t (v_t − S_{t−1} k_t) k_tᵀ and output S_t q_t.

    Each head has its own. An update is one step of gradient descent on ½|S k_t − v_t|², at a rate
    β_t between 0 and 1 and with |k_t| = 1.
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
        """Returns the outputs at all tokens of whole episodes, `CHUNK` tokens at a time.

        Yang et al.: the corrections e_t = β_t (v_t − S_{t−1} k_t) of several tokens, each of which
        depends on those before it, solve a triangular system. All else is matrix products.
        """
        T = x.shape[-2]
        size = min(T, CHUNK)

        def split(a: Float[Array, "*B T heads n"]) -> Float[Array, "part *B heads size n"]:
            padding = [(0, -T % size), (0, 0), (0, 0)]  # with β = 0, so that it corrects nothing
            padded = jnp.pad(a, [(0, 0)] * (a.ndim - 3) + padding).swapaxes(-2, -3)
            parts = padded.reshape(*padded.shape[:-2], -1, size, padded.shape[-1])
            return jnp.moveaxis(parts, -3, 0)

        tokens = [split(array) for array in self._projected(x)]
        memory, first = _correct_part(None, [array[0] for array in tokens])
        outputs = [first]
        if size < T:
            outputs.extend(jax.lax.scan(_correct_part, memory, [array[1:] for array in tokens])[1])
        return by_token(self.out, merge_heads(jnp.concatenate(outputs, axis=-2)[..., :T, :]))

    def start(self, steps: int) -> FastWeights:
        """Returns the initial fast weights, zero."""
        return jnp.zeros((self.heads, self.d, self.d))

    def step(self, memory: FastWeights, x: Float[Array, " H"]) -> tuple[FastWeights, Array]:
        """Corrects the fast weights at one token, and returns them and the output."""
        query, key, value, rate = self._projected(x)
        error = rate * (value - jnp.einsum("hvk,hk->hv", memory, key))
        error_term = error * (key * query).sum(-1, keepdims=True)
        mixed = jnp.einsum("hvk,hk->hv", memory, query) + error_term
        return memory + error[:, :, None] * key[:, None], self.out(mixed.reshape(-1))


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig(HeadedConfig):
    """Options of residual blocks whose memory is a linear map, trained online by the delta rule.

    After Schlag et al. (2021) and Yang et al. (2024, arXiv:2406.06484).
    """

    label = "DeltaNet"
    mixer = DeltaRule


def _correct_part(memory: FastWeights | None, tokens: list[Array]) -> tuple[FastWeights, Array]:
    """Returns the fast weights after one part's corrections, and the outputs at its tokens.

    `memory` is the fast weights before, None where they are zero. `tokens` are the queries, keys,
    values and rates of the part, [*B, heads, size, d] (of rates, d = 1).
    """
    query, key, value, rate = tokens
    recall = lambda a: 0.0 if memory is None else products.similarities(a, memory)
    lower = jnp.tril(rate * products.similarities(key, key), -1)
    error = jax.lax.custom_linear_solve(
        lambda error: error + lower @ error,
        rate * (value - recall(key)),
        lambda _, rhs: _substitute(lower, rhs),
        lambda _, rhs: _substitute(lower, rhs, transposed=True),
    )
    outputs = products.times(jnp.tril(products.similarities(query, key)), error) + recall(query)
    change = error.mT @ key
    return change if memory is None else memory + change, outputs


def _substitute(
    lower: Float[Array, "*B m m"], rhs: Float[Array, "*B m d"], transposed: bool = False
) -> Float[Array, "*B m d"]:
    """Solves (I + lower) e = rhs, or (I + lowerᵀ) e = rhs if `transposed`, row by row.

    No library routine is used: its calls on several CPU devices at once can wait for each other's
    threads for ever.
    """

    def solve_row(solution: Array, row: tuple[Array, Array, Array]) -> tuple[Array, None]:
        t, coefficients, rhs_row = row
        solved_terms = jnp.einsum("...s,...sd->...d", coefficients, solution)
        return solution.at[..., t, :].set(rhs_row - solved_terms), None

    coefficients = jnp.moveaxis(lower, -1 if transposed else -2, 0)
    rows = jnp.arange(len(coefficients)), coefficients, jnp.moveaxis(rhs, -2, 0)
    return jax.lax.scan(solve_row, jnp.zeros_like(rhs), rows, reverse=transposed)[0]


def _unit(a: Float[Array, "*T d"]) -> Float[Array, "*T d"]:
    """Applies SiLU and scales to unit length, as Yang et al. do to keys and queries; 0 stays 0."""
    a = jax.nn.silu(a)
    return a * jax.lax.rsqrt((a**2).sum(-1, keepdims=True) + 1e-6)
