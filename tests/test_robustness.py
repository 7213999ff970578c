"""The robustness study, run small in two of its domains: slopes, worst cases and figure."""

import dataclasses
import json
import sys
from collections import ChainMap
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import scipy.stats
import xarray as xr

from metadyn import figures, sweep
from metadyn.errors import ConfigError
from metadyn.learners.lstm import LSTMConfig
from metadyn.options import configured
from metadyn.progress import Progress
from metadyn.runner import rehearse, run_study
from metadyn.several_domains import TITLES
from metadyn.store import Results, RunFolder
from metadyn.study import Contender, load_study

STUDY = str(Path(__file__).parent.parent / "experiments" / "robustness.py")
SMALL = [
    *("--linear.n-x", "3", "--linear.n-y", "3", "--linear.steps", "4"),
    *("--bandit.contexts", "3", "--bandit.actions", "3", "--bandit.steps", "20"),
    *("--lstm.hidden", "4", "--widths", "--outer.steps", "20", "--outer.batch", "16"),
    *("--outer.seeds", "2", "--outer.warmup", "1", "--outer.checkpoints", "1"),
    *("--measure.updating-tasks", "6", "--measure.tracked-tasks", "6"),
    *("--measure.heldout-tasks", "8", "--measure.tasks", "7"),
]
DOMAINS, OPTIMIZERS = ("linear", "bandit"), ("sgd", "adam")  # those of the small run
ALL = ("sgd", "momentum", "rmsprop", "adam")


def restricted_to(*domains):
    """Restricts the study to some of its domains."""
    return patch.dict(TITLES, {name: TITLES[name] for name in domains}, clear=True)


def first_and_last(words):
    """Restricts typed options of four optimisers to the first and the last."""
    options = sweep.parsed(words.split())
    return " ".join(word for name, values in options.items() for word in (name, *values[::3]))


def test_ordinary_policies_are_run_for_as_long_as_in_the_bandits_own_study():
    study = load_study(STUDY)
    sweeps, presets = sys.modules[study.plan.__module__].sweeps, study.presets
    for preset, updates in {"quick": "60000 60000 10000", "paper": "400000 400000 66666"}.items():
        assert f"--policy.updates {updates} " in sweeps(presets[preset], "bandit")["inner"][1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out, study = tmp_path_factory.mktemp("runs") / "robustness", load_study(STUDY)
    config, module = configured(study.presets["quick"], SMALL), sys.modules[study.plan.__module__]
    fields = ("outer_rates", "regression_updates")
    config = dataclasses.replace(config, **{name: getattr(config, name)[::3] for name in fields})
    inner = {name: first_and_last(words) for name, words in module.INNER.items()}
    patched = patch.multiple(module, INNER=inner, OPTIMIZERS=" ".join(OPTIMIZERS))
    with patched, restricted_to(*DOMAINS):
        run_study(study, "quick", 0, config, out, Progress(None))
    return out


@pytest.fixture(scope="module")
def merits(finished):
    """Every figure of merit by name, as (value, low, high)."""
    summary = json.loads((finished / "summary.json").read_text())
    rows = (*summary["criteria"], *summary["reported"])
    return {row["name"]: (row["value"], row["low"], row["high"]) for row in rows}


def crossings(data, p):
    """Returns learning times of mean strengths by interpolation, NaN where one never crosses."""
    strength = data["mode_strength"].mean("task").transpose("step", "mode").to_numpy()
    time, times = data["time"].to_numpy(), []
    for column in strength.T:
        (above,) = np.nonzero(column >= p)
        around = slice(max(above[0] - 1, 0), above[0] + 1) if len(above) else None
        times.append(np.nan if around is None else np.interp(p, column[around], time[around]))
    return np.array(times)


def test_the_ordinary_learners_slope_is_that_of_the_stored_curves(finished, merits):
    data = RunFolder(finished).measurement("inner_linear", "inner_sgd")
    t = crossings(data, 0.5)
    learned = np.isfinite(t)
    assert merits["linear_inner_sgd_censored_modes"][0] == (~learned).sum()
    s = data["singular_value"].to_numpy()[learned]
    slope = scipy.stats.linregress(np.log(s), np.log(t[learned])).slope
    np.testing.assert_allclose(merits["linear_inner_sgd_staggering"][0], slope, rtol=1e-4)


def test_in_the_bandit_the_staggering_of_bayes_is_subtracted(finished, merits):
    run, staggering = RunFolder(finished), []
    for learner in ("inner_sgd", "bayes"):
        data = run.measurement("inner_bandit", learner)
        assert data.sizes["task"] == 7  # more tasks, as updates cost next to nothing
        times = data["time"].to_numpy()
        sorted_tasks = []
        for curves in data["mode_strength"].transpose("task", "step", "mode").to_numpy():
            first = [times[np.argmax(c >= 0.8)] if c.max() >= 0.8 else np.inf for c in curves.T]
            sorted_tasks.append(curves[:, np.argsort(first, kind="stable")])
        mean = data.copy()
        mean["mode_strength"] = (("task", "step", "mode"), np.array(sorted_tasks))
        t = crossings(mean, 0.8)
        staggering.append((t[-1] - t[0]) / t[-1])
    value = merits["bandit_inner_sgd_staggering"][0]
    np.testing.assert_allclose(value, staggering[0] - staggering[1], rtol=1e-4)


def test_the_worst_case_is_the_greatest_of_its_variants(merits):
    linear = [merits[f"linear_inner_{o}_staggering"][0] for o in OPTIMIZERS]
    assert merits["linear_inner_optimizers"][0] == pytest.approx(-max(linear))
    bandit = [merits[f"bandit_inner_{o}_staggering"][0] for o in OPTIMIZERS]
    assert merits["bandit_inner_optimizers"][0] == pytest.approx(min(bandit))
    names = "0.5_staggering", "0.5_censored_modes", "worst"
    noisy, censored, worst = (merits[f"linear_noise_{name}"] for name in names)
    undecided = None in noisy or censored[0] > 0
    assert worst[0] == (None if undecided else pytest.approx(abs(noisy[0])))


def test_claims_are_judged_in_all_three_domains(merits):
    """The third domain is rehearsed, with every optimiser and other widths."""
    study = load_study(STUDY)
    quick, module = study.presets["quick"], sys.modules[study.plan.__module__]
    for name in DOMAINS:
        settings = sweep.zipped(quick.domain_config(name), module.sweeps(quick, name)["inner"][1])
        assert tuple(optimizer for optimizer, _ in settings) == ALL
    with restricted_to("nonlinear"):
        rehearsed = {criterion.name for criterion in rehearse(study, quick, study.plan(quick))}
    assert {f"nonlinear_{x}_{o}_staggering" for x in ("inner", "outer") for o in ALL} <= rehearsed
    claimed = {*ChainMap(*study.claims.values())}
    hidden = {f"{name}_hidden_{row}" for name in DOMAINS for row in ("unlearned", "worst")}
    assert claimed - rehearsed - {*merits} == hidden


def test_a_setting_is_made_of_the_nth_value_of_each_option():
    """Unlike in a grid, values may repeat, because two optimisers may share a rate."""
    default = load_study("nonlinear_regression").presets["quick"]
    words = "--mlp.optimizer sgd adam rmsprop --mlp.learning-rate 0.2 1e-3 1e-3 --mlp.width 64"
    settings = sweep.zipped(default, words)
    assert [first for first, _ in settings] == ["sgd", "adam", "rmsprop"]
    assert [config.mlp.learning_rate for _, config in settings] == [0.2, 1e-3, 1e-3]
    assert all(config.mlp.width == 64 for _, config in settings)
    with pytest.raises(ConfigError, match=r"setting 2 of 2 .*: --mlp.width -1: must be positive"):
        sweep.zipped(default, "--mlp.width 8 -1")
    with pytest.raises(ConfigError, match="1e-3: given twice"):
        sweep.settings(sweep.parsed(words.split()), "grid", {}, 0, 0)


def test_modes_never_learned_are_counted_and_give_no_verdict(merits):
    assert merits["bandit_outer_sgd_censored_modes"][0] == 3
    assert merits["bandit_outer_sgd_staggering"] == (None, None, None)
    assert merits["bandit_outer_worst"] == (None, None, None)
    names = [name for name in merits if name.startswith("bandit_outer") and "staggering" in name]
    assert len(names) == 2
    for kind in ("bandit_outer", "bandit_noise", "linear_outer", "linear_noise"):
        rows = [row for name, row in merits.items() if f"{kind}_" in name and "stagg" in name]
        missed = [row for name, row in merits.items() if f"{kind}_" in name and "censored" in name]
        undecided = [None in row or n[0] > 0 for row, n in zip(rows, missed, strict=True)]
        assert merits[f"{kind}_unlearned"][0] == sum(undecided)


def test_a_variant_that_misses_a_mode_is_counted_and_not_compared(finished):
    """It staggers by far in the two modes that it learns. All others learn every mode at once."""
    stored, study = RunFolder(finished).results(), load_study(STUDY)

    def planted(task_set, name):
        data = stored[task_set, name].copy()
        if task_set == "tracked_linear":
            rates = [2.0, 1.0, 0.0] if name == "outer_adam" else [1.0, 1.0, 1.0]
            strength, time = data["mode_strength"], data["time"] / data["time"].max()
            rising = (xr.DataArray(rates, dims="mode") * time).broadcast_like(strength)
            data["mode_strength"] = strength.copy(data=rising.transpose(*strength.dims))
        return data

    results = Results({s: [*stored.learners(s)] for s in stored.sets()}, planted)
    with restricted_to("linear"):
        values = {row.name: row.value for row in study.criteria(study.presets["quick"], results)}
    assert abs(values["linear_outer_adam_staggering"]) > 0.2
    assert values["linear_outer_unlearned"] == 1
    assert values["linear_outer_worst"] == pytest.approx(0, abs=1e-6)


def test_a_meta_learner_beside_the_study_has_a_row_for_each_set_on_which_it_is_measured():
    def mine(comparison):
        return Contender("mine", "mine", LSTMConfig(hidden=4).make(comparison.domain))

    study = load_study(STUDY).beside("with_mine", mine)
    config = configured(study.presets["quick"], SMALL)
    with restricted_to("linear"):
        names = {criterion.name for criterion in rehearse(study, config, study.plan(config))}
    of_mine = {name for name in names if "mine" in name}
    excess = {"linear_mine_excess", "linear_heldout_linear_noise_0.5_mine_excess"}
    assert {name for name in of_mine if name.endswith("excess")} == excess
    slopes = {"linear_mine_staggering", "linear_tracked_linear_noise_0.5_mine_staggering"}
    assert {name for name in of_mine if name.endswith("staggering")} == slopes


def test_the_figure_shows_each_variant_at_its_value_and_marks_those_without_one(finished, merits):
    study = load_study(STUDY)
    (table,) = study.tables
    results = RunFolder(finished).results()
    assert list(study.figures) == ["robustness"]
    assert figures.histories(results) == {}  # there are too many for their histories to be shown
    figure = study.figures["robustness"](results)
    shown = {}
    for axis in figure.axes:
        labels = [text.get_text() for text in axis.get_yticklabels()]
        xs = [container.lines[0].get_xdata()[0] for container in axis.containers]
        shown |= {f"{axis.get_title()}, {label}": x for label, x in zip(labels, xs, strict=True)}
        unlearned = sum("too few" in text.get_text() for text in axis.texts)
        assert unlearned == np.isnan(xs).sum()
    assert np.isnan(list(shown.values())).any()
    for name, label in table.rows.items():
        if label in shown:  # the table has rows for the widths of the presets
            value = merits[f"{name}_staggering"][0]
            np.testing.assert_allclose(shown[label], np.nan if value is None else value, rtol=1e-6)
    assert set(shown) <= set(table.rows.values())


def test_networks_that_differ_only_in_their_training_are_one_object():
    """One compiled program then measures them all."""
    quick = load_study(STUDY).presets["quick"]
    faster = dataclasses.replace(quick, outer=dataclasses.replace(quick.outer, learning_rate=1.0))
    wider = dataclasses.replace(quick, lstm=dataclasses.replace(quick.lstm, hidden=7))
    first, second, third = (c.meta_learner(c.linear).learner for c in (quick, faster, wider))
    assert first is second
    assert first is not third
