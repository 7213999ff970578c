"""The nonlinear-regression study: one small run of it, and bad input to it."""

import dataclasses
import json
import shutil
from pathlib import Path

import matplotlib.image
import pytest

import metadyn
from metadyn.cli import main

STUDY = str(Path(__file__).parent.parent / "experiments" / "nonlinear_regression.py")
SMALL = [
    *("--domain.steps", "5", "--lstm.hidden", "4", "--outer.steps", "30", "--outer.batch", "4"),
    *("--outer.seeds", "2", "--outer.warmup", "1", "--outer.checkpoints", "3"),
    *("--mlp.width", "8", "--mlp.depth", "2", "--mlp.updates", "12", "--mlp.records", "4"),
    *("--measure.tasks", "32", "--measure.updating-tasks", "4", "--measure.shifted-tasks", "8"),
    *("--measure.tracked-tasks", "4", "--measure.heldout-tasks", "16"),
    *("--measure.probe-points", "11", "--measure.chunk", "4"),  # sets of any size share programs
]
OUTER = ("inner_curves", "outer_learning", "distance_to_bayes")
OPTIMIZERS = ("sgd", "momentum", "rmsprop", "adam")
for name in OPTIMIZERS:
    option = f"--optimizers.{name}"
    SMALL += [f"{option}.updates", "8", f"{option}.width", "8", f"{option}.depth", "1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "nonlinear"
    assert main(["run", STUDY, "--out", str(out), *SMALL]) == 1  # so small a study fails
    return out


def test_a_small_run_has_all_figures_and_criteria(finished):
    figures = {p.stem: matplotlib.image.imread(p) for p in (finished / "figures").glob("*.png")}
    assert set(figures) == {
        "mode_strength", "learning_times", "mode_strength_by_optimizer", "band_gain",
        *(f"{name}{suffix}" for name in OUTER for suffix in ("", "_band")), "orders",
    }  # fmt: skip
    assert all(image.std() > 0.02 for image in figures.values())
    summary = json.loads((finished / "summary.json").read_text())
    assert {c["name"] for c in summary["criteria"]} == {
        "mlp_slope", "mlp_rank_correlation", "lstm_minus_bayes_slope", "lstm_stop_band_gain",
        "lstm_excess_loss", "sgd_slope", "momentum_slope", "rmsprop_slope", "adam_slope",
    }  # fmt: skip
    reported = {c["name"]: c for c in summary["reported"]}
    assert abs(reported["bayes_band_gain_stop_band_alone"]["value"]) < 1e-5
    assert 0.1 < reported["bayes_band_gain_pass_band"]["value"] < 1


def test_figures_are_drawn_of_a_run_that_was_stopped_while_it_measured(finished, tmp_path, capsys):
    out = tmp_path / "stopped"
    shutil.copytree(finished, out)
    for name in ("stop_band", "mixture"):
        shutil.rmtree(out / "measurements" / name)
    assert main(["figures", str(out)]) == 0
    assert f"{out / 'figures' / 'band_gain.png'}\n" in capsys.readouterr().out


def test_both_outer_loops_and_every_set_load(finished):
    for task_set, learners, frequencies in (
        ("tracked", {"lstm", "bayes"}, [1, 2, 3, 4, 5]),
        ("tracked_band", {"lstm", "bayes"}, [2, 3, 4]),
        ("mixture", {"lstm", "bayes"}, [1, 2, 3, 4, 5]),
        ("stop_band", {"lstm", "bayes"}, [1, 5]),
        ("in_distribution", {"mlp", "lstm", "bayes", *OPTIMIZERS}, [1, 2, 3, 4, 5]),
    ):
        data = metadyn.load(finished, task_set)
        assert set(data["learner"].values) == learners
        assert data["frequency"].values.tolist() == frequencies
        assert ("outer_step" in data.dims) == task_set.startswith("tracked")
    assert metadyn.load(finished, "heldout_band")["outer_step"].values[-1] == 30


def test_the_second_lstm_has_its_own_number_of_updates():
    study = metadyn.load_study("nonlinear_regression")
    outer = dataclasses.replace(study.config("quick").outer, updates_per_step=3)
    config = dataclasses.replace(study.config("quick"), outer=outer, pass_band_updates=2)
    first, second = study.plan(config).trained.values()
    assert first.settings(outer).updates_per_step == 3
    assert second.settings(outer) == dataclasses.replace(outer, updates_per_step=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pass-band-updates", "0"], "--pass-band-updates 0: must be positive"),
        (
            ["--measure.probe-points", "10"],
            "-points 10: must be at least 11 to resolve frequency 5",
        ),
        (["--domain.spectrum", "0", "-1"], "--domain.spectrum 0 -1: every variance"),
        (["--domain.spectrum", "0", "0"], "at least one variance must be above 0"),
        (["--domain.sigma", "-0.1"], "--domain.sigma -0.1: must be"),
        (["--domain.embedding", "polar"], "polar"),
        (
            ["--mlp.points", "8", "--mlp.batch", "9"],
            "--mlp.points 8: must be no fewer than the batch",
        ),
        (["--mlp.optimizer", "magic"], "--mlp.optimizer magic: "),
        (["--optimizers.sgd.updates", "0"], "--optimizers.sgd.updates 0: must be positive"),
        (
            ["--stop-band", "2"],
            "--stop-band 2: name at least one frequency, all above 0 and outside pass_band: "
            "[2, 3, 4]",
        ),
        (["--stop-band"], "--stop-band : name at least one frequency"),
        (["--stop-band", "0"], "above 0"),
        (["--pass-band", "0", "inf"], "--pass-band 0 inf: every variance"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, refused):
    refused([STUDY, *SMALL, *arguments], message)
