"""Times probes at all steps of 1 024 tasks against training, and two solutions of their linear fit.

    python -m benchmarks.probes [--full] [--json FILE]

The probe of linear regression, 5 × 5, T = 20, asks an LSTM of 64 units 32 queries after every
observation of 1 024 tasks. This should take at most the time of 10 outer steps at batch 1 024. The
fit itself, a product with one precomputed pseudo-inverse, is compared with batched least squares.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.outer_step import N, operations
from benchmarks.timing import Result, Run, Side, alternate, limits, main, result

TASKS, HIDDEN, STEPS, POINTS = 1024, 64, 20, 32


def probe_side(learner: str, tasks: int) -> Run:
    """Makes a run of `inner.measure` with the probe at every step."""
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
    make_learner = {"lstm": meta.learner, "bayes": lambda params: bayes}[learner]
    params = jax.vmap(meta.init)(jax.random.split(jax.random.key(0), 1))
    evaluation = domain.evaluation(POINTS)
    probes = tuple(evaluation.probes.items())

    def run(count: int) -> None:
        for i in range(count):
            readings = inner.measure(
                domain, make_learner, tuple(range(STEPS + 1)), probes,
                params, evaluation.sample, jax.random.key(i), jnp.arange(tasks),
            )  # fmt: skip
            jax.block_until_ready(readings)

    return run


def fit_side(way: str, fits: int) -> Run:
    """Makes a run that fits Ŵ to `fits` sets of answers, by a pseudo-inverse or by lstsq."""
    import jax
    import jax.numpy as jnp

    design = jax.random.normal(jax.random.key(0), (POINTS, N + 1))
    answers = jax.random.normal(jax.random.key(1), (fits, POINTS, N))
    if way == "pseudo-inverse":
        inverse = jnp.linalg.pinv(design)
        fit = jax.jit(lambda answers: jnp.einsum("np,fpm->fnm", inverse, answers))
    else:
        fit = jax.jit(jax.vmap(lambda answers: jnp.linalg.lstsq(design, answers)[0]))

    def run(count: int) -> None:
        for _ in range(count):
            fitted: Any = fit(answers)
        jax.block_until_ready(fitted)

    return run


def benchmark(full: bool = False) -> Iterator[Result]:
    """Yields milliseconds, shares of the limit, and the two ratios."""
    for tasks in (256, TASKS, 4096) if full else (TASKS,):
        step = {"hidden": HIDDEN, "batch": tasks, "steps": STEPS}
        sides = {
            "LSTM": Side(__name__, "probe_side", {"learner": "lstm", "tasks": tasks}),
            "Bayes": Side(__name__, "probe_side", {"learner": "bayes", "tasks": tasks}),
            "outer step": Side("benchmarks.outer_step", "metadyn_side", step),
        }
        timings = alternate(sides)
        label = f"probe of {tasks} tasks at all steps"
        for name in ("LSTM", "Bayes"):
            yield result(f"{label}: {name}, ms", 1e3 * timings[name])
        # A forward pass per query; all queries share the product with the state.
        queries = POINTS * 8 * HIDDEN * N + 8 * HIDDEN * HIDDEN + POINTS * 2 * HIDDEN * N
        share = limits().share(timings["LSTM"], float(tasks * (STEPS + 1) * queries))
        yield result(f"{label}: LSTM, share of the product rate", share)
        yield result(
            f"{label}: LSTM / 10 outer steps at batch {tasks}",
            timings["LSTM"] / (10 * timings["outer step"]),
            at_most=1.0 if tasks == TASKS else None,
        )
        share = limits().share(timings["outer step"], operations(**step))
        yield result(f"outer step, batch {tasks}: share of the product rate", share)
    fits = 65_536
    sides = {
        way: Side(__name__, "fit_side", {"way": way, "fits": fits})
        for way in ("pseudo-inverse", "lstsq")
    }
    timings = alternate(sides)
    for way, seconds in timings.items():
        yield result(f"{fits} linear fits: {way}, ms", 1e3 * seconds)
    moved_bytes = 4.0 * fits * N * (POINTS + N + 1)
    for way, seconds in timings.items():
        share = limits().share(seconds, 2.0 * fits * (N + 1) * POINTS * N, moved_bytes)
        yield result(f"{fits} linear fits: {way}, share of the limit", share)
    ratio = timings["lstsq"] / timings["pseudo-inverse"]
    yield result(f"{fits} linear fits: lstsq / pseudo-inverse", ratio)


if __name__ == "__main__":
    main({"probes": benchmark}, __doc__ or "")
