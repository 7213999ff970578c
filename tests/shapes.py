"""The run-time check of jaxtyping's shape annotations; an int passes for a float (PEP 484).

A function inside another is defined anew at each call, and its check with it, which takes far
longer than the function itself. Such a function is checked only if a shape is written on it.
"""

from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_jaxtyped = jaxtyping.jaxtyped


def _unless_inside(*given: Any, **named: Any) -> Any:
    if given:
        return _jaxtyped(*given, **named)
    checked = _jaxtyped(**named)

    def decorate(f: Any) -> Any:
        written = getattr(
            f, "__annotations__", {}
        ).values()  # as strings, whose own are in single quotes
        inside = "<locals>" in getattr(f, "__qualname__", "")
        return f if inside and not any("'" in str(each) for each in written) else checked(f)

    return decorate


jaxtyping.jaxtyped = _unless_inside  # what the import hook writes above each function
