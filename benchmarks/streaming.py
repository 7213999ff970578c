"""Times what storing checkpoints and mode trajectories adds to training.

    python -m benchmarks.streaming [--full] [--json FILE]

Trains as a study plans it, with and without checkpoints in alternation. At a checkpoint the mode
trajectories of the tracked tasks and the losses of the held-out tasks are measured, and stored with
the training state. One checkpoint costs less than training varies between repeats. So they are
taken DENSER times as often as in the study, and the added time is divided by that. A third side
measures but does not store, which tells the two costs apart. Cases: the quick presets of linear
regression (3 × 3, batch 32, four seeds) and of outer-loop dynamics (an LSTM on each domain, batch
32, four seeds); `large`, linear regression of 5 × 5, batch 256, one seed.
"""

from __future__ import annotations

import atexit
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.timing import Result, Run, Side, alternate, main, result

DENSER = 10  # checkpoints here for each checkpoint of the study
CASES = {"linear_regression quick": 5.0, "outer_loop_dynamics quick": 5.0, "large": 2.0}
"""Cases, and the most that a checkpoint may cost in each, in % of training."""


def training_side(case: str, stored: str) -> Run:
    """Makes a run of steps up to a checkpoint. `stored` is "nothing", "measured" or "all" of it."""
    from metadyn import mesh

    mesh.use_every_core()
    import jax

    from metadyn import load_study
    from metadyn.domains.linear import LinearRegression
    from metadyn.measuring import readings
    from metadyn.outer import OuterConfig, OuterLoop
    from metadyn.store import RunFolder

    study_name = case.removesuffix(" quick") if case != "large" else "linear_regression"
    study = load_study(study_name)
    config = study.presets["quick"]
    if case == "large":
        outer = OuterConfig(steps=20_000, batch=256, seeds=1)
        config = dataclasses.replace(config, domain=LinearRegression(), outer=outer)
    plan = study.plan(config)
    endless = dataclasses.replace(plan.outer, schedule="constant")
    loop = OuterLoop(plan.trained, endless, jax.random.key(0))
    state = [loop.init()]
    steps = plan.outer.steps // len(plan.outer.checkpoint_steps) // DENSER
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    store = RunFolder.create(folder / "run", {"study": "-", "preset": "-", "seed": 0, "config": {}})

    def measure() -> dict[str, dict[str, dict[str, jax.Array]]]:
        return {
            tasks.name: {
                contender.name: readings(
                    tasks, contender, state[0].params[contender.name + part.suffix],
                    jax.random.key(1), config.measure.chunk,
                )
                for contender in part.metas
            }
            for part in plan.comparisons
            for tasks in (part.tracked, part.heldout)
        }  # fmt: skip

    def run(count: int) -> None:
        for _ in range(count):
            *_, (state[0], _) = loop.run(state[0], int(state[0].step) + steps)
            if stored == "measured":
                jax.block_until_ready(measure())
            elif stored == "all":
                store.save_checkpoint(int(state[0].step), state[0], measure(), {})
        store.finish()

    return run


def benchmark(full: bool = False) -> Iterator[Result]:
    """Yields the seconds of training, and the percentages that storing and measuring add."""
    for case, limit in CASES.items():
        sides = {
            stored: Side(__name__, "training_side", {"case": case, "stored": stored})
            for stored in ("nothing", "measured", "all")
        }
        timings = alternate(sides, repeats=27 if full else 9, seconds=0.5)
        plain = timings["nothing"]
        yield result(f"{case}: outer steps between two checkpoints, s", DENSER * plain)
        extra = {name: 100 * (timings[name] / plain - 1) / DENSER for name in ("measured", "all")}
        name = f"{case}: a checkpoint with trajectories, % of training"
        yield result(name, extra["all"], at_most=limit)
        yield result(f"{case}: of that, measuring them, %", extra["measured"])


if __name__ == "__main__":
    main({"streaming": benchmark}, __doc__ or "")
