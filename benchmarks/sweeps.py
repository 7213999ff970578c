"""A sweep against one run after another, and against PyTorch's vmap, by the number of settings.

    python -m benchmarks.sweeps [--settings 1 4 16 64 256] [--steps 300] [--study linear_regression]
    python -m benchmarks.sweeps --rival [--settings 16]

Both sides are whole commands in processes of their own: learning rates by noise, 4 seeds. Each is
done twice into folders of its own, with nothing compiled before and with all that the first time
compiled: the difference is what compiling takes. A few single runs are timed, half of them before
the sweep and half after, and their mean is taken for each setting. They draw their figures and
their page too, which a sweep leaves to `metadyn figures` and `metadyn view`.

The rival does one outer step of all settings' LSTMs at once, 4 for each learning rate: episodes,
gradient, clipping by each network's own norm, Adam. It is torch.func.vmap over the gradient of a
plain loop over time, eager and under torch.compile; metadyn's side is the rows of a sweep. Sizes
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
"""Inputs and outputs, units, episodes, T: of the rival."""
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
    """Seconds that a metadyn command took, and MiB that it held at most.

    What it compiles is kept in the folder `cache`, and taken from there.
    """
    kept = {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    kept |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    start = time.perf_counter()
    line = [sys.executable, "-m", "metadyn.cli", *arguments]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, env=os.environ | kept) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(line)}: exit code {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def twice(*arguments: str) -> tuple[float, float, float]:
    """Seconds that a command took with nothing compiled before, and with all that; MiB at first."""
    with tempfile.TemporaryDirectory() as folder:
        cache, outs = Path(folder) / "cache", [Path(folder) / name for name in ("first", "second")]
        (first, held), (second, _) = (command(cache, *arguments, "--out", str(out)) for out in outs)
    return first, second, held


def grid(settings: int) -> tuple[list[str], list[str]]:
    """Learning rates and noise of so many settings: up to four values of noise."""
    noise = SIGMAS[: min(settings, len(SIGMAS))]
    return [f"{rate:.3g}" for rate in rates(settings // len(noise))], [*noise]


def rates(count: int) -> list[float]:
    """So many learning rates."""
    return np.geomspace(3e-3, 3e-2, count).tolist()


def commands(settings: Sequence[int], study: str, steps: str, runs: int) -> None:
    """Prints a row for each number of settings, as it is there."""
    small = ["--outer.steps", steps, "--outer.warmup", "10", "--outer.checkpoints", "4"]
    small += ["--outer.seeds", str(SEEDS)]
    print(f"{device()}; {study}, {steps} outer steps, {SEEDS} seeds")
    print(f"| {' | '.join(COLUMNS)} |")
    print(f"|{' --- |' * len(COLUMNS)}", flush=True)
    before: tuple[int, float] | None = None
    for count in settings:
        rate, noise = grid(count)

        def single(i: int, rate: str = rate[-1], noise: Sequence[str] = noise) -> tuple[float, ...]:
            setting = "--outer.learning-rate", rate, "--domain.sigma", noise[i % len(noise)]
            return twice("run", study, *small, *setting)

        options = ["--outer.learning-rate", *rate, "--domain.sigma", *noise]
        alone = [single(i) for i in range(runs // 2)]
        first, second, held = twice("sweep", study, *small, *options)
        alone += [single(i) for i in range(runs // 2, runs)]
        more = f"{(held - before[1]) / (count - before[0]):.3g}" if before else "–"
        single_runs = [count * np.mean(each) for each in list(zip(*alone, strict=True))[:2]]
        cells = [first, second, held, more, *single_runs]
        said = [each if isinstance(each, str) else f"{each:.0f}" for each in cells]
        print(f"| {count} | {' | '.join(said)} |", flush=True)
        before = count, held


def rows_side(settings: int) -> Run:
    """metadyn's rows of a sweep over learning rates, dispatched as a sweep does."""
    loops = [loop(HIDDEN, BATCH, STEPS, n=N, seeds=SEEDS, rate=rate) for rate in rates(settings)]
    from metadyn.sweep_programs import ProgramCache
    from metadyn.sweep_rows import Rows

    rows = Rows(loops)
    states = [rows.start(ProgramCache())]

    def run(count: int) -> None:
        for reached, _ in rows.run(states[0], int(states[0][0].step) + count):
            states[0] = reached

    return run


def torch_side(settings: int, compiled: bool = False) -> Run:
    """PyTorch's vmap over all networks, on CPU cores."""
    import torch

    torch.set_num_threads(cores())
    of_each = torch.tensor(rates(settings)).repeat_interleave(SEEDS)
    networks = [torch_network(HIDDEN, "lstm loop", N) for _ in of_each]
    states = [network.state_dict() for network in networks]
    weights = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    zeros = {name: torch.zeros_like(leaf) for name, leaf in weights.items()}
    update = torch_step(networks[0], of_each)

    def step(state: Any, t: Any) -> Any:
        several = len(of_each), STEPS, BATCH, N
        W = torch.randn(len(of_each), BATCH, N, N) / N**0.5
        x = torch.randn(several)
        return update(
            *state, t, x, torch.einsum("mbij,mtbj->mtbi", W, x) + SIGMA * torch.randn(several)
        )

    step = torch.compile(step) if compiled else step
    state, t = [(weights, zeros, zeros)], torch.zeros(())

    def run(count: int) -> None:
        for _ in range(count):
            t.add_(1)
            state[0] = step(state[0], t)

    return run


def torch_step(network: Any, rates: Any) -> Callable[..., Any]:
    """A step of Adam for copies of a network, each with a rate of its own and its own clipping.

    `step(weights, means, squares, t, x, y)` gives the first three anew, which are dictionaries of
    leaves [copy, ...]; t counts steps from 1; x and y are [copy, T, B, n].
    """
    from torch.func import functional_call, grad, vmap

    def loss(weights: Any, x: Any, y: Any) -> Any:
        return functional_call(network, weights, (x, y))

    def step(weights: Any, means: Any, squares: Any, t: Any, x: Any, y: Any) -> Any:
        found = vmap(grad(loss))(weights, x, y)
        norm = sum((leaf**2).flatten(1).sum(1) for leaf in found.values()) ** 0.5
        scale = (CLIP / norm).clamp(max=1.0)
        new: tuple[dict[str, Any], ...] = {}, {}, {}
        for name, leaf in found.items():
            of_each = lambda value, leaf=leaf: value.view(-1, *[1] * (leaf.ndim - 1))
            leaf = leaf * of_each(scale)
            mean = 0.9 * means[name] + 0.1 * leaf
            square = 0.999 * squares[name] + 0.001 * leaf**2
            change = mean / (1 - 0.9**t) / ((square / (1 - 0.999**t)) ** 0.5 + 1e-8)
            leaves = weights[name] - of_each(rates) * change, mean, square
            for of, value in zip(new, leaves, strict=True):
                of[name] = value
        return new

    return step


def rivals(settings: Sequence[int]) -> None:
    """Prints what each side takes for an outer step, for each number of settings."""
    print(f"{device()}; {versions()}", flush=True)
    for count in settings:
        case: Mapping[str, Any] = {"settings": count}
        vmap = "torch.func.vmap"
        sides = {
            "metadyn": Side(__name__, "rows_side", case),
            vmap: Side(__name__, "torch_side", case),
            f"{vmap}, compiled": Side(__name__, "torch_side", {**case, "compiled": True}),
        }
        taken = alternate(sides)
        where = f"outer step of {SEEDS * count} LSTMs ({count} settings): "
        for name, seconds in taken.items():
            print(result(f"{where}{name}, ms", 1e3 * seconds), flush=True)
        ours = taken.pop("metadyn")
        for name, seconds in taken.items():
            print(result(f"{where}× {name}", seconds / ours), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--settings", type=int, nargs="+", help="default: 1 4 16; of the rival 16")
    parser.add_argument("--rival", action="store_true", help="against PyTorch's vmap instead")
    parser.add_argument("--study", default="linear_regression")
    parser.add_argument("--steps", default="300", help="outer steps")
    parser.add_argument("--runs", type=int, default=2, help="single runs that are timed")
    given = parser.parse_args(argv)
    few = len(SIGMAS)
    if any(count > few and count % few for count in given.settings or ()):
        parser.error(f"--settings: give numbers up to {few}, or multiples of it")
    if given.rival:
        rivals(given.settings or [16])
    else:
        commands(given.settings or [1, 4, 16], given.study, given.steps, given.runs)


if __name__ == "__main__":
    main()
