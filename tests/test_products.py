"""Products against those of NumPy, and their derivatives against those of plain products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metadyn import mesh
from metadyn.kernels import products

RNG = np.random.default_rng(0)
W, V = RNG.standard_normal((2, 7, 4, 6), np.float32)  # [learner, m, n]
X = RNG.standard_normal((7, 9, 6), np.float32)  # [learner, query, n]


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        (((None, None), (None, 0)), "mn,qn->qm"),
        (((0, 0), (None, 0)), "lmn,lqn->lqm"),
        (((0, None), (None, 0)), "lmn,qn->lqm"),
        (((None, 0), (None, 0)), "mn,lqn->lqm"),
        (((0, 0), (0, 0)), "lqmn,lqn->lqm"),
    ],
)
def test_matvec_is_the_product_however_it_is_mapped(axes, shape):
    outer, inner = axes
    apply = jax.vmap(products.matvec, inner)
    apply = jax.vmap(apply, outer) if any(axis is not None for axis in outer) else apply
    W_shape, x_shape = shape.split("->")[0].split(",")
    sizes = {"l": 7, "q": 9, "m": 4, "n": 6}
    A, x = (RNG.standard_normal([sizes[d] for d in dims]) for dims in (W_shape, x_shape))
    product = apply(jnp.float32(A), jnp.float32(x))
    np.testing.assert_allclose(product, np.einsum(shape, A, x), rtol=1e-4, atol=1e-5)
    single = products.matvec(jnp.array(W[0]), jnp.array(X[0, 0]))
    np.testing.assert_allclose(single, W[0] @ X[0, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_derivatives_are_those_of_plain_products(backend, monkeypatch):
    monkeypatch.setattr(mesh, "backend", lambda: backend)

    def loss(products, W, V, X):
        apply, times, similarities = products
        product = times(similarities(W, V), W)  # [m, n]
        answers = jax.vmap(apply, (None, 0))(product, X)
        return jnp.sum(jnp.sin(answers))

    def gradient(*products):
        gradient_of = jax.grad(lambda *parts: loss(products, *parts), argnums=(0, 1, 2))
        return jax.vmap(gradient_of)(W, V, X)

    plain = gradient(lambda W, x: W @ x, lambda A, B: A @ B, lambda A, B: A @ B.T)
    metadyn = gradient(products.matvec, products.times, products.similarities)
    for leaf, expected in zip(metadyn, plain, strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_products_of_stacks_are_those_of_their_matrices(backend, monkeypatch):
    monkeypatch.setattr(mesh, "backend", lambda: backend)
    product = lambda W, V: jnp.sum(jnp.sin(products.times(products.similarities(W, V), W)))
    single = jax.vmap(jax.value_and_grad(product, (0, 1)))(W, V)
    stacked = jax.value_and_grad(product, (0, 1))(W, V)
    np.testing.assert_allclose(single[0].sum(), stacked[0], rtol=1e-5)
    A, B = W[..., :4], V[..., :4]  # square: B has the shape of its transpose
    similar = products.similarities(jnp.array(A), jnp.array(B))
    np.testing.assert_allclose(similar, np.einsum("lik,ljk->lij", A, B), 1e-4, 1e-4)
    for leaf, all_at_once in zip(single[1], stacked[1], strict=True):
        np.testing.assert_allclose(leaf, all_at_once, rtol=1e-4, atol=1e-5)
