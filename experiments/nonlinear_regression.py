"""Nonlinear regression: an MLP learns low frequencies first, an LSTM and Bayes all at once.

    metadyn run nonlinear_regression [--preset quick|paper] [--meta lstm|gru] [overrides]

After Rahaman et al. (2018), arXiv:1806.08734, and Rabinowitz (2019), arXiv:1905.01320, §3. A second
LSTM is trained on a band of frequencies and tested in its stop band, beside Bayes with that prior.
"""

import dataclasses

import numpy as np

import metadyn as md
from metadyn import dynamics, figures, labelled
from metadyn.domains.fourier import FourierRegression, Spectrum, band, check_spectrum
from metadyn.errors import check, check_positive
from metadyn.inner import log_spaced
from metadyn.learners.bayes import bayes_fourier
from metadyn.learners.gradient import DescentConfig, gradient, mlp
from metadyn.learners.lstm import LSTMConfig
from metadyn.optimizers import named_optimizer
from metadyn.study import beyond_bayes, excess, staggering


@dataclasses.dataclass(frozen=True)
class MLPConfig(DescentConfig):
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
        enough = self.points == 0 or self.points >= self.batch
        fix = f"must be no fewer than the batch of {self.batch}, or 0 for fresh pairs"
        check(enough, "points", self.points, fix)


@dataclasses.dataclass(frozen=True)
class OptimizersConfig:
    """The same small MLP under several optimisers, each at a learning rate of our choice."""

    sgd: MLPConfig = MLPConfig("sgd", 0.2, depth=4, width=64, updates=5000)
    momentum: MLPConfig = MLPConfig("momentum", 0.02, depth=4, width=64, updates=5000)
    rmsprop: MLPConfig = MLPConfig("rmsprop", 1e-3, depth=4, width=64, updates=1000)
    adam: MLPConfig = MLPConfig("adam", 1e-3, depth=4, width=64, updates=1500)


@dataclasses.dataclass(frozen=True)
class Config(md.StudyConfig):
    """Everything the study depends on, beside its seed."""

    domain: FourierRegression = FourierRegression()
    pass_band: Spectrum = band(2, 4)
    """Prior spectrum of the second LSTM, from frequency 0 on."""
    stop_band: tuple[int, ...] = (1, 5)
    """Frequencies outside it, in which it is tested."""
    mlp: MLPConfig = MLPConfig()
    optimizers: OptimizersConfig = OptimizersConfig()
    examples: int = 3
    """Example functions in the figure of answers."""
    excess_at_most: float = 0.6
    """Greatest excess loss over Bayes with which the criterion on it passes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "examples")
        check_spectrum("pass_band", self.pass_band)
        check(len(self.stop_band) > 0, "stop_band", self.stop_band, "name at least one frequency")
        passed = {k for k, v in enumerate(self.pass_band) if v > 0}
        apart = all(k > 0 and k not in passed for k in self.stop_band)
        check(apart, "stop_band", self.stop_band, "frequencies must be above 0, outside pass_band")


def network(name: str, config: MLPConfig, drawn: bool) -> md.Contender:
    """An MLP under gradient descent."""
    optimizer = named_optimizer(config.optimizer, config.learning_rate)
    body, points = mlp(1, 1, config.depth, config.width), config.points or None
    learner = gradient(body, optimizer, config.batch, points=points)
    label = f"MLP {config.depth} × {config.width}, {config.optimizer}"
    times = log_spaced(config.updates, config.records)
    return md.Contender(name, label, learner, times=times, drawn=drawn)


def plan(config: Config) -> md.Plan:
    """What is trained and measured."""
    domain, sizes = config.domain, config.measure
    banded = dataclasses.replace(domain, spectrum=config.pass_band)
    passed, stopped = banded.support, config.stop_band
    bayes = [
        md.Contender("bayes", "Bayes-optimal", bayes_fourier(d), "bayes") for d in (domain, banded)
    ]
    main, smaller = network("mlp", config.mlp, drawn=True), config.optimizers
    by_optimizer = [
        network(field.name, getattr(smaller, field.name), drawn=False)
        for field in dataclasses.fields(smaller)
    ]
    lstm = config.meta_learner(domain)
    answers = domain.evaluation(max(128, sizes.probe_points), curves=True)
    examples = dataclasses.replace(
        answers, name="examples", size=config.examples, option="--examples"
    )

    def glimpsed(contender):
        """A contender probed at a few times alone."""
        last = contender.times_in(domain)[-1]
        few = sorted({0, *(max(1, round(last * part)) for part in (0.05, 0.15, 0.4, 1))})
        return dataclasses.replace(contender, times=tuple(few))

    return md.Plan(
        config.outer,
        [
            md.Comparison(
                domain,
                [main, *by_optimizer, lstm, bayes[0]],
                [sizes.sized(domain.evaluation(sizes.probe_points))],
                [(examples, glimpsed(who)) for who in (main, lstm, bayes[0])],
                sizes,
            ),
            md.Comparison(
                banded,
                [config.meta_learner(banded), bayes[1]],
                [
                    sizes.sized(banded.evaluation(sizes.probe_points, of), "shifted_tasks", name)
                    for name, of in (
                        ("pass_band", passed),
                        ("stop_band", stopped),
                        ("mixture", (*passed, *stopped)),
                    )
                ],
                measure=sizes,
                name="band",
                title="band-pass prior",
            ),
        ],
    )


def criteria(config: Config, results):
    """What the science says of what was measured."""

    def gain(task_set, learner, kept=slice(None)):
        """Mean gain of some frequencies at the end of the episode [seed, task, 1]."""
        strength = dynamics.strength(results[task_set, learner])[:, :, -1]
        return strength[..., kept].mean(-1)

    for name, data in results.learners("in_distribution", "ordinary").items():
        said = "learns low frequencies first: slope of log t_k on log k at least 0.5"
        yield from staggering(results, name, f"{name} {said}", at_least=0.5)
        if name == "mlp":
            said = "the MLP learns in order of frequency: Spearman's rank correlation at least 0.9"
            times, by = dynamics.times_of(data), dynamics.scale(data)
            ranks = lambda mean, t=times, by=by: dynamics.rank_correlation(by, t(mean))
            found = dynamics.measured(ranks, data)
            yield md.criterion("mlp_rank_correlation", found, said, at_least=0.9)
    yield from beyond_bayes(results, within=0.3)
    yield from staggering(results, "bayes", "its own, for the record")
    same = lambda mean: mean
    for name, data in results.learners("in_distribution", "ordinary", "meta", drawn=True).items():
        said = (
            "power at frequencies that the target does not contain, over the target's, at the end"
        )
        outside = dynamics.samples(data, "outside")[:, :, -1]
        yield md.criterion(f"{name}_power_outside", dynamics.estimate(same, outside), said)
    stopped = np.isin(dynamics.scale(results["mixture", "bayes"]), config.stop_band)
    for name, data in results.learners("stop_band", "meta", "bayes").items():
        about = labelled.about(data)
        if about.kind == "meta":
            yield md.criterion(
                f"{name}_stop_band_gain",
                dynamics.estimate(np.divide, gain("stop_band", name), gain("pass_band", name)),
                f"trained on a band, the {about.label} suppresses the rest: stop-band gain at most "
                "0.3 of pass-band",
                at_most=0.3,
            )
        for what, found in (
            ("pass_band", gain("pass_band", name)),
            ("stop_band_alone", gain("stop_band", name)),
            ("mixture_pass", gain("mixture", name, ~stopped)),
            ("mixture_stop", gain("mixture", name, stopped)),
        ):
            said = f"mean gain at the end: {what.replace('_', ' ')}"
            yield md.criterion(f"{name}_band_gain_{what}", dynamics.estimate(same, found), said)
    yield from excess(results, config.excess_at_most)
    yield from excess(results, suffix="_band")


def by_optimizer(results):
    """Draws mode strength of ordinary learners alone."""
    return figures.mode_strength(results.learners("in_distribution", "ordinary"))


def examples(results):
    """Draws example functions (rows) and the answers of each learner (columns) at a few steps."""
    panels = results.learners("examples").values()
    rows = results["examples", "bayes"].sizes["task"]
    figure, axes = figures.subplots(
        rows, len(panels), width=4.1, height=2.6, sharex=True, sharey="row"
    )
    for column, data in zip(axes.T, panels, strict=True):
        x, times = data["x"].to_numpy(), data["time"].to_numpy()[1:]
        answer, target = (dynamics.samples(data, name)[0] for name in ("answer", "target"))
        for axis, answers, f in zip(column, answer, target, strict=True):
            for t, colour, now in zip(
                times, figures.colours(times)[::-1], answers[1:], strict=True
            ):
                axis.plot(x, now, color=colour, label=f"{t:g}")
            axis.plot(x, f[0], color="black", ls="--", lw=1.5, label="target $f(x)$")
        column[0].set_title(labelled.about(data).label)
        title = f"input $x$; answer after … {labelled.about(data).clock}"
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 3, "fontsize": 9}
        column[-1].legend(title=title, **place)
    for axis in axes[:, 0]:
        axis.set_ylabel("answer")
    return figure


def band_gain(results):
    """Draws the gain of each frequency that the targets contain; the training band is shaded."""
    titles = {"pass_band": "pass-band targets", "stop_band": "stop-band targets"}
    band = labelled.modes(results["pass_band", "bayes"]).values
    return figures.final_strength(results, titles | {"mixture": "mixtures of the two"}, band)


QUICK = Config(
    domain=FourierRegression(steps=40),
    outer=md.OuterConfig(steps=12_000, batch=32, learning_rate=3e-2, schedule="linear"),
    measure=md.MeasureConfig(
        tasks=4096,
        updating_tasks=16,
        shifted_tasks=1024,
        heldout_tasks=512,
        tracked_tasks=64,
        probe_points=32,
        chunk=1024,
    ),
)
PAPER = Config(
    lstm=LSTMConfig(hidden=256),
    outer=md.OuterConfig(
        steps=100_000, batch=1024, learning_rate=4e-3, warmup=1000, checkpoints=40
    ),
    measure=md.MeasureConfig(
        tasks=65_536, updating_tasks=256, shifted_tasks=8192, heldout_tasks=8192, probe_points=64
    ),
    excess_at_most=0.1,
)
study = md.Study(
    "nonlinear_regression",
    {"quick": QUICK, "paper": PAPER},
    plan,
    criteria,
    {"mode_strength_by_optimizer": by_optimizer, "examples": examples, "band_gain": band_gain},
    section="§3",
    claims=[
        md.Claim("mlp_slope", "An MLP learns low frequencies first", "mode_strength"),
        md.Claim(
            "lstm_minus_bayes_slope",
            "A meta-trained LSTM learns nearly all frequencies at once, as Bayes does",
            "learning_times",
        ),
        md.Claim(
            "lstm_excess_loss", "Its losses are near those of Bayes-optimal inference",
            "distance_to_bayes",
        ),
        md.Claim(
            "lstm_stop_band_gain", "Trained on a band, it suppresses what lies outside it",
            "band_gain",
        ),
    ],
)  # fmt: skip
