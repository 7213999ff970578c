"""Optimisers of optax by name, and learning rates that change over training."""

from __future__ import annotations

import contextlib
import functools
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from metadyn.errors import ConfigError, check, meant

Schedule = Literal["cosine", "linear", "constant"]


@functools.lru_cache(maxsize=256)
def named_optimizer(
    name: str, learning_rate: optax.ScalarOrSchedule, b2: float | None = None
) -> optax.GradientTransformation:
    """Makes any optimiser of optax or optax.contrib that a learning rate suffices for, by name.

    "momentum" is sgd with a momentum of 0.9. `b2` replaces the default decay of the second moment
    in optimisers that take one, such as adam. Raises `ConfigError` for other names.
    """
    check(isinstance(name, str), "optimizer", name, "give its name in optax, such as 'adam'")
    make: Any = getattr(optax, name, getattr(optax.contrib, name, None))
    make = partial(optax.sgd, momentum=0.9) if name == "momentum" else make
    with contextlib.suppress(TypeError, AttributeError, ValueError):
        # By name, which scale_by_adam, for one, does not take: it is no optimiser.
        made = make(learning_rate=learning_rate, **({} if b2 is None else {"b2": b2}))
        if isinstance(made, optax.GradientTransformation):  # and it needs no more than gradients
            one = jax.ShapeDtypeStruct((1,), jnp.float32)
            jax.eval_shape(lambda g, p: made.update(g, made.init(p), p), one, one)
            state = jax.tree.leaves(jax.eval_shape(made.init, one))
            if not any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in state):
                return made  # a key would be the same one for every seed
    fix = "name an optimiser of optax that takes gradients alone, such as sgd, adam or rmsprop"
    if make is None:
        fix += meant(name, dir(optax))
    elif b2 is not None:
        fix = "name one of optax that takes a b2, such as adam or nadam, or set b2 to None"
    raise ConfigError(f"optimizer = {name!r}: {fix}", "optimizer", name, fix)


def scheduled(learning_rate: float, schedule: Schedule, warmup: int, steps: int) -> optax.Schedule:
    """Makes a learning rate that rises over `warmup` steps, and decays to zero at `steps`."""
    decay = {
        "cosine": optax.cosine_decay_schedule(learning_rate, steps - warmup),
        "linear": optax.linear_schedule(learning_rate, 0.0, steps - warmup),
        "constant": optax.constant_schedule(learning_rate),
    }[schedule]
    rise = optax.linear_schedule(0.0, learning_rate, max(warmup, 1))
    return optax.join_schedules([rise, decay], [warmup])
