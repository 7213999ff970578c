"""Shape annotations are enforced in every test; tests run on the devices the command would use.

What is compiled is kept for later tests, and for the processes that tests start. Most of a test's
time is compiling: here LLVM does not optimise as it does for users, which takes a third of it away,
and XLA's older emitters are used where there still are any, which takes a third of the rest.
"""

import gc
import os
from importlib.metadata import version
from pathlib import Path

_compiled = Path(__file__).parent.parent / ".pytest_cache" / "jax"
_compiled.mkdir(parents=True, exist_ok=True)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_compiled))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
_quickly = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # later ones do not know it, and abort
    _quickly += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{_quickly} {os.environ.get('XLA_FLAGS', '')}".strip()  # the last wins

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402
from matplotlib.layout_engine import ConstrainedLayoutEngine  # noqa: E402

_hook = install_import_hook("metadyn", "shapes.check")

from metadyn import mesh  # noqa: E402
from metadyn.cli import main  # noqa: E402

mesh.use_every_core()
ConstrainedLayoutEngine.execute = lambda engine, figure: None  # half of the time of a picture
gc.freeze()  # what is imported stays: no collection need look at it
gc.set_threshold(50_000, 20, 100)


@pytest.fixture(autouse=True, scope="module")
def forget():
    """Drops the programs of a module's tests where a process comes to hold many.

    Each takes several maps of memory, and Linux gives a process 65 530; beyond, LLVM crashes.
    """
    yield
    if Path("/proc/self/maps").read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def on_cpu(monkeypatch):
    """Makes the choices that are made on a CPU, on a GPU too."""
    monkeypatch.setattr(mesh, "backend", lambda: "cpu")


@pytest.fixture
def refused(tmp_path, capsys):
    """`refused(arguments, says)`: `metadyn run` leaves with one line, exit code 2 and no folder.

    Returns the line.
    """

    def check(arguments, says):
        out = tmp_path / "out"
        assert main(["run", *arguments, "--out", str(out)]) == 2
        errors = capsys.readouterr().err
        assert len(errors.splitlines()) == 1, errors
        assert says in errors
        assert not out.exists()
        return errors

    return check
