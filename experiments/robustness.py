"""Robustness: the order of learning by inner and outer optimiser, by hidden width and by noise.

    metadyn run robustness [--preset quick|workstation|paper] [--meta lstm|gru] [overrides]

Rabinowitz (2019), arXiv:1905.01320, says that what is found does not depend on the optimiser. One
thing at a time is changed, of an LSTM of 64 units (in the paper's preset 256). Those that learn
every mode are compared with Bayes, the others counted. For more, `metadyn sweep` a domain's study.
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
"""How far the LSTM may stagger beyond Bayes: the bounds of the domains' own studies."""
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
"""In the bandit the correct action pays with the one probability, any other with the other; "Bayes"
is then Thompson sampling from the exact posterior, and episodes are of twice the length."""
VARIED = {"outer": "outer optimiser", "hidden": "hidden width", "noise": "noise"}


@dataclasses.dataclass(frozen=True)
class Config(DomainsConfig):
    """Everything the study depends on, beside its seed. Values are our choice."""

    target: Target = "feedback"
    """What the regressions' meta-learners are trained to predict."""
    outer_rates: tuple[float, float, float, float] = (3.0, 1.0, 1e-2, 3e-2)
    """Learning rates of the outer loop, by SGD, momentum, RMSprop and Adam."""
    regression_updates: tuple[int, int, int, int] = (1, 1, 1, 1)
    """Updates in one outer step of the regressions, by the same: SGD needs more of them."""
    widths: tuple[int, ...] = (32, 128)
    """Other numbers of hidden units."""


def sweeps(config: Config, name: str) -> dict[str, tuple[str, str]]:
    """What is varied in a domain: label of each, and options of `metadyn sweep STUDY --zip`."""
    words = lambda values: " ".join(map(str, values))
    n = config.within("bandit").policy.updates
    outer = f"--outer.optimizer {OPTIMIZERS} --outer.learning-rate {words(config.outer_rates)}"
    if name != "bandit":
        outer += f" --outer.updates-per-step {words(config.regression_updates)}"
    found = {
        "inner": ("inner optimiser {}", INNER[name].format(2 * n, n // 3, n // 6)),
        "outer": ("outer optimiser {}", outer),
        "hidden": ("{} hidden units", f"--{config.meta}.hidden {words(config.widths)}"),
        "noise": (NOISE[name][0], NOISE[name][1].format(2 * config.bandit.steps)),
    }
    return {kind: each for kind, each in found.items() if kind != "hidden" or config.widths}


def plan(config: Config) -> md.Plan:
    """Every variant of every domain; those of one comparison are given the same tasks."""
    comparisons, sizes = [], config.measure
    for name, title in TITLES.items():
        made: dict[str, tuple[md.Comparison, list[md.Contender]]] = {}
        own = config.within(name)
        for kind, (label, words) in sweeps(config, name).items():
            for value, changed in sweep.zipped(own, words):
                whole = STUDIES[name].plan(changed).comparisons[0]
                wanted = ORDINARY[name] if kind == "inner" else config.meta
                (found,) = (each for each in whole.contenders if each.name == wanted)
                fields: dict[str, Any] = {"name": f"{kind}_{value}", "curve": None}
                n = changed.outer.updates_per_step
                fields["label"] = label.format(value) + f", {n} updates a step" * (n > 1)
                if kind == "outer":
                    fields |= {"own": changed.outer, "options": {"learning_rate": "outer_rates"}}
                ending = {"inner": "inner", "noise": f"{name}_noise_{value}"}.get(kind, name)
                made.setdefault(ending, (whole, []))[1].append(dataclasses.replace(found, **fields))
        base, inner = made.pop("inner")
        inner += [base.bayes] if name == "bandit" else []
        many = "tasks" if name == "bandit" else "updating_tasks"  # an update costs a microsecond
        tasks = sizes.sized(base.domain.evaluation(sizes.probe_points), many, f"inner_{name}")
        sets = [dataclasses.replace(tasks, updating_size=None)]
        comparisons.append(md.Comparison(base.domain, inner, sets, measure=sizes, title=title))
        for at, (whole, of) in made.items():
            comparisons += [whole.alone(at, title, contenders=[*of, whole.bayes], followed=False)]
    return md.Plan(config.outer, comparisons)


def found(results, name: str, *kinds: str) -> dict[str, tuple[Any, Any]]:
    """Of each variant of a domain its measurement, and Bayes', if any, on these kinds of sets."""
    rows, begins = {}, tuple(f"{kind}_{name}_" for kind in kinds)
    for task_set in sorted(results.sets()):  # ordinary learners first
        if f"{task_set}_".startswith(begins):
            bayes = results.learners(task_set, "bayes").get("bayes")
            for variant, data in results.learners(task_set, "ordinary", "meta").items():
                called = f"{task_set}_{variant}" if variant in rows else variant  # one put beside
                rows[called] = data.isel(outer_step=-1, missing_dims="ignore"), bayes
    return rows


def criteria(config: Config, results):
    """What the science says of every variant of every domain."""
    for name in TITLES:
        for variant, pair in found(results, name, HELDOUT).items():
            said = f"excess loss over Bayes, {trajectories.about(pair[0]).label}"
            yield md.criterion(f"{name}_{variant}_excess", dynamics.measured_excess(*pair), said)
        rows, bound = found(results, name, "inner", TRACKED), WITHIN[name]
        merit = "(t_K - t_1) / t_K" if name == "bandit" else "slope of log t_k on log scale"
        beyond = {variant: dynamics.differences([pair]) for variant, pair in rows.items()}
        missed = {each: censored(f"{name}_{each}", data) for each, (data, _) in rows.items()}
        for variant, (data, bayes) in rows.items():
            said = f"{trajectories.about(data).label}: {merit}" + " minus Bayes'" * bool(bayes)
            yield md.criterion(f"{name}_{variant}_staggering", beyond[variant], said)
        yield from missed.values()
        learned = {n for n in rows if missed[n].value == 0 and np.isfinite(beyond[n]).all()}
        of = lambda kind, rows=rows: [each for each in rows if each.startswith(kind)]
        take = lambda each, sign=SIGN[name]: (sign * each).min(0)
        least = dynamics.differences([rows[each] for each in of("inner")], take)
        said = "the least that it staggers under any optimiser, positive in the expected direction"
        yield md.criterion(f"{name}_inner_optimizers", least, said, at_least=0.0, surely=True)
        for varied in filter(of, VARIED):
            pairs = [rows[each] for each in of(varied) if each in learned]
            none = dynamics.exact(len(of(varied)) - len(pairs))
            said = f"variants of {VARIED[varied]} that do not surely learn every mode"
            yield md.criterion(f"{name}_{varied}_unlearned", none, said, 0.0, surely=True)
            take = lambda each: np.abs(each).max(0)
            worst = dynamics.differences(pairs, take) if pairs else dynamics.exact(np.nan)
            said = f"how far at most variants of {VARIED[varied]} that do stagger from Bayes"
            yield md.criterion(f"{name}_{varied}_worst", worst, said, bound, surely=True)


def robustness(results):
    """Draws how far each learner staggers, as one thing at a time is varied: a row each."""
    of = {name: [*found(results, name, "inner", TRACKED).values()] for name in TITLES}
    figure, axes = figures.grid(len(of), width=5.4, height=1.2 + 0.32 * max(map(len, of.values())))
    styles = {"ordinary": ("D", figures.COLOURS[1]), "meta": ("o", figures.COLOURS[0])}
    for axis, (name, rows) in zip(axes, of.items(), strict=True):
        for i, pair in enumerate(rows):
            far = dynamics.differences([pair])
            marker, colour = styles[trajectories.about(pair[0]).kind]
            style = {"color": colour, "mfc": "white" if censored("", pair[0]).value else colour}
            axis.errorbar(far.value, i, xerr=figures.bars(far)[:, None], fmt=marker, **style)
            if np.isnan(far.value):
                axis.text(0, i, " learned too few modes", va="center", color=colour, fontsize=9)
        axis.axvline(0, **figures.LEVEL)
        labels = [trajectories.about(data).label for data, _ in rows]
        axis.set_yticks(range(len(rows)), labels, fontsize=9)
        axis.set(title=TITLES[name], ylim=(max(len(rows), 1) - 0.5, -0.5))
        axis.set_xlabel("slope (meta-learner: minus Bayes')")
    axis.set_xlabel("staggering minus Bayes'")  # of the bandit, which is the last
    shown = [axis.plot([], [], marker, color=colour)[0] for marker, colour in styles.values()]
    named = "ordinary learner", "meta-learner (hollow: some mode is never learned)"
    figure.legend(shown, named, loc="outside lower center", ncols=2, fontsize=11)
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
