"""Contextual bandits: policy gradient stalls on plateaus, a meta-trained LSTM and Bayes do not.

    metadyn run contextual_bandit [--preset quick|workstation|paper] [--meta NAME] [overrides]

After Schaul et al. (2019), arXiv:1904.11455, and Rabinowitz (2019), arXiv:1905.01320, §4. A bias
shared by all contexts couples them; without it they are decoupled.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial

import numpy as np

import metadyn as md
from metadyn import dynamics, figures, trajectories
from metadyn.domains.bandit import ContextualBandit
from metadyn.errors import check, check_positive
from metadyn.inner import log_spaced
from metadyn.learners import gradient as gd
from metadyn.learners.bayes import bayes_bandit
from metadyn.learners.lstm import LSTMConfig
from metadyn.optimizers import named_optimizer
from metadyn.study import HELDOUT, beyond_bayes, paper, staggering

FIT_BOUNDS = {"reinforce_coupled": {"at_least": 1.0}, "reinforce_decoupled": {"at_most": 1.0}}
"""Bounds on the error of a linear fit to the learning times over that of an exponential fit."""


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """Settings of the ordinary learners: our choice, as we do not know the paper's values."""

    optimizer: str = "sgd"
    """Name of an optimiser of optax."""
    learning_rate: float = 0.3
    """Learning rate of REINFORCE, which samples one action per update."""
    expected_learning_rate: float = 1.0
    """Learning rate of the exact expected policy gradient."""
    scale: float = 1.0
    """Standard deviation of the initial weights."""
    most_contexts: int = 6
    """Largest K at which learning times are measured, with as many actions, all distinct."""
    updates: int = 30_000
    """Updates of REINFORCE."""
    expected_updates: int = 3000
    """Updates of the exact expected policy gradient."""
    records: int = 150
    """Number of updates, spaced evenly in logarithm, at which the probe runs."""

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "expected_learning_rate", "scale", "records")
        check_positive(self, "updates", "expected_updates")
        check(self.most_contexts >= 2, "most_contexts", self.most_contexts, "must be at least 2")
        named_optimizer(self.optimizer, self.learning_rate)


@dataclasses.dataclass(frozen=True)
class Config(md.StudyConfig):
    """All settings of the study, except its seed."""

    domain: ContextualBandit = ContextualBandit()
    actor_critic: md.ActorCriticConfig = md.ActorCriticConfig(annealed=True)
    policy: PolicyConfig = PolicyConfig()
    reward_at_least: float = 0.97
    """Lower bound on the LSTM's mean reward in its criterion, from 0 for chance to 1 for Bayes."""


def policies(config: PolicyConfig, domain: ContextualBandit) -> Iterator[md.Contender]:
    """Yields coupled and decoupled policies under REINFORCE and the exact expected gradient."""
    rates = config.learning_rate, config.expected_learning_rate
    reinforce_opt, expected_opt = (named_optimizer(config.optimizer, rate) for rate in rates)
    K, n = domain.contexts, domain.actions
    for coupling in ("coupled", "decoupled"):
        policy = gd.softmax_policy(K, n, coupling == "coupled", config.scale)
        expected = gd.expected_policy_gradient(policy, expected_opt)
        for name, label, learner, updates in (
            ("reinforce", "REINFORCE", gd.reinforce(policy, reinforce_opt, 1), config.updates),
            ("expected", "expected gradient", expected, config.expected_updates),
        ):
            times, label = log_spaced(updates, config.records), f"{label}, {coupling}"
            yield md.Contender(f"{name}_{coupling}", label, learner, times=times)


def plan(config: Config) -> md.Plan:
    """Returns the learners to train and compare, and the sets of tasks to measure them on."""
    domain, sizes, policy = config.domain, config.measure, config.policy
    posteriors = [md.Contender("bayes", "Bayes-optimal", bayes_bandit(domain), "bayes")]
    if not domain.deterministic:  # the optimal policy is not known in closed form
        greedy = posteriors[0].learner
        thompson, prefix = bayes_bandit(domain, "thompson"), "exact posterior,\n"
        posteriors = [
            md.Contender("bayes", f"{prefix}Thompson sampling", thompson, "bayes"),
            md.Contender("bayes_greedy", f"{prefix}most probable action", greedy, "reference"),
        ]
    ordinary = [c for c in policies(policy, domain) if c.name.startswith("reinforce")]
    contenders = [*ordinary, config.meta_learner(domain, heads=1), *posteriors]
    objective = partial(md.actor_critic, config=config.actor_critic, steps=config.outer.steps)
    sets = [sizes.sized(domain.evaluation())]
    comparisons = [md.Comparison(domain, contenders, sets, (), sizes, objective, heads=1)]
    for k in range(1, policy.most_contexts + 1):
        # There are enough actions for the largest K to have a distinct correct action per context.
        fields = {"contexts": k, "actions": policy.most_contexts, "steps": k, "permutation": True}
        variant = dataclasses.replace(domain, **fields)
        tasks = sizes.sized(variant.evaluation(), "updating_tasks", f"{k}_contexts")
        comparisons.append(md.Comparison(variant, [*policies(policy, variant)], [tasks], (), sizes))
    return md.Plan(config.outer, comparisons)


def criteria(config: Config, results):
    """Yields criteria on the growth of learning time with K, on staggering and on reward."""
    most, over_runs = config.policy.most_contexts, dynamics.estimate_over_runs
    numbers = np.arange(1, most + 1)
    by_k = [results.learners(f"{k}_contexts") for k in numbers]
    runs = {name: [dynamics.last_times(data[name]) for data in by_k] for name in by_k[0]}
    # How the median time to learn all contexts grows with their number.
    fit = lambda *times: dynamics.growth(numbers, np.array([np.median(t) for t in times]))
    ratio_of_factors = lambda *times: fit(*times[:most])[0] / fit(*times[most:])[0]
    ratio = over_runs(ratio_of_factors, *runs["reinforce_coupled"], *runs["reinforce_decoupled"])
    text = "factor of growth (below) of coupled contexts over that of decoupled ones"
    yield md.criterion("coupled_over_decoupled_growth", ratio, text, at_least=1.5)
    for name, times in runs.items():
        row, (factor, ratio) = f"{name}_growth", over_runs(fit, *times).split()
        bounds = {"at_least": 1.5} if name == "reinforce_coupled" else {}
        text = "each context more multiplies the time to learn all by this"
        yield md.criterion(f"{row}_factor", factor, text, **bounds)
        text = "linear fit's error of the time to learn all over an exponential's, fitted to logs"
        text += ": above 1 it grows exponentially, below 1 linearly"
        bounds = FIT_BOUNDS.get(name, {})
        yield md.criterion(f"{row}_linear_over_exponential", ratio, text, **bounds, surely=True)
        share = over_runs(np.mean, np.isinf(times[-1]))
        text = f"share of runs that had not learned all {most} contexts by the last update"
        yield md.criterion(f"{name}_censored_runs", share, text)
    yield from beyond_bayes(results, within=0.15)
    for name in results.learners("in_distribution", "ordinary", "bayes"):
        yield from staggering(results, name, "(t_K - t_1) / t_K, contexts in order of learning")
    d = config.domain
    chance = (d.p_high - d.p_low) * (1 - 1 / d.actions)  # regret of the uniform policy
    bayes_loss = dynamics.episode_loss(results[HELDOUT, "bayes"])
    for name, data in results.learners(HELDOUT, "meta").items():
        label, loss = trajectories.about(data).label, dynamics.episode_loss(data)[..., -1]
        reward = dynamics.estimate(lambda a, b: (chance - a) / (chance - b), loss, bayes_loss)
        text, bound = f"mean reward of the {label}: 0 chance, 1 Bayes", config.reward_at_least
        yield md.criterion(f"{name}_relative_reward", reward, text, at_least=bound)


def growth(results):
    """Draws the median time to learn the last context against the number of contexts."""
    numbers = 1 + np.arange(sum(name.endswith("_contexts") for name in results.sets()))
    figure, (axis,) = figures.grid(min(len(numbers), 1), width=6.6, height=4.6)
    for i, (name, data) in enumerate(results.learners("1_contexts").items()):
        runs = [dynamics.last_times(results[f"{k}_contexts", name]) for k in numbers]
        median = dynamics.stacked(dynamics.estimate_over_runs(np.median, times) for times in runs)
        finite, bars = np.isfinite(median.value), figures.bars(median)
        factor, _ = dynamics.growth(numbers[finite], median.value[finite])
        unfinished = f"{np.isinf(runs[-1]).mean():.0%} of runs not done at {numbers[-1]}"
        label = f"{trajectories.about(data).label}: × {factor:.2f} for each context; {unfinished}"
        colour, marker = figures.line_colour(i), "osDP"[i % 4]
        style = {"marker": marker, "color": colour, "label": label}
        axis.errorbar(numbers[finite], median.value[finite], bars[:, finite], **style)
        last_update = np.full((~finite).sum(), data["time"][-1])
        axis.plot(numbers[~finite], last_update, "^", mfc="none", color=colour, ms=10)
    axis.set(yscale="log", xlabel="contexts $K$", xticks=numbers)
    axis.set_ylabel("updates until the last is learned\n(median run; triangle: not done)")
    figure.legend(loc="outside lower center", fontsize=10)
    return figure


QUICK = Config(
    lstm=LSTMConfig(vector_rate=2.0),
    outer=md.OuterConfig(steps=3000, batch=32, learning_rate=3e-2, schedule="linear", warmup=100),
    measure=md.MeasureConfig(tasks=4096, updating_tasks=256, tracked_tasks=128, heldout_tasks=512),
)
WORKSTATION = Config(
    lstm=LSTMConfig(hidden=128),
    outer=md.OuterConfig(steps=12_000, batch=32, learning_rate=2e-2, schedule="linear", warmup=100),
    measure=md.MeasureConfig(updating_tasks=2048, tracked_tasks=256, heldout_tasks=2048),
)
PAPER = Config(
    **paper(50_000, batch=1024, checkpoints=40),
    policy=PolicyConfig(updates=200_000, expected_updates=20_000),
    measure=md.MeasureConfig(tasks=65_536, updating_tasks=2048, heldout_tasks=8192),
)
study = md.Study(
    "contextual_bandit",
    {"quick": QUICK, "workstation": WORKSTATION, "paper": PAPER},
    plan,
    criteria,
    {"growth": growth},
    section="§4",
    claims={
        "growth": {
            "reinforce_coupled_growth_linear_over_exponential": "Coupled, the time to learn all "
            "contexts grows exponentially with their number",
            "reinforce_decoupled_growth_linear_over_exponential": "Decoupled, it grows linearly",
        },
        "mode_strength": {"lstm_minus_bayes_staggering": "A meta-trained LSTM plateaus like Bayes"},
        "distance_to_bayes": {"lstm_relative_reward": "Its reward is near the optimal policy's"},
    },
)
