"""Nonlinear regression: an MLP learns low frequencies first, an LSTM and Bayes all at once.

    metadyn run experiments/nonlinear_regression.py [--preset quick|paper] [--out DIR] [overrides]

After Rahaman et al. (2018), arXiv:1806.08734, and Rabinowitz (2019), arXiv:1905.01320, §3. A second
LSTM is trained on a band of frequencies and tested in its stop band, beside Bayes with that prior.
"""

import dataclasses

import numpy as np

from metadyn import dynamics
from metadyn.base import check, check_positive
from metadyn.domains.fourier import FourierRegression, Spectrum, band, check_spectrum, uniform_grid
from metadyn.inner import log_spaced
from metadyn.learners.bayes import bayes_fourier
from metadyn.learners.gradient import gradient, mlp, named_optimizer
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


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """An ordinary learner. The paper's values are not known to us: these are our choice."""

    optimizer: str = "adam"
    """An optimiser of optax, by name; or momentum, sgd with a momentum of 0.9."""
    learning_rate: float = 1e-3
    """Its learning rate, for the loss ½(y − ŷ)²."""
    depth: int = 6
    """Hidden layers."""
    width: int = 256
    """Units of each."""
    points: int = 64
    """N, pairs that the network is trained on. 0: fresh ones at every update."""
    batch: int = 64
    """Pairs per update: all of them (full batch) where there are no more."""
    updates: int = 400
    """Optimiser updates."""
    records: int = 60
    """Log-spaced updates at which the probe runs."""

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "depth", "width", "batch", "updates", "records")
        enough = self.points == 0 or self.points >= self.batch
        fix = f"must be no fewer than the batch of {self.batch}, or 0 for fresh pairs"
        check(enough, "points", self.points, fix)
        named_optimizer(self.optimizer, self.learning_rate)


@dataclasses.dataclass(frozen=True)
class OptimizersConfig:
    """The same small MLP under several optimisers, each at a learning rate of our choice."""

    sgd: MLPConfig = MLPConfig("sgd", 0.2, depth=4, width=64, updates=5000)
    momentum: MLPConfig = MLPConfig("momentum", 0.02, depth=4, width=64, updates=5000)
    rmsprop: MLPConfig = MLPConfig("rmsprop", 1e-3, depth=4, width=64, updates=1000)
    adam: MLPConfig = MLPConfig("adam", 1e-3, depth=4, width=64, updates=1500)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything the study depends on, beside its seed."""

    domain: FourierRegression = FourierRegression()
    pass_band: Spectrum = band(2, 4)
    """Prior spectrum of the second LSTM, from frequency 0 on."""
    stop_band: tuple[int, ...] = (1, 5)
    """Frequencies outside it, in which it is tested."""
    lstm: LSTMConfig = LSTMConfig()
    outer: OuterConfig = OuterConfig()
    mlp: MLPConfig = MLPConfig()
    optimizers: OptimizersConfig = OptimizersConfig()
    measure: MeasureConfig = MeasureConfig()
    examples: int = 3
    """Example functions in the figure of answers."""
    excess_at_most: float = 0.6
    """Greatest excess loss over Bayes with which the criterion on it passes."""

    def __post_init__(self) -> None:
        check_positive(self, "examples")
        check_spectrum("pass_band", self.pass_band)
        check(len(self.stop_band) > 0, "stop_band", self.stop_band, "name at least one frequency")
        passed = {k for k, v in enumerate(self.pass_band) if v > 0}
        apart = all(k > 0 and k not in passed for k in self.stop_band)
        check(apart, "stop_band", self.stop_band, "frequencies must be above 0, outside pass_band")


def plan(config: Config) -> Plan:
    """What is trained and measured."""
    domain, sizes = config.domain, config.measure
    band_domain = dataclasses.replace(domain, spectrum=config.pass_band)

    def tasks(name, size, domain=domain, frequencies=None, curves=False, **attrs):
        amplitudes = domain.amplitudes(frequencies)
        points = max(128, sizes.probe_points) if curves else sizes.probe_points
        probe = domain.probe(amplitudes, points, curves)
        coords = {"frequency": ("mode", np.flatnonzero(amplitudes).tolist())}
        coords |= {"x": ("x", uniform_grid(points).tolist())} if curves else {}
        attrs |= {"mode_coordinate": "frequency", "mode_label": "frequency $k$", "p": LEARNED}
        attrs |= {"curves": True} if curves else {}
        arguments = (name, domain, domain.evaluation_task, size, np.float32(amplitudes))
        return TaskSet(*arguments, probe, coords, attrs)

    observed = tuple(range(domain.steps + 1))

    def trained(suffix, label, domain):
        """An LSTM, Bayes on the same prior, and how the LSTM is trained."""
        meta, sample = LSTMMetaLearner(domain, config.lstm), lambda key, _: domain.sample_task(key)
        names = (f"lstm{suffix}", f"meta-trained LSTM{label}")
        bayes = (f"bayes{suffix}", f"Bayes-optimal{label}")
        return Training(
            learner=Contender(*names, meta.learner, observed, trained=True, panel=1),
            trainee=Trainee(meta, prediction_loss(domain, meta)),
            bayes=plain(*bayes, bayes_fourier(domain), observed, panel=2),
            tracked=tasks(TRACKED + suffix, sizes.tracked_tasks, domain),
            heldout=TaskSet(HELDOUT + suffix, domain, sample, sizes.heldout_tasks),
        )

    def network(name, config, panel):
        """An MLP under gradient descent."""
        optimizer = named_optimizer(config.optimizer, config.learning_rate)
        learner = gradient(
            mlp(1, 1, config.depth, config.width),
            optimizer,
            config.batch,
            points=config.points or None,
        )
        label = f"MLP {config.depth} × {config.width}, {config.optimizer}"
        return plain(name, label, learner, log_spaced(config.updates, config.records), panel)

    main, banded = trained("", "", domain), trained("_band", ", band-pass", band_domain)
    ordinary = network("mlp", config.mlp, 0)
    in_distribution = tasks("in_distribution", sizes.tasks)
    by_optimizer = tasks("by_optimizer", sizes.updating_tasks, compared=True)
    passed, stopped = band_domain.support, config.stop_band
    in_bands = [
        tasks(
            name,
            sizes.shifted_tasks,
            band_domain,
            frequencies,
            targets=targets,
            order=order,
            band=list(passed),
        )
        for order, (name, targets, frequencies) in enumerate(
            (
                ("pass_band", "pass-band targets", passed),
                ("stop_band", "stop-band targets", stopped),
                ("mixture", "mixtures of the two", (*passed, *stopped)),
            )
        )
    ]
    examples = tasks("examples", config.examples, curves=True)

    def glimpsed(contender):
        """A contender probed at a few times alone."""
        last = contender.times[-1]
        few = sorted({0, *(max(1, round(last * part)) for part in (0.05, 0.15, 0.4, 1))})
        return dataclasses.replace(contender, times=tuple(few))

    return Plan(
        outer=config.outer,
        trainings=[main, banded],
        measurements=[
            (dataclasses.replace(in_distribution, size=sizes.updating_tasks), ordinary),
            (in_distribution, main.learner),
            (in_distribution, main.bayes),
            *(
                (by_optimizer, network(field.name, getattr(config.optimizers, field.name), panel))
                for panel, field in enumerate(dataclasses.fields(config.optimizers))
            ),
            *((each, who) for each in in_bands for who in (banded.learner, banded.bayes)),
            *((examples, glimpsed(who)) for who in (ordinary, main.learner, main.bayes)),
        ],
        chunk=sizes.chunk,
    )


def criteria(config: Config, run: RunFolder):
    """What the science says of the stored measurements."""

    def end(task_set, learner):
        """Gain at the end of the episode [seed, task, mode]."""
        return dynamics.strength(run.measurement(task_set, learner).isel(step=[-1]))[:, :, 0]

    mlp, lstm, bayes = (
        run.measurement("in_distribution", name) for name in ("mlp", "lstm", "bayes")
    )
    yield criterion(
        "mlp_slope",
        dynamics.measured(dynamics.slope_of, mlp),
        "the MLP learns low frequencies first: slope of log t_k on log k at least 0.5",
        at_least=0.5,
    )
    times, by = dynamics.times_of(mlp), dynamics.scale(mlp)
    yield criterion(
        "mlp_rank_correlation",
        dynamics.estimate(
            lambda a: dynamics.rank_correlation(by, times(a)), dynamics.strength(mlp)
        ),
        "the MLP learns in order of frequency: Spearman's rank correlation at least 0.9",
        at_least=0.9,
    )
    yield censored("mlp", mlp)
    yield criterion(
        "lstm_minus_bayes_slope",
        dynamics.difference(dynamics.slope_of, lstm, bayes),
        "the LSTM staggers no more than Bayes: slopes differ by at most 0.3",
        at_most=0.3,
        at_least=-0.3,
    )
    for name, data in (("lstm", lstm), ("bayes", bayes)):
        yield criterion(
            f"{name}_slope",
            dynamics.measured(dynamics.slope_of, data),
            "its own slope, for the record",
        )
        yield censored(name, data)
    for name, data in (("mlp", mlp), ("lstm", lstm)):
        yield criterion(
            f"{name}_power_outside",
            dynamics.estimate(lambda mean: mean, dynamics.samples(data, "outside")[:, :, -1]),
            "power at frequencies that the target does not contain, over the target's, at the end",
        )
    yield criterion(
        "stop_band_gain",
        dynamics.estimate(
            lambda stopped, passed: stopped.mean(-1) / passed.mean(-1),
            end("stop_band", "lstm_band"),
            end("pass_band", "lstm_band"),
        ),
        "trained on a band, the LSTM suppresses the rest: stop-band gain at most 0.3 of pass-band",
        at_most=0.3,
    )
    for task_set in ("pass_band", "stop_band"):
        for learner in ("lstm_band", "bayes_band"):
            yield criterion(
                f"{learner}_{task_set}_gain",
                dynamics.estimate(lambda mean: mean.mean(-1), end(task_set, learner)),
                f"mean gain of the {task_set.replace('_', '-')} targets' frequencies at the end",
            )
    stopped = np.isin(dynamics.scale(run.measurement("mixture", "lstm_band")), config.stop_band)
    for learner in ("lstm_band", "bayes_band"):
        gain = end("mixture", learner)
        for name, here in (("pass", ~stopped), ("stop", stopped)):
            yield criterion(
                f"{learner}_mixture_{name}_gain",
                dynamics.estimate(lambda mean: mean.mean(-1), gain[..., here]),
                f"mean gain of the {name}-band frequencies of mixtures at the end",
            )
    for field in dataclasses.fields(config.optimizers):
        data = run.measurement("by_optimizer", field.name)
        yield criterion(
            f"{field.name}_slope",
            dynamics.measured(dynamics.slope_of, data),
            "the smaller MLP learns low frequencies first under this optimiser too",
            at_least=0.5,
        )
        yield censored(field.name, data)
    for suffix, what, bound in (("", "", config.excess_at_most), ("_band", " of its band", np.inf)):
        data = (
            run.trajectories(HELDOUT + suffix).isel(outer_step=-1),
            run.measurement(HELDOUT + suffix, "bayes" + suffix),
        )
        yield criterion(
            f"excess_loss{suffix}",
            dynamics.measured_excess(*data),
            f"the LSTM comes near Bayes on held-out tasks{what}: excess loss"
            + (f" at most {bound:g}" if np.isfinite(bound) else ", for the record"),
            at_most=bound,
        )


QUICK = Config(
    domain=FourierRegression(steps=40),
    outer=OuterConfig(steps=12_000, batch=32, learning_rate=3e-2, schedule="linear"),
    measure=MeasureConfig(
        tasks=4096,
        updating_tasks=16,
        shifted_tasks=1024,
        heldout_tasks=512,
        tracked_tasks=64,
        probe_points=32,
    ),
)
PAPER = Config(
    lstm=LSTMConfig(hidden=256),
    outer=OuterConfig(steps=100_000, batch=1024, learning_rate=4e-3, warmup=1000, checkpoints=40),
    measure=MeasureConfig(
        tasks=65_536, updating_tasks=256, shifted_tasks=8192, heldout_tasks=8192, probe_points=64
    ),
    excess_at_most=0.1,
)

study = Study(
    "nonlinear_regression",
    {"quick": QUICK, "paper": PAPER},
    plan,
    criteria,
    section="§3",
    claims=(
        Claim(
            "An MLP learns low frequencies first",
            "mlp_slope",
            "mode_strength",
        ),
        Claim(
            "A meta-trained LSTM learns nearly all frequencies at once, as Bayes does",
            "lstm_minus_bayes_slope",
            "learning_times",
        ),
        Claim(
            "Its losses are near those of Bayes-optimal inference",
            "excess_loss",
            "distance_to_bayes",
        ),
        Claim(
            "Trained on a band, it suppresses what lies outside it",
            "stop_band_gain",
            "band_gain",
        ),
    ),
)
