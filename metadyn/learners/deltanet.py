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
        """What is read at each token of a whole episode, token by token.

        The triangular system that Yang et al. solve in its place is a library call on a CPU, and
        such calls on several CPU devices at once can wait for each other's threads for ever.
        """
        nothing = self.start(len(x))
        mixed = jax.lax.scan(lambda S, now: self._corrected(S, *now), nothing, self._projected(x))
        return self.out(mixed[1].reshape(len(x), -1))

    def _corrected(self, memory, query, key, value, rate) -> tuple[FastWeights, Array]:
        """The fast weights after one correction, and what is read of them."""
        error = rate * (value - jnp.einsum("hvk,hk->hv", memory, key))
        own = error * (key * query).sum(-1, keepdims=True)
        mixed = jnp.einsum("hvk,hk->hv", memory, query) + own
        return memory + error[:, :, None] * key[:, None], mixed

    def start(self, steps: int) -> FastWeights:
        """Fast weights of zero."""
        return jnp.zeros((self.heads, self.d, self.d))

    def step(self, memory: FastWeights, x: Float[Array, " H"]) -> tuple[FastWeights, Array]:
        """One correction, and what is read after it."""
        memory, mixed = self._corrected(memory, *self._projected(x))
        return memory, self.out(mixed.reshape(-1))


def _unit(a: Float[Array, "*T d"]) -> Float[Array, "*T d"]:
    """SiLU, then unit length (zero stays zero), as Yang et al. make keys and queries."""
    a = jax.nn.silu(a)
    return a * jax.lax.rsqrt((a**2).sum(-1, keepdims=True) + 1e-6)
