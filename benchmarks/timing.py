"""Times rival programs in alternation, and measures the machine's own limits.

Each side of a comparison runs in its own worker process and sleeps until the parent tells it to
run its next repeat. Whatever else the machine does therefore affects all sides alike, and the
thread pool of one side is idle while another is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

REPEATS = 9
SECONDS = 0.25  # least duration of one repeat: our choice
GRACE_SECONDS = 600.0  # longest that preparing a side, or one repeat, may take

Run = Callable[[int], Any]
"""`run(count)` does the work `count` times and returns when it is done."""


class Side(NamedTuple):
    """One side of a comparison: in the worker, `function(**case)` of `module` makes a `Run`."""

    module: str
    function: str
    case: Mapping[str, Any] = {}


class Unavailable(Exception):
    """Raised for a side that cannot run here; the message says why."""


class Worker:
    """Runs one side in its own process.

    Raises `Unavailable` if the side cannot be made, or its process dies or does not answer within
    `patience` seconds.
    """

    def __init__(self, side: Side, seconds: float = SECONDS, patience: float = GRACE_SECONDS):
        self._patience, context = patience, multiprocessing.get_context("spawn")
        self._pipe, worker_pipe = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(worker_pipe, side, seconds), daemon=True
        )
        self._process.start()
        worker_pipe.close()
        error = self._receive()
        if error:
            self.close()
            raise Unavailable(error)

    def repeat(self) -> float:
        """Returns the seconds that one unit of work took, as the mean over one repeat."""
        with contextlib.suppress(BrokenPipeError):  # if the worker is dead, `_receive` says so
            self._pipe.send(True)
        return self._receive()

    def _receive(self) -> Any:
        why = f"it did not answer within {self._patience:g} s"
        try:
            if self._pipe.poll(self._patience):
                return self._pipe.recv()
        except (EOFError, ConnectionError):
            why = "it died"
        self._process.kill()
        self.close()
        raise Unavailable(why)

    def close(self) -> None:
        """Ends the worker process."""
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()


def _serve(pipe: Any, side: Side, seconds: float) -> None:
    """Makes a side and chooses the count for repeats of `seconds`, then times repeats on demand."""
    try:
        run = _call(side)
        run(1)
        count, elapsed = 1, _seconds(run, 1) if seconds else 0.0
        while elapsed < seconds:
            count = max(count + 1, min(int(1.2 * count * seconds / elapsed), 10 * count))
            elapsed = _seconds(run, count)
        pipe.send(None)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}".splitlines()[0])
        return
    try:
        while pipe.recv():
            pipe.send(_seconds(run, count) / count)
    except EOFError:  # the parent has closed its end
        pass


def ask(side: Side) -> Any:
    """Calls `function(**case)` of a side in its own process and returns the result."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_call, (side,))


def _call(side: Side) -> Any:
    return getattr(importlib.import_module(side.module), side.function)(**side.case)


def _seconds(run: Run, count: int) -> float:
    start = time.perf_counter()
    run(count)
    return time.perf_counter() - start


def alternate(
    sides: Mapping[str, Side],
    repeats: int = REPEATS,
    seconds: float = SECONDS,
    patience: float = GRACE_SECONDS,
) -> dict[str, np.ndarray]:
    """Times the sides in alternation. Returns the seconds per unit of work [repeats] of each.

    A side that cannot run here, or fails on the way, is left out, and the reason is printed.
    """
    workers: dict[str, Worker] = {}
    timings: dict[str, list[float]] = {}
    try:
        for name, side in sides.items():
            with _left_out(name, timings):
                workers[name] = Worker(side, seconds, patience)
                timings[name] = []
        for _ in range(repeats):
            for name in [*timings]:
                with _left_out(name, timings):
                    timings[name].append(workers[name].repeat())
    finally:
        for worker in workers.values():
            worker.close()
    return {name: np.array(values) for name, values in timings.items()}


@contextlib.contextmanager
def _left_out(name: str, timings: dict[str, list[float]]) -> Iterator[None]:
    """Removes a side from `timings`, and prints why, if the code inside raises `Unavailable`."""
    try:
        yield
    except Unavailable as why:
        print(f"{name}: not measured ({why})", flush=True)
        timings.pop(name, None)


@dataclasses.dataclass(frozen=True)
class Result:
    """A measured value with its 95 % interval, its target if any, and whether it met the target."""

    name: str
    value: float
    low: float
    high: float
    target: str | None
    met: bool | None
    device: str

    def __str__(self) -> str:
        verdict = {True: "met", False: "MISSED", None: ""}[self.met]
        interval = f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"
        return f"{self.name:72} {interval:28} {self.target or '':14} {verdict}".rstrip()


def result(
    name: str, samples: Any, at_least: float | None = None, at_most: float | None = None
) -> Result:
    """Makes a `Result` of samples, one per repeat: their median, bootstrap interval and target."""
    samples = np.atleast_1d(np.asarray(samples, np.float64))
    resampled = np.random.default_rng(0).choice(samples, (2000, len(samples)))
    low, high = np.quantile(np.median(resampled, axis=1), [0.025, 0.975])
    value, target, met = float(np.median(samples)), None, None
    if at_least is not None:
        target, met = f"at least {at_least:g}", value >= at_least
    if at_most is not None:
        target, met = f"at most {at_most:g}", value <= at_most
    return Result(name, value, float(low), float(high), target, met, device())


def device() -> str:
    """Names this machine's processor, or returns the value of BENCHMARK_DEVICE if it is set."""
    label = os.environ.get("BENCHMARK_DEVICE")
    if label:
        return label
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{cores()} cores of {models[0] if models else platform.processor()}"


def cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class Limits(NamedTuple):
    """Measured limits of the machine."""

    products: float
    """Floating-point operations per second in products of 1024 × 1024 float32 matrices."""
    copies: float
    """Bytes per second, read and written, in x ← −x over 128 MiB."""

    def share(self, seconds: np.ndarray, operations: float, moved: float = 0.0) -> np.ndarray:
        """Returns the time that the limits require for the work, as a share of the time it took."""
        return max(operations / self.products, moved / self.copies) / seconds


PARTS, SIZE, ENTRIES = 8, 1024, 1 << 22


@cache
def limits() -> Limits:
    """Measures the limits of this machine, on all of its devices together."""
    timings = alternate({name: Side(__name__, name) for name in ("products", "copies")})
    best = {name: float(seconds.min()) for name, seconds in timings.items()}
    return Limits(2 * PARTS * SIZE**3 / best["products"], 2 * 4 * PARTS * ENTRIES / best["copies"])


def products(size: int = SIZE, precision: str = "float32") -> Run:
    """Makes a run of `PARTS` products of size × size matrices, sharded over the devices."""
    import jax

    product = jax.default_matmul_precision(precision)(lambda a: a @ a / size)
    return _on_all_devices((size, size), product)


def copies(entries: int = ENTRIES) -> Run:
    """Makes a run that negates `PARTS` arrays of `entries` in place, sharded over the devices."""
    return _on_all_devices((entries,), lambda a: -a)


def _on_all_devices(shape: tuple[int, ...], change: Callable[[Any], Any]) -> Run:
    """Makes a run that applies `change` over and over to `PARTS` arrays of a shape."""
    from metadyn import mesh

    mesh.use_every_core()
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    by_part = PartitionSpec(mesh.TASKS)
    repeat = lambda a, n: jax.lax.fori_loop(0, n, lambda _, a: change(a), a)
    program = jax.shard_map(
        lambda a, n: jax.lax.map(lambda part: repeat(part, n), a),
        mesh=mesh.mesh(),
        in_specs=(by_part, PartitionSpec()),
        out_specs=by_part,
    )
    program = jax.jit(program, donate_argnums=0)
    state = [jnp.ones((PARTS, *shape))]

    def run(count: int) -> None:
        state[0] = jax.block_until_ready(program(state[0], count))

    return run


Benchmark = Callable[[bool], Iterator[Result]]
"""`benchmark(full)` yields each result as soon as it is measured."""


def main(benchmarks: Mapping[str, Benchmark], description: str) -> None:
    """Runs the command line of one benchmark, or of several by name."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--full", action="store_true", help="the larger grid of sizes")
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    if len(benchmarks) > 1:
        parser.add_argument("--only", nargs="+", choices=list(benchmarks), metavar="NAME")
    arguments = parser.parse_args()
    chosen = getattr(arguments, "only", None) or list(benchmarks)
    print(f"{device()}; {versions()}", flush=True)
    results = []
    for name in chosen:
        start = time.perf_counter()
        for measured in benchmarks[name](arguments.full):
            print(measured, flush=True)
            results.append(measured)
            if arguments.json:  # after each result, so that a run that stops keeps those before
                rows = [dataclasses.asdict(measured) for measured in results]
                Path(arguments.json).write_text(json.dumps(rows, indent=2) + "\n")
        print(f"({name}: {time.perf_counter() - start:.0f} s)", flush=True)


def versions() -> str:
    """Lists the versions of Python and of the packages that are compared."""
    names = [f"Python {platform.python_version()}"]
    for package in ("jax", "flax", "torch"):
        with contextlib.suppress(PackageNotFoundError):
            names.append(f"{package} {version(package)}")
    return ", ".join(names)
