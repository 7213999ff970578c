"""The outer loop: trains a meta-learner's parameters by back-propagation through whole episodes.

Many outer steps run in one dispatch of one compiled program; tasks are sampled on the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from metadyn import inner, mesh, prng
from metadyn.base import (
    ConfigError,
    Domain,
    Key,
    Keys,
    MetaLearner,
    Params,
    check,
    check_positive,
    indexed_keys,
)
from metadyn.domains.bandit import ContextualBandit
from metadyn.learners.gradient import named_optimizer
from metadyn.learners.lstm import LSTMMetaLearner

Objective = Callable[[Params, Keys], tuple[Float[Array, ""], Float[Array, ""]]]
"""Of a batch of episodes, one for each key: what is minimised, and the domain's own mean loss."""


@dataclasses.dataclass(frozen=True)
class OuterConfig:
    """How the outer loop optimises.

    The paper's values are not known to us: these are our choice.
    """

    steps: int = 16_000
    """Outer steps."""
    batch: int = 32
    """Episodes in one outer step."""
    seeds: int = 4
    """Meta-learners trained side by side, each from its own initial weights on its own episodes."""
    optimizer: str = "adam"
    """An optimiser of optax, by name."""
    learning_rate: float = 2e-2
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """From the peak to zero, after the warm-up; or constant."""
    warmup: int = 200
    """Outer steps in which the learning rate rises from zero to its peak."""
    clip: float = 1.0
    """Greatest norm of the gradient."""
    checkpoints: int = 25
    """Log-spaced outer steps, beside step 0, at which state and mode trajectories are stored."""
    dispatch: int = 100
    """Outer steps in one dispatch to the devices: how often progress is shown."""

    def __post_init__(self) -> None:
        positive = "steps batch seeds learning_rate clip checkpoints dispatch"
        check_positive(self, *positive.split())
        right = 0 <= self.warmup < self.steps
        check(right, "warmup", self.warmup, f"must be from 0 to below steps = {self.steps}")
        schedules = ("cosine", "linear", "constant")
        check(self.schedule in schedules, "schedule", self.schedule, f"choose from {schedules}")
        self.transformation()

    @property
    def checkpoint_steps(self) -> tuple[int, ...]:
        """The outer steps at which state and mode trajectories are stored, from 0 to `steps`."""
        return inner.log_spaced(self.steps, self.checkpoints)

    def check_batch(self, trainees: Iterable[Trainee]) -> None:
        """Raises `ConfigError` unless the batch is of as many episodes as each takes together, and
        the devices can share them."""
        for each in trainees:
            fix = f"must be a multiple of {each.together}, which the objective takes together"
            check(self.batch % each.together == 0, "batch", self.batch, fix)
            mesh.shares(self.seeds, self.batch, each.together)

    def transformation(self) -> optax.GradientTransformation:
        """Clipping, then the optimiser under its schedule."""
        decay = {
            "cosine": optax.cosine_decay_schedule(self.learning_rate, self.steps - self.warmup),
            "linear": optax.linear_schedule(self.learning_rate, 0.0, self.steps - self.warmup),
            "constant": optax.constant_schedule(self.learning_rate),
        }[self.schedule]
        rise = optax.linear_schedule(0.0, self.learning_rate, max(self.warmup, 1))
        rate = optax.join_schedules([rise, decay], [self.warmup])
        return optax.chain(
            optax.clip_by_global_norm(self.clip), named_optimizer(self.optimizer, rate)
        )


class TrainState(NamedTuple):
    """All that training goes on from. Leaves of params and moments have a leading seed axis."""

    step: Int[Array, ""]
    params: dict[str, Params]
    """By the name of the meta-learner."""
    moments: dict[str, Any]


class Trainee(NamedTuple):
    """A meta-learner and what it is trained on."""

    meta: MetaLearner
    objective: Objective
    together: int = 1
    """Episodes that the objective needs on one device, in a row."""
    optimizer: optax.GradientTransformation | None = None
    """Its own optimiser. None: that of the `OuterConfig`."""


def prediction_loss(domain: Domain, meta: MetaLearner) -> Objective:
    """The domain's loss of the answers given before each feedback, mean over steps and episodes.

    For domains whose feedback does not depend on the answers.
    """

    def objective(params: Params, keys: Keys) -> tuple[Array, Array]:
        queries, feedback = inner.observe(domain, keys)
        answers = meta.unroll(params, queries, feedback)
        loss = jnp.mean(jax.vmap(jax.vmap(domain.loss, -1))(answers, feedback))
        return loss, loss

    return objective


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
    immediate: Literal["expected", "sampled"] = "expected"
    """The reward of a choice: in expectation over actions, which the simulator knows and which
    has a gradient of its own; or as it was drawn."""
    baseline: Literal["leave_one_out", "value", "none"] = "leave_one_out"
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


def actor_critic(
    domain: ContextualBandit, meta: LSTMMetaLearner, config: ActorCriticConfig
) -> Trainee:
    """Advantage actor-critic through the whole episode, with entropy regularisation.

    Episodes are acted out first, by the learner that the parameters are; then the outputs of the
    same episodes are differentiated. With J_t the expected reward of the policy at step t and
    F_t = Σ_{s>t} γ^{s−t} J_s, the gradient ascended is that of

        mean_t [J_t + log π_t(a_t) · (F_t − b_t) + entropy · H(π_t)],

    F and b held fixed: what a choice pays at once needs no sampling, and what it teaches is
    credited by the score function. With "sampled", rewards r_t stand for J_t and the score function
    credits r_t + F_t. `meta` must have a critic, which learns F_t minus the group's mean.
    """
    n = domain.answer_size

    def objective(params: Params, keys: Keys) -> tuple[Array, Array]:
        fixed = jax.lax.stop_gradient
        learner = meta.learner(fixed(params))
        queries, seen = fixed(jax.vmap(partial(inner.act, domain, learner), out_axes=-1)(keys))
        outputs = meta.outputs(params, queries, seen)
        logits, values = outputs[:, :n], outputs[:, n]
        loss = jax.vmap(jax.vmap(domain.loss, -1))(logits, seen)  # [T, B], as all below
        log_policy = jax.nn.log_softmax(logits, axis=1)
        chosen = jnp.take_along_axis(log_policy, seen.action[:, None], axis=1)[:, 0]
        entropy = -jnp.sum(jnp.exp(log_policy) * log_policy, axis=1)
        expected = config.immediate == "expected"
        rewards = -fixed(loss) if expected else seen.reward
        returns = discounted(rewards, config.discount)
        credit = returns - rewards if expected else returns
        others = jnp.zeros_like(credit)
        if config.baseline == "leave_one_out":
            others = mean_of_others(credit, config.group)
        advantage = credit - others
        critic = jnp.mean((values - advantage) ** 2)
        if config.baseline != "none":
            advantage = advantage - fixed(values)
        gain = chosen * advantage + config.entropy * entropy - (loss if expected else 0.0)
        return config.value_weight * critic - jnp.mean(gain), jnp.mean(loss)

    together = config.group if config.baseline == "leave_one_out" else 1
    return Trainee(meta, objective, together)


def discounted(rewards: Float[Array, "T B"], discount: float) -> Float[Array, "T B"]:
    """Returns Σ_{s≥t} γ^{s−t} r_s."""
    nothing = jnp.zeros_like(rewards[0])
    add = lambda after, r: (r + discount * after,) * 2  # noqa: E731
    return jax.lax.scan(add, nothing, rewards, reverse=True)[1]


def mean_of_others(values: Float[Array, "T B"], group: int) -> Float[Array, "T B"]:
    """For each episode the mean over the others of its group; groups are episodes in a row."""
    grouped = values.reshape(len(values), -1, group)
    rest = grouped.sum(-1, keepdims=True) - grouped
    return (rest / (group - 1)).reshape(values.shape)


def _gradient(trainee: Trainee, params: Params, keys: Keys) -> tuple[Params, Float[Array, ""]]:
    """Of the objective over all episodes, and the mean loss, some episodes at a time."""
    some = mesh.at_a_time(len(keys), trainee.together)
    gradient = jax.grad(trainee.objective, has_aux=True)
    if some == len(keys):
        return gradient(params, keys)

    def add(total, keys):
        return jax.tree.map(jnp.add, total, gradient(params, keys)), None

    nothing = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()))
    total, _ = jax.lax.scan(add, nothing, keys.reshape(-1, some))
    return jax.tree.map(lambda leaf: leaf * (some / len(keys)), total)


class Trainer:
    """The compiled outer loop: meta-learners, by name, that are trained side by side.

    All take their initial weights and their episodes from the same keys, so that differences
    between them are differences of what they are and what they are trained on.
    """

    def __init__(self, trainees: Mapping[str, Trainee], config: OuterConfig, key: Key):
        self.config = config
        config.check_batch(trainees.values())
        optimizers = {n: t.optimizer or config.transformation() for n, t in trainees.items()}
        key_init, key_episodes = jax.random.split(prng.fast(key))
        seeds = jnp.arange(config.seeds)

        def init() -> TrainState:
            keys = indexed_keys(key_init, seeds)
            params = {name: jax.vmap(t.meta.init)(keys) for name, t in trainees.items()}
            moments = {name: jax.vmap(optimizers[name].init)(p) for name, p in params.items()}
            return TrainState(jnp.zeros((), jnp.int32), params, moments)

        def advance(
            state: TrainState, count: Int[Array, ""]
        ) -> tuple[TrainState, dict[str, Array]]:
            def one_seed(trainee, optimizer, now, one):
                key, params, moments = one
                step, count = now

                def outer_step(i, carry):
                    params, moments, total = carry
                    key_step = jax.random.fold_in(key, step + i)
                    keys = indexed_keys(key_step, mesh.my_share(config.batch))
                    gradient, loss = mesh.mean(_gradient(trainee, params, keys))
                    updates, moments = optimizer.update(gradient, moments, params)
                    return optax.apply_updates(params, updates), moments, total + loss

                start = (params, moments, jnp.zeros(()))
                params, moments, total = jax.lax.fori_loop(0, count, outer_step, start)
                return params, moments, total / count

            keys = indexed_keys(key_episodes, seeds)
            params, moments, loss = {}, {}, {}
            for name, trainee in trainees.items():
                params[name], moments[name], loss[name] = mesh.train_seeds(
                    partial(one_seed, trainee, optimizers[name]),
                    (state.step, count),
                    (keys, state.params[name], state.moments[name]),
                    config.seeds,
                    config.batch,
                    trainee.together,
                )
            return TrainState(state.step + count, params, moments), loss

        # Computed on one device: batched decompositions on several CPU devices at once, as in
        # orthogonal initialisation, can wait for each other's threads for ever (jaxlib 0.10.2).
        self.init = lambda: mesh.replicate(jax.jit(init)())
        """The state at outer step 0."""
        self.abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=mesh.replicated()),
            jax.eval_shape(init),
        )
        """The shapes, types and placement of a state."""
        self.advance = jax.jit(advance, donate_argnums=0, out_shardings=mesh.replicated())
        """`advance(state, count)`: `count` outer steps on; (state, mean loss of each seed by name).
        The state passed in is consumed. Compiled once for all counts."""

    def run(
        self, state: TrainState, targets: Sequence[int]
    ) -> Iterator[tuple[TrainState, dict[str, Array]]]:
        """Yields (state, mean loss of each seed by name) after each dispatch and at every target.

        `targets` are outer steps in increasing order; those already passed are skipped. Raises
        `ConfigError` when a loss is not finite.
        """
        step = int(state.step)
        for target in targets:
            while step < target:
                count = min(self.config.dispatch, target - step)
                state, loss = self.advance(state, jnp.int32(count))
                step += count
                if not all(np.isfinite(each).all() for each in loss.values()):
                    raise ConfigError(
                        f"learning_rate = {self.config.learning_rate!r}: the loss is no longer "
                        f"finite at outer step {step}; lower it"
                    )
                yield state, loss
