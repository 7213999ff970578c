"""MAML: meta-learners that are gradient descent itself, from a learned start at learned rates.

After Finn, Abbeel & Levine (2017), arXiv:1703.03400. The networks are the very ones that ordinary
learners train; there is no memory beside their weights and the pairs seen.
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
    """A network in the middle of being trained."""

    weights: Weights
    memory: Any = ()
    """What the optimiser carries from step to step: momentum, for instance."""


class DescentState(NamedTuple):
    """All that a learner knows which trains a network on the pairs seen so far."""

    descent: Descent
    queries: Query
    """Those seen, with room for T, [T, ...]; zeros where none is yet."""
    feedback: Float[Array, "T n_y"]
    pairs: Int[Array, ""]
    """Pairs seen."""


class InnerDescent:
    """The `base.MetaLearner` whose inner loop trains a network; subclasses say how it steps.

    After each observation it takes `inner_steps` full-batch steps on the mean of ½ ‖y − ŷ‖² over
    the pairs seen so far, from where it stands, as an ordinary learner goes on from where it
    stands. In few-shot learning MAML goes back to its start for each set of pairs; here that would
    leave it K steps in all, however many pairs have come, which are too few to fit them. Gradients
    are clipped at a norm of `clip`. The domain is a regression, and there are no heads.
    """

    heads = 0

    def __init__(self, domain: Domain, network: Network, config: Any):
        """`config` is an `InnerDescentConfig`."""
        self.domain, self.network, self.config = domain, network, config

    # What subclasses say.

    def init(self, key: Key) -> Params:
        """Draws the outer parameters of outer step 0."""
        raise NotImplementedError

    def start(self, params: Params, key: Key) -> Descent:
        """Makes the network at the beginning of an episode."""
        raise NotImplementedError

    def stepped(
        self, params: Params, k: Int[Array, ""], descent: Descent, gradient: Weights
    ) -> Descent:
        """Takes step k of those that follow one observation."""
        raise NotImplementedError

    # The contract of `base.MetaLearner`.

    def learner(self, params: Params) -> Learner:
        """Makes the step-by-step form. Beyond as many pairs as an episode has it answers NaN."""
        domain, T = self.domain, self.domain.steps
        task = jax.eval_shape(domain.sample_task, jax.random.key(0))
        query = jax.eval_shape(domain.query, task, jax.random.key(0))
        room = lambda leaf: jnp.zeros((T, *leaf.shape), leaf.dtype)

        def init(key: Key) -> DescentState:
            nothing = jnp.zeros((T, domain.answer_size))
            return DescentState(
                self.start(params, key), jax.tree.map(room, query), nothing, jnp.int32(0)
            )

        def predict(state: DescentState, query: Query) -> Answer:
            answer = self.network.apply(state.descent.weights, query)
            return jnp.where(state.pairs <= T, answer, jnp.nan)

        def update(state: DescentState, query: Query, feedback: Feedback) -> DescentState:
            put = lambda seen, new: seen.at[state.pairs].set(new)
            queries, seen = jax.tree.map(put, (state.queries, state.feedback), (query, feedback))
            pairs = state.pairs + 1
            descent = self._descended(params, state.descent, queries, seen, pairs)
            return DescentState(descent, queries, seen, pairs)

        return Learner(init, predict, update)

    def unroll(
        self, params: Params, queries: Query, feedback: Feedback
    ) -> Float[Array, "T outputs B"]:
        """Answers whole episodes. Random starts are drawn from key 0 and the episode's index.

        The index is that on its device: training on `prediction_loss` a learner whose start is
        random depends on how many devices share the episodes.
        """

        def episode(key: Key, queries: Query, feedback: Feedback) -> Float[Array, "T n_y"]:
            def observe(descent, t):
                query = jax.tree.map(lambda leaf: leaf[t], queries)
                answer = self.network.apply(descent.weights, query)
                return self._descended(params, descent, queries, feedback, t + 1), answer

            return jax.lax.scan(observe, self.start(params, key), jnp.arange(len(feedback)))[1]

        keys = indexed_keys(jax.random.key(0), jnp.arange(feedback.shape[-1]))
        return jax.vmap(episode, (0, -1, -1), -1)(keys, queries, feedback)

    def _descended(self, params, descent, queries, feedback, count) -> Descent:
        """All steps that follow one observation, on the first `count` of these pairs."""
        seen = jnp.arange(len(feedback)) < count

        def loss(weights):
            answers = jax.vmap(self.network.apply, (None, 0))(weights, queries)
            each = jax.vmap(half_squared_error)(answers, feedback)
            return jnp.sum(jnp.where(seen, each, 0)) / count

        def step(descent, k):
            gradient = clipped(jax.grad(loss)(descent.weights), self.config.clip)
            return self.stepped(params, k, descent, gradient), None

        return jax.lax.scan(step, descent, jnp.arange(self.config.inner_steps))[0]


def clipped(gradient: Weights, clip: float) -> Weights:
    """Scales a gradient down to a norm of `clip` where it is longer.

    Unlike optax's it can be differentiated where the gradient is zero.
    """
    squared = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient))
    scale = jax.lax.rsqrt(jnp.maximum(squared / clip**2, 1.0))
    return jax.tree.map(lambda leaf: scale * leaf, gradient)


class MAML(InnerDescent):
    """Gradient descent from a learned start, at a learned rate for each layer and each inner step.

    Learned rates are those of Meta-SGD (Li et al. 2017, arXiv:1707.09835), one for each layer and
    step as in MAML++ (Antoniou et al. 2019, arXiv:1810.09502). Outer parameters are their
    logarithms [inner step, layer], so that they stay above zero, and the start. It is exact MAML:
    outer gradients go through the inner ones. The layers are the elements of the network's weights.
    """

    def init(self, key: Key) -> Params:
        """Returns the start as the network draws it, and all rates alike."""
        start, config = self.network.init(key), self.config
        rates = jnp.full((config.inner_steps, len(start)), math.log(config.learning_rate))
        return {"start": start, "log_rate": rates}

    def start(self, params: Params, key: Key) -> Descent:
        """Returns the learned start."""
        return Descent(params["start"])

    def stepped(
        self, params: Params, k: Int[Array, ""], descent: Descent, gradient: Weights
    ) -> Descent:
        """Moves each layer down its gradient, at its own rate."""
        rates = jnp.exp(params["log_rate"][k])
        down = lambda rate: lambda w, g: w - rate * g
        layers = zip(rates, descent.weights, gradient, strict=True)
        return Descent([jax.tree.map(down(rate), w, g) for rate, w, g in layers])


def ordinary_network(domain: Domain, depth: int, width: int, scale: float | None = None) -> Network:
    """Makes the network that ordinary learners train in a domain, on its queries as they are.

    In linear regression it is linear and has `depth` layers, with N(0, scale²) weights, or without
    a scale N(0, 1/fan-in), of ordinary size. Elsewhere it is an MLP with `depth` hidden layers.
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
    """Settings of all meta-learners that train a network within the episode. Values: our choice."""

    label: ClassVar[str]
    kind: ClassVar[type[InnerDescent]]
    """What `make` makes."""
    inner_steps: int = 3
    """K, full-batch steps after each observation."""
    depth: int = 2
    """Layers of the linear network; hidden layers of the MLP."""
    width: int = 32
    """Units of each hidden layer."""
    clip: float = 3.0
    """Greatest norm of an inner gradient."""
    outer_learning_rate: float = 1e-2
    """Peak learning rate of its outer loop, in the place of `--outer.learning-rate`."""
    outer_batch: int = 8
    """Episodes in an outer step, in the place of `--outer.batch`: each costs as much as dozens of
    an LSTM's."""

    def __post_init__(self) -> None:
        check_positive(self, *(field.name for field in dataclasses.fields(self)))

    def make(self, domain: Domain, heads: int = 0) -> InnerDescent:
        """Makes the meta-learner for a domain; raises `ConfigError` if it is no regression."""
        fix = f"{self.label} trains networks on squared errors: choose another, such as lstm"
        check(isinstance(domain, Regression), "domain", type(domain).__name__, fix)
        fix = f"{self.label} has none: choose another meta-learner, such as lstm"
        check(heads == 0, "heads", heads, fix)
        network = ordinary_network(domain, self.depth, self.width, getattr(self, "scale", None))
        return self.kind(domain, network, self)


@dataclasses.dataclass(frozen=True)
class MAMLConfig(InnerDescentConfig):
    """Gradient descent from a learned start. The values are our choice."""

    label, kind = "MAML", MAML
    learning_rate: float = 0.1
    """Every inner rate at outer step 0, for the loss ½‖y − ŷ‖²."""
