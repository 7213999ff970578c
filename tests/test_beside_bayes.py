"""Networks beside Bayes: their records and the effects of replaced states, by float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import xarray as xr

import metadyn as md
from metadyn import decoding, inner, measuring, trajectories
from metadyn.base import Learner, TaskSet, indexed_keys
from metadyn.domains.bandit import ContextualBandit, Outcome
from metadyn.domains.linear import LinearRegression
from metadyn.errors import ConfigError
from metadyn.learners import beside_bayes as beside
from metadyn.learners.attention import TransformerConfig
from metadyn.learners.lstm import LSTMConfig
from metadyn.learners.networks import GRUConfig

DOMAIN = LinearRegression(2, 3, steps=6)
BELIEFS = beside.linear_beliefs(DOMAIN)


def made(config=LSTMConfig(hidden=4), read=beside.flat_carry):  # noqa: B008 (it is frozen)
    """Returns a network beside Bayes, and parameters whose readout is not zero."""
    meta = config.make(DOMAIN)
    params = meta.init(jax.random.key(3))
    params["readout"] = 0.5 * jax.random.normal(jax.random.key(4), params["readout"].shape)
    return beside.Beside(meta, DOMAIN, BELIEFS, read), params


def test_the_check_and_the_rates_of_the_network_are_those_of_the_pair():
    pair, _ = made()
    assert pair.check == pair.meta.check
    assert pair.rates is pair.meta.rates


def episode(meta, params, seed=0, steps=6):
    """Returns the states before the first pair and after each pair, and the pairs."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(steps, 2)).astype(np.float32)
    y = rng.normal(size=(steps, 3)).astype(np.float32)

    @jax.jit
    def run(params, x, y):
        learner = meta.learner(params)
        first = learner.init(jax.random.key(seed))
        step = lambda state, pair: (learner.update(state, *pair),) * 2
        _, later = jax.lax.scan(step, first, (x, y))
        return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, later)

    states = jax.tree.map(np.asarray, run(params, x, y))
    state_at = lambda t: jax.tree.map(lambda leaf: jnp.asarray(leaf[t]), states)
    return [state_at(t) for t in range(steps + 1)], x, y


def posterior(x, y):
    """Returns the posterior mean [n_y, n_x] and the covariance of a row of W, in float64."""
    x, y = np.float64(x), np.float64(y)
    covariance = np.linalg.inv(2 * np.eye(2) + x.T @ x / DOMAIN.sigma**2)
    return y.T @ x @ covariance / DOMAIN.sigma**2, covariance


def test_the_network_answers_as_alone_and_bayes_is_recorded_after_the_pairs_its_state_has_read():
    combined, params = made()
    learner, network = combined.learner(params), combined.meta.learner(params)
    step_alone = jax.jit(
        lambda state, *pair: (network.predict(state, pair[0]), network.update(state, *pair))
    )
    states, x, y = episode(combined, params)
    plain = network.init(jax.random.key(0))
    for t in range(6):
        answer, plain = step_alone(plain, x[t], y[t])
        beside_answer = learner.predict(states[t], jnp.asarray(x[t]))
        np.testing.assert_allclose(beside_answer, answer, rtol=1e-5)
        data = learner.diagnose(states[t + 1])
        mean, covariance = posterior(x[:t], y[:t])
        np.testing.assert_allclose(data["mean"], mean.ravel(), atol=2e-4)
        np.testing.assert_allclose(data["covariance"], covariance.ravel(), atol=1e-5)
        np.testing.assert_allclose(data["uncertainty"], np.linalg.slogdet(covariance)[1], atol=0.01)
        np.testing.assert_array_equal(data["query"], x[t])
        distance = np.mean((np.float64(answer) - mean @ x[t]) ** 2)
        np.testing.assert_allclose(data["distance"], distance, rtol=1e-2, atol=1e-6)
        h, c = plain.carry
        np.testing.assert_allclose(data["state"], np.concatenate([h, c]), atol=1e-3)
        assert data["state"].dtype == jnp.float16
    first = learner.diagnose(states[0])
    assert all(np.all(np.asarray(value) == 0) for value in first.values())


@pytest.mark.parametrize("sigma", [0.1, 1e-2, 1e-4])
def test_the_log_determinant_is_right_for_a_covariance_that_float32_hardly_holds(sigma):
    """The judge is float64. After few pairs, variances differ by a factor of up to 1e8."""
    domain = LinearRegression(5, 1, sigma=sigma)
    beliefs = beside.linear_beliefs(domain)
    state, precision = beliefs.learner.init(jax.random.key(0)), np.linalg.inv(domain.C)
    update = jax.jit(beliefs.learner.update)
    for x in np.random.default_rng(0).standard_normal((12, 5)).astype(np.float32):
        state = update(state, jnp.asarray(x), jnp.zeros(1))
        precision = precision + np.outer(np.float64(x), x) / sigma**2
        log_determinant = beliefs.read(state)["uncertainty"]
        np.testing.assert_allclose(log_determinant, -np.linalg.slogdet(precision)[1], atol=0.02)


def test_posterior_and_divergence_in_the_bandit():
    domain = ContextualBandit(2, 3, steps=5)
    beliefs = beside.bandit_beliefs(domain)
    state = beliefs.learner.init(jax.random.key(0))
    pay = jnp.eye(3)[jnp.array([2, 1])]
    outcome = Outcome(jnp.int32(0), jnp.int32(0), jnp.float32(0), pay)
    state = beliefs.learner.update(state, jnp.int32(0), outcome)
    reading = beliefs.read(state)
    np.testing.assert_allclose(reading["mean"], [0, 0.5, 0.5, 1 / 3, 1 / 3, 1 / 3], atol=1e-6)
    np.testing.assert_allclose(reading["uncertainty"], np.log([2, 3]), atol=1e-6)
    best = beliefs.learner.predict(state, jnp.int32(0))
    divergence = beliefs.distance(jnp.log(jnp.array([0.5, 0.25, 0.25])), best)
    np.testing.assert_allclose(divergence, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(beliefs.distance(best, best), 0, atol=1e-6)
    with pytest.raises(ConfigError, match="permutation"):
        beside.bandit_beliefs(ContextualBandit(2, 3, steps=5, permutation=True))


def test_in_the_bandit_distances_are_from_the_best_policy_and_shifts_from_the_unchanged_one():
    domain = ContextualBandit(2, 3, steps=6)
    meta = LSTMConfig(hidden=4).make(domain)
    params = meta.init(jax.random.key(3))
    params["readout"] = 60 * jax.random.normal(jax.random.key(4), params["readout"].shape)
    with_bayes = beside.Beside(meta, domain, beside.bandit_beliefs(domain))
    bayes = with_bayes.beliefs.learner

    @jax.jit
    def act(params):
        learner, network = beside.implanted(with_bayes, 2, 16).learner(params), meta.learner(params)
        task = domain.sample_task(jax.random.key(1))

        def step(state, key):
            answer = lambda query: learner.predict(state, query)
            query, alone, outcome = inner.interact(domain, task, answer, jax.random.split(key))
            copies = jax.vmap(network.predict, (0, None))(state.copies, query)
            best = bayes.predict(state.alone.bayes, query)
            state = learner.update(state, query, outcome)
            policies = map(jax.nn.softmax, (alone, best, copies))
            return state, (*policies, state.alone.record["distance"], state.record["shift"])

        keys = jax.random.split(jax.random.key(5), 4)
        return jax.lax.scan(step, learner.init(jax.random.key(2)), keys)[1]

    alone, best, copies, distance, shift = (np.float64(array) for array in act(params))
    divergence = lambda p, q: scipy.special.rel_entr(p, q).sum(-1)
    np.testing.assert_allclose(distance, divergence(best, alone), rtol=1e-3, atol=1e-5)
    expected = divergence(alone[:, None], copies)
    np.testing.assert_allclose(shift, expected, rtol=1e-2, atol=1e-5)
    assert np.abs(expected - divergence(copies, alone[:, None])).max() > 0.05  # it is not symmetric


def test_the_state_of_a_transformer_is_the_mean_of_the_values_in_its_cache():
    config = TransformerConfig(hidden=8, layers=2, attention_heads=2)
    combined, params = made(config, beside.mean_cached_values)
    states, _, _ = episode(combined, params)
    values = [np.asarray(memory[1])[:4].mean(0).ravel() for memory in states[4].network.carry[1]]
    np.testing.assert_allclose(states[4].record["state"], np.concatenate(values), rtol=1e-5)


@pytest.mark.parametrize("config", [LSTMConfig(hidden=4), GRUConfig(hidden=5)])
def test_a_replaced_state_is_what_least_squares_predicts_from_bayes(config):
    combined, params = made(config)
    implanted = beside.implanted(combined, at=3, episodes=64)
    states, x, y = episode(implanted, params)
    plain, _, _ = episode(combined, params)
    # The fit is ridge regression on 64 episodes, here in float64.
    keys = jax.random.split(jax.random.key(0), 64)
    fit = jax.vmap(lambda key: beside._record_at(combined.domain, 3, combined.learner(params), key))
    records = jax.jit(fit)(keys)
    names = ("covariance", "mean", "query", "uncertainty")
    features = np.concatenate([np.float64(records[name]) for name in names], 1)
    mean, spread = features.mean(0), features.std(0)
    z, target = (features - mean) / spread, np.float64(records["state"])
    weights = np.linalg.solve(z.T @ z + np.eye(z.shape[1]), z.T @ (target - target.mean(0)))
    donor = int(states[3].donor)
    mapped = []
    for source in (plain[3].record, {name: array[donor] for name, array in records.items()}):
        numbers = {**source, "query": plain[3].record["query"]}
        vector = np.concatenate([np.float64(numbers[name]) for name in names])
        mapped.append(target.mean(0) + (vector - mean) / spread @ weights)
    carries = [jax.vmap(beside.flat_carry)(state.copies.carry) for state in states]
    np.testing.assert_allclose(carries[3], [*mapped, np.zeros_like(mapped[0])], atol=2e-3)
    assert np.abs(mapped[0] - mapped[1]).max() > 0.01
    np.testing.assert_array_equal(states[3].copies.feedback, np.tile(y[2], (3, 1)))
    for t in (1, 2):  # before step 3 no copy is replaced, and the one left alone never is
        expected = np.tile(plain[t].record["state"], (3, 1))
        np.testing.assert_allclose(carries[t], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(states[6].alone.record["state"], plain[6].record["state"], rtol=1e-5)
    assert [float(state.record["after"]) for state in states] == [0, 0, 0, 0, 1, 1, 1]
    shift = np.array([state.record["shift"] for state in states])
    assert shift[:4].max() < 1e-10 < shift[4:].min()
    # The losses recorded after the fourth pair are of the answers to its query.
    network = combined.meta.learner(params)
    copies = [jax.tree.map(lambda leaf, k=k: leaf[k], states[3].copies) for k in range(3)]
    networks = [plain[3].network, *copies]
    answers = [np.float64(network.predict(state, jnp.asarray(x[3]))) for state in networks]
    answers.append(posterior(x[:3], y[:3])[0] @ x[3])
    losses = [np.mean((answer - y[3]) ** 2) for answer in answers]
    np.testing.assert_allclose(states[4].record["losses"], losses, rtol=1e-3)
    shifts = [np.mean((answer - answers[0]) ** 2) for answer in answers[1:4]]
    np.testing.assert_allclose(states[4].record["shift"], shifts, rtol=1e-3)
    np.testing.assert_allclose(states[4].record["size"], np.mean(answers[0] ** 2), rtol=1e-4)


def test_each_episode_draws_its_own_donor_among_the_episodes_of_the_fit():
    combined, params = made()
    implanted = beside.implanted(combined, at=3, episodes=8)
    keys = indexed_keys(jax.random.key(1), jnp.arange(400))
    donors = jax.jit(jax.vmap(lambda key: implanted.learner(params).init(key).donor))(keys)
    assert len(counts := np.bincount(donors)) == 8
    assert counts.min() > 20


@pytest.mark.parametrize("at", [1, 4])
def test_the_episodes_of_the_fit_are_read_at_the_time_of_the_replacement(at):
    state_of = lambda count, x, y: beside.PairState(None, None, {"count": count, "x": x, "y": y})
    counting = Learner(
        lambda key: state_of(jnp.int32(0), jnp.zeros(2), jnp.zeros(3)),
        lambda state, x: jnp.zeros(3),
        lambda state, x, y: state_of(state.record["count"] + 1, x, y),
    )
    record = beside._record_at(DOMAIN, at, counting, jax.random.key(0))
    assert record["count"] == at


def test_vectors_are_stored_with_axes_of_their_sizes_and_decoded():
    combined, params = made()
    contender = md.Contender("lstm", "LSTM", combined, times=(0, 2, 4, 6))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    tasks = TaskSet("heldout", DOMAIN, size=20)
    arrays = measuring.readings(tasks, contender, stacked, jax.random.key(0))
    data = trajectories.dataset(arrays, measuring.description(tasks, contender))
    assert data["state"].dims == ("seed", "task", "step", "state_0")
    sizes = {name: data.sizes[f"{name}_0"] for name in ("state", "mean", "covariance", "query")}
    assert sizes == {"state": 8, "mean": 6, "covariance": 4, "query": 2}
    readings = 8 + 6 + 4 + 2 + 1 + 1 + 1  # the last three are uncertainty, distance and loss
    assert measuring.bytes_needed(tasks, contender, seeds=2) == 4 * 2 * 20 * 4 * readings
    assert decoding.vectors(data, "state", "query", "absent").shape == (2, 20, 3, 10)
    forth, back = decoding.both_ways(data)
    assert forth.left.shape == back.left.shape == (2, 10, 3)
    twice = xr.concat([data, data], "outer_step")
    decoded = decoding.of_state(twice)["mean"]
    np.testing.assert_array_equal(decoded.at(0).left, decoded.at(1).left)
    alone = decoding.held_out(decoding.vectors(data, "state"), decoding.vectors(data, "mean"))
    np.testing.assert_array_equal(decoded.at(1).left, alone.left)


@pytest.mark.parametrize(
    ("at", "message"), [(0, "at = 0: must be"), (6, "steps = 6: must be above")]
)
def test_a_state_can_only_be_replaced_within_the_episode(at, message):
    with pytest.raises(ConfigError, match=message):
        beside.implanted(made()[0], at)
