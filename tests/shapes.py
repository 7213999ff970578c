"""Checks jaxtyping's shape annotations at run time; an int passes for a float (PEP 484).

A function inside another is defined anew at each call, and so is its check, which takes far longer
than the function itself. Such a function is checked only if its annotations have a shape.
"""

from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_original_jaxtyped = jaxtyping.jaxtyped


def _jaxtyped_with_shapes(*arguments: Any, **options: Any) -> Any:
    """Decorates like `jaxtyping.jaxtyped`, but leaves out nested functions without shapes."""
    if arguments:
        return _original_jaxtyped(*arguments, **options)
    add_check = _original_jaxtyped(**options)

    def decorate(f: Any) -> Any:
        # Annotations are strings, in which a shape is between single quotes.
        annotations = getattr(f, "__annotations__", {}).values()
        is_nested = "<locals>" in getattr(f, "__qualname__", "")
        return f if is_nested and not any("'" in str(a) for a in annotations) else add_check(f)

    return decorate


jaxtyping.jaxtyped = _jaxtyped_with_shapes  # what the import hook writes above each function
