"""A linear recurrence, whose whole episode is one associative scan: the minLSTM."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from metadyn.base import Domain
from metadyn.learners.blocks import BlocksConfig

State = Float[Array, " H"]


@dataclasses.dataclass(frozen=True)
class MinLSTMConfig(BlocksConfig):
    """Residual blocks of minLSTMs (Feng et al. 2024, arXiv:2410.01201)."""

    label = "minLSTM"

    def mixer(self, domain: Domain, rngs: nnx.Rngs) -> MinLSTM:
        """A minLSTM."""
        return MinLSTM(self, domain.steps, rngs=rngs)


class MinLSTM(nnx.Module):
    """h_t = f'_t h_{t−1} + i'_t (W x_t + b), whose gates do not depend on h.

    f' = f / (f + i) and i' = i / (f + i), with f and i sigmoid gates of x_t. Forget gates start so
    that the units remember for up to the T steps of an episode, all lengths alike ("chrono
    initialisation", Tallec & Ollivier 2018).
    """

    def __init__(self, config: MinLSTMConfig, steps: int, *, rngs: nnx.Rngs):
        H = config.hidden
        self.project = nnx.Linear(H, 3 * H, rngs=rngs)
        self.out = nnx.Linear(H, H, rngs=rngs)
        spans = jax.random.uniform(rngs.params(), (H,), minval=1.0, maxval=max(steps - 1.0, 2.0))
        bias = jnp.log(spans)
        self.project.bias[...] = jnp.concatenate([bias, -bias, jnp.zeros(H)])

    def _gated(self, x: Float[Array, "*T H"]) -> tuple[Array, Array]:
        forget, take, new = jnp.split(self.project(x), 3, axis=-1)
        # f / (f + i) of two sigmoids, from their logarithms: they can both vanish
        kept = jax.nn.sigmoid(jax.nn.log_sigmoid(forget) - jax.nn.log_sigmoid(take))
        return kept, (1 - kept) * new

    def __call__(self, x: Float[Array, "T H"]) -> Float[Array, "T H"]:
        """h_1 … h_T of a whole episode, through the output weights."""
        then = lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1])  # h → a₀h + a₁, then h → b₀h + b₁
        return self.out(jax.lax.associative_scan(then, self._gated(x))[1])

    def start(self, steps: int) -> State:
        """h_0 = 0."""
        return jnp.zeros(self.project.in_features)

    def step(self, memory: State, x: Float[Array, " H"]) -> tuple[State, Float[Array, " H"]]:
        """h_t, and what is read of it."""
        kept, new = self._gated(x)
        memory = kept * memory + new
        return memory, self.out(memory)
