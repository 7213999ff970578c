"""Exact Bayesian learners and ridge regression, with closed-form updates after each pair."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from metadyn.base import Learner, Query, cached_concrete
from metadyn.domains.bandit import ContextualBandit, Outcome
from metadyn.domains.fourier import FourierRegression, fourier_features
from metadyn.domains.linear import LinearRegression
from metadyn.errors import check, check_choice

BanditPolicy = Literal["greedy", "thompson"]
MAX_PERMUTATIONS = 5040  # 7!, those of 7 contexts and 7 actions: our choice
TIE = 1e-4  # log-posteriors closer than this count as equal: float32 rounds over an episode


class Posterior(NamedTuple):
    """Independent Gaussian posteriors over the rows of a weight matrix."""

    mean: Float[Array, "rows n"]
    root: Float[Array, "rows n n"]
    """S, with covariance S Sᵀ: this form stays a valid covariance in float32 for any noise."""


def condition(
    posterior: Posterior,
    x: Float[Array, " n"],
    y: Float[Array, " rows"],
    variance: float | Float[Array, ""],
) -> Posterior:
    """Returns the posterior of W [rows, n] after a pair y = W x + noise of `variance` on each row.

    Uses Potter's square-root update (Bierman 1977, Factorization Methods for Discrete Sequential
    Estimation, §II.3): algebraically the Kalman update, but it subtracts no covariances.
    """

    def condition_row(mean, root, y):
        v = root.T @ x
        gain = root @ v / (v @ v + variance)
        shrink = 1 / (1 + jnp.sqrt(variance / (v @ v + variance)))
        return mean + gain * (y - mean @ x), root - shrink * jnp.outer(gain, v)

    return Posterior(*jax.vmap(condition_row)(posterior.mean, posterior.root, y))


class Gaussian(NamedTuple):
    """Model of Bayesian linear regression, y = Q W φ(x) + noise, with independent rows of W."""

    prior: Posterior
    variance: float
    """Variance of the noise on each output."""
    features: Callable[[Query], Array]
    """Feature map φ."""
    basis: Float[Array, "rows rows"]
    """Orthogonal matrix Q."""


def gaussian_linear(domain: LinearRegression) -> Gaussian:
    """Returns the Gaussian model with the domain's own prior MN(M, R, C) and noise variance σ².

    In the eigenbasis Q of R the outputs are independent: row i of W has prior covariance λ_i C.
    """
    eigenvalues, basis = np.linalg.eigh(domain.R)
    mean = jnp.asarray(basis.T @ domain.M, jnp.float32)
    roots = np.sqrt(eigenvalues)[:, None, None] * np.linalg.cholesky(domain.C)
    prior = Posterior(mean, jnp.asarray(roots, jnp.float32))
    return Gaussian(prior, domain.sigma**2, lambda x: x, jnp.asarray(basis, jnp.float32))


def gaussian_fourier(
    domain: FourierRegression, frequencies: tuple[int, ...] | None = None
) -> Gaussian:
    """Returns the Gaussian model with the domain's own prior, on Fourier features of `frequencies`.

    By default these are the domain's support. The model's noise variance is at least 1e-6 Σ_k v_k,
    which in float32 gives the limit without noise.
    """
    support, v = frequencies or domain.support, np.asarray(domain.spectrum)
    variances = [*v[list(support)], *(v[k] for k in support if k > 0)]
    noise = max(domain.sigma**2, 1e-6 * float(v.sum()))
    roots = jnp.asarray(np.diag(np.sqrt(variances))[None], jnp.float32)
    prior = Posterior(jnp.zeros((1, len(variances))), roots)
    return Gaussian(prior, noise, lambda x: fourier_features(x, support), jnp.eye(1))


@cached_concrete
def bayes_linear(domain: LinearRegression) -> Learner:
    """Makes exact Bayes, answering E[W] x for the domain's own prior MN(M, R, C) and noise σ²."""
    return _learner(gaussian_linear(domain))


@cached_concrete
def bayes_fourier(domain: FourierRegression) -> Learner:
    """Makes exact Bayes, which answers E[f(x)] by regression on the Fourier features of the prior.

    This is Gaussian-process regression with the kernel Σ_k v_k cos 2πk(x − x').
    """
    return _learner(gaussian_fourier(domain))


def _learner(model: Gaussian) -> Learner:
    """Makes the learner that answers with the posterior mean of the model's outputs."""
    prior, variance, features, Q = model
    predict = lambda state, x: Q @ (state.mean @ features(x))
    update = lambda state, x, y: condition(state, features(x), Q.T @ y, variance)
    return Learner(lambda key: prior, predict, update)


@cached_concrete
def bayes_bandit(domain: ContextualBandit, policy: BanditPolicy = "greedy") -> Learner:
    """Makes a learner that keeps the exact posterior over a* and answers with a policy based on it.

    greedy     Chooses evenly among the most probable actions. With deterministic pay this is
               Bayes-optimal: it tries actions that are not ruled out, the likeliest first, then
               exploits. (For independent contexts no try is worth more than another. For
               permutations it equals the optimum by enumeration in every case that the tests try;
               we know no proof.) With Bernoulli pay it is an approximation, which never gives up
               reward to explore.
    thompson   Chooses each action with the probability that it is correct: Thompson sampling
               (1933). It equals greedy for independent contexts with deterministic pay, and is an
               approximation otherwise.

    The state is the log posterior, up to a constant: of each action in each context [K, n], or, for
    permutations, of each of the n! / (n − K)! assignments. Raises `ConfigError` for too many.
    """
    check_choice("policy", policy, BanditPolicy)
    K, n = domain.contexts, domain.actions
    if domain.permutation:
        count = math.perm(n, K)
        hint = f"{count} permutations are too many to enumerate: at most {MAX_PERMUTATIONS}"
        check(count <= MAX_PERMUTATIONS, "actions", n, hint)
        assignments = jnp.asarray(list(itertools.permutations(range(n), K)), jnp.int32)
        prior = jnp.zeros(len(assignments))
    else:
        prior = jnp.zeros((K, n))

    def marginal(state: Array, c: Int[Array, ""]) -> Float[Array, " n"]:
        """Computes log P(a*_c = a) for each action a, up to a constant."""
        if not domain.permutation:
            return state[c]
        assigned = assignments[:, c, None] == jnp.arange(n)
        return jax.nn.logsumexp(jnp.where(assigned, state[:, None], -jnp.inf), axis=0)

    def predict(state: Array, c: Int[Array, ""]) -> Float[Array, " n"]:
        log_posterior = jax.nn.log_softmax(marginal(state, c))
        if policy == "thompson":
            return log_posterior
        likeliest = log_posterior > log_posterior.max() - TIE
        return jnp.where(likeliest, 0.0, -jnp.inf)

    def update(state: Array, c: Int[Array, ""], outcome: Outcome) -> Array:
        paid = outcome.reward > 0
        # Log-likelihoods of the reward if the action is the correct one, and if it is not.
        hit, miss = (jnp.log(jnp.where(paid, p, 1 - p)) for p in (domain.p_high, domain.p_low))
        if domain.permutation:
            return state + jnp.where(assignments[:, c] == outcome.action, hit, miss)
        return state.at[c].add(jnp.where(jnp.arange(n) == outcome.action, hit, miss))

    return Learner(lambda key: prior, predict, update)


@cached_concrete
def ridge(n_x: int, n_y: int, penalty: float) -> Learner:
    """Makes online ridge regression: W minimises Σ ‖y − W x‖² + penalty ‖W‖² over the pairs so far.

    W is the posterior mean for iid weights of variance 1 / penalty and noise of variance 1.
    """
    check(penalty > 0, "penalty", penalty, "must be positive")
    roots = jnp.broadcast_to(jnp.eye(n_x) / penalty**0.5, (n_y, n_x, n_x))
    prior = Posterior(jnp.zeros((n_y, n_x)), roots)
    return _learner(Gaussian(prior, 1.0, lambda x: x, jnp.eye(n_y)))
