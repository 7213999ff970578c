"""Costs of a computation: operations of its traced program; memory and exchanges once compiled."""

from __future__ import annotations

import math
import re
from typing import Any

from jax.extend.core import jaxprs_in_params, subjaxprs


def operations(jaxpr: Any, turns: float = 1) -> float:
    """Counts the floating-point operations of a traced program.

    A product counts 2 for each multiplication and its addition, an operation of `ARITHMETIC` 1 for
    each number in its result, and any other, such as solving and sorting, 0. A loop counts as often
    as it runs, or `turns` times if its length is unknown. Of a condition's branches the costliest
    counts. Work that is split over devices counts as it is on each of them.
    """
    return sum(_count(equation, turns) for equation in jaxpr.eqns)


def _count(equation: Any, turns: float) -> float:
    """Counts the floating-point operations of one equation of a traced program."""
    inner = [operations(jaxpr, turns) for jaxpr in jaxprs_in_params(equation.params)]
    name = equation.primitive.name
    if name == "scan":
        return equation.params["length"] * sum(inner)
    if name == "while":
        return turns * sum(inner)
    if name == "cond":
        return max(inner)
    if name == "pallas_call":
        return math.prod(equation.params["grid_mapping"].grid) * sum(inner)
    if name == "custom_linear_solve":  # its other programs are for derivatives alone
        return operations(equation.params["jaxprs"].solve.jaxpr, turns)
    if inner:
        return sum(inner)
    size = sum(math.prod(getattr(out.aval, "shape", ())) for out in equation.outvars)
    if name != "dot_general":
        return size if name in ARITHMETIC else 0
    contracted = equation.params["dimension_numbers"][0][0]
    shape = equation.invars[0].aval.shape
    return 2 * size * math.prod(shape[axis] for axis in contracted)


def largest(jaxpr: Any) -> int:
    """Returns the bytes of the largest array that a traced program makes, intermediate ones too."""
    arrays = [out.aval for equation in jaxpr.eqns for out in equation.outvars]
    sizes = [array.size * array.dtype.itemsize for array in arrays if hasattr(array, "dtype")]
    inner = [largest(program) for program in subjaxprs(jaxpr)]
    return max(sizes + inner, default=0)


ARITHMETIC = {
    *("add", "add_any", "sub", "mul", "div", "neg", "abs", "max", "min", "square", "cumsum"),
    *("exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "sin", "cos", "tan", "erf"),
    *("sqrt", "rsqrt", "pow", "integer_pow", "reduce_sum", "reduce_max", "reduce_min"),
}
"""JAX's names of the operations that count; those that only move or compare numbers do not."""


def memory(compiled: Any) -> int:
    """Returns the bytes of a compiled program's arguments, temporaries and results.

    Results that reuse an argument's buffer do not count. 0 if the compiler reports no memory.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return 0
    live = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    return live + analysis.output_size_in_bytes - analysis.alias_size_in_bytes


GATHERS = "all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
"""XLA's exchanges between devices other than all-reduces."""


def exchanged(program: str, kinds: str = "all-reduce") -> tuple[int, ...]:
    """Returns the bytes of the results of each exchange of some kinds in a compiled program.

    They are those that one device holds. An exchange in a loop counts once.
    """
    return tuple(map(array_bytes, re.findall(rf"= (.*?) (?:{kinds})(?:-done)?\(", program)))


def array_bytes(shapes: str) -> int:
    """Counts the bytes of arrays from their shapes in XLA's text, such as "(f32[4,2]{1,0}, s32[])".

    The first number in XLA's name of a type is its bits; "pred" has none, and takes a byte.
    """
    arrays = re.findall(r"[a-z]+(\d*)\w*\[([\d,]*)\]", shapes)
    counts = [(int(bits or 8) // 8, dims.split(",")) for bits, dims in arrays]
    return sum(width * math.prod(int(n) for n in dims if n) for width, dims in counts)
