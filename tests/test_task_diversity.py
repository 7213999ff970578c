"""The study of task diversity: training tasks, distances of known answers and refusals."""

import dataclasses
import sys
from collections import ChainMap

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import metadyn as md
from metadyn.runner import rehearse

STUDY = md.load_study("task_diversity")
QUICK = dataclasses.replace(STUDY.presets["quick"], pools=(4, 64))


@pytest.fixture(scope="module")
def plan():
    """The plan of the quick preset with two pools."""
    return STUDY.plan(QUICK)


def test_each_network_is_trained_on_the_tasks_in_its_name(plan):
    linear, bands = plan.comparisons
    trained_on = {meta.name: meta.objective for meta in linear.metas}
    assert [*trained_on] == ["lstm", "pool_4", "pool_64"]
    assert trained_on.pop("lstm") is None
    sizes = {name: objective.keywords["sample"].size for name, objective in trained_on.items()}
    assert sizes == {"pool_4": 4, "pool_64": 64}
    assert [meta.name for meta in bands.metas] == ["lstm", "lstm_mixture"]
    supports = [d.support for d in bands.metas[1].objective.keywords["sample"].domains]
    assert supports == [(1, 2), (3, 4), (1, 2, 3, 4)]


def test_memorising_bayes_knows_the_pool_of_the_training(plan):
    """After three pairs of a task of the pool, which determine it, Bayes answers W x."""
    linear, _ = plan.comparisons
    contenders = {c.name: c for _, t, c, _ in linear.measurements if t.name == "fresh"}
    assert {*contenders} == {"lstm", "bayes", "pool_4", "memorising_4", "pool_64", "memorising_64"}
    (trained,) = (meta for meta in linear.metas if meta.name == "pool_64")
    W = trained.objective.keywords["sample"].task(jnp.int32(63)).W
    learner = contenders["memorising_64"].learner
    state = learner.init(None)
    for x in 2 * jnp.eye(3):
        state = learner.update(state, x, W @ x)
    np.testing.assert_allclose(learner.predict(state, jnp.ones(3)), W.sum(1), rtol=1e-4)


def test_distances_are_those_of_planted_answers():
    """Bayes answers 0 or 1, and the two seeds of a network 0.1 and 0.3, except at the last step."""
    distances = sys.modules["metadyn_study_task_diversity"].distances
    shape = (5, 4, 3, 2)  # task, step, query, answer

    def constant(*values):
        answers = np.stack([np.full(shape, value) for value in values])
        answers[:, :, -1] = 7  # no query follows the last pair
        return xr.Dataset({"answers": (("seed", "task", "step", "query", "answer"), answers)})

    names = {"pool_4": (0.1, 0.3), "memorising_4": (0.0,), "bayes": (1.0,)}
    results = {("fresh", name): constant(*values) for name, values in names.items()}
    criteria = distances(results, 4)
    expected = [(0.01 + 0.09) / 2, (0.81 + 0.49) / 2, (0.80 + 0.40) / 2]
    np.testing.assert_allclose([criterion.value for criterion in criteria], expected, rtol=1e-6)


def test_the_study_is_rehearsed_without_complaint(plan):
    criteria = {criterion.name for criterion in rehearse(STUDY, QUICK, plan)}
    assert {*ChainMap(*STUDY.claims.values())} <= criteria


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pools", "0"], "--pools"),
        (["--pools"], "--pools"),
        (
            ["--nonlinear.spectrum", "1", "1"],
            "--nonlinear.spectrum 1 1: leave it out: bands are fixed",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(options, message, refused):
    refused(["task_diversity", *options], message)
