"""Outer-loop dynamics: how the inner learning curve of each mode changes over outer training.

    metadyn run experiments/outer_loop_dynamics.py [--preset quick|paper] [--out DIR] [overrides]

After Rabinowitz (2019), arXiv:1905.01320, §5. One LSTM is trained on each domain, side by side,
with the networks and the objectives of the other three studies.
"""

import dataclasses
from functools import partial
from pathlib import Path

from metadyn import dynamics
from metadyn.domains.bandit import ContextualBandit
from metadyn.domains.fourier import FourierRegression
from metadyn.domains.linear import LinearRegression
from metadyn.learners.lstm import LSTMConfig
from metadyn.outer import ActorCriticConfig, OuterConfig
from metadyn.store import HELDOUT, TRACKED, RunFolder
from metadyn.study import (
    Claim,
    MeasureConfig,
    Plan,
    Study,
    Table,
    censored,
    criterion,
    load_study,
)

DOMAINS = {
    "linear": ("linear_regression", "linear regression"),
    "nonlinear": ("nonlinear_regression", "nonlinear regression"),
    "bandit": ("contextual_bandit", "contextual bandit"),
}
"""Name here: study that trains on it, what figures call it."""
STUDIES = {
    name: load_study(str(Path(__file__).with_name(f"{study}.py")))
    for name, (study, _) in DOMAINS.items()
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything the study depends on, beside its seed. Values are our choice."""

    linear: LinearRegression = LinearRegression()
    nonlinear: FourierRegression = FourierRegression()
    bandit: ContextualBandit = ContextualBandit()
    lstm: LSTMConfig = LSTMConfig()
    actor_critic: ActorCriticConfig = ActorCriticConfig()
    outer: OuterConfig = OuterConfig()
    measure: MeasureConfig = MeasureConfig()


def plan(config: Config) -> Plan:
    """One training of each domain, as the domain's own study does it."""
    trainings = []
    for name, study in STUDIES.items():
        own = {"actor_critic": config.actor_critic} if name == "bandit" else {}
        same = {f: getattr(config, f) for f in ("lstm", "outer", "measure")}
        (training, *_) = study.changed(domain=getattr(config, name), **same, **own).trainings
        trainings.append(training.named(name, title=DOMAINS[name][1]))
    return Plan(config.outer, trainings, measurements=[], chunk=config.measure.chunk)


SAYS = {
    "linear": "lesser singular modes are learned before the greater ones",
    "nonlinear": "low frequencies are learned before high ones",
}


def of_domain(name: str, run: RunFolder):
    """The order of the outer loop, the order within an episode, and how the two compare."""
    trained = run.trajectories(f"{TRACKED}_{name}")
    bayes = run.measurement(f"{TRACKED}_{name}", "bayes")
    strengths = dynamics.strength(trained), dynamics.strength(bayes)
    over = dynamics.over_outer_training(trained, bayes)
    outer, inner = dynamics.outer_times_of(trained), dynamics.times_of(trained)
    scale = dynamics.scale(trained)

    def last(mean):
        """Inner learning times of the trained learner."""
        return inner(mean[..., -1, :, :])

    if name == "bandit":
        order, what = dynamics.staggering, "(t_K - t_1) / t_K, contexts in order of learning"
        yield criterion(
            "bandit_outer",
            dynamics.estimate(lambda a, b: order(outer(a, b)), *over),
            "the outer loop learns one context after another: (n_K - n_1) / n_K above 0, each "
            "seed's contexts in its own order",
            at_least=0.0,
            surely=True,
        )
    else:
        order, what = partial(dynamics.staggering_slope, scale), "slope of log t_k on log scale"
        yield criterion(
            f"{name}_outer",
            dynamics.estimate(lambda a, b: order(outer(a, b)), *over),
            f"over outer training {SAYS[name]}: slope of log n_k on log scale above 0",
            at_least=0.0,
            surely=True,
        )
    for who, estimate in (
        ("inner", dynamics.estimate(lambda a: order(last(a)), strengths[0])),
        ("bayes", dynamics.estimate(lambda b: order(inner(b)), strengths[1])),
    ):
        yield criterion(f"{name}_{who}", estimate, f"within an episode: {what}")
    if name != "bandit":  # the order of its contexts within an episode is chance
        correlation = dynamics.estimate(
            lambda a, b: dynamics.rank_correlation(last(a), outer(a, b)), *over
        )
        said = "Spearman's rank correlation of inner with outer learning times of the modes"
        yield criterion(f"{name}_correlation", correlation, said)
    yield censored(f"{name}_inner", trained.isel(outer_step=-1))
    yield criterion(
        f"{name}_excess",
        dynamics.measured_excess(
            run.trajectories(f"{HELDOUT}_{name}").isel(outer_step=-1),
            run.measurement(f"{HELDOUT}_{name}", "bayes"),
        ),
        "excess loss of the LSTM over Bayes at the last outer step",
    )
    n = dynamics.estimate(outer, *over)
    for k, at in enumerate(scale):
        yield criterion(
            f"{name}_n_{k + 1}",
            dynamics.Estimate(*(part[k] for part in n)),
            f"outer step at which mode {at:.3g} is half-way to Bayes; none if it never is",
        )


def criteria(config: Config, run: RunFolder):
    """What the science says of the stored measurements."""
    for name in DOMAINS:
        yield from of_domain(name, run)


QUICK = Config(
    linear=LinearRegression(n_x=3, n_y=3),
    nonlinear=FourierRegression(steps=40),
    outer=OuterConfig(steps=12_000, batch=32, learning_rate=3e-2, schedule="linear"),
    measure=MeasureConfig(tracked_tasks=256, heldout_tasks=256, probe_points=16),
)
PAPER = Config(
    lstm=LSTMConfig(hidden=256),
    outer=OuterConfig(steps=100_000, batch=1024, learning_rate=4e-3, warmup=1000, checkpoints=60),
    measure=MeasureConfig(tracked_tasks=1024, heldout_tasks=8192, probe_points=64),
)

study = Study(
    "outer_loop_dynamics",
    {"quick": QUICK, "paper": PAPER},
    plan,
    criteria,
    section="§5",
    claims=(
        Claim(
            "Over outer training, linear regression: lesser singular modes before greater ones",
            "linear_outer",
            "outer_learning_linear",
        ),
        Claim(
            "Over outer training, nonlinear regression: low frequencies before high ones",
            "nonlinear_outer",
            "inner_curves_nonlinear",
        ),
        Claim(
            "Over outer training, contextual bandit: one context after another",
            "bandit_outer",
            "outer_learning_bandit",
        ),
    ),
    tables=(
        Table(
            "Inner and outer order: slope of log learning time on log scale; in the bandit "
            "(t_K − t_1) / t_K",
            {name: title for name, (_, title) in DOMAINS.items()},
            {
                "inner": "within an episode: LSTM",
                "bayes": "within an episode: Bayes",
                "outer": "over outer training",
                "correlation": "rank correlation, inner with outer",
                "excess": "excess loss at the end",
            },
            "orders",
        ),
    ),
)
