"""Times one outer step of metadyn against PyTorch and flax.

    python -m benchmarks.outer_step [--full] [--json FILE]

Each side does the same work: it samples tasks of linear regression, 5 × 5, with their episodes,
runs an LSTM over them, back-propagates, clips the gradient by its global norm and takes a step of
Adam. Sides: metadyn; PyTorch's nn.LSTM, eager and under torch.compile; flax's nnx.RNN of an
OptimizedLSTMCell under jit, with many steps per dispatch, as in metadyn. At larger batches a
further side has PyTorch process a part of the batch at a time, which fits the cache, as metadyn
does by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from benchmarks.rivals import flax_body, torch_body
from benchmarks.timing import Result, Run, Side, alternate, cores, limits, main, result

N, SIGMA, RATE, CLIP = 5, 0.1, 1e-3, 1.0
SIZES = ((64, 256, 20), (64, 2048, 20))
FULL = tuple(
    (hidden, batch, steps)
    for steps in (20, 100)
    for hidden in (64, 128, 256)
    for batch in (256, 2048, 16_384, 65_536)
    if hidden * batch * steps <= 64 * 65_536 * 20
)
"""Hidden units, batch, T, as far as 16 GiB of memory hold the activations of the other sides."""


def loop(
    hidden: int,
    batch: int,
    steps: int,
    model: str = "lstm",
    precision: Any = "float32",
    n: int = N,
    seeds: int = 1,
    rate: float = RATE,
    **more: Any,
) -> Any:
    """Returns the `OuterLoop` of studies; `more` are fields of the network's configuration."""
    from metadyn import mesh

    mesh.use_every_core()
    import jax

    from metadyn.domains.linear import LinearRegression
    from metadyn.objectives import prediction_loss
    from metadyn.outer import MetaTraining, OuterConfig, OuterLoop
    from metadyn.study import StudyConfig

    domain = LinearRegression(n, n, sigma=SIGMA, steps=steps)
    network = dataclasses.replace(getattr(StudyConfig(), model), hidden=hidden, **more)
    meta = network.make(domain)
    outer = OuterConfig(
        steps=1_000_000,
        batch=batch,
        seeds=seeds,
        learning_rate=rate,
        schedule="constant",
        clip=CLIP,
        precision=precision,
    )
    trained = {model: MetaTraining(meta, prediction_loss(domain, meta))}
    return OuterLoop(trained, outer, jax.random.key(0))


def metadyn_side(hidden: int, batch: int, steps: int, model: str = "lstm", **more: Any) -> Run:
    """Makes a run of metadyn, on every core or on the accelerator; `more` are options of `loop`."""
    outer_loop = loop(hidden, batch, steps, model, **more)
    import jax
    import jax.numpy as jnp

    state = [outer_loop.init()]

    def run(count: int) -> None:
        state[0], metrics = outer_loop.advance(state[0], jnp.int32(count))
        jax.block_until_ready((state[0], metrics))

    return run


def torch_network(hidden: int, model: str = "lstm", n: int = N) -> Any:
    """Returns a network with a linear readout, whose forward pass is its loss on whole episodes."""
    import torch

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch_body(model, 2 * n, hidden)
            self.readout = torch.nn.Linear(hidden, n)

        def forward(self, x: Any, y: Any) -> Any:
            """Returns the mean squared error; x and y are [T, B, n]."""
            previous = torch.cat([torch.zeros_like(y[:1]), y[:-1]])
            answers = self.readout(self.body(torch.cat([x, previous], -1)))
            return torch.nn.functional.mse_loss(answers, y)

    return Network()


def torch_side(
    hidden: int,
    batch: int,
    steps: int,
    model: str = "lstm",
    compiled: bool = False,
    chunk: int | None = None,
) -> Run:
    """Makes a run of PyTorch, on a GPU if present. With `chunk`, that many episodes at a time."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(cores())
    network = torch_network(hidden, model).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE, fused=True)
    loss = torch.compile(network) if compiled else network
    chunk = chunk or batch

    def sample() -> tuple[Any, Any]:
        W = torch.randn(chunk, N, N, device=device) / N**0.5
        x = torch.randn(steps, chunk, N, device=device)
        noise = torch.randn(steps, chunk, N, device=device)
        return x, torch.einsum("bij,tbj->tbi", W, x) + SIGMA * noise

    def run(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            for _ in range(batch // chunk):
                (loss(*sample()) * (chunk / batch)).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def flax_network(hidden: int, model: str = "lstm") -> Any:
    """Returns a network with a linear readout, whose forward pass is its loss on whole episodes."""
    import jax.numpy as jnp
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.body = flax_body(model, 2 * N, hidden, rngs)
            self.readout = nnx.Linear(hidden, N, rngs=rngs)

        def __call__(self, x: Any, y: Any) -> Any:
            """Returns the mean squared error; x and y are [T, B, N]."""
            inputs = jnp.concatenate([x, jnp.concatenate([jnp.zeros_like(y[:1]), y[:-1]])], -1)
            return jnp.mean((self.readout(self.body(inputs)) - y) ** 2)

    return Network(nnx.Rngs(0))


def flax_side(hidden: int, batch: int, steps: int, model: str = "lstm") -> Run:
    """Makes a run of flax's own modules under jit, on all cores as one device."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    graph, params, rest = nnx.split(flax_network(hidden, model), nnx.Param, ...)
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(RATE))

    def sample(key: Any) -> tuple[Any, Any]:
        key_task, key_x, key_noise = jax.random.split(key, 3)
        W = jax.random.normal(key_task, (batch, N, N)) / N**0.5
        x = jax.random.normal(key_x, (steps, batch, N))
        noise = jax.random.normal(key_noise, (steps, batch, N))
        return x, jnp.einsum("bij,tbj->tbi", W, x) + SIGMA * noise

    def loss(params: Any, x: Any, y: Any) -> Any:
        return nnx.merge(graph, params, rest)(x, y)

    def step(_: Any, carry: Any) -> Any:
        key, params, moments = carry
        key, step_key = jax.random.split(key)
        gradient = jax.grad(loss)(params, *sample(step_key))
        updates, moments = optimizer.update(gradient, moments)
        return key, optax.apply_updates(params, updates), moments

    @partial(jax.jit, donate_argnums=0)
    def train(carry: Any, count: Any) -> Any:
        return jax.lax.fori_loop(0, count, step, carry)

    state = [(jax.random.key(0), params, optimizer.init(params))]

    def run(count: int) -> None:
        state[0] = jax.block_until_ready(train(state[0], count))

    return run


def operations(hidden: int, batch: int, steps: int) -> float:
    """Returns the FLOPs of an outer step's products: forwards, and twice as many backwards."""
    return 3 * 2.0 * steps * batch * (4 * hidden * (2 * N + hidden) + hidden * N)


def compared(
    model: str, size: tuple[int, int, int], pytorch: float | None, flax: float | None
) -> Iterator[Result]:
    """Times metadyn against PyTorch and flax at one size.

    `pytorch` and `flax` are the least speeds that metadyn must reach, as multiples of theirs; None:
    no target. An LSTM also has its shares of the machine's limit and, above batch 256, PyTorch in
    parts of the batch.
    """
    hidden, batch, steps = size
    case, is_lstm = {"hidden": hidden, "batch": batch, "steps": steps}, model == "lstm"
    side = lambda name, **more: Side("benchmarks.outer_step", name, case | {"model": model} | more)
    sides = {
        "metadyn": side("metadyn_side"),
        "PyTorch eager": side("torch_side"),
        "PyTorch compiled": side("torch_side", compiled=True),
        "flax": side("flax_side"),
    }
    chunked = "PyTorch eager, 256 episodes at a time"
    if is_lstm and batch > 256:
        sides[chunked] = side("torch_side", chunk=256)
    timings = alternate(sides)
    prefix = "outer step" if is_lstm else model
    label, ours = f"{prefix}, hidden {hidden}, batch {batch}, T {steps}", timings["metadyn"]
    for name, seconds in timings.items():
        yield result(f"{label}: {name}, ms", 1e3 * seconds)
        if is_lstm:
            share = limits().share(seconds, operations(**case))
            yield result(f"{label}: {name}, share of the product rate", share)
    rivals = [timings[name] for name in ("PyTorch eager", "PyTorch compiled") if name in timings]
    if rivals:
        best = np.min(rivals, axis=0)
        yield result(f"{label}: × better of PyTorch", best / ours, at_least=pytorch)
    if chunked in timings:
        yield result(f"{label}: × {chunked}", timings[chunked] / ours)
    if "flax" in timings:
        yield result(f"{label}: × flax", timings["flax"] / ours, at_least=flax)


def benchmark(full: bool = False) -> Iterator[Result]:
    """Yields the comparisons, and the shares of the machine's limit."""
    for size in FULL if full else SIZES:
        yield from compared("lstm", size, *((1.0, 1.5) if size in SIZES else (None, None)))


if __name__ == "__main__":
    main({"outer_step": benchmark}, __doc__ or "")
