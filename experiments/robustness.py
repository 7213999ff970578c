"""Robustness: the order of learning by inner and outer optimiser, by hidden width and by noise.

    metadyn run robustness [--preset quick|paper] [--meta lstm|gru] [--out DIR] [overrides]

Rabinowitz (2019), arXiv:1905.01320, says that what is found does not depend on the optimiser. One
thing at a time is changed in the studies of the three domains; the networks, objectives and sets of
tasks are theirs. A learner that is too slow to have learned anything has no slope.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
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

STUDIES = {
    name: md.load_study(study)
    for name, study in (
        ("linear", "linear_regression"),
        ("nonlinear", "nonlinear_regression"),
        ("bandit", "contextual_bandit"),
    )
}
TITLES = {name: study.name.replace("_", " ") for name, study in STUDIES.items()}
OPTIMIZERS = ("sgd", "momentum", "rmsprop", "adam")
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
        once = lambda values: len(set(values)) == len(values)
        right = once(self.widths) and all(width > 0 for width in self.widths)
        check(right, "widths", self.widths, "must be positive, each once")
        right = once(self.sigmas) and all(0 < sigma < float("inf") for sigma in self.sigmas)
        check(right, "sigmas", self.sigmas, "must be positive and finite, each once")
        right = once(self.pays) and all(0.5 < pay <= 1 for pay in self.pays)
        check(right, "pays", self.pays, "must be above 0.5 and at most 1, each once")


def comparison(config: Config, name: str, **changes: Any) -> md.Comparison:
    """What a domain's own study compares, with some of its configuration changed."""
    common = {f.name: getattr(config, f.name) for f in dataclasses.fields(md.StudyConfig)}
    return STUDIES[name].comparison(
        config.of, **{"domain": getattr(config, name), **common, **changes}
    )


def ordinary(config: Config, name: str) -> Iterator[md.Contender]:
    """The ordinary learner of a domain under each optimiser."""
    own = STUDIES[name].presets[config.of]
    for optimizer in OPTIMIZERS:
        wanted, changes = optimizer, {}
        if name == "linear":
            rate, wanted = getattr(config.linear_rates, optimizer), "sgd"
            fields = {"updates": config.linear_updates, "learning_rate": rate}
            changes = {"sgd": dataclasses.replace(own.sgd, optimizer=optimizer, **fields)}
        elif name == "bandit":
            rate, wanted = getattr(config.bandit_rates, optimizer), "reinforce_coupled"
            fields = {"optimizer": optimizer, "learning_rate": rate}
            changes = {"policy": dataclasses.replace(own.policy, **fields)}
        found = comparison(config, name, **changes).contenders
        contender = next(each for each in found if each.name == wanted)
        label = f"inner optimiser {optimizer}"
        yield dataclasses.replace(contender, name=f"inner_{optimizer}", label=label, curve=None)


def variants(config: Config, name: str) -> Iterator[md.Comparison]:
    """The meta-learner of a domain, changed; those of one domain are given the same tasks."""
    base = comparison(config, name)
    (meta,), varied = base.metas, []
    change = partial(dataclasses.replace, meta)
    for optimizer in OPTIMIZERS:
        rate = getattr(config.outer_rates, optimizer)
        own = dataclasses.replace(config.outer, optimizer=optimizer, learning_rate=rate)
        label, field = f"outer optimiser {optimizer}", f"outer_rates.{optimizer}"
        varied.append(change(name=f"outer_{optimizer}", label=label, own=own, rate=field))
    for hidden in config.widths:
        network = dataclasses.replace(getattr(config, config.meta), hidden=hidden)
        (wider,) = comparison(config, name, **{config.meta: network}).metas
        label = f"{hidden} hidden units"
        varied.append(dataclasses.replace(wider, name=f"hidden_{hidden}", label=label))
    yield base.alone(name, TITLES[name], contenders=[*varied, base.bayes], followed=False)
    for field, label, value in noise(config, name):
        changed = {field: value} | ({"p_low": 1 - value} if name == "bandit" else {})
        domain = dataclasses.replace(getattr(config, name), **changed)
        whole = comparison(config, name, domain=domain)
        learner = dataclasses.replace(whole.metas[0], name=f"noise_{value:g}", label=label)
        ending = f"{name}_{learner.name}"
        yield whole.alone(ending, TITLES[name], contenders=[learner, whole.bayes], followed=False)


def noise(config: Config, name: str) -> list[tuple[str, str, float]]:
    """Other noise in a domain: the field that sets it, what it is called, and its value."""
    if name == "bandit":
        return [("p_high", f"pay with {p:.0%} or {1 - p:.0%}", p) for p in config.pays]
    return [("sigma", f"noise σ = {sigma:g}", sigma) for sigma in config.sigmas]


def plan(config: Config) -> md.Plan:
    """Every variant of every domain."""
    comparisons = []
    for name, title in TITLES.items():
        base = comparison(config, name)
        learners = [*ordinary(config, name), *([base.bayes] if name == "bandit" else [])]
        tasks = config.measure.sized(
            base.domain.evaluation(config.measure.probe_points), "updating_tasks", f"inner_{name}"
        )
        comparisons.append(
            dataclasses.replace(base, contenders=learners, sets=[tasks], pairs=[], title=title)
        )
        comparisons += variants(config, name)
    return md.Plan(config.outer, comparisons)


def found(results) -> Iterator[tuple[str, str, Any, Any]]:
    """Every variant that was measured: domain, name, its data, Bayes' on the same tasks or None."""
    for name in TITLES:
        bayes = results.learners(f"inner_{name}", "bayes").get("bayes")
        for variant, data in results.learners(f"inner_{name}", "ordinary").items():
            yield name, variant, data, bayes
        for task_set in results.sets():
            if f"{task_set}_".startswith(f"{TRACKED}_{name}_"):
                for variant, data in results.learners(task_set, "meta").items():
                    yield name, variant, data.isel(outer_step=-1), results[task_set, "bayes"]


def beyond(data, bayes) -> dynamics.Estimate:
    """How far a learner staggers, beyond Bayes where that was measured on the same tasks."""
    if bayes is None:  # its slope is 0
        return dynamics.measured(dynamics.merit_of(data), data)
    return dynamics.difference(data, bayes)


def extreme(rows, take) -> dynamics.Estimate:
    """The greatest or least of what several variants stagger beyond Bayes, with its interval."""
    flat = [each for _, _, data, bayes in rows for each in (data, bayes) if each is not None]
    merits, paired = [dynamics.merit_of(data) for data in flat], rows[0][3] is not None

    def statistic(*means):
        each = np.array([merit(mean) for merit, mean in zip(merits, means, strict=True)])
        return take(each[::2] - each[1::2] if paired else each)

    return dynamics.estimate(statistic, *map(dynamics.strength, flat))


def criteria(config: Config, results):
    """What the science says of every variant of every domain."""
    every = list(found(results))
    for name, variant, data, bayes in every:
        merit = "(t_K - t_1) / t_K" if name == "bandit" else "slope of log t_k on log scale"
        said = f"{labelled.about(data).label}: {merit}{' minus Bayes' if bayes is not None else ''}"
        yield md.criterion(f"{name}_{variant}_staggering", beyond(data, bayes), said)
        yield censored(f"{name}_{variant}", data)
    for task_set in (each for each in results.sets() if each.startswith(HELDOUT)):
        name = task_set.split("_")[1]
        for variant, data in results.learners(task_set, "meta").items():
            excess = dynamics.measured_excess(data.isel(outer_step=-1), results[task_set, "bayes"])
            said = f"excess loss over Bayes, {labelled.about(data).label}"
            yield md.criterion(f"{name}_{variant}_excess", excess, said)
    for name, sign in SIGN.items():
        of = [row for row in every if row[0] == name]
        inner = [row for row in of if row[1].startswith("inner_")]
        yield md.criterion(
            f"{name}_inner_optimizers",
            extreme(inner, lambda each, sign=sign: (sign * each).min(0)),
            "the ordinary learner staggers alike under every optimiser: the least "
            f"staggering{' beyond Bayes' if name == 'bandit' else ''}, times {sign}, above 0",
            at_least=0.0,
            surely=True,
        )
        for varied, what in VARIED.items():
            rows = [row for row in of if row[1].startswith(f"{varied}_")]
            if rows:
                yield md.criterion(
                    f"{name}_{varied}_worst",
                    extreme(rows, lambda each: np.abs(each).max(0)),
                    f"the meta-learner staggers as Bayes does, whatever the {what}: greatest "
                    f"difference surely at most {WITHIN[name]:g}",
                    at_most=WITHIN[name],
                    surely=True,
                )


def robustness(results):
    """Draws how far each learner staggers, as one thing at a time is varied: a row each."""
    every = list(found(results))
    of = {name: [row for row in every if row[0] == name] for name in TITLES}
    height = 1.2 + 0.32 * max(map(len, of.values()))
    figure, axes = figures.grid(len(of), width=5.4, height=height)
    for axis, (name, rows) in zip(axes, of.items(), strict=True):
        for i, (_, _, data, bayes) in enumerate(rows):
            estimate, trained = beyond(data, bayes), labelled.about(data).kind == "meta"
            colour, marker = (figures.COLOURS[0], "o") if trained else (figures.COLOURS[1], "D")
            style = {"fmt": marker, "color": colour, "capsize": 3}
            axis.errorbar(estimate.value, i, xerr=figures.bars(estimate)[:, None], **style)
            if np.isnan(estimate.value):
                few = "not all" if labelled.modes(data).exchangeable else "fewer than two"
                axis.text(0, i, f" {few} modes ever learned", va="center", color=colour, fontsize=9)
        axis.axvline(0, color="grey", lw=0.8, zorder=0)
        axis.set_yticks(
            range(len(rows)), [labelled.about(row[2]).label for row in rows], fontsize=9
        )
        axis.set_ylim(len(rows) - 0.5, -0.5)
        alike = name == "bandit"
        what = "staggering minus Bayes'" if alike else "slope (meta-learner: minus Bayes')"
        axis.set(title=TITLES[name], xlabel=what)
    axes[0].plot([], [], "D", color=figures.COLOURS[1], label="ordinary learner")
    axes[0].plot([], [], "o", color=figures.COLOURS[0], label="meta-learner")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
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


def rows() -> dict[str, str]:
    """Every variant of a preset, by the name that its figures of merit begin with."""
    named = {}
    for name, title in TITLES.items():
        said = {
            f"{loop}_{o}": f"{loop} optimiser {o}"
            for loop in ("inner", "outer")
            for o in OPTIMIZERS
        }
        for config in (QUICK, PAPER):
            said |= {f"hidden_{hidden}": f"{hidden} hidden units" for hidden in config.widths}
            said |= {f"noise_{value:g}": label for _, label, value in noise(config, name)}
        named |= {f"{name}_{variant}": f"{title}, {label}" for variant, label in said.items()}
    return named


study = md.Study(
    "robustness",
    {"quick": QUICK, "paper": PAPER},
    plan,
    criteria,
    {"robustness": robustness},
    section="§§2–4",
    claims=[
        *(
            md.Claim(
                f"{name}_inner_optimizers",
                f"Ordinary learners stagger whatever their optimiser: {title}",
                "robustness",
            )
            for name, title in TITLES.items()
        ),
        *(
            md.Claim(
                f"{name}_{varied}_worst",
                f"The LSTM staggers as Bayes does, to within {WITHIN[name]:g}, whatever the "
                f"{what}: {title}",
                "robustness",
            )
            for varied, what in VARIED.items()
            for name, title in TITLES.items()
        ),
    ],
    tables=[
        md.Table(
            "Staggering by optimiser, width and noise: slope of log learning time on log scale, "
            "in the bandit (t_K − t_1) / t_K; the LSTM's minus Bayes', in the bandit the ordinary "
            "learner's too",
            rows(),
            {
                "staggering": "staggering",
                "censored_modes": "modes never learned",
                "excess": "excess loss of the LSTM",
            },
            "robustness",
        )
    ],
)
