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
        """What is read at each token of a whole episode.

        The weights are sums of outer products, S_t = Σ_{s≤t} u_s k_sᵀ, of the errors that were
        corrected: u_t = β_t (v_t − Σ_{s<t} u_s (k_s · k_t)), a triangular system (Yang et al.).
        """
        query, key, value, rate = (a.swapaxes(0, 1) for a in self._projected(x))
        system = rate * jnp.tril(key @ key.swapaxes(1, 2), -1)  # the unit diagonal is implied
        errors = jax.lax.linalg.triangular_solve(
            system, rate * value, left_side=True, lower=True, unit_diagonal=True
        )
        mixed = jnp.tril(query @ key.swapaxes(1, 2)) @ errors
        return self.out(mixed.swapaxes(0, 1).reshape(len(x), -1))

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


def _unit(a: Float[Array, "*T d"]) -> Float[Array, "*T d"]:
    """SiLU, then unit length (zero stays zero), as Yang et al. make keys and queries."""
    a = jax.nn.silu(a)
    return a * jax.lax.rsqrt((a**2).sum(-1, keepdims=True) + 1e-6)
