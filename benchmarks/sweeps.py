"""A sweep against one run after another, in seconds and memory, by the number of settings.

    python -m benchmarks.sweeps [--settings 1 4 16] [--steps 300] [--study linear_regression]

Both sides are whole commands in processes of their own that keep nothing compiled: learning rates
by noise, 4 seeds. A few single runs are timed, and their mean is taken for each setting. They draw
their figures and their page too, which a sweep leaves to `metadyn figures` and `metadyn view`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.timing import device

SIGMAS = ("0.1", "0.2", "0.3", "0.4")


def command(*arguments: str) -> tuple[float, float]:
    """Seconds that a metadyn command took, and MiB that it held at most."""
    start = time.perf_counter()
    line = [sys.executable, "-m", "metadyn.cli", *arguments, "--no-cache"]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(line)}: exit code {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def grid(settings: int) -> tuple[list[str], list[str]]:
    """Learning rates and noise of so many settings: up to four values of noise."""
    noise = SIGMAS[: min(settings, len(SIGMAS))]
    rates = np.geomspace(3e-3, 3e-2, settings // len(noise))
    return [f"{rate:.3g}" for rate in rates], [*noise]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a row for each number of settings, as it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", default="linear_regression")
    parser.add_argument("--settings", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", default="300")
    parser.add_argument("--runs", type=int, default=2, help="single runs that are timed")
    given = parser.parse_args(argv)
    small = ["--outer.steps", given.steps, "--outer.warmup", "10", "--outer.checkpoints", "4"]
    print(f"{device()}; {given.study}, {given.steps} outer steps, 4 seeds")
    print("| settings | sweep, s | MiB | single runs, s (of those timed, mean × settings) |")
    print("| --- | --- | --- | --- |", flush=True)
    for settings in given.settings:
        rates, noise = grid(settings)
        with tempfile.TemporaryDirectory() as folder:
            options = ["--outer.learning-rate", *rates, "--domain.sigma", *noise, "--seeds", "4"]
            out = ["--out", str(Path(folder) / "sweep")]
            seconds, held = command("sweep", given.study, *small, *options, *out)
            alone = [
                command(
                    *("run", given.study, *small, "--outer.seeds", "4"),
                    *("--outer.learning-rate", rates[-1], "--domain.sigma", noise[i % len(noise)]),
                    *("--out", str(Path(folder) / f"run{i}")),
                )[0]
                for i in range(min(given.runs, settings))
            ]
        single = f"{np.mean(alone) * settings:.0f}" if alone else "–"
        print(f"| {settings} | {seconds:.0f} | {held:.0f} | {single} |", flush=True)


if __name__ == "__main__":
    main()
