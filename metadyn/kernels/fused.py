"""The LSTM over an episode as two Pallas kernels for GPUs, forward and backward.

Each program takes a block of episodes through all T steps, with the weights, the state and its
gradient on the chip. What leaves the chip is what the other pass and the weight gradients need.
Checked in interpret mode on a CPU alone; not measured on a GPU, and off by default.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

BLOCK = 32  # episodes a program takes: our choice


def forward(
    input: Float[Array, "4 H n"],
    recurrent: Float[Array, "4 H H"],
    bias: Float[Array, "4 H 1"],
    x: Float[Array, "T n B"],
) -> tuple[Float[Array, "T H B"], Float[Array, "T 6 H B"]]:
    """Hidden states and the derivatives within each step, in the order of `lstm.Local`.

    Weights are those of the gates i, f, o, g.
    """

    def kernel(input, recurrent, bias, x, h_out, local_out):
        def step(t, carry):
            h, c_before = carry
            dot = partial(jnp.dot, preferred_element_type=jnp.float32)
            z = [dot(input[k], x[t]) + dot(recurrent[k], h) + bias[k] for k in range(4)]
            i, f, o = (0.5 + 0.5 * jnp.tanh(0.5 * each) for each in z[:3])
            g = jnp.tanh(z[3])
            c = f * c_before + i * g
            tanh_c = jnp.tanh(c)
            h = o * tanh_c
            h_out[t] = h
            local_out[t, 0] = g * i * (1 - i)
            local_out[t, 1] = c_before * f * (1 - f)
            local_out[t, 2] = tanh_c * o * (1 - o)
            local_out[t, 3] = i * (1 - g * g)
            local_out[t, 4] = o * (1 - tanh_c * tanh_c)
            local_out[t, 5] = f
            return h, c

        start = jnp.zeros((H, BLOCK), x.dtype)
        jax.lax.fori_loop(0, T, step, (start, start))

    (T, _, B), H = x.shape, recurrent.shape[1]
    return _call(
        kernel,
        (input, recurrent, bias),
        (x,),
        (jax.ShapeDtypeStruct((T, H, B), x.dtype), jax.ShapeDtypeStruct((T, 6, H, B), x.dtype)),
    )


def backward(
    recurrent_transposed: Float[Array, "4 H H"],
    local: Float[Array, "T 6 H B"],
    dh_out: Float[Array, "T H B"],
) -> Float[Array, "T 4 H B"]:
    """Gradients of the arguments of the gates i, f, o, g at every step."""

    def kernel(recurrent_transposed, local, dh_out, dz_out):
        def step(back, carry):
            dh, dc = carry
            t = T - 1 - back
            dh = dh + dh_out[t]
            dc = dc + dh * local[t, 4]
            dz = [(dh if k == 2 else dc) * local[t, k] for k in range(4)]
            dh = jnp.zeros_like(dh)
            for k in range(4):
                dz_out[t, k] = dz[k]
                product = partial(jnp.dot, preferred_element_type=jnp.float32)
                dh = dh + product(recurrent_transposed[k], dz[k])
            return dh, dc * local[t, 5]

        start = jnp.zeros((H, BLOCK), dh_out.dtype)
        jax.lax.fori_loop(0, T, step, (start, start))

    T, H, B = dh_out.shape
    out = (jax.ShapeDtypeStruct((T, 4, H, B), dh_out.dtype),)
    return _call(kernel, (recurrent_transposed,), (local, dh_out), out)[0]


def _call(kernel, whole, split, out):
    """Runs the kernel on each block of episodes: `whole` are there in full, the rest by block."""
    episodes = split[0].shape[-1]
    padding = -episodes % BLOCK
    widen = lambda array: jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, padding)])

    def spec(shape, by_block):
        block = (*shape[:-1], BLOCK) if by_block else shape
        last = (lambda b: b) if by_block else (lambda b: 0)
        return pl.BlockSpec(block, lambda b: (*[0] * (len(shape) - 1), last(b)))

    wide = [jax.ShapeDtypeStruct((*a.shape[:-1], episodes + padding), a.dtype) for a in out]
    found = pl.pallas_call(
        kernel,
        grid=((episodes + padding) // BLOCK,),
        in_specs=[spec(a.shape, False) for a in whole] + [spec(a.shape, True) for a in split],
        out_specs=tuple(spec(a.shape, True) for a in out),
        out_shape=tuple(wide),
        interpret=jax.default_backend() == "cpu",
    )(*whole, *map(widen, split))
    return tuple(array[..., :episodes] for array in found)
