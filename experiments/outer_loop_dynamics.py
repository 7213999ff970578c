"""Outer-loop dynamics: how the inner learning curve of each mode changes over outer training.

    metadyn run outer_loop_dynamics [--preset quick|workstation|paper] [--meta NAME] [overrides]

After Rabinowitz (2019), arXiv:1905.01320, §5. One LSTM is trained on each domain, side by side,
64 units wide (256 in the paper's preset): on y_t itself, where the regressions' own studies take
Bayes' answers, and with an entropy weight that stays, where the bandit's own lets it fall to zero.
The singular values of tracked tasks lie at even steps, as the least of the prior's quantiles cannot
be placed.
"""

import dataclasses

import metadyn as md
from metadyn import dynamics, trajectories
from metadyn.domains.linear import LinearRegression
from metadyn.objectives import Target
from metadyn.several_domains import EVEN, TITLES, DomainsConfig
from metadyn.study import TRACKED, censored, excess_of, paper

SAYS = {
    "linear": "lesser singular modes are learned before the greater ones",
    "nonlinear": "low frequencies are learned before high ones",
    "bandit": "contexts are learned one after another",
}
"""What the paper says of the outer loop's order in each domain."""


@dataclasses.dataclass(frozen=True)
class Config(DomainsConfig):
    """Everything the study depends on, beside its seed. Values are our choice."""

    target: Target = "feedback"
    """What the regressions' meta-learners are trained to predict."""
    actor_critic: md.ActorCriticConfig = md.ActorCriticConfig()


def plan(config: Config) -> md.Plan:
    """One comparison of each domain, as the domain's own study has it."""
    parts = [config.comparison(name).alone(name, title) for name, title in TITLES.items()]
    return md.Plan(config.outer, parts)


def criteria(config: Config, results):
    """The order of the outer loop, the order within an episode, and how the two compare."""
    for name in TITLES:
        metas = results.learners(f"{TRACKED}_{name}", "meta")
        for learner, trained in metas.items():
            prefix = name if learner == next(iter(metas)) else f"{name}_{learner}"
            yield from of_learner(name, prefix, learner, trained, results)


def of_learner(name: str, prefix: str, learner: str, trained, results):
    """The same, of one meta-learner on one domain."""
    bayes = results[f"{TRACKED}_{name}", "bayes"]
    last, modes = trained.isel(outer_step=-1), trajectories.modes(trained)
    what = "(n_K - n_1) / n_K" if modes.exchangeable else "slope of log n_k on log scale"
    order = dynamics.outer_merit(trained, bayes)
    said = f"over outer training {SAYS[name]}: {what}"
    yield md.criterion(f"{prefix}_outer", order, said, at_least=0.0, surely=True)
    for who, data in (("inner", last), ("bayes", bayes)):
        said = f"within an episode: {what.replace('n_', 't_')}"
        yield md.criterion(f"{prefix}_{who}", dynamics.merit(data), said)
    if not modes.exchangeable:  # the order of exchangeable modes within an episode is chance
        ranks = dynamics.outer_correlation(trained, bayes)
        said = "Spearman's rank correlation of inner with outer learning times of the modes"
        yield md.criterion(f"{prefix}_correlation", ranks, said)
    yield censored(f"{prefix}_inner", last)
    excess = excess_of(results, learner, f"_{name}")
    yield md.criterion(f"{prefix}_excess", excess, "excess loss over Bayes at the last outer step")
    times = dynamics.outer_times(trained, bayes).each()
    for k, (at, n) in enumerate(zip(modes.values, times, strict=True), 1):
        said = f"outer step at which mode {at:.3g} is half-way to Bayes; none if it never is"
        yield md.criterion(f"{prefix}_n_{k}", n, said)


QUICK = Config(
    linear=EVEN["linear"],
    outer=md.OuterConfig(steps=12_000, learning_rate=3e-2, schedule="linear"),
    measure=md.MeasureConfig(tracked_tasks=256, heldout_tasks=256, probe_points=16),
)
WORKSTATION = Config(
    linear=LinearRegression(spread="even"),
    outer=md.OuterConfig(steps=12_000, seeds=8, learning_rate=3e-2, schedule="linear"),
    measure=md.MeasureConfig(tracked_tasks=1024, heldout_tasks=1024, probe_points=32),
)
PAPER = Config(
    **paper(100_000, batch=1024, checkpoints=60),
    linear=LinearRegression(spread="even"),
    measure=md.MeasureConfig(tracked_tasks=1024, heldout_tasks=8192, probe_points=64),
)
study = md.Study(
    "outer_loop_dynamics",
    {"quick": QUICK, "workstation": WORKSTATION, "paper": PAPER},
    plan,
    criteria,
    section="§5",
    claims={
        f"outer_learning_{name}": {f"{name}_outer": f"Over outer training, {TITLES[name]}: {says}"}
        for name, says in SAYS.items()
    },
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
