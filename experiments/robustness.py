"""Robustness: the order of learning by inner and outer optimiser, by hidden width and by noise.

    metadyn run robustness [--preset quick|paper] [--meta lstm|gru] [--out DIR] [overrides]

Rabinowitz (2019), arXiv:1905.01320, says that what is found does not depend on the optimiser. One
thing at a time is changed in the studies of the three domains; the networks, objectives and sets of
tasks are theirs. A learner that is too slow to have learned anything has no slope.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

import metadyn as md
from metadyn import dynamics, figures, labelled
from metadyn.domains.bandit import ContextualBandit
from metadyn.domains.fourier import FourierRegression, band
from metadyn.domains.linear import LinearRegression
from metadyn.errors import check, check_positive
from metadyn.learners.lstm import LSTMConfig
from metadyn.objectives import Target
from metadyn.study import HELDOUT, TRACKED, censored

TITLES = {
    "linear": "linear regression",
    "nonlinear": "nonlinear regression",
    "bandit": "contextual bandit",
}
STUDIES = {name: md.load_study(title.replace(" ", "_")) for name, title in TITLES.items()}
ORDINARY = {"linear": ("sgd", "sgd"), "bandit": ("policy", "reinforce_coupled")}
"""Of these domains' ordinary learner: the field that configures it, and its name."""
WITHIN = {"linear": 0.2, "nonlinear": 0.3, "bandit": 0.15}
"""How far the LSTM may stagger beyond Bayes: the bounds of the domains' own studies."""
SIGN = {"linear": -1, "nonlinear": 1, "bandit": 1}
"""Of the ordinary learner's staggering: greatest modes first, low frequencies first."""
VARIED = {"outer": "outer optimiser", "hidden": "hidden width", "noise": "noise"}


@dataclasses.dataclass(frozen=True)
class Rates:
    """A learning rate for each optimiser. All of them are our choice."""

    sgd: float
    momentum: float
    rmsprop: float
    adam: float

    def __post_init__(self) -> None:
        check_positive(self, *OPTIMIZERS)


OPTIMIZERS = [field.name for field in dataclasses.fields(Rates)]


@dataclasses.dataclass(frozen=True)
class Config(md.StudyConfig):
    """Everything the study depends on, beside its seed. Values are our choice."""

    linear: LinearRegression = LinearRegression()
    nonlinear: FourierRegression = FourierRegression()
    bandit: ContextualBandit = ContextualBandit()
    target: Target = "feedback"
    """What the regressions' meta-learners are trained to predict."""
    of: str = "quick"
    """The preset of the domains' own studies in which things are changed."""
    outer_rates: Rates = Rates(sgd=3.0, momentum=1.0, rmsprop=1e-2, adam=3e-2)
    """Of the outer loop."""
    linear_rates: Rates = Rates(sgd=0.05, momentum=0.005, rmsprop=1e-3, adam=1e-3)
    """Of the deep linear network."""
    linear_updates: int = 3000
    """Its updates."""
    bandit_rates: Rates = Rates(sgd=0.3, momentum=0.03, rmsprop=0.01, adam=0.03)
    """Of REINFORCE. The MLPs in nonlinear regression have those of their own study."""
    widths: tuple[int, ...] = (32, 128)
    """Other numbers of hidden units."""
    sigmas: tuple[float, ...] = (0.5,)
    """Other noise, in the regressions."""
    pays: tuple[float, ...] = (0.9,)
    """Noise, in the bandit: the correct action pays with this probability p, any other with 1 − p.
    "Bayes" is then Thompson sampling from the exact posterior."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, most in (("widths", 10**9), ("sigmas", 1e9), ("pays", 1)):
            values, least = getattr(self, field), 0.5 if field == "pays" else 0
            right = len(set(values)) == len(values) and all(least < v <= most for v in values)
            check(right, field, values, f"must be above {least} and at most {most:g}, each once")


def comparison(config: Config, name: str, **changes: Any) -> md.Comparison:
    """What a domain's own study compares, with some of its configuration changed."""
    fields = config.common() | {"domain": getattr(config, name)} | changes
    target = {} if name == "bandit" else {"target": config.target}
    return STUDIES[name].comparison(config.of, **fields, **target)


def variants(config: Config, name: str) -> Iterator[tuple[str, str, dict, dict[str, Any]]]:
    """The variants of a domain: name, label, what each changes in the study and in the learner."""
    for optimizer in OPTIMIZERS:
        changes = {}  # nonlinear regression has a learner of each
        if name in ORDINARY:
            field, _ = ORDINARY[name]
            rate = getattr(getattr(config, f"{name}_rates"), optimizer)
            own = getattr(STUDIES[name].presets[config.of], field)
            own = dataclasses.replace(own, optimizer=optimizer, learning_rate=rate)
            linear = {"updates": config.linear_updates} if name == "linear" else {}
            changes = {field: dataclasses.replace(own, **linear)}
        yield f"inner_{optimizer}", f"inner optimiser {optimizer}", changes, {"curve": None}
    for optimizer in OPTIMIZERS:
        rate, field = getattr(config.outer_rates, optimizer), f"outer_rates.{optimizer}"
        own = dataclasses.replace(config.outer, optimizer=optimizer, learning_rate=rate)
        label = f"outer optimiser {optimizer}"
        yield f"outer_{optimizer}", label, {}, {"own": own, "rate": field}
    for hidden in config.widths:
        network = dataclasses.replace(getattr(config, config.meta), hidden=hidden)
        yield f"hidden_{hidden}", f"{hidden} hidden units", {config.meta: network}, {}
    for value in config.pays if name == "bandit" else config.sigmas:
        noise, label = {"sigma": value}, f"noise σ = {value:g}"
        if name == "bandit":
            noise = {"p_high": value, "p_low": 1 - value}
            label = f"pay with {value:.0%} or {1 - value:.0%}"
        domain = dataclasses.replace(getattr(config, name), **noise)
        yield f"noise_{value:g}", label, {"domain": domain}, {}


def plan(config: Config) -> md.Plan:
    """Every variant of every domain; those of one comparison are given the same tasks."""
    comparisons, sizes = [], config.measure
    for name, title in TITLES.items():
        made: dict[str, tuple[md.Comparison, list[md.Contender]]] = {}
        for variant, label, changes, fields in variants(config, name):
            kind, value = variant.split("_")
            whole = comparison(config, name, **changes)
            wanted = ORDINARY.get(name, ("", value))[1] if kind == "inner" else config.meta
            (found,) = (each for each in whole.contenders if each.name == wanted)
            ending = {"inner": "inner", "noise": f"{name}_{variant}"}.get(kind, name)
            _, several = made.setdefault(ending, (whole, []))
            several.append(dataclasses.replace(found, name=variant, label=label, **fields))
        base, inner = made.pop("inner")
        inner += [base.bayes] if name == "bandit" else []
        tasks = base.domain.evaluation(sizes.probe_points)
        sets = [sizes.sized(tasks, "updating_tasks", f"inner_{name}")]
        comparisons.append(md.Comparison(base.domain, inner, sets, measure=sizes, title=title))
        for ending, (whole, metas) in made.items():
            changes = {"contenders": [*metas, whole.bayes], "followed": False}
            comparisons.append(whole.alone(ending, title, **changes))
    return md.Plan(config.outer, comparisons)


def found(results, name: str) -> Iterator[tuple[str, Any, Any]]:
    """The variants of a domain: name, measurement, and Bayes' on the same tasks, if it has one."""
    bayes = results.learners(f"inner_{name}", "bayes").get("bayes")
    for variant, data in results.learners(f"inner_{name}", "ordinary").items():
        yield variant, data, bayes
    for task_set in results.sets():
        if f"{task_set}_".startswith(f"{TRACKED}_{name}_"):
            for variant, data in results.learners(task_set, "meta").items():
                yield variant, data.isel(outer_step=-1), results[task_set, "bayes"]


def beyond(rows, take=lambda each: each[0]) -> dynamics.Estimate:
    """One of what variants stagger beyond Bayes, or where there is no Bayes, whose slope is 0."""
    flat = [each for _, data, bayes in rows for each in (data, bayes) if each is not None]
    merits, paired = [dynamics.merit_of(data) for data in flat], rows[0][2] is not None

    def statistic(*means):
        each = np.array([merit(mean) for merit, mean in zip(merits, means, strict=True)])
        return take(each[::2] - each[1::2] if paired else each)

    return dynamics.estimate(statistic, *map(dynamics.strength, flat))


def criteria(config: Config, results):
    """What the science says of every variant of every domain."""
    for task_set in (each for each in results.sets() if each.startswith(HELDOUT)):
        for variant, data in results.learners(task_set, "meta").items():
            excess = dynamics.measured_excess(data.isel(outer_step=-1), results[task_set, "bayes"])
            said = f"excess loss over Bayes, {labelled.about(data).label}"
            yield md.criterion(f"{task_set.split('_')[1]}_{variant}_excess", excess, said)
    for name, sign in SIGN.items():
        rows = list(found(results, name))
        merit = "(t_K - t_1) / t_K" if name == "bandit" else "slope of log t_k on log scale"
        for row in rows:
            said = f"{labelled.about(row[1]).label}: {merit}"
            said += "" if row[2] is None else " minus Bayes"
            yield md.criterion(f"{name}_{row[0]}_staggering", beyond([row]), said)
            yield censored(f"{name}_{row[0]}", row[1])
        of = {kind: [row for row in rows if row[0].startswith(kind)] for kind in ("inner", *VARIED)}
        least = beyond(of.pop("inner"), lambda each, sign=sign: (sign * each).min(0))
        said = f"it staggers alike under every optimiser: the least, times {sign}, above 0"
        yield md.criterion(f"{name}_inner_optimizers", least, said, at_least=0.0, surely=True)
        bound = WITHIN[name]
        for varied, several in of.items():
            if several:
                worst = beyond(several, lambda each: np.abs(each).max(0))
                what = f"to within {bound:g}, whatever the {VARIED[varied]}"
                said = f"the meta-learner surely staggers as Bayes does, {what}"
                yield md.criterion(f"{name}_{varied}_worst", worst, said, bound, surely=True)


def robustness(results):
    """Draws how far each learner staggers, as one thing at a time is varied: a row each."""
    of = {name: list(found(results, name)) for name in TITLES}
    height = 1.2 + 0.32 * max(map(len, of.values()))
    figure, axes = figures.grid(len(of), width=5.4, height=height)
    styles = {"ordinary": ("D", figures.COLOURS[1]), "meta": ("o", figures.COLOURS[0])}
    for axis, (name, rows) in zip(axes, of.items(), strict=True):
        for i, row in enumerate(rows):
            far, (marker, colour) = beyond([row]), styles[labelled.about(row[1]).kind]
            axis.errorbar(far.value, i, xerr=figures.bars(far)[:, None], fmt=marker, color=colour)
            if np.isnan(far.value):
                few = "not all" if name == "bandit" else "fewer than two"
                axis.text(0, i, f" {few} modes ever learned", va="center", color=colour, fontsize=9)
        axis.axvline(0, **figures.LEVEL)
        labels = [labelled.about(data).label for _, data, _ in rows]
        axis.set_yticks(range(len(rows)), labels, fontsize=9)
        axis.set(title=TITLES[name], ylim=(len(rows) - 0.5, -0.5))
        axis.set_xlabel("slope (meta-learner: minus Bayes')")
    axis.set_xlabel("staggering minus Bayes'")  # of the bandit, which is the last
    shown = [axis.plot([], [], marker, color=colour)[0] for marker, colour in styles.values()]
    named, style = ["ordinary learner", "meta-learner"], {"ncols": 2, "fontsize": 11}
    figure.legend(shown, named, loc="outside lower center", **style)
    return figure


QUICK = Config(
    linear=LinearRegression(n_x=3, n_y=3),
    nonlinear=FourierRegression(band(1, 3), steps=20),
    bandit=ContextualBandit(contexts=3, actions=3, steps=20),
    outer=md.OuterConfig(
        steps=3000, batch=32, learning_rate=3e-2, schedule="linear", checkpoints=4
    ),
    measure=md.MeasureConfig(
        updating_tasks=32, tracked_tasks=512, heldout_tasks=512, probe_points=16
    ),
)
PAPER = Config(
    of="paper",
    lstm=LSTMConfig(hidden=256),
    outer=md.OuterConfig(steps=50_000, batch=512, learning_rate=4e-3, warmup=1000, checkpoints=4),
    outer_rates=Rates(sgd=1.0, momentum=0.1, rmsprop=1e-3, adam=4e-3),
    widths=(64, 128),
    measure=md.MeasureConfig(
        updating_tasks=256, tracked_tasks=8192, heldout_tasks=8192, probe_points=64
    ),
)


def claims() -> Iterator[md.Claim]:
    """What the paper says of optimisers, and what of the rest, in each domain."""
    for name, title in TITLES.items():
        says = f"Ordinary learners stagger whatever their optimiser: {title}"
        yield md.Claim(f"{name}_inner_optimizers", says, "robustness")
    for varied, what in VARIED.items():
        for name, title in TITLES.items():
            says = f"The LSTM staggers as Bayes does, to within {WITHIN[name]:g}, whatever the "
            yield md.Claim(f"{name}_{varied}_worst", f"{says}{what}: {title}", "robustness")


ROWS = {
    f"{name}_{variant}": f"{title}, {label}"
    for name, title in TITLES.items()
    for config in (QUICK, PAPER)
    for variant, label, *_ in variants(config, name)
}
COLUMNS = {
    "staggering": "staggering",
    "censored_modes": "modes never learned",
    "excess": "excess loss of the LSTM",
}
TITLE = (
    "Staggering by optimiser, width and noise: slope of log learning time on log scale, in the "
    "bandit (t_K − t_1) / t_K; the LSTM's minus Bayes', in the bandit the ordinary learner's too"
)
study = md.Study(
    "robustness",
    {"quick": QUICK, "paper": PAPER},
    plan,
    criteria,
    {"robustness": robustness},
    section="§§2–4",
    claims=list(claims()),
    tables=[md.Table(TITLE, ROWS, COLUMNS, "robustness")],
)
