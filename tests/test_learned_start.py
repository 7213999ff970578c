"""The study of learned starts: its starts against their definition, and a rehearsal."""

import dataclasses
from collections import ChainMap
from pathlib import Path

import jax
import numpy as np
import pytest

import metadyn
from metadyn.base import Learner
from metadyn.errors import ConfigError
from metadyn.measuring import readings
from metadyn.runner import rehearse

STUDY = str(Path(__file__).parent.parent / "experiments" / "learned_start.py")


@pytest.fixture(scope="module")
def linear():
    """The contenders of the linear network, by name, and the comparison."""
    study = metadyn.load_study(STUDY)
    comparison = study.plan(study.presets["quick"]).comparisons[0]
    return {contender.name: contender for contender in comparison.contenders}, comparison


def test_starts_lie_between_the_random_one_and_the_learned_one(linear):
    contenders, _ = linear
    params = contenders["maml"].learner.init(jax.random.key(0))
    key = jax.random.key(1)
    learners = {a: contenders[f"interpolated_{a:g}"].make(params) for a in (0, 0.25, 1)}
    random, between, learned = (learner.init(key)[0] for learner in learners.values())
    for small, mixed, end, start in zip(random, between, learned, params["start"], strict=True):
        np.testing.assert_array_equal(end, start)
        np.testing.assert_allclose(np.std(small), 1e-3, rtol=0.3)
        np.testing.assert_allclose(mixed, 0.75 * np.float64(small) + 0.25 * start, atol=1e-6)
    W1, W2 = (np.float64(W) for W in learned)
    diagnosed = learners[1].diagnose(learners[1].init(key))
    expected = {
        "norm": np.sqrt((W1**2).sum() + (W2**2).sum()),
        "imbalance": np.linalg.norm(W2.T @ W2 - W1 @ W1.T),
        "product": np.linalg.norm(W2 @ W1),
    }
    assert diagnosed.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(diagnosed[name], value, rtol=1e-5)


def test_only_maml_is_trained_and_learners_derived_from_it_count_updates(linear):
    contenders, comparison = linear
    assert [meta.name for meta in comparison.metas] == ["maml"]
    assert contenders["interpolated_1"].clock == contenders["random_1"].clock == "updates"
    assert contenders["interpolated_1"].seeded
    assert isinstance(contenders["random_1"].learner, Learner)
    others = [c for c in comparison.contenders if c.name != "maml"]
    with pytest.raises(ConfigError, match=r"derived_from = 'maml': .*'interpolated_0' needs this"):
        dataclasses.replace(comparison, contenders=others)


def test_maml_is_trained_by_its_own_rate_and_batch():
    study = metadyn.load_study(STUDY)
    maml = dataclasses.replace(
        study.presets["quick"].linear_maml, outer_batch=5, outer_learning_rate=0.5
    )
    own = study.plan(study.config("quick", linear_maml=maml)).trained["maml_linear"].own
    assert (own.batch, own.learning_rate) == (5, 0.5)


def test_the_study_is_rehearsed_without_complaint():
    study = metadyn.load_study(STUDY)
    quick = study.presets["quick"]
    few = dataclasses.replace(quick, interpolations=(0.0, 1.0), factors=(1.0,))
    criteria = {criterion.name for criterion in rehearse(study, few, study.plan(few))}
    assert {*ChainMap(*study.claims.values())} <= criteria


def test_all_tasks_of_a_seed_have_the_same_start(linear):
    contenders, comparison = linear
    params = jax.vmap(contenders["maml"].learner.init)(jax.random.split(jax.random.key(0)))
    contender = dataclasses.replace(contenders["interpolated_1"], times=(0, 1))
    tasks = dataclasses.replace(comparison.sets[0], size=3, updating_size=3)
    norm = np.asarray(readings(tasks, contender, params, jax.random.key(1))["norm"])
    assert norm.shape == (2, 3, 2)
    np.testing.assert_array_equal(norm[:, :, 0], norm[:, :1, 0].repeat(3, axis=1))
    assert norm[0, 0, 0] != norm[1, 0, 0]
