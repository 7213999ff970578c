"""Amortised Bayes: is the posterior in a meta-learner's state, and is it what the network uses?

    metadyn run amortised_bayes [--preset quick|workstation|paper] [--out DIR] [overrides]

Compares behaviour with Bayes', decodes states, simulates both ways (Mikulik et al. 2020,
arXiv:2010.11223) and tests causally: an LSTM and a GRU go on from Bayes' state, mapped into theirs.
"""

import dataclasses
from functools import lru_cache, partial
from typing import Any

import numpy as np

import metadyn as md
from metadyn import decoding, dynamics, errors, figures
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
ROWS = {(name, key): f"{TITLES[name]}, {LABELS[key]}" for name in TITLES for key in LABELS}
RATES = {"gru": 1 / 3, "control": 1 / 100}  # factors on the learning rate of the outer loop
NEAR = 0.3  # excess loss up to which a recurrent network counts as near Bayes
COLUMNS = "excess mean untrained uncertainty nonlinear to_bayes from_bayes delay kept"
BOUNDS = {  # on the whole interval of some criteria
    "linear_lstm_uncertainty": {"at_most": 0.5},
    "linear_lstm_nonlinear": {"at_most": 0.5},
    "linear_lstm_direction": {"at_least": 0.0},
    "linear_lstm_kept": {"at_least": 0.5},
}


@dataclasses.dataclass(frozen=True)
class Config(md.StudyConfig):
    """All settings of the study, except its seed."""

    linear: LinearRegression = LinearRegression()
    bandit: ContextualBandit = ContextualBandit()
    small: LSTMConfig = LSTMConfig()
    """The LSTM in the bandit, and in both domains the control that stays far from Bayes."""


def comparison(config: Config, name: str) -> md.Comparison:
    """Compares networks with Bayes in one domain, and copies with replaced recurrent states."""
    errors.check(config.meta == Config.meta, "meta", config.meta, "leave it out: all are trained")
    domain, linear, sizes = getattr(config, name), name == "linear", config.measure
    beliefs = (beside.linear_beliefs if linear else beside.bandit_beliefs)(domain)
    policy = lambda domain, wrapper: md.actor_critic(domain, wrapper.meta)  # leaves Bayes out
    objective, heads = (predicting("bayes", beliefs.learner), 0) if linear else (policy, 1)
    bayes_label = "Bayes-optimal" if linear or domain.deterministic else "most probable action"
    contenders = [md.Contender("bayes", bayes_label, beliefs.learner, "bayes")]
    for network, label in LABELS.items():
        meta: Any = "lstm" if network == "control" else network
        lstm = config.lstm if linear and network == meta else config.small
        base: Any = dataclasses.replace(config, meta=meta, lstm=lstm).meta_learner(domain, heads)
        rate = RATES.get(network, 1) * config.outer.learning_rate
        outer = base.own or dataclasses.replace(config.outer, learning_rate=rate)
        read = beside.mean_cached_values if network == "transformer" else beside.flat_carry
        learner = beside.Beside(base.learner, domain, beliefs, read)
        times = [0, *(pairs + 1 for pairs in log_spaced(domain.steps - 1, 5)[1:])]
        changes = {"name": network, "label": label, "learner": learner, "times": times}
        contenders.append(dataclasses.replace(base, own=outer, **changes))
        if network in RECURRENT:
            copies = f"{network}_operated", label, beside.implanted(learner), "reference"
            contenders.append(md.Contender(*copies, derived_from=network))  # type: ignore[arg-type]
    tasks = sizes.sized(md.TaskSet(f"causal_{name}", domain, kinds=("reference",)))
    fields = sizes, objective, heads, name, TITLES[name], False
    return md.Comparison(domain, contenders, [tasks], (), *fields)


@lru_cache(maxsize=16)  # both criteria and figures use it
def decoded(results, name: str, network: str) -> dict[str, decoding.Decoded]:
    """Decodes Bayes' posterior from a network's state."""
    return decoding.of_state(results[f"{HELDOUT}_{name}", network])


def merits(results, name: str, network: str):
    """Yields the figures of merit of a network in a domain, each with its name."""
    data, bayes = (results[f"{HELDOUT}_{name}", learner] for learner in (network, "bayes"))
    yield from decoding.merits(data, bayes, decoded(results, name, network))
    if network in RECURRENT:
        yield from decoding.operated(results[f"causal_{name}", f"{network}_operated"])


def criteria(config: Config, results):
    """Yields the figures of merit of every network, some with bounds."""
    near = []
    for (name, network), label in ROWS.items():
        estimates = dict(merits(results, name, network))
        for merit, estimate in estimates.items():
            row, text = f"{name}_{network}_{merit}", f"{label}: {decoding.MERITS[merit]}"
            yield md.criterion(row, estimate, text, **BOUNDS.get(row, {}), surely=True)
        if name == "linear" and network in RECURRENT and estimates["excess"].value <= NEAR:
            near.append(estimates["least"])
    worst = min(near, key=lambda estimate: estimate.value, default=dynamics.exact(np.nan))
    text = f"linear regression, the worst recurrent network near Bayes: {decoding.MERITS['least']}"
    yield md.criterion("linear_near_bayes_mean", worst, text, at_least=0.9, surely=True)


def panels(read, results, **axes):
    """Draws the R² that `read` returns, one panel per network and domain."""
    curves = {label: read(results, *key) for key, label in ROWS.items()}
    return figures.panels(curves, "R² on held-out tasks", ylim=(-0.15, 1.05), **axes)


def by_step(results, name: str, network: str):
    """Returns the pairs read at each recorded step, and R² of what is decoded and of controls."""
    posterior = decoded(results, name, network)
    curves = {
        "mean": posterior["mean"].at(-1),
        "mean, untrained": posterior["mean"].at(0),
        "mean of a shuffled task": posterior["shuffled"].at(-1),
        "uncertainty": posterior["uncertainty"].at(-1),
        "uncertainty, by an MLP too": posterior["nonlinear"].at(-1),
        "uncertainty, untrained": posterior["uncertainty"].at(0),
    }
    pairs = results[f"{HELDOUT}_{name}", network]["time"].to_numpy()[1:] - 1
    return pairs, {label: decoding.r_squared(curve) for label, curve in curves.items()}


def by_training(results, name: str, network: str):
    """Returns 1 + outer steps, R² of what is decoded at each, and the closeness to Bayes' loss."""
    data, bayes = (results[f"{HELDOUT}_{name}", learner] for learner in (network, "bayes"))
    posterior, parts = decoded(results, name, network), ("mean", "shuffled", "uncertainty")
    curves = {part: dynamics.estimate(decoding.over_steps, *posterior[part]) for part in parts}
    value, low, high = (1 / (1 + part) for part in dynamics.excess_over_bayes(data, bayes))
    curves["behaviour: 1 / (1 + excess loss), 1 as Bayes"] = dynamics.Estimate(value, high, low)
    return 1 + data["outer_step"].to_numpy(), curves


def causal(results):
    """Draws the excess loss after a network's state is replaced, for each kind of new state."""
    figure, axes = figures.grid(len(TITLES), "excess loss over Bayes, afterwards", 4.6, 3.8)
    for axis, name in zip(axes, TITLES, strict=True):
        operated = (results[f"causal_{name}", f"{network}_operated"] for network in RECURRENT)
        rows = [dict(decoding.operated(data)) for data in operated]
        excess = lambda source, rows=rows: dynamics.stacked(row[f"from_{source}"] for row in rows)
        bars = [(label, excess(source)) for source, label in decoding.GOES_ON.items()]
        figures.grouped_bars(axis, [*RECURRENT.values()], bars)
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
    lambda config: md.Plan(config.outer, [comparison(config, name) for name in TITLES]),
    criteria,
    {
        "decoded": partial(panels, by_step, xlabel="pairs that the state has read"),
        "over_outer_training": partial(panels, by_training, xscale="log", xlabel="1 + outer step"),
        "causal": causal,
    },
    section="ours",
    closed="each needs its own way to have Bayes' state written into it",
    tables=[
        md.Table(
            "Amortised Bayes: R² of decoding and of simulation, and the causal test",
            {"_".join(key): label for key, label in ROWS.items()},
            {merit: decoding.MERITS[merit] for merit in COLUMNS.split()},
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
