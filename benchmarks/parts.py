"""Where the time of an outer step goes: processor time on one core, which a busy machine disturbs
little.

    python -m benchmarks.parts [--full] [--json FILE]

Linear regression, 5 × 5, T = 20, 64 units. Each row is a program of its own, on one core, by the
processor time of its process: the whole step of each side, and metadyn's with parts left out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import numpy as np

from benchmarks import outer_step
from benchmarks.timing import Result, Run, Side, ask, cores, main, result

HIDDEN, STEPS, SECONDS, REPEATS = 64, 20, 0.3, 7
SIDES = {
    "metadyn": "metadyn_side",
    "PyTorch eager": "torch_side",
    "flax": "flax_side",
}
PARTS = ("products alone", "sampling", "forward", "forward and backward")


def processor_times(side: str, batch: int) -> list[float]:
    """Milliseconds of a whole step, or of a part, by repeat."""
    os.sched_setaffinity(0, {cores() - 1})
    if side in SIDES:
        run = getattr(outer_step, SIDES[side])(hidden=HIDDEN, batch=batch, steps=STEPS)
    else:
        run = part(side, batch)
    run(1)
    count, took = 1, 0.0
    while took < SECONDS:
        count *= 2
        start = time.process_time()
        run(count)
        took = time.process_time() - start
    taken = []
    for _ in range(REPEATS):
        start = time.process_time()
        run(count)
        taken.append(1e3 * (time.process_time() - start) / count)
    return taken


def part(name: str, batch: int) -> Run:
    """A part of metadyn's step, on as many episodes at a time as the trainer takes."""
    import jax
    import jax.numpy as jnp

    from metadyn import inner, mesh
    from metadyn.base import indexed_keys
    from metadyn.domains.linear import LinearRegression
    from metadyn.learners.lstm import LSTMConfig, LSTMMetaLearner

    domain = LinearRegression(steps=STEPS)
    meta = LSTMMetaLearner(domain, LSTMConfig(hidden=HIDDEN))
    params, some = meta.init(jax.random.key(0)), mesh.at_a_time(batch)
    keys = indexed_keys(jax.random.key(1), jnp.arange(some))
    queries, feedback = inner.observe(domain, keys)
    weights = jnp.ones((4 * HIDDEN, HIDDEN + 2 * outer_step.N))

    def loss(params, feedback):
        return jnp.mean((meta.unroll(params, queries, feedback) - feedback) ** 2)

    def products(scale):
        def step(carry, _):
            seen, total = carry
            dz = 1e-3 * (weights @ seen)
            return (weights.T @ dz, total + dz @ seen.T), None

        start = (jnp.full((weights.shape[1], some), scale), jnp.zeros_like(weights))
        return jax.lax.scan(step, start, length=STEPS)[0]

    def sampled(scale):
        return inner.observe(domain, jax.vmap(jax.random.fold_in, (0, None))(keys, scale > 0))

    work = {
        "products alone": products,
        "sampling": sampled,
        "forward": lambda scale: loss(params, scale * feedback),
        "forward and backward": lambda scale: jax.grad(loss)(params, scale * feedback),
    }[name]
    # The result of each round goes into the next, so that none is left out.
    again = lambda _, scale: 1 + 0 * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(work(scale)))  # noqa: E731
    many = jax.jit(lambda rounds: jax.lax.fori_loop(0, rounds, again, jnp.float32(1)))
    return lambda count: jax.block_until_ready(many(count * (batch // some)))


def benchmark(full: bool = False) -> Iterator[Result]:
    """Milliseconds of one core."""
    for batch in (32, 256, 2048) if full else (256, 2048):
        for side in (*SIDES, *PARTS):
            taken = np.array(ask(Side(__name__, "processor_times", {"side": side, "batch": batch})))
            where = "" if side in SIDES else "metadyn, "
            yield result(f"batch {batch}, one core: {where}{side}, ms of processor", taken)


if __name__ == "__main__":
    main({"parts": benchmark}, __doc__ or "")
