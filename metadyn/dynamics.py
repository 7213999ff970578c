"""Figures of merit: what mode trajectories say, each with its 95 % bootstrap interval.

Works on stored arrays alone, in NumPy. Arrays of samples are [seed, task, ...]; a learner without
outer parameters has one seed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Float, Real
from scipy.special import ndtri, stdtrit

from metadyn import trajectories
from metadyn.base import STRENGTH
from metadyn.errors import check

Numbers = np.ndarray | np.floating | float
Statistic = Callable[..., Numbers]
Inner = Float[np.ndarray, "*#batch step mode"]
Outer = Float[np.ndarray, "*#batch outer_step step mode"]
DRAWS = 1000  # resamples behind an interval: our choice


class Estimate(NamedTuple):
    """A figure of merit and its 95 % interval; scalars or arrays of one shape."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def each(self) -> list[Estimate]:
        """Splits an estimate of arrays into a list, one for each index of their last axis."""
        parts = (np.moveaxis(part, -1, 0) for part in self)
        return [Estimate(*each) for each in zip(*parts, strict=True)]


def stacked(estimates: Iterable[Estimate]) -> Estimate:
    """Puts several estimates into one, along a new last axis."""
    return Estimate(*(np.stack(parts, -1) for parts in zip(*estimates, strict=True)))


def exact(value: float | int) -> Estimate:
    """Makes an estimate of what is known exactly; NaN where there is no number."""
    return Estimate(*[np.asarray(value, np.float64)] * 3)


def text(estimate: Estimate, digits: int | None = None) -> str:
    """Writes a figure of merit as value [low, high], of two digits, of three if it is narrow."""
    n = digits or (3 if 0 < estimate.high - estimate.low < 0.02 else 2)
    said = "{:z.{n}f} [{:z.{n}f}, {:z.{n}f}]".format(*estimate, n=n)
    return said.replace("nan", "–").replace("-", "−").replace("– [–, –]", "–")


def estimate(statistic: Statistic, *samples: np.ndarray, draws: int = DRAWS) -> Estimate:
    """Estimates a statistic of means over seeds and tasks, with its percentile bootstrap interval.

    `statistic(*means)` maps means [..., *rest] of the samples [seed, task, *rest] to figures [...,
    *any]. Tasks are resampled and, independently, seeds are. Samples of as many tasks (seeds) are
    taken to be of the same tasks (seeds) and are resampled together, so differences between
    learners on the same episodes have paired intervals. Resampled weights are spread by `widening`,
    without which the interval of few seeds would be far too narrow. Draws in which the statistic
    has no finite value are left out; where more than 5 % have none, and for a single task of a
    single seed, there is no interval (NaN).
    """

    def resampled(sample: np.ndarray) -> np.ndarray:
        n_seeds, n_tasks, *rest = sample.shape
        by_task, by_seed = _resampling(n_tasks, draws, 0), _resampling(n_seeds, draws, 1)
        parts = zip(by_seed.T, sample.reshape(n_seeds, n_tasks, -1), strict=True)
        mean = sum(weights[:, None] * (by_task @ each) for weights, each in parts)
        return np.asarray(mean).reshape(draws, *rest)

    value = statistic(*(np.asarray(s, np.float64).mean((0, 1)) for s in samples))
    if all(np.shape(s)[:2] == (1, 1) for s in samples):
        nothing = np.full(np.shape(value), np.nan)
        return Estimate(np.asarray(value), nothing, nothing)
    return _interval(value, statistic(*(resampled(np.asarray(s, np.float32)) for s in samples)))


def on_common_tasks(*samples: np.ndarray) -> list[np.ndarray]:
    """Cuts samples [seed, task, ...] to the tasks that all have, so that `estimate` pairs them.

    These are the first ones: task i is the same in all sets that sample alike.
    """
    tasks = min(sample.shape[1] for sample in samples)
    return [sample[:, :tasks] for sample in samples]


def estimate_over_runs(statistic: Statistic, *samples: np.ndarray, draws: int = DRAWS) -> Estimate:
    """Estimates a statistic of runs, with its percentile bootstrap interval.

    For statistics that are not functions of means, such as a median of runs. Samples are
    [run, ...]; the runs of each are resampled independently. Draws without a finite value are
    treated as `estimate` does.
    """
    rng = np.random.default_rng(0)
    drawn = [statistic(*(rng.choice(s, len(s)) for s in samples)) for _ in range(draws)]
    return _interval(statistic(*samples), drawn)


def _interval(value: Numbers, drawn: Numbers | list) -> Estimate:
    """A value with the central 95 % of what was drawn for it [draw, ...]."""
    drawn = np.where(np.isfinite(drawn), drawn, np.nan)
    none = np.isnan(drawn).mean(0) > 0.05
    drawn = np.where(none, 0.0, drawn)
    # The quantile that looks for NaN is far slower.
    quantile = np.nanquantile if np.isnan(drawn).any() else np.quantile
    low, high = (np.where(none, np.nan, q) for q in quantile(drawn, [0.025, 0.975], axis=0))
    return Estimate(np.asarray(value), low, high)


@functools.lru_cache(maxsize=4)  # up to a quarter of a gigabyte each
def _resampling(n: int, draws: int, which: int) -> Float[np.ndarray, "draws n"]:
    """Weights of n samples in each draw: how often it was drawn of n, spread by `widening`."""
    rng, weights = np.random.default_rng([0, which, n]), np.empty((draws, n), np.float32)
    for row in weights:
        counts = np.bincount(rng.integers(n, size=n), minlength=n)
        row[:] = 1 / n + widening(n) * (counts / n - 1 / n)
    return weights


def widening(n: int) -> float:
    """Returns the factor by which a bootstrap interval of a mean of n is narrower than Student's.

    It is √(n / (n − 1)) t / z, of Student's and the normal 97.5 % quantiles: 1.01 for 200, 1.87
    for 4, 9.2 for 2. Hesterberg (2015), arXiv:1411.5279, expands percentile intervals by it; that
    it is the weights that are spread, so that it serves any statistic of means, is our choice.
    """
    if n == 1:
        return 1.0
    return float(np.sqrt(n / (n - 1)) * stdtrit(n - 1, 0.975) / ndtri(0.975))


def learning_times(
    times: Real[np.ndarray, " time"], strength: Float[np.ndarray, "*runs time mode"], p: float = 0.5
) -> Float[np.ndarray, "*runs mode"]:
    """Finds when each mode's strength first reaches p, linearly interpolated: t_k(p).

    In the units of `times`. NaN where it never does: the mode is censored.
    """
    reached = strength >= p
    after = reached.argmax(-2)
    before = np.maximum(after - 1, 0)
    a, b = (np.take_along_axis(strength, i[..., None, :], -2)[..., 0, :] for i in (before, after))
    start, end = (np.asarray(times, np.float64)[i] for i in (before, after))
    t = start + (p - a) / np.where(b > a, b - a, 1.0) * (end - start)
    return np.where(reached.any(-2), t, np.nan)


def staggering_slope(
    scale: Real[np.ndarray, " mode"], t: Float[np.ndarray, "*batch mode"]
) -> Float[np.ndarray, "*batch"]:
    """Least-squares slope of log t_k against log scale_k, unit-free.

    Over the modes that are not censored (report the others beside it) and crossed after t = 0, and
    whose scale is above 0; NaN where fewer than two are left.
    """
    with np.errstate(all="ignore"):
        x, y = np.broadcast_arrays(np.log(scale), np.log(np.where(t > 0, t, np.nan)))
        there = np.isfinite(x) & np.isfinite(y)
        n = there.sum(-1)
        x = x - (x.sum(-1, where=there) / n)[..., None]
        slope = (x * y).sum(-1, where=there) / (x**2).sum(-1, where=there)
        return np.where(n >= 2, slope, np.nan)


def staggering(t: Float[np.ndarray, "*batch mode"]) -> Float[np.ndarray, "*batch"] | np.floating:
    """Computes (t_(K) − t_(1)) / t_(K) of modes in order of learning: 0 if all come at once.

    NaN if the last is censored, or learned at once.
    """
    with np.errstate(all="ignore"):
        return (t[..., -1] - t[..., 0]) / t[..., -1]


def rank_correlation(
    x: Real[np.ndarray, "*#batch mode"], t: Float[np.ndarray, "*batch mode"]
) -> Float[np.ndarray, "*batch"] | np.floating:
    """Spearman's rank correlation of t_k with x_k; censored modes (NaN) rank as learned last."""

    def centred_ranks(each: np.ndarray) -> np.ndarray:  # those of equals are their mean
        each = np.where(np.isnan(each), np.inf, each)
        one, other = each[..., :, None], each[..., None, :]
        return ((one > other).sum(-1) - (one < other).sum(-1)) / 2

    x, t = centred_ranks(x), centred_ranks(t)
    with np.errstate(all="ignore"):  # NaN where all are learned at the same time
        return (x * t).sum(-1) / np.sqrt((x**2).sum(-1) * (t**2).sum(-1))


def samples(data: xr.Dataset, name: str) -> np.ndarray:
    """Returns a stored reading [seed, task, (outer_step,) step, ...]; one seed if it has none."""
    data = trajectories.of_one_learner(data)
    array = data[name] if "seed" in data[name].dims else data[name].expand_dims("seed")
    lead = ("seed", "task", "outer_step", "step")
    return array.transpose(*lead, ..., missing_dims="ignore").to_numpy()


def strength(data: xr.Dataset, probe: str = STRENGTH) -> np.ndarray:
    """Returns mode strengths [seed, task, (outer_step,) step, mode], exchangeable ones in order.

    Those of each run are then in its own order: averages over runs would hide staggering.
    """
    values = samples(data, probe)
    if trajectories.modes(data, probe).exchangeable:
        order = np.argsort(times_of(data, probe)(values), axis=-1, kind="stable")  # NaN comes last
        values = np.take_along_axis(values, order[..., None, :], -1)
    return values


def times_of(data: xr.Dataset, probe: str = STRENGTH) -> Callable[[np.ndarray], np.ndarray]:
    """Makes the statistic that turns mean mode strengths [..., step, mode] into learning times."""
    times = trajectories.of_one_learner(data)["time"].to_numpy()
    p = trajectories.modes(data, probe).p
    return lambda strength: learning_times(times, strength, p)


def order_of(data: xr.Dataset, probe: str = STRENGTH) -> Callable[[np.ndarray], Numbers]:
    """Picks the statistic: `staggering_slope`, or `staggering` if modes are exchangeable."""
    modes = trajectories.modes(data, probe)
    if modes.exchangeable:
        return staggering
    return functools.partial(staggering_slope, np.array(modes.values))


def merit_of(data: xr.Dataset, probe: str = STRENGTH) -> Callable[[np.ndarray], Numbers]:
    """Makes the function from mean mode strengths to the slope or staggering of their times."""
    times, order = times_of(data, probe), order_of(data, probe)
    return lambda strength: order(times(strength))


def merit_name(data: xr.Dataset, probe: str = STRENGTH) -> str:
    """Names the figure of merit: "staggering" if modes are exchangeable, otherwise "slope"."""
    return "staggering" if trajectories.modes(data, probe).exchangeable else "slope"


def merit(data: xr.Dataset, probe: str = STRENGTH) -> Estimate:
    """Estimates how far one learner staggers: its slope, or `staggering` of exchangeable modes."""
    return estimate(merit_of(data, probe), strength(data, probe))


def difference(data: xr.Dataset, other: xr.Dataset, probe: str = STRENGTH) -> Estimate:
    """Estimates how far one learner staggers beyond another on the same tasks, in pairs."""
    return differences([(data, other)], probe=probe)


def differences(
    pairs: Sequence[tuple[xr.Dataset, xr.Dataset | None]],
    take: Callable[[np.ndarray], Numbers] = lambda each: each[0],
    probe: str = STRENGTH,
) -> Estimate:
    """Applies `take` to how far the first learner of each pair staggers beyond the second.

    What it is given is [pair, ...]. All were measured on the same tasks. None, for a second, is one
    that does not stagger. Slopes are compared over the modes that both learn.
    """
    flat = [data for pair in pairs for data in pair if data is not None]
    times = [times_of(data, probe) for data in flat]

    def beyond(data: xr.Dataset, t: np.ndarray, other: np.ndarray | None) -> Numbers:
        order = order_of(data, probe)
        if other is None:
            return order(t)
        if not trajectories.modes(data, probe).exchangeable:
            t, other = np.where(np.isnan(t) | np.isnan(other), np.nan, (t, other))
        return order(t) - order(other)

    def statistic(*means: np.ndarray) -> Numbers:
        t = iter([learned(mean) for learned, mean in zip(times, means, strict=True)])
        each = [beyond(a, next(t), None if b is None else next(t)) for a, b in pairs]
        return take(np.array(each))

    return estimate(statistic, *(strength(data, probe) for data in flat))


def slope(data: xr.Dataset | Mapping[str, xr.Dataset], probe: str = STRENGTH) -> xr.Dataset:
    """Estimates how far each learner of a dataset staggers (`merit`): value, low, high [learner].

    Meta-learners that are followed over outer training are taken at its end.
    """
    parts = trajectories.split(data).items()
    check(len(parts) > 0, "data", dict(parts), "holds no learner")
    found = {n: merit(p.isel(outer_step=-1, missing_dims="ignore"), probe) for n, p in parts}
    named = stacked(found.values())._asdict().items()
    return xr.Dataset({part: ("learner", each) for part, each in named}, {"learner": [*found]})


def last_times(data: xr.Dataset, probe: str = STRENGTH) -> Float[np.ndarray, " run"]:
    """Returns the learning time of the last mode of each run; infinite where it is censored."""
    return np.nan_to_num(times_of(data, probe)(samples(data, probe)), nan=np.inf).max(-1).ravel()


def growth(k: Real[np.ndarray, " n"], t: Real[np.ndarray, " n"]) -> Float[np.ndarray, " 2"]:
    """Fits an exponential and a line to times t at numbers k: the factor of growth, and which fits.

    The factor, by which each one more multiplies the time, is e^b of the fit log t = a + b k. The
    other is the root-mean-square relative error of the line that makes it least, over that of this
    exponential: below 1 if growth is rather linear, above 1 if it is rather exponential. NaN if a
    time is 0 or not finite, and where there are too few points to tell.
    """
    if len(t) < 2 or not (np.isfinite(t) & (t > 0)).all():
        return np.full(2, np.nan)
    b, a = np.polyfit(k, np.log(t), 1)
    fits = np.exp(a + b * k), np.polyval(np.polyfit(k, t, 1, w=1 / t), k)
    exponential, linear = (np.sqrt(np.mean((fit / t - 1) ** 2)) for fit in fits)
    ratio = linear / exponential if len(t) > 2 and exponential > 0 else np.nan
    return np.array([np.exp(b), ratio])


def share_of_bayes(trained: Outer, bayes: Inner) -> Float[np.ndarray, "*batch outer_step mode"]:
    """Computes how far outer training has moved each mode's mean strength: 0 untrained, 1 as Bayes.

    The mean is over the times recorded but for the first, where nothing can be learned yet.
    """
    learned, best = trained[..., 1:, :].mean(-2), bayes[..., None, 1:, :].mean(-2)
    untrained = learned[..., :1, :]
    return (learned - untrained) / (best - untrained)


def distance_to_bayes(trained: Outer, bayes: Inner) -> Float[np.ndarray, "*batch outer_step mode"]:
    """Computes the root-mean-square distance of two inner learning curves by mode: 1 untrained."""
    distance = np.sqrt(((trained - bayes[..., None, :, :]) ** 2).mean(-2))
    return distance / distance[..., :1, :]


def outer_times_of(trained: xr.Dataset) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Makes the function from mean strengths, and Bayes', to the outer step that learns each mode.

    It is the one at which the outer loop has come half-way to Bayes (`share_of_bayes`).
    """
    steps = trained["outer_step"].to_numpy()
    return lambda mean, bayes: learning_times(steps, share_of_bayes(mean, bayes))


def over_outer_training(
    trained: xr.Dataset, bayes: xr.Dataset, probe: str = STRENGTH
) -> tuple[Outer, Inner]:
    """Returns mode strengths over outer training, and Bayes', as `outer_times_of` takes them.

    Which of several exchangeable modes the outer loop comes to learn first is chance, and differs
    between seeds. They are put in each seed's own order, which is found on one half of the tasks;
    strengths are those of the other half, so that noise alone would order nothing.
    """
    strength, best = (samples(each, probe) for each in (trained, bayes))
    if not trajectories.modes(trained, probe).exchangeable:
        return strength, best
    best = np.broadcast_to(best.mean(-1, keepdims=True), best.shape)  # to Bayes they are alike
    one, other = slice(0, None, 2), slice(1, None, 2)
    found = outer_times_of(trained)(strength[:, one].mean(1), best[:, one].mean(1))
    order = np.argsort(found, axis=-1, kind="stable")[:, None, None, None]  # of each seed
    return np.take_along_axis(strength[:, other], order, -1), best[:, other]


def outer_times(trained: xr.Dataset, bayes: xr.Dataset, probe: str = STRENGTH) -> Estimate:
    """Estimates the outer step at which each mode is half-way from untrained to Bayes [mode]."""
    return estimate(outer_times_of(trained), *over_outer_training(trained, bayes, probe))


def outer_merit(trained: xr.Dataset, bayes: xr.Dataset, probe: str = STRENGTH) -> Estimate:
    """Estimates how far the modes stagger over outer training: `order_of` their `outer_times`."""
    times, order = outer_times_of(trained), order_of(trained, probe)
    statistic = lambda mean, best: order(times(mean, best))
    return estimate(statistic, *over_outer_training(trained, bayes, probe))


def outer_correlation(trained: xr.Dataset, bayes: xr.Dataset, probe: str = STRENGTH) -> Estimate:
    """Correlates the ranks of modes' learning times at the end of training with those over it."""
    inner, outer = times_of(trained, probe), outer_times_of(trained)
    ranks = lambda mean, best: rank_correlation(inner(mean[..., -1, :, :]), outer(mean, best))
    return estimate(ranks, *over_outer_training(trained, bayes, probe))


def excess_loss(loss: Numbers, bayes_loss: Numbers, floor: float) -> Numbers:
    """Computes (L − L_Bayes) / (L_Bayes − floor); floor is the loss of knowing all.

    Infinite, or NaN where a learner has it too, if Bayes has that loss itself.
    """
    with np.errstate(all="ignore"):
        return np.divide(loss - bayes_loss, bayes_loss - floor)


def episode_loss(data: xr.Dataset) -> np.ndarray:
    """Averages the loss over the answers of an episode [seed, task(, outer_step)].

    A stored loss is the mean since the time before, however many answers that is of.
    """
    answers = np.diff(trajectories.of_one_learner(data)["time"].to_numpy())
    return np.average(samples(data, "loss")[..., 1:], -1, answers)


def measured_excess(trained: xr.Dataset, bayes: xr.Dataset) -> Estimate:
    """Estimates the `excess_loss` of a meta-learner on the tasks that Bayes was measured on.

    Of one at each outer step, if it was measured over outer training.
    """
    floor, over = trajectories.about(trained).loss_floor, "outer_step" in trained.dims
    excess = lambda loss, best: excess_loss(loss, best[..., None] if over else best, floor)
    return estimate(excess, episode_loss(trained), episode_loss(bayes))


def excesses(
    pairs: Sequence[tuple[xr.Dataset, xr.Dataset]], take: Callable[[np.ndarray], Numbers]
) -> Estimate:
    """Estimates a function of the excess losses of several learners, such as the ratio of two.

    What `take` is given is [pair, ...]. Each pair is a learner's measurement and Bayes' on the same
    tasks.
    """
    floors = [trajectories.about(learner).loss_floor for learner, _ in pairs]
    losses = [episode_loss(data) for pair in pairs for data in pair]

    def statistic(*means: Numbers) -> Numbers:
        both = zip(means[::2], means[1::2], floors, strict=True)
        return take(np.array([excess_loss(*each) for each in both]))

    return estimate(statistic, *losses)


def to_equal_excess(
    ways: Sequence[xr.Dataset], bayes: xr.Dataset
) -> tuple[Estimate, list[Estimate], list[Estimate]]:
    """Compares ways of training by the outer steps that each takes to an excess that all reach.

    Returns that excess loss, the outer steps of each, and the gain of each: how many times fewer
    outer steps it takes than the first. Ways of training are measured over it, on the tasks that
    Bayes was measured on: steps are linearly interpolated between those, the excess the lowest so
    far.
    """
    steps, floor = ways[0]["outer_step"].to_numpy(), trajectories.about(ways[0]).loss_floor

    def all_of(*mean: Any) -> np.ndarray:
        excess = excess_loss(np.stack(mean[:-1], -1), np.asarray(mean[-1])[..., None, None], floor)
        lowest = np.minimum.accumulate(excess, -2)
        level = lowest[..., -1, :].max(-1)[..., None]
        taken = learning_times(steps, level[..., None] - lowest, p=0.0)
        with np.errstate(all="ignore"):
            return np.concatenate([level, taken, taken[..., :1] / taken], -1)

    losses = [episode_loss(each) for each in (*ways, bayes)]
    level, *rest = estimate(all_of, *losses).each()
    return level, rest[: len(ways)], rest[len(ways) :]
