"""Operations counted from programs, against what their formulae say."""

import jax
import jax.numpy as jnp
import pytest

from metadyn.cost import operations


def test_products_count_two_for_each_multiplication_and_addition():
    a, b = jax.ShapeDtypeStruct((3, 5), jnp.float32), jax.ShapeDtypeStruct((5, 7), jnp.float32)
    assert operations(jnp.matmul, a, b) == 2 * 3 * 5 * 7
    batched = jax.vmap(jnp.matmul)
    many = [jax.ShapeDtypeStruct((11, *each.shape), jnp.float32) for each in (a, b)]
    assert operations(batched, *many) == 11 * 2 * 3 * 5 * 7


@pytest.mark.parametrize("length", [1, 20])
def test_loops_count_as_often_as_they_run(length):
    def f(W, h):
        return jax.lax.scan(lambda h, _: (jnp.tanh(W @ h), None), h, length=length)[0]

    W, h = jnp.ones((4, 4)), jnp.ones(4)
    assert operations(f, W, h) == length * (2 * 4 * 4 + 4)
    assert operations(jax.jit(f), W, h) == operations(f, W, h)


def test_only_the_costliest_branch_counts_and_moving_numbers_is_free():
    branches = lambda x: jax.lax.cond(x[0] > 0, lambda x: x * 2 + 1, lambda x: x, x)
    x = jnp.ones(6)
    assert operations(branches, x) == 12
    assert operations(lambda x: x.reshape(2, 3).T, x) == 0
