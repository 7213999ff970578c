"""Contextual bandits: the domain, exact Bayes against enumeration, policy gradients by hand."""

import dataclasses
import functools
import itertools
import json
import shutil
from fractions import Fraction
from pathlib import Path

import jax
import jax.flatten_util
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import metadyn
from metadyn import dynamics, figures, inner
from metadyn.base import Domain, indexed_keys
from metadyn.cli import main
from metadyn.domains.bandit import BanditTask, ContextualBandit, Outcome
from metadyn.errors import ConfigError, ConfigWarning
from metadyn.learners.bayes import bayes_bandit
from metadyn.learners.gradient import Policy, expected_policy_gradient, reinforce, softmax_policy
from metadyn.learners.lstm import LSTMConfig
from metadyn.objectives import ActorCriticConfig, actor_critic, discounted, mean_of_others
from metadyn.outer import MetaTraining, OuterConfig, OuterLoop
from metadyn.progress import Progress
from metadyn.store import RunFolder
from metadyn.study import load_study

# The domain.


def test_growth_is_measured_with_the_pay_of_the_configured_domain():
    study = load_study("contextual_bandit")
    config = study.presets["quick"]
    config = dataclasses.replace(config, domain=dataclasses.replace(config.domain, p_high=0.9))
    *_, last = study.plan(config).comparisons
    assert (last.domain.p_high, last.domain.contexts, last.domain.actions) == (0.9, 6, 6)


def test_the_domain_keeps_the_contract():
    assert isinstance(ContextualBandit(), Domain)


@pytest.mark.parametrize("permutation", [False, True])
def test_correct_actions_are_uniform_and_distinct_in_a_permutation(permutation):
    domain = ContextualBandit(2, 3, permutation=permutation)
    best = jax.vmap(domain.sample_task)(jax.random.split(jax.random.key(0), 9000)).best
    counts = np.bincount(np.asarray(best[:, 0] * 3 + best[:, 1]), minlength=9).reshape(3, 3)
    allowed = 1 - np.eye(3) if permutation else np.ones((3, 3))
    expected = 9000 * allowed / allowed.sum()
    assert np.all(np.abs(counts - expected) <= 5 * np.sqrt(expected))


def test_actions_follow_the_policy_and_pay_as_stated():
    domain = ContextualBandit(2, 3, p_high=0.8, p_low=0.3)
    task = BanditTask(jnp.array([2, 0]))
    logits = jnp.array([0.0, 1.0, -1.0])
    answer = lambda key: domain.feedback(task, jnp.int32(0), logits, key)
    feedback = jax.vmap(answer)(jax.random.split(jax.random.key(1), 20_000))
    policy = np.exp(logits) / np.exp(logits).sum()
    shares = np.bincount(feedback.action, minlength=3) / 20_000
    np.testing.assert_allclose(shares, policy, atol=5 * 0.5 / np.sqrt(20_000))
    for action, pay in enumerate((0.3, 0.3, 0.8)):
        rewards = np.asarray(feedback.reward)[np.asarray(feedback.action) == action]
        assert abs(rewards.mean() - pay) < 5 * np.sqrt(0.25 / len(rewards))
    np.testing.assert_allclose(feedback.pay[0], [[0.3, 0.3, 0.8], [0.8, 0.3, 0.3]], rtol=1e-6)
    regret = domain.loss(logits, jax.tree.map(lambda leaf: leaf[0], feedback))
    np.testing.assert_allclose(regret, 0.8 - policy @ [0.3, 0.3, 0.8], rtol=1e-5)


def test_probe_reads_the_probability_of_the_correct_action():
    domain = ContextualBandit(3, 2)
    probe = domain.probe()
    np.testing.assert_array_equal(probe.queries, [0, 1, 2])
    answers = jnp.log(jnp.array([[0.1, 0.9], [0.6, 0.4], [0.5, 0.5]]))
    readings = probe.read(BanditTask(jnp.array([1, 1, 0])), answers)
    np.testing.assert_allclose(readings["strength"], [0.9, 0.4, 0.5], rtol=1e-6)


def test_networks_read_context_action_and_reward():
    domain = ContextualBandit(3, 2)
    np.testing.assert_array_equal(domain.encode_query(jnp.int32(1)), [0, 1, 0])
    feedback = Outcome(jnp.int32(1), jnp.int32(0), jnp.float32(1), jnp.zeros((3, 2)))
    np.testing.assert_array_equal(domain.encode_feedback(feedback), [1, 0, 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ContextualBandit(contexts=0), "contexts = 0"),
        (lambda: ContextualBandit(actions=1), "actions = 1: must be at least 2"),
        (lambda: ContextualBandit(steps=0), "steps = 0"),
        (
            lambda: ContextualBandit(p_low=0.5, p_high=0.5),
            "p_low = 0.5: must be below p_high = 0.5",
        ),
        (lambda: ContextualBandit(p_low=-0.1), "p_low = -0.1"),
        (lambda: ContextualBandit(p_high=1.5), "p_high = 1.5"),
        (lambda: ContextualBandit(6, 5, permutation=True), "contexts = 6: with permutation"),
        (lambda: bayes_bandit(ContextualBandit(8, 9, permutation=True)), "too many to enumerate"),
        (lambda: ActorCriticConfig(discount=1.1), "discount = 1.1"),
        (lambda: ActorCriticConfig(entropy=-1.0), "entropy = -1.0"),
        (lambda: ActorCriticConfig(group=1), "group = 1"),
        (lambda: reinforce(softmax_policy(2, 2), optax.sgd(1.0), 0), "batch = 0"),
        (lambda: softmax_policy(2, 2, scale=-1.0), "scale = -1.0"),
    ],
)
@pytest.mark.filterwarnings("ignore:steps")
def test_bad_input_names_field_value_and_fix(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_an_episode_too_short_to_see_each_context_gives_a_warning():
    with pytest.warns(ConfigWarning, match="steps = 4: too few to see each of the 5 contexts once"):
        ContextualBandit(5, 5, steps=4)


def test_a_command_warns_in_one_line(capsys):
    assert main(["run", "contextual_bandit", "--domain.steps", "4", "--plan=nowhere"]) == 2
    warning, error = capsys.readouterr().err.splitlines()
    message = "steps = 4: too few to see each of the 5 contexts once"
    assert warning == f"metadyn: warning: {message}"
    assert error.startswith("metadyn: --plan nowhere")


# Exact Bayes.


def enumerated_reward(K, n, T, permutation):
    """Returns the most that any policy can earn in expectation, by enumerating all beliefs."""
    assignments = itertools.product(range(n), repeat=K)
    all_tasks = frozenset(h for h in assignments if not permutation or len(set(h)) == K)

    @functools.cache
    def best(t, belief):
        if t == T:
            return Fraction(0)
        total = Fraction(0)
        for c in range(K):
            values = []
            for a in range(n):
                paying = frozenset(h for h in belief if h[c] == a)
                value = Fraction(0)
                for outcome, reward in ((paying, 1), (belief - paying, 0)):
                    if outcome:
                        total_reward = reward + best(t + 1, outcome)
                        value += Fraction(len(outcome), len(belief)) * total_reward
                values.append(value)
            total += max(values)
        return total / K

    return float(best(0, all_tasks))


CASES = [(2, 2, 4, False), (2, 3, 5, False), (2, 3, 5, True), (3, 3, 6, True), (2, 4, 6, True)]
CASES += [(3, 4, 4, True)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:steps")
def test_bayes_earns_the_most_that_enumeration_finds(case):
    """Its value is exact, since every context, action and outcome is followed by the learner's own
    functions and nothing is sampled."""
    K, n, T, permutation = case
    learner = bayes_bandit(ContextualBandit(K, n, steps=T, permutation=permutation))
    assignments = itertools.product(range(n), repeat=K)
    all_tasks = tuple(h for h in assignments if not permutation or len(set(h)) == K)

    @jax.jit
    def policies(state):
        return jax.nn.softmax(jax.vmap(learner.predict, (None, 0))(state, jnp.arange(K)))

    @jax.jit
    def updated(state, c, a, r):
        feedback = Outcome(c, a, r.astype(jnp.float32), jnp.zeros((K, n)))
        state = learner.update(state, c, feedback)
        return state, policies(state)

    @functools.cache
    def state_and_policies(history):
        """Returns the state and all contexts' policies after choices (context, action, reward)."""
        if not history:
            state = learner.init(jax.random.key(0))
            policy = policies(state)
        else:
            state, policy = updated(state_and_policies(history[:-1])[0], *np.int32(history[-1]))
        return state, np.asarray(policy)

    @functools.cache
    def expected_reward(history, belief):
        if len(history) == T:
            return 0.0
        total = 0.0
        for c in range(K):
            for a, chosen in enumerate(state_and_policies(history)[1][c]):
                for r in (0, 1):
                    remaining = tuple(h for h in belief if (h[c] == a) == r)
                    if chosen > 0 and remaining:
                        # Bayes does not depend on the order of its observations.
                        observations = tuple(sorted({*history, (c, a, r)}))
                        padded = observations + ((c, a, r),) * (
                            len(history) + 1 - len(observations)
                        )
                        later_reward = expected_reward(padded, remaining)
                        total += chosen * len(remaining) / len(belief) * (r + later_reward)
        return total / K

    assert expected_reward((), all_tasks) == pytest.approx(
        enumerated_reward(K, n, T, permutation), rel=1e-5
    )


@pytest.mark.parametrize("permutation", [False, True])
@pytest.mark.parametrize("pay", [(1.0, 0.0), (0.9, 0.2)])
def test_posterior_equals_enumeration_and_sums_to_one(permutation, pay):
    high, low = pay
    K, n, rng = 3, 4, np.random.default_rng(0)
    domain = ContextualBandit(K, n, p_high=high, p_low=low, permutation=permutation)
    learner = bayes_bandit(domain, "thompson")
    state, best = learner.init(jax.random.key(0)), rng.permutation(n)[:K]
    assignments = list(itertools.product(range(n), repeat=K))
    weights = np.array([not permutation or len(set(h)) == K for h in assignments], np.float64)
    for _ in range(12):
        c, a = rng.integers(K), rng.integers(n)
        r = float(rng.random() < (high if best[c] == a else low))
        feedback = Outcome(jnp.int32(c), jnp.int32(a), jnp.float32(r), jnp.zeros((K, n)))
        state = learner.update(state, jnp.int32(c), feedback)
        for i, h in enumerate(assignments):
            p = high if h[c] == a else low
            weights[i] *= p if r else 1 - p
        posterior = weights / weights.sum()
        for c in range(K):
            expected = [
                sum(posterior[i] for i, h in enumerate(assignments) if h[c] == a) for a in range(n)
            ]
            probabilities = np.exp(learner.predict(state, jnp.int32(c)))
            np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-5)
            np.testing.assert_allclose(probabilities, expected, atol=1e-5)


def test_greedy_takes_the_likeliest_actions_evenly():
    learner = bayes_bandit(ContextualBandit(1, 3, p_high=0.8, p_low=0.1))
    state = learner.init(jax.random.key(0))
    policy = lambda: np.asarray(jax.nn.softmax(learner.predict(state, jnp.int32(0))))
    np.testing.assert_allclose(policy(), 1 / 3)
    feedback = Outcome(jnp.int32(0), jnp.int32(1), jnp.float32(0), jnp.zeros((1, 3)))
    state = learner.update(state, jnp.int32(0), feedback)
    np.testing.assert_allclose(policy(), [0.5, 0, 0.5])


def test_bayes_earns_point_eight_a_step_at_the_papers_size():
    domain = ContextualBandit(5, 5, steps=50)
    learner = bayes_bandit(domain)
    measurements = inner.measure(
        domain, lambda params: learner, (0, 50), (),
        (), Partial(domain.sample_task), jax.random.key(0), jnp.arange(8192),
    )  # fmt: skip
    assert float(1 - measurements["loss"][:, 1].mean()) == pytest.approx(0.800, abs=0.003)


# Policy gradient.


def outcome(c, a, r, pay):
    return Outcome(jnp.int32(c), jnp.int32(a), jnp.float32(r), jnp.asarray(pay, jnp.float32))


@pytest.mark.parametrize("same", [True, False])
def test_expected_gradient_equals_the_derivation_by_hand(same):
    """From even policies over two actions in two contexts, the gradient of J in a logit is
    π_a (pay_a − J) = ±¼, half of it for each context. Both contexts act on a shared bias."""
    pay = [[1, 0], [1, 0]] if same else [[1, 0], [0, 1]]
    learner = expected_policy_gradient(softmax_policy(2, 2, True, 0.0), optax.sgd(1.0))
    (policy, _) = learner.update(learner.init(jax.random.key(0)), None, outcome(0, 0, 0, pay))
    W = [[1 / 8, 1 / 8], [-1 / 8, -1 / 8]] if same else [[1 / 8, -1 / 8], [-1 / 8, 1 / 8]]
    np.testing.assert_allclose(policy.W, W, rtol=1e-6)
    np.testing.assert_allclose(policy.b, [1 / 4, -1 / 4] if same else [0, 0], atol=1e-7)


def test_reinforce_equals_the_derivation_by_hand():
    """One choice adds (r − r̄)(onehot(a) − π) to the context's column and to the shared bias."""
    learner = reinforce(softmax_policy(2, 2, True, 0.0), optax.sgd(1.0), 1)
    batch = lambda r: jax.tree.map(lambda leaf: leaf[None], outcome(1, 0, r, np.zeros((2, 2))))
    state = learner.update(learner.init(jax.random.key(0)), jnp.array([1]), batch(1))
    policy, _, mean = state
    np.testing.assert_allclose(policy.W, [[0, 0.5], [0, -0.5]], rtol=1e-6)
    np.testing.assert_allclose(policy.b, [0.5, -0.5], rtol=1e-6)
    assert float(mean) == pytest.approx(0.01)
    after, _, mean = learner.update(state, jnp.array([1]), batch(0))
    p = 1 / (1 + np.exp(-2.0))
    np.testing.assert_allclose(after.b - policy.b, np.array([-0.01, 0.01]) * (1 - p), rtol=1e-5)
    assert float(mean) == pytest.approx(0.99 * 0.01)


def starting_weights(coupled, K=3, n=4):
    """Returns weights, and biases if `coupled`."""
    rng = np.random.default_rng(7)
    return rng.normal(size=(n, K)), rng.normal(size=n) if coupled else None


@pytest.mark.parametrize("coupled", [True, False])
def test_expected_gradient_matches_float64_finite_differences(coupled):
    W, b = starting_weights(coupled)
    pay = np.random.default_rng(8).random((3, 4))

    def reward(flat):
        logits = flat[:12].reshape(4, 3) + (flat[12:, None] if coupled else 0)
        policy = np.exp(logits) / np.exp(logits).sum(0)
        return np.mean(np.sum(policy.T * pay, 1))

    flat = np.concatenate([W.ravel(), b if coupled else []])
    bumps = 1e-6 * np.eye(len(flat))
    slope = np.array([(reward(flat + bump) - reward(flat - bump)) / 2e-6 for bump in bumps])
    learner = expected_policy_gradient(softmax_policy(3, 4, coupled), optax.sgd(1.0))
    weights = jax.tree.map(jnp.float32, Policy(W, b))
    after, _ = learner.update((weights, optax.sgd(1.0).init(weights)), None, outcome(0, 0, 0, pay))
    change = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(after)]) - flat
    np.testing.assert_allclose(change, slope, atol=2e-6)


@pytest.mark.parametrize("coupled", [True, False])
def test_expected_gradient_is_the_mean_of_sampled_reinforce(coupled):
    W, b = starting_weights(coupled)
    domain, batch = ContextualBandit(3, 4, p_high=0.9, p_low=0.2), 200_000
    task = BanditTask(jnp.array([3, 0, 0]))
    weights = jax.tree.map(jnp.float32, Policy(W, b))
    network, sgd = softmax_policy(3, 4, coupled), optax.sgd(1.0)
    sampled = reinforce(network, sgd, batch)
    state = (weights, sgd.init(weights), jnp.float32(0.4))
    answer = lambda context: sampled.predict(state, context)
    pose = lambda keys: inner.interact(domain, task, answer, keys)
    query, _, feedback = jax.vmap(pose)(jax.random.split(jax.random.key(0), (batch, 2)))
    expected = expected_policy_gradient(network, sgd)
    single = jax.tree.map(lambda leaf: leaf[0], feedback)
    updated = [
        after[0]
        for after in (
            sampled.update(state, query, feedback),
            expected.update(state[:2], query[0], single),
        )
    ]
    for mean, expectation, before in zip(*map(jax.tree.leaves, (*updated, weights)), strict=True):
        np.testing.assert_allclose(mean - before, expectation - before, atol=5 / np.sqrt(batch))
        assert np.abs(expectation - before).max() > 0.01


def test_policies_measured_together_equal_each_measured_alone():
    domain = ContextualBandit(3, 3, steps=3)
    learner = reinforce(softmax_policy(3, 3), optax.sgd(0.3), 2)
    make, sample = (lambda params: learner), Partial(domain.sample_task)
    probes = (("mode_strength", domain.probe()),)
    measure = lambda indices: np.asarray(
        inner.measure(
            domain, make, (0, 5, 200), probes,
            (), sample, jax.random.key(1), indices,
        )["mode_strength"]
    )  # fmt: skip
    together = measure(jnp.arange(16))
    assert together[:, 2].mean() > together[:, 0].mean() + 0.2
    for i in range(16):
        np.testing.assert_allclose(together[i], measure(jnp.array([i]))[0], rtol=1e-3, atol=1e-4)


# Actor-critic.

TINY = ContextualBandit(1, 2, steps=2)
META = LSTMConfig(hidden=3).make(TINY, heads=1)


def scattered(meta):
    """Returns parameters away from the symmetric start."""
    flat, unravel = jax.flatten_util.ravel_pytree(meta.init(jax.random.key(0)))
    return unravel(flat + 0.7 * jax.random.normal(jax.random.key(5), flat.shape))


def exact_return(params):
    """Returns the mean reward a step, expected over all tasks and choices, by enumeration."""
    learner, c, total = META.learner(params), jnp.int32(0), 0.0
    for best in (0, 1):
        task = BanditTask(jnp.array([best]))
        state = learner.init(jax.random.key(0))
        first = jax.nn.softmax(learner.predict(state, c))
        total += 0.5 * first[best]
        for a in (0, 1):
            feedback = Outcome(c, jnp.int32(a), jnp.float32(a == best), TINY.pay(task))
            second = jax.nn.softmax(learner.predict(learner.update(state, c, feedback), c))
            total += 0.5 * first[a] * second[best]
    return total / 2


return_and_gradient = jax.jit(jax.value_and_grad(exact_return))


@functools.cache
def half_learned():
    """Returns parameters on the way up the exact return, where its gradient is not small."""
    params = scattered(META)
    for _ in range(35):
        _, gradient = return_and_gradient(params)
        size = 0.1 / jnp.linalg.norm(jax.flatten_util.ravel_pytree(gradient)[0])
        params = jax.tree.map(lambda leaf, g, size=size: leaf + size * g, params, gradient)
    return params


@pytest.mark.parametrize("immediate", ["expected", "sampled"])
@pytest.mark.parametrize("baseline", ["leave_one_out", "value", "none"])
def test_actor_critic_gradient_is_that_of_the_expected_return(immediate, baseline):
    """It holds without discount and entropy, whatever is sampled and whatever the baseline."""
    config = ActorCriticConfig(
        discount=1.0, entropy=0.0, immediate=immediate, baseline=baseline, group=8, value_weight=0.0
    )
    objective, params = actor_critic(TINY, META, config), half_learned()
    expected_return, exact = return_and_gradient(params)

    @jax.jit
    def batch(index):
        keys = indexed_keys(jax.random.fold_in(jax.random.key(1), index), jnp.arange(400))
        gradient, metrics = jax.grad(objective.loss, has_aux=True)(params, keys)
        return jax.flatten_util.ravel_pytree(gradient)[0], metrics["loss"]

    gradients, losses = jax.lax.map(batch, jnp.arange(100))
    mean, error = -np.mean(gradients, 0), np.std(gradients, 0) / 10
    expected = jax.flatten_util.ravel_pytree(exact)[0]
    assert np.abs(expected).max() > 8 * error[np.abs(expected).argmax()]
    assert np.all(np.abs(mean - expected) <= 5 * error + 1e-6)
    assert 1 - np.mean(losses) == pytest.approx(float(expected_return), abs=0.01)


def test_the_leave_one_out_baseline_and_the_known_pay_lower_the_variance():
    domain, variance = ContextualBandit(2, 2, steps=8), {}
    meta = LSTMConfig(hidden=3).make(domain, heads=1)
    params = scattered(meta)
    for name, fields in {
        "loo": {},
        "none": {"baseline": "none"},
        "sampled": {"immediate": "sampled", "baseline": "none"},
    }.items():
        config = ActorCriticConfig(discount=1.0, entropy=0.0, value_weight=0.0, **fields)
        objective = actor_critic(domain, meta, config)

        def batch(index, objective=objective):
            keys = indexed_keys(jax.random.fold_in(jax.random.key(1), index), jnp.arange(32))
            return jax.flatten_util.ravel_pytree(
                jax.grad(objective.loss, has_aux=True)(params, keys)[0]
            )[0]

        variance[name] = float(jax.lax.map(batch, jnp.arange(200)).var(0).sum())
    assert variance["loo"] < variance["none"] < variance["sampled"]


def test_returns_and_baselines_equal_loops():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(5, 6))
    returns = [
        [sum(0.7 ** (s - t) * rewards[s, b] for s in range(t, 5)) for b in range(6)]
        for t in range(5)
    ]
    np.testing.assert_allclose(discounted(jnp.float32(rewards), 0.7), returns, rtol=1e-5)
    groups = [[0, 1, 2], [0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5], [3, 4, 5]]
    others = [
        [rewards[t, [i for i in groups[b] if i != b]].mean() for b in range(6)] for t in range(5)
    ]
    np.testing.assert_allclose(mean_of_others(jnp.float32(rewards), 3), others, atol=1e-6)


@pytest.mark.parametrize("immediate", ["expected", "sampled"])
@pytest.mark.parametrize("baseline", ["leave_one_out", "value", "none"])
def test_the_actor_critic_objective_equals_its_formula(immediate, baseline):
    """The formula is computed in float64 by loops, from outputs in episodes that are acted out."""
    config = ActorCriticConfig(0.7, 0.2, immediate=immediate, baseline=baseline, group=3)
    domain = ContextualBandit(2, 3, steps=4)
    meta = LSTMConfig(hidden=3).make(domain, heads=1)
    params, keys = scattered(meta), indexed_keys(jax.random.key(1), jnp.arange(6))
    objective, metrics = jax.jit(actor_critic(domain, meta, config).loss)(params, keys)
    act = jax.vmap(functools.partial(inner.act, domain, meta.learner(params)), out_axes=-1)
    queries, feedback = jax.jit(act)(keys)
    outputs = np.float64(jax.jit(meta.unroll)(params, queries, feedback))  # [T, n + 1, B]
    policy = np.exp(outputs[:, :3]) / np.exp(outputs[:, :3]).sum(1, keepdims=True)
    value, action, reward = outputs[:, 3], np.asarray(feedback.action), np.float64(feedback.reward)
    pay = np.asarray(feedback.pay)  # [T, K, n, B]
    gains, critic, regrets = [], [], []
    positions = [(t, b) for t in range(4) for b in range(6)]
    regret = {(t, b): 1 - policy[t, :, b] @ pay[t, queries[t, b], :, b] for t, b in positions}

    def credit(t, b):
        now = {s: -regret[s, b] if immediate == "expected" else reward[s, b] for s in range(4)}
        first = t + 1 if immediate == "expected" else t
        return sum(0.7 ** (s - t) * now[s] for s in range(first, 4))

    for t, b in positions:
        group = [i for i in range(6) if i // 3 == b // 3 and i != b]
        advantage = credit(t, b)
        if baseline == "leave_one_out":
            advantage -= np.mean([credit(t, i) for i in group])
        critic.append((value[t, b] - advantage) ** 2)
        advantage -= 0 if baseline == "none" else value[t, b]
        entropy = -(policy[t, :, b] * np.log(policy[t, :, b])).sum()
        chosen = np.log(policy[t, action[t, b], b])
        regret_term = regret[t, b] if immediate == "expected" else 0
        gains.append(chosen * advantage + 0.2 * entropy - regret_term)
        regrets.append(regret[t, b])
    np.testing.assert_allclose(metrics["loss"], np.mean(regrets), rtol=1e-4)
    np.testing.assert_allclose(metrics["critic"], np.mean(critic), rtol=1e-4)
    np.testing.assert_allclose(objective, 0.5 * np.mean(critic) - np.mean(gains), rtol=1e-4)


def test_entropy_lowers_the_objective():
    """At the start the policy is even over two actions, so a unit of weight lowers it by log 2."""
    params, keys = META.init(jax.random.key(0)), indexed_keys(jax.random.key(1), jnp.arange(16))

    def value(entropy):
        config = ActorCriticConfig(entropy=entropy)
        return jax.jit(actor_critic(TINY, META, config).loss)(params, keys)[0]

    np.testing.assert_allclose(value(0.0) - value(1.0), np.log(2), rtol=1e-5)


def test_the_weight_of_the_entropy_falls_to_zero_over_the_outer_steps():
    """It falls linearly, as the reductions of the objective at steps 0, 25 and 200 of 100 show."""
    params, keys = META.init(jax.random.key(0)), indexed_keys(jax.random.key(1), jnp.arange(16))
    plain = jax.jit(actor_critic(TINY, META, ActorCriticConfig(entropy=0.0)).loss)(params, keys)[0]
    annealed = ActorCriticConfig(entropy=1.0, annealed=True)
    objective = actor_critic(TINY, META, annealed, steps=100)
    loss = jax.jit(lambda step: objective.at(step).loss(params, keys)[0])
    for step, share in ((0, 1.0), (25, 0.75), (200, 0.0)):
        reduction = plain - loss(jnp.int32(step))
        np.testing.assert_allclose(reduction, share * np.log(2), atol=1e-6)
    with pytest.raises(ConfigError, match=r"annealed = True: .* needs the outer `steps`"):
        actor_critic(TINY, META, annealed)


def test_acting_and_measuring_give_the_same_losses():
    domain = ContextualBandit(2, 3, steps=6)
    meta = LSTMConfig(hidden=4).make(domain, heads=1)
    params = jax.tree.map(lambda leaf: leaf + 0.3, meta.init(jax.random.key(0)))
    key = jax.random.key(3)
    queries, feedback = jax.vmap(lambda i: inner.act(domain, meta.learner(params), i))(
        indexed_keys(key, jnp.arange(5))
    )
    assert feedback.action.shape == (5, 6)
    queries, feedback = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, -1), (queries, feedback))
    answers = meta.unroll(params, queries, feedback)[:, :3]
    losses = jax.vmap(jax.vmap(domain.loss, -1))(answers, feedback).mean(0)
    one_seed = jax.tree.map(lambda leaf: leaf[None], params)
    measured = inner.measure(
        domain, meta.learner, (0, 6), (),
        one_seed, Partial(domain.sample_task), key, jnp.arange(5),
    )["loss"][0, :, 1]  # fmt: skip
    np.testing.assert_allclose(losses, measured, rtol=1e-4)


def test_training_learns_to_exploit():
    domain = ContextualBandit(2, 2, steps=8)
    meta = LSTMConfig(hidden=12).make(domain, heads=1)
    config = OuterConfig(
        steps=800, batch=32, seeds=2, warmup=10, learning_rate=3e-2, schedule="linear"
    )
    loop = OuterLoop(
        {"lstm": MetaTraining(meta, actor_critic(domain, meta))}, config, jax.random.key(0)
    )
    *_, (_, metrics) = loop.run(loop.init(), 800)
    chance, bayes = 0.5, 1 - enumerated_reward(2, 2, 8, False) / 8
    assert np.all((chance - metrics["lstm"]["loss"]) / (chance - bayes) > 0.7)


def test_groups_must_divide_the_batch():
    trained = {"lstm": MetaTraining(META, actor_critic(TINY, META, ActorCriticConfig(group=16)))}
    with pytest.raises(ConfigError, match="batch = 24: must be a multiple of 16"):
        OuterLoop(trained, OuterConfig(batch=24), jax.random.key(0))


# The study.

STUDY = str(Path(__file__).parent.parent / "experiments" / "contextual_bandit.py")
SMALL = [
    *("--domain.contexts", "2", "--domain.actions", "3", "--domain.steps", "4"),
    *("--lstm.hidden", "4", "--outer.steps", "30", "--outer.batch", "16", "--outer.seeds", "2"),
    *("--outer.warmup", "1", "--outer.checkpoints", "3", "--actor-critic.group", "8"),
    *("--policy.updates", "40", "--policy.expected-updates", "10", "--policy.records", "8"),
    *("--policy.most-contexts", "2"),
    *("--measure.tasks", "32", "--measure.updating-tasks", "16", "--measure.tracked-tasks", "4"),
    *("--measure.heldout-tasks", "16", "--measure.chunk", "4"),  # sets of any size share programs
]


def test_a_small_study_runs_to_its_end(tmp_path, monkeypatch):
    out, fewer_draws = tmp_path / "out", functools.partial(dynamics.estimate_over_runs, draws=50)
    monkeypatch.setattr(dynamics, "estimate_over_runs", fewer_draws)
    assert main(["run", STUDY, "--out", str(out), *SMALL]) == 1  # a small study fails its criteria
    pictures = {p.stem: matplotlib.image.imread(p) for p in (out / "figures").glob("*.png")}
    assert set(pictures) == {
        "mode_strength", "single_runs", "growth",
        "inner_curves", "outer_learning", "distance_to_bayes", "orders",
    }  # fmt: skip
    assert all(image.std() > 0.02 for image in pictures.values())
    summary = json.loads((out / "summary.json").read_text())
    assert {c["name"] for c in summary["criteria"]} == {
        "reinforce_coupled_growth_factor", "coupled_over_decoupled_growth",
        "reinforce_coupled_growth_linear_over_exponential",
        "reinforce_decoupled_growth_linear_over_exponential",
        "lstm_minus_bayes_staggering", "lstm_relative_reward",
    }  # fmt: skip
    data = metadyn.load(out, "in_distribution")
    assert set(data["learner"].values) == {
        "reinforce_coupled", "reinforce_decoupled", "lstm", "bayes"
    }  # fmt: skip
    starting_weights = data["mode_strength"].sel(learner="bayes").isel(step=0, seed=0)
    np.testing.assert_allclose(starting_weights.dropna("task"), 1 / 3, rtol=1e-5)
    # A run that was stopped while it measured growth has fewer learners at its last K. Only the
    # figure of growth is then left out.
    shutil.rmtree(out / "measurements" / "2_contexts" / "reinforce_decoupled")
    monkeypatch.setattr(figures, "histories", lambda results: {})
    monkeypatch.setattr(figures, "of_every_run", lambda results, trained: {})
    drawings = load_study(STUDY).own_figures() | {"other": figures.strengths_on("in_distribution")}
    drawn = figures.draw(out / "figures", RunFolder(out).results(), drawings, Progress(None))
    assert [path.stem for path in drawn] == ["other"]


def test_a_bernoulli_study_names_its_approximations():
    study = load_study(STUDY)
    config = dataclasses.replace(study.presets["quick"], domain=ContextualBandit(p_high=0.8))
    labels = {
        measurement.contender.name: measurement.contender.label
        for measurement in study.plan(config).measurements
    }
    assert labels["bayes"] == "exact posterior,\nThompson sampling"
    assert labels["bayes_greedy"] == "exact posterior,\nmost probable action"
    exact_labels = {
        c.name: c.label for c in study.plan(study.config("quick")).comparisons[0].contenders
    }
    assert exact_labels["bayes"] == "Bayes-optimal"
    assert "bayes_greedy" not in exact_labels


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--domain.contexts", "0"], "--domain.contexts 0: must be"),
        (["--domain.actions", "-2"], "--domain.actions -2: must be"),
        (["--domain.p-low", "1"], "--domain.p-low 1: must be below"),
        (["--domain.permutation", "True", "--domain.contexts", "4"], "with permutation"),
        (["--outer.batch", "12"], "--outer.batch 12: must be a multiple of 8"),
        (["--policy.scale", "0"], "--policy.scale 0: must"),
        (["--policy.most-contexts", "1"], "--policy.most-contexts 1: must be"),
        (["--actor-critic.baseline", "magic"], "magic"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, refused):
    refused([STUDY, *SMALL, *arguments], message)
