"""Curricula: tilted inputs against Saxe's closed form, and modes admitted at their steps."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metadyn as md
from metadyn import dynamics, inner
from metadyn.base import Learner, indexed_keys
from metadyn.curriculum import (
    Admission,
    AdmittedContexts,
    AdmittedFrequencies,
    TiltedRegression,
    admitting,
    tilt,
)
from metadyn.domains.bandit import ContextualBandit
from metadyn.domains.fourier import FourierRegression, band
from metadyn.domains.linear import LinearRegression
from metadyn.errors import ConfigError
from metadyn.learners import gradient as gd
from metadyn.learners.lstm import LSTMConfig
from metadyn.objectives import prediction_loss
from metadyn.outer import MetaTraining, OuterConfig, OuterLoop
from metadyn.runner import rehearse
from metadyn.trajectories import About, dataset, describe

S = np.array([2.0, 1.0, 0.5], np.float32)
FOURIER = FourierRegression(band(1, 3), steps=6)
BANDIT = ContextualBandit(contexts=3, actions=3, steps=6)
KEYS = indexed_keys(jax.random.key(5), jnp.arange(2000))


def test_tilted_inputs_have_their_stated_variances_and_an_unchanged_trace():
    domain = TiltedRegression(n_x=4, n_y=3)
    task = jax.jit(domain.evaluation_task)(jax.random.key(0), S)
    keys = indexed_keys(KEYS[0], jnp.arange(20_000))
    x = np.float64(jax.jit(jax.vmap(partial(domain.query, task)))(keys))
    V = np.float64(task.V)
    covariance = np.eye(4) + V @ np.diag([3 / 7 - 1, 6 / 7 - 1, 12 / 7 - 1]) @ V.T
    np.testing.assert_allclose(tilt(S), [3 / 7, 6 / 7, 12 / 7], rtol=1e-6)
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.06)
    assert np.trace(covariance) == pytest.approx(4)


@pytest.mark.parametrize("kind", [LinearRegression, TiltedRegression])
def test_descent_on_tilted_inputs_follows_the_closed_form_at_the_speed_of_each_variance(kind):
    domain, start, rate = kind(3, 3, sigma=0.01), 1e-3, 0.01
    times = inner.log_spaced(1200, 80)
    network = gd.balanced_deep_linear(3, 3, width=3, strength=start)
    learner = gd.gradient(network, optax.sgd(rate), batch=128)
    task = jax.jit(partial(domain.evaluation_task, rotate=False))(jax.random.key(0), S)
    probes = (("mode_strength", domain.probe(8)),)
    run = jax.jit(partial(inner.run, domain, learner, times=times, probes=probes))
    strength = np.float64(run(task, KEYS[0])["mode_strength"])
    learning_times = dynamics.learning_times(np.array(times), strength)
    speed = tilt(S) if kind is TiltedRegression else np.ones(3)
    theory = np.log(S / start - 1) / (2 * S * speed * rate)  # a(t) = s / 2 (Saxe et al. 2013)
    np.testing.assert_allclose(learning_times, theory, rtol=0.06)


def test_modes_are_admitted_from_their_steps_on():
    admitted = jax.jit(jax.vmap(Admission((0, 5, 9)).admitted, (0, None)))(jnp.arange(12), KEYS[0])
    assert admitted.tolist() == [[True, step >= 5, step >= 9] for step in range(12)]


def test_mixed_episodes_have_the_modes_of_any_stage_until_all_are_admitted():
    admission = Admission((0, 5, 20), mixed=True)
    share = jax.jit(lambda step: jax.vmap(partial(admission.admitted, step))(KEYS).mean(0))
    for step in (0, 7, 19):  # a third of the episodes each have one mode, two and three
        np.testing.assert_allclose(share(step), [1, 2 / 3, 1 / 3], atol=0.04)
    np.testing.assert_array_equal(share(20), [1, 1, 1])


def test_the_stage_of_a_mixed_episode_is_independent_of_its_task():
    domain = ContextualBandit(2, 2, steps=4)
    admitting_domain = AdmittedContexts(2, 2, steps=4, admission=Admission((0, 9), mixed=True))
    task, admitted = jax.jit(jax.vmap(admitting_domain.sample_task))(KEYS)
    first = np.asarray(jax.tree.leaves(task)[0])[:, 0]
    joint = np.bincount(2 * first + np.asarray(admitted) - 1, minlength=4) / len(KEYS)
    np.testing.assert_allclose(joint, 1 / 4, atol=0.05)
    np.testing.assert_array_equal(task.best, jax.jit(jax.vmap(domain.sample_task))(KEYS).best)


def test_functions_lack_frequencies_that_are_not_admitted_and_are_otherwise_unchanged():
    plain = jax.jit(jax.vmap(FOURIER.sample_task))(KEYS)
    domain = partial(AdmittedFrequencies, band(1, 3), steps=6, admission=Admission((0, 9, 5)))
    draw = jax.jit(lambda step: jax.vmap(domain(step=step).sample_task)(KEYS))
    for step, admitted in ((0, [0, 1, 0, 0]), (5, [0, 1, 0, 1]), (9, [0, 1, 1, 1])):
        for drawn, full in zip(draw(step), plain, strict=True):
            np.testing.assert_array_equal(drawn, np.array(admitted) * np.asarray(full))


def test_contexts_are_drawn_evenly_from_those_admitted():
    any_action = Learner(lambda key: 0, lambda state, c: jnp.zeros(3), lambda state, c, seen: state)
    domain = partial(AdmittedContexts, 3, 3, steps=6, admission=Admission((0, 5, 9)))
    act = lambda step, key: inner.act(domain(step=step), any_action, key)
    run = jax.jit(jax.vmap(act, (None, 0)))
    for step, count in ((0, 1), (5, 2), (9, 3)):
        queries, outcomes = run(step, KEYS[:500])
        np.testing.assert_array_equal(queries, outcomes.context)
        share = np.bincount(np.ravel(queries), minlength=3) / queries.size
        np.testing.assert_allclose(share, [1 / count] * count + [0] * (3 - count), atol=0.04)


def trained(objective, *steps, meta=None):
    """Returns the parameters after each of these outer steps."""
    config = OuterConfig(steps=20, batch=4, seeds=2, warmup=0, dispatch=3, schedule="constant")
    loop = OuterLoop({"lstm": MetaTraining(meta or META, objective)}, config, jax.random.key(0))
    state, params = loop.init(), []
    for step in steps:
        (*_, (state, _)) = loop.run(state, step)
        params.append(jax.tree.map(np.array, state.params))
    return params


META = LSTMConfig(hidden=4).make(FOURIER)


def test_training_admits_a_mode_at_its_step_and_not_before():
    """Before it, the prior lacks the mode. With all modes from step 0, training is plain."""
    without = dataclasses.replace(FOURIER, spectrum=(*FOURIER.spectrum[:3], 0.0))
    curriculum = lambda *steps: admitting(FOURIER, META, prediction_loss, Admission(steps))
    assert_equal = partial(jax.tree.map, np.testing.assert_array_equal)
    before, after = zip(
        trained(curriculum(0, 0, 7), 7, 8),
        trained(prediction_loss(without, META), 7, 8),
        strict=True,
    )
    assert_equal(*before)
    with pytest.raises(AssertionError):
        assert_equal(*after)
    assert_equal(trained(curriculum(0, 0, 0), 8), trained(prediction_loss(FOURIER, META), 8))


def test_an_objective_that_changes_over_training_still_does_so_under_a_curriculum():
    meta = LSTMConfig(hidden=4).make(BANDIT, 1)
    objective = lambda annealed: partial(
        md.actor_critic, config=md.ActorCriticConfig(annealed=annealed, group=2), steps=10
    )
    curriculum = lambda annealed: admitting(BANDIT, meta, objective(annealed), Admission((0, 0, 0)))
    assert_close = partial(jax.tree.map, partial(np.testing.assert_allclose, atol=1e-6))
    after = partial(trained, meta=meta)
    annealed = after(curriculum(True), 8)
    assert_close(annealed, after(objective(True)(BANDIT, meta), 8))
    with pytest.raises(AssertionError):
        assert_close(annealed, after(curriculum(False), 8))


@pytest.mark.parametrize("preset", ["quick", "workstation"])
def test_no_curriculum_has_the_targets_of_tasks_with_all_modes(preset):
    study = md.load_study("curriculum")
    _, nonlinear, _ = study.plan(study.presets[preset]).comparisons
    plain, *arms = (meta.objective for meta in nonlinear.metas)
    assert len(arms) == 3
    for objective in (plain, *(arm.keywords["objective"] for arm in arms)):
        assert objective.keywords["teacher"] is None


def test_a_curriculum_needs_a_domain_that_has_modes_and_a_step_for_each():
    with pytest.raises(ConfigError, match="give a step for each of the 3 modes"):
        admitting(FOURIER, META, prediction_loss, Admission((0, 5)))
    with pytest.raises(ConfigError, match="domain = 'LinearRegression': has no curriculum"):
        admitting(LinearRegression(), META, prediction_loss, Admission((0, 5)))
    with pytest.raises(ConfigError, match="one context must join at step 0"):
        admitting(ContextualBandit(contexts=2), META, prediction_loss, Admission((1, 5)))
    with pytest.raises(ConfigError, match="steps = \\(0, -1\\)"):
        Admission((0, -1))


@pytest.mark.parametrize(
    ("excess", "level", "steps"),
    [
        ([[8, 4, 2, 1.0], [8, 2, 1, 0.5]], 1, [30, 20]),
        ([[8, 6, 7, 2, 4.0], [8, 4, 2, 1, 1.0]], 2, [30, 20]),  # one sometimes rises
    ],
)
def test_curricula_are_compared_by_the_steps_to_an_excess_that_all_reach(excess, level, steps):
    """Bayes has a loss of 0.5, 0.3 above the floor; `excess` is in units of these 0.3."""
    about = lambda name: About(name, name, "meta", "observations", loss_floor=0.2)
    axes, time = ("outer_step", "seed", "task", "step"), {"time": ("step", (0, 1))}

    def measured(excess):
        loss = 0.5 + 0.3 * np.array(excess)[:, None, None]
        arrays = {"loss": np.stack([np.nan * loss, loss], -1)}
        coords = {"outer_step": ("outer_step", range(0, 10 * len(excess), 10))}
        return dataset(arrays, describe(about("a"), {"loss": axes}, time | coords, {}))

    bayes = dataset(
        {"loss": np.array([[np.nan, 0.5]])},
        describe(about("bayes"), {"loss": ("task", "step")}, time, {}),
    )
    reached, steps_taken, gains = dynamics.to_equal_excess([*map(measured, excess)], bayes)
    np.testing.assert_allclose(reached.value, level, rtol=1e-6)
    np.testing.assert_allclose([estimate.value for estimate in steps_taken], steps, rtol=1e-6)
    np.testing.assert_allclose([gain.value for gain in gains], [1, 1.5], rtol=1e-6)


def test_the_study_is_rehearsed_without_complaint():
    study = md.load_study("curriculum")
    config = dataclasses.replace(study.presets["quick"], learners=("lstm",))
    plan = study.plan(config)
    arms = ["none", "measured", "mixed", "reversed"]
    trained = {part.name: [meta.name for meta in part.metas] for part in plan.comparisons}
    assert trained == {"linear": ["lstm"], "nonlinear": arms, "bandit": arms[:-1]}
    rehearse(study, config, plan)

    def mine(comparison):
        meta = LSTMConfig(hidden=4).make(comparison.domain, comparison.heads)
        return md.Contender("mine", "mine", meta)

    study = study.beside("with_mine", mine)
    criteria = {criterion.name for criterion in rehearse(study, config, study.plan(config))}
    assert {"nonlinear_mine_gain", "bandit_mine_gain"} <= criteria


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--nonlinear-steps", "0", "10", "3000"],
            "--nonlinear-steps 0 10 3000: would never admit a mode: must be below outer.steps",
        ),
        (["--bandit-steps", "0", "10"], "--bandit-steps 0 10: give a step for each of the 3 modes"),
        (["--bandit-steps", "0", "10", "5"], "--bandit-steps 0 10 5: must increase"),
    ],
)
def test_bad_curricula_are_one_line_and_exit_code_2(options, message, refused):
    refused(["curriculum", *options], message)
