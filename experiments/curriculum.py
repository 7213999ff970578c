"""Curricula: inputs made for the modes of a task, and modes that outer training admits in order.

    metadyn run curriculum [--preset quick|workstation|paper] [--out DIR] [overrides]

Inner curriculum: inputs of linear regression have variance λ_k ∝ 1 / s_k along mode k. From a small
start descent learns mode k in a time ∝ 1 / (s_k λ_k) (after Saxe et al. 2013, arXiv:1312.6120), so
it learns all modes at once. Outer curriculum: frequencies, or contexts, join training at the outer
step at which plain training was half-way to Bayes in them. Other arms use the reverse order, or mix
the stages (Zaremba & Sutskever 2014, arXiv:1410.4615).
"""

import dataclasses
from functools import partial

import numpy as np

import metadyn as md
from metadyn import dynamics, figures, trajectories
from metadyn.base import as_subclass
from metadyn.curriculum import Admission, TiltedRegression, admitting, tilt
from metadyn.errors import check
from metadyn.learners.gradient import random_start
from metadyn.several_domains import SMALL, STUDIES, TITLES, DomainsConfig, LearnersConfig
from metadyn.study import HELDOUT, TRACKED, censored, paper

OUTER = ("nonlinear", "bandit")
INPUTS = {
    "isotropic": ("isotropic inputs", {"at_most": -0.7}),
    "tilted": ("inputs ∝ 1 / s_k", {"at_most": 0.2, "at_least": -0.2}),
}
"""By kind of inputs: the label, and bounds on the slope of gradient descent on them."""
ARMS = {"none": "none", "measured": "measured order", "mixed": "mixed", "reversed": "reverse"}
"""Labels of the outer curricula. Contexts are alike, so the bandit has no "reversed" one."""


@dataclasses.dataclass(frozen=True)
class Config(LearnersConfig, DomainsConfig):
    """All settings of the study, except its seed. Values are our choice, except the steps.

    The quick preset's steps lie within the intervals of nonlinear_n_k and bandit_n_k that it
    reports; plain training does not depend on them. The workstation preset's were reported by
    `outer_loop_dynamics` with an outer loop that brought plain training to the last two frequencies
    9 % sooner. The defaults were reported by that study too, and not fitted to the paper's preset.
    """

    learners: tuple[str, ...] = ("lstm", "maml")
    """The meta-learners that are measured on the inner curriculum."""
    nonlinear_steps: tuple[int, ...] = (330, 750, 1100, 1600, 2500)
    """Outer step at which each frequency joins training. The first always joins at step 0."""
    bandit_steps: tuple[int, ...] = (510, 610, 640, 670, 840)
    """Outer step at which each context joins training. The first always joins at step 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        end, contexts = self.outer.steps, self.bandit.contexts
        for name, modes in (("nonlinear", len(self.nonlinear.support)), ("bandit", contexts)):
            field, steps = f"{name}_steps", getattr(self, f"{name}_steps")
            check(len(steps) == modes, field, steps, f"give a step for each of the {modes} modes")
            check(list(steps) == sorted(steps) and steps[0] >= 0, field, steps, "must increase")
            hint = f"would never admit a mode: must be below outer.steps = {end}"
            check(steps[-1] < end, field, steps, hint)


def outer_curricula(config: Config, name: str) -> md.Comparison:
    """Compares copies of a domain's meta-learner, each trained under another outer curriculum."""
    # Bayes' answers would be wrong targets: they assume tasks with all modes.
    base = config.comparison(name, target="feedback")
    steps = 0, *getattr(config, f"{name}_steps")[1:]
    meta, orders = base.metas[0], {"measured": Admission(steps), "mixed": Admission(steps, True)}
    if name == "nonlinear":
        orders["reversed"] = Admission(steps[::-1])
    plain = meta.objective or base.objective
    staged = {arm: partial(admitting, objective=plain, admission=a) for arm, a in orders.items()}
    metas = [
        dataclasses.replace(meta, name=arm, label=f"curriculum: {ARMS[arm]}", objective=objective)
        for arm, objective in ({"none": plain} | staged).items()
    ]
    return base.alone(name, TITLES[name], contenders=[*metas, base.bayes], followed=False)


def inner_curriculum(config: Config) -> md.Comparison:
    """Compares SGD, Bayes and meta-learners trained on isotropic inputs, on both input kinds."""
    (base, metas), domain, sizes = config.contenders("linear"), config.linear, config.measure
    tasks = sizes.sized(domain.evaluation(sizes.probe_points), name="isotropic")
    sets = [
        tasks,
        dataclasses.replace(tasks, name="tilted", domain=as_subclass(domain, TiltedRegression)),
    ]
    contenders = [dataclasses.replace(base.contenders[0], curve=None), *metas, base.bayes]
    return base.alone("linear", TITLES["linear"], contenders=contenders, sets=sets, followed=False)


def plan(config: Config) -> md.Plan:
    """Returns a comparison of the inner curriculum, and one of the outer curricula per domain."""
    outer = [outer_curricula(config, name) for name in OUTER]
    return md.Plan(config.outer, [inner_curriculum(config), *outer])


def criteria(config: Config, results):
    """Yields criteria on the gains from the inner curriculum and from the outer ones."""
    s, sgd = np.array(config.linear.spectrum()), STUDIES["linear"].presets[config.of].sgd
    times = np.log(s / random_start(sgd.width, sgd.scale) - 1) / s  # Saxe's t_k, up to a factor
    theory = times.max() / (times / tilt(s)).max()
    for learner, isotropic in results.learners("isotropic").items():
        pair, about = [results[name, learner] for name in INPUTS], trajectories.about(isotropic)
        for (name, (inputs, bounds)), data in zip(INPUTS.items(), pair, strict=True):
            text, row = f"{about.label}, {inputs}: slope of log t_k on log s_k", f"{learner}_{name}"
            bounds = bounds if about.kind == "ordinary" else {}
            yield md.criterion(row, dynamics.merit(data), text, **bounds)
            yield censored(row, data)
        times_of = [dynamics.times_of(data) for data in pair]
        ratio = lambda a, b, t=times_of: t[0](a).max(-1) / t[1](b).max(-1)
        gain = dynamics.estimate(ratio, *(dynamics.strength(data) for data in pair))
        text = f"{about.label}: times sooner that all is learned; descent in theory {theory:.3g}"
        yield md.criterion(f"{learner}_gain", gain, text)
    for name in OUTER:
        yield from outer_gains(config, results, name)


def outer_gains(config: Config, results, name: str):
    """Yields each curriculum's cost to reach the lowest excess loss that all of them reach."""
    arms = results.learners(f"{HELDOUT}_{name}", "meta")
    bayes = results[f"{HELDOUT}_{name}", "bayes"]
    level, steps, gains = dynamics.to_equal_excess([*arms.values()], bayes)
    yield md.criterion(f"{name}_level", level, f"{TITLES[name]}: excess loss that all come to")
    for (arm, data), arm_steps, gain in zip(arms.items(), steps, gains, strict=True):
        prefix, row = f"{TITLES[name]}, {ARMS.get(arm, arm)}: ", f"{name}_{arm}"
        seconds = trajectories.about(data).seconds / config.outer.steps
        episodes = config.outer.batch * config.outer.updates_per_step
        for unit, per_step in (("episodes", episodes), ("seconds", seconds)):
            cost = dynamics.Estimate(*(per_step * part for part in arm_steps))
            yield md.criterion(f"{row}_{unit}", cost, f"{prefix}{unit} to that loss")
        bounds = {"at_most": 1.5, "surely": True} if arm == "measured" else {}
        text = prefix + "times fewer episodes than plain training"
        if arm != "none":
            yield md.criterion(f"{row}_gain", gain, text, **bounds)
    plain = (results[f"{TRACKED}_{name}", learner] for learner in ("none", "bayes"))
    for k, n in enumerate(dynamics.outer_times(*plain).split(), 1):
        text = f"{TITLES[name]}: outer step at which mode {k} is half-way to Bayes, plain"
        yield md.criterion(f"{name}_n_{k}", n, text)


def outer(results):
    """Draws excess loss against outer steps under each outer curriculum, one panel per domain."""
    figure, axes = figures.grid(len(OUTER), "excess loss over Bayes", width=5.2)
    for axis, name in zip(axes, OUTER, strict=True):
        arms = results.learners(f"{HELDOUT}_{name}", "meta")
        bayes = results[f"{HELDOUT}_{name}", "bayes"]
        for i, data in enumerate(arms.values()):
            steps = figures.outer_axis(axis, data)
            excess = dynamics.excess_over_bayes(data, bayes)
            label = trajectories.about(data).label
            figures.curve(axis, steps, excess, label, figures.line_colour(i))
        level = dynamics.to_equal_excess([*arms.values()], bayes)[0].value
        axis.axhline(level, **figures.LEVEL_STYLE, label="where they are compared")
        axis.set(title=TITLES[name], yscale="log")
        axis.legend()
    return figure


QUICK = Config(
    **SMALL,
    nonlinear_steps=(270, 980, 1870),
    bandit_steps=(470, 540, 600),
    outer=md.OuterConfig(steps=3000, learning_rate=1e-2, schedule="constant", warmup=100),
    measure=md.MeasureConfig(
        tasks=2048, updating_tasks=64, tracked_tasks=128, heldout_tasks=1024, probe_points=16
    ),
)
WORKSTATION = Config(
    of="workstation",
    nonlinear_steps=(320, 1060, 1660, 2500, 3940),
    bandit_steps=(1220, 1370, 1500, 1620, 1880),
    outer=dataclasses.replace(QUICK.outer, steps=12_000, seeds=8, checkpoints=40),
    measure=md.MeasureConfig(tasks=4096, tracked_tasks=512, heldout_tasks=2048, probe_points=16),
)
PAPER = Config(
    **paper(50_000, batch=256, learning_rate=2e-3, schedule="constant"),
    of="paper",
    measure=md.MeasureConfig(tasks=16_384, tracked_tasks=1024, heldout_tasks=8192, probe_points=64),
)
study = md.Study(
    "curriculum",
    {"quick": QUICK, "workstation": WORKSTATION, "paper": PAPER},
    plan,
    criteria,
    {f"mode_strength_{inputs}": figures.strengths_on(inputs) for inputs in INPUTS}
    | {"outer": outer},
    section="ours",
    claims={
        "mode_strength_tilted": {
            "sgd_tilted": "Inputs of variance ∝ 1 / s_k make SGD learn all modes at once (ours)"
        },
        "outer": {
            f"{name}_measured_gain": "Modes admitted to outer training in its own order save at "
            f"most a third of its episodes: {TITLES[name]} (ours)"
            for name in OUTER
        },
    },
)
