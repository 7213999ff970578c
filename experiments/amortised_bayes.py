"""Amortised Bayes: is the posterior in a meta-learner's state, and is it what the network uses?

    metadyn run amortised_bayes [--preset quick|workstation|paper] [--out DIR] [overrides]

Behaviour beside Bayes, decoding, simulation both ways (Mikulik et al. 2020, arXiv:2010.11223) and
a causal test: an LSTM and a GRU that go on, in mid-episode, from Bayes' state mapped into theirs.
"""

import dataclasses
from functools import lru_cache, partial
from typing import Any

import numpy as np

import metadyn as md
from metadyn import decoding, dynamics, errors, figures
from metadyn.base import training_tasks
from metadyn.domains.bandit import ContextualBandit
from metadyn.domains.linear import LinearRegression
from metadyn.inner import log_spaced
from metadyn.learners import beside_bayes as beside
from metadyn.learners.attention import TransformerConfig
from metadyn.learners.lstm import LSTMConfig
from metadyn.objectives import predicting
from metadyn.study import HELDOUT, paper

TITLES = {"linear": "linear regression", "bandit": "contextual bandit"}
RECURRENT = {"lstm": "LSTM", "gru": "GRU"}
LABELS = RECURRENT | {"transformer": "transformer", "control": "LSTM far from Bayes"}
ROWS = {(name, each): f"{TITLES[name]}, {LABELS[each]}" for name in TITLES for each in LABELS}
RATES = {"gru": 1 / 3, "control": 1 / 100}  # learning rates, over that of the outer loop
NEAR = 0.3  # excess loss up to which a recurrent network counts as near Bayes
COLUMNS = "excess mean untrained uncertainty nonlinear to_bayes from_bayes delay kept"
SURELY = {  # what is expected, each of the whole interval
    "linear_lstm_uncertainty": {"at_most": 0.5},
    "linear_lstm_nonlinear": {"at_most": 0.5},
    "linear_lstm_direction": {"at_least": 0.0},
    "linear_lstm_kept": {"at_least": 0.5},
}


@dataclasses.dataclass(frozen=True)
class Config(md.StudyConfig):
    """Everything the study depends on, beside its seed."""

    linear: LinearRegression = LinearRegression()
    bandit: ContextualBandit = ContextualBandit()
    small: LSTMConfig = LSTMConfig()
    """The LSTM of the bandit, and in both domains the one that stays far from Bayes."""


def compared(config: Config, name: str) -> md.Comparison:
    """Networks beside Bayes in one domain, and copies of recurrent ones put on other states."""
    errors.check(config.meta == Config.meta, "meta", config.meta, "all are trained: leave it out")
    domain, linear, sizes = getattr(config, name), name == "linear", config.measure
    beliefs = (beside.linear_beliefs if linear else beside.bandit_beliefs)(domain)
    policy = lambda domain, meta: md.actor_critic(domain, meta.meta)  # Bayes has no part in it
    objective, heads = (predicting("bayes", beliefs.learner), 0) if linear else (policy, 1)
    said = "Bayes-optimal" if linear or domain.deterministic else "most probable action"
    contenders = [md.Contender("bayes", said, beliefs.learner, "bayes")]
    for network, label in LABELS.items():
        meta: Any = "lstm" if network == "control" else network
        lstm = config.lstm if linear and network == meta else config.small
        made: Any = dataclasses.replace(config, meta=meta, lstm=lstm).meta_learner(domain, heads)
        rate = RATES.get(network, 1) * config.outer.learning_rate
        own = made.own or dataclasses.replace(config.outer, learning_rate=rate)
        read = beside.mean_values if network == "transformer" else beside.whole
        learner = beside.Beside(made.learner, domain, beliefs, read)
        times = [0, *(pairs + 1 for pairs in log_spaced(domain.steps - 1, 5)[1:])]
        changes = {"name": network, "label": label, "learner": learner, "times": times}
        contenders.append(dataclasses.replace(made, own=own, **changes))
        if network in RECURRENT:
            copies = f"{network}_operated", label, beside.implanted(learner), "reference"
            contenders.append(md.Contender(*copies, of=network))  # type: ignore[arg-type]
    causal = sizes.sized(training_tasks(domain), name=f"causal_{name}", kinds=("reference",))
    how = sizes, objective, heads, name, TITLES[name], False
    return md.Comparison(domain, contenders, [causal], (), *how)


@lru_cache(maxsize=16)  # criteria and figures both ask for it
def decoded(results, name: str, network: str) -> dict[str, decoding.Decoded]:
    """How much of Bayes' posterior is in a network's state."""
    return decoding.of_state(results[f"{HELDOUT}_{name}", network])


def merits(results, name: str, network: str):
    """The figures of merit of a network, by name."""
    data, bayes = (results[f"{HELDOUT}_{name}", who] for who in (network, "bayes"))
    yield from decoding.merits(data, bayes, decoded(results, name, network))
    if network in RECURRENT:
        yield from decoding.operated(results[f"causal_{name}", f"{network}_operated"])


def criteria(config: Config, results):
    """Figures of merit of every network, and what is expected of some."""
    near = []
    for (name, network), called in ROWS.items():
        found = dict(merits(results, name, network))
        for what, merit in found.items():
            row, said = f"{name}_{network}_{what}", f"{called}: {decoding.MERITS[what]}"
            yield md.criterion(row, merit, said, **SURELY.get(row, {}), surely=True)
        if name == "linear" and network in RECURRENT and found["excess"].value <= NEAR:
            near.append(found["least"])
    worst = min(near, key=lambda each: each.value, default=dynamics.exact(np.nan))
    said = f"linear regression, the worst recurrent network near Bayes: {decoding.MERITS['least']}"
    yield md.criterion("linear_near_bayes_mean", worst, said, at_least=0.9, surely=True)


def panels(read, results, **axes):
    """Draws R², with a panel for each network of each domain, of what `read` gives."""
    shown = {called: read(results, *who) for who, called in ROWS.items()}
    return figures.panels(shown, "R² on held-out tasks", ylim=(-0.15, 1.05), **axes)


def by_step(results, name: str, network: str):
    """How much is decoded at each step of an episode, and the controls."""
    of = decoded(results, name, network)
    found = {
        "mean": of["mean"].at(-1),
        "mean, untrained": of["mean"].at(0),
        "mean of a shuffled task": of["shuffled"].at(-1),
        "uncertainty": of["uncertainty"].at(-1),
        "uncertainty, by an MLP too": of["nonlinear"].at(-1),
        "uncertainty, untrained": of["uncertainty"].at(0),
    }
    pairs = results[f"{HELDOUT}_{name}", network]["time"].to_numpy()[1:] - 1
    return pairs, {called: decoding.r_squared(each) for called, each in found.items()}


def by_training(results, name: str, network: str):
    """How much is decoded over outer training, and how far behaviour is that of Bayes."""
    data, bayes = (results[f"{HELDOUT}_{name}", who] for who in (network, "bayes"))
    of, shown = decoded(results, name, network), ("mean", "shuffled", "uncertainty")
    found = {what: dynamics.estimate(decoding.over_steps, *of[what]) for what in shown}
    value, low, high = (1 / (1 + part) for part in dynamics.measured_excess(data, bayes))
    found["behaviour: 1 / (1 + excess loss), 1 as Bayes"] = dynamics.Estimate(value, high, low)
    return 1 + data["outer_step"].to_numpy(), found


def causal(results):
    """Draws excess loss after states were replaced, by what came in their place."""
    figure, axes = figures.grid(len(TITLES), "excess loss over Bayes, afterwards", 4.6, 3.8)
    for axis, name in zip(axes, TITLES, strict=True):
        both = (results[f"causal_{name}", f"{each}_operated"] for each in RECURRENT)
        rows = [dict(decoding.operated(data)) for data in both]
        merit = lambda source, rows=rows: dynamics.stacked(row[f"from_{source}"] for row in rows)
        found = [(said, merit(source)) for source, said in decoding.GOES_ON.items()]
        figures.grouped_bars(axis, [*RECURRENT.values()], found)
        axis.set(title=TITLES[name], yscale="log")
    figures.legend_below(axes[0], title="going on from")
    return figure


QUICK = Config(
    linear=LinearRegression(n_x=3, n_y=3),
    bandit=ContextualBandit(contexts=3, actions=3, steps=20),
    transformer=TransformerConfig(hidden=32),
    outer=md.OuterConfig(steps=4000, optimizer="nadam", b2=0.98, learning_rate=3e-2, checkpoints=5),
    measure=md.MeasureConfig(tasks=512, tracked_tasks=0, heldout_tasks=1024),
)
WORKSTATION = Config(
    lstm=LSTMConfig(hidden=256),
    outer=md.OuterConfig(6000, optimizer="nadam", b2=0.98, learning_rate=2e-2, checkpoints=6),
    measure=md.MeasureConfig(tasks=1024, tracked_tasks=0, heldout_tasks=2048),
)
PAPER = Config(
    **paper(50_000, batch=256, checkpoints=12),
    small=LSTMConfig(hidden=256),
    measure=md.MeasureConfig(tasks=8192, tracked_tasks=0, heldout_tasks=4096),
)
study = md.Study(
    "amortised_bayes",
    {"quick": QUICK, "workstation": WORKSTATION, "paper": PAPER},
    lambda config: md.Plan(config.outer, [compared(config, name) for name in TITLES]),
    criteria,
    {
        "decoded": partial(panels, by_step, xlabel="pairs that the state has read"),
        "over_outer_training": partial(panels, by_training, xscale="log", xlabel="1 + outer step"),
        "causal": causal,
    },
    section="ours",
    closed="Bayes' state is written into each of them, in a way of its own",
    tables=[
        md.Table(
            "Amortised Bayes: R² of decoding and of simulation, and the causal test",
            {"_".join(who): called for who, called in ROWS.items()},
            {what: decoding.MERITS[what] for what in COLUMNS.split()},
            "decoded",
        )
    ],
    claims={
        "decoded": {
            "linear_near_bayes_mean": "Ours: recurrent networks near Bayes hold its mean linearly",
            "linear_lstm_uncertainty": "Ours: late on, an LSTM hardly holds uncertainty linearly",
            "linear_lstm_nonlinear": "Ours: nor does a small MLP find uncertainty there",
            "linear_lstm_direction": "Ours: an LSTM simulates Bayes better than Bayes an LSTM",
        },
        "causal": {"linear_lstm_kept": "Ours: an LSTM goes on from Bayes' state mapped to its own"},
    },
)
