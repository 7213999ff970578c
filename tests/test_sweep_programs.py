"""Programs that differ only in constants: which do, and what the shared program computes."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from metadyn import mesh
from metadyn.sweep_programs import ProgramCache, evaluate, split_constants, varying

X = np.linspace(0.1, 1, 6, dtype=np.float32)


@jax.custom_vjp
def squared(x):
    return x * x


squared.defvjp(lambda x: (x * x, x), lambda x, g: (2 * x * g,))


def on_devices(c, x):
    part = PartitionSpec(mesh.TASKS)
    scaled = lambda x: jax.lax.scan(lambda total, y: (total + c * y, None), 0.0, x)[0][None]
    return jax.shard_map(scaled, mesh=mesh.mesh(), in_specs=part, out_specs=part, check_vma=False)(
        x
    ).sum()


# Each program of a constant c and an array x, with the same in NumPy.
PROGRAMS = {
    "plain": (lambda c, x: c * x + 1, lambda c, x: c * x + 1),
    "an array": (lambda c, x: jnp.asarray(c * np.arange(6.0), jnp.float32) @ x,
                 lambda c, x: c * np.arange(6.0) @ x),
    "jit": (lambda c, x: jax.jit(lambda x: c * x)(x), lambda c, x: c * x),
    "vmap": (lambda c, x: jax.vmap(lambda y: jnp.exp(c * y))(x), lambda c, x: np.exp(c * x)),
    "grad": (lambda c, x: jax.grad(lambda x: jnp.sum(c * squared(x)))(x), lambda c, x: 2 * c * x),
    "custom": (lambda c, x: squared(c + x), lambda c, x: (c + x) ** 2),
    "scan": (lambda c, x: jax.lax.scan(lambda a, y: (a * y + c, a), 0.0, x, reverse=True)[1],
             lambda c, x: numpy_scan(c, x)),
    "while": (lambda c, x: jax.lax.while_loop(lambda a: a.sum() < 9, lambda a: a * (1 + c), x),
              lambda c, x: numpy_while(c, x)),
    "fori": (lambda c, x: jax.lax.fori_loop(0, 3, lambda i, a: c * a + i, x),
             lambda c, x: c * (c * c * x + 1) + 2),
    "cond": (lambda c, x: jax.lax.cond(x[0] > 0, lambda x: c * x, lambda x: x - c, x),
             lambda c, x: c * x),
    "closed over": (lambda c, x: closure(c)(x), lambda c, x: closed_over(c, x)),
    "closed over, in a scan": (
        lambda c, x: jax.lax.scan(lambda a, _: (closure(c)(a), None), x, None, 2)[0],
        lambda c, x: closed_over(c, closed_over(c, x))),
    "closed over, in a condition": (
        lambda c, x: jax.lax.cond(x[0] > 0, closure(c), lambda x: x, x),
        lambda c, x: closed_over(c, x)),
    "closed over, derived": (
        lambda c, x: jax.grad(lambda x: jnp.sum(closure(c)(x) ** 2))(x),
        lambda c, x: 2 * closed_over(c, x) * c * np.arange(6)),
    "checkpoint": (lambda c, x: jax.grad(lambda x: jnp.sum(jax.checkpoint(closure(c))(x) ** 2))(x),
                   lambda c, x: 2 * closed_over(c, x) * c * np.arange(6)),
    "its result": (lambda c, x: (x, c)[1] * jnp.ones(()), lambda c, x: c),
    "devices": (on_devices, lambda c, x: c * x.sum()),
}  # fmt: skip


@functools.cache
def closure(c):
    """Returns a jitted function that closes over an array of NumPy and one of JAX, not traced."""
    factor = c * np.arange(6, dtype=np.float32)
    with jax.ensure_compile_time_eval():
        shift = c * jnp.ones(6)
    return jax.jit(lambda x: x * factor + shift)


def closed_over(c, x):
    return x * c * np.arange(6) + c


def numpy_scan(c, x):
    total, totals = 0.0, []
    for y in x[::-1]:
        totals.append(total)
        total = total * y + c
    return np.array(totals[::-1])


def numpy_while(c, x):
    while x.sum() < 9:
        x = x * (1 + c)
    return x


@pytest.mark.parametrize("name", PROGRAMS)
def test_other_numbers_go_through_one_compiled_program(name):
    program, reference = PROGRAMS[name]
    shared = ProgramCache()
    programs = {c: jax.jit(lambda x, c=c: program(c, x)).trace(X) for c in (0.5, 0.75, 2.0)}
    forms = {shared.expect(traced)[0] for traced in programs.values()}
    assert len(forms) == 1
    for c, traced in programs.items():
        np.testing.assert_allclose(shared(traced, X), reference(c, X.astype(np.float64)), rtol=1e-5)
    (compiled,) = shared._compiled.values()
    assert compiled[1]._cache_size() == 1


def test_the_numbers_of_a_shared_program_are_in_the_order_in_which_it_has_them():
    """Every process then has the same program, and finds it compiled."""
    traced = lambda c: jax.jit(lambda x: ((c * x + c) * (c + 1) - c) / (c + 2)).trace(X)
    shared = ProgramCache()
    (_, numbers), _ = (shared.expect(traced(c)) for c in (0.5, 0.75))
    shared(traced(0.5), X)
    ((places, _),) = shared._compiled.values()
    assert len(places) == 5
    assert places == [place for place in numbers if place in places]


def test_numbers_may_be_batched():
    program, _ = PROGRAMS["scan"]
    jaxprs = {c: jax.make_jaxpr(lambda x, c=c: program(c, x))(X) for c in (0.5, 2.0)}
    (place,) = varying([split_constants(jaxpr)[1] for jaxpr in jaxprs.values()])
    run = lambda c: evaluate(jaxprs[0.5], {place: c}, [X])[0]
    results = jax.vmap(run)(jnp.array([0.5, 2.0, 3.0]))
    for c, result in zip((0.5, 2.0, 3.0), results, strict=True):
        np.testing.assert_allclose(result, numpy_scan(c, X), rtol=1e-5)


def test_arrays_inside_primitives_that_are_not_opened_are_part_of_the_form():
    """A linear solve is such a primitive, and a callback, whose function hides its array."""

    def solve(c):
        matrix = c * np.arange(1, 7, dtype=np.float32)
        return lambda x: jax.scipy.sparse.linalg.cg(jax.jit(lambda v: matrix * v), x)[0]

    shape = jax.ShapeDtypeStruct((), jnp.float32)
    look = lambda table, i: table[i]
    looked_up = lambda c: (
        lambda x: jax.pure_callback(
            functools.partial(look, np.arange(2001, dtype=np.float32) * c), shape, 3
        )
    )
    for make, reference in (
        (solve, lambda c: X / (c * np.arange(1, 7))),
        (looked_up, lambda c: 3 * c),
    ):
        shared = ProgramCache()
        programs = {c: jax.jit(make(c)).trace(X) for c in (0.5, 2.0)}
        assert len({shared.expect(traced)[0] for traced in programs.values()}) == 2
        for c, traced in programs.items():
            np.testing.assert_allclose(shared(traced, X), reference(c), rtol=1e-4)


def test_programs_that_differ_in_more_than_constants_differ_in_form():
    programs = [
        lambda x: 2.0 * x,
        lambda x: 2.0 + x,
        lambda x: 2.0 * x[:5],
        lambda x: 2.0 * x.astype(jnp.bfloat16),
        lambda x: jnp.sin(2.0 * x),
        lambda x: x * x,
        lambda x: x**3,
        lambda x: x**4,
        lambda x: 2.0 * jax.random.uniform(jax.random.key(0), (6,)),
    ]
    forms = [split_constants(jax.make_jaxpr(program)(X))[0] for program in programs]
    assert len({*forms}) == len(forms)


def test_a_form_is_the_same_in_every_process():
    """Sets of names, such as those of a mesh's axes, are in another order in another process."""
    code = """
import jax
from metadyn.sweep_programs import split_constants
mesh = jax.make_mesh((1, 1, 1), ("seeds", "spare", "episodes"))
P = jax.sharding.PartitionSpec
mapped = jax.shard_map(lambda x: 2 * x, mesh=mesh, in_specs=P(), out_specs=P())
program = jax.make_jaxpr(mapped)(1.0)
axes = next(e.params["newly_manual_axes"] for e in program.eqns if "mesh" in e.params)
print([*axes], split_constants(program)[0], sep=":")
"""
    run = lambda seed: subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": seed},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.split(":")
    (axes, form), (other_axes, same_form) = map(run, ("1", "2"))
    assert axes != other_axes
    assert form == same_form


def test_programs_with_different_random_keys_differ_in_form():
    keys = [jax.random.key(0), jax.random.key(1)]
    draws = [lambda k=k: jax.random.uniform(k) for k in keys]
    forms = {split_constants(jax.make_jaxpr(draw)())[0] for draw in draws}
    assert len(forms) == 2


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_shares_with_no_other_computes_the_same(name):
    program, reference = PROGRAMS[name]
    result = ProgramCache()(jax.jit(lambda x: program(0.5, x)).trace(X), X)
    np.testing.assert_allclose(result, reference(0.5, X.astype(np.float64)), rtol=1e-5)


def test_constants_that_were_not_announced_may_follow():
    shared = ProgramCache()
    for c in (2.0, 3.0, 4.0):
        traced = jax.jit(lambda x, c=c: c * x).trace(X)
        np.testing.assert_array_equal(shared(traced, X), np.float32(c) * X)
    assert len(shared._compiled) == 2


def test_a_program_announced_several_times_is_computed_once():
    shared = ProgramCache()
    double = lambda: jax.jit(lambda x: 2.0 * x).trace(X)
    for _ in range(3):
        shared.expect(double(), (X,))
    shared.expect(double(), (X + 1,))
    triple = jax.jit(lambda x: 3.0 * x).trace(X)
    first, second = shared(double(), X), shared(double(), X)
    np.testing.assert_array_equal(shared(triple, X), 3 * X)  # it has the same form
    assert first is second is shared(double(), X)
    assert shared(double(), X) is not first  # no longer kept once all have had it
    np.testing.assert_array_equal(shared(double(), X + 1), 2 * (X + 1))
