"""The inner loop: keys, probing, chunks, devices."""

import functools
import os
import subprocess
import sys
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from metadyn import inner, measuring
from metadyn.base import Learner, Modes, Probe, TaskSet, indexed_keys
from metadyn.domains.bandit import ContextualBandit
from metadyn.domains.linear import LinearRegression
from metadyn.errors import ConfigError
from metadyn.learners.bayes import bayes_linear
from metadyn.learners.gradient import deep_linear, gradient
from metadyn.learners.lstm import LSTMConfig
from metadyn.study import Contender

DOMAIN = LinearRegression(3, 2, steps=8)
S = jnp.float32(DOMAIN.spectrum())
PROBE = DOMAIN.probe(8)
PROBES = (("mode_strength", PROBE),)
META = LSTMConfig(hidden=8).make(DOMAIN)


@functools.cache
def learners():
    params = jax.jit(lambda key: jax.tree.map(lambda a: a + 0.3, META.init(key)))(jax.random.key(0))
    return {
        "bayes": bayes_linear(DOMAIN),
        "lstm": META.learner(params),
        "sgd": gradient(deep_linear(3, 2, scale=0.3), optax.sgd(0.05), 4),
    }


@pytest.mark.parametrize("name", ["bayes", "lstm", "sgd"])
def test_probing_never_disturbs_the_learner(name):
    """Probed at every step or only at the last one, a learner ends with the same bits."""
    learner = learners()[name]
    task = jax.jit(DOMAIN.evaluation_task)(jax.random.key(1), S)
    final = []
    for times in (tuple(range(9)), (0, 8)):
        for probes in (PROBES, ()):
            run = jax.jit(partial(inner.run, DOMAIN, learner, times=times, probes=probes))
            readings = jax.tree.map(np.asarray, run(task, jax.random.key(2)))
            if len(times) == 2:
                mean = readings["loss"][-1] * 8
            else:
                mean = readings["loss"][1:].sum()
            final.append((readings["mode_strength"][-1] if probes else None, mean))
    np.testing.assert_array_equal(final[0][0], final[2][0])
    np.testing.assert_array_equal(final[0][1], final[1][1])
    np.testing.assert_array_equal(final[2][1], final[3][1])


def make_bayes(params):
    return bayes_linear(DOMAIN)


def measure(indices, times=(0, 1, 5, 8)):
    readings = inner.measure(
        DOMAIN,
        make_bayes,
        times,
        PROBES,
        (),
        Partial(DOMAIN.evaluation_task, spectrum=S),
        jax.random.key(4),
        indices,
    )
    return jax.tree.map(np.asarray, readings)


def test_a_task_is_the_same_in_any_chunk_and_among_any_others(monkeypatch):
    expected = measure(jnp.arange(64))
    assert {name: a.shape for name, a in expected.items()} == {
        "loss": (64, 4),
        "mode_strength": (64, 4, 2),
        "off_diagonal": (64, 4),
        "unexplained": (64, 4),
    }
    for chunk in (3, 1):
        inner.measure.clear_cache()
        with monkeypatch.context() as patch:
            patch.setattr(inner.mesh, "task_chunk", lambda *arguments, chunk=chunk: chunk)
            chunked = measure(jnp.arange(64))
        inner.measure.clear_cache()
        for name in expected:
            np.testing.assert_allclose(expected[name], chunked[name], rtol=1e-4, atol=1e-5)
    two_tasks = measure(jnp.array([7, 2]))
    np.testing.assert_allclose(
        two_tasks["mode_strength"], expected["mode_strength"][[7, 2]], rtol=1e-4, atol=1e-5
    )


def test_the_same_key_gives_the_same_bits_twice():
    first, second = (measure(jnp.arange(64)) for _ in range(2))
    chex.assert_trees_all_equal(first, second)


def test_a_learner_that_draws_its_start_acts_in_the_same_way_when_it_is_measured():
    domain = ContextualBandit(2, 3, steps=4)
    start = lambda key: 3 * jax.random.normal(key, (3,))
    learner = Learner(start, lambda state, c: state, lambda state, c, feedback: state)
    key = jax.random.key(5)
    _, feedback = inner.act(domain, learner, key)
    key_task, key_episode = jax.random.split(key)
    task = domain.sample_task(key_task)
    run = inner.run(domain, learner, task, key_episode, range(5))
    answer = learner.init(jax.random.split(key_episode)[0])
    losses = jax.vmap(domain.loss, (None, 0))(answer, feedback)
    np.testing.assert_allclose(run["loss"][1:], losses, rtol=1e-6)
    actions = np.asarray(feedback.action)
    actions_again = []
    for t in range(4):
        keys = jax.random.split(jax.random.fold_in(jax.random.split(key_episode)[1], t))
        _, _, outcome = inner.interact(domain, task, lambda query: answer, keys)
        actions_again.append(int(outcome.action))
    np.testing.assert_array_equal(actions, actions_again)


def test_observed_episodes_equal_measured_ones_of_the_same_key():
    keys = indexed_keys(jax.random.key(3), jnp.arange(5))
    remember = Learner(
        lambda key: jnp.zeros(5), lambda state, x: jnp.zeros(2),
        lambda state, x, y: jnp.concatenate([x, y]), diagnose=lambda state: {"seen": state},
    )  # fmt: skip

    def measure_inputs(key):
        key_task, key_episode = jax.random.split(key)
        task = DOMAIN.sample_task(key_task)
        return inner.run(DOMAIN, remember, task, key_episode, range(9))["seen"][1:]

    observed = jax.jit(lambda keys: jnp.concatenate(inner.observe(DOMAIN, keys), 1))(keys)
    measured_inputs = jax.jit(jax.vmap(measure_inputs, out_axes=-1))(keys)  # [T, 5, B]
    np.testing.assert_allclose(measured_inputs, observed, rtol=1e-5, atol=1e-6)


def test_random_draws_do_not_depend_on_names_of_task_sets_or_learners():
    """Then what differs only by name is compared on the same tasks, from the same weights."""
    sample = Partial(DOMAIN.evaluation_task, spectrum=S)
    measure_sgd = lambda tasks, learner: measuring.readings(
        TaskSet(tasks, DOMAIN, sample, {"mode_strength": PROBE}, size=8),
        Contender(learner, "SGD", learners()["sgd"], times=(0, 5, 8)),
        (),
        jax.random.key(4),
    )
    chex.assert_trees_all_equal(measure_sgd("heldout", "sgd"), measure_sgd("heldout_gru", "other"))
    first, second = measure_sgd("heldout", "sgd")["mode_strength"][:2]
    assert np.any(np.asarray(first) != np.asarray(second))


def test_readings_are_in_range():
    readings = measure(jnp.arange(64))
    for share in ("off_diagonal", "unexplained"):
        assert np.all((readings[share] >= 0) & (readings[share] <= 1))
    assert np.all(np.isnan(readings["loss"][:, 0]))
    assert np.all(readings["loss"][:, 1:] >= 0)
    np.testing.assert_allclose(readings["mode_strength"][:, 0], 0)  # before any feedback
    np.testing.assert_allclose(readings["unexplained"], 0, atol=1e-5)


def test_the_loss_of_a_batch_is_the_mean_over_its_answers():
    """The learner answers zero, so the loss is the mean square of the targets that it gets next."""
    remember = lambda state, x, y: y
    learner = Learner(
        lambda key: jnp.zeros((6, 2)), lambda state, x: jnp.zeros(2), remember, batch=6,
        diagnose=lambda state: {"seen": state},
    )  # fmt: skip
    task = DOMAIN.sample_task(jax.random.key(0))
    readings = inner.run(DOMAIN, learner, task, jax.random.key(1), range(9))
    expected = (np.float64(readings["seen"][1:]) ** 2).mean((1, 2))
    np.testing.assert_allclose(readings["loss"][1:], expected, rtol=1e-5)


def test_65536_tasks_fit_in_8_gib():
    """The compiler states a device's peak memory, at the paper's size: 5 × 5, T = 20."""
    domain = LinearRegression(5, 5)
    meta = LSTMConfig(hidden=64).make(domain)
    lowered = inner.measure.lower(
        domain,
        meta.learner,
        tuple(range(21)),
        (("mode_strength", domain.probe(32)),),
        jax.eval_shape(jax.vmap(meta.init), jax.random.split(jax.random.key(0), 1)),
        Partial(domain.evaluation_task, spectrum=jnp.float32(domain.spectrum())),
        jax.random.key(0),
        jax.ShapeDtypeStruct((65_536,), jnp.int32),
    )
    memory = lowered.compile().memory_analysis()
    bytes_used = memory.temp_size_in_bytes + memory.output_size_in_bytes
    outputs = 65_536 * 21 * (5 + 4) * 4 / jax.device_count()
    assert outputs <= bytes_used < 8 * 2**30


def axes_of(learner, probes):
    """Returns the axes of each reading from what is stored beside a measurement."""
    sample = Partial(DOMAIN.evaluation_task, spectrum=S)
    tasks = TaskSet("tasks", DOMAIN, sample, dict(probes), size=3)
    stored_axes = measuring.description(tasks, Contender("learner", "learner", learner))["axes"]
    assert all(axes[:2] == ["task", "step"] for axes in stored_axes.values())
    return {name: tuple(axes[2:]) for name, axes in stored_axes.items()}


def test_bytes_needed_count_all_that_a_probe_reads():
    """3 tasks have 8 answers of 2 numbers, a strength and a loss at 9 times, in float32."""
    probe = DOMAIN.answers(8)
    sample = Partial(DOMAIN.evaluation_task, spectrum=S)
    tasks = TaskSet("tasks", DOMAIN, sample, {"said": probe}, size=3)
    bayes = Contender("bayes", "Bayes", bayes_linear(DOMAIN), "bayes")
    assert measuring.bytes_needed(tasks, bayes, seeds=1) == 4 * 3 * 9 * (8 * 2 + 1 + 1)


def test_axes_name_every_reading():
    assert axes_of(learners()["lstm"], PROBES) == {
        "loss": (),
        "saturated_gates": (),
        "mode_strength": ("mode",),
        "off_diagonal": (),
        "unexplained": (),
    }


def test_a_second_probe_is_recorded_under_its_own_name():
    """Readings of the first probe stay as they are when it is alone."""
    domain = LinearRegression(3, 2, steps=4)
    learner, probes = bayes_linear(domain), (*PROBES, ("coarse", domain.probe(6)))
    task = jax.jit(domain.evaluation_task)(jax.random.key(1), S)
    run = jax.jit(partial(inner.run, domain, learner, times=range(5)), static_argnames="probes")
    alone, readings = (run(task, jax.random.key(2), probes=p) for p in (PROBES, probes))
    axes = axes_of(learner, probes)
    assert (
        axes.keys()
        == readings.keys()
        == {*alone, "coarse", "coarse_off_diagonal", "coarse_unexplained"}
    )
    assert axes["coarse"] == ("coarse_mode",)
    assert {name: a.shape for name, a in readings.items() if name not in alone} == {
        "coarse": (5, 2),
        "coarse_off_diagonal": (5,),
        "coarse_unexplained": (5,),
    }
    for name, value in alone.items():
        np.testing.assert_array_equal(readings[name], value)
    # The learner is linear, so that other queries read the same.
    np.testing.assert_allclose(readings["coarse"], readings["mode_strength"], atol=1e-4)


def test_log_spaced_times():
    assert inner.log_spaced(1000, 4) == (0, 1, 10, 100, 1000)
    assert inner.log_spaced(3, 50) == (0, 1, 2, 3)
    assert inner.log_spaced(7, 1) == (0, 7)
    with pytest.raises(ConfigError, match="steps = 0"):
        inner.log_spaced(0, 3)


@pytest.mark.parametrize("times", [(0,), (1, 2), (0, 2, 2), (0, 3, 1)])
def test_bad_times_are_named(times):
    with pytest.raises(ConfigError, match="increase strictly from 0"):
        measure(jnp.arange(2), times=times)


ONE_THREAD, MANY_THREADS = (f"--xla_cpu_multi_thread_eigen={on}" for on in ("false", "true"))
MATH = "--xla_cpu_enable_fast_math=false"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="keeps to one core of Linux")
@pytest.mark.parametrize(
    ("variables", "devices", "flags"),
    [
        ({}, 1, ONE_THREAD),
        ({"XLA_FLAGS": MATH}, 1, f"{MATH} {ONE_THREAD}"),
        ({"XLA_FLAGS": MANY_THREADS}, 1, MANY_THREADS),
        ({"JAX_NUM_CPU_DEVICES": "3"}, 3, None),
    ],
)
def test_each_core_is_a_device_of_one_thread_unless_told_otherwise(variables, devices, flags):
    program = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from metadyn import mesh; mesh.use_every_core()\n"
        "import jax; print(jax.device_count(), os.environ.get('XLA_FLAGS'))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= variables | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == f"{devices} {flags}"


@pytest.mark.parametrize("axis", ["task", "seed", "outer_step", "loss", "size", "coarse"])
def test_an_axis_cannot_have_the_name_of_another_axis_or_reading(axis):
    """Otherwise the measurement could be stored but not read."""
    read = lambda task, answers: {"strength": answers[:2, 0], "size": jnp.zeros(3)}
    modes = Modes((1, 2), "mode")
    probe = Probe(jnp.zeros((8, 3)), read, modes, {"size": (axis,)})
    probes = {"mode_strength": probe, "coarse": DOMAIN.probe(6)}
    tasks = TaskSet("tasks", DOMAIN, None, probes, size=2)
    bayes = Contender("bayes", "Bayes", bayes_linear(DOMAIN), "bayes")
    with pytest.raises(ConfigError, match=f"axis = '{axis}': of probe 'mode_strength'"):
        measuring.description(tasks, bayes)


def test_a_probe_cannot_have_the_name_of_another_probes_axis_of_modes():
    probes = {name: DOMAIN.probe(6) for name in ("mode_strength", "far", "far_mode")}
    bayes = Contender("bayes", "Bayes", bayes_linear(DOMAIN), "bayes")
    with pytest.raises(
        ConfigError, match="probe = 'far_mode': 'far' has its modes under this name"
    ):
        measuring.description(TaskSet("tasks", DOMAIN, None, probes, size=2), bayes)
