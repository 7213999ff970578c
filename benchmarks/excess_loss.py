"""Wall-clock to a given excess loss over Bayes: the figure that users feel.

    python -m benchmarks.excess_loss [--full] [--json FILE]

Linear regression, 3 × 3, T = 20, σ = 0.1, one outer seed at a time on every core. Each row trains
SEEDS LSTMs, with the schedule stretched over the steps it is given, and says the seconds of
training (compilation left out) after which the mean loss of 200 outer steps first came under the
given excess, and the excess that they ended with: medians over seeds. The first row is the base;
each other changes what it names. The schedule decays to zero, so a row reaches its best at the end.
A setting with a seed that does not come under it has no seconds. `outer_loop.py` asks the
same of nonlinear regression in outer steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.timing import Result, Side, ask, main, result

EXCESS, STEPS, SEEDS = 1.0, 3000, 5
APART = 1_000_000  # outer steps from which the seeds count on: the step decides the episodes
BASE: dict[str, Any] = {"hidden": 64, "batch": 32, "learning_rate": 2e-2, "steps": STEPS}
SHORT: dict[str, dict[str, Any]] = {
    "base: 64 units, batch 32, Adam at 2e-2, cosine": {},
    "32 units": {"hidden": 32},
    "batch 128, a quarter of the steps": {"batch": 128, "steps": STEPS // 4},
}
FULL = SHORT | {
    "128 units": {"hidden": 128},
    "batch 16, twice the steps": {"batch": 16, "steps": 2 * STEPS},
    "batch 256, an eighth of the steps": {"batch": 256, "steps": STEPS // 8},
    "learning rate 1e-2": {"learning_rate": 1e-2},
    "learning rate 5e-3": {"learning_rate": 5e-3},
    "linear decay": {"schedule": "linear"},
    "constant rate": {"schedule": "constant"},
    "RMSProp at 3e-3": {"optimizer": "rmsprop", "learning_rate": 3e-3},
    "AdaBelief": {"optimizer": "adabelief"},
    "products in bfloat16": {"precision": "bfloat16"},
}


def train(hidden: int, precision: str | None = None, **outer: Any) -> list[tuple[float, float]]:
    """Of each seed, seconds until the excess is below EXCESS, and the excess at the end."""
    from metadyn import mesh

    mesh.use_every_core()
    import time

    import jax
    import jax.numpy as jnp

    from metadyn import inner
    from metadyn.domains.linear import LinearRegression
    from metadyn.dynamics import excess_loss
    from metadyn.learners.bayes import bayes_linear
    from metadyn.learners.lstm import LSTMConfig
    from metadyn.objectives import prediction_loss
    from metadyn.outer import MetaTraining, OuterConfig, OuterLoop

    jax.config.update("jax_default_matmul_precision", precision)
    domain = LinearRegression(3, 3)
    meta, bayes = LSTMConfig(hidden=hidden).make(domain), bayes_linear(domain)
    sample = lambda key, _: domain.sample_task(key)
    losses = inner.measure(
        domain, lambda params: bayes, (), False, sample, None,
        jax.random.key(1), jnp.arange(16_384), (0, domain.steps),
    )  # fmt: skip
    best = float(losses["loss"][:, 1].mean())
    config = OuterConfig(seeds=1, dispatch=200, **outer)
    trained = {"lstm": MetaTraining(meta, prediction_loss(domain, meta))}
    loop = OuterLoop(trained, config, jax.random.key(0))
    found = []
    for seed in range(SEEDS):
        first = jnp.int32(seed * APART)
        state = OuterLoop(trained, config, jax.random.key(seed)).init()._replace(step=first)
        state = jax.block_until_ready(loop.advance(state, jnp.int32(0))[0])
        start, reached, excess = time.perf_counter(), np.inf, np.inf
        for _, metrics in loop.run(state, [seed * APART + config.steps]):
            excess = float(
                excess_loss(float(metrics["lstm"]["loss"].mean()), best, domain.loss_floor)
            )
            if excess <= EXCESS:
                reached = min(reached, time.perf_counter() - start)
        found.append((reached, excess))
    return found


def benchmark(full: bool = False) -> Iterator[Result]:
    """Seconds and excess loss of each setting."""
    for name, changes in (FULL if full else SHORT).items():
        reached, excess = np.transpose(ask(Side(__name__, "train", BASE | changes)))
        if np.isfinite(reached).all():
            yield result(f"{name}: seconds to an excess loss of {EXCESS:g}", reached)
        yield result(f"{name}: excess loss at the end", excess)


if __name__ == "__main__":
    main({"excess_loss": benchmark}, __doc__ or "")
