"""Amortised Bayes: is the posterior in a meta-learner's state, and is it what the network uses?

    metadyn run amortised_bayes [--preset quick|paper] [--out DIR] [overrides]

Behaviour beside Bayes, decoding, simulation both ways (Mikulik et al. 2020, arXiv:2010.11223) and
a causal test: an LSTM and a GRU that go on, in mid-episode, from Bayes' state mapped into theirs.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

import metadyn as md
from metadyn import decoding, dynamics, figures, labelled
from metadyn.base import training_tasks
from metadyn.decoding import Decoded, held_out, of_state, over_steps, r_squared, vectors
from metadyn.domains.bandit import ContextualBandit
from metadyn.domains.linear import LinearRegression
from metadyn.errors import check, check_positive
from metadyn.learners import beside
from metadyn.objectives import predicting
from metadyn.study import HELDOUT, paper

TITLES = {"linear": "linear regression", "bandit": "contextual bandit"}
RECURRENT = ("lstm", "gru")
LABELS = {
    "lstm": "LSTM",
    "gru": "GRU",
    "transformer": "transformer",
    "control": "LSTM far from Bayes",
}
GOES_ON = {
    "none": "its own state",
    "own": "Bayes' state, mapped",
    "other": "that of another task",
    "fresh": "a fresh state",
}
NEAR = 0.3
"""Excess loss up to which a network counts as near Bayes."""
SURELY = {
    "linear_near_bayes_mean": {"at_least": 0.9},
    "linear_lstm_uncertainty": {"at_most": 0.5},
    "linear_lstm_nonlinear": {"at_most": 0.5},
    "linear_lstm_direction": {"at_least": 0.0},
    "linear_lstm_kept": {"at_least": 0.5},
}
"""Criteria of what is expected, each of the whole interval; the others are reported."""
COLUMNS = {
    "excess": "excess loss",
    "mean": "posterior mean",
    "untrained": "untrained",
    "uncertainty": "uncertainty, at the end",
    "nonlinear": "by a perceptron too",
    "to_bayes": "network simulates Bayes",
    "from_bayes": "Bayes simulates network",
    "delay": "doublings later than behaviour",
    "kept": "kept of its state",
}


@dataclasses.dataclass(frozen=True)
class Config(md.StudyConfig):
    """Everything the study depends on, beside its seed. Values are our choice."""

    linear: LinearRegression = LinearRegression()
    bandit: ContextualBandit = ContextualBandit()
    pairs: tuple[int, ...] = (1, 2, 4, 9, 19)
    """Pairs that a state has read when it is decoded."""
    at: int = 5
    """Observations after which states are replaced."""
    gru_learning_rate: float = 1e-2
    """Of the GRU's outer loop, in the place of `--outer.learning-rate`."""
    control_learning_rate: float = 3e-4
    """Of the control: an LSTM of the same size, trained for as long, that stays far from Bayes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "gru_learning_rate", "control_learning_rate")
        steps = min(self.linear.steps, self.bandit.steps)
        right = self.pairs and all(0 < n < steps for n in self.pairs)
        check(right, "pairs", self.pairs, f"from 1 to {steps - 1}, one less than there are steps")
        K, n = self.bandit.contexts, self.bandit.actions
        fix = f"must be at most actions = {n}: outside the training distribution all are distinct"
        check(n >= K, "contexts", K, fix)
        check(0 < self.at < steps, "at", self.at, f"must be from 1 to {steps - 1}")

    def network(self, name: str, domain, beliefs, heads: int) -> md.Contender:
        """A network to train, beside Bayes; its state is recorded."""
        rate = f"{name}_learning_rate"
        meta: Any = "lstm" if name == "control" else name
        made = dataclasses.replace(self, meta=meta).meta_learner(domain, heads)
        read = beside.mean_values if name == "transformer" else beside.whole
        network: Any = made.learner
        changes: dict[str, Any] = {"name": name, "label": LABELS[name]}
        changes["learner"] = beside.Beside(network, domain, beliefs, read)
        changes["times"] = sorted({0, *(n + 1 for n in self.pairs), domain.steps})
        if hasattr(self, rate):
            own = dataclasses.replace(self.outer, learning_rate=getattr(self, rate))
            changes |= {"own": own, "rate": rate}
        return dataclasses.replace(made, **changes)

    def operated(self, meta: md.Contender) -> md.Contender:
        """A trained network, and copies of it that go on from other states."""
        network: Any = meta.learner
        learner = beside.implanted(network, self.at)
        return md.Contender(f"{meta.name}_operated", meta.label, learner, "reference", of=meta.name)


def plan(config: Config) -> md.Plan:
    """One comparison of each domain."""
    wide = config.linear.evaluation(config.measure.probe_points, scale=4)
    bandit = dataclasses.replace(config.bandit, permutation=True)
    shifted = {"linear": wide, "bandit": training_tasks(bandit)}
    comparisons, sizes = [], config.measure
    for name, title in TITLES.items():
        domain, linear = getattr(config, name), name == "linear"
        beliefs = (beside.linear_beliefs if linear else beside.bandit_beliefs)(domain)
        policy = lambda domain, meta: md.actor_critic(domain, meta.meta)  # Bayes has no part in it
        objective = predicting("bayes", beliefs.learner) if linear else policy
        metas = [config.network(each, domain, beliefs, 0 if linear else 1) for each in LABELS]
        operated = [config.operated(meta) for meta in metas if meta.name in RECURRENT]
        bayes = md.Contender("bayes", "Bayes-optimal", beliefs.learner, "bayes")
        tasks, far = training_tasks(domain), dataclasses.replace(shifted[name], probes={})
        sets = [
            sizes.sized(tasks, "tasks", f"causal_{name}", kinds=("reference",)),
            sizes.sized(far, "shifted_tasks", f"shifted_{name}", kinds=("meta",)),
        ]
        part = md.Comparison(
            domain, [*metas, *operated, bayes], sets, (), sizes, objective, 0 if linear else 1,
            name, title, followed=False,
        )  # fmt: skip
        comparisons.append(part)
    return md.Plan(config.outer, comparisons)


@functools.lru_cache(maxsize=64)  # criteria and figures both ask for it
def decoded(results, name: str, network: str, what: str) -> Decoded:
    """How much of what is known of Bayes' posterior is in a network's state, at checkpoints."""
    data = results[f"{HELDOUT}_{name}", network]
    if what == "nonlinear":
        return of_state(data.isel(outer_step=[-1]), "uncertainty", decoding.perceptron)
    if what == "shuffled":
        last = data.isel(outer_step=-1)
        return held_out(vectors(last, "state"), decoding.shuffled(vectors(last, "mean")))
    return of_state(data, what)


def losses(results, name: str, network: str) -> list[np.ndarray]:
    """Losses of a network and of Bayes, by outer step, on the tasks that decoding is judged on."""
    both = (results[f"{HELDOUT}_{name}", who] for who in (network, "bayes"))
    trained, bayes = (dynamics.episode_loss(data)[:, 1::2] for data in both)
    return [trained, bayes[..., None]]


def after(results, name: str, network: str, *sources: str) -> list[np.ndarray]:
    """Losses [seed, task] of the answers after states were replaced, and last those of Bayes."""
    data = results[f"causal_{name}", f"{network}_operated"]
    given = dynamics.samples(data, "after")[0, 0] > 0
    losses = dynamics.samples(data, "losses")[:, :, given].mean(2)
    return [losses[..., beside.SOURCES.index(source)] for source in (*sources, "bayes")]


def over_bayes(results, name: str):
    """Excess loss in a domain, as a statistic of the losses."""
    floor = labelled.about(results[f"{HELDOUT}_{name}", "bayes"]).loss_floor
    return functools.partial(dynamics.excess_loss, floor=floor)


def merits(results, name: str, network: str):
    """What the figures of merit of a network are called, what they are of, and they."""
    data, estimate = results[f"{HELDOUT}_{name}", network], dynamics.estimate
    last, steps = data.isel(outer_step=-1), data["outer_step"].to_numpy()
    excess, loss = over_bayes(results, name), losses(results, name, network)
    mean, uncertainty, nonlinear, other = (
        decoded(results, name, network, what)
        for what in ("mean", "uncertainty", "nonlinear", "shuffled")
    )
    forth, back = decoding.both_ways(last)
    yield "excess", "excess loss over Bayes", estimate(excess, *(part[..., -1] for part in loss))
    for where, measured in ("inside", last), ("outside", results[f"shifted_{name}", network]):
        distance = dynamics.samples(measured, "distance")[:, :, 1:].mean(-1)
        said = f"distance of its answers from Bayes', {where} the training distribution"
        yield f"distance_{where}", said, estimate(np.asarray, distance)
    for what, said, found in (
        ("mean", "R² of the posterior mean", mean.at(-1)),
        ("untrained", "the same, untrained", mean.at(0)),
        ("shuffled", "the same, of other tasks", other),
        ("to_bayes", "R² of Bayes' state simulated from its own", forth),
        ("from_bayes", "R² of its state simulated from Bayes'", back),
    ):
        yield what, f"{said}, mean over the steps", estimate(over_steps, *found)
    way = lambda a, b, c, d: over_steps(a, b) - over_steps(c, d)
    yield "direction", "difference of the two", estimate(way, *forth, *back)
    for what, said, found in (
        ("uncertainty", "", uncertainty.at(-1)),
        ("uncertainty_untrained", ", untrained", uncertainty.at(0)),
        ("nonlinear", ", by a perceptron too", nonlinear.at(-1)),
    ):
        said = f"R² of the uncertainty at the end of the episode{said}"
        yield what, said, r_squared(found).each()[-1]
    when = lambda a, b, c, d: decoding.delay(steps, over_steps(a, b), excess(c, d))
    said = "doublings of the outer step by which the mean appears after the behaviour"
    yield "delay", said, estimate(when, *mean, *loss)
    if network in RECURRENT:
        for source, said in GOES_ON.items():
            worse = estimate(excess, *after(results, name, network, source))
            yield f"from_{source}", f"excess loss, going on from {said}", worse
        data = results[f"causal_{name}", f"{network}_operated"]
        first = np.flatnonzero(dynamics.samples(data, "after")[0, 0])[0]
        parts = (dynamics.samples(data, each)[:, :, first] for each in ("shift", "size"))
        shift, size = next(parts)[..., 0], next(parts)
        outputs = estimate(lambda a, b: a / b, shift, size)
        yield "outputs", "shift of the next answer on Bayes' state, mapped, over its size", outputs
        kept = lambda own, none, fresh, bayes: decoding.explained(own - none, fresh - none)
        share = estimate(kept, *after(results, name, network, "own", "none", "fresh"))
        yield "kept", "share of what its state is worth that Bayes', mapped, keeps", share


def criteria(config: Config, results):
    """Figures of merit of every network, and what is expected of some."""
    near: list[np.ndarray] = []
    for name, title in TITLES.items():
        for network, label in LABELS.items():
            for what, said, found in merits(results, name, network):
                row = f"{name}_{network}_{what}"
                bounds = SURELY.get(row, {})
                yield md.criterion(row, found, f"{title}, {label}: {said}", **bounds, surely=True)
                whole = name == "linear" and network != "transformer"
                if what == "excess" and whole and found.value <= NEAR:
                    near += decoded(results, name, network, "mean").at(-1)

    def least(*parts):
        pairs = zip(parts[::2], parts[1::2], strict=True)
        return np.min([decoding.explained(*pair)[..., 1:].min(-1) for pair in pairs], axis=0)

    found = dynamics.estimate(least, *near) if near else dynamics.exact(np.nan)
    said = f"least R² of the posterior mean from the second step, recurrent, excess up to {NEAR:g}"
    row = "linear_near_bayes_mean"
    yield md.criterion(row, found, said, **SURELY[row], surely=True)


def panels(draw):
    """Makes a figure with a panel for each network of each domain."""

    def figure(results):
        shown = {name: results.learners(f"{HELDOUT}_{name}", "meta") for name in TITLES}
        every = [(name, network) for name, found in shown.items() for network in found]
        figure, axes = figures.grid(len(every), width=3.8, height=3.4)
        for axis, (name, network) in zip(axes, every, strict=True):
            draw(axis, results, name, network)
            axis.set_title(f"{TITLES[name]}: {LABELS[network]}", fontsize=10)
        entries = axes[0].get_legend_handles_labels()
        figure.legend(*entries, loc="outside lower center", ncols=3)
        return figure

    return figure


def curves(axis, x, found: dict[str, dynamics.Estimate]) -> None:
    """Draws estimates of R² [x], by what they are called."""
    figures.curves(axis, x, dynamics.stacked(found.values()), [*found], marker="o", ms=3)
    axis.set(ylim=(-0.15, 1.05), ylabel="R² on held-out tasks")


def by_step(axis, results, name: str, network: str) -> None:
    """Draws how much is decoded at each step of an episode, and the controls."""
    of = functools.partial(decoded, results, name, network)
    found = {
        "mean": of("mean").at(-1),
        "mean, untrained": of("mean").at(0),
        "mean of another task": of("shuffled"),
        "uncertainty": of("uncertainty").at(-1),
        "uncertainty, by a perceptron too": of("nonlinear").at(-1),
        "uncertainty, untrained": of("uncertainty").at(0),
    }
    pairs = results[f"{HELDOUT}_{name}", network]["time"].to_numpy()[1:] - 1
    curves(axis, pairs, {called: r_squared(each) for called, each in found.items()})
    axis.set_xlabel("pairs that the state has read")


def by_outer_step(axis, results, name: str, network: str) -> None:
    """Draws how much is decoded, and excess loss, over outer training."""
    steps = np.maximum(results[f"{HELDOUT}_{name}", network]["outer_step"].to_numpy(), 0.5)
    both = {what: decoded(results, name, network, what) for what in ("mean", "uncertainty")}
    curves(axis, steps, {w: dynamics.estimate(over_steps, *each) for w, each in both.items()})
    found = dynamics.estimate(over_bayes(results, name), *losses(results, name, network))
    behind, style = axis.twinx(), {"fmt": "k.--", "lw": 1, "label": "excess loss (right)"}
    behind.errorbar(steps, found.value, figures.bars(found), **style)
    axis.errorbar([], [], **style)  # in the legend
    behind.set(yscale="log")
    axis.set(xscale="log", xlabel="outer step (leftmost: 0)")


def causal(results):
    """Draws excess loss after states were replaced, by what came in their place."""
    shown = [name for name in TITLES if f"causal_{name}" in results.sets()]
    figure, axes = figures.grid(len(shown), "excess loss over Bayes, afterwards", 4.6, 3.8)
    for axis, name in zip(axes, shown, strict=True):
        excess = over_bayes(results, name)
        for i, (source, said) in enumerate(GOES_ON.items()):
            parts = (after(results, name, network, source) for network in RECURRENT)
            found = dynamics.stacked(dynamics.estimate(excess, *each) for each in parts)
            style = {"color": figures.COLOURS[i], "label": said, "yerr": figures.bars(found)}
            axis.bar(np.arange(len(RECURRENT)) + 0.2 * i, found.value, 0.2, **style)
        axis.set(title=TITLES[name], yscale="log")
        axis.set_xticks(np.arange(len(RECURRENT)) + 0.3, [LABELS[each] for each in RECURRENT])
    entries = axes[0].get_legend_handles_labels()
    figure.legend(*entries, title="going on from", loc="outside lower center", ncols=4)
    return figure


QUICK = Config(
    linear=LinearRegression(n_x=3, n_y=3),
    bandit=ContextualBandit(contexts=3, actions=3, steps=20),
    outer=md.OuterConfig(steps=4000, optimizer="nadam", b2=0.98, learning_rate=3e-2, checkpoints=5),
    measure=md.MeasureConfig(
        tasks=512, shifted_tasks=256, tracked_tasks=2, heldout_tasks=1024, probe_points=8
    ),
)
PAPER = Config(
    **paper(50_000, batch=256, checkpoints=12),
    measure=md.MeasureConfig(
        tasks=8192, shifted_tasks=2048, tracked_tasks=2, heldout_tasks=4096, probe_points=16
    ),
)
study = md.Study(
    "amortised_bayes",
    {"quick": QUICK, "paper": PAPER},
    plan,
    criteria,
    {"decoded": panels(by_step), "over_outer_training": panels(by_outer_step), "causal": causal},
    section="ours",
    tables=[
        md.Table(
            "Amortised Bayes: R² of decoding and of simulation, and the causal test",
            {
                f"{name}_{n}": f"{title}, {LABELS[n]}"
                for name, title in TITLES.items()
                for n in LABELS
            },
            COLUMNS,
            "decoded",
        )
    ],
    claims=md.study.claims(
        decoded={
            "linear_near_bayes_mean": "Ours: whoever is near Bayes' loss holds the posterior mean "
            "in linear form",
            "linear_lstm_uncertainty": "Ours: late in an episode the uncertainty is hardly in the "
            "LSTM's state in linear form",
            "linear_lstm_nonlinear": "Ours: nor in another form, that a small perceptron finds",
            "linear_lstm_direction": "Ours: the LSTM's state simulates that of Bayes better than "
            "it is simulated",
        },
        causal={
            "linear_lstm_kept": "Ours: it is what the LSTM uses, which goes on from Bayes' state "
            "mapped into its own"
        },
    ),
)
