"""The fused LSTM kernels against the reference: on a GPU as they are, elsewhere interpreted."""

from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.lax import DotAlgorithmPreset as Algorithm

from metadyn import mesh, program_cost
from metadyn.kernels import fused
from metadyn.kernels.lstm import LSTMWeights, has_fused, lstm

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
    """To 1e-5 of the greatest entry, at float32, in blocks of as many episodes as on GPUs."""
    if not fused.fits(hidden, inputs, remat):
        pytest.skip("of one tile alone")
    monkeypatch.setattr(fused, "LARGE_BLOCK", block)  # what is interpreted takes many
    weights, x, direction = case(hidden, batch, steps, inputs)

    def found(run):
        h, vjp = jax.vjp(run, weights, x)
        return h, vjp(direction)

    ours = jax.jit(lambda: found(lambda w, x: fused.lstm(*w, x, remat)))()
    theirs = jax.jit(lambda: found(lambda w, x: lstm(w, x, "scan")))()
    for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * float(jnp.abs(other).max()))


@pytest.mark.parametrize("remat", [False, True])
@jax.default_matmul_precision("float32")
def test_seeds_are_one_more_axis_of_the_blocks(remat):
    weights, x, _ = case(16, 5, 3, 4)
    two = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a]), weights)
    loss = lambda run: lambda w: (jnp.sum(jnp.sin(h := run(w))), h)
    ours = jax.grad(loss(lambda w: fused.lstm(*w, x, remat)), has_aux=True)
    both = jax.vmap(ours)(two)
    for seed in range(2):
        one = lambda leaf, seed=seed: leaf[seed]
        each = jax.grad(loss(lambda w: lstm(w, x, "scan")), has_aux=True)(jax.tree.map(one, two))
        chex.assert_trees_all_close(jax.tree.map(one, both), each, rtol=0, atol=1e-5)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ("float32", Algorithm.TF32_TF32_F32_X3),
        ("tensorfloat32", (jax.lax.Precision.HIGH,) * 2),
        ("bfloat16", (jax.lax.Precision.DEFAULT,) * 2),
    ],
)
def test_float32_is_three_products_in_every_kernel(asked, made, remat, monkeypatch):
    """And what else JAX says holds in kernels as it does elsewhere."""
    weights, x, _ = case(64, 4, 2, 3)
    monkeypatch.setattr(mesh, "backend", lambda: "gpu")
    with jax.default_matmul_precision(asked):
        loss = lambda w: jnp.sum(fused.lstm(*w, x, remat))
        program = jax.make_jaxpr(jax.grad(loss))(weights)
    said = [*precisions(program.jaxpr)]
    assert len(said) > 2
    assert {*said} == {made}


def precisions(jaxpr, inside=False):
    """What each product within a kernel is told."""
    for equation in jaxpr.eqns:
        if inside and equation.primitive.name == "dot_general":
            yield equation.params["precision"]
        within = inside or equation.primitive.name == "pallas_call"
        for each in jaxprs_in_params(equation.params):
            yield from precisions(each, within)


def test_operations_of_a_kernel_count_for_each_block():
    """What a whole block more costs, and the products of a step."""
    program = jax.make_jaxpr(lambda w, x: fused.lstm(*w, x))
    programs = [program(*case(16, batch, 3, 4)[:2]) for batch in (64, 128)]
    counts = [program_cost.operations(each.jaxpr) for each in programs]
    block = counts[1] - counts[0]
    products = 3 * 2 * 64 * (4 * 16 * (16 + 16))
    assert products < block < 1.2 * products


@pytest.mark.parametrize(("remat", "least", "most"), [(False, 100e3, 200e3), (True, 30e3, 40e3)])
def test_an_episode_reads_and_writes_less_where_the_gates_are_not_stored(
    remat, least, most, monkeypatch
):
    """Bytes of all arrays that kernels, products and sums take and give, with 64 units, T = 20."""
    monkeypatch.setattr(mesh, "backend", lambda: "gpu")
    batch = 16_384
    shapes = ((256, 6), (256, 64), (256,), (20, 6, batch), (20, 64, batch))
    *weights, x, by_h = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    gradient = lambda w, x, by_h: jax.vjp(lambda w: fused.lstm(*w, x, remat), w)[1](by_h)
    program = jax.make_jaxpr(gradient)(LSTMWeights(*weights), x, by_h)
    costly = {"pallas_call", "dot_general", "reduce_sum"}
    arrays = [
        each.aval
        for equation in equations(program.jaxpr)
        if equation.primitive.name in costly and max(v.aval.size for v in equation.invars) > batch
        for each in (*equation.invars, *equation.outvars)
    ]
    assert least < 4 * sum(array.size for array in arrays) / batch < most


def equations(jaxpr):
    """All equations of a program, but for those within its kernels."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name != "pallas_call":
            for each in jaxprs_in_params(equation.params):
                yield from equations(each)


@pytest.mark.parametrize(
    ("hidden", "inputs", "there", "with_remat"),
    [
        *((8, 2, False, False), (16, 2, True, True), (48, 2, False, False), (64, 15, True, True)),
        *((192, 63, True, False), (64, 16, True, False), (64, 64, False, False)),
    ],
)
def test_what_fits_is_whole_tiles(hidden, inputs, there, with_remat):
    assert fused.fits(hidden, inputs) == there
    assert fused.fits(hidden, inputs, remat=True) == with_remat


@pytest.mark.parametrize(("made", "there"), [("7.5", False), ("8.0", True), ("gfx942", False)])
def test_cards_before_ampere_and_of_others_have_none(made, there, monkeypatch):
    monkeypatch.setattr(mesh, "backend", lambda: "gpu")
    monkeypatch.setattr(mesh, "devices", lambda: [SimpleNamespace(compute_capability=made)])
    assert has_fused(64, 10) == there


@pytest.mark.skipif(mesh.backend() == "gpu", reason="where there is no GPU")
def test_no_gpu_is_one_line_and_exit_code_2(refused):
    refused(TINY, "metadyn: --lstm.backend fused: needs NVIDIA GPUs, 16, 32 or a multiple of 64")
    refused(
        [*TINY[:-1], "fused_remat"], "fused_remat: needs NVIDIA GPUs, 16, 32 or 64 hidden units"
    )
