"""Probes against training: all steps of 1 024 tasks, and how the probe's linear fit is solved.

    python -m benchmarks.probes [--full] [--json FILE]

The probe of linear regression, 5 × 5, T = 20: an LSTM of 64 units is asked 32 queries after every
observation of 1 024 tasks. Its time ought to be at most that of 10 outer steps at batch 1 024. The
fit itself, one precomputed pseudo-inverse and a product, is compared with batched least squares.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.outer_step import N, operations
from benchmarks.timing import Result, Run, Side, alternate, limits, main, result

TASKS, HIDDEN, STEPS, POINTS = 1024, 64, 20, 32


def probe_side(learner: str, tasks: int) -> Run:
    """`inner.measure` with the probe at every step."""
    from metadyn import mesh

    mesh.use_every_core()
    import jax
    import jax.numpy as jnp

    from metadyn import inner
    from metadyn.domains.linear import LinearRegression
    from metadyn.learners.bayes import bayes_linear
    from metadyn.learners.lstm import LSTMConfig

    domain = LinearRegression(N, N, steps=STEPS)
    meta, bayes = LSTMConfig(hidden=HIDDEN).make(domain), bayes_linear(domain)
    make = {"lstm": meta.learner, "bayes": lambda params: bayes}[learner]
    params = jax.vmap(meta.init)(jax.random.split(jax.random.key(0), 1))
    asked = domain.evaluation(POINTS)
    probes = tuple(asked.probes.items())

    def run(count: int) -> None:
        for i in range(count):
            found = inner.measure(
                domain, make, tuple(range(STEPS + 1)), probes,
                params, asked.sample, jax.random.key(i), jnp.arange(tasks),
            )  # fmt: skip
            jax.block_until_ready(found)

    return run


def fit_side(way: str, fits: int) -> Run:
    """Ŵ of `fits` sets of answers by the product with a pseudo-inverse, or by lstsq."""
    import jax
    import jax.numpy as jnp

    design = jax.random.normal(jax.random.key(0), (POINTS, N + 1))
    answers = jax.random.normal(jax.random.key(1), (fits, POINTS, N))
    if way == "pseudo-inverse":
        inverse = jnp.linalg.pinv(design)
        fit = jax.jit(lambda answers: jnp.einsum("np,fpm->fnm", inverse, answers))
    else:
        fit = jax.jit(jax.vmap(lambda one: jnp.linalg.lstsq(design, one)[0]))

    def run(count: int) -> None:
        for _ in range(count):
            found: Any = fit(answers)
        jax.block_until_ready(found)

    return run


def benchmark(full: bool = False) -> Iterator[Result]:
    """Milliseconds, and the two ratios."""
    for tasks in (256, TASKS, 4096) if full else (TASKS,):
        step = {"hidden": HIDDEN, "batch": tasks, "steps": STEPS}
        sides = {
            "LSTM": Side(__name__, "probe_side", {"learner": "lstm", "tasks": tasks}),
            "Bayes": Side(__name__, "probe_side", {"learner": "bayes", "tasks": tasks}),
            "outer step": Side("benchmarks.outer_step", "metadyn_side", step),
        }
        taken = alternate(sides)
        where = f"probe of {tasks} tasks at all steps"
        for name in ("LSTM", "Bayes"):
            yield result(f"{where}: {name}, ms", 1e3 * taken[name])
        # A forward pass a query, of which the product with the state is shared by all.
        queries = POINTS * 8 * HIDDEN * N + 8 * HIDDEN * HIDDEN + POINTS * 2 * HIDDEN * N
        share = limits().share(taken["LSTM"], float(tasks * (STEPS + 1) * queries))
        yield result(f"{where}: LSTM, share of the product rate", share)
        yield result(
            f"{where}: LSTM / 10 outer steps at batch {tasks}",
            taken["LSTM"] / (10 * taken["outer step"]),
            at_most=1.0 if tasks == TASKS else None,
        )
        share = limits().share(taken["outer step"], operations(**step))
        yield result(f"outer step, batch {tasks}: share of the product rate", share)
    fits = 65_536
    sides = {
        way: Side(__name__, "fit_side", {"way": way, "fits": fits})
        for way in ("pseudo-inverse", "lstsq")
    }
    taken = alternate(sides)
    for way, seconds in taken.items():
        yield result(f"{fits} linear fits: {way}, ms", 1e3 * seconds)
    moved = 4.0 * fits * N * (POINTS + N + 1)
    for way, seconds in taken.items():
        share = limits().share(seconds, 2.0 * fits * (N + 1) * POINTS * N, moved)
        yield result(f"{fits} linear fits: {way}, share of the limit", share)
    ratio = taken["lstsq"] / taken["pseudo-inverse"]
    yield result(f"{fits} linear fits: lstsq / pseudo-inverse", ratio)


if __name__ == "__main__":
    main({"probes": benchmark}, __doc__ or "")
