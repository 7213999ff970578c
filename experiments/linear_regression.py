"""Linear regression: SGD learns mode after mode, a meta-trained LSTM and Bayes learn all at once.

    metadyn run experiments/linear_regression.py [--preset quick|paper] [--out DIR] [overrides]

After Saxe et al. (2013), arXiv:1312.6120, and Rabinowitz (2019), arXiv:1905.01320, §2. To make a
study of your own, copy this file and change the contenders, the sets of tasks or the criteria.
"""

import dataclasses
from functools import partial

import numpy as np

from metadyn import dynamics
from metadyn.base import check, check_positive
from metadyn.domains.linear import LinearRegression
from metadyn.inner import log_spaced
from metadyn.learners.bayes import bayes_linear, least_squares, ridge
from metadyn.learners.gradient import (
    balanced_deep_linear,
    deep_linear,
    gradient,
    named_optimizer,
    random_start,
    saxe_strength,
    updates_to_learn,
)
from metadyn.learners.lstm import LSTMConfig, LSTMMetaLearner
from metadyn.outer import OuterConfig, Trainee, prediction_loss
from metadyn.store import HELDOUT, TRACKED, RunFolder
from metadyn.study import (
    Claim,
    Contender,
    MeasureConfig,
    Plan,
    Study,
    TaskSet,
    Training,
    censored,
    criterion,
    plain,
)

LEARNED = 0.5  # p of the learning time t_k(p)
SHIFTS = {"in_distribution": (1, 1), "x2": (2, 1), "x4": (4, 1), "x8": (8, 1), "outsize": (1, 8)}
"""Sets of evaluation tasks: factor on the whole spectrum, factor on its greatest mode alone."""


@dataclasses.dataclass(frozen=True)
class SGDConfig:
    """The ordinary learner. The paper's values are not known to us: these are our choice."""

    optimizer: str = "sgd"
    """An optimiser of optax, by name."""
    learning_rate: float = 0.05
    """Its learning rate, for the loss ½‖y − ŷ‖²."""
    batch: int = 20
    """Fresh pairs per update."""
    depth: int = 2
    """Layers."""
    width: int = 32
    """Units of each hidden layer."""
    scale: float = 1e-3
    """Standard deviation of the initial weights."""
    updates: int = 0
    """Updates. 0: a third more than Saxe's closed form needs for the least mode."""
    records: int = 100
    """Log-spaced updates at which the probe runs."""
    balanced_learning_rate: float = 0.02
    """Learning rate from the balanced start: small, as the closed form has continuous time."""
    balanced_strength: float = 1e-3
    """a₀ of the balanced start."""

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "batch", "depth", "width", "scale", "records")
        check_positive(self, "balanced_learning_rate", "balanced_strength")
        check(self.updates >= 0, "updates", self.updates, "must be 0 or more")
        named_optimizer(self.optimizer, self.learning_rate)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything the study depends on, beside its seed."""

    domain: LinearRegression = LinearRegression()
    lstm: LSTMConfig = LSTMConfig()
    outer: OuterConfig = OuterConfig()
    sgd: SGDConfig = SGDConfig()
    measure: MeasureConfig = MeasureConfig()
    excess_at_most: float = 0.4
    """Greatest excess loss over Bayes with which the criterion on it passes."""


def plan(config: Config) -> Plan:
    """What is trained and measured."""
    domain, sgd, sizes = config.domain, config.sgd, config.measure
    n_x, n_y = domain.n_x, domain.n_y
    meta = LSTMMetaLearner(domain, config.lstm)
    probe = domain.probe(sizes.probe_points)
    aligned = partial(domain.evaluation_task, rotate=False)

    def tasks(name, size, scale=1.0, outsize=1.0, sample=domain.evaluation_task):
        s = domain.spectrum(scale, outsize)
        attrs = {
            "mode_coordinate": "singular_value",
            "mode_label": "singular value $s_k$",
            "p": LEARNED,
        }
        if name in SHIFTS:
            attrs |= {"shift": scale * outsize} | ({"outsize": outsize} if outsize > 1 else {})
        coords = {"singular_value": ("mode", s)}
        return TaskSet(name, domain, sample, size, np.float32(s), probe, coords, attrs)

    observed = tuple(range(domain.steps + 1))
    lstm = Contender("lstm", "meta-trained LSTM", meta.learner, observed, trained=True, panel=1)
    bayes = plain("bayes", "Bayes-optimal", bayes_linear(domain), observed, panel=2)
    references = [
        plain("ridge", "ridge", ridge(n_x, n_y, penalty=1.0), observed),
        plain("least_squares", "least squares", least_squares(n_x, n_y), observed),
    ]

    def descent(name, label, network, start, learning_rate, panel=None):
        """A network under gradient descent, and Saxe's closed form at the times it is probed."""
        s = np.array(domain.spectrum())
        updates = sgd.updates or updates_to_learn(s[-1], start, learning_rate, strength=0.9)
        times = log_spaced(updates, sgd.records)
        learner = gradient(network, named_optimizer(sgd.optimizer, learning_rate), sgd.batch)
        curve = saxe_strength(np.array(times), s, start, learning_rate)
        return plain(name, label, learner, times, panel), curve

    random, random_curve = descent(
        "sgd",
        f"{sgd.depth}-layer linear network, {sgd.optimizer.upper()}",
        deep_linear(n_x, n_y, sgd.depth, sgd.width, sgd.scale),
        random_start(sgd.width, sgd.scale),
        sgd.learning_rate,
        panel=0,
    )
    balanced, balanced_curve = descent(
        "sgd_balanced",
        "SGD, balanced start",
        balanced_deep_linear(
            n_x, n_y, width=max(sgd.width, domain.modes), strength=sgd.balanced_strength
        ),
        sgd.balanced_strength,
        sgd.balanced_learning_rate,
    )
    main = tasks("in_distribution", sizes.tasks)
    few = dataclasses.replace(main, size=sizes.updating_tasks)
    few_aligned = tasks("aligned", sizes.updating_tasks, sample=aligned)
    shifted = [
        tasks(name, sizes.shifted_tasks, *factors)
        for name, factors in SHIFTS.items()
        if name != main.name
    ]
    heldout = TaskSet(HELDOUT, domain, lambda key, _: domain.sample_task(key), sizes.heldout_tasks)
    # Saxe's closed form is that of two layers under plain gradient descent.
    saxe = sgd.depth == 2 and sgd.optimizer == "sgd"
    return Plan(
        outer=config.outer,
        trainings=[
            Training(
                learner=lstm,
                trainee=Trainee(meta, prediction_loss(domain, meta)),
                bayes=bayes,
                tracked=tasks(TRACKED, sizes.tracked_tasks),
                heldout=heldout,
            )
        ],
        measurements=[
            (few, random),
            *([(few_aligned, balanced)] if saxe else []),
            *((main, each) for each in (lstm, bayes, *references)),
            *((each, learner) for each in shifted for learner in (lstm, bayes)),
        ],
        curves={
            ("in_distribution", "sgd"): random_curve,
            ("aligned", "sgd_balanced"): balanced_curve,
        }
        if saxe
        else {},
        chunk=sizes.chunk,
    )


def criteria(config: Config, run: RunFolder):
    """What the science says of the stored measurements."""
    excess = partial(dynamics.excess_loss, floor=config.domain.loss_floor)

    def shifted(name):
        """Losses of the LSTM and Bayes on one set of tasks, and the share of saturated gates."""
        lstm, bayes = run.measurement(name, "lstm"), run.measurement(name, "bayes")
        gates = dynamics.samples(lstm, "saturated_gates")[:, :, 1:].mean(-1)
        return dynamics.episode_loss(lstm), dynamics.episode_loss(bayes), gates

    sgd, lstm, bayes = (
        run.measurement("in_distribution", name) for name in ("sgd", "lstm", "bayes")
    )
    yield criterion(
        "sgd_slope",
        dynamics.measured(dynamics.slope_of, sgd),
        "SGD learns mode after mode: slope of log t_k on log s_k near -1, at most -0.7",
        at_most=-0.7,
    )
    yield censored("sgd", sgd)
    yield criterion(
        "lstm_minus_bayes_slope",
        dynamics.difference(dynamics.slope_of, lstm, bayes),
        "the LSTM staggers no more than Bayes: slopes differ by at most 0.2",
        at_most=0.2,
        at_least=-0.2,
    )
    yield criterion(
        "lstm_slope",
        dynamics.measured(dynamics.slope_of, lstm),
        "the LSTM's own slope, for the record",
    )
    yield censored("lstm", lstm)
    yield criterion(
        "bayes_slope",
        dynamics.measured(dynamics.slope_of, bayes),
        "Bayes learns all modes at one rate: slope 0, at most 0.05 either way",
        at_most=0.05,
        at_least=-0.05,
    )
    yield censored("bayes", bayes)
    stored = run.measurements()
    for name, task_set, learner, bound, expected in (
        (
            "saxe_balanced",
            "aligned",
            "sgd_balanced",
            0.05,
            "from a balanced start SGD keeps to Saxe's learning times: worst mode within 5 %",
        ),
        (
            "saxe_random",
            "in_distribution",
            "sgd",
            np.inf,
            "from random weights, worst relative distance to Saxe's times, for the record",
        ),
    ):
        if learner not in stored.get(task_set, []):
            continue
        data = run.measurement(task_set, learner)
        curve = data.get("closed_form")
        if curve is None:
            continue
        learned = dynamics.times_of(data)
        theory = learned(curve.values)

        def worst(mean, learned=learned, theory=theory):
            return np.abs(learned(mean) / theory - 1).max(-1)

        yield criterion(
            name, dynamics.estimate(worst, dynamics.strength(data)), expected, at_most=bound
        )
    bound = config.excess_at_most
    yield criterion(
        "excess_loss",
        dynamics.measured_excess(
            run.trajectories(HELDOUT).isel(outer_step=-1), run.measurement(HELDOUT, "bayes")
        ),
        f"the LSTM comes near Bayes on held-out tasks: excess loss at most {bound:g}",
        at_most=bound,
    )
    lstm, bayes, gates = shifted("in_distribution")
    yield criterion(
        "saturated_gates",
        dynamics.estimate(lambda mean: mean, gates),
        "share of the LSTM's gates within 0.05 of 0 or 1, in distribution",
    )
    for name, (scale, outsize) in SHIFTS.items():
        if name == "in_distribution":
            continue
        far_lstm, far_bayes, gates = shifted(name)
        what = f"spectrum x{scale}" if outsize == 1 else f"greatest mode x{outsize}"
        yield criterion(
            f"out_of_distribution_{name}",
            dynamics.estimate(
                lambda a, b, c, d: excess(a, b) - excess(c, d), far_lstm, far_bayes, lstm, bayes
            ),
            f"{what}: the LSTM falls behind Bayes; its excess loss exceeds that in distribution",
            at_least=0.0,
        )
        yield criterion(
            f"saturated_gates_{name}",
            dynamics.estimate(lambda mean: mean, gates),
            f"share of the LSTM's gates within 0.05 of 0 or 1, {what}",
        )


QUICK = Config(
    domain=LinearRegression(n_x=3, n_y=3),
    outer=OuterConfig(steps=12_000, batch=32, learning_rate=2e-2),
    measure=MeasureConfig(
        tasks=8192, shifted_tasks=1024, tracked_tasks=96, heldout_tasks=256, probe_points=12
    ),
)
PAPER = Config(
    lstm=LSTMConfig(hidden=256),
    outer=OuterConfig(steps=100_000, batch=1024, learning_rate=4e-3, warmup=1000, checkpoints=40),
    measure=MeasureConfig(
        tasks=65_536, updating_tasks=1024, shifted_tasks=8192, heldout_tasks=8192
    ),
    excess_at_most=0.05,
)

study = Study(
    "linear_regression",
    {"quick": QUICK, "paper": PAPER},
    plan,
    criteria,
    section="§2",
    claims=(
        Claim(
            "SGD on a linear network learns singular modes from greatest to least",
            "sgd_slope",
            "mode_strength",
        ),
        Claim(
            "A meta-trained LSTM learns nearly all singular modes at once, as Bayes does",
            "lstm_minus_bayes_slope",
            "learning_times",
        ),
        Claim(
            "Its losses are near those of Bayes-optimal inference",
            "excess_loss",
            "distance_to_bayes",
        ),
        Claim(
            "Out of distribution it falls behind Bayes",
            "out_of_distribution_x4",
            "learned_spectrum",
        ),
    ),
)
