"""Ordinary learners: a network trained by an optax optimiser on the feedback it gets."""

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
    """How an ordinary learner descends. The paper's values are not known to us: ours are a choice.

    Studies set defaults, and add what only their network has.
    """

    optimizer: str = "sgd"
    """An optimiser of optax, by name; or momentum, sgd with a momentum of 0.9."""
    learning_rate: float = 0.05
    """Its learning rate, for the loss ½‖y − ŷ‖²."""
    batch: int = 20
    """Pairs per update."""
    updates: int = 0
    """Optimiser updates. 0, for the linear network: until its least mode is at 0.9."""
    records: int = 100
    """Log-spaced updates at which the probe runs."""

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "batch", "records")
        most, updates = inner.MOST_TIMES, self.updates
        check(self.records <= most, "records", self.records, f"must be at most {most:,}")
        check(0 <= updates < 2**31, "updates", updates, f"must be from 0 to below {2**31}")
        named_optimizer(self.optimizer, self.learning_rate)


@dataclasses.dataclass(frozen=True)
class NetworkDescentConfig(DescentConfig):
    """How an ordinary learner descends, and the size of its network."""

    depth: int = 2
    """Layers of the linear network; hidden layers of the MLP."""
    width: int = 32
    """Units of each hidden layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "depth", "width")


class Network(NamedTuple):
    """A function of weights, for one query at a time."""

    init: Callable[[Key], Weights]
    apply: Callable[[Weights, Query], Answer]


@functools.cache
def deep_linear(
    n_x: int, n_y: int, depth: int = 2, width: int = 32, scale: float = 1e-2
) -> Network:
    """Makes ŷ = W_depth … W_2 W_1 x with N(0, scale²) entries (Saxe et al. 2013)."""
    check(scale > 0, "scale", scale, "must be positive")
    shapes = _shapes(n_x, n_y, depth, width)

    def init(key: Key) -> list[Array]:
        keys = jax.random.split(key, depth)
        return [scale * prng.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]

    return Network(init, _product)


@functools.cache
def balanced_deep_linear(n_x: int, n_y: int, width: int = 32, strength: float = 1e-3) -> Network:
    """Makes a two-layer linear network at the balanced, aligned start of Saxe's closed form.

    Both layers are multiples of the identity and their product has `strength` a₀ on its diagonal,
    so that W_{l+1}ᵀ W_{l+1} = W_l W_lᵀ and the modes of a task whose singular vectors are the
    coordinate axes never mix. Inputs or outputs that have no mode start at 0.
    """
    check(strength > 0, "strength", strength, "must be positive")
    shapes, least = _shapes(n_x, n_y, 2, width), min(n_x, n_y)
    check(width >= least, "width", width, f"must be at least {least}: each mode needs a unit")
    diagonal = jnp.diag(jnp.where(jnp.arange(width) < least, strength**0.5, 0.0))
    return Network(lambda key: [diagonal[:n, :m] for n, m in shapes], _product)


def _shapes(n_x: int, n_y: int, depth: int, width: int) -> list[tuple[int, int]]:
    """(rows, columns) of each layer of weights."""
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

    def layer(key: Key, shape: tuple[int, int]) -> Layer:
        rows, columns = shape
        drawn = jax.random.uniform(key, (rows, columns + 1), minval=-1.0) / columns**0.5
        return Layer(drawn[:, :-1], drawn[:, -1])

    def init(key: Key) -> list[Layer]:
        return [*map(layer, jax.random.split(key, depth + 1), shapes)]

    def apply(weights: list[Layer], x: Float[Array, " n_x"]) -> Float[Array, " n_y"]:
        *hidden, last = weights
        for W, b in hidden:
            x = jax.nn.relu(products.matvec(W, x) + b)
        return products.matvec(last.weight, x) + last.bias

    return Network(init, apply)


class Layer(NamedTuple):
    """x ↦ W x + b."""

    weight: Float[Array, "rows columns"]
    bias: Float[Array, " rows"]


def _product(weights: list[Array], x: Float[Array, " n_x"]) -> Float[Array, " n_y"]:
    # Multiplied out from the output's side: for n_y below the batch fewer operations in all.
    return products.matvec(reduce(products.times, reversed(weights)), x)


def half_squared_error(answer: Array, feedback: Array) -> Array:
    """Computes ½ ‖answer − feedback‖², whose unit of time is 1 / learning rate (Saxe et al.)."""
    return 0.5 * jnp.sum((answer - feedback) ** 2)


@functools.cache
def gradient(
    network: Network,
    optimizer: optax.GradientTransformation,
    batch: int,
    loss: Callable[[Answer, Feedback], Array] = half_squared_error,
    points: int | None = None,
) -> Learner:
    """Makes a network that takes one optimiser step on the mean loss over each minibatch.

    Minibatches are fresh, or drawn from `points` pairs that stay the same: all of them at every
    update (full batch) if there are as many as `batch`. Its state is (weights, optimiser state);
    its time t counts optimiser updates. Raises `ConfigError` for fewer points than the batch has.
    """
    check(batch >= 1, "batch", batch, "must be at least 1")
    fix = f"must be no fewer than the batch of {batch}"
    check(points is None or points >= batch, "points", points, fix)

    def objective(weights: Weights, query: Query, feedback: Feedback) -> Array:
        answers = jax.vmap(network.apply, (None, 0))(weights, query)
        return jnp.mean(jax.vmap(loss)(answers, feedback))

    return _descent(network, optimizer, objective)._replace(batch=batch, points=points)


def _descent(network, optimizer, objective) -> Learner:
    """A network that takes one optimiser step down objective(weights, query, feedback)."""

    def init(key: Key):
        weights = network.init(key)
        return weights, optimizer.init(weights)

    def update(state, query: Query, feedback: Feedback):
        weights, moments = state
        slope = jax.grad(objective)(weights, query, feedback)
        steps, moments = optimizer.update(slope, moments, weights)
        return optax.apply_updates(weights, steps), moments

    predict = lambda state, query: network.apply(state[0], query)
    return Learner(init, predict, update, clock="updates")


@functools.cache
def softmax_policy(
    contexts: int, actions: int, coupled: bool = True, scale: float = 1.0
) -> Network:
    """Logits W onehot(c) + b with N(0, scale²) entries (Schaul et al. 2019).

    The shared bias b couples the contexts: what is learned in one moves the policy in all. Without
    it they are decoupled.
    """
    check(scale >= 0, "scale", scale, "must be 0 or more")

    def init(key: Key) -> Policy:
        drawn = scale * prng.normal(key, (actions, contexts + 1))
        return Policy(drawn[:, :contexts], drawn[:, contexts] if coupled else None)

    def apply(weights: Policy, c: Int[Array, ""]) -> Float[Array, " n"]:
        logits = weights.W[:, c]
        return logits if weights.b is None else logits + weights.b

    return Network(init, apply)


class Policy(NamedTuple):
    """Logits W onehot(c) + b."""

    W: Float[Array, "n K"]
    b: Float[Array, " n"] | None


@functools.cache
def expected_policy_gradient(network: Network, optimizer: optax.GradientTransformation) -> Learner:
    """Ascends the gradient of the expected reward itself, over all contexts and actions.

    It knows what every action pays (`Outcome.pay`), so that nothing is sampled: the mean of
    `reinforce`, exactly. Its time t counts updates.
    """

    def objective(weights: Weights, query: Query, feedback: Outcome) -> Array:
        logits = jax.vmap(network.apply, (None, 0))(weights, jnp.arange(len(feedback.pay)))
        return -jnp.mean(jnp.sum(jax.nn.softmax(logits) * feedback.pay, axis=1))

    return _descent(network, optimizer, objective)


@functools.cache
def reinforce(network: Network, optimizer: optax.GradientTransformation, batch: int) -> Learner:
    """Learns by REINFORCE (Williams 1992) on `batch` choices an update, drawn from its own policy.

    The gradient of −(r − r̄) log π(a | c), with r̄ the running mean of past rewards: it begins at 0,
    and each update moves it by 0.01 of the way to the mean of its own. Its time t counts updates.
    """
    check(batch >= 1, "batch", batch, "must be at least 1")

    def objective(weights: Weights, query: Query, credited: tuple[Array, Array]) -> Array:
        action, advantage = credited
        logits = jax.vmap(network.apply, (None, 0))(weights, query)
        chosen = jnp.take_along_axis(logits, action[:, None], 1)[:, 0]
        return -jnp.mean(advantage * (chosen - jax.nn.logsumexp(logits, axis=1)))

    policy = _descent(network, optimizer, objective)

    def update(state, query: Query, feedback: Outcome):
        *descended, mean = state
        credited = feedback.action, feedback.reward - mean
        mean = 0.99 * mean + 0.01 * jnp.mean(feedback.reward)
        return *policy.update(descended, query, credited), mean

    init = lambda key: (*policy.init(key), jnp.zeros(()))
    return Learner(init, policy.predict, update, batch=batch, clock="updates")


def saxe_strength(
    t: Real[np.ndarray, " time"], s: Real[np.ndarray, " mode"], start: float, learning_rate: float
) -> Float[np.ndarray, "time mode"]:
    """Saxe's closed form for a two-layer linear network, as mode strengths a(t) / s, float64.

    a(t) = s e^{2st/τ} / (e^{2st/τ} − 1 + s/a₀) with τ = 1 / learning rate, a₀ = `start`, t in
    updates; Saxe et al. (2013), arXiv:1312.6120. From N(0, scale²) weights of width n the growing
    half of mode k, ½ (W₁ v_k + W₂ᵀ u_k), has expected squared norm ½ n scale²: use that as a₀.
    """
    t, s = np.asarray(t, np.float64)[:, None], np.asarray(s, np.float64)[None, :]
    decay = np.exp(-2 * s * t * learning_rate)  # of the reciprocal, so that nothing overflows
    return 1 / (1 + decay * (s / start - 1))


def random_start(width: int, scale: float) -> float:
    """Returns the a₀ of `saxe_strength` that stands for N(0, scale²) weights: ½ width scale²."""
    return 0.5 * width * scale**2


def updates_to_learn(s: float, start: float, learning_rate: float, strength: float = 0.5) -> int:
    """Updates until Saxe's closed form reaches a(t) = strength · s, rounded up."""
    odds = strength / (1 - strength) * max(s / start - 1, 1.0)
    return math.ceil(math.log(odds) / (2 * s * learning_rate))
