"""The minLSTM: a linear recurrence that runs a whole episode as one associative scan."""

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
    """Mixer h_t = f'_t h_{t−1} + i'_t (W x_t + b), whose gates do not depend on h.

    f' = f / (f + i) and i' = i / (f + i), where f and i are sigmoid gates of x_t. Two things are
    added to Feng et al. First, the gates' biases start so that the units' memory spans are uniform
    from 2 to T steps ("chrono initialisation", Tallec & Ollivier 2018). Second, h_t is
    multiplied by the SiLU of a projection of x_t before the output layer, as in Mamba's blocks (Gu
    & Dao 2023): h_{t−1} does not depend on the query, and regression needs the product of the two.
    """

    def __init__(self, config: BlocksConfig, steps: int, *, rngs: nnx.Rngs):
        H = config.hidden

        def chrono_bias(key: Key, shape: tuple[int, ...], *_: Any) -> Array:
            spans = jax.random.uniform(key, (H,), minval=1.0, maxval=max(steps - 1.0, 2.0))
            return jnp.concatenate([jnp.log(spans), -jnp.log(spans), jnp.zeros(2 * H)])

        self.project = nnx.Linear(H, 4 * H, bias_init=chrono_bias, rngs=rngs)
        self.out = nnx.Linear(H, H, rngs=rngs)

    def _gated(self, x: Float[Array, "*T H"]) -> tuple[Array, Array, Array]:
        """Returns f', i' (W x + b), and the factor of the output."""
        f_logit, i_logit, candidate, z = jnp.split(by_token(self.project, x), 4, axis=-1)
        # f / (f + i), computed from logarithms because both gates can underflow to zero
        keep = jax.nn.sigmoid(jax.nn.log_sigmoid(f_logit) - jax.nn.log_sigmoid(i_logit))
        return keep, (1 - keep) * candidate, jax.nn.silu(z)

    def __call__(self, x: Float[Array, "*B T H"]) -> Float[Array, "*B T H"]:
        """Returns the outputs at all T steps, by composing the maps h → keep h + added."""
        keep, added, factor = self._gated(x)
        compose = lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1])
        states = jax.lax.associative_scan(compose, (keep, added), axis=-2)[1]
        return by_token(self.out, factor * states)

    def start(self, steps: int) -> State:
        """Returns the memory before the first token, h_0 = 0."""
        return jnp.zeros(self.project.in_features)

    def step(self, memory: State, x: Float[Array, " H"]) -> tuple[State, Float[Array, " H"]]:
        """Returns h_t and the output at step t."""
        keep, added, factor = self._gated(x)
        memory = keep * memory + added
        return memory, self.out(factor * memory)


@dataclasses.dataclass(frozen=True)
class MinLSTMConfig(BlocksConfig):
    """Options of residual blocks whose mixers are minLSTMs (Feng et al. 2024, arXiv:2410.01201)."""

    label = "minLSTM"
    mixer = MinLSTM
    outer_learning_rate: float = 1e-2
    """Peak learning rate of this network's outer loop, in place of `--outer.learning-rate`."""
