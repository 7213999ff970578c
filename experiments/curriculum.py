"""Curricula: inputs made for the modes of a task, and modes that outer training admits in order.

    metadyn run curriculum [--preset quick|paper] [--meta lstm|gru|…] [--out DIR] [overrides]

Inner: in linear regression, inputs whose variance along mode k is λ_k ∝ 1 / s_k at the same trace.
From a small start gradient descent learns mode k after a time ∝ 1 / (s_k λ_k) (Saxe et al. 2013,
arXiv:1312.6120, with inputs that are not whitened): so it learns all at once. Outer: frequencies
and contexts that are missing from training until the outer step at which plain training was
half-way to Bayes in them; against the same in reverse, mixed (Zaremba & Sutskever 2014,
arXiv:1410.4615), and none.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import metadyn as md
from metadyn import dynamics, figures, labelled
from metadyn.domains.bandit import ContextualBandit
from metadyn.domains.fourier import FourierRegression, band
from metadyn.domains.linear import LinearRegression
from metadyn.errors import check
from metadyn.learners.lstm import LSTMConfig
from metadyn.study import HELDOUT, TRACKED, censored, claims

TITLES = {
    "linear": "linear regression",
    "nonlinear": "nonlinear regression",
    "bandit": "contextual bandit",
}
STUDIES = {name: md.load_study(title.replace(" ", "_")) for name, title in TITLES.items()}
INPUTS = {"isotropic": "isotropic inputs", "tilted": "inputs of variance ∝ 1 / s_k"}
ARMS = {
    "none": "all from the start",
    "measured": "in the measured order",
    "mixed": "mixed",
    "reversed": "in reverse",
}
"""The curricula. Contexts are alike, so that in reverse theirs is the same."""


@dataclasses.dataclass(frozen=True)
class Config(md.StudyConfig):
    """Everything the study depends on, beside its seed. Values are our choice, but for the steps.

    The steps are the reported nonlinear_n_k and bandit_n_k of a run of the same preset, in order:
    they come from its plain training, which no curriculum changes.
    """

    linear: LinearRegression = LinearRegression()
    nonlinear: FourierRegression = FourierRegression()
    bandit: ContextualBandit = ContextualBandit()
    of: str = "quick"
    """The preset of the domains' own studies, for the ordinary learner and the objectives."""
    learners: tuple[str, ...] = ("lstm", "maml")
    """The meta-learners that are given the inner curriculum."""
    nonlinear_steps: tuple[int, ...] = (330, 750, 1100, 1600, 2500)
    """Outer steps from which frequencies are there, in order; the first is from the start."""
    bandit_steps: tuple[int, ...] = (510, 610, 640, 670, 840)
    """Outer steps from which contexts are there, likewise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        count = {"nonlinear": len(self.nonlinear.support), "bandit": self.bandit.contexts}
        for name, modes in count.items():
            field, steps = f"{name}_steps", getattr(self, f"{name}_steps")
            check(len(steps) == modes, field, steps, f"give one for each of the {modes} modes")
            check(list(steps) == sorted(steps) and steps[0] >= 0, field, steps, "must increase")
            end = self.outer.steps
            fix = f"a mode is never admitted: must be below outer.steps = {end}"
            check(steps[-1] < end, field, steps, fix)

    def base(self, name: str, meta: str) -> md.Comparison:
        """What a domain's own study compares, with a meta-learner of choice."""
        fields = self.common() | {"domain": getattr(self, name), "meta": meta}
        return STUDIES[name].comparison(self.of, **fields)


class Tilted(LinearRegression):
    """Linear regression whose inputs have covariance V diag(λ) Vᵀ, λ_k ∝ 1 / s_k, of trace K.

    For evaluation tasks alone, whose modes are known. Directions beyond them keep variance 1.
    """

    def query(self, task, key):
        """Draws x ~ N(0, V diag(λ) Vᵀ)."""
        isotropic = super().query(task, key)
        stretched = (jnp.sqrt(variances(task.s)) - 1) * (task.V.T @ isotropic)
        return isotropic + task.V @ stretched


def variances(s):
    """λ_k ∝ 1 / s_k, of mean 1."""
    return 1 / (s * (1 / s).mean())


@dataclasses.dataclass(frozen=True, eq=False)
class Admission:
    """Which modes an episode has, at one outer step of a curriculum."""

    steps: tuple[int, ...]
    """The outer step from which each mode is there."""
    mixed: bool
    """Whether each episode takes its modes from a step of its own, drawn evenly from those before
    the last mode is there: the same exposure to each mode, in no order."""
    now: Any

    def __call__(self, key):
        """Whether each mode is there [K], in the episode of a key."""
        end = max(*self.steps, 1)
        drawn = jax.random.randint(jax.random.fold_in(key, 1), (), 0, end)
        now = jnp.where(self.mixed & (self.now < end), drawn, self.now)
        return now >= jnp.array(self.steps)


@dataclasses.dataclass(frozen=True, eq=False)
class SomeFrequencies(FourierRegression):
    """Functions that lack the frequencies which are not admitted yet; the others are as ever."""

    admission: Any = None

    def sample_task(self, key):
        """Draws the function that training without a curriculum has, and leaves out the rest."""
        kept = jnp.zeros(len(self.spectrum)).at[np.array(self.support)].set(self.admission(key))
        return jax.tree.map(lambda part: kept * part, super().sample_task(key))


@dataclasses.dataclass(frozen=True, eq=False)
class SomeContexts(ContextualBandit):
    """A bandit whose first contexts alone are there, as many as are admitted: (task, number)."""

    admission: Any = None

    def sample_task(self, key):
        """Draws the correct actions of all contexts."""
        return super().sample_task(key), self.admission(key).sum()

    def query(self, task, key):
        """Draws a context, uniformly from those that are there."""
        return jax.random.randint(key, (), 0, task[1])

    def feedback(self, task, query, answer, key):
        """Gives the outcome, as ever."""
        return super().feedback(task[0], query, answer, key)


SOME = {"nonlinear": SomeFrequencies, "bandit": SomeContexts}


def admitting(domain, meta, objective, some, steps, mixed) -> md.Objective:
    """An objective on the modes that are admitted at each outer step."""
    own = {field.name: getattr(domain, field.name) for field in dataclasses.fields(domain)}
    at = lambda now: objective(some(**own, admission=Admission(steps, mixed, now)), meta)
    return dataclasses.replace(objective(domain, meta), at=at)


def outer_curricula(config: Config, name: str) -> md.Comparison:
    """One meta-learner of a domain, trained under each curriculum."""
    base = config.base(name, config.meta)
    (meta,) = base.metas
    steps = (0, *getattr(config, f"{name}_steps")[1:])
    orders = {"measured": (steps, False), "mixed": (steps, True)}
    if name == "nonlinear":
        orders["reversed"] = steps[::-1], False
    trained = [dataclasses.replace(meta, name="none", label=ARMS["none"])]
    for arm, (order, mixed) in orders.items():
        plain = meta.objective or base.objective
        own = partial(admitting, objective=plain, some=SOME[name], steps=order, mixed=mixed)
        trained.append(dataclasses.replace(meta, name=arm, label=ARMS[arm], objective=own))
    changes = {"contenders": [*trained, base.bayes], "followed": False}
    return base.alone(name, TITLES[name], **changes)


def inner_curriculum(config: Config) -> md.Comparison:
    """SGD, meta-learners that know isotropic inputs alone, and Bayes, on either kind of inputs."""
    bases = [config.base("linear", meta) for meta in config.learners]
    domain, first, sizes = config.linear, bases[0], config.measure
    sgd = dataclasses.replace(first.contenders[0], curve=None)
    tasks = domain.evaluation(sizes.probe_points)
    domains = (
        domain,
        Tilted(**{f.name: getattr(domain, f.name) for f in dataclasses.fields(domain)}),
    )
    sets = [
        sizes.sized(tasks, name=name, domain=each)
        for name, each in zip(INPUTS, domains, strict=True)
    ]
    contenders = [sgd, *(base.metas[0] for base in bases), first.bayes]
    return first.alone("linear", TITLES["linear"], contenders=contenders, sets=sets, followed=False)


def plan(config: Config) -> md.Plan:
    """One comparison of each domain."""
    outer = [outer_curricula(config, name) for name in SOME]
    return md.Plan(config.outer, [inner_curriculum(config), *outer])


def criteria(config: Config, results):
    """What either kind of curriculum gains."""
    for learner, plain in results.learners("isotropic").items():
        pair, called = (
            {name: results[name, learner] for name in INPUTS},
            labelled.about(plain).label,
        )
        for name, data in pair.items():
            bounds = {"isotropic": {"at_most": -0.7}, "tilted": {"at_most": 0.2, "at_least": -0.2}}
            judged = bounds[name] if labelled.about(data).kind == "ordinary" else {}
            said = f"{called}, {INPUTS[name]}: slope" + f", {judged}" * bool(judged)
            yield md.criterion(f"{learner}_{name}", dynamics.merit(data), said, **judged)
            yield censored(f"{learner}_{name}", data)
        last = [
            partial(lambda t, mean: t(mean).max(-1), dynamics.times_of(d)) for d in pair.values()
        ]
        gain = lambda a, b, last=last: last[0](a) / last[1](b)
        found = dynamics.estimate(gain, *(dynamics.strength(data) for data in pair.values()))
        theory = variances(np.array(config.linear.spectrum()))[-1]
        said = f"{called}: how many times sooner all is learned; SGD in theory {theory:.3g}"
        yield md.criterion(f"{learner}_gain", found, said)
    for name in SOME:
        yield from outer_gains(config, results, name)


def outer_gains(config: Config, results, name: str):
    """Episodes and seconds to the lowest excess loss that training comes to under all curricula."""
    arms = results.learners(f"{HELDOUT}_{name}", "meta")
    reached = to_equal_excess(arms["none"])
    losses = losses_of(results, name)
    times = dynamics.estimate(lambda *means: reached(*means)[0], *losses)
    gains = dynamics.estimate(lambda *means: (t := reached(*means)[0])[..., :1] / t, *losses)
    level = dynamics.estimate(lambda *means: reached(*means)[1], *losses)
    yield md.criterion(f"{name}_level", level, f"{TITLES[name]}: excess loss that all come to")
    for k, (arm, data) in enumerate(arms.items()):
        taken, gain = (dynamics.Estimate(*(part[k] for part in each)) for each in (times, gains))
        each_step = labelled.about(data).seconds / config.outer.steps
        said = f"{TITLES[name]}, {ARMS[arm]}: {{}} to that excess loss"
        for what, scale in (("episodes", config.outer.batch), ("seconds", each_step)):
            scaled = dynamics.Estimate(*(scale * part for part in taken))
            yield md.criterion(f"{name}_{arm}_{what}", scaled, said.format(what))
        if arm != "none":
            bounds = {"at_most": 1.5, "surely": True} if arm == "measured" else {}
            said = f"{said.format('times fewer episodes')}" + ", at most 1.5" * bool(bounds)
            yield md.criterion(f"{name}_{arm}_gain", gain, said, **bounds)
    trained, bayes = (results[f"{TRACKED}_{name}", who] for who in ("none", "bayes"))
    over = dynamics.over_outer_training(trained, bayes)
    for k, n in enumerate(zip(*dynamics.estimate(dynamics.outer_times_of(trained), *over))):
        said = f"{TITLES[name]}: outer step at which mode {k + 1} is half-way to Bayes, plain"
        yield md.criterion(f"{name}_n_{k + 1}", dynamics.Estimate(*n), said)


def losses_of(results, name: str) -> list[np.ndarray]:
    """Losses under each curriculum [seed, task, outer_step], and Bayes' [1, task]."""
    return [dynamics.episode_loss(d) for d in results.learners(f"{HELDOUT}_{name}").values()]


def to_equal_excess(data):
    """Makes the statistic of mean losses, Bayes' last, that gives outer steps and excess loss.

    They are those until the lowest excess loss so far of each curriculum is down to where all come.
    """
    steps, floor = data["outer_step"].to_numpy(), labelled.about(data).loss_floor

    def statistic(*means):
        excess = [dynamics.excess_loss(loss, means[-1][..., None], floor) for loss in means[:-1]]
        lowest = np.minimum.accumulate(np.stack(excess, -1), -2)
        level = lowest[..., -1, :].max(-1)
        return dynamics.learning_times(steps, level[..., None, None] - lowest, p=0.0), level

    return statistic


def inner(inputs: str):
    """Makes the figure of mode strengths of all learners on one kind of inputs."""
    return lambda results: figures.mode_strength(results.learners(inputs, drawn=True))


@figures.styled
def outer(results):
    """Draws excess loss against outer steps under each curriculum."""
    figure, axes = figures.grid(len(SOME), "excess loss over Bayes", width=5.2)
    for axis, name in zip(axes, SOME, strict=True):
        arms = results.learners(f"{HELDOUT}_{name}", "meta")
        floor, losses = labelled.about(arms["none"]).loss_floor, losses_of(results, name)
        for (arm, data), loss, colour in zip(arms.items(), losses, figures.COLOURS, strict=False):
            over = lambda a, b, f=floor: dynamics.excess_loss(a, b[..., None], f)
            found = dynamics.estimate(over, loss, losses[-1])
            steps = np.maximum(data["outer_step"].to_numpy(), 0.5)
            axis.fill_between(steps, found.low, found.high, color=colour, alpha=0.2, lw=0)
            axis.plot(steps, found.value, color=colour, label=ARMS[arm])
        axis.axhline(
            to_equal_excess(data)(*(each.mean((0, 1)) for each in losses))[1], **figures.LEVEL
        )
        axis.set(title=TITLES[name], xlabel="outer step", xscale="log", yscale="log")
        axis.legend()
    return figure


QUICK = Config(
    linear=LinearRegression(n_x=3, n_y=3),
    nonlinear=FourierRegression(band(1, 3), steps=20),
    bandit=ContextualBandit(contexts=3, actions=3, steps=20),
    nonlinear_steps=(200, 500, 1000),
    bandit_steps=(200, 300, 400),
    outer=md.OuterConfig(steps=4000, learning_rate=1e-2, schedule="constant", warmup=100),
    measure=md.MeasureConfig(
        tasks=2048, updating_tasks=64, tracked_tasks=128, heldout_tasks=1024, probe_points=16
    ),
)
PAPER = Config(
    of="paper",
    lstm=LSTMConfig(hidden=256),
    outer=md.OuterConfig(
        steps=50_000, batch=256, learning_rate=2e-3, schedule="constant", warmup=1000
    ),
    measure=md.MeasureConfig(tasks=16_384, tracked_tasks=1024, heldout_tasks=8192, probe_points=64),
)
study = md.Study(
    "curriculum",
    {"quick": QUICK, "paper": PAPER},
    plan,
    criteria,
    {f"mode_strength_{inputs}": inner(inputs) for inputs in INPUTS} | {"outer": outer},
    section="ours",
    claims=claims(
        mode_strength_tilted={
            "sgd_tilted": "Inputs of variance ∝ 1 / s_k make SGD learn all modes at once (ours)"
        },
        outer={
            f"{name}_measured_gain": "Modes admitted to outer training in its own order save at "
            f"most a third of its episodes: {TITLES[name]} (ours)"
            for name in SOME
        },
    ),
)
