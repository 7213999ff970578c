"""Outer-loop dynamics: how the inner learning curve of each mode changes over outer training.

    metadyn run outer_loop_dynamics [--preset quick|workstation|paper] [--meta NAME] [overrides]

After Rabinowitz (2019), arXiv:1905.01320, §5. One LSTM of 64 units (256 in the paper's preset) is
trained on each domain, all side by side. In regression it predicts y_t itself, where most presets
of the domains' own studies train on Bayes' answers. In the bandit its entropy weight is constant,
where the domain's own study lets it fall to zero. The singular values of tracked tasks are evenly
spaced, because the least of the prior's quantiles is too small for its learning to be timed.
"""

import dataclasses

import metadyn as md
from metadyn import dynamics, trajectories
from metadyn.domains.linear import LinearRegression
from metadyn.objectives import Target
from metadyn.several_domains import EVEN, TITLES, DomainsConfig
from metadyn.study import TRACKED, censored, heldout_excess, paper

ORDERS = {
    "linear": "lesser singular modes are learned before the greater ones",
    "nonlinear": "low frequencies are learned before high ones",
    "bandit": "contexts are learned one after another",
}
"""The order of learning over outer training that the paper reports for each domain."""


@dataclasses.dataclass(frozen=True)
class Config(DomainsConfig):
    """All settings of the study, except its seed. Values are our choice."""

    target: Target = "feedback"
    """What meta-learners are trained to predict in regression: y_t, or Bayes' answer ("bayes")."""
    actor_critic: md.ActorCriticConfig = md.ActorCriticConfig()


def plan(config: Config) -> md.Plan:
    """Returns one comparison per domain: the meta-learner and Bayes of the domain's own study."""
    comparisons = [config.comparison(name).alone(name, title) for name, title in TITLES.items()]
    return md.Plan(config.outer, comparisons)


def criteria(config: Config, results):
    """Yields criteria on the order over outer training, within an episode, and how they compare."""
    for name in TITLES:
        metas = results.learners(f"{TRACKED}_{name}", "meta")
        for learner, trained in metas.items():
            prefix = name if learner == next(iter(metas)) else f"{name}_{learner}"
            yield from learner_criteria(name, prefix, learner, trained, results)


def learner_criteria(name: str, prefix: str, learner: str, trained, results):
    """Yields the criteria of one meta-learner in one domain; their names begin with `prefix`."""
    bayes = results[f"{TRACKED}_{name}", "bayes"]
    last, modes = trained.isel(outer_step=-1), trajectories.modes(trained)
    merit = "(n_K - n_1) / n_K" if modes.exchangeable else "slope of log n_k on log scale"
    order = dynamics.outer_merit(trained, bayes)
    text = f"over outer training {ORDERS[name]}: {merit}"
    yield md.criterion(f"{prefix}_outer", order, text, at_least=0.0, surely=True)
    for ending, data in (("inner", last), ("bayes", bayes)):
        text = f"within an episode: {merit.replace('n_', 't_')}"
        yield md.criterion(f"{prefix}_{ending}", dynamics.merit(data), text)
    if not modes.exchangeable:  # exchangeable modes are learned in a random order in each episode
        correlation = dynamics.outer_correlation(trained, bayes)
        text = "Spearman's rank correlation of inner with outer learning times of the modes"
        yield md.criterion(f"{prefix}_correlation", correlation, text)
    yield censored(f"{prefix}_inner", last)
    excess = heldout_excess(results, learner, f"_{name}")
    yield md.criterion(f"{prefix}_excess", excess, "excess loss over Bayes at the last outer step")
    times = dynamics.outer_times(trained, bayes).split()
    for k, (value, n) in enumerate(zip(modes.values, times, strict=True), 1):
        text = f"outer step at which mode {value:.3g} is half-way to Bayes; none if it never is"
        yield md.criterion(f"{prefix}_n_{k}", n, text)


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
        f"outer_learning_{name}": {f"{name}_outer": f"Over outer training, {TITLES[name]}: {order}"}
        for name, order in ORDERS.items()
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
