"""Commands run as several processes of one run, over loopback."""

import os
import socket
import subprocess
import time
from typing import NamedTuple


class Done(NamedTuple):
    """What a process left."""

    code: int
    out: str
    err: str


def begin(command, processes=1, devices=1, **options):
    """Starts a command as so many processes of so many virtual CPU devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONUNBUFFERED": "1"}
    environment["JAX_PLATFORMS"] = "cpu"
    started = []
    for index in range(processes):
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment, **pipes, **options))
    return started


def newest(out):
    """The outer step of the newest checkpoint of a run; 0 if there is none."""
    return max((int(p.name) for p in (out / "checkpoints").glob("*[0-9]")), default=0)


def trains(started, out, patience=200):
    """Waits until a run stores a checkpoint that is not there yet: sooner than it says a line."""
    before, end_of_patience = newest(out), time.monotonic() + patience
    while newest(out) <= before:
        if started[0].poll() is not None or time.monotonic() > end_of_patience:
            for process in started:
                process.kill()
            raise AssertionError(started[0].communicate())
        time.sleep(0.02)


def end(started, timeout=200):
    """Waits for processes; whatever happens none is left running."""
    try:
        said = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [Done(p.returncode, *both) for p, both in zip(started, said, strict=True)]


def together(command, processes=1, devices=1):
    """What each process left of a command that must succeed."""
    done = end(begin(command, processes, devices))
    assert all(each.code == 0 for each in done), done
    return done
