"""Two processes of one run, over loopback: interrupted, bereft of one, gone on with elsewhere."""

import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import xarray as xr
from processes import begin, end, newest, together, trains

import metadyn
from metadyn import mesh
from metadyn.cli import main
from metadyn.errors import ConfigError

STUDY = str(Path(__file__).parent.parent / "benchmarks" / "tiny_study.py")
LONG = ("--outer.steps", "2000", "--outer.schedule", "constant", "--outer.learning-rate", "0.001")
LONG += ("--outer.checkpoints", "12")


def command(out, *more):
    return [sys.executable, "-m", "metadyn.cli", "run", STUDY, "--out", str(out), *more]


LATER = "import os, time; from metadyn import cli, mesh; start = mesh.start; "
LATER += "wait = lambda: time.sleep(float(os.environ['JAX_PROCESS_ID'])); "
LATER += "mesh.start = lambda *given: (start(*given), wait()); cli.console()"


@pytest.mark.parametrize("options", [("--domain.sigma", "-1"), ("--preset", "nope")])
def test_bad_input_is_said_by_all_however_late_one_is(options, tmp_path):
    """And is not taken for the loss of a process, after which launchers start them again."""
    late = [sys.executable, "-c", LATER, "run", STUDY, "--out", str(tmp_path / "r"), *options]
    done = end(begin(late, 2))
    assert [each.code for each in done] == [2, 2], done
    assert not (tmp_path / "r").exists()


def test_processes_of_unlike_devices_are_refused(tmp_path):
    unlike = "import os; i = int(os.environ['JAX_PROCESS_ID']); "
    unlike += "os.environ['JAX_NUM_CPU_DEVICES'] = str(1 + i); "
    unlike += "from metadyn.cli import console; console()"
    done = end(begin([sys.executable, "-c", unlike, "run", STUDY, "--out", str(tmp_path / "r")], 2))
    assert [each.code for each in done] == [2, 2], done
    assert "devices by process = {0: 1, 1: 2}: must be equally many" in done[0].err
    assert not (tmp_path / "r").exists()


def test_a_port_that_is_taken_is_said(capsys):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        where = f"localhost:{taken.getsockname()[1]}"
        several = ["--coordinator", where, "--processes", "2", "--process-id", "0"]
        assert main(["devices", *several]) == 2
    assert f"--coordinator {where}: process 0 cannot listen there" in capsys.readouterr().err


def test_a_process_that_waits_for_others_is_interrupted_in_time(tmp_path):
    alone, other = begin(command(tmp_path / "r"), 2)
    other.kill()
    time.sleep(5)
    alone.send_signal(signal.SIGTERM)
    began = time.monotonic()
    done = end([alone, other])
    assert done[0].code == 130, done
    assert time.monotonic() - began < 12


def loses(out, victim):
    """Of two processes that train one is killed: the other leaves within a minute, and says why."""
    run = begin(command(out, *LONG), 2)
    trains(run, out)
    run[victim].kill()
    began = time.monotonic()
    left = end(run)[1 - victim]
    assert time.monotonic() - began < 60
    assert left.code != 0
    said = "another process of this run was lost", "another task died"  # ours, or JAX's own
    assert any(each in left.err for each in said), left.err


def test_two_processes_are_interrupted_lose_one_and_are_gone_on_with_by_one(tmp_path, monkeypatch):
    """Only process 0 prints, and the end is that of one process undisturbed."""
    out = tmp_path / "two"

    run = begin(command(out, *LONG), 2)
    trains(run, out)
    run[1].send_signal(signal.SIGTERM)  # one alone is told: both stop at the same step
    began = time.monotonic()
    done = end(run)
    assert time.monotonic() - began < 10
    assert [each.code for each in done] == [130, 130], done
    assert all("run the same command again" in each.err for each in done)
    assert "metadyn" not in done[1].out

    before = newest(out)
    with monkeypatch.context() as patched:  # one process goes on until it stores a checkpoint
        patched.setattr(mesh, "any_process", lambda *flags: [newest(out) > before, False])
        assert main(["run", STUDY, "--out", str(out), *LONG]) == 130
    assert newest(out) > before

    loses(out, victim=1)
    assert not (out / "summary.json").exists()
    done = together(command(out, *LONG), 2)
    assert "passed" in done[0].out
    assert "passed" not in done[1].out
    assert main(["run", STUDY, "--out", str(tmp_path / "one"), *LONG]) == 0
    for task_set in ("tracked", "in_distribution"):
        one, two = (metadyn.load(run, task_set) for run in (tmp_path / "one", out))
        xr.testing.assert_allclose(one, two, rtol=1e-3)  # 2 000 outer steps


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_process_0_is_lost_too(tmp_path):
    loses(tmp_path / "two", victim=0)
    together(command(tmp_path / "two", *LONG), 2)


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"TPU_ML_PLATFORM": "JAX"}, True),
        ({"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"}, False),
        (
            {
                "TPU_ML_PLATFORM": "JAX",
                "TPU_SKIP_MDS_QUERY": "true",
                "TPU_WORKER_HOSTNAMES": "a,b",
            },
            True,
        ),
    ],
)
def test_launchers_are_recognised(environment, joins, monkeypatch):
    asked = []
    monkeypatch.setattr(
        mesh.jax.distributed, "initialize", lambda *given, **told: asked.append(given)
    )
    for name in list(mesh.os.environ):
        if name.startswith(("SLURM_", "OMPI_", "TPU_")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    mesh.start()
    assert bool(asked) == joins


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--processes", "2"], "--coordinator is missing: give all of --coordinator"),
        (["--coordinator", "localhost:1"], "--processes is missing"),
        (
            ["--coordinator", "x:1", "--processes", "2", "--process-id", "7"],
            "--process-id 7: must be",
        ),
        *(
            (
                ["--coordinator", at, "--processes", "2", "--process-id", "0"],
                f"--coordinator {at}: must be HOST:PORT, with a port from 1 to 65535",
            )
            for at in ("x", ":1", "x:", "x:abc", "x:0", "x:99999")
        ),
        (["--processes", "two"], "invalid int value"),
    ],
)
def test_bad_process_options_are_one_line(options, says, refused):
    refused([STUDY, *options], says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--outer.batch", "6"], "--outer.batch 6: must be a multiple of 4"),
        (["--meta", "maml", "--maml.outer-batch", "6"], "--maml.outer-batch 6: must be a multiple"),
    ],
)
def test_accelerators_that_cannot_share_the_batch_are_refused_before_dir_exists(
    options, says, refused, monkeypatch
):
    monkeypatch.setattr(mesh, "devices", lambda: [None] * 4)
    monkeypatch.setattr(mesh, "backend", lambda: "gpu")
    refused([STUDY, *options], says)


def test_a_bad_process_variable_is_named(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "many")
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES = 'many'"):
        mesh.start()
