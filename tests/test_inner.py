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
from metadyn.base import Learner, TaskSet, indexed_keys
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
    """Probed at every step or at the last alone, a learner ends with the same bits."""
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


@pytest.mark.parametrize("name", ["bayes", "lstm", "sgd"])
def test_probing_a_state_leaves_its_bits_alone(name):
    learner = learners()[name]
    state = jax.jit(learner.init)(jax.random.key(0))
    before = jax.tree.map(np.array, state)
    jax.jit(jax.vmap(learner.predict, (None, 0)))(state, PROBE.queries)
    chex.assert_trees_all_equal(before, jax.tree.map(np.array, state))


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
    whole = measure(jnp.arange(64))
    assert {name: a.shape for name, a in whole.items()} == {
        "loss": (64, 4),
        "mode_strength": (64, 4, 2),
        "off_diagonal": (64, 4),
        "unexplained": (64, 4),
    }
    for chunk in (3, 1):
        inner.measure.clear_cache()
        with monkeypatch.context() as patched:
            patched.setattr(inner.mesh, "task_chunk", lambda *given, chunk=chunk: chunk)
            other = measure(jnp.arange(64))
        inner.measure.clear_cache()
        for name in whole:
            np.testing.assert_allclose(whole[name], other[name], rtol=1e-4, atol=1e-5)
    some = measure(jnp.array([7, 2]))
    np.testing.assert_allclose(
        some["mode_strength"], whole["mode_strength"][[7, 2]], rtol=1e-4, atol=1e-5
    )


def test_the_same_key_gives_the_same_bits_twice():
    once, twice = (measure(jnp.arange(64)) for _ in range(2))
    chex.assert_trees_all_equal(once, twice)


def test_a_learner_that_draws_its_start_acts_as_it_is_measured():
    domain = ContextualBandit(2, 3, steps=4)
    start = lambda key: 3 * jax.random.normal(key, (3,))
    drawn = Learner(start, lambda state, c: state, lambda state, c, seen: state)
    key = jax.random.key(5)
    _, seen = inner.act(domain, drawn, key)
    key_task, key_episode = jax.random.split(key)
    task = domain.sample_task(key_task)
    run = inner.run(domain, drawn, task, key_episode, range(5))
    said = drawn.init(jax.random.split(key_episode)[0])
    losses = jax.vmap(domain.loss, (None, 0))(said, seen)
    np.testing.assert_allclose(run["loss"][1:], losses, rtol=1e-6)
    actions = np.asarray(seen.action)
    again = []
    for t in range(4):
        keys = jax.random.split(jax.random.fold_in(jax.random.split(key_episode)[1], t))
        _, _, outcome = inner.interact(domain, task, lambda query: said, keys)
        again.append(int(outcome.action))
    np.testing.assert_array_equal(actions, again)


def test_what_is_observed_is_what_is_measured_under_the_same_key():
    keys = indexed_keys(jax.random.key(3), jnp.arange(5))
    remember = Learner(
        lambda key: jnp.zeros(5), lambda state, x: jnp.zeros(2),
        lambda state, x, y: jnp.concatenate([x, y]), diagnose=lambda state: {"seen": state},
    )  # fmt: skip

    def measured(key):
        key_task, key_episode = jax.random.split(key)
        task = DOMAIN.sample_task(key_task)
        return inner.run(DOMAIN, remember, task, key_episode, range(9))["seen"][1:]

    observed = jax.jit(lambda keys: jnp.concatenate(inner.observe(DOMAIN, keys), 1))(keys)
    found = jax.jit(jax.vmap(measured, out_axes=-1))(keys)  # [T, 5, B]
    np.testing.assert_allclose(found, observed, rtol=1e-5, atol=1e-6)


def test_neither_a_sets_name_nor_a_learners_decides_what_is_drawn():
    """So what differs by name alone is compared on the same tasks, from the same weights."""
    sample = Partial(DOMAIN.evaluation_task, spectrum=S)
    measured = lambda tasks, learner: measuring.readings(
        TaskSet(tasks, DOMAIN, sample, {"mode_strength": PROBE}, size=8),
        Contender(learner, "SGD", learners()["sgd"], times=(0, 5, 8)),
        (),
        jax.random.key(4),
    )
    chex.assert_trees_all_equal(measured("heldout", "sgd"), measured("heldout_gru", "other"))
    first, second = measured("heldout", "sgd")["mode_strength"][:2]
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
    """Of a learner that answers zero: the mean square of the targets that it is then given."""
    remember = lambda state, x, y: y
    learner = Learner(
        lambda key: jnp.zeros((6, 2)), lambda state, x: jnp.zeros(2), remember, batch=6,
        diagnose=lambda state: {"seen": state},
    )  # fmt: skip
    task = DOMAIN.sample_task(jax.random.key(0))
    found = inner.run(DOMAIN, learner, task, jax.random.key(1), range(9))
    expected = (np.float64(found["seen"][1:]) ** 2).mean((1, 2))
    np.testing.assert_allclose(found["loss"][1:], expected, rtol=1e-5)


def test_65536_tasks_fit_in_8_gib():
    """Peak memory of a device by the compiler's own account, at the paper's size: 5 × 5, T = 20."""
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
    used = memory.temp_size_in_bytes + memory.output_size_in_bytes
    outputs = 65_536 * 21 * (5 + 4) * 4 / jax.device_count()
    assert outputs <= used < 8 * 2**30


def axes_of(learner, probes):
    """The axes of each reading, by what is stored beside a measurement."""
    sample = Partial(DOMAIN.evaluation_task, spectrum=S)
    tasks = TaskSet("tasks", DOMAIN, sample, dict(probes), size=3)
    found = measuring.description(tasks, Contender("learner", "learner", learner))["axes"]
    assert all(axes[:2] == ["task", "step"] for axes in found.values())
    return {name: tuple(axes[2:]) for name, axes in found.items()}


def test_all_that_a_probe_reads_is_reckoned_up():
    """8 answers of 2 numbers, a strength and a loss, at 9 times on 3 tasks, in float32."""
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
    """What is read with the first alone stays as it is."""
    domain = LinearRegression(3, 2, steps=4)
    learner, probes = bayes_linear(domain), (*PROBES, ("coarse", domain.probe(6)))
    task = jax.jit(domain.evaluation_task)(jax.random.key(1), S)
    run = jax.jit(partial(inner.run, domain, learner, times=range(5)), static_argnames="probes")
    alone, found = (run(task, jax.random.key(2), probes=each) for each in (PROBES, probes))
    axes = axes_of(learner, probes)
    assert (
        axes.keys()
        == found.keys()
        == {*alone, "coarse", "coarse_off_diagonal", "coarse_unexplained"}
    )
    assert axes["coarse"] == ("coarse_mode",)
    assert {name: a.shape for name, a in found.items() if name not in alone} == {
        "coarse": (5, 2),
        "coarse_off_diagonal": (5,),
        "coarse_unexplained": (5,),
    }
    for name, value in alone.items():
        np.testing.assert_array_equal(found[name], value)
    # The learner is linear, so that other queries read the same.
    np.testing.assert_allclose(found["coarse"], found["mode_strength"], atol=1e-4)


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
    ("given", "devices", "flags"),
    [
        ({}, 1, ONE_THREAD),
        ({"XLA_FLAGS": MATH}, 1, f"{MATH} {ONE_THREAD}"),
        ({"XLA_FLAGS": MANY_THREADS}, 1, MANY_THREADS),
        ({"JAX_NUM_CPU_DEVICES": "3"}, 3, None),
    ],
)
def test_each_core_is_a_device_of_one_thread_unless_told_otherwise(given, devices, flags):
    asked = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from metadyn import mesh; mesh.use_every_core()\n"
        "import jax; print(jax.device_count(), os.environ.get('XLA_FLAGS'))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= given | {"JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == f"{devices} {flags}"
