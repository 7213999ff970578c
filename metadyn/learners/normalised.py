"""Any meta-learner on feedback of unit size: divided by its running root-mean-square."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from metadyn.base import Answer, Domain, Feedback, Key, Learner, MetaLearner, Params, Query, State

LEAST = 1e-6  # what mean squares are at least, so that feedback of zero can be divided


@dataclasses.dataclass(frozen=True)
class _Inside:
    """A domain as the meta-learner inside sees it: each query comes with two numbers on sizes."""

    domain: Any

    def __post_init__(self) -> None:
        same = "steps loss_floor answer_size sample_task loss encode_feedback evaluation"
        for name in same.split():
            object.__setattr__(self, name, getattr(self.domain, name))

    def query(self, task: Any, key: Key) -> Query:
        return self.domain.query(task, key), jnp.zeros(2)

    def feedback(self, task: Any, query: Query, answer: Answer, key: Key) -> Feedback:
        return self.domain.feedback(task, query[0], answer, key)

    def encode_query(self, query: Query) -> Float[Array, " n"]:
        return jnp.concatenate([self.domain.encode_query(query[0]), query[1]])


class NormalisedState(NamedTuple):
    """What the meta-learner inside knows, and how large the feedback was."""

    inside: State
    t: Float[Array, ""]
    """Observations so far."""
    mean_square: Float[Array, ""]
    """r² of the feedback so far; 1 before any."""
    before: Float[Array, ""]
    """r² one step before."""


class Normalised:
    """A meta-learner whose feedback is divided by r_t, its root-mean-square up to then.

    `make(domain)` makes the meta-learner inside, such as `LSTMConfig().make`. It reads y_{t−1} /
    r_{t−1}, and its answers are multiplied by r_{t−1}, which does not know y_t; r_0 = 1. Beside x_t
    it reads 1 / r_{t−1}, to which the noise is proportional in the new units and which stays
    bounded as r grows; and log r_{t−1} / r_{t−2}, by which what it remembers has changed its unit.
    It is not exactly equivariant. For domains whose feedback and answers are vectors of one unit.
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

        def asked(state: NormalisedState, x: Query) -> Query:
            return x, _read(state.mean_square, state.before, state.t)

        def init(key: Key) -> NormalisedState:
            return NormalisedState(inside.init(key), jnp.zeros(()), jnp.ones(()), jnp.ones(()))

        def predict(state: NormalisedState, x: Query) -> Answer:
            return jnp.sqrt(state.mean_square) * inside.predict(state.inside, asked(state, x))

        def update(state: NormalisedState, x: Query, y: Feedback) -> NormalisedState:
            t, now = state.t, jnp.maximum((y**2).mean(), LEAST)
            after = jnp.where(t > 0, (t * state.mean_square + now) / (t + 1), now)
            known = inside.update(state.inside, asked(state, x), y / jnp.sqrt(after))
            return NormalisedState(known, t + 1, after, state.mean_square)

        said = inside.diagnose
        diagnose = None if said is None else lambda state: said(state.inside)
        return Learner(init, predict, update, diagnose=diagnose)

    def unroll(
        self, params: Params, queries: Query, feedback: Float[Array, "T m B"]
    ) -> Float[Array, "T outputs B"]:
        """Runs whole episodes at once: the answers."""
        t = jnp.arange(len(feedback))[:, None]
        squares = jnp.maximum((feedback**2).mean(1), LEAST)
        after = jnp.cumsum(squares, axis=0) / (t + 1)
        late = lambda squares: jnp.concatenate([jnp.ones_like(squares[:1]), squares[:-1]])
        now = late(after)
        read = jnp.moveaxis(_read(now, late(now), t), 0, 1)
        answers = self.inside.unroll(params, (queries, read), feedback / jnp.sqrt(after)[:, None])
        return answers * jnp.sqrt(now)[:, None]


def _read(now: Array, before: Array, t: Array) -> Float[Array, " read *any"]:
    """1 / r, and the logarithm of its change, 0 until there was one, from mean squares."""
    change = jnp.where(t > 1, 0.5 * jnp.log(now / before), 0.0)
    return jnp.stack([now**-0.5, change])
