"""Figures of merit of mode trajectories, each with its 95 % bootstrap interval.

Works in NumPy, on stored arrays alone. Arrays of samples have the shape [seed, task, ...]. A
learner without outer parameters has one seed.
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
DRAWS = 1000  # bootstrap resamples behind an interval: our choice


class Estimate(NamedTuple):
    """A figure of merit and its 95 % interval: three scalars, or three arrays of one shape."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def split(self) -> list[Estimate]:
        """Splits an estimate of arrays into a list, one estimate per index of the last axis."""
        fields = (np.moveaxis(field, -1, 0) for field in self)
        return [Estimate(*entry) for entry in zip(*fields, strict=True)]


def stacked(estimates: Iterable[Estimate]) -> Estimate:
    """Stacks several estimates into one, along a new last axis."""
    return Estimate(*(np.stack(field, -1) for field in zip(*estimates, strict=True)))


def exact(value: float | int) -> Estimate:
    """Makes an estimate with an interval of zero width; `value` is NaN where there is no number."""
    return Estimate(*[np.asarray(value, np.float64)] * 3)


def text(estimate: Estimate, digits: int | None = None) -> str:
    """Formats a figure of merit as value [low, high], with two decimals, or three if it is narrow.

    A narrow interval has a width above 0 and below 0.02. `digits` sets the decimals instead.
    """
    decimals = digits or (3 if 0 < estimate.high - estimate.low < 0.02 else 2)
    line = "{:z.{n}f} [{:z.{n}f}, {:z.{n}f}]".format(*estimate, n=decimals)
    return line.replace("nan", "–").replace("-", "−").replace("– [–, –]", "–")


def estimate(statistic: Statistic, *samples: np.ndarray, draws: int = DRAWS) -> Estimate:
    """Estimates a statistic of means over seeds and tasks, with its percentile bootstrap interval.

    `statistic(*means)` maps means [..., *rest] of the samples [seed, task, *rest] to figures [...,
    *any]. Tasks and seeds are resampled independently. Samples with equal numbers of tasks (seeds)
    are assumed to be of the same tasks (seeds) and are resampled together, so that differences
    between learners on the same episodes have paired intervals. `widening` spreads the resampled
    weights; without it the interval over few seeds would be far too narrow. Draws in which the
    statistic has no finite value are left out. There is no interval (NaN) where more than 5 % of
    the draws have none, and for a single task of a single seed.
    """

    def resample(sample: np.ndarray) -> np.ndarray:
        n_seeds, n_tasks, *rest = sample.shape
        task_weights, seed_weights = _weights(n_tasks, draws, 0), _weights(n_seeds, draws, 1)
        seeds = zip(seed_weights.T, sample.reshape(n_seeds, n_tasks, -1), strict=True)
        mean = sum(weights[:, None] * (task_weights @ tasks) for weights, tasks in seeds)
        return np.asarray(mean).reshape(draws, *rest)

    value = statistic(*(np.asarray(s, np.float64).mean((0, 1)) for s in samples))
    if all(np.shape(s)[:2] == (1, 1) for s in samples):
        no_bound = np.full(np.shape(value), np.nan)
        return Estimate(np.asarray(value), no_bound, no_bound)
    return _interval(value, statistic(*(resample(np.asarray(s, np.float32)) for s in samples)))


def on_common_tasks(*samples: np.ndarray) -> list[np.ndarray]:
    """Truncates samples [seed, task, ...] to their common tasks, so that `estimate` pairs them.

    Common tasks are the first ones: task i is the same in all sets of tasks that sample alike.
    """
    n_tasks = min(sample.shape[1] for sample in samples)
    return [sample[:, :n_tasks] for sample in samples]


def estimate_over_runs(statistic: Statistic, *samples: np.ndarray, draws: int = DRAWS) -> Estimate:
    """Estimates a statistic of runs, with its percentile bootstrap interval.

    This is for statistics that are not functions of means, such as a median over runs. Samples are
    [run, ...], and the runs of each sample are resampled independently. Draws without a finite
    value are treated as in `estimate`.
    """
    rng = np.random.default_rng(0)
    drawn = [statistic(*(rng.choice(s, len(s)) for s in samples)) for _ in range(draws)]
    return _interval(statistic(*samples), drawn)


def _interval(value: Numbers, drawn: Numbers | list) -> Estimate:
    """Returns a value with the central 95 % interval of its bootstrap draws `drawn` [draw, ...]."""
    drawn = np.where(np.isfinite(drawn), drawn, np.nan)
    undefined = np.isnan(drawn).mean(0) > 0.05
    drawn = np.where(undefined, 0.0, drawn)
    # `np.nanquantile` is far slower.
    quantile = np.nanquantile if np.isnan(drawn).any() else np.quantile
    low, high = (np.where(undefined, np.nan, q) for q in quantile(drawn, [0.025, 0.975], axis=0))
    return Estimate(np.asarray(value), low, high)


@functools.lru_cache(maxsize=4)  # an array takes up to a quarter of a gigabyte
def _weights(n: int, draws: int, stream: int) -> Float[np.ndarray, "draws n"]:
    """Returns the weight of each of n samples in each draw: its share, spread by `widening`.

    `stream` tells apart the random numbers of tasks and of seeds.
    """
    rng, weights = np.random.default_rng([0, stream, n]), np.empty((draws, n), np.float32)
    for row in weights:
        counts = np.bincount(rng.integers(n, size=n), minlength=n)
        row[:] = 1 / n + widening(n) * (counts / n - 1 / n)
    return weights


def widening(n: int) -> float:
    """Returns the factor by which a bootstrap interval of a mean of n is narrower than Student's.

    It is √(n / (n − 1)) t / z, where t and z are Student's and the normal 97.5 % quantiles: 1.01
    for n = 200, 1.87 for 4, 9.2 for 2. For n = 1 it is set to 1. Hesterberg (2015),
    arXiv:1411.5279, expands percentile intervals by it. Our choice is to spread the weights
    instead, which serves any statistic of means.
    """
    if n == 1:
        return 1.0
    return float(np.sqrt(n / (n - 1)) * stdtrit(n - 1, 0.975) / ndtri(0.975))


def learning_times(
    times: Real[np.ndarray, " time"], strength: Float[np.ndarray, "*runs time mode"], p: float = 0.5
) -> Float[np.ndarray, "*runs mode"]:
    """Finds the time t_k(p) at which each mode's strength first reaches p, linearly interpolated.

    It has the units of `times`. NaN marks a mode that never reaches p, which is censored.
    """
    reached = strength >= p
    after = reached.argmax(-2)
    before = np.maximum(after - 1, 0)
    a, b = (np.take_along_axis(strength, i[..., None, :], -2)[..., 0, :] for i in (before, after))
    t_a, t_b = (np.asarray(times, np.float64)[i] for i in (before, after))
    t = t_a + (p - a) / np.where(b > a, b - a, 1.0) * (t_b - t_a)
    return np.where(reached.any(-2), t, np.nan)


def staggering_slope(
    scale: Real[np.ndarray, " mode"], t: Float[np.ndarray, "*batch mode"]
) -> Float[np.ndarray, "*batch"]:
    """Computes the least-squares slope of log t_k against log scale_k, which is unit-free.

    The fit uses the modes that are not censored (report the others beside it), that reach p after
    t = 0, and whose scale is above 0. The slope is NaN where fewer than two are left.
    """
    with np.errstate(all="ignore"):
        x, y = np.broadcast_arrays(np.log(scale), np.log(np.where(t > 0, t, np.nan)))
        fitted = np.isfinite(x) & np.isfinite(y)
        n = fitted.sum(-1)
        x = x - (x.sum(-1, where=fitted) / n)[..., None]
        slope = (x * y).sum(-1, where=fitted) / (x**2).sum(-1, where=fitted)
        return np.where(n >= 2, slope, np.nan)


def staggering(t: Float[np.ndarray, "*batch mode"]) -> Float[np.ndarray, "*batch"] | np.floating:
    """Computes (t_(K) − t_(1)) / t_(K) of modes in order of learning: 0 if all times are equal.

    NaN if the last mode is censored, or is learned at t = 0.
    """
    with np.errstate(all="ignore"):
        return (t[..., -1] - t[..., 0]) / t[..., -1]


def rank_correlation(
    x: Real[np.ndarray, "*#batch mode"], t: Float[np.ndarray, "*batch mode"]
) -> Float[np.ndarray, "*batch"] | np.floating:
    """Computes Spearman's rank correlation of t_k with x_k; censored modes (NaN) rank last."""

    def centred_ranks(values: np.ndarray) -> np.ndarray:  # equal values share their mean rank
        values = np.where(np.isnan(values), np.inf, values)
        column, row = values[..., :, None], values[..., None, :]
        return ((column > row).sum(-1) - (column < row).sum(-1)) / 2

    x, t = centred_ranks(x), centred_ranks(t)
    with np.errstate(all="ignore"):  # NaN where all values are equal
        return (x * t).sum(-1) / np.sqrt((x**2).sum(-1) * (t**2).sum(-1))


def samples(data: xr.Dataset, name: str, further_axes: int | None = None) -> np.ndarray:
    """Returns a stored reading [seed, task, (outer_step,) step, ...], adding seed if absent.

    If `further_axes` is given, raises `ConfigError` unless there are task, step and so many further
    axes: an option of a sweep is one more, and a single mode that was selected one fewer.
    """
    data = trajectories.of_one_learner(data)
    array = data[name] if "seed" in data[name].dims else data[name].expand_dims("seed")
    leading = ("seed", "task", "outer_step", "step")
    if further_axes is not None:
        given = {*array.dims}
        valid = {"task", "step"} <= given and len(given - {*leading}) == further_axes
        needed = f"besides seed and outer_step, must be task, step and {further_axes} further"
        hint = "select one setting of a sweep, and lists of tasks and modes, as isel(task=[0]) does"
        check(valid, "dimensions", array.dims, f"of {name!r}, {needed}: {hint}")
    return array.transpose(*leading, ..., missing_dims="ignore").to_numpy()


def strength(data: xr.Dataset, probe: str = STRENGTH) -> np.ndarray:
    """Returns mode strengths [seed, task, (outer_step,) step, mode], exchangeable modes sorted.

    They are in each run's own order of learning, as averages over runs would hide staggering.
    """
    values = samples(data, probe, 1)
    if trajectories.modes(data, probe).exchangeable:
        order = np.argsort(times_of(data, probe)(values), axis=-1, kind="stable")  # NaN comes last
        values = np.take_along_axis(values, order[..., None, :], -1)
    return values


def times_of(data: xr.Dataset, probe: str = STRENGTH) -> Callable[[np.ndarray], np.ndarray]:
    """Makes the statistic that maps mean mode strengths [..., step, mode] to learning times."""
    times = trajectories.of_one_learner(data)["time"].to_numpy()
    p = trajectories.modes(data, probe).p
    return lambda mean: learning_times(times, mean, p)


def order_of(data: xr.Dataset, probe: str = STRENGTH) -> Callable[[np.ndarray], Numbers]:
    """Returns the statistic of learning times: a slope, or `staggering` of exchangeable modes."""
    modes = trajectories.modes(data, probe)
    if modes.exchangeable:
        return staggering
    return functools.partial(staggering_slope, np.array(modes.values))


def merit_of(data: xr.Dataset, probe: str = STRENGTH) -> Callable[[np.ndarray], Numbers]:
    """Makes the statistic that maps mean mode strengths to their slope or staggering."""
    times, order = times_of(data, probe), order_of(data, probe)
    return lambda mean: order(times(mean))


def merit_name(data: xr.Dataset, probe: str = STRENGTH) -> str:
    """Names the figure of merit: "staggering" for exchangeable modes, otherwise "slope"."""
    return "staggering" if trajectories.modes(data, probe).exchangeable else "slope"


def merit(data: xr.Dataset, probe: str = STRENGTH) -> Estimate:
    """Estimates one learner's staggering: its slope, or `staggering` for exchangeable modes."""
    return estimate(merit_of(data, probe), strength(data, probe))


def difference(data: xr.Dataset, other: xr.Dataset | None, probe: str = STRENGTH) -> Estimate:
    """Estimates how far one learner staggers beyond another, paired over the same tasks.

    None, as the other, stands for one that does not stagger.
    """
    return differences([(data, other)], lambda gaps: gaps[0], probe)


def differences(
    pairs: Sequence[tuple[xr.Dataset, xr.Dataset | None]],
    take: Callable[[np.ndarray], Numbers],
    probe: str = STRENGTH,
) -> Estimate:
    """Estimates `take` of the gaps in staggering between the two learners of each pair.

    `take` receives the gaps [pair, ...], first learner minus second. All learners are measured on
    the same tasks. None, as a second learner, stands for one that does not stagger. Slopes are
    compared over the modes that both learn.
    """
    learners = [data for pair in pairs for data in pair if data is not None]
    functions = [times_of(data, probe) for data in learners]

    def gap(data: xr.Dataset, t: np.ndarray, t_second: np.ndarray | None) -> Numbers:
        order = order_of(data, probe)
        if t_second is None:
            return order(t)
        if not trajectories.modes(data, probe).exchangeable:
            t, t_second = np.where(np.isnan(t) | np.isnan(t_second), np.nan, (t, t_second))
        return order(t) - order(t_second)

    def statistic(*means: np.ndarray) -> Numbers:
        times = iter([to_times(mean) for to_times, mean in zip(functions, means, strict=True)])
        gaps = [gap(a, next(times), None if b is None else next(times)) for a, b in pairs]
        return take(np.array(gaps))

    return estimate(statistic, *(strength(data, probe) for data in learners))


def slope(data: xr.Dataset | Mapping[str, xr.Dataset], probe: str = STRENGTH) -> xr.Dataset:
    """Estimates the `merit` of each learner of a dataset: value, low, high [learner].

    The merit of a meta-learner followed over outer training is the one at its end.
    """
    parts = trajectories.split(data).items()
    check(len(parts) > 0, "data", dict(parts), "holds no learner")
    merits = {n: merit(p.isel(outer_step=-1, missing_dims="ignore"), probe) for n, p in parts}
    fields = stacked(merits.values())._asdict().items()
    return xr.Dataset({name: ("learner", x) for name, x in fields}, {"learner": [*merits]})


def last_times(data: xr.Dataset, probe: str = STRENGTH) -> Float[np.ndarray, " run"]:
    """Returns each run's learning time of its last mode; infinite where a mode is censored."""
    return np.nan_to_num(times_of(data, probe)(samples(data, probe, 1)), nan=np.inf).max(-1).ravel()


def growth(k: Real[np.ndarray, " n"], t: Real[np.ndarray, " n"]) -> Float[np.ndarray, " 2"]:
    """Fits an exponential and a line to times t at numbers k; returns (growth factor, error ratio).

    The growth factor e^b, of the fit log t = a + b k, multiplies the time when k grows by one. The
    error ratio divides the root-mean-square relative error of the line that minimises it by that of
    this exponential: below 1 the growth is closer to linear, above 1 closer to exponential. Both
    are NaN unless all times are finite and above 0. The factor needs two points, the ratio three.
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

    The mean is over all recorded times except the first, where nothing can be learned yet.
    """
    mean, best = trained[..., 1:, :].mean(-2), bayes[..., None, 1:, :].mean(-2)
    untrained = mean[..., :1, :]
    return (mean - untrained) / (best - untrained)


def distance_to_bayes(trained: Outer, bayes: Inner) -> Float[np.ndarray, "*batch outer_step mode"]:
    """Computes each mode's root-mean-square distance from Bayes' inner curve: 1 untrained."""
    distance = np.sqrt(((trained - bayes[..., None, :, :]) ** 2).mean(-2))
    return distance / distance[..., :1, :]


def outer_times_of(trained: xr.Dataset) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Makes the statistic that maps mean strengths, and Bayes', to each mode's outer learning time.

    That is the outer step at which the mode is half-way from untrained to Bayes (`share_of_bayes`).
    """
    steps = trained["outer_step"].to_numpy()
    return lambda mean, bayes: learning_times(steps, share_of_bayes(mean, bayes))


def over_outer_training(
    trained: xr.Dataset, bayes: xr.Dataset, probe: str = STRENGTH
) -> tuple[Outer, Inner]:
    """Returns mode strengths over outer training, and Bayes', as `outer_times_of` takes them.

    Which of several exchangeable modes the outer loop learns first is chance, and differs between
    seeds. They are sorted into each seed's own order. One half of the tasks gives the order and the
    other half the strengths, so that noise alone does not make an order.
    """
    strength, best = (samples(data, probe, 1) for data in (trained, bayes))
    if not trajectories.modes(trained, probe).exchangeable:
        return strength, best
    best = np.broadcast_to(best.mean(-1, keepdims=True), best.shape)  # Bayes learns them alike
    half, rest = slice(0, None, 2), slice(1, None, 2)
    times = outer_times_of(trained)(strength[:, half].mean(1), best[:, half].mean(1))
    order = np.argsort(times, axis=-1, kind="stable")[:, None, None, None]  # one per seed
    return np.take_along_axis(strength[:, rest], order, -1), best[:, rest]


def outer_times(trained: xr.Dataset, bayes: xr.Dataset, probe: str = STRENGTH) -> Estimate:
    """Estimates the outer step at which each mode is half-way from untrained to Bayes [mode]."""
    return estimate(outer_times_of(trained), *over_outer_training(trained, bayes, probe))


def outer_merit(trained: xr.Dataset, bayes: xr.Dataset, probe: str = STRENGTH) -> Estimate:
    """Estimates the staggering of modes over outer training: `order_of` their `outer_times`."""
    times, order = outer_times_of(trained), order_of(trained, probe)
    statistic = lambda mean, best: order(times(mean, best))
    return estimate(statistic, *over_outer_training(trained, bayes, probe))


def outer_correlation(trained: xr.Dataset, bayes: xr.Dataset, probe: str = STRENGTH) -> Estimate:
    """Estimates the rank correlation of modes' inner times, once trained, with outer times."""
    inner, outer = times_of(trained, probe), outer_times_of(trained)
    statistic = lambda mean, best: rank_correlation(inner(mean[..., -1, :, :]), outer(mean, best))
    return estimate(statistic, *over_outer_training(trained, bayes, probe))


def excess_loss(loss: Numbers, bayes_loss: Numbers, floor: float) -> Numbers:
    """Computes (L − L_Bayes) / (L_Bayes − floor), with floor the loss of knowing the task.

    If Bayes itself has that loss, the result is infinite, or NaN where the learner has it too.
    """
    with np.errstate(all="ignore"):
        return np.divide(loss - bayes_loss, bayes_loss - floor)


def episode_loss(data: xr.Dataset) -> np.ndarray:
    """Computes the mean loss over all answers of an episode [seed, task(, outer_step)].

    A stored loss is the mean since the last recorded time, so the number of answers weights it.
    """
    n_answers = np.diff(trajectories.of_one_learner(data)["time"].to_numpy())
    return np.average(samples(data, "loss", 0)[..., 1:], -1, n_answers)


def excess_over_bayes(trained: xr.Dataset, bayes: xr.Dataset) -> Estimate:
    """Estimates the `excess_loss` of a meta-learner on the tasks that Bayes was measured on.

    The estimate is [outer_step] if the meta-learner was measured over outer training.
    """
    floor, tracked = trajectories.about(trained).loss_floor, "outer_step" in trained.dims
    excess = lambda loss, best: excess_loss(loss, best[..., None] if tracked else best, floor)
    return estimate(excess, episode_loss(trained), episode_loss(bayes))


def joint_excess(
    pairs: Sequence[tuple[xr.Dataset, xr.Dataset]], take: Callable[[np.ndarray], Numbers]
) -> Estimate:
    """Estimates a joint function of the excess losses of several learners, such as a ratio of two.

    `take` receives the excess losses [pair, ...]. A pair is a learner's measurement, and Bayes' on
    the same tasks.
    """
    floors = [trajectories.about(learner).loss_floor for learner, _ in pairs]
    losses = [episode_loss(data) for pair in pairs for data in pair]

    def statistic(*means: Numbers) -> Numbers:
        terms = zip(means[::2], means[1::2], floors, strict=True)
        return take(np.array([excess_loss(*term) for term in terms]))

    return estimate(statistic, *losses)


def to_equal_excess(
    ways: Sequence[xr.Dataset], bayes: xr.Dataset
) -> tuple[Estimate, list[Estimate], list[Estimate]]:
    """Compares ways of training by the outer steps each takes to an excess loss that all reach.

    Returns that excess loss, the outer steps of each way, and the gain of each way: how many times
    fewer outer steps it takes than the first. Each way is measured over outer training, on the
    tasks that Bayes was measured on. Outer steps are linearly interpolated between those measured,
    on the lowest excess loss so far.
    """
    steps, floor = ways[0]["outer_step"].to_numpy(), trajectories.about(ways[0]).loss_floor

    def compare(*mean: Any) -> np.ndarray:
        excess = excess_loss(np.stack(mean[:-1], -1), np.asarray(mean[-1])[..., None, None], floor)
        lowest = np.minimum.accumulate(excess, -2)
        level = lowest[..., -1, :].max(-1)[..., None]
        reached = learning_times(steps, level[..., None] - lowest, p=0.0)
        with np.errstate(all="ignore"):
            return np.concatenate([level, reached, reached[..., :1] / reached], -1)

    losses = [episode_loss(data) for data in (*ways, bayes)]
    level, *rest = estimate(compare, *losses).split()
    return level, rest[: len(ways)], rest[len(ways) :]
