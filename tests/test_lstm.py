"""The LSTM: kernels against a float64 NumPy LSTM, and steps against whole episodes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import DOMAINS, observe, scattered, unroll
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
def test_the_default_backend_is_the_one_that_was_measured_to_be_fastest(
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
    """Returns hidden states in float64, by the definition of an LSTM."""
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


in_float32 = lambda tree: jax.tree.map(np.float32, tree)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_states_match_float64_numpy(backend: Backend):
    weights, inputs, _ = random_case()
    hidden = jax.jit(lstm, static_argnums=2)(in_float32(weights), in_float32(inputs), backend)
    np.testing.assert_allclose(hidden, numpy_lstm(weights, inputs), atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_match_float64_finite_differences(backend: Backend):
    weights, inputs, direction = random_case(1)
    objective = lambda w, x: jnp.sum(in_float32(direction) * lstm(w, x, backend))
    gradients = jax.jit(jax.grad(objective, (0, 1)))(in_float32(weights), in_float32(inputs))
    arguments = [*weights, inputs]

    def numpy_objective(arguments):
        return np.sum(direction * numpy_lstm(LSTMWeights(*arguments[:3]), arguments[3]))

    for index, gradient in enumerate(map(np.asarray, [*gradients[0], gradients[1]])):
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
    """Values and gradients at 64 units, 20 steps and 40 episodes agree to 1e-5 of the greatest."""
    rng = np.random.default_rng(0)
    shapes = ((256, 10), (256, 64), (256,), (20, 10, 40), (20, 64, 40))
    *parts, inputs, direction = (np.float32(0.1 * rng.normal(size=shape)) for shape in shapes)

    def evaluate(backend):
        def objective(w, x):
            hidden = lstm(w, x, backend)
            return jnp.sum(direction * hidden), hidden

        gradient = jax.jit(jax.grad(objective, (0, 1), has_aux=True))
        return jax.tree.leaves(gradient(LSTMWeights(*parts), 10 * inputs))

    for array, expected in zip(evaluate(backend), evaluate("scan"), strict=True):
        np.testing.assert_allclose(array, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_on_cpus_nothing_is_transposed_or_summed_inside_the_loops(on_cpu):
    """On CPUs, XLA is slow at reading transposed factors and at summing many products."""
    weights, inputs, direction = in_float32(random_case(1))
    gradient = jax.make_jaxpr(jax.grad(lambda w, x: jnp.sum(direction * lstm(w, x)), (0, 1)))
    loops = [e for e in gradient(weights, inputs).eqns if e.primitive.name == "scan"]
    assert len(loops) == 2
    for loop in loops:
        primitives = [e.primitive.name for e in loop.params["jaxpr"].eqns]
        assert primitives.count("dot_general") == 1
        assert "transpose" not in primitives


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_accelerators_store_three_arrays_a_step_and_join_weights_once(backend, monkeypatch):
    """The forward loop stores h and all derivatives, the backward loop the gradient by z.
    Products after all steps then give the gradients by the weights and by x, as on a CPU."""
    weights, inputs, direction = in_float32(random_case(1))
    gradient = jax.grad(lambda w, x: jnp.sum(direction * lstm(w, x)), (0, 1))
    expected = jax.jit(gradient)(weights, inputs)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    jitted = jax.jit(lambda w, x: gradient(w, x))
    platform = "cuda" if backend == "gpu" else backend
    text = jitted.trace(weights, inputs).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.dynamic_update_slice") == 3
    after_loops = text[text.rindex("stablehlo.while") :]
    assert f"tensor<{T}x{4 * H}x{H}xf32>" in after_loops  # one product a step, not summed
    shaped = [line for line in text.splitlines() if f"tensor<{4 * H}x{N + H}xf32>" in line]
    assert sum("stablehlo.concatenate" in line for line in shaped) == 1
    before_loops = text[: text.index("stablehlo.while")].splitlines()
    assert any("stablehlo.concatenate" in line for line in before_loops)
    gradients = (jitted(weights, inputs), expected)
    for leaf, cpu_leaf in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(leaf, cpu_leaf, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_episodes_equal_stepping_the_cell(backend: Backend):
    cell = LSTMCell(N, LSTMConfig(hidden=16, backend=backend), rngs=nnx.Rngs(0))
    inputs = jax.random.normal(jax.random.key(1), (T, N, B))
    start, step = cell.initialize_carry((N,)), lambda carry, x: cell(carry, x)
    scan_cell = jax.vmap(lambda xs: jax.lax.scan(step, start, xs)[1], -1, -1)
    hidden, expected = (jax.jit(f)(inputs) for f in (lambda x: cell.episodes(x), scan_cell))
    assert expected.shape == (T, 16, B)
    np.testing.assert_allclose(hidden, expected, rtol=0, atol=1e-6)


def test_bad_configurations_are_named():
    with pytest.raises(ConfigError, match="hidden = 0"):
        LSTMConfig(hidden=0)


@pytest.fixture(scope="module")
def trained_like():
    """A domain with n_x ≠ n_y, and a meta-learner whose weights are large enough to answer."""
    domain = DOMAINS["linear"]
    meta = LSTMConfig(hidden=8).make(domain)
    return domain, meta, scattered(meta, scale=0.5)


def test_training_episodes_are_those_the_inner_loop_poses(trained_like):
    """`measure` under a key has the loss of the whole episode under the same key."""
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
    expected = np.mean((answers - feedback) ** 2, axis=1).T
    np.testing.assert_allclose(np.asarray(loss)[0, :, 1:], expected, rtol=1e-5)


def test_an_untrained_lstm_answers_zero_and_only_huge_queries_saturate_it():
    domain = LinearRegression(2, 2)
    meta = LSTMConfig(hidden=16).make(domain)

    @jax.jit
    def run(key, queries):
        learner = meta.learner(meta.init(key))
        state, feedback = learner.init(key), jnp.ones(2)

        def step(state, query):
            answer = learner.predict(state, query)
            state = learner.update(state, query, feedback)
            return state, (answer, learner.diagnose(state)["saturated_gates"])

        return jax.lax.scan(step, state, queries)[1]

    answers, saturated = run(jax.random.key(0), np.float32([[1, 1], [1e6, 1e6]]))
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
