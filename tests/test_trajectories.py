"""Labelled arrays: several learners are merged into one dataset and split again."""

import numpy as np
import pytest
import xarray as xr

from metadyn import dynamics, figures, trajectories
from metadyn.base import Modes
from metadyn.errors import ConfigError

MODES = Modes((2.0, 1.0), "singular value", "singular_value")
SIZES = {"seed": 3, "task": 4, "outer_step": 2, "step": 6, "mode": 2}


def learner(name, kind, *more):
    """Returns data with dimensions `more`: strengths that rise to 1.2, the greater mode first."""
    axes = (*(axis for axis in ("seed", "task", "outer_step") if axis in more), "step", "mode")
    rng = np.random.default_rng(0)
    rise = np.linspace(0, 1.2, 6)[:, None] * np.array([1.0, 0.9])
    strength = rise + 0.01 * rng.random([SIZES[axis] for axis in axes])
    loss = 1.5 - strength.mean(-1)
    about = trajectories.About(name, name, kind, "observations", 0.5)
    coords = {"time": ("step", range(6)), "singular_value": ("mode", MODES.values)}
    arrays = {"mode_strength": strength, "loss": loss}
    if kind == "ordinary":
        arrays["closed_form"] = rise
    dims = {"mode_strength": axes, "loss": axes[:-1], "closed_form": ("step", "mode")}
    if "outer_step" in more:
        coords["outer_step"] = ("outer_step", (0, 10))
    return trajectories.dataset(
        arrays, trajectories.describe(about, dims, coords, {"mode_strength": MODES})
    )


@pytest.fixture(scope="module")
def parts():
    return {
        "sgd": learner("sgd", "ordinary", "task"),
        "lstm": learner("lstm", "meta", "seed", "task", "outer_step"),
        "bayes": learner("bayes", "bayes", "task"),
    }


def test_learners_without_seeds_are_repeated_over_as_many_seeds_as_any_has(parts):
    fewer = parts["lstm"].isel(seed=slice(2))
    merged = trajectories.merge({"lstm": parts["lstm"], "fewer": fewer, "bayes": parts["bayes"]})
    assert merged.sizes["seed"] == 3
    assert not merged["loss"].sel(learner="bayes").isnull().any()
    assert merged["loss"].sel(learner="fewer").isel(seed=2).isnull().all()


def test_learners_stored_at_different_outer_steps_keep_their_own(parts):
    shifted = parts["lstm"].assign_coords(outer_step=[0, 4])
    merged = trajectories.merge({"one": shifted, "other": parts["lstm"], "bayes": parts["bayes"]})
    assert merged["outer_step"].values.tolist() == [0, 4, 10]
    last = parts["lstm"]["loss"].isel(outer_step=1)
    for name, step, absent in (("one", 4, 10), ("other", 10, 4)):
        loss = merged["loss"].sel(learner=name)
        assert loss.sel(outer_step=absent).isnull().all()
        np.testing.assert_array_equal(loss.sel(outer_step=step).transpose(*last.dims), last)
    assert not merged["loss"].sel(learner="bayes").isel(step=-1).isnull().any()


def test_split_undoes_merge(parts):
    """Learners that are not trained have no outer step, and a closed form has no seed or task."""
    split = trajectories.split(trajectories.merge(parts))
    assert [*split] == [*parts]
    for name, data in parts.items():
        restored = split[name]
        assert ("outer_step" in restored.dims) == ("outer_step" in data.dims)
        assert ("closed_form" in restored) == ("closed_form" in data)
        assert trajectories.about(restored) == trajectories.about(data)
        for array in ("mode_strength", "loss"):
            dims = data[array].dims
            assert {*restored[array].dims} == {*dims}
            np.testing.assert_array_equal(restored[array].transpose(*dims), data[array])
    np.testing.assert_array_equal(
        split["sgd"]["closed_form"].transpose("step", "mode"), parts["sgd"]["closed_form"]
    )


@pytest.mark.parametrize(
    "arrange", [lambda d: d.sortby("singular_value"), lambda d: d.isel(mode=[1, 0])]
)
def test_modes_keep_their_values_however_they_are_sorted(parts, arrange):
    merged = trajectories.merge(parts)
    slopes = [dynamics.slope(data)["value"] for data in (merged, arrange(merged))]
    xr.testing.assert_allclose(*slopes)
    assert trajectories.modes(merged.isel(mode=[1])).values == (1.0,)
    with pytest.raises(ConfigError, match="must keep 'singular_value'"):
        dynamics.slope(merged.set_index(mode="singular_value").sortby("mode"))


def test_runs_with_different_spectra_keep_their_own(parts):
    first, second = trajectories.merge(parts), trajectories.merge(parts)
    second = second.assign_coords(singular_value=("mode", [8.0, 1.0]))
    joined = trajectories.concatenate([first, second], "run", ["one", "other"])
    for name, run in (("one", first), ("other", second)):
        slope = dynamics.slope(joined.sel(run=name))
        xr.testing.assert_allclose(slope, dynamics.slope(run))
    with pytest.raises(ConfigError, match="select one setting"):
        trajectories.modes(joined)


@pytest.mark.parametrize("first", [0, 1])
def test_settings_with_different_learners_keep_their_own(parts, first):
    fewer = {name: parts[name] for name in ("sgd", "bayes")}
    settings = [parts, fewer][:: 1 - 2 * first]
    joined = trajectories.concatenate(map(trajectories.merge, settings), "setting", [0, 1])
    for i, learners in enumerate(settings):
        restored = trajectories.split(joined.sel(setting=i))
        assert {*restored} == {*learners}
        slopes = (dynamics.slope(data)["value"] for data in (restored, learners))
        xr.testing.assert_allclose(*(slope.sortby("learner") for slope in slopes))


def test_a_learner_selected_from_a_merged_dataset_is_judged_as_before(parts):
    """Merging pads tasks and times, repeats missing axes and makes attributes coordinates."""
    fewer = parts["sgd"].isel(task=slice(2), step=slice(4))
    merged = trajectories.merge({**parts, "sgd": fewer})
    bayes, sgd = parts["bayes"], merged.sel(learner="sgd")
    np.testing.assert_allclose(dynamics.merit(sgd), dynamics.merit(fewer))
    np.testing.assert_allclose(dynamics.episode_loss(sgd), dynamics.episode_loss(fewer))
    selected = [merged.sel(learner=name) for name in ("lstm", "bayes")]
    for figure in (dynamics.excess_over_bayes, dynamics.outer_times, dynamics.outer_merit):
        np.testing.assert_allclose(figure(*selected), figure(parts["lstm"], bayes))
    last = [data.isel(outer_step=-1, missing_dims="ignore") for data in (parts["lstm"], bayes)]
    at_last = [data.isel(outer_step=-1) for data in selected]
    np.testing.assert_allclose(dynamics.difference(*at_last), dynamics.difference(*last))
    with pytest.raises(ConfigError, match=r"data = \['sgd', 'lstm', 'bayes'\]: select one learner"):
        dynamics.merit(merged)


def test_a_learner_with_too_few_learned_modes_for_a_slope_is_still_in_the_legend(parts):
    slow = parts["sgd"].assign(mode_strength=parts["sgd"]["mode_strength"] * 0.1)
    slow = slow.assign_attrs(label="slow")
    slow["mode_strength"].attrs = parts["sgd"]["mode_strength"].attrs
    (legend,) = figures.learning_times({"bayes": parts["bayes"], "slow": slow}).legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert [label.split(" (")[0] for label in labels] == ["bayes", "slow"]
    assert labels[1].endswith("too few learned for a slope")


def test_arrays_that_some_learners_diagnose_are_padded(parts):
    wide = xr.DataArray(np.ones((4, 6, 5)), dims=("task", "step", "svals_0"))
    diagnosed = {"a": parts["sgd"].assign(svals=wide), "b": parts["bayes"]}
    merged = trajectories.merge(diagnosed | {"c": parts["sgd"].assign(svals=wide[..., :3])})
    assert merged.sizes["svals_0"] == 5
    np.testing.assert_array_equal(
        merged["svals"].notnull().any(["task", "step"]).sum("svals_0"), [5, 0, 3]
    )


@pytest.mark.parametrize("lost", [slice(None), slice(0, 2)])
def test_diverged_readings_are_not_taken_for_padding(parts, lost):
    """Readings diverge on all tasks, or on the first two."""
    diverged = parts["sgd"].copy(deep=True)
    for name in ("mode_strength", "loss"):
        diverged[name][{"task": lost}] = np.nan
    learners = parts | {"sgd": diverged}
    split = trajectories.split(trajectories.merge(learners))["sgd"]
    for name in ("mode_strength", "loss"):
        np.testing.assert_array_equal(split[name].transpose(*diverged[name].dims), diverged[name])
    slope = dynamics.slope(trajectories.merge(learners)).sel(learner="sgd")
    assert np.isnan(slope["value"])
    figures.mode_strength(trajectories.merge(learners))


def test_a_merged_dataset_is_drawn_and_judged_as_its_parts_are(parts):
    merged = trajectories.merge(parts)
    last = parts | {"lstm": parts["lstm"].isel(outer_step=-1)}
    xr.testing.assert_allclose(dynamics.slope(merged), dynamics.slope(last))
    selected = dynamics.slope(merged.sel(learner="sgd"))
    xr.testing.assert_allclose(selected, dynamics.slope({"sgd": parts["sgd"]}))
    split = trajectories.split(merged)
    excess = dynamics.excess_over_bayes(split["lstm"], split["bayes"])
    expected = dynamics.excess_over_bayes(parts["lstm"], parts["bayes"])
    np.testing.assert_allclose(excess.value, expected.value)
    assert np.shape(excess.value) == (2,)
    figure = figures.mode_strength(last | {"lstm": split["lstm"].isel(outer_step=-1)})
    (dotted,) = (
        line
        for axis in figure.axes
        for line in axis.lines
        if line.get_linestyle() == ":" and line.get_label() == "closed form"
    )
    redrawn = figures.mode_strength(merged.isel(outer_step=-1))
    (redrawn_line,) = (
        line for axis in redrawn.axes for line in axis.lines if line.get_label() == "closed form"
    )
    np.testing.assert_array_equal(dotted.get_xydata(), redrawn_line.get_xydata())


def test_the_single_run_shown_has_the_median_time_to_learn_all_modes():
    """Three runs learn the lesser mode at 1, and the greater, which comes last, at 4, 2 and 3."""
    data = learner("sgd", "ordinary", "task").drop_vars("closed_form").isel(task=[0, 1, 2])
    strength = np.zeros((3, 6, 2))
    for run, time in enumerate((4, 2, 3)):
        strength[run, 1:, 1] = 1
        strength[run, time:, 0] = 1
    data["mode_strength"] = data["mode_strength"].copy(data=strength)
    lines = figures.single_runs({"sgd": data}).axes[0].lines
    greater = next(line for line in lines if len(line.get_xdata()) == 6)
    np.testing.assert_array_equal(greater.get_ydata(), strength[2, :, 0])
