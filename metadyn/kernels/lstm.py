"""The LSTM (Hochreiter & Schmidhuber 1997) with forget gates (Gers et al. 2000), over episodes.

Arrays are feature-major, [features, B], so that the four gates are contiguous row blocks of one
matrix product and every elementwise operation runs along the episodes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from metadyn import mesh
from metadyn.errors import check, check_choice
from metadyn.kernels import fused

Backend = Literal["auto", "scan", "backward", "fused", "fused_remat"]
MAX_FUSED_UNITS = 128
"""Most hidden units for which `auto` takes `fused`: our choice. With more of them, the blocks of a
batch of a thousand episodes are too few to keep a GPU busy."""


class LSTMWeights(NamedTuple):
    """Weights, whose Z = 4H rows are the gates in blocks of H: input, forget, output, candidate."""

    input: Float[Array, "Z n"]
    recurrent: Float[Array, "Z H"]
    bias: Float[Array, " Z"]


def multiply(matrix: Float[Array, "m n"], columns: Float[Array, " n *B"]) -> Float[Array, " m *B"]:
    """Multiplies a matrix by columns, or by a single column.

    A single column c is computed as c Mᵀ, which is equal: under `vmap` over episodes that is one
    product X Mᵀ, [B, features], so that a probe's many queries transpose nothing.
    """
    return columns @ matrix.T if columns.ndim == 1 else matrix @ columns


def cell(
    weights: LSTMWeights,
    x: Float[Array, " n *B"],
    h: Float[Array, " H *B"],
    c: Float[Array, " H *B"],
) -> tuple[Float[Array, " H *B"], Float[Array, " H *B"], tuple[Array, ...]]:
    """Runs one step: c' = f·c + i·g, h' = o·tanh c'. Returns (h', c', (i, f, o, g)), shaped as h.

    The products with x and h are separate, so that many queries to one state share that with h.
    """
    bias = weights.bias.reshape(-1, *[1] * (x.ndim - 1))
    return _activate(multiply(weights.input, x) + multiply(weights.recurrent, h) + bias, c)


def _activate(z: Float[Array, " Z *B"], c: Float[Array, " H *B"]):
    # σ(z) = ½ + ½ tanh(½z), so one tanh gives all gates: it vectorises better than an exponential
    # and a division.
    H = len(c)
    scale = jnp.where(jnp.arange(4 * H) < 3 * H, 0.5, 1.0).astype(z.dtype)
    tanh = jnp.tanh(scale.reshape(-1, *[1] * (z.ndim - 1)) * z)
    i, f, o = (0.5 + 0.5 * tanh[k * H : (k + 1) * H] for k in range(3))
    g = tanh[3 * H :]
    c = f * c + i * g
    return o * jnp.tanh(c), c, (i, f, o, g)


def lstm(
    weights: LSTMWeights, inputs: Float[Array, "T n B"], backend: Backend = "auto"
) -> Float[Array, "T H B"]:
    """Returns the hidden states h_1 … h_T of B episodes, run at once from h_0 = c_0 = 0.

    Backends agree in value and gradient (tested):
      auto      `fused` on GPUs for up to 128 units (`benchmarks/gpu.py`), else `backward`, which
                on CPUs is faster than `scan` at all sizes that `benchmarks/kernels.py` times.
      scan      `lax.scan` with automatic differentiation, the reference.
      backward  a hand-written backward pass. The forward pass stores the derivatives of each step,
                so that a step of the reverse recurrence is one product and a few multiplications.
                The weight gradients are computed afterwards, by products over all steps.
      fused     on GPUs, one kernel for each direction (`metadyn.kernels.fused`).
      fused_remat  the same for up to 64 units, with gates that the backward pass computes again
                and the forward pass does not store. An episode takes a third of the memory. It was
                never timed, so `auto` does not choose it.
    """
    H, n = weights.recurrent.shape[1], inputs.shape[1]
    if backend == "auto":
        backend = "fused" if H <= MAX_FUSED_UNITS and has_fused(H, n) else "backward"
    check_backend(backend, H, n)
    if backend in ("fused", "fused_remat"):
        return fused.lstm(*weights, inputs, remat=backend == "fused_remat")
    return (_scan if backend == "scan" else _lstm)(weights, inputs)


def has_fused(hidden: int, inputs: int, remat: bool = False) -> bool:
    """Tells whether fused kernels of these sizes run here: on NVIDIA GPUs from Ampere on."""
    capability = str(getattr(mesh.devices()[0], "compute_capability", "9.0"))  # on AMD: "gfx942"
    recent = capability[0].isdigit() and float(capability) >= 8
    return mesh.backend() == "gpu" and recent and fused.fits(hidden, inputs, remat)


def check_backend(backend: str, hidden: int, inputs: int) -> None:
    """Raises `ConfigError` if the backend is unknown or does not run these sizes here."""
    check_choice("backend", backend, Backend)
    sizes = {
        "fused": "16, 32 or a multiple of 64 hidden units, and fewer than 64 inputs",
        "fused_remat": "16, 32 or 64 hidden units, and fewer than 16 inputs",
    }
    if backend in sizes:
        available = has_fused(hidden, inputs, backend == "fused_remat")
        check(available, "backend", backend, f"needs NVIDIA GPUs, {sizes[backend]}")


def _scan(weights: LSTMWeights, inputs: Float[Array, "T n B"]) -> Float[Array, "T H B"]:
    matrix = _joint_matrix(weights)

    def step(carry, x):
        h, c, _ = _step(matrix, weights.bias, x, *carry)
        return (h, c), h

    return jax.lax.scan(step, _start(weights, inputs), inputs)[1]


def _joint_matrix(weights):
    return jnp.concatenate([weights.input, weights.recurrent], axis=1)


def _step(matrix, bias, x, h, c):
    """Does the same as `cell`, with one product for x and h."""
    return _activate(matrix @ jnp.concatenate([x, h]) + bias[:, None], c)


def _start(weights, inputs):
    zeros = jnp.zeros((weights.recurrent.shape[1], inputs.shape[2]), inputs.dtype)
    return zeros, zeros


_lstm = jax.custom_vjp(_scan)


def _lstm_forward(weights, inputs):
    matrix = _joint_matrix(weights)
    # Other devices than CPUs store one array in place of six, as each costs a launch at every step.
    pack = tuple if mesh.backend() == "cpu" else jnp.stack

    def step(carry, x):
        c_before = carry[1]
        h, c, (i, f, o, g) = _step(matrix, weights.bias, x, *carry)
        tanh_c = jnp.tanh(c)
        # Derivatives of c by the pre-activations of i and f, of h by that of o, of c by that of g,
        # of h by c, and of c by the previous c.
        derivatives = (
            g * i * (1 - i),
            c_before * f * (1 - f),
            tanh_c * o * (1 - o),
            i * (1 - g**2),
            o * (1 - tanh_c**2),
            f,
        )
        return (h, c), (h, pack(derivatives))

    _, (h, derivatives) = jax.lax.scan(step, _start(weights, inputs), inputs)
    return h, (weights, inputs, h, derivatives)


def _lstm_backward(residuals, dh_out):
    weights, inputs, h, derivatives = residuals
    start, on_cpu = _start(weights, inputs), mesh.backend() == "cpu"
    # On CPUs XLA takes two to four times as long for a product whose left factor is read
    # transposed, so there the weights are transposed once, before the loop.
    recurrent = weights.recurrent.T if on_cpu else weights.recurrent

    def step(carry, xs):
        dh, dc = carry
        dh_out, (c_by_i, c_by_f, h_by_o, c_by_g, h_by_c, c_by_c) = xs
        dh = dh + dh_out
        dc = dc + dh * h_by_c
        dz = jnp.concatenate([dc * c_by_i, dc * c_by_f, dh * h_by_o, dc * c_by_g])
        return ((recurrent if on_cpu else recurrent.T) @ dz, dc * c_by_c), dz

    _, dz = jax.lax.scan(step, start, (dh_out, derivatives), reverse=True)
    x = jnp.concatenate([inputs, jnp.ones_like(inputs[:, :1])], 1)  # the last row is for the bias
    by_x, by_h = fused.weight_gradient(dz, x), fused.weight_gradient(dz, fused.previous_states(h))
    dx = jnp.einsum("zn,tzb->tnb", weights.input, dz)
    return LSTMWeights(by_x[:, :-1], by_h, by_x[:, -1]), dx


_lstm.defvjp(_lstm_forward, _lstm_backward)
