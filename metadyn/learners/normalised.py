"""A wrapper for any meta-learner that divides feedback by its running size where that is large."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from metadyn import mesh
from metadyn.base import Domain, Key, Learner, MetaLearner, Params, Query, State, as_subclass


def _with_scale_features(domain: Any) -> Any:
    """Returns the wrapped meta-learner's view of a domain: queries carry `_scale_features` too."""
    kind: Any = type(domain)

    class Inside(kind):
        def query(self, task: Any, key: Key) -> Query:
            return super().query(task, key), jnp.zeros(2)

        def feedback(self, task: Any, query: Query, answer: Array, key: Key) -> Array:
            return super().feedback(task, query[0], answer, key)

        def encode_query(self, query: Query) -> Float[Array, " n"]:
            return jnp.concatenate([super().encode_query(query[0]), query[1]])

    return as_subclass(domain, Inside)


class NormalisedState(NamedTuple):
    """The wrapped learner's state, and the size of the feedback so far."""

    inside: State
    t: Float[Array, ""]
    """Number of observations so far."""
    mean_square: Float[Array, ""]
    """Mean square of the feedback so far; 0 before any."""
    before: Float[Array, ""]
    """The mean square one step earlier."""


class Normalised:
    """A meta-learner whose feedback is divided by r_t, a measure of the feedback's size so far.

    r_t² is twice the mean square of y_1 … y_t, but at least 1, and r_0 = 1. So small feedback stays
    as it is, and what the meta-learner knows of the prior applies to it. (Division by the root mean
    square itself, of any size, gave more excess loss within the training distribution: our choice.)

    `make(domain)` makes the wrapped meta-learner, such as `LSTMConfig().make`. It reads
    y_{t−1} / r_{t−1} in place of y_{t−1}, and its answers are multiplied by r_{t−1}, which does not
    depend on y_t. It also reads 1 / r_{t−1}, which is bounded and proportional to the noise in the
    new units, and log(r_{t−1} / r_{t−2}), the change in units of what it remembers. Results
    are not exactly equivariant to scale. Feedback and answers must be vectors in the same unit.
    """

    heads = 0

    def __init__(self, domain: Domain, make: Callable[[Any], MetaLearner]):
        self.domain, self.inside = domain, make(_with_scale_features(domain))
        self.init, self.cached_episodes = self.inside.init, mesh.cached_episodes(self.inside)
        self.rates = getattr(self.inside, "rates", None)
        self.check = getattr(self.inside, "check", lambda: None)

    def learner(self, params: Params) -> Learner:
        """Makes the learner with these outer parameters, to be stepped through an episode."""
        inside = self.inside.learner(params)

        def with_features(state: NormalisedState, x: Query) -> Query:
            return x, _scale_features(_scale(state.mean_square), _scale(state.before))

        def init(key: Key) -> NormalisedState:
            return NormalisedState(inside.init(key), *[jnp.zeros(())] * 3)

        def predict(state: NormalisedState, x: Query) -> Array:
            return _scale(state.mean_square) * inside.predict(state.inside, with_features(state, x))

        def update(state: NormalisedState, x: Query, y: Array) -> NormalisedState:
            t, before = state.t + 1, state.mean_square
            after = before + ((y**2).mean() - before) / t
            inner = inside.update(state.inside, with_features(state, x), y / _scale(after))
            return NormalisedState(inner, t, after, before)

        diagnose_inside = inside.diagnose
        diagnose = None if diagnose_inside is None else lambda state: diagnose_inside(state.inside)
        return Learner(init, predict, update, diagnose=diagnose)

    def unroll(
        self, params: Params, queries: Query, feedback: Float[Array, "T m B"]
    ) -> Float[Array, "T outputs B"]:
        """Runs B whole episodes at once and returns the answers."""
        t = jnp.arange(1, len(feedback) + 1)[:, None]
        scale = _scale(jnp.cumsum((feedback**2).mean(1), axis=0) / t)
        delayed = lambda r: jnp.concatenate([jnp.ones_like(r[:1]), r[:-1]])
        previous = delayed(scale)
        features = jnp.moveaxis(_scale_features(previous, delayed(previous)), 0, 1)
        answers = self.inside.unroll(params, (queries, features), feedback / scale[:, None])
        return answers * previous[:, None]


def _scale(mean_square: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Returns r, the divisor of the feedback, from the feedback's mean square."""
    return jnp.sqrt(jnp.maximum(2 * mean_square, 1.0))


def _scale_features(
    scale: Float[Array, "*any"], previous: Float[Array, "*any"]
) -> Float[Array, " read *any"]:
    """Returns two numbers for the wrapped meta-learner to read: 1 / r, and the log change of r."""
    return jnp.stack([1 / scale, jnp.log(scale / previous)])
