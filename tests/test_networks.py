"""Any network as a meta-learner: steps against whole episodes, and the GRU against PyTorch's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import DOMAINS, episodes, scattered, stepped, unroll, untrained_it_answers_zero
from flax import nnx

import metadyn as md
from metadyn.base import MetaLearner, indexed_keys
from metadyn.domains.bandit import ContextualBandit
from metadyn.errors import ConfigError
from metadyn.learners.networks import GRUConfig, Recurrent, Sequence
from metadyn.learners.normalised import Normalised
from metadyn.objectives import actor_critic

DOMAIN = DOMAINS["linear"]
H = 8


class Attention(nnx.Module):
    """One head of causal softmax attention; its cache is (keys, values, position)."""

    def __init__(self, n_in, rngs):
        self.query, self.key, self.value = (nnx.Linear(n_in, H, rngs=rngs) for _ in range(3))

    def projected(self, inputs):
        return self.query(inputs) / np.sqrt(H), self.key(inputs), self.value(inputs)

    def __call__(self, inputs):
        queries, keys, values = self.projected(inputs)
        past = np.tril(np.ones((len(inputs),) * 2, bool))
        return jax.nn.softmax(jnp.where(past, queries @ keys.T, -jnp.inf)) @ values

    def start(self, steps):
        return jnp.zeros((steps, H)), jnp.zeros((steps, H)), jnp.int32(0)

    def step(self, cache, x):
        keys, values, position = cache
        query, key, value = self.projected(x)
        keys, values = keys.at[position].set(key), values.at[position].set(value)
        scores = jnp.where(jnp.arange(len(keys)) <= position, keys @ query, -jnp.inf)
        return (keys, values, position + 1), jax.nn.softmax(scores) @ values


CELLS = {
    "gru": lambda n, rngs: nnx.GRUCell(n, H, rngs=rngs),
    "optimized_lstm": lambda n, rngs: nnx.OptimizedLSTMCell(n, H, rngs=rngs),
    "simple": lambda n, rngs: nnx.SimpleCell(n, H, rngs=rngs),
}
NETWORKS = [*CELLS, "attention"]


@functools.cache
def made(name, domain=DOMAIN, heads=0):
    if name == "attention":
        return Sequence(domain, Attention, heads)
    return Recurrent(domain, CELLS[name], heads)


def test_a_model_with_a_method_for_many_episodes_at_once_is_run_by_it():
    shapes = []

    class AtOnce(Attention):
        def episodes(self, inputs):
            shapes.append(inputs.shape)
            return jax.vmap(self.__call__, -1, -1)(inputs)

    meta = Sequence(DOMAIN, AtOnce)
    arguments = (scattered(meta, scale=0.5), *episodes("linear"))
    at_once = unroll(meta, *arguments)
    assert shapes == [(7, 5, 7)]
    one_by_one = unroll(made("attention"), *arguments)
    np.testing.assert_allclose(at_once, one_by_one, rtol=1e-5, atol=1e-6)


class SeesTheFuture(Attention):
    def __call__(self, inputs):
        return super().__call__(inputs[::-1])[::-1]


class ForgetsInSteps(Attention):
    def step(self, cache, x):
        _, output = super().step(self.start(len(cache[0])), x)
        return cache, output


class HasNoNumber(Attention):
    def __call__(self, inputs):
        return super().__call__(inputs) * jnp.nan


class OtherAtOnce(nnx.GRUCell):
    def __init__(self, n_in, rngs):
        super().__init__(n_in, H, rngs=rngs)

    def episodes(self, inputs):
        return jnp.zeros((len(inputs), H, inputs.shape[-1]))


class Leaks(nnx.Module):
    """Its decay of 0.999 leaves the range of the square root where noise is added to it."""

    def __init__(self, n_in, rngs):
        self.read = nnx.Linear(n_in, H, rngs=rngs)
        self.decay = nnx.Param(jnp.full(H, 0.999))

    def __call__(self, inputs):
        return jax.lax.scan(self.step, self.start(len(inputs)), inputs)[1]

    def start(self, steps):
        return jnp.zeros(H)

    def step(self, state, x):
        decay = self.decay[...]
        state = decay * state + jnp.sqrt(1 - decay**2) * self.read(x)
        return state, state


class LeaksAhead(Leaks):
    def __call__(self, inputs):
        return super().__call__(inputs[::-1])[::-1]


@pytest.mark.parametrize(
    ("meta", "t"),
    [
        (lambda: Sequence(DOMAIN, SeesTheFuture), 0),
        (lambda: Normalised(DOMAIN, lambda domain: Sequence(domain, SeesTheFuture)), 0),
        (lambda: Sequence(DOMAIN, LeaksAhead), 0),
        (lambda: Sequence(DOMAIN, ForgetsInSteps), 1),
        (lambda: Sequence(DOMAIN, HasNoNumber), 0),
        (lambda: Recurrent(DOMAIN, OtherAtOnce), 0),
    ],
)
def test_a_network_whose_episodes_are_not_its_steps_is_refused_before_training(meta, t):
    message = rf": its output at t = {t} of a whole episode is \S+ off that of `step`"
    with pytest.raises(ConfigError, match=message):
        md.train(meta(), DOMAIN, steps=1, seeds=2, progress=False)


class KnowsThePositions(Attention):
    """It runs episodes of the domain's length alone."""

    def __init__(self, n_in, rngs):
        super().__init__(n_in, rngs)
        self.places = nnx.Param(jnp.ones((DOMAIN.steps, n_in)))

    def __call__(self, inputs):
        return super().__call__(inputs + self.places[...])

    def step(self, cache, x):
        return super().step(cache, x + self.places[...][cache[2]])


@pytest.mark.parametrize(
    "meta", [*map(made, NETWORKS), Sequence(DOMAIN, KnowsThePositions), Sequence(DOMAIN, Leaks)]
)
def test_networks_whose_episodes_are_their_steps_pass_the_check(meta):
    meta.check()


@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_step_by_step_and_whole_episode_give_the_same_numbers(name, heads):
    """So does a query after the episode."""
    meta = made(name, heads=heads)
    params = scattered(meta, scale=0.5)
    queries, feedback = episodes("linear")
    unrolled = unroll(meta, params, queries, feedback)
    assert isinstance(meta, MetaLearner)
    assert unrolled.shape == (7, 2 + heads, 7)
    assert np.std(unrolled, axis=(0, 2)).min() > 0.1
    answers = stepped(meta.learner(params), queries, feedback)
    np.testing.assert_allclose(answers, unrolled[:, :2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_untrained_networks_answer_zero_and_seeds_start_apart(name):
    untrained_it_answers_zero(made(name))


def test_a_gru_is_that_of_pytorch_s_formulae():
    """r, z and n are of W x + b and U h, in float64. Inputs are x_t, y_{t−1}; readout is linear."""
    meta = made("gru", heads=1)
    params = scattered(meta, scale=0.5)
    queries, feedback = episodes("linear")
    answers = unroll(meta, params, queries, feedback)
    queries, feedback = np.float64(queries), np.float64(feedback)
    body, readout, offset = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64),
        (params["body"], params["readout"], params["offset"]),
    )
    W_r, W_z, W_n = np.split(body["dense_i"]["kernel"], 3, axis=1)
    b_r, b_z, b_n = np.split(body["dense_i"]["bias"], 3)
    U_r, U_z, U_n = np.split(body["dense_h"]["kernel"], 3, axis=1)
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    h, last_feedback = np.zeros((7, H)), np.zeros((7, 2))
    for t in range(7):
        x = np.concatenate([queries[t].T, last_feedback], axis=1)
        r = sigmoid(x @ W_r + b_r + h @ U_r)
        z = sigmoid(x @ W_z + b_z + h @ U_z)
        n = np.tanh(x @ W_n + b_n + r * (h @ U_n))
        h = (1 - z) * n + z * h
        np.testing.assert_allclose(answers[t], (h @ readout.T + offset).T, rtol=1e-5, atol=1e-5)
        last_feedback = feedback[t].T


@pytest.mark.parametrize("name", NETWORKS)
def test_a_critic_is_trained_through_a_head(name):
    domain = ContextualBandit(3, 3, steps=5)
    meta = made(name, domain, heads=1)
    keys = indexed_keys(jax.random.key(3), jnp.arange(32))
    gradient = jax.jit(jax.grad(actor_critic(domain, meta).loss, has_aux=True))
    gradients, metrics = gradient(scattered(meta, scale=0.5), keys)
    for leaf in jax.tree.leaves(gradients):
        assert np.all(np.isfinite(leaf))
        assert np.any(np.asarray(leaf) != 0)
    assert np.any(np.asarray(gradients["readout"][3]) != 0)  # the critic's row
    assert metrics.keys() == {"loss", "critic", "entropy"}
    with pytest.raises(ConfigError, match="heads = 0: actor_critic needs at least 1"):
        actor_critic(domain, made(name, domain))


def test_bad_networks_are_named():
    with pytest.raises(ConfigError, match="heads = -1: must be 0 or more"):
        made("gru", heads=-1)
    with pytest.raises(ConfigError, match="domain = 3: must be a domain, such as Linear"):
        Recurrent.__init__.__wrapped__(object.__new__(Recurrent), 3, None)
    with pytest.raises(ConfigError, match="hidden = 0"):
        GRUConfig(hidden=0)
    assert GRUConfig(hidden=5).make(DOMAIN, heads=1).heads == 1
