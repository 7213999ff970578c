"""Curricula: inputs made for the modes of a task, and modes that outer training admits in order."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from metadyn.base import Domain, Key, MetaLearner, as_subclass
from metadyn.domains.bandit import ContextualBandit, Outcome
from metadyn.domains.fourier import FourierRegression, FourierTask
from metadyn.domains.linear import LinearRegression, LinearTask
from metadyn.errors import ConfigError, check
from metadyn.objectives import Objective, ObjectiveOf


class TiltedRegression(LinearRegression):
    """Linear regression whose inputs have covariance V diag(λ) Vᵀ, λ_k ∝ 1 / s_k, of trace K.

    For evaluation tasks alone, whose modes are known. Directions beyond them keep variance 1. From
    a small balanced start gradient flow learns mode k as it does from isotropic inputs, λ_k times
    as fast: so after a time ∝ 1 / (s_k λ_k), but for logarithms (Saxe et al. 2013).
    """

    def query(self, task: LinearTask, key: Key) -> Float[Array, " n_x"]:
        """Draws x ~ N(0, V diag(λ) Vᵀ)."""
        assert task.s is not None and task.V is not None  # noqa: PT018
        isotropic = super().query(task, key)
        stretch = jnp.sqrt(tilt(task.s)) - 1
        return isotropic + task.V @ (stretch * (task.V.T @ isotropic))


def tilt(s: Any) -> Any:
    """Returns the variances λ_k ∝ 1 / s_k, of mean 1, by singular values [K]."""
    return 1 / (s * (1 / s).mean())


@dataclasses.dataclass(frozen=True)
class Admission:
    """From which outer step each mode of a domain is there in training: 0 is from the start."""

    steps: tuple[int, ...]
    mixed: bool = False
    """Whether, until all modes are there, each episode has those of a step of its own instead,
    drawn evenly from `steps` (the mixed strategy of Zaremba & Sutskever 2014, arXiv:1410.4615)."""

    def __post_init__(self) -> None:
        right = self.steps and all(step >= 0 for step in self.steps)
        check(right, "steps", self.steps, "give an outer step, from 0, for each mode")

    def there(self, step: Int[Array, ""] | int, key: Key) -> Bool[Array, " K"]:
        """Tells which modes [K] occur in the episode of this key at an outer step."""
        steps = jnp.array(self.steps)
        drawn = jax.random.choice(jax.random.fold_in(key, 1), steps)
        return jnp.where(self.mixed & (step < steps.max()), drawn, step) >= steps


@dataclasses.dataclass(frozen=True, eq=False)
class SomeFrequencies(FourierRegression):
    """Functions without the frequencies that are not admitted yet; the others are as ever."""

    admission: Admission = Admission((0,))
    step: Int[Array, ""] | int = 0

    def sample_task(self, key: Key) -> FourierTask:
        """Draws the function that training without a curriculum has, and leaves out the rest."""
        task, there = super().sample_task(key), self.admission.there(self.step, key)
        kept = jnp.zeros(len(self.spectrum)).at[np.array(self.support)].set(there)
        return FourierTask(kept * task.cosine, kept * task.sine)


@dataclasses.dataclass(frozen=True, eq=False)
class SomeContexts(ContextualBandit):
    """A bandit of which the contexts admitted so far, the first ones, are drawn: (task, number)."""

    admission: Admission = Admission((0,))
    step: Int[Array, ""] | int = 0

    def sample_task(self, key: Key) -> Any:
        """Draws the correct actions of all contexts."""
        return super().sample_task(key), self.admission.there(self.step, key).sum()

    def query(self, task: Any, key: Key) -> Int[Array, ""]:
        """Draws a context, uniformly from those that are there."""
        return jax.random.randint(key, (), 0, task[1])

    def feedback(self, task: Any, query: Int[Array, ""], answer: Array, key: Key) -> Outcome:
        """Draws an action of the policy, and whether it paid, as ever."""
        return super().feedback(task[0], query, answer, key)


def admitting(
    domain: Domain, meta: MetaLearner, objective: ObjectiveOf, admission: Admission
) -> Objective:
    """Makes an objective that trains on the modes alone that the current outer step admits.

    Once all are there it is the objective itself, on the same episodes, also where that changes by
    itself over outer training, as the weight of an entropy may. Raises `ConfigError` for domains
    without a curriculum, unless each mode has a step, and unless a bandit's first step is 0.
    """
    kind: Any
    match domain:
        case FourierRegression():
            kind, modes = SomeFrequencies, len(domain.support)
        case ContextualBandit():
            kind, modes = SomeContexts, domain.contexts
            fix = "one context must be there from step 0: there is nothing else to ask for"
            check(0 in admission.steps, "steps", admission.steps, fix)
        case _:
            raise ConfigError(f"domain = {type(domain).__name__!r}: there is no curriculum for it")
    fix = f"give a step for each of the {modes} modes"
    check(len(admission.steps) == modes, "steps", admission.steps, fix)
    at = lambda step: objective(as_subclass(domain, kind, admission=admission, step=step), meta)
    return dataclasses.replace(objective(domain, meta), at=at)
