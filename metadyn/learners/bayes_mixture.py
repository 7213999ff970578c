"""Exact Bayes under priors that are not Gaussian: a mixture of Gaussians, a pool of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from metadyn import inner
from metadyn.base import Learner
from metadyn.domains.distributions import Pool
from metadyn.errors import check
from metadyn.learners.bayes import Gaussian, Posterior, condition


class MixtureState(NamedTuple):
    """What is known under each of S priors, and the evidence for each."""

    posteriors: Posterior
    log_evidence: Float[Array, " S"]
    """log p(y_1 … y_t | x_1 … x_t) under each, up to a constant."""


def bayes_mixture(models: Sequence[Gaussian]) -> Learner:
    """Answers by the posterior mean under several Gaussian priors, all equally likely at first.

    It is the mean of the models' own posterior means, weighted by their evidence, which grows by
    the log density of each target as it was foretold. The models have the same features. Raises
    `ConfigError` for none.
    """
    check(len(models) > 0, "models", models, "mix at least one")
    stacked = lambda leaves: jax.tree.map(lambda *each: jnp.stack(each), *leaves)
    priors, bases = (stacked([model[i] for model in models]) for i in (0, 3))
    variances = jnp.asarray([model.variance for model in models], jnp.float32)
    features = models[0].features

    def predict(state: MixtureState, x: Array) -> Array:
        answers = jax.vmap(lambda Q, mean: Q @ (mean @ features(x)))(bases, state.posteriors.mean)
        return jax.nn.softmax(state.log_evidence) @ answers

    def update(state: MixtureState, x: Array, y: Array) -> MixtureState:
        phi = features(x)

        def one(posterior: Posterior, Q: Array, variance: Array) -> tuple[Posterior, Array]:
            error = Q.T @ y - posterior.mean @ phi
            foretold = ((posterior.root.mT @ phi) ** 2).sum(-1) + variance
            density = -0.5 * (error**2 / foretold + jnp.log(foretold)).sum()
            return condition(posterior, phi, Q.T @ y, variance), density

        posteriors, density = jax.vmap(one)(state.posteriors, bases, variances)
        return MixtureState(posteriors, state.log_evidence + density)

    return Learner(lambda key: MixtureState(priors, jnp.zeros(len(models))), predict, update)


def bayes_memorising(pool: Pool) -> Learner:
    """Answers by the posterior mean of W where W is that of one of a pool of tasks y = W x + ε.

    Each task counts by its likelihood: the minimum mean-square estimator of discrete tasks in
    Raventós et al. (2023), arXiv:2306.15063, eq. 3. The state is the log posterior [size].
    """
    size, variance = pool.size, pool.domain.sigma**2

    W = jax.jit(inner.full_precision(lambda: jax.vmap(pool.task)(jnp.arange(size)).W))()

    def predict(state: Float[Array, " size"], x: Array) -> Array:
        return jnp.tensordot(jax.nn.softmax(state), W, 1) @ x

    def update(state: Float[Array, " size"], x: Array, y: Array) -> Array:
        return state - ((y - W @ x) ** 2).sum(-1) / (2 * variance)

    return Learner(lambda key: jnp.zeros(size), predict, update)
