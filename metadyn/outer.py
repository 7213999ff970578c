"""The outer loop: trains a meta-learner's parameters by back-propagation through whole episodes.

Many outer steps run in one dispatch of one compiled program; tasks are sampled on the device.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from metadyn import inner, mesh, prng
from metadyn.base import Key, Keys, MetaLearner, Params, indexed_keys
from metadyn.errors import check, check_choice, check_positive, error_context
from metadyn.objectives import Metrics, Objective
from metadyn.optimizers import Schedule, named_optimizer, scheduled

Precision = Literal["float32", "tensorfloat32", "bfloat16"]
DISPATCH_SECONDS = 2.0
"""Seconds that a dispatch of several outer steps takes at most: signals are heard in between."""


@dataclasses.dataclass(frozen=True)
class OuterConfig:
    """How the outer loop optimises.

    The paper's values are not known to us: these are our choice. Raises `ConfigError` for values
    that cannot be.
    """

    steps: int = 16_000
    """Outer steps."""
    batch: int = 32
    """Episodes in one update of each seed of each meta-learner, over all devices."""
    updates_per_step: int = 1
    """Updates in one outer step, each on a batch of its own. With more than 1 of its own, one
    meta-learner is trained for longer than those beside it. Warm-up and schedule count updates;
    objectives that change go by outer steps."""
    seeds: int = 4
    """Meta-learners trained side by side, each from its own initial weights on its own episodes."""
    optimizer: str = "adam"
    """An optimiser of optax, by name."""
    learning_rate: float = 2e-2
    """Peak learning rate."""
    b2: float | None = None
    """Decay of the second moment, of optimisers that have one. None: optax's default."""
    schedule: Schedule = "cosine"
    """From the peak to zero, after the warm-up; or constant."""
    warmup: int = 200
    """Updates in which the learning rate rises from zero to its peak; by default, outer steps."""
    clip: float = 1.0
    """Greatest norm of the gradient."""
    checkpoints: int = 25
    """Log-spaced outer steps, beside step 0, at which state and mode trajectories are stored."""
    dispatch: int = 100
    """Outer steps in one call to the devices; fewer, if so many would take more than 2 seconds.
    Progress is shown after each call."""
    precision: Precision = "float32"
    """What products in training are rounded to on GPUs and TPUs, in the words of
    `jax.default_matmul_precision`; CPUs round nothing, and measurements are float32 everywhere.
    GPUs take tensorfloat32 for bfloat16 too, TPUs three bfloat16 products for tensorfloat32."""

    def __post_init__(self) -> None:
        positive = "steps batch updates_per_step seeds learning_rate clip checkpoints dispatch"
        check_positive(self, *positive.split())
        most = inner.MOST_TIMES
        check(self.checkpoints <= most, "checkpoints", self.checkpoints, f"at most {most:,}")
        fix = f"must be below {2**31} / steps = {2**31 // self.steps}"
        right = self.steps * self.updates_per_step < 2**31
        check(right, "updates_per_step", self.updates_per_step, fix)
        right = isinstance(self.warmup, Integral) and 0 <= int(self.warmup) < self.steps
        check(right, "warmup", self.warmup, f"must be from 0 to below steps = {self.steps}")
        check_choice("schedule", self.schedule, Schedule)
        right = self.b2 is None or (isinstance(self.b2, Real) and 0 < float(self.b2) < 1)
        check(right, "b2", self.b2, "must be above 0 and below 1")
        check_choice("precision", self.precision, Precision)
        self.transformation(self.steps)

    @property
    def checkpoint_steps(self) -> tuple[int, ...]:
        """Lists the outer steps at which state and mode trajectories are stored: 0 to `steps`."""
        return inner.log_spaced(self.steps, self.checkpoints)

    def check_batch(self, trained: Iterable[MetaTraining]) -> None:
        """Raises `ConfigError` unless the batch is of whole groups that the devices can share."""
        for each in trained:
            group, batch = each.objective.group, each.settings(self).batch
            fix = f"must be a multiple of {group}: the objective takes so many episodes together"
            each.check(batch % group == 0, "batch", self, fix)
            mesh.shares(self.seeds, batch, group, each.option("batch"))

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """Makes the optimiser, after clipping, under its schedule over so many updates."""
        warmup = min(self.warmup, steps - 1)
        rate = scheduled(self.learning_rate, self.schedule, warmup, steps)
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            named_optimizer(self.optimizer, rate, b2=self.b2),
        )


class TrainState(NamedTuple):
    """The state of training. Leaves of params and moments have a leading seed axis."""

    step: Int[Array, ""]
    params: dict[str, Params]
    """By the name of the meta-learner."""
    moments: dict[str, Any]

    def only(self, name: str) -> TrainState:
        """Returns the state of one meta-learner alone."""
        return TrainState(self.step, {name: self.params[name]}, {name: self.moments[name]})


class MetaTraining(NamedTuple):
    """A meta-learner, the objective it is trained on, and settings of its own, if it has any."""

    meta: MetaLearner
    objective: Objective
    own: OuterConfig | None = None
    """Settings in place of the outer loop's: its own optimiser, batch and updates in each step. The
    number of steps stays the run's. None: the outer loop's settings."""
    options: Mapping[str, str] | None = None
    """The options that set fields of `own`, by field, for messages."""

    def settings(self, outer: OuterConfig) -> OuterConfig:
        """Returns the settings that it is trained by: its own, or those of the whole outer loop."""
        return self.own or outer

    def check(self, holds: Any, field: str, outer: OuterConfig, fix: str) -> None:
        """Raises `ConfigError`, naming the option and the value of a field, unless `holds`."""
        check(holds, self.option(field), getattr(self.settings(outer), field), fix)

    def check_traced(self, name: str, params: Params) -> None:
        """Raises `ConfigError` unless the objective gives a loss and metrics, each one number.

        At every outer step alike. It is traced, not computed, for outer parameters of which shapes
        are enough.
        """
        group = self.objective.group
        keys = jax.eval_shape(lambda key: jax.random.split(key, group), jax.random.key(0))

        def numbers(loss: Any, *given: Any) -> list[str]:
            lost, metrics = jax.eval_shape(loss, *given, params, keys)
            for what, value in [("loss", lost), *metrics.items()]:
                check(value.shape == (), what, f"of shape {value.shape}", "must be one number")
                real = jnp.issubdtype(value.dtype, jnp.floating)
                check(real, what, f"of type {value.dtype}", "must be a floating-point number")
            return [f"{what}: {value.dtype}" for what, value in sorted(metrics.items())]

        with error_context(f"the objective of {name} cannot be computed"):
            usual = numbers(self.objective.loss)
            if self.objective.at is not None:
                at = lambda step, *given: self.objective.at_step(step).loss(*given)
                found = numbers(at, jnp.int32(0))
                fix = f"at an outer step they must be {usual}, too"
                check(found == usual, "metrics", found, fix)

    def option(self, field: str) -> str:
        """Names the option that sets a field of its outer loop, for messages."""
        group = "outer" if self.own is None or self.options else "own"
        return (self.options or {}).get(field, f"{group}.{field}")


def _gradient(
    objective: Objective, params: Params, keys: Keys, cached: int = mesh.CACHED_EPISODES
) -> tuple[Params, Metrics]:
    """The gradient over all episodes, and the mean metrics, some episodes at a time."""
    some = mesh.microbatch(len(keys), objective.group, cached)
    gradient = jax.grad(objective.loss, has_aux=True)
    if some == len(keys):
        return gradient(params, keys)

    def add(total, keys):
        return jax.tree.map(jnp.add, total, gradient(params, keys)), None

    _, metrics = jax.eval_shape(objective.loss, params, keys[:some])
    nothing = jax.tree.map(jnp.zeros_like, (params, metrics))
    total, _ = jax.lax.scan(add, nothing, keys.reshape(-1, some))
    return jax.tree.map(lambda leaf: leaf * (some / len(keys)), total)


def _at_rates(updates: Params, meta: MetaLearner) -> Params:
    """Multiplies updates by a meta-learner's own `rates`, if it has any."""
    rates = getattr(meta, "rates", None)
    if rates is None:
        return updates
    return jax.tree.map(lambda u, rate: u if rate == 1 else rate * u, updates, rates)


class OuterLoop:
    """The compiled outer loop: meta-learners, by name, that are trained side by side.

    All take their initial weights and their episodes from the same keys, so that differences
    between them are differences of what they are and what they are trained on. Raises `ConfigError`
    for a batch that cannot be shared by the devices.
    """

    def __init__(self, trained: Mapping[str, MetaTraining], config: OuterConfig, key: Key):
        self.config, self.trained = config, trained
        self.settings = {name: each.settings(config) for name, each in trained.items()}
        """The settings that each meta-learner is trained by, by its name."""
        config.check_batch(trained.values())
        optimizers = {
            name: own.transformation(config.steps * own.updates_per_step)
            for name, own in self.settings.items()
        }
        key_init, key_episodes = jax.random.split(prng.fast(key))
        seeds = jnp.arange(config.seeds)

        @inner.full_precision
        def init() -> TrainState:
            keys = indexed_keys(key_init, seeds)
            params = {name: jax.lax.map(t.meta.init, keys) for name, t in trained.items()}
            moments = {name: jax.vmap(optimizers[name].init)(p) for name, p in params.items()}
            return TrainState(jnp.zeros((), jnp.int32), params, moments)

        @jax.default_matmul_precision(config.precision)
        def one_seed(name, now, one):
            objective, optimizer = trained[name].objective, optimizers[name]
            key, params, moments = one
            meta = trained[name].meta
            cached = mesh.cached_episodes(meta)
            step, count = now
            own = self.settings[name]

            def episodes(i):
                share = mesh.local_episodes(own.batch)
                return indexed_keys(jax.random.fold_in(key, step + i), share)

            def outer_step(i, carry):
                params, moments, total = carry
                n = own.updates_per_step
                current = objective.at_step((step + i) // n if n > 1 else step + i)
                gradient, metrics = mesh.mean(_gradient(current, params, episodes(i), cached))
                updates, moments = optimizer.update(gradient, moments, params)
                updates = _at_rates(updates, meta)
                total = jax.tree.map(jnp.add, total, metrics)
                return optax.apply_updates(params, updates), moments, total

            _, metrics = jax.eval_shape(objective.loss, params, episodes(0))
            nothing = jax.tree.map(jnp.zeros_like, metrics)
            params, moments, total = jax.lax.fori_loop(
                0, count, outer_step, (params, moments, nothing)
            )
            return params, moments, jax.tree.map(lambda leaf: leaf / jnp.maximum(count, 1), total)

        def advance(
            state: TrainState, count: Int[Array, ""]
        ) -> tuple[TrainState, dict[str, Metrics]]:
            (name,), now = state.params, (state.step, count)
            stacked = self.keys(), state.params[name], state.moments[name]
            shared = self.settings[name].batch, trained[name].objective.group
            each = mesh.train_seeds(partial(one_seed, name), now, stacked, config.seeds, *shared)
            params, moments, metrics = ({name: found} for found in each)
            return TrainState(state.step + count, params, moments), metrics

        self.keys = lambda: indexed_keys(key_episodes, seeds)
        """The key of each seed's episodes."""
        self.one_seed = one_seed
        """`one_seed(name, (step, count), (key, params, moments))`: outer steps of one seed of a
        meta-learner, inside `mesh.train_seeds`; (params, moments, mean metrics)."""
        self.starting = jax.jit(init, out_shardings=mesh.one_device())
        """The program that makes the state at outer step 0."""
        # Computed on one device, one seed at a time: decompositions in batches, or on several CPU
        # devices at once, as in orthogonal initialisation, can wait for each other's threads for
        # ever (jaxlib 0.10.2).
        self.init = lambda: mesh.replicate(self.starting())
        """The state at outer step 0."""
        self.abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=mesh.replicated()),
            jax.eval_shape(self.starting),
        )
        """The shapes, types and placement of a state."""
        self.advance = jax.jit(advance, donate_argnums=0, out_shardings=mesh.replicated())
        """`advance(state, count)`: `count` updates on, of the one meta-learner that the state is of
        (`TrainState.only`); (state, mean metrics of each seed). The state passed in is consumed.
        Compiled once for all counts, and for each meta-learner."""
        self.compiled = functools.cache(
            lambda name: self.advance.lower(self.abstract.only(name), jnp.int32(1)).compile()
        )
        """`advance` for the state of one meta-learner, by its name (`jax.stages.Compiled`)."""
        self.seconds = dict.fromkeys(trained, 0.0)
        """Seconds that `run` has trained each meta-learner, compiling left out."""
        self.pace = 0.0
        """Seconds that each outer step took in the last dispatch; 0 before the first."""

    def run(
        self, state: TrainState, target: int
    ) -> Iterator[tuple[TrainState, dict[str, Metrics]]]:
        """Yields (state, metrics by meta-learner) after each dispatch, up to outer step `target`.

        A metric [seed] is the mean over the outer steps of the dispatch, each before its update.
        Raises `ConfigError` when one is not finite.
        """
        step = int(state.step)
        while step < target:
            count = self.dispatched(target - step)
            begun = sum(self.seconds.values())
            params, moments = state.params, state.moments
            metrics: dict[str, Metrics] = {}
            for name in self.trained:  # each by itself, so that its time is known
                advance, times = self.compiled(name), self.settings[name].updates_per_step
                # Its step counts updates, and is a new array, as the state is consumed.
                alone = state.only(name)._replace(step=times * state.step)
                updates = jnp.int32(times * count)
                start = time.perf_counter()
                now, found = jax.block_until_ready(advance(alone, updates))
                self.seconds[name] += time.perf_counter() - start
                params, moments = params | now.params, moments | now.moments
                metrics |= found
            self.pace = (sum(self.seconds.values()) - begun) / count
            step, state = step + count, TrainState(state.step + count, params, moments)
            self.check_finite(step, metrics)
            yield state, metrics

    def dispatched(self, left: int) -> int:
        """Chooses the outer steps in the next dispatch, of so many that are left, by its pace."""
        most = max(1, int(DISPATCH_SECONDS / self.pace)) if self.pace else left
        return mesh.broadcast(min(self.config.dispatch, left, most))

    @property
    def episodes(self) -> int:
        """Counts the episodes in one outer step, of all seeds and meta-learners."""
        each = (own.batch * own.updates_per_step for own in self.settings.values())
        return self.config.seeds * sum(each)

    def check_finite(self, step: int, metrics: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises `ConfigError`, which names the learning rate, when a metric is not finite."""
        for name, each in metrics.items():
            for what, value in each.items():
                fix = f"the {what} of {name} is no longer finite at outer step {step}; lower it"
                finite = np.isfinite(value).all()
                self.trained[name].check(finite, "learning_rate", self.config, fix)
