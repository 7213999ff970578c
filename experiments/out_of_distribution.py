"""Out of distribution: what makes a meta-trained learner keep to Bayes beyond its training tasks.

    metadyn run out_of_distribution [--preset quick|paper] [--out DIR] [overrides]

Remedies for the LSTM, and for another network, in linear regression: a mixture of scales to train
on, feedback divided by its running size, both, and more or fewer distinct tasks to train on
(Raventós et al. 2023, arXiv:2306.15063); in nonlinear regression a mixture of bands.
"""

import dataclasses

import numpy as np

import metadyn as md
from metadyn import dynamics, figures, labelled
from metadyn.base import STRENGTH, Sampler
from metadyn.domains.distributions import Mixture, Pool
from metadyn.domains.fourier import FourierRegression, band
from metadyn.domains.linear import LinearRegression
from metadyn.errors import check, check_positive, check_unique
from metadyn.learners.bayes import (
    bayes_fourier,
    bayes_linear,
    gaussian_fourier,
    gaussian_linear,
)
from metadyn.learners.bayes_mixture import bayes_memorising, bayes_mixture
from metadyn.learners.normalised import Normalised
from metadyn.objectives import Target, predicting
from metadyn.study import HELDOUT, Network

SHIFTS = {"x2": (2, 1), "x4": (4, 1), "x8": (8, 1), "x16": (16, 1), "outsize": (1, 8)}
"""Sets of tasks: factor on the whole spectrum, factor on its greatest mode alone."""
WITHIN = "in_distribution"
LEARNED = {"bayes": "wrong prior", "bayes_mixture": "mixture", "bayes_right": "right prior"}
REMEDIES = {"mixture": "mixture of scales", "normalised": "normalised", "both": "both"}
GROWTH = {"x4": 0.1, "x16": 0.2}
"""Greatest growth of the excess with both remedies: ours, as is the cost inside."""
COST = 1.15


@dataclasses.dataclass(frozen=True)
class Config(md.StudyConfig):
    """Everything the study depends on, beside its seed. Values are our choice."""

    linear: LinearRegression = LinearRegression()
    nonlinear: FourierRegression = FourierRegression(steps=20)
    target: Target = "bayes"
    """What is predicted in training: y_t, or the answer of Bayes under the prior of training. Of
    pools of tasks it is y_t."""
    scales: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)
    """Factors on W in the mixture; losses count by their inverse square."""
    pools: tuple[int, ...] = (16, 256, 4096)
    """Numbers of distinct tasks that LSTMs are trained on."""
    bands: tuple[tuple[int, int], ...] = ((1, 2), (3, 4), (1, 4))
    """Lowest and highest frequency of each band of the mixture; the first is also trained alone."""
    other: Network = "deltanet"
    """Another network to remedy."""
    other_batch: int = 8
    """Its episodes in one outer step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, fix in (("scales", "above 0 and finite"), ("pools", "at least 1")):
            values = getattr(self, field)
            check_unique(list(values), field, "name each once")
            right = len(values) > 0 and all(0 < value < float("inf") for value in values)
            check(right, field, values, f"name at least one, all {fix}")
        check(len(self.bands) > 1, "bands", self.bands, "name at least two")
        check(self.other != self.meta, "other", self.other, "must not be meta itself")
        check_positive(self, "other_batch")

    @property
    def band_domains(self) -> list[FourierRegression]:
        """Nonlinear regression on each band."""
        highest = max(high for _, high in self.bands)
        spectra = [band(*each) + (0.0,) * (highest - each[1]) for each in self.bands]
        return [dataclasses.replace(self.nonlinear, spectrum=each) for each in spectra]


def linear(config: Config) -> md.Comparison:
    """All learners of linear regression, on the same tasks."""
    domain, sizes, points = config.linear, config.measure, config.measure.probe_points
    scaled = [domain.scaled(scale) for scale in config.scales]
    mixture = Mixture(tuple(scaled), tuple(scale**-2.0 for scale in config.scales))
    bayes, mixed = bayes_linear(domain), bayes_mixture([gaussian_linear(d) for d in scaled])
    plainly = predicting(config.target, bayes)
    on_mixture = predicting(config.target, mixed, sample=mixture, weight=mixture.weight)
    metas = []
    for name in (config.meta, config.other):
        plain = dataclasses.replace(config, meta=name).meta_learner(domain)
        network = getattr(config, name)
        label = network.label
        if name == config.other:
            own = dataclasses.replace(plain.own or config.outer, batch=config.other_batch)
            plain = dataclasses.replace(plain, own=own)
        inside = Normalised(domain, network.make)
        for remedy, objective, learner in (
            ("", plainly, plain.learner),
            ("mixture", on_mixture, plain.learner),
            ("normalised", plainly, inside),
            ("both", on_mixture, inside),
        ):
            if name == config.meta or remedy in ("", "both"):
                changes = {"name": f"{name}_{remedy}".strip("_"), "learner": learner}
                changes |= {"label": f"{label}, {REMEDIES.get(remedy, 'plain')}"}
                metas.append(dataclasses.replace(plain, objective=objective, **changes))
    sets, pairs = [], []
    for name, factors in {WITHIN: (1, 1), **SHIFTS}.items():
        tasks = sizes.sized(domain.evaluation(points, *factors), "shifted_tasks", name)
        size = np.linalg.norm(domain.spectrum(*factors)) / np.linalg.norm(domain.spectrum())
        right = bayes_linear(domain.scaled(float(size)))
        sets.append(tasks)
        pairs.append((tasks, md.Contender("bayes_right", "Bayes, right prior", right, "reference")))
    fresh = md.TaskSet("fresh", domain, Sampler(domain), probes={STRENGTH: domain.answers(points)})
    fresh = sizes.sized(fresh, "heldout_tasks", kinds=("meta", "bayes"))
    sets.append(fresh)
    for size in config.pools:
        pool = Pool(domain, size)
        trained = {"name": f"pool_{size}", "label": f"{size} tasks", "drawn": False}
        objective = predicting("feedback", bayes, sample=pool)
        metas.append(dataclasses.replace(metas[0], objective=objective, **trained))
        own = dataclasses.replace(fresh, name=f"pool_{size}", sample=pool)
        name, label = f"memorising_{size}", f"Bayes, {size} tasks"
        memorising = md.Contender(name, label, bayes_memorising(pool), "reference")
        pairs += [(own, metas[-1]), (own, memorising), (fresh, memorising)]
        pairs.append((own, md.Contender("bayes", "Bayes", bayes, "bayes")))
    bayes_of = {"bayes": (bayes, "bayes"), "bayes_mixture": (mixed, "reference")}
    references = [
        md.Contender(name, f"Bayes, {LEARNED[name]}", *each) for name, each in bayes_of.items()
    ]
    return md.Comparison(domain, [*metas, *references], sets, pairs, sizes, followed=False)


def bands(config: Config) -> md.Comparison:
    """The LSTM of one band, that of all bands, and Bayes under the priors of each."""
    domains, sizes = config.band_domains, config.measure
    first, mixture = domains[0], Mixture(tuple(domains))
    frequencies = tuple(sorted({k for each in domains for k in each.support}))
    mixed = bayes_mixture([gaussian_fourier(each, frequencies) for each in domains])
    plain, alone = config.meta_learner(first), bayes_fourier(first)
    trained = {"name": f"{plain.name}_mixture", "label": "LSTM, mixture of bands"}
    objectives = predicting(config.target, alone), predicting(config.target, mixed, sample=mixture)
    contenders = [
        dataclasses.replace(plain, label="LSTM, one band", objective=objectives[0]),
        dataclasses.replace(plain, objective=objectives[1], **trained),
        md.Contender("bayes", "Bayes, wrong prior", alone, "bayes"),
        md.Contender("bayes_mixture", "Bayes, mixture", mixed, "reference"),
    ]
    sets, pairs = [], []
    for domain, (low, high) in zip(domains, config.bands, strict=True):
        tasks = domain.evaluation(sizes.probe_points)
        tasks = dataclasses.replace(tasks, domain=first)
        sets.append(sizes.sized(tasks, "shifted_tasks", f"band_{low}_{high}"))
        right = md.Contender("bayes_right", "Bayes, right prior", bayes_fourier(domain), "reference")
        pairs.append((sets[-1], right))
    return md.Comparison(
        first, contenders, sets, pairs, sizes, name="band", title="bands", followed=False
    )


def plan(config: Config) -> md.Plan:
    """What is trained and measured."""
    return md.Plan(config.outer, [linear(config), bands(config)])


def criteria(config: Config, results):
    """What each remedy gains outside, what it costs inside, and what exact Bayes pays."""
    plain = results[HELDOUT, config.meta].isel(outer_step=-1)
    floor, best = config.linear.loss_floor, results[HELDOUT, "bayes"]
    over = lambda a, b, c: dynamics.excess_loss(a, c, floor) / dynamics.excess_loss(b, c, floor)
    for name, data in results.learners(WITHIN, "meta").items():
        called, inside = labelled.about(data).label, results[HELDOUT, name].isel(outer_step=-1)
        bounded = name.endswith("_both")
        excess = dynamics.measured_excess(inside, best)
        yield md.criterion(f"{name}_excess", excess, f"{called}: excess loss inside")
        cost = dynamics.estimate(over, *map(dynamics.episode_loss, (inside, plain, best)))
        said = f"{called}: excess inside over the plain {labelled.about(plain).learner}'s"
        said, most = (f"{said}: at most {COST:g}", COST) if bounded else (said, np.inf)
        yield md.criterion(f"{name}_cost", cost, said, at_most=most)
        seconds = [np.asarray(labelled.about(each).seconds) for each in (inside, plain)]
        ratio = dynamics.Estimate(*[seconds[0] / max(seconds[1], 1e-9)] * 3)
        yield md.criterion(f"{name}_seconds", ratio, f"{called}: seconds of training, over plain's")
        for shift in SHIFTS:
            pairs = [(results[each, name], results[each, "bayes"]) for each in (shift, WITHIN)]
            growth, most = dynamics.excess_growth(*pairs), GROWTH.get(shift, np.inf)
            said, most = f"{called}: growth of the excess, {TITLES[shift]}", most if bounded else np.inf
            said += f": at most {most:g}" if np.isfinite(most) else ""
            yield md.criterion(f"{name}_growth_{shift}", growth, said, at_most=most)
        for where in (WITHIN, "x4"):
            beyond = dynamics.difference(results[where, name], results[where, "bayes"])
            said = f"{called}: slope minus Bayes', {TITLES[where]}"
            yield md.criterion(f"{name}_beyond_{where}", beyond, said)
    bands = [f"band_{low}_{high}" for low, high in config.bands]
    for task_set in (*TITLES, *bands):
        kinds = ("meta", "bayes", "reference") if task_set in bands else ("bayes", "reference")
        for name, data in results.learners(task_set, *kinds).items():
            if name != "bayes_right":
                excess = dynamics.measured_excess(data, results[task_set, "bayes_right"])
                said = f"{labelled.about(data).label}: excess over the right prior, {task_set}"
                yield md.criterion(f"{name}_{task_set}_over_right", excess, said)
    losses = [
        dynamics.episode_loss(results[bands[1], who])
        for who in (f"{config.meta}_mixture", config.meta, "bayes_right")
    ]
    gain = dynamics.estimate(lambda a, b, c: over(a, b, c), *losses)
    said = "a mixture of bands at least halves the excess outside the band: surely at most 0.5"
    yield md.criterion("bands_gain", gain, said, at_most=0.5, surely=True)
    for size in config.pools:
        for where in ("fresh", f"pool_{size}"):
            apart = [distance(results, where, f"pool_{size}", to) for to in (f"memorising_{size}", "bayes")]
            for to, found in zip(("memorising", "generalising"), apart, strict=True):
                said = f"{size} tasks: mean-square distance to the {to} Bayes, {where}"
                yield md.criterion(f"pool_{size}_{where}_{to}", found, said)
