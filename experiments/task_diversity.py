"""Task diversity: of which tasks, and of how many, must a learner be trained to generalise?

    metadyn run task_diversity [--preset quick|workstation|paper] [--out DIR] [overrides]

In linear regression a network trained on few distinct tasks may memorise them or generalise
(Raventós et al. 2023, arXiv:2306.15063). In nonlinear regression it is trained on one band of
frequencies or on a mixture of bands. Both are compared with Bayes under either prior.
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np

import metadyn as md
from metadyn import dynamics, figures, trajectories
from metadyn.base import STRENGTH
from metadyn.domains.distributions import Mixture, Pool
from metadyn.domains.fourier import FourierRegression, band
from metadyn.domains.linear import LinearRegression
from metadyn.errors import check
from metadyn.learners import bayes
from metadyn.learners.bayes_mixture import bayes_memorising, bayes_mixture
from metadyn.learners.lstm import LSTMConfig
from metadyn.objectives import prediction_loss
from metadyn.study import heldout_excess, paper

WITHIN, LARGER, FRESH, RIGHT = "in_distribution", "x4", "fresh", "bayes_right"
BANDS = {"band_1_2": (1, 2), "band_3_4": (3, 4), "band_1_4": (1, 4)}
"""Lowest and highest frequency of each band in the mixture. The first is also trained on alone."""
KINDS = ("memorising", "generalising")  # Bayes that knows the pool of tasks, or the prior


@dataclass(frozen=True)
class Config(md.StudyConfig):
    """All settings of the study, except its seed. Values are our choice."""

    linear: LinearRegression = LinearRegression()
    nonlinear: FourierRegression = FourierRegression(steps=20)
    pools: tuple[int, ...] = (16, 256, 4096)
    """Numbers of distinct training tasks, for one network each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(min(self.pools, default=0) >= 1, "pools", self.pools, "give numbers of 1 or more")
        spectrum, default = self.nonlinear.spectrum, FourierRegression.spectrum
        check(spectrum == default, "spectrum", spectrum, "leave it out: bands are fixed")


def pools(config: Config) -> md.Comparison:
    """Compares networks trained on fresh tasks and on pools with Bayes that knows each pool."""
    domain, sizes, plain = config.linear, config.measure, config.meta_learner(config.linear)
    check(plain.objective is None, "meta", config.meta, "has its own objective: choose another")
    points, label = sizes.probe_points, getattr(config, config.meta).label
    probes = {STRENGTH: domain.answers(points)}
    fresh = md.TaskSet(FRESH, domain, probes=probes, kinds=("meta", "bayes"))
    scaled = lambda name, by: sizes.sized(domain.evaluation(points, by), "shifted_tasks", name)
    sets = [sizes.sized(fresh, "heldout_tasks"), scaled(WITHIN, 1.0), scaled(LARGER, 4.0)]
    contenders, pairs = [replace(plain, label=f"{label}, ever new tasks")], []
    for size in config.pools:
        pool, pool_label = Pool(domain, size), f"{label}, {size} tasks"
        fields = {"label": pool_label, "objective": partial(prediction_loss, sample=pool)}
        contenders.append(replace(plain, name=f"pool_{size}", **fields))
        memorising = f"memorising_{size}", f"Bayes that knows {size} tasks", bayes_memorising(pool)
        pairs.append((sets[0], md.Contender(*memorising, "reference")))
    contenders.append(md.Contender("bayes", "Bayes-optimal", bayes.bayes_linear(domain), "bayes"))
    return md.Comparison(domain, contenders, sets, pairs, sizes, followed=False)


def bands(config: Config) -> md.Comparison:
    """Compares networks trained on one band and on all bands with Bayes under several priors."""
    highest, sizes = max(high for _, high in BANDS.values()), config.measure
    domains, pairs = [], []
    for name, (low, high) in BANDS.items():
        spectrum = (*band(low, high), *(0.0,) * (highest - high))
        domains.append(domain := replace(config.nonlinear, spectrum=spectrum))
        tasks = sizes.sized(domain.evaluation(sizes.probe_points), "shifted_tasks", name)
        right = md.Contender(RIGHT, "Bayes, right prior", bayes.bayes_fourier(domain), "reference")
        pairs.append((tasks, right))
    frequencies = tuple(range(1, highest + 1))
    mixture_bayes = bayes_mixture([bayes.gaussian_fourier(d, frequencies) for d in domains])
    plain, band_bayes = config.meta_learner(domains[0]), bayes.bayes_fourier(domains[0])
    label, one = getattr(config, plain.name).label, partial(prediction_loss, teacher=band_bayes)
    mixed = partial(prediction_loss, teacher=mixture_bayes, sample=Mixture(tuple(domains)))
    contenders = [
        replace(plain, label=f"{label}, one band", objective=one),
        replace(plain, name=f"{plain.name}_mixture", label=f"{label}, all bands", objective=mixed),
        md.Contender("bayes", "Bayes, one band's prior", band_bayes, "bayes"),
        md.Contender("bayes_mixture", "Bayes, all bands' priors", mixture_bayes, "reference"),
    ]
    sets, names = [tasks for tasks, _ in pairs], {"name": "band", "title": "bands"}
    return md.Comparison(domains[0], contenders, sets, pairs, sizes, followed=False, **names)


def plan(config: Config) -> md.Plan:
    """Plans linear regression on pools of tasks and nonlinear regression on frequency bands."""
    return md.Plan(config.outer, [pools(config), bands(config)])


def distances(results, size: int) -> list[dynamics.Estimate]:
    """Estimates mean-square distances on fresh tasks of a pool's network from Bayes' answers.

    Returns those from the memorising and the generalising Bayes, and the latter minus the former.
    """
    names = f"pool_{size}", f"memorising_{size}", "bayes"
    network, *best = (dynamics.samples(results[FRESH, n], "answers")[:, :, :-1] for n in names)
    distance = np.stack([((network - answers) ** 2).mean((2, 3, 4)) for answers in best], -1)
    with_gain = lambda mean: np.concatenate([mean, np.diff(mean)], -1)
    return dynamics.estimate(with_gain, distance).split()


def criteria(config: Config, results):
    """Yields how near each pool's network is to either Bayes, and what a mixture of bands gains."""
    pair = lambda tasks, name, best="bayes": (results[tasks, name], results[tasks, best])
    for name, data in results.learners(WITHIN, "meta").items():
        excess, label = heldout_excess(results, name), trajectories.about(data).label
        yield md.criterion(f"{name}_excess", excess, f"{label}: excess on fresh tasks")
        text = f"{label}: growth of the excess over training's Bayes, {LARGER}"
        growth = dynamics.joint_excess([pair(LARGER, name), pair(WITHIN, name)], np.subtract.reduce)
        yield md.criterion(f"{name}_growth_{LARGER}", growth, text)
    by_size = {size: distances(results, size) for size in config.pools}
    for size, estimates in by_size.items():
        for kind, distance in zip(KINDS, estimates, strict=False):
            text = f"{size} tasks: mean-square distance to the {kind} Bayes, on fresh tasks"
            yield md.criterion(f"pool_{size}_{kind}", distance, text)
    few, many = by_size[min(config.pools)][-1], by_size[max(config.pools)][-1]
    text = "{} tasks: mean-square distance to the generalising Bayes minus that to the memorising"
    yield md.criterion("few_nearer", few, text.format("fewest"), at_least=0.0, surely=True)
    yield md.criterion("many_nearer", many, text.format("most"), at_most=0.0, surely=True)
    for band_name in BANDS:
        for name, data in results.learners(band_name, "meta", "bayes", "reference").items():
            if name != RIGHT:
                text = f"{trajectories.about(data).label}: excess over the right prior, {band_name}"
                excess = dynamics.excess_over_bayes(*pair(band_name, name, RIGHT))
                yield md.criterion(f"{name}_{band_name}_over_right", excess, text)
    pairs = [pair("band_3_4", f"{config.meta}{suffix}", RIGHT) for suffix in ("_mixture", "")]
    ratio = dynamics.joint_excess(pairs, lambda e: e[0] / e[1])
    text = "excess in another band, trained on a mixture of bands over trained on one"
    yield md.criterion("bands_gain", ratio, text, 0.5, surely=True)


def diversity(results):
    """Draws distances to the memorising and to the generalising Bayes by the number of tasks."""
    names = [name.removeprefix("pool_") for name in results.learners(FRESH)]
    sizes = sorted(int(size) for size in names if size.isdecimal())
    by_kind = zip(*(distances(results, size)[:-1] for size in sizes), strict=True)
    lines = {f"to the {k} Bayes": dynamics.stacked(d) for k, d in zip(KINDS, by_kind, strict=False)}
    panels = {"answers on fresh tasks": (np.array(sizes), lines)} if sizes else {}
    axes = {"xscale": "log", "yscale": "log", "xlabel": "distinct tasks in training"}
    figure = figures.panels(panels, "mean-square distance", **axes)
    figures.log_ticks(figure.axes[0].yaxis)
    return figure


def excess_by_band(results):
    """Draws the excess loss over Bayes under the right prior in each band of frequencies."""
    names = [name for name in results.learners("band_1_2") if name != RIGHT]
    figure, (axis,) = figures.grid(min(len(names), 1), width=7.5, height=4.4)
    excess = lambda name, b: dynamics.excess_over_bayes(results[b, name], results[b, RIGHT])
    excesses = lambda name: dynamics.stacked(excess(name, b) for b in BANDS)
    bars = [(trajectories.about(results["band_1_2", n]).label, excesses(n)) for n in names]
    figures.grouped_bars(axis, [f"frequencies {a} to {b}" for a, b in BANDS.values()], bars)
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
