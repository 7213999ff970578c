"""Runs the benchmark for GPUs at tiny sizes on a CPU; what fails there costs only itself."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import gpu, timing
from benchmarks.timing import Side
from metadyn import mesh

ROOT = Path(gpu.__file__).parent.parent


def test_a_dry_run_goes_through_all_of_it(tmp_path):
    """PyTorch's side runs too where PyTorch is installed, which `.ci/run` does after the tests."""
    command = [sys.executable, "-m", "benchmarks.gpu", str(tmp_path), "--dry"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    results = json.loads((tmp_path / "results.json").read_text())
    names = " ".join(result["name"] for result in results)
    parts = ["hidden 4", "hidden 5", "float32: metadyn, ms", "copies", "share of", "backward"]
    parts += ["scan", "flax", *([gpu.RIVAL] if find_spec("torch") else [])]
    for part in parts:
        assert part in names
    failed = {line.partition(":")[0] for line in process.stdout.splitlines() if "Error" in line}
    fused = {"fused, float32", "fused_remat, float32"}
    assert failed == {*fused, *([] if find_spec("torch") else [gpu.RIVAL])}
    assert all(result["value"] > 0 for result in results)
    kind = mesh.processor().partition(" × ")[2]
    assert {result["device"].partition(" × ")[2] for result in results} == {kind}
    assert "suite.txt: 0\npaper.txt: 0\n" in process.stdout
    assert "passed" in (tmp_path / "suite.txt").read_text()
    assert (tmp_path / "paper" / "summary.json").exists()


def test_pytorch_captures_a_step_after_three_on_another_stream(monkeypatch):
    """PyTorch demands this order. A CPU has no graphs, so stand-ins record the calls."""
    cuda = pytest.importorskip("torch").cuda
    events, current = [], ["main"]

    @contextmanager
    def within(name, message):
        current.append(name)
        yield
        events.append(message)
        current.pop()

    def stream(name):
        return SimpleNamespace(
            name=name, wait_stream=lambda other: events.append(f"{name} waits for {other.name}")
        )

    graph = SimpleNamespace(replay=lambda: events.append("replayed"))
    stand_ins = {
        "Stream": lambda: stream("side"),
        "current_stream": lambda: stream(current[-1]),
        "stream": lambda stream: within(stream.name, "left the side"),
        "CUDAGraph": lambda: graph,
        "graph": lambda given: within("graph", f"captured {given is graph}"),
    }
    for name, function in stand_ins.items():
        monkeypatch.setattr(cuda, name, function)
    gpu.captured(lambda: events.append(f"step on {current[-1]}"))()
    steps = ["side waits for main", *["step on side"] * 3, "left the side", "main waits for side"]
    assert events == [*steps, "step on graph", "captured True", "replayed"]


def dying_side(after):
    """Makes a side whose process exits silently after some calls."""
    calls = []

    def run(count):
        calls.append(count)
        if len(calls) > after:
            os._exit(3)

    return run


def silent_side():
    """Makes a side that is never ready."""
    import time

    time.sleep(60)


def whole_side():
    return lambda count: None


def test_a_side_that_dies_or_says_nothing_costs_only_itself(capsys):
    sides = {
        "dies at once": Side(__name__, "dying_side", {"after": 0}),
        "dies later": Side(__name__, "dying_side", {"after": 2}),
        "whole": Side(__name__, "whole_side"),
    }
    timings = timing.alternate(sides, repeats=4, seconds=0)
    assert list(timings) == ["whole"]
    assert len(timings["whole"]) == 4
    with pytest.raises(timing.Unavailable, match=r"did not answer within 0\.5 s"):
        timing.Worker(Side(__name__, "silent_side"), patience=0.5)
    output = capsys.readouterr().out
    assert "dies at once: not measured (it died)" in output
    assert "dies later: not measured (it died)" in output


def test_a_part_that_fails_costs_only_itself(tmp_path, monkeypatch, capsys):
    def broken():
        yield timing.result("before it broke", [1.0])
        raise RuntimeError("no such card")

    parts = [("broken", broken()), ("whole", iter([timing.result("whole", [2.0])]))]
    monkeypatch.setattr(gpu, "measured", lambda sizes: parts)
    commands = {"fails.txt": (9, ["-c", "raise SystemExit(3)"])}
    commands["slow.txt"] = (0.2, ["-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(gpu, "commands", lambda sizes, out: commands)
    monkeypatch.setenv("BENCHMARK_DEVICE", "a card")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "")
    gpu.programme(tmp_path, gpu.DRY)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [result["name"] for result in results] == ["before it broke", "whole"]
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    output = capsys.readouterr().out
    assert "broken: RuntimeError: no such card" in output
    assert "fails.txt: 3\nslow.txt: stopped for time\n" in output


def test_shares_are_of_the_products_that_the_problem_needs(monkeypatch):
    """An outer step that takes twice the time of as many operations has a share of one half."""
    sizes = gpu.Sizes(hidden=(3,), batch=2, steps=5, product=10, precisions=("float32",))
    timings = {"copies": np.array([1.0]), "float32": np.array([4.0])}
    monkeypatch.setattr(gpu.Sizes, "sides", lambda self, sides: dict(timings))
    n, h = 5, 3  # numbers in x and in y; hidden units
    step = 3 * 2 * 5 * 2 * (4 * h * (2 * n + h) + h * n)
    rate = 8 * 2 * 10**3 / 4.0
    *_, share = gpu.shares(sizes, {"float32": np.array([2 * step / rate])})
    assert share.value == pytest.approx(0.5)
