"""The study of remedies out of distribution: what it trains on what, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metadyn as md
from metadyn.learners.normalised import Normalised
from metadyn.runner import rehearse

STUDY = md.load_study("out_of_distribution")
QUICK = dataclasses.replace(STUDY.presets["quick"], pools=(4, 64))


@pytest.fixture(scope="module")
def plan():
    """What the quick preset asks for, with two pools."""
    return STUDY.plan(QUICK)


def test_each_remedy_is_what_it_is_called(plan):
    linear, bands = plan.comparisons
    metas = {each.name: each for each in linear.metas}
    remedies = ["lstm", "lstm_mixture", "lstm_normalised", "lstm_both", "deltanet", "deltanet_both"]
    assert [*metas] == [*remedies, "pool_4", "pool_64"]
    normalised = [name for name, each in metas.items() if isinstance(each.learner, Normalised)]
    assert normalised == ["lstm_normalised", "lstm_both", "deltanet_both"]
    trained_on = {name: each.objective.keywords.get("sample") for name, each in metas.items()}
    mixture = trained_on.pop("lstm_mixture")
    assert [d.C[0, 0] * 3 for d in mixture.domains] == pytest.approx([1, 64])
    assert mixture.weights == pytest.approx([1, 1 / 64])
    assert trained_on["lstm_both"] == trained_on["deltanet_both"] == mixture
    assert (trained_on["pool_4"].size, trained_on["pool_64"].size) == (4, 64)
    assert trained_on["lstm"] is trained_on["lstm_normalised"] is trained_on["deltanet"] is None
    assert [each.name for each in bands.metas] == ["lstm", "lstm_mixture"]
    supports = [d.support for d in bands.metas[1].objective.keywords["sample"].domains]
    assert supports == [(1, 2), (3, 4), (1, 2, 3, 4)]


def test_the_right_prior_of_a_set_has_the_mean_square_of_its_tasks(plan):
    linear, _ = plan.comparisons
    right = {tasks.name: c for tasks, c in linear.measurements if c.name == "bayes_right"}
    assert [*right] == ["in_distribution", "x2", "x4", "x8", "x16", "outsize"]
    s = np.array(QUICK.linear.spectrum())
    largest = np.array([8 * s[0], *s[1:]])
    factors = {"x4": 4, "x16": 16, "outsize": np.linalg.norm(largest) / np.linalg.norm(s)}
    for name, factor in factors.items():
        root = right[name].learner.init(jax.random.key(0)).root
        np.testing.assert_allclose(root[0], factor * np.eye(3) / np.sqrt(3), rtol=1e-5)


def test_memorising_bayes_knows_the_pool_that_was_trained_on(plan):
    """After a long episode on one of these tasks it answers W x."""
    linear, _ = plan.comparisons
    known = {c.name: c for t, c in linear.measurements if t.name == "fresh"}
    assert set(known) == {"bayes", "pool_4", "memorising_4", "pool_64", "memorising_64"}
    (trained,) = (each for each in linear.metas if each.name == "pool_64")
    W = trained.objective.keywords["sample"].task(jnp.int32(63)).W
    learner = known["memorising_64"].learner
    state = learner.init(jax.random.key(0))
    for x in 2 * jnp.eye(3):
        state = learner.update(state, x, W @ x)
    np.testing.assert_allclose(learner.predict(state, jnp.ones(3)), W.sum(1), rtol=1e-4)


def test_the_study_is_rehearsed_without_complaint(plan):
    rehearse(STUDY, QUICK, plan)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--pools", "0"], "--pools"),
        (["--scales", "1", "0"], "--scales"),
        (["--other-batch", "0"], "--other-batch 0"),
        (["--meta", "deltanet"], "deltanet"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(options, says, refused):
    refused(["out_of_distribution", *options], says)
