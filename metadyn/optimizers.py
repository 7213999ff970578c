"""Optax optimisers by name, and learning-rate schedules."""

from __future__ import annotations

import contextlib
import functools
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from metadyn.errors import ConfigError, check, did_you_mean

Schedule = Literal["cosine", "linear", "constant"]


@functools.lru_cache(maxsize=256)
def named_optimizer(
    name: str, learning_rate: optax.ScalarOrSchedule, b2: float | None = None
) -> optax.GradientTransformation:
    """Makes an optimiser of optax or optax.contrib, by name, that needs only a learning rate.

    "momentum" is sgd with a momentum of 0.9. `b2` replaces the default decay rate of the second
    moment in optimisers that take one, such as adam. Raises `ConfigError` for other names.
    """
    check(isinstance(name, str), "optimizer", name, "give its name in optax, such as 'adam'")
    make: Any = getattr(optax, name, getattr(optax.contrib, name, None))
    make = partial(optax.sgd, momentum=0.9) if name == "momentum" else make
    with contextlib.suppress(TypeError, AttributeError, ValueError):
        # As a keyword, which rejects mere transformations: scale_by_adam has no `learning_rate`.
        optimizer = make(learning_rate=learning_rate, **({} if b2 is None else {"b2": b2}))
        if isinstance(optimizer, optax.GradientTransformation):
            array = jax.ShapeDtypeStruct((1,), jnp.float32)
            # Raises for an optimiser that needs more than gradients and parameters.
            jax.eval_shape(lambda g, p: optimizer.update(g, optimizer.init(p), p), array, array)
            state = jax.tree.leaves(jax.eval_shape(optimizer.init, array))
            if not any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in state):
                return optimizer  # a key in its state would be the same for all seeds
    hint = "name an optimiser of optax that takes gradients alone, such as sgd, adam or rmsprop"
    if make is None:
        hint += did_you_mean(name, dir(optax))
    elif b2 is not None:
        hint = "name one of optax that takes a b2, such as adam or nadam, or set b2 to None"
    raise ConfigError(f"optimizer = {name!r}: {hint}", "optimizer", name, hint)


def scheduled(learning_rate: float, schedule: Schedule, warmup: int, steps: int) -> optax.Schedule:
    """Makes a schedule that rises over `warmup` steps, then decays to zero at `steps` or stays."""
    decay = {
        "cosine": optax.cosine_decay_schedule(learning_rate, steps - warmup),
        "linear": optax.linear_schedule(learning_rate, 0.0, steps - warmup),
        "constant": optax.constant_schedule(learning_rate),
    }[schedule]
    rise = optax.linear_schedule(0.0, learning_rate, max(warmup, 1))
    return optax.join_schedules([rise, decay], [warmup])
