"""Two processes of one run, over loopback: interruption, loss of one process, continuation."""

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


def command(out, *options):
    return [sys.executable, "-m", "metadyn.cli", "run", STUDY, "--out", str(out), *options]


DELAY = "import os, time; from metadyn import cli, mesh; start = mesh.start; "
DELAY += "wait = lambda: time.sleep(float(os.environ['JAX_PROCESS_ID'])); "
DELAY += "mesh.start = lambda *given: (start(*given), wait()); cli.console()"


@pytest.mark.parametrize("options", [("--domain.sigma", "-1"), ("--preset", "nope")])
def test_every_process_reports_bad_input_however_late_one_is(options, tmp_path):
    """Bad input must not pass for the loss of a process, after which launchers start anew."""
    late = [sys.executable, "-c", DELAY, "run", STUDY, "--out", str(tmp_path / "r"), *options]
    done = end(begin(late, 2))
    assert [process.code for process in done] == [2, 2], done
    assert not (tmp_path / "r").exists()


def test_processes_with_different_numbers_of_devices_are_refused(tmp_path):
    code = "import os; i = int(os.environ['JAX_PROCESS_ID']); "
    code += "os.environ['JAX_NUM_CPU_DEVICES'] = str(1 + i); "
    code += "from metadyn.cli import console; console()"
    done = end(begin([sys.executable, "-c", code, "run", STUDY, "--out", str(tmp_path / "r")], 2))
    assert [process.code for process in done] == [2, 2], done
    assert "devices by process = {0: 1, 1: 2}: must be equally many" in done[0].err
    assert not (tmp_path / "r").exists()


def test_a_port_in_use_is_named(capsys):
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        address = f"localhost:{listener.getsockname()[1]}"
        options = ["--coordinator", address, "--processes", "2", "--process-id", "0"]
        assert main(["devices", *options]) == 2
    assert f"--coordinator {address}: process 0 cannot listen there" in capsys.readouterr().err


def test_a_process_that_waits_for_a_lost_one_can_be_interrupted_in_time(tmp_path):
    waiting, lost = begin(command(tmp_path / "r"), 2)
    lost.kill()
    time.sleep(5)
    waiting.send_signal(signal.SIGTERM)
    began = time.monotonic()
    done = end([waiting, lost])
    assert done[0].code == 130, done
    assert time.monotonic() - began < 12


def lose(out, victim):
    """Kills one of two training processes: the other must leave within a minute and say why."""
    run = begin(command(out, *LONG), 2)
    trains(run, out)
    run[victim].kill()
    began = time.monotonic()
    survivor = end(run)[1 - victim]
    assert time.monotonic() - began < 60
    assert survivor.code != 0
    messages = "another process of this run was lost", "another task died"  # by metadyn or by JAX
    assert any(message in survivor.err for message in messages), survivor.err


def test_a_run_of_two_processes_that_were_interrupted_or_lost_can_go_on(tmp_path, monkeypatch):
    """Only process 0 prints, and the results are those of one undisturbed process."""
    out = tmp_path / "two"

    run = begin(command(out, *LONG), 2)
    trains(run, out)
    run[1].send_signal(signal.SIGTERM)  # only one is told, but both stop at the same step
    began = time.monotonic()
    done = end(run)
    assert time.monotonic() - began < 10
    assert [process.code for process in done] == [130, 130], done
    assert all("run the same command again" in process.err for process in done)
    assert "metadyn" not in done[1].out

    before = newest(out)
    with monkeypatch.context() as patched:  # one process goes on until it stores a checkpoint
        patched.setattr(mesh, "any_process", lambda *flags: [newest(out) > before, False])
        assert main(["run", STUDY, "--out", str(out), *LONG]) == 130
    assert newest(out) > before

    lose(out, victim=1)
    assert not (out / "summary.json").exists()
    done = together(command(out, *LONG), 2)
    assert "passed" in done[0].out
    assert "passed" not in done[1].out
    assert main(["run", STUDY, "--out", str(tmp_path / "one"), *LONG]) == 0
    for task_set in ("tracked", "in_distribution"):
        by_one, by_two = (metadyn.load(run, task_set) for run in (tmp_path / "one", out))
        xr.testing.assert_allclose(by_one, by_two, rtol=1e-3)  # rounding grows in 2 000 steps


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_process_0_may_be_the_lost_one(tmp_path):
    lose(tmp_path / "two", victim=0)
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
    calls = []
    monkeypatch.setattr(
        mesh.jax.distributed, "initialize", lambda *arguments, **options: calls.append(arguments)
    )
    for name in list(mesh.os.environ):
        if name.startswith(("SLURM_", "OMPI_", "TPU_")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    mesh.start()
    assert bool(calls) == joins


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "2"], "--coordinator is missing: give all of --coordinator"),
        (["--coordinator", "localhost:1"], "--processes is missing"),
        (
            ["--coordinator", "x:1", "--processes", "2", "--process-id", "7"],
            "--process-id 7: must be",
        ),
        *(
            (
                ["--coordinator", address, "--processes", "2", "--process-id", "0"],
                f"--coordinator {address}: must be HOST:PORT, with a port from 1 to 65535",
            )
            for address in ("x", ":1", "x:", "x:abc", "x:0", "x:99999")
        ),
        (["--processes", "two"], "invalid int value"),
    ],
)
def test_bad_process_options_are_one_line(options, message, refused):
    refused([STUDY, *options], message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--outer.batch", "6"], "--outer.batch 6: must be a multiple of 4"),
        (["--meta", "maml", "--maml.outer-batch", "6"], "--maml.outer-batch 6: must be a multiple"),
    ],
)
def test_a_batch_that_accelerators_cannot_share_is_refused_before_dir_exists(
    options, message, refused, monkeypatch
):
    monkeypatch.setattr(mesh, "devices", lambda: [None] * 4)
    monkeypatch.setattr(mesh, "backend", lambda: "gpu")
    refused([STUDY, *options], message)


def test_a_bad_process_variable_is_named(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "many")
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES = 'many'"):
        mesh.start()
