"""Compiled programs are kept in the user's own cache folder, by JAX's persistent cache."""

import os
import stat
import subprocess
import sys

import pytest

PROGRAM = """
import sys
import jax
from metadyn import mesh
if sys.argv[2:]:
    mesh._cpu = lambda: {"model name": sys.argv[2]}
mesh.use_compilation_cache(sys.argv[1] == "keep")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(jax.jit(lambda x: jax.numpy.sin(x) @ x)(jax.numpy.ones((4, 4)))[0, 0])
"""


@pytest.fixture
def started(tmp_path):
    """`started("keep")` starts a process that compiles a program and prints its result."""
    unset = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "XLA_FLAGS")
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    return lambda *arguments: subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=inherited | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def entries(tmp_path):
    """`entries()` returns the files of kept programs, each with its time of writing."""
    kept = lambda: (path for path in tmp_path.glob("metadyn/*/*") if "-cache" in path.name)
    return lambda: {path: path.stat().st_mtime_ns for path in kept()}


def test_a_program_is_compiled_once_for_all_processes_of_one_user(started, entries):
    answers = [p.communicate()[0] for p in [started("keep"), started("keep")]]  # both run at once
    written = entries()
    (folder,) = {path.parent for path in written}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    answers.append(started("keep").communicate()[0])
    assert entries() == written
    for path in written:
        path.write_bytes(path.read_bytes()[:100])  # as left by a process that was killed
    answers.append(started("keep").communicate()[0])
    assert len({*answers}) == 1
    assert answers[0].strip()


def test_processors_of_another_kind_have_a_folder_of_their_own(started, entries):
    for kind in ("one", "other"):
        started("keep", kind).communicate()
    assert len({path.parent for path in entries()}) == 2


def test_nothing_is_kept_if_unwanted_or_if_others_could_read_it(started, entries):
    started("none").communicate()
    assert not entries()
    started("keep").communicate()
    written = entries()
    for path in written:
        path.parent.chmod(0o755)
        path.unlink()
    assert written
    started("keep").communicate()
    assert not entries()
