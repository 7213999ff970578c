"""Compares the fused LSTM kernels with the reference: compiled on a GPU, interpreted elsewhere."""

from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.lax import DotAlgorithmPreset as Algorithm

from metadyn import mesh, program_cost
from metadyn.errors import ConfigError
from metadyn.kernels import fused
from metadyn.kernels.lstm import LSTMWeights, check_backend, has_fused, lstm

TINY = ["linear_regression", "--lstm.backend", "fused"]


def case(hidden, batch, steps, inputs):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = ((4 * hidden, inputs), (4 * hidden, hidden), (4 * hidden,))
    scales = (0.3, hidden**-0.5, 0.3)
    weights = LSTMWeights(
        *(
            s * jax.random.normal(k, shape)
            for s, k, shape in zip(scales, keys, shapes, strict=False)
        )
    )
    x = jax.random.normal(keys[3], (steps, inputs, batch))
    return weights, x, jax.random.normal(keys[4], (steps, hidden, batch))


@pytest.mark.parametrize(
    ("hidden", "batch", "steps", "inputs"),
    [
        *((16, 1, 5, 10), (32, 64, 1, 15), (64, 70, 20, 3), (64, 65, 2, 3), (64, 1, 3, 10)),
        *((128, 33, 4, 16), (192, 2, 3, 2), (256, 3, 2, 10)),
    ],
)
@pytest.mark.parametrize("block", [fused.SMALL_BLOCK, fused.LARGE_BLOCK])
@pytest.mark.parametrize("remat", [False, True])
@jax.default_matmul_precision("float32")
def test_values_and_gradients_are_those_of_the_reference(
    hidden, batch, steps, inputs, block, remat, monkeypatch
):
    """They agree in float32 to 1e-5 of the greatest entry, in blocks as large as on GPUs.

    Interpreted kernels take large blocks, so the test sets the size of these.
    """
    if not fused.fits(hidden, inputs, remat):
        pytest.skip("rematerialisation is for one tile alone")
    monkeypatch.setattr(fused, "LARGE_BLOCK", block)
    weights, x, direction = case(hidden, batch, steps, inputs)

    def value_and_gradient(run):
        h, vjp = jax.vjp(run, weights, x)
        return h, vjp(direction)

    kernel = jax.jit(lambda: value_and_gradient(lambda w, x: fused.lstm(*w, x, remat)))()
    reference = jax.jit(lambda: value_and_gradient(lambda w, x: lstm(w, x, "scan")))()
    for actual, expected in zip(*map(jax.tree.leaves, (kernel, reference)), strict=True):
        tolerance = 1e-5 * float(jnp.abs(expected).max())
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("remat", [False, True])
@jax.default_matmul_precision("float32")
def test_seeds_are_one_more_axis_of_the_blocks(remat):
    weights, x, _ = case(16, 5, 3, 4)
    stacked = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a]), weights)
    loss = lambda run: lambda w: (jnp.sum(jnp.sin(h := run(w))), h)
    kernel = jax.vmap(jax.grad(loss(lambda w: fused.lstm(*w, x, remat)), has_aux=True))(stacked)
    reference = jax.grad(loss(lambda w: lstm(w, x, "scan")), has_aux=True)
    for seed in range(2):
        of_seed = lambda leaf, seed=seed: leaf[seed]
        expected = reference(jax.tree.map(of_seed, stacked))
        chex.assert_trees_all_close(jax.tree.map(of_seed, kernel), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("float32", Algorithm.TF32_TF32_F32_X3),
        ("tensorfloat32", (jax.lax.Precision.HIGH,) * 2),
        ("bfloat16", (jax.lax.Precision.DEFAULT,) * 2),
    ],
)
def test_float32_is_three_products_in_every_kernel(precision, expected, remat, monkeypatch):
    """Kernels take JAX's other precisions as products elsewhere do."""
    weights, x, _ = case(64, 4, 2, 3)
    monkeypatch.setattr(mesh, "backend", lambda: "gpu")
    with jax.default_matmul_precision(precision):
        loss = lambda w: jnp.sum(fused.lstm(*w, x, remat))
        program = jax.make_jaxpr(jax.grad(loss))(weights)
    used = [*precisions(program.jaxpr)]
    assert len(used) > 2
    assert {*used} == {expected}


def precisions(jaxpr, inside=False):
    """Yields the precision of each product inside a kernel."""
    for equation in jaxpr.eqns:
        if inside and equation.primitive.name == "dot_general":
            yield equation.params["precision"]
        within = inside or equation.primitive.name == "pallas_call"
        for jaxpr in jaxprs_in_params(equation.params):
            yield from precisions(jaxpr, within)


def test_operations_of_a_kernel_count_for_each_block():
    """One more block of episodes costs the products of its steps, and a fifth more at most."""
    program = jax.make_jaxpr(lambda w, x: fused.lstm(*w, x))
    programs = [program(*case(16, batch, 3, 4)[:2]) for batch in (64, 128)]
    counts = [program_cost.operations(program.jaxpr) for program in programs]
    block = counts[1] - counts[0]
    products = 3 * 2 * 64 * (4 * 16 * (16 + 16))
    assert products < block < 1.2 * products


@pytest.mark.parametrize(("remat", "least", "most"), [(False, 100e3, 200e3), (True, 30e3, 40e3)])
def test_an_episode_reads_and_writes_less_where_the_gates_are_not_stored(
    remat, least, most, monkeypatch
):
    """Counts the bytes of all arguments and results of kernels, products and sums (H 64, T 20)."""
    monkeypatch.setattr(mesh, "backend", lambda: "gpu")
    batch = 16_384
    shapes = ((256, 6), (256, 64), (256,), (20, 6, batch), (20, 64, batch))
    *weights, x, by_h = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    gradient = lambda w, x, by_h: jax.vjp(lambda w: fused.lstm(*w, x, remat), w)[1](by_h)
    program = jax.make_jaxpr(gradient)(LSTMWeights(*weights), x, by_h)
    costly = {"pallas_call", "dot_general", "reduce_sum"}
    arrays = [
        variable.aval
        for equation in equations(program.jaxpr)
        if equation.primitive.name in costly and max(v.aval.size for v in equation.invars) > batch
        for variable in (*equation.invars, *equation.outvars)
    ]
    assert least < 4 * sum(array.size for array in arrays) / batch < most


def equations(jaxpr):
    """Yields all equations of a program except those inside kernels."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name != "pallas_call":
            for jaxpr in jaxprs_in_params(equation.params):
                yield from equations(jaxpr)


@pytest.mark.parametrize(
    ("hidden", "inputs", "fits", "fits_with_remat"),
    [
        *((8, 2, False, False), (16, 2, True, True), (48, 2, False, False), (64, 15, True, True)),
        *((192, 63, True, False), (64, 16, True, False), (64, 64, False, False)),
    ],
)
def test_sizes_that_fit_are_whole_tiles(hidden, inputs, fits, fits_with_remat):
    assert fused.fits(hidden, inputs) == fits
    assert fused.fits(hidden, inputs, remat=True) == fits_with_remat


@pytest.mark.parametrize(
    ("capability", "expected"), [("7.5", False), ("8.0", True), ("gfx942", False)]
)
def test_gpus_before_ampere_and_of_other_makers_have_no_fused_kernels(
    capability, expected, monkeypatch
):
    monkeypatch.setattr(mesh, "backend", lambda: "gpu")
    monkeypatch.setattr(mesh, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    assert has_fused(64, 10) == has_fused(64, 10, remat=True) == expected


def test_a_backend_is_refused_for_sizes_that_it_does_not_run(monkeypatch):
    monkeypatch.setattr(mesh, "backend", lambda: "gpu")
    check_backend("fused", 128, 16)
    check_backend("fused_remat", 64, 15)
    for backend, hidden, inputs in (("fused", 65, 3), ("fused_remat", 128, 3)):
        with pytest.raises(ConfigError, match=f"'{backend}': needs NVIDIA GPUs, 16, 32 or "):
            check_backend(backend, hidden, inputs)


@pytest.mark.skipif(mesh.backend() == "gpu", reason="where there is no GPU")
def test_no_gpu_is_one_line_and_exit_code_2(refused):
    refused(TINY, "metadyn: --lstm.backend fused: needs NVIDIA GPUs, 16, 32 or a multiple of 64")
    refused(
        [*TINY[:-1], "fused_remat"], "fused_remat: needs NVIDIA GPUs, 16, 32 or 64 hidden units"
    )
