"""Enforces shape annotations in every test, and runs tests on the devices that commands would use.

Compiled programs are cached for later tests and for the processes that tests start. Most of a
test's time is compiling. Here LLVM does not optimise as it does for users, which saves a third of
it, and XLA's older emitters are used where they still exist, which saves a third of the rest.
"""

import gc
import os
from importlib.metadata import version
from pathlib import Path

_cache = Path(__file__).parent.parent / ".pytest_cache" / "jax"
_cache.mkdir(parents=True, exist_ok=True)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
_flags = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # later versions abort at this flag
    _flags += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{_flags} {os.environ.get('XLA_FLAGS', '')}".strip()  # the last one wins

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402
from matplotlib.layout_engine import ConstrainedLayoutEngine  # noqa: E402

_hook = install_import_hook("metadyn", "shapes.check")

from metadyn import mesh  # noqa: E402
from metadyn.cli import main  # noqa: E402

mesh.use_every_core()
ConstrainedLayoutEngine.execute = lambda engine, figure: None  # takes half of a figure's time
gc.freeze()  # imports stay: collections need not look at them
gc.set_threshold(50_000, 20, 100)


@pytest.fixture(autouse=True, scope="module")
def forget():
    """Clears JAX's caches after a module's tests if the process holds many programs.

    Each takes several memory maps, and Linux gives a process 65 530. Beyond that, LLVM crashes.
    """
    yield
    if Path("/proc/self/maps").read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def on_cpu(monkeypatch):
    """Makes programs choose as on a CPU, on a GPU too."""
    monkeypatch.setattr(mesh, "backend", lambda: "cpu")


@pytest.fixture
def refused(tmp_path, capsys):
    """Returns `refused(arguments, says)`, which checks that `metadyn run` refuses bad input.

    It must leave with one line that contains `says`, exit code 2 and no folder. Returns the line.
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
