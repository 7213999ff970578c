"""Outer-loop dynamics: how the inner learning curve of each mode changes over outer training.

    metadyn run outer_loop_dynamics [--preset quick|paper] [--meta lstm|gru|…] [overrides]

After Rabinowitz (2019), arXiv:1905.01320, §5. One LSTM is trained on each domain, side by side,
with the networks and the objectives of the other three studies.
"""

import dataclasses
from functools import partial

import numpy as np

import metadyn as md
from metadyn import dynamics, labelled
from metadyn.domains.bandit import ContextualBandit
from metadyn.domains.fourier import FourierRegression
from metadyn.domains.linear import LinearRegression
from metadyn.learners.lstm import LSTMConfig
from metadyn.objectives import Target
from metadyn.study import HELDOUT, TRACKED, censored

DOMAINS = {
    "linear": ("linear_regression", "lesser singular modes are learned before the greater ones"),
    "nonlinear": ("nonlinear_regression", "low frequencies are learned before high ones"),
    "bandit": ("contextual_bandit", "contexts are learned one after another"),
}
"""Name here: the study that trains on it, and what the paper says of the outer loop's order."""
STUDIES = {name: md.load_study(study) for name, (study, _) in DOMAINS.items()}
TITLES = {name: study.replace("_", " ") for name, (study, _) in DOMAINS.items()}


@dataclasses.dataclass(frozen=True)
class Config(md.StudyConfig):
    """Everything the study depends on, beside its seed. Values are our choice."""

    linear: LinearRegression = LinearRegression()
    nonlinear: FourierRegression = FourierRegression()
    bandit: ContextualBandit = ContextualBandit()
    target: Target = "feedback"
    """What the regressions' meta-learners are trained to predict."""
    actor_critic: md.ActorCriticConfig = md.ActorCriticConfig()


def plan(config: Config) -> md.Plan:
    """One comparison of each domain, as the domain's own study has it."""
    comparisons = []
    for name, study in STUDIES.items():
        own = config.common() | {"domain": getattr(config, name)}
        field = "actor_critic" if name == "bandit" else "target"
        own |= {field: getattr(config, field)}
        comparisons.append(study.comparison("quick", **own).alone(name, TITLES[name]))
    return md.Plan(config.outer, comparisons)


def criteria(config: Config, results):
    """The order of the outer loop, the order within an episode, and how the two compare."""
    for name in DOMAINS:
        metas = results.learners(f"{TRACKED}_{name}", "meta")
        for learner, trained in metas.items():
            prefix = name if learner == next(iter(metas)) else f"{name}_{learner}"
            yield from of_learner(name, prefix, learner, trained, results)


def of_learner(name: str, prefix: str, learner: str, trained, results):
    """The same, of one meta-learner on one domain."""
    bayes = results[f"{TRACKED}_{name}", "bayes"]
    over = dynamics.over_outer_training(trained, bayes)
    outer, inner = dynamics.outer_times_of(trained), dynamics.times_of(trained)
    last, modes = trained.isel(outer_step=-1), labelled.modes(trained)
    alike, scale = modes.exchangeable, np.array(modes.values)
    order = dynamics.staggering if alike else partial(dynamics.staggering_slope, scale)
    what = "(n_K - n_1) / n_K" if alike else "slope of log n_k on log scale"
    n, ordered = (dynamics.estimate(f, *over) for f in (outer, lambda a, b: order(outer(a, b))))
    said = f"over outer training {DOMAINS[name][1]}: {what} above 0"
    yield md.criterion(f"{prefix}_outer", ordered, said, at_least=0.0, surely=True)
    for who, data in (("inner", last), ("bayes", bayes)):
        said = f"within an episode: {what.replace('n_', 't_')}"
        yield md.criterion(f"{prefix}_{who}", dynamics.merit(data), said)
    if not alike:  # the order of exchangeable modes within an episode is chance
        ranks = lambda a, b: dynamics.rank_correlation(inner(a[..., -1, :, :]), outer(a, b))
        said = "Spearman's rank correlation of inner with outer learning times of the modes"
        yield md.criterion(f"{prefix}_correlation", dynamics.estimate(ranks, *over), said)
    yield censored(f"{prefix}_inner", last)
    losses = [results[f"{HELDOUT}_{name}", who] for who in (learner, "bayes")]
    excess = dynamics.measured_excess(losses[0].isel(outer_step=-1), losses[1])
    yield md.criterion(f"{prefix}_excess", excess, "excess loss over Bayes at the last outer step")
    for k, at in enumerate(scale):
        said = f"outer step at which mode {at:.3g} is half-way to Bayes; none if it never is"
        at_k = dynamics.Estimate(*(part[k] for part in n))
        yield md.criterion(f"{prefix}_n_{k + 1}", at_k, said)


QUICK = Config(
    linear=LinearRegression(n_x=3, n_y=3),
    outer=md.OuterConfig(steps=12_000, batch=32, learning_rate=3e-2, schedule="linear"),
    measure=md.MeasureConfig(tracked_tasks=256, heldout_tasks=256, probe_points=16),
)
PAPER = Config(
    lstm=LSTMConfig(hidden=256),
    outer=md.OuterConfig(
        steps=100_000, batch=1024, learning_rate=4e-3, warmup=1000, checkpoints=60
    ),
    measure=md.MeasureConfig(tracked_tasks=1024, heldout_tasks=8192, probe_points=64),
)
study = md.Study(
    "outer_loop_dynamics",
    {"quick": QUICK, "paper": PAPER},
    plan,
    criteria,
    section="§5",
    claims=[
        md.Claim(
            f"{name}_outer",
            f"Over outer training, {TITLES[name]}: {says}",
            f"outer_learning_{name}",
        )
        for name, (_, says) in DOMAINS.items()
    ],
    tables=[
        md.Table(
            "Inner and outer order: slope of log t on log scale; in the bandit (t_K − t_1) / t_K",
            TITLES,
            {
                "inner": "within an episode: LSTM",
                "bayes": "within an episode: Bayes",
                "outer": "over outer training",
                "correlation": "rank correlation, inner with outer",
                "excess": "excess loss at the end",
            },
            "orders",
        )
    ],
)
