"""Products of many small matrices at once, made fast on CPUs.

There XLA's batched products are slow if they read their left factor transposed, as the derivative
of a product always does. So a factor that is read transposed is first written to memory transposed.
On other devices these are plain products. Use reverse-mode derivatives alone, not `jax.jvp`.
"""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from metadyn import mesh


def matvec(W: Float[Array, "m n"], x: Float[Array, " n"]) -> Float[Array, " m"]:
    """Computes W x. Under `jax.vmap` over x alone it is one matrix product, X Wᵀ."""
    return _matvec(W, x) if mesh.backend() == "cpu" else W @ x


def times(A: Float[Array, "*B i j"], B: Float[Array, "*B j k"]) -> Float[Array, "*B i k"]:
    """Computes A B."""
    return _times(A, B) if mesh.backend() == "cpu" else A @ B


def similarities(A: Float[Array, "*B i k"], B: Float[Array, "*B j k"]) -> Float[Array, "*B i j"]:
    """Computes A Bᵀ: the inner products of the rows of A with those of B."""
    return _similarities(A, B) if mesh.backend() == "cpu" else A @ B.mT


@jax.custom_batching.custom_vmap
def _matvec(W, x):
    return W @ x


@_matvec.def_vmap
def _(size, batched, W, x):
    if batched == [False, True]:
        return _matvec_rows(W, x), True
    return jax.vmap(_matvec.fun, [0 if mapped else None for mapped in batched])(W, x), True


@jax.custom_vjp
def _matvec_rows(W, X):
    """Computes W x for each row x of X: X Wᵀ."""
    return X @ _materialised(W.T)


_matvec_rows.defvjp(
    lambda W, X: (_matvec_rows(W, X), (W, X)),
    lambda factors, d: (_materialised(d.T) @ factors[1], d @ factors[0]),
)


@jax.custom_vjp
def _times(A, B):
    return _materialised(A @ B)


_times.defvjp(
    lambda A, B: (_times(A, B), (A, B)),
    lambda factors, d: (d @ factors[1].mT, _materialised(factors[0].mT) @ d),
)


@jax.custom_vjp
def _similarities(A, B):
    return A @ B.mT


_similarities.defvjp(
    lambda A, B: (_similarities(A, B), (A, B)),
    lambda factors, d: (d @ factors[1], _materialised(d.mT) @ factors[0]),
)


def _materialised(A):
    """Returns A behind a barrier, so that XLA does not fuse it into the product that reads it."""
    return jax.lax.optimization_barrier(A)
