"""Nonlinear regression: an MLP learns low frequencies first, an LSTM and Bayes all at once.

    metadyn run nonlinear_regression [--preset quick|workstation|paper] [--meta NAME] [overrides]

After Rahaman et al. (2018), arXiv:1806.08734, and Rabinowitz (2019), arXiv:1905.01320, §3. A second
LSTM is trained on a band of frequencies and tested in its stop band, beside Bayes with that prior.
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
    """An ordinary learner, on a fixed set of pairs."""

    optimizer: str = "adam"
    learning_rate: float = 1e-3
    batch: int = 64
    """Pairs per update: all of them (full batch) where there are no more."""
    depth: int = 6
    width: int = 256
    updates: int = 400
    records: int = 60
    points: int = 64
    """N, pairs that the network is trained on. 0: fresh ones at every update."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "updates")
        fix = f"must be no fewer than the batch of {self.batch}, or 0 for fresh pairs"
        check(self.points == 0 or self.points >= self.batch, "points", self.points, fix)


@dataclass(frozen=True)
class OptimizersConfig:
    """The same small MLP under several optimisers, each at a learning rate of our choice."""

    sgd: MLPConfig = MLPConfig("sgd", 0.2, depth=4, width=64, updates=5000)
    momentum: MLPConfig = MLPConfig("momentum", 0.02, depth=4, width=64, updates=5000)
    rmsprop: MLPConfig = MLPConfig("rmsprop", 1e-3, depth=4, width=64, updates=1000)
    adam: MLPConfig = MLPConfig("adam", 1e-3, depth=4, width=64, updates=1500)


@dataclass(frozen=True)
class Config(md.StudyConfig):
    """Everything the study depends on, beside its seed."""

    domain: FourierRegression = FourierRegression()
    target: Target = "feedback"
    """What meta-learners are trained to predict: y_t, or Bayes' answer, of which y_t is a noisy
    sample. The expected gradient is the same."""
    pass_band: Spectrum = band(2, 4)
    """Prior spectrum of the second LSTM, from frequency 0 on."""
    pass_band_updates: int = 1
    """Updates of the second LSTM in each outer step; the first has `outer.updates_per_step`."""
    stop_band: tuple[int, ...] = (1, 5)
    """Frequencies outside it, in which it is tested."""
    mlp: MLPConfig = MLPConfig()
    optimizers: OptimizersConfig = OptimizersConfig()
    excess_at_most: float = 0.58
    """Greatest excess loss over Bayes with which the criterion on it passes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "pass_band_updates")
        check_spectrum("pass_band", self.pass_band)
        passed = {k for k, v in enumerate(self.pass_band) if v > 0}
        apart = self.stop_band and all(k > 0 and k not in passed for k in self.stop_band)
        fix = f"name at least one frequency, all above 0 and outside pass_band: {sorted(passed)}"
        check(bool(apart), "stop_band", self.stop_band, fix)


def network(name: str, config: MLPConfig, drawn: bool = False) -> md.Contender:
    """An MLP under gradient descent."""
    optimizer = named_optimizer(config.optimizer, config.learning_rate)
    body = mlp(1, 1, config.depth, config.width)
    learner = gradient(body, optimizer, config.batch, points=config.points or None)
    label = f"MLP {config.depth} × {config.width}, {config.optimizer}"
    times = log_spaced(config.updates, config.records)
    return md.Contender(name, label, learner, times=times, drawn=drawn)


def plan(config: Config) -> md.Plan:
    """What is trained and measured."""
    domain, sizes, several = config.domain, config.measure, config.optimizers
    domains = domain, replace(domain, spectrum=config.pass_band)
    passed, stopped = domains[1].support, config.stop_band
    small = [network(f.name, getattr(several, f.name)) for f in fields(several)]
    metas = [config.meta_learner(each) for each in domains]
    own = replace(metas[1].own or config.outer, updates_per_step=config.pass_band_updates)
    metas[1] = replace(metas[1], own=own)
    bayes = [md.Contender("bayes", "Bayes-optimal", bayes_fourier(d), "bayes") for d in domains]
    objectives = [predicting(config.target, each.learner) for each in bayes]
    contenders = [network("mlp", config.mlp, drawn=True), *small, metas[0], bayes[0]]
    within = sizes.sized(domain.evaluation(sizes.probe_points))
    sets = [
        sizes.sized(domains[1].evaluation(sizes.probe_points, of), "shifted_tasks", name)
        for name, of in zip(TITLES, (passed, stopped, (*passed, *stopped)), strict=True)
    ]
    main = md.Comparison(domain, contenders, [within], (), sizes, objectives[0])
    shown = {"name": "band", "title": "band-pass prior"}
    second = [domains[1], [metas[1], bayes[1]], sets, (), sizes, objectives[1]]
    return md.Plan(config.outer, [main, md.Comparison(*second, **shown)])


def criteria(config: Config, results):
    """What the science says of what was measured."""
    for name in results.learners("in_distribution", "ordinary"):
        said = "learns low frequencies first: slope of log t_k on log k"
        yield from staggering(results, name, f"{name} {said}", at_least=0.5)
    mlp = results["in_distribution", "mlp"]
    times, by = dynamics.times_of(mlp), np.array(trajectories.modes(mlp).values)
    ranks = lambda mean: dynamics.rank_correlation(by, times(mean))
    found = dynamics.estimate(ranks, dynamics.strength(mlp))
    said = "the MLP learns in order of frequency: Spearman's rank correlation"
    yield md.criterion("mlp_rank_correlation", found, said, at_least=0.9)
    yield from beyond_bayes(results, within=0.3)
    yield from staggering(results, "bayes", "its own, for the record")
    for name, data in results.learners("in_distribution", "ordinary", "meta", drawn=True).items():
        outside = dynamics.estimate(np.asarray, dynamics.samples(data, "outside")[:, :, -1])
        said = "power at frequencies that the target lacks, over the target's, at the end"
        yield md.criterion(f"{name}_power_outside", outside, said)
    for name, data in results.learners("mixture", "meta", "bayes").items():
        about = trajectories.about(data)
        stopped = np.isin(trajectories.modes(data).values, config.stop_band)
        end = [dynamics.strength(results[each, name])[:, :, -1] for each in TITLES]
        parts = {"pass_band": end[0], "stop_band_alone": end[1]}
        parts |= {"mixture_pass": end[2][..., ~stopped], "mixture_stop": end[2][..., stopped]}
        gain = {what: part.mean(-1) for what, part in parts.items()}
        if about.kind == "meta":
            ratio = dynamics.estimate(np.divide, gain["stop_band_alone"], gain["pass_band"])
            said = f"gain of the {about.label} outside its band over that inside"
            yield md.criterion(f"{name}_stop_band_gain", ratio, said, at_most=0.3)
        for what, each in gain.items():
            mean, said = dynamics.estimate(np.asarray, each), what.replace("_", " ")
            yield md.criterion(f"{name}_band_gain_{what}", mean, f"mean gain at the end: {said}")
    yield from excess(results, config.excess_at_most)
    yield from excess(results, suffix="_band")


def band_gain(results):
    """Draws the gain of each frequency that the targets contain; the training band is shaded."""
    band = trajectories.modes(results["pass_band", "bayes"]).values
    return figures.final_strength(results, TITLES, band)


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
