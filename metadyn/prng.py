"""Random keys and normal numbers, drawn fast on every platform.

The bits equal those of JAX's own Threefry keys. Only their computation on a CPU differs: JAX runs
the rounds in a loop, which XLA can neither fuse nor vectorise; here the rounds are written out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.random import define_prng_impl, threefry_prng_impl
from jaxtyping import Array, Float, UInt32

from metadyn import mesh
from metadyn.base import Key

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
# Polynomials of Giles (2010), "Approximating the erfinv function", in single precision, for the
# centre (near 0) and the tails.
_CENTRE = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087,
    -0.00125372503, -0.00417768164, 0.246640727, 1.50140941,
)  # fmt: skip
_TAILS = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773,
    -0.0076224613, 0.00943887047, 1.00167406, 2.83297682,
)  # fmt: skip
# Polynomial for (log(1 + f) − f) / f² on [−1/3, 1/3], from a Chebyshev fit.
_LOG = (
    -0.1504942923784256, 0.16729101538658142, -0.16481579840183258, 0.19858717918395996,
    -0.25004205107688904, 0.33335334062576294, -0.49999985098838806,
)  # fmt: skip
_TWO_THIRDS = 0x3F2AAAAB  # the bits of the float32 number 2/3


def fast(key: Key) -> Key:
    """Returns a key that draws the same bits by the fastest generator for this backend."""
    if mesh.backend() == "cpu" and jax.random.key_impl(key) == "threefry2x32":
        return jax.random.wrap_key_data(jax.random.key_data(key), impl=_WRITTEN_OUT)
    return key


def normal(key: Key, shape: tuple[int, ...] = ()) -> Float[Array, "*shape"]:
    """Draws standard normal numbers of a given shape."""
    lowest = float(np.nextafter(np.float32(-1), np.float32(0)))
    return normal_of(jax.random.uniform(key, shape, minval=lowest))


def normal_of(u: Float[Array, ...]) -> Float[Array, ...]:
    """Computes √2 erf⁻¹(u) to 1e-6, which is standard normal if u is uniform on (−1, 1).

    It uses the approximation of `jax.random.normal`, but from log((1 − u)(1 + u)), as published.
    XLA uses log1p(−u²), which is slower on a CPU and loses digits in the tails.
    """
    w = -_log((1 - u) * (1 + u))
    central = w < 5
    w = jnp.where(central, w - 2.5, jnp.sqrt(w) - 3)
    polynomial = jnp.zeros_like(u)
    for centre, tail in zip(_CENTRE, _TAILS, strict=True):
        polynomial = jnp.where(central, centre, tail) + polynomial * w
    return math.sqrt(2) * polynomial * u


def _log(x: Float[Array, ...]) -> Float[Array, ...]:
    """Computes log x of positive x to 4e-7 relative, without the special cases of a general log."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    exponent = (bits - _TWO_THIRDS) >> 23  # so that x / 2^exponent = 1 + f lies in [2/3, 4/3)
    f = jax.lax.bitcast_convert_type(bits - (exponent << 23), jnp.float32) - 1
    polynomial = jnp.zeros_like(x)
    for coefficient in _LOG:
        polynomial = coefficient + polynomial * f
    return math.log(2) * exponent.astype(jnp.float32) + (f + f * f * polynomial)


def threefry(
    key: tuple[UInt32[Array, ...], UInt32[Array, ...]],
    counter: tuple[UInt32[Array, ...], UInt32[Array, ...]],
) -> tuple[UInt32[Array, ...], UInt32[Array, ...]]:
    """Computes Threefry-2x32 with 20 rounds (Salmon et al. 2011), element by element."""
    keys = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    a, b = counter[0] + key[0], counter[1] + key[1]
    for i in range(5):
        for shift in _ROTATIONS[i % 2]:
            a = a + b
            b = a ^ (b << jnp.uint32(shift) | b >> jnp.uint32(32 - shift))
        a = a + keys[(i + 1) % 3]
        b = b + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return a, b


def _blocks(key: UInt32[Array, " 2"], shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Computes one Threefry block for each index of an array of this shape, of size below 2³²."""
    index = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return threefry((key[0], key[1]), (jnp.zeros_like(index), index))


def _block(key: UInt32[Array, " 2"], index: UInt32[Array, ""]) -> tuple[Array, Array]:
    return threefry((key[0], key[1]), (jnp.uint32(0), index))


def _words(key: UInt32[Array, " 2"], width: int, shape: tuple[int, ...]) -> Array:
    a, b = _blocks(key, shape)
    if width == 64:
        return a.astype(jnp.uint64) << jnp.uint64(32) | b.astype(jnp.uint64)
    return (a ^ b).astype(f"uint{width}")


def _uninlined(hash_fn: Callable[..., Any], **jit_options: Any) -> Callable[..., Any]:
    """Compiles a hash apart from its caller: XLA neither inlines the call nor fuses it.

    XLA might otherwise fuse the hash into a loop in which it does not change. To find out that it
    does not, LLVM follows every path through the rounds, some 3.4²⁰.
    """
    jitted = jax.jit(hash_fn, **jit_options)

    def call(*args: Any) -> Any:
        with set_xla_metadata(inlineable="false"):
            return jitted(*args)

    return call


_uninlined_blocks = _uninlined(_blocks, static_argnums=1)
_uninlined_block = _uninlined(_block)
_uninlined_words = _uninlined(_words, static_argnums=(1, 2))
_WRITTEN_OUT = define_prng_impl(
    key_shape=(2,),
    seed=threefry_prng_impl.seed,
    split=lambda key, shape: jnp.stack(_uninlined_blocks(key, shape), axis=-1),
    random_bits=_uninlined_words,
    fold_in=lambda key, number: jnp.stack(_uninlined_block(key, jnp.asarray(number, jnp.uint32))),
    name="threefry2x32_written_out",
    tag="fry",
)
