"""Other distributions of a domain's tasks to train on: a mixture of priors, a pool of fixed tasks.

Each is a frozen dataclass that draws a task when it is called. It can be the `sample` of
`base.TaskSet` and of `objectives.prediction_loss`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from metadyn.base import Key, Task
from metadyn.errors import check, check_positive


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A distribution of tasks from several equally likely domains that differ only in their priors.

    Raises `ConfigError` if there are no domains, if the number of weights is neither 0 nor that of
    the domains, or if a weight is not finite and above 0.
    """

    domains: tuple[Any, ...]
    """Domains to mix, whose tasks have the same shapes."""
    weights: tuple[float, ...] = ()
    """Weight of the training loss on tasks of each domain. Empty: all are 1."""

    def __post_init__(self) -> None:
        check(len(self.domains) > 0, "domains", self.domains, "give at least one")
        paired = len(self.weights) in (0, len(self.domains))
        valid = paired and all(0 < weight < float("inf") for weight in self.weights)
        check(valid, "weights", self.weights, "give a number above 0 for each domain, or none")

    def component(self, key: Key) -> Int[Array, ""]:
        """Returns the index of the domain from which the task of this key is drawn."""
        return jax.random.randint(jax.random.split(key)[0], (), 0, len(self.domains))

    def __call__(self, key: Key) -> Task:
        samplers = [domain.sample_task for domain in self.domains]
        return jax.lax.switch(self.component(key), samplers, jax.random.split(key)[1])

    def weight(self, key: Key) -> Float[Array, ""]:
        """Returns the factor on the training loss of the task of this key."""
        weights = self.weights or (1.0,) * len(self.domains)
        return jnp.asarray(weights, jnp.float32)[self.component(key)]


@dataclasses.dataclass(frozen=True)
class Pool:
    """A fixed set of equally likely tasks, drawn once from one domain.

    Raises `ConfigError` for an empty pool.
    """

    domain: Any
    size: int
    """Number of tasks. A smaller pool consists of the first tasks of a larger one."""
    seed: int = 0
    """Seed from which the tasks are drawn."""

    def __post_init__(self) -> None:
        check_positive(self, "size")

    def task(self, index: Int[Array, ""]) -> Task:
        """Returns the task at `index`, from 0."""
        return self.domain.sample_task(jax.random.fold_in(jax.random.key(self.seed), index))

    def __call__(self, key: Key) -> Task:
        return self.task(jax.random.randint(key, (), 0, self.size))
