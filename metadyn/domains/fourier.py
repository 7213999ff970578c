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
from metadyn.base import STRENGTH, Key, Modes, Probe, Regression, TaskSet, kept
from metadyn.errors import check, check_choice, check_positive

Spectrum = tuple[float, ...]
"""A number for each frequency 0, 1, 2, …, in cycles over the unit interval."""

Number = Float[Array, "1"]
"""An input x, an output y: one number, as a vector."""
Embedding = Literal["raw", "standard", "angle", "circle", "fourier"]


def band(low: int, high: int) -> Spectrum:
    """Gives equal variances, 1 in all, to the frequencies low … high: a band-pass prior.

    From low = 1 it is a low-pass prior. The functions have variance 1 at every input. Raises
    `ConfigError` unless 0 <= low <= high.
    """
    check(0 <= low <= high, "band", (low, high), "must be 0 <= low <= high")
    return tuple(float(k >= low) / (high - low + 1) for k in range(high + 1))


def band_stop(low: int, high: int, highest: int) -> Spectrum:
    """Gives equal variances, 1 in all, to 1 … highest but for the frequencies low … high."""
    check(1 <= low <= high <= highest, "band_stop", (low, high, highest), "must be in this order")
    fix = "leave a frequency that passes"
    check(low > 1 or high < highest, "band_stop", (low, high, highest), fix)
    passes = [0 < k < low or k > high for k in range(highest + 1)]
    return tuple(each / sum(passes) for each in passes)


def check_spectrum(field: str, v: Spectrum) -> None:
    """Raises `ConfigError` naming the field unless `v` is a prior spectrum."""
    check(len(v) > 0, field, v, "give a variance for each frequency 0, 1, 2, …")
    right = all(0 <= value < float("inf") for value in v)
    check(right, field, v, "every variance must be 0 or more, and finite")
    check(sum(v) > 0, field, v, "a frequency must have variance above 0")


class FourierTask(NamedTuple):
    """A function f(x) = Σ_k (α_k cos 2πkx + β_k sin 2πkx), k = 0 … F, by its coefficients."""

    cosine: Float[Array, " frequencies"]
    sine: Float[Array, " frequencies"]


@dataclasses.dataclass(frozen=True)
class FourierRegression(Regression):
    """Tasks y = f(x) + ε with x uniform on [−½, ½), ε ~ N(0, σ²) and Gaussian coefficients.

    α_k and β_k are N(0, v_k) with v the prior spectrum, so that f(x) has variance Σ_k v_k at every
    x. Raises `ConfigError` for an empty, negative or zero spectrum, σ < 0 and steps < 1.
    """

    spectrum: Spectrum = band(1, 5)
    """v_k, prior variances of the coefficients of frequencies k = 0, 1, 2, … (0: only a cosine)."""
    sigma: float = 0.1
    """Standard deviation σ ≥ 0 of the noise."""
    steps: int = 40
    """T, the observations in one episode."""
    embedding: Embedding = "standard"
    """How a meta-learner reads x: raw, as it is; standard, as √12 x, of unit variance; angle, as
    2πx; circle, as (cos 2πx, sin 2πx); fourier, as these at every frequency of the prior."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "spectrum", tuple(self.spectrum))  # an array cannot be hashed
        check_spectrum("spectrum", self.spectrum)
        check(0 <= self.sigma < float("inf"), "sigma", self.sigma, "must be 0 or more, and finite")
        check_positive(self, "steps")
        check_choice("embedding", self.embedding, Embedding)

    @property
    def support(self) -> tuple[int, ...]:
        """Returns the frequencies that the prior gives variance to."""
        return tuple(k for k, v in enumerate(self.spectrum) if v > 0)

    # The contract of `base.Domain`.

    answer_size = 1
    """Numbers in one answer."""

    def sample_task(self, key: Key) -> FourierTask:
        """Draws the coefficients α_k, β_k ~ N(0, v_k)."""
        roots = jnp.sqrt(jnp.asarray(self.spectrum, jnp.float32))
        return FourierTask(*(roots * prng.normal(key, (2, len(self.spectrum)))))

    def evaluation_task(self, key: Key, amplitudes: Float[Array, " frequencies"]) -> FourierTask:
        """Draws the phases of f(x) = Σ_k A_k cos(2πkx − φ_k), uniform, for the given amplitudes.

        The constant, k = 0, is A_0 / √2 or −A_0 / √2, of the same mean square as the others.
        """
        phase = jax.random.uniform(key, amplitudes.shape, maxval=2 * np.pi)
        cosine, sine = amplitudes * jnp.cos(phase), amplitudes * jnp.sin(phase)
        constant = amplitudes[0] * math.sqrt(0.5) * jnp.where(phase[0] < np.pi, 1.0, -1.0)
        return FourierTask(cosine.at[0].set(constant), sine.at[0].set(0.0))

    def query(self, task: FourierTask, key: Key) -> Number:
        """Draws an input x, uniform on [−½, ½)."""
        return jax.random.uniform(key, (1,), minval=-0.5, maxval=0.5)

    def feedback(self, task: FourierTask, query: Number, answer: object, key: Key) -> Number:
        """Gives the target y = f(x) + ε, whatever was answered."""
        return value(task, query) + self.sigma * prng.normal(key, (1,))

    def encode_query(self, query: Number) -> Float[Array, " n"]:
        """Embeds x as the configuration says."""
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
        """Sets up functions of fixed `amplitudes` and random phases (`evaluation_task`)."""
        amplitudes = self.amplitudes(frequencies)
        probes = {STRENGTH: self.probe(amplitudes, points)}
        sample = Partial(self.evaluation_task, amplitudes=np.array(amplitudes, np.float32))
        return TaskSet("in_distribution", self, sample, probes)

    # The probe.

    def amplitudes(self, frequencies: Sequence[int] | None = None) -> Spectrum:
        """Amplitudes A_k of evaluation tasks of these frequencies, by default those of the prior.

        Frequencies of the prior stand in the ratio of their root-mean-square amplitudes there, each
        other one counts as the prior's strongest, and all are scaled so that the function has the
        variance of the prior's, Σ_k v_k: A_k = √(2 v_k) for those of the prior.
        """
        v = np.asarray(self.spectrum)
        here = list(self.support if frequencies is None else frequencies)
        check(len(here) > 0, "frequencies", here, "name at least one")
        check(all(k >= 0 for k in here), "frequencies", here, "must be 0 or more")
        variances = np.zeros(max(*here, 0) + 1)
        variances[here] = [v[k] if k in self.support else v.max() for k in here]
        return tuple(float(A) for A in np.sqrt(2 * variances * v.sum() / variances.sum()))

    @kept
    def probe(self, amplitudes: Spectrum, points: int = 32) -> Probe:
        """Reads the strength of each frequency that evaluation tasks of these amplitudes contain.

        The answers on a uniform grid of `points` inputs are Fourier-transformed, on the device.

        Readings: the strengths, a_k = Re(conj(F_k) F̂_k) / |F_k|², of those frequencies k in
        order; `outside`, the power of the answers at all other frequencies that the grid resolves,
        relative to the target's whole power. Raises `ConfigError` for a grid too coarse for the
        highest frequency.
        """
        highest = max(len(amplitudes), len(self.spectrum)) - 1
        least = 2 * highest + 1
        fix = f"must be at least {least} to resolve frequency {highest}"
        check(points >= least, "probe_points", points, fix)
        grid = jnp.asarray(uniform_grid(points), jnp.float32)[:, None]
        contained = np.flatnonzero(amplitudes)

        def read(task: FourierTask, answers: Float[Array, "P 1"]) -> dict[str, Array]:
            target = jax.vmap(value, (None, 0))(task, grid)
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
    """Returns the P inputs −½, −½ + 1/P, …, float64."""
    return np.arange(points) / points - 0.5


def coefficients(answers: Float[Array, " P"]) -> Complex[Array, " half"]:
    """Computes the Fourier coefficients F_k, k = 0 … ⌊P/2⌋, of values on `uniform_grid`.

    The values are Re F_k e^{2πikx} summed over k: so F_k = α_k − iβ_k at every frequency, 0 and
    Nyquist's (where the sine vanishes) included.
    """
    (points,) = answers.shape
    shift = (-1.0) ** np.arange(points // 2 + 1)  # as the grid starts at −½
    scale = np.where(_alone(points), 1.0, 2.0) * shift / points
    # As a product: library transforms that run on several CPU devices at once can wait for each
    # other's threads for ever (seen with jaxlib 0.11.2); and products have a precision to ask for.
    return answers @ jnp.asarray(np.fft.rfft(np.eye(points)) * scale, jnp.complex64)


def power_spectrum(F: Complex[Array, " half"], points: int) -> Float[Array, " half"]:
    """Computes the mean square over the grid of each frequency of `coefficients`."""
    return jnp.abs(F) ** 2 * np.where(_alone(points), 1.0, 0.5).astype(np.float32)


def _alone(points: int) -> np.ndarray:
    """Which of the frequencies 0 … ⌊P/2⌋ are not one of a conjugate pair."""
    k = np.arange(points // 2 + 1)
    return (k == 0) | (2 * k == points)


def fourier_features(x: Number, frequencies: tuple[int, ...]) -> Float[Array, " n"]:
    """Features of x: cos 2πkx for each frequency, then sin 2πkx for each but 0."""
    k = jnp.asarray(frequencies, jnp.float32)
    turns = 2 * np.pi * k * x
    return jnp.concatenate([jnp.cos(turns), jnp.sin(turns)[np.asarray(frequencies) > 0]])


def value(task: FourierTask, x: Number) -> Number:
    """Computes the value f(x) of a task's function."""
    turns = 2 * np.pi * jnp.arange(task.cosine.shape[0]) * x
    return jnp.sum(task.cosine * jnp.cos(turns) + task.sine * jnp.sin(turns), keepdims=True)
