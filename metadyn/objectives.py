"""Objectives that meta-learners are trained on, with the metrics reported during training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from metadyn import inner
from metadyn.base import (
    Answer,
    Domain,
    Feedback,
    Key,
    Keys,
    Learner,
    MetaLearner,
    Params,
    Query,
    Sample,
)
from metadyn.errors import check, check_choice

Metrics = Mapping[str, Array]
"""Scalars by name. "loss" is the domain's mean loss, whose excess over Bayes is reported."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """Training loss as a function of the outer parameters and of one key per episode."""

    loss: Callable[[Params, Keys], tuple[Float[Array, ""], Metrics]]
    """`loss(params, keys)` returns the mean training loss over the episodes, and the metrics."""
    group: int = 1
    """Number of consecutive episodes that must stay together on one device."""
    at: Callable[[Int[Array, ""]], Objective] | None = None
    """Returns the objective at an outer step, for a curriculum, with the same group and the same
    metrics. None: this objective at every step."""

    def at_step(self, step: Int[Array, ""]) -> Objective:
        """Returns the objective at an outer step: the one that `at` gives, or this one."""
        return self.at(step).at_step(step) if self.at else self


ObjectiveOf = Callable[[Domain, MetaLearner], Objective]
Target = Literal["feedback", "bayes"]
"""Targets with which predictions can be compared in training (`prediction_loss`)."""


def prediction_loss(
    domain: Domain,
    meta: MetaLearner,
    teacher: Learner | None = None,
    sample: Sample | None = None,
    weight: Callable[[Key], Array] | None = None,
) -> Objective:
    """Makes an objective that minimises the domain's loss of each answer over whole episodes.

    For domains whose feedback does not depend on the answers. With a `teacher`, the answers are
    compared with the teacher's answers instead of the feedback; the metric "loss" is still that on
    the feedback. If the teacher is Bayes and the loss is squared error, the expected gradient is
    the same, because Bayes' answer is the mean of the feedback given the episode so far, but its
    variance is lower. (This does not hold if episodes are weighted by something that the learner
    cannot see, because the teacher's answer is unweighted.)

    `sample(key)` draws the tasks in place of the domain. `weight(key)`, for the same key, is the
    weight of an episode's losses, by default 1.
    """

    @inner.full_precision
    def teacher_answers(queries: Query, feedback: Feedback) -> Answer:
        """Returns the teacher's answers in one episode, in full precision whatever training has."""
        assert teacher is not None

        def step(state, pair):
            return teacher.update(state, *pair), teacher.predict(state, pair[0])

        return jax.lax.scan(step, teacher.init(jax.random.key(0)), (queries, feedback))[1]

    def loss(params: Params, keys: Keys) -> tuple[Array, Metrics]:
        queries, feedback = inner.observe(domain, keys, sample)
        answers = meta.unroll(params, queries, feedback)[:, : domain.answer_size]
        losses_to = lambda targets: jax.vmap(jax.vmap(domain.loss, -1))(answers, targets)
        targets = feedback
        if teacher is not None:
            targets = jax.vmap(teacher_answers, -1, -1)(queries, feedback)
        losses = losses_to(targets)
        if weight is not None:
            key_task = jax.vmap(jax.random.split)(keys)[:, 0]
            losses = losses * jax.vmap(weight)(key_task)
        return jnp.mean(losses), {"loss": jnp.mean(losses_to(feedback))}

    return Objective(loss)


def predicting(target: Target, bayes: Learner) -> ObjectiveOf:
    """Returns the function that makes the prediction objective for a study's configured target."""
    check_choice("target", target, Target)
    return partial(prediction_loss, teacher=bayes if target == "bayes" else None)


Immediate = Literal["expected", "sampled"]
Baseline = Literal["leave_one_out", "value", "none"]


@dataclasses.dataclass(frozen=True)
class ActorCriticConfig:
    """Settings of actor-critic training, for a policy that learns within the episode.

    All of them are our choice; `benchmarks/actor_critic.py` compares them with others.
    """

    discount: float = 0.7
    """Discount factor γ of rewards, per step."""
    entropy: float = 0.2
    """Weight of the policy's entropy, which keeps the policy from settling before the network has
    learned to remember."""
    annealed: bool = False
    """Whether the entropy's weight falls linearly to zero over the outer steps. A constant weight
    keeps the policy from ever becoming certain."""
    immediate: Immediate = "expected"
    """Immediate reward of an action: its expectation over actions, which the simulator knows and
    which has its own gradient, or the reward that was drawn."""
    baseline: Baseline = "leave_one_out"
    """Baseline subtracted from returns: the mean return of the group's other episodes at that step,
    corrected by the critic; the critic alone; or nothing."""
    group: int = 16
    """Number of episodes in a group."""
    value_weight: float = 0.5
    """Weight of the critic's squared error."""

    def __post_init__(self) -> None:
        check(0 <= self.discount <= 1, "discount", self.discount, "must be from 0 to 1")
        for field in ("entropy", "value_weight"):
            value = getattr(self, field)
            check(0 <= value < float("inf"), field, value, "must be 0 or more, and finite")
        check(self.group >= 2, "group", self.group, "must be at least 2")
        check_choice("immediate", self.immediate, Immediate)
        check_choice("baseline", self.baseline, Baseline)


def actor_critic(
    domain: Domain,
    meta: MetaLearner,
    config: ActorCriticConfig = ActorCriticConfig(),
    steps: int | None = None,
) -> Objective:
    """Makes an advantage actor-critic objective over whole episodes, with entropy regularisation.

    For any meta-learner with a head, the critic, and any domain whose answers are logits, whose
    feedback has an `action` and a `reward`, and whose loss is the policy's expected regret.

    The learner with the current parameters first acts in the episodes; its outputs in the same
    episodes are then differentiated. Let J_t be the expected reward of the policy at step t minus
    that of the correct action, and F_t = Σ_{s>t} γ^{s−t} J_s. Training ascends the gradient of

        mean_t [J_t + log π_t(a_t) · (F_t − b_t) + entropy · H(π_t)],

    with F and the baseline b (`ActorCriticConfig.baseline`) held fixed. The immediate reward of an
    action needs no sampling; the score function credits the action with the later rewards. With
    "sampled", rewards r_t replace J_t and the score function credits r_t + F_t. The critic is
    fitted to the credit, minus the mean of the group's other episodes with "leave_one_out". An
    annealed entropy weight reaches zero after `steps` outer steps. Raises `ConfigError` if
    `annealed` is set without `steps`, or if there is no head for the critic.
    """
    n = domain.answer_size
    check(meta.heads >= 1, "heads", meta.heads, "actor_critic needs at least 1, for the critic")
    check(steps or not config.annealed, "annealed", True, "actor_critic needs the outer `steps`")

    def loss(params: Params, keys: Keys, weight: Any = config.entropy) -> tuple[Array, Metrics]:
        stopped = jax.lax.stop_gradient
        learner = meta.learner(stopped(params))
        act = partial(inner.act, domain, learner)
        queries, feedback = stopped(jax.vmap(act, out_axes=-1)(keys))
        outputs = meta.unroll(params, queries, feedback)
        logits, values = outputs[:, :n], outputs[:, n]
        regret_of = inner.full_precision(domain.loss)
        regret = jax.vmap(jax.vmap(regret_of, -1))(logits, feedback)  # [T, B], as all below
        log_policy = jax.nn.log_softmax(logits, axis=1)
        log_chosen = jnp.take_along_axis(log_policy, feedback.action[:, None], axis=1)[:, 0]
        entropy = -jnp.sum(jnp.exp(log_policy) * log_policy, axis=1)
        expected = config.immediate == "expected"
        rewards = -stopped(regret) if expected else feedback.reward
        returns = discounted(rewards, config.discount)
        credit = returns - rewards if expected else returns
        baseline = jnp.zeros_like(credit)
        if config.baseline == "leave_one_out":
            baseline = mean_of_others(credit, config.group)
        advantage = credit - baseline
        critic_loss = jnp.mean((values - advantage) ** 2)
        if config.baseline != "none":
            advantage = advantage - stopped(values)
        gain = log_chosen * advantage + weight * entropy - (regret if expected else 0.0)
        metrics = {"loss": jnp.mean(regret), "critic": critic_loss, "entropy": jnp.mean(entropy)}
        return config.value_weight * critic_loss - jnp.mean(gain), metrics

    group = config.group if config.baseline == "leave_one_out" else 1

    def objective_at(step: Array) -> Objective:
        entropy_weight = config.entropy * jnp.maximum(1 - step / (steps or 1), 0)
        return Objective(partial(loss, weight=entropy_weight), group)

    return Objective(loss, group, objective_at if config.annealed else None)


def discounted(rewards: Float[Array, "T B"], discount: float) -> Float[Array, "T B"]:
    """Returns the discounted sum of rewards from each step on, Σ_{s≥t} γ^{s−t} r_s."""

    def add(later: Array, reward: Array) -> tuple[Array, Array]:
        return (reward + discount * later,) * 2

    return jax.lax.scan(add, jnp.zeros_like(rewards[0]), rewards, reverse=True)[1]


def mean_of_others(values: Float[Array, "T B"], group: int) -> Float[Array, "T B"]:
    """Averages, for each episode, the other episodes of its group of consecutive episodes."""
    grouped = values.reshape(len(values), -1, group)
    sum_of_others = grouped.sum(-1, keepdims=True) - grouped
    return (sum_of_others / (group - 1)).reshape(values.shape)
