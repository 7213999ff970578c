"""Random numbers against Threefry's published vectors, JAX's keys and SciPy's normal quantiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtri
from scipy.stats import kstest

from metadyn import prng
from metadyn.kernels import products

KEY = jax.random.key(3)


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # Random123's known answers for threefry2x32 with 20 rounds
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_published_answers(key, counter, expected):
    pair = lambda numbers: tuple(jnp.uint32(n) for n in numbers)
    assert tuple(int(word) for word in prng.threefry(pair(key), pair(counter))) == expected


@pytest.mark.parametrize(
    "draw",
    [
        lambda key: jax.random.key_data(jax.random.split(key, (3, 2))),
        lambda key: jax.random.key_data(jax.random.fold_in(key, 2**32 - 1)),
        lambda key: jax.random.key_data(
            jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(5))
        ),
        lambda key: jax.random.bits(key, (4, 5)),
        lambda key: jax.random.bits(key, (7,), jnp.uint8),
        lambda key: jax.random.permutation(key, 50),
        lambda key: jax.random.randint(key, (9,), -3, 11),
        lambda key: jax.random.uniform(key),
    ],
)
def test_a_fast_key_draws_the_same_bits_as_jax(draw):
    fast = prng.fast(KEY)
    assert jax.random.key_impl(fast) != jax.random.key_impl(KEY)  # or nothing would be compared
    np.testing.assert_array_equal(draw(fast), draw(KEY))
    keys = jax.random.split(KEY, (2, 3))
    batched = jax.vmap(jax.vmap(lambda key: draw(prng.fast(key))))(keys)
    np.testing.assert_array_equal(batched, jax.vmap(jax.vmap(draw))(keys))


@pytest.mark.timeout(60)
def test_a_draw_inside_a_product_compiles_in_time():
    """When XLA fused such a draw into the loop of the product, compiling did not end."""

    def answer(key, inputs, weights):
        key, _ = jax.random.split(prng.fast(key))
        drawn = jax.random.uniform(prng.fast(key), (1,))
        return products.matvec(weights, jnp.concatenate([drawn, inputs]))

    keys, inputs, weights = jax.random.split(KEY, 1), jnp.ones((1, 1)), jnp.ones((16, 2))
    answers = jax.jit(jax.vmap(answer, (0, 0, None)))(keys, inputs, weights)
    drawn = jax.random.uniform(jax.random.split(keys[0])[0], (1,))
    np.testing.assert_allclose(answers, jnp.broadcast_to(1 + drawn, (1, 16)), rtol=1e-6)


def test_other_keys_are_left_as_they_are():
    key = jax.random.key(0, impl="rbg")
    assert prng.fast(key) is key
    assert prng.fast(prng.fast(KEY)).dtype == prng.fast(KEY).dtype


def test_normal_is_the_quantile_of_the_same_uniform_numbers():
    shape = (1_000_000,)
    least = float(np.nextafter(np.float32(-1), np.float32(0)))
    uniform = np.asarray(jax.random.uniform(KEY, shape, minval=least), np.float64)
    drawn = np.asarray(prng.normal(KEY, shape))
    assert np.abs(drawn).max() > 4.5  # the draws use both branches
    np.testing.assert_allclose(drawn, ndtri((1 + uniform) / 2), rtol=1e-6, atol=2e-7)
    # XLA's own draws are less exact in the tails.
    np.testing.assert_allclose(drawn, jax.random.normal(KEY, shape), atol=1e-4)
    assert kstest(drawn, "norm").pvalue > 1e-3


def test_normal_is_finite_at_the_ends():
    least = np.nextafter(np.float32(-1), np.float32(0))
    ends = jnp.array([least, -0.5, 0.0, 0.5, -least])
    normal = prng.normal_of(ends)
    np.testing.assert_allclose(normal, ndtri((1 + np.asarray(ends, np.float64)) / 2), rtol=1e-6)
