"""The study of task diversity: what is trained on what, distances of known answers, refusals."""

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
    """What the quick preset asks for, with two pools."""
    return STUDY.plan(QUICK)


def test_each_network_is_trained_on_what_it_is_called(plan):
    linear, bands = plan.comparisons
    trained_on = {each.name: each.objective for each in linear.metas}
    assert [*trained_on] == ["lstm", "pool_4", "pool_64"]
    assert trained_on.pop("lstm") is None
    sizes = {name: objective.keywords["sample"].size for name, objective in trained_on.items()}
    assert sizes == {"pool_4": 4, "pool_64": 64}
    assert [each.name for each in bands.metas] == ["lstm", "lstm_mixture"]
    supports = [d.support for d in bands.metas[1].objective.keywords["sample"].domains]
    assert supports == [(1, 2), (3, 4), (1, 2, 3, 4)]


def test_memorising_bayes_knows_the_pool_that_was_trained_on(plan):
    """After a long episode on one of these tasks it answers W x."""
    linear, _ = plan.comparisons
    known = {c.name: c for _, t, c, _ in linear.measurements if t.name == "fresh"}
    assert {*known} == {"lstm", "bayes", "pool_4", "memorising_4", "pool_64", "memorising_64"}
    (trained,) = (each for each in linear.metas if each.name == "pool_64")
    W = trained.objective.keywords["sample"].task(jnp.int32(63)).W
    learner = known["memorising_64"].learner
    state = learner.init(None)
    for x in 2 * jnp.eye(3):
        state = learner.update(state, x, W @ x)
    np.testing.assert_allclose(learner.predict(state, jnp.ones(3)), W.sum(1), rtol=1e-4)


def test_distances_are_those_of_answers_that_are_known():
    """Bayes answers 0 or 1; the network of two seeds 0.1 and 0.3, but for the last time."""
    distances = sys.modules["metadyn_study_task_diversity"].distances
    shape = (5, 4, 3, 2)  # task, step, query, answer

    def answered(*values):
        many = np.stack([np.full(shape, value) for value in values])
        many[:, :, -1] = 7  # after the last pair nothing is left to answer
        return xr.Dataset({"answers": (("seed", "task", "step", "query", "answer"), many)})

    names = {"pool_4": (0.1, 0.3), "memorising_4": (0.0,), "bayes": (1.0,)}
    results = {("fresh", name): answered(*values) for name, values in names.items()}
    found = distances(results, 4)
    expected = [(0.01 + 0.09) / 2, (0.81 + 0.49) / 2, (0.80 + 0.40) / 2]
    np.testing.assert_allclose([each.value for each in found], expected, rtol=1e-6)


def test_the_study_is_rehearsed_without_complaint(plan):
    named = {each.name for each in rehearse(STUDY, QUICK, plan)}
    assert {*ChainMap(*STUDY.claims.values())} <= named


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--pools", "0"], "--pools"),
        (["--pools"], "--pools"),
        (
            ["--nonlinear.spectrum", "1", "1"],
            "--nonlinear.spectrum 1 1: leave it out: bands are fixed",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(options, says, refused):
    refused(["task_diversity", *options], says)
