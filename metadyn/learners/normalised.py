"""Any meta-learner on feedback of bounded size: divided by its running size where that is large."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from metadyn import mesh
from metadyn.base import Domain, Key, Learner, MetaLearner, Params, Query, State, as_subclass


def _inside(domain: Any) -> Any:
    """A domain as the meta-learner inside sees it: each query comes with two numbers on sizes."""
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
    """What the meta-learner inside knows, and how large the feedback was."""

    inside: State
    t: Float[Array, ""]
    """Observations so far."""
    mean_square: Float[Array, ""]
    """That of the feedback so far; 0 before any."""
    before: Float[Array, ""]
    """That of one step before."""


class Normalised:
    """A meta-learner whose feedback is divided by r_t, which grows with the feedback up to then.

    r_t² is twice the mean square of y_1 … y_t, but at least 1: small feedback stays as it is, to
    which what it knows of the prior applies, and r_0 = 1. (With the root-mean-square itself, of any
    size, the excess loss within the training distribution was greater: our choice.)

    `make(domain)` makes the meta-learner inside, such as `LSTMConfig().make`. In place of y_{t−1}
    it reads y_{t−1} / r_{t−1}, and its answers are multiplied by r_{t−1}, which does not know y_t.
    It reads two numbers more: 1 / r_{t−1}, to which the noise is proportional in the new units and
    which stays bounded as r grows; and log(r_{t−1} / r_{t−2}), by which the unit of what it
    remembers has changed. It is not exactly equivariant. For domains whose feedback and answers are
    vectors of one unit.
    """

    heads = 0

    def __init__(self, domain: Domain, make: Callable[[Any], MetaLearner]):
        self.domain, self.inside = domain, make(_inside(domain))
        self.init, self.cached_episodes = self.inside.init, mesh.cached_episodes(self.inside)
        self.rates = getattr(self.inside, "rates", None)

    def learner(self, params: Params) -> Learner:
        """Makes the learner that these parameters are, stepped through an episode."""
        inside = self.inside.learner(params)

        def asked(state: NormalisedState, x: Query) -> Query:
            return x, _read(_size(state.mean_square), _size(state.before))

        def init(key: Key) -> NormalisedState:
            return NormalisedState(inside.init(key), *[jnp.zeros(())] * 3)

        def predict(state: NormalisedState, x: Query) -> Array:
            return _size(state.mean_square) * inside.predict(state.inside, asked(state, x))

        def update(state: NormalisedState, x: Query, y: Array) -> NormalisedState:
            t, before = state.t + 1, state.mean_square
            after = before + ((y**2).mean() - before) / t
            known = inside.update(state.inside, asked(state, x), y / _size(after))
            return NormalisedState(known, t, after, before)

        said = inside.diagnose
        diagnose = None if said is None else lambda state: said(state.inside)
        return Learner(init, predict, update, diagnose=diagnose)

    def unroll(
        self, params: Params, queries: Query, feedback: Float[Array, "T m B"]
    ) -> Float[Array, "T outputs B"]:
        """Runs whole episodes at once: the answers."""
        t = jnp.arange(1, len(feedback) + 1)[:, None]
        after = _size(jnp.cumsum((feedback**2).mean(1), axis=0) / t)
        late = lambda sizes: jnp.concatenate([jnp.ones_like(sizes[:1]), sizes[:-1]])
        now = late(after)
        read = jnp.moveaxis(_read(now, late(now)), 0, 1)
        answers = self.inside.unroll(params, (queries, read), feedback / after[:, None])
        return answers * now[:, None]


def _size(mean_square: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """r."""
    return jnp.sqrt(jnp.maximum(2 * mean_square, 1.0))


def _read(now: Float[Array, "*any"], before: Float[Array, "*any"]) -> Float[Array, " read *any"]:
    """1 / r, and the logarithm of its change."""
    return jnp.stack([1 / now, jnp.log(now / before)])
