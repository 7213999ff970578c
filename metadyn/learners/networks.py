"""Meta-learners built from any flax NNX network: a recurrent cell or a causal sequence model.

At step t the network reads the query and the previous feedback, (x_t, y_{t−1}), and a linear
readout of its output is the answer (Hochreiter et al. 2001; Santoro et al. 2016). Its weights are
the outer parameters. Everything that it learns within an episode is held in its state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.flatten_util import ravel_pytree
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
from metadyn.errors import ConfigError, check, check_positive
from metadyn.kernels.lstm import multiply

Carry = Any  # the state of a recurrent cell or the cache of a sequence model


@runtime_checkable
class CausalModel(Protocol):
    """A sequence model for one episode, whose output at t depends only on the inputs up to t."""

    def __call__(self, inputs: Float[Array, "T n"], /) -> Float[Array, "T F"]:
        """Runs a whole episode and returns the outputs of all steps."""

    def start(self, steps: int, /) -> Carry:
        """Returns an empty cache with room for `steps` inputs."""

    def step(self, cache: Carry, x: Float[Array, " n"], /) -> tuple[Carry, Float[Array, " F"]]:
        """Reads x and returns the cache with x added, and the output."""


class _Cell(NamedTuple):
    """A recurrent cell as a `CausalModel`, whose cache is the carry."""

    cell: nnx.RNNCellBase
    n_in: int

    def __call__(self, inputs: Float[Array, "T n"]) -> Float[Array, "T F"]:
        return jax.lax.scan(self.step, self.start(len(inputs)), inputs)[1]

    def start(self, steps: int) -> Carry:
        return self.cell.initialize_carry((self.n_in,), nnx.Rngs(0))

    def step(self, cache: Carry, x: Float[Array, " n"]) -> tuple[Carry, Float[Array, " F"]]:
        return self.cell(cache, x)


class NetworkState(NamedTuple):
    """State of a network within an episode."""

    carry: Carry
    feedback: Float[Array, " m"]
    """The previous feedback y_{t−1}, encoded; zero at the first step."""
    diagnoses: Mapping[str, Array]
    """Diagnostics of the last update, by name; zero before the first update."""


class _Readout(nnx.Module):
    """A network and its linear readout, which starts at zero: it first answers the prior mean."""

    def __init__(self, body: nnx.Module, features: int, n_out: int):
        self.body = body
        rate = getattr(body, "readout_rate", 1.0)
        self.readout = nnx.Param(jnp.zeros((n_out, features)), rate=rate)
        self.offset = nnx.Param(jnp.zeros(n_out), rate=rate)

    def outputs(self, hidden: Float[Array, " F *B"]) -> Float[Array, " n_out *B"]:
        """Returns the answer, then the heads: the linear readout of the network's output."""
        return self._read(self.readout[...], hidden)

    def episodes(self, hidden: Float[Array, "T F B"]) -> Float[Array, "T n_out B"]:
        """Returns the answers, then the heads, at all steps of whole episodes."""
        readout = self.readout[...]
        if mesh.backend() == "cpu":
            return jax.vmap(self.outputs)(hidden)
        # One product per step: a single product over all steps would transpose the episodes first.
        readouts = jnp.broadcast_to(readout, (len(hidden), *readout.shape))
        return jax.vmap(self._read)(readouts, hidden)

    def _read(self, readout: Array, hidden: Array) -> Array:
        return multiply(readout, hidden) + self.offset[...].reshape(-1, *[1] * (hidden.ndim - 1))


class _NetworkMetaLearner:
    """Base class of `Recurrent` and `Sequence`: the `base.MetaLearner` of a network for a domain.

    `make(n_in, rngs)` builds the network for inputs of `n_in` numbers. A parameter that it creates
    as `nnx.Param(value, rate=r)` learns at r times the outer loop's rate, and the readout at the
    network's `readout_rate` times that rate, if the network has this attribute. `heads` is the
    number of outputs beyond the answer, which objectives use: one for the critic of
    `objectives.actor_critic`. Raises `ConfigError` if `heads` is negative or `domain` is no domain.
    """

    def __init__(self, domain: Domain, make: Callable[[int, nnx.Rngs], Any], heads: int = 0):
        check(heads >= 0, "heads", heads, "must be 0 or more")
        hint = "must be a domain, such as LinearRegression()"
        check(hasattr(domain, "sample_task"), "domain", domain, hint)
        self.domain, self.heads = domain, heads
        (n,), (self._m,) = encoded_shapes(domain)
        self._n_in, self._room = n + self._m, domain.steps + 1

        def build(rngs: nnx.Rngs) -> _Readout:
            model = self._model(body := make(self._n_in, rngs))
            step = lambda: model.step(model.start(self._room), jnp.zeros(self._n_in))[1]
            return _Readout(body, jax.eval_shape(step).shape[0], domain.answer_size + heads)

        self._build = build
        split: Any = nnx.split  # into graph, parameters, and other state such as random streams
        abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
        self._graph, variables, other_state = split(abstract, nnx.Param, ...)
        rate = lambda path, variable: variable.get_metadata().get("rate", 1.0)
        self._features = nnx.to_pure_dict(variables)["readout"].shape[1]
        self._body: type = type(abstract.body)
        self.rates: Params = nnx.to_pure_dict(nnx.map_state(rate, variables))
        """Learning rates over the outer loop's: the `rate` of each `nnx.Param`, 1 by default."""
        # Weights are drawn only if there is such state: for a large network drawing takes long.
        stateful = bool(jax.tree.leaves(other_state))
        self._rest = split(build(nnx.Rngs(0)), nnx.Param, ...)[2] if stateful else other_state

    def _model(self, body: Any) -> CausalModel:
        """Returns the network, as `make` builds it, in the form that runs episodes."""
        return body

    # The contract of `base.MetaLearner`.

    def check(self) -> None:
        """Raises `ConfigError` unless a user's network gives the same outputs at once and in steps.

        They may differ by 1 % of the largest (by 10 % if they are not float32) on a random episode,
        with noise on the first weights unless it makes the outputs infinite or NaN. Tests check
        metadyn's own networks, and a cell without `episodes` has nothing to compare.
        """
        ours = self._body.__module__.startswith("metadyn.")
        if ours or not (isinstance(self, Sequence) or hasattr(self._body, "episodes")):
            return

        @jax.jit
        def outputs(noise: Any) -> tuple[Float[Array, "T F"], Float[Array, "T F"]]:
            """Returns the outputs of an episode, run at once and in steps."""
            key_init, key_noise, key_inputs = jax.random.split(jax.random.key(0), 3)
            flat, unravel = ravel_pytree(self.init(key_init))
            body = self.network(
                unravel(flat + noise * jax.random.normal(key_noise, flat.shape))
            ).body
            model, shape = self._model(body), (self.domain.steps, self._n_in)
            inputs = jax.random.normal(key_inputs, shape)
            in_steps = jax.lax.scan(model.step, model.start(self._room), inputs)[1]
            return self._run_episodes(body)(inputs[..., None])[..., 0], in_steps

        for noise in (0.1, 0.0):
            with jax.default_matmul_precision("highest"):
                at_once, in_steps = outputs(noise)
            if bool(jnp.isfinite(in_steps).all()):
                break
        else:
            return  # training reports what is not finite
        error, largest = jnp.abs(at_once - in_steps).max(-1), float(jnp.abs(in_steps).max())
        wrong = ~(error <= (0.01 if in_steps.dtype == jnp.float32 else 0.1) * largest)
        if bool(wrong.any()):
            t = int(wrong.argmax())
            raise ConfigError(
                f"{self._body.__name__}: its output at t = {t} of a whole episode is "
                f"{error[t]:.2g} off that of `step` (the largest is {largest:.2g}): it must equal "
                "that, and so depend only on the inputs up to t"
            )

    def init(self, key: Key) -> Params:
        """Draws the outer parameters, as plain nested dictionaries of arrays."""
        return nnx.to_pure_dict(nnx.state(self._build(nnx.Rngs(key)), nnx.Param))

    def network(self, params: Params) -> _Readout:
        """Returns the network that has these parameters."""
        return nnx.merge(self._graph, nnx.State(params), self._rest)

    def learner(self, params: Params) -> Learner:
        """Returns the learner that runs this network through an episode, step by step."""
        network, domain = self.network(params), self.domain
        body, model = network.body, self._model(network.body)

        def network_input(state: NetworkState, query: Query) -> Array:
            return jnp.concatenate([domain.encode_query(query), state.feedback])

        def diagnose(carry: Carry, x: Array) -> dict[str, Array]:
            return dict(body.diagnose(carry, x)) if hasattr(body, "diagnose") else {}

        shapes = jax.eval_shape(lambda: diagnose(model.start(self._room), jnp.zeros(self._n_in)))

        def init(key: Key) -> NetworkState:
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            return NetworkState(model.start(self._room), jnp.zeros(self._m), zeros)

        def predict(state: NetworkState, query: Query) -> Answer:
            hidden = model.step(state.carry, network_input(state, query))[1]
            return network.outputs(hidden)[: domain.answer_size]

        def update(state: NetworkState, query: Query, feedback: Feedback) -> NetworkState:
            x = network_input(state, query)
            carry, _ = model.step(state.carry, x)
            return NetworkState(carry, domain.encode_feedback(feedback), diagnose(state.carry, x))

        last_diagnoses = (lambda state: state.diagnoses) if shapes else None
        return Learner(init, predict, update, diagnose=last_diagnoses)

    def unroll(
        self, params: Params, queries: Query, feedback: Feedback
    ) -> Float[Array, "T outputs B"]:
        """Runs whole episodes: gives the answers [T, answer_size, B], then the heads on axis 1."""
        network = self.network(params)
        x, y = encoded_episodes(self.domain, queries, feedback)
        previous_y = jnp.concatenate([jnp.zeros_like(y[:1]), y[:-1]])
        inputs = jnp.concatenate([x, previous_y], axis=1)
        return network.episodes(self._run_episodes(network.body)(inputs))

    def _run_episodes(self, body: Any) -> Callable[[Array], Array]:
        """Returns the function that runs B whole episodes, from [T, n, B] to [T, F, B]."""
        return getattr(body, "episodes", jax.vmap(self._model(body), -1, -1))


class Recurrent(_NetworkMetaLearner):
    """Meta-learner with any flax NNX recurrent cell: `Recurrent(domain, make_cell, heads=0)`.

    `make_cell(n_in, rngs)` returns an `nnx.RNNCellBase` for inputs of `n_in` numbers, such as
    `lambda n, rngs: nnx.GRUCell(n, 64, rngs=rngs)`. A cell may have two further methods.
    `episodes(inputs)`, from [T, n, B] to [T, F, B], runs B whole episodes at once. It replaces a
    scan of the cell and must give the same outputs. `diagnose(carry, x)` returns scalars about the
    step that reads x, keyed by name, which are recorded beside the probes.
    """

    def _model(self, body: Any) -> CausalModel:
        return _Cell(body, self._n_in)


class Sequence(_NetworkMetaLearner):
    """Meta-learner with any causal sequence model: `Sequence(domain, make_model, heads=0)`.

    `make_model(n_in, rngs)` returns an `nnx.Module` that is a `CausalModel` for inputs of `n_in`
    numbers, such as a transformer. It may have a method `episodes`, as the cells of `Recurrent`
    may. Training runs whole episodes through it. Probing steps it from a cache with room for T + 1
    inputs: those of the episode, and a probe's query after it.
    """

    @property
    def cached_episodes(self) -> int:
        """Number of episodes whose backward pass, 8 arrays [T, F] each, fits a CPU core's cache."""
        return max(mesh.CPU_CACHE_BYTES // (8 * 4 * self.domain.steps * self._features), 1)


@dataclasses.dataclass(frozen=True)
class GRUConfig:
    """Size of the gated recurrent unit (Cho et al. 2014), in flax's implementation."""

    label = "GRU"
    hidden: int = 64
    """Number of hidden units, H."""

    def __post_init__(self) -> None:
        check_positive(self, "hidden")

    def make(self, domain: Domain, heads: int = 0) -> Recurrent:
        """Returns the meta-learner for a domain."""
        return Recurrent(domain, lambda n, rngs: nnx.GRUCell(n, self.hidden, rngs=rngs), heads)
