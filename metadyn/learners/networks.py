"""Meta-learners made of any flax NNX network: a recurrent cell, or a causal model of sequences.

The network reads the query and the last feedback, (x_t, y_{t−1}), and a linear readout of what it
gives is the answer (Hochreiter et al. 2001; Santoro et al. 2016). Its weights are outer parameters;
all that it learns within an episode stands in its state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from metadyn import mesh
from metadyn.base import (
    Answer,
    Domain,
    Feedback,
    Key,
    Learner,
    Params,
    Query,
    encoded_episodes,
    encoded_shapes,
)
from metadyn.errors import check, check_positive
from metadyn.kernels.lstm import apply

Carry = Any  # the state of a recurrent cell, the cache of a sequence model


@runtime_checkable
class CausalModel(Protocol):
    """A model of sequences for one episode, whose output at t depends on inputs up to t alone."""

    def __call__(self, inputs: Float[Array, "T n"], /) -> Float[Array, "T F"]:
        """Runs a whole episode, and returns all outputs."""

    def start(self, steps: int, /) -> Carry:
        """Makes an empty cache with room for `steps` inputs."""

    def step(self, cache: Carry, x: Float[Array, " n"], /) -> tuple[Carry, Float[Array, " F"]]:
        """Reads x: returns the cache with x in it, and the output."""


class NetworkState(NamedTuple):
    """What a network knows within an episode."""

    carry: Carry
    feedback: Float[Array, " m"]
    """y_{t−1}, encoded; zero before the first."""
    diagnoses: Mapping[str, Array]
    """What the last update said of itself; zeros before the first."""


class _Readout(nnx.Module):
    """A network and a linear readout of it, which is zero at first: the prior mean is answered."""

    def __init__(self, body: nnx.Module, features: int, n_out: int):
        self.body = body
        rate = getattr(body, "readout_rate", 1.0)
        self.readout = nnx.Param(jnp.zeros((n_out, features)), rate=rate)
        self.offset = nnx.Param(jnp.zeros(n_out), rate=rate)

    def outputs(self, hidden: Float[Array, " F *B"]) -> Float[Array, " n_out *B"]:
        """Reads the answer and the heads out of what the network gives."""
        return self._read(self.readout[...], hidden)

    def episodes(self, hidden: Float[Array, "T F B"]) -> Float[Array, "T n_out B"]:
        """Reads them out of whole episodes."""
        readout = self.readout[...]
        if mesh.backend() == "cpu":
            return jax.vmap(self.outputs)(hidden)
        # A product for each step: one product of all would transpose the episodes for it.
        each = jnp.broadcast_to(readout, (len(hidden), *readout.shape))
        return jax.vmap(self._read)(each, hidden)

    def _read(self, readout: Array, hidden: Array) -> Array:
        return apply(readout, hidden) + self.offset[...].reshape(-1, *[1] * (hidden.ndim - 1))


class _NetworkMetaLearner:
    """What `Recurrent` and `Sequence` share: the `base.MetaLearner` of networks for one domain.

    `make(n_in, rngs)` makes the network, for inputs of `n_in` numbers. Parameters that it makes as
    `nnx.Param(value, rate=r)` learn at r times the outer loop's rate; the readout does so if the
    network has a `readout_rate`. `heads` outputs more than an answer needs are there for
    objectives: one for the critic of `objectives.actor_critic`. Raises `ConfigError` for fewer than
    none.
    """

    def __init__(self, domain: Domain, make: Callable[[int, nnx.Rngs], Any], heads: int = 0):
        check(heads >= 0, "heads", heads, "must be 0 or more")
        fix = "must be a domain, such as LinearRegression()"
        check(hasattr(domain, "sample_task"), "domain", domain, fix)
        self.domain, self.heads = domain, heads
        (n,), (self._m,) = encoded_shapes(domain)
        self._n_in = n + self._m

        def build(rngs: nnx.Rngs) -> _Readout:
            body = make(self._n_in, rngs)
            step = lambda: self._step(body, self._start(body), jnp.zeros(self._n_in))[1]
            self._features = features = jax.eval_shape(step).shape[0]
            return _Readout(body, features, domain.answer_size + heads)

        self._build = build
        split: Any = nnx.split  # into its graph, its parameters, and state such as random streams
        abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
        self._graph, variables, rest = split(abstract, nnx.Param, ...)
        rate = lambda path, variable: variable.get_metadata().get("rate", 1.0)
        self.rates: Params = nnx.to_pure_dict(nnx.map_state(rate, variables))
        """Learning rates over the outer loop's: 1 but where a `nnx.Param` was made with `rate`."""
        # Only where there is such state are numbers drawn, which for a large network takes long.
        stateful = bool(jax.tree.leaves(rest))
        self._rest = split(build(nnx.Rngs(0)), nnx.Param, ...)[2] if stateful else rest

    # What subclasses say of a network.

    def _start(self, body: Any) -> Carry:
        raise NotImplementedError

    def _step(self, body: Any, carry: Carry, x: Array) -> tuple[Carry, Array]:
        raise NotImplementedError

    def _episode(self, body: Any, inputs: Float[Array, "T n"]) -> Float[Array, "T F"]:
        raise NotImplementedError

    # The contract of `base.MetaLearner`.

    def init(self, key: Key) -> Params:
        """Draws outer parameters, as plain dictionaries of arrays."""
        return nnx.to_pure_dict(nnx.state(self._build(nnx.Rngs(key)), nnx.Param))

    def network(self, params: Params) -> _Readout:
        """Returns the network that these parameters are of."""
        return nnx.merge(self._graph, nnx.State(params), self._rest)

    def learner(self, params: Params) -> Learner:
        """Makes the learner that steps this network through an episode."""
        network, domain = self.network(params), self.domain
        body = network.body

        def read(state: NetworkState, query: Query) -> Array:
            return jnp.concatenate([domain.encode_query(query), state.feedback])

        def said(carry: Carry, x: Array) -> dict[str, Array]:
            return dict(body.diagnose(carry, x)) if hasattr(body, "diagnose") else {}

        diagnoses = jax.eval_shape(lambda: said(self._start(body), jnp.zeros(self._n_in)))

        def init(key: Key) -> NetworkState:
            nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), diagnoses)
            return NetworkState(self._start(body), jnp.zeros(self._m), nothing)

        def predict(state: NetworkState, query: Query) -> Answer:
            hidden = self._step(body, state.carry, read(state, query))[1]
            return network.outputs(hidden)[: domain.answer_size]

        def update(state: NetworkState, query: Query, feedback: Feedback) -> NetworkState:
            x = read(state, query)
            carry, _ = self._step(body, state.carry, x)
            return NetworkState(carry, domain.encode_feedback(feedback), said(state.carry, x))

        diagnose = (lambda state: state.diagnoses) if diagnoses else None
        return Learner(init, predict, update, diagnose=diagnose)

    def unroll(
        self, params: Params, queries: Query, feedback: Feedback
    ) -> Float[Array, "T outputs B"]:
        """Runs whole episodes: the answers [T, answer_size, B], and below them the heads."""
        network = self.network(params)
        one_by_one = jax.vmap(partial(self._episode, network.body), -1, -1)
        whole = getattr(network.body, "episodes", one_by_one)
        x, y = encoded_episodes(self.domain, queries, feedback)
        y_before = jnp.concatenate([jnp.zeros_like(y[:1]), y[:-1]])
        inputs = jnp.concatenate([x, y_before], axis=1)
        return network.episodes(whole(inputs))


class Recurrent(_NetworkMetaLearner):
    """Meta-learners with any flax NNX recurrent cell: `Recurrent(domain, make_cell, heads=0)`.

    `make_cell(n_in, rngs)` returns an `nnx.RNNCellBase` for inputs of `n_in` numbers, such as
    `lambda n, rngs: nnx.GRUCell(n, 64, rngs=rngs)`. A cell may have two methods more.
    `episodes(inputs)`, from [T, n, B] to [T, F, B], runs B whole episodes at once, in place of a
    scan of the cell, with the outputs that stepping it gives. `diagnose(carry, x)` names scalars
    about the step that reads x, which are recorded beside the probes.
    """

    def _start(self, body: Any) -> Carry:
        return body.initialize_carry((self._n_in,), nnx.Rngs(0))

    def _step(self, body: Any, carry: Carry, x: Array) -> tuple[Carry, Array]:
        return body(carry, x)

    def _episode(self, body: Any, inputs: Float[Array, "T n"]) -> Float[Array, "T F"]:
        return jax.lax.scan(partial(self._step, body), self._start(body), inputs)[1]


class Sequence(_NetworkMetaLearner):
    """Meta-learners with any causal model of sequences: `Sequence(domain, make_model, heads=0)`.

    `make_model(n_in, rngs)` returns an `nnx.Module` that is a `CausalModel` of inputs of `n_in`
    numbers, such as a transformer, and may have a method `episodes`, as cells of `Recurrent` may.
    Training runs whole episodes through it; probing steps it from a cache, which has room for T + 1
    inputs: those of the episode, and a probe's query after it.
    """

    @property
    def cached_episodes(self) -> int:
        """Counts the episodes whose backward pass fits a CPU core's cache: eight arrays each."""
        return max(mesh.CACHE // (8 * 4 * self.domain.steps * self._features), 1)

    def _start(self, body: Any) -> Carry:
        return body.start(self.domain.steps + 1)

    def _step(self, body: Any, carry: Carry, x: Array) -> tuple[Carry, Array]:
        return body.step(carry, x)

    def _episode(self, body: Any, inputs: Float[Array, "T n"]) -> Float[Array, "T F"]:
        return body(inputs)


@dataclasses.dataclass(frozen=True)
class GRUConfig:
    """A gated recurrent unit (Cho et al. 2014), as flax has it."""

    label = "GRU"
    hidden: int = 64
    """H, hidden units."""

    def __post_init__(self) -> None:
        check_positive(self, "hidden")

    def make(self, domain: Domain, heads: int = 0) -> Recurrent:
        """Makes the meta-learner for a domain."""
        return Recurrent(domain, lambda n, rngs: nnx.GRUCell(n, self.hidden, rngs=rngs), heads)
