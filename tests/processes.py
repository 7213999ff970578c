"""Runs commands as several processes of one run, over the loopback interface."""

import os
import socket
import subprocess
import time
from typing import NamedTuple


class Done(NamedTuple):
    """Exit code and output of a process."""

    code: int
    out: str
    err: str


def begin(command, processes=1, devices=1, **options):
    """Starts a command as `processes` processes, each with `devices` virtual CPU devices."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONUNBUFFERED": "1"}
    environment["JAX_PLATFORMS"] = "cpu"
    running = []
    for index in range(processes):
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, env=environment, **pipes, **options))
    return running


def newest(out):
    """Returns the outer step of a run's newest checkpoint, or 0 if there is none."""
    return max((int(p.name) for p in (out / "checkpoints").glob("*[0-9]")), default=0)


def trains(started, out, patience=200):
    """Waits until a run stores a new checkpoint, which comes sooner than a line of its output."""
    before, deadline = newest(out), time.monotonic() + patience
    while newest(out) <= before:
        if started[0].poll() is not None or time.monotonic() > deadline:
            for process in started:
                process.kill()
            raise AssertionError(started[0].communicate())
        time.sleep(0.02)


def end(started, timeout=200):
    """Waits for processes and returns what they left. Whatever happens, none is left running."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [Done(p.returncode, *output) for p, output in zip(started, outputs, strict=True)]


def together(command, processes=1, devices=1):
    """Runs a command that must succeed, and returns what each process left."""
    done = end(begin(command, processes, devices))
    assert all(process.code == 0 for process in done), done
    return done
