"""Runs all measurements for a GPU in one command of 10 minutes, the most telling first.

    python -m benchmarks.gpu OUT [--dry]

To install the packages on a fresh machine with a network:

    python3 -m venv v && v/bin/pip install -e '.[cuda,benchmark,test]' -c constraints.txt

and without one, from wheels that a machine of the same Python and system has put into a folder:

    pip download -d wheels setuptools '.[cuda,benchmark,test]' -c constraints.txt
    v/bin/pip install --no-index --find-links wheels -e '.[cuda,benchmark,test]'

These are about 7 GB, most of it NVIDIA's libraries. OUT/results.json gets every figure as soon as
it is measured, suite.txt the output of the tests, and paper.txt and paper/ that of linear
regression's paper preset, which runs for the time that is left. A side, or a part, that fails costs
only itself. `--dry` runs everything at tiny sizes, on a CPU too, and none of its figures count.
README.md beside this file has the results of an H100.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np

from benchmarks.outer_step import CLIP, RATE, SIGMA, N, operations, torch_network
from benchmarks.timing import PARTS, Result, Run, Side, alternate, ask, result, versions

SECONDS = 580
RIVAL = "PyTorch, CUDA graph"
SUITE = "fused lstm linear fourier bandit bayes inner gradient outer"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of everything that is measured or run."""

    hidden: tuple[int, ...] = (64, 128, 256)
    """Numbers of hidden units, of which the first is compared in every way."""
    precisions: tuple[str, ...] = ("tensorfloat32", "float32")
    """Precisions of products: PyTorch's default for an LSTM on a GPU, and metadyn's."""
    batch: int = 16_384
    steps: int = 20
    product: int = 8192
    """Number of rows of the matrices that measure the rate of products."""
    entries: int = 1 << 27
    """Number of entries of each of the 8 arrays that measure the rate of copies: 4 GiB in all."""
    repeats: int = 7
    seconds: float = 0.25
    """Least duration of a repeat, in seconds."""
    patience: float = 60
    """Longest time, in seconds, that preparing a side, or one repeat, may take."""
    suite: tuple[str, ...] = tuple("test_" + name for name in SUITE.split())
    workers: int = 8
    """Number of processes that run the suite."""
    study: tuple[str, ...] = ("linear_regression", "--preset", "paper")

    def case(self, hidden: int) -> tuple[str, dict[str, int]]:
        """Returns the label and the arguments of an outer step with this many hidden units."""
        case = {"hidden": hidden, "batch": self.batch, "steps": self.steps}
        return "outer step, " + ", ".join(f"{name} {n}" for name, n in case.items()), case

    def sides(self, sides: Mapping[str, Side]) -> dict[str, Any]:
        """Times the sides that can run, and returns the seconds [repeats] of each."""
        return alternate(sides, self.repeats, self.seconds, self.patience)


DRY = Sizes(
    hidden=(4, 5),
    precisions=("float32",),
    batch=8,
    steps=3,
    product=8,
    entries=8,
    repeats=2,
    seconds=1e-3,
    suite=("test_program_cost",),
    workers=1,
    study=("benchmarks/tiny_study.py", "--outer.steps", "20"),
)


def graph_side(hidden: int, batch: int, steps: int, precision: str) -> Run:
    """Makes a run of PyTorch's cuDNN path, each outer step replayed as a CUDA graph if on a GPU."""
    import torch

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    torch.backends.cudnn.allow_tf32 = precision == "tensorfloat32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tensorfloat32"
    network = torch_network(hidden).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE, fused=True, capturable=cuda)

    def step() -> None:
        W = torch.randn(batch, N, N, device=device) / N**0.5
        x = torch.randn(steps, batch, N, device=device)
        noise = torch.randn(steps, batch, N, device=device)
        optimizer.zero_grad(set_to_none=True)
        network(x, torch.einsum("bij,tbj->tbi", W, x) + SIGMA * noise).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP, foreach=True)
        optimizer.step()

    replay, finish = (captured(step), torch.cuda.synchronize) if cuda else (step, lambda: None)

    def run(count: int) -> None:
        for _ in range(count):
            replay()
        finish()

    return run


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """Captures a step as a CUDA graph, after three on another stream, as PyTorch requires."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def measured(sizes: Sizes) -> Iterator[tuple[str, Iterator[Result]]]:
    """Yields the parts that give figures, each a name and its results, the most telling first."""
    first, *wider = sizes.hidden
    metadyn_seconds: dict[str, np.ndarray] = {}
    for precision in sizes.precisions:
        yield f"outer step, {precision}", outer_step(sizes, first, precision, metadyn_seconds, 2.0)
    yield "shares of the limits", shares(sizes, metadyn_seconds)
    yield "backends", backends(sizes)
    for hidden in wider:
        part = outer_step(sizes, hidden, sizes.precisions[0], {})
        yield f"outer step, hidden {hidden}", part


def outer_step(
    sizes: Sizes, hidden: int, precision: str, ours: dict[str, Any], least: float | None = None
) -> Iterator[Result]:
    """Times the outer step against PyTorch's at one precision, and stores our seconds in `ours`."""
    label, case = sizes.case(hidden)
    case |= {"precision": precision}
    sides = {
        "metadyn": Side("benchmarks.outer_step", "metadyn_side", case),
        RIVAL: Side(__name__, "graph_side", case),
    }
    timings = sizes.sides(sides)
    for name, seconds in timings.items():
        yield result(f"{label}, {precision}: {name}, ms", 1e3 * seconds)
    if "metadyn" in timings:
        ours[precision] = timings["metadyn"]
    if len(timings) == len(sides):
        ratio = timings[RIVAL] / timings["metadyn"]
        yield result(f"{label}, {precision}: × {RIVAL}", ratio, at_least=least)


def shares(sizes: Sizes, ours: Mapping[str, Any]) -> Iterator[Result]:
    """Yields the card's limits, and the shares of its product rate that our outer steps reach."""
    label, case = sizes.case(sizes.hidden[0])
    side = lambda function, **case: Side("benchmarks.timing", function, case)
    sides = {"copies": side("copies", entries=sizes.entries)}
    sides |= {p: side("products", size=sizes.product, precision=p) for p in sizes.precisions}
    timings = sizes.sides(sides)
    if "copies" in timings:
        yield result("limit: copies, GB/s", 8 * PARTS * sizes.entries / timings.pop("copies") / 1e9)
    for precision, seconds in timings.items():
        rate = 2 * PARTS * sizes.product**3 / seconds
        yield result(f"limit: products, {precision}, TFLOP/s", rate / 1e12)
        if precision in ours:
            share = operations(**case) / ours[precision] / rate.max()
            name = f"{label}, {precision}: metadyn, share of the product rate"
            yield result(name, share, at_least=0.4)


def backends(sizes: Sizes) -> Iterator[Result]:
    """Times each backend in float32, and flax at JAX's default precision, TensorFloat32 on GPUs."""
    from metadyn.kernels.lstm import Backend

    label, case = sizes.case(sizes.hidden[0])
    names = [name for name in get_args(Backend) if name != "auto"]
    side = lambda name, **more: Side("benchmarks.outer_step", name, case | more)
    sides = {f"{name}, float32": side("metadyn_side", backend=name) for name in names}
    sides["flax, JAX's default precision"] = side("flax_side")
    for name, seconds in sizes.sides(sides).items():
        yield result(f"{label}: {name}, ms", 1e3 * seconds)


def commands(sizes: Sizes, out: Path) -> dict[str, tuple[float, list[str]]]:
    """Returns the other commands, by output file: most seconds, and arguments of Python."""
    tests = [str(sizes.workers), *(f"tests/{name}.py" for name in sizes.suite)]
    study = [*sizes.study, "--out", str(out / "paper")]
    return {
        "suite.txt": (150, ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", *tests]),
        "paper.txt": (SECONDS, ["-m", "metadyn.cli", "run", *study]),
    }


def programme(out: Path, sizes: Sizes) -> None:
    """Runs all parts and commands, and prints each result and the time after each part."""
    start, results = time.monotonic(), []
    out.mkdir(parents=True, exist_ok=True)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # sides share the card
    if "BENCHMARK_DEVICE" not in os.environ:
        os.environ["BENCHMARK_DEVICE"] = ask(Side("metadyn.mesh", "processor"))
    print(f"{os.environ['BENCHMARK_DEVICE']}; {versions()}", flush=True)
    for name, part in measured(sizes):
        try:
            for measurement in part:
                print(measurement, flush=True)
                results.append(dataclasses.asdict(measurement))
                (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        print(f"({name}: {time.monotonic() - start:.0f} s from the start)", flush=True)
    for name, (limit, command) in commands(sizes, out).items():
        seconds = min(limit, SECONDS - (time.monotonic() - start))
        print(f"{name}: {_run(out / name, command, seconds)}", flush=True)


def _run(output: Path, command: list[str], seconds: float) -> int | str:
    """Runs Python for at most `seconds`. Returns its exit code, or why there is none."""
    environment = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "float32"}  # unless set in code
    with open(output, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, env=environment
        )
        try:
            return process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            process.terminate()  # metadyn stores what it has
            process.wait()
            return "stopped for time"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, to try the command itself")
    arguments = parser.parse_args()
    programme(arguments.out, DRY if arguments.dry else Sizes())
