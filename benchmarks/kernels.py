"""Times the backends of the LSTM kernel: value and gradient over a whole episode.

    python -m benchmarks.kernels [--full] [--json FILE]

T = 20, 10 inputs. `scan` is the reference, and `backward` is what `auto` chooses on CPUs. `fused`
and `fused_remat`, which are for NVIDIA GPUs, are timed by `python -m benchmarks.gpu`.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.timing import Result, Run, Side, alternate, limits, main, result

STEPS, INPUTS = 20, 10
SIZES = ((64, 32), (64, 128))
FULL = tuple((hidden, batch) for hidden in (64, 128, 256) for batch in (16, 32, 128, 512, 2048))


def kernel_side(backend: str, hidden: int, batch: int) -> Run:
    """Makes a run that descends the mean of h², many steps per dispatch, on one device."""
    import jax
    import jax.numpy as jnp

    from metadyn.kernels.lstm import LSTMWeights, lstm

    shapes = ((4 * hidden, INPUTS), (4 * hidden, hidden), (4 * hidden,))
    keys = jax.random.split(jax.random.key(0), 4)
    weights = LSTMWeights(
        *(0.1 * jax.random.normal(k, s) for k, s in zip(keys[1:], shapes, strict=True))
    )
    inputs = jax.random.normal(keys[0], (STEPS, INPUTS, batch))
    gradient = jax.grad(lambda weights: jnp.mean(lstm(weights, inputs, backend) ** 2))
    descend = lambda _, w: jax.tree.map(lambda a, g: a - 1e-3 * g, w, gradient(w))
    program = jax.jit(lambda weights, count: jax.lax.fori_loop(0, count, descend, weights))
    return lambda count: jax.block_until_ready(program(weights, count))


def benchmark(full: bool = False) -> Iterator[Result]:
    """Yields the milliseconds of each backend, and its speed as a multiple of the reference's."""
    for hidden, batch in FULL if full else SIZES:
        case = {"hidden": hidden, "batch": batch}
        backends = ("scan", "backward")
        sides = {b: Side(__name__, "kernel_side", case | {"backend": b}) for b in backends}
        timings = alternate(sides)
        label = f"kernel, hidden {hidden}, batch {batch}"
        flops = 6.0 * STEPS * batch * 4 * hidden * (INPUTS + hidden)
        for name, seconds in timings.items():
            yield result(f"{label}: {name}, ms", 1e3 * seconds)
            share = limits().share(seconds, flops)
            yield result(f"{label}: {name}, share of the product rate", share)
            if name != "scan":
                yield result(f"{label}: {name} × scan", timings["scan"] / seconds)


if __name__ == "__main__":
    main({"kernels": benchmark}, __doc__ or "")
