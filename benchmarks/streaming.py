"""What it costs training to store checkpoints and mode trajectories.

    python -m benchmarks.streaming [--full] [--json FILE]

A training of linear regression, 5 × 5, T = 20, 64 units, batch 256: as many outer steps with 5
checkpoints spread over them as without. Three sides: nothing stored; the training state stored;
and also the mode trajectories of 128 tasks and the losses of 2 048, measured first. Storing is what
ought to cost at most 2 % of training; measuring is work of its own, reported beside it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.timing import Result, Run, Side, alternate, main, result

CHECKPOINTS = 5


def training_side(stored: str, steps: int) -> Run:
    """`steps` outer steps; `stored` is nothing, measured (but not stored), or all."""
    from metadyn import mesh

    mesh.use_every_core()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from metadyn import inner
    from metadyn.domains.linear import LinearRegression
    from metadyn.learners.lstm import LSTMConfig, LSTMMetaLearner
    from metadyn.outer import OuterConfig, Trainee, Trainer, prediction_loss
    from metadyn.store import RunFolder

    domain = LinearRegression()
    meta, probe = LSTMMetaLearner(domain, LSTMConfig()), domain.probe()
    trainees = {"lstm": Trainee(meta, prediction_loss(domain, meta))}
    outer = OuterConfig(steps=10**7, batch=256, seeds=1, schedule="constant", learning_rate=1e-3)
    trainer = Trainer(trainees, outer, jax.random.key(0))
    spectrum, times = np.float32(domain.spectrum()), tuple(range(domain.steps + 1))
    state = [trainer.init()]
    folder = Path(tempfile.mkdtemp())
    store = RunFolder.create(folder / "run", {"study": "-", "preset": "-", "seed": 0, "config": {}})

    def measured() -> dict[str, dict[str, jax.Array]]:
        params, key = state[0].params["lstm"], jax.random.key(1)
        tracked = inner.measure(
            domain, meta.learner, params, True, domain.evaluation_task, spectrum, key,
            jnp.arange(128), times, probe,
        )  # fmt: skip
        heldout = inner.measure(
            domain, meta.learner, params, True, _sample(domain), None, key, jnp.arange(2048), times
        )
        return {"tracked": tracked, "heldout": heldout}

    def run(count: int) -> None:
        for _ in range(count * CHECKPOINTS):
            state[0], loss = trainer.advance(state[0], jnp.int32(steps // CHECKPOINTS))
            if stored == "nothing":
                jax.block_until_ready(loss)
            elif stored == "state":
                store.save_checkpoint(int(state[0].step), state[0], None, {})
            elif stored == "measured":
                jax.block_until_ready(measured())
            else:
                store.save_checkpoint(int(state[0].step), state[0], measured(), {})
        jax.block_until_ready(state[0])
        store.close()
        shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)

    return run


def _sample(domain):
    return lambda key, _: domain.sample_task(key)


def benchmark(full: bool = False) -> Iterator[Result]:
    """Seconds of training, and the percentage that storing adds."""
    steps = 20_000 if full else 2000
    sides = {
        stored: Side(__name__, "training_side", {"stored": stored, "steps": steps})
        for stored in ("nothing", "state", "measured", "all")
    }
    taken = alternate(sides, repeats=5)
    where = f"{steps} outer steps"
    plain = taken["nothing"]
    yield result(f"{where}, nothing stored, s", plain)
    for name, seconds, base, most in (
        (f"{CHECKPOINTS} checkpoints of the state", taken["state"], plain, 2.0),
        ("trajectories stored, their measuring left out", taken["all"], taken["measured"], 2.0),
        ("measuring trajectories and held-out losses", taken["measured"], plain, None),
    ):
        extra = 100 * (seconds - base) / plain
        yield result(f"{where}, {name}: % of training", extra, at_most=most)


if __name__ == "__main__":
    main({"streaming": benchmark}, __doc__ or "")
