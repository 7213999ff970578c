"""Curricula: inputs adapted to a task's modes, and outer training that admits modes in order."""

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

    For evaluation tasks only, whose modes are known. Directions outside the modes keep variance 1.
    From a small balanced initialisation, gradient flow learns mode k λ_k times as fast as from
    isotropic inputs: after a time ∝ 1 / (s_k λ_k), up to logarithms (Saxe et al. 2013).
    """

    def query(self, task: LinearTask, key: Key) -> Float[Array, " n_x"]:
        """Draws x ~ N(0, V diag(λ) Vᵀ)."""
        assert task.s is not None and task.V is not None  # noqa: PT018
        isotropic = super().query(task, key)
        stretch = jnp.sqrt(tilt(task.s)) - 1
        return isotropic + task.V @ (stretch * (task.V.T @ isotropic))


def tilt(s: Any) -> Any:
    """Returns the variances λ_k ∝ 1 / s_k, with mean 1, for singular values [K]."""
    return 1 / (s * (1 / s).mean())


@dataclasses.dataclass(frozen=True)
class Admission:
    """Outer step from which each mode of a domain occurs in training; 0 means from the start."""

    steps: tuple[int, ...]
    mixed: bool = False
    """Whether, until all modes are admitted, each episode has the modes of its own step, drawn
    uniformly from `steps` (mixed strategy of Zaremba & Sutskever 2014, arXiv:1410.4615)."""

    def __post_init__(self) -> None:
        valid = self.steps and all(step >= 0 for step in self.steps)
        check(valid, "steps", self.steps, "give an outer step, from 0, for each mode")

    def admitted(self, step: Int[Array, ""] | int, key: Key) -> Bool[Array, " K"]:
        """Returns which modes [K] occur in the episode with this key at an outer step."""
        steps = jnp.array(self.steps)
        drawn = jax.random.choice(jax.random.fold_in(key, 1), steps)
        return jnp.where(self.mixed & (step < steps.max()), drawn, step) >= steps


@dataclasses.dataclass(frozen=True, eq=False)
class AdmittedFrequencies(FourierRegression):
    """Fourier regression without the frequencies not admitted yet; the others are unchanged."""

    admission: Admission = Admission((0,))
    step: Int[Array, ""] | int = 0

    def sample_task(self, key: Key) -> FourierTask:
        """Draws the same function as without a curriculum and removes frequencies not admitted."""
        task, admitted = super().sample_task(key), self.admission.admitted(self.step, key)
        mask = jnp.zeros(len(self.spectrum)).at[np.array(self.support)].set(admitted)
        return FourierTask(mask * task.cosine, mask * task.sine)


@dataclasses.dataclass(frozen=True, eq=False)
class AdmittedContexts(ContextualBandit):
    """Contextual bandit that draws only the first contexts, as many as are admitted."""

    admission: Admission = Admission((0,))
    step: Int[Array, ""] | int = 0

    def sample_task(self, key: Key) -> Any:
        """Draws the correct actions of all contexts; returns them with the number admitted."""
        return super().sample_task(key), self.admission.admitted(self.step, key).sum()

    def query(self, task: Any, key: Key) -> Int[Array, ""]:
        """Draws a context uniformly from the admitted ones."""
        return jax.random.randint(key, (), 0, task[1])

    def feedback(self, task: Any, query: Int[Array, ""], answer: Array, key: Key) -> Outcome:
        """Draws an action from the policy, and its reward, as without a curriculum."""
        return super().feedback(task[0], query, answer, key)


def admitting(
    domain: Domain, meta: MetaLearner, objective: ObjectiveOf, admission: Admission
) -> Objective:
    """Makes an objective that trains only on the modes admitted at the current outer step.

    Once all modes are admitted it equals the original objective on the same episodes, even if that
    changes over outer training, as an annealed entropy weight does. Raises `ConfigError` for
    domains without a curriculum, unless each mode has a step, and unless a bandit has a step 0.
    """
    kind: Any
    match domain:
        case FourierRegression():
            kind, modes = AdmittedFrequencies, len(domain.support)
        case ContextualBandit():
            kind, modes = AdmittedContexts, domain.contexts
            hint = "one context must join at step 0, as every query is a context"
            check(0 in admission.steps, "steps", admission.steps, hint)
        case _:
            raise ConfigError(f"domain = {type(domain).__name__!r}: has no curriculum")
    hint = f"give a step for each of the {modes} modes"
    check(len(admission.steps) == modes, "steps", admission.steps, hint)
    domain_at = lambda step: as_subclass(domain, kind, admission=admission, step=step)
    at = lambda step: objective(domain_at(step), meta)
    return dataclasses.replace(objective(domain, meta), at=at)
