"""MAML: meta-learners whose inner loop is gradient descent, from a learned start at learned rates.

After Finn, Abbeel & Levine (2017), arXiv:1703.03400. The networks are those that ordinary learners
train. Their only memory is the weights and the pairs seen.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from metadyn.base import (
    Answer,
    Domain,
    Feedback,
    Key,
    Learner,
    Params,
    Query,
    Regression,
    indexed_keys,
)
from metadyn.domains.linear import LinearRegression
from metadyn.errors import check, check_positive
from metadyn.learners.gradient import Network, Weights, deep_linear, half_squared_error, mlp


class Descent(NamedTuple):
    """A network during training: its weights, and the state of its optimiser."""

    weights: Weights
    memory: Any = ()
    """What the optimiser carries from step to step, such as momentum."""


class DescentState(NamedTuple):
    """The state of a learner that trains a network on the pairs seen so far."""

    descent: Descent
    queries: Query
    """Buffer [T, ...] of the queries seen so far, padded with zeros."""
    feedback: Float[Array, "T n_y"]
    pairs: Int[Array, ""]
    """Number of pairs seen."""


class InnerDescent:
    """A `base.MetaLearner` whose inner loop trains a network. Subclasses define start and steps.

    After each observation the learner takes `inner_steps` full-batch steps on the mean of
    ½ ‖y − ŷ‖² over the pairs seen so far. It continues from its current weights, as an ordinary
    learner does. In few-shot learning MAML returns to its start for each set of pairs. Here that
    would leave it K steps in all, however many pairs it has seen: too few to fit them. Gradients
    are clipped at a norm of `clip`. The domain is a regression, and there are no heads.
    """

    heads = 0

    def __init__(self, domain: Domain, network: Network, config: Any):
        """`config` is an `InnerDescentConfig`."""
        self.domain, self.network, self.config = domain, network, config

    # For subclasses to define.

    def init(self, key: Key) -> Params:
        """Draws the outer parameters of outer step 0."""
        raise NotImplementedError

    def start(self, params: Params, key: Key) -> Descent:
        """Returns the network at the beginning of an episode."""
        raise NotImplementedError

    def inner_step(
        self, params: Params, k: Int[Array, ""], descent: Descent, gradient: Weights
    ) -> Descent:
        """Returns the network after inner step k, from 0, of those that follow an observation."""
        raise NotImplementedError

    # The contract of `base.MetaLearner`.

    def learner(self, params: Params) -> Learner:
        """Makes the step-by-step learner. After more pairs than an episode has, it answers NaN."""
        domain, T = self.domain, self.domain.steps
        task = jax.eval_shape(domain.sample_task, jax.random.key(0))
        query = jax.eval_shape(domain.query, task, jax.random.key(0))
        buffer = lambda leaf: jnp.zeros((T, *leaf.shape), leaf.dtype)

        def init(key: Key) -> DescentState:
            feedbacks = jnp.zeros((T, domain.answer_size))
            return DescentState(
                self.start(params, key), jax.tree.map(buffer, query), feedbacks, jnp.int32(0)
            )

        def predict(state: DescentState, query: Query) -> Answer:
            answer = self.network.apply(state.descent.weights, query)
            return jnp.where(state.pairs <= T, answer, jnp.nan)

        def update(state: DescentState, query: Query, feedback: Feedback) -> DescentState:
            insert = lambda buffer, leaf: buffer.at[state.pairs].set(leaf)
            buffers = state.queries, state.feedback
            queries, feedbacks = jax.tree.map(insert, buffers, (query, feedback))
            pairs = state.pairs + 1
            descent = self._descend(params, state.descent, queries, feedbacks, pairs)
            return DescentState(descent, queries, feedbacks, pairs)

        return Learner(init, predict, update)

    def unroll(
        self, params: Params, queries: Query, feedback: Feedback
    ) -> Float[Array, "T outputs B"]:
        """Returns the answers of B whole episodes.

        Random starts are drawn from key 0 and the episode's index on its device. So training such a
        learner on `prediction_loss` depends on how many devices share the episodes.
        """

        def episode(key: Key, queries: Query, feedback: Feedback) -> Float[Array, "T n_y"]:
            def observe(descent, t):
                query = jax.tree.map(lambda leaf: leaf[t], queries)
                answer = self.network.apply(descent.weights, query)
                return self._descend(params, descent, queries, feedback, t + 1), answer

            return jax.lax.scan(observe, self.start(params, key), jnp.arange(len(feedback)))[1]

        keys = indexed_keys(jax.random.key(0), jnp.arange(feedback.shape[-1]))
        return jax.vmap(episode, (0, -1, -1), -1)(keys, queries, feedback)

    def _descend(self, params, descent, queries, feedback, count) -> Descent:
        """Returns the network after all steps of one observation, on the first `count` pairs."""
        seen = jnp.arange(len(feedback)) < count

        def loss(weights):
            answers = jax.vmap(self.network.apply, (None, 0))(weights, queries)
            losses = jax.vmap(half_squared_error)(answers, feedback)
            return jnp.sum(jnp.where(seen, losses, 0)) / count

        def step(descent, k):
            gradient = clipped(jax.grad(loss)(descent.weights), self.config.clip)
            return self.inner_step(params, k, descent, gradient), None

        return jax.lax.scan(step, descent, jnp.arange(self.config.inner_steps))[0]


def clipped(gradient: Weights, clip: float) -> Weights:
    """Scales a gradient down to a norm of `clip` if its norm is greater.

    Unlike optax's clipping, it can be differentiated where the gradient is zero.
    """
    squared_norm = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient))
    scale = jax.lax.rsqrt(jnp.maximum(squared_norm / clip**2, 1.0))
    return jax.tree.map(lambda leaf: scale * leaf, gradient)


class MAML(InnerDescent):
    """Gradient descent from a learned start, at a learned rate for each layer and each inner step.

    Rates are learned as in Meta-SGD (Li et al. 2017, arXiv:1707.09835), one for each layer and step
    as in MAML++ (Antoniou et al. 2019, arXiv:1810.09502). Outer parameters are the start, and the
    logarithms of the rates [inner step, layer], so that these stay above zero. It is exact MAML:
    outer gradients go through the inner ones. Layers are the elements of the network's weights.
    """

    def init(self, key: Key) -> Params:
        """Draws the start as the network does, and sets all rates to `learning_rate`."""
        start, config = self.network.init(key), self.config
        rates = jnp.full((config.inner_steps, len(start)), math.log(config.learning_rate))
        return {"start": start, "log_rate": rates}

    def start(self, params: Params, key: Key) -> Descent:
        """Returns the learned start."""
        return Descent(params["start"])

    def inner_step(
        self, params: Params, k: Int[Array, ""], descent: Descent, gradient: Weights
    ) -> Descent:
        """Returns the network with each layer moved down its gradient, at its own rate."""
        rates = jnp.exp(params["log_rate"][k])
        descend = lambda rate: lambda w, g: w - rate * g
        layers = zip(rates, descent.weights, gradient, strict=True)
        return Descent([jax.tree.map(descend(rate), w, g) for rate, w, g in layers])


def ordinary_network(domain: Domain, depth: int, width: int, scale: float | None = None) -> Network:
    """Makes the network that ordinary learners train in a domain, with its raw queries as inputs.

    For linear regression it is linear, with `depth` layers and N(0, scale²) weights. Without a
    scale these are N(0, 1/fan-in), the ordinary size. For other domains it is an MLP with `depth`
    hidden layers.
    """
    task = jax.eval_shape(domain.sample_task, jax.random.key(0))
    (n_x,) = jax.eval_shape(domain.query, task, jax.random.key(0)).shape
    if not isinstance(domain, LinearRegression):
        return mlp(n_x, domain.answer_size, depth, width)
    linear = deep_linear(n_x, domain.n_y, depth, width, 1.0 if scale is None else scale)
    if scale is not None:
        return linear
    return Network(lambda key: [W / W.shape[1] ** 0.5 for W in linear.init(key)], linear.apply)


@dataclasses.dataclass(frozen=True)
class InnerDescentConfig:
    """Settings of all meta-learners that train a network in the episode. Values: our choice."""

    label: ClassVar[str]
    kind: ClassVar[type[InnerDescent]]
    """Class of the meta-learner that `make` returns."""
    inner_steps: int = 3
    """Full-batch steps after each observation, K."""
    depth: int = 2
    """Layers of the linear network; hidden layers of the MLP."""
    width: int = 32
    """Units of each hidden layer."""
    clip: float = 3.0
    """Greatest norm of an inner gradient, at which it is clipped."""
    outer_learning_rate: float = 1e-2
    """Peak learning rate of its outer loop, in place of `--outer.learning-rate`."""
    outer_batch: int = 8
    """Episodes per outer step, in place of `--outer.batch`: each costs as much as dozens of an
    LSTM's."""

    def __post_init__(self) -> None:
        check_positive(self, *(field.name for field in dataclasses.fields(self)))

    def make(self, domain: Domain, heads: int = 0) -> InnerDescent:
        """Makes the meta-learner for a regression. Raises `ConfigError` otherwise and for heads."""
        hint = f"{self.label} learns regressions only: choose another meta-learner, such as lstm"
        check(isinstance(domain, Regression), "domain", type(domain).__name__, hint)
        hint = f"{self.label} has no heads: choose another meta-learner, such as lstm"
        check(heads == 0, "heads", heads, hint)
        network = ordinary_network(domain, self.depth, self.width, getattr(self, "scale", None))
        return self.kind(domain, network, self)


@dataclasses.dataclass(frozen=True)
class MAMLConfig(InnerDescentConfig):
    """Settings of MAML, gradient descent from a learned start. The values are our choice."""

    label, kind = "MAML", MAML
    learning_rate: float = 0.1
    """Inner learning rates at outer step 0, all alike, for the loss ½‖y − ŷ‖²."""
