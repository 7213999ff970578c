"""Networks beside Bayes: records both states on the same pairs, or puts one in place of the other.

After Mikulik et al. (2020, "Meta-trained agents implement Bayes-optimal agents",
arXiv:2010.11223), who compare the states of the two. Replacing a state is our addition.
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
    """Exact Bayes, with functions that read its state and compare other answers with its own."""

    learner: Learner
    read: Callable[[State], Mapping[str, Float[Array, " _"]]]
    """`read(state)` returns the posterior as vectors by name: "mean", "uncertainty" and others."""
    distance: Callable[[Answer, Answer], Float[Array, ""]]
    """`distance(answer, best)` returns how far an answer is from the best one."""


def linear_beliefs(domain: LinearRegression) -> Beliefs:
    """Makes the beliefs of linear regression, which read the posterior mean and covariance of W.

    These are "mean" [n_y n_x], "covariance" [n_x n_x], and as "uncertainty" the covariance's log
    determinant [1]. Rows of W are in the eigenbasis of R. The covariance is that of the first row,
    which all rows share if R is the identity. Distances are mean squared errors.
    """

    def read(state: State) -> Mapping[str, Array]:
        covariance = state.root[0] @ state.root[0].T
        uncertainty = _log_determinant(state.root[0])[None]
        mean, flat = state.mean.ravel(), covariance.ravel()
        return {"mean": mean, "covariance": flat, "uncertainty": uncertainty}

    return Beliefs(bayes_linear(domain), read, lambda answer, best: jnp.mean((answer - best) ** 2))


def _log_determinant(root: Float[Array, "n n"]) -> Float[Array, ""]:
    """Returns log det S Sᵀ from the root S, which float32 represents better than the product.

    Orthogonalises row by row (Gram–Schmidt): library calls can deadlock when several CPU devices
    make them at once, each waiting for the other's threads.
    """
    log_det = jnp.zeros(())
    for k in range(len(root)):
        row = root[k]
        squared_norm = row @ row
        log_det = log_det + jnp.log(squared_norm)
        root = root - jnp.outer(root @ row, row) / squared_norm
    return log_det


def bandit_beliefs(domain: ContextualBandit) -> Beliefs:
    """Makes the beliefs of the bandit, which read each action's probability in each context.

    These are "mean" [K n], and as "uncertainty" the entropy in each context [K]. Distances are
    KL(best policy ‖ policy), in nats. Raises `ConfigError` for permutations, whose contexts are not
    independent.
    """
    check(not domain.permutation, "permutation", True, "must be False, for independent contexts")

    def read(state: State) -> Mapping[str, Array]:
        posterior = jax.nn.softmax(state)
        entropy = jax.scipy.special.entr(posterior).sum(-1)
        return {"mean": posterior.ravel(), "uncertainty": entropy}

    def distance(answer: Answer, best: Answer) -> Array:
        log_p, log_q = jax.nn.log_softmax(best), jax.nn.log_softmax(answer)
        p = jnp.exp(log_p)
        return jnp.sum(jnp.where(p > 0, p * (jnp.where(p > 0, log_p, 0) - log_q), 0))

    return Beliefs(bayes_bandit(domain), read, distance)


def flat_carry(carry: Carry) -> Float[Array, " D"]:
    """Flattens the carry of a recurrent cell, such as (h, c) of an LSTM, into one vector."""
    return ravel_pytree(carry)[0]


def mean_cached_values(carry: Carry) -> Float[Array, " D"]:
    """Returns the means over tokens of the values in a transformer's cache, layer after layer.

    The cache itself grows with the episode. Uniform attention would read these means out of it.
    """
    _, memories = carry
    means = [values.sum(0).ravel() / jnp.maximum(t, 1) for _, values, t in memories]
    return jnp.concatenate(means)


class PairState(NamedTuple):
    """The states of a network and of Bayes within one episode."""

    network: State
    bayes: State
    record: Mapping[str, Array]
    """Record of the last update; zeros before the first."""


class Beside:
    """A meta-learner that records Bayes' state beside its own, on the pairs of its own episodes.

    Its answers are those it gives alone. Its record at time t holds `state`, read from the carry,
    which contains x_1 … x_t and y_1 … y_{t−1}; the readings of Bayes after the same t − 1 pairs;
    `query`, x_t as the network reads it; and `distance`, of its t-th answer from that of Bayes.
    States are recorded in half precision, finer than decoding can resolve. `read` maps the carry to
    the recorded `state`.
    """

    def __init__(
        self,
        meta: MetaLearner,
        domain: Domain,
        beliefs: Beliefs,
        read: Callable[[Carry], Float[Array, " D"]] = flat_carry,
    ):
        self.meta, self.domain, self.beliefs, self.read = meta, domain, beliefs, read
        self.heads, self.cached_episodes = meta.heads, mesh.cached_episodes(meta)
        self.init, self.unroll = meta.init, meta.unroll
        self.rates = getattr(meta, "rates", None)
        self.check = getattr(meta, "check", lambda: None)

    def learner(self, params: Params) -> Learner:
        """Makes the learner with these outer parameters, and Bayes beside it."""
        network, bayes, domain = self.meta.learner(params), self.beliefs.learner, self.domain

        def record(belief: State, carry: Carry, query: Array, distance: Array) -> dict[str, Array]:
            readings = {**self.beliefs.read(belief), "state": self.read(carry)}
            return readings | {"query": query, "distance": distance}

        def init(key: Key) -> PairState:
            state, belief = network.init(key), bayes.init(key)
            query = jnp.zeros(encoded_shapes(domain)[0])
            first = record(belief, state.carry, query, jnp.zeros(()))
            zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), first)
            return PairState(state, belief, zeros)

        def predict(state: PairState, query: Query) -> Answer:
            return network.predict(state.network, query)

        def update(state: PairState, query: Query, feedback: Feedback) -> PairState:
            answer, best = predict(state, query), bayes.predict(state.bayes, query)
            after = network.update(state.network, query, feedback)
            distance = self.beliefs.distance(answer, best)
            latest = record(state.bayes, after.carry, domain.encode_query(query), distance)
            return PairState(after, bayes.update(state.bayes, query, feedback), latest)

        def diagnose(state: PairState) -> Mapping[str, Array]:
            return {**state.record, "state": state.record["state"].astype(jnp.float16)}

        return Learner(init, predict, update, diagnose=diagnose)


SOURCES = ("none", "own", "other", "fresh", "bayes")
"""Origins of the states whose losses `implanted` records: of the network, its copies, and Bayes."""


class ImplantedState(NamedTuple):
    """The states of a network left alone beside Bayes, and of copies whose carries are replaced."""

    alone: PairState
    copies: State
    """Stacked states of three copies of the network: "own", "other" and "fresh"."""
    time: Int[Array, ""]
    donor: Int[Array, ""]
    """Index of the episode, among those of the fit, whose posterior "other" gets."""
    record: Mapping[str, Array]


def implanted(beside: Beside, at: int = 5, episodes: int = 512) -> Derived:
    """Replaces a trained recurrent network's carry in mid-episode by one made of Bayes' state.

    Copies of the network are stepped beside each other. They differ in the carry that they get
    after update `at`.

    For the copy "own", ridge regression predicts the carry from Bayes' posterior after the same
    pairs and from the query last read: all else that the carry held is lost. Controls are "other",
    whose carry comes from the posterior of another task; "fresh", which gets the carry at an
    episode's beginning; and "none", the network left alone. The last feedback, which no carry holds
    yet, stays. All see the same pairs. In domains where answers affect the feedback, these are the
    pairs of the network left alone.

    The learner records `losses`, in the order of `SOURCES`; `shift`, the distances of the copies'
    last answers from that of the network left alone; `size`, the mean square of the latter; and
    `after`, 1 if the answers came after the replacement, else 0. The ridge regression is fitted on
    `episodes` episodes of training, 512 by our choice. Raises `ConfigError` unless
    1 ≤ `at` < `domain.steps`.
    """
    domain, beliefs = beside.domain, beside.beliefs
    check(at >= 1, "at", at, "must be 1 or more")
    hint = f"must be above {at}, the step after which states are replaced"
    check(at < domain.steps, "steps", domain.steps, hint)

    def make(params: Params) -> Learner:
        learner = beside.learner(params)
        network, bayes = beside.meta.learner(params), beliefs.learner
        fresh, unflatten = ravel_pytree(learner.init(jax.random.key(0)).network.carry)
        keys = jax.random.split(jax.random.key(0), episodes)
        donors = jax.vmap(partial(_record_at, domain, at, learner))(keys)
        predict_carry = _ridge(_features(donors), donors["state"])

        def init(key: Key) -> ImplantedState:
            alone = learner.init(key)
            copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), alone.network)
            donor = jax.random.randint(key, (), 0, episodes)
            zeros = {
                "after": jnp.zeros(()),
                "losses": jnp.zeros(len(SOURCES)),
                "shift": jnp.zeros(3),
                "size": jnp.zeros(()),
            }
            return ImplantedState(alone, copies, jnp.int32(0), donor, zeros)

        def predict(state: ImplantedState, query: Query) -> Answer:
            return learner.predict(state.alone, query)

        def update(state: ImplantedState, query: Query, feedback: Feedback) -> ImplantedState:
            answer, best = predict(state, query), bayes.predict(state.alone.bayes, query)
            answers = jax.vmap(network.predict, (0, None))(state.copies, query)
            all_answers = jnp.concatenate([answer[None], answers, best[None]])
            latest = {
                "after": jnp.where(state.time >= at, 1.0, 0.0),
                "losses": jax.vmap(domain.loss, (0, None))(all_answers, feedback),
                "shift": jax.vmap(beliefs.distance, (0, None))(answers, answer),
                "size": jnp.mean(answer**2),
            }
            alone = learner.update(state.alone, query, feedback)
            copies = jax.vmap(network.update, (0, None, None))(state.copies, query, feedback)
            donor = jax.tree.map(lambda leaf: leaf[state.donor], donors)
            own, other = (
                unflatten(predict_carry(_features(record)))
                for record in (alone.record, {**donor, "query": alone.record["query"]})
            )
            new = jax.tree.map(lambda *leaves: jnp.stack(leaves), own, other, unflatten(fresh))
            replace = lambda new, old: jnp.where(state.time + 1 == at, new, old)
            copies = copies._replace(carry=jax.tree.map(replace, new, copies.carry))
            return ImplantedState(alone, copies, state.time + 1, state.donor, latest)

        return Learner(init, predict, update, diagnose=lambda state: state.record)

    return Derived(beside, make)


def _record_at(domain: Domain, at: int, learner: Learner, key: Key) -> Mapping[str, Array]:
    """Returns the record at time `at` of an episode of training."""
    key_task, key_init, key_steps = jax.random.split(key, 3)
    task = domain.sample_task(key_task)

    def step(state: PairState, key: Key) -> tuple[PairState, None]:
        answer, keys = partial(learner.predict, state), jax.random.split(key)
        query, _, feedback = inner.interact(domain, task, answer, keys)
        return learner.update(state, query, feedback), None

    keys = jax.random.split(key_steps, at)
    return jax.lax.scan(step, learner.init(key_init), keys)[0].record


def _features(record: Mapping[str, Array]) -> Float[Array, "*episodes p"]:
    """Concatenates what predicts the carry in a record: the readings of Bayes, and the query."""
    vectors = [record[name] for name in sorted({*record} - {"state", "distance"})]
    return jnp.concatenate(vectors, axis=-1)


def _ridge(x: Float[Array, "n p"], y: Float[Array, "n q"]) -> Callable[[Array], Array]:
    """Fits ridge regression of y on standardised x, with penalty 1: returns it as a function."""
    x_mean, x_std, y_mean = x.mean(0), x.std(0), y.mean(0)
    standardise = lambda x: (x - x_mean) / jnp.where(x_std > 0, x_std, 1.0)
    learner = ridge(x.shape[1], y.shape[1], 1.0)
    pairs = standardise(x), y - y_mean
    fitted, _ = jax.lax.scan(
        lambda state, pair: (learner.update(state, *pair), None),
        learner.init(jax.random.key(0)),
        pairs,
    )
    return lambda x: y_mean + learner.predict(fitted, standardise(x))
