"""Out of distribution: what keeps a meta-trained learner near Bayes beyond its training tasks.

    metadyn run out_of_distribution [--preset quick|workstation|paper] [--out DIR] [overrides]

Remedies for an LSTM and another network in linear regression: training on a mixture of scales,
feedback divided by its running size, both, more distinct tasks (Raventós et al. 2023,
arXiv:2306.15063); and in nonlinear regression training on a mixture of bands. What a remedy costs
within is reckoned at equal outer steps; the criterion on seconds says how long each trained.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import numpy as np

import metadyn as md
from metadyn import dynamics, figures, labelled
from metadyn.base import STRENGTH, Sampler
from metadyn.domains.distributions import Mixture, Pool
from metadyn.domains.fourier import FourierRegression, band
from metadyn.domains.linear import LinearRegression
from metadyn.errors import check, check_positive
from metadyn.learners import bayes
from metadyn.learners.bayes_mixture import bayes_memorising, bayes_mixture
from metadyn.learners.lstm import LSTMConfig
from metadyn.learners.normalised import Normalised
from metadyn.objectives import prediction_loss
from metadyn.study import HELDOUT, Network, claims, excess_of, paper

WITHIN, RIGHT = "in_distribution", "bayes_right"
SETS = {WITHIN: (1, 1), "x2": (2, 1), "x4": (4, 1), "x8": (8, 1), "x16": (16, 1), "outsize": (1, 8)}
"""Sets of tasks: factor on the whole spectrum, factor on its greatest mode alone."""
BANDS = {"band_1_2": (1, 2), "band_3_4": (3, 4), "band_1_4": (1, 4)}
"""Lowest and highest frequency of each band in the mixture; the first is trained on alone."""
KNOWING = {"memorising": "memorising_{}", "generalising": "bayes"}
"""Bayes that knows the pool of tasks, and that knows the prior."""
OTHER: Network = "deltanet"
"""The other network."""
GROWTH, COST = {"x4": 0.1, "x16": 0.2}, 1.15
"""Greatest growth of the excess with both remedies, and excess within over the plain network's."""


@dataclass(frozen=True)
class Config(md.StudyConfig):
    """Everything the study depends on, beside its seed. Values are our choice."""

    linear: LinearRegression = LinearRegression()
    nonlinear: FourierRegression = FourierRegression(steps=20)
    scales: tuple[float, ...] = (1.0, 8.0)
    """Factors on W in the mixture; losses count by their inverse square."""
    pools: tuple[int, ...] = (16, 256, 4096)
    """Numbers of distinct tasks to train on."""
    other_batch: int = 8
    """Episodes in one outer step of the other network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("scales", "pools"):
            values = getattr(self, field)
            right = len(values) > 0 and all(0 < value < math.inf for value in values)
            check(right, field, values, "name at least one, all above 0 and finite")
        check_positive(self, "other_batch")


def linear(config: Config) -> md.Comparison:
    """The networks with each remedy, on the same tasks, and Bayes under the priors in question."""
    domain, sizes, points = config.linear, config.measure, config.measure.probe_points
    scaled = tuple(domain.scaled(scale) for scale in config.scales)
    mixture = Mixture(scaled, tuple(scale**-2.0 for scale in config.scales))
    mix = bayes_mixture([bayes.gaussian_linear(each) for each in scaled])
    alone = bayes.bayes_linear(domain)
    # Its prior is wrong for larger scales, but loses hardly anything there, and is quick.
    one_scale = partial(prediction_loss, teacher=alone)
    mixed = partial(one_scale, sample=mixture, weight=mixture.weight)
    contenders, sets, pairs = [], [], []
    for name in (config.meta, OTHER):
        plain, network = replace(config, meta=name).meta_learner(domain), getattr(config, name)
        if name == OTHER:
            plain = replace(plain, own=replace(plain.own, batch=config.other_batch))
        normalised = replace(plain, learner=Normalised(domain, network.make))
        remedies = {
            "plain": (plain, one_scale),
            "mixture": (plain, mixed),
            "normalised": (normalised, one_scale),
            "both": (normalised, mixed),
        }
        for remedy in remedies if name == config.meta else ("plain", "both"):
            called, (made, objective) = f"{name}_{remedy}", remedies[remedy]
            made = replace(made, name=called.removesuffix("_plain"), objective=objective)
            contenders.append(replace(made, label=f"{network.label}, {remedy}"))
    for shift, factors in SETS.items():
        sets.append(sizes.sized(domain.evaluation(points, *factors), "shifted_tasks", shift))
        norms = [math.hypot(*domain.spectrum(*each)) for each in (factors, (1, 1))]
        pairs.append((sets[-1], right(bayes.bayes_linear(domain.scaled(norms[0] / norms[1])))))
    probes = {STRENGTH: domain.answers(points)}
    fresh = md.TaskSet("fresh", domain, Sampler(domain), probes=probes, kinds=("bayes",))
    sets.append(fresh := sizes.sized(fresh, "heldout_tasks"))
    for size in config.pools:
        pool, label = Pool(domain, size), f"{getattr(config, config.meta).label}, {size} tasks"
        made = replace(contenders[0], name=f"pool_{size}", label=label, drawn=False)
        contenders.append(replace(made, objective=partial(prediction_loss, sample=pool)))
        known = md.Contender(f"memorising_{size}", label, bayes_memorising(pool), "reference")
        pairs += [(fresh, contenders[-1]), (fresh, known)]
    contenders += references(alone, mix)
    return md.Comparison(domain, contenders, sets, pairs, sizes, followed=False)


def right(learner: md.Learner) -> md.Contender:
    """Bayes under the prior that a set of tasks is of, which is measured on that set alone."""
    return md.Contender(RIGHT, "Bayes, right prior", learner, "reference")


def references(alone: md.Learner, mix: md.Learner) -> list[md.Contender]:
    """Bayes under the prior of plain training, from whom excess is reckoned, and the mixture's."""
    known = md.Contender("bayes", "Bayes, plain training's prior", alone, "bayes")
    return [known, md.Contender("bayes_mixture", "Bayes, mixture", mix, "reference")]


def bands(config: Config) -> md.Comparison:
    """The network of one band, that of all of them, and Bayes under the priors in question."""
    highest, sizes = max(high for _, high in BANDS.values()), config.measure
    domains, pairs = [], []
    for name, (low, high) in BANDS.items():
        spectrum = (*band(low, high), *(0.0,) * (highest - high))
        domains.append(domain := replace(config.nonlinear, spectrum=spectrum))
        tasks = sizes.sized(domain.evaluation(sizes.probe_points), "shifted_tasks", name)
        pairs.append((tasks, right(bayes.bayes_fourier(domain))))
    frequencies = tuple(range(1, highest + 1))
    mix = bayes_mixture([bayes.gaussian_fourier(each, frequencies) for each in domains])
    plain, alone = config.meta_learner(domains[0]), bayes.bayes_fourier(domains[0])
    label = getattr(config, plain.name).label
    one_band = partial(prediction_loss, teacher=alone)
    mixed = partial(prediction_loss, teacher=mix, sample=Mixture(tuple(domains)))
    contenders = [
        replace(plain, label=f"{label}, one band", objective=one_band),
        replace(plain, name=f"{plain.name}_mixture", label=f"{label}, all bands", objective=mixed),
        *references(alone, mix),
    ]
    sets = [tasks for tasks, _ in pairs]
    made = md.Comparison(domains[0], contenders, sets, pairs, sizes, name="band", title="bands")
    return replace(made, followed=False)


def plan(config: Config) -> md.Plan:
    """Linear regression with all remedies, and nonlinear regression with a mixture of bands."""
    return md.Plan(config.outer, [linear(config), bands(config)])


def over_right(results, task_set: str, name: str) -> dynamics.Estimate:
    """Excess loss over Bayes under the right prior for a set of tasks."""
    return dynamics.measured_excess(results[task_set, name], results[task_set, RIGHT])


def distance(results, size: int, kind: str) -> dynamics.Estimate:
    """Mean-square distance of answers of a pool's network, on fresh tasks, to those of a Bayes."""
    pair = [results["fresh", name.format(size)] for name in ("pool_{}", KNOWING[kind])]
    one, two = (dynamics.samples(data, "answers") for data in pair)
    return dynamics.estimate(np.asarray, ((one - two) ** 2)[:, :, :-1].mean((2, 3, 4)))


def row(data, what: str, found: dynamics.Estimate, said: str, at_most: float = math.inf):
    """A criterion on one learner."""
    about = labelled.about(data)
    said += f"; at most {at_most:g}" if at_most < math.inf else ""
    return md.criterion(f"{about.learner}_{what}", found, f"{about.label}: {said}", at_most)


def criteria(config: Config, results):
    """What each remedy gains outside, what it costs within, and what exact Bayes pays."""
    plain, best = (results[HELDOUT, name] for name in (config.meta, "bayes"))
    for name, data in results.learners(WITHIN, "meta").items():
        bounds: dict[str, float] = GROWTH if name.endswith("_both") else {}
        yield row(data, "excess", excess_of(results, name), "excess loss within")
        trained = [each.isel(outer_step=-1) for each in (results[HELDOUT, name], plain)]
        seconds = [labelled.about(each).seconds for each in trained]
        found = dynamics.excess_ratio(trained[0], trained[1], best)
        said = "excess within over the plain network's"
        yield row(data, "cost", found, said, COST if name == f"{config.meta}_both" else math.inf)
        found = dynamics.exact(seconds[0] / max(seconds[1], 1e-3))
        yield row(data, "seconds", found, "seconds of training over the plain network's")
        pairs = {each: (results[each, name], results[each, "bayes"]) for each in SETS}
        for shift in [each for each in SETS if each != WITHIN]:
            found, most = dynamics.excess_growth(pairs[shift], pairs[WITHIN]), bounds.get(shift)
            said = f"growth of the excess, {shift}"
            yield row(data, f"growth_{shift}", found, said, most or math.inf)
        for where in (WITHIN, "x4"):
            found = dynamics.difference(*pairs[where])
            yield row(data, f"beyond_{where}", found, f"slope minus Bayes', {where}")
    for task_set in (*SETS, *BANDS):
        kinds = ("bayes", "reference") if task_set in SETS else ("meta", "bayes", "reference")
        for name, data in results.learners(task_set, *kinds).items():
            if name != RIGHT:
                found, said = over_right(results, task_set, name), "excess over the right prior"
                yield row(data, f"{task_set}_over_right", found, f"{said}, {task_set}")
    who = (f"{config.meta}_mixture", config.meta, RIGHT)
    found = dynamics.excess_ratio(*(results["band_3_4", name] for name in who))
    said = "a mixture of bands at least halves the excess in another band: surely at most 0.5"
    yield md.criterion("bands_gain", found, said, 0.5, surely=True)
    for size, kind in product(config.pools, KNOWING):
        said = f"mean-square distance to the {kind} Bayes, on fresh tasks"
        data = results["fresh", f"pool_{size}"]
        yield row(data, f"fresh_{kind}", distance(results, size, kind), said)


def excess_by_scale(results):
    """Draws excess over Bayes under the right prior, by scale and by band."""
    names, of_bands = (
        [name for name in results.learners(each) if name != RIGHT] for each in (WITHIN, "band_1_2")
    )
    pools, scales = [each for each in names if each.startswith("pool")], [*SETS][:-1]
    panels = {
        "remedies": (scales, [each for each in names if each not in pools]),
        "distinct tasks": (scales, [*names[:1], *pools, "bayes"]),
        "bands of frequencies": ([*BANDS], of_bands),
    }
    shown = {}
    for title, (sets, drawn) in panels.items() if names and of_bands else ():
        of = lambda name, sets=sets: dynamics.stacked(over_right(results, s, name) for s in sets)
        called = {name: labelled.about(results[sets[0], name]).label for name in drawn}
        shown[title] = np.arange(len(sets)), {said: of(name) for name, said in called.items()}
    label = "excess loss over Bayes\nunder the right prior"
    figure = figures.panels(shown, label, "turbo", xlabel="tasks")
    for axis, (sets, _) in zip(figure.axes, panels.values(), strict=True):
        axis.set_yscale("symlog", linthresh=0.05)
        axis.set_xticks(range(len(sets)), [each.replace("_", " ") for each in sets])
    return figure


def diversity(results):
    """Draws distances to the memorising and to the generalising Bayes by the number of tasks."""
    pools = [name for name in results.learners("fresh") if name.startswith("pool_")]
    sizes = np.sort([int(name.removeprefix("pool_")) for name in pools])
    of = lambda kind: dynamics.stacked(distance(results, size, kind) for size in sizes)
    found = {f"to the {kind} Bayes": of(kind) for kind in KNOWING if pools}
    style = {"xscale": "log", "yscale": "log", "xlabel": "distinct tasks in training"}
    shown = {"answers on fresh tasks": (sizes, found)} if pools else {}
    return figures.panels(shown, "mean-square distance", **style)


QUICK = Config(
    linear=LinearRegression(n_x=3, n_y=3),
    outer=md.OuterConfig(
        steps=2000, batch=48, optimizer="nadam", b2=0.98, learning_rate=3e-2, checkpoints=1
    ),
    measure=md.MeasureConfig(
        shifted_tasks=256, tracked_tasks=256, heldout_tasks=256, probe_points=12, chunk=256
    ),
)
WORKSTATION = Config(
    lstm=LSTMConfig(hidden=128),
    outer=md.OuterConfig(
        steps=4000, batch=48, optimizer="nadam", b2=0.98, learning_rate=2e-2, checkpoints=1
    ),
    measure=md.MeasureConfig(
        shifted_tasks=1024, tracked_tasks=256, heldout_tasks=1024, probe_points=16, chunk=512
    ),
)
PAPER = Config(
    **paper(100_000, batch=1024, checkpoints=10),
    pools=tuple(4**k for k in range(2, 9)),
    other_batch=1024,
    measure=md.MeasureConfig(shifted_tasks=8192, heldout_tasks=4096, chunk=1024),
)
study = md.Study(
    "out_of_distribution",
    {"quick": QUICK, "workstation": WORKSTATION, "paper": PAPER},
    plan,
    criteria,
    {"excess_by_scale": excess_by_scale, "diversity": diversity},
    section="ours",
    claims=claims(
        excess_by_scale={
            "lstm_both_growth_x4": "Ours: a mixture of scales and normalised feedback together "
            "keep an LSTM near Bayes",
            "lstm_both_growth_x16": "Ours: even beyond every scale of training",
            "lstm_both_cost": "Ours: at little cost within",
            "bands_gain": "Ours: so does a mixture of bands, in another band",
        }
    ),
)
