"""Amortised Bayes: is the posterior in a meta-learner's state, and is it what the network uses?

    metadyn run amortised_bayes [--preset quick|paper] [--out DIR] [overrides]

Behaviour beside Bayes, decoding, simulation both ways (Mikulik et al. 2020, arXiv:2010.11223) and
a causal test: an LSTM and a GRU that go on, in mid-episode, from Bayes' state mapped into theirs.
"""

import dataclasses
import functools

import numpy as np

import metadyn as md
from metadyn import decoding, dynamics, figures, labelled
from metadyn.base import training_tasks
from metadyn.decoding import Decoded, held_out, over_steps, r_squared, vectors
from metadyn.domains.bandit import ContextualBandit
from metadyn.domains.linear import LinearRegression
from metadyn.errors import check, check_positive
from metadyn.learners import beside
from metadyn.learners.lstm import LSTMConfig
from metadyn.objectives import predicting
from metadyn.study import HELDOUT

TITLES = {"linear": "linear regression", "bandit": "contextual bandit"}
RECURRENT = ("lstm", "gru")
NETWORKS = (*RECURRENT, "transformer", "control")
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
    """Of the control's: an LSTM like the other, trained for as long, that does not come near Bayes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "gru_learning_rate", "control_learning_rate")
        steps = min(self.linear.steps, self.bandit.steps)
        right = self.pairs and all(0 < n < steps for n in self.pairs)
        check(right, "pairs", self.pairs, f"from 1 to {steps - 1}, one less than there are steps")
        check(0 < self.at < steps, "at", self.at, f"must be from 1 to {steps - 1}")

    def network(self, name: str, domain, beliefs, heads: int) -> md.Contender:
        """A network to train, beside Bayes; its state is recorded."""
        rate = f"{name}_learning_rate"
        base = dataclasses.replace(self, meta="lstm" if name == "control" else name)
        made = base.meta_learner(domain, heads)
        read = beside.mean_values if name == "transformer" else beside.whole
        changes = {"learner": beside.Beside(made.learner, domain, beliefs, read)}
        changes |= {"name": name, "label": LABELS[name]}
        changes["times"] = sorted({0, *(n + 1 for n in self.pairs), domain.steps})
        if hasattr(self, rate):
            own = dataclasses.replace(self.outer, learning_rate=getattr(self, rate))
            changes |= {"own": own, "rate": rate}
        return dataclasses.replace(made, **changes)


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
        metas = [config.network(each, domain, beliefs, 0 if linear else 1) for each in NETWORKS]
        operated = [
            md.Contender(
                f"{meta.name}_{source}", f"{meta.label} from {said}",
                beside.Implanted(meta.learner, source, config.at), "reference", of=meta.name,
            )
            for meta in metas if meta.name in RECURRENT for source, said in GOES_ON.items()
        ]  # fmt: skip
        bayes = md.Contender("bayes", "Bayes-optimal", beliefs.learner, "bayes")
        tasks, far = training_tasks(domain), dataclasses.replace(shifted[name], probes={})
        kinds = {"kinds": ("reference", "bayes")}
        sets = [
            sizes.sized(tasks, "tasks", f"causal_{name}", **kinds),
            sizes.sized(far, "shifted_tasks", f"shifted_{name}", kinds=("meta",)),
        ]
        part = md.Comparison(
            domain, [*metas, *operated, bayes], sets, (), sizes, objective, 0 if linear else 1,
            name, title, followed=False,
        )  # fmt: skip
        comparisons.append(part)
    return md.Plan(config.outer, comparisons)


@functools.lru_cache(maxsize=64)  # criteria and figures both ask for it
def decoded(results, name: str, network: str, what: str, decode=decoding.ridge) -> Decoded:
    """How much of Bayes' mean or uncertainty is in a network's state, at each checkpoint."""
    data = results[f"{HELDOUT}_{name}", network]
    steps = range(data.sizes["outer_step"]) if decode is decoding.ridge else [-1]
    states = [data.isel(outer_step=i) for i in steps]
    found = [held_out(*(vectors(each, n) for n in ("state", what)), decode) for each in states]
    return Decoded(*(np.stack(parts, 2) for parts in zip(*found, strict=True)))


def at(found: Decoded, checkpoint: int) -> Decoded:
    """What was decoded at one checkpoint."""
    return Decoded(*(part[:, :, checkpoint] for part in found))


def losses(results, name: str, network: str) -> list[np.ndarray]:
    """Losses of a network and of Bayes, by outer step, on the tasks that decoding is judged on."""
    both = (results[f"{HELDOUT}_{name}", who] for who in (network, "bayes"))
    trained, bayes = (dynamics.episode_loss(data)[:, 1::2] for data in both)
    return [trained, bayes[..., None]]


def after(results, name: str, network: str, source: str) -> np.ndarray:
    """Losses [seed, task] of the answers after states were replaced, of a network or of Bayes."""
    given = dynamics.samples(results[f"causal_{name}", f"{network}_none"], "after")[0, 0] > 0
    who = f"{network}_{source}" if source in GOES_ON else source
    return dynamics.samples(results[f"causal_{name}", who], "loss")[..., given].mean(-1)


def merits(results, name: str, network: str):
    """What figures of merit are called, what they are of, and they."""
    data, estimate = results[f"{HELDOUT}_{name}", network], dynamics.estimate
    last, steps = data.isel(outer_step=-1), data["outer_step"].to_numpy()
    excess = functools.partial(dynamics.excess_loss, floor=labelled.about(data).loss_floor)
    mean, uncertainty = (decoded(results, name, network, w) for w in ("mean", "uncertainty"))
    nonlinear = decoded(results, name, network, "uncertainty", decoding.perceptron)
    state, belief = vectors(last, "state"), vectors(last, "mean", "covariance", "uncertainty")
    forth, back = (
        held_out(state, belief),
        held_out(np.concatenate([belief, vectors(last, "query")], -1), state),
    )
    other = held_out(state, decoding.shuffled(vectors(last, "mean")))
    of_both = losses(results, name, network)

    def appears(left, total, loss, bayes):
        with np.errstate(all="ignore"):
            both = over_steps(left, total), -np.log(excess(loss, bayes))
            share = [(c - c[..., :1]) / (c[..., -1:] - c[..., :1]) for c in both]
        t = dynamics.learning_times(np.log2(1 + steps), np.stack(share, -1))
        return t[..., 0] - t[..., 1]

    yield "excess", "excess loss over Bayes", estimate(excess, *(x[..., -1] for x in of_both))
    for task_set in (HELDOUT, "shifted"):
        distance = results[f"{task_set}_{name}", network]
        distance = distance.isel(outer_step=-1) if task_set == HELDOUT else distance
        distance = dynamics.samples(distance, "distance")[:, :, 1:].mean(-1)
        yield (
            f"{task_set}_distance",
            "distance of answers from Bayes'",
            estimate(np.asarray, distance),
        )
    for what, said, found in (
        ("mean", "R² of the posterior mean in the state", at(mean, -1)),
        ("untrained", "the same, untrained", at(mean, 0)),
        ("shuffled", "the same, of other tasks", other),
        ("to_bayes", "R² of Bayes' state simulated from the network's", forth),
        ("from_bayes", "R² of the network's state simulated from Bayes'", back),
    ):
        yield what, said, estimate(over_steps, *found)
    way = lambda a, b, c, d: over_steps(a, b) - over_steps(c, d)
    yield (
        "direction",
        "R² of simulating Bayes minus that of being simulated",
        estimate(way, *forth, *back),
    )
    for what, found in ("uncertainty", uncertainty), ("nonlinear", nonlinear):
        end = dynamics.Estimate(*(part[-1] for part in r_squared(at(found, -1))))
        form = "linearly" if what == "uncertainty" else "in any form"
        yield what, f"R² of the uncertainty at the end of the episode, {form}", end
    found = estimate(appears, *mean, *of_both)
    yield (
        "appears",
        "doublings of the outer step by which the mean appears after the behaviour",
        found,
    )
    if network in RECURRENT:
        best = after(results, name, network, "bayes")
        by = {source: after(results, name, network, source) for source in GOES_ON}
        for source, said in GOES_ON.items():
            yield (
                f"from_{source}",
                f"excess loss going on from {said}",
                estimate(excess, by[source], best),
            )
        kept = lambda own, none, fresh: (fresh - own) / (fresh - none)
        found = estimate(kept, by["own"], by["none"], by["fresh"])
        yield "kept", "share of what its state is worth that Bayes', mapped, keeps", found


def criteria(config: Config, results):
    """Figures of merit of every network, and what is expected of them."""
    near = []
    for name, title in TITLES.items():
        for network in NETWORKS:
            for what, said, found in merits(results, name, network):
                row = f"{name}_{network}_{what}"
                yield md.criterion(
                    row,
                    found,
                    f"{title}, {LABELS[network]}: {said}",
                    **SURELY.get(row, {}),
                    surely=True,
                )
                if (
                    what == "excess"
                    and name == "linear"
                    and network != "transformer"
                    and found.value <= NEAR
                ):
                    near += at(decoded(results, name, network, "mean"), -1)
    worst = lambda *parts: np.min(
        [
            decoding.explained(*pair)[..., 1:].min(-1)
            for pair in zip(parts[::2], parts[1::2], strict=True)
        ],
        0,
    )
    found = (
        dynamics.estimate(worst, *near) if near else dynamics.Estimate(*[np.asarray(np.nan)] * 3)
    )
    yield md.criterion(
        "linear_near_bayes_mean", found, "least", **SURELY["linear_near_bayes_mean"], surely=True
    )


def panels(draw):
    """Makes a figure with a panel for each network of each domain."""

    def figure(results):
        every = [
            (name, network)
            for name in TITLES
            for network in results.learners(f"{HELDOUT}_{name}", "meta")
        ]
        figure, axes = figures.grid(len(every), width=3.8, height=3.4)
        for axis, (name, network) in zip(axes, every, strict=True):
            draw(axis, results, name, network)
            axis.set_title(f"{TITLES[name]}: {LABELS[network]}", fontsize=10)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return figure

    return figure


def curves(axis, x, found: dict) -> None:
    """Draws estimates [x] by what they are called."""
    both = dynamics.Estimate(*(np.stack(part, -1) for part in zip(*found.values(), strict=True)))
    figures.curves(axis, x, both, [*found], marker="o", ms=3)
    axis.set(ylim=(-0.15, 1.05), ylabel="R² on held-out tasks")


def by_step(axis, results, name: str, network: str) -> None:
    """Draws how much is decoded at each step of an episode, and the controls."""
    data = results[f"{HELDOUT}_{name}", network].isel(outer_step=-1)
    mean, uncertainty = (decoded(results, name, network, w) for w in ("mean", "uncertainty"))
    other = held_out(vectors(data, "state"), decoding.shuffled(vectors(data, "mean")))
    found = {
        "mean": at(mean, -1), "mean, untrained": at(mean, 0), "mean of another task": other,
        "uncertainty": at(uncertainty, -1), "uncertainty, untrained": at(uncertainty, 0),
        "uncertainty, perceptron": at(decoded(results, name, network, "uncertainty", decoding.perceptron), -1),
    }  # fmt: skip
    curves(axis, data["time"].to_numpy()[1:] - 1, {k: r_squared(each) for k, each in found.items()})
    axis.set_xlabel("pairs that the state has read")


def by_outer_step(axis, results, name: str, network: str) -> None:
    """Draws how much is decoded, and excess loss, over outer training."""
    data = results[f"{HELDOUT}_{name}", network]
    steps = np.maximum(data["outer_step"].to_numpy(), 0.5)
    both = {w: decoded(results, name, network, w) for w in ("mean", "uncertainty")}
    curves(axis, steps, {w: dynamics.estimate(over_steps, *each) for w, each in both.items()})
    excess = functools.partial(dynamics.excess_loss, floor=labelled.about(data).loss_floor)
    behind = axis.twinx()
    found = dynamics.estimate(excess, *losses(results, name, network))
    behind.errorbar(steps, found.value, figures.bars(found), fmt="k.--", lw=1)
    axis.plot([], [], "k.--", lw=1, label="excess loss (right)")
    behind.set(yscale="log")
    axis.set(xscale="log", xlabel="outer step (leftmost: 0)")


def causal(results):
    """Draws excess loss after a state was replaced, by what came in its place."""
    shown = [name for name in TITLES if f"causal_{name}" in results.sets()]
    figure, axes = figures.grid(len(shown), "excess loss over Bayes, afterwards", 4.6, 3.8)
    for axis, name in zip(axes, shown, strict=True):
        floor = labelled.about(results[f"causal_{name}", "bayes"]).loss_floor
        excess = functools.partial(dynamics.excess_loss, floor=floor)
        for i, (source, said) in enumerate(GOES_ON.items()):
            found = [
                dynamics.estimate(
                    excess, after(results, name, n, source), after(results, name, n, "bayes")
                )
                for n in RECURRENT
            ]
            height = dynamics.Estimate(*np.transpose(found))
            axis.bar(
                np.arange(2) + 0.2 * i,
                height.value,
                0.2,
                yerr=figures.bars(height),
                color=figures.COLOURS[i],
                label=said,
            )
        axis.set(title=TITLES[name], yscale="log")
        axis.set_xticks(np.arange(2) + 0.3, [LABELS[n] for n in RECURRENT])
    axes[0].legend()
    return figure


QUICK = Config(
    linear=LinearRegression(n_x=3, n_y=3),
    bandit=ContextualBandit(contexts=3, actions=3, steps=20),
    outer=md.OuterConfig(
        steps=5000, batch=32, seeds=3, optimizer="nadam", b2=0.98, learning_rate=3e-2, checkpoints=5
    ),
    measure=md.MeasureConfig(
        tasks=512,
        shifted_tasks=256,
        tracked_tasks=2,
        heldout_tasks=1024,
        probe_points=8,
        chunk=1024,
    ),
)
PAPER = Config(
    lstm=LSTMConfig(hidden=256),
    outer=md.OuterConfig(steps=50_000, batch=256, learning_rate=4e-3, warmup=1000, checkpoints=12),
    measure=md.MeasureConfig(tasks=8192, shifted_tasks=2048, tracked_tasks=2, heldout_tasks=4096),
)
study = md.Study(
    "amortised_bayes",
    {"quick": QUICK, "paper": PAPER},
    plan,
    criteria,
    {"decoded": panels(by_step), "over_outer_training": panels(by_outer_step), "causal": causal},
    section="ours",
    claims=md.study.claims(
        decoded={
            "linear_near_bayes_mean": "Ours: whoever is near Bayes' loss holds the posterior mean in linear form",
            "linear_lstm_uncertainty": "Ours: late in an episode the LSTM's state hardly holds the uncertainty linearly",
            "linear_lstm_nonlinear": "Ours: nor does it hold it in another form that a small perceptron finds",
            "linear_lstm_direction": "Ours: the LSTM's state simulates Bayes' better than Bayes' simulates it",
        },
        causal={
            "linear_lstm_kept": "Ours: the LSTM uses it: it goes on from Bayes' state mapped into its own"
        },
    ),
)
