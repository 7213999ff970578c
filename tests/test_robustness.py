"""The robustness study, run small in two of its domains: its slopes, worst cases and figure."""

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
DOMAINS, OPTIMIZERS = ("linear", "bandit"), ("sgd", "adam")  # of which the small run is
ALL = ("sgd", "momentum", "rmsprop", "adam")


def among(*domains):
    """Has the study be of some of its domains alone."""
    return patch.dict(TITLES, {name: TITLES[name] for name in domains}, clear=True)


def of_two(words):
    """Options as they are typed, of the first and the last optimiser alone."""
    options = sweep.parsed(words.split())
    return " ".join(word for name, values in options.items() for word in (name, *values[::3]))


def test_ordinary_policies_are_run_as_long_as_the_bandits_own_study_says():
    study = load_study(STUDY)
    sweeps, presets = sys.modules[study.plan.__module__].sweeps, study.presets
    for preset, updates in {"quick": "60000 60000 10000", "paper": "400000 400000 66666"}.items():
        assert f"--policy.updates {updates} " in sweeps(presets[preset], "bandit")["inner"][1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out, study = tmp_path_factory.mktemp("runs") / "robustness", load_study(STUDY)
    config, module = configured(study.presets["quick"], SMALL), sys.modules[study.plan.__module__]
    of_each = ("outer_rates", "regression_updates")
    config = dataclasses.replace(config, **{name: getattr(config, name)[::3] for name in of_each})
    inner = {name: of_two(words) for name, words in module.INNER.items()}
    two = patch.multiple(module, INNER=inner, OPTIMIZERS=" ".join(OPTIMIZERS))
    with two, among(*DOMAINS):
        run_study(study, "quick", 0, config, out, Progress(None))
    return out


@pytest.fixture(scope="module")
def found(finished):
    """Every figure of merit by name: value, low, high."""
    summary = json.loads((finished / "summary.json").read_text())
    rows = (*summary["criteria"], *summary["reported"])
    return {row["name"]: (row["value"], row["low"], row["high"]) for row in rows}


def crossings(data, p):
    """Learning times of mean strengths by interpolation; NaN where one never crosses."""
    strength = data["mode_strength"].mean("task").transpose("step", "mode").to_numpy()
    time, found = data["time"].to_numpy(), []
    for column in strength.T:
        (after,) = np.nonzero(column >= p)
        near = slice(max(after[0] - 1, 0), after[0] + 1) if len(after) else None
        found.append(np.nan if near is None else np.interp(p, column[near], time[near]))
    return np.array(found)


def test_the_ordinary_learners_slope_is_that_of_the_stored_curves(finished, found):
    data = RunFolder(finished).measurement("inner_linear", "inner_sgd")
    t = crossings(data, 0.5)
    learned = np.isfinite(t)
    assert found["linear_inner_sgd_censored_modes"][0] == (~learned).sum()
    s = data["singular_value"].to_numpy()[learned]
    slope = scipy.stats.linregress(np.log(s), np.log(t[learned])).slope
    np.testing.assert_allclose(found["linear_inner_sgd_staggering"][0], slope, rtol=1e-4)


def test_in_the_bandit_the_staggering_of_bayes_is_taken_off(finished, found):
    run, beyond = RunFolder(finished), []
    for who in ("inner_sgd", "bayes"):
        data = run.measurement("inner_bandit", who)
        assert data.sizes["task"] == 7  # more than others: an update costs next to nothing
        times = data["time"].to_numpy()
        ordered = []
        for curves in data["mode_strength"].transpose("task", "step", "mode").to_numpy():
            first = [times[np.argmax(c >= 0.8)] if c.max() >= 0.8 else np.inf for c in curves.T]
            ordered.append(curves[:, np.argsort(first, kind="stable")])
        mean = data.copy()
        mean["mode_strength"] = (("task", "step", "mode"), np.array(ordered))
        t = crossings(mean, 0.8)
        beyond.append((t[-1] - t[0]) / t[-1])
    value = found["bandit_inner_sgd_staggering"][0]
    np.testing.assert_allclose(value, beyond[0] - beyond[1], rtol=1e-4)


def test_the_worst_case_is_the_greatest_of_its_variants(found):
    each = [found[f"linear_inner_{o}_staggering"][0] for o in OPTIMIZERS]
    assert found["linear_inner_optimizers"][0] == pytest.approx(-max(each))
    each = [found[f"bandit_inner_{o}_staggering"][0] for o in OPTIMIZERS]
    assert found["bandit_inner_optimizers"][0] == pytest.approx(min(each))
    parts = "0.5_staggering", "0.5_censored_modes", "worst"
    one, missed, worst = (found[f"linear_noise_{part}"] for part in parts)
    unsure = None in one or missed[0] > 0
    assert worst[0] == (None if unsure else pytest.approx(abs(one[0])))


def test_what_is_claimed_is_judged_in_all_three_domains(found):
    """The third is rehearsed, with every optimiser and other widths."""
    study = load_study(STUDY)
    quick, module = study.presets["quick"], sys.modules[study.plan.__module__]
    for name in DOMAINS:
        settings = sweep.zipped(quick.domain_config(name), module.sweeps(quick, name)["inner"][1])
        assert tuple(optimizer for optimizer, _ in settings) == ALL
    with among("nonlinear"):
        named = {each.name for each in rehearse(study, quick, study.plan(quick))}
    assert {f"nonlinear_{x}_{o}_staggering" for x in ("inner", "outer") for o in ALL} <= named
    claimed = {*ChainMap(*study.claims.values())}
    hidden = {f"{name}_hidden_{row}" for name in DOMAINS for row in ("unlearned", "worst")}
    assert claimed - named - {*found} == hidden


def test_a_setting_is_made_of_the_nth_value_of_each_option():
    """Values may come twice: two optimisers may share a rate. In a grid they may not."""
    default = load_study("nonlinear_regression").presets["quick"]
    words = "--mlp.optimizer sgd adam rmsprop --mlp.learning-rate 0.2 1e-3 1e-3 --mlp.width 64"
    found = sweep.zipped(default, words)
    assert [first for first, _ in found] == ["sgd", "adam", "rmsprop"]
    assert [config.mlp.learning_rate for _, config in found] == [0.2, 1e-3, 1e-3]
    assert all(config.mlp.width == 64 for _, config in found)
    with pytest.raises(ConfigError, match=r"setting 2 of 2 .*: --mlp.width -1: must be positive"):
        sweep.zipped(default, "--mlp.width 8 -1")
    with pytest.raises(ConfigError, match="1e-3: given twice"):
        sweep.settings(sweep.parsed(words.split()), "grid", {}, 0, 0)


def test_what_is_never_learned_is_counted_and_gives_no_verdict(found):
    assert found["bandit_outer_sgd_censored_modes"][0] == 3
    assert found["bandit_outer_sgd_staggering"] == (None, None, None)
    assert found["bandit_outer_worst"] == (None, None, None)
    names = [name for name in found if name.startswith("bandit_outer") and "staggering" in name]
    assert len(names) == 2
    for kind in ("bandit_outer", "bandit_noise", "linear_outer", "linear_noise"):
        each = [row for name, row in found.items() if f"{kind}_" in name and "stagg" in name]
        missed = [row for name, row in found.items() if f"{kind}_" in name and "censored" in name]
        unsure = [None in row or n[0] > 0 for row, n in zip(each, missed, strict=True)]
        assert found[f"{kind}_unlearned"][0] == sum(unsure)


def test_a_variant_that_misses_a_mode_is_counted_and_not_compared(finished):
    """It staggers by far, in the two modes that it learns; all others learn every mode at once."""
    stored, study = RunFolder(finished).results(), load_study(STUDY)

    def made_up(task_set, name):
        data = stored[task_set, name].copy()
        if task_set == "tracked_linear":
            rates = [2.0, 1.0, 0.0] if name == "outer_adam" else [1.0, 1.0, 1.0]
            strength, time = data["mode_strength"], data["time"] / data["time"].max()
            rising = (xr.DataArray(rates, dims="mode") * time).broadcast_like(strength)
            data["mode_strength"] = strength.copy(data=rising.transpose(*strength.dims))
        return data

    results = Results({s: [*stored.learners(s)] for s in stored.sets()}, made_up)
    with among("linear"):
        found = {row.name: row.value for row in study.criteria(study.presets["quick"], results)}
    assert abs(found["linear_outer_adam_staggering"]) > 0.2
    assert found["linear_outer_unlearned"] == 1
    assert found["linear_outer_worst"] == pytest.approx(0, abs=1e-6)


def test_a_meta_learner_beside_the_study_has_a_row_for_each_set_that_it_is_measured_on():
    def mine(comparison):
        return Contender("mine", "mine", LSTMConfig(hidden=4).make(comparison.domain))

    study = load_study(STUDY).beside("with_mine", mine)
    config = configured(study.presets["quick"], SMALL)
    with among("linear"):
        names = {each.name for each in rehearse(study, config, study.plan(config))}
    of_mine = {name for name in names if "mine" in name}
    excess = {"linear_mine_excess", "linear_heldout_linear_noise_0.5_mine_excess"}
    assert {name for name in of_mine if name.endswith("excess")} == excess
    slopes = {"linear_mine_staggering", "linear_tracked_linear_noise_0.5_mine_staggering"}
    assert {name for name in of_mine if name.endswith("staggering")} == slopes


def test_the_figure_shows_each_variant_at_its_value_and_says_what_has_none(finished, found):
    study = load_study(STUDY)
    (table,) = study.tables
    results = RunFolder(finished).results()
    assert list(study.figures) == ["robustness"]
    assert figures.histories(results) == {}  # none is followed: there are too many
    figure = study.figures["robustness"](results)
    shown = {}
    for axis in figure.axes:
        labels = [text.get_text() for text in axis.get_yticklabels()]
        at = [container.lines[0].get_xdata()[0] for container in axis.containers]
        shown |= {f"{axis.get_title()}, {label}": x for label, x in zip(labels, at, strict=True)}
        never = sum("too few" in text.get_text() for text in axis.texts)
        assert never == np.isnan(at).sum()
    assert np.isnan(list(shown.values())).any()
    for name, label in table.rows.items():
        if label in shown:  # the table has rows for the widths of the presets
            value = found[f"{name}_staggering"][0]
            np.testing.assert_allclose(shown[label], np.nan if value is None else value, rtol=1e-6)
    assert set(shown) <= set(table.rows.values())


def test_networks_that_differ_in_their_training_alone_are_one_object():
    """So that one compiled program measures them all."""
    quick = load_study(STUDY).presets["quick"]
    other = dataclasses.replace(quick, outer=dataclasses.replace(quick.outer, learning_rate=1.0))
    wider = dataclasses.replace(quick, lstm=dataclasses.replace(quick.lstm, hidden=7))
    one, two, three = (each.meta_learner(each.linear).learner for each in (quick, other, wider))
    assert one is two
    assert one is not three
