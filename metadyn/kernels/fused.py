"""The LSTM over whole episodes as Triton kernels for GPUs, one forwards and one backwards.

A block of threads runs some episodes from the first step to the last. So a step costs no kernel
launch, and what it writes is still in nearby caches when the next step reads it.

There are two backward kernels. One reads the gates that the forward kernel stored, and computes the
gradient by their pre-activations; products after it give that by the weights. The other, for
rematerialisation (`remat`), computes the gates again from h and c, and adds up the gradient by the
weights in registers. Then an episode's arrays take a third of the memory, and its kernels read and
write a quarter of the bytes (benchmarks/compiled.md), for a third more products.

Arrays are laid out as in `metadyn.kernels.lstm`. The kernels use the Triton backend of Pallas,
which JAX 0.10 to 0.12 have, and which JAX 0.11 calls deprecated.
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

# MIN_SIDE is the shortest side that Triton takes in a product, TILE the hidden units in a tile.
GATES, MIN_SIDE, TILE, WARPS = 4, 16, 64, 4
SMALL_BLOCK, LARGE_BLOCK = 32, 64  # episodes: like TILE and WARPS our choice, fast on an H100
# The registers of so many warps hold the weights' gradient of 64 units: our choice, by ptxas.
REMAT_WARPS = 8


def fits(hidden: int, inputs: int, remat: bool = False) -> bool:
    """Tells whether there are fused kernels for these numbers of hidden units and inputs.

    There are for 16, 32 or a multiple of 64 units, and up to 63 inputs: with the bias, one tile.
    With `remat` there are for one tile: 16, 32 or 64 units, and up to 15 inputs.
    """
    tileable = hidden in (MIN_SIDE, 2 * MIN_SIDE) or (hidden > 0 and hidden % TILE == 0)
    if remat:
        return tileable and hidden <= TILE and inputs < MIN_SIDE
    return tileable and inputs < TILE


def product_algorithm() -> Algorithm | None:
    """Returns the algorithm of products if `jax.default_matmul_precision` asks for float32.

    It makes three products in TensorFloat32, of the leading and the trailing bits of the factors:
    as exact as float32, and on the matrix units. None, JAX's own choice, if it asks for anything
    else or there is no GPU.
    """
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    full = precision in ("float32", "highest")
    return Algorithm.TF32_TF32_F32_X3 if full and mesh.backend() == "gpu" else None


def _sigmoid(z: Array) -> Array:
    return 0.5 + 0.5 * jnp.tanh(0.5 * z)


def _over_tiles(tiles: int, body: Callable[[Any, Any], Any], start: Any) -> Any:
    """Runs `body(p, carry)` for each tile p of hidden units; a single tile needs no loop."""
    return jax.lax.fori_loop(0, tiles, body, start) if tiles > 1 else body(0, start)


def _run_steps(T: int, tiles: int, clear: Any, step: Any, wait: Callable[[], None]) -> None:
    """Runs `clear(p)` for each tile p, then for each of T steps n in turn `step(n)(p)` for each p.

    After `clear` and after each step it waits until all threads of the block have written.
    """

    def on_all_tiles(body):
        _over_tiles(tiles, lambda p, _: body(p), None)
        wait()

    on_all_tiles(clear)
    jax.lax.fori_loop(0, T, lambda n, _: on_all_tiles(step(n)), None)


def _forward_kernel(x, w_x, w_h, h_out, c_out, gates_out=None, *, dot, wait):
    """Runs E episodes forwards, a tile of hidden units at a time.

    Reads x [T, K, E], w_x [4, H, K], w_h [4, H, H]; writes h, c [T, H, E] and, if asked for, gates
    [T, 4, H, E].
    """
    T, H, E = h_out.shape
    rows, tiles = _tiling(H)

    def clear(p):  # step 0 multiplies these values by 0, so none may be NaN
        h_out[0, rows(p)] = c_out[0, rows(p)] = jnp.zeros((H // tiles, E), jnp.float32)

    def step(t):
        x_t, previous, has_previous = x[t], jnp.maximum(t - 1, 0), (t > 0).astype(jnp.float32)

        def run_tile(p):
            def add(q, z):
                h = h_out[previous, rows(q)] * has_previous
                return tuple(z[k] + dot(w_h[k, rows(p), rows(q)], h) for k in range(GATES))

            z = _over_tiles(tiles, add, tuple(dot(w_x[k, rows(p)], x_t) for k in range(GATES)))
            i, f, o, g = gates = _gates(z)
            c = f * (c_out[previous, rows(p)] * has_previous) + i * g
            h_out[t, rows(p)], c_out[t, rows(p)] = o * jnp.tanh(c), c
            for k in range(GATES if gates_out is not None else 0):
                gates_out[t, k, rows(p)] = gates[k]

        return run_tile

    _run_steps(T, tiles, clear, step, wait)


def _backward_kernel(c, gates, dh_out, w_h, dz_out, dc_out, *, dot, wait):
    """Runs E episodes backwards: writes dz, shaped as gates, and dc [H, E], by the previous c.

    Reads c, dh_out [T, H, E], gates [T, 4, H, E], w_h [4, H, H] transposed.
    """
    T, H, E = c.shape
    rows, tiles = _tiling(H)

    def clear(p):
        zeros = jnp.zeros((H // tiles, E), jnp.float32)
        dc_out[rows(p)] = zeros
        for k in range(GATES):
            dz_out[T - 1, k, rows(p)] = zeros

    def step(n):
        t = T - 1 - n
        previous, has_previous = jnp.maximum(t - 1, 0), (t > 0).astype(jnp.float32)
        following, has_following = jnp.minimum(t + 1, T - 1), (t < T - 1).astype(jnp.float32)

        def run_tile(p):
            def add(q, dh):
                dz = (dz_out[following, k, rows(q)] * has_following for k in range(GATES))
                return dh + sum(dot(w_h[k, rows(p), rows(q)], dz_k) for k, dz_k in enumerate(dz))

            dh = _over_tiles(tiles, add, dh_out[t, rows(p)])
            c_previous = c[previous, rows(p)] * has_previous
            ifog = [gates[t, k, rows(p)] for k in range(GATES)]
            dz, dc_out[rows(p)] = _cell_gradient(
                ifog, c[t, rows(p)], c_previous, dh, dc_out[rows(p)]
            )
            for k in range(GATES):
                dz_out[t, k, rows(p)] = dz[k]

        return run_tile

    _run_steps(T, tiles, clear, step, wait)


def _backward_remat_kernel(
    x, h, c, dh_out, w_x, w_h, dx_out, dw_x_out, dw_h_out, dz, dhc, *, dot, wait
):
    """Runs E episodes backwards without stored gates: writes dx and the gradient by the weights.

    Reads x [T, K, E], h, c, dh_out [T, H, E], w_x [4, H, K], w_h [4, H, H]; writes dx as x, and
    dw_x, dw_h as the weights, summed over the E episodes. dz [4, H, E] and dhc [2, H, E] are
    scratch space, where a step's products find their factors a slice at a time: whole factors do
    not fit into registers beside the sums.
    """
    (T, H, E), K = h.shape, x.shape[1]
    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
    slices = [pl.ds(start, MIN_SIDE) for start in range(0, H, MIN_SIDE)]
    dhc[0] = dhc[1] = zeros(H, E)

    def step(n, sums):
        t = T - 1 - n
        previous, has_previous = jnp.maximum(t - 1, 0), (t > 0).astype(jnp.float32)

        def pre_activation(k, _):
            z = sum(dot(w_h[k, :, part], h[previous, part]) for part in slices)
            dz[k] = z * has_previous + dot(w_x[k], x[t])

        jax.lax.fori_loop(0, GATES, pre_activation, None)
        wait()  # at the first step for the zeros in dhc, too
        gates, c_previous = _gates([dz[k] for k in range(GATES)]), c[previous] * has_previous
        by_z, dc = _cell_gradient(gates, c[t], c_previous, dhc[0] + dh_out[t], dhc[1])
        wait()  # other threads than those that read an entry may write it
        dhc[1] = dc
        for k in range(GATES):
            dz[k] = by_z[k]
        wait()

        def by_inputs(k, dh_dx):
            dh, dx = dh_dx
            for part in slices:
                dh = dh + dot(w_h[k, part].T, dz[k, part])
            return dh, dx + dot(w_x[k].T, dz[k])

        def by_weights(k, sums):
            def add(e, sums):
                part = pl.ds(e * MIN_SIDE, MIN_SIDE)
                seen = x[t, :, part], h[previous, :, part] * has_previous
                return tuple(s + dot(dz[k, :, part], a.T) for s, a in zip(sums, seen, strict=True))

            return jax.lax.fori_loop(0, E // MIN_SIDE, add, sums)

        dhc[0], dx_out[t] = jax.lax.fori_loop(0, GATES, by_inputs, (zeros(H, E), zeros(K, E)))
        sums = tuple(by_weights(k, sums[k]) for k in range(GATES))
        wait()
        return sums

    sums = jax.lax.fori_loop(0, T, step, ((zeros(H, K), zeros(H, H)),) * GATES)
    for k in range(GATES):
        dw_x_out[k], dw_h_out[k] = sums[k]


def _gates(z):
    """Returns the gates i, f, o and the candidate g by their pre-activations."""
    return (*map(_sigmoid, z[:3]), jnp.tanh(z[3]))


def _cell_gradient(gates, c, c_previous, dh, dc):
    """Returns the gradient by the pre-activations of the gates, and that by the previous c."""
    i, f, o, g = gates
    tanh_c = jnp.tanh(c)
    dc = dc + dh * o * (1 - tanh_c**2)
    by_z = (
        dc * g * i * (1 - i),
        dc * c_previous * f * (1 - f),
        dh * tanh_c * o * (1 - o),
        dc * i * (1 - g**2),
    )
    return by_z, dc * f


def _tiling(hidden: int) -> tuple[Callable[[Any], Any], int]:
    """Returns a function `rows(p)`, the hidden units of tile p, and the number of tiles."""
    size = min(hidden, TILE)
    return lambda p: pl.ds(p * size, size), hidden // size


def _call(kernel, episodes: int, inputs, weights, outputs, sums=(), scratch=(), warps=WARPS):
    """Runs a kernel over blocks of episodes, the last axis of inputs, outputs and scratch space.

    Outputs and `sums` are shapes. Every block has its own sums, stacked along a new leading axis.
    """
    from jax.experimental.pallas import triton  # takes a tenth of a second, and only GPUs need it

    part = lambda shape: pl.BlockSpec((*shape[:-1], episodes), lambda b: (*[0] * len(shape[1:]), b))
    whole = lambda shape: pl.BlockSpec(shape, lambda b: (0,) * len(shape))
    of_block = lambda shape: pl.BlockSpec((None, *shape), lambda b: (b, *[0] * len(shape)))
    dot = partial(jnp.dot, precision=product_algorithm(), preferred_element_type=jnp.float32)
    on_gpu = mesh.backend() == "gpu"
    wait = triton.debug_barrier if on_gpu else lambda: None
    blocks = inputs[0].shape[-1] // episodes
    shapes = [*outputs, *((blocks, *shape) for shape in sums), *scratch]
    return pl.pallas_call(
        partial(kernel, dot=dot, wait=wait),
        grid=(blocks,),
        in_specs=[*(part(a.shape) for a in inputs), *(whole(a.shape) for a in weights)],
        out_specs=[*map(part, outputs), *map(of_block, sums), *map(part, scratch)],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        interpret=not on_gpu,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
        name=kernel.__name__.strip("_"),
    )(*inputs, *weights)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def lstm(
    w_x: Float[Array, "Z n"],
    w_h: Float[Array, "Z H"],
    bias: Float[Array, " Z"],
    inputs: Float[Array, "T n B"],
    remat: bool = False,
) -> Float[Array, "T H B"]:
    """Returns the hidden states h_1 … h_T of B episodes, run at once from h_0 = c_0 = 0 in float32.

    The backward pass computes the gates again if `remat`. The sizes must satisfy `fits`. Without a
    GPU the kernels run as JAX's own operations, so that they can be tested anywhere.
    """
    return _forward(w_x, w_h, bias, inputs, remat)[0]


def _forward(w_x, w_h, bias, inputs, remat):
    (T, n, B), H = inputs.shape, w_h.shape[1]
    K = max(MIN_SIDE, pl.next_power_of_2(n + 1))
    # Three products take more registers than one.
    episodes = SMALL_BLOCK if product_algorithm() else LARGE_BLOCK
    padded = -(-B // episodes) * episodes  # B, rounded up to whole blocks
    ones = jnp.ones((T, 1, B), jnp.float32)
    # The bias is the weight of an input that is 1. Triton needs widths that are powers of two.
    x = jnp.pad(jnp.concatenate([inputs, ones], 1), ((0, 0), (0, K - n - 1), (0, padded - B)))
    w = jnp.pad(jnp.concatenate([w_x, bias[:, None]], 1), ((0, 0), (0, K - n - 1)))
    weights = w.reshape(GATES, H, K), w_h.reshape(GATES, H, H)
    shapes = [(T, H, padded), (T, H, padded), *[(T, GATES, H, padded)] * (not remat)]
    h, c, *gates = _call(_forward_kernel, episodes, [x], weights, shapes)
    return h[..., :B], (w_x, weights, x, h, c, gates)


def _backward(remat, residuals, dh):
    w_x, weights, x, h, c, gates = residuals
    (T, H, padded), B, n = h.shape, dh.shape[-1], w_x.shape[1]
    dh = jnp.pad(dh, ((0, 0), (0, 0), (0, padded - B)))
    if remat:
        sums, scratch = [a.shape for a in weights], [(GATES, H, padded), (2, H, padded)]
        arguments = [x, h, c, dh], weights, [x.shape], sums, scratch, REMAT_WARPS
        dx, *sums = _call(_backward_remat_kernel, SMALL_BLOCK, *arguments)[:3]
        d_x, d_h = (of_blocks.sum(0).reshape(GATES * H, -1) for of_blocks in sums)
        return d_x[:, :n], d_h, d_x[:, n], dx[:, :n, :B]
    transposed, shapes = weights[1].transpose(0, 2, 1), [gates[0].shape, c.shape[1:]]
    dz, _ = _call(_backward_kernel, SMALL_BLOCK, [c, *gates, dh], [transposed], shapes)
    dz, precision = dz.reshape(T, GATES * H, padded), product_algorithm()
    d_x, d_h = weight_gradient(dz, x, precision), weight_gradient(dz, previous_states(h), precision)
    dx = jnp.einsum("zn,tzb->tnb", w_x, dz[..., :B], precision=precision)
    return d_x[:, :n], d_h, d_x[:, n], dx


def previous_states(h: Float[Array, "T H B"]) -> Float[Array, "T H B"]:
    """Returns the states before each step, h_0 … h_{T−1}."""
    return jnp.concatenate([jnp.zeros_like(h[:1]), h[:-1]])


def weight_gradient(
    dz: Float[Array, "T Z B"], seen: Float[Array, "T s B"], precision: Any = None
) -> Float[Array, "Z s"]:
    """Returns the gradient by the weights that multiply `seen`, Σ_t dz_t seen_tᵀ.

    On CPUs it is one product over all steps. Elsewhere it is the sum of one product per step, as a
    single product would transpose its factors first.
    """
    if mesh.backend() == "cpu":
        dz_rows, seen_rows = (a.swapaxes(0, 1).reshape(a.shape[1], -1) for a in (dz, seen))
        return jnp.matmul(dz_rows, seen_rows.T, precision=precision)
    return jnp.einsum("tzb,tsb->tzs", dz, seen, precision=precision).sum(0)


lstm.defvjp(_forward, _backward)
