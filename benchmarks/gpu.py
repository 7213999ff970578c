"""All that is to be measured on a GPU, in one command of 10 minutes, the most telling first.

    python -m benchmarks.gpu OUT [--dry]

Before it, on a fresh machine with a network:

    python3 -m venv v && v/bin/pip install -e '.[cuda,benchmark,test]' -c constraints.txt

and without one, from wheels brought along in a folder: on a machine of the same Python and system,

    pip download -d wheels setuptools '.[cuda,benchmark,test]' -c constraints.txt
    v/bin/pip install --no-index --find-links wheels -e '.[cuda,benchmark,test]'

About 7 GB, most of it NVIDIA's libraries. OUT/results.json has every figure as soon as it is there,
suite.txt the tests, paper.txt and paper/ linear regression's paper preset for as long as time is
left. A side, or a part, that fails costs itself alone. `--dry` goes through all of it at tiny
sizes, on a CPU too, where nothing that it says counts. What an H100 gave is in README.md
beside this file.
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
    """How much of everything."""

    hidden: tuple[int, ...] = (64, 128, 256)
    """The first is compared in every way."""
    precisions: tuple[str, ...] = ("tensorfloat32", "float32")
    """PyTorch's default for an LSTM on a GPU, and metadyn's."""
    batch: int = 16_384
    steps: int = 20
    product: int = 8192
    """Rows of the matrices that the rate of products is measured with."""
    entries: int = 1 << 27
    """Numbers in each of the 8 arrays that the rate of copies is measured with: 4 GiB in all."""
    repeats: int = 7
    seconds: float = 0.25
    """Of a repeat, at least."""
    patience: float = 60
    """Seconds that a side may take to be prepared."""
    suite: tuple[str, ...] = tuple("test_" + of for of in SUITE.split())
    workers: int = 8
    """Processes that the suite is run by."""
    study: tuple[str, ...] = ("linear_regression", "--preset", "paper")

    def case(self, hidden: int) -> tuple[str, dict[str, int]]:
        """What results and sides call an outer step of so many hidden units."""
        case = {"hidden": hidden, "batch": self.batch, "steps": self.steps}
        return "outer step, " + ", ".join(f"{name} {n}" for name, n in case.items()), case

    def sides(self, sides: Mapping[str, Side]) -> dict[str, Any]:
        """Seconds [repeats] of each side that can run."""
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
    """PyTorch's cuDNN path, one whole outer step captured as a CUDA graph; on a CPU as it is."""
    import torch

    cuda = torch.cuda.is_available()
    place = "cuda" if cuda else "cpu"
    torch.backends.cudnn.allow_tf32 = precision == "tensorfloat32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tensorfloat32"
    network = torch_network(hidden).to(place)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE, fused=True, capturable=cuda)

    def step() -> None:
        W = torch.randn(batch, N, N, device=place) / N**0.5
        x = torch.randn(steps, batch, N, device=place)
        noise = torch.randn(steps, batch, N, device=place)
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
    """A step as a CUDA graph, after three on a stream of their own, as PyTorch asks for."""
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
    """Every part that gives figures, by name, the most telling first."""
    first, *wider = sizes.hidden
    taken: dict[str, np.ndarray] = {}
    for precision in sizes.precisions:
        yield f"outer step, {precision}", outer_step(sizes, first, precision, taken, 2.0)
    yield "shares of the limits", shares(sizes, taken)
    yield "backends", backends(sizes)
    for hidden in wider:
        part = outer_step(sizes, hidden, sizes.precisions[0], {})
        yield f"outer step, hidden {hidden}", part


def outer_step(
    sizes: Sizes, hidden: int, precision: str, ours: dict[str, Any], least: float | None = None
) -> Iterator[Result]:
    """The outer step against PyTorch at the same precision; notes our seconds in `ours`."""
    where, case = sizes.case(hidden)
    case |= {"precision": precision}
    sides = {
        "metadyn": Side("benchmarks.outer_step", "metadyn_side", case),
        RIVAL: Side(__name__, "graph_side", case),
    }
    taken = sizes.sides(sides)
    for name, seconds in taken.items():
        yield result(f"{where}, {precision}: {name}, ms", 1e3 * seconds)
    if "metadyn" in taken:
        ours[precision] = taken["metadyn"]
    if len(taken) == len(sides):
        ratio = taken[RIVAL] / taken["metadyn"]
        yield result(f"{where}, {precision}: × {RIVAL}", ratio, at_least=least)


def shares(sizes: Sizes, ours: Mapping[str, Any]) -> Iterator[Result]:
    """The card's limits, and the share of its products' that outer steps of `ours` seconds take."""
    where, case = sizes.case(sizes.hidden[0])
    of = lambda what, **case: Side("benchmarks.timing", what, case)
    sides = {"copies": of("copies", entries=sizes.entries)}
    sides |= {each: of("products", size=sizes.product, precision=each) for each in sizes.precisions}
    taken = sizes.sides(sides)
    if "copies" in taken:
        yield result("limit: copies, GB/s", 8 * PARTS * sizes.entries / taken.pop("copies") / 1e9)
    for precision, seconds in taken.items():
        rate = 2 * PARTS * sizes.product**3 / seconds
        yield result(f"limit: products, {precision}, TFLOP/s", rate / 1e12)
        if precision in ours:
            share = operations(**case) / ours[precision] / rate.max()
            name = f"{where}, {precision}: metadyn, share of the product rate"
            yield result(name, share, at_least=0.4)


def backends(sizes: Sizes) -> Iterator[Result]:
    """What `auto` chooses from, in float32, and flax at the default of JAX: TF32 on GPUs."""
    from metadyn.kernels.lstm import Backend

    where, case = sizes.case(sizes.hidden[0])
    ours = [each for each in get_args(Backend) if each != "auto"]
    side = lambda name, **more: Side("benchmarks.outer_step", name, case | more)
    sides = {f"{each}, float32": side("metadyn_side", backend=each) for each in ours}
    sides["flax, JAX's default precision"] = side("flax_side")
    for name, seconds in sizes.sides(sides).items():
        yield result(f"{where}: {name}, ms", 1e3 * seconds)


def commands(sizes: Sizes, out: Path) -> dict[str, tuple[float, list[str]]]:
    """What is run beside: name of its output, seconds at most, command."""
    tests = [str(sizes.workers), *(f"tests/{name}.py" for name in sizes.suite)]
    study = [*sizes.study, "--out", str(out / "paper")]
    return {
        "suite.txt": (150, ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", *tests]),
        "paper.txt": (SECONDS, ["-m", "metadyn.cli", "run", *study]),
    }


def programme(out: Path, sizes: Sizes) -> None:
    """Goes through all of it, and prints what it found and how long each part took."""
    start, results = time.monotonic(), []
    out.mkdir(parents=True, exist_ok=True)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # sides share the card
    if "BENCHMARK_DEVICE" not in os.environ:
        os.environ["BENCHMARK_DEVICE"] = ask(Side("metadyn.mesh", "processor"))
    print(f"{os.environ['BENCHMARK_DEVICE']}; {versions()}", flush=True)
    for name, part in measured(sizes):
        try:
            for each in part:
                print(each, flush=True)
                results.append(dataclasses.asdict(each))
                (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        print(f"({name}: {time.monotonic() - start:.0f} s from the start)", flush=True)
    for name, (most, command) in commands(sizes, out).items():
        left = min(most, SECONDS - (time.monotonic() - start))
        print(f"{name}: {_run(out / name, command, left)}", flush=True)


def _run(into: Path, command: list[str], seconds: float) -> int | str:
    """Runs a command of Python for so many seconds at most; returns its exit code, or why none."""
    exact = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "float32"}  # where nothing else is said
    with open(into, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, env=exact
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
