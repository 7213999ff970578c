"""Out of distribution: what keeps a meta-trained learner near Bayes beyond its training tasks.

    metadyn run out_of_distribution [--preset quick|workstation|paper] [--out DIR] [overrides]

Remedies for an LSTM and another network in linear regression: training on a mixture of scales,
feedback divided by its running size, and both. The cost of a remedy in distribution is measured
after equal outer steps; the criterion on seconds says how long each network trained. For effects
of training tasks other than their scale, see `task_diversity`.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

import metadyn as md
from metadyn import dynamics, figures, trajectories
from metadyn.domains.distributions import Mixture
from metadyn.domains.linear import LinearRegression
from metadyn.errors import check, check_positive
from metadyn.learners import bayes
from metadyn.learners.bayes_mixture import bayes_mixture
from metadyn.learners.lstm import LSTMConfig
from metadyn.learners.normalised import Normalised
from metadyn.objectives import prediction_loss
from metadyn.several_domains import REGRESSION_ONLY
from metadyn.study import HELDOUT, Network, heldout_excess, paper

WITHIN, RIGHT = "in_distribution", "bayes_right"
SETS = {WITHIN: (1, 1), "x2": (2, 1), "x4": (4, 1), "x8": (8, 1), "x16": (16, 1), "outsize": (1, 8)}
"""Sets of tasks: factor on the whole spectrum, further factor on its greatest mode."""
OTHER: Network = "deltanet"
"""The second network that is trained, beside the one that `--meta` chooses."""
GROWTH, COST = {"x4": 0.1, "x16": 0.2}, 1.15
"""With both remedies: bounds on the excess's growth, and on its ratio to the plain network's."""


@dataclass(frozen=True)
class Config(md.StudyConfig):
    """All settings of the study, except its seed. Values are our choice."""

    linear: LinearRegression = LinearRegression()
    scales: tuple[float, ...] = (1.0, 8.0)
    """Factors on W in the mixture. Losses are weighted by the inverse square of the factor."""
    other_batch: int = 8
    """Episodes in one outer step of the other network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = len(self.scales) > 0 and all(0 < scale < math.inf for scale in self.scales)
        check(valid, "scales", self.scales, "name at least one, all above 0 and finite")
        check_positive(self, "other_batch")


def plan(config: Config) -> md.Plan:
    """Compares the networks with each remedy, and Bayes under several priors, on the same tasks."""
    hint = f"choose a network with a memory, other than {OTHER}"
    check(config.meta not in (OTHER, *REGRESSION_ONLY), "meta", config.meta, hint)
    domain, sizes, points = config.linear, config.measure, config.measure.probe_points
    scaled = tuple(domain.scaled(scale) for scale in config.scales)
    mixture = Mixture(scaled, tuple(scale**-2.0 for scale in config.scales))
    mixture_bayes = bayes_mixture([bayes.gaussian_linear(d) for d in scaled])
    plain_bayes = bayes.bayes_linear(domain)
    one_scale = partial(prediction_loss, teacher=plain_bayes)
    mixed = partial(prediction_loss, teacher=mixture_bayes, sample=mixture, weight=mixture.weight)
    contenders, sets, pairs = [], [], []
    for name in (config.meta, OTHER):
        plain, network = replace(config, meta=name).meta_learner(domain), getattr(config, name)
        if name == OTHER:
            outer, options = replace(plain.own, batch=config.other_batch), {"batch": "other_batch"}
            plain = replace(plain, own=outer, options={**plain.options, **options})
        normalised = replace(plain, learner=Normalised(domain, network.make))
        remedies = {
            "plain": (plain, one_scale),
            "mixture": (plain, mixed),
            "normalised": (normalised, one_scale),
            "both": (normalised, mixed),
        }
        for remedy in remedies if name == config.meta else ("plain", "both"):
            full_name, (meta, objective) = f"{name}_{remedy}", remedies[remedy]
            meta = replace(meta, name=full_name.removesuffix("_plain"), objective=objective)
            contenders.append(replace(meta, label=f"{network.label}, {remedy}"))
    for task_set, factors in SETS.items():
        sets.append(sizes.sized(domain.evaluation(points, *factors), "shifted_tasks", task_set))
        norms = [math.hypot(*domain.spectrum(*pair)) for pair in (factors, (1, 1))]
        right = bayes.bayes_linear(domain.scaled(norms[0] / norms[1]))  # under this set's prior
        pairs.append((sets[-1], md.Contender(RIGHT, "Bayes, right prior", right, "reference")))
    contenders += [
        md.Contender("bayes", "Bayes, plain training's prior", plain_bayes, "bayes"),
        md.Contender("bayes_mixture", "Bayes, mixture", mixture_bayes, "reference"),
    ]
    comparison = md.Comparison(domain, contenders, sets, pairs, sizes, followed=False)
    return md.Plan(config.outer, [comparison])


def right_excess(results, task_set: str, name: str) -> dynamics.Estimate:
    """Estimates a learner's excess loss over Bayes under the right prior for a set of tasks."""
    return dynamics.excess_over_bayes(results[task_set, name], results[task_set, RIGHT])


def row(data, name: str, estimate: dynamics.Estimate, text: str, at_most: float = math.inf):
    """Returns a criterion whose name and text begin with the learner's name and label."""
    about = trajectories.about(data)
    return md.criterion(f"{about.learner}_{name}", estimate, f"{about.label}: {text}", at_most)


def criteria(config: Config, results):
    """Yields each remedy's gain outside and cost within, and what a wrong prior costs Bayes."""
    plain, bayes_data = (results[HELDOUT, name] for name in (config.meta, "bayes"))
    for name, data in results.learners(WITHIN, "meta").items():
        bounds: dict[str, float] = GROWTH if name.endswith("_both") else {}
        yield row(data, "excess", heldout_excess(results, name), "excess loss within")
        trained = [last.isel(outer_step=-1) for last in (results[HELDOUT, name], plain)]
        seconds = [trajectories.about(last).seconds for last in trained]
        inside = [(last, bayes_data) for last in trained]
        ratio = dynamics.joint_excess(inside, lambda e: e[0] / e[1])
        text = "excess within over the plain network's"
        yield row(data, "cost", ratio, text, COST if name == f"{config.meta}_both" else math.inf)
        ratio = dynamics.exact(seconds[0] / max(seconds[1], 1e-3))
        yield row(data, "seconds", ratio, "seconds of training over the plain network's")
        pairs = {tasks: (results[tasks, name], results[tasks, RIGHT]) for tasks in SETS}
        for shift in [tasks for tasks in SETS if tasks != WITHIN]:
            growth = dynamics.joint_excess([pairs[shift], pairs[WITHIN]], lambda e: e[0] - e[1])
            text = f"growth of the excess over Bayes under the right prior, {shift}"
            yield row(data, f"growth_{shift}", growth, text, bounds.get(shift, math.inf))
    for task_set in SETS:
        for name, data in results.learners(task_set, "bayes", "reference").items():
            if name != RIGHT:
                excess, text = right_excess(results, task_set, name), "excess over the right prior"
                yield row(data, f"{task_set}_over_right", excess, f"{text}, {task_set}")


def excess_by_scale(results):
    """Draws excess loss over Bayes under the right prior against the scale of the tasks."""
    names = [name for name in results.learners(WITHIN) if name != RIGHT]
    figure, (axis,) = figures.grid(min(len(names), 1), width=8.5, height=4.4)
    scales = [*SETS][:-1]  # the last set scales one mode alone
    over = lambda name: dynamics.stacked(right_excess(results, s, name) for s in scales)
    labels = [trajectories.about(results[WITHIN, name]).label for name in names]
    excesses = dynamics.stacked(map(over, names))
    figures.curves(axis, np.arange(len(scales)), excesses, labels, "turbo", marker="o")
    axis.set_yscale("symlog", linthresh=0.1)
    axis.set_yticks([0, 0.1, 1, 10], ["0", "0.1", "1", "10"])
    axis.set_xticks(range(len(scales)), [f"× {SETS[name][0]}" for name in scales])
    axis.set_xlabel("scale of the tasks, over that of plain training")
    axis.set_ylabel("excess loss over Bayes\nunder the right prior")
    figure.legend(loc="outside right center")
    return figure


OUTER = md.OuterConfig(
    steps=2000, batch=48, optimizer="nadam", b2=0.98, learning_rate=3e-2, checkpoints=1
)
QUICK = Config(
    linear=LinearRegression(n_x=3, n_y=3),
    outer=OUTER,
    measure=md.MeasureConfig(
        shifted_tasks=256, tracked_tasks=256, heldout_tasks=256, probe_points=12, chunk=256
    ),
)
WORKSTATION = Config(
    lstm=LSTMConfig(hidden=128),
    outer=replace(OUTER, steps=4000, seeds=6, learning_rate=2e-2),
    measure=md.MeasureConfig(
        shifted_tasks=1024, tracked_tasks=256, heldout_tasks=1024, probe_points=16, chunk=512
    ),
)
PAPER = Config(
    **paper(100_000, batch=1024, checkpoints=10),
    other_batch=1024,
    measure=md.MeasureConfig(shifted_tasks=8192, heldout_tasks=4096, chunk=1024),
)
study = md.Study(
    "out_of_distribution",
    {"quick": QUICK, "workstation": WORKSTATION, "paper": PAPER},
    plan,
    criteria,
    {"excess_by_scale": excess_by_scale},
    section="ours",
    claims={
        "excess_by_scale": {
            "lstm_both_growth_x4": "Ours: a mixture of scales and normalised feedback together "
            "keep an LSTM near Bayes on spectra × 4",
            "lstm_both_growth_x16": "Ours: they do so on spectra × 16, beyond every training scale",
            "lstm_both_cost": "Ours: they cost little on the training distribution",
        }
    },
)
