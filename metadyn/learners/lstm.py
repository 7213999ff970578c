"""The LSTM meta-learner (Hochreiter et al. 2001; Santoro et al. 2016; Rabinowitz 2019).

It reads the query and the last feedback, (x_t, y_{t−1}), and answers. Its weights are outer
parameters; all that it learns within an episode stands in its hidden state.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from metadyn.base import (
    Answer,
    Domain,
    Feedback,
    Key,
    Learner,
    Params,
    Query,
    check,
    check_positive,
)
from metadyn.kernels.lstm import Backend, Gates, LSTMWeights, apply, cell, lstm

SATURATED = 0.05  # our choice: a gate this close to 0 or 1 has at most a fifth of its full slope


@dataclasses.dataclass(frozen=True)
class LSTMConfig:
    """The network. The paper's width is not known to us: the values here are our choice."""

    hidden: int = 64
    """H, hidden units."""
    forget_bias: float = 1.0
    """Initial bias of the forget gate (Jozefowicz et al. 2015)."""
    backend: Backend = "auto"
    """Kernel of the whole-episode form."""

    def __post_init__(self) -> None:
        check_positive(self, "hidden")
        fits = self.hidden >= 16 and self.hidden.bit_count() == 1
        fix = "must be a power of two, 16 or more, with backend = 'pallas'"
        check(self.backend != "pallas" or fits, "hidden", self.hidden, fix)


class LSTMNetwork(nnx.Module):
    """LSTM with a linear readout, initially zero so that training starts from the prior mean."""

    def __init__(self, n_in: int, n_out: int, config: LSTMConfig, *, rngs: nnx.Rngs):
        H = config.hidden
        scaled = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=0)
        orthogonal = nnx.initializers.orthogonal()
        self.input = nnx.Param(scaled(rngs.params(), (4 * H, n_in)))
        self.recurrent = nnx.Param(orthogonal(rngs.params(), (4 * H, H)))
        self.bias = nnx.Param(jnp.zeros(4 * H).at[H : 2 * H].set(config.forget_bias))
        self.readout = nnx.Param(jnp.zeros((n_out, H)))
        self.offset = nnx.Param(jnp.zeros(n_out))
        self.backend = config.backend

    @property
    def weights(self) -> LSTMWeights:
        """The recurrent part, as the kernels take it."""
        return LSTMWeights(self.input[...], self.recurrent[...], self.bias[...])

    def answer(self, h: Float[Array, " H *B"]) -> Float[Array, " n_out *B"]:
        """The readout of hidden states."""
        return apply(self.readout[...], h) + self.offset[...].reshape(-1, *[1] * (h.ndim - 1))


class LSTMState(NamedTuple):
    """What the LSTM knows within an episode."""

    h: Float[Array, " H"]
    c: Float[Array, " H"]
    feedback: Float[Array, " m"]
    """y_{t−1}, encoded; zero before the first."""
    saturated: Float[Array, ""]
    """Share of the gates i, f, o that the last update left saturated."""


class LSTMMetaLearner:
    """The `base.MetaLearner` of LSTMs for one domain.

    With `critic` it has one output more than an answer needs: a value head (`outputs`).
    """

    def __init__(self, domain: Domain, config: LSTMConfig, critic: bool = False):
        self.domain = domain
        n_out = domain.answer_size + critic
        task = jax.eval_shape(domain.sample_task, jax.random.key(0))
        query = jax.eval_shape(domain.query, task, jax.random.key(0))
        answer = jax.ShapeDtypeStruct((domain.answer_size,), jnp.float32)
        feedback = jax.eval_shape(domain.feedback, task, query, answer, jax.random.key(0))
        (n,) = jax.eval_shape(domain.encode_query, query).shape
        (self._m,) = jax.eval_shape(domain.encode_feedback, feedback).shape
        self._build = lambda rngs: LSTMNetwork(n + self._m, n_out, config, rngs=rngs)
        self._graph = nnx.graphdef(nnx.eval_shape(lambda: self._build(nnx.Rngs(0))))
        self._hidden = config.hidden

    def init(self, key: Key) -> Params:
        """Outer parameters as a plain dictionary of arrays."""
        return nnx.to_pure_dict(nnx.state(self._build(nnx.Rngs(params=key)), nnx.Param))

    def _network(self, params: Params) -> LSTMNetwork:
        return nnx.merge(self._graph, nnx.State(params))

    def learner(self, params: Params) -> Learner:
        """The step-by-step form."""
        network = self._network(params)

        def init(key: Key) -> LSTMState:
            del key
            zeros = jnp.zeros(self._hidden)
            return LSTMState(zeros, zeros, jnp.zeros(self._m), jnp.zeros(()))

        def advance(state: LSTMState, query: Query) -> tuple[Array, Array, Gates]:
            x = jnp.concatenate([self.domain.encode_query(query), state.feedback])
            return cell(network.weights, x, state.h, state.c)

        def predict(state: LSTMState, query: Query) -> Answer:
            return network.answer(advance(state, query)[0])[: self.domain.answer_size]

        def update(state: LSTMState, query: Query, feedback: Feedback) -> LSTMState:
            h, c, gates = advance(state, query)
            sigmoids = jnp.stack(gates[:3])
            saturated = jnp.mean(jnp.abs(sigmoids - 0.5) > 0.5 - SATURATED)
            encoded = self.domain.encode_feedback(feedback)
            return LSTMState(h, c, encoded, saturated)

        return Learner(
            init, predict, update, diagnose=lambda state: {"saturated_gates": state.saturated}
        )

    def unroll(self, params: Params, queries: Query, feedback: Feedback) -> Answer:
        """The whole-episode form. Leaves [T, ..., B] in, answers [T, answer_size, B] out."""
        return self.outputs(params, queries, feedback)[:, : self.domain.answer_size]

    def outputs(
        self, params: Params, queries: Query, feedback: Feedback
    ) -> Float[Array, "T n_out B"]:
        """Answers over whole episodes, and below them the values of the critic if there is one."""
        network = self._network(params)
        over_batch_and_time = lambda f: jax.vmap(jax.vmap(f, -1, -1))  # noqa: E731
        x = over_batch_and_time(self.domain.encode_query)(queries)
        y = over_batch_and_time(self.domain.encode_feedback)(feedback)
        y_before = jnp.concatenate([jnp.zeros_like(y[:1]), y[:-1]])
        inputs = jnp.concatenate([x, y_before], axis=1)
        return jax.vmap(network.answer)(lstm(network.weights, inputs, network.backend))
