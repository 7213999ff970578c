"""The contracts everything hangs on: what a domain, a learner, a probe and a meta-learner are.

Each is a small set of pure functions on pytrees, written for ONE task and ONE episode. Batching is
`jax.vmap` and happens in `inner.py` and `outer.py`; placement is sharding and happens in `mesh.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jaxtyping
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

Key = PRNGKeyArray
Keys = jaxtyping.Key[Array, " n"]
Task = Any  # the pytree that a domain's `sample_task` returns
Query = Any  # what a domain asks: an input x_t, a context c_t
Answer = Any  # what a learner replies: a prediction, a policy
Feedback = Any  # what a domain says then: a target y_t, a reward
State = Any  # all that a learner knows
Params = Any  # the outer parameters of a meta-learner


class ConfigError(Exception):
    """Bad input. The message is one line that names the field, the value and the fix."""


class ConfigWarning(UserWarning):
    """Input that can be run, but hardly as meant. One line that names the field and the value."""


def check(holds: bool | np.bool, field: str, value: Any, fix: str) -> None:
    """Raises `ConfigError` naming the field, the value and the fix unless `holds`."""
    if not holds:
        raise ConfigError(f"{field} = {value!r}: {fix}")


def check_positive(config: Any, *fields: str) -> None:
    """Raises `ConfigError` unless each named field of `config` is a number above zero."""
    for field in fields:
        value = getattr(config, field)
        check(0 < value < float("inf"), field, value, "must be positive and finite")


class Learner(NamedTuple):
    """Anything that answers queries and learns from feedback.

    `init(key) -> state`, `predict(state, query) -> answer` and `update(state, query, feedback) ->
    state` are pure; a learner that needs randomness later keeps a key in its state.
    """

    init: Callable[[Key], State]
    predict: Callable[[State, Query], Answer]
    update: Callable[[State, Query, Feedback], State]
    batch: int | None = None
    """Pairs per update. None: one, unbatched. Otherwise `update` is given a leading batch axis."""
    points: int | None = None
    """Pairs in all, from which each batch is drawn without repetition. None: always fresh ones."""
    clock: str = "observations"
    """What the learner's time t counts."""
    diagnose: Callable[[State], Mapping[str, Array]] | None = None
    """Scalars about the state that are recorded beside the probe's readings."""


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """Queries shared by all tasks and times, and how mode strengths are read off the answers."""

    queries: Query
    """Probe queries, stacked along a leading axis [P, ...]."""
    read: Callable[[Task, Answer], Mapping[str, Array]]
    """`read(task, answers [P, ...])`: by name, readings with the axes that `axes` gives."""
    axes: Mapping[str, tuple[str, ...]]
    """Axis names of each reading, such as {"mode_strength": ("mode",), "unexplained": ()}."""


@runtime_checkable
class Domain(Protocol):
    """A distribution of tasks, and how one task poses queries and gives feedback."""

    @property
    def steps(self) -> int:
        """T, the observations in one episode."""

    @property
    def loss_floor(self) -> float:
        """The expected loss of a learner that knows the task: its irreducible part."""

    @property
    def answer_size(self) -> int:
        """Numbers in one answer, for learners that must size an output layer."""

    def sample_task(self, key: Key) -> Task:
        """One task of the meta-training distribution."""

    def query(self, task: Task, key: Key) -> Query:
        """What the learner is asked."""

    def feedback(self, task: Task, query: Query, answer: Answer, key: Key) -> Feedback:
        """What it is told once it has answered."""

    def loss(self, answer: Answer, feedback: Feedback) -> Float[Array, ""]:
        """What the answer cost."""

    def encode_query(self, query: Query) -> Float[Array, " n"]:
        """The query as the flat vector a network reads."""

    def encode_feedback(self, feedback: Feedback) -> Float[Array, " m"]:
        """The feedback as the flat vector a network reads."""


@runtime_checkable
class MetaLearner(Protocol):
    """A family of learners indexed by outer parameters, which the outer loop trains."""

    def init(self, key: Key) -> Params:
        """Outer parameters at outer step 0."""

    def learner(self, params: Params) -> Learner:
        """The learner that these parameters are: the step-by-step form, used when probing."""

    def unroll(self, params: Params, queries: Query, feedback: Feedback) -> Answer:
        """All answers of whole episodes at once, used in training; the same numbers as stepping
        `learner(params)`. Leaves are time-major with the episodes last, [T, ..., B]."""


def indexed_keys(key: Key, indices: Int[Array, " n"]) -> Keys:
    """A key for each global index, so that nothing random depends on batch, chunk or device."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)
