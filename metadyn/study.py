"""Defines a study: learners of one or more domains, the tasks they are compared on, and criteria.

A study states what is compared and what the science expects. Everything else (training, probing,
storing, resuming, and the figures that every run has) is common to all, and is in `runner.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from numbers import Integral
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from metadyn import dynamics, inner, trajectories
from metadyn.base import (
    STRENGTH,
    Derived,
    Domain,
    Learner,
    LearnerKind,
    MetaLearner,
    Params,
    Probe,
    TaskSet,
)
from metadyn.errors import (
    ConfigError,
    check,
    check_choice,
    check_name,
    check_positive,
    check_unique,
    did_you_mean,
    error_context,
)
from metadyn.learners.attention import LinearAttentionConfig, TransformerConfig
from metadyn.learners.deltanet import DeltaNetConfig
from metadyn.learners.learned_optimizer import LearnedOptimizerConfig
from metadyn.learners.linear_recurrent import MinLSTMConfig
from metadyn.learners.lstm import LSTMConfig
from metadyn.learners.maml import MAMLConfig
from metadyn.learners.networks import GRUConfig
from metadyn.objectives import Objective, ObjectiveOf, prediction_loss
from metadyn.options import options_of
from metadyn.outer import MetaTraining, OuterConfig
from metadyn.store import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRACKED, HELDOUT = "tracked", "heldout"
"""Names of the task sets on which meta-learners are measured at every checkpoint: the first
evaluation tasks, for mode trajectories, and tasks of the training distribution, for excess loss."""
Clock = Literal["observations", "updates"]
Network = Literal[
    "lstm",
    "gru",
    "minlstm",
    "transformer",
    "linear_attention",
    "deltanet",
    "maml",
    "learned_optimizer",
]


@dataclasses.dataclass(frozen=True)
class MeasureConfig:
    """Number of tasks in each measurement. All defaults are our choice."""

    tasks: int = 16_384
    """Number of evaluation tasks for each learner whose time counts observations."""
    updating_tasks: int = 256
    """Number of evaluation tasks for each learner whose time counts updates."""
    shifted_tasks: int = 2048
    """Number of evaluation tasks in each out-of-distribution set."""
    tracked_tasks: int = 128
    """Number of evaluation tasks probed at every checkpoint; 0 for none."""
    heldout_tasks: int = 2048
    """Number of tasks of the training distribution for measuring excess loss; 0 for none."""
    probe_points: int = 32
    """Number of queries in a probe."""
    chunk: int = 4096
    """Number of tasks measured in one call, which bounds the memory."""

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self)]
        disabled = {n for n in ("tracked_tasks", "heldout_tasks") if getattr(self, n) == 0}
        check_positive(self, *(name for name in names if name not in disabled))
        hint = "must be at least 2, as halves are compared, or 0 for none"
        check(self.tracked_tasks != 1, "tracked_tasks", self.tracked_tasks, hint)

    def sized(
        self, tasks: TaskSet, field: str = "tasks", name: str | None = None, **changes: Any
    ) -> TaskSet:
        """Returns a copy of a task set whose size is that of a field of this configuration."""
        updating = self.updating_tasks if field == "tasks" else None
        changes |= {"size": getattr(self, field), "updating_size": updating}
        option = f"measure.{field}"
        return dataclasses.replace(tasks, name=name or tasks.name, option=option, **changes)


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Settings common to all studies. A study adds its own in a subclass."""

    meta: Network = "lstm"
    """The meta-learner to train."""
    lstm: LSTMConfig = LSTMConfig()
    gru: GRUConfig = GRUConfig()
    minlstm: MinLSTMConfig = MinLSTMConfig()
    transformer: TransformerConfig = TransformerConfig()
    linear_attention: LinearAttentionConfig = LinearAttentionConfig()
    deltanet: DeltaNetConfig = DeltaNetConfig()
    maml: MAMLConfig = MAMLConfig()
    learned_optimizer: LearnedOptimizerConfig = LearnedOptimizerConfig()
    outer: OuterConfig = OuterConfig()
    measure: MeasureConfig = MeasureConfig()

    def __post_init__(self) -> None:
        check_choice("meta", self.meta, Network)

    def meta_learner(self, domain: Domain, heads: int = 0) -> Contender:
        """Makes a contender of the chosen meta-learner, for a domain.

        Raises `ConfigError` if the meta-learner cannot serve that domain.
        """
        return to_train(self.meta, getattr(self, self.meta), self.outer, domain, heads)


def to_train(
    option: str, network: Any, outer: OuterConfig, domain: Domain, heads: int = 0
) -> Contender:
    """Makes a contender to train from a meta-learner's configuration, such as `LSTMConfig`.

    `option` is the option that the configuration is set by. Its fields `outer_…` override settings
    of the outer loop. Raises `ConfigError` if the meta-learner cannot serve that domain.
    """
    fields = dataclasses.asdict(network)
    sizes = {f: fields[f] for f in ("hidden", "width", "inner_steps") if f in fields}
    own = {f.removeprefix("outer_"): v for f, v in fields.items() if f.startswith("outer_")}
    return Contender(
        option,
        f"meta-trained {network.label}",
        _meta_learner(network, domain, heads),
        objective=getattr(network, "objective", None),
        own=dataclasses.replace(outer, **own) if own else None,
        options={f: f"{option}.outer_{f}" for f in own},
        option=f"{option}.{max(sizes, key=sizes.__getitem__)}" if sizes else "",  # the largest
    )


@functools.cache
def _constant(learner: Learner) -> Callable[[Params], Learner]:
    """Returns one constant function for equal learners, so that they share compiled programs."""
    return lambda params: learner


@functools.cache
def _meta_learner(network: Any, domain: Domain, heads: int) -> MetaLearner:
    """Returns one meta-learner for equal arguments, so that they share compiled programs."""
    return network.make(domain, heads)


def paper(steps: int, **outer: Any) -> dict[str, Any]:
    """Returns the configuration fields `lstm` and `outer` that all "paper" presets share.

    `steps` and `outer` set fields of the outer loop. All values are our choice.
    """
    outer = {"learning_rate": 4e-3, "warmup": 1000} | outer
    return {"lstm": LSTMConfig(hidden=256), "outer": OuterConfig(steps, **outer)}


@dataclasses.dataclass(frozen=True, eq=False)
class Contender:
    """A learner to compare with others, or a meta-learner to train and then compare.

    Raises `ConfigError` for a name that no file can have, and a kind that does not fit the learner.
    """

    name: str
    label: str
    """Name of the contender in figures."""
    learner: Learner | MetaLearner | Derived
    kind: LearnerKind | None = None
    """Role in the comparison: "ordinary", "meta" (trained), "reference" or "bayes" (one contender,
    the baseline of excess loss). None: "meta" if it is a meta-learner to train, else "ordinary"."""
    times: Sequence[int] | np.ndarray | None = None
    """Steps of its own clock at which it is probed, from 0. None: 0 and after every observation."""
    drawn: bool = True
    """Whether figures show it. False: it is measured for the record only."""
    curve: np.ndarray | None = None
    """Closed form of its mode strengths [time, mode], stored beside the measured ones."""
    objective: ObjectiveOf | None = None
    """Objective that a meta-learner is trained on. None: that of the comparison."""
    own: OuterConfig | None = None
    """Outer-loop settings of this meta-learner alone. None: those of the whole plan."""
    options: Mapping[str, str] | None = None
    """Options that set the fields of `own`, keyed by field, for messages. Those of the outer loop
    set all others. None: no option sets any."""
    option: str = ""
    """Option that sets the learner's size, for messages."""
    derived_from: str = ""
    """Name of the meta-learner that a `Derived` learner takes its trained parameters from. Both are
    in one comparison; the derived contender is not trained itself."""

    def __post_init__(self) -> None:
        check_name(self.name, "contender")
        learner, owner = self.learner, f"of contender {self.name!r}"
        check(isinstance(self.label, str), "label", self.label, f"{owner}, must be text")
        is_learner = isinstance(learner, (Learner, MetaLearner, Derived))
        hint = f"{owner}, must be a `Learner`, or a meta-learner, such as LSTMConfig().make(domain)"
        check(is_learner, "learner", learner, hint)
        check_choice("clock", self.clock, Clock)
        hint = f"{owner}, which counts updates: list the updates to probe it after"
        check(self.times is not None or self.clock == "observations", "times", self.times, hint)
        if isinstance(learner, Learner):
            hint = f"{owner}, must be a whole number from 1, or None"
            for field in ("batch", "points"):
                n = getattr(learner, field)
                check(n is None or (isinstance(n, Integral) and int(n) >= 1), field, n, hint)
            batch_fits = learner.points is None or (learner.batch or 1) <= learner.points
            check(batch_fits, "points", learner.points, f"{owner}, must be at least its batch")
        kinds = [kind for kind in get_args(LearnerKind) if (kind == "meta") == self.trained]
        kinds = [kind for kind in kinds if kind != "bayes" or not self.seeded]
        object.__setattr__(self, "kind", self.kind or kinds[0])
        hint = f"{owner}, a {type(learner).__name__}: choose from {kinds}"
        check(self.kind in kinds, "kind", self.kind, hint)
        named = bool(self.derived_from) or not isinstance(learner, Derived)
        hint = "is derived: name the meta-learner whose parameters it takes"
        check(named, "derived_from", self.derived_from, f"contender {self.name!r} {hint}")
        if self.times is not None:
            object.__setattr__(self, "times", tuple(map(int, inner.checked_times(self.times))))

    @property
    def trained(self) -> bool:
        """Returns whether the contender is a meta-learner to train."""
        return self.seeded and not self.derived_from

    @property
    def seeded(self) -> bool:
        """Returns whether there is a copy of the learner for each outer seed."""
        return not isinstance(self.learner, Learner)

    @property
    def clock(self) -> str:
        """Returns what the learner's time counts: observations for meta-learners."""
        return getattr(self.learner, "clock", "observations")

    @functools.cached_property  # one object, so that compiled programs are reused
    def make(self) -> Callable[[Params], Learner]:
        """Returns the function that makes the learner of outer parameters, or of () without any."""
        learner = self.learner
        return _constant(learner) if isinstance(learner, Learner) else learner.learner

    def remade(self, change: Callable[[Learner], Learner], **fields: Any) -> Contender:
        """Returns a copy whose learner is `change(learner)`, with other `fields` replaced.

        The copy of a meta-learner is not trained. It takes the trained parameters and the clock of
        the original, and is a "reference" if no kind is given. No copy has a closed form, objective
        or outer-loop settings of its own unless they are given.
        """
        learner, make = self.learner, lambda params: change(self.make(params))
        fields = {"curve": None, "objective": None, "own": None, **fields}
        if isinstance(learner, Learner):
            return dataclasses.replace(self, learner=make(()), **fields)
        if self.trained:
            fields.setdefault("kind", "reference")
        fields |= {"derived_from": self.derived_from or self.name}
        return dataclasses.replace(self, learner=Derived(learner, make, self.clock), **fields)

    def times_in(self, domain: Domain) -> Sequence[int]:
        """Returns the steps of the learner's clock at which it is probed in an episode."""
        return range(domain.steps + 1) if self.times is None else tuple(self.times)


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Learners compared on the same tasks of one domain, and how the meta-learners are trained.

    Raises `ConfigError` if two contenders share a name, and for meta-learners without one Bayes.
    """

    domain: Domain
    contenders: Sequence[Contender]
    """Learners to compare, in the order in which figures show them."""
    sets: Sequence[TaskSet] = ()
    """Task sets to measure on after training: each takes the contenders of its `kinds`."""
    pairs: Sequence[tuple[TaskSet, Contender]] = ()
    """Further measurements of one contender each, which need not be one of `contenders`."""
    measure: MeasureConfig = MeasureConfig()
    objective: ObjectiveOf = prediction_loss
    """Objective of all meta-learners that have none of their own."""
    heads: int = 0
    """Number of outputs beyond the answer that the objective needs."""
    name: str = ""
    """Suffix, after "_", of the names of its tracked and held-out sets and of its meta-learners,
    where a study has several comparisons."""
    title: str = ""
    """Name of the comparison in figures."""
    followed: bool = True
    """Whether figures, reports and sweeps follow its meta-learners over outer training."""
    probes: Mapping[str, Callable[[TaskSet], Probe]] = dataclasses.field(default_factory=dict)
    """Functions that make further probes, keyed by name, for every set that has the main probe."""

    def __post_init__(self) -> None:
        check_name(self.name or "main", "comparison")
        names = [contender.name for contender in self.contenders]
        check_unique(names, "name", "two contenders have this name: choose another")
        for name in (tasks.name for tasks in (*self.sets, *(tasks for tasks, _ in self.pairs))):
            hint = "this name is reserved for sets measured at every checkpoint"
            check(not name.startswith((TRACKED, HELDOUT)), "set of tasks", name, hint)
        trained = [meta.name for meta in self.metas]
        for contender in (*self.contenders, *(c for _, c in self.pairs)):
            hint = f"contender {contender.name!r} needs this meta-learner in `contenders`"
            source = contender.derived_from or (contender.name if contender.trained else "")
            check(source in ("", *trained), "derived_from", source, hint)
        bayes_count = sum(contender.kind == "bayes" for contender in self.contenders)
        label = f"comparison {self.name or 'of ' + type(self.domain).__name__}"
        hint = f"{label} has meta-learners, which need exactly one to compare with"
        valid = bayes_count == 1 or not self.metas
        check(valid, "contenders of kind 'bayes'", bayes_count, hint)

    @property
    def metas(self) -> list[Contender]:
        """Returns the meta-learners to train."""
        return [contender for contender in self.contenders if contender.trained]

    @property
    def bayes(self) -> Contender:
        """Returns the contender that is the baseline of excess loss."""
        return next(contender for contender in self.contenders if contender.kind == "bayes")

    @property
    def suffix(self) -> str:
        """Returns the suffix of the names of its tracked and held-out sets and meta-learners."""
        return f"_{self.name}" if self.name else ""

    @functools.cached_property
    def tracked(self) -> TaskSet:
        """Returns the fixed evaluation tasks that are probed at every checkpoint."""
        tasks = self._with_probes(self.domain.evaluation(self.measure.probe_points))
        hint = f"of {tasks.name!r}, must include {STRENGTH!r}, the probe of tracked modes"
        check(STRENGTH in tasks.probes, "probes", sorted(tasks.probes), hint)
        return self.measure.sized(tasks, "tracked_tasks", TRACKED + self.suffix)

    @functools.cached_property
    def heldout(self) -> TaskSet:
        """Returns the tasks of the training distribution that give the loss at every checkpoint."""
        tasks = TaskSet(HELDOUT + self.suffix, self.domain)
        return self.measure.sized(tasks, "heldout_tasks")

    @functools.cached_property
    def measurements(self) -> list[Measurement]:
        """Returns its measurements: at checkpoints, of Bayes on the same sets, after training."""
        tracked = [self.tracked] if self.metas and self.measure.tracked_tasks else []
        tracked += [self.heldout] if self.metas and self.measure.heldout_tasks else []
        compared = [c for c in self.contenders if c.kind in ("meta", "bayes")]
        sets = [self._with_probes(tasks) for tasks in self.sets]
        pairs = [(tasks, c) for tasks in sets for c in self.contenders if c.kind in tasks.kinds]
        pairs += [(self._with_probes(tasks), c) for tasks, c in self.pairs]
        return [
            *(Measurement(self, tasks, c, False) for c in compared for tasks in tracked),
            *(Measurement(self, tasks, c, after_training=True) for tasks, c in pairs),
        ]

    def _with_probes(self, tasks: TaskSet) -> TaskSet:
        """Adds the comparison's further probes to a task set, if it has the main probe."""
        if not self.probes or STRENGTH not in tasks.probes:
            return tasks
        for name in self.probes:
            hint = f"set {tasks.name!r} has a probe of this name: choose another"
            check(name not in tasks.probes, "probe", name, hint)
        probes = {name: make(tasks) for name, make in self.probes.items()}
        return dataclasses.replace(tasks, probes={**tasks.probes, **probes})

    def training(self, contender: Contender) -> MetaTraining:
        """Returns one of its meta-learners with its objective and outer-loop settings."""
        meta = contender.learner
        assert not isinstance(meta, Learner | Derived)
        objective = (contender.objective or self.objective)(self.domain, meta)
        hint = f"of {contender.name!r}, must be a `metadyn.objectives.Objective`"
        check(isinstance(objective, Objective), "objective", objective, hint)
        return MetaTraining(meta, objective, contender.own, contender.options)

    def with_contender(self, contender: Contender) -> Comparison:
        """Returns a copy with a contender inserted after the last one of its kind.

        A reference may also follow an ordinary learner. Returns itself if it has none of that kind.
        """
        kinds = {"ordinary", "reference"} if contender.kind == "reference" else {contender.kind}
        positions = [i for i, c in enumerate(self.contenders) if c.kind in kinds]
        if not positions:
            return self
        contenders = [*self.contenders]
        contenders.insert(positions[-1] + 1, contender)
        return dataclasses.replace(self, contenders=contenders)

    def alone(self, name: str, title: str = "", **changes: Any) -> Comparison:
        """Returns a copy of its meta-learners and Bayes only, measured over outer training."""
        contenders = [c for c in self.contenders if c.kind in ("meta", "bayes")]
        changes = {"contenders": contenders, "sets": (), "pairs": ()} | changes
        return dataclasses.replace(self, name=name, title=title, **changes)


class Measurement(NamedTuple):
    """A contender, the task set to measure it on, and the comparison that plans it."""

    comparison: Comparison
    tasks: TaskSet
    contender: Contender
    after_training: bool
    """Whether it is made once after training. Otherwise: at every checkpoint or, of Bayes, once
    before training."""

    @property
    def at_checkpoints(self) -> bool:
        """Returns whether the measurement is made at every checkpoint."""
        return self.contender.trained and not self.after_training

    @property
    def meta(self) -> str:
        """Returns the name in `Plan.trained` of the meta-learner whose outer parameters it uses."""
        return (self.contender.derived_from or self.contender.name) + self.comparison.suffix

    @property
    def label(self) -> str:
        """Returns the label of the measurement in messages, from its contender and task set."""
        return f"{self.contender.name} on {self.tasks.name}"

    def arguments(
        self, params: Mapping[str, Params], key: Any
    ) -> tuple[TaskSet, Contender, Params, Any, int]:
        """Returns the arguments of `measuring.calls` and `measuring.readings`.

        `params` are the outer parameters of all meta-learners in `Plan.trained`, or their shapes.
        """
        outer_params = params.get(self.meta, ()) if self.contender.seeded else ()
        return self.tasks, self.contender, outer_params, key, self.comparison.measure.chunk


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that one configuration of a study trains and measures."""

    outer: OuterConfig
    comparisons: Sequence[Comparison]
    """Comparisons to measure. Their meta-learners are all trained side by side."""

    def __post_init__(self) -> None:
        self.outer.check_batch(self.trained.values())
        names = [(m.tasks.name, m.contender.name) for m in self.measurements]
        check_unique(names, "measurement", "is planned twice: rename the task set")

    @functools.cached_property
    def trained(self) -> dict[str, MetaTraining]:
        """Returns every meta-learner to train, keyed by its name with its comparison's suffix."""
        metas = [(comparison, meta) for comparison in self.comparisons for meta in comparison.metas]
        named = [(meta.name + each.suffix, each.training(meta)) for each, meta in metas]
        check_unique([name for name, _ in named], "name", "two meta-learners have this name")
        return dict(named)

    @functools.cached_property
    def measurements(self) -> list[Measurement]:
        """Returns the measurements of all comparisons."""
        return [m for comparison in self.comparisons for m in comparison.measurements]


@dataclasses.dataclass(frozen=True)
class Criterion:
    """A statement of the science, with its measured value and whether that passes."""

    name: str
    value: float
    low: float
    high: float
    expected: str
    """What the science says, in words and numbers."""
    passed: bool | None
    """Whether the value passes. None: it is reported and not judged."""
    verdict: str = ""
    """Position of the whole interval with respect to the bounds (`verdict`); "" without bounds."""

    def __post_init__(self) -> None:
        for field in ("name", "expected"):
            text = getattr(self, field)
            check(isinstance(text, str), f"{field} of a criterion", text, "must be text")
        for field in ("value", "low", "high"):
            object.__setattr__(self, field, float(getattr(self, field)))
        if self.passed is not None:
            object.__setattr__(self, "passed", bool(self.passed))


def verdict(estimate: dynamics.Estimate, at_least: float, at_most: float) -> str:
    """Returns whether a statement "holds", is "refuted", or is "undecided: " and what would decide.

    A statement holds if the whole interval lies within the bounds. It is refuted if the whole
    interval lies beyond one of them, and undecided otherwise. An interval shrinks by about √n with
    n times as many tasks and seeds. A value that does not exist needs other runs.
    """
    value, low, high = (float(np.asarray(number)) for number in estimate)
    if not all(map(math.isfinite, (value, low, high))):
        problem = "it has no value or no interval"
        return f"undecided: {problem}; more tasks or longer training may give it one"
    if at_least <= low and high <= at_most:
        return "holds"
    if high < at_least or low > at_most:
        return "refuted"
    ends = [(bound, low if bound < value else high) for bound in (at_least, at_most)]
    crossed = [(bound, end) for bound, end in ends if min(value, end) <= bound <= max(value, end)]
    factor = max(((end - value) / (bound - value or math.nan)) ** 2 for bound, end in crossed)
    if not factor <= 100:
        return "undecided: more than 100 times the tasks and seeds would decide it"
    return f"undecided: about {max(factor, 1.1):.2g} times the tasks and seeds would decide it"


def criterion(
    name: str,
    estimate: dynamics.Estimate,
    expected: str,
    at_most: float = math.inf,
    at_least: float = -math.inf,
    surely: bool = False,
) -> Criterion:
    """Makes a criterion of an estimate, which passes if its value lies within the bounds.

    With `surely` it passes only if its whole interval does. Without bounds it is reported and not
    judged. A value that does not exist (NaN) never passes. `expected` says what the number is;
    the bounds are appended to it.
    """
    value, low, high = (float(np.asarray(number)) for number in estimate)
    if not (math.isfinite(at_most) or math.isfinite(at_least)):
        return Criterion(name, value, low, high, expected, None)
    outcome = verdict(estimate, at_least, at_most)
    passed = outcome == "holds" if surely else at_least <= value <= at_most
    bounds = f"between {at_least:g} and {at_most:g}"
    if at_least in (at_most, -math.inf):
        bounds = f"{'at most ' * (at_least < at_most)}{at_most:g}"
    elif at_most == math.inf:
        bounds = f"at least {at_least:g}"
    expected += f"; {'the whole interval ' * surely}{bounds}"
    return Criterion(name, value, low, high, expected, passed, outcome)


def censored(name: str, data: Any) -> Criterion:
    """Reports the number of modes that are never learned, which a slope leaves out."""
    t = dynamics.times_of(data)(dynamics.strength(data).mean((0, 1)))
    expected = f"modes that never reach {trajectories.modes(data).p:g}: a slope is of the others"
    return criterion(f"{name}_censored_modes", dynamics.exact(float(np.isnan(t).sum())), expected)


def staggering(results: Results, name: str, expected: str, **bounds: Any) -> Iterator[Criterion]:
    """Judges the staggering of one learner in distribution, and reports its censored modes."""
    data = results["in_distribution", name]
    merit = dynamics.merit_name(data)
    yield criterion(f"{name}_{merit}", dynamics.merit(data), expected, **bounds)
    yield censored(name, data)


def beyond_bayes(results: Results, within: float) -> Iterator[Criterion]:
    """Judges each meta-learner's staggering minus that of Bayes, and reports its own."""
    metas = results.learners("in_distribution", "meta")
    (bayes,) = results.learners("in_distribution", "bayes").values()
    merit = dynamics.merit_name(bayes)
    for name, data in metas.items():
        label = trajectories.about(data).label
        yield criterion(
            f"{name}_minus_bayes_{merit}",
            dynamics.difference(data, bayes),
            f"the {label} staggers as Bayes does: its {merit} minus Bayes'",
            at_most=within,
            at_least=-within,
        )
        yield from staggering(results, name, "its own, for the record")


def heldout_excess(results: Results, name: str, suffix: str = "") -> dynamics.Estimate:
    """Estimates the excess loss of one meta-learner on held-out tasks after training."""
    (bayes,) = results.learners(HELDOUT + suffix, "bayes").values()
    return dynamics.excess_over_bayes(results[HELDOUT + suffix, name].isel(outer_step=-1), bayes)


def excess(results: Results, at_most: float = math.inf, suffix: str = "") -> Iterator[Criterion]:
    """Judges the excess loss of each meta-learner on held-out tasks after training."""
    for name, data in results.learners(HELDOUT + suffix, "meta").items():
        label = trajectories.about(data).label
        expected = f"the {label} is near Bayes on held-out tasks: excess loss"
        estimate = heldout_excess(results, name, suffix)
        yield criterion(f"{name}{suffix}_excess_loss", estimate, expected, at_most=at_most)


def as_bayes(modes: str) -> dict[str, dict[str, str]]:
    """Returns the claims of regression studies that a meta-trained LSTM learns as Bayes does."""
    slope_claim = f"A meta-trained LSTM learns nearly all {modes} at once, as Bayes does"
    loss_claim = "Its losses are near those of Bayes-optimal inference"
    slopes, losses = {"lstm_minus_bayes_slope": slope_claim}, {"lstm_excess_loss": loss_claim}
    return {"learning_times": slopes, "distance_to_bayes": losses}


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of figures of merit, each cell of which is the criterion named ROW_COLUMN."""

    title: str
    rows: Mapping[str, str]
    """Labels of the rows, keyed by the row's name."""
    columns: Mapping[str, str]
    """Labels of the columns, keyed by the column's name."""
    figure: str
    """Name of the figure that shows the table's values."""


@dataclasses.dataclass(frozen=True)
class Study:
    """A study, defined as the module-level variable `study` of a Python file."""

    name: str
    presets: Mapping[str, Any]
    """Configurations keyed by preset, "quick" among them: frozen dataclasses of one type."""
    plan: Callable[[Any], Plan]
    criteria: Callable[[Any, Results], Iterable[Criterion]]
    """`criteria(config, results)` makes the criteria from what was measured."""
    figures: Mapping[str, Callable[[Results], Figure]] = dataclasses.field(default_factory=dict)
    """Functions that draw figures of this study alone, keyed by name. Every run has others too."""
    section: str = ""
    """Section of the paper, by which a folder of studies is ordered to be run and reported."""
    claims: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    """Texts of the claims in `metadyn claims`, keyed by the name of the figure that shows a claim,
    then by the name of the criterion that judges it."""
    tables: Sequence[Table] = ()
    closed: str = ""
    """Reason why the study takes no further learner. "": it takes them."""

    def __post_init__(self) -> None:
        check_name(self.name, "study")
        for preset, config in self.presets.items():
            valid = dataclasses.is_dataclass(config) and not isinstance(config, type)
            check(valid, f"preset {preset!r}", config, "must be an object of a frozen dataclass")
        for name in self.figures:
            check_name(name, "figure")
        make_plan, complaint = self.plan, f"study {self.name!r}: its plan cannot be made"

        @functools.wraps(make_plan)
        def plan(config: Any) -> Plan:
            with error_context(complaint, ConfigError):
                try:
                    result = make_plan(config)
                except (MemoryError, OverflowError) as error:
                    integers = lambda c: {o: n for o, n in options_of(c) if isinstance(n, int)}
                    sizes, usual = integers(config), integers(next(iter(self.presets.values())))
                    growth = lambda option: sizes[option] / max(usual.get(option, 1), 1)
                    largest = max(sizes, key=growth, default="preset")
                    hint = "too large a number to set the study up with; lower it"
                    raise ConfigError(f"{largest} {sizes.get(largest)}: {hint}") from error
                check(isinstance(result, Plan), "plan", result, "must return a `metadyn.Plan`")
                return result

        object.__setattr__(self, "plan", plan)

    def config(self, preset: str, **fields: Any) -> Any:
        """Returns the configuration of a preset, with the given fields replaced."""
        check(preset in self.presets, "preset", preset, f"choose from {', '.join(self.presets)}")
        return dataclasses.replace(self.presets[preset], **fields)

    def beside(self, name: str, *more: Callable[[Comparison], Contender]) -> Study:
        """Returns a copy of this study, named `name`, with further contenders.

        Each of `more` makes a contender for a comparison of the study, from the comparison's
        `domain` and the `heads` that its objective needs. Ordinary learners are measured on every
        set that those of the study are. Meta-learners are trained on the same episodes and measured
        on the same tasks as those of the study. Each contender appears in every figure and
        criterion of its kind. Raises `ConfigError` for a study that is `closed`.
        """
        check(
            not self.closed, "study", self.name, f"takes no learner beside its own: {self.closed}"
        )

        def with_contenders(comparison: Comparison) -> Comparison:
            for make in more:
                contender = make(comparison)
                hint = "`beside` takes functions that return a `metadyn.Contender`"
                check(isinstance(contender, Contender), "contender", type(contender).__name__, hint)
                comparison = comparison.with_contender(contender)
            return comparison

        return self._with_comparisons(name, with_contenders)

    def probing(self, name: str, **probes: Callable[[TaskSet], Probe]) -> Study:
        """Returns a copy of this study, named `name`, with further probes beside its own.

        Each of `probes` makes a probe for a task set that has the main probe. Its readings are
        stored under its name, and figures of modes are drawn of them too.
        """

        def with_probes(comparison: Comparison) -> Comparison:
            for probe in probes:
                hint = "the study has a further probe of this name: choose another"
                check(probe not in comparison.probes, "probe", probe, hint)
            return dataclasses.replace(comparison, probes={**comparison.probes, **probes})

        return self._with_comparisons(name, with_probes)

    def judged(self, config: Any, results: Results) -> list[Criterion]:
        """Returns the criteria. Raises `ConfigError` if they fail, or two of them share a name."""
        with error_context(f"study {self.name!r}: its criteria cannot be computed"):
            criteria = list(self.criteria(config, results))
            names = [criterion.name for criterion in criteria]
        check_unique(names, f"study {self.name!r}: criterion", "two have this name: rename one")
        return criteria

    def own_figures(self) -> dict[str, Callable[[Results], Figure]]:
        """Returns `figures` so that one that fails raises a `ConfigError` that names it."""
        from metadyn.figures import checked

        complaint = f"study {self.name!r}: figure {{!r}} cannot be drawn"
        return {
            n: error_context(complaint.format(n))(checked(draw)) for n, draw in self.figures.items()
        }

    def _with_comparisons(self, name: str, change: Callable[[Comparison], Comparison]) -> Study:
        """Returns a copy of this study, named `name`, that applies `change` to each comparison."""

        def plan(config: Any) -> Plan:
            base = self.plan(config)
            comparisons = [change(comparison) for comparison in base.comparisons]
            hint = f"{self.name!r} has no contender of that kind: give the new one another"
            changed = any(a is not b for a, b in zip(base.comparisons, comparisons, strict=True))
            check(changed, "study", name, hint)
            return dataclasses.replace(base, comparisons=comparisons)

        return dataclasses.replace(self, name=name, plan=plan)


def studies_folder() -> Path:
    """Returns the folder of the studies that come with metadyn, in the package or its checkout."""
    installed = Path(__file__).parent / "experiments"
    return installed if installed.is_dir() else installed.parent.parent / "experiments"


def study_names() -> list[str]:
    """Returns the names of the studies that come with metadyn."""
    return sorted(path.stem for path in studies_folder().glob("*.py"))


def load_study(name: str) -> Study:
    """Loads a study by the name of one that comes with metadyn, or by the path of a Python file.

    Raises `ConfigError` if there is none.
    """
    path = str(studies_folder() / f"{name}.py") if name in study_names() else name
    hint = f"there is no such file, and no such study: choose from {', '.join(study_names())}"
    hint = "is a folder: name one study, or a Python file" if os.path.isdir(path) else hint
    is_file = os.path.isfile(path)  # False too for what cannot be a path
    check(is_file, "study", name, hint + did_you_mean(name, study_names()))
    if (parent := str(Path(path).absolute().parent)) not in sys.path:
        sys.path.append(parent)  # so that the file can import its neighbours
    module = ModuleType(f"metadyn_study_{Path(path).stem}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # where dataclasses and their docstrings are looked up
    with error_context(f"study = {name!r}: cannot be imported"):
        SourceFileLoader(module.__name__, path).exec_module(module)
    study: Any = getattr(module, "study", None)
    check(isinstance(study, Study), "study", name, "defines no `study = metadyn.Study(...)`")
    return study


def load_studies(folder: str) -> list[Study]:
    """Loads the studies that the files of a folder define: first those of the paper, by section.

    Raises `ConfigError` if a file defines no study, or the folder holds no Python file.
    """
    paths = sorted(Path(folder).glob("*.py"))
    check(paths, "study", folder, "the folder holds no studies")
    studies = [load_study(str(path)) for path in paths]
    in_paper = lambda study: study.section.startswith("§")
    return sorted(studies, key=lambda study: (not in_paper(study), study.section, study.name))
