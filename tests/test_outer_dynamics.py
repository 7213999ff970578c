"""Outer-loop dynamics: the figures of merit, the study, and what follows a run from outside."""

import dataclasses
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import chex
import jax
import matplotlib.image
import numpy as np
import PIL.Image
import pytest
import scipy.stats
import xarray as xr

import metadyn
from metadyn import dynamics, figures, view
from metadyn.cli import main
from metadyn.domains.linear import LinearRegression
from metadyn.errors import ConfigError, ConfigWarning
from metadyn.learners.lstm import LSTMConfig
from metadyn.objectives import prediction_loss
from metadyn.options import configured
from metadyn.outer import MetaTraining, OuterConfig, OuterLoop
from metadyn.progress import Progress
from metadyn.runner import rehearse, run_study
from metadyn.several_domains import TITLES
from metadyn.store import Results, RunFolder
from metadyn.study import criterion, load_study
from metadyn.trajectories import About, Modes, dataset, describe

ROOT = Path(__file__).parent.parent
STUDY = str(ROOT / "experiments" / "outer_loop_dynamics.py")
SMALL = [
    *("--linear.n-x", "2", "--linear.n-y", "2", "--linear.steps", "4"),
    *("--bandit.steps", "6", "--lstm.hidden", "4"),
    *("--outer.steps", "40", "--outer.batch", "16", "--outer.seeds", "2", "--outer.warmup", "1"),
    *("--outer.checkpoints", "3", "--measure.tracked-tasks", "6", "--measure.heldout-tasks", "8"),
]
IDENTITY = {"study": "s", "preset": "quick", "seed": 0, "config": {"outer": {"steps": 200}}}
DOMAINS = ("linear", "bandit")


# Figures of merit, against curves whose answers are known.


def bayes_curve():
    """Two modes [task, step, mode] with other courses, from 0 at the start."""
    t = np.arange(6)[:, None]
    return np.broadcast_to(1 - np.array([0.5, 0.8]) ** t, (3, 6, 2))


def test_share_of_bayes_is_the_share_by_which_the_curves_were_made():
    share = np.array([[0.0, 0.0], [0.2, 0.6], [1.0, 0.9]])  # [outer step, mode]
    untrained = 0.2  # such as chance in a bandit
    best = untrained + bayes_curve()
    trained = untrained + share[:, None] * bayes_curve()[:, None]
    np.testing.assert_allclose(dynamics.share_of_bayes(trained, best)[1], share, atol=1e-12)
    # Half-way lies between outer steps 1 and 3 of the first mode, before 1 of the second.
    data = xr.Dataset(coords={"outer_step": [0, 1, 3]})
    found = dynamics.outer_times_of(data)(trained.mean(0), best.mean(0))
    np.testing.assert_allclose(found, [1 + 2 * 0.3 / 0.8, 0.5 / 0.6])


def test_what_is_answered_before_any_feedback_has_no_part_in_the_share_of_bayes():
    best = np.array([[0.2], [0.6], [1.0]])  # [step, mode]
    trained = np.array([[[0.2], [0.2], [0.2]], [[0.9], [0.4], [0.6]]])  # sure of nothing, at once
    np.testing.assert_allclose(dynamics.share_of_bayes(trained, best), [[0], [0.5]])


def test_distance_to_bayes_is_one_untrained_and_falls_with_the_share_left():
    share = np.array([[0.0, 0.0], [0.25, 1.0], [1.5, 0.5]])
    trained = share[:, None] * bayes_curve()[:, None]
    found = dynamics.distance_to_bayes(trained, bayes_curve())[0]
    np.testing.assert_allclose(found, np.abs(1 - share), atol=1e-12)


def test_rank_correlation_of_two_batches_is_scipys():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 20, 5))
    each = [scipy.stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(dynamics.rank_correlation(x, y), each)
    never = dynamics.rank_correlation(np.array([1.0, np.nan, 2.0]), np.array([1.0, 3.0, 2.0]))
    np.testing.assert_allclose(never, 1)


def test_surely_asks_the_whole_interval():
    straddling = dynamics.Estimate(np.array(0.2), np.array(-0.1), np.array(0.5))
    assert criterion("c", straddling, "above 0", at_least=0).passed
    assert criterion("c", straddling, "above 0", at_least=0, surely=True).passed is False
    unknown = dynamics.Estimate(*[np.array(np.nan)] * 3)
    assert criterion("c", unknown, "above 0", at_least=0, surely=True).passed is False
    without_value = dynamics.Estimate(np.array(np.nan), np.array(0.1), np.array(0.5))
    assert criterion("c", without_value, "above 0", at_least=0, surely=True).passed is False
    assert criterion("c", without_value, "reported").passed is None


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ({}, "a slope"),
        ({"at_most": 0.2}, "a slope; at most 0.2"),
        ({"at_most": 0.2, "at_least": -0.2}, "a slope; between -0.2 and 0.2"),
        ({"at_least": 0, "surely": True}, "a slope; the whole interval at least 0"),
        ({"at_least": 0, "at_most": 0, "surely": True}, "a slope; the whole interval 0"),
    ],
)
def test_what_is_expected_names_the_bounds_it_is_judged_by(bounds, said):
    assert criterion("c", dynamics.exact(1.0), "a slope", **bounds).expected == said


@pytest.mark.parametrize(
    ("estimate", "bounds", "found"),
    [
        ((1, 0.5, 2), (0, 2), "holds"),  # the bounds themselves are within
        ((1, 0.5, 2), (0.5, 3), "holds"),
        ((1, 0.5, 2), (-np.inf, 0.49), "refuted"),
        ((1, 0.5, 2), (2.01, np.inf), "refuted"),
        ((1, 0.5, 2), (2, np.inf), "undecided"),
        ((1, 0.5, 3), (0.9, np.inf), "undecided: about 25 times"),  # (0.5 / 0.1)²
        ((1, 0.5, 3), (-np.inf, 2), "undecided: about 4 times"),  # (2 / 1)²
        ((1, 0, 3), (0.5, 2.5), "undecided: about 4 times"),  # of 4 and 1.8
        ((1, 0.5, 3), (1, np.inf), "undecided: more than 100 times"),  # the value is at the bound
        ((1, -0.5, 1), (0.9, np.inf), "undecided: more than 100 times"),  # (1.5 / 0.1)²
        ((np.nan, 0.5, 3), (0, 4), "undecided: it has no value"),
        ((1, np.nan, np.nan), (0, 4), "undecided: it has no value"),
    ],
)
def test_a_verdict_is_of_the_whole_interval(estimate, bounds, found):
    estimate = dynamics.Estimate(*(np.array(float(each)) for each in estimate))
    at_least, at_most = bounds
    said = criterion("c", estimate, "", at_most=at_most, at_least=at_least).verdict
    assert said.startswith(found)
    assert criterion("c", estimate, "reported").verdict == ""


def bandit_over_outer_training(learned_at, tasks=400, noise=0.2):
    """Trajectories of contexts that jump from 0.2 to 1 at an outer step of their own [seed, c]."""
    rng, steps = np.random.default_rng(1), np.arange(0, 101, 5)
    J = np.where(steps[:, None] >= learned_at[:, None], 1.0, 0.2)[:, None, :, None]
    seeds, _, n, _, contexts = J.shape
    J = J + noise * rng.normal(size=(seeds, tasks, n, 3, contexts))
    axes = ("seed", "task", "outer_step", "step", "mode")
    ranks = Modes(tuple(range(1, contexts + 1)), "context", "rank", exchangeable=True, p=0.8)
    coords = {"time": ("step", range(3)), "rank": ("mode", ranks.values)}

    def of(learner, kind, axes, J):
        about = About(learner, learner, kind, "observations", loss_floor=0.0)
        both = {"mode_strength": axes, "loss": axes[:-1]}
        described = describe(about, both, coords, {"mode_strength": ranks})
        return dataset({"mode_strength": J, "loss": J.mean(-1)}, described)

    trained = of("lstm", "meta", axes, J).assign_coords(outer_step=steps)
    return trained, of("bayes", "bayes", axes[1:2] + axes[3:], np.ones((tasks, 3, contexts)))


def staggering_of_contexts(trained, bayes):
    """From outer times in each seed's own order."""
    times = dynamics.outer_times_of(trained)
    return dynamics.estimate(
        lambda a, b: dynamics.staggering(times(a, b)), *dynamics.over_outer_training(trained, bayes)
    )


def test_staggering_of_contexts_finds_each_seeds_own_order_and_nothing_in_noise():
    apart = np.array([[20, 40, 80], [80, 20, 40]])  # jumps half-way between records
    value, low, high = staggering_of_contexts(*bandit_over_outer_training(apart))
    np.testing.assert_allclose(value, (77.5 - 17.5) / 77.5, rtol=0.02)
    assert low > 0.7
    assert high < 0.85
    alike = np.full((4, 5), 40)
    value, low, high = staggering_of_contexts(*bandit_over_outer_training(alike, noise=2.0))
    assert low < 0 < high


def test_the_first_history_of_a_comparison_has_no_name_in_its_suffix():
    trained, bayes = bandit_over_outer_training(np.full((2, 3), 40), tasks=8)
    other = trained.assign_attrs(learner="gru", label="gru", place=1)
    stored = {"lstm": trained, "gru": other, "bayes": bayes}
    both = Results({"tracked": [*stored], "heldout": [*stored]}, lambda _, name: stored[name])
    assert [*figures.histories(both)] == ["", "_gru"]
    # Of the first of them nothing is held out, as where a run is still going on.
    second = Results(
        {"tracked": [*stored], "heldout": ["gru", "bayes"]}, lambda _, name: stored[name]
    )
    assert [*figures.histories(second)] == [""]


def over_training(trained, bayes, modes, outer_steps):
    """Datasets of strengths [seed, task, outer_step, step, mode] and Bayes' [task, step, mode]."""

    def of(axes, strength, **coords):
        about = About("a", "a", "meta", "observations", loss_floor=0.0)
        time = {"time": ("step", range(strength.shape[-2]))}
        described = describe(
            about, {"mode_strength": axes}, time | coords, {"mode_strength": modes}
        )
        return dataset({"mode_strength": strength}, described)

    axes = ("seed", "task", "outer_step", "step", "mode")
    steps = {"outer_step": ("outer_step", outer_steps)}
    return of(axes, trained, **steps), of(("task", "step", "mode"), bayes)


def test_contexts_in_order_stand_beside_bayes_on_the_same_tasks_who_knows_no_order():
    rng = np.random.default_rng(0)
    best = 1 + 0.1 * rng.random((8, 3, 2))
    learned_at = np.array([[20, 10], [10, 20]])
    share = np.where(np.array([0, 10, 20])[:, None] >= learned_at[:, None], 1.0, 0.0)
    trained = share[:, None, :, None] * (1 + np.arange(8))[:, None, None, None] * np.ones((3, 2))
    ranks = Modes((1, 2), "context", "rank", exchangeable=True, p=0.8)
    found, bayes = dynamics.over_outer_training(*over_training(trained, best, ranks, (0, 10, 20)))
    np.testing.assert_allclose(found[1], trained[1, 1::2])  # seed 1 is in order as it is
    np.testing.assert_allclose(found[0], trained[0, 1::2, ..., ::-1])
    expected = np.repeat(best[1::2].mean(-1, keepdims=True), 2, axis=-1)
    np.testing.assert_allclose(bayes, [expected])


@pytest.mark.parametrize("sign", [1, -1])
def test_the_order_at_the_end_of_training_is_compared_with_that_over_it(sign):
    """Modes come to Bayes' strength one after the other, and grow in that order or in the other."""
    steps, t = np.array([0, 1, 2, 3]), np.arange(9)[:, None]
    share = np.array([[0.1, 0.05, 0], [1, 0.1, 0.05], [1, 1, 0.1], [1, 1, 1]])
    curve = np.minimum(1, t / np.array([2.0, 4, 6])[::sign])
    trained = np.tile(share[:, None] * curve, (1, 4, 1, 1, 1))
    modes = Modes((3.0, 2.0, 1.0), "s")
    both = over_training(trained, np.tile(curve, (4, 1, 1)), modes, steps)
    np.testing.assert_allclose(dynamics.outer_correlation(*both).value, sign)


# Training.


def test_a_training_may_have_an_optimiser_of_its_own():
    domain = LinearRegression(2, 2, steps=5)
    meta = LSTMConfig(hidden=8).make(domain)
    config = OuterConfig(steps=20, batch=8, seeds=2, warmup=2)
    plain = MetaTraining(meta, prediction_loss(domain, meta))
    own = plain._replace(own=dataclasses.replace(config, optimizer="sgd", learning_rate=0.1))
    loop = OuterLoop({"a": plain, "b": own}, config, jax.random.key(0))
    *_, (state, _) = loop.run(loop.init(), 10)
    alone = OuterLoop({"a": plain}, config, jax.random.key(0))
    *_, (other, _) = alone.run(alone.init(), 10)
    chex.assert_trees_all_equal(state.params["a"], other.params["a"])
    inputs = [state.params[name]["body"]["input"] for name in ("a", "b")]
    assert not np.allclose(*inputs)
    moments = [len(jax.tree.leaves(each)) for each in (state.moments["a"], state.moments["b"])]
    assert moments[0] > moments[1]  # plain gradient descent has none


# The study, and following it.


def among(*domains):
    """Has the study be of some of its domains alone."""
    return patch.dict(TITLES, {name: TITLES[name] for name in domains}, clear=True)


def run_small(out):
    """Modes have an order in one of its domains, and none in the other."""
    study = load_study(STUDY)
    config = configured(study.presets["quick"], SMALL)
    with among(*DOMAINS):
        run_study(study, "quick", 0, config, out, Progress(None), tensorboard=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "outer"
    run_small(out)
    return out


def test_every_domain_has_its_figures_and_its_criteria(finished):
    drawn = {p.name for p in (finished / "figures").iterdir()}
    kinds = ("inner_curves_{}.png", "outer_learning_{}.png", "distance_to_bayes_{}.png")
    kinds = (*kinds, "inner_curves_{}.gif")
    assert drawn == {kind.format(name) for kind in kinds for name in DOMAINS} | {"orders.png"}
    for path in (finished / "figures").glob("*.png"):
        assert matplotlib.image.imread(path).std() > 0.02
    summary = json.loads((finished / "summary.json").read_text())
    study = load_study(STUDY)
    quick = study.presets["quick"]
    with among("nonlinear"):
        rehearsed = rehearse(study, quick, study.plan(quick))
    judged = {c["name"] for c in summary["criteria"]}
    assert judged == {f"{name}_outer" for name in DOMAINS}
    assert {c.name for c in rehearsed if c.passed is not None} == {"nonlinear_outer"}
    reported = {c["name"] for c in summary["reported"]}
    reported |= {c.name for c in rehearsed if c.passed is None}
    parts = ("inner", "bayes", "excess", "n_1", "inner_censored_modes")
    assert {f"{name}_{part}" for name in TITLES for part in parts} <= reported
    assert {"linear_correlation", "nonlinear_correlation"} <= reported
    assert "bandit_correlation" not in reported  # its contexts have no order of their own


def test_the_animation_has_a_frame_for_each_checkpoint(finished):
    checkpoints = len(RunFolder(finished).outer_steps())
    with PIL.Image.open(finished / "figures" / "inner_curves_linear.gif") as gif:
        shown = sum(_length(gif, i) for i in range(gif.n_frames)) / 250
    assert shown == checkpoints + 4  # the last stays; equal frames are stored as one, for longer


def _length(gif, i):
    gif.seek(i)
    return gif.info["duration"]


def test_trajectories_of_every_domain_load(finished):
    for name in DOMAINS:
        data = metadyn.load(finished, f"tracked_{name}")
        assert {"learner", "outer_step", "seed", "task", "mode", "step"} <= set(data.dims)
        assert set(data["learner"].values) == {"lstm", "bayes"}
        assert data["outer_step"].values[[0, -1]].tolist() == [0, 40]
        assert data["mode_strength"].dtype == np.float32
    with pytest.raises(ConfigError, match=r"task_set = 'tracked': .* holds .*tracked_bandit"):
        metadyn.load(finished)


def test_the_bandits_outer_times_are_of_contexts_that_stay_the_same():
    """Contexts that are learned at once have one n_k; sorted within episodes, noise parts them."""
    study = load_study("outer_loop_dynamics")

    def found(learned_at):
        trained, bayes = bandit_over_outer_training(learned_at, noise=1.0)
        both = {"lstm": trained, "bayes": bayes}
        sets = {name: list(both) for name in ("tracked_bandit", "heldout_bandit")}
        results = Results(sets, lambda task_set, learner: both[learner])
        rows = {row.name: row.value for row in study.criteria(study.presets["quick"], results)}
        return np.array([rows[f"bandit_n_{k + 1}"] for k in range(5)])

    np.testing.assert_allclose(found(np.full((4, 5), 40)), 37.5, rtol=0.05)
    apart = np.array([[10, 20, 40, 60, 80], [80, 60, 40, 20, 10]])
    np.testing.assert_allclose(found(apart), [7.5, 17.5, 37.5, 57.5, 77.5], rtol=0.15)


def events(folder):
    """TFRecords (length, checksum, bytes, checksum) of TensorBoard, in the order written."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.iterdir()):
        raw, at = path.read_bytes(), 0
        while at < len(raw):
            (length,) = struct.unpack_from("<Q", raw, at)
            yield Event.FromString(raw[at + 12 : at + 12 + length])
            at += 16 + length


def logged_in(folder):
    """Step, name and value of each scalar."""
    return [(e.step, v.tag, v.simple_value) for e in events(folder) for v in e.summary.value]


def test_scalars_for_tensorboard(finished):
    logged = logged_in(finished / "tensorboard")
    names = {f"{what}/lstm_{name}" for what in ("loss", "excess_loss") for name in DOMAINS}
    names |= {"critic/lstm_bandit", "entropy/lstm_bandit"}
    assert {tag for _, tag, _ in logged} == names
    assert max(step for step, _, _ in logged) == 40
    assert all(np.isfinite(value) for _, _, value in logged)


def test_scalars_after_a_damaged_checkpoint_are_still_shown(finished, tmp_path, monkeypatch):
    """TensorBoard hides what was logged before, from the step at which a later session starts."""
    out = tmp_path / "r"
    shutil.copytree(finished, out)
    (out / "checkpoints" / "1" / "SHA256SUMS").write_text("nonsense")
    before = logged_in(out / "tensorboard")
    monkeypatch.setattr(figures, "draw", lambda *given: [])
    monkeypatch.setattr(view, "write", lambda *given: out / "report.html")
    with pytest.warns(ConfigWarning, match="checkpoints/1 is damaged"):
        run_small(out)
    starts = [e.step for e in events(out / "tensorboard") if e.HasField("session_log")]
    assert len(starts) == 2
    assert max(step for step, _, _ in before) < starts[-1]
    again = set(logged_in(out / "tensorboard"))
    assert again == set(before)  # made anew to the same numbers


def test_tensorboard_must_be_installed(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    refused([STUDY, "--tensorboard"], "pip install -e '.[tensorboard]'")


def readings(value, learner="lstm", kind="meta", tasks=4, seeds=1, steps=3):
    """A set of readings, all equal to `value`, and its description."""
    arrays = {
        "mode_strength": np.full((seeds, tasks, steps, 2), value, np.float32),
        "loss": np.full((seeds, tasks, steps), value, np.float32),
    }
    axes = ("seed", "task", "step")
    about = describe(
        About(learner, learner.upper(), kind, "observations", loss_floor=0.5),
        {"mode_strength": (*axes, "mode"), "loss": axes},
        {"time": ("step", range(steps)), "s": ("mode", [2.0, 1.0])},
        {"mode_strength": Modes((2.0, 1.0), "s", "s")},
    )
    return arrays, about


def save(run, step, value, **size):
    arrays, about = readings(value, **size)
    both = [{name: {"lstm": of} for name in ("tracked", "heldout")} for of in (arrays, about)]
    run.save_checkpoint(step, {"w": np.float32(step)}, *both)
    run.finish()


def test_a_live_run_is_reported(tmp_path, capsys):
    """Excess over Bayes at the newest checkpoint is (2 - 1) / (1 - 0.5)."""
    run = RunFolder.create(tmp_path / "r", IDENTITY)
    for task_set in ("tracked", "heldout"):
        run.save_measurement(task_set, "bayes", *readings(1.0, "bayes", "bayes"))
    save(run, 0, 3.0)
    save(run, 50, 2.0)
    assert main(["report", str(run.path)]) == 0
    printed = capsys.readouterr().out
    assert "outer step 50 of 200 (25%); 2 checkpoints" in printed
    assert "LSTM: excess loss over Bayes 2.000 [2.000, 2.000]" in printed
    assert "2 measurements stored" in printed
    run.save_checkpoint(60, {"w": np.float32(60)}, None, {})  # between two at which it is measured
    run.finish()
    assert main(["report", str(run.path)]) == 0
    printed = capsys.readouterr().out
    assert "outer step 60 of 200 (30%); 3 checkpoints" in printed
    assert "LSTM: excess loss over Bayes 2.000 [2.000, 2.000]" in printed


def test_a_hundred_checkpoints_are_read_in_five_seconds(tmp_path):
    """As large as those of nonlinear regression in outer-loop dynamics: 4 × 256 × 41 × 5.

    All but four are links to these.
    """
    run = RunFolder.create(tmp_path / "r", IDENTITY)
    for step in range(4):
        save(run, step, step, seeds=4, tasks=640, steps=41)
    checkpoints = run.path / "checkpoints"
    for step in range(4, 100):
        linked = checkpoints / str(step % 4), checkpoints / str(step)
        shutil.copytree(*linked, copy_function=os.link)
    start = time.monotonic()
    data = metadyn.load(run.path)
    assert time.monotonic() - start < 5
    np.testing.assert_array_equal(
        data["mode_strength"].isel(mode=0, task=0, step=0, seed=0).squeeze(), np.arange(100) % 4
    )


WRITE = """
import sys
sys.path.insert(0, sys.argv[2])
from test_outer_dynamics import IDENTITY, RunFolder, save
run = RunFolder.create(sys.argv[1], IDENTITY)
for step in range(12):
    save(run, step, step)
"""


def test_what_is_read_while_a_run_writes_is_whole(tmp_path):
    """Every look at it is a beginning of the run, with the right numbers, and the looks grow."""
    path = tmp_path / "r"
    command = [sys.executable, "-c", WRITE, str(path), str(Path(__file__).parent)]
    looks = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as writer:
        while writer.poll() is None or not looks or looks[-1] < 12:
            assert writer.returncode in (None, 0), writer.stderr.read()
            if not (path / "config.json").exists() or not RunFolder(path).outer_steps():
                time.sleep(0.02)
                continue
            data = RunFolder(path).trajectories("tracked", "lstm")
            steps = data["outer_step"].values
            np.testing.assert_array_equal(steps, range(len(steps)))
            value = data["mode_strength"].transpose("outer_step", ...).values
            np.testing.assert_array_equal(
                value, np.broadcast_to(steps[:, None, None, None, None], value.shape)
            )
            looks.append(len(steps))
    assert looks == sorted(looks)
    assert len(set(looks)) > 3
    assert looks[-1] == 12


def test_of_very_many_modes_those_drawn_are_spread_over_all():
    trained, bayes = bandit_over_outer_training(np.tile(np.arange(0, 80) % 50, (2, 1)), tasks=4)
    figure = figures.inner_curves(figures.LearningHistory("LSTM", trained, bayes, (trained, bayes)))
    shown = [int(axis.get_title().split(": ")[1]) for axis in figure.axes if axis.get_visible()]
    assert len(shown) == figures.MODES
    assert (shown[0], shown[-1]) == (1, 80)
    assert set(np.diff(shown)) == {2, 3}
