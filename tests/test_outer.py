"""The outer loop: its gradient, its determinism, and what it compiles and transfers."""

import dataclasses
import json
import sys
import time
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from processes import together

from metadyn import mesh, outer
from metadyn.base import indexed_keys
from metadyn.domains.linear import LinearRegression
from metadyn.errors import ConfigError
from metadyn.learners.attention import TransformerConfig
from metadyn.learners.beside_bayes import Beside, linear_beliefs
from metadyn.learners.lstm import LSTMConfig
from metadyn.learners.networks import Recurrent
from metadyn.learners.normalised import Normalised
from metadyn.objectives import Objective, prediction_loss
from metadyn.outer import MetaTraining, OuterConfig, OuterLoop, _gradient
from metadyn.sweep_training import OuterLoops, by_program

DOMAIN = LinearRegression(2, 2, steps=5)
META = LSTMConfig(hidden=8).make(DOMAIN)
CONFIG = OuterConfig(steps=40, batch=8, seeds=2, warmup=4, checkpoints=3, dispatch=7)
OBJECTIVE = prediction_loss(DOMAIN, META)


def loop_of(config=CONFIG, seed=0):
    return OuterLoop({"lstm": MetaTraining(META, OBJECTIVE)}, config, jax.random.key(seed))


def final_state(loop, start, target):
    *_, (state, _) = loop.run(start, target)
    return jax.tree.map(np.asarray, state)


@pytest.fixture(scope="module")
def shared():
    return loop_of()


def test_gradient_through_the_episode_matches_finite_differences():
    keys = indexed_keys(jax.random.key(1), jnp.arange(16))
    params = META.init(jax.random.key(0))
    key = jax.random.key(2)
    params = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(key, a.shape), params)
    objective = jax.jit(lambda p: OBJECTIVE.loss(p, keys)[0])
    leaves, structure = jax.tree.flatten(params)
    assert len(leaves) == 5
    for index, gradient in enumerate(jax.tree.leaves(jax.grad(objective)(params))):
        direction = jax.random.normal(jax.random.key(3), gradient.shape)
        step = 1e-2 / float(jnp.linalg.norm(direction))
        ends = []
        for sign in (1, -1):
            shifted = leaves[index] + sign * step * direction
            point = jax.tree.unflatten(structure, [*leaves[:index], shifted, *leaves[index + 1 :]])
            ends.append(float(objective(point)))
        slope = float(jnp.vdot(gradient, direction))
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=2e-2, abs=1e-3), index


def test_training_lowers_the_loss_of_every_seed():
    loop = loop_of(dataclasses.replace(CONFIG, steps=1200, batch=32, dispatch=200))
    losses = [metrics["lstm"]["loss"] for _, metrics in loop.run(loop.init(), 1200)]
    assert losses[0].shape == (2,)
    assert np.all(losses[-1] < 0.85 * losses[0])


def test_stopping_anywhere_and_going_on_gives_the_same_bits(shared):
    uninterrupted = final_state(shared, shared.init(), 40)
    assert int(uninterrupted.step) == 40
    resumed = shared.init()
    for loop, target in ((shared, 13), (loop_of(), 29), (loop_of(), 40)):
        resumed = final_state(loop, jax.device_put(resumed, mesh.replicated()), target)
    chex.assert_trees_all_equal(uninterrupted, resumed)


def test_a_dispatch_that_would_take_long_is_cut_short(monkeypatch):
    """Dispatches after the first, which measures the pace, are short. Training is the same."""
    unlimited, loop = loop_of(), loop_of()
    monkeypatch.setattr(outer, "DISPATCH_SECONDS", 1e-9)
    steps = [int(state.step) for state, _ in loop.run(loop.init(), 12)]
    assert steps == [7, *range(8, 13)]
    loop.pace = 0.5
    monkeypatch.setattr(outer, "DISPATCH_SECONDS", 2.0)
    assert [loop.dispatched(remaining) for remaining in (3, 9)] == [3, 4]
    expected, paced = final_state(unlimited, unlimited.init(), 12), loop_of()
    paced.pace = 1.0
    chex.assert_trees_all_equal(final_state(paced, paced.init(), 12), expected)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(shared):
    first, again = (final_state(loop, loop.init(), 10) for loop in (shared, loop_of()))
    other_seed = final_state(loop_of(seed=1), loop_of(seed=1).init(), 10)
    chex.assert_trees_all_equal(first, again)
    weights, others = (state.params["lstm"]["body"]["input"] for state in (first, other_seed))
    assert not np.array_equal(weights, others)
    assert not np.array_equal(weights[0], weights[1])


def trained_on(loss, steps=3, **settings):
    """Returns biases [seed, unit] before and after steps at a constant rate, and the metrics."""
    config = dataclasses.replace(CONFIG, warmup=0, schedule="constant", **settings)
    loop = OuterLoop({"lstm": MetaTraining(META, Objective(loss))}, config, jax.random.key(0))
    start = loop.init()
    before = np.float64(start.params["lstm"]["body"]["bias"])
    *_, (state, metrics) = loop.run(start, steps)
    return before, np.float64(state.params["lstm"]["body"]["bias"]), metrics["lstm"]


def test_gradients_are_clipped_to_the_configured_norm():
    loss = lambda params, keys: (7 * (total := params["body"]["bias"].sum()), {"loss": total})
    settings = {"optimizer": "sgd", "learning_rate": 0.1, "clip": 0.5}
    before, after, _ = trained_on(loss, **settings)
    distance = np.linalg.norm(after - before, axis=1)
    np.testing.assert_allclose(distance, 3 * 0.1 * 0.5, rtol=1e-4)
    size = np.sqrt(before.shape[1])
    before, after, _ = trained_on(loss, **settings | {"clip": 100.0})
    np.testing.assert_allclose(np.linalg.norm(after - before, axis=1), 2.1 * size, rtol=1e-4)


def test_adam_has_the_configured_decay_of_its_second_moment():
    """Adam is computed by hand in float64. Biases so far from 0 change gradients at each step."""

    def loss(params, keys):
        total = jnp.sum((params["body"]["bias"] - 1) ** 2) / 2
        return total, {"loss": total}

    rate, b1, b2 = 0.3, 0.9, 0.5
    start, after, _ = trained_on(loss, learning_rate=rate, b2=b2, clip=1e9)
    x, m, v = start.copy(), 0.0, 0.0
    for t in range(1, 4):
        m, v = b1 * m + (1 - b1) * (x - 1), b2 * v + (1 - b2) * (x - 1) ** 2
        x = x - rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
    np.testing.assert_allclose(after, x, rtol=1e-4, atol=1e-4)


def test_each_seed_has_episodes_of_its_own():
    def loss(params, keys):
        draws = jnp.mean(jax.vmap(jax.random.uniform)(keys))
        return params["body"]["bias"].sum(), {"loss": draws}

    _, _, metrics = trained_on(loss, steps=1)
    first, second = np.asarray(metrics["loss"])
    assert first != second


def test_meta_learners_side_by_side_equal_each_alone(shared):
    """Another meta-learner of other width and noise does not change what the first learns."""
    noisy = dataclasses.replace(DOMAIN, sigma=1.0)
    meta = LSTMConfig(hidden=6).make(noisy)
    trained = {
        "lstm": MetaTraining(META, OBJECTIVE),
        "noisy": MetaTraining(meta, prediction_loss(noisy, meta)),
    }
    loop = OuterLoop(trained, CONFIG, jax.random.key(0))
    together = final_state(loop, loop.init(), 10)
    alone = final_state(shared, shared.init(), 10)
    assert together.params["noisy"]["body"]["recurrent"].shape == (2, 24, 6)
    params, expected = together.params["lstm"], alone.params["lstm"]
    chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [False, True])
def test_several_updates_in_each_outer_step_equal_as_many_outer_steps(rows):
    """They are equal to the bit, under a schedule over all, beside a learner of one update."""
    plain = MetaTraining(META, OBJECTIVE)
    twice = plain._replace(own=dataclasses.replace(CONFIG, updates_per_step=2))
    pair = OuterLoop({"lstm": plain, "twice": twice}, CONFIG, jax.random.key(0))
    assert pair.episodes == 2 * (8 + 2 * 8)

    def run(loop, target):
        advance, start = OuterLoops([loop]).run if rows else loop.run, loop.init()
        *_, (states, metrics) = advance([start] if rows else start, target)
        return (states[0], metrics[0]) if rows else (states, metrics)

    (state, metrics), (single, _) = run(pair, 10), run(loop_of(), 10)
    longer, losses = run(loop_of(dataclasses.replace(CONFIG, steps=80, dispatch=14)), 20)
    assert int(state.step) == 10
    chex.assert_trees_all_equal(
        (state.params["lstm"], state.moments["lstm"]),
        (single.params["lstm"], single.moments["lstm"]),
    )
    chex.assert_trees_all_equal(
        (state.params["twice"], state.moments["twice"], metrics["twice"]),
        (longer.params["lstm"], longer.moments["lstm"], losses["lstm"]),
    )


@pytest.mark.parametrize("updates", [1, 2])
def test_an_objective_that_changes_is_given_outer_steps(updates):
    """Four outer steps are counted from 0 to 3, however many updates each of them has."""

    def at(step):
        def loss(params, keys):
            value, metrics = OBJECTIVE.loss(params, keys)
            return value, metrics | {"at": jnp.float32(step)}

        return Objective(loss)

    training = MetaTraining(META, Objective(at(0).loss, at=at))
    config = dataclasses.replace(CONFIG, updates_per_step=updates)
    loop = OuterLoop({"lstm": training}, config, jax.random.key(0))
    *_, (_, metrics) = loop.run(loop.init(), 4)
    np.testing.assert_array_equal(metrics["lstm"]["at"], 1.5)


def test_settings_with_other_numbers_of_updates_do_not_share_a_program():
    counts = [1, 2, 2]
    loops = [loop_of(dataclasses.replace(CONFIG, updates_per_step=n)) for n in counts]
    assert by_program(dict(enumerate(loops))) == [[0], [1, 2]]


def test_nothing_is_compiled_or_transferred_after_the_first_dispatch():
    loop = loop_of()
    state = loop.init()
    counts = [jax.device_put(np.int32(n), mesh.replicated()) for n in (7, 7, 3)]
    state, _ = loop.advance(state, counts[0])
    with jax.transfer_guard("disallow"):
        for count in counts[1:]:
            state, metrics = loop.advance(state, count)
            metrics["lstm"]["loss"].block_until_ready()
    assert loop.advance._cache_size() == 1


def test_a_loss_that_is_not_finite_stops_training():
    diverging = loop_of(dataclasses.replace(CONFIG, optimizer="sgd", learning_rate=1e30, clip=1e30))
    message = "learning_rate = 1e\\+30: the loss of lstm is no longer finite at outer step"
    with pytest.raises(ConfigError, match=message):
        final_state(diverging, diverging.init(), 40)


@pytest.mark.parametrize("rows", [False, True])
def test_the_time_that_compiling_takes_does_not_count_as_training(rows, monkeypatch):
    """The clock stands still, except that compiling takes a second."""
    now, real_compile = [0.0], jax.stages.Lowered.compile

    def compile_slowly(*arguments):
        now[0] += 1
        return real_compile(*arguments)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_slowly)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    loop = loop_of()
    state = loop.init()
    list(OuterLoops([loop]).run([state], 10) if rows else loop.run(state, 10))
    assert now[0] == 1
    assert loop.seconds == {"lstm": 0}
    assert loop.pace == 0  # otherwise the next dispatch would be short


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({"learning_rate": "outer_sgd_learning_rate"}, "outer_sgd_learning_rate"),
        ({"batch": "outer_sgd_batch"}, "outer.learning_rate"),
        (None, "own.learning_rate"),  # no option sets it
    ],
)
def test_the_message_of_divergence_names_the_meta_learners_own_learning_rate(options, rate):
    """Descent of b⁴ from 1 by steps of 3 diverges: −11, 16 thousand, −5e13, beyond float32."""

    def loss(params, keys):
        total = jnp.sum(params["body"]["bias"] ** 4)
        return total, {"loss": total}

    own = dataclasses.replace(CONFIG, optimizer="sgd", learning_rate=3.0, warmup=0, clip=1e30)
    trained = {
        "lstm": MetaTraining(META, OBJECTIVE),
        "wild": MetaTraining(META, Objective(loss), own, options),
    }
    loop = OuterLoop(trained, CONFIG, jax.random.key(0))
    message = f"^{rate} = 3.0: the loss of wild is no longer finite at outer step 7; lower it$"
    with pytest.raises(ConfigError, match=message):
        final_state(loop, loop.init(), 40)


def test_all_metrics_of_an_objective_reach_the_caller():
    """They are means for each seed over the outer steps of a dispatch, each before its update."""

    def loss(params, keys):
        value, metrics = OBJECTIVE.loss(params, keys)
        return value, metrics | {"size": jnp.sum(params["body"]["input"] ** 2), "one": 1.0}

    trained = {"lstm": MetaTraining(META, Objective(loss))}
    stepwise = OuterLoop(trained, dataclasses.replace(CONFIG, dispatch=1), jax.random.key(0))
    size = lambda state: np.sum(np.asarray(state.params["lstm"]["body"]["input"]) ** 2, (1, 2))
    start = stepwise.init()
    sizes, reports = [size(start)], []
    for state, metrics in stepwise.run(start, 7):
        assert metrics["lstm"].keys() == {"loss", "size", "one"}
        sizes.append(size(state))
        reports.append(metrics["lstm"])
    assert not np.allclose(sizes[0], sizes[-1], rtol=1e-3)
    for before, metrics in zip(sizes[:-1], reports, strict=True):
        np.testing.assert_allclose(metrics["size"], before, rtol=1e-5)
        np.testing.assert_array_equal(metrics["one"], [1, 1])
    loop = OuterLoop(trained, CONFIG, jax.random.key(0))
    _, metrics = next(loop.run(loop.init(), 40))  # a dispatch of 7 outer steps
    for name, value in metrics["lstm"].items():
        expected = np.mean([report[name] for report in reports], axis=0)
        np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch", -1),
        ("seeds", 0),
        ("learning_rate", float("nan")),
        ("warmup", 40),
        ("optimizer", "nonsense"),
        ("clip", 0.0),
    ],
)
def test_bad_configurations_are_named(field, value):
    with pytest.raises(ConfigError, match=f"{field} = "):
        dataclasses.replace(CONFIG, **{field: value})


def test_checkpoints_are_log_spaced_from_zero_to_the_end():
    steps = OuterConfig(steps=10_000, checkpoints=5).checkpoint_steps
    assert steps == (0, 1, 10, 100, 1000, 10_000)


TRAIN = """
import hashlib, json, jax, numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.tree_util import Partial
from metadyn import inner, mesh
mesh.start()
from metadyn.domains.linear import LinearRegression
from metadyn.learners.lstm import LSTMConfig
from metadyn.objectives import Objective, prediction_loss
from metadyn.outer import MetaTraining, OuterConfig, OuterLoop
domain = LinearRegression(2, 2, steps=5)
meta = LSTMConfig(hidden=8).make(domain)
config = OuterConfig(steps=50, batch=12, seeds=2, warmup=4, dispatch=50)
trained = {"lstm": MetaTraining(meta, prediction_loss(domain, meta))}
loop = OuterLoop(trained, config, jax.random.key(0))
program = loop.advance.lower(loop.abstract, np.int32(1)).compile().as_text()
state, metrics = next(loop.run(loop.init(), 50))
sample = Partial(domain.evaluation_task, spectrum=np.float32([1, 0.5]))
readings = inner.measure(
    domain, meta.learner, tuple(range(6)), (),
    state.params["lstm"], sample, jax.random.key(1), np.arange(5),
)
losses = process_allgather(readings["loss"], tiled=True)[0, :, 1:].tolist()
draw = lambda key, index: domain.sample_task(jax.random.fold_in(key, index))
tasks = jax.jit(lambda: mesh.map_tasks(draw, jax.random.key(2), np.arange(64), 16))()
tasks = [np.asarray(leaf) for leaf in jax.tree.leaves(process_allgather(tasks, tiled=True))]
print(json.dumps({
    "devices": [jax.device_count(), jax.process_count()],
    "reductions": program.count(" all-reduce(") + program.count(" all-reduce-start("),
    "loss": np.asarray(metrics["lstm"]["loss"]).tolist(), "losses": losses,
    "tasks": [hashlib.sha256(leaf).hexdigest() for leaf in tasks],
}))
"""


def test_results_do_not_depend_on_the_number_of_devices_or_processes():
    """50 outer steps and a measurement are made on 1, 2 (a seed on each) and 8 virtual devices (4
    share the 12 episodes of each seed), and on two processes of two devices (half of a seed's
    episodes on each). Tasks are equal bit for bit, and an outer step has one all-reduce."""
    processes = []
    for devices in (1, 2, 8):
        processes += together([sys.executable, "-c", TRAIN], 1, devices)
    processes += together([sys.executable, "-c", TRAIN], 2, 2)
    expected, *results = (json.loads(process.out.splitlines()[-1]) for process in processes)
    assert [result["devices"] for result in results] == [[2, 1], [8, 1], [4, 2], [4, 2]]
    assert [result["reductions"] for result in results[1:]] == [1, 1, 1]
    for result in results:
        assert result["tasks"] == expected["tasks"]
        np.testing.assert_allclose(expected["loss"], result["loss"], rtol=1e-5)
        np.testing.assert_allclose(expected["losses"], result["losses"], rtol=1e-4)


def test_the_gradient_of_episodes_in_parts_equals_that_of_all_at_once(on_cpu):
    """320 episodes are taken 80 at a time, and each part computes its own loss."""
    keys = indexed_keys(jax.random.key(1), jnp.arange(320))
    params = META.init(jax.random.key(0))
    params = jax.tree.map(lambda a: a + 0.1, params)
    assert mesh.microbatch(320) == 80
    in_tens = jax.make_jaxpr(partial(_gradient, OBJECTIVE, cached=10))(params, keys)
    assert "length=32" in str(in_tens)  # 32 parts of 10 episodes
    assert "length=32" not in str(jax.make_jaxpr(partial(_gradient, OBJECTIVE))(params, keys))
    gradient = _gradient(OBJECTIVE, params, keys)
    expected = jax.jit(jax.grad(OBJECTIVE.loss, has_aux=True))(params, keys)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("episodes", "together", "size"),
    [(32, 1, 32), (128, 1, 128), (2048, 16, 128), (192, 1, 96), (257, 1, 257), (480, 48, 96)],
)
def test_parts_are_equal_whole_groups_that_the_cache_holds(episodes, together, size, on_cpu):
    assert mesh.microbatch(episodes, together) == size


@pytest.mark.parametrize(
    ("episodes", "together", "cached", "size"),
    [(128, 1, 25, 16), (24, 1, 25, 24), (30, 3, 8, 6), (32, 16, 5, 16), (64, 1, 1, 1)],
)
def test_parts_are_smaller_where_an_episode_needs_more(episodes, together, cached, size, on_cpu):
    assert mesh.microbatch(episodes, together, cached) == size


def test_a_transformers_episodes_need_more_than_an_lstms():
    domain = LinearRegression(5, 5, steps=20)
    assert TransformerConfig(hidden=64).make(domain).cached_episodes == 25
    assert TransformerConfig(hidden=128).make(domain).cached_episodes == 12
    assert not hasattr(LSTMConfig(hidden=64).make(domain), "cached_episodes")


class RatedCell(nnx.RNNCellBase):
    """A cell with a parameter at a rate of its own in a module inside it, and one without."""

    def __init__(self, n_in, *, rngs):
        self.inside = nnx.Linear(n_in, 3, rngs=rngs)
        self.inside.kernel = nnx.Param(self.inside.kernel[...], rate=0.25)

    def initialize_carry(self, input_shape, rngs=None, carry_init=None):
        return jnp.zeros(3)

    def __call__(self, carry, inputs):
        h = jnp.tanh(carry + self.inside(inputs))
        return h, h


def beside_bayes(meta):
    return Beside(meta, DOMAIN, linear_beliefs(DOMAIN))


def first_updates(meta, **fields):
    """Returns what one outer step adds to outer parameters away from the start."""
    config = OuterConfig(steps=2, batch=8, seeds=1, warmup=0, schedule="constant", **fields)
    training = MetaTraining(meta, prediction_loss(DOMAIN, meta))
    loop = OuterLoop({"any": training}, config, jax.random.key(0))
    state = loop.init()
    shifted = jax.tree.map(lambda a: a + 0.1, state.params)
    before = jax.tree.map(np.asarray, shifted["any"])
    after = final_state(loop, state._replace(params=shifted), 1).params["any"]
    return jax.tree.map(np.subtract, after, before)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("wrap", [lambda meta: meta, beside_bayes])
def test_a_parameter_learns_at_its_own_rate_whatever_the_optimiser(optimizer, wrap):
    rated = Recurrent(DOMAIN, lambda n, rngs: RatedCell(n, rngs=rngs))
    assert rated.rates["body"]["inside"] == {"kernel": 0.25, "bias": 1.0}
    unrated = Recurrent(DOMAIN, lambda n, rngs: RatedCell(n, rngs=rngs))
    unrated.rates = None
    updates, usual = (first_updates(wrap(m), optimizer=optimizer) for m in (rated, unrated))
    expected = {**usual["body"]["inside"]}
    assert np.abs(expected["kernel"]).max() > 1e-4
    expected["kernel"] = 0.25 * expected["kernel"]
    chex.assert_trees_all_close(updates["body"]["inside"], expected, atol=1e-7)
    chex.assert_trees_all_close(updates["readout"], usual["readout"], atol=1e-7)


def test_the_lstms_biases_and_readout_learn_at_their_rate():
    fast = LSTMConfig(hidden=8, vector_rate=3.0)
    updates, usual = first_updates(fast.make(DOMAIN)), first_updates(META)
    for name in ("input", "recurrent", "bias"):
        scale = 3 if name == "bias" else 1
        np.testing.assert_allclose(updates["body"][name], scale * usual["body"][name], atol=1e-6)
        assert np.abs(usual["body"][name]).max() > 1e-4
    for name in ("readout", "offset"):
        np.testing.assert_allclose(updates[name], 3 * usual[name], atol=1e-6)
        assert np.abs(usual[name]).max() > 1e-4
    normalised = Normalised(DOMAIN, fast.make)
    assert normalised.rates["body"] == {"input": 1.0, "recurrent": 1.0, "bias": 3.0}
    with pytest.raises(ConfigError, match="vector_rate = 0: must be"):
        LSTMConfig(vector_rate=0)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_tasks_come_back_in_order_however_many_are_taken_at_a_time(chunk):
    results = mesh.map_tasks(lambda scale, i: {"twice": scale * i}, 2, jnp.arange(101), chunk)
    np.testing.assert_array_equal(results["twice"], 2 * np.arange(101))


def test_a_cpu_takes_as_many_tasks_at_a_time_as_its_cache_holds(on_cpu):
    assert mesh.task_chunk(mesh.CPU_CACHE_BYTES // 200) == 100
    assert mesh.task_chunk(mesh.CPU_CACHE_BYTES // 600) == 512
    assert mesh.task_chunk(100) == mesh.CPU_CACHE_BYTES // 200
    assert mesh.task_chunk(mesh.CPU_CACHE_BYTES) == 4
    assert mesh.task_chunk(mesh.CPU_CACHE_BYTES, shared=True) == mesh.SHARED_WEIGHT_TASKS


def test_an_own_optimiser_is_scheduled_over_the_runs_steps():
    """Its own `steps`, which are fewer, do not end its learning."""
    config = dataclasses.replace(CONFIG, steps=5, warmup=1, schedule="linear", optimizer="sgd")
    training = {"lstm": MetaTraining(META, prediction_loss(DOMAIN, META), own=config)}
    loop = OuterLoop(training, CONFIG, jax.random.key(0))
    before = final_state(loop, loop.init(), 20)
    after = final_state(loop, jax.device_put(before, mesh.replicated()), 30)
    changes = jax.tree.map(lambda a, b: np.abs(a - b).max(), before.params, after.params)
    assert max(jax.tree.leaves(changes)) > 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nnx.Param(jnp.ones(3, jnp.int32)), r"parameter \['body'\]\['odd'\] .* = 'int32'"),
        (lambda: nnx.Param(jnp.ones(3, bool)), r"parameter \['body'\]\['odd'\] .* = 'bool'"),
        (lambda: nnx.Param(jnp.ones((0, 3))), r"parameter \['body'\]\['odd'\] .* = \(0, 3\)"),
        (lambda: nnx.Param(jnp.ones(3), rate="fast"), r"rate \['body'\]\['odd'\] .* = 'fast'"),
        (lambda: nnx.Param(jnp.ones(3), rate=float("nan")), r"rate \['body'\]\['odd'\] .* = nan"),
        (lambda: nnx.Param(jnp.ones(3), rate=None), r"rate \['body'\]\['odd'\] .* = None"),
    ],
)
def test_a_parameter_that_cannot_be_trained_is_named(make, message):
    class Cell(nnx.GRUCell):
        def __init__(self, n, rngs):
            super().__init__(n, 4, rngs=rngs)
            self.odd = make()

    meta = Recurrent(DOMAIN, lambda n, rngs: Cell(n, rngs))
    with pytest.raises(ConfigError, match=message):
        MetaTraining(meta, prediction_loss(DOMAIN, meta)).check_traced("odd")
