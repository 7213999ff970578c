"""Ordinary learners: networks that an optax optimiser trains on the feedback they get."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Real

from metadyn import inner, prng
from metadyn.base import Answer, Feedback, Key, Learner, Query
from metadyn.domains.bandit import Outcome
from metadyn.errors import check, check_positive
from metadyn.kernels import products
from metadyn.optimizers import named_optimizer

Weights = Any


@dataclasses.dataclass(frozen=True)
class DescentConfig:
    """Settings for training an ordinary learner. The paper's are unknown to us: ours are a choice.

    Studies set other defaults, and add settings of their own networks.
    """

    optimizer: str = "sgd"
    """Name of an optimiser in optax; or momentum, which is sgd with a momentum of 0.9."""
    learning_rate: float = 0.05
    """Learning rate of the optimiser, for the loss ½‖y − ŷ‖²."""
    batch: int = 20
    """Number of pairs per update."""
    updates: int = 0
    """Number of optimiser updates. 0, for the linear network: until its least mode reaches 0.9."""
    records: int = 100
    """Number of log-spaced updates at which the probe runs."""

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "batch", "records")
        most, updates = inner.MAX_TIMES, self.updates
        check(self.records <= most, "records", self.records, f"must be at most {most:,}")
        check(0 <= updates < 2**31, "updates", updates, f"must be from 0 to below {2**31}")
        named_optimizer(self.optimizer, self.learning_rate)


@dataclasses.dataclass(frozen=True)
class NetworkDescentConfig(DescentConfig):
    """Settings for training an ordinary learner, and the size of its network."""

    depth: int = 2
    """Layers of the linear network; hidden layers of the MLP."""
    width: int = 32
    """Units of each hidden layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "depth", "width")


class Network(NamedTuple):
    """A network as a pair of functions: one draws its weights, the other answers one query."""

    init: Callable[[Key], Weights]
    apply: Callable[[Weights, Query], Answer]


@functools.cache
def deep_linear(
    n_x: int, n_y: int, depth: int = 2, width: int = 32, scale: float = 1e-2
) -> Network:
    """Makes a linear network, W_depth … W_2 W_1 x, with N(0, scale²) entries (Saxe et al. 2013)."""
    check(scale > 0, "scale", scale, "must be positive")
    shapes = _shapes(n_x, n_y, depth, width)

    def init(key: Key) -> list[Array]:
        keys = jax.random.split(key, depth)
        return [scale * prng.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]

    return Network(init, _product)


@functools.cache
def balanced_deep_linear(n_x: int, n_y: int, width: int = 32, strength: float = 1e-3) -> Network:
    """Makes a two-layer linear network at the balanced, aligned start of Saxe's closed form.

    Both layers are multiples of the identity, and their product has `strength` a₀ on its diagonal.
    So W_{l+1}ᵀ W_{l+1} = W_l W_lᵀ, and the modes of a task whose singular vectors are the
    coordinate axes never mix. Weights of inputs or outputs that have no mode start at 0.
    """
    check(strength > 0, "strength", strength, "must be positive")
    shapes, modes = _shapes(n_x, n_y, 2, width), min(n_x, n_y)
    check(width >= modes, "width", width, f"must be at least {modes}: each mode needs a unit")
    diagonal = jnp.diag(jnp.where(jnp.arange(width) < modes, strength**0.5, 0.0))
    return Network(lambda key: [diagonal[:n, :m] for n, m in shapes], _product)


def _shapes(n_x: int, n_y: int, depth: int, width: int) -> list[tuple[int, int]]:
    """Returns the shape (rows, columns) of each layer's weight matrix."""
    check(depth >= 1, "depth", depth, "must be at least 1")
    check(width >= 1, "width", width, "must be at least 1")
    sizes = [n_x, *[width] * (depth - 1), n_y]
    return list(zip(sizes[1:], sizes[:-1], strict=True))


@functools.cache
def mlp(n_x: int, n_y: int, depth: int = 6, width: int = 256) -> Network:
    """Makes a ReLU multilayer perceptron with `depth` hidden layers.

    Weights and biases start uniform on ±1/√fan-in, PyTorch's default, as in Rahaman et al. (2018).
    """
    shapes = _shapes(n_x, n_y, depth + 1, width)

    def init_layer(key: Key, shape: tuple[int, int]) -> Layer:
        rows, columns = shape
        entries = jax.random.uniform(key, (rows, columns + 1), minval=-1.0) / columns**0.5
        return Layer(entries[:, :-1], entries[:, -1])

    def init(key: Key) -> list[Layer]:
        return [*map(init_layer, jax.random.split(key, depth + 1), shapes)]

    def apply(weights: list[Layer], x: Float[Array, " n_x"]) -> Float[Array, " n_y"]:
        *hidden, last = weights
        for W, b in hidden:
            x = jax.nn.relu(products.matvec(W, x) + b)
        return products.matvec(last.weight, x) + last.bias

    return Network(init, apply)


class Layer(NamedTuple):
    """Weights of one layer of an MLP, x ↦ W x + b."""

    weight: Float[Array, "rows columns"]
    bias: Float[Array, " rows"]


def _product(weights: list[Array], x: Float[Array, " n_x"]) -> Float[Array, " n_y"]:
    # The layers' product comes first, from the output's side: fewer operations if n_y < batch.
    return products.matvec(reduce(products.times, reversed(weights)), x)


def half_squared_error(answer: Array, feedback: Array) -> Array:
    """Computes ½ ‖answer − feedback‖²; its unit of time is 1 / learning rate (Saxe et al.)."""
    return 0.5 * jnp.sum((answer - feedback) ** 2)


@functools.cache
def gradient(
    network: Network,
    optimizer: optax.GradientTransformation,
    batch: int,
    loss: Callable[[Answer, Feedback], Array] = half_squared_error,
    points: int | None = None,
) -> Learner:
    """Makes a learner whose network takes one optimiser step on the mean loss over each minibatch.

    Minibatches are fresh, or drawn from a fixed dataset of `points` pairs. If `points` equals
    `batch`, every update uses all of them (full batch). The state is (weights, optimiser state) and
    the time t counts optimiser updates. Raises `ConfigError` if `points` is below `batch`.
    """
    check(batch >= 1, "batch", batch, "must be at least 1")
    hint = f"must be no fewer than the batch of {batch}"
    check(points is None or points >= batch, "points", points, hint)

    def objective(weights: Weights, query: Query, feedback: Feedback) -> Array:
        answers = jax.vmap(network.apply, (None, 0))(weights, query)
        return jnp.mean(jax.vmap(loss)(answers, feedback))

    return _learner(network, optimizer, objective)._replace(batch=batch, points=points)


def _learner(network, optimizer, objective) -> Learner:
    """Makes a learner that takes one optimiser step down objective(weights, query, feedback)."""

    def init(key: Key):
        weights = network.init(key)
        return weights, optimizer.init(weights)

    def update(state, query: Query, feedback: Feedback):
        weights, optimizer_state = state
        grads = jax.grad(objective)(weights, query, feedback)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, weights)
        return optax.apply_updates(weights, updates), optimizer_state

    predict = lambda state, query: network.apply(state[0], query)
    return Learner(init, predict, update, clock="updates")


@functools.cache
def softmax_policy(
    contexts: int, actions: int, coupled: bool = True, scale: float = 1.0
) -> Network:
    """Makes a policy with logits W onehot(c) + b and N(0, scale²) entries (Schaul et al. 2019).

    The shared bias b couples the contexts: learning in one context changes the policy in all.
    Without it (`coupled` is False) they are decoupled.
    """
    check(scale >= 0, "scale", scale, "must be 0 or more")

    def init(key: Key) -> Policy:
        entries = scale * prng.normal(key, (actions, contexts + 1))
        return Policy(entries[:, :contexts], entries[:, contexts] if coupled else None)

    def apply(weights: Policy, c: Int[Array, ""]) -> Float[Array, " n"]:
        logits = weights.W[:, c]
        return logits if weights.b is None else logits + weights.b

    return Network(init, apply)


class Policy(NamedTuple):
    """Weights of a policy with logits W onehot(c) + b; b is None for decoupled contexts."""

    W: Float[Array, "n K"]
    b: Float[Array, " n"] | None


@functools.cache
def expected_policy_gradient(network: Network, optimizer: optax.GradientTransformation) -> Learner:
    """Makes a learner that ascends the gradient of expected reward over all contexts and actions.

    It knows what every action pays (`Outcome.pay`), so nothing is sampled: its gradient is the
    exact mean of those of `reinforce`. The time t counts updates.
    """

    def objective(weights: Weights, query: Query, feedback: Outcome) -> Array:
        logits = jax.vmap(network.apply, (None, 0))(weights, jnp.arange(len(feedback.pay)))
        return -jnp.mean(jnp.sum(jax.nn.softmax(logits) * feedback.pay, axis=1))

    return _learner(network, optimizer, objective)


@functools.cache
def reinforce(network: Network, optimizer: optax.GradientTransformation, batch: int) -> Learner:
    """Makes a REINFORCE learner (Williams 1992), with `batch` choices of its own policy per update.

    It descends the gradient of −(r − r̄) log π(a | c), where r̄ is the running mean of past rewards.
    r̄ starts at 0, and each update moves it by 0.01 of the way to the mean of the batch's rewards.
    The time t counts updates.
    """
    check(batch >= 1, "batch", batch, "must be at least 1")

    def objective(weights: Weights, query: Query, choices: tuple[Array, Array]) -> Array:
        action, advantage = choices
        logits = jax.vmap(network.apply, (None, 0))(weights, query)
        chosen_logits = jnp.take_along_axis(logits, action[:, None], 1)[:, 0]
        return -jnp.mean(advantage * (chosen_logits - jax.nn.logsumexp(logits, axis=1)))

    learner = _learner(network, optimizer, objective)

    def update(state, query: Query, feedback: Outcome):
        *learner_state, mean_reward = state
        choices = feedback.action, feedback.reward - mean_reward
        mean_reward = 0.99 * mean_reward + 0.01 * jnp.mean(feedback.reward)
        return *learner.update(learner_state, query, choices), mean_reward

    init = lambda key: (*learner.init(key), jnp.zeros(()))
    return Learner(init, learner.predict, update, batch=batch, clock="updates")


def saxe_strength(
    t: Real[np.ndarray, " time"], s: Real[np.ndarray, " mode"], start: float, learning_rate: float
) -> Float[np.ndarray, "time mode"]:
    """Returns mode strengths a(t) / s by Saxe's closed form for two-layer linear networks, float64.

    a(t) = s e^{2st/τ} / (e^{2st/τ} − 1 + s/a₀) with τ = 1 / learning rate, a₀ = `start`, t in
    updates (Saxe et al. 2013, arXiv:1312.6120). For N(0, scale²) weights of width n, the growing
    part of mode k, ½ (W₁ v_k + W₂ᵀ u_k), has expected squared norm ½ n scale²: use that as a₀.
    """
    t, s = np.asarray(t, np.float64)[:, None], np.asarray(s, np.float64)[None, :]
    decay = np.exp(-2 * s * t * learning_rate)  # not its reciprocal, which could overflow
    return 1 / (1 + decay * (s / start - 1))


def random_start(width: int, scale: float) -> float:
    """Returns the a₀ to use in `saxe_strength` for N(0, scale²) weights: ½ width scale²."""
    return 0.5 * width * scale**2


def updates_to_learn(s: float, start: float, learning_rate: float, strength: float = 0.5) -> int:
    """Returns the updates until Saxe's closed form reaches a(t) = strength · s, rounded up."""
    odds = strength / (1 - strength) * max(s / start - 1, 1.0)
    return math.ceil(math.log(odds) / (2 * s * learning_rate))
