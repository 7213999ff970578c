"""Who else learns all modes at once: eight meta-learners under the same probe, on the same tasks.

    metadyn run learners [--preset quick|workstation|paper] [--out DIR] [overrides]

What is it about meta-learning that removes the staggering: memory, amortisation, or a better start?
Networks with a memory of any kind, gradient descent from a learned start (MAML) and a learned
optimiser are trained on each domain and compared with its ordinary learner and Bayes.
"""

import dataclasses

import jax
import numpy as np

import metadyn as md
from metadyn import dynamics, figures, inner, trajectories
from metadyn.domains.linear import LinearRegression
from metadyn.program_cost import operations
from metadyn.several_domains import (
    EVEN,
    NETWORKS,
    REGRESSION_ONLY,
    SIGN,
    TITLES,
    DomainsConfig,
    LearnersConfig,
)
from metadyn.study import HELDOUT, TRACKED, censored, heldout_excess, paper

STYLES = {
    name: {"fmt": mark, "color": colour, "ms": 8, "capsize": 2}
    for name, mark, colour in zip(
        NETWORKS, "osD^vP*X", (*figures.COLOURS, "black", "#999999"), strict=True
    )
}
OTHER = {"fmt": "h", "color": "#bbbbbb", "ms": 8, "capsize": 2}
"""Style of a learner that a user adds to the study."""
NEAR, WITHIN = 0.3, 0.2
"""Excess loss up to which a learner is near Bayes, and how far it may stagger beyond Bayes."""


@dataclasses.dataclass(frozen=True)
class Config(LearnersConfig, DomainsConfig):
    """All settings of the study, except its seed. Values are our choice."""


def plan(config: Config) -> md.Plan:
    """Returns one comparison per domain: its ordinary learner, all meta-learners and Bayes."""
    comparisons, sizes = [], config.measure
    for name, title in TITLES.items():
        base, metas = config.contenders(name)
        ordinary = dataclasses.replace(base.contenders[0], label="ordinary learner", curve=None)
        tasks = base.domain.evaluation(sizes.probe_points)
        changes = {"sets": [sizes.sized(tasks, "tasks", f"inner_{name}")], "followed": False}
        changes["contenders"] = [ordinary, *metas, base.bayes]
        comparisons.append(base.alone(name, title, **changes))
    return md.Plan(config.outer, comparisons)


def criteria(config: Config, results):
    """Yields how far each learner staggers beyond Bayes, its excess loss and what it costs."""
    near, signs = [], []
    for name in TITLES:
        bayes = results[f"inner_{name}", "bayes"]
        metas = {meta.name: meta for meta in config.contenders(name)[1]}
        for learner, data in results.learners(f"inner_{name}", "ordinary", "meta").items():
            label, row = trajectories.about(data).label, f"{name}_{learner}"
            text = f"{label}: {dynamics.merit_name(data)}"
            yield md.criterion(f"{row}_staggering", dynamics.merit(data), text)
            beyond = dynamics.difference(data, bayes)
            yield md.criterion(f"{row}_beyond", beyond, f"{text} minus Bayes'")
            yield censored(row, data)
            if trajectories.about(data).kind == "meta":
                excess = heldout_excess(results, learner, f"_{name}")
                yield md.criterion(f"{row}_excess", excess, f"excess loss of the {label}")
                if excess.value <= NEAR:
                    near.append((data, bayes))
                    signs.append(SIGN[name])
                seconds = trajectories.about(results[f"{HELDOUT}_{name}", learner]).seconds
                if learner in metas:  # a learner that a user adds is not among them
                    yield from costs(row, getattr(config, name), metas[learner].learner, seconds)
                pair = (results[f"{TRACKED}_{name}", key] for key in (learner, "bayes"))
                text = f"{label}: the same, over outer training"
                yield md.criterion(f"{row}_outer", dynamics.outer_merit(*pair), text)
    text = f"the most that anyone with an excess loss up to {NEAR:g} staggers beyond Bayes"
    largest = lambda beyond: (beyond.T * signs).T.max(0)
    worst = dynamics.differences(near, largest) if near else dynamics.exact(np.nan)
    yield md.criterion("near_bayes_worst", worst, text, at_most=WITHIN)
    if "maml" in config.learners:
        ordinary, *_ = results.learners("inner_linear", "ordinary").values()
        difference = dynamics.difference(results["inner_linear", "maml"], ordinary)
        text = "MAML staggers less than ordinary descent: its slope minus that of descent"
        yield md.criterion("maml_beyond_descent", difference, text, at_least=0.5, surely=True)


def costs(row: str, domain, meta, seconds: float):
    """Yields a learner's parameters, operations per episode and training seconds of all seeds."""
    params = jax.eval_shape(meta.init, jax.random.key(0))

    def episode(params, key):
        return inner.act(domain, meta.learner(params), key)

    keys = jax.random.split(jax.random.key(0), 1)
    pairs = jax.eval_shape(jax.vmap(episode, (None, 0), -1), params, keys)
    count = operations(jax.make_jaxpr(meta.unroll)(params, *pairs).jaxpr)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    for cost, value, text in (
        ("parameters", size, "outer parameters"),
        ("operations", count, "floating-point operations in the answers of an episode"),
        ("seconds", seconds, "seconds of training, of all seeds, as measured in this run"),
    ):
        yield md.criterion(f"{row}_{cost}", dynamics.exact(value), text)


def outer_times(results):
    """Draws the outer step at which each mode is half-way to Bayes, one panel per domain."""
    label = "outer learning time $n_k$\n(outer step half-way to Bayes)"
    figure, axes = figures.grid(len(TITLES), label, width=4.3, height=4.0)
    handles = {}
    for axis, (name, title) in zip(axes, TITLES.items(), strict=True):
        tracked = f"{TRACKED}_{name}"
        modes = trajectories.modes(bayes := results[tracked, "bayes"])
        for learner, data in results.learners(tracked, "meta").items():
            y = dynamics.outer_times(data, bayes)
            style = STYLES.get(learner, OTHER)
            style = style | {"fmt": f"{style['fmt']}-", "lw": 1.2}
            line = axis.errorbar(modes.values, y.value, figures.bars(y), **style)
            handles.setdefault(trajectories.about(data).label, line)
        axis.set(title=title, xlabel=modes.axis, yscale="log")
        axis.set_xticks(modes.values, [f"{value:.3g}" for value in modes.values])
        figures.log_ticks(axis.yaxis)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=11)
    return figure


def slope_against_excess(results):
    """Draws staggering beyond Bayes against excess loss: one point per learner in each domain."""
    figure, axes = figures.grid(len(TITLES), width=4.3, height=4.0)
    handles = {}
    for axis, (name, title) in zip(axes, TITLES.items(), strict=True):
        bayes = results[f"inner_{name}", "bayes"]
        merit, negative = dynamics.merit_name(bayes), "excess below 0"  # has no log
        hidden: dict[str, list[str]] = {f"no {merit}": [], negative: []}
        for learner, data in results.learners(f"inner_{name}", "meta").items():
            x, y = heldout_excess(results, learner, f"_{name}"), dynamics.difference(data, bayes)
            bars = {"xerr": figures.bars(x)[:, None], "yerr": figures.bars(y)[:, None]}
            point = axis.errorbar(x.value, y.value, **bars, **STYLES.get(learner, OTHER))
            handles.setdefault(label := trajectories.about(data).label, point)
            hidden[f"no {merit}"] += [label] * (not np.isfinite(y.value))
            hidden[negative] += [label] * bool(x.value <= 0)
        axis.axhline(0, **figures.LEVEL_STYLE)
        near = axis.axvline(NEAR, color="grey", ls=":", lw=1)
        notes = (f"\n({why}: {', '.join(labels)})" for why, labels in hidden.items() if labels)
        xlabel = "".join(["excess loss over Bayes", *notes])
        axis.set(title=title, xlabel=xlabel, ylabel=f"{merit} minus Bayes'")
        axis.set_xscale("log")
        figures.log_ticks(axis.xaxis)
    handles["near Bayes: to the left"] = near
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, fontsize=11)
    return figure


QUICK = Config(
    **EVEN,
    outer=md.OuterConfig(steps=1000, learning_rate=3e-2, warmup=100, checkpoints=8),
    measure=md.MeasureConfig(
        tasks=1024, updating_tasks=32, tracked_tasks=64, heldout_tasks=512, probe_points=16
    ),
)
WORKSTATION = Config(
    of="workstation",
    linear=LinearRegression(spread="even"),
    outer=md.OuterConfig(steps=1200, learning_rate=2e-2, checkpoints=6),
    measure=md.MeasureConfig(
        tasks=2048, updating_tasks=64, tracked_tasks=128, heldout_tasks=1024, probe_points=16
    ),
)
PAPER = Config(
    **paper(50_000, batch=256),
    of="paper",
    linear=LinearRegression(spread="even"),
    measure=md.MeasureConfig(
        tasks=16_384, updating_tasks=256, tracked_tasks=1024, heldout_tasks=8192, probe_points=64
    ),
)
ROWS = {
    f"{name}_{learner}": f"{title}, {getattr(QUICK, learner).label}"
    for name, title in TITLES.items()
    for learner in NETWORKS
    if name != "bandit" or learner not in REGRESSION_ONLY
}
COLUMNS = {
    "beyond": "staggering minus Bayes'",
    "excess": "excess loss",
    "outer": "over outer training",
    "parameters": "parameters",
    "operations": "operations an episode",
    "seconds": "seconds of training",
}
study = md.Study(
    "learners",
    {"quick": QUICK, "workstation": WORKSTATION, "paper": PAPER},
    plan,
    criteria,
    {f"learners_{name}": figures.strengths_on(f"inner_{name}") for name in TITLES}
    | {"slope_against_excess": slope_against_excess, "outer_times": outer_times},
    section="ours",
    claims={
        "slope_against_excess": {
            "near_bayes_worst": "Whoever comes near Bayes' loss staggers no more than Bayes (ours)"
        },
        "learners_linear": {
            "maml_beyond_descent": "MAML does not stagger as ordinary descent does (ours)"
        },
    },
    tables=[md.Table("Learners: staggering, loss and cost", ROWS, COLUMNS, "slope_against_excess")],
)
