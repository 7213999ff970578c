"""The amortised-Bayes study: comparisons, figures of merit on planted states, refusals."""

import dataclasses
import sys

import jax
import numpy as np
import pytest

import metadyn as md
from metadyn import decoding, figures, trajectories
from metadyn.domains.bandit import ContextualBandit
from metadyn.dynamics import Estimate
from metadyn.learners import beside_bayes as beside
from metadyn.measuring import check_step
from metadyn.store import Results

STUDY = md.load_study("amortised_bayes")
QUICK = STUDY.presets["quick"]
MODULE = sys.modules[STUDY.plan.__module__]
TIMES, STEPS, TASKS = (0, 2, 3), (0, 1, 3, 7, 15), 400
RNG = np.random.default_rng(0)


def test_every_network_is_trained_in_both_domains_and_recurrent_ones_have_states_replaced():
    plan = STUDY.plan(QUICK)
    for part in plan.comparisons:
        assert [meta.name for meta in part.metas] == ["lstm", "gru", "transformer", "control"]
        assert all(list(meta.times) == [0, 2, 3, 5, 10, 20] for meta in part.metas)
        operated = {c.name: c.derived_from for c in part.contenders if c.kind == "reference"}
        assert operated == {"lstm_operated": "lstm", "gru_operated": "gru"}
    assert not any(m.tasks.probes for m in plan.measurements)  # no tracked tasks
    rates = {name: (t.own or plan.outer).learning_rate for name, t in plan.trained.items()}
    assert rates["control_linear"] < rates["lstm_linear"] / 50
    sizes = {name: sum(x.size for x in _leaves(t.meta)) for name, t in plan.trained.items()}
    assert sizes["control_bandit"] == sizes["lstm_bandit"]


def test_the_exact_posterior_is_called_optimal_only_where_it_is():
    labels = lambda config: [part.bayes.label for part in STUDY.plan(config).comparisons]
    uncertain = dataclasses.replace(QUICK, bandit=ContextualBandit(p_high=0.9))
    assert labels(QUICK) == ["Bayes-optimal", "Bayes-optimal"]
    assert labels(uncertain) == ["Bayes-optimal", "most probable action"]


def test_networks_with_replaced_states_keep_nothing_of_one_trace_for_another():
    """An array of a cached learner that is first made in a trace would be kept."""
    pairs = {(c.name, tasks.name): (tasks, c) for _, tasks, c, _ in STUDY.plan(QUICK).measurements}
    for name in ("lstm_operated", "gru_operated"):
        with jax.checking_leaks():
            check_step(*pairs[name, "causal_linear"])


def _leaves(meta):
    return jax.tree.leaves(jax.eval_shape(meta.init, jax.random.key(0)))


def measured(arrays, axes, learner="lstm", kind="meta", times=TIMES, outer=True):
    about = trajectories.About(learner, learner, kind, "observations", 0.5)
    coords = {"time": ("step", times)} | ({"outer_step": ("outer_step", STEPS)} if outer else {})
    return trajectories.dataset(arrays, trajectories.describe(about, axes, coords, {}))


@pytest.fixture(scope="module")
def planted():
    """Results of an LSTM whose state gains only the mean, half-way through outer training.

    Its excess loss is 4, 4, 2, 1, 1 over training; copies lose 1, 2, 5 and 3, and Bayes loses 1.
    """
    shape = (len(STEPS), 1, TASKS, len(TIMES))
    mean, uncertainty, noise = (RNG.standard_normal((*shape, n)) for n in (2, 1, 4))
    held = np.array([0, 0, 0, 1, 1])[:, None, None, None, None]
    state = np.concatenate([held * mean + (1 - held) * noise[..., :2], noise[..., 2:]], -1)
    loss = 1 + 0.5 * np.array([4, 4, 2, 1, 1.0])[:, None, None, None] + np.zeros(shape)
    dims = ("outer_step", "seed", "task", "step")
    vectors = {"state": state, "mean": mean, "uncertainty": uncertainty, "query": noise[..., :1]}
    axes = {name: (*dims, f"{name}_0") for name in vectors} | {"loss": dims, "distance": dims}
    trained = measured(vectors | {"loss": loss, "distance": loss}, axes)
    ones = {"loss": np.ones((TASKS, 4))}
    bayes = ones, {"loss": ("task", "step")}, "bayes", "bayes", (0, 1, 2, 3), False
    copies = {
        "after": np.tile([0, 0, 1, 1.0], (1, 8, 1)),
        "losses": np.tile([1, 2, 5, 3, 1.0], (1, 8, 4, 1)),
        "shift": np.tile([0.5, 2, 1.0], (1, 8, 4, 1)),
        "size": np.full((1, 8, 4), 2.0),
    }
    over = {name: ("seed", "task", "step", name + "_0")[: a.ndim] for name, a in copies.items()}
    data = {
        ("heldout_linear", "lstm"): trained,
        ("heldout_linear", "bayes"): measured(*bayes),
        ("causal_linear", "lstm_operated"): measured(
            copies, over, "lstm_operated", "reference", (0, 1, 2, 3), False
        ),
    }
    sets = {}
    for task_set, learner in data:
        sets.setdefault(task_set, []).append(learner)
    return Results(sets, lambda *names: data[names])


def test_figures_of_merit_have_their_planted_values(planted):
    merits = dict(MODULE.merits(planted, "linear", "lstm"))
    value = {name: float(merit.value) for name, merit in merits.items()}
    assert value["mean"] > value["least"] > 0.999
    for name in ("untrained", "shuffled", "uncertainty", "nonlinear"):
        assert abs(value[name]) < 0.1, name
    np.testing.assert_allclose(value["excess"], 1.0)
    assert value["distance"] == 1.5
    # R² is half-way at 2½ doublings of 1 + step, between steps 3 and 7, and excess loss at step 3.
    np.testing.assert_allclose(value["delay"], 0.5, atol=0.02)
    # The state holds two of Bayes' three numbers; Bayes and the query hold two of the state's four.
    np.testing.assert_allclose(value["to_bayes"], 2 / 3, atol=0.03)
    assert value["direction"] == pytest.approx(value["to_bayes"] - value["from_bayes"])
    bayes = {source: value[f"from_{source}"] for source in ("none", "own", "other", "fresh")}
    assert bayes == {"none": 0.0, "own": 2.0, "other": 8.0, "fresh": 4.0}
    assert (value["kept"], value["outputs"]) == (0.5, 0.25)
    assert set(decoding.GOES_ON) == set(beside.SOURCES) - {"bayes"}


def test_figures_of_merit_use_the_steps_and_tasks_of_their_definitions():
    """The planted state holds the query and s at each step, and the mean from the second on.

    The uncertainty is s at first and s² later. The mean enters after outer step 3 of `STEPS`.
    Excess loss is halved, on a logarithmic scale, at step 3 on the tasks held out, and at once on
    the others.
    """
    rng, times = np.random.default_rng(0), (0, 2, 3, 5)
    shape = (5, 1, 1200, 4, 1)
    mean, s, query, noise = rng.standard_normal((4, *shape))
    later, trained = np.arange(4)[:, None] >= 2, np.arange(5)[:, None, None, None, None] >= 3
    state = np.concatenate([np.where(later & trained, mean, noise), s, query], -1)
    odd = np.arange(1200)[:, None] % 2 == 1
    excess = np.where(odd, [4, 4, 2, 1, 1.0], [4, 1, 1, 1, 1.0]).T[:, None, :, None]
    dims = ("outer_step", "seed", "task", "step")
    vectors = {
        "state": state, "mean": mean, "uncertainty": np.where(later, s**2, s), "query": query
    }  # fmt: skip
    scalars = {"loss": 1 + 0.5 * excess + np.zeros(shape[:-1])}
    scalars["distance"] = np.broadcast_to([0.0, 1, 2, 3], shape[:-1])
    axes = {name: (*dims, f"{name}_0") for name in vectors} | dict.fromkeys(scalars, dims)
    data = measured(vectors | scalars, axes, times=times)
    losses, loss_dims = {"loss": np.ones((1200, 4))}, {"loss": ("task", "step")}
    bayes = measured(losses, loss_dims, "bayes", "bayes", times, outer=False)
    merits = decoding.merits(data, bayes, decoding.of_state(data))
    value = {name: float(merit.value) for name, merit in merits}
    assert value["distance"] == 2
    assert value["least"] > 0.99
    np.testing.assert_allclose(value["mean"], 2 / 3, atol=0.02)
    assert abs(value["uncertainty"]) < 0.1
    assert value["nonlinear"] > 0.8
    np.testing.assert_allclose(value["delay"], 0.5, atol=0.05)
    np.testing.assert_allclose(value["from_bayes"], 2 / 3, atol=0.03)


def test_losses_count_after_states_are_replaced_and_shifts_at_the_next_answer():
    after = np.array([0, 0, 1, 1.0])
    losses = np.where(after[:, None] > 0, [1, 2, 5, 3, 1.0], [9, 9, 9, 9, 4.0])
    arrays = {
        "after": after, "losses": losses, "size": np.array([1, 1, 2, 8.0]),
        "shift": np.array([[0, 0, 0], [0, 0, 0], [0.5, 2, 1], [7, 7, 7]]),
    }  # fmt: skip
    arrays = {name: np.tile(a, (1, 8, *[1] * a.ndim)) for name, a in arrays.items()}
    axes = {n: ("seed", "task", "step", n + "_0")[: a.ndim] for n, a in arrays.items()}
    data = measured(arrays, axes, "lstm_operated", "reference", range(4), outer=False)
    merits = decoding.operated(data)
    value = {name: float(merit.value) for name, merit in merits}
    bayes = {source: value[f"from_{source}"] for source in ("none", "own", "other", "fresh")}
    assert bayes == {"none": 0.0, "own": 2.0, "other": 8.0, "fresh": 4.0}
    assert (value["kept"], value["outputs"]) == (0.5, 0.25)


def test_panels_show_their_curves_with_title_label_and_legend():
    value = np.array([0.1, 0.5, 0.9])
    curves = {"mean": Estimate(value, value - 0.1, value + 0.1)}
    figure = figures.panels({"LSTM": (np.arange(3), curves)}, "R²", ylim=(0, 1))
    (axis,), (legend,) = figure.axes, figure.legends
    assert (axis.get_title(), axis.get_ylabel(), axis.get_ylim()) == ("LSTM", "R²", (0, 1))
    np.testing.assert_array_equal(axis.get_lines()[0].get_xydata().T, [np.arange(3), value])
    assert [text.get_text() for text in legend.get_texts()] == ["mean"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--linear.steps", "5"], "must be above 5, the step after which"),
        (["--bandit.permutation", "True"], "must be False, for independent contexts"),
        (["--measure.tracked-tasks", "1"], "--measure.tracked-tasks 1: must be at least 2"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(options, message, refused):
    refused(["amortised_bayes", *options], message)
