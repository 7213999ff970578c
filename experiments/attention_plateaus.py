"""Linear attention's outer loop: one abrupt drop if keys and queries are merged, else a staircase.

    metadyn run attention_plateaus [--preset quick|workstation|paper] [--out DIR] [overrides]

One layer of linear attention is trained from small weights on y = w · x + ε with inputs of several
variances. Zhang, Singh, Latham & Saxe (2025), arXiv:2501.16265, analyse this case. Its components
are those of the inputs' covariance, which all tasks share, not the singular vectors of one task. A
second copy of the same initial weights descends the expected loss, known in closed form.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import metadyn as md
from metadyn import dynamics, figures, inner, trajectories
from metadyn.base import STRENGTH, Modes, Probe, TaskSet, cached_concrete
from metadyn.domains.linear import LinearRegression, LinearTask
from metadyn.errors import check
from metadyn.learners.attention import OneLayerAttentionConfig
from metadyn.learners.bayes import bayes_linear
from metadyn.objectives import Objective
from metadyn.study import HELDOUT, TRACKED

KINDS = {"separate": "keys and queries separate", "merged": "keys and queries merged"}
REST = 1.5
"""Least factor on the outer step, from 10 % above a plateau to 10 % below it, for a rest there."""


@dataclasses.dataclass(frozen=True)
class Components(LinearRegression):
    """Tasks y = w · x + ε with w ~ N(0, I) and inputs x ~ N(0, Λ) of several variances."""

    variances: tuple[float, ...] = ()
    """Variance λ_d of each input, greatest first."""

    def query(self, task, key):
        """Draws an input x ~ N(0, Λ)."""
        return jnp.sqrt(jnp.array(self.variances)) * super().query(task, key)

    @cached_concrete
    def components(self) -> Probe:
        """Reads each component's strength: the answer to its unit input, over the task's weight."""
        read = lambda task, answers: {"strength": answers[:, 0] / task.W[0]}
        modes = Modes(self.variances, "input variance $\\lambda_d$", "variance")
        return Probe(jnp.eye(self.n_x), read, modes)

    def evaluation(self, points=32, **more):
        """Sets up tasks whose weights are all 1 or −1, so that all components count the same."""
        sign = lambda key: LinearTask(jax.random.rademacher(key, (1, self.n_x), float))
        return TaskSet("in_distribution", self, sign, {STRENGTH: self.components()})

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the variances λ and the power E[b_d²] of b = Σ_s y_s x_s / N over the N pairs.

        N = T − 1. The power is λ_d² + λ_d (λ_d + Σλ + σ²) / N, by Wick's theorem; E[b wᵀ] is Λ.
        """
        lam = np.array(self.variances)
        return lam, lam**2 + lam * (lam + lam.sum() + self.sigma**2) / (self.steps - 1)

    def plateaus(self) -> np.ndarray:
        """Returns the least expected last loss if the first 0, 1, …, n_x components are learned."""
        lam, power = self.moments()
        learned = np.concatenate([[0.0], np.cumsum(lam**3 / power)])
        return lam.sum() + self.sigma**2 - learned


def last_answer(domain, meta):
    """Trains on half the squared error of the last answer, with all other pairs in context."""

    def loss(params, keys):
        queries, feedback = inner.observe(domain, keys)
        mean = jnp.mean((meta.unroll(params, queries, feedback)[-1] - feedback[-1]) ** 2)
        return mean / 2, {"loss": mean}

    return Objective(loss)


def expected(domain, meta):
    """Trains on the expectation of the loss of `last_answer`, in closed form.

    The answer is bᵀ A x, its mean squared error Σλ + σ² − 2 tr(A Λ²) + tr(Aᵀ E[bbᵀ] A Λ).
    """
    lam, power = (jnp.asarray(moment, jnp.float32) for moment in domain.moments())
    unit = jnp.eye(domain.n_x)

    def loss(params, keys):
        answer = lambda b, x: meta.learner(params).predict((b[None], jnp.int32(1)), x)[0]
        A = jax.vmap(jax.vmap(answer, (None, 0)), (0, None))(unit, unit)
        squared = jnp.sum(power[:, None] * A**2 * lam)
        mean = lam.sum() + domain.sigma**2 - 2 * jnp.sum(jnp.diag(A) * lam**2) + squared
        return mean / 2, {"loss": mean}

    return Objective(loss)


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of the study, except its seed. Values are our choice."""

    variances: tuple[float, ...] = (1.0, 0.6, 0.36)
    """Variance λ_d of each input, greatest first."""
    steps: int = 31
    """T, the pairs in an episode. The last answer has T − 1 of them in context."""
    sigma: float = 0.1
    """Standard deviation σ of the noise."""
    separate: OneLayerAttentionConfig = OneLayerAttentionConfig(scale=4e-2)
    merged: OneLayerAttentionConfig = OneLayerAttentionConfig(merged=True, scale=2e-2)
    outer: md.OuterConfig = md.OuterConfig(
        optimizer="sgd", schedule="constant", learning_rate=0.06, clip=1e6, warmup=0, batch=128,
        steps=8000, seeds=8, checkpoints=80,
    )  # fmt: skip
    """Plain gradient descent at a constant rate, which the theory assumes."""
    measure: md.MeasureConfig = md.MeasureConfig(tracked_tasks=16, heldout_tasks=4096)

    def __post_init__(self) -> None:
        lam = self.variances
        valid = lam and [*lam] == sorted({*lam}, reverse=True) and lam[-1] > 0
        hint = "give positive numbers in decreasing order"
        check(valid and np.isfinite(lam[0]), "variances", lam, hint)
        check(self.steps >= 2, "steps", self.steps, "must be at least 2: a pair, and a query")

    @property
    def domain(self) -> Components:
        """Returns the distribution of tasks, whose weights are N(0, I)."""
        identity = tuple(map(tuple, np.eye(len(self.variances)).tolist()))
        sizes = {"n_x": len(identity), "n_y": 1, "sigma": self.sigma, "steps": self.steps}
        return Components(**sizes, column_covariance=identity, variances=self.variances)


def plan(config: Config) -> md.Plan:
    """Trains both networks on episodes and on the expected loss, from the same initial weights."""
    domain, metas = config.domain, []
    times = *inner.log_spaced(domain.steps - 1, 6), domain.steps
    for name, label in KINDS.items():
        meta = getattr(config, name).make(domain)
        for suffix, objective in (("", last_answer), ("_expected", expected)):
            full_label = label + ", expected loss" * bool(suffix)
            fields = {"times": times, "objective": objective, "option": f"{name}.attention-heads"}
            metas.append(md.Contender(name + suffix, full_label, meta, **fields))
    bayes = md.Contender("bayes", "Bayes-optimal", bayes_linear(domain), "bayes", times)
    return md.Plan(config.outer, [md.Comparison(domain, [*metas, bayes], measure=config.measure)])


def last_loss(data) -> np.ndarray:
    """Returns the loss of the last answer over its value at outer step 0 [seed, outer_step].

    The initial weights are so small that answers are about 0 there and the loss the mean of y².
    """
    loss = dynamics.samples(data, "loss")[..., -1].mean(1)
    return loss / loss[:, :1]


def first_below(data, levels) -> np.ndarray:
    """Finds the outer step at which each seed's loss first falls to each level [seed, level]."""
    below = np.asarray(levels) - last_loss(data)[..., None]
    return dynamics.learning_times(data["outer_step"].to_numpy(), below, p=0.0)


def rested(data, before, after, last) -> np.ndarray:
    """Counts the levels at which each seed rests [seed]; NaN if it never falls below the last."""
    rests = first_below(data, after) >= REST * first_below(data, before)
    return np.where(np.isfinite(first_below(data, last)[..., 0]), rests.sum(-1), np.nan)


def over_seeds(values) -> dynamics.Estimate:
    """Estimates the mean of values [seed, …] over seeds."""
    return dynamics.estimate(np.asarray, np.asarray(values, float)[:, None])


def criteria(config: Config, results):
    """Yields criteria on training's plateaus, when it leaves them and the order of components."""
    levels = config.domain.plateaus() / config.domain.plateaus()[0]
    halfway, before, after = (levels[1:] + levels[:-1]) / 2, 1.1 * levels[1:-1], 0.9 * levels[1:-1]
    for name, label in KINDS.items():
        trained, theory = (results[HELDOUT, name + suffix] for suffix in ("", "_expected"))
        count, predicted = (rested(data, before, after, halfway[-1:]) for data in (trained, theory))
        staircase = name == "separate"
        text = "it goes down a staircase" if staircase else "it drops once"
        text = f"{label}: plateaus in between at which training rests, as {text}"
        bounds = {"at_least": 1} if staircase else {"at_most": 0}
        yield md.criterion(f"{name}_plateaus", over_seeds(count), text, **bounds, surely=True)
        text = f"{label}: the same, minus those at which descent on the expected loss rests"
        difference = over_seeds(count - predicted)
        yield md.criterion(f"{name}_plateaus_beyond_theory", difference, text, 0, 0, surely=True)
        ratios = first_below(trained, halfway) / first_below(theory, halfway)
        text = f"{label}: outer step of the drop, over that of descent on the expected loss"
        for k, drop in enumerate(ratios.T if staircase else ratios.T[-1:]):
            ratio, suffix = over_seeds(drop), f"_{k + 1}" * staircase
            yield md.criterion(f"{name}_drop{suffix}", ratio, text, 1.1, 0.9, surely=True)
        tracked = results[TRACKED, name]
        order = dynamics.outer_merit(tracked, results[TRACKED, "bayes"])
        bounds = {"at_most": -0.2} if staircase else {}
        text = f"{label}: over outer training greater components come first: slope of log n_d"
        yield md.criterion(f"{name}_outer", order, text, **bounds)
        slope = dynamics.merit(tracked.isel(outer_step=-1))
        yield md.criterion(f"{name}_inner", slope, f"{label}: slope of log t_d within an episode")


def plateaus(results):
    """Draws each seed's loss over outer training, with the plateaus, and components' strengths."""
    merged = results[TRACKED, "merged"]
    about, modes = trajectories.about(merged), trajectories.modes(merged)
    T, sigma = int(merged["time"][-1]), about.loss_floor**0.5
    domain = Config(modes.values, T, sigma).domain
    figure, axes = figures.grid(4, columns=2, width=5.2, height=3.4)
    for (name, title), upper, lower in zip(KINDS.items(), axes[:2], axes[2:], strict=True):
        trained, tracked = results[HELDOUT, name], results[TRACKED, name]
        steps, _ = (figures.outer_axis(axis, trained) for axis in (upper, lower))
        for data, label, colour, style in (
            (trained, "trained, each seed", figures.COLOURS[0], "-"),
            (results[HELDOUT, f"{name}_expected"], "the same on the expected loss", "black", "--"),
        ):
            lines = upper.plot(steps, last_loss(data).T, style, color=colour, lw=1.2)
            lines[0].set_label(label)
        for level in domain.plateaus() / domain.plateaus()[0]:
            line = upper.axhline(level, **figures.LEVEL_STYLE)
        line.set_label("plateaus in theory")
        strength = dynamics.estimate(np.asarray, dynamics.strength(tracked)[:, :, :, -1])
        figures.curves(lower, steps, strength, [f"{value:g}" for value in domain.variances])
        upper.set(title=title, yscale="log", ylabel="loss of the last answer\n(1 at outer step 0)")
        lower.set(ylabel="strength of each component", ylim=figures.STRENGTH_LIMITS)
        lower.legend(title=modes.label)
    axes[0].legend(frameon=True, framealpha=0.9, edgecolor="none")
    return figure


WORKSTATION = Config(
    variances=(1.0, 0.6, 0.36, 0.216),
    outer=dataclasses.replace(Config().outer, steps=24_000, batch=256, seeds=16, checkpoints=120),
)
PAPER = Config(
    separate=OneLayerAttentionConfig(),
    merged=OneLayerAttentionConfig(merged=True),
    outer=dataclasses.replace(Config().outer, steps=60_000, batch=1024, checkpoints=120),
    measure=md.MeasureConfig(tracked_tasks=64, heldout_tasks=8192),
)
study = md.Study(
    "attention_plateaus",
    {"quick": Config(), "workstation": WORKSTATION, "paper": PAPER},
    plan,
    criteria,
    {"plateaus": plateaus},
    section="ours",
    claims={
        "plateaus": {
            "separate_plateaus": "With separate keys and queries training goes down a staircase "
            "(Zhang et al. 2025)",
            "separate_drop_1": "The first drop of that staircase comes when descent on the "
            "expected loss has it",
            "merged_plateaus": "With merged keys and queries the loss drops once "
            "(Zhang et al. 2025)",
            "separate_outer": "Components come in order of their input variance",
        }
    },
)
