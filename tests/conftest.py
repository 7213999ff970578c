"""Shape annotations are enforced in every test; tests run on the devices the command would use."""

from jaxtyping import install_import_hook

_hook = install_import_hook("metadyn", "shapes.check")

from metadyn import mesh  # noqa: E402

mesh.use_every_core()
