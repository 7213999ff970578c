"""Products of many small matrices at once on a CPU.

There XLA's batched products are slow if they read their left factor transposed, and a product's
derivative always does. Here what is to be read transposed is written down transposed first.
Elsewhere these are plain products. Their derivatives are had backwards alone, not by `jax.jvp`.
"""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from metadyn import mesh


def matvec(W: Float[Array, "m n"], x: Float[Array, " n"]) -> Float[Array, " m"]:
    """Computes W x. Under `jax.vmap` over x alone it is one product, X Wᵀ."""
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
        return _to_each(W, x), True
    return jax.vmap(_matvec.fun, [0 if each else None for each in batched])(W, x), True


@jax.custom_vjp
def _to_each(W, X):
    return X @ _written(W.T)


_to_each.defvjp(
    lambda W, X: (_to_each(W, X), (W, X)),
    lambda factors, d: (_written(d.T) @ factors[1], d @ factors[0]),
)


@jax.custom_vjp
def _times(A, B):
    return _written(A @ B)


_times.defvjp(
    lambda A, B: (_times(A, B), (A, B)),
    lambda factors, d: (d @ factors[1].mT, _written(factors[0].mT) @ d),
)


@jax.custom_vjp
def _similarities(A, B):
    return A @ B.mT


_similarities.defvjp(
    lambda A, B: (_similarities(A, B), (A, B)),
    lambda factors, d: (d @ factors[1], _written(d.mT) @ factors[0]),
)


def _written(A):
    """Returns A behind a barrier, so that XLA does not fuse it into the product that reads it."""
    return jax.lax.optimization_barrier(A)
