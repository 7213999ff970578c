"""The study of remedies out of distribution: training tasks, teachers and refusals."""

import jax
import numpy as np
import pytest

import metadyn as md
from metadyn import dynamics, trajectories
from metadyn.learners.normalised import Normalised
from metadyn.runner import rehearse

STUDY = md.load_study("out_of_distribution")
QUICK = STUDY.presets["quick"]


@pytest.fixture(scope="module")
def plan():
    """The plan of the quick preset."""
    return STUDY.plan(QUICK)


def test_each_remedy_has_the_parts_in_its_name(plan):
    (linear,) = plan.comparisons
    metas = {meta.name: meta for meta in linear.metas}
    remedies = ["lstm", "lstm_mixture", "lstm_normalised", "lstm_both", "deltanet", "deltanet_both"]
    assert [*metas] == remedies
    normalised = [name for name, meta in metas.items() if isinstance(meta.learner, Normalised)]
    assert normalised == ["lstm_normalised", "lstm_both", "deltanet_both"]
    trained_on = {name: meta.objective.keywords.get("sample") for name, meta in metas.items()}
    mixture = trained_on.pop("lstm_mixture")
    assert [d.C[0, 0] * 3 for d in mixture.domains] == pytest.approx([1, 64])
    assert mixture.weights == pytest.approx([1, 1 / 64])
    assert trained_on["lstm_both"] == trained_on["deltanet_both"] == mixture
    assert trained_on["lstm"] is trained_on["lstm_normalised"] is trained_on["deltanet"] is None
    bayes = {contender.name: contender.learner for contender in linear.contenders}
    for name, meta in metas.items():
        prior = "bayes" if trained_on.get(name) is None and name in trained_on else "bayes_mixture"
        assert meta.objective.keywords["teacher"] is bayes[prior]


def test_the_right_prior_of_a_set_has_the_mean_square_of_its_tasks(plan):
    (linear,) = plan.comparisons
    right = {tasks.name: c for _, tasks, c, _ in linear.measurements if c.name == "bayes_right"}
    assert [*right] == ["in_distribution", "x2", "x4", "x8", "x16", "outsize"]
    s = np.array(QUICK.linear.spectrum())
    largest = np.array([8 * s[0], *s[1:]])
    factors = {"x4": 4, "x16": 16, "outsize": np.linalg.norm(largest) / np.linalg.norm(s)}
    for name, factor in factors.items():
        root = right[name].learner.init(jax.random.key(0)).root
        np.testing.assert_allclose(root[0], factor * np.eye(3) / np.sqrt(3), rtol=1e-5)


def test_the_study_is_rehearsed_and_growth_is_over_bayes_under_the_right_prior(plan, monkeypatch):
    references, joint_excess = [], dynamics.joint_excess

    def record(pairs, take):
        references.append([trajectories.about(best).learner for _, best in pairs])
        return joint_excess(pairs, take)

    monkeypatch.setattr(dynamics, "joint_excess", record)
    rehearse(STUDY, QUICK, plan)
    assert references.count(["bayes_right", "bayes_right"]) == 6 * 5  # learners times shifts
    assert references.count(["bayes", "bayes"]) == 6  # the cost of each remedy in distribution


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scales", "1", "0"], "--scales"),
        (["--other-batch", "0"], "--other-batch 0"),
        (["--meta", "deltanet"], "--meta deltanet: choose a network with a memory, other than"),
        (["--meta", "maml"], "--meta maml: choose a network with a memory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(options, message, refused):
    refused(["out_of_distribution", *options], message)
