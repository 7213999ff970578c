"""Domain 1, linear regression: y = W x + ε with a matrix-normal prior over W.

After Saxe et al. (2013), arXiv:1312.6120, and Rabinowitz (2019), arXiv:1905.01320. The modes of a
task W = U diag(s) Vᵀ are its singular triples.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property, partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from metadyn import prng
from metadyn.base import STRENGTH, Key, Modes, Probe, Regression, TaskSet, cached_concrete
from metadyn.errors import check, check_choice, check_positive
from metadyn.kernels import products

Matrix = tuple[tuple[float, ...], ...] | None
"""A matrix as rows of numbers, or None for a default."""
Spread = Literal["quantiles", "even"]

_SPECTRUM_DRAWS = 20_000  # matrices that a spectrum is estimated from: our choice


class LinearTask(NamedTuple):
    """The matrix W of y = W x + ε and, on evaluation tasks alone, its K modes U, s and V."""

    W: Float[Array, "n_y n_x"]
    U: Float[Array, "n_y K"] | None = None
    s: Float[Array, " K"] | None = None
    V: Float[Array, "n_x K"] | None = None


@dataclasses.dataclass(frozen=True)
class LinearRegression(Regression):
    """Tasks y = W x + ε with x ~ N(0, I), ε ~ N(0, σ² I) and W ~ MN(M, R, C).

    cov(vec W) = C ⊗ R. Raises `ConfigError` for sizes below 1, for σ ≤ 0, for matrices of a wrong
    shape, and for covariances that are not symmetric or not positive definite.
    """

    n_x: int = 5
    """Number of inputs, n_x."""
    n_y: int = 5
    """Number of outputs, n_y."""
    sigma: float = 0.1
    """Standard deviation σ of the noise on each output."""
    steps: int = 20
    """Number of observations in one episode, T."""
    mean: Matrix = None
    """Prior mean M: n_y rows of n_x numbers. None: zero."""
    row_covariance: Matrix = None
    """Prior covariance R between outputs: n_y rows of n_y numbers. None: identity."""
    column_covariance: Matrix = None
    """Prior covariance C between inputs: n_x rows of n_x numbers. None: identity / n_x."""
    spread: Spread = "quantiles"
    """Spacing of the singular values of evaluation tasks: quantiles of those of the prior, or
    even, at the fractions 1, (K − 1)/K, … 1/K of the greatest. At the default sizes the least
    quantile is 0.03, where a learner's errors, divided by s_k, drown its strength. Even spacing
    lets the last mode be placed too."""

    def __post_init__(self) -> None:
        check_choice("spread", self.spread, Spread)
        check_positive(self, "n_x", "n_y", "sigma", "steps")
        for field, shape in (
            ("mean", (self.n_y, self.n_x)),
            ("row_covariance", (self.n_y, self.n_y)),
            ("column_covariance", (self.n_x, self.n_x)),
        ):
            rows = getattr(self, field)
            if rows is None:
                continue
            valid = len(rows) == shape[0] and all(len(row) == shape[1] for row in rows)
            check(valid, field, rows, f"give {shape[0]} rows of {shape[1]} numbers")
            matrix = np.asarray(rows, np.float64)
            check(bool(np.isfinite(matrix).all()), field, rows, "every number must be finite")
            object.__setattr__(self, field, tuple(map(tuple, matrix.tolist())))  # hashable
            if field == "mean":
                continue
            check(np.allclose(matrix, matrix.T), field, rows, "a covariance must be symmetric")
            least = float(np.linalg.eigvalsh(matrix)[0])
            check(least > 0, field, rows, f"must be positive definite (an eigenvalue is {least:g})")

    # The prior.

    @cached_property
    def M(self) -> np.ndarray:
        """Returns the prior mean [n_y, n_x], float64."""
        return np.zeros((self.n_y, self.n_x)) if self.mean is None else np.array(self.mean)

    @cached_property
    def R(self) -> np.ndarray:
        """Returns the prior covariance between outputs [n_y, n_y], float64."""
        return np.eye(self.n_y) if self.row_covariance is None else np.array(self.row_covariance)

    @cached_property
    def C(self) -> np.ndarray:
        """Returns the prior covariance between inputs [n_x, n_x], float64."""
        C = self.column_covariance
        return np.eye(self.n_x) / self.n_x if C is None else np.array(C)

    @property
    def modes(self) -> int:
        """Returns the number of modes of a task, K = min(n_x, n_y)."""
        return min(self.n_x, self.n_y)

    @cached_property
    def _singular_values(self) -> np.ndarray:
        """Returns singular values [draw, K] of matrices W of the prior, drawn with a fixed seed."""
        draws = np.random.default_rng(0).standard_normal((_SPECTRUM_DRAWS, self.n_y, self.n_x))
        W = self.M + np.linalg.cholesky(self.R) @ draws @ np.linalg.cholesky(self.C).T
        return np.linalg.svd(W, compute_uv=False)

    def spectrum(self, scale: float = 1.0, outsize: float = 1.0) -> tuple[float, ...]:
        """Returns K singular values, greatest first, spread over the prior's central 95 %.

        They are the quantiles at K evenly spaced probabilities from 0.975 to 0.025 of all singular
        values of W ~ MN(M, R, C), by Monte Carlo with a fixed seed. If `spread` is "even", they are
        s_k = s_1 (K − k + 1) / K, with s_1 the greatest quantile. For tasks out of distribution,
        `scale` multiplies all values and `outsize` the greatest alone.
        """
        check(scale > 0, "scale", scale, "must be positive")
        check(outsize > 0, "outsize", outsize, "must be positive")
        levels = [0.5] if self.modes == 1 else np.linspace(0.975, 0.025, self.modes)
        s = scale * np.quantile(self._singular_values, levels)
        if self.spread == "even":
            s = s[0] * np.linspace(1, 0, self.modes, endpoint=False)
        s[0] *= outsize
        return tuple(float(value) for value in s)

    def scaled(self, scale: float) -> LinearRegression:
        """Returns a copy whose prior has every matrix W multiplied by a finite `scale` above 0."""
        check(0 < scale < float("inf"), "scale", scale, "must be positive and finite")
        rows = lambda matrix: tuple(map(tuple, matrix.tolist()))
        mean, C = rows(scale * self.M), rows(scale**2 * self.C)
        return dataclasses.replace(self, mean=mean, column_covariance=C)

    # The contract of `base.Domain`.

    @property
    def answer_size(self) -> int:
        """Returns the length of one answer, n_y."""
        return self.n_y

    def sample_task(self, key: Key) -> LinearTask:
        """Draws W ~ MN(M, R, C)."""
        left = jnp.asarray(np.linalg.cholesky(self.R), jnp.float32)
        right = jnp.asarray(np.linalg.cholesky(self.C), jnp.float32)
        Z = prng.normal(key, (self.n_y, self.n_x))
        return LinearTask(jnp.asarray(self.M, jnp.float32) + left @ Z @ right.T)

    def evaluation_task(
        self, key: Key, spectrum: Float[Array, " K"], rotate: bool = True
    ) -> LinearTask:
        """Draws W = U diag(s) Vᵀ with Haar-random U and V, or with the axes if not `rotate`.

        As x and ε are isotropic, all rotations are alike to a learner whose initial state is
        isotropic too. A learner that starts along the axes starts aligned with the unrotated task,
        as Saxe's closed form assumes.
        """
        s = jnp.asarray(spectrum, jnp.float32)
        check(s.shape == (self.modes,), "spectrum", spectrum, f"give {self.modes} values")
        U, V = jnp.eye(self.n_y), jnp.eye(self.n_x)
        if rotate:
            key_u, key_v = jax.random.split(key)
            U, V = haar(key_u, self.n_y), haar(key_v, self.n_x)
        U, V = U[:, : self.modes], V[:, : self.modes]
        return LinearTask((U * s) @ V.T, U, s, V)

    def query(self, task: LinearTask, key: Key) -> Float[Array, " n_x"]:
        """Draws an input x ~ N(0, I)."""
        return prng.normal(key, (self.n_x,))

    def feedback(
        self, task: LinearTask, query: Float[Array, " n_x"], answer: object, key: Key
    ) -> Float[Array, " n_y"]:
        """Draws the target y = W x + ε, which does not depend on the answer."""
        return products.matvec(task.W, query) + self.sigma * prng.normal(key, (self.n_y,))

    def evaluation(
        self, points: int = 32, scale: float = 1.0, outsize: float = 1.0, rotate: bool = True
    ) -> TaskSet:
        """Returns tasks with one `spectrum` and random directions (`evaluation_task`)."""
        s = self.spectrum(scale, outsize)
        probe = dataclasses.replace(self.probe(points), modes=_modes(s))
        # A JAX Partial traces the values bound in it, and a flag must not be traced.
        draw = self.evaluation_task if rotate else partial(self.evaluation_task, rotate=False)
        sample = Partial(draw, spectrum=np.array(s, np.float32))
        return TaskSet("in_distribution", self, sample, {STRENGTH: probe})

    # The probe.

    @cached_concrete
    def probe(self, points: int = 32) -> Probe:
        """Makes the probe that reads the effective spectrum from input-output pairs alone.

        It fits ŷ(x') ≈ Ŵ x' + b to the answers at `points` inputs x' ~ N(0, I), shared by all
        tasks and times. The fit is a matrix product with one pseudo-inverse, computed once in
        float64.

        Readings: the strengths [K], a_k = (Uᵀ Ŵ V)_kk / s_k; `off_diagonal`, the share of
        ‖Ŵ‖²_F outside that diagonal; `unexplained`, the share of the answers' variance that the
        fit leaves out. Both shares lie in [0, 1] and are 0 where their total is 0. Raises
        `ConfigError` if `points` are too few to tell a linear answer from a nonlinear one.
        """
        least = self.n_x + 2
        check(points >= least, "probe_points", points, f"must be at least n_x + 2 = {least}")
        x = np.random.default_rng(0).standard_normal((points, self.n_x))
        design = np.concatenate([x, np.ones((points, 1))], axis=1)
        pseudo_inverse = jnp.asarray(np.linalg.pinv(design), jnp.float32)
        inputs = jnp.asarray(design, jnp.float32)

        def read(task: LinearTask, answers: Float[Array, "P n_y"]) -> dict[str, Array]:
            assert task.U is not None and task.s is not None and task.V is not None  # noqa: PT018
            coefficients = pseudo_inverse @ answers
            W_hat = coefficients[:-1].T
            diagonal = jnp.einsum("ik,ij,jk->k", task.U, W_hat, task.V)
            residual = answers - inputs @ coefficients
            return {
                "strength": diagonal / task.s,
                "off_diagonal": _share(jnp.sum(W_hat**2) - jnp.sum(diagonal**2), W_hat),
                "unexplained": _share(jnp.sum(residual**2), answers - answers.mean(0)),
            }

        extras: dict[str, tuple[str, ...]] = {"off_diagonal": (), "unexplained": ()}
        return Probe(inputs[:, :-1], read, _modes(self.spectrum()), extras)

    @cached_concrete
    def answers(self, points: int = 32) -> Probe:
        """Makes the probe that records the answers at the inputs of `probe`, to compare to Bayes'.

        It works for any tasks. Readings: `answers` [points, n_y] and, as the only strength [1], the
        projection of the answers on the task's noiseless outputs, ⟨ŷ, W x'⟩ / ‖W x'‖².
        """
        inputs = self.probe(points).queries

        def read(task: LinearTask, answers: Float[Array, "P n_y"]) -> dict[str, Array]:
            targets = inputs @ task.W.T
            strength = jnp.sum(answers * targets) / jnp.sum(targets**2)
            return {"strength": strength[None], "answers": answers}

        modes = Modes((1,), "task", strength="projection on the task")
        return Probe(inputs, read, modes, {"answers": ("point", "output")})


def _modes(spectrum: tuple[float, ...]) -> Modes:
    """Returns the modes that have these singular values."""
    return Modes(spectrum, "singular value $s_k$", "singular_value")


def haar(key: Key, n: int) -> Float[Array, "n n"]:
    """Draws a Haar-random orthogonal matrix by Gram–Schmidt, twice over, on Gaussian vectors.

    Under `jax.vmap` this is a few fused matrix products, whereas a QR decomposition is one library
    call per matrix on a GPU.
    """
    vectors = prng.normal(key, (n, n))

    def orthogonalise(k: Array, Q: Array) -> Array:
        v = vectors[k]
        for _ in range(2):
            v = v - Q.T @ (Q @ v)
        return Q.at[k].set(v / jnp.linalg.norm(v))

    return jax.lax.fori_loop(0, n, orthogonalise, jnp.zeros((n, n)))


def _share(part: Float[Array, ""], whole: Float[Array, ...]) -> Float[Array, ""]:
    """Returns part / ‖whole‖² clipped to [0, 1], or 0 where ‖whole‖² is 0."""
    total = jnp.sum(whole**2)
    return jnp.where(total > 0, jnp.clip(part / jnp.where(total > 0, total, 1.0), 0.0, 1.0), 0.0)
