"""All that is to be measured on a GPU, in one command of under 10 minutes.

    python -m benchmarks.gpu OUT

Needs metadyn with its `cuda` extra and PyTorch for CUDA. Writes into OUT: suite.txt, the tests;
benchmarks.json and .txt, the outer step against cuDNN, PyTorch's cuDNN path under CUDA graphs and
flax, at hidden 64, batch 16 384, and every kernel backend; paper.txt, the paper preset of linear
regression for as long as time is left. Not run yet: no GPU was at hand.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import kernels
from benchmarks.outer_step import CLIP, RATE, SIGMA, N, operations, torch_network
from benchmarks.timing import Result, Run, Side, alternate, limits, main, result

CASE = {"hidden": 64, "batch": 16_384, "steps": 20}
SECONDS = 580
PARTS = (
    ("suite.txt", 200, ["-m", "pytest", "-q", "-x", "tests/test_lstm.py", "tests/test_outer.py"]),
    ("benchmarks.txt", 240, ["-m", "benchmarks.gpu", "--measure", "--json", "benchmarks.json"]),
    ("paper.txt", SECONDS, ["-m", "metadyn.cli", "run", "experiments/linear_regression.py"]),
)
"""Of each part: where its output goes, seconds at most, the command."""


def cudnn_side(hidden: int, batch: int, steps: int) -> Run:
    """jax.experimental.rnn, which is cuDNN's LSTM, in the training step of the flax side."""
    from functools import partial

    import jax
    import jax.numpy as jnp
    import optax
    from jax.experimental import rnn

    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(RATE))
    key = jax.random.key(0)
    weights = rnn.init_lstm_weight(key, 2 * N, hidden, 1, False)
    params = (weights, jnp.zeros((hidden, N)), jnp.zeros(N))
    lengths, zeros = jnp.full(batch, steps, jnp.int32), jnp.zeros((1, batch, hidden))

    def loss(params: Any, key: Any) -> Any:
        key_task, key_x, key_noise = jax.random.split(key, 3)
        W = jax.random.normal(key_task, (batch, N, N)) / N**0.5
        x = jax.random.normal(key_x, (batch, steps, N))
        noise = jax.random.normal(key_noise, (batch, steps, N))
        y = jnp.einsum("bij,btj->bti", W, x) + SIGMA * noise
        before = jnp.concatenate([jnp.zeros_like(y[:, :1]), y[:, :-1]], 1)
        h, _, _ = rnn.lstm(
            jnp.concatenate([x, before], -1), zeros, zeros, params[0], lengths,
            2 * N, hidden, 1, 0.0, False,
        )  # fmt: skip
        return jnp.mean((h @ params[1] + params[2] - y) ** 2)

    def step(_: Any, carry: Any) -> Any:
        key, params, moments = carry
        key, now = jax.random.split(key)
        updates, moments = optimizer.update(jax.grad(loss)(params, now), moments)
        return key, optax.apply_updates(params, updates), moments

    @partial(jax.jit, donate_argnums=0)
    def train(carry: Any, count: Any) -> Any:
        return jax.lax.fori_loop(0, count, step, carry)

    state = [(key, params, optimizer.init(params))]

    def run(count: int) -> None:
        state[0] = jax.block_until_ready(train(state[0], count))

    return run


def graph_side(hidden: int, batch: int, steps: int) -> Run:
    """PyTorch's cuDNN path, one whole outer step captured as a CUDA graph."""
    import torch

    network = torch_network(hidden).cuda()
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE, fused=True, capturable=True)

    def step() -> None:
        W = torch.randn(batch, N, N, device="cuda") / N**0.5
        x = torch.randn(steps, batch, N, device="cuda")
        noise = torch.randn(steps, batch, N, device="cuda")
        optimizer.zero_grad(set_to_none=True)
        network(x, torch.einsum("bij,tbj->tbi", W, x) + SIGMA * noise).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP, foreach=True)
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def run(count: int) -> None:
        for _ in range(count):
            graph.replay()
        torch.cuda.synchronize()

    return run


def benchmark(full: bool = False) -> Iterator[Result]:
    """The outer step, its share of the card's limit, and how long 10⁹ episodes would train."""
    sides = {
        "metadyn": Side("benchmarks.outer_step", "metadyn_side", CASE),
        "PyTorch, CUDA graph": Side(__name__, "graph_side", CASE),
        "cuDNN in JAX": Side(__name__, "cudnn_side", CASE),
        "flax": Side("benchmarks.outer_step", "flax_side", CASE),
    }
    taken = alternate(sides)
    where = "outer step, " + ", ".join(f"{k} {v}" for k, v in CASE.items())
    for name, seconds in taken.items():
        yield result(f"{where}: {name}, ms", 1e3 * seconds)
    ours = taken["metadyn"]
    share: np.ndarray = limits().share(ours, operations(**CASE))
    yield result(f"{where}: metadyn, share of the product rate", share)
    yield result("10⁹ episodes at that rate, s", ours / CASE["batch"] * 1e9)
    for name, least in (("PyTorch, CUDA graph", 3.0), ("cuDNN in JAX", 2.0), ("flax", None)):
        if name in taken:
            yield result(f"{where}: × {name}", taken[name] / ours, at_least=least)
    yield from kernels.benchmark(full=True)


def programme(out: Path) -> None:
    """Runs the parts in turn, each for its seconds at most and all for SECONDS."""
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    for name, most, command in PARTS:
        left = SECONDS - (time.monotonic() - start)
        more = ["--preset", "paper", "--out", str(out / "paper")] if name == "paper.txt" else []
        asked = [str(out / part) if part == "benchmarks.json" else part for part in command]
        with open(out / name, "w") as file:
            process = subprocess.Popen(
                [sys.executable, *asked, *more], stdout=file, stderr=subprocess.STDOUT
            )
            try:
                code: int | str = process.wait(min(most, left))
            except subprocess.TimeoutExpired:
                process.terminate()  # metadyn stores what it has
                process.wait()
                code = "stopped for time"
        print(f"{name}: {code}", flush=True)


if __name__ == "__main__":
    if "--measure" in sys.argv:
        sys.argv.remove("--measure")
        main({"gpu": benchmark}, __doc__ or "")
    elif len(sys.argv) == 2:
        programme(Path(sys.argv[1]))
    else:
        sys.exit("usage: python -m benchmarks.gpu OUT")
