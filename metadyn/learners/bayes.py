"""Exact Bayes and its plain relations, by closed-form updates after each pair."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from metadyn.base import Learner, Query, kept
from metadyn.domains.bandit import ContextualBandit, Outcome
from metadyn.domains.fourier import FourierRegression, fourier_features
from metadyn.domains.linear import LinearRegression
from metadyn.errors import check, check_choice

BanditPolicy = Literal["greedy", "thompson"]
MOST_PERMUTATIONS = 5040  # 7 contexts of 7 actions: our choice
TIE = 1e-4  # log-posteriors this close are equal: in float32, over an episode


class Posterior(NamedTuple):
    """Independent Gaussian posteriors over the rows of a weight matrix."""

    mean: Float[Array, "rows n"]
    root: Float[Array, "rows n n"]
    """S with covariance S Sᵀ: kept as a root, so that it stays one in float32 for any noise."""


def condition(
    posterior: Posterior,
    x: Float[Array, " n"],
    y: Float[Array, " rows"],
    variance: float | Float[Array, ""],
) -> Posterior:
    """Conditions W [rows, n] on a pair y = W x + noise of the given variance on each row.

    Potter's square-root update (Bierman 1977, Factorization Methods for Discrete Sequential
    Estimation, §II.3): algebraically the Kalman update, without its subtraction of covariances.
    """

    def row(mean, root, y):
        v = root.T @ x
        gain = root @ v / (v @ v + variance)
        shrink = 1 / (1 + jnp.sqrt(variance / (v @ v + variance)))
        return mean + gain * (y - mean @ x), root - shrink * jnp.outer(gain, v)

    return Posterior(*jax.vmap(row)(posterior.mean, posterior.root, y))


class Gaussian(NamedTuple):
    """Bayesian linear regression y = Q W φ(x) + noise, with independent rows of W."""

    prior: Posterior
    variance: float
    """Of the noise on each output."""
    features: Callable[[Query], Array]
    """φ."""
    basis: Float[Array, "rows rows"]
    """Q, orthogonal."""


def gaussian_linear(domain: LinearRegression) -> Gaussian:
    """Returns the domain's own prior MN(M, R, C) and noise σ².

    In the eigenbasis of R the outputs are independent: row i has prior covariance λ_i C.
    """
    eigenvalues, basis = np.linalg.eigh(domain.R)
    mean = jnp.asarray(basis.T @ domain.M, jnp.float32)
    roots = np.sqrt(eigenvalues)[:, None, None] * np.linalg.cholesky(domain.C)
    prior = Posterior(mean, jnp.asarray(roots, jnp.float32))
    return Gaussian(prior, domain.sigma**2, lambda x: x, jnp.asarray(basis, jnp.float32))


def gaussian_fourier(
    domain: FourierRegression, frequencies: tuple[int, ...] | None = None
) -> Gaussian:
    """Returns the domain's own prior on Fourier features of frequencies, by default its support.

    Without noise the update has σ² = 1e-6 Σ_k v_k: in float32, its limit.
    """
    support, v = frequencies or domain.support, np.asarray(domain.spectrum)
    variances = [*v[list(support)], *(v[k] for k in support if k > 0)]
    noise = max(domain.sigma**2, 1e-6 * float(v.sum()))
    roots = jnp.asarray(np.diag(np.sqrt(variances))[None], jnp.float32)
    prior = Posterior(jnp.zeros((1, len(variances))), roots)
    return Gaussian(prior, noise, lambda x: fourier_features(x, support), jnp.eye(1))


@kept
def bayes_linear(domain: LinearRegression) -> Learner:
    """Answers by the posterior mean of W under the domain's own prior MN(M, R, C) and noise σ²."""
    return _regression(gaussian_linear(domain))


@kept
def bayes_fourier(domain: FourierRegression) -> Learner:
    """Answers by the posterior mean of f: Bayesian regression on the Fourier features of the prior.

    It is the Gaussian process with kernel Σ_k v_k cos 2πk(x − x').
    """
    return _regression(gaussian_fourier(domain))


def _regression(model: Gaussian) -> Learner:
    """The learner that answers with the posterior mean."""
    prior, variance, features, Q = model
    predict = lambda state, x: Q @ (state.mean @ features(x))
    update = lambda state, x, y: condition(state, features(x), Q.T @ y, variance)
    return Learner(lambda key: prior, predict, update)


@kept
def bayes_bandit(domain: ContextualBandit, policy: BanditPolicy = "greedy") -> Learner:
    """Keeps the exact posterior over a*, and answers by a policy on it.

    greedy     the most probable actions, evenly. With deterministic pay it is Bayes-optimal: it
               tries what is not ruled out, the likeliest first, then exploits. (For independent
               contexts no try is worth more than another. For permutations it equals the optimum by
               enumeration in every case that the tests try; we know no proof.) With Bernoulli pay
               it is an approximation, which never pays to explore.
    thompson   each action with the probability that it is the correct one: Thompson sampling
               (1933). The same as greedy for independent contexts with deterministic pay, an
               approximation otherwise.

    The state is the logarithm of the posterior: of each action in each context [K, n], or, for
    permutations, of each of the n! / (n − K)! assignments.
    """
    check_choice("policy", policy, BanditPolicy)
    K, n = domain.contexts, domain.actions
    if domain.permutation:
        count = math.perm(n, K)
        fix = f"{count} permutations are too many to enumerate: at most {MOST_PERMUTATIONS}"
        check(count <= MOST_PERMUTATIONS, "actions", n, fix)
        assignments = jnp.asarray(list(itertools.permutations(range(n), K)), jnp.int32)
        prior = jnp.zeros(len(assignments))
    else:
        prior = jnp.zeros((K, n))

    def marginal(state: Array, c: Int[Array, ""]) -> Float[Array, " n"]:
        """Computes log P(a*_c = a), up to a constant."""
        if not domain.permutation:
            return state[c]
        given = assignments[:, c, None] == jnp.arange(n)
        return jax.nn.logsumexp(jnp.where(given, state[:, None], -jnp.inf), axis=0)

    def predict(state: Array, c: Int[Array, ""]) -> Float[Array, " n"]:
        log_posterior = jax.nn.log_softmax(marginal(state, c))
        if policy == "thompson":
            return log_posterior
        likeliest = log_posterior > log_posterior.max() - TIE
        return jnp.where(likeliest, 0.0, -jnp.inf)

    def update(state: Array, c: Int[Array, ""], seen: Outcome) -> Array:
        paid = seen.reward > 0
        hit, miss = (jnp.log(jnp.where(paid, p, 1 - p)) for p in (domain.p_high, domain.p_low))
        if domain.permutation:
            return state + jnp.where(assignments[:, c] == seen.action, hit, miss)
        return state.at[c].add(jnp.where(jnp.arange(n) == seen.action, hit, miss))

    return Learner(lambda key: prior, predict, update)


@kept
def ridge(n_x: int, n_y: int, penalty: float) -> Learner:
    """Makes ridge regression, argmin_W Σ ‖y − W x‖² + penalty ‖W‖², online.

    It is the posterior mean under iid weights of variance 1 / penalty and noise of variance 1.
    """
    check(penalty > 0, "penalty", penalty, "must be positive")
    roots = jnp.broadcast_to(jnp.eye(n_x) / penalty**0.5, (n_y, n_x, n_x))
    prior = Posterior(jnp.zeros((n_y, n_x)), roots)
    return _regression(Gaussian(prior, 1.0, lambda x: x, jnp.eye(n_y)))
