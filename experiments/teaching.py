"""Teaching: examples made for Bayes, made by gradient through a learner, and drawn at random.

    metadyn run teaching [--preset quick|workstation|paper] [--learners NAME …] [overrides]

In linear regression a teacher who knows W chooses the first inputs of an episode (Zhu 2013; Liu &
Zhu 2015); random ones follow. The study measures the teaching gain, whether modes are learned in
the order taught, and what a set made for one learner does for another. In the bandit it compares
demonstrations of the correct action with rewards (Ho et al. 2018). Training episodes are random.
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
import numpy as np

import metadyn as md
from metadyn import dynamics, figures, teaching, trajectories
from metadyn.base import STRENGTH, as_subclass
from metadyn.domains.bandit import ContextualBandit
from metadyn.domains.linear import LinearRegression
from metadyn.errors import check, check_positive
from metadyn.several_domains import LearnersConfig
from metadyn.study import paper

SETS = {
    "random": "random examples",
    "bayes": "made for Bayes",
    "least": "made for Bayes, least mode first",
    "own": "made through the learner",
}
FEEDBACK = {"rewards": "rewards", "demonstrations": "demonstrations"}
"""Labels of the sets of tasks, by name, in linear regression and in the bandit."""


@dataclasses.dataclass(frozen=True)
class Config(LearnersConfig):
    """All settings of the study, except its seed. Values are our choice."""

    linear: LinearRegression = LinearRegression()
    bandit: ContextualBandit = ContextualBandit()
    examples: int = 5
    """Examples that are taught in an episode. SGD is shown each of them for as many updates."""
    descent: int = 20
    """Gradient steps on the inputs of a set that is made through a learner."""
    rate: float = 0.3
    """Length of the first gradient step, over the norm of all inputs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "examples", "descent", "rate")
        hint = f"more examples than steps: must be at most linear.steps = {self.linear.steps}"
        check(self.examples <= self.linear.steps, "examples", self.examples, hint)


def pupils(config: Config, sgd, bayes, metas):
    """Returns the contenders taught random examples or those made for Bayes, and the contenders
    taught examples made through themselves, with Bayes taught those made through the others."""
    m, n_x, descent = config.examples, config.linear.n_x, (config.descent, config.rate)
    queries = jnp.asarray(np.random.default_rng(1).standard_normal((32, n_x)), jnp.float32)
    for_bayes = partial(teaching.for_bayes, examples=m)
    nothing = partial(teaching.no_lesson, examples=m)
    teachers = [nothing, for_bayes, partial(for_bayes, least_first=True)]
    taught = partial(teaching.taught, teachers=teachers, n_x=n_x, examples=m)

    def through(learner, pupil=None):
        teacher = lambda task: teaching.through(learner, task, for_bayes(task), queries, *descent)
        return taught(pupil or learner, teachers=[teacher])

    def pupil_of(base, change, **fields):
        return base.remade(change, **{"name": f"taught_{base.name}", "kind": "reference"} | fields)

    chosen = [pupil_of(sgd, partial(taught, each=-(-sgd.times[-1] // m)), kind="ordinary")]
    chosen += [pupil_of(base, taught) for base in (bayes, *metas)]
    own = [pupil_of(base, through) for base in (bayes, *metas)]
    for meta in metas:
        names = {"name": f"bayes_by_{meta.name}", "label": f"{bayes.label}, by {meta.label}"}
        own.append(pupil_of(meta, partial(through, pupil=bayes.learner), drawn=False, **names))
    return chosen, own


def plan(config: Config) -> md.Plan:
    """Plans linear regression with its pupils, and the bandit with both kinds of feedback."""
    sizes, bandit = config.measure, config.bandit
    untracked = dataclasses.replace(sizes, tracked_tasks=0, heldout_tasks=0)
    base, metas = config.contenders("linear")
    tasks = config.linear.evaluation(sizes.probe_points)
    many = sizes.sized(tasks, kinds=("ordinary", "reference"))
    sets = teaching.taught_sets(many, "random", "bayes", "least")
    fewer = sizes.sized(tasks, "shifted_tasks")  # as these lessons cost more
    (few,) = teaching.taught_sets(fewer, "own")
    chosen, own = pupils(config, base.contenders[0], base.bayes, metas)
    changes = {"contenders": [*metas, *chosen, base.bayes], "sets": sets, "measure": untracked}
    changes["pairs"] = [(few, contender) for contender in own]
    linear = base.alone("linear", "linear regression", **changes)
    base, metas = config.contenders("bandit")
    rewards = sizes.sized(bandit.evaluation(), name="rewards")
    demonstrated = as_subclass(bandit, teaching.DemonstratedBandit)
    sets = [rewards, dataclasses.replace(rewards, name="demonstrations", domain=demonstrated)]
    changes |= {"contenders": [base.contenders[0], *metas, base.bayes], "sets": sets, "pairs": ()}
    return md.Plan(config.outer, [linear, base.alone("bandit", "contextual bandit", **changes)])


def criteria(config: Config, results):
    """Yields teaching gain, control of the order and transfer; demonstrations against rewards."""
    m, errors = config.examples, lambda *key: dynamics.samples(results[key], "error")
    ratio_after = lambda a, b: a[..., m] / b[..., m]
    for learner in ("bayes", *config.learners, "sgd"):
        pupil = f"taught_{learner}"
        times = results["random", pupil]["time"].to_numpy()
        end, bounds = m, {"at_least": 1.0, "surely": True}
        if learner == "sgd":  # it is shown each example for many updates
            end, bounds = int(times[-1]), {}
        for name in ("bayes", "own"):
            if (name, pupil) in results:
                gain_of = partial(teaching.gain, times, end)
                pair = dynamics.on_common_tasks(errors("random", pupil), errors(name, pupil))
                gain = dynamics.estimate(gain_of, *pair)
                text = f"{learner}, {SETS[name]}: random steps (of {times[-1]:g}) over taught ones,"
                text += " to equal error"
                yield md.criterion(f"{learner}_{name}_gain", gain, text, **bounds)
        for name, sign in (("bayes", -1), ("least", 1)):
            data = results[name, pupil]
            order, t = sign * np.array(trajectories.modes(data).values), dynamics.times_of(data)
            rank_correlation = lambda mean, x=order, t=t: dynamics.rank_correlation(x, t(mean))
            correlation = dynamics.estimate(rank_correlation, dynamics.strength(data))
            text = f"{learner}, {SETS[name]}: rank correlation of modes' times with the order"
            text += " taught"
            yield md.criterion(f"{learner}_{name}_control", correlation, text, at_least=0.9)
        if learner in config.learners:
            pair = dynamics.on_common_tasks(errors("bayes", pupil), errors("own", pupil))
            ratio = dynamics.estimate(ratio_after, *pair)
            text = f"{learner}: error after the set made for Bayes over that after its own"
            yield md.criterion(f"{learner}_transfer", ratio, text)
            pair = errors("own", f"bayes_by_{learner}"), errors("bayes", "taught_bayes")
            ratio = dynamics.estimate(ratio_after, *dynamics.on_common_tasks(*pair))
            text = f"Bayes: error after the set made through {learner} over that after its own"
            yield md.criterion(f"bayes_transfer_{learner}", ratio, text)
    for learner, rewards in results.learners("rewards").items():
        t, pair = dynamics.times_of(rewards), (results[name, learner] for name in FEEDBACK)
        means = (dynamics.samples(data, STRENGTH).mean(-1, keepdims=True) for data in pair)
        ratio_of_times = lambda a, b, t=t: (t(a) / t(b))[..., 0]
        text = f"{trajectories.about(rewards).label}: steps by rewards over steps by demonstrations"
        text += f", to a mean of {trajectories.modes(rewards).p:g} of the correct action"
        ratio = dynamics.estimate(ratio_of_times, *means)
        yield md.criterion(f"{learner}_communication", ratio, text, at_least=1.0, surely=True)


def by_learner(sets, reading: str, label: str, style, results):
    """Draws a reading over time: one panel per learner, one curve per set of tasks."""
    learners = results.learners(next(iter(sets)), drawn=True)
    figure, axes = figures.grid(len(learners), label, width=3.6, height=3.4)
    for axis, (learner, data) in zip(axes, learners.items(), strict=True):
        for (name, title), colour in zip(sets.items(), figures.COLOURS, strict=False):
            if (name, learner) in results:
                values = dynamics.samples(results[name, learner], reading)
                mean = values.reshape(*values.shape[:3], -1).mean(-1)  # over contexts in the bandit
                curve = dynamics.estimate(np.asarray, mean)
                figures.curve(axis, data["time"].to_numpy(), curve, title, colour)
        about = trajectories.about(data)
        scale = "log" if about.clock == "updates" else "linear"
        axis.set(title=about.label, xlabel=about.clock, xscale=scale, **style)
    figures.legend_below(axes[-1])
    return figure


ERROR = partial(by_learner, SETS, "error", "error ‖Ŵ − W‖² / ‖W‖²", {"yscale": "log"})
PROB = partial(by_learner, FEEDBACK, STRENGTH, "probability of correct action", {"ylim": (0, 1.05)})
QUICK = Config(
    linear=LinearRegression(n_x=3, n_y=3),
    bandit=ContextualBandit(contexts=2, actions=3, steps=12),
    examples=3,
    descent=10,
    outer=md.OuterConfig(steps=500, seeds=3, learning_rate=3e-2, warmup=50, checkpoints=1),
    measure=md.MeasureConfig(tasks=1024, updating_tasks=32, shifted_tasks=64, probe_points=16),
)
WORKSTATION = Config(
    of="workstation",
    learners=("lstm", "gru", "transformer", "maml"),
    outer=md.OuterConfig(steps=4000, learning_rate=2e-2, checkpoints=1),
    measure=md.MeasureConfig(tasks=2048, updating_tasks=64, shifted_tasks=64),
)
PAPER = Config(
    **paper(50_000, batch=256), of="paper", measure=md.MeasureConfig(tasks=8192, probe_points=64)
)
study = md.Study(
    "teaching",
    {"quick": QUICK, "workstation": WORKSTATION, "paper": PAPER},
    plan,
    criteria,
    {"error": ERROR, "mode_strength_least": figures.strengths_on("least"), "communication": PROB},
    section="ours",
    closed="it makes examples through each; choose them by --learners",
    claims={
        "error": {
            "bayes_bayes_gain": "Examples along the singular vectors teach Bayes in fewer steps "
            "than random ones (ours)",
            "lstm_bayes_gain": "What is made for Bayes teaches a meta-trained LSTM too (ours)",
        },
        "mode_strength_least": {
            "lstm_least_control": "Taught the least mode first, the LSTM learns it first (ours)"
        },
        "communication": {
            "lstm_communication": "Demonstrations teach the LSTM sooner than rewards (ours)"
        },
    },
)
