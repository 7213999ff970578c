"""Teaching: examples made for Bayes, made by gradient through a learner, and drawn at random.

    metadyn run teaching [--preset quick|paper] [--learners lstm …] [--out DIR] [overrides]

In linear regression a teacher who knows W chooses the first inputs of an episode (Zhu 2013; Liu &
Zhu 2015); they are answered with noise, as ever, and random ones follow. Measured are the teaching
gain, whether the teacher controls the order in which modes are learned, and what a set made for one
learner does for another. In the bandit, demonstrations of the correct action stand against rewards
(Ho et al. 2018). Meta-learners are trained on random episodes alone.
"""

import dataclasses
from functools import partial
from typing import get_args

import jax.numpy as jnp
import numpy as np

import metadyn as md
from metadyn import dynamics, figures, labelled, teaching
from metadyn.base import STRENGTH, variant
from metadyn.domains.bandit import ContextualBandit
from metadyn.domains.linear import LinearRegression
from metadyn.errors import check, check_positive
from metadyn.inner import log_spaced
from metadyn.study import Network, claims, paper

STUDIES = {name: md.load_study(name) for name in ("linear_regression", "contextual_bandit")}
NETWORKS = get_args(Network)
DESCENTS = ("maml", "learned_optimizer")
"""Those that cannot serve in the bandit."""
SETS = {
    "random": "random examples",
    "bayes": "made for Bayes",
    "least": "made for Bayes, least mode first",
    "own": "made through the learner",
}
FEEDBACK = ("rewards", "demonstrations")


@dataclasses.dataclass(frozen=True)
class Config(md.StudyConfig):
    """Everything the study depends on, beside its seed. Values are our choice."""

    linear: LinearRegression = LinearRegression()
    bandit: ContextualBandit = ContextualBandit()
    of: str = "quick"
    """The preset of the domains' own studies, for the ordinary learners and the objectives."""
    learners: tuple[str, ...] = NETWORKS
    """The meta-learners that are trained and taught."""
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
        right = self.learners and set(self.learners) <= set(NETWORKS)
        check(right, "learners", self.learners, f"choose from {', '.join(NETWORKS)}")

    def base(self, study: str, meta: str, domain) -> md.Comparison:
        """What a domain's own study compares, with a meta-learner of choice."""
        fields = self.common() | {"domain": domain, "meta": meta}
        return STUDIES[study].comparison(self.of, **fields)


def pupils(config: Config, sgd, bayes, metas) -> list[md.Contender]:
    """SGD, Bayes and meta-learners, each taught every set; Bayes those made through others too."""
    m, n_x, found = config.examples, config.linear.n_x, []
    for_bayes = partial(teaching.for_bayes, examples=m)
    teachers = {"random": None, "bayes": for_bayes, "least": partial(for_bayes, least_first=True)}
    seen = jnp.asarray(np.random.default_rng(1).standard_normal((32, n_x)), jnp.float32)
    taught = partial(teaching.taught, n_x=n_x, examples=m)
    each = max(sgd.times[-1] // m, 1)
    times = log_spaced(m * each, len(sgd.times))

    def through(learner, task):
        start = for_bayes(task)
        return teaching.through(learner, task, start, seen, config.descent, config.rate)

    def add(name, label, learner, kind="reference", **more):
        found.append(md.Contender(name, label, learner, kind, **more))

    for name, teacher in teachers.items():
        descent = taught(sgd.learner, teacher, each=each)
        add(f"sgd_{name}", f"{sgd.label}\n{SETS[name]}", descent, "ordinary", times=times)
    for name, teacher in (teachers | {"own": partial(through, bayes.learner)}).items():
        add(f"bayes_{name}", f"{bayes.label}\n{SETS[name]}", taught(bayes.learner, teacher))
    for meta in metas:
        made = {name: partial(taught, teacher=teacher) for name, teacher in teachers.items()}
        made["own"] = lambda learner: taught(learner, partial(through, learner))
        made["for_bayes"] = lambda learner: taught(bayes.learner, partial(through, learner))
        for name, make in made.items():
            learner = md.Derived(meta.learner, lambda p, f=make, g=meta.make: f(g(p)))
            label = f"{meta.label}\n{SETS.get(name, 'its set for Bayes')}"
            add(f"{meta.name}_{name}", label, learner, of=meta.name)
    return found


def plan(config: Config) -> md.Plan:
    """Linear regression with its pupils, and the bandit with either feedback."""
    sizes, domain, bandit = config.measure, config.linear, config.bandit
    bases = [config.base("linear_regression", meta, domain) for meta in config.learners]
    metas, base = [each.metas[0] for each in bases], bases[0]
    tasks = sizes.sized(domain.evaluation(sizes.probe_points), name="taught")
    probes = {STRENGTH: teaching.with_error(tasks.probes[STRENGTH])}
    shown = {"domain": variant(domain, teaching.OpenRegression), "probes": probes}
    sets = [dataclasses.replace(tasks, kinds=("ordinary", "reference"), **shown)]
    contenders = [*metas, *pupils(config, base.contenders[0], base.bayes, metas), base.bayes]
    changes = {"contenders": contenders, "sets": sets, "followed": False}
    parts = [base.alone("linear", "linear regression", **changes)]
    able = [meta for meta in config.learners if meta not in DESCENTS] or ["lstm"]
    bases = [config.base("contextual_bandit", meta, bandit) for meta in able]
    rewards = sizes.sized(bandit.evaluation(), name=FEEDBACK[0])
    shown = {"domain": variant(bandit, teaching.DemonstratedBandit)}
    sets = [rewards, dataclasses.replace(rewards, name=FEEDBACK[1], **shown)]
    contenders = [bases[0].contenders[0], *(each.metas[0] for each in bases), bases[0].bayes]
    changes = {"contenders": contenders, "sets": sets, "followed": False}
    return md.Plan(config.outer, [*parts, bases[0].alone("bandit", "contextual bandit", **changes)])


def criteria(config: Config, results):
    """Teaching gain, control of the order and transfer; demonstrations against rewards."""
    data, m = results.learners("taught"), config.examples
    error = lambda name: dynamics.samples(data[name], "error")
    after = lambda a, b: a[..., m] / b[..., m]
    for who in ("bayes", *config.learners, "sgd"):
        times = data[f"{who}_random"]["time"].to_numpy()
        gain = partial(teaching.gain, times, m if who != "sgd" else int(times[-1]))
        bound = {"at_least": 1.0, "surely": True} if who != "sgd" else {}
        for row in [row for row in (f"{who}_bayes", f"{who}_own") if row in data]:
            found = dynamics.estimate(gain, error(f"{who}_random"), error(row))
            said = f"{row}: random steps over taught ones, to equal error" + "; above 1" * bool(
                bound
            )
            yield md.criterion(f"{row}_gain", found, said, **bound)
        for name, sign in (("bayes", -1), ("least", 1)):
            of = data[f"{who}_{name}"]
            place, t = sign * np.array(labelled.modes(of).values), dynamics.times_of(of)
            ranks = lambda mean, x=place, t=t: dynamics.rank_correlation(x, t(mean))
            found = dynamics.estimate(ranks, dynamics.strength(of))
            said = f"{who}, {SETS[name]}: modes are learned in the order taught, correlation 1"
            yield md.criterion(f"{who}_{name}_control", found, said, at_least=0.9)
        if who in config.learners:
            found = dynamics.estimate(after, error(f"{who}_bayes"), error(f"{who}_own"))
            said = f"{who}: error after the set made for Bayes over that after its own"
            yield md.criterion(f"{who}_transfer", found, said)
            found = dynamics.estimate(after, error(f"{who}_for_bayes"), error("bayes_bayes"))
            said = f"Bayes: error after the set made through {who} over that after its own"
            yield md.criterion(f"bayes_transfer_{who}", found, said)
    both = [results.learners(name, "ordinary", "meta", "bayes") for name in FEEDBACK]
    for who, rewards in both[0].items():
        times, p = rewards["time"].to_numpy(), labelled.modes(rewards).p
        reached = lambda mean, t=times, p=p: dynamics.learning_times(t, mean.mean(-1)[..., None], p)
        ratio = lambda a, b, f=reached: (f(a) / f(b))[..., 0]
        found = dynamics.estimate(ratio, *(dynamics.strength(each[who]) for each in both))
        said = f"{labelled.about(rewards).label}: steps by rewards over steps by demonstrations"
        said += f" to a mean of {p:g} of the correct action, above 1"
        yield md.criterion(f"{who}_communication", found, said, at_least=1.0, surely=True)


@figures.styled
def by_learner(panels, reading: str, label: str, **style):
    """Draws a reading of each learner (panels) against its steps, one curve for what it is told."""
    figure, axes = figures.grid(len(panels), label, width=4.2)
    for axis, told in zip(axes, panels, strict=True):
        for (name, data), colour in zip(told.items(), figures.COLOURS, strict=False):
            mean = (lambda x: x.mean(-1)) if reading == STRENGTH else np.asarray
            found = dynamics.estimate(mean, dynamics.samples(data, reading))
            figures.curve(axis, data["time"].to_numpy(), found, name, colour)
        about = labelled.about(data)
        scale = "log" if about.clock == "updates" else "linear"
        axis.set(title=about.label.split("\n")[0], xlabel=about.clock, xscale=scale, **style)
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def error(results):
    """Draws the error of each learner by what it is taught."""
    data = results.learners("taught")
    whose = [name.removesuffix("_random") for name in data if name.endswith("_random")]
    panels = [
        {said: data[f"{who}_{kind}"] for kind, said in SETS.items() if f"{who}_{kind}" in data}
        for who in whose
    ]
    return by_learner(panels, "error", "error ‖Ŵ − W‖² / ‖W‖²", yscale="log")


def communication(results):
    """Draws the probability of the correct action, mean over contexts, by what is told."""
    shown = results.learners("rewards", drawn=True)
    panels = [{told: results[told, who] for told in FEEDBACK} for who in shown]
    label = "mean probability of the\ncorrect action"
    return by_learner(panels, STRENGTH, label, ylim=(0, 1.05))


def order(results):
    """Draws the strength of each mode when the least mode is taught first."""
    data = results.learners("taught")
    return figures.mode_strength({n: each for n, each in data.items() if n.endswith("_least")})


QUICK = Config(
    linear=LinearRegression(n_x=3, n_y=3),
    bandit=ContextualBandit(contexts=3, actions=3, steps=20),
    learners=("lstm", "maml"),
    examples=3,
    outer=md.OuterConfig(steps=1500, learning_rate=3e-2, warmup=100, checkpoints=6),
    measure=md.MeasureConfig(
        tasks=1024, updating_tasks=32, tracked_tasks=64, heldout_tasks=512, probe_points=16
    ),
)
PAPER = Config(
    **paper(50_000, batch=256),
    of="paper",
    measure=md.MeasureConfig(tasks=8192, tracked_tasks=1024, heldout_tasks=8192, probe_points=64),
)
study = md.Study(
    "teaching",
    {"quick": QUICK, "paper": PAPER},
    plan,
    criteria,
    {"error": error, "mode_strength_least": order, "communication": communication},
    section="ours",
    claims=claims(
        error={
            "bayes_bayes_gain": "Examples along the singular vectors teach Bayes in fewer steps "
            "than random ones (ours)",
            "lstm_bayes_gain": "What is made for Bayes teaches a meta-trained LSTM too (ours)",
        },
        mode_strength_least={
            "lstm_least_control": "Taught the least mode first, the LSTM learns it first (ours)"
        },
        communication={
            "lstm_communication": "Demonstrations teach the LSTM sooner than rewards (ours)"
        },
    ),
)
