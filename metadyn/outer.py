"""The outer loop: trains a meta-learner's parameters by back-propagation through whole episodes.

One dispatch of a compiled program runs many outer steps, which sample their tasks on the device.
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

from metadyn import inner, mesh, prng, program_cost
from metadyn.base import Key, Keys, MetaLearner, Params, indexed_keys, weight_shapes
from metadyn.errors import ConfigError, check, check_choice, check_positive, error_context
from metadyn.objectives import Metrics, Objective
from metadyn.optimizers import Schedule, named_optimizer, scheduled

Precision = Literal["float32", "tensorfloat32", "bfloat16"]
DISPATCH_SECONDS = 2.0
"""Upper limit on the seconds that several outer steps in one dispatch may take, because signals
are handled only between dispatches."""


@dataclasses.dataclass(frozen=True)
class OuterConfig:
    """Settings of the outer loop's optimisation.

    The paper's values are not known to us: these are our choice. Raises `ConfigError` for a value
    out of its range.
    """

    steps: int = 16_000
    """Number of outer steps."""
    batch: int = 32
    """Number of episodes in one update of one seed of a meta-learner, over all devices."""
    updates_per_step: int = 1
    """Number of updates in one outer step, each on a new batch. A meta-learner whose own settings
    raise it trains for longer than the others. Warm-up and schedule count updates; objectives that
    change over training follow outer steps."""
    seeds: int = 4
    """Number of seeds of each meta-learner, trained side by side, each from its own initial weights
    on its own episodes."""
    optimizer: str = "adam"
    """Name of an optax optimiser."""
    learning_rate: float = 2e-2
    """Peak learning rate."""
    b2: float | None = None
    """Decay rate of the second moment, for optimisers that have one. None: optax's default."""
    schedule: Schedule = "cosine"
    """Shape of the decay from the peak to zero after the warm-up, or a constant rate."""
    warmup: int = 200
    """Number of updates (by default one per outer step) in which the learning rate rises from zero
    to its peak."""
    clip: float = 1.0
    """Maximum norm of the gradient."""
    checkpoints: int = 25
    """Number of log-spaced outer steps, besides step 0, at which the state and mode trajectories
    are stored."""
    dispatch: int = 100
    """Number of outer steps in one call to the devices, reduced if it would exceed 2 seconds.
    Progress is shown after each call."""
    precision: Precision = "float32"
    """Precision of matrix products in training on GPUs and TPUs, as `jax.default_matmul_precision`
    names it. CPUs do not round, and measurements are float32 everywhere. For bfloat16 GPUs use
    tensorfloat32 too; for tensorfloat32 TPUs use three bfloat16 products."""

    def __post_init__(self) -> None:
        fields = "steps batch updates_per_step seeds learning_rate clip checkpoints dispatch"
        check_positive(self, *fields.split())
        limit = inner.MAX_TIMES
        check(self.checkpoints <= limit, "checkpoints", self.checkpoints, f"at most {limit:,}")
        hint = f"must be below {2**31} / steps = {2**31 // self.steps}"
        valid = self.steps * self.updates_per_step < 2**31
        check(valid, "updates_per_step", self.updates_per_step, hint)
        valid = isinstance(self.warmup, Integral) and 0 <= int(self.warmup) < self.steps
        check(valid, "warmup", self.warmup, f"must be from 0 to below steps = {self.steps}")
        check_choice("schedule", self.schedule, Schedule)
        valid = self.b2 is None or (isinstance(self.b2, Real) and 0 < float(self.b2) < 1)
        check(valid, "b2", self.b2, "must be above 0 and below 1")
        check_choice("precision", self.precision, Precision)
        self.transformation(self.steps)

    @property
    def checkpoint_steps(self) -> tuple[int, ...]:
        """Returns the outer steps at which state and mode trajectories are stored, 0 to `steps`."""
        return inner.log_spaced(self.steps, self.checkpoints)

    def check_batch(self, trained: Iterable[MetaTraining]) -> None:
        """Raises `ConfigError` unless devices can share each batch in whole groups of episodes."""
        for training in trained:
            group, batch = training.objective.group, training.settings(self).batch
            hint = f"must be a multiple of {group}: the objective takes so many episodes together"
            training.check(batch % group == 0, "batch", self, hint)
            mesh.shares(self.seeds, batch, group, training.option("batch"))

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """Returns gradient clipping followed by the optimiser, scheduled over `steps` updates."""
        warmup = min(self.warmup, steps - 1)
        rate = scheduled(self.learning_rate, self.schedule, warmup, steps)
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            named_optimizer(self.optimizer, rate, b2=self.b2),
        )


class TrainState(NamedTuple):
    """State of training. The leaves of params and moments have a leading seed axis."""

    step: Int[Array, ""]
    params: dict[str, Params]
    """Outer parameters of each meta-learner, keyed by its name."""
    moments: dict[str, Any]
    """Optimiser state of each meta-learner."""

    def only(self, name: str) -> TrainState:
        """Returns the state of a single meta-learner."""
        return TrainState(self.step, {name: self.params[name]}, {name: self.moments[name]})


class MetaTraining(NamedTuple):
    """A meta-learner with its training objective and, if it has any, settings of its own."""

    meta: MetaLearner
    objective: Objective
    own: OuterConfig | None = None
    """Settings that replace the outer loop's: its own optimiser, batch and updates per step. The
    number of steps stays the run's. None: the outer loop's settings."""
    options: Mapping[str, str] | None = None
    """Command-line options that set fields of `own`, keyed by field, for error messages. Those of
    the outer loop set all others. None: no option sets any."""

    def settings(self, outer: OuterConfig) -> OuterConfig:
        """Returns the settings used in its training: its own if it has any, or the outer loop's."""
        return self.own or outer

    def check(self, holds: Any, field: str, outer: OuterConfig, hint: str) -> None:
        """Raises `ConfigError`, naming the option and the value of a field, unless `holds`."""
        check(holds, self.option(field), getattr(self.settings(outer), field), hint)

    def check_traced(self, name: str) -> None:
        """Raises `ConfigError` unless the objective returns a scalar loss and scalar metrics.

        The metrics and their types must be the same at every outer step. The objective is traced,
        not computed. Raises `ConfigError` also for outer parameters that cannot be trained, and for
        rates that are no numbers.
        """
        group, params = self.objective.group, weight_shapes(self.meta.init)
        keys = jax.eval_shape(lambda key: jax.random.split(key, group), jax.random.key(0))

        def checked_metrics(loss_fn: Any, *args: Any) -> list[str]:
            loss, metrics = jax.eval_shape(loss_fn, *args, params, keys)
            for label, value in [("loss", loss), *metrics.items()]:
                check(value.shape == (), f"{label}.shape", value.shape, "must be one number")
                floating = jnp.issubdtype(value.dtype, jnp.floating)
                check(floating, f"{label}.dtype", value.dtype.name, "must be a floating-point type")
            return [f"{label}: {value.dtype}" for label, value in sorted(metrics.items())]

        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            field = f"outer parameter {jax.tree_util.keystr(path)} of {name}"
            floating = jnp.issubdtype(leaf.dtype, jnp.floating)
            check(floating, field, leaf.dtype.name, "must be a floating-point type, to be trained")
            check(leaf.size > 0, field, leaf.shape, "must not be empty: it could not be stored")
        rates = getattr(self.meta, "rates", None)
        is_none = lambda leaf: leaf is None and rates is not None
        for path, rate in jax.tree_util.tree_leaves_with_path(rates, is_none):
            number = np.ndim(rate) == 0 and np.asarray(rate).dtype.kind in "iuf"
            valid, hint = number and 0 <= float(rate) < float("inf"), "must be a number, 0 or more"
            check(valid, f"rate {jax.tree_util.keystr(path)} of {name}", rate, hint)
        with error_context(f"the objective of {name} cannot be computed"):
            metrics = checked_metrics(self.objective.loss)
            if self.objective.at is not None:
                loss_at = lambda step, *args: self.objective.at_step(step).loss(*args)
                metrics_at = checked_metrics(loss_at, jnp.int32(0))
                hint = f"must be the same at every outer step, {metrics}"
                check(metrics_at == metrics, "metrics", metrics_at, hint)

    def check_run(self, name: str) -> None:
        """Calls the meta-learner's own `check`, if it has one, which raises `ConfigError`."""
        with error_context(f"meta-learner {name!r} cannot be checked", ConfigError):
            getattr(self.meta, "check", lambda: None)()

    def option(self, field: str) -> str:
        """Returns the command-line option that sets a field of its settings, for error messages."""
        group = "own" if self.own is not None and self.options is None else "outer"
        return (self.options or {}).get(field, f"{group}.{field}")


def _gradient(
    objective: Objective, params: Params, keys: Keys, cached: int = mesh.CACHED_EPISODES
) -> tuple[Params, Metrics]:
    """Computes the gradient and metrics, averaged over all episodes, one microbatch at a time."""
    size = mesh.microbatch(len(keys), objective.group, cached)
    gradient = jax.grad(objective.loss, has_aux=True)
    if size == len(keys):
        return gradient(params, keys)

    def add(total, keys):
        return jax.tree.map(jnp.add, total, gradient(params, keys)), None

    _, metrics = jax.eval_shape(objective.loss, params, keys[:size])
    zeros = jax.tree.map(jnp.zeros_like, (params, metrics))
    total, _ = jax.lax.scan(add, zeros, keys.reshape(-1, size))
    return jax.tree.map(lambda leaf: leaf * (size / len(keys)), total)


def _scaled_by_rates(updates: Params, meta: MetaLearner) -> Params:
    """Multiplies updates by a meta-learner's own `rates`, if it has any."""
    rates = getattr(meta, "rates", None)
    if rates is None:
        return updates
    return jax.tree.map(lambda u, rate: u if rate == 1 else rate * u, updates, rates)


def compiled(what: str, traced: Any, option: str, change: str = "lower it") -> Any:
    """Compiles a traced program (`jax.stages.Traced`) that trains.

    Raises `ConfigError`, naming the option to change, if by the compiler's own account the program
    exceeds the memory.
    """
    with error_context(f"{what} cannot be compiled", jax.errors.JaxRuntimeError):
        executable = traced.lower().compile()
    mesh.require_memory(what, program_cost.memory(executable), option, change=change)
    return executable


class OuterLoop:
    """The compiled outer loop, which trains several named meta-learners side by side.

    All draw their initial weights and episodes from the same keys, so differences between them come
    only from the meta-learners and what they are trained on. Raises `ConfigError` if the devices
    cannot share a batch.
    """

    def __init__(self, trained: Mapping[str, MetaTraining], config: OuterConfig, key: Key):
        self.config, self.trained = config, trained
        self.settings = {name: training.settings(config) for name, training in trained.items()}
        """Settings used in the training of each meta-learner, keyed by its name."""
        config.check_batch(trained.values())
        self._optimizers = {
            name: settings.transformation(config.steps * settings.updates_per_step)
            for name, settings in self.settings.items()
        }
        self._key_init, self._key_episodes = jax.random.split(prng.fast(key))
        self._seeds = jnp.arange(config.seeds)
        self.init_on_one_device = jax.jit(self._init, out_shardings=mesh.one_device())
        """Jitted function that makes the state at outer step 0."""
        # It runs on one device, one seed at a time, because batched decompositions (in orthogonal
        # initialisation), or those on several CPU devices at once, can wait for each other's
        # threads for ever (jaxlib 0.10.2).
        self.abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=mesh.replicated()),
            jax.eval_shape(self.init_on_one_device),
        )
        """Shapes, types and shardings of a training state."""
        self.advance = jax.jit(self._advance, donate_argnums=0, out_shardings=mesh.replicated())
        """`advance(state, count)` runs `count` updates of the one meta-learner in the state
        (`TrainState.only`); returns (state, mean metrics of each seed). The state passed in is
        donated. Compiled once for each meta-learner, for all counts."""
        self.compiled = functools.cache(self._compiled)
        """Returns `advance` compiled for the named meta-learner, by `compiled`; cached."""
        self.seconds = dict.fromkeys(trained, 0.0)
        """Seconds that `run` has spent on training each meta-learner, without compilation."""
        self.pace = 0.0
        """Seconds per outer step in the last dispatch; 0 before the first."""

    def init(self) -> TrainState:
        """Returns the state at outer step 0, replicated on all devices."""
        return mesh.replicate(self.init_on_one_device())

    def keys(self) -> Keys:
        """Returns the key from which each seed draws its episodes."""
        return indexed_keys(self._key_episodes, self._seeds)

    @inner.full_precision
    def _init(self) -> TrainState:
        keys = indexed_keys(self._key_init, self._seeds)
        params = {name: jax.lax.map(t.meta.init, keys) for name, t in self.trained.items()}
        moments = {name: jax.vmap(self._optimizers[name].init)(p) for name, p in params.items()}
        return TrainState(jnp.zeros((), jnp.int32), params, moments)

    def _advance(
        self, state: TrainState, count: Int[Array, ""]
    ) -> tuple[TrainState, dict[str, Metrics]]:
        (name,) = state.params
        stacked = self.keys(), state.params[name], state.moments[name]
        sizes = self.settings[name].batch, self.trained[name].objective.group
        train_seed = partial(self.advance_seed, name)
        results = mesh.train_seeds(train_seed, (state.step, count), stacked, *sizes)
        params, moments, metrics = ({name: tree} for tree in results)
        return TrainState(state.step + count, params, moments), metrics

    def advance_seed(self, name: str, span: Any, seed_state: Any) -> tuple[Params, Any, Metrics]:
        """Runs `count` updates of one seed of a meta-learner, inside `mesh.train_seeds`.

        Takes span = (step, count) and seed_state = (key, params, moments). Returns (params,
        moments, mean metrics).
        """
        (step, count), (key, params, moments) = span, seed_state
        meta, objective = self.trained[name].meta, self.trained[name].objective
        settings, optimizer = self.settings[name], self._optimizers[name]
        cached, n = mesh.cached_episodes(meta), settings.updates_per_step

        def episode_keys(i):
            indices = mesh.local_episodes(settings.batch)
            return indexed_keys(jax.random.fold_in(key, step + i), indices)

        def train_once(i, carry):
            params, moments, total = carry
            current = objective.at_step((step + i) // n if n > 1 else step + i)
            gradient, metrics = mesh.mean(_gradient(current, params, episode_keys(i), cached))
            updates, moments = optimizer.update(gradient, moments, params)
            updates = _scaled_by_rates(updates, meta)
            total = jax.tree.map(jnp.add, total, metrics)
            return optax.apply_updates(params, updates), moments, total

        with jax.default_matmul_precision(self.config.precision):
            _, metrics = jax.eval_shape(objective.loss, params, episode_keys(0))
            start = params, moments, jax.tree.map(jnp.zeros_like, metrics)
            params, moments, total = jax.lax.fori_loop(0, count, train_once, start)
            return params, moments, jax.tree.map(lambda leaf: leaf / jnp.maximum(count, 1), total)

    def _compiled(self, name: str) -> Any:
        traced = self.advance.trace(self.abstract.only(name), jnp.int32(1))
        return compiled(f"an outer step of {name}", traced, self.trained[name].option("batch"))

    def run(
        self, state: TrainState, target: int
    ) -> Iterator[tuple[TrainState, dict[str, Metrics]]]:
        """Yields (state, metrics by meta-learner) after each dispatch, up to outer step `target`.

        A metric [seed] is the mean over the dispatch's updates, computed before each update. Raises
        `ConfigError` if one is not finite.
        """
        step = int(state.step)
        while step < target:
            count = self.dispatched(target - step)
            seconds_before = sum(self.seconds.values())
            params, moments = state.params, state.moments
            metrics: dict[str, Metrics] = {}
            for name in self.trained:  # one at a time, to measure the seconds of each
                advance, n = self.compiled(name), self.settings[name].updates_per_step
                # Here the step counts updates. It is a new array, because `advance` donates it.
                own_state = state.only(name)._replace(step=n * state.step)
                updates = jnp.int32(n * count)
                start = time.perf_counter()
                own_state, own_metrics = jax.block_until_ready(advance(own_state, updates))
                self.seconds[name] += time.perf_counter() - start
                params, moments = params | own_state.params, moments | own_state.moments
                metrics |= own_metrics
            self.pace = (sum(self.seconds.values()) - seconds_before) / count
            step, state = step + count, TrainState(state.step + count, params, moments)
            self.check_finite(step, metrics)
            yield state, metrics

    def dispatched(self, left: int) -> int:
        """Chooses how many of the `left` outer steps the next dispatch runs, from the last pace."""
        limit = max(1, int(DISPATCH_SECONDS / self.pace)) if self.pace else left
        return mesh.broadcast(min(self.config.dispatch, left, limit))

    @property
    def episodes(self) -> int:
        """Returns the number of episodes in one outer step, over all seeds and meta-learners."""
        per_seed = (own.batch * own.updates_per_step for own in self.settings.values())
        return self.config.seeds * sum(per_seed)

    def check_finite(self, step: int, metrics: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises `ConfigError`, naming the learning rate, if a metric is not finite."""
        for name, values in metrics.items():
            for metric, value in values.items():
                hint = f"the {metric} of {name} is no longer finite at outer step {step}; lower it"
                finite = np.isfinite(value).all()
                self.trained[name].check(finite, "learning_rate", self.config, hint)
