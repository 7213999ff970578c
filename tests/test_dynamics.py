"""Figures of merit on planted trajectories, and intervals against SciPy's bootstrap."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import xarray as xr

from metadyn import dynamics, figures
from metadyn.errors import ConfigError
from metadyn.trajectories import About, Modes, dataset, describe


def test_learning_times_are_interpolated_and_censored_modes_are_nan():
    times = np.array([0, 1, 4, 10])
    strength = np.array([[0.0, 0.0, 0.6], [0.25, 0.0, 0.9], [1.0, 0.4, 0.2], [1.0, 0.49, 0.1]])
    t = dynamics.learning_times(times, strength, 0.5)
    np.testing.assert_allclose(t, [1 + 3 * (0.25 / 0.75), np.nan, 0.0])
    batched = dynamics.learning_times(times, np.stack([strength, strength]), 0.5)
    np.testing.assert_array_equal(batched, np.stack([t, t]))


def test_the_first_crossing_counts():
    strength = np.array([[0.0], [1.0], [0.0], [1.0]])
    assert dynamics.learning_times(np.arange(4), strength, 0.25) == 0.25


def test_slope_of_a_power_law_uses_the_modes_that_are_not_censored():
    scale = np.array([2.0, 1.0, 0.3, 0.1])
    t = 7 * scale**-0.8
    np.testing.assert_allclose(dynamics.staggering_slope(scale, t), -0.8)
    t[1] = np.nan
    np.testing.assert_allclose(dynamics.staggering_slope(scale, t), -0.8)
    noisy = np.array([1.0, 3.0, 2.0, 9.0])
    expected = scipy.stats.linregress(np.log(scale), np.log(noisy)).slope
    np.testing.assert_allclose(dynamics.staggering_slope(scale, noisy), expected)
    assert np.isnan(dynamics.staggering_slope(scale, np.array([1, np.nan, np.nan, np.nan])))
    slope = dynamics.staggering_slope(np.array([0.0, 2, 1, 0.3, 0.1]), np.append(5.0, noisy))
    np.testing.assert_allclose(slope, expected)
    batched = dynamics.staggering_slope(scale, np.stack([noisy, 7 * scale**-0.8]))
    np.testing.assert_allclose(batched, [expected, -0.8])


def test_rank_correlation_is_spearmans_and_censored_modes_come_last():
    rng = np.random.default_rng(0)
    scale, t = np.arange(1, 8), rng.normal(size=(3, 7))
    t[1, 2] = t[1, 3]
    expected = [scipy.stats.spearmanr(scale, row).statistic for row in t]
    np.testing.assert_allclose(dynamics.rank_correlation(scale, t), expected)
    with_censored = np.array([1.0, 2.0, 3.0, np.nan])
    np.testing.assert_allclose(dynamics.rank_correlation(np.arange(4), with_censored), 1.0)
    assert np.isnan(dynamics.rank_correlation(np.arange(3), np.ones(3)))


def test_modes_are_ordered_within_each_run_with_censored_ones_last():
    late, early, never = [0, 0, 0, 1.0], [0, 1.0, 1, 1], [0, 0.1, 0.2, 0.3]
    runs = np.array([[late, never, early], [never, early, late]]).swapaxes(1, 2)
    ranks = Modes((1, 2, 3), "context", "rank", exchangeable=True, p=0.8)
    description = describe(
        About("a", "A", "ordinary", "updates", loss_floor=0.0),
        {"mode_strength": ("task", "step", "mode")},
        {"time": ("step", range(4))},
        {"mode_strength": ranks},
    )
    (ordered,) = dynamics.strength(dataset({"mode_strength": runs}, description))
    for run in ordered:
        np.testing.assert_array_equal(run.T, [early, late, never])
    assert dynamics.staggering(np.array([2.0, 5.0, 8.0])) == 0.75
    assert np.isnan(dynamics.staggering(np.array([2.0, np.nan])))


def test_the_last_time_of_a_run_is_its_last_modes_and_infinite_if_one_is_censored():
    t = np.arange(5)[:, None]
    runs = np.stack([t / np.array([2, 4]), t / np.array([4, 1]), t / np.array([2, 40])])
    description = describe(
        About("a", "a", "ordinary", "updates", loss_floor=0.0),
        {"mode_strength": ("task", "step", "mode")},
        {"time": ("step", range(5))},
        {"mode_strength": Modes((1, 2), "s")},
    )
    times = dynamics.last_times(dataset({"mode_strength": runs}, description))
    np.testing.assert_allclose(times, [2, 2, np.inf])


def test_growth_tells_a_line_from_an_exponential():
    k = np.arange(1, 7)
    factor, linear_over_exponential = dynamics.growth(k, 5 * 2.5**k)
    np.testing.assert_allclose(factor, 2.5)
    assert linear_over_exponential > 100
    assert dynamics.growth(k, 3 + 10.0 * k)[1] < 1e-6
    rng = np.random.default_rng(0)
    noisy = 2.0**k * rng.lognormal(sigma=0.1, size=6)
    assert dynamics.growth(k, noisy)[1] > 1
    assert np.isnan(dynamics.growth(k, np.where(k < 6, 1.0 * k, np.inf))[0])
    assert np.isnan(dynamics.growth(k[:0], np.array([]))[0])
    assert np.isnan(dynamics.growth(k, 10.0 * (k - 1))).all()  # the first is learned at the start
    of_two = dynamics.growth(k[:2], np.array([1.0, 3.0]))
    np.testing.assert_allclose(of_two, [3.0, np.nan])


def test_growth_fits_the_line_of_the_least_relative_error():
    """A general minimiser gives the expected line, on times that double."""
    k = np.arange(1, 7)
    t = 2.0**k * np.array([1.1, 0.9, 1, 1, 0.9, 1.1])
    error = lambda fit: np.sqrt(np.mean((fit / t - 1) ** 2))
    line = scipy.optimize.minimize(lambda p: error(p[0] + p[1] * k) ** 2, [1, 1], tol=1e-12).x
    log = scipy.stats.linregress(k, np.log(t))
    exponential = np.exp(log.intercept + log.slope * k)
    expected = error(line[0] + line[1] * k) / error(exponential)
    np.testing.assert_allclose(dynamics.growth(k, t)[1], expected, rtol=1e-4)


def test_interval_over_runs_matches_scipys_bootstrap_of_a_median():
    values = np.random.default_rng(3).lognormal(size=150)
    interval = dynamics.estimate_over_runs(np.median, values, draws=8000)
    expected = scipy.stats.bootstrap(
        (values,), np.median, n_resamples=8000, method="percentile", rng=1, vectorized=False
    ).confidence_interval
    np.testing.assert_allclose(interval.value, np.median(values))
    np.testing.assert_allclose([interval.low, interval.high], expected, atol=0.03)
    infinite = dynamics.estimate_over_runs(np.median, np.full(5, np.inf))
    assert np.isinf(infinite.value)
    assert np.isnan(infinite.low)


def test_excess_loss_equals_its_definition():
    loss, bayes = np.array([0.3, 0.2]), np.array([0.2, 0.2])
    np.testing.assert_allclose(dynamics.excess_loss(loss, bayes, 0.1), [1.0, 0.0], atol=1e-12)
    with np.errstate(all="raise"):  # plain numbers, with a loss of Bayes at the floor
        assert np.isposinf(dynamics.excess_loss(0.2, 0.1, 0.1))


def test_interval_matches_scipys_bootstrap_of_a_nonlinear_statistic():
    rng = np.random.default_rng(0)
    values = rng.lognormal(size=200)
    interval = dynamics.estimate(np.log, values[None], draws=8000)
    expected = scipy.stats.bootstrap(
        (values,),
        lambda v, axis: np.log(v.mean(axis)),
        n_resamples=8000,
        method="percentile",
        rng=1,
    ).confidence_interval
    np.testing.assert_allclose(interval.value, np.log(values.mean()))
    np.testing.assert_allclose([interval.low, interval.high], expected, atol=0.015)


def test_seeds_widen_the_interval_and_shared_tasks_are_paired():
    rng = np.random.default_rng(1)
    tasks = rng.normal(size=400)
    seeds = np.array([-1.0, 0.0, 1.0])[:, None] + tasks
    width = lambda e: e.high - e.low
    single = dynamics.estimate(lambda m: m, tasks[None])
    three = dynamics.estimate(lambda m: m, seeds)
    assert width(three) > 3 * width(single)
    paired = dynamics.estimate(lambda a, b: a - b, tasks[None] + 0.1, tasks[None])
    np.testing.assert_allclose(paired, 0.1, atol=1e-5)


def test_seeds_are_resampled_apart_from_as_many_tasks():
    """Tasks take off what seeds add: resampled alike, the two would cancel in every draw."""
    effects = np.random.default_rng(0).normal(size=6)
    mixed = dynamics.estimate(lambda m: m, effects[:, None] - effects)
    alone = dynamics.estimate(lambda m: m, effects[:, None])
    np.testing.assert_allclose(mixed.high - mixed.low, 2**0.5 * (alone.high - alone.low), rtol=0.2)


def test_coverage_is_near_95_percent():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(300):
        interval = dynamics.estimate(lambda m: m, rng.exponential(size=(1, 80)), draws=400)
        covered += bool(interval.low <= 1 <= interval.high)
    assert 0.89 <= covered / 300 <= 0.98


@pytest.mark.parametrize("seeds", [2, 4, 8])
@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_coverage_is_near_95_percent_where_few_seeds_vary(seeds, noise):
    """Seeds vary alone, or beside tasks."""
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        values = rng.normal(size=(seeds, 1)) + noise * rng.normal(size=(1, 20))
        interval = dynamics.estimate(lambda m: m, values, draws=400)
        covered += bool(interval.low <= 0 <= interval.high)
    assert 0.9 <= covered / 400 <= 1.0


@pytest.mark.parametrize("axis", ["seeds", "tasks"])
def test_the_interval_of_a_mean_of_four_is_students(axis):
    four = np.array([[0.1], [0.5], [0.2], [0.9]])
    mean = dynamics.estimate(lambda m: m, four if axis == "seeds" else four.T, draws=20_000)
    student = scipy.stats.ttest_1samp(four[:, 0], 0).confidence_interval()
    np.testing.assert_allclose(mean.high - mean.low, student.high - student.low, rtol=0.12)


def test_a_mode_that_no_resample_learns_has_no_interval():
    values = np.zeros((1, 10, 3, 1))
    estimate = dynamics.estimate(lambda m: dynamics.learning_times(np.arange(3), m), values)
    assert all(np.isnan(part).all() for part in estimate)


def test_a_single_sample_has_no_interval_but_may_be_paired_with_several():
    single, several = np.full((1, 1), 2.0), np.arange(10.0)[None]
    estimate = dynamics.estimate(np.asarray, single)
    assert (estimate.value, [*np.isnan(estimate)]) == (2, [False, True, True])
    paired = dynamics.estimate(lambda a, b: b - a, single, several)
    assert paired.low < paired.value < paired.high


def test_samples_on_sets_of_other_sizes_are_paired_on_the_tasks_that_both_have():
    few = np.random.default_rng(0).random((3, 20, 4))
    many = np.concatenate([few, np.random.default_rng(1).random((3, 30, 4))], 1)
    difference = lambda *samples: dynamics.estimate(lambda a, b: a - b, *samples)
    np.testing.assert_array_equal(difference(*dynamics.on_common_tasks(2 * many, 2 * few)), 0)
    unpaired = difference(2 * many, 2 * few)
    assert (unpaired.high - unpaired.low > 0.1).all()


def test_narrow_intervals_are_written_with_one_more_digit():
    text = lambda *parts: dynamics.text(dynamics.Estimate(*map(np.asarray, parts)))
    assert text(-0.8887, -0.8899, -0.8879) == "−0.889 [−0.890, −0.888]"
    assert text(-0.001, -0.04, 0.0312) == "0.00 [−0.04, 0.03]"
    assert text(1.5, np.nan, np.nan) == "1.50 [–, –]"
    assert text(np.nan, np.nan, np.nan) == "–"


def test_modes_without_a_place_on_logarithmic_axes_are_left_out():
    """They are a frequency of 0, and a mode that has its strength before the first feedback."""
    times, values = np.arange(5), (0.0, 1.0, 2.0)
    strength = np.clip(times[:, None] / np.array([1.0, 2.0, 4.0]), 0, 1) + np.array([0, 0, 0.6])
    about = About("a", "a", "ordinary", "observations", loss_floor=0.0)
    axes, coords = {"mode_strength": ("seed", "task", "step", "mode")}, {"time": ("step", range(5))}
    modes = Modes(values, "frequency $k$")
    coords[modes.coordinate] = ("mode", values)
    description = describe(about, axes, coords, {"mode_strength": modes})
    data = dataset({"mode_strength": strength[None, None]}, description)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        axis = figures.learning_times(data).axes[0]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["1", "2"]


@pytest.mark.parametrize("values", [(0.0, 0.0), (-1.0, -2.0)])
def test_modes_that_a_log_axis_cannot_show_leave_the_figure_without_them(values):
    about = About("a", "a", "ordinary", "observations", loss_floor=0.0)
    axes, coords = {"mode_strength": ("seed", "task", "step", "mode")}, {"time": ("step", range(5))}
    modes = Modes(values, "eigenvalue")
    coords[modes.coordinate] = ("mode", values)
    description = describe(about, axes, coords, {"mode_strength": modes})
    strength = np.broadcast_to(np.arange(5)[:, None] / 4, (1, 1, 5, 2))
    data = dataset({"mode_strength": strength}, description)
    figures.picture(lambda: figures.learning_times(data))


def test_there_is_no_interval_if_many_draws_have_no_value():
    """The mean is below 0, and has no logarithm, in about a third of the draws."""
    values = np.random.default_rng(4).normal(0.05, 1, size=100)
    with np.errstate(invalid="ignore"):
        estimate = dynamics.estimate(np.log, values[None] - values.mean() + 0.05)
    np.testing.assert_allclose(estimate.value, np.log(0.05))
    assert np.isnan([estimate.low, estimate.high]).all()
    # The same holds for medians that are infinite in many draws.
    runs = np.where(np.arange(101) < 52, 1.0, np.inf)
    estimate = dynamics.estimate_over_runs(np.median, runs)
    assert estimate.value == 1
    assert np.isnan([estimate.low, estimate.high]).all()


def test_the_loss_of_an_episode_counts_every_answer_once_however_seldom_it_is_recorded():
    losses = np.random.default_rng(0).random((2, 5, 20))  # seed, task, answer
    for times in (range(21), (0, 2, 3, 10, 20)):
        spans = [losses[..., a:b].mean(-1) for a, b in pairwise(times)]
        stored = np.stack([np.full((2, 5), np.nan), *spans])
        dims = ("step", "seed", "task")
        data = xr.Dataset({"loss": (dims, stored)}, {"time": ("step", list(times))})
        np.testing.assert_allclose(dynamics.episode_loss(data), losses.mean(-1))


def test_slopes_are_compared_over_the_modes_that_both_learn():
    """A mode that only one of them learns would move its slope, but not the other's."""
    times = np.array([0, 1, 2, 3, 9])
    description = describe(
        About("a", "A", "ordinary", "updates", loss_floor=0.0),
        {"mode_strength": ("task", "step", "mode")},
        {"time": ("step", times.tolist())},
        {"mode_strength": Modes((1.0, 2.0, 4.0), "s")},
    )

    def jumping(*jumps):
        strength = np.where(times[:, None] >= np.array(jumps), 1.0, 0.0)
        return dataset({"mode_strength": np.stack([strength] * 4)}, description)

    # They are learned at 0.5 and 1.5, and at 0.5, 0.5 and 6.
    first, second = jumping(1, 2, np.inf), jumping(1, 1, 9)
    expected = np.log(1.5 / 0.5) / np.log(2)
    np.testing.assert_allclose(dynamics.difference(first, second), expected)
    np.testing.assert_allclose(dynamics.difference(second, first), -expected)
    np.testing.assert_allclose(dynamics.merit(second), np.log(6 / 0.5) / np.log(4))


def test_ratio_and_difference_of_two_excesses_are_paired_and_relative_to_the_floor():
    """One is 3 times as far above Bayes as the other on every task, whatever the task's loss."""
    best = 0.5 + np.random.default_rng(0).random(50)
    about = About("a", "a", "reference", "observations", loss_floor=0.25)
    description = describe(about, {"loss": ("task", "step")}, {"time": ("step", (0, 1))}, {})
    far, near, bayes = (
        dataset({"loss": np.stack([np.nan * best, best + k * (best - 0.25)], 1)}, description)
        for k in (0.6, 0.2, 0.0)
    )
    pairs = [(far, bayes), (near, bayes)]
    np.testing.assert_allclose(dynamics.joint_excess(pairs, lambda e: e[0] / e[1]), 3.0, rtol=1e-5)
    np.testing.assert_allclose(dynamics.joint_excess(pairs, lambda e: e[0] - e[1]), 0.4, rtol=1e-5)


def test_data_of_several_settings_or_of_a_single_task_or_mode_are_refused():
    """The option of several settings would otherwise be taken for the time."""
    about = About("a", "a", "meta", "observations", loss_floor=0.0)
    axes = {"mode_strength": ("seed", "task", "step", "mode"), "loss": ("seed", "task", "step")}
    modes, coords = Modes((2.0, 1.0), "s", "s"), {"time": ("step", range(5))}
    description = describe(
        about, axes, coords | {"s": ("mode", modes.values)}, {"mode_strength": modes}
    )
    strength = np.broadcast_to(np.arange(5)[:, None] / np.array([4, 6]), (2, 3, 5, 2))
    data = dataset({"mode_strength": strength, "loss": 1 - strength[..., 0]}, description)
    assert dynamics.slope(data)["value"].item() < 0
    several = xr.concat([data, data], xr.Variable("domain.sigma", [0.1, 0.3]))
    for wrong in (several, data.isel(task=0), data.isel(mode=0), data.isel(step=-1)):
        with pytest.raises(ConfigError, match=r"dimensions = .*: of 'mode_strength', .* must be"):
            dynamics.merit(wrong)
    for wrong in (several, data.isel(task=0)):
        with pytest.raises(ConfigError, match=r"dimensions = .*: of 'loss', .* must be"):
            dynamics.episode_loss(wrong)
