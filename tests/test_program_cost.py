"""Operations counted from programs, against their formulae."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from metadyn import mesh
from metadyn.program_cost import (
    GATHERS,
    exchanged,
    memory,
    operations,
)


def counted(f, *args):
    return operations(jax.make_jaxpr(f)(*args).jaxpr)


def test_products_count_two_for_each_multiplication_and_addition():
    a, b = jax.ShapeDtypeStruct((3, 5), jnp.float32), jax.ShapeDtypeStruct((5, 7), jnp.float32)
    assert counted(jnp.matmul, a, b) == 2 * 3 * 5 * 7
    batched = jax.vmap(jnp.matmul)
    stacks = [jax.ShapeDtypeStruct((11, *matrix.shape), jnp.float32) for matrix in (a, b)]
    assert counted(batched, *stacks) == 11 * 2 * 3 * 5 * 7


@pytest.mark.parametrize("length", [1, 20])
def test_the_body_of_a_loop_counts_as_often_as_it_runs(length):
    def f(W, h):
        return jax.lax.scan(lambda h, _: (jnp.tanh(W @ h), None), h, length=length)[0]

    W, h = jnp.ones((4, 4)), jnp.ones(4)
    assert counted(f, W, h) == length * (2 * 4 * 4 + 4)
    assert counted(jax.jit(f), W, h) == counted(f, W, h)


def test_only_the_costliest_branch_counts_and_moving_numbers_is_free():
    branches = lambda x: jax.lax.cond(x[0] > 0, lambda x: x * 2 + 1, lambda x: x, x)
    x = jnp.ones(6)
    assert counted(branches, x) == 12
    assert counted(lambda x: x.reshape(2, 3).T, x) == 0


def test_only_the_solution_of_a_linear_system_counts():
    def f(a, b):
        solve = lambda _, right: right / a
        return jax.lax.custom_linear_solve(lambda x: a * x + 0 * x, b, solve, solve)

    assert counted(f, jnp.ones(6), jnp.ones(6)) == 6


def test_loops_of_unknown_length_count_for_the_given_number_of_turns():
    f = lambda n, x: jax.lax.fori_loop(0, n, lambda _, x: x * 2 + 1, x)
    jaxpr = jax.make_jaxpr(f)(jnp.int32(3), jnp.ones(6)).jaxpr
    one_turn = operations(jaxpr)
    assert operations(jaxpr, turns=5) == 5 * one_turn
    assert 12 <= one_turn <= 14  # with the counter and its comparison


def test_memory_and_exchanges_are_of_one_device():
    """A split array counts for the device's part of it, and a reduced one in full."""
    count = jax.device_count()
    x = jax.ShapeDtypeStruct((64 * count, 32), jnp.float32)
    parts = PartitionSpec(mesh.TASKS)
    add = lambda x: jax.lax.psum(jnp.sin(x).sum(0), mesh.TASKS)
    total = jax.shard_map(add, mesh=mesh.mesh(), in_specs=parts, out_specs=PartitionSpec())
    compiled = jax.jit(total).trace(x).lower().compile()
    if count > 1:
        assert exchanged(compiled.as_text()) == (32 * 4,)
    assert 64 * 32 * 4 + 32 * 4 <= memory(compiled) < 2 * 64 * 32 * 4 + 4096
    split, everywhere = (NamedSharding(mesh.mesh(), spec) for spec in (parts, PartitionSpec()))
    gather = jax.jit(jnp.sin, in_shardings=split, out_shardings=everywhere)
    text = gather.trace(x).lower().compile().as_text()
    assert sum(exchanged(text, GATHERS)) == (64 * count * 32 * 4 if count > 1 else 0)


PROGRAM = """HloModule jit_f

ENTRY %main (a: (s32[], f32[4,2])) -> (s32[], f32[4,2]) {
  %a = (s32[], f32[4,2]{1,0}) parameter(0)
  %r = f32[10]{0} all-reduce(%a), to_apply=%sum
  %s = (bf16[3,2]{1,0}, f32[]) all-reduce-start(%a), to_apply=%sum
  %d = (bf16[3,2]{1,0}, f32[]) all-reduce-done(%s)
  %g = ((f32[1,5]{1,0}, s32[1]), (f32[4,5]{1,0}, s32[4])) all-gather-start(%a), dimensions={0}
  %h = (f32[4,5]{1,0}, s32[4]) all-gather-done(%g)
  ROOT %v = (s32[], f32[4,2]{1,0}) tuple(%a)
}
"""


def test_without_an_account_of_memory_by_the_compiler_memory_is_0():
    assert memory(SimpleNamespace(memory_analysis=lambda: None)) == 0


def test_exchanged_bytes_are_read_off_the_text_of_programs():
    assert exchanged(PROGRAM) == (40, 2 * 6 + 4)
    assert exchanged(PROGRAM, GATHERS) == (4 * 4 * 6,)
