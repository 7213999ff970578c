"""Shape annotations are enforced in every test, and tests use the devices that the command would."""

from jaxtyping import install_import_hook

_hook = install_import_hook("metadyn", "shapes.check")

from metadyn import mesh  # noqa: E402

mesh.use_every_core()
