"""What a computation costs: operations counted from its program, and what its compiler says."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import jaxprs_in_params, subjaxprs


def operations(f: Callable[..., Any], *args: Any) -> int:
    """Counts the floating-point operations of `f(*args)`, of which only shapes need be known.

    Those of products are 2 for each multiplication and addition; those of `ARITHMETIC` count 1 for
    each number that they make, and others, such as solving and sorting, nothing. Loops count as
    often as they run; of the branches of a condition the costliest counts, and a loop of unknown
    length once.
    """
    return round(operations_of(jax.make_jaxpr(f)(*args).jaxpr))


def operations_of(jaxpr: Any, turns: float = 1) -> float:
    """Counts them in a traced program; a loop of unknown length counts for so many turns.

    What is split over devices counts as it is on each of them.
    """
    return sum(_count(equation, turns) for equation in jaxpr.eqns)


def _count(equation: Any, turns: float) -> float:
    inner = [operations_of(each, turns) for each in jaxprs_in_params(equation.params)]
    name = equation.primitive.name
    if name == "scan":
        return equation.params["length"] * sum(inner)
    if name == "while":
        return turns * sum(inner)
    if name == "cond":
        return max(inner)
    if name == "pallas_call":
        return math.prod(equation.params["grid_mapping"].grid) * sum(inner)
    if name == "custom_linear_solve":  # beside the solution it has what derivatives need
        return operations_of(equation.params["jaxprs"].solve.jaxpr, turns)
    if inner:
        return sum(inner)
    made = sum(math.prod(getattr(out.aval, "shape", ())) for out in equation.outvars)
    if name != "dot_general":
        return made if name in ARITHMETIC else 0
    contracted = equation.params["dimension_numbers"][0][0]
    shape = equation.invars[0].aval.shape
    return 2 * made * math.prod(shape[axis] for axis in contracted)


def largest(jaxpr: Any) -> int:
    """Counts the bytes of the greatest array that a traced program makes on its way."""
    made = [out.aval for equation in jaxpr.eqns for out in equation.outvars]
    sizes = [each.size * each.dtype.itemsize for each in made if hasattr(each, "dtype")]
    inner = [largest(each) for each in subjaxprs(jaxpr)]
    return max(sizes + inner, default=0)


ARITHMETIC = {
    *("add", "add_any", "sub", "mul", "div", "neg", "abs", "max", "min", "square", "cumsum"),
    *("exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "sin", "cos", "tan", "erf"),
    *("sqrt", "rsqrt", "pow", "integer_pow", "reduce_sum", "reduce_max", "reduce_min"),
}
"""Operations that count, by JAX's names; those that only move or compare numbers do not."""


class Account(NamedTuple):
    """What a compiled program takes on each device, by its compiler's account."""

    memory: int
    """Bytes (`memory`)."""
    reduced: tuple[int, ...]
    """Bytes of each all-reduce that stands in the program."""
    gathered: tuple[int, ...]
    """Bytes that each device has after each other exchange between them, such as an all-gather."""


def account(compiled: Any) -> Account:
    """Reads a compiled program."""
    text = compiled.as_text()
    return Account(memory(compiled), exchanged(text), exchanged(text, GATHERS))


def memory(compiled: Any) -> int:
    """Counts the bytes of arguments, results that take no argument's place, and what is between.

    0 if its compiler gives no account.
    """
    found = compiled.memory_analysis()
    if found is None:
        return 0
    between = found.argument_size_in_bytes + found.temp_size_in_bytes
    return between + found.output_size_in_bytes - found.alias_size_in_bytes


GATHERS = "all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
"""XLA's exchanges between devices, beside all-reduces."""


def exchanged(program: str, kinds: str = "all-reduce") -> tuple[int, ...]:
    """Counts the bytes of the results of each exchange of some kinds in a compiled program."""
    return tuple(map(array_bytes, re.findall(rf"= (.*?) (?:{kinds})(?:-done)?\(", program)))


def array_bytes(shapes: str) -> int:
    """Counts the bytes of the arrays that XLA's text says, such as "(f32[4,2]{1,0}, s32[])".

    The first number in XLA's name of a type is that of its bits; "pred" has none, and takes a byte.
    """
    arrays = re.findall(r"[a-z]+(\d*)\w*\[([\d,]*)\]", shapes)
    counts = [(int(bits or 8) // 8, dims.split(",")) for bits, dims in arrays]
    return sum(width * math.prod(int(n) for n in dims if n) for width, dims in counts)
