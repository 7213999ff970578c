"""Timing of rival programs in alternation, and the machine's own limits.

Each side of a comparison lives in a worker process of its own and sleeps until the parent tells it
to run its next repeat. So the sides alternate through whatever else the machine does, and the
thread pool of one is idle while another is timed.
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
SECONDS = 0.25  # of one repeat, at least: our choice
GRACE_SECONDS = 600.0  # seconds that a side may take to be prepared, or to repeat

Run = Callable[[int], Any]
"""`run(count)` does the work `count` times and returns when it is done."""


class Side(NamedTuple):
    """One side of a comparison: `function(**case)` of a module makes a `Run`, in the worker."""

    module: str
    function: str
    case: Mapping[str, Any] = {}


class Unavailable(Exception):
    """A side that cannot run here, and why."""


class Worker:
    """A side in a process of its own.

    Raises `Unavailable` if it cannot be made, dies, or does not answer within `patience` seconds.
    """

    def __init__(self, side: Side, seconds: float = SECONDS, patience: float = GRACE_SECONDS):
        self._patience, context = patience, multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, side, seconds), daemon=True)
        self._process.start()
        theirs.close()
        complaint = self._answer()
        if complaint:
            self.close()
            raise Unavailable(complaint)

    def repeat(self) -> float:
        """Seconds for one unit of work, mean over one repeat."""
        with contextlib.suppress(BrokenPipeError):  # if it is dead, the missing answer says so
            self._pipe.send(True)
        return self._answer()

    def _answer(self) -> Any:
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
        """Ends the process."""
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()


def _serve(pipe: Any, side: Side, seconds: float) -> None:
    try:
        run = _answer(side)
        run(1)
        count, took = 1, _seconds(run, 1) if seconds else 0.0
        while took < seconds:
            count = max(count + 1, min(int(1.2 * count * seconds / took), 10 * count))
            took = _seconds(run, count)
        pipe.send(None)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}".splitlines()[0])
        return
    try:
        while pipe.recv():
            pipe.send(_seconds(run, count) / count)
    except EOFError:  # the parent has heard enough
        pass


def ask(side: Side) -> Any:
    """What `function(**case)` returns, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_answer, (side,))


def _answer(side: Side) -> Any:
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
    """Seconds per unit of work [repeats] of each side, repeat by repeat in turn.

    A side that cannot run here, or fails on the way, is left out, and why is printed.
    """
    workers: dict[str, Worker] = {}
    taken: dict[str, list[float]] = {}
    try:
        for name, side in sides.items():
            with _left_out(name, taken):
                workers[name] = Worker(side, seconds, patience)
                taken[name] = []
        for _ in range(repeats):
            for name in [*taken]:
                with _left_out(name, taken):
                    taken[name].append(workers[name].repeat())
    finally:
        for worker in workers.values():
            worker.close()
    return {name: np.array(each) for name, each in taken.items()}


@contextlib.contextmanager
def _left_out(name: str, taken: dict[str, list[float]]) -> Iterator[None]:
    """Takes a side out of what was measured, and prints why, if it cannot run inside."""
    try:
        yield
    except Unavailable as why:
        print(f"{name}: not measured ({why})", flush=True)
        taken.pop(name, None)


@dataclasses.dataclass(frozen=True)
class Result:
    """One measured figure with its 95 % interval, and what it ought to be."""

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
    """The median of the samples, one a repeat, with its bootstrap interval, against a target."""
    samples = np.atleast_1d(np.asarray(samples, np.float64))
    drawn = np.random.default_rng(0).choice(samples, (2000, len(samples)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    value, target, met = float(np.median(samples)), None, None
    if at_least is not None:
        target, met = f"at least {at_least:g}", value >= at_least
    if at_most is not None:
        target, met = f"at most {at_most:g}", value <= at_most
    return Result(name, value, float(low), float(high), target, met, device())


def device() -> str:
    """The processor, by name; or what BENCHMARK_DEVICE says."""
    said = os.environ.get("BENCHMARK_DEVICE")
    if said:
        return said
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{cores()} cores of {models[0] if models else platform.processor()}"


def cores() -> int:
    """CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class Limits(NamedTuple):
    """What the machine can do, measured."""

    products: float
    """Floating-point operations a second in products of 1024 × 1024 float32 matrices."""
    copies: float
    """Bytes a second, read and written, in x ← −x over 128 MiB."""

    def share(self, seconds: np.ndarray, operations: float, moved: float = 0.0) -> np.ndarray:
        """The time that the limit allows for so much work, over the time that it took."""
        return max(operations / self.products, moved / self.copies) / seconds


PARTS, SIZE, ENTRIES = 8, 1024, 1 << 22


@cache
def limits() -> Limits:
    """Those of this machine, on all of its devices."""
    taken = alternate({name: Side(__name__, name) for name in ("products", "copies")})
    best = {name: float(seconds.min()) for name, seconds in taken.items()}
    return Limits(2 * PARTS * SIZE**3 / best["products"], 2 * 4 * PARTS * ENTRIES / best["copies"])


def products(size: int = SIZE, precision: str = "float32") -> Run:
    """PARTS products of size × size matrices, split over the devices."""
    import jax

    product = jax.default_matmul_precision(precision)(lambda a: a @ a / size)
    return _everywhere((size, size), product)


def copies(entries: int = ENTRIES) -> Run:
    """PARTS arrays of so many entries negated in place, split over the devices."""
    return _everywhere((entries,), lambda a: -a)


def _everywhere(shape: tuple[int, ...], change: Callable[[Any], Any]) -> Run:
    from metadyn import mesh

    mesh.use_every_core()
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    split = PartitionSpec(mesh.TASKS)
    repeat = lambda a, n: jax.lax.fori_loop(0, n, lambda _, a: change(a), a)
    many = jax.shard_map(
        lambda a, n: jax.lax.map(lambda one: repeat(one, n), a),
        mesh=mesh.mesh(),
        in_specs=(split, PartitionSpec()),
        out_specs=split,
    )
    many = jax.jit(many, donate_argnums=0)
    state = [jnp.ones((PARTS, *shape))]

    def run(count: int) -> None:
        state[0] = jax.block_until_ready(many(state[0], count))

    return run


Benchmark = Callable[[bool], Iterator[Result]]
"""`benchmark(full)` yields its results as they come."""


def main(benchmarks: Mapping[str, Benchmark], description: str) -> None:
    """The command line of one benchmark or of all."""
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
        for each in benchmarks[name](arguments.full):
            print(each, flush=True)
            results.append(each)
            if arguments.json:  # after each, so that what is done is kept
                rows = [dataclasses.asdict(each) for each in results]
                Path(arguments.json).write_text(json.dumps(rows, indent=2) + "\n")
        print(f"({name}: {time.perf_counter() - start:.0f} s)", flush=True)


def versions() -> str:
    """Python and the packages that are compared."""
    found = [f"Python {platform.python_version()}"]
    for package in ("jax", "flax", "torch"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)
