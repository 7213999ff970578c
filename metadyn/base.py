"""The contracts everything hangs on: domains, learners, meta-learners, probes and sets of tasks.

Each is a small set of pure functions on pytrees, written for ONE task and ONE episode. Batching is
`jax.vmap` and happens in `inner.py` and `outer.py`; placement is sharding and happens in `mesh.py`.
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

from metadyn.errors import check, check_choice, check_name

P = ParamSpec("P")
T = TypeVar("T")
Key = PRNGKeyArray
Keys = jaxtyping.Key[Array, " n"]
Task = Any  # the pytree that a domain's `sample_task` returns
Query = Any  # what a domain asks: an input x_t, a context c_t
Answer = Any  # what a learner replies: a prediction, the logits of a policy
Feedback = Any  # what a domain says then: a target y_t, a reward
State = Any  # all that a learner knows
Params = Any  # the outer parameters of a meta-learner
Sample = Callable[[Key], Task]  # draws a task
LearnerKind = Literal["ordinary", "meta", "bayes", "reference"]  # what learners are compared as


class Learner(NamedTuple):
    """A learner answers queries and learns from feedback, by three pure functions.

    They are `init(key) -> state`, `predict(state, query) -> answer` and `update(state, query,
    feedback) -> state`. A learner that needs randomness later keeps a key in its state.
    """

    init: Callable[[Key], State]
    predict: Callable[[State, Query], Answer]
    update: Callable[[State, Query, Feedback], State]
    batch: int | None = None
    """Pairs per update. None: one, unbatched. Otherwise `update` is given a leading batch axis."""
    points: int | None = None
    """Pairs in all; each batch is drawn of them anew, no pair twice. None: always fresh ones."""
    clock: str = "observations"
    """What the learner's time t counts: "observations" in the episode, or optimiser "updates"."""
    diagnose: Callable[[State], Mapping[str, Array]] | None = None
    """Numbers about the state, or arrays of them, by name: recorded beside the probes' readings."""


@runtime_checkable
class MetaLearner(Protocol):
    """A meta-learner is a family of learners, indexed by outer parameters that are trained.

    It may have `rates` as well, a tree like its parameters: learning rates of theirs over the outer
    loop's.
    """

    @property
    def heads(self) -> int:
        """Outputs beyond the answer, which an objective may train: one for a critic."""

    def init(self, key: Key) -> Params:
        """Draws the outer parameters of outer step 0."""

    def learner(self, params: Params) -> Learner:
        """Makes the learner that these parameters are, stepped through an episode."""

    def unroll(
        self, params: Params, queries: Query, feedback: Feedback
    ) -> Float[Array, "T outputs B"]:
        """Runs whole episodes at once: gives the answers, and below them the heads.

        Used in training. The answers are those of stepping `learner(params)` through the episodes.
        Leaves of the queries and the feedback are time-major with the episodes last, [T, ..., B].
        """


@dataclasses.dataclass(frozen=True, eq=False)
class Derived:
    """The learners that are made of a meta-learner's outer parameters, once these are trained."""

    meta: MetaLearner
    """Whose outer parameters they are."""
    learner: Callable[[Params], Learner]
    """Makes the learner of these parameters."""
    clock: str = "observations"
    """What its time counts."""

    def init(self, key: Key) -> Params:
        """Draws the meta-learner's outer parameters."""
        return self.meta.init(key)


@dataclasses.dataclass(frozen=True)
class Modes:
    """The modes of a task are the parts whose strengths are followed, one by one.

    Raises `ConfigError` without values, or for a threshold that is not finite.
    """

    values: Sequence[int | float]
    """What orders them: singular values, frequencies; ranks 1, 2, … if they are exchangeable."""
    label: str
    """What figures call a value: "singular value $s_k$"."""
    coordinate: str = "mode_value"
    """What labelled arrays call the values: "singular_value"."""
    unit: str = ""
    """Unit of the values, if they have one."""
    exchangeable: bool = False
    """Whether the modes of a task are alike, so that each run has to be put in its own order of
    learning before runs are averaged."""
    p: float = 0.5
    """Strength at which a mode counts as learned: learning times are the t_k(p)."""
    strength: str = "mode strength $a_k$\n(0 nothing, 1 learned)"
    """What figures call the strength of a mode."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(float(value) for value in self.values))
        check(len(self.values) > 0, "modes", self.values, "give a value for each mode")
        check(bool(np.isfinite(self.p)), "p", self.p, "must be finite")

    @property
    def axis(self) -> str:
        """Returns the label of an axis or a legend of the values."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """A probe is a set of queries, and how mode strengths are read off the answers to them."""

    queries: Query
    """The queries, stacked along a leading axis [P, ...], shared by all tasks and times."""
    read: Callable[[Task, Answer], Mapping[str, Array]]
    """`read(task, answers [P, ...])` gives "strength" [K], of each mode, and the extras by name."""
    modes: Modes
    extras: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Axis names of whatever else is read, such as {"off_diagonal": (), "answer": ("x",)}."""

    # Probes are equal if they ask and read alike, whatever the modes are called: so sets of tasks
    # with other spectra share compiled programs.

    def _asks(self) -> tuple[Any, ...]:
        return id(self.queries), self.read

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Probe) and self._asks() == other._asks()

    def __hash__(self) -> int:
        return hash(self._asks())


STRENGTH = "mode_strength"
"""The probe that figures and figures of merit are of, unless another one is named."""


@runtime_checkable
class Domain(Protocol):
    """A domain is a distribution of tasks, and how one task poses queries and gives feedback."""

    @property
    def steps(self) -> int:
        """Observations in one episode, T."""

    @property
    def loss_floor(self) -> float:
        """Returns the expected loss of a learner that knows the task: the irreducible part."""

    @property
    def answer_size(self) -> int:
        """Returns how many numbers one answer has, for learners that must size an output layer."""

    def __hash__(self) -> int:
        """Domains are hashable, as frozen dataclasses are, for programs are compiled for each."""

    def sample_task(self, key: Key) -> Task:
        """Draws a task of the meta-training distribution."""

    def query(self, task: Task, key: Key) -> Query:
        """Draws a query, which is what the learner is asked."""

    def feedback(self, task: Task, query: Query, answer: Answer, key: Key) -> Feedback:
        """Gives the feedback, which is what the learner is told once it has answered."""

    def loss(self, answer: Answer, feedback: Feedback) -> Float[Array, ""]:
        """Scores an answer by the feedback to it: the lower, the better."""

    def encode_query(self, query: Query) -> Float[Array, " n"]:
        """Flattens a query into the vector that a network reads."""

    def encode_feedback(self, feedback: Feedback) -> Float[Array, " m"]:
        """Flattens a feedback into the vector that a network reads."""

    def evaluation(self, points: int) -> TaskSet:
        """Sets up tasks to evaluate learners on, and probes of `points` queries for their modes.

        The number of tasks is left open.
        """


class Regression:
    """What regression domains share: squared errors, and networks that read x and y as they are.

    For a domain with a `sigma`, whose targets are vectors and whose answers are predictions.
    """

    sigma: float

    @property
    def loss_floor(self) -> float:
        """Returns the variance σ² of the noise."""
        return self.sigma**2

    def loss(self, answer: Float[Array, " n_y"], feedback: Float[Array, " n_y"]) -> Array:
        """Computes the squared error, mean over outputs."""
        fix = f"an answer is of the feedback's shape, {jnp.shape(feedback)}"
        check(jnp.shape(answer) == jnp.shape(feedback), "answer", jnp.shape(answer), fix)
        return ((answer - feedback) ** 2).mean()

    def encode_query(self, query: Float[Array, " n_x"]) -> Float[Array, " n_x"]:
        """Leaves x as it is."""
        return query

    def encode_feedback(self, feedback: Float[Array, " n_y"]) -> Float[Array, " n_y"]:
        """Leaves y as it is."""
        return feedback


@dataclasses.dataclass(frozen=True, eq=False)
class TaskSet:
    """Tasks of one domain that learners are measured on: `sample(key_i)` for i < `size`.

    The keys are the same for every set, so that task i of one set is task i of any other that
    samples likewise, whatever it is called.
    """

    name: str
    domain: Domain
    sample: Sample
    """Draws a task from a key. It is kept as a `jax.tree_util.Partial`: arrays that are bound in it
    are arguments of compiled programs, so that sets which differ in these alone share one."""
    probes: Mapping[str, Probe] = dataclasses.field(default_factory=dict)
    """What is read of each learner, by the name under which it is recorded."""
    size: int = 0
    """Tasks in the set. 0: not said yet; a study says it by `config.measure.sized`."""
    updating_size: int | None = None
    """Of these, those on which learners that count updates are measured. None: all."""
    kinds: tuple[LearnerKind, ...] = get_args(LearnerKind)
    """Kinds of contenders that are measured on it (`study.Contender`)."""
    option: str = ""
    """The option that sets the size, for messages."""

    def __post_init__(self) -> None:
        check_name(self.name, "set of tasks")
        for name in self.probes:
            check_name(name, "probe")
        for kind in self.kinds:
            check_choice("kinds", kind, LearnerKind)
        if not isinstance(self.sample, Partial):
            object.__setattr__(self, "sample", Partial(self.sample))

    def size_for(self, clock: str) -> int:
        """Says on how many tasks a learner is measured, by what its time counts."""
        if clock != "updates" or self.updating_size is None:
            return self.size
        return min(self.size, self.updating_size)


def as_subclass(domain: Any, kind: Callable[..., Any], **more: Any) -> Any:
    """Copies a domain as `kind`, a subclass of its class, whose own fields `more` sets."""
    own = {field.name: getattr(domain, field.name) for field in dataclasses.fields(domain)}
    return kind(**own, **more)


def training_tasks(domain: Domain) -> TaskSet:
    """Makes the set of tasks of a domain's meta-training distribution, for measuring losses."""
    return TaskSet("heldout", domain, Sampler(domain))


@dataclasses.dataclass(frozen=True)
class Sampler:
    """`domain.sample_task` as the `sample` of a `TaskSet`; equal if the domains are."""

    domain: Domain

    def __call__(self, key: Key) -> Task:
        return self.domain.sample_task(key)


def kept(make: Callable[P, T]) -> Callable[P, T]:
    """Returns a function that is called once for each choice of arguments, and keeps its result.

    Arguments are hashable. Arrays in the result are values, not tracers, even where the first call
    comes while JAX traces.
    """

    @functools.cache
    @functools.wraps(make)
    def made(*given: P.args, **named: P.kwargs) -> T:
        with jax.ensure_compile_time_eval():
            return make(*given, **named)

    return made  # type: ignore[return-value]


def indexed_keys(key: Key, indices: Int[Array, " n"]) -> Keys:
    """Makes a key for each global index, so that no draw depends on batch, chunk or device."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)


def encoded_episodes(domain: Domain, queries: Query, feedback: Feedback) -> tuple[Any, Any]:
    """Encodes the queries and the feedback of B whole episodes [T, ..., B] as a network reads them.

    That is [T, n, B] and [T, m, B], of NumPy arrays where these are given and encode as they are.
    """
    over_batch_and_time = lambda encode: jax.vmap(jax.vmap(encode, -1, -1))
    x = over_batch_and_time(domain.encode_query)(queries)
    return x, over_batch_and_time(domain.encode_feedback)(feedback)


def encoded_shapes(domain: Domain) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of a query and of the feedback to it, as a network reads them."""

    def pair(key: Key) -> tuple[Array, Array]:
        task = domain.sample_task(key)
        query = domain.query(task, key)
        feedback = domain.feedback(task, query, jnp.zeros(domain.answer_size), key)
        return domain.encode_query(query), domain.encode_feedback(feedback)

    query, feedback = jax.eval_shape(pair, jax.random.key(0))
    return query.shape, feedback.shape
