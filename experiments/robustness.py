"""Robustness: the order of learning by inner and outer optimiser, by hidden width and by noise.

    metadyn run robustness [--preset quick|workstation|paper] [--meta lstm|gru] [overrides]

Rabinowitz (2019), arXiv:1905.01320, says that his findings do not depend on the optimiser. Each
variant changes one setting of an ordinary learner or of an LSTM of 64 units (paper preset: 256).
LSTMs that learn every mode are compared with Bayes, the others counted. For more: `metadyn sweep`.
"""

import dataclasses
from typing import Any

import numpy as np

import metadyn as md
from metadyn import dynamics, figures, sweep, trajectories
from metadyn.domains.linear import LinearRegression
from metadyn.objectives import Target
from metadyn.several_domains import EVEN, SIGN, STUDIES, TITLES, DomainsConfig
from metadyn.study import HELDOUT, TRACKED, censored, paper

ORDINARY = {"linear": "sgd", "nonlinear": "mlp", "bandit": "reinforce_coupled"}
WITHIN = {"linear": 0.2, "nonlinear": 0.3, "bandit": 0.15}
"""How far the LSTM may stagger beyond Bayes: the same bounds as in the domains' own studies."""
OPTIMIZERS = "sgd momentum rmsprop adam"
INNER = {
    "linear": f"--sgd.optimizer {OPTIMIZERS} --sgd.learning-rate 0.05 0.005 1e-3 1e-3"
    " --sgd.updates 3000",
    "nonlinear": f"--mlp.optimizer {OPTIMIZERS} --mlp.learning-rate 0.2 0.02 1e-3 1e-3"
    " --mlp.updates 5000 5000 1000 1500 --mlp.depth 4 --mlp.width 64",
    "bandit": f"--policy.optimizer {OPTIMIZERS} --policy.learning-rate 0.3 0.03 0.01 0.03"
    " --policy.updates {0} {0} {1} {2}",
}
NOISE = {
    "linear": ("noise σ = {}", "--domain.sigma 0.5"),
    "nonlinear": ("noise σ = {}", "--domain.sigma 0.5"),
    "bandit": ("pay with 90% or 10%", "--domain.p-high 0.9 --domain.p-low 0.1 --domain.steps {}"),
}
"""The correct action of the bandit pays with probability `p_high`, any other with `p_low`. "Bayes"
is then Thompson sampling from the exact posterior, and episodes are twice as long."""
VARIED = {"outer": "outer optimiser", "hidden": "hidden width", "noise": "noise"}


@dataclasses.dataclass(frozen=True)
class Config(DomainsConfig):
    """All settings of the study, except its seed. Values are our choice."""

    target: Target = "feedback"
    """What meta-learners are trained to predict in regression: y_t, or Bayes' answer ("bayes")."""
    outer_rates: tuple[float, float, float, float] = (3.0, 1.0, 1e-2, 3e-2)
    """Learning rates of the outer loop under SGD, momentum, RMSprop and Adam."""
    regression_updates: tuple[int, int, int, int] = (1, 1, 1, 1)
    """Updates in each outer step in regression under the same optimisers. SGD needs more."""
    widths: tuple[int, ...] = (32, 128)
    """Numbers of hidden units to try in place of the default."""


def sweeps(config: Config, name: str) -> dict[str, tuple[str, str]]:
    """Returns the label and the options of `metadyn sweep STUDY --zip` for each kind of variant."""
    joined = lambda values: " ".join(map(str, values))
    n = config.domain_config("bandit").policy.updates
    outer = f"--outer.optimizer {OPTIMIZERS} --outer.learning-rate {joined(config.outer_rates)}"
    if name != "bandit":
        outer += f" --outer.updates-per-step {joined(config.regression_updates)}"
    kinds = {
        "inner": ("inner optimiser {}", INNER[name].format(2 * n, n // 3, n // 6)),
        "outer": ("outer optimiser {}", outer),
        "hidden": ("{} hidden units", f"--{config.meta}.hidden {joined(config.widths)}"),
        "noise": (NOISE[name][0], NOISE[name][1].format(2 * config.bandit.steps)),
    }
    return {kind: pair for kind, pair in kinds.items() if kind != "hidden" or config.widths}


def plan(config: Config) -> md.Plan:
    """Returns comparisons of each domain's variants. Those in one comparison get the same tasks."""
    comparisons, sizes = [], config.measure
    for name, title in TITLES.items():
        groups: dict[str, tuple[md.Comparison, list[md.Contender]]] = {}
        default = config.domain_config(name)
        for kind, (label, options) in sweeps(config, name).items():
            for value, changed in sweep.zipped(default, options):
                base = STUDIES[name].plan(changed).comparisons[0]
                varied = ORDINARY[name] if kind == "inner" else config.meta
                (learner,) = (c for c in base.contenders if c.name == varied)
                fields: dict[str, Any] = {"name": f"{kind}_{value}", "curve": None}
                n = changed.outer.updates_per_step
                fields["label"] = label.format(value) + f", {n} updates a step" * (n > 1)
                if kind == "outer":
                    fields |= {"own": changed.outer, "options": {"learning_rate": "outer_rates"}}
                key = {"inner": "inner", "noise": f"{name}_noise_{value}"}.get(kind, name)
                groups.setdefault(key, (base, []))[1].append(dataclasses.replace(learner, **fields))
        base, ordinary = groups.pop("inner")
        ordinary += [base.bayes] if name == "bandit" else []
        size = "tasks" if name == "bandit" else "updating_tasks"  # a bandit's update takes 1 µs
        tasks = sizes.sized(base.domain.evaluation(sizes.probe_points), size, f"inner_{name}")
        sets = [dataclasses.replace(tasks, updating_size=None)]
        comparisons.append(md.Comparison(base.domain, ordinary, sets, measure=sizes, title=title))
        for key, (base, metas) in groups.items():
            comparisons += [base.alone(key, title, contenders=[*metas, base.bayes], followed=False)]
    return md.Plan(config.outer, comparisons)


def measured(results, name: str, *kinds: str) -> dict[str, tuple[Any, Any]]:
    """Returns the data of a domain's variants, and of Bayes or None, from sets of these kinds."""
    rows, prefixes = {}, tuple(f"{kind}_{name}_" for kind in kinds)
    for task_set in sorted(results.sets()):  # "inner_…" first: the ordinary learners
        if f"{task_set}_".startswith(prefixes):
            bayes = results.learners(task_set, "bayes").get("bayes")
            for variant, data in results.learners(task_set, "ordinary", "meta").items():
                row = f"{task_set}_{variant}" if variant in rows else variant  # a user's learner
                rows[row] = data.isel(outer_step=-1, missing_dims="ignore"), bayes
    return rows


def criteria(config: Config, results):
    """Yields criteria on the staggering of each variant, and on the worst of each kind."""
    for name in TITLES:
        for variant, pair in measured(results, name, HELDOUT).items():
            text = f"excess loss over Bayes, {trajectories.about(pair[0]).label}"
            yield md.criterion(f"{name}_{variant}_excess", dynamics.excess_over_bayes(*pair), text)
        rows, bound = measured(results, name, "inner", TRACKED), WITHIN[name]
        merit = ": (t_K - t_1) / t_K" if name == "bandit" else ": slope of log t_k on log scale"
        beyond = {variant: dynamics.difference(*pair) for variant, pair in rows.items()}
        unlearned = {row: censored(f"{name}_{row}", data) for row, (data, _) in rows.items()}
        for variant, (data, bayes) in rows.items():
            text = trajectories.about(data).label + merit + " minus Bayes'" * (bayes is not None)
            yield md.criterion(f"{name}_{variant}_staggering", beyond[variant], text)
        yield from unlearned.values()
        learned = {n for n in rows if unlearned[n].value == 0 and np.isfinite(beyond[n]).all()}
        of_kind = lambda kind, rows=rows: [row for row in rows if row.startswith(kind)]
        smallest = lambda slopes, sign=SIGN[name]: (sign * slopes).min(0)
        least = dynamics.differences([rows[row] for row in of_kind("inner")], smallest)
        text = "the least that it staggers under any optimiser, positive in the expected direction"
        yield md.criterion(f"{name}_inner_optimizers", least, text, at_least=0.0, surely=True)
        for kind in filter(of_kind, VARIED):
            pairs = [rows[row] for row in of_kind(kind) if row in learned]
            count = dynamics.exact(len(of_kind(kind)) - len(pairs))
            text = f"variants of {VARIED[kind]} that do not surely learn every mode"
            yield md.criterion(f"{name}_{kind}_unlearned", count, text, 0.0, surely=True)
            largest = lambda slopes: np.abs(slopes).max(0)
            worst = dynamics.differences(pairs, largest) if pairs else dynamics.exact(np.nan)
            text = f"how far at most variants of {VARIED[kind]} that do stagger from Bayes"
            yield md.criterion(f"{name}_{kind}_worst", worst, text, bound, surely=True)


def robustness(results):
    """Draws how far each variant staggers beyond Bayes: a panel per domain, a row per variant."""
    panels = [[*measured(results, name, "inner", TRACKED).values()] for name in TITLES]
    figure, axes = figures.grid(len(panels), width=5.4, height=1.2 + 0.32 * max(map(len, panels)))
    styles = {"ordinary": ("D", figures.COLOURS[1]), "meta": ("o", figures.COLOURS[0])}
    for axis, title, rows in zip(axes, TITLES.values(), panels, strict=True):
        for i, (data, bayes) in enumerate(rows):
            beyond = dynamics.difference(data, bayes)
            marker, colour = styles[trajectories.about(data).kind]
            style = {"color": colour, "mfc": "white" if censored("", data).value else colour}
            axis.errorbar(beyond.value, i, xerr=figures.bars(beyond)[:, None], fmt=marker, **style)
            if np.isnan(beyond.value):
                axis.text(0, i, " learned too few modes", va="center", color=colour, fontsize=9)
        axis.axvline(0, **figures.LEVEL_STYLE)
        labels = [trajectories.about(data).label for data, _ in rows]
        axis.set_yticks(range(len(rows)), labels, fontsize=9)
        axis.set(title=title, ylim=(max(len(rows), 1) - 0.5, -0.5))
        axis.set_xlabel("slope (meta-learner: minus Bayes')")
    axis.set_xlabel("staggering minus Bayes'")  # the last panel is the bandit's
    markers = [axis.plot([], [], marker, color=colour)[0] for marker, colour in styles.values()]
    labels = "ordinary learner", "meta-learner (hollow: some mode is never learned)"
    figure.legend(markers, labels, loc="outside lower center", ncols=2, fontsize=11)
    return figure


QUICK = Config(
    **EVEN,
    outer=md.OuterConfig(steps=3000, learning_rate=3e-2, schedule="linear", checkpoints=4),
    measure=md.MeasureConfig(2048, 32, tracked_tasks=512, heldout_tasks=512, probe_points=16),
)
WORKSTATION = Config(
    of="workstation",
    linear=LinearRegression(spread="even"),
    target="bayes",
    regression_updates=(2, 1, 1, 3),  # with one of Adam's, nonlinear regression is undecided
    outer=md.OuterConfig(steps=5000, learning_rate=3e-2, schedule="linear", checkpoints=4),
    measure=md.MeasureConfig(4096, updating_tasks=256, tracked_tasks=1024, heldout_tasks=1024),
)
PAPER = Config(
    **paper(50_000, batch=512, checkpoints=4),
    of="paper",
    outer_rates=(1.0, 0.1, 1e-3, 4e-3),
    widths=(64, 128),
    measure=md.MeasureConfig(tracked_tasks=8192, heldout_tasks=8192, probe_points=64),
)
ROWS = {
    f"{name}_{kind}_{value}": f"{title}, {label.format(value)}"
    for name, title in TITLES.items()
    for config in (QUICK, PAPER)
    for kind, (label, words) in sweeps(config, name).items()
    for value in next(iter(sweep.parsed(words.split()).values()))
}
COLUMNS = {"staggering": "staggering", "censored_modes": "unlearned modes", "excess": "excess loss"}
TITLE = "Staggering by optimiser, width and noise; of the LSTM, and in the bandit, minus Bayes'"
SAYS = {"inner_optimizers": "Ordinary learners stagger whatever their optimiser"}
AS_BAYES = "Where it learns every mode, the LSTM staggers as Bayes does, to within {:g}"
for varied, what in VARIED.items():
    SAYS[f"{varied}_unlearned"] = f"The LSTM comes to learn every mode, whatever the {what}"
    SAYS[f"{varied}_worst"] = f"{AS_BAYES}, whatever the {what}"
study = md.Study(
    "robustness",
    {"quick": QUICK, "workstation": WORKSTATION, "paper": PAPER},
    plan,
    criteria,
    {"robustness": robustness},
    section="§§2–4",
    claims={
        "robustness": {
            f"{name}_{row}": f"{says.format(WITHIN[name])}: {title}"
            for row, says in SAYS.items()
            for name, title in TITLES.items()
        }
    },
    tables=[md.Table(TITLE, ROWS, COLUMNS, "robustness")],
)
