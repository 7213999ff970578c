"""A linear recurrence, whose whole episode is one associative scan: the minLSTM."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from metadyn.base import Key
from metadyn.learners.residual_blocks import BlocksConfig, by_token

State = Float[Array, " H"]


class MinLSTM(nnx.Module):
    """h_t = f'_t h_{t−1} + i'_t (W x_t + b), whose gates do not depend on h.

    f' = f / (f + i) and i' = i / (f + i), with f and i sigmoid gates of x_t. Two things are not in
    Feng et al. Forget gates start so that the units remember for up to the T steps of an episode,
    all lengths alike ("chrono initialisation", Tallec & Ollivier 2018). And what is read of h_t is
    multiplied by the SiLU of a projection of x_t, as in Mamba's blocks (Gu & Dao 2023): the state
    does not know the query, and a product with it is what regression is made of.
    """

    def __init__(self, config: BlocksConfig, steps: int, *, rngs: nnx.Rngs):
        H = config.hidden

        def bias(key: Key, shape: tuple[int, ...], *rest: Any) -> Array:
            spans = jax.random.uniform(key, (H,), minval=1.0, maxval=max(steps - 1.0, 2.0))
            return jnp.concatenate([jnp.log(spans), -jnp.log(spans), jnp.zeros(2 * H)])

        self.project = nnx.Linear(H, 4 * H, bias_init=bias, rngs=rngs)
        self.out = nnx.Linear(H, H, rngs=rngs)

    def _gated(self, x: Float[Array, "*T H"]) -> tuple[Array, Array, Array]:
        forget, take, new, read = jnp.split(by_token(self.project, x), 4, axis=-1)
        # f / (f + i) of two sigmoids, from their logarithms: they can both vanish
        kept = jax.nn.sigmoid(jax.nn.log_sigmoid(forget) - jax.nn.log_sigmoid(take))
        return kept, (1 - kept) * new, jax.nn.silu(read)

    def __call__(self, x: Float[Array, "*B T H"]) -> Float[Array, "*B T H"]:
        """What is read of h_1 … h_T, which are composed of the maps h → kept h + new."""
        kept, new, read = self._gated(x)
        then = lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1])
        states = jax.lax.associative_scan(then, (kept, new), axis=-2)[1]
        return by_token(self.out, read * states)

    def start(self, steps: int) -> State:
        """Returns the memory before the first token, h_0 = 0."""
        return jnp.zeros(self.project.in_features)

    def step(self, memory: State, x: Float[Array, " H"]) -> tuple[State, Float[Array, " H"]]:
        """Computes h_t, and what is read of it."""
        kept, new, read = self._gated(x)
        memory = kept * memory + new
        return memory, self.out(read * memory)


@dataclasses.dataclass(frozen=True)
class MinLSTMConfig(BlocksConfig):
    """Residual blocks of minLSTMs (Feng et al. 2024, arXiv:2410.01201)."""

    label = "minLSTM"
    mixer = MinLSTM
    outer_learning_rate: float = 1e-2
    """Peak learning rate of its outer loop, in the place of `--outer.learning-rate`."""
