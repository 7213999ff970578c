"""The study of learners: which it trains where, with which settings, and its refusals."""

import dataclasses

import chex
import jax
import pytest

import metadyn as md
from metadyn.domains.linear import LinearRegression
from metadyn.learners.lstm import LSTMConfig
from metadyn.runner import rehearse
from metadyn.study import to_train

STUDY = md.load_study("learners")
QUICK = STUDY.presets["quick"]


@pytest.fixture(scope="module")
def plan():
    """The plan of the quick preset."""
    return STUDY.plan(QUICK)


def test_every_learner_is_trained_on_each_domain_that_it_can_serve(plan):
    trained = {part.name: [meta.name for meta in part.metas] for part in plan.comparisons}
    networks = ["lstm", "gru", "minlstm", "transformer", "linear_attention", "deltanet"]
    regressors = [*networks, "maml", "learned_optimizer"]
    assert trained == {"linear": regressors, "nonlinear": regressors, "bandit": networks}


def test_all_learners_of_a_domain_are_measured_on_the_same_tasks(plan):
    for part in plan.comparisons:
        (tasks,) = part.sets
        measured = {c.name for _, t, c, _ in part.measurements if t.name == tasks.name}
        assert {c.name for c in part.contenders} == measured


def test_a_learners_own_settings_replace_those_of_the_outer_loop(plan):
    own = {name: (trained.own or plan.outer) for name, trained in plan.trained.items()}
    assert own["lstm_linear"].learning_rate == QUICK.outer.learning_rate
    assert own["deltanet_linear"].learning_rate == QUICK.deltanet.outer_learning_rate
    assert own["maml_linear"].batch == QUICK.maml.outer_batch == 8
    assert own["lstm_linear"].batch == own["deltanet_linear"].batch == QUICK.outer.batch

    @dataclasses.dataclass(frozen=True)
    class Slow(LSTMConfig):
        outer_updates_per_step: int = 3

    slow = to_train("slow", Slow(), QUICK.outer, LinearRegression())
    assert slow.own == dataclasses.replace(QUICK.outer, updates_per_step=3)
    assert slow.options == {"updates_per_step": "slow.outer_updates_per_step"}


def test_the_study_is_rehearsed_without_complaint_with_another_beside_it():
    def mine(comparison):
        meta = LSTMConfig(hidden=4).make(comparison.domain, comparison.heads)
        return md.Contender("mine", "mine", meta)

    study = STUDY.beside("with_mine", mine)
    few = dataclasses.replace(QUICK, learners=("lstm", "maml"))
    criteria = {criterion.name for criterion in rehearse(study, few, study.plan(few))}
    for figure in ("staggering", "beyond", "excess", "outer"):
        assert {f"linear_mine_{figure}", f"bandit_mine_{figure}"} <= criteria


def test_a_smaller_batch_has_the_first_episodes_and_does_not_change_other_trainings():
    domain = md.load_study("linear_regression").presets["quick"].domain
    meta = QUICK.lstm.make(domain)
    outer = md.OuterConfig(steps=3, batch=4, seeds=1, warmup=0, dispatch=3)
    small = dataclasses.replace(outer, batch=2)
    objective = md.prediction_loss(domain, meta)
    metas = {
        "a": md.MetaTraining(meta, objective),
        "b": md.MetaTraining(meta, objective, small),
    }

    def trained(trainings, config):
        loop = md.OuterLoop(trainings, config, jax.random.key(0))
        return [state for state, _ in loop.run(loop.init(), 3)][-1].params, loop.seconds

    together, seconds = trained(metas, outer)
    for name, config in (("a", outer), ("b", small)):
        alone, _ = trained({name: md.MetaTraining(meta, objective)}, config)
        chex.assert_trees_all_equal(together[name], alone[name])
    assert set(seconds) == {"a", "b"}
    assert all(duration > 0 for duration in seconds.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learners", "lstm", "elman"], "learners"),
        (["--transformer.attention-heads", "5"], "--transformer.attention-heads 5: must divide"),
        (["--deltanet.hidden", "65"], "--deltanet.attention-heads 4: must divide hidden = 65"),
        (["--deltanet.layers", "0"], "--deltanet.layers 0: must be positive"),
        (["--maml.outer-batch", "0"], "--maml.outer-batch 0: must be positive"),
        (["--outer.b2", "1.5"], "--outer.b2 1.5: must be above 0 and below 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(options, message, refused):
    refused(["learners", *options], message)


def test_a_learner_that_cannot_serve_a_domain_is_refused_before_training(refused):
    refused(["contextual_bandit", "--meta", "maml"], "lstm")
