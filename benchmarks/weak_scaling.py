"""Weak scaling of the outer loop over virtual CPU devices, and what it predicts for many GPUs.

    python -m benchmarks.weak_scaling [--devices N ...] [--steps N] [--batch N] [--hidden N]

Every device has the same number of episodes, and there is one outer seed. Each row runs in its own
process. The bytes that an outer step reduces over the devices are read from the compiled program.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp

from benchmarks.outer_step import loop
from metadyn.program_cost import exchanged

# Assumed, not measured: number of GPUs, bytes/s that one sends, seconds of latency per message.
LINKS = {"8 GPUs, NVLink": (8, 450e9, 3e-6), "256 GPUs, 400 Gb/s InfiniBand": (256, 50e9, 10e-6)}


def measure(steps: int, batch: int, hidden: int) -> dict:
    """Returns the seconds and the reduced bytes of an outer step on the devices present."""
    outer_loop = loop(hidden, batch * jax.device_count(), steps=20)
    advance = outer_loop.compiled("lstm")
    state, times = outer_loop.init(), []
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    for _ in range(4):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(advance(state, jnp.int32(steps)))
        times.append((time.perf_counter() - start) / steps)
    return {
        "devices": jax.device_count(),
        "parameters": parameters,
        "seconds": min(times[1:]),
        "reduced": exchanged(advance.as_text()),
    }


def all_reduce(devices: int, size: float, speed: float, latency: float) -> float:
    """Returns seconds: each device sends 2 (n − 1) / n of the bytes in 2 log2 n serial messages."""
    return 2 * (devices - 1) / devices * size / speed + 2 * math.log2(devices) * latency


def main():
    """Prints a row per number of devices, then the estimates for GPUs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="*", default=[2, 4, 8], help="besides 1")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32, help="episodes of each device")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.steps, arguments.batch, arguments.hidden)))
        return
    print(f"JAX {jax.__version__}, {len(os.sched_getaffinity(0))} CPU cores\n")
    print("| devices | seconds a step | episodes/s | all-reduces a step | bytes reduced |")
    print("| --- | --- | --- | --- | --- |")
    step_time = math.nan
    for devices in sorted({1, *arguments.devices}):
        completed = subprocess.run(
            [sys.executable, "-m", "benchmarks.weak_scaling", "--one", *sys.argv[1:]],
            env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        row = json.loads(completed.stdout)
        step_time = row["seconds"] if devices == 1 else step_time
        cells = (
            devices,
            f"{row['seconds']:.4f}",
            f"{arguments.batch * devices / row['seconds']:,.0f}",
        )
        cells += len(row["reduced"]), f"{sum(row['reduced']):,}"
        print("|", " | ".join(map(str, cells)), "|", flush=True)
    size = 4 * (row["parameters"] + 1)
    print(f"\n{row['parameters']:,} parameters: {size:,} bytes with the loss\n")
    print(f"| | all-reduce | efficiency at {step_time:.4f} s a step | step of 90 % efficiency |")
    print("| --- | --- | --- | --- |")
    for name, (devices, speed, latency) in LINKS.items():
        seconds = all_reduce(devices, size, speed, latency)
        cells = name, f"{1e6 * seconds:.0f} µs", f"{step_time / (step_time + seconds):.1%}"
        print("|", " | ".join(cells), f"| {1e3 * 9 * seconds:.2f} ms |")


if __name__ == "__main__":
    main()
