"""Exact Bayesian learners for priors that are not Gaussian: mixtures of Gaussians, task pools."""

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
    """The posterior under each of S Gaussian priors, and the evidence for each prior."""

    posteriors: Posterior
    log_evidence: Float[Array, " S"]
    """log p(y_1 … y_t | x_1 … x_t) under each prior, up to a constant."""


def bayes_mixture(models: Sequence[Gaussian]) -> Learner:
    """Makes exact Bayes for a mixture of Gaussian priors, all equally likely at first.

    The answer is the mean of the models' posterior means, weighted by their evidence. Each target
    adds its log predictive density to a model's log evidence. The models must have the same
    features. Raises `ConfigError` if there is no model.
    """
    check(len(models) > 0, "models", models, "give at least one")
    priors = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[model.prior for model in models])
    bases = jnp.stack([model.basis for model in models])
    variances = jnp.asarray([model.variance for model in models], jnp.float32)
    features = models[0].features

    def predict(state: MixtureState, x: Array) -> Array:
        answers = jax.vmap(lambda Q, mean: Q @ (mean @ features(x)))(bases, state.posteriors.mean)
        return jax.nn.softmax(state.log_evidence) @ answers

    def update(state: MixtureState, x: Array, y: Array) -> MixtureState:
        phi = features(x)

        def update_one(posterior: Posterior, Q: Array, variance: Array) -> tuple[Posterior, Array]:
            error = Q.T @ y - posterior.mean @ phi
            y_variance = ((posterior.root.mT @ phi) ** 2).sum(-1) + variance
            log_density = -0.5 * (error**2 / y_variance + jnp.log(y_variance)).sum()
            return condition(posterior, phi, Q.T @ y, variance), log_density

        posteriors, log_densities = jax.vmap(update_one)(state.posteriors, bases, variances)
        return MixtureState(posteriors, state.log_evidence + log_densities)

    return Learner(lambda key: MixtureState(priors, jnp.zeros(len(models))), predict, update)


def bayes_memorising(pool: Pool) -> Learner:
    """Makes exact Bayes for tasks y = W x + ε whose W is one of those in a finite pool.

    Its answers weight each W by its likelihood: the minimum mean-square estimator of discrete tasks
    in Raventós et al. (2023), arXiv:2306.15063, eq. 3. The state is the log posterior [size].
    """
    size, variance = pool.size, pool.domain.sigma**2

    W = jax.jit(inner.full_precision(lambda: jax.vmap(pool.task)(jnp.arange(size)).W))()

    def predict(state: Float[Array, " size"], x: Array) -> Array:
        return jnp.tensordot(jax.nn.softmax(state), W, 1) @ x

    def update(state: Float[Array, " size"], x: Array, y: Array) -> Array:
        return state - ((y - W @ x) ** 2).sum(-1) / (2 * variance)

    return Learner(lambda key: jnp.zeros(size), predict, update)
