"""Task diversity: of which tasks, and of how many, must a learner be trained to generalise?

    metadyn run task_diversity [--preset quick|workstation|paper] [--out DIR] [overrides]

Linear regression trained on few distinct tasks, between memorising them and generalising
(Raventós et al. 2023, arXiv:2306.15063), and nonlinear regression trained on one band of
frequencies or on a mixture of bands: each beside Bayes under both priors in question.
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np

import metadyn as md
from metadyn import dynamics, figures, trajectories
from metadyn.base import STRENGTH, Sampler
from metadyn.domains.distributions import Mixture, Pool
from metadyn.domains.fourier import FourierRegression, band
from metadyn.domains.linear import LinearRegression
from metadyn.errors import check
from metadyn.learners import bayes
from metadyn.learners.bayes_mixture import bayes_memorising, bayes_mixture
from metadyn.learners.lstm import LSTMConfig
from metadyn.objectives import prediction_loss
from metadyn.study import excess_of, paper

WITHIN, LARGER, FRESH, RIGHT = "in_distribution", "x4", "fresh", "bayes_right"
BANDS = {"band_1_2": (1, 2), "band_3_4": (3, 4), "band_1_4": (1, 4)}
"""Lowest and highest frequency of each band in the mixture; the first is trained on alone."""
KINDS = ("memorising", "generalising")  # Bayes that knows the pool of tasks, or the prior


@dataclass(frozen=True)
class Config(md.StudyConfig):
    """Everything the study depends on, beside its seed. Values are our choice."""

    linear: LinearRegression = LinearRegression()
    nonlinear: FourierRegression = FourierRegression(steps=20)
    pools: tuple[int, ...] = (16, 256, 4096)
    """Numbers of distinct tasks to train on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(min(self.pools, default=0) >= 1, "pools", self.pools, "name at least one, from 1 on")
        given = self.nonlinear.spectrum
        check(given == FourierRegression.spectrum, "spectrum", given, "leave out: bands are fixed")


def pools(config: Config) -> md.Comparison:
    """The network trained on fresh tasks, on pools of them, and Bayes that knows each pool."""
    domain, sizes, plain = config.linear, config.measure, config.meta_learner(config.linear)
    check(plain.objective is None, "meta", config.meta, "its objective is its own: choose another")
    points, label = sizes.probe_points, getattr(config, config.meta).label
    probes = {STRENGTH: domain.answers(points)}
    fresh = md.TaskSet(FRESH, domain, Sampler(domain), probes=probes, kinds=("meta", "bayes"))
    shifted = lambda name, by: sizes.sized(domain.evaluation(points, by), "shifted_tasks", name)
    sets = [sizes.sized(fresh, "heldout_tasks"), shifted(WITHIN, 1.0), shifted(LARGER, 4.0)]
    contenders, pairs = [replace(plain, label=f"{label}, ever new tasks")], []
    for size in config.pools:
        pool, called = Pool(domain, size), f"{label}, {size} tasks"
        trained = {"label": called, "objective": partial(prediction_loss, sample=pool)}
        contenders.append(replace(plain, name=f"pool_{size}", **trained))
        known = f"memorising_{size}", f"Bayes that knows {size} tasks", bayes_memorising(pool)
        pairs.append((sets[0], md.Contender(*known, "reference")))
    contenders.append(md.Contender("bayes", "Bayes-optimal", bayes.bayes_linear(domain), "bayes"))
    return md.Comparison(domain, contenders, sets, pairs, sizes, followed=False)


def bands(config: Config) -> md.Comparison:
    """The network of one band, that of all of them, and Bayes under the priors in question."""
    highest, sizes = max(high for _, high in BANDS.values()), config.measure
    domains, pairs = [], []
    for name, (low, high) in BANDS.items():
        spectrum = (*band(low, high), *(0.0,) * (highest - high))
        domains.append(domain := replace(config.nonlinear, spectrum=spectrum))
        tasks = sizes.sized(domain.evaluation(sizes.probe_points), "shifted_tasks", name)
        known = md.Contender(RIGHT, "Bayes, right prior", bayes.bayes_fourier(domain), "reference")
        pairs.append((tasks, known))
    every = tuple(range(1, highest + 1))
    mix = bayes_mixture([bayes.gaussian_fourier(each, every) for each in domains])
    plain, alone = config.meta_learner(domains[0]), bayes.bayes_fourier(domains[0])
    label, one = getattr(config, plain.name).label, partial(prediction_loss, teacher=alone)
    mixed = partial(prediction_loss, teacher=mix, sample=Mixture(tuple(domains)))
    contenders = [
        replace(plain, label=f"{label}, one band", objective=one),
        replace(plain, name=f"{plain.name}_mixture", label=f"{label}, all bands", objective=mixed),
        md.Contender("bayes", "Bayes, one band's prior", alone, "bayes"),
        md.Contender("bayes_mixture", "Bayes, all bands' priors", mix, "reference"),
    ]
    sets, named = [tasks for tasks, _ in pairs], {"name": "band", "title": "bands"}
    return md.Comparison(domains[0], contenders, sets, pairs, sizes, followed=False, **named)


def plan(config: Config) -> md.Plan:
    """Linear regression with pools of tasks, and nonlinear regression with bands of frequencies."""
    return md.Plan(config.outer, [pools(config), bands(config)])


def distances(results, size: int) -> list[dynamics.Estimate]:
    """Mean-square distances of the answers of a pool's network, on fresh tasks, to each Bayes.

    To the memorising one, to the generalising one, and by how much the former is nearer.
    """
    names = f"pool_{size}", f"memorising_{size}", "bayes"
    own, *known = (dynamics.samples(results[FRESH, who], "answers")[:, :, :-1] for who in names)
    apart = np.stack([((own - each) ** 2).mean((2, 3, 4)) for each in known], -1)
    with_gain = lambda mean: np.concatenate([mean, np.diff(mean)], -1)
    return dynamics.estimate(with_gain, apart).each()


def criteria(config: Config, results):
    """How near each pool's network is to either Bayes, and what a mixture of bands gains."""
    pair = lambda tasks, name, best="bayes": (results[tasks, name], results[tasks, best])
    for name, data in results.learners(WITHIN, "meta").items():
        found, label = excess_of(results, name), trajectories.about(data).label
        yield md.criterion(f"{name}_excess", found, f"{label}: excess on fresh tasks")
        said = f"{label}: growth of the excess over training's Bayes, {LARGER}"
        found = dynamics.excesses([pair(LARGER, name), pair(WITHIN, name)], lambda e: e[0] - e[1])
        yield md.criterion(f"{name}_growth_{LARGER}", found, said)
    apart = {size: distances(results, size) for size in config.pools}
    for size, each in apart.items():
        for kind, found in zip(KINDS, each, strict=False):
            said = f"{size} tasks: mean-square distance to the {kind} Bayes, on fresh tasks"
            yield md.criterion(f"pool_{size}_{kind}", found, said)
    few, many = (apart[size][-1] for size in (min(config.pools), max(config.pools)))
    said = "{} tasks: mean-square distance to the generalising Bayes minus that to the memorising"
    yield md.criterion("few_nearer", few, said.format("fewest"), at_least=0.0, surely=True)
    yield md.criterion("many_nearer", many, said.format("most"), at_most=0.0, surely=True)
    for task_set in BANDS:
        for name, data in results.learners(task_set, "meta", "bayes", "reference").items():
            if name != RIGHT:
                said = f"{trajectories.about(data).label}: excess over the right prior, {task_set}"
                found = dynamics.measured_excess(*pair(task_set, name, RIGHT))
                yield md.criterion(f"{name}_{task_set}_over_right", found, said)
    two = [pair("band_3_4", f"{config.meta}{each}", RIGHT) for each in ("_mixture", "")]
    ratio = dynamics.excesses(two, lambda e: e[0] / e[1])
    said = "excess in another band, trained on a mixture of bands over trained on one"
    yield md.criterion("bands_gain", ratio, said, 0.5, surely=True)


def diversity(results):
    """Draws distances to the memorising and to the generalising Bayes by the number of tasks."""
    names = [name.removeprefix("pool_") for name in results.learners(FRESH)]
    sizes = sorted(int(size) for size in names if size.isdecimal())
    both = zip(*(distances(results, size)[:-1] for size in sizes), strict=True)
    found = {f"to the {k} Bayes": dynamics.stacked(of) for k, of in zip(KINDS, both, strict=False)}
    shown = {"answers on fresh tasks": (np.array(sizes), found)} if sizes else {}
    axes = {"xscale": "log", "yscale": "log", "xlabel": "distinct tasks in training"}
    figure = figures.panels(shown, "mean-square distance", **axes)
    figures.log_ticks(figure.axes[0].yaxis)
    return figure


def excess_by_band(results):
    """Draws the excess over Bayes under the right prior for each band of frequencies."""
    names = [name for name in results.learners("band_1_2") if name != RIGHT]
    figure, (axis,) = figures.grid(min(len(names), 1), width=7.5, height=4.4)
    over = lambda name, of: dynamics.measured_excess(results[of, name], results[of, RIGHT])
    merit = lambda name: dynamics.stacked(over(name, of) for of in BANDS)
    found = [(trajectories.about(results["band_1_2", name]).label, merit(name)) for name in names]
    figures.grouped_bars(axis, [f"frequencies {a} to {b}" for a, b in BANDS.values()], found)
    axis.set_yscale("symlog", linthresh=0.1)
    axis.set_ylabel("excess loss over Bayes under the right prior", fontsize=10)
    figures.legend_below(axis)
    return figure


OUTER = md.OuterConfig(2000, 48, optimizer="nadam", b2=0.98, learning_rate=3e-2, checkpoints=1)
UNTRACKED = {"tracked_tasks": 0, "chunk": 512}
QUICK = Config(
    linear=LinearRegression(n_x=3, n_y=3),
    outer=OUTER,
    measure=md.MeasureConfig(shifted_tasks=256, heldout_tasks=512, probe_points=12, **UNTRACKED),
)
WORKSTATION = Config(
    lstm=LSTMConfig(hidden=128),
    outer=replace(OUTER, steps=4000, learning_rate=2e-2),
    measure=md.MeasureConfig(shifted_tasks=1024, heldout_tasks=1024, probe_points=16, **UNTRACKED),
)
PAPER = Config(
    **paper(100_000, batch=1024, checkpoints=10),
    pools=tuple(4**k for k in range(2, 9)),
    measure=md.MeasureConfig(shifted_tasks=8192, heldout_tasks=4096, tracked_tasks=0),
)
study = md.Study(
    "task_diversity",
    {"quick": QUICK, "workstation": WORKSTATION, "paper": PAPER},
    plan,
    criteria,
    {"diversity": diversity, "excess_by_band": excess_by_band},
    section="ours",
    claims={
        "diversity": {
            "few_nearer": "Ours: trained on few tasks an LSTM is nearer to the memorising Bayes",
            "many_nearer": "Ours: trained on many, to the generalising Bayes",
        },
        "excess_by_band": {"bands_gain": "Ours: a mixture of bands helps an LSTM in another band"},
    },
)
