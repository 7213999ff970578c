"""Decoding: how much of one recorded quantity another one reveals, on tasks held out from the fit.

Decoding a network's state gives its figures of merit beside Bayes. Works on stored arrays [seed,
task, step, number]. Each seed and step has a fit of its own, made on every other task and judged on
the tasks between. R² is 1 where all is decoded and 0 where nothing is.
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
"""`decode(x [..., n, p], y [..., n, q], new [..., m, p])` fits y to x and predicts [..., m, q]."""
PENALTIES = 10.0 ** np.arange(-7, 4)
"""Penalties of ridge regression per sample, of which cross-validation chooses the best."""
LEAST = 1e-2
"""Least divisor of a standardised number, as a share of the greatest deviation in its state."""
VARIES = 1e-5
"""Least standard deviation beyond rounding errors, as a share of a number's greatest size."""
HIDDEN, UPDATES, RATE, DECAY = 32, 150, 1e-2, 1e-1
"""Width of the MLP, and AdamW's number of updates, learning rate and weight decay. Our choice."""

GOES_ON = {
    "none": "its own state",
    "own": "Bayes' state, mapped",
    "other": "that of another task",
    "fresh": "a fresh state",
}
"""Labels of the states from which `learners.beside_bayes.implanted` lets a network go on."""
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
} | {f"from_{source}": f"excess loss, going on from {label}" for source, label in GOES_ON.items()}
"""Labels of the figures of merit of a network beside Bayes, keyed by name."""


class Decoded(NamedTuple):
    """Squared errors of decoding on held-out tasks, and of the mean as the baseline.

    Over outer training there is an axis of checkpoints before the steps.
    """

    left: Float[np.ndarray, "seed task *checkpoint step"]
    """Squared error of the decoded vector, summed over its numbers."""
    total: Float[np.ndarray, "seed task *checkpoint step"]
    """Squared distance of the vector from its mean over the tasks of the fit."""

    def at(self, checkpoint: int) -> Decoded:
        """Returns the errors at one checkpoint."""
        return Decoded(*(part[:, :, checkpoint] for part in self))


def ridge(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Decodes by ridge regression with an intercept, on standardised x; a `Decoder`.

    Each fit along the leading axes takes the penalty of `PENALTIES` with the least generalised
    cross-validation error (Golub, Heath & Wahba 1979). Computed in float64.
    """
    n, centre = x.shape[-2], y.mean(-2, keepdims=True)
    z, z_new = _standardised(x, new)
    eigenvalues, V = np.linalg.eigh(np.swapaxes(z, -1, -2) @ z / n)
    eigenvalues = np.maximum(eigenvalues, 0)
    b = np.swapaxes(V, -1, -2) @ (np.swapaxes(z, -1, -2) @ (y - centre) / n)
    penalty = PENALTIES.reshape(-1, *[1] * eigenvalues.ndim)
    shrunk = eigenvalues + penalty
    freedom = 1 + (eigenvalues / shrunk).sum(-1)  # degrees of freedom, with the intercept
    reduction = ((b**2).sum(-1) * (shrunk + penalty) / shrunk**2).sum(-1)
    residual = y.var(-2).sum(-1) - reduction
    best = (residual / np.maximum(1 - freedom / n, 1e-12) ** 2).argmin(0)
    return centre + z_new @ (V @ (b / (eigenvalues + PENALTIES[best][..., None])[..., None]))


def mlp(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Decodes by ridge regression, and what it leaves unexplained by a small MLP; a `Decoder`.

    Together they find what is there in linear form and in any other. Both are fitted to three
    quarters of the samples, the MLP by AdamW, stopped where it explains most of the others.
    """
    train_size = 3 * x.shape[-2] // 4
    all_x = np.concatenate([x, new], -2)
    linear = ridge(x[..., :train_size, :], y[..., :train_size, :], all_x)
    residual = y - linear[..., : x.shape[-2], :]
    spread = residual.std(-2, keepdims=True)
    spread = np.where(spread > 0, spread, 1.0)
    pair = _standardised(x, all_x)[1], residual / spread
    flat = [jnp.asarray(a.reshape(-1, *a.shape[-2:]), jnp.float32) for a in pair]
    answers = np.asarray(_mlps(*flat, train_size), np.float64).reshape(*all_x.shape[:-1], -1)
    return (linear + spread * answers)[..., x.shape[-2] :, :]


@partial(jax.jit, static_argnames="train_size")
@inner.full_precision
def _mlps(
    x: Float[Array, "fit m p"], y: Float[Array, "fit n q"], train_size: int
) -> Float[Array, "fit m q"]:
    """Trains one MLP for each fit, in turn, to give y from the first n x; returns it at all x."""
    optimizer = optax.adamw(RATE, weight_decay=DECAY)
    p, q, n = x.shape[-1], y.shape[-1], y.shape[-2]
    first_layer = jax.random.normal(jax.random.key(0), (p, HIDDEN)) / jnp.sqrt(p)
    start = first_layer, jnp.zeros(HIDDEN), jnp.zeros((HIDDEN, q)), jnp.zeros(q)

    def answer(weights, x):
        W1, b1, W2, b2 = weights
        return jax.nn.gelu(x @ W1 + b1) @ W2 + b2

    def fit(pair):
        x, y = pair
        loss = lambda weights, rows: jnp.mean((answer(weights, x[:n][rows]) - y[rows]) ** 2)

        def step(carry, _):
            weights, moments, best, least = carry
            error = loss(weights, slice(train_size, None))
            best = jax.tree.map(lambda a, b: jnp.where(error < least, a, b), weights, best)
            gradient = jax.grad(loss)(weights, slice(train_size))
            changes, moments = optimizer.update(gradient, moments, weights)
            weights = optax.apply_updates(weights, changes)
            return (weights, moments, best, jnp.minimum(error, least)), None

        initial = start, optimizer.init(start), start, jnp.inf
        return answer(jax.lax.scan(step, initial, None, UPDATES)[0][2], x)

    return jax.lax.map(fit, (x, y))


def held_out(x: Samples, y: Samples, decode: Decoder = ridge) -> Decoded:
    """Decodes y from x of the same task: fits on even tasks, judges on odd ones."""
    x, y = (np.swapaxes(np.asarray(samples, np.float64), 1, 2) for samples in (x, y))
    fit, new = y[:, :, ::2], y[:, :, 1::2]
    answers = decode(x[:, :, ::2], fit, x[:, :, 1::2])
    errors = new - answers, new - fit.mean(2, keepdims=True)
    return Decoded(*(np.swapaxes((error**2).sum(-1), 1, 2) for error in errors))


def vectors(data: xr.Dataset, *names: str) -> Samples:
    """Concatenates recorded vectors at each time but the first; skips names that data lacks."""
    recorded = [dynamics.samples(data, name) for name in names if name in data]
    return np.concatenate(recorded, -1)[:, :, 1:]


def of_state(data: xr.Dataset) -> dict[str, Decoded]:
    """Decodes Bayes' posterior from the state of a network beside it, at each checkpoint.

    Decodes the posterior's "mean", the mean of another task ("shuffled"), the "uncertainty", and
    at the last checkpoint the uncertainty by an MLP too ("nonlinear").
    """
    checkpoints = [data.isel(outer_step=i) for i in range(data.sizes["outer_step"])]
    recorded = lambda name: [vectors(checkpoint, name) for checkpoint in checkpoints]
    state, mean, uncertainty = map(recorded, ("state", "mean", "uncertainty"))

    def decoded(targets: list[Samples], decode: Decoder = ridge) -> Decoded:
        pairs = zip(state[-len(targets) :], targets, strict=True)  # of the last checkpoints
        parts = zip(*(held_out(x, y, decode) for x, y in pairs), strict=True)
        return Decoded(*(np.stack(errors, 2) for errors in parts))

    return {
        "mean": decoded(mean),
        "shuffled": decoded([shuffled(y) for y in mean]),
        "uncertainty": decoded(uncertainty),
        "nonlinear": decoded(uncertainty[-1:], mlp),
    }


def both_ways(data: xr.Dataset) -> tuple[Decoded, Decoded]:
    """Decodes Bayes' state from a network's, and the network's from Bayes' and its last query.

    After Mikulik et al. (2020), arXiv:2010.11223, whose dissimilarity of states is 1 − R². Numbers
    of Bayes' state have unlike units, so each is measured in its standard deviations.
    """
    state, bayes = vectors(data, "state"), vectors(data, "mean", "covariance", "uncertainty")
    with_query = np.concatenate([bayes, vectors(data, "query")], -1)
    return held_out(state, in_deviations(bayes)), held_out(with_query, state)


def in_deviations(y: Samples) -> Samples:
    """Divides each number by its standard deviation over the tasks of the fit.

    A number that varies by rounding alone becomes zero, so that there is nothing to explain.
    """
    fit = y[:, ::2].astype(np.float64)
    spread = fit.std(1, keepdims=True)
    varies = spread > VARIES * np.abs(fit).max(1, keepdims=True)
    return np.where(varies, y / np.where(varies, spread, 1.0), 0.0)


def shuffled(y: Samples) -> Samples:
    """Gives each task the numbers of another one: a control, for which R² is 0."""
    return np.roll(y, 2, axis=1)


def explained(left: dynamics.Numbers, total: dynamics.Numbers) -> np.ndarray:
    """Computes R² = 1 − left / total from means over seeds and tasks; NaN if `total` is 0."""
    with np.errstate(all="ignore"):
        return np.where(total > 0, 1 - left / total, np.nan)


def over_steps(left: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Computes R² at each step, and averages it over the steps: [..., step] to [...]."""
    return np.asarray(explained(left, total).mean(-1))


def r_squared(decoded: Decoded) -> dynamics.Estimate:
    """Computes R² at each step, with its interval over held-out tasks and seeds."""
    return dynamics.estimate(explained, *decoded)


def _standardised(x: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns x and new, less the mean of x and over its standard deviation.

    If all of x is constant, only the mean is subtracted. A number that hardly varies in x is
    divided by `LEAST` of the greatest deviation: otherwise one that a network has all but switched
    off would become large on a task where it is on.
    """
    mean, spread = x.mean(-2, keepdims=True), x.std(-2, keepdims=True)
    least = LEAST * spread.max(-1, keepdims=True)
    spread = np.maximum(spread, np.where(least > LEAST * 1e-12, least, 1.0))
    return (x - mean) / spread, (new - mean) / spread


def delay(steps: np.ndarray, r2: np.ndarray, excess: np.ndarray) -> np.ndarray:
    """Returns by how many doublings of the outer step decoding lags behind behaviour.

    R² and excess loss [..., outer_step] are each timed half-way from untrained to trained: R² on a
    linear scale, excess loss on a logarithmic one.
    """
    with np.errstate(all="ignore"):
        curves = np.stack([r2, -np.log(excess)], -1)
        share = (curves - curves[..., :1, :]) / (curves[..., -1:, :] - curves[..., :1, :])
    t = dynamics.learning_times(np.log2(1 + steps), share)
    return np.asarray(t[..., 0] - t[..., 1])


def merits(
    data: xr.Dataset, bayes: xr.Dataset, of: Mapping[str, Decoded]
) -> Iterator[tuple[str, Estimate]]:
    """Yields the figures of merit (`MERITS`) of a network over outer training, compared with Bayes.

    `of` holds what was decoded from its state (`of_state`). Means are over the recorded steps,
    which count alike although they are log-spaced.
    """
    last, steps = data.isel(outer_step=-1), data["outer_step"].to_numpy()
    yield "excess", dynamics.excess_over_bayes(last, bayes)
    yield "distance", estimate(np.asarray, dynamics.samples(last, "distance")[:, :, 1:].mean(-1))
    to_bayes, from_bayes = both_ways(last)
    untrained, trained, other = of["mean"].at(0), of["mean"].at(-1), of["shuffled"].at(-1)
    decoded = {"mean": trained, "untrained": untrained, "shuffled": other}
    for name, errors in (decoded | {"to_bayes": to_bayes, "from_bayes": from_bayes}).items():
        yield name, estimate(over_steps, *errors)
    least = lambda left, total: explained(left, total)[..., 1:].min(-1)
    yield "least", estimate(least, *trained)
    difference = lambda a, b, c, d: over_steps(a, b) - over_steps(c, d)
    yield "direction", estimate(difference, *to_bayes, *from_bayes)
    for name in ("uncertainty", "nonlinear"):
        yield name, r_squared(of[name].at(-1)).split()[-1]
    # On held-out tasks. The scale of excess loss makes no difference to when it falls.
    losses = (dynamics.episode_loss(part)[:, 1::2] for part in (data, bayes))
    lag = lambda a, b, loss, best: delay(steps, over_steps(a, b), loss - best[..., None])
    yield "delay", estimate(lag, *of["mean"], *losses)


def operated(data: xr.Dataset) -> Iterator[tuple[str, Estimate]]:
    """Yields figures of merit (`MERITS`) of a network whose states were replaced (`implanted`)."""
    after = dynamics.samples(data, "after")[0, 0] > 0
    names = ("losses", "shift", "size")
    losses, shift, size = (dynamics.samples(data, name)[:, :, after] for name in names)
    by_source = dict(zip(SOURCES, np.moveaxis(losses.mean(2), -1, 0), strict=True))
    excess = partial(dynamics.excess_loss, floor=trajectories.about(data).loss_floor)
    for source in GOES_ON:
        yield f"from_{source}", estimate(excess, by_source[source], by_source["bayes"])
    share_kept = lambda own, none, fresh: explained(own - none, fresh - none)
    yield "kept", estimate(share_kept, by_source["own"], by_source["none"], by_source["fresh"])
    yield "outputs", estimate(np.divide, shift[:, :, 0, 0], size[:, :, 0])
