"""Domain 2, nonlinear regression: random functions of one variable with a given Fourier spectrum.

After Rahaman et al. (2018), arXiv:1806.08734, Xu et al. (2018), arXiv:1807.01251, and Rabinowitz
(2019), arXiv:1905.01320. The modes of a task are the frequencies that its target contains.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Complex, Float

from metadyn import prng
from metadyn.base import STRENGTH, Key, Modes, Probe, Regression, TaskSet, cached_concrete
from metadyn.errors import check, check_choice, check_positive

Spectrum = tuple[float, ...]
"""One number per frequency 0, 1, 2, …, in cycles over the unit interval."""

Number = Float[Array, "1"]
"""An input x or an output y: a vector of one number."""
Embedding = Literal["raw", "standard", "angle", "circle", "fourier"]


def band(low: int, high: int) -> Spectrum:
    """Returns a band-pass prior: equal variances, which sum to 1, at the frequencies low … high.

    With low = 1 it is a low-pass prior. The functions have variance 1 at every input. Raises
    `ConfigError` unless 0 <= low <= high.
    """
    check(0 <= low <= high, "band", (low, high), "must be 0 <= low <= high")
    return tuple(float(k >= low) / (high - low + 1) for k in range(high + 1))


def band_stop(low: int, high: int, highest: int) -> Spectrum:
    """Returns a band-stop prior: equal variances, with sum 1, at 1 … highest except low … high."""
    value, hint = (low, high, highest), "must be 1 <= low <= high <= highest"
    check(1 <= low <= high <= highest, "band_stop", value, hint)
    check(low > 1 or high < highest, "band_stop", value, "must leave a frequency outside the band")
    passes = [0 < k < low or k > high for k in range(highest + 1)]
    return tuple(passed / sum(passes) for passed in passes)


def check_spectrum(field: str, v: Spectrum) -> None:
    """Raises `ConfigError` naming the field unless `v` is a prior spectrum."""
    check(len(v) > 0, field, v, "give a variance for each frequency 0, 1, 2, …")
    valid = all(0 <= value < float("inf") for value in v)
    check(valid, field, v, "every variance must be 0 or more, and finite")
    check(sum(v) > 0, field, v, "at least one variance must be above 0")


class FourierTask(NamedTuple):
    """The coefficients of a function f(x) = Σ_k (α_k cos 2πkx + β_k sin 2πkx), k = 0 … F."""

    cosine: Float[Array, " frequencies"]
    sine: Float[Array, " frequencies"]


@dataclasses.dataclass(frozen=True)
class FourierRegression(Regression):
    """Tasks y = f(x) + ε with x uniform on [−½, ½), ε ~ N(0, σ²) and Gaussian coefficients.

    α_k and β_k are N(0, v_k), with v the prior spectrum, so that f(x) has variance Σ_k v_k at every
    x. Raises `ConfigError` for an empty, negative or zero spectrum, for σ < 0 and for steps < 1.
    """

    spectrum: Spectrum = band(1, 5)
    """Prior variances v_k of the coefficients at frequencies k = 0, 1, 2, … (0: only a cosine)."""
    sigma: float = 0.1
    """Standard deviation σ ≥ 0 of the noise."""
    steps: int = 40
    """Number of observations in one episode, T."""
    embedding: Embedding = "standard"
    """How a meta-learner reads x. raw: x itself; standard: √12 x, which has unit variance; angle:
    2πx; circle: (cos 2πx, sin 2πx); fourier: cos 2πkx and sin 2πkx for all k of the prior."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "spectrum", tuple(self.spectrum))  # an array cannot be hashed
        check_spectrum("spectrum", self.spectrum)
        check(0 <= self.sigma < float("inf"), "sigma", self.sigma, "must be 0 or more, and finite")
        check_positive(self, "steps")
        check_choice("embedding", self.embedding, Embedding)

    @property
    def support(self) -> tuple[int, ...]:
        """Returns the frequencies whose prior variance is above 0."""
        return tuple(k for k, v in enumerate(self.spectrum) if v > 0)

    # The contract of `base.Domain`.

    answer_size = 1
    """Length of one answer."""

    def sample_task(self, key: Key) -> FourierTask:
        """Draws the coefficients α_k, β_k ~ N(0, v_k)."""
        deviations = jnp.sqrt(jnp.asarray(self.spectrum, jnp.float32))
        return FourierTask(*(deviations * prng.normal(key, (2, len(self.spectrum)))))

    def evaluation_task(self, key: Key, amplitudes: Float[Array, " frequencies"]) -> FourierTask:
        """Draws f(x) = Σ_k A_k cos(2πkx − φ_k) with the given amplitudes and uniform phases.

        The constant, k = 0, is A_0 / √2 or −A_0 / √2, whose mean square is A_0² / 2 as for other k.
        """
        phase = jax.random.uniform(key, amplitudes.shape, maxval=2 * np.pi)
        cosine, sine = amplitudes * jnp.cos(phase), amplitudes * jnp.sin(phase)
        constant = amplitudes[0] * math.sqrt(0.5) * jnp.where(phase[0] < np.pi, 1.0, -1.0)
        return FourierTask(cosine.at[0].set(constant), sine.at[0].set(0.0))

    def query(self, task: FourierTask, key: Key) -> Number:
        """Draws an input x uniformly from [−½, ½)."""
        return jax.random.uniform(key, (1,), minval=-0.5, maxval=0.5)

    def feedback(self, task: FourierTask, query: Number, answer: object, key: Key) -> Number:
        """Draws the target y = f(x) + ε, which does not depend on the answer."""
        return function_value(task, query) + self.sigma * prng.normal(key, (1,))

    def encode_query(self, query: Number) -> Float[Array, " n"]:
        """Encodes x as `embedding` says."""
        match self.embedding:
            case "raw":
                return query
            case "standard":
                return math.sqrt(12) * query
            case "angle":
                return 2 * np.pi * query
            case "circle":
                return fourier_features(query, (1,))
            case "fourier":
                return fourier_features(query, self.support)

    def evaluation(self, points: int = 32, frequencies: Sequence[int] | None = None) -> TaskSet:
        """Returns functions with fixed `amplitudes` and random phases (`evaluation_task`)."""
        amplitudes = self.amplitudes(frequencies)
        probes = {STRENGTH: self.probe(amplitudes, points)}
        sample = Partial(self.evaluation_task, amplitudes=np.array(amplitudes, np.float32))
        return TaskSet("in_distribution", self, sample, probes)

    # The probe.

    def amplitudes(self, frequencies: Sequence[int] | None = None) -> Spectrum:
        """Returns amplitudes A_k of evaluation tasks of these frequencies, by default the prior's.

        Frequencies of the prior keep the ratio of their root-mean-square amplitudes there. Every
        other frequency counts as the prior's strongest. All are scaled to give the function the
        variance of the prior's, Σ_k v_k. By default that makes A_k = √(2 v_k).
        """
        v = np.asarray(self.spectrum)
        chosen = list(self.support if frequencies is None else frequencies)
        check(len(chosen) > 0, "frequencies", chosen, "name at least one")
        check(all(k >= 0 for k in chosen), "frequencies", chosen, "must be 0 or more")
        variances = np.zeros(max(*chosen, 0) + 1)
        variances[chosen] = [v[k] if k in self.support else v.max() for k in chosen]
        return tuple(float(A) for A in np.sqrt(2 * variances * v.sum() / variances.sum()))

    @cached_concrete
    def probe(self, amplitudes: Spectrum, points: int = 32) -> Probe:
        """Makes the probe that reads the strength of each frequency with a nonzero amplitude.

        It Fourier-transforms the answers on a uniform grid of `points` inputs, on the device.

        Readings: the strengths, a_k = Re(conj(F_k) F̂_k) / |F_k|², of those frequencies k in
        order; `outside`, the power of the answers at all other frequencies that the grid resolves,
        relative to the target's total power. Raises `ConfigError` for a grid too coarse for the
        highest frequency.
        """
        highest = max(len(amplitudes), len(self.spectrum)) - 1
        least = 2 * highest + 1
        hint = f"must be at least {least} to resolve frequency {highest}"
        check(points >= least, "probe_points", points, hint)
        grid = jnp.asarray(uniform_grid(points), jnp.float32)[:, None]
        contained = np.flatnonzero(amplitudes)

        def read(task: FourierTask, answers: Float[Array, "P 1"]) -> dict[str, Array]:
            target = jax.vmap(function_value, (None, 0))(task, grid)
            F, F_hat = coefficients(target[:, 0]), coefficients(answers[:, 0])
            projection = jnp.real(jnp.conj(F) * F_hat)[contained]
            outside = jnp.sum(jnp.delete(power_spectrum(F_hat, points), contained))
            return {
                "strength": projection / jnp.abs(F[contained]) ** 2,
                "outside": outside / jnp.sum(power_spectrum(F, points)),
            }

        modes = Modes(contained.tolist(), "frequency $k$", "frequency", "cycles")
        return Probe(grid, read, modes, {"outside": ()})


def uniform_grid(points: int) -> Float[np.ndarray, " P"]:
    """Returns P evenly spaced inputs −½, −½ + 1/P, …, float64."""
    return np.arange(points) / points - 0.5


def coefficients(answers: Float[Array, " P"]) -> Complex[Array, " half"]:
    """Computes the Fourier coefficients F_k, k = 0 … ⌊P/2⌋, of values on `uniform_grid`.

    The values are Σ_k Re F_k e^{2πikx}, so that F_k = α_k − iβ_k at every frequency, including 0
    and the Nyquist frequency (where the sine vanishes).
    """
    (points,) = answers.shape
    shift = (-1.0) ** np.arange(points // 2 + 1)  # because the grid starts at −½
    scale = np.where(_unpaired(points), 1.0, 2.0) * shift / points
    # A matrix product, as library transforms that run on several CPU devices at once can wait for
    # each other's threads for ever (seen with jaxlib 0.11.2), and as its precision can be chosen.
    return answers @ jnp.asarray(np.fft.rfft(np.eye(points)) * scale, jnp.complex64)


def power_spectrum(F: Complex[Array, " half"], points: int) -> Float[Array, " half"]:
    """Computes the mean square over the grid of each frequency's part, from its `coefficients`."""
    return jnp.abs(F) ** 2 * np.where(_unpaired(points), 1.0, 0.5).astype(np.float32)


def _unpaired(points: int) -> np.ndarray:
    """Returns a mask of the frequencies 0 … ⌊P/2⌋ that are not one of a conjugate pair."""
    k = np.arange(points // 2 + 1)
    return (k == 0) | (2 * k == points)


def fourier_features(x: Number, frequencies: tuple[int, ...]) -> Float[Array, " n"]:
    """Returns features of x: cos 2πkx for each frequency k, then sin 2πkx for each but 0."""
    k = jnp.asarray(frequencies, jnp.float32)
    angles = 2 * np.pi * k * x
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)[np.asarray(frequencies) > 0]])


def function_value(task: FourierTask, x: Number) -> Number:
    """Computes the value f(x) of a task's function."""
    angles = 2 * np.pi * jnp.arange(task.cosine.shape[0]) * x
    return jnp.sum(task.cosine * jnp.cos(angles) + task.sine * jnp.sin(angles), keepdims=True)
