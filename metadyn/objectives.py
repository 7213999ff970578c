"""Objectives: what a meta-learner is trained on, and what is reported of it as it trains."""

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
"""Scalars by name. "loss", the domain's mean loss, is what excess over Bayes is reported of."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised, as a function of outer parameters and of a key for each episode."""

    loss: Callable[[Params, Keys], tuple[Float[Array, ""], Metrics]]
    """`loss(params, keys)` is the mean over the episodes of what is minimised, and the metrics."""
    group: int = 1
    """Episodes that must be together on one device, in a row."""
    at: Callable[[Int[Array, ""]], Objective] | None = None
    """The objective of one outer step, for a curriculum: of the same group, with the same metrics.
    None: this one throughout."""

    def at_step(self, step: Int[Array, ""]) -> Objective:
        """Returns the objective at this outer step: that of `at`, if there is one, or this one."""
        return self.at(step).at_step(step) if self.at else self


ObjectiveOf = Callable[[Domain, MetaLearner], Objective]
Target = Literal["feedback", "bayes"]
"""What predictions are compared with in training (`prediction_loss`)."""


def prediction_loss(
    domain: Domain,
    meta: MetaLearner,
    teacher: Learner | None = None,
    sample: Sample | None = None,
    weight: Callable[[Key], Array] | None = None,
) -> Objective:
    """Trains on the domain's loss of each answer before its feedback, mean over whole episodes.

    For domains whose feedback does not depend on the answers. With a `teacher` the answers are
    compared with its answers instead of the feedback, and the loss on the feedback is reported. If
    the teacher is Bayes and the loss is squared error the expected gradient is the same, as Bayes'
    answer is the mean of the feedback given the episode so far; but it varies less. (Not so where
    episodes are weighted by what the learner cannot see: the teacher's answer is unweighted.)

    `sample(key)` draws the tasks, in the domain's place, and `weight(key)`, of the same key,
    says how much an episode's losses count: 1 without it.
    """

    @inner.full_precision
    def taught(queries: Query, feedback: Feedback) -> Answer:
        """Gives the teacher's answers in one episode, exact whatever training is rounded to."""
        assert teacher is not None

        def step(state, now):
            return teacher.update(state, *now), teacher.predict(state, now[0])

        return jax.lax.scan(step, teacher.init(jax.random.key(0)), (queries, feedback))[1]

    def loss(params: Params, keys: Keys) -> tuple[Array, Metrics]:
        queries, feedback = inner.observe(domain, keys, sample)
        answers = meta.unroll(params, queries, feedback)[:, : domain.answer_size]
        losses = lambda targets: jax.vmap(jax.vmap(domain.loss, -1))(answers, targets)
        targets = feedback if teacher is None else jax.vmap(taught, -1, -1)(queries, feedback)
        counted = losses(targets)
        if weight is not None:
            key_task = jax.vmap(jax.random.split)(keys)[:, 0]
            counted = counted * jax.vmap(weight)(key_task)
        return jnp.mean(counted), {"loss": jnp.mean(losses(feedback))}

    return Objective(loss)


def predicting(target: Target, bayes: Learner) -> ObjectiveOf:
    """Makes the objective of predicting either target, as studies configure it."""
    check_choice("target", target, Target)
    return partial(prediction_loss, teacher=bayes if target == "bayes" else None)


Immediate = Literal["expected", "sampled"]
Baseline = Literal["leave_one_out", "value", "none"]


@dataclasses.dataclass(frozen=True)
class ActorCriticConfig:
    """How a policy that learns within the episode is trained.

    All of it is our choice; `benchmarks/actor_critic.py` compares.
    """

    discount: float = 0.7
    """γ, of rewards one step later."""
    entropy: float = 0.2
    """Weight of the policy's entropy: it keeps the policy from settling before the network has
    learned to remember."""
    annealed: bool = False
    """Whether that weight falls to zero, linearly, over the outer steps; a weight that stays keeps
    the policy from ever being sure."""
    immediate: Immediate = "expected"
    """The reward of a choice: in expectation over actions, which the simulator knows and which
    has a gradient of its own; or as it was drawn."""
    baseline: Baseline = "leave_one_out"
    """What returns are compared with: the mean return of the group's other episodes at that step,
    corrected by the critic; the critic alone; or nothing."""
    group: int = 16
    """Episodes in a group."""
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
    """Trains by advantage actor-critic through whole episodes, with entropy regularisation.

    For any meta-learner with a head, the critic, and any domain whose answers are logits, whose
    feedback has an `action` and a `reward`, and whose loss is the policy's expected regret.

    Episodes are acted out first, by the learner that the parameters are; then the outputs of the
    same episodes are differentiated. With J_t the expected reward of the policy at step t, less
    that of the correct action, and F_t = Σ_{s>t} γ^{s−t} J_s, the gradient ascended is that of

        mean_t [J_t + log π_t(a_t) · (F_t − b_t) + entropy · H(π_t)],

    F and the baseline b (`ActorCriticConfig.baseline`) held fixed: what a choice pays at once needs
    no sampling, and what it teaches is credited by the score function. With "sampled", rewards r_t
    stand for J_t and the score function credits r_t + F_t. The critic learns what is credited, with
    "leave_one_out" less the mean of the group's other episodes. An annealed weight of the
    entropy falls for `steps` outer steps. Raises `ConfigError` if it is not told how many, and if
    there is no head for the critic.
    """
    n = domain.answer_size
    check(meta.heads >= 1, "heads", meta.heads, "actor_critic needs 1, for the critic")
    check(steps or not config.annealed, "annealed", True, "actor_critic needs the outer `steps`")

    def loss(params: Params, keys: Keys, weight: Any = config.entropy) -> tuple[Array, Metrics]:
        fixed = jax.lax.stop_gradient
        learner = meta.learner(fixed(params))
        queries, seen = fixed(jax.vmap(partial(inner.act, domain, learner), out_axes=-1)(keys))
        outputs = meta.unroll(params, queries, seen)
        logits, values = outputs[:, :n], outputs[:, n]
        lost = inner.full_precision(domain.loss)
        regret = jax.vmap(jax.vmap(lost, -1))(logits, seen)  # [T, B], as all below
        log_policy = jax.nn.log_softmax(logits, axis=1)
        chosen = jnp.take_along_axis(log_policy, seen.action[:, None], axis=1)[:, 0]
        entropy = -jnp.sum(jnp.exp(log_policy) * log_policy, axis=1)
        expected = config.immediate == "expected"
        rewards = -fixed(regret) if expected else seen.reward
        returns = discounted(rewards, config.discount)
        credit = returns - rewards if expected else returns
        others = jnp.zeros_like(credit)
        if config.baseline == "leave_one_out":
            others = mean_of_others(credit, config.group)
        advantage = credit - others
        critic = jnp.mean((values - advantage) ** 2)
        if config.baseline != "none":
            advantage = advantage - fixed(values)
        gain = chosen * advantage + weight * entropy - (regret if expected else 0.0)
        metrics = {"loss": jnp.mean(regret), "critic": critic, "entropy": jnp.mean(entropy)}
        return config.value_weight * critic - jnp.mean(gain), metrics

    group = config.group if config.baseline == "leave_one_out" else 1

    def at(step: Array) -> Objective:
        left = config.entropy * jnp.maximum(1 - step / (steps or 1), 0)
        return Objective(partial(loss, weight=left), group)

    return Objective(loss, group, at if config.annealed else None)


def discounted(rewards: Float[Array, "T B"], discount: float) -> Float[Array, "T B"]:
    """Sums discounted rewards, Σ_{s≥t} γ^{s−t} r_s, from each step on."""

    def add(after: Array, r: Array) -> tuple[Array, Array]:
        return (r + discount * after,) * 2

    return jax.lax.scan(add, jnp.zeros_like(rewards[0]), rewards, reverse=True)[1]


def mean_of_others(values: Float[Array, "T B"], group: int) -> Float[Array, "T B"]:
    """Averages, for each episode, the others of its group; a group is consecutive episodes."""
    grouped = values.reshape(len(values), -1, group)
    rest = grouped.sum(-1, keepdims=True) - grouped
    return (rest / (group - 1)).reshape(values.shape)
