"""What a computation costs: its floating-point operations, counted from its program."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def operations(f: Callable[..., Any], *args: Any) -> int:
    """Counts the floating-point operations of `f(*args)`, of which only shapes need be known.

    Those of products are 2 for each multiplication and addition; every other operation counts 1
    for each number that it makes. Loops count as often as they run; of the branches of a condition
    the costliest counts, and a loop of unknown length once.
    """
    return _count(jax.make_jaxpr(f)(*args).jaxpr)


def _count(jaxpr: Any) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> int:
    inner = [_count(each) for each in _inner(equation.params)]
    name = equation.primitive.name
    if name == "scan":
        return equation.params["length"] * sum(inner)
    if name == "cond":
        return max(inner)
    if inner:
        return sum(inner)
    made = sum(math.prod(getattr(out.aval, "shape", ())) for out in equation.outvars)
    if name != "dot_general":
        return made if name in ARITHMETIC else 0
    contracted = equation.params["dimension_numbers"][0][0]
    shape = equation.invars[0].aval.shape
    return 2 * made * math.prod(shape[axis] for axis in contracted)


def _inner(params: Any) -> Iterator[Any]:
    """The programs that stand in an equation's parameters."""
    for value in params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(each, "eqns"):
                yield each
            elif hasattr(each, "jaxpr") and hasattr(each.jaxpr, "eqns"):
                yield each.jaxpr


ARITHMETIC = {
    *("add", "add_any", "sub", "mul", "div", "neg", "abs", "max", "min", "square", "cumsum"),
    *("exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "sin", "cos", "tan", "erf"),
    *("sqrt", "rsqrt", "pow", "integer_pow", "reduce_sum", "reduce_max", "reduce_min"),
}
"""Operations that count, by JAX's names; those that only move or compare numbers do not."""
