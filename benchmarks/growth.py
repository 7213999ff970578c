"""Time and memory of an outer step and of a measurement, as each size grows.

    python -m benchmarks.growth [--full] [--json FILE]

Outer steps: each row changes one size of 64 units, batch 256, T = 20 and 2 devices, and gives the
time per episode and the bytes per episode that the compiled step holds besides its arguments.
Measurements: SGD on a two-layer linear network, 20 updates, for several numbers of tasks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from benchmarks.inner_loops import OPERATIONS, UPDATES
from benchmarks.outer_step import loop, metadyn_side, operations
from benchmarks.timing import Result, Run, Side, alternate, ask, limits, main, result

BASE = {"hidden": 64, "batch": 256, "steps": 20, "devices": 2}
SHORT = {"batch": (32, 4096), "steps": (100,), "hidden": (128,), "devices": (1, 4)}
FULL = {
    "batch": (32, 1024, 4096, 16_384, 65_536),
    "steps": (10, 50, 100, 200),
    "hidden": (32, 128, 256, 512),
    "devices": (1, 4, 8),
}
TASKS = {False: (16, 4096), True: (1, 16, 256, 4096, 65_536)}


def step_side(hidden: int, batch: int, steps: int, devices: int) -> Run:
    """Makes a run of outer steps on `devices` virtual devices of a CPU."""
    os.environ["JAX_NUM_CPU_DEVICES"] = str(devices)
    return metadyn_side(hidden, batch, steps)


def memory(hidden: int, batch: int, steps: int, devices: int) -> int:
    """Returns the compiled outer step's bytes per device besides its arguments and results."""
    os.environ["JAX_NUM_CPU_DEVICES"] = str(devices)
    compiled = loop(hidden, batch, steps).compiled("lstm")
    return compiled.memory_analysis().temp_size_in_bytes


def benchmark(full: bool = False) -> Iterator[Result]:
    """Yields the time and memory per episode of each size, and the time per update of SGD."""
    sizes = [BASE]
    for field, values in (FULL if full else SHORT).items():
        sizes += [BASE | {field: value} for value in values]
    for case in sizes:
        seconds = alternate({"": Side(__name__, "step_side", case)})[""]
        held_bytes = ask(Side(__name__, "memory", case)) * case["devices"]
        label = "outer step, " + ", ".join(f"{k} {v}" for k, v in case.items())
        yield result(f"{label}: µs an episode", 1e6 * seconds / case["batch"])
        yield result(f"{label}: KiB an episode", held_bytes / case["batch"] / 1024)
        flops = operations(case["hidden"], case["batch"], case["steps"])
        yield result(f"{label}: share of the product rate", limits().share(seconds, flops))
    for tasks in TASKS[full]:
        side = Side("benchmarks.inner_loops", "metadyn_side", {"kind": "linear", "learners": tasks})
        seconds = alternate({"": side})[""] / (tasks * UPDATES)
        yield result(f"SGD on {tasks} tasks: µs an update", 1e6 * seconds)
        share = limits().share(seconds, OPERATIONS["linear"])
        yield result(f"SGD on {tasks} tasks: share of the product rate", share)


if __name__ == "__main__":
    main({"growth": benchmark}, __doc__ or "")
