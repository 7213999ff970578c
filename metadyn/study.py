"""What a study is: learners of one or more domains, the tasks they are compared on, and criteria.

A study says what is compared and what the science expects. Everything else (training, probing,
storing, resuming, drawing what every run has) is the same for all, and is in `runner.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from metadyn import dynamics, labelled
from metadyn.base import (
    STRENGTH,
    Domain,
    Learner,
    MetaLearner,
    Params,
    Probe,
    TaskSet,
    training_tasks,
)
from metadyn.errors import ConfigError, check, check_name, check_positive, meant
from metadyn.labelled import Kind
from metadyn.learners.lstm import LSTMConfig
from metadyn.learners.networks import GRUConfig
from metadyn.objectives import ObjectiveOf, prediction_loss
from metadyn.outer import MetaTraining, OuterConfig
from metadyn.store import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRACKED, HELDOUT = "tracked", "heldout"
"""The sets of tasks on which meta-learners are measured at every checkpoint: the first of those of
evaluation, for mode trajectories; and some of the training distribution, for excess loss."""


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
    """Evaluation tasks probed at every checkpoint."""
    heldout_tasks: int = 2048
    """Tasks of the training distribution on which the excess loss is measured."""
    probe_points: int = 32
    """Queries in a probe."""
    chunk: int = 4096
    """Tasks measured at a time, which bounds the memory."""

    def __post_init__(self) -> None:
        check_positive(self, *(field.name for field in dataclasses.fields(self)))
        tracked = self.tracked_tasks
        check(tracked >= 2, "tracked_tasks", tracked, "must be at least 2: halves are compared")

    def sized(
        self, tasks: TaskSet, field: str = "tasks", name: str | None = None, **changes: Any
    ) -> TaskSet:
        """A set of tasks, of the size that a field of this configuration gives."""
        updating = self.updating_tasks if field == "tasks" else None
        option = f"--measure.{field.replace('_', '-')}"
        size = {"size": getattr(self, field), "updating_size": updating, "option": option}
        return dataclasses.replace(tasks, name=name or tasks.name, **size, **changes)


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """What the configuration of every study has: copy a study to see how its own is added."""

    meta: Literal["lstm", "gru"] = "lstm"
    """The meta-learner that is trained."""
    lstm: LSTMConfig = LSTMConfig()
    gru: GRUConfig = GRUConfig()
    outer: OuterConfig = OuterConfig()
    measure: MeasureConfig = MeasureConfig()

    def __post_init__(self) -> None:
        known = ("lstm", "gru")
        check(self.meta in known, "meta", self.meta, f"choose from {', '.join(known)}")

    def meta_learner(self, domain: Domain, heads: int = 0) -> Contender:
        """The chosen meta-learner for a domain, as a contender."""
        network = getattr(self, self.meta)
        label, option = f"meta-trained {network.label}", f"--{self.meta}.hidden"
        return Contender(self.meta, label, network.make(domain, heads), option=option)


@dataclasses.dataclass(frozen=True, eq=False)
class Contender:
    """A learner to compare with others, or a meta-learner to train and then compare.

    Raises `ConfigError` for a name that cannot be that of a file, and a kind that does not fit.
    """

    name: str
    label: str
    """What figures call it."""
    learner: Learner | MetaLearner
    kind: Kind | None = None
    """What it is compared as: "ordinary" learners, "meta" (of meta-learners), "bayes", of which
    there is one and which excess loss is over, or a "reference". None: by what it is."""
    times: Sequence[int] | None = None
    """Steps of its own clock at which it is probed, from 0. None: after every observation."""
    drawn: bool = True
    """Whether it has a place in figures, or is measured for the record."""
    curve: np.ndarray | None = None
    """Closed form of its mode strengths [time, mode], to be stored beside them."""
    objective: ObjectiveOf | None = None
    """What a meta-learner is trained on. None: the objective of the comparison."""
    own: OuterConfig | None = None
    """Settings of a meta-learner's own optimiser. None: those of the whole outer loop."""
    rate: str = ""
    """The field of the study's configuration that sets `own`'s learning rate, for messages."""
    option: str = ""
    """The option that sets its size, for messages."""

    def __post_init__(self) -> None:
        check_name(self.name, "contender")
        kind = self.kind or ("meta" if self.trained else "ordinary")
        kinds = ("meta",) if self.trained else ("ordinary", "bayes", "reference")
        fix = f"of contender {self.name!r}, a {type(self.learner).__name__}: choose from {kinds}"
        check(kind in kinds, "kind", kind, fix)
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "_make", lambda params: self.learner)

    @property
    def trained(self) -> bool:
        """Whether it is a meta-learner."""
        return not isinstance(self.learner, Learner)

    @property
    def clock(self) -> str:
        """What its time counts: of meta-learners, observations."""
        return self.learner.clock if isinstance(self.learner, Learner) else "observations"

    @property
    def make(self) -> Callable[[Params], Learner]:
        """The learner that outer parameters make; without any, it is given an empty tuple."""
        if isinstance(self.learner, Learner):
            return self._make  # type: ignore[attr-defined]
        return self.learner.learner

    def times_in(self, domain: Domain) -> Sequence[int]:
        """When it is probed in an episode of a domain."""
        return range(domain.steps + 1) if self.times is None else self.times


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
    """Measurements beside these, of one learner on one set."""
    measure: MeasureConfig = MeasureConfig()
    objective: ObjectiveOf = prediction_loss
    """What its meta-learners are trained on."""
    heads: int = 0
    """Outputs beyond the answer that the objective needs."""
    name: str = ""
    """Ending of the names of its own sets, where a study has several comparisons."""
    title: str = ""
    """What figures call it."""
    followed: bool = True
    """Whether figures follow its meta-learners over outer training."""
    probes: Mapping[str, Callable[[TaskSet], Probe]] = dataclasses.field(default_factory=dict)
    """What is read beside the main probe, by name, wherever that is read."""

    def __post_init__(self) -> None:
        check_name(self.name or "main", "comparison")
        names = [contender.name for contender in self.contenders]
        for name in names:
            fix = "two contenders have this name: choose another"
            check(names.count(name) == 1, "name", name, fix)
        bayes = sum(contender.kind == "bayes" for contender in self.contenders)
        lacking = f"comparison {self.name or 'of ' + type(self.domain).__name__}"
        fix = "meta-learners are compared with one contender of kind 'bayes'"
        check(bayes == 1 or not self.metas, lacking, f"{bayes} of kind 'bayes'", fix)

    @property
    def metas(self) -> list[Contender]:
        """The meta-learners."""
        return [contender for contender in self.contenders if contender.trained]

    @property
    def bayes(self) -> Contender:
        """What excess loss is over."""
        return next(contender for contender in self.contenders if contender.kind == "bayes")

    @property
    def suffix(self) -> str:
        """What the names of its own sets end with."""
        return f"_{self.name}" if self.name else ""

    @functools.cached_property
    def tracked(self) -> TaskSet:
        """Fixed evaluation tasks, probed at every checkpoint."""
        tasks = self._probed(self.domain.evaluation(self.measure.probe_points))
        return self.measure.sized(tasks, "tracked_tasks", TRACKED + self.suffix)

    def _probed(self, tasks: TaskSet) -> TaskSet:
        if not self.probes or STRENGTH not in tasks.probes:
            return tasks
        more = {name: make(tasks) for name, make in self.probes.items()}
        return dataclasses.replace(tasks, probes={**tasks.probes, **more})

    @functools.cached_property
    def heldout(self) -> TaskSet:
        """Tasks of the training distribution, on which the loss is measured at every checkpoint."""
        tasks = training_tasks(self.domain)
        return self.measure.sized(tasks, "heldout_tasks", HELDOUT + self.suffix)

    def training(self, contender: Contender) -> MetaTraining:
        """A meta-learner and what it is trained on."""
        assert not isinstance(contender.learner, Learner)
        meta = contender.learner
        objective = (contender.objective or self.objective)(self.domain, meta)
        return MetaTraining(meta, objective, contender.own, contender.rate)

    @functools.cached_property
    def measurements(self) -> list[tuple[TaskSet, Contender]]:
        """What is measured once training is done."""
        sets = [self._probed(tasks) for tasks in self.sets]
        found = [(tasks, c) for tasks in sets for c in self.contenders if c.kind in tasks.kinds]
        return found + [(self._probed(tasks), contender) for tasks, contender in self.pairs]

    def joined(self, contender: Contender) -> Comparison:
        """This comparison with one more contender, before Bayes; or itself, if its kind is absent.

        Meta-learners join where others are trained, and the rest where there are any like it.
        """
        like = {"ordinary", "reference"} if contender.kind == "reference" else {contender.kind}
        if not like & {each.kind for each in self.contenders}:
            return self
        at = [each.kind for each in self.contenders]
        place = max(i for i, kind in enumerate(at) if kind in like) + 1
        contenders = [*self.contenders[:place], contender, *self.contenders[place:]]
        return dataclasses.replace(self, contenders=contenders)

    def alone(self, name: str, title: str = "", **changes: Any) -> Comparison:
        """Its meta-learners and Bayes, measured over outer training alone, under another name."""
        kept = [each for each in self.contenders if each.kind in ("meta", "bayes")]
        changes = {"contenders": kept, "sets": (), "pairs": ()} | changes
        return dataclasses.replace(self, name=name, title=title, **changes)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that one configuration of a study asks for."""

    outer: OuterConfig
    comparisons: Sequence[Comparison]
    """All meta-learners of all comparisons are trained side by side."""

    def __post_init__(self) -> None:
        self.outer.check_batch(self.trained.values())
        pairs = [(tasks.name, contender.name) for _, tasks, contender in self.every]
        for pair, (_, tasks, _) in zip(pairs, self.every, strict=True):
            fix = "is asked for twice: rename the set"
            check(pairs.count(pair) == 1, "measurement", pair, fix)
            check(
                tasks.size >= 1,
                tasks.option.removeprefix("--") or tasks.name,
                tasks.size,
                "must be 1 or more",
            )

    @functools.cached_property
    def trained(self) -> dict[str, MetaTraining]:
        """Every meta-learner of every comparison, by its name and the comparison's ending."""
        named: dict[str, MetaTraining] = {}
        for part in self.comparisons:
            for contender in part.metas:
                name = contender.name + part.suffix
                check(name not in named, "name", name, "two meta-learners have this name")
                named[name] = part.training(contender)
        return named

    @functools.cached_property
    def every(self) -> list[tuple[Comparison, TaskSet, Contender]]:
        """All that is measured: at checkpoints, Bayes beside it, and once training is done."""
        found = []
        for part in self.comparisons:
            found += [
                (part, tasks, contender)
                for contender in part.contenders
                if part.metas and contender.kind in ("meta", "bayes")
                for tasks in (part.tracked, part.heldout)
            ]
            found += [(part, *pair) for pair in part.measurements]
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


def criterion(
    name: str,
    estimate: dynamics.Estimate,
    expected: str,
    at_most: float = math.inf,
    at_least: float = -math.inf,
    surely: bool = False,
) -> Criterion:
    """Judges an estimate: passed when it lies within the bounds, or `surely` with its interval.

    A value that does not exist (NaN) passes nothing.
    """
    value, low, high = (float(np.asarray(part)) for part in estimate)
    bounded = math.isfinite(at_most) or math.isfinite(at_least)
    judged = (low, value, high) if surely else (value,)
    passed = all(at_least <= each <= at_most for each in judged) if bounded else None
    return Criterion(name, value, low, high, expected, passed)


def censored(name: str, data: Any) -> Criterion:
    """Reports how many modes of a measurement never come to be learned: a slope leaves them out."""
    t = dynamics.times_of(data)(dynamics.strength(data).mean((0, 1)))
    count = np.asarray(np.isnan(t).sum(), np.float64)
    said = f"modes that never reach {labelled.modes(data).p:g}: a slope is of the others"
    return criterion(f"{name}_censored_modes", dynamics.Estimate(count, count, count), said)


def staggering(results: Results, name: str, expected: str, **bounds: Any) -> Iterator[Criterion]:
    """How far one learner staggers in distribution, with what it leaves censored."""
    data = results["in_distribution", name]
    merit = dynamics.merit_name(data)
    yield criterion(
        f"{name}_{merit}", dynamics.measured(dynamics.merit_of(data), data), expected, **bounds
    )
    yield censored(name, data)


def beyond_bayes(results: Results, within: float) -> Iterator[Criterion]:
    """How far each meta-learner staggers beyond Bayes in distribution; then each of them alone."""
    metas = results.learners("in_distribution", "meta")
    (bayes,) = results.learners("in_distribution", "bayes").values()
    merit = dynamics.merit_name(bayes)
    for name, data in metas.items():
        yield criterion(
            f"{name}_minus_bayes_{merit}",
            dynamics.difference(data, bayes),
            f"the {labelled.about(data).label} staggers no more than Bayes: {merit}s differ by at "
            f"most {within:g}",
            at_most=within,
            at_least=-within,
        )
        yield from staggering(results, name, "its own, for the record")


def excess(results: Results, at_most: float = math.inf, suffix: str = "") -> Iterator[Criterion]:
    """Excess loss over Bayes of each meta-learner on held-out tasks, once training is done."""
    (bayes,) = results.learners(HELDOUT + suffix, "bayes").values()
    for name, data in results.learners(HELDOUT + suffix, "meta").items():
        bound = f" at most {at_most:g}" if math.isfinite(at_most) else ", for the record"
        yield criterion(
            f"{name}{suffix}_excess_loss",
            dynamics.measured_excess(data.isel(outer_step=-1), bayes),
            f"the {labelled.about(data).label} is near Bayes on held-out tasks: excess loss{bound}",
            at_most=at_most,
        )


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper that a study tests."""

    criterion: str
    """The criterion that judges it, by name."""
    says: str
    figure: str
    """The figure that shows it, by name."""


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
    claims: Sequence[Claim] = ()
    """Of the paper, for `metadyn claims`."""
    tables: Sequence[Table] = ()

    def comparison(self, preset: str, **fields: Any) -> Comparison:
        """The study's first comparison, with some fields of a preset changed."""
        check(preset in self.presets, "of", preset, f"choose from {', '.join(self.presets)}")
        return self.plan(dataclasses.replace(self.presets[preset], **fields)).comparisons[0]

    def beside(self, name: str, *more: Callable[[Comparison], Contender]) -> Study:
        """This study, called `name`, with more contenders beside its own.

        `contender(comparison)` makes one for each comparison of the study, from its `domain` and
        the `heads` that its objective needs. Ordinary learners are measured on every set that
        others are; meta-learners are trained on the same episodes and measured on the same tasks as
        the study's own. So each appears in every figure and criterion of its kind.
        """

        def with_more(comparison: Comparison) -> Comparison:
            for contender in more:
                comparison = comparison.joined(contender(comparison))
            return comparison

        def plan(config: Any) -> Plan:
            base, made = self.plan(config), self._changed(name, with_more).plan(config)
            pairs = zip(base.comparisons, made.comparisons, strict=True)
            fix = f"{self.name!r} compares none of that kind: give the contender another kind"
            joined = any(len(a.contenders) < len(b.contenders) for a, b in pairs)
            check(joined or not more, "study", name, fix)
            return made

        return dataclasses.replace(self, name=name, plan=plan)

    def probing(self, name: str, **probes: Callable[[TaskSet], Probe]) -> Study:
        """This study, called `name`, with more probes read wherever its own are.

        `probe(tasks)` makes one for a set of tasks. What it reads is recorded under its name, and
        the figures of modes are drawn of it too.
        """
        return self._changed(
            name, lambda each: dataclasses.replace(each, probes={**each.probes, **probes})
        )

    def _changed(self, name: str, change: Callable[[Comparison], Comparison]) -> Study:
        def plan(config: Any) -> Plan:
            base = self.plan(config)
            return dataclasses.replace(base, comparisons=[*map(change, base.comparisons)])

        return dataclasses.replace(self, name=name, plan=plan)


def folder() -> Path:
    """Where the studies that come with metadyn are: installed with it, or beside a checkout."""
    inside = Path(__file__).parent / "experiments"
    return inside if inside.is_dir() else inside.parent.parent / "experiments"


def known() -> list[str]:
    """The names of the studies that come with metadyn."""
    return sorted(path.stem for path in folder().glob("*.py"))


def load_study(name: str) -> Study:
    """The study of that name which comes with metadyn, or that a Python file defines.

    Raises `ConfigError` if there is none.
    """
    path = str(folder() / f"{name}.py") if name in known() else name
    if not os.path.isfile(path):  # False too for what cannot be a path
        fix = f"there is no such file, and no such study: choose from {', '.join(known())}"
        fix += meant(name, known())
        raise ConfigError(f"study = {name!r}: {fix}", "study", name, fix)
    module_name = f"metadyn_study_{Path(path).stem}"
    loader = SourceFileLoader(module_name, path)
    spec = importlib.util.spec_from_file_location(module_name, path, loader=loader)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # where dataclasses and their docstrings are looked up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise ConfigError(f"study = {name!r}: cannot be imported ({said})") from error
    found = getattr(module, "study", None)
    if not isinstance(found, Study):
        raise ConfigError(f"study = {name!r}: defines no `study = metadyn.Study(...)`")
    return found


def load_studies(folder: str) -> list[Study]:
    """The studies that the Python files of a folder define, in the paper's order.

    Raises `ConfigError` if one of them defines none, or there is none.
    """
    paths = sorted(Path(folder).glob("*.py"))
    if not paths:
        raise ConfigError(f"study = {folder!r}: the folder holds no studies")
    studies = [load_study(str(path)) for path in paths]
    return sorted(studies, key=lambda study: (study.section or "~", study.name))
