"""Nonlinear regression: an MLP learns low frequencies first, an LSTM and Bayes all at once.

    metadyn run nonlinear_regression [--preset quick|workstation|paper] [--meta NAME] [overrides]

After Rahaman et al. (2018), arXiv:1806.08734, and Rabinowitz (2019), arXiv:1905.01320, §3. A second
LSTM is trained on a band of frequencies and tested outside it, as is Bayes with the same prior.
"""

from dataclasses import dataclass, fields, replace

import numpy as np

import metadyn as md
from metadyn import dynamics, figures, trajectories
from metadyn.domains.fourier import FourierRegression, Spectrum, band, check_spectrum
from metadyn.errors import check, check_positive
from metadyn.inner import log_spaced
from metadyn.learners.bayes import bayes_fourier
from metadyn.learners.gradient import NetworkDescentConfig, gradient, mlp
from metadyn.learners.lstm import LSTMConfig
from metadyn.objectives import Target, predicting
from metadyn.optimizers import named_optimizer
from metadyn.study import as_bayes, beyond_bayes, excess, paper, staggering

TITLES = {"pass_band": "pass-band targets", "stop_band": "stop-band targets"}
TITLES["mixture"] = "mixtures of the two"


@dataclass(frozen=True)
class MLPConfig(NetworkDescentConfig):
    """Settings of an ordinary learner: an MLP, trained on a fixed set of pairs by default."""

    optimizer: str = "adam"
    learning_rate: float = 1e-3
    batch: int = 64
    """Pairs in each update. If `points` is the same number, that is all of them (full batch)."""
    depth: int = 6
    width: int = 256
    updates: int = 400
    records: int = 60
    points: int = 64
    """N, the number of pairs that the network is trained on. 0: fresh pairs at every update."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "updates")
        hint = f"must be no fewer than the batch of {self.batch}, or 0 for fresh pairs"
        check(self.points == 0 or self.points >= self.batch, "points", self.points, hint)


@dataclass(frozen=True)
class OptimizersConfig:
    """Settings of one small MLP under several optimisers, at learning rates of our choice."""

    sgd: MLPConfig = MLPConfig("sgd", 0.2, depth=4, width=64, updates=5000)
    momentum: MLPConfig = MLPConfig("momentum", 0.02, depth=4, width=64, updates=5000)
    rmsprop: MLPConfig = MLPConfig("rmsprop", 1e-3, depth=4, width=64, updates=1000)
    adam: MLPConfig = MLPConfig("adam", 1e-3, depth=4, width=64, updates=1500)


@dataclass(frozen=True)
class Config(md.StudyConfig):
    """All settings of the study, except its seed."""

    domain: FourierRegression = FourierRegression()
    target: Target = "feedback"
    """What meta-learners are trained to predict: y_t ("feedback"), or its mean given the pairs so
    far, which is Bayes' answer ("bayes"). Both give the same expected gradient."""
    pass_band: Spectrum = band(2, 4)
    """Prior spectrum of the second LSTM's tasks: a variance for each frequency, from 0 on."""
    pass_band_updates: int = 1
    """Updates of the second LSTM in each outer step; the first has `outer.updates_per_step`."""
    stop_band: tuple[int, ...] = (1, 5)
    """Frequencies outside the pass band, on which the second LSTM is tested."""
    mlp: MLPConfig = MLPConfig()
    optimizers: OptimizersConfig = OptimizersConfig()
    excess_at_most: float = 0.58
    """Upper bound on the excess loss over Bayes in the criterion that judges it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "pass_band_updates")
        check_spectrum("pass_band", self.pass_band)
        passed = {k for k, v in enumerate(self.pass_band) if v > 0}
        valid = self.stop_band and all(k > 0 and k not in passed for k in self.stop_band)
        hint = f"name at least one frequency, all above 0 and outside pass_band: {sorted(passed)}"
        check(bool(valid), "stop_band", self.stop_band, hint)


def descent(name: str, config: MLPConfig, drawn: bool = False) -> md.Contender:
    """Returns an MLP under gradient descent."""
    optimizer = named_optimizer(config.optimizer, config.learning_rate)
    network = mlp(1, 1, config.depth, config.width)
    learner = gradient(network, optimizer, config.batch, points=config.points or None)
    label = f"MLP {config.depth} × {config.width}, {config.optimizer}"
    times = log_spaced(config.updates, config.records)
    return md.Contender(name, label, learner, times=times, drawn=drawn)


def plan(config: Config) -> md.Plan:
    """Returns the learners to train and compare, and the sets of tasks to measure them on."""
    domain, sizes, optimizers = config.domain, config.measure, config.optimizers
    domains = domain, replace(domain, spectrum=config.pass_band)
    passed, stopped = domains[1].support, config.stop_band
    small_mlps = [descent(f.name, getattr(optimizers, f.name)) for f in fields(optimizers)]
    metas = [config.meta_learner(d) for d in domains]
    outer = replace(metas[1].own or config.outer, updates_per_step=config.pass_band_updates)
    metas[1] = replace(metas[1], own=outer)
    bayes = [md.Contender("bayes", "Bayes-optimal", bayes_fourier(d), "bayes") for d in domains]
    objectives = [predicting(config.target, contender.learner) for contender in bayes]
    contenders = [descent("mlp", config.mlp, drawn=True), *small_mlps, metas[0], bayes[0]]
    tasks = sizes.sized(domain.evaluation(sizes.probe_points))
    band_sets = [
        sizes.sized(domains[1].evaluation(sizes.probe_points, frequencies), "shifted_tasks", name)
        for name, frequencies in zip(TITLES, (passed, stopped, (*passed, *stopped)), strict=True)
    ]
    main = md.Comparison(domain, contenders, [tasks], (), sizes, objectives[0])
    names = {"name": "band", "title": "band-pass prior"}
    second = [domains[1], [metas[1], bayes[1]], band_sets, (), sizes, objectives[1]]
    return md.Plan(config.outer, [main, md.Comparison(*second, **names)])


def criteria(config: Config, results):
    """Yields criteria on the order of frequencies, on gains in and outside a band, and on loss."""
    for name in results.learners("in_distribution", "ordinary"):
        text = "learns low frequencies first: slope of log t_k on log k"
        yield from staggering(results, name, f"{name} {text}", at_least=0.5)
    mlp = results["in_distribution", "mlp"]
    times_of, frequencies = dynamics.times_of(mlp), np.array(trajectories.modes(mlp).values)
    rank_correlation = lambda mean: dynamics.rank_correlation(frequencies, times_of(mean))
    correlation = dynamics.estimate(rank_correlation, dynamics.strength(mlp))
    text = "the MLP learns in order of frequency: Spearman's rank correlation"
    yield md.criterion("mlp_rank_correlation", correlation, text, at_least=0.9)
    yield from beyond_bayes(results, within=0.3)
    yield from staggering(results, "bayes", "its own, for the record")
    for name, data in results.learners("in_distribution", "ordinary", "meta", drawn=True).items():
        power = dynamics.estimate(np.asarray, dynamics.samples(data, "outside")[:, :, -1])
        text = "power at frequencies that the target lacks, over the target's, at the end"
        yield md.criterion(f"{name}_power_outside", power, text)
    for name, data in results.learners("mixture", "meta", "bayes").items():
        about = trajectories.about(data)
        stopped = np.isin(trajectories.modes(data).values, config.stop_band)
        final = [dynamics.strength(results[tasks, name])[:, :, -1] for tasks in TITLES]
        parts = {"pass_band": final[0], "stop_band_alone": final[1]}
        parts |= {"mixture_pass": final[2][..., ~stopped], "mixture_stop": final[2][..., stopped]}
        gains = {part: strengths.mean(-1) for part, strengths in parts.items()}
        if about.kind == "meta":
            ratio = dynamics.estimate(np.divide, gains["stop_band_alone"], gains["pass_band"])
            text = f"gain of the {about.label} outside its band over that inside"
            yield md.criterion(f"{name}_stop_band_gain", ratio, text, at_most=0.3)
        for part, gain in gains.items():
            mean, words = dynamics.estimate(np.asarray, gain), part.replace("_", " ")
            yield md.criterion(f"{name}_band_gain_{part}", mean, f"mean gain at the end: {words}")
    yield from excess(results, config.excess_at_most)
    yield from excess(results, suffix="_band")


def band_gain(results):
    """Draws the final gain of each frequency in the targets, with the training band shaded."""
    shaded = trajectories.modes(results["pass_band", "bayes"]).values
    return figures.final_strength(results, TITLES, shaded)


QUICK = Config(
    domain=FourierRegression(embedding="angle"),
    lstm=LSTMConfig(vector_rate=3.0),
    target="bayes",
    outer=md.OuterConfig(6000, optimizer="nadam", b2=0.98, learning_rate=3e-2, schedule="linear"),
    measure=md.MeasureConfig(4096, 16, shifted_tasks=1024, tracked_tasks=64, heldout_tasks=2048),
)
WORKSTATION = Config(
    lstm=LSTMConfig(hidden=96),
    target="bayes",
    outer=md.OuterConfig(8000, 64, 8, optimizer="nadam", b2=0.98, learning_rate=2e-2),
    measure=md.MeasureConfig(updating_tasks=64, tracked_tasks=256, heldout_tasks=4096),
    excess_at_most=0.3,
)
PAPER = Config(
    **paper(100_000, batch=1024, checkpoints=40),
    measure=md.MeasureConfig(
        tasks=65_536, updating_tasks=256, shifted_tasks=8192, heldout_tasks=8192, probe_points=64
    ),
    excess_at_most=0.1,
)
study = md.Study(
    "nonlinear_regression",
    {"quick": QUICK, "workstation": WORKSTATION, "paper": PAPER},
    plan,
    criteria,
    {
        "mode_strength_by_optimizer": figures.strengths_on("in_distribution", "ordinary"),
        "band_gain": band_gain,
    },
    section="§3",
    claims={
        "mode_strength": {"mlp_slope": "An MLP learns low frequencies first"},
        **as_bayes("frequencies"),
        "band_gain": {"lstm_stop_band_gain": "Trained on a band, it suppresses the rest"},
    },
)
