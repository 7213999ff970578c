"""Contextual bandits: policy gradient stalls on plateaus, a meta-trained LSTM and Bayes do not.

    metadyn run contextual_bandit [--preset quick|paper] [--meta lstm|gru] [--out DIR] [overrides]

After Schaul et al. (2019), arXiv:1904.11455, and Rabinowitz (2019), arXiv:1905.01320, §4. A bias
shared by all contexts couples them; without it they are decoupled.
"""

import dataclasses
import functools
from functools import partial

import matplotlib.ticker
import numpy as np

import metadyn as md
from metadyn import dynamics, figures, labelled
from metadyn.domains.bandit import ContextualBandit
from metadyn.errors import check, check_positive
from metadyn.inner import log_spaced
from metadyn.learners import gradient as gd
from metadyn.learners.bayes import bayes_bandit
from metadyn.learners.lstm import LSTMConfig
from metadyn.optimizers import named_optimizer
from metadyn.study import HELDOUT, beyond_bayes, staggering


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """The ordinary learners. The paper's values are not known to us: these are our choice."""

    optimizer: str = "sgd"
    """An optimiser of optax, by name."""
    learning_rate: float = 0.3
    """Of REINFORCE."""
    batch: int = 1
    """Choices per update of REINFORCE."""
    expected_learning_rate: float = 1.0
    """Of the exact expected policy gradient."""
    scale: float = 1.0
    """Standard deviation of the initial weights."""
    scales: tuple[float, ...] = (0.1, 0.3, 3.0)
    """Other such standard deviations, tried at `scale_contexts` contexts."""
    scale_contexts: int = 4
    """K at which the initial scale is varied."""
    most_contexts: int = 6
    """K up to which the growth of learning time is measured, with as many actions, all distinct."""
    updates: int = 30_000
    """Updates of REINFORCE."""
    expected_updates: int = 3000
    """Updates of the exact expected policy gradient."""
    records: int = 150
    """Log-spaced updates at which the probe runs."""

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "expected_learning_rate", "batch", "scale", "records")
        check_positive(self, "updates", "expected_updates", "scale_contexts")
        check(self.most_contexts >= 2, "most_contexts", self.most_contexts, "must be at least 2")
        most = self.scale_contexts <= self.most_contexts
        fix = f"must be at most most_contexts = {self.most_contexts}"
        check(most, "scale_contexts", self.scale_contexts, fix)
        check(all(s > 0 for s in self.scales), "scales", self.scales, "must all be positive")
        named_optimizer(self.optimizer, self.learning_rate)


@dataclasses.dataclass(frozen=True)
class Config(md.StudyConfig):
    """Everything the study depends on, beside its seed."""

    domain: ContextualBandit = ContextualBandit()
    actor_critic: md.ActorCriticConfig = md.ActorCriticConfig()
    policy: PolicyConfig = PolicyConfig()
    reward_at_least: float = 0.7
    """Least mean reward of the LSTM, from 0 for chance to 1 for Bayes, to pass the criterion."""


def policies(config: PolicyConfig, domain: ContextualBandit, scale: float) -> list[md.Contender]:
    """Coupled and decoupled policies under REINFORCE and the exact expected gradient."""
    sampled = named_optimizer(config.optimizer, config.learning_rate)
    expected = named_optimizer(config.optimizer, config.expected_learning_rate)
    made = []
    for coupling, coupled in (("coupled", True), ("decoupled", False)):
        policy = gd.softmax_policy(domain.contexts, domain.actions, coupled, scale)
        for name, label, learner, updates in (
            ("reinforce", "REINFORCE", gd.reinforce(policy, sampled, config.batch), config.updates),
            ("reinforce_no_baseline", "REINFORCE without baseline",
             gd.reinforce(policy, sampled, config.batch, baseline=False), config.updates),
            ("expected", "expected gradient",
             gd.expected_policy_gradient(policy, expected, domain.contexts),
             config.expected_updates),
        ):  # fmt: skip
            times, names = log_spaced(updates, config.records), (f"{name}_{coupling}",)
            made.append(md.Contender(*names, f"{label}, {coupling}", learner, times=times))
    return made


def plan(config: Config) -> md.Plan:
    """What is trained and measured."""
    domain, sizes, policy = config.domain, config.measure, config.policy
    greedy, thompson = (bayes_bandit(domain, rule) for rule in ("greedy", "thompson"))
    posteriors = [md.Contender("bayes", "Bayes-optimal", greedy, "bayes")]
    if not domain.deterministic:  # what is optimal is not known in closed form
        said = "exact posterior,\n"
        posteriors = [
            md.Contender("bayes", f"{said}Thompson sampling", thompson, "bayes"),
            md.Contender("bayes_greedy", f"{said}most probable action", greedy, "reference"),
        ]
    ordinary = [p for p in policies(policy, domain, policy.scale) if "reinforce_c" in p.name
                or "reinforce_d" in p.name]  # fmt: skip
    main = md.Comparison(
        domain,
        [*ordinary, config.meta_learner(domain, heads=1), *posteriors],
        [sizes.sized(domain.evaluation())],
        measure=sizes,
        objective=partial(md.actor_critic, config=config.actor_critic),
        heads=1,
    )
    wanted = [(k, policy.scale) for k in range(1, policy.most_contexts + 1)]
    comparisons = [main]
    for k, scale in [*wanted, *((policy.scale_contexts, scale) for scale in policy.scales)]:
        # As many actions as there can be contexts, all of them distinct.
        few = ContextualBandit(k, policy.most_contexts, steps=k, permutation=True)
        tasks = sizes.sized(few.evaluation(), "updating_tasks", named(policy, k, scale))
        made = policies(policy, few, scale)
        comparisons.append(md.Comparison(few, made, [tasks], measure=sizes))
    return md.Plan(config.outer, comparisons)


def named(policy: PolicyConfig, contexts: int, scale: float) -> str:
    """What the tasks of so many contexts are called, on which weights of a scale start."""
    return f"{contexts}_contexts" + (f"_scale_{scale:g}" if scale != policy.scale else "")


def criteria(config: Config, results):
    """What the science says of what was measured."""
    policy, numbers = config.policy, np.arange(1, config.policy.most_contexts + 1)
    learners = list(results.learners("1_contexts"))

    @functools.cache
    def last_times(name):
        """Time to learn all contexts [run] for each number of contexts."""
        return [dynamics.last_times(results[f"{k}_contexts", name]) for k in numbers]

    def fitted(runs):
        return dynamics.growth(numbers, np.array([np.median(each) for each in runs]))

    def growth(name, field, **bounds):
        """A figure of the growth of the median time to learn all contexts."""
        found = dynamics.estimate_over_runs(lambda *r: getattr(fitted(r), field), *last_times(name))
        says = {
            "factor": "factor by which each context more multiplies the time to learn all",
            "linear_over_exponential": "error of the best linear fit of that time over that of the "
            "best exponential: above 1 it grows exponentially, below 1 linearly",
        }
        return md.criterion(f"{name}_growth_{field}", found, says[field], **bounds)

    yield growth("reinforce_coupled", "factor", at_least=1.5)
    yield md.criterion(
        "coupled_over_decoupled_growth",
        dynamics.estimate_over_runs(
            lambda *runs: fitted(runs[: len(numbers)]).factor / fitted(runs[len(numbers) :]).factor,
            *last_times("reinforce_coupled"),
            *last_times("reinforce_decoupled"),
        ),
        "that factor is 1.5 times, or more, what an exponential fit makes of the decoupled growth",
        at_least=1.5,
    )
    judged = {"reinforce_coupled": {"at_least": 1.0}, "reinforce_decoupled": {"at_most": 1.0}}
    for name in learners:
        bound = {**judged[name], "surely": True} if name in judged else {}
        yield growth(name, "linear_over_exponential", **bound)
        if name != "reinforce_coupled":
            yield growth(name, "factor")
        share = dynamics.estimate_over_runs(np.mean, np.isinf(last_times(name)[-1]))
        said = f"share of runs that had not learned all {numbers[-1]} contexts by the last update"
        yield md.criterion(f"{name}_censored_runs", share, said)
    coupled = [name for name in learners if name.endswith("_coupled")]
    for scale in sorted((policy.scale, *policy.scales)):
        among = named(policy, policy.scale_contexts, scale)
        for name in coupled:
            both = name, name.replace("_coupled", "_decoupled")
            yield md.criterion(
                f"{name}_over_decoupled_scale_{scale:g}",
                dynamics.estimate_over_runs(
                    lambda a, b: np.median(a) / np.median(b),
                    *(dynamics.last_times(results[among, each]) for each in both),
                ),
                f"time to learn all, coupled over decoupled, from initial weights of {scale:g}; "
                "none if the median run had not by the last update",
            )
    yield from beyond_bayes(results, within=0.15)
    for name in results.learners("in_distribution", "ordinary", "bayes"):
        yield from staggering(results, name, "(t_K - t_1) / t_K, contexts in order of learning")
    d = config.domain
    chance = (d.p_high - d.p_low) * (1 - 1 / d.actions)  # regret of the uniform policy
    best = dynamics.episode_loss(results[HELDOUT, "bayes"])
    for name, data in results.learners(HELDOUT, "meta").items():
        loss, called = dynamics.episode_loss(data.isel(outer_step=-1)), labelled.about(data).label
        bound = config.reward_at_least
        yield md.criterion(
            f"{name}_relative_reward",
            dynamics.estimate(lambda a, b: (chance - a) / (chance - b), loss, best),
            f"mean reward of the {called}, between chance 0 and Bayes 1: at least {bound:g}",
            at_least=bound,
        )
    for name, data in results.learners(HELDOUT, "meta", "bayes").items():
        loss = dynamics.episode_loss(data if name == "bayes" else data.isel(outer_step=-1))
        reward = dynamics.estimate(lambda regret: d.p_high - regret, loss)
        yield md.criterion(f"{name}_reward", reward, "mean reward a step on held-out tasks")


def growth(results):
    """Draws the median time until the last context is learned, against their number."""
    sets = sorted(n for n in results.sets() if n.endswith("_contexts"))
    numbers = np.array([int(name.split("_")[0]) for name in sets])
    figure, (axis,) = figures.grid(1, width=6.6, height=4.6)
    styles = zip(figures.COLOURS, figures.MARKERS, strict=False)
    for (name, first), (colour, marker) in zip(
        results.learners(sets[0]).items(), styles, strict=False
    ):
        runs = [dynamics.last_times(results[each, name]) for each in sets]
        found = [dynamics.estimate_over_runs(np.median, each, draws=300) for each in runs]
        found = dynamics.Estimate(*(np.array(part) for part in zip(*found, strict=True)))
        done, bars = np.isfinite(found.value), figures.bars(found)
        factor = dynamics.growth(numbers[done], found.value[done]).factor
        label = f"{labelled.about(first).label}: × {factor:.2f} for each context"
        never = np.isinf(runs[-1]).mean()
        label += f"; {never:.0%} of runs not done at {numbers[-1]}" if never else ""
        style = {"marker": marker, "color": colour, "capsize": 3, "label": label}
        axis.errorbar(numbers[done], found.value[done], bars[:, done], **style)
        end = np.full((~done).sum(), first["time"].to_numpy()[-1])
        axis.plot(numbers[~done], end, "^", mfc="none", color=colour, ms=10)
    axis.set(yscale="log", xlabel="contexts $K$")
    axis.set_ylabel("updates until the last is learned\n(median run; triangle: not done)")
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", fontsize=10)
    return figure


QUICK = Config(
    outer=md.OuterConfig(steps=4000, batch=32, learning_rate=3e-2, schedule="linear", warmup=100),
    measure=md.MeasureConfig(tasks=4096, updating_tasks=256, tracked_tasks=128, heldout_tasks=512),
)
PAPER = Config(
    lstm=LSTMConfig(hidden=256),
    outer=md.OuterConfig(steps=50_000, batch=1024, learning_rate=4e-3, warmup=1000, checkpoints=40),
    policy=PolicyConfig(updates=200_000, expected_updates=20_000),
    measure=md.MeasureConfig(tasks=65_536, updating_tasks=2048, heldout_tasks=8192),
    reward_at_least=0.95,
)
study = md.Study(
    "contextual_bandit",
    {"quick": QUICK, "paper": PAPER},
    plan,
    criteria,
    {"growth": growth},
    section="§4",
    claims=[
        md.Claim(
            "reinforce_coupled_growth_linear_over_exponential",
            "Coupled, the time to learn all contexts grows exponentially with their number",
            "growth",
        ),
        md.Claim(
            "reinforce_decoupled_growth_linear_over_exponential",
            "Decoupled, it grows linearly",
            "growth",
        ),
        md.Claim(
            "lstm_minus_bayes_staggering",
            "A meta-trained LSTM has no plateaus beyond those of Bayes",
            "mode_strength",
        ),
        md.Claim(
            "lstm_relative_reward",
            "Its reward is near that of the optimal policy",
            "distance_to_bayes",
        ),
    ],
)
