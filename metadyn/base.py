"""Contracts shared by all modules: domains, learners, meta-learners, probes and task sets.

Each is a small set of pure functions on pytrees, written for ONE task and ONE episode. `inner.py`
and `outer.py` batch them with `jax.vmap`; `mesh.py` places them on devices by sharding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import (
    Any,
    Literal,
    NamedTuple,
    ParamSpec,
    Protocol,
    TypeVar,
    get_args,
    runtime_checkable,
)

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, PRNGKeyArray

from metadyn.errors import check, check_choice, check_name, error_context

P = ParamSpec("P")
T = TypeVar("T")
Key = PRNGKeyArray
Keys = jaxtyping.Key[Array, " n"]
Task = Any  # the pytree that a domain's `sample_task` returns
Query = Any  # a domain's question: an input x_t, a context c_t
Answer = Any  # a learner's reply to a query: a prediction, the logits of a policy
Feedback = Any  # a domain's response to an answer: a target y_t, a reward
State = Any  # everything that a learner remembers
Params = Any  # the outer parameters of a meta-learner
Sample = Callable[[Key], Task]  # draws a task
LearnerKind = Literal["ordinary", "meta", "bayes", "reference"]  # a learner's role in comparisons


class Learner(NamedTuple):
    """A learner answers queries and learns from feedback through three pure functions.

    They are `init(key) -> state`, `predict(state, query) -> answer` and `update(state, query,
    feedback) -> state`. A learner that needs randomness after `init` keeps a key in its state.
    """

    init: Callable[[Key], State]
    predict: Callable[[State, Query], Answer]
    update: Callable[[State, Query, Feedback], State]
    batch: int | None = None
    """Number of pairs per update, on a leading batch axis. None: one pair, without that axis."""
    points: int | None = None
    """Size of the learner's dataset, from which each batch draws pairs without replacement. None:
    every batch is fresh."""
    clock: str = "observations"
    """What the learner's time t counts: "observations" in the episode, or optimiser "updates"."""
    diagnose: Callable[[State], Mapping[str, Array]] | None = None
    """Returns named diagnostics of the state (arrays), recorded beside the probes' readings."""


@runtime_checkable
class MetaLearner(Protocol):
    """A meta-learner is a family of learners, indexed by outer parameters that are trained.

    It may also have `rates`, a pytree like its parameters: each parameter's learning rate in
    multiples of the outer loop's. And it may have `check()`, which is called before training and
    raises `ConfigError` for a fault that tracing does not show.
    """

    @property
    def heads(self) -> int:
        """Number of outputs beyond the answer, which an objective may train: 1 for a critic."""

    def init(self, key: Key) -> Params:
        """Draws the outer parameters of outer step 0."""

    def learner(self, params: Params) -> Learner:
        """Returns the learner with these outer parameters, to be stepped through an episode."""

    def unroll(
        self, params: Params, queries: Query, feedback: Feedback
    ) -> Float[Array, "T outputs B"]:
        """Runs whole episodes at once and returns the answers, followed by the heads' outputs.

        Training uses it. The answers equal those of stepping `learner(params)` through the
        episodes. The leaves of queries and feedback are time-major, episodes last: [T, ..., B].
        """


@dataclasses.dataclass(frozen=True, eq=False)
class Derived:
    """Learners built from a meta-learner's trained parameters, and never trained themselves."""

    meta: MetaLearner | Derived
    """The meta-learner, or another such family, whose outer parameters are used."""
    learner: Callable[[Params], Learner]
    """Returns the learner with these outer parameters."""
    clock: str = "observations"
    """What the learner's time counts (`Learner.clock`)."""

    def init(self, key: Key) -> Params:
        """Draws the meta-learner's outer parameters."""
        return self.meta.init(key)


@dataclasses.dataclass(frozen=True)
class Modes:
    """The modes of a task are its parts whose strengths a probe measures one by one.

    Raises `ConfigError` if there are no values or the threshold is not finite.
    """

    values: Sequence[int | float]
    """One number per mode, to order them: singular values, frequencies, or ranks 1, 2, … if the
    modes are exchangeable."""
    label: str
    """Name of the values in figures: "singular value $s_k$"."""
    coordinate: str = "mode_value"
    """Name of the values in labelled arrays: "singular_value"."""
    unit: str = ""
    """Unit of the values; empty if they have none."""
    exchangeable: bool = False
    """Whether the modes are statistically alike. If so, the modes of each run are sorted by
    learning time before runs are averaged."""
    p: float = 0.5
    """Strength at which a mode counts as learned: the threshold of the learning times t_k(p)."""
    strength: str = "mode strength $a_k$\n(0 nothing, 1 learned)"
    """Name of the mode strength in figures."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(float(value) for value in self.values))
        check(len(self.values) > 0, "modes", self.values, "give a value for each mode")
        check(bool(np.isfinite(self.p)), "p", self.p, "must be finite")

    @property
    def axis(self) -> str:
        """Returns the values' label with their unit, for an axis or a legend."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """A probe is a set of queries and a function that reads mode strengths off their answers."""

    queries: Query
    """Queries stacked along a leading axis [P, ...], shared by all tasks and times."""
    read: Callable[[Task, Answer], Mapping[str, Array]]
    """`read(task, answers [P, ...])` returns "strength" [K], one per mode, and extras by name."""
    modes: Modes
    extras: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Axis names of every other reading, such as {"off_diagonal": (), "answer": ("x",)}."""

    # Probes are equal if they share their queries and `read`, whatever their `modes`, so that task
    # sets with different spectra share compiled programs.

    def _identity(self) -> tuple[Any, ...]:
        return id(self.queries), self.read

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Probe) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())


STRENGTH = "mode_strength"
"""Name of the main probe, which figures and figures of merit use unless they name another one."""


@runtime_checkable
class Domain(Protocol):
    """A domain is a distribution of tasks, with functions that draw their queries and feedback."""

    @property
    def steps(self) -> int:
        """Number of observations in one episode, T."""

    @property
    def loss_floor(self) -> float:
        """Returns the expected loss of a learner that knows the task: the irreducible part."""

    @property
    def answer_size(self) -> int:
        """Returns the number of values in one answer, for learners that size an output layer."""

    def __hash__(self) -> int:
        """Hashes the domain, as frozen dataclasses do: programs are compiled once per domain."""

    def sample_task(self, key: Key) -> Task:
        """Draws a task from the meta-training distribution."""

    def query(self, task: Task, key: Key) -> Query:
        """Draws a query for the learner to answer."""

    def feedback(self, task: Task, query: Query, answer: Answer, key: Key) -> Feedback:
        """Draws the feedback that the learner receives once it has answered a query."""

    def loss(self, answer: Answer, feedback: Feedback) -> Float[Array, ""]:
        """Scores an answer against its feedback; lower is better."""

    def encode_query(self, query: Query) -> Float[Array, " n"]:
        """Flattens a query into a network's input vector."""

    def encode_feedback(self, feedback: Feedback) -> Float[Array, " m"]:
        """Flattens a feedback into a network's input vector."""

    def evaluation(self, points: int) -> TaskSet:
        """Returns the tasks to evaluate learners on, with probes of their modes.

        Each probe has `points` queries. The caller sets the number of tasks.
        """


class Regression:
    """Base class of regression domains: squared error, and networks that read x and y unchanged.

    For a domain with a noise level `sigma`, vector targets, and predictions as answers.
    """

    sigma: float

    @property
    def loss_floor(self) -> float:
        """Returns the variance σ² of the noise."""
        return self.sigma**2

    def loss(self, answer: Float[Array, " n_y"], feedback: Float[Array, " n_y"]) -> Array:
        """Returns the mean squared error over outputs. Raises `ConfigError` if shapes differ."""
        hint = f"must have the feedback's shape, {jnp.shape(feedback)}"
        check(jnp.shape(answer) == jnp.shape(feedback), "answer", jnp.shape(answer), hint)
        return ((answer - feedback) ** 2).mean()

    def encode_query(self, query: Float[Array, " n_x"]) -> Float[Array, " n_x"]:
        """Returns x unchanged."""
        return query

    def encode_feedback(self, feedback: Float[Array, " n_y"]) -> Float[Array, " n_y"]:
        """Returns y unchanged."""
        return feedback


@dataclasses.dataclass(frozen=True, eq=False)
class TaskSet:
    """Tasks of one domain on which learners are measured: `sample(key_i)` for i < `size`.

    All sets use the same keys, so task i is the same task in every set with the same `sample`,
    whatever the sets' names.
    """

    name: str
    domain: Domain
    sample: Sample | None = None
    """Draws a task from a key. None: from the domain's meta-training distribution. Stored as a
    `jax.tree_util.Partial`, whose bound arrays are arguments of compiled programs: sets that differ
    only in these arrays share one program."""
    probes: Mapping[str, Probe] = dataclasses.field(default_factory=dict)
    """Probes to apply to each learner, keyed by the name their readings are stored under."""
    size: int = 0
    """Number of tasks. 0: not set yet; a study sets it with `config.measure.sized`."""
    updating_size: int | None = None
    """Number of these tasks for learners whose clock counts updates. None: all."""
    kinds: tuple[LearnerKind, ...] = get_args(LearnerKind)
    """Kinds of contenders (`study.Contender`) that are measured on the set."""
    option: str = ""
    """Command-line option that sets the size, for error messages."""

    def __post_init__(self) -> None:
        check_name(self.name, "set of tasks")
        for name in self.probes:
            check_name(name, "probe")
        for kind in self.kinds:
            check_choice("kinds", kind, LearnerKind)
        if not isinstance(self.sample, Partial):
            object.__setattr__(self, "sample", Partial(self.sample or Sampler(self.domain)))

    def size_for(self, clock: str) -> int:
        """Returns the number of tasks on which a learner with this clock is measured.

        Raises `ConfigError` if there are none.
        """
        size = self.size
        if clock == "updates" and self.updating_size is not None:
            size = min(size, self.updating_size)
        check(size >= 1, self.option or self.name, size, "must be 1 or more")
        return size


def as_subclass(domain: Any, kind: Callable[..., Any], **more: Any) -> Any:
    """Copies a domain as a `kind`, a subclass of its class whose additional fields are `more`."""
    inherited = {field.name: getattr(domain, field.name) for field in dataclasses.fields(domain)}
    return kind(**inherited, **more)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Callable `domain.sample_task`, for `TaskSet.sample`; samplers of equal domains are equal."""

    domain: Domain

    def __call__(self, key: Key) -> Task:
        return self.domain.sample_task(key)


def cached_concrete(make: Callable[P, T]) -> Callable[P, T]:
    """Caches a function's results by its arguments, which must be hashable.

    Arrays in a result are concrete values, not tracers, even if the first call happens while JAX
    traces.
    """

    @functools.cache
    @functools.wraps(make)
    def cached(*args: P.args, **kwargs: P.kwargs) -> T:
        with jax.ensure_compile_time_eval():
            return make(*args, **kwargs)

    return cached  # type: ignore[return-value]


@functools.cache
def weight_shapes(init: Callable[[Key], Params]) -> Params:
    """Returns the shapes of the outer parameters that a meta-learner's `init` draws."""
    with error_context(f"{getattr(init, '__qualname__', init)} cannot draw outer parameters"):
        return jax.eval_shape(init, jax.random.key(0))


def indexed_keys(key: Key, indices: Int[Array, " n"]) -> Keys:
    """Returns one key per global index, so that no draw depends on batch, chunk or device."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)


def encoded_episodes(domain: Domain, queries: Query, feedback: Feedback) -> tuple[Any, Any]:
    """Encodes the queries and feedback of B whole episodes, [T, ..., B], as network inputs.

    Returns arrays [T, n, B] and [T, m, B]. NumPy arrays stay NumPy arrays if the domain encodes
    them unchanged.
    """
    over_time_and_batch = lambda encode: jax.vmap(jax.vmap(encode, -1, -1))
    x = over_time_and_batch(domain.encode_query)(queries)
    return x, over_time_and_batch(domain.encode_feedback)(feedback)


def encoded_shapes(domain: Domain) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of an encoded query and of its encoded feedback."""

    def encoded_pair(key: Key) -> tuple[Array, Array]:
        task = domain.sample_task(key)
        query = domain.query(task, key)
        feedback = domain.feedback(task, query, jnp.zeros(domain.answer_size), key)
        return domain.encode_query(query), domain.encode_feedback(feedback)

    query, feedback = jax.eval_shape(encoded_pair, jax.random.key(0))
    return query.shape, feedback.shape
