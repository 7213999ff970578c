"""Outer-loop dynamics: the figures of merit, the study, and what reads a run as it goes on."""

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


# Figures of merit of curves whose results are known.


def bayes_curve():
    """Returns curves [task, step, mode] of two modes that start at 0 and grow at unequal rates."""
    t = np.arange(6)[:, None]
    return np.broadcast_to(1 - np.array([0.5, 0.8]) ** t, (3, 6, 2))


def test_share_of_bayes_is_the_share_from_which_the_curves_were_made():
    share = np.array([[0.0, 0.0], [0.2, 0.6], [1.0, 0.9]])  # [outer step, mode]
    untrained = 0.2  # for example chance in a bandit
    best = untrained + bayes_curve()
    trained = untrained + share[:, None] * bayes_curve()[:, None]
    np.testing.assert_allclose(dynamics.share_of_bayes(trained, best)[1], share, atol=1e-12)
    # The first mode is half-way between outer steps 1 and 3, the second one before 1.
    data = xr.Dataset(coords={"outer_step": [0, 1, 3]})
    times = dynamics.outer_times_of(data)(trained.mean(0), best.mean(0))
    np.testing.assert_allclose(times, [1 + 2 * 0.3 / 0.8, 0.5 / 0.6])


def test_answers_before_any_feedback_do_not_count_in_the_share_of_bayes():
    best = np.array([[0.2], [0.6], [1.0]])  # [step, mode]
    trained = np.array([[[0.2], [0.2], [0.2]], [[0.9], [0.4], [0.6]]])  # 0.9 comes before feedback
    np.testing.assert_allclose(dynamics.share_of_bayes(trained, best), [[0], [0.5]])


def test_distance_to_bayes_is_one_untrained_and_falls_with_the_share_left():
    share = np.array([[0.0, 0.0], [0.25, 1.0], [1.5, 0.5]])
    trained = share[:, None] * bayes_curve()[:, None]
    distance = dynamics.distance_to_bayes(trained, bayes_curve())[0]
    np.testing.assert_allclose(distance, np.abs(1 - share), atol=1e-12)


def test_rank_correlation_of_two_batches_equals_scipys():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 20, 5))
    expected = [scipy.stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(dynamics.rank_correlation(x, y), expected)
    with_nan = dynamics.rank_correlation(np.array([1.0, np.nan, 2.0]), np.array([1.0, 3.0, 2.0]))
    np.testing.assert_allclose(with_nan, 1)


def test_surely_requires_the_whole_interval():
    straddling = dynamics.Estimate(np.array(0.2), np.array(-0.1), np.array(0.5))
    assert criterion("c", straddling, "above 0", at_least=0).passed
    assert criterion("c", straddling, "above 0", at_least=0, surely=True).passed is False
    unknown = dynamics.Estimate(*[np.array(np.nan)] * 3)
    assert criterion("c", unknown, "above 0", at_least=0, surely=True).passed is False
    without_value = dynamics.Estimate(np.array(np.nan), np.array(0.1), np.array(0.5))
    assert criterion("c", without_value, "above 0", at_least=0, surely=True).passed is False
    assert criterion("c", without_value, "reported").passed is None


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({}, "a slope"),
        ({"at_most": 0.2}, "a slope; at most 0.2"),
        ({"at_most": 0.2, "at_least": -0.2}, "a slope; between -0.2 and 0.2"),
        ({"at_least": 0, "surely": True}, "a slope; the whole interval at least 0"),
        ({"at_least": 0, "at_most": 0, "surely": True}, "a slope; the whole interval 0"),
    ],
)
def test_the_expectation_of_a_criterion_names_its_bounds(bounds, expected):
    assert criterion("c", dynamics.exact(1.0), "a slope", **bounds).expected == expected


@pytest.mark.parametrize(
    ("estimate", "bounds", "expected"),
    [
        ((1, 0.5, 2), (0, 2), "holds"),  # the bounds themselves count as within
        ((1, 0.5, 2), (0.5, 3), "holds"),
        ((1, 0.5, 2), (-np.inf, 0.49), "refuted"),
        ((1, 0.5, 2), (2.01, np.inf), "refuted"),
        ((1, 0.5, 2), (2, np.inf), "undecided"),
        ((1, 0.5, 3), (0.9, np.inf), "undecided: about 25 times"),  # (0.5 / 0.1)²
        ((1, 0.5, 3), (-np.inf, 2), "undecided: about 4 times"),  # (2 / 1)²
        ((1, 0, 3), (0.5, 2.5), "undecided: about 4 times"),  # the larger of 4 and 1.8
        ((1, 0.5, 3), (1, np.inf), "undecided: more than 100 times"),  # the value is at the bound
        ((1, -0.5, 1), (0.9, np.inf), "undecided: more than 100 times"),  # (1.5 / 0.1)²
        ((np.nan, 0.5, 3), (0, 4), "undecided: it has no value"),
        ((1, np.nan, np.nan), (0, 4), "undecided: it has no value"),
    ],
)
def test_a_verdict_depends_on_the_whole_interval(estimate, bounds, expected):
    estimate = dynamics.Estimate(*(np.array(float(number)) for number in estimate))
    at_least, at_most = bounds
    verdict = criterion("c", estimate, "", at_most=at_most, at_least=at_least).verdict
    assert verdict.startswith(expected)
    assert criterion("c", estimate, "reported").verdict == ""


def bandit_over_outer_training(learned_at, tasks=400, noise=0.2):
    """Returns strengths of contexts that jump from 0.2 to 1 at their own outer steps [seed, c]."""
    rng, steps = np.random.default_rng(1), np.arange(0, 101, 5)
    J = np.where(steps[:, None] >= learned_at[:, None], 1.0, 0.2)[:, None, :, None]
    seeds, _, n, _, contexts = J.shape
    J = J + noise * rng.normal(size=(seeds, tasks, n, 3, contexts))
    axes = ("seed", "task", "outer_step", "step", "mode")
    ranks = Modes(tuple(range(1, contexts + 1)), "context", "rank", exchangeable=True, p=0.8)
    coords = {"time": ("step", range(3)), "rank": ("mode", ranks.values)}

    def measured(learner, kind, axes, J):
        about = About(learner, learner, kind, "observations", loss_floor=0.0)
        variable_axes = {"mode_strength": axes, "loss": axes[:-1]}
        description = describe(about, variable_axes, coords, {"mode_strength": ranks})
        return dataset({"mode_strength": J, "loss": J.mean(-1)}, description)

    trained = measured("lstm", "meta", axes, J).assign_coords(outer_step=steps)
    return trained, measured("bayes", "bayes", axes[1:2] + axes[3:], np.ones((tasks, 3, contexts)))


def staggering_of_contexts(trained, bayes):
    """Estimates the staggering of contexts from outer times in each seed's own order."""
    times = dynamics.outer_times_of(trained)
    return dynamics.estimate(
        lambda a, b: dynamics.staggering(times(a, b)), *dynamics.over_outer_training(trained, bayes)
    )


def test_staggering_of_contexts_finds_each_seeds_own_order_and_nothing_in_noise():
    apart = np.array([[20, 40, 80], [80, 20, 40]])  # half-way is 2.5 earlier, between records
    value, low, high = staggering_of_contexts(*bandit_over_outer_training(apart))
    np.testing.assert_allclose(value, (77.5 - 17.5) / 77.5, rtol=0.02)
    assert low > 0.7
    assert high < 0.85
    together = np.full((4, 5), 40)
    value, low, high = staggering_of_contexts(*bandit_over_outer_training(together, noise=2.0))
    assert low < 0 < high


def test_the_first_history_of_a_comparison_has_no_name_in_its_suffix():
    trained, bayes = bandit_over_outer_training(np.full((2, 3), 40), tasks=8)
    gru = trained.assign_attrs(learner="gru", label="gru", place=1)
    stored = {"lstm": trained, "gru": gru, "bayes": bayes}
    results = Results({"tracked": [*stored], "heldout": [*stored]}, lambda _, name: stored[name])
    assert [*figures.histories(results)] == ["", "_gru"]
    # The first one is not measured on held-out tasks, as while a run still goes on.
    unfinished = Results(
        {"tracked": [*stored], "heldout": ["gru", "bayes"]}, lambda _, name: stored[name]
    )
    assert [*figures.histories(unfinished)] == [""]


def over_training(trained, bayes, modes, outer_steps):
    """Returns strengths [seed, task, outer_step, step, mode] and Bayes' [task, step, mode]."""

    def measurement(axes, strength, **coords):
        about = About("a", "a", "meta", "observations", loss_floor=0.0)
        time = {"time": ("step", range(strength.shape[-2]))}
        description = describe(
            about, {"mode_strength": axes}, time | coords, {"mode_strength": modes}
        )
        return dataset({"mode_strength": strength}, description)

    axes = ("seed", "task", "outer_step", "step", "mode")
    steps = {"outer_step": ("outer_step", outer_steps)}
    return measurement(axes, trained, **steps), measurement(("task", "step", "mode"), bayes)


def test_contexts_in_order_are_compared_with_bayes_without_order_on_the_same_tasks():
    rng = np.random.default_rng(0)
    best = 1 + 0.1 * rng.random((8, 3, 2))
    learned_at = np.array([[20, 10], [10, 20]])
    share = np.where(np.array([0, 10, 20])[:, None] >= learned_at[:, None], 1.0, 0.0)
    trained = share[:, None, :, None] * (1 + np.arange(8))[:, None, None, None] * np.ones((3, 2))
    ranks = Modes((1, 2), "context", "rank", exchangeable=True, p=0.8)
    ordered, bayes = dynamics.over_outer_training(*over_training(trained, best, ranks, (0, 10, 20)))
    np.testing.assert_allclose(ordered[1], trained[1, 1::2])  # seed 1 is in order already
    np.testing.assert_allclose(ordered[0], trained[0, 1::2, ..., ::-1])
    expected = np.repeat(best[1::2].mean(-1, keepdims=True), 2, axis=-1)
    np.testing.assert_allclose(bayes, [expected])


@pytest.mark.parametrize("sign", [1, -1])
def test_the_order_in_trained_episodes_is_compared_with_that_over_training(sign):
    """Modes reach Bayes' strength one by one, and grow in that order or in the opposite one."""
    steps, t = np.array([0, 1, 2, 3]), np.arange(9)[:, None]
    share = np.array([[0.1, 0.05, 0], [1, 0.1, 0.05], [1, 1, 0.1], [1, 1, 1]])
    curve = np.minimum(1, t / np.array([2.0, 4, 6])[::sign])
    trained = np.tile(share[:, None] * curve, (1, 4, 1, 1, 1))
    modes = Modes((3.0, 2.0, 1.0), "s")
    pair = over_training(trained, np.tile(curve, (4, 1, 1)), modes, steps)
    np.testing.assert_allclose(dynamics.outer_correlation(*pair).value, sign)


# Training.


def test_a_training_may_have_an_optimiser_of_its_own():
    domain = LinearRegression(2, 2, steps=5)
    meta = LSTMConfig(hidden=8).make(domain)
    config = OuterConfig(steps=20, batch=8, seeds=2, warmup=2)
    plain = MetaTraining(meta, prediction_loss(domain, meta))
    with_sgd = plain._replace(own=dataclasses.replace(config, optimizer="sgd", learning_rate=0.1))
    loop = OuterLoop({"a": plain, "b": with_sgd}, config, jax.random.key(0))
    *_, (state, _) = loop.run(loop.init(), 10)
    alone = OuterLoop({"a": plain}, config, jax.random.key(0))
    *_, (state_alone, _) = alone.run(alone.init(), 10)
    chex.assert_trees_all_equal(state.params["a"], state_alone.params["a"])
    inputs = [state.params[name]["body"]["input"] for name in ("a", "b")]
    assert not np.allclose(*inputs)
    moments = [len(jax.tree.leaves(state.moments[name])) for name in ("a", "b")]
    assert moments[0] > moments[1]  # gradient descent has no moments


# The study, and what reads its runs.


def only_domains(*domains):
    """Restricts the study to some of its domains."""
    return patch.dict(TITLES, {name: TITLES[name] for name in domains}, clear=True)


def run_small(out):
    """Runs the study on two domains, of which only the first has an order of modes."""
    study = load_study(STUDY)
    config = configured(study.presets["quick"], SMALL)
    with only_domains(*DOMAINS):
        run_study(study, "quick", 0, config, out, Progress(None), tensorboard=True)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Returns the folder of a small run."""
    out = tmp_path_factory.mktemp("runs") / "outer"
    run_small(out)
    return out


def test_every_domain_has_its_figures_and_its_criteria(run_folder):
    files = {p.name for p in (run_folder / "figures").iterdir()}
    kinds = ("inner_curves_{}.png", "outer_learning_{}.png", "distance_to_bayes_{}.png")
    kinds = (*kinds, "inner_curves_{}.gif")
    assert files == {kind.format(name) for kind in kinds for name in DOMAINS} | {"orders.png"}
    for path in (run_folder / "figures").glob("*.png"):
        assert matplotlib.image.imread(path).std() > 0.02
    summary = json.loads((run_folder / "summary.json").read_text())
    study = load_study(STUDY)
    quick = study.presets["quick"]
    with only_domains("nonlinear"):
        criteria = rehearse(study, quick, study.plan(quick))
    names = {c["name"] for c in summary["criteria"]}
    assert names == {f"{name}_outer" for name in DOMAINS}
    assert {c.name for c in criteria if c.passed is not None} == {"nonlinear_outer"}
    reported_names = {c["name"] for c in summary["reported"]}
    reported_names |= {c.name for c in criteria if c.passed is None}
    parts = ("inner", "bayes", "excess", "n_1", "inner_censored_modes")
    assert {f"{name}_{part}" for name in TITLES for part in parts} <= reported_names
    assert {"linear_correlation", "nonlinear_correlation"} <= reported_names
    assert "bandit_correlation" not in reported_names  # contexts have no order of their own


def test_the_animation_has_a_frame_for_each_checkpoint(run_folder):
    checkpoints = len(RunFolder(run_folder).outer_steps())
    with PIL.Image.open(run_folder / "figures" / "inner_curves_linear.gif") as gif:
        frames = sum(_length(gif, i) for i in range(gif.n_frames)) / 250
    assert frames == checkpoints + 4  # the last one stays, and equal ones are stored as one


def _length(gif, i):
    gif.seek(i)
    return gif.info["duration"]


def test_trajectories_of_every_domain_load(run_folder):
    for name in DOMAINS:
        data = metadyn.load(run_folder, f"tracked_{name}")
        assert {"learner", "outer_step", "seed", "task", "mode", "step"} <= set(data.dims)
        assert set(data["learner"].values) == {"lstm", "bayes"}
        assert data["outer_step"].values[[0, -1]].tolist() == [0, 40]
        assert data["mode_strength"].dtype == np.float32
    with pytest.raises(ConfigError, match=r"task_set = 'tracked': .* holds .*tracked_bandit"):
        metadyn.load(run_folder)


def test_the_bandits_outer_times_are_of_the_same_contexts_in_all_episodes():
    """Contexts learned at once have one n_k. Noise would part them if episodes were sorted."""
    study = load_study("outer_loop_dynamics")

    def outer_times(learned_at):
        trained, bayes = bandit_over_outer_training(learned_at, noise=1.0)
        measurements = {"lstm": trained, "bayes": bayes}
        sets = {name: list(measurements) for name in ("tracked_bandit", "heldout_bandit")}
        results = Results(sets, lambda task_set, learner: measurements[learner])
        rows = {row.name: row.value for row in study.criteria(study.presets["quick"], results)}
        return np.array([rows[f"bandit_n_{k + 1}"] for k in range(5)])

    np.testing.assert_allclose(outer_times(np.full((4, 5), 40)), 37.5, rtol=0.05)
    apart = np.array([[10, 20, 40, 60, 80], [80, 60, 40, 20, 10]])
    np.testing.assert_allclose(outer_times(apart), [7.5, 17.5, 37.5, 57.5, 77.5], rtol=0.15)


def events(folder):
    """Yields TensorBoard's TFRecords (length, checksum, bytes, checksum) in the order written."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.iterdir()):
        raw, offset = path.read_bytes(), 0
        while offset < len(raw):
            (length,) = struct.unpack_from("<Q", raw, offset)
            yield Event.FromString(raw[offset + 12 : offset + 12 + length])
            offset += 16 + length


def scalars(folder):
    """Returns step, name and value of each scalar."""
    return [(e.step, v.tag, v.simple_value) for e in events(folder) for v in e.summary.value]


def test_scalars_are_logged_for_tensorboard(run_folder):
    logged = scalars(run_folder / "tensorboard")
    names = {f"{what}/lstm_{name}" for what in ("loss", "excess_loss") for name in DOMAINS}
    names |= {"critic/lstm_bandit", "entropy/lstm_bandit"}
    assert {tag for _, tag, _ in logged} == names
    assert max(step for step, _, _ in logged) == 40
    assert all(np.isfinite(value) for _, _, value in logged)


def test_scalars_after_a_damaged_checkpoint_are_still_shown(run_folder, tmp_path, monkeypatch):
    """From the step at which a later session starts, TensorBoard hides what was logged before."""
    out = tmp_path / "r"
    shutil.copytree(run_folder, out)
    (out / "checkpoints" / "1" / "SHA256SUMS").write_text("nonsense")
    before = scalars(out / "tensorboard")
    monkeypatch.setattr(figures, "draw", lambda *arguments: [])
    monkeypatch.setattr(view, "write", lambda *arguments: out / "report.html")
    with pytest.warns(ConfigWarning, match="checkpoints/1 is damaged"):
        run_small(out)
    starts = [e.step for e in events(out / "tensorboard") if e.HasField("session_log")]
    assert len(starts) == 2
    assert max(step for step, _, _ in before) < starts[-1]
    again = set(scalars(out / "tensorboard"))
    assert again == set(before)  # the same numbers are computed again


def test_tensorboard_must_be_installed(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    refused([STUDY, "--tensorboard"], "pip install -e '.[tensorboard]'")


def readings(value, learner="lstm", kind="meta", tasks=4, seeds=1, steps=3):
    """Returns readings that are all equal to `value`, and their description."""
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
    """Saves a checkpoint with readings of a meta-learner on both task sets."""
    arrays, about = readings(value, **size)
    by_set = [{name: {"lstm": part} for name in ("tracked", "heldout")} for part in (arrays, about)]
    run.save_checkpoint(step, {"w": np.float32(step)}, *by_set)
    run.finish()


def test_a_live_run_is_reported(tmp_path, capsys):
    """The excess over Bayes at the newest checkpoint is (2 - 1) / (1 - 0.5)."""
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
    run.save_checkpoint(60, {"w": np.float32(60)}, None, {})  # a checkpoint without measurements
    run.finish()
    assert main(["report", str(run.path)]) == 0
    printed = capsys.readouterr().out
    assert "outer step 60 of 200 (30%); 3 checkpoints" in printed
    assert "LSTM: excess loss over Bayes 2.000 [2.000, 2.000]" in printed


def test_a_hundred_checkpoints_are_read_in_five_seconds(tmp_path):
    """They are as large as nonlinear regression's in outer-loop dynamics, 4 × 256 × 41 × 5.

    All but four are links to these.
    """
    run = RunFolder.create(tmp_path / "r", IDENTITY)
    for step in range(4):
        save(run, step, step, seeds=4, tasks=640, steps=41)
    checkpoints = run.path / "checkpoints"
    for step in range(4, 100):
        source_and_link = checkpoints / str(step % 4), checkpoints / str(step)
        shutil.copytree(*source_and_link, copy_function=os.link)
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


def test_a_run_that_still_writes_is_read_as_a_consistent_beginning(tmp_path):
    """Each reading is a beginning of the run with the right numbers, and readings grow."""
    path = tmp_path / "r"
    command = [sys.executable, "-c", WRITE, str(path), str(Path(__file__).parent)]
    lengths = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as writer:
        while writer.poll() is None or not lengths or lengths[-1] < 12:
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
            lengths.append(len(steps))
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 3
    assert lengths[-1] == 12


def test_if_there_are_very_many_modes_those_drawn_are_spread_over_all():
    trained, bayes = bandit_over_outer_training(np.tile(np.arange(0, 80) % 50, (2, 1)), tasks=4)
    figure = figures.inner_curves(figures.LearningHistory("LSTM", trained, bayes, (trained, bayes)))
    modes = [int(axis.get_title().split(": ")[1]) for axis in figure.axes if axis.get_visible()]
    assert len(modes) == figures.MODES
    assert (modes[0], modes[-1]) == (1, 80)
    assert set(np.diff(modes)) == {2, 3}


def test_an_excess_loss_that_does_not_exist_leaves_the_figure_its_other_panel():
    """It does not exist if Bayes' own loss is not finite on some held-out task."""
    steps = xr.Variable("outer_step", [0, 1, 9])
    trained = xr.concat([dataset(*readings(x)) for x in (0.9, 0.8, 0.7)], steps)
    bayes = dataset(*readings(1.0, "bayes", "bayes"))
    lost = bayes.assign(loss=bayes["loss"].where(bayes["loss"]["task"] > 0))
    history = figures.LearningHistory("LSTM", trained, bayes, (trained, lost))
    figures.picture(lambda: figures.distance_to_bayes(history))
