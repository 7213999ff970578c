"""Teaching: sets for Bayes against brute force, pairs that learners see, demonstrations."""

import dataclasses
from collections import ChainMap
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import metadyn as md
from metadyn import inner, teaching
from metadyn.base import STRENGTH, Learner, indexed_keys
from metadyn.domains.linear import LinearRegression
from metadyn.learners.bayes import bayes_bandit, bayes_linear
from metadyn.measuring import readings
from metadyn.runner import rehearse

SIGMA = 0.3
PLAIN, OPEN = (kind(2, 2, SIGMA, steps=6) for kind in (LinearRegression, teaching.OpenRegression))
TASK = PLAIN.evaluation_task(jax.random.key(3), jnp.array([1.5, 0.7]))
W, V = np.float64(TASK.W), np.float64(TASK.V)
KEYS = indexed_keys(jax.random.key(7), jnp.arange(4000))
ANGLES = np.linspace(0, np.pi, 181)
CIRCLE = np.sqrt(2) * np.stack([np.cos(ANGLES), np.sin(ANGLES)], -1)


def expected_error(X):
    """Returns E ‖M − W‖² / ‖W‖² in closed form, of posterior means M after inputs [..., m, 2]."""
    A = np.swapaxes(X, -1, -2) @ X
    P = np.linalg.inv(A + 2 * SIGMA**2 * np.eye(2))  # the prior variance is 1 / n_x
    bias = ((W @ (A @ P - np.eye(2))) ** 2).sum((-1, -2))
    noise = 2 * SIGMA**2 * np.trace(P @ A @ P, axis1=-2, axis2=-1)
    return (bias + noise) / (W**2).sum()


def test_sets_for_bayes_are_the_best_there_are_by_brute_force():
    lesson = np.float64(teaching.for_bayes(TASK, 3))
    np.testing.assert_allclose(lesson, np.sqrt(2) * V.T[[0, 1, 0]], rtol=1e-6)
    np.testing.assert_array_equal(teaching.for_bayes(TASK, 2, least_first=True), lesson[[1, 0]])
    one_input = expected_error(CIRCLE[:, None])
    assert expected_error(lesson[:1]) <= one_input.min()
    assert expected_error(lesson[1:2]) == pytest.approx(one_input.max(), rel=1e-3)
    x, y = np.broadcast_arrays(CIRCLE[:, None], CIRCLE[None])
    two_inputs = expected_error(np.stack([x, y], -2))
    assert two_inputs.shape == (181, 181)
    assert expected_error(lesson[:2]) <= 1.03 * two_inputs.min() < 0.3 * two_inputs.max()


@pytest.mark.parametrize("sizes", [(3, 2), (2, 3)])
def test_lessons_are_of_the_size_of_inputs_when_outputs_are_more_or_fewer(sizes):
    task = LinearRegression(*sizes).evaluation_task(jax.random.key(0), jnp.array([2.0, 1.0]))
    lesson = np.float64(teaching.for_bayes(task, 3))
    assert lesson.shape == teaching.no_lesson(task, 3).shape == (3, sizes[0])
    np.testing.assert_allclose(np.linalg.norm(lesson, axis=1), sizes[0] ** 0.5, rtol=1e-5)
    stretch = np.linalg.norm(lesson @ np.float64(task.W).T, axis=1) / sizes[0] ** 0.5
    np.testing.assert_allclose(stretch, [2, 1, 2], rtol=1e-5)


def test_gradient_through_bayes_finds_the_closed_form_from_anywhere():
    find = partial(teaching.through, bayes_linear(PLAIN), TASK, steps=60, rate=0.3)
    starts = jnp.asarray(CIRCLE[[20, 80, 150]], jnp.float32)[:, None]
    queries = jax.random.normal(KEYS[0], (400, 2))
    lessons = jax.jit(jax.vmap(lambda start: find(start=start, queries=queries)))(starts)
    np.testing.assert_allclose(np.linalg.norm(lessons, axis=-1), np.sqrt(2), rtol=1e-5)
    alignment = np.abs(lessons[:, 0] @ V[:, 0]) / np.sqrt(2)
    assert (alignment > 0.99).all()
    at_start = np.abs(starts[:, 0] @ V[:, 0]) / np.sqrt(2)
    assert at_start.min() < 0.9


def test_the_best_lesson_is_kept_where_descent_overshoots_it():
    """A first step that is far too long makes no start worse."""
    starts = np.float32(CIRCLE[::20])[:, None]
    queries, learner = jax.random.normal(KEYS[0], (50, 2)), bayes_linear(PLAIN)

    def error(lesson):
        state = learner.update(learner.init(jax.random.key(0)), lesson[0], TASK.W @ lesson[0])
        answers = jax.vmap(learner.predict, (None, 0))(state, queries)
        return jnp.mean((answers - queries @ TASK.W.T) ** 2)

    find = lambda start: teaching.through(learner, TASK, start, queries, steps=1, rate=5.0)
    lessons, errors = jax.jit(jax.vmap(find)), jax.jit(jax.vmap(error))
    assert np.all(errors(lessons(starts)) <= errors(starts) * (1 + 1e-5))


def test_taught_bayes_comes_to_the_expected_error_of_each_teacher():
    """The closed form gives it. Teaching the least mode first is only worse after one example."""
    best = partial(teaching.for_bayes, examples=2)
    teachers = (best, partial(best, least_first=True))
    learner = teaching.taught(bayes_linear(PLAIN), teachers, n_x=2, examples=2)
    sample = Partial(PLAIN.evaluation_task, spectrum=np.float32([1.5, 0.7]))
    tasks = dataclasses.replace(PLAIN.evaluation(64), sample=sample, size=4000)
    lesson = np.float64(best(TASK))
    for task_set, examples in zip(
        teaching.taught_sets(tasks, "best", "least"), (lesson, lesson[::-1]), strict=True
    ):
        measured = readings(
            task_set, md.Contender("b", "b", learner, "bayes", (0, 1, 2)), (), KEYS[0]
        )
        errors = [expected_error(examples[:m]) for m in (1, 2)]
        np.testing.assert_allclose(np.float64(measured["error"]).mean(0), [1, *errors], rtol=0.04)


def test_the_teacher_is_asked_once_for_each_task():
    calls = []

    def teacher(task):
        jax.debug.callback(lambda: calls.append(1))
        return teaching.for_bayes(task, 2)

    learner = teaching.taught(bayes_linear(PLAIN), [teacher], n_x=2, examples=2)
    task = teaching.Taught(TASK, jnp.int32(0))
    run = lambda key: inner.run(OPEN, learner, task, key, (0, 3, 6))["loss"]
    jax.block_until_ready(jax.jit(jax.vmap(run))(KEYS[:3]))
    jax.effects_barrier()
    assert 0 < len(calls) <= 3


@pytest.mark.parametrize("each", [1, 2])
def test_taught_inputs_come_first_and_have_the_noise_of_the_pairs_that_they_replace(each):
    def remember(state, x, y):
        t, pairs = state
        return t + 1, pairs.at[t].set(jnp.concatenate([x, y]))

    start = lambda key: (jnp.int32(0), jnp.zeros((6, 4)))
    witness = Learner(start, lambda state, x: state[1].ravel()[:2], remember)
    teachers = [partial(teaching.no_lesson, examples=2), partial(teaching.for_bayes, examples=2)]

    def pairs_of(teacher):
        learner = teaching.taught(witness, teachers, n_x=2, examples=2, each=each)
        task = teaching.Taught(TASK, jnp.int32(teacher))
        state = learner.init(KEYS[0])
        for t in range(6):
            x, _, y = inner.interact(OPEN, task, lambda q: jnp.zeros(2), jax.random.split(KEYS[t]))
            state = learner.update(state, x, y)
        return np.split(np.float64(state[2][1]), 2, axis=1)

    (posed, answers), (x, y) = pairs_of(0), pairs_of(1)
    count = 2 * each
    np.testing.assert_allclose(x[:count], np.repeat(np.sqrt(2) * V.T, each, axis=0), rtol=1e-5)
    np.testing.assert_array_equal(x[count:], posed[count:])
    np.testing.assert_allclose(y - x @ W.T, answers - posed @ W.T, atol=1e-5)
    assert np.std(y - x @ W.T) == pytest.approx(SIGMA, rel=0.6)


def test_the_teaching_gain_is_that_of_planted_curves():
    times = np.arange(7)
    random = np.array([[1, 0.9, 0.8, 0.4, 0.5, 0.2, 0.1], [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]])
    taught = np.array([[1, 0.5, 0.3, 0, 0, 0, 0], [1, 0.5, 0.3, 0, 0, 0, 0]])
    # Six steps are too few for the second curve, so its gain is at least that of the last step.
    np.testing.assert_allclose(teaching.gain(times, 2, random, taught), [4.5 / 2, 6 / 2])


def test_demonstrations_show_the_correct_action_and_bayes_learns_it_at_once():
    domain = teaching.DemonstratedBandit(contexts=3, actions=4, steps=8)
    _, outcomes = inner.observe(domain, KEYS[:200])
    assert (outcomes.reward == 1).all()
    probes = tuple(domain.evaluation().probes.items())
    run = lambda key: inner.run(
        domain, bayes_bandit(domain), domain.sample_task(key), key, range(9), probes
    )[STRENGTH]
    strength = np.float64(jax.jit(jax.vmap(run))(KEYS)).mean((0, 2))
    expected = 1 - (1 - 1 / 4) * (1 - 1 / 3) ** np.arange(9)  # chance, until a context is seen
    np.testing.assert_allclose(strength, expected, atol=0.02)


def test_the_study_is_rehearsed_without_complaint():
    study = md.load_study("teaching")
    config = dataclasses.replace(study.presets["quick"], learners=("maml", "lstm"))
    plan = study.plan(config)
    linear, bandit = plan.comparisons
    assert [meta.name for meta in linear.metas] == ["maml", "lstm"]
    assert [meta.name for meta in bandit.metas] == ["lstm"]
    assert not [m for m in plan.measurements if not m.after_training]
    own = {contender.name for _, tasks, contender, _ in linear.measurements if tasks.name == "own"}
    assert {"taught_bayes", "taught_maml", "bayes_by_maml", "bayes_by_lstm"} < own
    assert "taught_sgd" not in own
    drawn = [contender for _, tasks, contender, _ in linear.measurements if tasks.name == "random"]
    names = {f"taught_{name}" for name in ("sgd", "bayes", "maml", "lstm")}
    assert {contender.name for contender in drawn} == names
    assert {c.name: c.derived_from for c in drawn if c.derived_from} == {
        "taught_maml": "maml",
        "taught_lstm": "lstm",
    }
    criteria = {criterion.name for criterion in rehearse(study, config, plan)}
    assert {*ChainMap(*study.claims.values())} <= criteria


def test_where_no_meta_learner_can_serve_the_study_trains_an_lstm():
    study = md.load_study("teaching")
    config = dataclasses.replace(study.presets["quick"], learners=("maml",))
    _, bandit = study.plan(config).comparisons
    assert [meta.name for meta in bandit.metas] == ["lstm"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--examples", "21"], "--examples 21: more examples than steps: must be at most"),
        (["--examples", "0"], "--examples 0: must be positive"),
        (["--learners", "elman"], "learners"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(options, message, refused):
    refused(["teaching", *options], message)
