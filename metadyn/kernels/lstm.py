"""The LSTM of Hochreiter & Schmidhuber (1997) with forget gates (Gers et al. 2000), over episodes.

Arrays are feature-major, [features, B], so that the four gates are contiguous row blocks of one
matrix product and every elementwise operation runs along the episodes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Backend = Literal["scan", "backward"]


class LSTMWeights(NamedTuple):
    """Rows, Z = 4H of them, are the gates in blocks of H: input, forget, output, candidate."""

    input: Float[Array, "Z n"]
    recurrent: Float[Array, "Z H"]
    bias: Float[Array, " Z"]


class Gates(NamedTuple):
    """Activations i, f, o in (0, 1) and candidate g in (−1, 1), each [H, ...]."""

    i: Float[Array, " H *B"]
    f: Float[Array, " H *B"]
    o: Float[Array, " H *B"]
    g: Float[Array, " H *B"]


def apply(matrix: Float[Array, "m n"], columns: Float[Array, " n *B"]) -> Float[Array, " m *B"]:
    """matrix @ columns.

    A lone column is the left factor, so that mapped over episodes the product has its features
    last, as all else then has, and nothing is transposed: probing is five times faster for it.
    """
    return columns @ matrix.T if columns.ndim == 1 else matrix @ columns


def cell(
    weights: LSTMWeights,
    x: Float[Array, " n *B"],
    h: Float[Array, " H *B"],
    c: Float[Array, " H *B"],
) -> tuple[Float[Array, " H *B"], Float[Array, " H *B"], Gates]:
    """One step: c' = f·c + i·g, h' = o·tanh c'. Returns (h', c', gates)."""
    bias = weights.bias.reshape(-1, *[1] * (x.ndim - 1))
    z = apply(weights.input, x) + apply(weights.recurrent, h) + bias
    z_i, z_f, z_o, z_g = jnp.split(z, 4)
    sigmoid = jax.nn.sigmoid
    gates = Gates(sigmoid(z_i), sigmoid(z_f), sigmoid(z_o), jnp.tanh(z_g))
    c = gates.f * c + gates.i * gates.g
    return gates.o * jnp.tanh(c), c, gates


def lstm(
    weights: LSTMWeights, inputs: Float[Array, "T n B"], backend: Backend = "scan"
) -> Float[Array, "T H B"]:
    """Hidden states h_1 … h_T of B episodes at once, from h_0 = c_0 = 0.

    Backends agree in value and gradient (tested):
      scan      `lax.scan` under autodiff, the reference.
      backward  a hand-written backward pass: the reverse recurrence carries dh and dc alone, and
                the weight gradients are one product over all steps and episodes at its end.
    """
    if backend == "scan":
        return _trace(weights, inputs).h
    if backend == "backward":
        return _lstm(weights, inputs)
    raise ValueError(f"backend = {backend!r}: choose scan or backward")


class _Trace(NamedTuple):
    h: Float[Array, "T H B"]
    c: Float[Array, "T H B"]
    gates: Gates


def _trace(weights: LSTMWeights, inputs: Float[Array, "T n B"]) -> _Trace:
    def step(carry, x):
        h, c, gates = cell(weights, x, *carry)
        return (h, c), _Trace(h, c, gates)

    zeros = jnp.zeros((weights.recurrent.shape[1], inputs.shape[2]), inputs.dtype)
    return jax.lax.scan(step, (zeros, zeros), inputs)[1]


@jax.custom_vjp
def _lstm(weights: LSTMWeights, inputs: Float[Array, "T n B"]) -> Float[Array, "T H B"]:
    return _trace(weights, inputs).h


def _lstm_forward(weights, inputs):
    trace = _trace(weights, inputs)
    return trace.h, (weights, inputs, trace)


def _lstm_backward(residuals, dh_out):
    weights, inputs, trace = residuals
    zeros = jnp.zeros_like(trace.h[:1])
    h_before = jnp.concatenate([zeros, trace.h[:-1]])
    c_before = jnp.concatenate([zeros, trace.c[:-1]])

    def step(carry, now):
        dh, dc = carry
        dh_out, c, c_before, (i, f, o, g) = now
        dh = dh + dh_out
        tanh_c = jnp.tanh(c)
        dc = dc + dh * o * (1 - tanh_c**2)
        dz = jnp.concatenate(
            [
                dc * g * i * (1 - i),
                dc * c_before * f * (1 - f),
                dh * tanh_c * o * (1 - o),
                dc * i * (1 - g**2),
            ]
        )
        return (weights.recurrent.T @ dz, dc * f), dz

    xs = (dh_out, trace.c, c_before, trace.gates)
    _, dz = jax.lax.scan(step, (zeros[0], zeros[0]), xs, reverse=True)
    d_weights = LSTMWeights(
        jnp.einsum("tzb,tnb->zn", dz, inputs),
        jnp.einsum("tzb,thb->zh", dz, h_before),
        dz.sum((0, 2)),
    )
    return d_weights, jnp.einsum("zn,tzb->tnb", weights.input, dz)


_lstm.defvjp(_lstm_forward, _lstm_backward)
