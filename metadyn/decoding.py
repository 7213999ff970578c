"""Decoding: how much of one thing can be read out of another, on tasks held out from the fit.

Works on stored arrays [seed, task, step, number]; a fit is made for each seed and step on every
other task, and judged on the tasks between. R² is 1 where all is decoded and 0 where nothing is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from jaxtyping import Array, Float

from metadyn import dynamics

Samples = Float[np.ndarray, "seed task step _"]
Decoder = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""`decode(x [..., n, p], y [..., n, q], new [..., m, p])` fits y to x; what it says of `new`."""
PENALTIES = 10.0 ** np.arange(-7, 4)
"""Of ridge regression, times the number of samples: the best by cross-validation is taken."""
HIDDEN, UPDATES, RATE, DECAY = 32, 150, 1e-2, 1e-1
"""Of the perceptron: its width, and updates, rate and weight decay of AdamW. Our choice."""


class Decoded(NamedTuple):
    """What decoding leaves unexplained on held-out tasks, and what there was to explain.

    Over outer training there is an axis of checkpoints before the steps.
    """

    left: Float[np.ndarray, "seed task *checkpoint step"]
    """Squared error of what was decoded, summed over its numbers."""
    total: Float[np.ndarray, "seed task *checkpoint step"]
    """Squared distance from the mean over the tasks of the fit."""

    def at(self, checkpoint: int) -> Decoded:
        """What was decoded at one checkpoint."""
        return Decoded(*(part[:, :, checkpoint] for part in self))


def ridge(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Ridge regression with an intercept, on standardised x; a `Decoder`.

    The penalty is that of `PENALTIES` with the least generalised cross-validation error (Golub,
    Heath & Wahba 1979), for each of the leading axes. Computed in float64.
    """
    n, centre = x.shape[-2], y.mean(-2, keepdims=True)
    z, z_new = _standard(x, new)
    eigenvalues, V = np.linalg.eigh(np.swapaxes(z, -1, -2) @ z / n)
    a, residual = z @ V, y - centre
    b = np.swapaxes(a, -1, -2) @ residual / n

    def coefficients(penalty: np.ndarray) -> np.ndarray:
        return b / (np.maximum(eigenvalues, 0) + penalty)[..., None]

    def error(penalty: float) -> np.ndarray:
        used = 1 + (eigenvalues / (eigenvalues + penalty)).sum(-1)  # degrees of freedom
        left = ((residual - a @ coefficients(np.asarray(penalty))) ** 2).sum((-1, -2))
        return left / np.maximum(1 - used / n, 1e-6) ** 2

    best = PENALTIES[np.argmin([error(penalty) for penalty in PENALTIES], axis=0)]
    return centre + z_new @ (V @ coefficients(best[..., None]))


def perceptron(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Ridge regression, and a small perceptron of what it leaves unexplained; a `Decoder`.

    So it finds what is there in linear form, and in another. The perceptron is trained by AdamW on
    three quarters of the samples and stopped where it explains most of the others.
    """
    kept = 3 * x.shape[-2] // 4
    both = np.concatenate([x, new], -2)
    linear = ridge(x[..., :kept, :], y[..., :kept, :], both)
    left = y - linear[..., : x.shape[-2], :]
    spread = left.std(-2, keepdims=True)
    spread = np.where(spread > 0, spread, 1.0)
    parts = _standard(x, both)[1], left / spread
    flat = [jnp.asarray(a.reshape(-1, *a.shape[-2:]), jnp.float32) for a in parts]
    found = np.asarray(_perceptrons(*flat, kept), np.float64).reshape(*both.shape[:-1], -1)
    return (linear + spread * found)[..., x.shape[-2] :, :]


@partial(jax.jit, static_argnames="kept")
def _perceptrons(
    x: Float[Array, "fit m p"], y: Float[Array, "fit n q"], kept: int
) -> Float[Array, "fit m q"]:
    """One for each fit, in turn: what each says of all x, of which the first n are those of y."""
    optimizer = optax.adamw(RATE, weight_decay=DECAY)
    p, q, n = x.shape[-1], y.shape[-1], y.shape[-2]
    inner = jax.random.normal(jax.random.key(0), (p, HIDDEN)) / jnp.sqrt(p)
    start = inner, jnp.zeros(HIDDEN), jnp.zeros((HIDDEN, q)), jnp.zeros(q)

    def answer(weights, x):
        W1, b1, W2, b2 = weights
        return jax.nn.gelu(x @ W1 + b1) @ W2 + b2

    def fit(given):
        x, y = given
        loss = lambda weights, some: jnp.mean((answer(weights, x[:n][some]) - y[some]) ** 2)

        def step(carry, _):
            weights, moments, best, least = carry
            now = loss(weights, slice(kept, None))
            best = jax.tree.map(lambda a, b: jnp.where(now < least, a, b), weights, best)
            gradient = jax.grad(loss)(weights, slice(kept))
            changes, moments = optimizer.update(gradient, moments, weights)
            weights = optax.apply_updates(weights, changes)
            return (weights, moments, best, jnp.minimum(now, least)), None

        first = start, optimizer.init(start), start, jnp.inf
        return answer(jax.lax.scan(step, first, None, UPDATES)[0][2], x)

    return jax.lax.map(fit, (x, y))


def held_out(x: Samples, y: Samples, decode: Decoder = ridge) -> Decoded:
    """Decodes y from x of the same task: fitted on even tasks, judged on odd ones."""
    x, y = (np.swapaxes(np.asarray(each, np.float64), 1, 2) for each in (x, y))
    fit, new = (y[:, :, each] for each in (slice(0, None, 2), slice(1, None, 2)))
    found = decode(x[:, :, ::2], fit, x[:, :, 1::2])
    parts = new - found, new - fit.mean(2, keepdims=True)
    return Decoded(*(np.swapaxes((each**2).sum(-1), 1, 2) for each in parts))


def vectors(data: xr.Dataset, *names: str) -> Samples:
    """Vectors that were recorded, end to end, at each time but the first, so far as there are."""
    found = [dynamics.samples(data, name) for name in names if name in data]
    return np.concatenate(found, -1)[:, :, 1:]


def of_state(data: xr.Dataset, what: str, decode: Decoder = ridge) -> Decoded:
    """Decodes a vector recorded beside a network's state from that state, at each checkpoint."""
    each = [data.isel(outer_step=i) for i in range(data.sizes["outer_step"])]
    found = [held_out(vectors(one, "state"), vectors(one, what), decode) for one in each]
    return Decoded(*(np.stack(parts, 2) for parts in zip(*found, strict=True)))


def both_ways(data: xr.Dataset) -> tuple[Decoded, Decoded]:
    """Simulates Bayes' state from a network's, and a network's from Bayes' and its last query.

    After Mikulik et al. (2020), arXiv:2010.11223, whose dissimilarity of states is 1 − R².
    """
    state, bayes = vectors(data, "state"), vectors(data, "mean", "covariance", "uncertainty")
    told = np.concatenate([bayes, vectors(data, "query")], -1)
    return held_out(state, bayes), held_out(told, state)


def shuffled(y: Samples) -> Samples:
    """The same numbers with those of other tasks in their place: a control, where R² is 0."""
    return np.roll(y, 2, axis=1)


def explained(left: dynamics.Numbers, total: dynamics.Numbers) -> np.ndarray:
    """R² = 1 − left / total, of means over seeds and tasks; NaN with nothing to explain."""
    with np.errstate(all="ignore"):
        return np.where(total > 0, 1 - left / total, np.nan)


def over_steps(left: np.ndarray, total: np.ndarray) -> np.ndarray:
    """R², mean over the steps."""
    return np.asarray(explained(left, total).mean(-1))


def r_squared(decoded: Decoded) -> dynamics.Estimate:
    """R² at each step, with its interval over held-out tasks and seeds."""
    return dynamics.estimate(explained, *decoded)


def _standard(x: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in units of the standard deviation of x from its mean; constants are left alone."""
    mean, spread = x.mean(-2, keepdims=True), x.std(-2, keepdims=True)
    spread = np.where(spread > 1e-12, spread, 1.0)
    return (x - mean) / spread, (new - mean) / spread


def delay(steps: np.ndarray, r2: np.ndarray, excess: np.ndarray) -> np.ndarray:
    """How many doublings of the outer step what is decoded appears after the behaviour.

    From R² and excess loss [..., outer_step], each timed half-way from untrained to trained: R² on
    a linear scale, excess loss on a logarithmic one.
    """
    with np.errstate(all="ignore"):
        both = np.stack([r2, -np.log(excess)], -1)
        share = (both - both[..., :1, :]) / (both[..., -1:, :] - both[..., :1, :])
    t = dynamics.learning_times(np.log2(1 + steps), share)
    return np.asarray(t[..., 0] - t[..., 1])
