"""What a study is: learners of one or more domains, the tasks they are compared on, and criteria.

A study says what is compared and what the science expects. Everything else (training, probing,
storing, resuming, drawing what every run has) is the same for all, and is in `runner.py`.
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
    training_tasks,
)
from metadyn.errors import (
    ConfigError,
    check,
    check_choice,
    check_name,
    check_positive,
    check_unique,
    error_context,
    meant,
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
"""The sets of tasks on which meta-learners are measured at every checkpoint: the first of those of
evaluation, for mode trajectories; and some of the training distribution, for excess loss."""
Clock = Literal["observations", "updates"]
OWN = ("learning_rate", "batch", "updates_per_step")
"""Settings of the outer loop that a meta-learner's configuration may have as `outer_…`."""
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
    """How many tasks each measurement takes. All of it is our choice."""

    tasks: int = 16_384
    """Evaluation tasks on which every learner that counts observations is measured."""
    updating_tasks: int = 256
    """Evaluation tasks on which every learner that counts updates is measured."""
    shifted_tasks: int = 2048
    """Evaluation tasks of each set that is out of distribution."""
    tracked_tasks: int = 128
    """Evaluation tasks probed at every checkpoint; 0 for none."""
    heldout_tasks: int = 2048
    """Tasks of the training distribution on which the excess loss is measured; 0 for none."""
    probe_points: int = 32
    """Queries in a probe."""
    chunk: int = 4096
    """Tasks measured at a time, which bounds the memory."""

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self)]
        none = {n for n in ("tracked_tasks", "heldout_tasks") if getattr(self, n) == 0}
        check_positive(self, *(name for name in names if name not in none))
        fix = "must be at least 2, as halves are compared, or 0 for none"
        check(self.tracked_tasks != 1, "tracked_tasks", self.tracked_tasks, fix)

    def sized(
        self, tasks: TaskSet, field: str = "tasks", name: str | None = None, **changes: Any
    ) -> TaskSet:
        """Returns a set of tasks with the size that a field of this configuration gives."""
        updating = self.updating_tasks if field == "tasks" else None
        changes |= {"size": getattr(self, field), "updating_size": updating}
        option = f"measure.{field}"
        return dataclasses.replace(tasks, name=name or tasks.name, option=option, **changes)


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """The settings that every study has; those of one study alone are added in a subclass."""

    meta: Network = "lstm"
    """The meta-learner that is trained."""
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
        """Makes the chosen meta-learner for a domain, as a contender.

        Raises `ConfigError` if it cannot serve that domain.
        """
        return to_train(self.meta, getattr(self, self.meta), self.outer, domain, heads)


def to_train(
    option: str, network: Any, outer: OuterConfig, domain: Domain, heads: int = 0
) -> Contender:
    """Makes a contender of a meta-learner's configuration, which options set.

    Raises `ConfigError` if it cannot serve that domain.
    """
    fields = dataclasses.asdict(network)
    sizes = {f: fields[f] for f in ("hidden", "width", "inner_steps") if f in fields}
    own: dict[str, Any] = {f: fields[f"outer_{f}"] for f in OWN if f"outer_{f}" in fields}
    return Contender(
        option,
        f"meta-trained {network.label}",
        _made(network, domain, heads),
        objective=getattr(network, "objective", None),
        own=dataclasses.replace(outer, **own) if own else None,
        options={f: f"{option}.outer_{f}" if f in own else f"outer.{f}" for f in OWN},
        option=f"{option}.{max(sizes, key=sizes.__getitem__)}" if sizes else "",  # the largest
    )


@functools.cache
def _always(learner: Learner) -> Callable[[Params], Learner]:
    """One constant function for equal learners, so that what is compiled of one is found again."""
    return lambda params: learner


@functools.cache
def _made(network: Any, domain: Domain, heads: int) -> MetaLearner:
    """One object for all that train the same network, so that what measures it is compiled once."""
    return network.make(domain, heads)


def paper(steps: int, **outer: Any) -> dict[str, Any]:
    """Returns the fields `lstm` and `outer` that presets called "paper" share.

    `steps` and `outer` are of the outer loop. All of it is our choice.
    """
    outer = {"learning_rate": 4e-3, "warmup": 1000} | outer
    return {"lstm": LSTMConfig(hidden=256), "outer": OuterConfig(steps, **outer)}


@dataclasses.dataclass(frozen=True, eq=False)
class Contender:
    """A learner to compare with others, or a meta-learner to train and then compare.

    Raises `ConfigError` for a name that cannot be that of a file, and a kind that does not fit.
    """

    name: str
    label: str
    """What figures call it."""
    learner: Learner | MetaLearner | Derived
    kind: LearnerKind | None = None
    """What it is compared as: "ordinary" learners, "meta" (of meta-learners), "bayes", of which
    there is one and which excess loss is over, or a "reference". None: by what it is."""
    times: Sequence[int] | np.ndarray | None = None
    """Steps of its own clock at which it is probed, from 0. None: after every observation."""
    drawn: bool = True
    """Whether it has a place in figures, or is measured for the record."""
    curve: np.ndarray | None = None
    """Closed form of its mode strengths [time, mode], to be stored beside them."""
    objective: ObjectiveOf | None = None
    """What a meta-learner is trained on. None: the objective of the comparison."""
    own: OuterConfig | None = None
    """Settings of a meta-learner's own optimiser. None: those of the whole outer loop."""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The options that set fields of `own`, by field, for messages."""
    option: str = ""
    """The option that sets its size, for messages."""
    of: str = ""
    """Name of a meta-learner of the same comparison, if `learner` is `Derived` from it: this
    contender is made of its trained parameters, and is not trained itself."""

    def __post_init__(self) -> None:
        check_name(self.name, "contender")
        learner, who = self.learner, f"of contender {self.name!r}"
        check(isinstance(self.label, str), "label", self.label, f"{who}, must be words")
        known = isinstance(learner, (Learner, MetaLearner, Derived))
        fix = f"{who}, must be a `Learner`, or a meta-learner, such as LSTMConfig().make(domain)"
        check(known, "learner", learner, fix)
        check_choice("clock", self.clock, Clock)
        fix = f"{who}, which counts updates: say after which of them it is probed"
        check(self.times is not None or self.clock == "observations", "times", self.times, fix)
        if isinstance(learner, Learner):
            fix = f"{who}, must be a whole number from 1, or None"
            for field in ("batch", "points"):
                n = getattr(learner, field)
                check(n is None or (isinstance(n, Integral) and int(n) >= 1), field, n, fix)
            enough = learner.points is None or (learner.batch or 1) <= learner.points
            check(enough, "points", learner.points, f"{who}, must be at least its batch")
        kinds = [kind for kind in get_args(LearnerKind) if (kind == "meta") == self.trained]
        kinds = [kind for kind in kinds if kind != "bayes" or not self.seeded]
        object.__setattr__(self, "kind", self.kind or kinds[0])
        fix = f"{who}, a {type(learner).__name__}: choose from {kinds}"
        check(self.kind in kinds, "kind", self.kind, fix)
        fix = f"contender {self.name!r} is derived: name the meta-learner whose parameters it takes"
        check(bool(self.of) or not isinstance(learner, Derived), "of", self.of, fix)
        if self.times is not None:
            object.__setattr__(self, "times", tuple(map(int, inner.checked(self.times))))

    @property
    def trained(self) -> bool:
        """Tells whether it is a meta-learner that is trained."""
        return self.seeded and not self.of

    @property
    def seeded(self) -> bool:
        """Tells whether there is one of it for each outer seed."""
        return not isinstance(self.learner, Learner)

    @property
    def clock(self) -> str:
        """Says what its time counts: of meta-learners, observations."""
        return getattr(self.learner, "clock", "observations")

    @functools.cached_property  # one object, so that what is compiled of it is found again
    def make(self) -> Callable[[Params], Learner]:
        """Returns the function from outer parameters, or () if there are none, to the learner."""
        learner = self.learner
        return _always(learner) if isinstance(learner, Learner) else learner.learner

    def remade(self, change: Callable[[Learner], Learner], **fields: Any) -> Contender:
        """Returns a copy whose learner is `change(learner)`, with some other fields.

        The copy of a meta-learner is not trained: it takes the trained parameters of the original,
        and is a "reference" if no kind is given. Its clock is the original's; it has no closed
        form, objective or optimiser of its own.
        """
        learner, make = self.learner, lambda params: change(self.make(params))
        fields = {"curve": None, "objective": None, "own": None, **fields}
        if isinstance(learner, Learner):
            return dataclasses.replace(self, learner=make(()), **fields)
        if self.trained:
            fields.setdefault("kind", "reference")
        meta, of = (learner.meta, self.of) if isinstance(learner, Derived) else (learner, self.name)
        changed = Derived(meta, make, self.clock)
        return dataclasses.replace(self, learner=changed, of=of, **fields)

    def times_in(self, domain: Domain) -> Sequence[int]:
        """Returns the steps of its clock at which it is probed in an episode of a domain."""
        return range(domain.steps + 1) if self.times is None else tuple(self.times)


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Learners of one domain, how its meta-learners are trained, and the tasks they all get.

    Raises `ConfigError` if names are taken twice, or there are meta-learners and no Bayes.
    """

    domain: Domain
    contenders: Sequence[Contender]
    """In the order in which figures show them."""
    sets: Sequence[TaskSet] = ()
    """What they are measured on, once training is done: each on the sets that are for its kind."""
    pairs: Sequence[tuple[TaskSet, Contender]] = ()
    """Measurements beside these, of one learner on one set; it need not be among `contenders`."""
    measure: MeasureConfig = MeasureConfig()
    objective: ObjectiveOf = prediction_loss
    """What its meta-learners are trained on."""
    heads: int = 0
    """Outputs beyond the answer that the objective needs."""
    name: str = ""
    """Ending, after "_", of the names of its tracked and held-out sets and of its meta-learners,
    where a study has several comparisons."""
    title: str = ""
    """What figures call it."""
    followed: bool = True
    """Whether figures, reports and sweeps follow its meta-learners over outer training."""
    probes: Mapping[str, Callable[[TaskSet], Probe]] = dataclasses.field(default_factory=dict)
    """What is read beside the main probe, by name, wherever that is read."""

    def __post_init__(self) -> None:
        check_name(self.name or "main", "comparison")
        names = [contender.name for contender in self.contenders]
        check_unique(names, "name", "two contenders have this name: choose another")
        for name in (tasks.name for tasks in (*self.sets, *(tasks for tasks, _ in self.pairs))):
            fix = "sets measured at every checkpoint are called so: give another name"
            check(not name.startswith((TRACKED, HELDOUT)), "set of tasks", name, fix)
        trained = [each.name for each in self.metas]
        for contender in (*self.contenders, *(who for _, who in self.pairs)):
            fix = f"contender {contender.name!r} is made of a meta-learner that is not compared"
            of = contender.of or (contender.name if contender.trained else "")
            check(of in ("", *trained), "of", of, fix)
        bayes = sum(contender.kind == "bayes" for contender in self.contenders)
        lacking = f"comparison {self.name or 'of ' + type(self.domain).__name__}"
        fix = "meta-learners are compared with one contender of kind 'bayes'"
        check(bayes == 1 or not self.metas, lacking, f"{bayes} of kind 'bayes'", fix)

    @property
    def metas(self) -> list[Contender]:
        """Returns the meta-learners."""
        return [contender for contender in self.contenders if contender.trained]

    @property
    def bayes(self) -> Contender:
        """Returns the contender that excess loss is reckoned from."""
        return next(contender for contender in self.contenders if contender.kind == "bayes")

    @property
    def suffix(self) -> str:
        """Returns the ending of the names of its own sets of tasks."""
        return f"_{self.name}" if self.name else ""

    @functools.cached_property
    def tracked(self) -> TaskSet:
        """Returns the fixed evaluation tasks, probed at every checkpoint."""
        tasks = self._probed(self.domain.evaluation(self.measure.probe_points))
        fix = f"call one of the probes of {tasks.name!r} {STRENGTH!r}: it is what is tracked"
        check(STRENGTH in tasks.probes, "probes", sorted(tasks.probes), fix)
        return self.measure.sized(tasks, "tracked_tasks", TRACKED + self.suffix)

    @functools.cached_property
    def heldout(self) -> TaskSet:
        """Returns tasks of the training distribution, for the loss at every checkpoint."""
        tasks = training_tasks(self.domain)
        return self.measure.sized(tasks, "heldout_tasks", HELDOUT + self.suffix)

    @property
    def watched(self) -> tuple[TaskSet, ...]:
        """Lists the sets that meta-learners are measured on at every checkpoint, and Bayes once."""
        tracked = (self.tracked,) if self.measure.tracked_tasks else ()
        heldout = (self.heldout,) if self.measure.heldout_tasks else ()
        return (*tracked, *heldout) if self.metas else ()

    @functools.cached_property
    def measurements(self) -> list[tuple[TaskSet, Contender]]:
        """Lists each set with each contender that is measured on it once training is done."""
        sets = [self._probed(tasks) for tasks in self.sets]
        found = [(tasks, c) for tasks in sets for c in self.contenders if c.kind in tasks.kinds]
        return found + [(self._probed(tasks), contender) for tasks, contender in self.pairs]

    def _probed(self, tasks: TaskSet) -> TaskSet:
        if not self.probes or STRENGTH not in tasks.probes:
            return tasks
        more = {name: make(tasks) for name, make in self.probes.items()}
        return dataclasses.replace(tasks, probes={**tasks.probes, **more})

    def training(self, contender: Contender) -> MetaTraining:
        """Returns one of its meta-learners with its objective and the settings of its optimiser."""
        meta = contender.learner
        assert not isinstance(meta, Learner | Derived)
        objective = (contender.objective or self.objective)(self.domain, meta)
        fix = f"that of {contender.name!r} must be a `metadyn.objectives.Objective`"
        check(isinstance(objective, Objective), "objective", objective, fix)
        return MetaTraining(meta, objective, contender.own, contender.options)

    def joined(self, contender: Contender) -> Comparison:
        """Adds a contender behind those of its kind; returns itself if there are none.

        Meta-learners join where others are trained, and the rest where there are any like it.
        """
        like = {"ordinary", "reference"} if contender.kind == "reference" else {contender.kind}
        places = [i for i, each in enumerate(self.contenders) if each.kind in like]
        if not places:
            return self
        contenders = [*self.contenders]
        contenders.insert(places[-1] + 1, contender)
        return dataclasses.replace(self, contenders=contenders)

    def alone(self, name: str, title: str = "", **changes: Any) -> Comparison:
        """Returns a copy of its meta-learners and Bayes alone, measured over outer training."""
        kept = [each for each in self.contenders if each.kind in ("meta", "bayes")]
        changes = {"contenders": kept, "sets": (), "pairs": ()} | changes
        return dataclasses.replace(self, name=name, title=title, **changes)


class Measurement(NamedTuple):
    """One contender on one set of tasks, and the comparison that asks for it."""

    part: Comparison
    tasks: TaskSet
    contender: Contender
    watched: bool
    """Whether it is made at every checkpoint, or, of Bayes, once before training."""

    @property
    def at_checkpoints(self) -> bool:
        """Tells whether it is made at every checkpoint."""
        return self.watched and self.contender.trained

    @property
    def meta(self) -> str:
        """Names the meta-learner, in `Plan.trained`, whose outer parameters it takes."""
        return (self.contender.of or self.contender.name) + self.part.suffix

    @property
    def called(self) -> str:
        """Names it for messages, by the names of the contender and the set."""
        return f"{self.contender.name} on {self.tasks.name}"

    def arguments(
        self, params: Mapping[str, Params], key: Any
    ) -> tuple[TaskSet, Contender, Params, Any, int]:
        """Returns what `measuring.calls` and `readings` take; `params` are those of `Plan.trained`.

        They may be shapes.
        """
        of_one, chunk = params.get(self.meta, ()), self.part.measure.chunk
        return self.tasks, self.contender, of_one, key, chunk


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that one configuration of a study trains and measures."""

    outer: OuterConfig
    comparisons: Sequence[Comparison]
    """All meta-learners of all comparisons are trained side by side."""

    def __post_init__(self) -> None:
        self.outer.check_batch(self.trained.values())
        names = [(each.tasks.name, each.contender.name) for each in self.every]
        check_unique(names, "measurement", "is asked for twice: rename the set")
        for tasks in (each.tasks for each in self.every):
            check(tasks.size >= 1, tasks.option or tasks.name, tasks.size, "must be 1 or more")

    @functools.cached_property
    def trained(self) -> dict[str, MetaTraining]:
        """Lists every meta-learner of every comparison, by its name and the comparison's ending."""
        parts = [(part, contender) for part in self.comparisons for contender in part.metas]
        found = [(meta.name + part.suffix, part.training(meta)) for part, meta in parts]
        check_unique([name for name, _ in found], "name", "two meta-learners have this name")
        return dict(found)

    @functools.cached_property
    def every(self) -> list[Measurement]:
        """Lists all that is measured: at checkpoints, Bayes beside, and once training is done."""
        found = []
        for part in self.comparisons:
            both = [c for c in part.contenders if c.kind in ("meta", "bayes")]
            watched = [(tasks, who) for who in both for tasks in part.watched]
            found += [Measurement(part, *pair, watched=True) for pair in watched]
            found += [Measurement(part, *pair, watched=False) for pair in part.measurements]
        return found


@dataclasses.dataclass(frozen=True)
class Criterion:
    """One statement of the science, measured."""

    name: str
    value: float
    low: float
    high: float
    expected: str
    """What the science says, in words and numbers."""
    passed: bool | None
    """None: reported beside the criteria, with nothing to pass."""
    verdict: str = ""
    """What the whole interval says of the bounds (`verdict`); "" without bounds."""

    def __post_init__(self) -> None:
        for field in ("name", "expected"):
            text = getattr(self, field)
            check(isinstance(text, str), f"{field} of a criterion", text, "must be words")
        for field in ("value", "low", "high"):
            object.__setattr__(self, field, float(getattr(self, field)))
        if self.passed is not None:
            object.__setattr__(self, "passed", bool(self.passed))


def verdict(estimate: dynamics.Estimate, at_least: float, at_most: float) -> str:
    """Says whether a statement "holds", is "refuted", or is "undecided: " and what would decide it.

    It holds if the whole interval lies within the bounds, is refuted if the whole interval lies
    beyond one of them, and is undecided in between. More tasks and seeds, n times as many, narrow
    an interval by about √n; a value that is not there needs other runs.
    """
    value, low, high = (float(np.asarray(part)) for part in estimate)
    if not all(map(math.isfinite, (value, low, high))):
        lacks = "it has no value or no interval"
        return f"undecided: {lacks}; more tasks or longer training may give it one"
    if at_least <= low and high <= at_most:
        return "holds"
    if high < at_least or low > at_most:
        return "refuted"
    ends = [(bound, low if bound < value else high) for bound in (at_least, at_most)]
    crossed = [(bound, end) for bound, end in ends if min(value, end) <= bound <= max(value, end)]
    more = max(((end - value) / (bound - value or math.nan)) ** 2 for bound, end in crossed)
    if not more <= 100:
        return "undecided: more than 100 times the tasks and seeds would decide it"
    return f"undecided: about {max(more, 1.1):.2g} times the tasks and seeds would decide it"


def criterion(
    name: str,
    estimate: dynamics.Estimate,
    expected: str,
    at_most: float = math.inf,
    at_least: float = -math.inf,
    surely: bool = False,
) -> Criterion:
    """Judges an estimate by bounds: it passes if its value lies within them.

    With `surely` it passes only if its whole interval does. Without bounds it is reported and not
    judged. A value that does not exist (NaN) never passes. `expected` says what the number is;
    the bounds are added to it.
    """
    value, low, high = (float(np.asarray(part)) for part in estimate)
    if not (math.isfinite(at_most) or math.isfinite(at_least)):
        return Criterion(name, value, low, high, expected, None)
    found = verdict(estimate, at_least, at_most)
    passed = found == "holds" if surely else at_least <= value <= at_most
    bounds = f"between {at_least:g} and {at_most:g}"
    if at_least in (at_most, -math.inf):
        bounds = f"{'at most ' * (at_least < at_most)}{at_most:g}"
    elif at_most == math.inf:
        bounds = f"at least {at_least:g}"
    expected += f"; {'the whole interval ' * surely}{bounds}"
    return Criterion(name, value, low, high, expected, passed, found)


def censored(name: str, data: Any) -> Criterion:
    """Reports how many modes of a measurement never come to be learned: a slope leaves them out."""
    t = dynamics.times_of(data)(dynamics.strength(data).mean((0, 1)))
    said = f"modes that never reach {trajectories.modes(data).p:g}: a slope is of the others"
    return criterion(f"{name}_censored_modes", dynamics.exact(float(np.isnan(t).sum())), said)


def staggering(results: Results, name: str, expected: str, **bounds: Any) -> Iterator[Criterion]:
    """Judges how far one learner staggers in distribution, and reports what is censored."""
    data = results["in_distribution", name]
    merit = dynamics.merit_name(data)
    yield criterion(f"{name}_{merit}", dynamics.merit(data), expected, **bounds)
    yield censored(name, data)


def beyond_bayes(results: Results, within: float) -> Iterator[Criterion]:
    """Judges how far each meta-learner staggers beyond Bayes, and reports how far it does alone."""
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


def excess_of(results: Results, name: str, suffix: str = "") -> dynamics.Estimate:
    """Estimates the excess loss of one meta-learner on held-out tasks, once training is done."""
    (bayes,) = results.learners(HELDOUT + suffix, "bayes").values()
    return dynamics.measured_excess(results[HELDOUT + suffix, name].isel(outer_step=-1), bayes)


def excess(results: Results, at_most: float = math.inf, suffix: str = "") -> Iterator[Criterion]:
    """Judges the excess loss of each meta-learner on held-out tasks, once training is done."""
    for name, data in results.learners(HELDOUT + suffix, "meta").items():
        said = f"the {trajectories.about(data).label} is near Bayes on held-out tasks: excess loss"
        found = excess_of(results, name, suffix)
        yield criterion(f"{name}{suffix}_excess_loss", found, said, at_most=at_most)


def as_bayes(modes: str) -> dict[str, dict[str, str]]:
    """Gives the claims of regression studies that a meta-trained LSTM learns as Bayes does."""
    says = f"A meta-trained LSTM learns nearly all {modes} at once, as Bayes does"
    near = "Its losses are near those of Bayes-optimal inference"
    slope, loss = {"lstm_minus_bayes_slope": says}, {"lstm_excess_loss": near}
    return {"learning_times": slope, "distance_to_bayes": loss}


@dataclasses.dataclass(frozen=True)
class Table:
    """Figures of merit to be set side by side: criteria called ROW_COLUMN."""

    title: str
    rows: Mapping[str, str]
    """Name: what the table calls it."""
    columns: Mapping[str, str]
    figure: str
    """The figure that shows it, by name."""


@dataclasses.dataclass(frozen=True)
class Study:
    """A study, as the module-level name `study` of a Python file defines it."""

    name: str
    presets: Mapping[str, Any]
    """Configurations by name, "quick" among them: frozen dataclasses of one type."""
    plan: Callable[[Any], Plan]
    criteria: Callable[[Any, Results], Iterable[Criterion]]
    """`criteria(config, results)`, from what was measured."""
    figures: Mapping[str, Callable[[Results], Figure]] = dataclasses.field(default_factory=dict)
    """Figures that only this study has, by name; those that every run has are drawn beside them."""
    section: str = ""
    """Where the paper has it: the order in which a folder of studies is run and reported."""
    claims: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    """What it claims, for `metadyn claims`: by the name of the figure that shows a claim, and that
    of the criterion that judges it, what it says."""
    tables: Sequence[Table] = ()
    closed: str = ""
    """Why no learner can be put beside its own, of a study for which none can."""

    def __post_init__(self) -> None:
        check_name(self.name, "study")
        for preset, config in self.presets.items():
            right = dataclasses.is_dataclass(config) and not isinstance(config, type)
            check(right, f"preset {preset!r}", config, "must be an object of a frozen dataclass")
        for name in self.figures:
            check_name(name, "figure")
        make, said = self.plan, f"study {self.name!r}: its plan cannot be made"

        @functools.wraps(make)
        def plan(config: Any) -> Plan:
            with error_context(said, ConfigError):
                try:
                    found = make(config)
                except (MemoryError, OverflowError) as error:
                    numbers = lambda of: {o: n for o, n in options_of(of) if isinstance(n, int)}
                    sizes, usual = numbers(config), numbers(next(iter(self.presets.values())))
                    grown = lambda option: sizes[option] / max(usual.get(option, 1), 1)
                    largest = max(sizes, key=grown, default="preset")
                    fix = "too large a number to set the study up with; lower it"
                    raise ConfigError(f"{largest} {sizes.get(largest)}: {fix}") from error
                check(isinstance(found, Plan), "plan", found, "must return a `metadyn.Plan`")
                return found

        object.__setattr__(self, "plan", plan)

    def config(self, preset: str, **fields: Any) -> Any:
        """Returns the configuration of a preset, with some fields changed."""
        check(preset in self.presets, "of", preset, f"choose from {', '.join(self.presets)}")
        return dataclasses.replace(self.presets[preset], **fields)

    def beside(self, name: str, *more: Callable[[Comparison], Contender]) -> Study:
        """Returns this study, called `name`, with more contenders beside its own.

        Each of `more` makes one of a comparison of the study, from its `domain` and the `heads`
        that its objective needs. Ordinary learners are measured on every set that others are;
        meta-learners are trained on the same episodes and measured on the same tasks as
        the study's own. So each appears in every figure and criterion of its kind. Raises
        `ConfigError` for a study that is `closed`.
        """
        check(
            not self.closed, "study", self.name, f"takes no learner beside its own: {self.closed}"
        )

        def with_more(comparison: Comparison) -> Comparison:
            for make in more:
                made = make(comparison)
                fix = "what is beside a study must be a metadyn.Contender"
                check(isinstance(made, Contender), "contender", type(made).__name__, fix)
                comparison = comparison.joined(made)
            return comparison

        return self._changed(name, with_more)

    def probing(self, name: str, **probes: Callable[[TaskSet], Probe]) -> Study:
        """Returns this study, called `name`, with more probes read wherever its own are.

        Each of `probes` makes one of a set of tasks. What it reads is recorded under its name, and
        the figures of modes are drawn of it too.
        """
        return self._changed(
            name, lambda each: dataclasses.replace(each, probes={**each.probes, **probes})
        )

    def judged(self, config: Any, results: Results) -> list[Criterion]:
        """Returns the criteria. Raises `ConfigError` if they fail, or two are of one name."""
        with error_context(f"study {self.name!r}: its criteria cannot be had"):
            found = list(self.criteria(config, results))
            names = [each.name for each in found]
        check_unique(names, f"study {self.name!r}: criterion", "two have this name: rename one")
        return found

    def own_figures(self) -> dict[str, Callable[[Results], Figure]]:
        """Returns its figures, so that each, where it fails, raises a `ConfigError` naming it."""
        from metadyn.figures import checked

        said = f"study {self.name!r}: figure {{!r}} cannot be drawn"
        return {n: error_context(said.format(n))(checked(draw)) for n, draw in self.figures.items()}

    def _changed(self, name: str, change: Callable[[Comparison], Comparison]) -> Study:
        def plan(config: Any) -> Plan:
            base = self.plan(config)
            made = [change(comparison) for comparison in base.comparisons]
            fix = f"{self.name!r} compares none of that kind: give the contender another kind"
            changed = any(a is not b for a, b in zip(base.comparisons, made, strict=True))
            check(changed, "study", name, fix)
            return dataclasses.replace(base, comparisons=made)

        return dataclasses.replace(self, name=name, plan=plan)


def folder() -> Path:
    """Finds the studies that come with metadyn: installed with it, or beside a checkout."""
    inside = Path(__file__).parent / "experiments"
    return inside if inside.is_dir() else inside.parent.parent / "experiments"


def known() -> list[str]:
    """Lists the names of the studies that come with metadyn."""
    return sorted(path.stem for path in folder().glob("*.py"))


def load_study(name: str) -> Study:
    """Loads the study of that name which comes with metadyn, or that a Python file defines.

    Raises `ConfigError` if there is none.
    """
    path = str(folder() / f"{name}.py") if name in known() else name
    fix = f"there is no such file, and no such study: choose from {', '.join(known())}"
    fix = "is a folder: name one study, or a Python file" if os.path.isdir(path) else fix
    is_file = os.path.isfile(path)  # False too for what cannot be a path
    check(is_file, "study", name, fix + meant(name, known()))
    if (beside := str(Path(path).absolute().parent)) not in sys.path:
        sys.path.append(beside)  # for what it imports
    module = ModuleType(f"metadyn_study_{Path(path).stem}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # where dataclasses and their docstrings are looked up
    with error_context(f"study = {name!r}: cannot be imported"):
        SourceFileLoader(module.__name__, path).exec_module(module)
    found: Any = getattr(module, "study", None)
    check(isinstance(found, Study), "study", name, "defines no `study = metadyn.Study(...)`")
    return found


def load_studies(folder: str) -> list[Study]:
    """Loads the studies that the Python files of a folder define, the paper's first, in its order.

    Raises `ConfigError` if one of them defines none, or there is none.
    """
    paths = sorted(Path(folder).glob("*.py"))
    check(paths, "study", folder, "the folder holds no studies")
    studies = [load_study(str(path)) for path in paths]
    of_paper = lambda study: study.section.startswith("§")
    return sorted(studies, key=lambda study: (not of_paper(study), study.section, study.name))
