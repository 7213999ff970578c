"""The start experiment: its starts against their definition, the whole study once, small."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import metadyn
from metadyn.base import Learner
from metadyn.cli import main
from metadyn.errors import ConfigError
from metadyn.store import RunFolder

STUDY = str(Path(__file__).parent.parent / "experiments" / "learned_start.py")
SMALL = [
    *("--interpolations", "0", "1", "--factors", "1", "--linear.steps", "4"),
    *("--nonlinear.steps", "4", "--nonlinear-maml.width", "4", "--linear-maml.inner-steps", "1"),
    *("--linear-descent.updates", "100", "--nonlinear-descent.updates", "20"),
    *("--outer.steps", "10", "--outer.warmup", "2", "--outer.batch", "4", "--outer.seeds", "2"),
    *("--outer.checkpoints", "2", "--measure.updating-tasks", "6", "--measure.tasks", "32"),
    *("--measure.heldout-tasks", "16", "--measure.tracked-tasks", "4"),
]


@pytest.fixture(scope="module")
def linear():
    """The contenders of the linear network, by name, and the comparison."""
    study = metadyn.load_study(STUDY)
    comparison = study.plan(study.presets["quick"]).comparisons[0]
    return {each.name: each for each in comparison.contenders}, comparison


def test_starts_lie_between_the_random_one_and_the_learned_one(linear):
    contenders, _ = linear
    params = contenders["maml"].learner.init(jax.random.key(0))
    key = jax.random.key(1)
    at = {a: contenders[f"interpolated_{a:g}"].make(params) for a in (0, 0.25, 1)}
    random, between, learned = (each.init(key)[0] for each in at.values())
    for small, mixed, end, own in zip(random, between, learned, params["start"], strict=True):
        np.testing.assert_array_equal(end, own)
        np.testing.assert_allclose(np.std(small), 1e-3, rtol=0.3)
        np.testing.assert_allclose(mixed, 0.75 * np.float64(small) + 0.25 * own, atol=1e-6)
    W1, W2 = (np.float64(W) for W in learned)
    said = at[1].diagnose(at[1].init(key))
    expected = {
        "norm": np.sqrt((W1**2).sum() + (W2**2).sum()),
        "imbalance": np.linalg.norm(W2.T @ W2 - W1 @ W1.T),
        "product": np.linalg.norm(W2 @ W1),
        "interpolation": 1.0,
    }
    assert said.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(said[name], value, rtol=1e-5)


def test_only_maml_is_trained_and_what_is_made_of_it_counts_updates(linear):
    contenders, comparison = linear
    assert [each.name for each in comparison.metas] == ["maml"]
    assert contenders["interpolated_1"].clock == contenders["random_1"].clock == "updates"
    assert contenders["interpolated_1"].seeded
    assert isinstance(contenders["random_1"].learner, Learner)
    others = [each for each in comparison.contenders if each.name != "maml"]
    with pytest.raises(ConfigError, match=r"of = 'maml': .*'interpolated_0' is made of"):
        dataclasses.replace(comparison, contenders=others)


def test_the_whole_study_runs(tmp_path):
    out = tmp_path / "start"
    assert main(["run", STUDY, "--out", str(out), *SMALL]) == 1  # so small a study fails
    run = RunFolder(out)
    figures = {path.stem for path in run.figures.iterdir()}
    assert {"start", "mode_strength_linear"} <= figures
    named = {row["name"] for row in run.summary()["criteria"]}
    assert {claim.criterion for claim in metadyn.load_study(STUDY).claims} == named
    norm = run.measurement("linear", "interpolated_1")["norm"].transpose("seed", "task", "step")
    first = norm.to_numpy()[:, :, 0]
    assert first.shape == (2, 6)
    np.testing.assert_array_equal(first, first[:, :1].repeat(6, axis=1))  # each seed has one start
    assert first[0, 0] != first[1, 0]
