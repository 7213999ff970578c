"""The LSTM as a recurrent cell of flax whose whole episodes are a kernel of our own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from metadyn.base import Domain
from metadyn.errors import check_positive
from metadyn.kernels.lstm import Backend, LSTMWeights, cell, check_backend, lstm
from metadyn.learners.networks import Recurrent

SATURATED = 0.05  # our choice: a gate this close to 0 or 1 has at most a fifth of its full slope
Carry = tuple[Float[Array, " H"], Float[Array, " H"]]


@dataclasses.dataclass(frozen=True)
class LSTMConfig:
    """Size and start of the LSTM: our choice, as the paper's width is not known to us."""

    label = "LSTM"
    hidden: int = 64
    """H, hidden units."""
    forget_bias: float = 1.0
    """Initial bias of the forget gate (Jozefowicz et al. 2015)."""
    vector_rate: float = 1.0
    """Learning rate of the biases and of the readout, over that of the two matrices, which is the
    outer loop's. (Yang et al. 2022, arXiv:2203.03466, set hidden matrices apart so, but count the
    weights of inputs with the biases.)"""
    backend: Backend = "auto"
    """Kernel of the whole-episode form: `metadyn.kernels.lstm.lstm` says which there are."""

    def __post_init__(self) -> None:
        check_positive(self, "hidden", "vector_rate")

    def make(self, domain: Domain, heads: int = 0) -> Recurrent:
        """Makes the meta-learner for a domain."""
        return Recurrent(domain, lambda n, rngs: LSTMCell(n, self, rngs=rngs), heads)


class LSTMCell(nnx.RNNCellBase):
    """The LSTM of Hochreiter & Schmidhuber (1997) with forget gates; its carry is (h, c)."""

    def __init__(self, n_in: int, config: LSTMConfig, *, rngs: nnx.Rngs):
        H = config.hidden
        check_backend(config.backend, H, n_in)
        scaled = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=0)
        orthogonal = nnx.initializers.orthogonal()
        self.input = nnx.Param(scaled(rngs.params(), (4 * H, n_in)))
        self.recurrent = nnx.Param(orthogonal(rngs.params(), (4 * H, H)))
        bias = jnp.zeros(4 * H).at[H : 2 * H].set(config.forget_bias)
        self.bias = nnx.Param(bias, rate=config.vector_rate)
        self.hidden, self.backend, self.readout_rate = H, config.backend, config.vector_rate

    @property
    def weights(self) -> LSTMWeights:
        """Returns the weights in the form that the kernels take."""
        return LSTMWeights(self.input[...], self.recurrent[...], self.bias[...])

    def initialize_carry(
        self, input_shape: tuple[int, ...], rngs: Any = None, carry_init: Any = None
    ) -> Carry:
        """Makes the carry before the first step, h_0 = c_0 = 0."""
        zeros = jnp.zeros((*input_shape[:-1], self.hidden))
        return zeros, zeros

    def __call__(self, carry: Carry, inputs: Float[Array, " n"]) -> tuple[Carry, Array]:
        """Takes one step of one episode."""
        h, c, _ = cell(self.weights, inputs, *carry)
        return (h, c), h

    def episodes(self, inputs: Float[Array, "T n B"]) -> Float[Array, "T H B"]:
        """Runs B whole episodes by the kernel of the chosen backend: hidden states h_1 … h_T."""
        return lstm(self.weights, inputs, self.backend)

    def diagnose(self, carry: Carry, x: Float[Array, " n"]) -> Mapping[str, Array]:
        """Measures the share of the gates i, f, o within 0.05 of 0 or 1."""
        gates = jnp.stack(cell(self.weights, x, *carry)[2][:3])
        return {"saturated_gates": jnp.mean(jnp.abs(gates - 0.5) > 0.5 - SATURATED)}
