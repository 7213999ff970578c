"""What it costs training to store checkpoints and mode trajectories.

    python -m benchmarks.streaming [--full] [--json FILE]

Linear regression, 5 × 5, T = 20, 64 units, batch 256: 800 outer steps with one checkpoint, about as
many seconds apart as in the quick preset, against 800 without. At a checkpoint the mode
trajectories of 128 tasks and the losses of 2 048 are measured and stored with the training state.
A third side measures and does not store, which tells the two apart.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.timing import Result, Run, Side, alternate, main, result


def training_side(stored: str, steps: int) -> Run:
    """`steps` outer steps; `stored` says what: nothing, measured (and not stored), all."""
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
    sample = lambda key, _: domain.sample_task(key)  # noqa: E731
    state = [trainer.init()]
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    store = RunFolder.create(folder / "run", {"study": "-", "preset": "-", "seed": 0, "config": {}})

    def measured() -> dict[str, dict[str, jax.Array]]:
        params, key = state[0].params["lstm"], jax.random.key(1)
        tracked = inner.measure(
            domain, meta.learner, params, True, domain.evaluation_task, spectrum, key,
            jnp.arange(128), times, probe,
        )  # fmt: skip
        heldout = inner.measure(
            domain, meta.learner, params, True, sample, None, key, jnp.arange(2048), times
        )
        return {"tracked": tracked, "heldout": heldout}

    def run(count: int) -> None:
        for _ in range(count):
            state[0], loss = trainer.advance(state[0], jnp.int32(steps // 2))
            if stored == "measured":
                jax.block_until_ready(measured())
            elif stored == "all":
                store.save_checkpoint(int(state[0].step), state[0], measured(), {})
            state[0], loss = trainer.advance(state[0], jnp.int32(steps - steps // 2))
            jax.block_until_ready((state[0], loss))

    return run


def benchmark(full: bool = False) -> Iterator[Result]:
    """Seconds of training, and the percentage that storing adds."""
    steps = 8000 if full else 800
    sides = {
        stored: Side(__name__, "training_side", {"stored": stored, "steps": steps})
        for stored in ("nothing", "measured", "all")
    }
    taken = alternate(sides, repeats=4, seconds=0.0)
    where, plain = f"{steps} outer steps", taken["nothing"]
    yield result(f"{where}: nothing stored, s", plain)
    extra = {name: 100 * (taken[name] - plain) / plain for name in ("measured", "all")}
    yield result(f"{where}: a checkpoint with trajectories, %", extra["all"], at_most=2.0)
    yield result(f"{where}: of that, measuring them, %", extra["measured"])


if __name__ == "__main__":
    main({"streaming": benchmark}, __doc__ or "")
