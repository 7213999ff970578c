"""Launches and bytes read off compiled programs, against XLA's own count and counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hlo

PROGRAM = """HloModule jit_f

%f (p0: f32[4,2], p1: s32[]) -> f32[1,2] {
  %p0 = f32[4,2]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %row = f32[1,2]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,2}
}

%g (p0: f32[1,2], p1: f32[8], p2: s32[]) -> f32[4,2] {
  %p0.1 = f32[1,2]{1,0} parameter(0)
  %p1.1 = f32[8]{0} parameter(1)
  %whole = f32[4,2]{1,0} bitcast(%p1.1)
  %p2.1 = s32[] parameter(2)
  %twice = f32[1,2]{1,0} add(%p0.1, %p0.1)
  ROOT %put = f32[4,2]{1,0} dynamic-update-slice(%whole, %twice, %p2.1, %p2.1)
}

%inner (p: (s32[], f32[4,2], f32[8])) -> (s32[], f32[4,2], f32[4,2]) {
  %p = (s32[], f32[4,2]{1,0}, f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,2]{1,0} get-tuple-element(%p), index=1
  %z = f32[8]{0} get-tuple-element(%p), index=2
  %next = s32[] add(%i, %i)
  %copy-start = (f32[4,2]{1,0}, f32[4,2]{1,0}, u32[]) copy-start(%x)
  %copy-done = f32[4,2]{1,0} copy-done(%copy-start)
  %y = f32[1,2]{1,0} fusion(%copy-done, %i), kind=kLoop, calls=%f
  %w = f32[4,2]{1,0} fusion(%y, %z, %i), kind=kLoop, calls=%g
  ROOT %t = (s32[], f32[4,2]{1,0}, f32[4,2]{1,0}) tuple(%next, %x, %w)
}

%outer (q: (s32[], f32[4,2], f32[8])) -> (s32[], f32[4,2], f32[8]) {
  %q = (s32[], f32[4,2]{1,0}, f32[8]{0}) parameter(0)
  %v = (s32[], f32[4,2]{1,0}, f32[8]{0}) while(%q), condition=%c, body=%inner, \
backend_config={"known_trip_count":{"n":"5"}}
  %k = f32[8]{0} get-tuple-element(%v), index=2
  ROOT %e = f32[8]{0} exponential(%k)
}

%none (q.2: (s32[], f32[4,2], f32[8])) -> f32[8] {
  %q.2 = (s32[], f32[4,2]{1,0}, f32[8]{0}) parameter(0)
  ROOT %k.2 = f32[8]{0} get-tuple-element(%q.2), index=2
}

ENTRY %main (a: (s32[], f32[4,2], f32[8])) -> f32[8] {
  %a = (s32[], f32[4,2]{1,0}, f32[8]{0}) parameter(0)
  %j = s32[] get-tuple-element(%a), index=0
  %b = f32[8]{0} conditional(%j, %a, %a), branch_computations={%outer, %none}
  ROOT %u = (s32[], f32[4,2]{1,0}, f32[8]{0}) while(%a), condition=%d, body=%outer
}
"""
INNER = 3 * 4 + 2 * 32 + (8 + 4 + 8) + (8 + 4 + 8)
"""Bytes of an iteration of the inner loop: a counter, a copy, a row read and a row written."""


def test_operations_of_innermost_loops_are_counted():
    assert hlo.launches(PROGRAM) == (3,)  # the start of a copy, and two fusions


@pytest.mark.parametrize("turns", [1, 7])
def test_bytes_are_those_of_slices_in_loops_as_often_as_they_turn(turns):
    outer = 5 * INNER + 2 * 32
    assert hlo.moved(PROGRAM, turns) == (1 + turns) * outer


def test_the_scratch_of_a_product_is_neither_read_nor_written():
    text = """ENTRY %main (a: c64[8,4], b: c64[4,2]) -> c64[8,2] {
  %a = c64[8,4]{1,0} parameter(0)
  %b = c64[4,2]{1,0} parameter(1)
  %made = (c64[8,2]{1,0}, s8[33554432]{0}) custom-call(%a, %b), custom_call_target="__cublas"
  ROOT %c = c64[8,2]{1,0} get-tuple-element(%made), index=0
}
"""
    assert hlo.moved(text) == 8 * (32 + 8 + 16)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: jnp.tanh(x @ y) + 1,
        lambda x, y: (x**2).sum(0) + y[0],
        lambda x, y: x.T.copy() @ y[:3].T,
        lambda x, y: jnp.where(x > y, x, y).sum(1),
    ],
)
def test_bytes_of_a_program_without_loops_are_as_xla_counts_them(function):
    x = jnp.ones((48, 48))
    compiled = jax.jit(function).lower(x, x).compile()
    assert hlo.moved(compiled.as_text()) == compiled.cost_analysis()["bytes accessed"]


def test_bytes_of_a_scan_are_those_of_its_step_as_often_as_it_turns():
    w, few, many = jnp.ones((48, 48)), jnp.ones((10, 48)), jnp.ones((1000, 48))
    scan = lambda xs: jax.lax.scan(lambda c, x: (jnp.tanh(c @ w + x), c), jnp.zeros(48), xs)
    ten, thousand = (hlo.moved(jax.jit(scan).lower(xs).compile().as_text()) for xs in (few, many))
    step = (thousand - ten) / 990
    # A step reads the weights, again if XLA copies them, and one row of the stacked inputs, which
    # are 20 times as large.
    assert w.nbytes < step < 3 * w.nbytes
