"""Decoding: how much of one thing can be read out of another, on tasks held out from the fit.

And what that says of a network beside Bayes, whose state is decoded: its figures of merit. Works on
stored arrays [seed, task, step, number]; a fit is made for each seed and step on every other task,
and judged on the tasks between. R² is 1 where all is decoded and 0 where nothing is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from jaxtyping import Array, Float

from metadyn import dynamics, inner, trajectories
from metadyn.dynamics import Estimate, estimate
from metadyn.learners.beside_bayes import SOURCES

Samples = Float[np.ndarray, "seed task step _"]
Decoder = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""`decode(x [..., n, p], y [..., n, q], new [..., m, p])` fits y to x; what it says of `new`."""
PENALTIES = 10.0 ** np.arange(-7, 4)
"""Of ridge regression, times the number of samples: the best by cross-validation is taken."""
LEAST = 1e-2
"""Of the greatest standard deviation in a state: the least that a number of it is divided by."""
VARIES = 1e-5
"""Of a number's greatest size: the standard deviation from which on it is more than rounding."""
HIDDEN, UPDATES, RATE, DECAY = 32, 150, 1e-2, 1e-1
"""Of the MLP: its width, and updates, rate and weight decay of AdamW. Our choice."""

GOES_ON = {
    "none": "its own state",
    "own": "Bayes' state, mapped",
    "other": "that of another task",
    "fresh": "a fresh state",
}
"""What `learners.beside_bayes.implanted` lets a network go on from."""
MERITS = {
    "excess": "excess loss over Bayes",
    "distance": "distance of its answers from Bayes', over the steps recorded",
    "mean": "R² of the posterior mean, over the steps recorded",
    "least": "least R² of the posterior mean from the second step recorded",
    "untrained": "R² of the posterior mean, untrained",
    "shuffled": "R² of the posterior mean of another task",
    "uncertainty": "R² of the uncertainty, at the end",
    "nonlinear": "R² of the uncertainty, by an MLP too",
    "to_bayes": "R² of Bayes' state from its own",
    "from_bayes": "R² of its own state from Bayes'",
    "direction": "difference of R² of Bayes' state from its own and the other way",
    "delay": "doublings of the outer step by which the mean is later than behaviour",
    "kept": "share of what its state is worth that Bayes', mapped, keeps",
    "outputs": "shift of the next answer on Bayes' state, mapped, over its size",
} | {f"from_{source}": f"excess loss, going on from {said}" for source, said in GOES_ON.items()}
"""What is reported of a network beside Bayes, by name."""


class Decoded(NamedTuple):
    """What decoding leaves unexplained on held-out tasks, and what there was to explain.

    Over outer training there is an axis of checkpoints before the steps.
    """

    left: Float[np.ndarray, "seed task *checkpoint step"]
    """Squared error of what was decoded, summed over its numbers."""
    total: Float[np.ndarray, "seed task *checkpoint step"]
    """Squared distance from the mean over the tasks of the fit."""

    def at(self, checkpoint: int) -> Decoded:
        """Returns what was decoded at one checkpoint."""
        return Decoded(*(part[:, :, checkpoint] for part in self))


def ridge(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Decodes by ridge regression with an intercept, on standardised x; a `Decoder`.

    The penalty is that of `PENALTIES` with the least generalised cross-validation error (Golub,
    Heath & Wahba 1979), for each of the leading axes. Computed in float64.
    """
    n, centre = x.shape[-2], y.mean(-2, keepdims=True)
    z, z_new = _standard(x, new)
    eigenvalues, V = np.linalg.eigh(np.swapaxes(z, -1, -2) @ z / n)
    eigenvalues = np.maximum(eigenvalues, 0)
    b = np.swapaxes(V, -1, -2) @ (np.swapaxes(z, -1, -2) @ (y - centre) / n)
    penalty = PENALTIES.reshape(-1, *[1] * eigenvalues.ndim)
    shrunk = eigenvalues + penalty
    used = 1 + (eigenvalues / shrunk).sum(-1)  # degrees of freedom
    explained = ((b**2).sum(-1) * (shrunk + penalty) / shrunk**2).sum(-1)
    left = y.var(-2).sum(-1) - explained
    best = (left / np.maximum(1 - used / n, 1e-12) ** 2).argmin(0)
    return centre + z_new @ (V @ (b / (eigenvalues + PENALTIES[best][..., None])[..., None]))


def mlp(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Decodes by ridge regression and a small MLP of what it leaves unexplained; a `Decoder`.

    So it finds what is there in linear form, and in another. The MLP is trained by AdamW on
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
    found = np.asarray(_mlps(*flat, kept), np.float64).reshape(*both.shape[:-1], -1)
    return (linear + spread * found)[..., x.shape[-2] :, :]


@partial(jax.jit, static_argnames="kept")
@inner.full_precision
def _mlps(
    x: Float[Array, "fit m p"], y: Float[Array, "fit n q"], kept: int
) -> Float[Array, "fit m q"]:
    """One for each fit, in turn: what each says of all x, of which the first n are those of y."""
    optimizer = optax.adamw(RATE, weight_decay=DECAY)
    p, q, n = x.shape[-1], y.shape[-1], y.shape[-2]
    first = jax.random.normal(jax.random.key(0), (p, HIDDEN)) / jnp.sqrt(p)
    start = first, jnp.zeros(HIDDEN), jnp.zeros((HIDDEN, q)), jnp.zeros(q)

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


def of_state(data: xr.Dataset) -> dict[str, Decoded]:
    """Decodes parts of Bayes' posterior from a network's state beside it, at each checkpoint.

    The "mean", and that of another task, "shuffled"; the "uncertainty", and at the last checkpoint
    by an MLP too, "nonlinear".
    """
    each = [data.isel(outer_step=i) for i in range(data.sizes["outer_step"])]
    state = [vectors(one, "state") for one in each]

    def over(y: list[Samples], decode: Decoder = ridge) -> Decoded:
        found = [held_out(*pair, decode) for pair in zip(state[-len(y) :], y, strict=True)]
        return Decoded(*(np.stack(parts, 2) for parts in zip(*found, strict=True)))

    mean, uncertainty = ([vectors(one, of) for one in each] for of in ("mean", "uncertainty"))
    return {
        "mean": over(mean),
        "shuffled": over([shuffled(one) for one in mean]),
        "uncertainty": over(uncertainty),
        "nonlinear": over(uncertainty[-1:], mlp),
    }


def both_ways(data: xr.Dataset) -> tuple[Decoded, Decoded]:
    """Simulates Bayes' state from a network's, and a network's from Bayes' and its last query.

    After Mikulik et al. (2020), arXiv:2010.11223, whose dissimilarity of states is 1 − R². Numbers
    of Bayes' state are of unlike units, so each counts by its standard deviations.
    """
    state, bayes = vectors(data, "state"), vectors(data, "mean", "covariance", "uncertainty")
    told = np.concatenate([bayes, vectors(data, "query")], -1)
    return held_out(state, in_deviations(bayes)), held_out(told, state)


def in_deviations(y: Samples) -> Samples:
    """Divides each number by its standard deviation over the tasks of the fit.

    One that varies by rounding alone becomes zero: there is nothing to explain.
    """
    fit = y[:, ::2].astype(np.float64)
    spread = fit.std(1, keepdims=True)
    varies = spread > VARIES * np.abs(fit).max(1, keepdims=True)
    return np.where(varies, y / np.where(varies, spread, 1.0), 0.0)


def shuffled(y: Samples) -> Samples:
    """Puts the numbers of other tasks in the place of each task's: a control, where R² is 0."""
    return np.roll(y, 2, axis=1)


def explained(left: dynamics.Numbers, total: dynamics.Numbers) -> np.ndarray:
    """Computes R² = 1 − left / total of means over seeds and tasks; NaN with nothing to explain."""
    with np.errstate(all="ignore"):
        return np.where(total > 0, 1 - left / total, np.nan)


def over_steps(left: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Computes R² at each step, and averages it over the steps: [..., step] to [...]."""
    return np.asarray(explained(left, total).mean(-1))


def r_squared(decoded: Decoded) -> dynamics.Estimate:
    """Computes R² at each step, with its interval over held-out tasks and seeds."""
    return dynamics.estimate(explained, *decoded)


def _standard(x: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns both in units of the standard deviation of x, from its mean.

    Where x is constant they are left as they are. Of numbers that hardly vary in x beside the
    others, in units of `LEAST` of the greatest one: else one that a network has all but switched
    off would be large on a task on which it is not.
    """
    mean, spread = x.mean(-2, keepdims=True), x.std(-2, keepdims=True)
    least = LEAST * spread.max(-1, keepdims=True)
    spread = np.maximum(spread, np.where(least > LEAST * 1e-12, least, 1.0))
    return (x - mean) / spread, (new - mean) / spread


def delay(steps: np.ndarray, r2: np.ndarray, excess: np.ndarray) -> np.ndarray:
    """Measures by how many doublings of the outer step decoding lags behind the behaviour.

    From R² and excess loss [..., outer_step], each timed half-way from untrained to trained: R² on
    a linear scale, excess loss on a logarithmic one.
    """
    with np.errstate(all="ignore"):
        both = np.stack([r2, -np.log(excess)], -1)
        share = (both - both[..., :1, :]) / (both[..., -1:, :] - both[..., :1, :])
    t = dynamics.learning_times(np.log2(1 + steps), share)
    return np.asarray(t[..., 0] - t[..., 1])


def merits(
    data: xr.Dataset, bayes: xr.Dataset, of: Mapping[str, Decoded]
) -> Iterator[tuple[str, Estimate]]:
    """Figures of merit of a network over outer training and Bayes, by name (`MERITS`).

    `of` is what was decoded from its state (`of_state`); means are over the steps recorded, each
    counted once, though they are spaced in logarithm.
    """
    last, steps = data.isel(outer_step=-1), data["outer_step"].to_numpy()
    yield "excess", dynamics.measured_excess(last, bayes)
    yield "distance", estimate(np.asarray, dynamics.samples(last, "distance")[:, :, 1:].mean(-1))
    forth, back = both_ways(last)
    untrained, now, other = of["mean"].at(0), of["mean"].at(-1), of["shuffled"].at(-1)
    decoded = {"mean": now, "untrained": untrained, "shuffled": other}
    for what, found in (decoded | {"to_bayes": forth, "from_bayes": back}).items():
        yield what, estimate(over_steps, *found)
    yield "least", estimate(lambda a, b: explained(a, b)[..., 1:].min(-1), *now)
    way = lambda a, b, c, d: over_steps(a, b) - over_steps(c, d)
    yield "direction", estimate(way, *forth, *back)
    for what in ("uncertainty", "nonlinear"):
        yield what, r_squared(of[what].at(-1)).each()[-1]
    # Of the tasks held out. The scale of excess loss makes no difference to when it falls.
    losses = (dynamics.episode_loss(each)[:, 1::2] for each in (data, bayes))
    when = lambda a, b, c, d: delay(steps, over_steps(a, b), c - d[..., None])
    yield "delay", estimate(when, *of["mean"], *losses)


def operated(data: xr.Dataset) -> Iterator[tuple[str, Estimate]]:
    """Yields by name (`MERITS`) what a network whose states were replaced (`implanted`) came to."""
    after = dynamics.samples(data, "after")[0, 0] > 0
    names = ("losses", "shift", "size")
    losses, shift, size = (dynamics.samples(data, name)[:, :, after] for name in names)
    of = dict(zip(SOURCES, np.moveaxis(losses.mean(2), -1, 0), strict=True))
    excess = partial(dynamics.excess_loss, floor=trajectories.about(data).loss_floor)
    for source in GOES_ON:
        yield f"from_{source}", estimate(excess, of[source], of["bayes"])
    kept = lambda own, none, fresh: explained(own - none, fresh - none)
    yield "kept", estimate(kept, of["own"], of["none"], of["fresh"])
    yield "outputs", estimate(np.divide, shift[:, :, 0, 0], size[:, :, 0])
