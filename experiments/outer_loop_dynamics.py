"""Outer-loop dynamics: how the inner learning curve of each mode changes over outer training.

    metadyn run outer_loop_dynamics [--preset quick|paper] [--meta lstm|gru] [--out DIR] [overrides]

After Rabinowitz (2019), arXiv:1905.01320, §5. One LSTM is trained on each domain, side by side,
with the networks and the objectives of the other three studies.
"""

import dataclasses
from functools import partial

import metadyn as md
from metadyn import dynamics, labelled
from metadyn.domains.bandit import ContextualBandit
from metadyn.domains.fourier import FourierRegression
from metadyn.domains.linear import LinearRegression
from metadyn.learners.lstm import LSTMConfig
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
    actor_critic: md.ActorCriticConfig = md.ActorCriticConfig()


def plan(config: Config) -> md.Plan:
    """One comparison of each domain, as the domain's own study has it."""
    common = {f.name: getattr(config, f.name) for f in dataclasses.fields(md.StudyConfig)}
    comparisons = []
    for name, study in STUDIES.items():
        own = {"actor_critic": config.actor_critic} if name == "bandit" else {}
        whole = study.comparison("quick", domain=getattr(config, name), **common, **own)
        comparisons.append(whole.alone(name, TITLES[name]))
    return md.Plan(config.outer, comparisons)


def of_domain(name: str, results):
    """The order of the outer loop, the order within an episode, and how the two compare."""
    bayes = results[f"{TRACKED}_{name}", "bayes"]
    best = dynamics.strength(bayes)
    metas = results.learners(f"{TRACKED}_{name}", "meta")
    for learner, trained in metas.items():
        prefix = name if learner == next(iter(metas)) else f"{name}_{learner}"
        over = dynamics.over_outer_training(trained, bayes)
        outer, inner = dynamics.outer_times_of(trained), dynamics.times_of(trained)
        last = trained.isel(outer_step=-1)
        scale, alike = dynamics.scale(trained), labelled.modes(trained).exchangeable
        order = dynamics.staggering if alike else partial(dynamics.staggering_slope, scale)
        what = "(n_K - n_1) / n_K" if alike else "slope of log n_k on log scale"
        yield md.criterion(
            f"{prefix}_outer",
            dynamics.estimate(lambda a, b: order(outer(a, b)), *over),  # noqa: B023
            f"over outer training {DOMAINS[name][1]}: {what} above 0",
            at_least=0.0,
            surely=True,
        )
        for who, strength in (("inner", dynamics.strength(last)), ("bayes", best)):
            found = dynamics.estimate(lambda mean: order(inner(mean)), strength)  # noqa: B023
            said = f"within an episode: {what.replace('n_', 't_')}"
            yield md.criterion(f"{prefix}_{who}", found, said)
        if not alike:  # the order of exchangeable modes within an episode is chance
            correlation = dynamics.estimate(
                lambda a, b: dynamics.rank_correlation(inner(a[..., -1, :, :]), outer(a, b)),  # noqa: B023
                *over,
            )
            said = "Spearman's rank correlation of inner with outer learning times of the modes"
            yield md.criterion(f"{prefix}_correlation", correlation, said)
        yield censored(f"{prefix}_inner", last)
        heldout = [results[f"{HELDOUT}_{name}", who] for who in (learner, "bayes")]
        excess = dynamics.measured_excess(heldout[0].isel(outer_step=-1), heldout[1])
        said = "excess loss over Bayes at the last outer step"
        yield md.criterion(f"{prefix}_excess", excess, said)
        n = dynamics.estimate(outer, *over)
        for k, at in enumerate(scale):
            at_k = dynamics.Estimate(*(part[k] for part in n))
            said = f"outer step at which mode {at:.3g} is half-way to Bayes; none if it never is"
            yield md.criterion(f"{prefix}_n_{k + 1}", at_k, said)


def criteria(config: Config, results):
    """What the science says of what was measured."""
    for name in DOMAINS:
        yield from of_domain(name, results)


QUICK = Config(
    linear=LinearRegression(n_x=3, n_y=3),
    nonlinear=FourierRegression(steps=40),
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
SAYS = "Over outer training"
COLUMNS = {
    "inner": "within an episode: LSTM",
    "bayes": "within an episode: Bayes",
    "outer": "over outer training",
    "correlation": "rank correlation, inner with outer",
    "excess": "excess loss at the end",
}
study = md.Study(
    "outer_loop_dynamics",
    {"quick": QUICK, "paper": PAPER},
    plan,
    criteria,
    section="§5",
    claims=[
        md.Claim(f"{name}_outer", f"{SAYS}, {TITLES[name]}: {says}", figure)
        for (name, (_, says)), figure in zip(
            DOMAINS.items(),
            ("outer_learning_linear", "inner_curves_nonlinear", "outer_learning_bandit"),
            strict=True,
        )
    ],
    tables=[
        md.Table(
            "Inner and outer order: slope of log learning time on log scale; in the bandit "
            "(t_K − t_1) / t_K",
            TITLES,
            COLUMNS,
            "orders",
        )
    ],
)
