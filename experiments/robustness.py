"""Robustness: the order of learning by inner and outer optimiser, by hidden width and by noise.

    metadyn run experiments/robustness.py [--preset quick|paper] [--out DIR] [overrides]

Rabinowitz (2019), arXiv:1905.01320, says that what is found does not depend on the optimiser. One
thing at a time is changed in the studies of the three domains; the networks, objectives and sets of
tasks are theirs. A learner that is too slow to have learned anything has no slope.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from metadyn import dynamics
from metadyn.base import check_positive
from metadyn.domains.bandit import ContextualBandit
from metadyn.domains.fourier import FourierRegression, band
from metadyn.domains.linear import LinearRegression
from metadyn.learners.lstm import LSTMConfig
from metadyn.outer import OuterConfig
from metadyn.store import HELDOUT, TRACKED, RunFolder
from metadyn.study import (
    Claim,
    Contender,
    MeasureConfig,
    Plan,
    Study,
    Table,
    TaskSet,
    Training,
    censored,
    criterion,
    load_study,
)

TITLES = {
    "linear": "linear regression",
    "nonlinear": "nonlinear regression",
    "bandit": "contextual bandit",
}
STUDIES = {
    name: load_study(str(Path(__file__).with_name(f"{title.replace(' ', '_')}.py")))
    for name, title in TITLES.items()
}
OPTIMIZERS = ("sgd", "momentum", "rmsprop", "adam")


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
class Config:
    """Everything the study depends on, beside its seed. Values are our choice."""

    linear: LinearRegression = LinearRegression()
    nonlinear: FourierRegression = FourierRegression()
    bandit: ContextualBandit = ContextualBandit()
    lstm: LSTMConfig = LSTMConfig()
    outer: OuterConfig = OuterConfig()
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
    measure: MeasureConfig = MeasureConfig()


def parts(config: Config, name: str, **changes: Any) -> Plan:
    """What a domain's own study plans, with some of its configuration changed."""
    same = {f: getattr(config, f) for f in ("lstm", "outer", "measure")}
    return STUDIES[name].changed(**{"domain": getattr(config, name), **same, **changes})


def inner_variants(config: Config, name: str) -> Iterator[tuple[str, TaskSet, Contender]]:
    """Ordinary learners by optimiser: (optimiser, tasks, learner)."""
    own = STUDIES[name].presets["quick"]
    for optimizer in OPTIMIZERS:
        if name == "nonlinear":
            wanted, changes = ("by_optimizer", optimizer), {}
        elif name == "linear":
            rate, wanted = getattr(config.linear_rates, optimizer), ("in_distribution", "sgd")
            fields = {"updates": config.linear_updates, "learning_rate": rate}
            changes = {"sgd": dataclasses.replace(own.sgd, optimizer=optimizer, **fields)}
        else:
            rate = getattr(config.bandit_rates, optimizer)
            wanted = ("in_distribution", "reinforce_coupled")
            fields = {"optimizer": optimizer, "learning_rate": rate}
            changes = {"policy": dataclasses.replace(own.policy, **fields)}
        planned = parts(config, name, **changes).measurements
        yield (
            optimizer,
            *next((s, who) for s, who in planned if (s.name, who.name) == wanted),
        )


def labels(config: Config, name: str) -> dict[str, str]:
    """What each variant of a domain's meta-learner is called."""
    said = {f"outer_{optimizer}": f"outer optimiser {optimizer}" for optimizer in OPTIMIZERS}
    said |= {f"hidden_{hidden}": f"{hidden} hidden units" for hidden in config.widths}
    if name == "bandit":
        return said | {f"noise_{p:g}": f"pay with {p:.0%} or {1 - p:.0%}" for p in config.pays}
    return said | {f"noise_{sigma:g}": f"noise σ = {sigma:g}" for sigma in config.sigmas}


def outer_variants(config: Config, name: str) -> Iterator[tuple[str, Training]]:
    """How each of them is trained."""
    domain = getattr(config, name)

    def changed(**changes: Any) -> Training:
        return parts(config, name, **changes).trainings[0]

    for optimizer in OPTIMIZERS:
        rate, training = getattr(config.outer_rates, optimizer), changed()
        outer = dataclasses.replace(config.outer, optimizer=optimizer, learning_rate=rate)
        trainee = training.trainee._replace(optimizer=outer.transformation())
        yield f"outer_{optimizer}", dataclasses.replace(training, trainee=trainee)
    for hidden in config.widths:
        lstm = dataclasses.replace(config.lstm, hidden=hidden)
        yield f"hidden_{hidden}", changed(lstm=lstm)
    for p in config.pays if name == "bandit" else ():
        noisy = dataclasses.replace(domain, p_high=p, p_low=1 - p)
        yield f"noise_{p:g}", changed(domain=noisy)
    for sigma in config.sigmas if name != "bandit" else ():
        noisy = dataclasses.replace(domain, sigma=sigma)
        yield f"noise_{sigma:g}", changed(domain=noisy)


def plan(config: Config) -> Plan:
    """Every variant of every domain."""
    trainings, measurements = [], []
    for name, title in TITLES.items():
        for optimizer, tasks, contender in inner_variants(config, name):
            attrs = {k: v for k, v in tasks.attrs.items() if k not in ("compared", "shift")}
            attrs |= {"title": title, "varied": f"inner optimiser {optimizer}"}
            tasks = dataclasses.replace(tasks, name=f"{name}_inner_{optimizer}", attrs=attrs)
            measurements.append((tasks, dataclasses.replace(contender, name="ordinary")))
            if name == "bandit":
                measurements.append((tasks, parts(config, name).trainings[0].bayes))
        said = labels(config, name)
        for variant, training in outer_variants(config, name):
            attrs = {"title": title, "varied": said[variant]}
            trainings.append(training.named(f"{name}_{variant}", **attrs))
    return Plan(config.outer, trainings, measurements, chunk=config.measure.chunk)


WITHIN = {"linear": 0.2, "nonlinear": 0.3, "bandit": 0.15}
"""How far the LSTM may stagger beyond Bayes: the bounds of the domains' own studies."""
SIGN = {"linear": -1, "nonlinear": 1, "bandit": 1}
"""Of the ordinary learner's staggering: greatest modes first, low frequencies first."""
VARIED = {"outer": "outer optimiser", "hidden": "hidden width", "noise": "noise"}


def of_domain(config: Config, run: RunFolder, name: str):
    """How far each variant staggers; the meta-learners beside Bayes, and their excess loss."""
    last = run.outer_steps()[-1:]
    bandit = name == "bandit"
    of = dynamics.staggering_of if bandit else dynamics.slope_of
    merit = "(t_K - t_1) / t_K" if bandit else "slope of log t_k on log scale"

    learners = ("ordinary", "bayes") if bandit else ("ordinary",)  # Bayes' slope is 0
    ordinary = {
        o: [run.measurement(f"{name}_inner_{o}", who) for who in learners] for o in OPTIMIZERS
    }
    for optimizer, measured in ordinary.items():
        yield criterion(
            f"{name}_inner_{optimizer}_staggering",
            dynamics.difference(of, *measured) if bandit else dynamics.measured(of, *measured),
            f"ordinary learner{' minus Bayes' if bandit else ''} under {optimizer}: {merit}",
        )
        yield censored(f"{name}_inner_{optimizer}", measured[0])
    flat = [data for measured in ordinary.values() for data in measured]
    staggerings = [of(data) for data in flat]

    def least(*means):
        """Over optimisers, of the staggering of the ordinary learner in its own direction."""
        found = [each(mean) for each, mean in zip(staggerings, means, strict=True)]
        found = np.subtract(found[::2], found[1::2]) if bandit else np.array(found)
        return (SIGN[name] * found).min(0)

    what = "least (t_K - t_1) / t_K minus Bayes'" if bandit else f"least slope, times {SIGN[name]},"
    yield criterion(
        f"{name}_inner_optimizers",
        dynamics.estimate(least, *map(dynamics.strength, flat)),
        f"the ordinary learner staggers the same way under every optimiser: {what} above 0",
        at_least=0.0,
        surely=True,
    )

    beside_bayes: dict[str, list] = {}
    for variant, label in labels(config, name).items():
        (lstm, bayes), losses = (
            (
                run.trajectories(f"{s}_{name}_{variant}", last).isel(outer_step=0),
                run.measurement(f"{s}_{name}_{variant}", "bayes"),
            )
            for s in (TRACKED, HELDOUT)
        )
        beside_bayes.setdefault(variant.partition("_")[0], []).append((lstm, bayes))
        yield criterion(
            f"{name}_{variant}_staggering",
            dynamics.difference(of, lstm, bayes),
            f"LSTM minus Bayes, {label}: {merit}",
        )
        yield censored(f"{name}_{variant}", lstm)
        yield criterion(
            f"{name}_{variant}_excess",
            dynamics.measured_excess(*losses),
            f"excess loss of the LSTM over Bayes, {label}",
        )
    for varied, pairs in beside_bayes.items():
        merits = [(of(lstm), of(bayes)) for lstm, bayes in pairs]
        yield criterion(
            f"{name}_{varied}_worst",
            dynamics.estimate(
                lambda *means, merits=merits: np.max(
                    [
                        np.abs(one(a) - other(b))
                        for (one, other), a, b in zip(merits, means[::2], means[1::2], strict=True)
                    ],
                    axis=0,
                ),
                *(dynamics.strength(data) for pair in pairs for data in pair),
            ),
            f"the LSTM staggers as Bayes does, whatever the {VARIED[varied]}: greatest "
            f"difference surely at most {WITHIN[name]:g}",
            at_most=WITHIN[name],
            surely=True,
        )


def criteria(config: Config, run: RunFolder):
    """What the science says of every variant of every domain."""
    for name in TITLES:
        yield from of_domain(config, run, name)


QUICK = Config(
    linear=LinearRegression(n_x=3, n_y=3),
    nonlinear=FourierRegression(band(1, 3), steps=20),
    bandit=ContextualBandit(contexts=3, actions=3, steps=20),
    outer=OuterConfig(steps=3000, batch=32, learning_rate=3e-2, schedule="linear", checkpoints=4),
    measure=MeasureConfig(updating_tasks=32, tracked_tasks=512, heldout_tasks=512, probe_points=16),
)
PAPER = Config(
    lstm=LSTMConfig(hidden=256),
    outer=OuterConfig(steps=50_000, batch=512, learning_rate=4e-3, warmup=1000, checkpoints=4),
    outer_rates=Rates(sgd=1.0, momentum=0.1, rmsprop=1e-3, adam=4e-3),
    widths=(64, 128),
    measure=MeasureConfig(
        updating_tasks=256, tracked_tasks=8192, heldout_tasks=8192, probe_points=64
    ),
)


def rows(*configs: Config) -> dict[str, str]:
    """Every variant, by the name that its figures of merit begin with."""
    found = {}
    for name, title in TITLES.items():
        found |= {f"{name}_inner_{o}": f"{title}, inner optimiser {o}" for o in OPTIMIZERS}
        for config in configs:
            found |= {f"{name}_{v}": f"{title}, {said}" for v, said in labels(config, name).items()}
    return found


study = Study(
    "robustness",
    {"quick": QUICK, "paper": PAPER},
    plan,
    criteria,
    section="§§2–4",
    claims=(
        *(
            Claim(
                f"Ordinary learners stagger whatever their optimiser: {TITLES[name]}",
                f"{name}_inner_optimizers",
                "robustness",
            )
            for name in TITLES
        ),
        *(
            Claim(
                f"The LSTM staggers as Bayes does, to within {WITHIN[name]:g}, whatever the "
                f"{what}: {TITLES[name]}",
                f"{name}_{varied}_worst",
                "robustness",
            )
            for varied, what in VARIED.items()
            for name in TITLES
        ),
    ),
    tables=(
        Table(
            "Staggering by optimiser, width and noise: slope of log learning time on log scale, "
            "in the bandit (t_K − t_1) / t_K; the LSTM's minus Bayes', in the bandit the ordinary "
            "learner's too",
            rows(QUICK, PAPER),
            {
                "staggering": "staggering",
                "censored_modes": "modes never learned",
                "excess": "excess loss of the LSTM",
            },
            "robustness",
        ),
    ),
)
