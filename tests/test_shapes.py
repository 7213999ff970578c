"""The checks of shapes in every other test: of functions in a module and of nested functions."""

from __future__ import annotations

import jax.numpy as jnp
import jaxtyping
import pytest
import shapes
from jaxtyping import Array, Float

as_the_hook_does = jaxtyping.jaxtyped(typechecker=shapes.check)


@as_the_hook_does
def plain(n: int) -> int:
    return n


def test_nested_functions_are_checked_only_if_their_annotations_have_shapes():
    def shaped(a: Float[Array, "n n"]) -> Float[Array, " n"]:
        return a[0]

    def bare(n: int) -> int:
        return n

    checked = as_the_hook_does(shaped)
    assert checked(jnp.ones((2, 2))).shape == (2,)
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(jnp.ones((2, 3)))
    assert as_the_hook_does(bare) is bare
    with pytest.raises(jaxtyping.TypeCheckError):
        plain("one")
