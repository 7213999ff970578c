"""Domain 3, contextual bandits: in each context one action pays.

After Schaul et al. (2019), arXiv:1904.11455, and Rabinowitz (2019), arXiv:1905.01320. The modes of
a task are its contexts. They are exchangeable, so order them within each run before averaging.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from metadyn.base import STRENGTH, Key, Modes, Probe, TaskSet, cached_concrete
from metadyn.errors import ConfigWarning, check, check_positive


class BanditTask(NamedTuple):
    """The correct action a*_c of each context."""

    best: Int[Array, " K"]


class Outcome(NamedTuple):
    """The outcome of one choice: its context, action and reward, and what each action pays.

    `pay` is for simulators and referees. A learner that reads it knows the answer.
    """

    context: Int[Array, ""]
    action: Int[Array, ""]
    reward: Float[Array, ""]
    pay: Float[Array, "K n"]
    """Expected reward of every action in every context."""


@dataclasses.dataclass(frozen=True)
class ContextualBandit:
    """K contexts × n actions: in context c the action a*_c pays with p_high, any other with p_low.

    The reward is 1 if the action pays and 0 otherwise. Each step draws a context uniformly. A
    learner's answer is the logits of a policy, from which an action is drawn. Raises `ConfigError`
    for K or T below 1, n below 2, p_low ≥ p_high, probabilities outside [0, 1], and for
    permutations with K > n.
    """

    contexts: int = 5
    """Number of contexts, K."""
    actions: int = 5
    """Number of actions, n."""
    steps: int = 50
    """Number of choices in one episode, T."""
    p_high: float = 1.0
    """Probability that the correct action pays. With 1, and p_low = 0, pay is deterministic."""
    p_low: float = 0.0
    """Probability that any other action pays."""
    permutation: bool = False
    """Whether no two contexts share a correct action. Otherwise each is drawn independently."""

    def __post_init__(self) -> None:
        check_positive(self, "contexts", "steps")
        check(self.actions >= 2, "actions", self.actions, "must be at least 2, to choose from")
        check(0 <= self.p_low <= 1, "p_low", self.p_low, "must be from 0 to 1")
        check(0 <= self.p_high <= 1, "p_high", self.p_high, "must be from 0 to 1")
        hint = f"must be below p_high = {self.p_high:g}"
        check(self.p_low < self.p_high, "p_low", self.p_low, hint)
        valid = not self.permutation or self.contexts <= self.actions
        hint = f"with permutation there must be no more than actions = {self.actions}"
        check(valid, "contexts", self.contexts, hint)
        if self.steps < self.contexts:
            text = f"steps = {self.steps}: too few to see each of the {self.contexts} contexts once"
            warnings.warn(text, ConfigWarning, stacklevel=2)

    @property
    def deterministic(self) -> bool:
        """Returns whether one try tells if an action is correct."""
        return self.p_high == 1 and self.p_low == 0

    # The contract of `base.Domain`.

    loss_floor = 0.0
    """Regret of a learner that knows the task."""

    @property
    def answer_size(self) -> int:
        """Returns the length of one answer: the logits of n actions."""
        return self.actions

    def sample_task(self, key: Key) -> BanditTask:
        """Draws the correct actions, independently or from a random permutation."""
        K, n = self.contexts, self.actions
        if self.permutation:
            return BanditTask(jax.random.permutation(key, n)[:K])
        return BanditTask(jax.random.randint(key, (K,), 0, n))

    def query(self, task: BanditTask, key: Key) -> Int[Array, ""]:
        """Draws a context uniformly."""
        return jax.random.randint(key, (), 0, self.contexts)

    def pay(self, task: BanditTask) -> Float[Array, "K n"]:
        """Returns the expected reward of every action in every context."""
        correct = jax.nn.one_hot(task.best, self.actions)
        return self.p_low + (self.p_high - self.p_low) * correct

    def feedback(
        self, task: BanditTask, query: Int[Array, ""], answer: Float[Array, " n"], key: Key
    ) -> Outcome:
        """Draws an action from the policy softmax(answer), and whether it pays."""
        key_action, key_reward = jax.random.split(key)
        # Inverting the cumulative distribution takes one draw, whereas Gumbel's trick takes n.
        below = jnp.cumsum(jax.nn.softmax(answer))[:-1] <= jax.random.uniform(key_action)
        action, pay = jnp.sum(below, dtype=jnp.int32), self.pay(task)
        paid = jax.random.uniform(key_reward) < pay[query, action]
        return Outcome(query, action, paid.astype(jnp.float32), pay)

    def loss(self, answer: Float[Array, " n"], feedback: Outcome) -> Float[Array, ""]:
        """Computes the regret: the expected reward of the correct action minus the policy's."""
        return self.p_high - jax.nn.softmax(answer) @ feedback.pay[feedback.context]

    def encode_query(self, query: Int[Array, ""]) -> Float[Array, " K"]:
        """Encodes the context as a one-hot vector [K]."""
        return jax.nn.one_hot(query, self.contexts)

    def encode_feedback(self, feedback: Outcome) -> Float[Array, " m"]:
        """Encodes the action as a one-hot vector, followed by the reward [n + 1]."""
        action = jax.nn.one_hot(feedback.action, self.actions)
        return jnp.append(action, feedback.reward)

    def evaluation(self, points: int = 0) -> TaskSet:
        """Returns tasks of the training distribution; `points` is ignored."""
        return TaskSet("in_distribution", self, probes={STRENGTH: self.probe()})

    # The probe.

    @cached_concrete
    def probe(self) -> Probe:
        """Makes the probe that reads the policy in every context, from a copy of the state.

        The strengths [K] are J_c = π(a*_c | c), the probability of the correct action.
        """

        def read(task: BanditTask, answers: Float[Array, "K n"]) -> dict[str, Array]:
            policy = jax.nn.softmax(answers)
            return {"strength": jnp.take_along_axis(policy, task.best[:, None], 1)[:, 0]}

        ranks = tuple(range(1, self.contexts + 1))
        strength = "$J_c$, probability of the\ncorrect action"
        label = "context, in order\nof learning"
        modes = Modes(ranks, label, "rank", exchangeable=True, p=0.8, strength=strength)
        return Probe(jnp.arange(self.contexts), read, modes)
