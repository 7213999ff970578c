"""The LSTM as a flax recurrent cell, which runs whole episodes by a kernel of our own."""

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

SATURATED = 0.05  # so close to 0 or 1 a gate has at most a fifth of its full slope: our choice
Carry = tuple[Float[Array, " H"], Float[Array, " H"]]


@dataclasses.dataclass(frozen=True)
class LSTMConfig:
    """Size and initialisation of the LSTM: our choice, as we do not know the paper's width."""

    label = "LSTM"
    hidden: int = 64
    """Number of hidden units, H."""
    forget_bias: float = 1.0
    """Initial bias of the forget gate (Jozefowicz et al. 2015)."""
    vector_rate: float = 1.0
    """Learning rate of the biases and the readout, relative to that of the two weight matrices,
    which is the outer loop's. (Yang et al. 2022, arXiv:2203.03466, also give hidden matrices a rate
    of their own, but count the input weights with the biases.)"""
    backend: Backend = "auto"
    """Kernel that runs whole episodes: `metadyn.kernels.lstm.lstm` lists the backends."""

    def __post_init__(self) -> None:
        check_positive(self, "hidden", "vector_rate")

    def make(self, domain: Domain, heads: int = 0) -> Recurrent:
        """Returns the meta-learner for a domain."""
        return Recurrent(domain, lambda n, rngs: LSTMCell(n, self, rngs=rngs), heads)


class LSTMCell(nnx.RNNCellBase):
    """The LSTM of Hochreiter & Schmidhuber (1997) with forget gates; its carry is (h, c)."""

    def __init__(self, n_in: int, config: LSTMConfig, *, rngs: nnx.Rngs):
        H = config.hidden
        check_backend(config.backend, H, n_in)
        normal = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=0)
        orthogonal = nnx.initializers.orthogonal()
        self.input = nnx.Param(normal(rngs.params(), (4 * H, n_in)))
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
        """Returns the carry before the first step, h_0 = c_0 = 0."""
        zeros = jnp.zeros((*input_shape[:-1], self.hidden))
        return zeros, zeros

    def __call__(self, carry: Carry, inputs: Float[Array, " n"]) -> tuple[Carry, Array]:
        """Runs one step of one episode: returns the carry (h, c) and the output h."""
        h, c, _ = cell(self.weights, inputs, *carry)
        return (h, c), h

    def episodes(self, inputs: Float[Array, "T n B"]) -> Float[Array, "T H B"]:
        """Returns the hidden states h_1 … h_T of B whole episodes, run by the chosen kernel."""
        return lstm(self.weights, inputs, self.backend)

    def diagnose(self, carry: Carry, x: Float[Array, " n"]) -> Mapping[str, Array]:
        """Returns the share of the gates i, f, o whose values lie within 0.05 of 0 or 1."""
        gates = jnp.stack(cell(self.weights, x, *carry)[2][:3])
        return {"saturated_gates": jnp.mean(jnp.abs(gates - 0.5) > 0.5 - SATURATED)}
