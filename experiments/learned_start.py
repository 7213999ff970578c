"""The start alone: where between a small random one and MAML's learned one the staggering goes.

    metadyn run learned_start [--preset quick|workstation|paper] [--out DIR] [overrides]

The two-layer linear network of linear regression and the MLP of nonlinear regression are trained by
descent, the MLP's by Adam, always alike, from starts (1 − α) · random + α · learned, and from
random starts of several sizes. The learned one is that of MAML (Finn et al. 2017, arXiv:1703.03400)
on that very network. Saxe et al. (2013), arXiv:1312.6120, derive the staggering from a small start.
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
from metadyn.study import censored, excess_of, to_train

TITLES = {"linear": "two-layer linear network", "nonlinear": "MLP"}
STAGGERS = {"linear": {"at_most": -0.5}, "nonlinear": {"at_least": 0.5}}
"""Slope of an ordinary learner, beyond Bayes': greater singular values, lower frequencies first."""
WITHIN = {"at_most": 0.2, "at_least": -0.2}
RANDOM = {"linear": "a small random start", "nonlinear": "an ordinary random start"}
EXPECTED = {
    "random_start": ("interpolated_0", "from {} descent staggers"),
    "learned_start": ("interpolated_1", "from the start that MAML learned it does not"),
    "maml": ("maml", "MAML itself does not stagger"),
}
"""Criteria: the learner each is of, and what it says."""
SERIES = {"interpolated_": "random to learned", "random_": "random, scaled"}
"""Series of starts: how the names of their learners begin, where a number follows."""
CHANGES = {"norm": "norm of all weights", "imbalance": "imbalance", "product": "product's norm"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything the study depends on, beside its seed. Values are our choice."""

    linear: LinearRegression = LinearRegression()
    nonlinear: FourierRegression = FourierRegression()
    linear_maml: MAMLConfig = MAMLConfig(outer_batch=32)
    nonlinear_maml: MAMLConfig = MAMLConfig(width=64, outer_batch=32)
    linear_descent: gd.DescentConfig = gd.DescentConfig(learning_rate=0.02, updates=6000)
    """On fresh pairs. Depth and width are those of MAML's network."""
    nonlinear_descent: gd.DescentConfig = gd.DescentConfig(
        "adam", 1e-3, batch=64, updates=3000, records=60
    )
    """On a fixed set of as many pairs as the batch has."""
    small: float = 1e-3
    """Standard deviation of the linear network's small random start. That of the MLP is PyTorch's,
    which an ordinary learner has."""
    interpolations: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
    """α, from the random start, 0, to the learned one, 1."""
    factors: tuple[float, ...] = (0.01, 0.1, 0.3, 1.0, 2.0)
    """Of random starts, times N(0, 1/fan-in) in the linear network and PyTorch's in the MLP."""
    outer: md.OuterConfig = md.OuterConfig()
    measure: md.MeasureConfig = md.MeasureConfig()

    def __post_init__(self) -> None:
        check_positive(self, "small")
        check_positive(self.linear_descent, "updates")
        check_positive(self.nonlinear_descent, "updates")
        right = all(0 <= a <= 1 for a in self.interpolations) and {0, 1} <= {*self.interpolations}
        check(right, "interpolations", self.interpolations, "from 0 to 1, with both of them")
        right = len(self.factors) > 0 and all(0 < f < float("inf") for f in self.factors)
        check(right, "factors", self.factors, "must be positive and finite")


def properties(weights) -> dict[str, jax.Array]:
    """What may change in a start: norms, and how far ‖W_{l+1}ᵀ W_{l+1} − W_l W_lᵀ‖ is from 0."""
    W = [getattr(layer, "weight", layer) for layer in weights]  # without biases
    product = reduce(lambda below, above: above @ below, W)
    apart = [b.T @ b - a @ a.T for a, b in pairwise(W)]
    norm = lambda leaves: jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in leaves))
    return {"norm": norm(W), "imbalance": norm(apart), "product": norm([product])}


def compared(config: Config, name: str) -> md.Comparison:
    """MAML, descent from every start, and Bayes, in one domain."""
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
    contenders, trained = [dataclasses.replace(meta, name="maml", label="MAML")], meta.learner
    for a in config.interpolations:
        called = f"interpolated_{a:g}", f"α = {a:g}"
        made = md.Derived(trained, partial(between, a), "updates")
        contenders.append(md.Contender(*called, made, "ordinary", times, of="maml"))
    for f in config.factors:
        called = f"random_{f:g}", f"random × {f:g}"
        contenders.append(md.Contender(*called, scaled(f), "reference", times))
    bayes = bayes_linear(domain) if linear else bayes_fourier(domain)
    contenders.append(md.Contender("bayes", "Bayes-optimal", bayes, "bayes"))
    tasks = config.measure.sized(domain.evaluation(config.measure.probe_points), name=name)
    return md.Comparison(
        domain, contenders, [tasks], measure=config.measure, name=name, title=TITLES[name]
    )


def plan(config: Config) -> md.Plan:
    """One comparison of each domain."""
    return md.Plan(config.outer, [compared(config, name) for name in TITLES])


def criteria(config: Config, results):
    """The slope from every start, and how it and the start change from one end to the other."""
    for name, staggers in STAGGERS.items():
        for learner, data in results.learners(name).items():
            found = dynamics.merit(data)
            said = f"{TITLES[name]}, {trajectories.about(data).label}: slope of log t_k"
            yield md.criterion(f"{name}_{learner}_slope", found, said)
            yield censored(f"{name}_{learner}", data)
        for row, (learner, says) in EXPECTED.items():
            bound = staggers if row == "random_start" else WITHIN
            found = dynamics.difference(results[name, learner], results[name, "bayes"])
            said = f"{TITLES[name]}, {says.format(RANDOM[name])}: slope minus Bayes'"
            yield md.criterion(f"{name}_{row}", found, said, **bound, surely=True)
        excess = excess_of(results, "maml", f"_{name}")
        yield md.criterion(f"{name}_maml_excess", excess, f"{TITLES[name]}: MAML's excess loss")
        for learner in ("interpolated_0", "interpolated_1"):
            for what, said in CHANGES.items():
                found = of_start(results[name, learner], what)
                said = f"{TITLES[name]}, {trajectories.about(results[name, learner]).label}: {said}"
                yield md.criterion(f"{name}_{learner}_{what}", found, said)


def of_start(data, what: str) -> dynamics.Estimate:
    """A property of the start."""
    return dynamics.estimate(np.asarray, dynamics.samples(data, what)[:, :, 0])


def start(results):
    """Draws the slope along both series of starts, and what changes in the start beside it."""
    names = [name for name in TITLES if name in results.sets()]
    figure, axes = figures.grid(3 * len(names), columns=3, width=4.6, height=3.6)
    for i, name in enumerate(names):
        by_alpha, changing, by_norm = axes[3 * i : 3 * i + 3]
        for (begins, label), colour in zip(SERIES.items(), figures.COLOURS, strict=False):
            learners = results.learners(name, "ordinary", "reference").items()
            number = re.compile(re.escape(begins) + r"([\d.e+-]+)")
            those = ((float(m[1]), d) for n, d in learners if (m := number.fullmatch(n)))
            found = dict(sorted(those, key=lambda each: each[0]))
            of_each = lambda what, found=found: [of_start(d, what).value for d in found.values()]
            slopes = dynamics.stacked(map(dynamics.merit, found.values()))
            style = {"fmt": "o-", "color": colour, "capsize": 3, "label": label}
            by_norm.errorbar(of_each("norm"), slopes.value, figures.bars(slopes), **style)
            if begins == "interpolated_":
                by_alpha.errorbar([*found], slopes.value, figures.bars(slopes), **style)
                for what, said in CHANGES.items():
                    changing.semilogy([*found], of_each(what), "o-", label=said)
        for who, ls in (("maml", "--"), ("bayes", ":")):
            data = results[name, who]
            slope = dynamics.merit(data).value
            by_alpha.axhline(slope, color="black", ls=ls, label=trajectories.about(data).label)
        by_alpha.set(title=TITLES[name], xlabel="α, random to learned", ylabel="staggering slope")
        changing.set(xlabel="α, random to learned", ylabel="norm or imbalance of the start")
        by_norm.set(xscale="log", xlabel="norm of the start", ylabel="staggering slope")
        for axis in (by_alpha, changing, by_norm):
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
            f"{name}_{row}": f"Ours: {says.format(RANDOM[name])} ({title})"
            for name, title in TITLES.items()
            for row, (_, says) in EXPECTED.items()
        }
    },
)
