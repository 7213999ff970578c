"""Times a sweep against one run after another, and against PyTorch's vmap, by number of settings.

    python -m benchmarks.sweeps [--settings 1 4 16 64 256] [--steps 300] [--study linear_regression]
    python -m benchmarks.sweeps --rival [--settings 16]

Both sides are whole commands in their own processes, over learning rates × noise, with 4 seeds.
Each command runs twice, into different folders: first with an empty compilation cache, then with
the cache that the first filled. The difference is the time of compiling. A few single runs are
timed, half of them before the sweep and half after, and their mean is multiplied by the number of
settings. They draw their figures and their page too, which a sweep leaves to `metadyn figures` and
`metadyn view`.

The rival takes one outer step of all settings' LSTMs at once, 4 for each learning rate: episodes,
gradient, clipping by each network's own norm, Adam. It is torch.func.vmap over the gradient of a
plain loop over time, eager and under torch.compile. metadyn's side is the rows of a sweep. Sizes
are those of linear regression's quick preset.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.outer_step import CLIP, SIGMA, loop, torch_network
from benchmarks.timing import Run, Side, alternate, cores, device, result, versions

SIGMAS = ("0.1", "0.2", "0.3", "0.4")
SEEDS = 4
N, HIDDEN, BATCH, STEPS = 3, 64, 32, 20
"""Sizes for the rival: inputs and outputs, units, episodes, T."""
COLUMNS = (
    "settings",
    "sweep, s",
    "compiled before, s",
    "MiB",
    "MiB for each more",
    "single runs, s (mean × settings)",
    "compiled before, s",
)


def command(cache: Path, *arguments: str) -> tuple[float, float]:
    """Runs a metadyn command, and returns its seconds and its peak memory in MiB.

    `cache` is the compilation cache's folder. Raises `RuntimeError` unless the exit code is 0 or 1.
    """
    variables = {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    variables |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    start = time.perf_counter()
    argv = [sys.executable, "-m", "metadyn.cli", *arguments]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, env=os.environ | variables) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(argv)}: exit code {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def twice(*arguments: str) -> tuple[float, float, float]:
    """Runs a command with an empty, then a full cache; returns both seconds and the first's MiB."""
    with tempfile.TemporaryDirectory() as folder:
        cache, outs = Path(folder) / "cache", [Path(folder) / name for name in ("first", "second")]
        (first, peak), (second, _) = (command(cache, *arguments, "--out", str(out)) for out in outs)
    return first, second, peak


def grid(settings: int) -> tuple[list[str], list[str]]:
    """Returns learning rates and noise for a number of settings: up to four values of noise."""
    noise = SIGMAS[: min(settings, len(SIGMAS))]
    return [f"{rate:.3g}" for rate in rates(settings // len(noise))], [*noise]


def rates(count: int) -> list[float]:
    """Returns this many learning rates, evenly spaced in logarithm."""
    return np.geomspace(3e-3, 3e-2, count).tolist()


def commands(settings: Sequence[int], study: str, steps: str, runs: int) -> None:
    """Prints a row for each number of settings, as soon as it is measured."""
    common = ["--outer.steps", steps, "--outer.warmup", "10", "--outer.checkpoints", "4"]
    common += ["--outer.seeds", str(SEEDS)]
    print(f"{device()}; {study}, {steps} outer steps, {SEEDS} seeds")
    print(f"| {' | '.join(COLUMNS)} |")
    print(f"|{' --- |' * len(COLUMNS)}", flush=True)
    previous: tuple[int, float] | None = None
    for count in settings:
        rate, noise = grid(count)

        def single(i: int, rate: str = rate[-1], noise: Sequence[str] = noise) -> tuple[float, ...]:
            setting = "--outer.learning-rate", rate, "--domain.sigma", noise[i % len(noise)]
            return twice("run", study, *common, *setting)

        options = ["--outer.learning-rate", *rate, "--domain.sigma", *noise]
        single_times = [single(i) for i in range(runs // 2)]
        first, second, peak = twice("sweep", study, *common, *options)
        single_times += [single(i) for i in range(runs // 2, runs)]
        added = f"{(peak - previous[1]) / (count - previous[0]):.3g}" if previous else "–"
        single_runs = [count * np.mean(s) for s in list(zip(*single_times, strict=True))[:2]]
        cells = [first, second, peak, added, *single_runs]
        texts = [cell if isinstance(cell, str) else f"{cell:.0f}" for cell in cells]
        print(f"| {count} | {' | '.join(texts)} |", flush=True)
        previous = count, peak


def rows_side(settings: int) -> Run:
    """Makes a run of metadyn's rows of a sweep over learning rates, dispatched as in a sweep."""
    loops = [loop(HIDDEN, BATCH, STEPS, n=N, seeds=SEEDS, rate=rate) for rate in rates(settings)]
    from metadyn.sweep_programs import ProgramCache
    from metadyn.sweep_training import OuterLoops

    side_by_side = OuterLoops(loops)
    states = [side_by_side.start(ProgramCache())]

    def run(count: int) -> None:
        for new_state, _ in side_by_side.run(states[0], int(states[0][0].step) + count):
            states[0] = new_state

    return run


def torch_side(settings: int, compiled: bool = False) -> Run:
    """Makes a run of PyTorch's vmap over all networks, on CPU cores."""
    import torch

    torch.set_num_threads(cores())
    network_rates = torch.tensor(rates(settings)).repeat_interleave(SEEDS)
    networks = [torch_network(HIDDEN, "lstm loop", N) for _ in network_rates]
    states = [network.state_dict() for network in networks]
    weights = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    zeros = {name: torch.zeros_like(leaf) for name, leaf in weights.items()}
    update = torch_step(networks[0], network_rates)

    def step(state: Any, t: Any) -> Any:
        shape = len(network_rates), STEPS, BATCH, N
        W = torch.randn(len(network_rates), BATCH, N, N) / N**0.5
        x = torch.randn(shape)
        return update(
            *state, t, x, torch.einsum("mbij,mtbj->mtbi", W, x) + SIGMA * torch.randn(shape)
        )

    step = torch.compile(step) if compiled else step
    state, t = [(weights, zeros, zeros)], torch.zeros(())

    def run(count: int) -> None:
        for _ in range(count):
            t.add_(1)
            state[0] = step(state[0], t)

    return run


def torch_step(network: Any, rates: Any) -> Callable[..., Any]:
    """Makes a step of Adam for copies of a network, each with its own rate and clipping.

    `step(weights, means, squares, t, x, y)` returns new values of the first three, which are
    dictionaries of leaves [copy, ...]; t counts steps from 1; x and y are [copy, T, B, n].
    """
    from torch.func import functional_call, grad, vmap

    def loss(weights: Any, x: Any, y: Any) -> Any:
        return functional_call(network, weights, (x, y))

    def step(weights: Any, means: Any, squares: Any, t: Any, x: Any, y: Any) -> Any:
        gradients = vmap(grad(loss))(weights, x, y)
        norm = sum((leaf**2).flatten(1).sum(1) for leaf in gradients.values()) ** 0.5
        scale = (CLIP / norm).clamp(max=1.0)
        new: tuple[dict[str, Any], ...] = {}, {}, {}
        for name, leaf in gradients.items():
            per_copy = lambda value, leaf=leaf: value.view(-1, *[1] * (leaf.ndim - 1))
            leaf = leaf * per_copy(scale)
            mean = 0.9 * means[name] + 0.1 * leaf
            square = 0.999 * squares[name] + 0.001 * leaf**2
            change = mean / (1 - 0.9**t) / ((square / (1 - 0.999**t)) ** 0.5 + 1e-8)
            leaves = weights[name] - per_copy(rates) * change, mean, square
            for target, value in zip(new, leaves, strict=True):
                target[name] = value
        return new

    return step


def rivals(settings: Sequence[int]) -> None:
    """Prints the time of an outer step of each side, for each number of settings."""
    print(f"{device()}; {versions()}", flush=True)
    for count in settings:
        case: Mapping[str, Any] = {"settings": count}
        vmap = "torch.func.vmap"
        sides = {
            "metadyn": Side(__name__, "rows_side", case),
            vmap: Side(__name__, "torch_side", case),
            f"{vmap}, compiled": Side(__name__, "torch_side", {**case, "compiled": True}),
        }
        timings = alternate(sides)
        label = f"outer step of {SEEDS * count} LSTMs ({count} settings): "
        for name, seconds in timings.items():
            print(result(f"{label}{name}, ms", 1e3 * seconds), flush=True)
        ours = timings.pop("metadyn")
        for name, seconds in timings.items():
            print(result(f"{label}× {name}", seconds / ours), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--settings", type=int, nargs="+", help="default: 1 4 16; of the rival 16")
    parser.add_argument("--rival", action="store_true", help="against PyTorch's vmap instead")
    parser.add_argument("--study", default="linear_regression")
    parser.add_argument("--steps", default="300", help="outer steps")
    parser.add_argument("--runs", type=int, default=2, help="single runs that are timed")
    arguments = parser.parse_args(argv)
    levels = len(SIGMAS)
    if any(count > levels and count % levels for count in arguments.settings or ()):
        parser.error(f"--settings: give numbers up to {levels}, or multiples of it")
    if arguments.rival:
        rivals(arguments.settings or [16])
    else:
        commands(arguments.settings or [1, 4, 16], arguments.study, arguments.steps, arguments.runs)


if __name__ == "__main__":
    main()
