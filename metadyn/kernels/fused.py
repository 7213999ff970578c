"""The LSTM over whole episodes as two GPU kernels, one forwards and one backwards, by Triton.

A block of threads takes some episodes from their first step to their last, so that states never
leave the chip between steps, and a step costs no launch. What the backward kernel finds are the
derivatives by the gates' arguments; those by the weights are products over all steps after it.

Arrays are laid out as in `metadyn.kernels.lstm`. Through Pallas, whose Triton backend JAX 0.11
calls deprecated; 0.10 to 0.12 have it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.lax import DotAlgorithmPreset as Algorithm
from jaxtyping import Array, Float

GATES = 4
LEAST, MOST = 16, 128  # hidden units: Triton's least product, and what shared memory holds
FEW = 64  # hidden units up to which four warps have registers enough


class Launch(NamedTuple):
    """How a kernel is laid out on the device: our choice, by what was fast on an H100."""

    episodes: int
    """In a block."""
    warps: int

    @classmethod
    def forward(cls, hidden: int) -> Launch:
        """Of the forward kernel."""
        return cls(64, 4) if hidden <= FEW else cls(32, 8)

    @classmethod
    def backward(cls, hidden: int) -> Launch:
        """Of the backward kernel, which holds more in registers."""
        return cls(32, 4) if hidden <= FEW else cls(32, 8)


def fits(hidden: int) -> bool:
    """Whether there are kernels for so many hidden units: powers of two from 16 to 128."""
    return LEAST <= hidden <= MOST and hidden & (hidden - 1) == 0


def exact(interpret: bool) -> Algorithm | None:
    """How products are made that `jax.default_matmul_precision` says are to be float32.

    As three products in TensorFloat32, of the leading and the trailing bits of the factors: as
    exact as float32, and on the matrix units. None where JAX says all that there is to say.
    """
    full = jax.config.jax_default_matmul_precision in ("float32", "highest")
    return Algorithm.TF32_TF32_F32_X3 if full and not interpret else None


def _dot(precision: Any) -> Callable[[Array, Array], Array]:
    return partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)


def _sigmoid(z: Array) -> Array:
    return 0.5 + 0.5 * jnp.tanh(0.5 * z)


def _forward_kernel(x, w_x, w_h, h_out, c_out, gates_out, *, dot):
    """Refs of x [T, K, E], w_x [4, H, K], w_h [4, H, H]; h, c [T, H, E], gates [T, 4, H, E]."""

    def step(t, carry):
        h, c = carry
        z = [dot(w_x[k], x[t]) + dot(w_h[k], h) for k in range(GATES)]
        i, f, o, g = *map(_sigmoid, z[:3]), jnp.tanh(z[3])
        c = f * c + i * g
        h = o * jnp.tanh(c)
        h_out[t], c_out[t] = h, c
        for k, gate in enumerate((i, f, o, g)):
            gates_out[t, k] = gate
        return h, c

    zeros = jnp.zeros(h_out.shape[1:], jnp.float32)
    jax.lax.fori_loop(0, len(h_out), step, (zeros, zeros))


def _backward_kernel(c, gates, dh_out, w_h, dz_out, *, dot):
    """Refs of c, dh [T, H, E], gates [T, 4, H, E], w_h [4, H, H] transposed; dz as the gates."""
    T = len(c)

    def step(n, carry):
        dh, dc, c_now = carry
        t = T - 1 - n
        c_before = jnp.where(t > 0, c[jnp.maximum(t - 1, 0)], 0.0)
        i, f, o, g = (gates[t, k] for k in range(GATES))
        tanh_c = jnp.tanh(c_now)
        dh = dh + dh_out[t]
        dc = dc + dh * o * (1 - tanh_c**2)
        dz = (
            dc * g * i * (1 - i),
            dc * c_before * f * (1 - f),
            dh * tanh_c * o * (1 - o),
            dc * i * (1 - g**2),
        )
        for k in range(GATES):
            dz_out[t, k] = dz[k]
        return sum(dot(w_h[k], dz[k]) for k in range(GATES)), dc * f, c_before

    zeros = jnp.zeros(c.shape[1:], jnp.float32)
    jax.lax.fori_loop(0, T, step, (zeros, zeros, c[T - 1]))


def _call(kernel, launch: Launch, inputs, weights, outputs, interpret: bool):
    """Runs a kernel over blocks of episodes, which are the last axis of inputs and outputs."""
    last = lambda shape: pl.BlockSpec(
        (*shape[:-1], launch.episodes), lambda b: (*[0] * (len(shape) - 1), b)
    )
    whole = lambda shape: pl.BlockSpec(shape, lambda b: (0,) * len(shape))
    return pl.pallas_call(
        kernel,
        grid=(inputs[0].shape[-1] // launch.episodes,),
        in_specs=[*(last(a.shape) for a in inputs), *(whole(a.shape) for a in weights)],
        out_specs=[last(shape) for shape in outputs],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in outputs],
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=launch.warps, num_stages=1),
        name=kernel.func.__name__.strip("_"),
    )(*inputs, *weights)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def lstm(
    w_x: Float[Array, "Z n"],
    w_h: Float[Array, "Z H"],
    bias: Float[Array, " Z"],
    inputs: Float[Array, "T n B"],
    interpret: bool = False,
) -> Float[Array, "T H B"]:
    """Hidden states h_1 … h_T of B episodes at once, from h_0 = c_0 = 0, in float32.

    For hidden units that `fits`. With `interpret` the kernels run as JAX's own operations, on any
    device: to test them.
    """
    return _forward(w_x, w_h, bias, inputs, interpret)[0]


def _forward(w_x, w_h, bias, inputs, interpret):
    (T, n, B), H = inputs.shape, w_h.shape[1]
    launch = Launch.forward(H)
    K = max(LEAST, pl.next_power_of_2(n + 1))
    blocks = -(-B // launch.episodes) * launch.episodes
    ones = jnp.ones((T, 1, B), jnp.float32)
    # The bias is the weight of an input that is 1; widths are powers of two, as Triton asks.
    x = jnp.pad(jnp.concatenate([inputs, ones], 1), ((0, 0), (0, K - n - 1), (0, blocks - B)))
    w = jnp.pad(jnp.concatenate([w_x, bias[:, None]], 1), ((0, 0), (0, K - n - 1)))
    kernel = partial(_forward_kernel, dot=_dot(exact(interpret)))
    weights = w.reshape(GATES, H, K), w_h.reshape(GATES, H, H)
    states, gates = (T, H, blocks), (T, GATES, H, blocks)
    h, c, gates = _call(kernel, launch, [x], weights, [states, states, gates], interpret)
    return h[..., :B], (w_x, w_h, x, h, c, gates)


def _backward(interpret, kept, dh):
    w_x, w_h, x, h, c, gates = kept
    (T, H, blocks), B, n = h.shape, dh.shape[-1], w_x.shape[1]
    precision = exact(interpret)
    kernel = partial(_backward_kernel, dot=_dot(precision))
    dh = jnp.pad(dh, ((0, 0), (0, 0), (0, blocks - B)))
    transposed = w_h.reshape(GATES, H, H).transpose(0, 2, 1)
    inputs = [c, gates, dh]
    (dz,) = _call(kernel, Launch.backward(H), inputs, [transposed], [gates.shape], interpret)
    dz = dz.reshape(T, GATES * H, blocks)
    d_x, d_h = summed(dz, x, precision), summed(dz, before(h), precision)
    dx = jnp.einsum("zn,tzb->tnb", w_x, dz[..., :B], precision=precision)
    return d_x[:, :n], d_h, d_x[:, n], dx


def before(h: Float[Array, "T H B"]) -> Float[Array, "T H B"]:
    """The states that each step begins with, h_0 … h_{T−1}."""
    return jnp.concatenate([jnp.zeros_like(h[:1]), h[:-1]])


def summed(
    dz: Float[Array, "T Z B"], seen: Float[Array, "T s B"], precision: Any = None
) -> Float[Array, "Z s"]:
    """The gradient by weights of what was seen, Σ_t dz_t seen_tᵀ.

    As a product for each step, then their sum: one product of all would transpose them first.
    """
    return jnp.einsum("tzb,tsb->tzs", dz, seen, precision=precision).sum(0)


lstm.defvjp(_forward, _backward)
