"""Any meta-learner on feedback of unit size: divided by its running root-mean-square."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from metadyn.base import Answer, Domain, Feedback, Key, Learner, MetaLearner, Params, Query, State

LEVEL = (lambda l: 10*0.1*jnp.exp(-l)) if os.environ.get("RATIO") else (lambda l: l)
Size = Float[Array, "*T_B"]


@dataclasses.dataclass(frozen=True)
class _Inside:
    """A domain as the meta-learner inside sees it: each query comes with log r of the feedback."""

    domain: Any

    def __post_init__(self) -> None:
        same = "steps loss_floor answer_size sample_task loss encode_feedback evaluation"
        for name in same.split():
            object.__setattr__(self, name, getattr(self.domain, name))

    def query(self, task: Any, key: Key) -> Query:
        return self.domain.query(task, key), jnp.zeros(())

    def feedback(self, task: Any, query: Query, answer: Answer, key: Key) -> Feedback:
        return self.domain.feedback(task, query[0], answer, key)

    def encode_query(self, query: Query) -> Float[Array, " n"]:
        return jnp.append(self.domain.encode_query(query[0]), LEVEL(query[1]))


class Seen(NamedTuple):
    """The feedback so far, in two numbers."""

    count: Size
    squares: Size
    """Sum of y² over all outputs."""

    def add(self, y: Feedback) -> Seen:
        """Adds the feedback of one step."""
        return Seen(self.count + y.size, self.squares + (y**2).sum())

    @property
    def size(self) -> Size:
        """r, its root-mean-square; 1 before any has come."""
        mean = self.squares / jnp.maximum(self.count, 1)
        return jnp.sqrt(jnp.where(self.count > 0, mean + 1e-12, 1.0))


class NormalisedState(NamedTuple):
    """What the meta-learner inside knows, and the feedback so far."""

    inside: State
    seen: Seen


class Normalised:
    """A meta-learner whose feedback is divided by r_t, its root-mean-square up to then.

    `make(domain)` makes the meta-learner inside, such as `LSTMConfig().make`. It reads log r_{t−1}
    beside x_t, and y_{t−1} / r_{t−1}; its answers are multiplied by r_{t−1}, which does not know
    y_t. For domains whose feedback and answers are vectors of one unit. It is not exactly
    equivariant: the noise has a size of its own, and past feedback was divided by past r.
    """

    heads = 0

    def __init__(self, domain: Domain, make: Callable[[Any], MetaLearner]):
        self.domain, self.inside = domain, make(_Inside(domain))

    def init(self, key: Key) -> Params:
        """Draws the outer parameters of the meta-learner inside."""
        return self.inside.init(key)

    def learner(self, params: Params) -> Learner:
        """The learner that these parameters are, stepped through an episode."""
        inside = self.inside.learner(params)

        def init(key: Key) -> NormalisedState:
            return NormalisedState(inside.init(key), Seen(jnp.zeros(()), jnp.zeros(())))

        def predict(state: NormalisedState, x: Query) -> Answer:
            r = state.seen.size
            return r * inside.predict(state.inside, (x, jnp.log(r)))

        def update(state: NormalisedState, x: Query, y: Feedback) -> NormalisedState:
            seen, level = state.seen.add(y), jnp.log(state.seen.size)
            return NormalisedState(inside.update(state.inside, (x, level), y / seen.size), seen)

        said = inside.diagnose
        diagnose = None if said is None else lambda state: said(state.inside)
        return Learner(init, predict, update, diagnose=diagnose)

    def unroll(
        self, params: Params, queries: Query, feedback: Float[Array, "T m B"]
    ) -> Float[Array, "T outputs B"]:
        """Runs whole episodes at once: the answers."""
        T, m, B = feedback.shape
        count = jnp.broadcast_to(m * jnp.arange(1.0, T + 1)[:, None], (T, B))
        r = Seen(count, jnp.cumsum((feedback**2).sum(1), axis=0)).size
        before = jnp.concatenate([jnp.ones((1, B)), r[:-1]])
        outputs = self.inside.unroll(params, (queries, jnp.log(before)), feedback / r[:, None])
        return outputs * before[:, None]
