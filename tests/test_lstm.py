"""The LSTM: kernels against a float64 NumPy LSTM, steps against whole episodes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import DOMAINS, observe, scattered, stepped, unroll
from flax import nnx
from jax.tree_util import Partial

from metadyn import inner, mesh
from metadyn.base import indexed_keys
from metadyn.domains.linear import LinearRegression
from metadyn.errors import ConfigError
from metadyn.kernels.lstm import Backend, LSTMWeights, lstm
from metadyn.learners.lstm import LSTMCell, LSTMConfig

T, N, H, B = 7, 3, 5, 4
BACKENDS = ("scan", "backward")


@pytest.mark.parametrize(
    ("device", "hidden", "batch", "chosen"),
    [
        ("cpu", 64, 16, "backward"),
        ("cpu", 256, 2, "backward"),
        ("gpu", 64, 16, "fused"),
        ("gpu", 128, 16, "fused"),
        ("gpu", 65, 16, "backward"),
        ("gpu", 256, 32, "backward"),
        ("tpu", 64, 16, "backward"),
    ],
)
def test_the_default_is_what_was_measured_to_be_the_faster(
    device, hidden, batch, chosen, monkeypatch
):
    monkeypatch.setattr(mesh, "backend", lambda: device)
    shapes = ((4 * hidden, 3), (4 * hidden, hidden), (4 * hidden,), (5, 3, batch))
    *weights, inputs = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)

    def program(*backend):
        return str(jax.make_jaxpr(lambda w, x: lstm(w, x, *backend))(LSTMWeights(*weights), inputs))

    assert program() == program("auto") == program(chosen)
    assert program() != program("scan")


def random_case(seed=0):
    rng = np.random.default_rng(seed)
    weights = LSTMWeights(
        *(rng.normal(size=shape) * 0.5 for shape in ((4 * H, N), (4 * H, H), (4 * H,)))
    )
    return weights, rng.normal(size=(T, N, B)), rng.normal(size=(T, H, B))


def numpy_lstm(weights, inputs):
    """Float64, straight from the definition."""
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    h = c = np.zeros((H, inputs.shape[2]))
    hidden = []
    for x in inputs:
        z = weights.input @ x + weights.recurrent @ h + weights.bias[:, None]
        i, f, o, g = z[:H], z[H : 2 * H], z[2 * H : 3 * H], z[3 * H :]
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        hidden.append(h)
    return np.array(hidden)


single = lambda tree: jax.tree.map(np.float32, tree)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_states_match_float64_numpy(backend: Backend):
    weights, inputs, _ = random_case()
    found = jax.jit(lstm, static_argnums=2)(single(weights), single(inputs), backend)
    np.testing.assert_allclose(found, numpy_lstm(weights, inputs), atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_match_float64_finite_differences(backend: Backend):
    weights, inputs, direction = random_case(1)
    objective = lambda w, x: jnp.sum(single(direction) * lstm(w, x, backend))
    found = jax.jit(jax.grad(objective, (0, 1)))(single(weights), single(inputs))
    arguments = [*weights, inputs]

    def numpy_objective(arguments):
        return np.sum(direction * numpy_lstm(LSTMWeights(*arguments[:3]), arguments[3]))

    for index, gradient in enumerate(map(np.asarray, [*found[0], found[1]])):
        for entry in np.ndindex(gradient.shape):
            ends = []
            for sign in (1, -1):
                moved = [a.copy() for a in arguments]
                moved[index][entry] += sign * 1e-6
                ends.append(numpy_objective(moved))
            np.testing.assert_allclose(
                gradient[entry], (ends[0] - ends[1]) / 2e-6, rtol=1e-3, atol=1e-4
            )


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_backends_agree_with_the_reference_at_sizes_in_use(backend: Backend):
    """Value and gradient at 64 units, 20 steps, 40 episodes, to 1e-5 of the greatest entry."""
    rng = np.random.default_rng(0)
    shapes = ((256, 10), (256, 64), (256,), (20, 10, 40), (20, 64, 40))
    *parts, inputs, direction = (np.float32(0.1 * rng.normal(size=shape)) for shape in shapes)

    def both(backend):
        def objective(w, x):
            hidden = lstm(w, x, backend)
            return jnp.sum(direction * hidden), hidden

        gradient = jax.jit(jax.grad(objective, (0, 1), has_aux=True))
        return jax.tree.leaves(gradient(LSTMWeights(*parts), 10 * inputs))

    for found, expected in zip(both(backend), both("scan"), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_on_cpus_nothing_is_transposed_or_summed_inside_the_loops(on_cpu):
    """There XLA is slow with a factor that is read transposed, and with a sum of many products."""
    weights, inputs, direction = single(random_case(1))
    gradient = jax.make_jaxpr(jax.grad(lambda w, x: jnp.sum(direction * lstm(w, x)), (0, 1)))
    loops = [e for e in gradient(weights, inputs).eqns if e.primitive.name == "scan"]
    assert len(loops) == 2
    for loop in loops:
        inside = [each.primitive.name for each in loop.params["jaxpr"].eqns]
        assert inside.count("dot_general") == 1
        assert "transpose" not in inside


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_accelerators_store_three_arrays_a_step_and_join_weights_once(backend, monkeypatch):
    """Forward h and all derivatives, backward those by z, of which products after all steps make
    those by the weights and by x; what is computed is the same."""
    weights, inputs, direction = single(random_case(1))
    gradient = jax.grad(lambda w, x: jnp.sum(direction * lstm(w, x)), (0, 1))
    expected = jax.jit(gradient)(weights, inputs)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    there = jax.jit(lambda w, x: gradient(w, x))
    platform = "cuda" if backend == "gpu" else backend
    text = there.trace(weights, inputs).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.dynamic_update_slice") == 3
    after = text[text.rindex("stablehlo.while") :]
    assert f"tensor<{T}x{4 * H}x{H}xf32>" in after  # a product for each step, before their sum
    joined = [line for line in text.splitlines() if f"tensor<{4 * H}x{N + H}xf32>" in line]
    assert sum("stablehlo.concatenate" in line for line in joined) == 1
    before = text[: text.index("stablehlo.while")].splitlines()
    assert any("stablehlo.concatenate" in line for line in before)
    for one, other in zip(*map(jax.tree.leaves, (there(weights, inputs), expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_episodes_are_what_stepping_the_cell_gives(backend: Backend):
    fast = LSTMCell(N, LSTMConfig(hidden=16, backend=backend), rngs=nnx.Rngs(0))
    inputs = jax.random.normal(jax.random.key(1), (T, N, B))
    start, step = fast.initialize_carry((N,)), lambda carry, x: fast(carry, x)
    stepping = jax.vmap(lambda one: jax.lax.scan(step, start, one)[1], -1, -1)
    found, expected = (jax.jit(f)(inputs) for f in (lambda x: fast.episodes(x), stepping))
    assert expected.shape == (T, 16, B)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_bad_configurations_are_named():
    with pytest.raises(ConfigError, match="hidden = 0"):
        LSTMConfig(hidden=0)


@pytest.fixture(scope="module")
def trained_like():
    """A meta-learner with weights large enough to answer, on a domain with n_x ≠ n_y."""
    domain = DOMAINS["linear"]
    meta = LSTMConfig(hidden=8).make(domain)
    return domain, meta, scattered(meta, scale=0.5)


def test_step_by_step_and_whole_episode_give_the_same_numbers(trained_like):
    domain, meta, params = trained_like
    queries, feedback = observe(domain, jax.random.split(jax.random.key(2), 4))
    whole = unroll(meta, params, queries, feedback)
    assert whole.shape == (6, 2, 4)
    found = stepped(meta.learner(params), queries, feedback)
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-6)


def test_training_episodes_are_those_the_inner_loop_poses(trained_like):
    """The loss of `measure` under a key is that of the whole episode under the same key."""
    domain, meta, params = trained_like
    root, indices = jax.random.key(3), jnp.arange(4)
    loss = inner.measure(
        domain,
        meta.learner,
        tuple(range(7)),
        (),
        jax.tree.map(lambda leaf: leaf[None], params),
        Partial(domain.sample_task),
        root,
        indices,
    )["loss"]
    queries, feedback = map(np.asarray, observe(domain, indexed_keys(root, indices)))
    answers = unroll(meta, params, queries, feedback)
    whole = np.mean((answers - feedback) ** 2, axis=1).T
    np.testing.assert_allclose(np.asarray(loss)[0, :, 1:], whole, rtol=1e-5)


def test_an_untrained_lstm_answers_zero_and_saturates_nothing():
    domain = LinearRegression(2, 2)
    meta = LSTMConfig(hidden=16).make(domain)

    @jax.jit
    def said(key, queries):
        learner = meta.learner(meta.init(key))
        state, ones = learner.init(key), jnp.ones(2)

        def step(state, query):
            answer = learner.predict(state, query)
            state = learner.update(state, query, ones)
            return state, (answer, learner.diagnose(state)["saturated_gates"])

        return jax.lax.scan(step, state, queries)[1]

    answers, saturated = said(jax.random.key(0), np.float32([[1, 1], [1e6, 1e6]]))
    np.testing.assert_array_equal(answers, 0)
    np.testing.assert_array_equal(saturated, [0, 1])


def test_seeds_start_apart_and_one_seed_twice_starts_alike():
    meta = LSTMConfig(hidden=4).make(LinearRegression(2, 2))
    a, b, c = (jax.tree.map(np.asarray, jax.jit(meta.init)(jax.random.key(k))) for k in (0, 0, 1))
    chex.assert_trees_all_equal(a, b)
    recurrent = a["body"]["recurrent"]
    for name in ("input", "recurrent"):
        assert not np.array_equal(a["body"][name], c["body"][name])
    assert recurrent.shape == (16, 4)
    np.testing.assert_allclose(recurrent.T @ recurrent, np.eye(4), atol=1e-5)
    np.testing.assert_array_equal(a["body"]["bias"], [0] * 4 + [1] * 4 + [0] * 8)
