"""Robustness: the order of learning by inner and outer optimiser, by hidden width and by noise.

    metadyn run robustness [--preset quick|paper] [--meta lstm|gru] [--out DIR] [overrides]

Rabinowitz (2019), arXiv:1905.01320, says that what is found does not depend on the optimiser. One
thing at a time is changed in the studies of the three domains; the networks, objectives and sets of
tasks are theirs. A learner that is too slow to have learned anything has no slope.
"""

import dataclasses
import math
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
        for field, least, most in (
            ("widths", 0, math.inf),
            ("sigmas", 0, math.inf),
            ("pays", 0.5, 1),
        ):
            values = getattr(self, field)
            right = all(least < each <= most and math.isfinite(each) for each in values)
            fix = f"must be finite, above {least:g} and at most {most:g}, each once"
            check(right and len(set(values)) == len(values), field, values, fix)


def named(config: Config, name: str) -> dict[str, str]:
    """Every variant of the learners of a domain: what figures call it, by name."""
    said = {
        f"{loop}_{o}": f"{loop} optimiser {o}" for loop in ("inner", "outer") for o in OPTIMIZERS
    }
    said |= {f"hidden_{hidden}": f"{hidden} hidden units" for hidden in config.widths}
    if name == "bandit":
        return said | {f"noise_{p:g}": f"pay with {p:.0%} or {1 - p:.0%}" for p in config.pays}
    return said | {f"noise_{sigma:g}": f"noise σ = {sigma:g}" for sigma in config.sigmas}


def comparison(config: Config, name: str, **changes: Any) -> md.Comparison:
    """What a domain's own study compares, with some of its configuration changed."""
    fields = config.common() | {"domain": getattr(config, name)} | changes
    return STUDIES[name].comparison(config.of, **fields)


def ordinary(config: Config, name: str) -> Iterator[md.Contender]:
    """The ordinary learner of a domain under each optimiser."""
    own = STUDIES[name].presets[config.of]
    for optimizer in OPTIMIZERS:
        changes, wanted = {}, optimizer  # nonlinear regression has a learner of each
        if name in ORDINARY:
            rate = getattr(getattr(config, f"{name}_rates"), optimizer)
            fields = {"optimizer": optimizer, "learning_rate": rate}
            fields |= {"updates": config.linear_updates} if name == "linear" else {}
            field, wanted = ORDINARY[name]
            changes = {field: dataclasses.replace(getattr(own, field), **fields)}
        found = {each.name: each for each in comparison(config, name, **changes).contenders}
        variant = f"inner_{optimizer}"
        label = named(config, name)[variant]
        yield dataclasses.replace(found[wanted], name=variant, label=label, curve=None)


def variants(config: Config, name: str) -> Iterator[md.Comparison]:
    """The meta-learner of a domain, changed; those of one domain are given the same tasks."""
    said = named(config, name)

    def alone(base, ending, changed):
        """Some changed meta-learners, by the names of the variants, beside Bayes alone."""
        metas = [dataclasses.replace(c, name=v, label=said[v]) for v, c in changed.items()]
        contenders = [*metas, base.bayes]
        return base.alone(ending, TITLES[name], contenders=contenders, followed=False)

    base, changed = comparison(config, name), {}
    for optimizer in OPTIMIZERS:
        rates = {"learning_rate": getattr(config.outer_rates, optimizer)}
        own = dataclasses.replace(config.outer, optimizer=optimizer, **rates)
        changed[f"outer_{optimizer}"] = dataclasses.replace(
            base.metas[0], own=own, rate=f"outer_rates.{optimizer}"
        )
    for hidden in config.widths:
        network = dataclasses.replace(getattr(config, config.meta), hidden=hidden)
        (changed[f"hidden_{hidden}"],) = comparison(config, name, **{config.meta: network}).metas
    yield alone(base, name, changed)
    for value in config.pays if name == "bandit" else config.sigmas:
        noise = {"p_high": value, "p_low": 1 - value} if name == "bandit" else {"sigma": value}
        domain = dataclasses.replace(getattr(config, name), **noise)
        base, variant = comparison(config, name, domain=domain), f"noise_{value:g}"
        yield alone(base, f"{name}_{variant}", {variant: base.metas[0]})


def plan(config: Config) -> md.Plan:
    """Every variant of every domain."""
    comparisons, sizes = [], config.measure
    for name, title in TITLES.items():
        base = comparison(config, name)
        learners = [*ordinary(config, name), *([base.bayes] if name == "bandit" else [])]
        tasks = base.domain.evaluation(sizes.probe_points)
        sets = [sizes.sized(tasks, "updating_tasks", f"inner_{name}")]
        fields = {"contenders": learners, "sets": sets, "pairs": [], "title": title}
        comparisons += [dataclasses.replace(base, **fields), *variants(config, name)]
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
        name = task_set.split("_")[1]
        for variant, data in results.learners(task_set, "meta").items():
            excess = dynamics.measured_excess(data.isel(outer_step=-1), results[task_set, "bayes"])
            said = f"excess loss over Bayes, {labelled.about(data).label}"
            yield md.criterion(f"{name}_{variant}_excess", excess, said)
    for name, sign in SIGN.items():
        rows = list(found(results, name))
        merit = "(t_K - t_1) / t_K" if name == "bandit" else "slope of log t_k on log scale"
        for variant, data, bayes in rows:
            said = f"{labelled.about(data).label}: {merit}{' minus Bayes' * (bayes is not None)}"
            row = variant, data, bayes
            yield md.criterion(f"{name}_{variant}_staggering", beyond([row]), said)
            yield censored(f"{name}_{variant}", data)
        inner = [row for row in rows if row[0].startswith("inner_")]
        least = beyond(inner, lambda each, sign=sign: (sign * each).min(0))
        said = (
            "the ordinary learner staggers alike under every optimiser: the least staggering"
            f"{' beyond Bayes' * (name == 'bandit')}, times {sign}, above 0"
        )
        yield md.criterion(f"{name}_inner_optimizers", least, said, at_least=0.0, surely=True)
        within = {"at_most": WITHIN[name], "surely": True}
        for varied, what in VARIED.items():
            if of := [row for row in rows if row[0].startswith(f"{varied}_")]:
                worst = beyond(of, lambda each: np.abs(each).max(0))
                said = f"the meta-learner staggers as Bayes does, whatever the {what}: greatest"
                said += f" difference surely at most {WITHIN[name]:g}"
                yield md.criterion(f"{name}_{varied}_worst", worst, said, **within)


def robustness(results):
    """Draws how far each learner staggers, as one thing at a time is varied: a row each."""
    of = {name: list(found(results, name)) for name in TITLES}
    height = 1.2 + 0.32 * max(map(len, of.values()))
    figure, axes = figures.grid(len(of), width=5.4, height=height)
    kinds = {"ordinary": ("D", figures.COLOURS[1]), "meta": ("o", figures.COLOURS[0])}
    for axis, (name, rows) in zip(axes, of.items(), strict=True):
        abouts = [labelled.about(data) for _, data, _ in rows]
        for i, (row, about) in enumerate(zip(rows, abouts, strict=True)):
            found_, (marker, colour) = beyond([row]), kinds[about.kind]
            bars = figures.bars(found_)[:, None]
            axis.errorbar(found_.value, i, xerr=bars, fmt=marker, color=colour)
            if np.isnan(found_.value):
                few = "not all" if name == "bandit" else "fewer than two"
                axis.text(0, i, f" {few} modes ever learned", va="center", color=colour, fontsize=9)
        axis.axvline(0, **figures.LEVEL)
        axis.set_yticks(range(len(rows)), [about.label for about in abouts], fontsize=9)
        what = (
            "staggering minus Bayes'" if name == "bandit" else "slope (meta-learner: minus Bayes')"
        )
        axis.set(title=TITLES[name], xlabel=what, ylim=(len(rows) - 0.5, -0.5))
    for kind, (marker, colour) in kinds.items():
        axes[0].plot(
            [], [], marker, color=colour, label=f"{kind}{'-' * (kind == 'meta') or ' '}learner"
        )
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=11)
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
    for variant, label in named(config, name).items()
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
