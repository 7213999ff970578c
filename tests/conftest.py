"""Shape annotations are enforced in every test."""

from jaxtyping import install_import_hook

_hook = install_import_hook("metadyn", "shapes.check")
