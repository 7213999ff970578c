"""Teaching: examples made for Bayes, made by gradient through a learner, and drawn at random.

    metadyn run teaching [--preset quick|workstation|paper] [--learners NAME …] [overrides]

In linear regression a teacher who knows W chooses the first inputs of an episode (Zhu 2013; Liu &
Zhu 2015); random ones follow. Measured are the teaching gain, whether modes are learned in the
order taught, and what a set made for one learner does for another. In the bandit, demonstrations of
the correct action stand against rewards (Ho et al. 2018). All are trained on random episodes alone.
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
"""Sets of tasks in linear regression and in the bandit, and what figures call them."""


@dataclasses.dataclass(frozen=True)
class Config(LearnersConfig):
    """Everything the study depends on, beside its seed. Values are our choice."""

    linear: LinearRegression = LinearRegression()
    bandit: ContextualBandit = ContextualBandit()
    examples: int = 5
    """Examples that are taught in an episode; SGD is shown each for as many of its updates."""
    descent: int = 20
    """Gradient steps in which a set is made through a learner."""
    rate: float = 0.3
    """Length of the first of them, over the norm of all inputs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "examples", "descent", "rate")
        fix = f"more examples than steps: must be at most linear.steps = {self.linear.steps}"
        check(self.examples <= self.linear.steps, "examples", self.examples, fix)


def pupils(config: Config, sgd, bayes, metas):
    """Returns learners shown random examples or those made for Bayes, and the same shown what is
    made through each; among these is Bayes shown what is made through the others."""
    m, n_x, descent = config.examples, config.linear.n_x, (config.descent, config.rate)
    seen = jnp.asarray(np.random.default_rng(1).standard_normal((32, n_x)), jnp.float32)
    best = partial(teaching.for_bayes, examples=m)
    teachers = [partial(teaching.none, examples=m), best, partial(best, least_first=True)]
    taught = partial(teaching.taught, teachers=teachers, n_x=n_x, examples=m)

    def through(learner, pupil=None):
        teacher = lambda task: teaching.through(learner, task, best(task), seen, *descent)
        return taught(pupil or learner, teachers=[teacher])

    def each(of, taught, **fields):
        return of.remade(taught, **{"name": f"taught_{of.name}", "kind": "reference"} | fields)

    chosen = [each(sgd, partial(taught, each=-(-sgd.times[-1] // m)), kind="ordinary")]
    chosen += [each(of, taught) for of in (bayes, *metas)]
    own = [each(of, through) for of in (bayes, *metas)]
    for of in metas:
        named = {"name": f"bayes_by_{of.name}", "label": f"{bayes.label}, by {of.label}"}
        own.append(each(of, partial(through, pupil=bayes.learner), drawn=False, **named))
    return chosen, own


def plan(config: Config) -> md.Plan:
    """Linear regression with its pupils, and the bandit with either feedback."""
    sizes, bandit = config.measure, config.bandit
    once = dataclasses.replace(sizes, tracked_tasks=0, heldout_tasks=0)
    base, metas = config.contenders("linear")
    tasks = config.linear.evaluation(sizes.probe_points)
    all_of_them = sizes.sized(tasks, kinds=("ordinary", "reference"))
    sets = teaching.sets(all_of_them, "random", "bayes", "least")
    (few,) = teaching.sets(sizes.sized(tasks, "shifted_tasks"), "own")  # fewer: it is dear
    taught, through = pupils(config, base.contenders[0], base.bayes, metas)
    changes = {"contenders": [*metas, *taught, base.bayes], "sets": sets, "measure": once}
    changes["pairs"] = [(few, each) for each in through]
    linear = base.alone("linear", "linear regression", **changes)
    base, metas = config.contenders("bandit")
    rewards = sizes.sized(bandit.evaluation(), name="rewards")
    shown = as_subclass(bandit, teaching.DemonstratedBandit)
    sets = [rewards, dataclasses.replace(rewards, name="demonstrations", domain=shown)]
    changes |= {"contenders": [base.contenders[0], *metas, base.bayes], "sets": sets, "pairs": ()}
    return md.Plan(config.outer, [linear, base.alone("bandit", "contextual bandit", **changes)])


def criteria(config: Config, results):
    """Teaching gain, control of the order and transfer; demonstrations against rewards."""
    m, error = config.examples, lambda *pair: dynamics.samples(results[pair], "error")
    after = lambda a, b: a[..., m] / b[..., m]
    for who in ("bayes", *config.learners, "sgd"):
        pupil = f"taught_{who}"
        times = results["random", pupil]["time"].to_numpy()
        end, bound = m, {"at_least": 1.0, "surely": True}
        if who == "sgd":  # needs updates rather than examples
            end, bound = int(times[-1]), {}
        for name in ("bayes", "own"):
            if (name, pupil) in results:
                gain = partial(teaching.gain, times, end)
                both = dynamics.on_common_tasks(error("random", pupil), error(name, pupil))
                found = dynamics.estimate(gain, *both)
                said = f"{who}, {SETS[name]}: random steps (of {times[-1]:g}) over taught ones, to"
                said += " equal error"
                yield md.criterion(f"{who}_{name}_gain", found, said, **bound)
        for name, sign in (("bayes", -1), ("least", 1)):
            of = results[name, pupil]
            place, t = sign * np.array(trajectories.modes(of).values), dynamics.times_of(of)
            ranks = lambda mean, x=place, t=t: dynamics.rank_correlation(x, t(mean))
            found = dynamics.estimate(ranks, dynamics.strength(of))
            said = f"{who}, {SETS[name]}: rank correlation of modes' times with the order taught"
            yield md.criterion(f"{who}_{name}_control", found, said, at_least=0.9)
        if who in config.learners:
            both = dynamics.on_common_tasks(error("bayes", pupil), error("own", pupil))
            found = dynamics.estimate(after, *both)
            said = f"{who}: error after the set made for Bayes over that after its own"
            yield md.criterion(f"{who}_transfer", found, said)
            both = error("own", f"bayes_by_{who}"), error("bayes", "taught_bayes")
            both = dynamics.on_common_tasks(*both)
            said = f"Bayes: error after the set made through {who} over that after its own"
            yield md.criterion(f"bayes_transfer_{who}", dynamics.estimate(after, *both), said)
    for who, rewards in results.learners("rewards").items():
        t, both = dynamics.times_of(rewards), (results[name, who] for name in FEEDBACK)
        both = (dynamics.samples(each, STRENGTH).mean(-1, keepdims=True) for each in both)
        ratio = lambda a, b, t=t: (t(a) / t(b))[..., 0]
        said = (
            f"{trajectories.about(rewards).label}: steps by rewards over steps by demonstrations,"
        )
        said += f" to a mean of {trajectories.modes(rewards).p:g} of the correct action"
        found = dynamics.estimate(ratio, *both)
        yield md.criterion(f"{who}_communication", found, said, at_least=1.0, surely=True)


def by_learner(sets, reading: str, label: str, style, results):
    """Draws a reading of each learner (panels) against its steps, one curve for a set of tasks."""
    learners = results.learners(next(iter(sets)), drawn=True)
    figure, axes = figures.grid(len(learners), label, width=3.6, height=3.4)
    for axis, (who, data) in zip(axes, learners.items(), strict=True):
        for (name, said), colour in zip(sets.items(), figures.COLOURS, strict=False):
            if (name, who) in results:
                each = dynamics.samples(results[name, who], reading)
                mean = each.reshape(*each.shape[:3], -1).mean(-1)  # over contexts, if there are any
                found = dynamics.estimate(np.asarray, mean)
                figures.curve(axis, data["time"].to_numpy(), found, said, colour)
        about = trajectories.about(data)
        scale = "log" if about.clock == "updates" else "linear"
        axis.set(title=about.label, xlabel=about.clock, xscale=scale, **style)
    figures.legend_below(axes[-1])
    return figure


ERROR = partial(by_learner, SETS, "error", "error ‖Ŵ − W‖² / ‖W‖²", {"yscale": "log"})
TOLD = partial(by_learner, FEEDBACK, STRENGTH, "probability of correct action", {"ylim": (0, 1.05)})
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
    {"error": ERROR, "mode_strength_least": figures.strengths_on("least"), "communication": TOLD},
    section="ours",
    closed="what is taught is made through each of them; --learners chooses these",
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
