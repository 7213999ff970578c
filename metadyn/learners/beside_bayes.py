"""Networks beside Bayes: states of both on the same pairs, and Bayes' put in the network's place.

After Mikulik et al. (2020, "Meta-trained agents implement Bayes-optimal agents",
arXiv:2010.11223), who compare the states of the two; replacing one is added here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from metadyn import inner, mesh
from metadyn.base import (
    Answer,
    Derived,
    Domain,
    Feedback,
    Key,
    Learner,
    MetaLearner,
    Params,
    Query,
    State,
    encoded_shapes,
)
from metadyn.domains.bandit import ContextualBandit
from metadyn.domains.linear import LinearRegression
from metadyn.errors import check
from metadyn.learners.bayes import bayes_bandit, bayes_linear, ridge
from metadyn.learners.networks import Carry


@dataclasses.dataclass(frozen=True, eq=False)
class Beliefs:
    """Exact Bayes, with what is read of its state and how far other answers are from its own."""

    learner: Learner
    read: Callable[[State], Mapping[str, Float[Array, " _"]]]
    """The posterior as vectors by name: its "mean", its "uncertainty", and what else there is."""
    distance: Callable[[Answer, Answer], Float[Array, ""]]
    """`distance(answer, best)` of an answer from the best one."""


def linear_beliefs(domain: LinearRegression) -> Beliefs:
    """Reads the posterior of W: mean [n_y n_x], covariance [n_x n_x], and the latter's log det [1].

    In the eigenbasis of R; the covariance is that of the first row, which is that of all if R is
    the identity. Distances are mean squared errors.
    """

    def read(state: State) -> Mapping[str, Array]:
        covariance = state.root[0] @ state.root[0].T
        uncertainty = _log_determinant(state.root[0])[None]
        mean, flat = state.mean.ravel(), covariance.ravel()
        return {"mean": mean, "covariance": flat, "uncertainty": uncertainty}

    return Beliefs(bayes_linear(domain), read, lambda answer, best: jnp.mean((answer - best) ** 2))


def _log_determinant(root: Float[Array, "n n"]) -> Float[Array, ""]:
    """Of S Sᵀ, by the root S, of which float32 holds what it does not hold of the product.

    By Gram and Schmidt, row by row: library calls, on several CPU devices at once, can wait for
    each other's threads for ever.
    """
    total = jnp.zeros(())
    for k in range(len(root)):
        row = root[k]
        squared = row @ row
        total = total + jnp.log(squared)
        root = root - jnp.outer(root @ row, row) / squared
    return total


def bandit_beliefs(domain: ContextualBandit) -> Beliefs:
    """Reads the posterior of each action in each context [K n], and its entropy in each [K].

    Distances are KL(best policy ‖ policy), in nats. Raises `ConfigError` for permutations, whose
    contexts are not independent.
    """
    check(not domain.permutation, "permutation", True, "contexts must be independent")

    def read(state: State) -> Mapping[str, Array]:
        posterior = jax.nn.softmax(state)
        entropy = jax.scipy.special.entr(posterior).sum(-1)
        return {"mean": posterior.ravel(), "uncertainty": entropy}

    def distance(answer: Answer, best: Answer) -> Array:
        log_p, log_q = jax.nn.log_softmax(best), jax.nn.log_softmax(answer)
        p = jnp.exp(log_p)
        return jnp.sum(jnp.where(p > 0, p * (jnp.where(p > 0, log_p, 0) - log_q), 0))

    return Beliefs(bayes_bandit(domain), read, distance)


def whole(carry: Carry) -> Float[Array, " D"]:
    """Flattens the carry of a recurrent cell into one vector: (h, c) of an LSTM."""
    return ravel_pytree(carry)[0]


def mean_values(carry: Carry) -> Float[Array, " D"]:
    """Means over the tokens read of the values in a transformer's cache, layer after layer.

    The cache itself grows with the episode; this is what even attention reads out of it.
    """
    _, memories = carry
    means = [values.sum(0).ravel() / jnp.maximum(t, 1) for _, values, t in memories]
    return jnp.concatenate(means)


class Both(NamedTuple):
    """A network and Bayes within one episode."""

    network: State
    bayes: State
    said: Mapping[str, Array]
    """What is recorded after the last update; zeros before the first."""


class Beside:
    """A meta-learner that Bayes accompanies through its own episodes, for the record.

    It answers as it would alone. Recorded at time t are `state`, read of the carry, in which are
    x_1 … x_t and y_1 … y_{t−1}; what is read of Bayes after the same t − 1 pairs; `query`, x_t as
    the network reads it; and `distance`, of its t-th answer from that of Bayes. States are recorded
    in half precision, which is more than decoding can tell. `read` says what is recorded of the
    network's carry.
    """

    def __init__(
        self,
        meta: MetaLearner,
        domain: Domain,
        beliefs: Beliefs,
        read: Callable[[Carry], Float[Array, " D"]] = whole,
    ):
        self.meta, self.domain, self.beliefs, self.read = meta, domain, beliefs, read
        self.heads, self.cached_episodes = meta.heads, mesh.cached_episodes(meta)
        self.init, self.unroll = meta.init, meta.unroll
        self.rates = getattr(meta, "rates", None)

    def learner(self, params: Params) -> Learner:
        """Makes the learner that these parameters are, and Bayes beside it."""
        network, bayes, domain = self.meta.learner(params), self.beliefs.learner, self.domain

        def told(known: State, carry: Carry, query: Array, distance: Array) -> dict[str, Array]:
            read = {**self.beliefs.read(known), "state": self.read(carry)}
            return read | {"query": query, "distance": distance}

        def init(key: Key) -> Both:
            before = network.init(key), bayes.init(key)
            query = jnp.zeros(encoded_shapes(domain)[0])
            said = told(before[1], before[0].carry, query, jnp.zeros(()))
            return Both(*before, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), said))

        def predict(state: Both, query: Query) -> Answer:
            return network.predict(state.network, query)

        def update(state: Both, query: Query, feedback: Feedback) -> Both:
            answer, best = predict(state, query), bayes.predict(state.bayes, query)
            after = network.update(state.network, query, feedback)
            apart = self.beliefs.distance(answer, best)
            said = told(state.bayes, after.carry, domain.encode_query(query), apart)
            return Both(after, bayes.update(state.bayes, query, feedback), said)

        def diagnose(state: Both) -> Mapping[str, Array]:
            return {**state.said, "state": state.said["state"].astype(jnp.float16)}

        return Learner(init, predict, update, diagnose=diagnose)


SOURCES = ("none", "own", "other", "fresh", "bayes")
"""Whose losses `implanted` records: of copies that go on from one state or another, and Bayes'."""


class Operated(NamedTuple):
    """A network left alone beside Bayes, and copies of it whose states are replaced."""

    alone: Both
    copies: State
    """Three of the network's states, stacked: those of "own", "other" and "fresh"."""
    time: Int[Array, ""]
    donor: Int[Array, ""]
    """The episode, among those of the fit, whose posterior is put in the place of its own."""
    said: Mapping[str, Array]


def implanted(beside: Beside, at: int = 5, episodes: int = 512) -> Derived:
    """Replaces a trained recurrent network's carry in mid-episode by one made of Bayes' state.

    The copies that are stepped beside each other differ in what comes in its place, after update
    `at`.

    The carry of the copy "own" is that to which ridge regression, fitted on episodes of training,
    maps Bayes' posterior after the same pairs and the query last read: all else that it held is
    lost. Controls are the posterior of another task in its place, "other"; the carry at an
    episode's beginning, "fresh"; and the network left alone, "none". The last feedback, which no
    carry holds yet, stays. All see the same pairs, which where answers count are those of the
    network left alone.

    Recorded are `losses`, of `SOURCES`; `shift`, the distances of the three copies' last answers
    from that of the network left alone; `size`, the mean square of the latter; and `after`, whether
    they were given after the replacement, 1 or 0. The ridge regression is fitted on so many
    `episodes`, 512 by our choice.
    """
    domain, beliefs = beside.domain, beside.beliefs
    check(at >= 1, "at", at, "must be 1 or more")
    fix = f"must be above {at}, after which states are replaced"
    check(at < domain.steps, "steps", domain.steps, fix)

    def make(params: Params) -> Learner:
        learner = beside.learner(params)
        network, bayes = beside.meta.learner(params), beliefs.learner
        empty, carried = ravel_pytree(learner.init(jax.random.key(0)).network.carry)
        keys = jax.random.split(jax.random.key(0), episodes)
        seen = jax.vmap(partial(_told, domain, at, learner))(keys)
        mapped = _ridge(_features(seen), seen["state"])

        def init(key: Key) -> Operated:
            both = learner.init(key)
            copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), both.network)
            donor = jax.random.randint(key, (), 0, episodes)
            said = {
                "after": jnp.zeros(()),
                "losses": jnp.zeros(len(SOURCES)),
                "shift": jnp.zeros(3),
                "size": jnp.zeros(()),
            }
            return Operated(both, copies, jnp.int32(0), donor, said)

        def predict(state: Operated, query: Query) -> Answer:
            return learner.predict(state.alone, query)

        def update(state: Operated, query: Query, feedback: Feedback) -> Operated:
            answer, best = predict(state, query), bayes.predict(state.alone.bayes, query)
            answers = jax.vmap(network.predict, (0, None))(state.copies, query)
            every = jnp.concatenate([answer[None], answers, best[None]])
            said = {
                "after": jnp.where(state.time >= at, 1.0, 0.0),
                "losses": jax.vmap(domain.loss, (0, None))(every, feedback),
                "shift": jax.vmap(beliefs.distance, (0, None))(answers, answer),
                "size": jnp.mean(answer**2),
            }
            alone = learner.update(state.alone, query, feedback)
            copies = jax.vmap(network.update, (0, None, None))(state.copies, query, feedback)
            donor = jax.tree.map(lambda leaf: leaf[state.donor], seen)
            own, other = (
                carried(mapped(_features(told)))
                for told in (alone.said, {**donor, "query": alone.said["query"]})
            )
            new = jax.tree.map(lambda *three: jnp.stack(three), own, other, carried(empty))
            put = lambda new, old: jnp.where(state.time + 1 == at, new, old)
            copies = copies._replace(carry=jax.tree.map(put, new, copies.carry))
            return Operated(alone, copies, state.time + 1, state.donor, said)

        return Learner(init, predict, update, diagnose=lambda state: state.said)

    return Derived(beside, make)


def _told(domain: Domain, at: int, learner: Learner, key: Key) -> Mapping[str, Array]:
    """What is recorded at time `at` of an episode of training."""
    key_task, key_init, key_steps = jax.random.split(key, 3)
    task = domain.sample_task(key_task)

    def step(state: Both, key: Key) -> tuple[Both, None]:
        answer, keys = partial(learner.predict, state), jax.random.split(key)
        query, _, feedback = inner.interact(domain, task, answer, keys)
        return learner.update(state, query, feedback), None

    keys = jax.random.split(key_steps, at)
    return jax.lax.scan(step, learner.init(key_init), keys)[0].said


def _features(said: Mapping[str, Array]) -> Float[Array, "*episodes p"]:
    told = [said[name] for name in sorted({*said} - {"state", "distance"})]
    return jnp.concatenate(told, axis=-1)


def _ridge(x: Float[Array, "n p"], y: Float[Array, "n q"]) -> Callable[[Array], Array]:
    """Ridge regression of y on standardised x, with a penalty of 1, as a function of x."""
    mean, spread, centre = x.mean(0), x.std(0), y.mean(0)
    standard = lambda x: (x - mean) / jnp.where(spread > 0, spread, 1.0)
    online = ridge(x.shape[1], y.shape[1], 1.0)
    pairs = standard(x), y - centre
    fitted, _ = jax.lax.scan(
        lambda state, pair: (online.update(state, *pair), None),
        online.init(jax.random.key(0)),
        pairs,
    )
    return lambda x: centre + online.predict(fitted, standard(x))
