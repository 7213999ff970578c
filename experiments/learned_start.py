"""The start alone: where between a small random one and MAML's learned one the staggering goes.

    metadyn run learned_start [--preset quick|workstation|paper] [--out DIR] [overrides]

SGD trains the two-layer linear network of linear regression, and Adam the MLP of nonlinear
regression, from starts (1 − α) · random + α · learned and from random starts of several sizes. Only
the start differs. The learned one is MAML's (Finn et al. 2017, arXiv:1703.03400), learned on the
same network. Saxe et al. (2013), arXiv:1312.6120, derive the staggering from a small start.
"""

import dataclasses
import re
from functools import partial, reduce
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

import metadyn as md
from metadyn import dynamics, figures, trajectories
from metadyn.domains.fourier import FourierRegression, band
from metadyn.domains.linear import LinearRegression
from metadyn.errors import check, check_positive
from metadyn.inner import log_spaced
from metadyn.learners import gradient as gd
from metadyn.learners.bayes import bayes_fourier, bayes_linear
from metadyn.learners.maml import MAMLConfig, ordinary_network
from metadyn.optimizers import named_optimizer
from metadyn.study import censored, heldout_excess, to_train

TITLES = {"linear": "two-layer linear network", "nonlinear": "MLP"}
STAGGERS = {"linear": {"at_most": -0.5}, "nonlinear": {"at_least": 0.5}}
"""Bounds on the slope minus Bayes' if greater singular values, or lower frequencies, come first."""
WITHIN = {"at_most": 0.2, "at_least": -0.2}
RANDOM = {"linear": "a small random start", "nonlinear": "an ordinary random start"}
EXPECTED = {
    "random_start": ("interpolated_0", "from {} descent staggers"),
    "learned_start": ("interpolated_1", "from the start that MAML learned it does not"),
    "maml": ("maml", "MAML itself does not stagger"),
}
"""Criteria by name: the learner that each judges, and what it says."""
SERIES = {"interpolated_": "random to learned", "random_": "random, scaled"}
"""Labels of the series of starts, by what the names of their learners have before the number."""
PROPERTIES = {"norm": "norm of all weights", "imbalance": "imbalance", "product": "product's norm"}


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of the study, except its seed. Values are our choice."""

    linear: LinearRegression = LinearRegression()
    nonlinear: FourierRegression = FourierRegression()
    linear_maml: MAMLConfig = MAMLConfig(outer_batch=32)
    nonlinear_maml: MAMLConfig = MAMLConfig(width=64, outer_batch=32)
    linear_descent: gd.DescentConfig = gd.DescentConfig(learning_rate=0.02, updates=6000)
    """Descent on fresh pairs. The network has the depth and width of MAML's."""
    nonlinear_descent: gd.DescentConfig = gd.DescentConfig(
        "adam", 1e-3, batch=64, updates=3000, records=60
    )
    """Descent on a fixed set of pairs, as many as `batch`."""
    small: float = 1e-3
    """Standard deviation of the linear network's small random start. The MLP's random start is
    PyTorch's, as in an ordinary learner."""
    interpolations: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
    """Values of α, which is 0 at the random start and 1 at the learned one."""
    factors: tuple[float, ...] = (0.01, 0.1, 0.3, 1.0, 2.0)
    """Factors on random starts, N(0, 1/fan-in) in the linear network and PyTorch's in the MLP."""
    outer: md.OuterConfig = md.OuterConfig()
    measure: md.MeasureConfig = md.MeasureConfig()

    def __post_init__(self) -> None:
        check_positive(self, "small")
        check_positive(self.linear_descent, "updates")
        check_positive(self.nonlinear_descent, "updates")
        valid = all(0 <= a <= 1 for a in self.interpolations) and {0, 1} <= {*self.interpolations}
        check(valid, "interpolations", self.interpolations, "must be from 0 to 1, both included")
        valid = len(self.factors) > 0 and all(0 < f < float("inf") for f in self.factors)
        check(valid, "factors", self.factors, "must be positive and finite")


def properties(weights) -> dict[str, jax.Array]:
    """Returns norms: of the weights, of their product and of all W_{l+1}ᵀ W_{l+1} − W_l W_lᵀ."""
    W = [getattr(layer, "weight", layer) for layer in weights]  # without biases
    product = reduce(lambda below, above: above @ below, W)
    imbalances = [b.T @ b - a @ a.T for a, b in pairwise(W)]
    norm = lambda leaves: jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in leaves))
    return {"norm": norm(W), "imbalance": norm(imbalances), "product": norm([product])}


def comparison(config: Config, name: str) -> md.Comparison:
    """Returns the comparison of MAML, descent from every start, and Bayes in one domain."""
    domain, descent = getattr(config, name), getattr(config, f"{name}_descent")
    maml, linear = getattr(config, f"{name}_maml"), name == "linear"
    ordinary = ordinary_network(domain, maml.depth, maml.width)
    random = ordinary_network(domain, maml.depth, maml.width, config.small)
    optimizer = named_optimizer(descent.optimizer, descent.learning_rate)
    times = log_spaced(descent.updates, descent.records)

    def descend(start):
        network, points = gd.Network(start, ordinary.apply), None if linear else descent.batch
        learner = gd.gradient(network, optimizer, descent.batch, points=points)
        return learner._replace(diagnose=lambda state: properties(state[0]))

    def scaled(factor):
        return descend(lambda key: jax.tree.map(lambda w: factor * w, ordinary.init(key)))

    def between(alpha, params):
        mix = lambda a, b: (1 - alpha) * a + alpha * b
        return descend(lambda key: jax.tree.map(mix, random.init(key), params["start"]))

    meta = to_train(f"{name}_maml", maml, config.outer, domain)
    contenders = [dataclasses.replace(meta, name="maml", label="MAML")]
    for a in config.interpolations:
        names = f"interpolated_{a:g}", f"α = {a:g}"
        learner = md.Derived(meta.learner, partial(between, a), "updates")
        contenders.append(md.Contender(*names, learner, "ordinary", times, derived_from="maml"))
    for f in config.factors:
        names = f"random_{f:g}", f"random × {f:g}"
        contenders.append(md.Contender(*names, scaled(f), "reference", times))
    bayes = bayes_linear(domain) if linear else bayes_fourier(domain)
    contenders.append(md.Contender("bayes", "Bayes-optimal", bayes, "bayes"))
    tasks = config.measure.sized(domain.evaluation(config.measure.probe_points), name=name)
    return md.Comparison(
        domain, contenders, [tasks], measure=config.measure, name=name, title=TITLES[name]
    )


def plan(config: Config) -> md.Plan:
    """Returns one comparison per domain."""
    return md.Plan(config.outer, [comparison(config, name) for name in TITLES])


def criteria(config: Config, results):
    """Yields the slope from every start, and properties of the random and the learned start."""
    for name, staggers in STAGGERS.items():
        for learner, data in results.learners(name).items():
            slope = dynamics.merit(data)
            text = f"{TITLES[name]}, {trajectories.about(data).label}: slope of log t_k"
            yield md.criterion(f"{name}_{learner}_slope", slope, text)
            yield censored(f"{name}_{learner}", data)
        for row, (learner, claim) in EXPECTED.items():
            bounds = staggers if row == "random_start" else WITHIN
            beyond = dynamics.difference(results[name, learner], results[name, "bayes"])
            text = f"{TITLES[name]}, {claim.format(RANDOM[name])}: slope minus Bayes'"
            yield md.criterion(f"{name}_{row}", beyond, text, **bounds, surely=True)
        excess = heldout_excess(results, "maml", f"_{name}")
        yield md.criterion(f"{name}_maml_excess", excess, f"{TITLES[name]}: MAML's excess loss")
        for learner in ("interpolated_0", "interpolated_1"):
            label = trajectories.about(results[name, learner]).label
            for key, title in PROPERTIES.items():
                value, text = property_of_start(results[name, learner], key), f"{label}: {title}"
                yield md.criterion(f"{name}_{learner}_{key}", value, f"{TITLES[name]}, {text}")


def property_of_start(data, name: str) -> dynamics.Estimate:
    """Estimates one of `properties` at the first time recorded, before any update."""
    return dynamics.estimate(np.asarray, dynamics.samples(data, name)[:, :, 0])


def start(results):
    """Draws the slope along both series of starts, and properties of the interpolated starts."""
    names = [name for name in TITLES if name in results.sets()]
    figure, axes = figures.grid(3 * len(names), columns=3, width=4.6, height=3.6)
    for i, name in enumerate(names):
        by_alpha, properties_axis, by_norm = axes[3 * i : 3 * i + 3]
        for (prefix, label), colour in zip(SERIES.items(), figures.COLOURS, strict=False):
            learners = results.learners(name, "ordinary", "reference").items()
            pattern = re.compile(re.escape(prefix) + r"([\d.e+-]+)")
            numbered = ((float(m[1]), d) for n, d in learners if (m := pattern.fullmatch(n)))
            starts = dict(sorted(numbered, key=lambda pair: pair[0]))
            values = lambda key, s=starts: [property_of_start(d, key).value for d in s.values()]
            slopes = dynamics.stacked(map(dynamics.merit, starts.values()))
            style = {"fmt": "o-", "color": colour, "capsize": 3, "label": label}
            by_norm.errorbar(values("norm"), slopes.value, figures.bars(slopes), **style)
            if prefix == "interpolated_":
                by_alpha.errorbar([*starts], slopes.value, figures.bars(slopes), **style)
                for key, title in PROPERTIES.items():
                    properties_axis.semilogy([*starts], values(key), "o-", label=title)
        for learner, ls in (("maml", "--"), ("bayes", ":")):
            data = results[name, learner]
            slope = dynamics.merit(data).value
            by_alpha.axhline(slope, color="black", ls=ls, label=trajectories.about(data).label)
        by_alpha.set(title=TITLES[name], xlabel="α, random to learned", ylabel="staggering slope")
        properties_axis.set(xlabel="α, random to learned", ylabel="norm or imbalance of the start")
        by_norm.set(xscale="log", xlabel="norm of the start", ylabel="staggering slope")
        for axis in (by_alpha, properties_axis, by_norm):
            axis.legend(fontsize=9, frameon=True, framealpha=0.9, edgecolor="none")
    return figure


QUICK = Config(
    linear=LinearRegression(n_x=3, n_y=3, spread="even"),
    nonlinear=FourierRegression(band(1, 3), steps=20),
    outer=md.OuterConfig(steps=3000, checkpoints=4),
    linear_maml=MAMLConfig(outer_batch=32, outer_learning_rate=1e-3),  # faster, some seeds fail
    nonlinear_maml=MAMLConfig(inner_steps=1, outer_batch=32),
    measure=md.MeasureConfig(
        tasks=1024, updating_tasks=64, tracked_tasks=32, heldout_tasks=512, probe_points=16
    ),
)
WORKSTATION = Config(
    linear=LinearRegression(spread="even"),
    outer=md.OuterConfig(steps=6000, checkpoints=4),
    linear_maml=MAMLConfig(outer_batch=32, outer_learning_rate=1e-3),
    nonlinear_maml=MAMLConfig(inner_steps=1, outer_batch=16, outer_learning_rate=3e-3),
    measure=md.MeasureConfig(
        tasks=2048, updating_tasks=128, tracked_tasks=64, heldout_tasks=1024, probe_points=16
    ),
)
MANY = {"outer_learning_rate": 3e-3, "outer_batch": 512}
PAPER = Config(
    outer=md.OuterConfig(steps=50_000, warmup=1000),
    linear_maml=MAMLConfig(**MANY),
    nonlinear_maml=MAMLConfig(width=64, **MANY),
)
study = md.Study(
    "learned_start",
    {"quick": QUICK, "workstation": WORKSTATION, "paper": PAPER},
    plan,
    criteria,
    {
        "start": start,
        "mode_strength_linear": figures.strengths_on("linear", "ordinary", "reference"),
    },
    section="ours",
    claims={
        "start": {
            f"{name}_{row}": f"Ours: {claim.format(RANDOM[name])} ({title})"
            for name, title in TITLES.items()
            for row, (_, claim) in EXPECTED.items()
        }
    },
)
