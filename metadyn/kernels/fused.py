"""The LSTM over whole episodes as two GPU kernels, one forwards and one backwards, by Triton.

A block of threads takes some episodes from their first step to their last, so that a step costs no
launch; what it leaves for its next step is still in the caches beside it. What the backward kernel
finds are the derivatives by the gates' arguments; those by the weights are products after it.

Arrays are laid out as in `metadyn.kernels.lstm`. Through Pallas, whose Triton backend JAX 0.11
calls deprecated; 0.10 and 0.11 have it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.lax import DotAlgorithmPreset as Algorithm
from jaxtyping import Array, Float

from metadyn import mesh

GATES, LEAST, TILE, WARPS = 4, 16, 64, 4
FEW, MANY = 32, 64  # episodes of a block; with TILE and WARPS our choice, fast on an H100


def fits(hidden: int, inputs: int) -> bool:
    """Tells whether there are fused kernels for so many hidden units and inputs.

    They are for 16, 32 or a multiple of 64 units, and up to 63 inputs: a tile of their weights.
    """
    whole = hidden in (LEAST, 2 * LEAST) or (hidden > 0 and hidden % TILE == 0)
    return whole and inputs < TILE


def exact(interpret: bool) -> Algorithm | None:
    """Chooses how products are made that `jax.default_matmul_precision` says are to be float32.

    As three products in TensorFloat32, of the leading and the trailing bits of the factors: as
    exact as float32, and on the matrix units. None where JAX says all that there is to say.
    """
    said = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    full = said in ("float32", "highest")
    return Algorithm.TF32_TF32_F32_X3 if full and not interpret else None


def _sigmoid(z: Array) -> Array:
    return 0.5 + 0.5 * jnp.tanh(0.5 * z)


def _over(tiles: int, body: Callable[[Any, Any], Any], start: Any = 0) -> Any:
    """`body(p, carry)` for each tile of hidden units; one tile needs no loop."""
    return jax.lax.fori_loop(0, tiles, body, start) if tiles > 1 else body(0, start)


def _steps(T: int, tiles: int, clear: Any, step: Any, wait: Callable[[], None]) -> None:
    """`clear(p)` for each tile, then `step(n)(p)` for each tile at each of T steps in turn.

    `wait()` until all threads of the block have written theirs, between steps.
    """

    def each(body):
        def visit(p, carry):
            body(p)
            return carry

        _over(tiles, visit)
        wait()

    def turn(n, carry):
        each(step(n))
        return carry

    each(clear)
    jax.lax.fori_loop(0, T, turn, 0)


def _forward_kernel(x, w_x, w_h, h_out, c_out, gates_out, *, dot, wait):
    """Refs of x [T, K, E], w_x [4, H, K], w_h [4, H, H]; h, c [T, H, E], gates [T, 4, H, E].

    Hidden units are taken in tiles.
    """
    T, H, E = h_out.shape
    rows, tiles = _tiled(H)

    def clear(p):  # what step 0 reads, and makes nothing of
        h_out[0, rows(p)] = c_out[0, rows(p)] = jnp.zeros((H // tiles, E), jnp.float32)

    def step(t):
        x_t, last, later = x[t], jnp.maximum(t - 1, 0), (t > 0).astype(jnp.float32)

        def unit(p):
            def add(q, z):
                h = h_out[last, rows(q)] * later
                return tuple(z[k] + dot(w_h[k, rows(p), rows(q)], h) for k in range(GATES))

            z = _over(tiles, add, tuple(dot(w_x[k, rows(p)], x_t) for k in range(GATES)))
            i, f, o, g = gates = (*map(_sigmoid, z[:3]), jnp.tanh(z[3]))
            c = f * (c_out[last, rows(p)] * later) + i * g
            h_out[t, rows(p)], c_out[t, rows(p)] = o * jnp.tanh(c), c
            for k in range(GATES):
                gates_out[t, k, rows(p)] = gates[k]

        return unit

    _steps(T, tiles, clear, step, wait)


def _backward_kernel(c, gates, dh_out, w_h, dz_out, dc_out, *, dot, wait):
    """Refs of c, dh [T, H, E], gates [T, 4, H, E], w_h [4, H, H] transposed; dz as the gates, dc
    [H, E], by the c of the step before."""
    T, H, E = c.shape
    rows, tiles = _tiled(H)

    def clear(p):
        zeros = jnp.zeros((H // tiles, E), jnp.float32)
        dc_out[rows(p)] = zeros
        for k in range(GATES):
            dz_out[T - 1, k, rows(p)] = zeros

    def step(n):
        t = T - 1 - n
        last, later = jnp.maximum(t - 1, 0), (t > 0).astype(jnp.float32)
        after, more = jnp.minimum(t + 1, T - 1), (t < T - 1).astype(jnp.float32)

        def unit(p):
            def add(q, dh):
                dz = (dz_out[after, k, rows(q)] * more for k in range(GATES))
                return dh + sum(dot(w_h[k, rows(p), rows(q)], each) for k, each in enumerate(dz))

            dh = _over(tiles, add, dh_out[t, rows(p)])
            i, f, o, g = (gates[t, k, rows(p)] for k in range(GATES))
            tanh_c = jnp.tanh(c[t, rows(p)])
            dc = dc_out[rows(p)] + dh * o * (1 - tanh_c**2)
            dz = (
                dc * g * i * (1 - i),
                dc * (c[last, rows(p)] * later) * f * (1 - f),
                dh * tanh_c * o * (1 - o),
                dc * i * (1 - g**2),
            )
            dc_out[rows(p)] = dc * f
            for k in range(GATES):
                dz_out[t, k, rows(p)] = dz[k]

        return unit

    _steps(T, tiles, clear, step, wait)


def _tiled(hidden: int) -> tuple[Callable[[Any], Any], int]:
    """`rows(p)` are the hidden units of tile p; and how many tiles there are."""
    size = min(hidden, TILE)
    return lambda p: pl.ds(p * size, size), hidden // size


def _call(kernel, episodes: int, inputs, weights, outputs, interpret: bool):
    """Runs a kernel over blocks of episodes, which are the last axis of inputs and outputs."""
    from jax.experimental.pallas import triton  # a tenth of a second, for GPUs alone

    last = lambda shape: pl.BlockSpec((*shape[:-1], episodes), lambda b: (*[0] * len(shape[1:]), b))
    whole = lambda shape: pl.BlockSpec(shape, lambda b: (0,) * len(shape))
    dot = partial(jnp.dot, precision=exact(interpret), preferred_element_type=jnp.float32)
    wait = (lambda: None) if interpret else triton.debug_barrier
    return pl.pallas_call(
        partial(kernel, dot=dot, wait=wait),
        grid=(inputs[0].shape[-1] // episodes,),
        in_specs=[*(last(a.shape) for a in inputs), *(whole(a.shape) for a in weights)],
        out_specs=[last(shape) for shape in outputs],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in outputs],
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        name=kernel.__name__.strip("_"),
    )(*inputs, *weights)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def lstm(
    w_x: Float[Array, "Z n"],
    w_h: Float[Array, "Z H"],
    bias: Float[Array, " Z"],
    inputs: Float[Array, "T n B"],
    interpret: bool = False,
) -> Float[Array, "T H B"]:
    """Computes the hidden states h_1 … h_T of B episodes at once, from h_0 = c_0 = 0, in float32.

    For hidden units that `fits`. With `interpret` the kernels run as JAX's own operations, on any
    device: to test them.
    """
    return _forward(w_x, w_h, bias, inputs, interpret)[0]


def _forward(w_x, w_h, bias, inputs, interpret):
    (T, n, B), H = inputs.shape, w_h.shape[1]
    K = max(LEAST, pl.next_power_of_2(n + 1))
    episodes = FEW if exact(interpret) else MANY  # three products take more registers than one
    blocks = -(-B // episodes) * episodes
    ones = jnp.ones((T, 1, B), jnp.float32)
    # The bias is the weight of an input that is 1; widths are powers of two, as Triton asks.
    x = jnp.pad(jnp.concatenate([inputs, ones], 1), ((0, 0), (0, K - n - 1), (0, blocks - B)))
    w = jnp.pad(jnp.concatenate([w_x, bias[:, None]], 1), ((0, 0), (0, K - n - 1)))
    weights = w.reshape(GATES, H, K), w_h.reshape(GATES, H, H)
    states, gates = (T, H, blocks), (T, GATES, H, blocks)
    h, c, gates = _call(_forward_kernel, episodes, [x], weights, [states, states, gates], interpret)
    return h[..., :B], (w_x, w_h, x, h, c, gates)


def _backward(interpret, kept, dh):
    w_x, w_h, x, h, c, gates = kept
    (T, H, blocks), B, n = h.shape, dh.shape[-1], w_x.shape[1]
    dh = jnp.pad(dh, ((0, 0), (0, 0), (0, blocks - B)))
    transposed, found = w_h.reshape(GATES, H, H).transpose(0, 2, 1), [gates.shape, c.shape[1:]]
    dz, _ = _call(_backward_kernel, FEW, [c, gates, dh], [transposed], found, interpret)
    dz, precision = dz.reshape(T, GATES * H, blocks), exact(interpret)
    d_x, d_h = summed(dz, x, precision), summed(dz, before(h), precision)
    dx = jnp.einsum("zn,tzb->tnb", w_x, dz[..., :B], precision=precision)
    return d_x[:, :n], d_h, d_x[:, n], dx


def before(h: Float[Array, "T H B"]) -> Float[Array, "T H B"]:
    """Returns the states that each step begins with, h_0 … h_{T−1}."""
    return jnp.concatenate([jnp.zeros_like(h[:1]), h[:-1]])


def summed(
    dz: Float[Array, "T Z B"], seen: Float[Array, "T s B"], precision: Any = None
) -> Float[Array, "Z s"]:
    """Computes the gradient by weights of what was seen, Σ_t dz_t seen_tᵀ.

    On CPUs as one product over all steps; elsewhere as a product for each, then their sum: one of
    all would transpose them first.
    """
    if mesh.backend() == "cpu":
        rows, columns = (a.swapaxes(0, 1).reshape(a.shape[1], -1) for a in (dz, seen))
        return jnp.matmul(rows, columns.T, precision=precision)
    return jnp.einsum("tzb,tsb->tzs", dz, seen, precision=precision).sum(0)


lstm.defvjp(_forward, _backward)
