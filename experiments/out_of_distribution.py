"""Out of distribution: what keeps a meta-trained learner near Bayes beyond its training tasks.

    metadyn run out_of_distribution [--preset quick|paper] [--out DIR] [overrides]

Remedies for an LSTM and another network in linear regression: training on a mixture of scales,
feedback divided by its running size, both, more distinct tasks (Raventós et al. 2023,
arXiv:2306.15063); and in nonlinear regression training on a mixture of bands.
"""

import dataclasses
from functools import partial
from typing import Any

import numpy as np

import metadyn as md
from metadyn import dynamics, figures, labelled
from metadyn.base import STRENGTH, Sampler
from metadyn.domains.distributions import Mixture, Pool
from metadyn.domains.fourier import FourierRegression, band
from metadyn.domains.linear import LinearRegression
from metadyn.errors import check, check_positive, check_unique
from metadyn.learners import bayes
from metadyn.learners.bayes_mixture import bayes_memorising, bayes_mixture
from metadyn.learners.normalised import Normalised
from metadyn.objectives import Target, predicting
from metadyn.study import HELDOUT, Network, excess_of, paper

WITHIN, RIGHT = "in_distribution", "bayes_right"
SETS = {WITHIN: (1, 1), "x2": (2, 1), "x4": (4, 1), "x8": (8, 1), "x16": (16, 1), "outsize": (1, 8)}
"""Sets of tasks: factor on the whole spectrum, factor on its greatest mode alone."""
REMEDIES = {"": "plain", "mixture": "mixture", "normalised": "normalised", "both": "both"}
BAYES_OF = {"memorising_{}": "memorising", "bayes": "generalising"}
GROWTH, COST = {"x4": 0.1, "x16": 0.2}, 1.15
"""Greatest growth of the excess with both remedies, and excess within over the plain LSTM's."""


@dataclasses.dataclass(frozen=True)
class Config(md.StudyConfig):
    """Everything the study depends on, beside its seed. Values are our choice."""

    linear: LinearRegression = LinearRegression()
    nonlinear: FourierRegression = FourierRegression(steps=20)
    target: Target = "bayes"
    """What is predicted in training: y_t, or the answer of Bayes under the prior of training. In
    training on pools of tasks it is y_t."""
    scales: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)
    """Factors on W in the mixture; losses count by their inverse square."""
    pools: tuple[int, ...] = (16, 256, 4096)
    """Numbers of distinct tasks to train on."""
    bands: tuple[tuple[int, int], ...] = ((1, 2), (3, 4), (1, 4))
    """Lowest and highest frequency of each band in the mixture; the first is trained on alone."""
    other: Network = "deltanet"
    """The other network."""
    other_batch: int = 8
    """Its episodes in one outer step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("scales", "pools"):
            values = getattr(self, field)
            check_unique(list(values), field, "name each once")
            right = len(values) > 0 and all(0 < value < float("inf") for value in values)
            check(right, field, values, "name at least one, all above 0 and finite")
        check(len(self.bands) > 1, "bands", self.bands, "name at least two")
        check_positive(self, "other_batch")


def linear(config: Config) -> md.Comparison:
    """The networks with each remedy, on the same tasks, and Bayes under the priors in question."""
    check(config.other != config.meta, "other", config.other, "must not be that of --meta")
    domain, sizes, points = config.linear, config.measure, config.measure.probe_points
    scaled = tuple(domain.scaled(scale) for scale in config.scales)
    mixture = Mixture(scaled, tuple(scale**-2.0 for scale in config.scales))
    mix = bayes_mixture([bayes.gaussian_linear(each) for each in scaled])
    alone = bayes.bayes_linear(domain)
    objective = predicting(config.target, alone)
    mixed = predicting(config.target, mix, sample=mixture, weight=mixture.weight)
    contenders, sets, pairs = [], [], []
    for name in (config.meta, config.other):
        network = getattr(config, name)
        plain = dataclasses.replace(config, meta=name).meta_learner(domain)
        if name == config.other:
            outer = dataclasses.replace(plain.own or config.outer, batch=config.other_batch)
            plain = dataclasses.replace(plain, own=outer)
        normalised = Normalised(domain, network.make)
        for remedy in REMEDIES if name == config.meta else ("", "both"):
            called = f"{name}_{remedy}".strip("_"), f"{network.label}, {REMEDIES[remedy]}"
            meta = normalised if remedy in ("normalised", "both") else plain.learner
            trained: dict[str, Any] = {
                "objective": mixed if remedy in ("mixture", "both") else objective
            }
            contenders.append(named(plain, *called, learner=meta, **trained))
    for shift, factors in SETS.items():
        sets.append(sizes.sized(domain.evaluation(points, *factors), "shifted_tasks", shift))
        norms = [np.linalg.norm(domain.spectrum(*each)) for each in (factors, (1, 1))]
        pairs.append((sets[-1], right_bayes(domain.scaled(float(norms[0] / norms[1])))))
    probes = {STRENGTH: domain.answers(points)}
    fresh = md.TaskSet("fresh", domain, Sampler(domain), probes=probes, kinds=("meta", "bayes"))
    sets.append(fresh := sizes.sized(fresh, "heldout_tasks"))
    ideal, other = references(alone, mix)
    for size in config.pools:
        pool, label = Pool(domain, size), f"{getattr(config, config.meta).label}, {size} tasks"
        trained = {"objective": predicting("feedback", alone, sample=pool), "drawn": False}
        contenders.append(named(contenders[0], f"pool_{size}", label, **trained))
        own = dataclasses.replace(fresh, name=f"pool_{size}", sample=pool)
        known = md.Contender(f"memorising_{size}", label, bayes_memorising(pool), "reference")
        pairs += [(own, contenders[-1]), (own, known), (own, ideal), (fresh, known)]
    return md.Comparison(domain, [*contenders, ideal, other], sets, pairs, sizes, followed=False)


def named(contender: md.Contender, name: str, label: str, **changes: Any) -> md.Contender:
    """A contender under another name, with some of it changed."""
    return dataclasses.replace(contender, name=name, label=label, **changes)


def references(alone: md.Learner, mix: md.Learner) -> tuple[md.Contender, md.Contender]:
    """Bayes under the prior of plain training, from whom excess is reckoned, and the mixture's."""
    known = md.Contender("bayes", "Bayes, plain training's prior", alone, "bayes")
    return known, md.Contender("bayes_mixture", "Bayes, mixture", mix, "reference")


def right_bayes(domain: LinearRegression | FourierRegression) -> md.Contender:
    """Bayes under the prior that a set of tasks is of, which is measured on that set alone."""
    if isinstance(domain, LinearRegression):
        learner = bayes.bayes_linear(domain)
    else:
        learner = bayes.bayes_fourier(domain)
    return md.Contender(RIGHT, "Bayes, right prior", learner, "reference")


def bands(config: Config) -> md.Comparison:
    """The LSTM of one band, that of all of them, and Bayes under the priors in question."""
    highest, sizes = max(high for _, high in config.bands), config.measure
    spectra = [(*band(*each), *(0.0,) * (highest - each[1])) for each in config.bands]
    domains = [dataclasses.replace(config.nonlinear, spectrum=each) for each in spectra]
    frequencies = tuple(sorted({k for each in domains for k in each.support}))
    mix = bayes_mixture([bayes.gaussian_fourier(each, frequencies) for each in domains])
    plain, alone = config.meta_learner(domains[0]), bayes.bayes_fourier(domains[0])
    label, on_all = getattr(config, plain.name).label, Mixture(tuple(domains))
    objective = predicting(config.target, alone)
    mixed = predicting(config.target, mix, sample=on_all)
    contenders = [
        named(plain, plain.name, f"{label}, one band", objective=objective),
        named(plain, f"{plain.name}_mixture", f"{label}, all bands", objective=mixed),
        *references(alone, mix),
    ]
    pairs = []
    for domain, name in zip(domains, band_sets(config), strict=True):
        tasks = sizes.sized(domain.evaluation(sizes.probe_points), "shifted_tasks", name)
        pairs.append((tasks, right_bayes(domain)))
    sets = [tasks for tasks, _ in pairs]
    return md.Comparison(
        domains[0], contenders, sets, pairs, sizes, name="band", title="bands", followed=False
    )


def band_sets(config: Config) -> list[str]:
    """The names of the sets of tasks, one of each band."""
    return [f"band_{low}_{high}" for low, high in config.bands]


def plan(config: Config) -> md.Plan:
    """Linear regression with all remedies, and nonlinear regression with a mixture of bands."""
    return md.Plan(config.outer, [linear(config), bands(config)])


def over_right(results, task_set: str, name: str) -> dynamics.Estimate:
    """Excess loss over Bayes under the right prior for a set of tasks."""
    return dynamics.measured_excess(results[task_set, name], results[task_set, RIGHT])


def distance(results, where: str, size: int, bayes_of: str) -> dynamics.Estimate:
    """Mean-square distance of the answers of the network of a pool to those of a Bayes."""
    pair = [results[where.format(size), who.format(size)] for who in ("pool_{}", bayes_of)]
    one, two = (dynamics.samples(data, "answers") for data in pair)
    return dynamics.estimate(np.asarray, ((one - two) ** 2)[:, :, :-1].mean((2, 3, 4)))


def criteria(config: Config, results):
    """What each remedy gains outside, what it costs within, and what exact Bayes pays."""
    plain, best = (results[HELDOUT, name] for name in (config.meta, "bayes"))
    over = partial(dynamics.excess_loss, floor=config.linear.loss_floor)
    ratio = lambda a, b, c: over(a, c) / over(b, c)
    for name, data in results.learners(WITHIN, "meta").items():
        trained = results[HELDOUT, name]
        last = [each.isel(outer_step=-1) for each in (trained, plain)]
        called, bounded = labelled.about(data).label, name.endswith("_both")
        bound = lambda most, given=bounded: {"at_most": most} if given else {}
        found = excess_of(results, name)
        yield md.criterion(f"{name}_excess", found, f"{called}: excess loss within")
        found = dynamics.estimate(ratio, *map(dynamics.episode_loss, (*last, best)))
        said = f"{called}: excess within over the plain network's; with both at most {COST:g}"
        yield md.criterion(f"{name}_cost", found, said, **bound(COST))
        seconds = [labelled.about(each).seconds for each in (trained, plain)]
        found = dynamics.exact(seconds[0] / max(seconds[1], 1e-3))
        said = f"{called}: seconds of training over the plain network's"
        yield md.criterion(f"{name}_seconds", found, said)
        pairs = {each: (results[each, name], results[each, "bayes"]) for each in SETS}
        for shift in [each for each in SETS if each != WITHIN]:
            said = f"{called}: growth of the excess, {shift}"
            found = dynamics.excess_growth(pairs[shift], pairs[WITHIN])
            most = bound(GROWTH[shift]) if shift in GROWTH else {}
            said += f"; at most {GROWTH[shift]:g}" if most else ""
            yield md.criterion(f"{name}_growth_{shift}", found, said, **most)
        for where in (WITHIN, "x4"):
            said = f"{called}: slope minus Bayes', {where}"
            yield md.criterion(f"{name}_beyond_{where}", dynamics.difference(*pairs[where]), said)
    for task_set in (*SETS, *band_sets(config)):
        kinds = ("bayes", "reference") if task_set in SETS else ("meta", "bayes", "reference")
        for name, data in results.learners(task_set, *kinds).items():
            if name != RIGHT:
                said = f"{labelled.about(data).label}: excess over the right prior, {task_set}"
                found = over_right(results, task_set, name)
                yield md.criterion(f"{name}_{task_set}_over_right", found, said)
    who = (f"{config.meta}_mixture", config.meta, RIGHT)
    losses = [dynamics.episode_loss(results[band_sets(config)[1], name]) for name in who]
    said = "a mixture of bands at least halves the excess in another band: surely at most 0.5"
    over = partial(dynamics.excess_loss, floor=config.nonlinear.loss_floor)
    yield md.criterion("bands_gain", dynamics.estimate(ratio, *losses), said, 0.5, surely=True)
    for size in config.pools:
        for where, tasks in (("fresh", "fresh"), ("pool_{}", "own")):
            for to, kind in BAYES_OF.items():
                said = f"{size} tasks: mean-square distance to the {kind} Bayes, on {tasks} tasks"
                found = distance(results, where, size, to)
                yield md.criterion(f"pool_{size}_{tasks}_{kind}", found, said)


def excess_by_scale(results):
    """Draws excess over Bayes under the right prior: by scale, with one outsize mode, by band."""
    bands = [each for each in results.sets() if each.startswith("band_")]
    names = [
        [name for name in results.learners(each) if name != RIGHT] for each in (WITHIN, *bands[:1])
    ]
    pools = [name for name in names[0] if name.startswith("pool")]
    scales = [f"× {scale}" for scale, _ in [*SETS.values()][:-1]] + ["one × 8"]
    called, factor = ["–".join(each.split("_")[1:]) for each in bands], "factor on the spectrum"
    panels = [
        ("remedies", SETS, [n for n in names[0] if n not in pools], scales, factor),
        ("distinct tasks", SETS, [names[0][0], *pools, "bayes"], scales, factor),
        *[("bands", bands, each, called, "frequencies") for each in names[1:]],
    ]
    label = "excess loss over Bayes\nunder the right prior"
    figure, axes = figures.grid(len(panels), label, 5.2, 4.6)
    for axis, (title, sets, shown, ticks, what) in zip(axes, panels, strict=True):
        rows = [[over_right(results, each, name) for each in sets] for name in shown]
        y = dynamics.stacked(map(dynamics.stacked, rows))
        x, apart = np.arange(len(ticks)), int(sets is SETS)  # the last of which is no scale
        for k, colour in enumerate(figures.colours(shown, "turbo")):
            style = {"color": colour, "marker": "o", "ms": 4}
            sides, end = figures.bars(y)[..., k], len(x) - apart
            label = labelled.about(results[WITHIN if apart else bands[0], shown[k]]).label
            axis.errorbar(x[:end], y.value[:end, k], sides[:, :end], label=label, **style)
            axis.errorbar(x[end:], y.value[end:, k], sides[:, end:], **style)
        axis.set_yscale("symlog", linthresh=0.05)
        axis.set_xticks(x, ticks)
        axis.set(title=title, xlabel=f"{what} of the tasks")
        axis.legend(fontsize=8)
    return figure


def diversity(results):
    """Draws distances to the memorising and to the generalising Bayes by the number of tasks."""
    sizes = [int(each.removeprefix("pool_")) for each in results.sets() if each.startswith("pool_")]
    figure, axes = figures.grid(2, "mean-square distance of answers", 4.6, 4, sharey=True)
    for axis, where in zip(axes, ("fresh", "pool_{}"), strict=True):
        rows = [[distance(results, where, size, to) for size in sizes] for to in BAYES_OF]
        y = dynamics.stacked(map(dynamics.stacked, rows))
        labels = [f"to the {kind} Bayes" for kind in BAYES_OF.values()]
        figures.curves(axis, np.array(sizes), y, labels, marker="o")
        axis.set_xscale("log", base=2)
        title = "fresh tasks" if where == "fresh" else "tasks of the pool"
        axis.set(title=title, xlabel="distinct tasks in training", yscale="log")
        axis.legend()
    return figure


QUICK = Config(
    linear=LinearRegression(n_x=3, n_y=3),
    outer=md.OuterConfig(
        steps=2500, batch=32, optimizer="nadam", b2=0.98, learning_rate=3e-2, checkpoints=1
    ),
    measure=md.MeasureConfig(
        shifted_tasks=256, tracked_tasks=16, heldout_tasks=256, probe_points=12, chunk=256
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
    {"quick": QUICK, "paper": PAPER},
    plan,
    criteria,
    {"excess_by_scale": excess_by_scale, "diversity": diversity},
    section="ours",
    claims=[
        md.Claim(
            "lstm_both_growth_x4",
            "Ours: a mixture of scales and normalised feedback together keep an LSTM near Bayes",
            "excess_by_scale",
        ),
        md.Claim(
            "lstm_both_growth_x16", "Ours: even beyond every scale of training", "excess_by_scale"
        ),
        md.Claim("lstm_both_cost", "Ours: at little cost within", "excess_by_scale"),
        md.Claim(
            "bands_gain", "Ours: so does a mixture of bands, in another band", "excess_by_scale"
        ),
    ],
)
