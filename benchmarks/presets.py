"""Seconds of training that quick presets take to where those of version 0.1 ended.

    python -m benchmarks.presets [--only STUDY] [--repeats N]

The LSTM of a study's quick preset, four seeds, on every core, is trained with the settings that the
preset had and with those that it has, in turn, compiling left out. A line of each training says its
seconds and the excess over Bayes on its last outer steps; the last line of a study, the
seconds after which the present settings first came under where the former ended, as a share of
the former's.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import numpy as np

from benchmarks.timing import Side, ask, device, versions

BEFORE: dict[str, dict[str, Any]] = {
    "linear_regression": {
        "target": "feedback",
        "outer": {"steps": 12_000, "optimizer": "adam", "b2": None, "learning_rate": 2e-2},
    },
    "contextual_bandit": {"actor_critic": {"annealed": False}, "outer": {"steps": 4000}},
}
"""The fields of each study's configuration that are others now, as they were."""
LAST = 200
"""Outer steps that an excess is the mean of."""


def train(study: str, before: bool) -> tuple[list[float], list[float]]:
    """Seconds of training so far, and the excess over Bayes, after every LAST outer steps."""
    from metadyn import mesh

    mesh.use_every_core()
    import jax
    import jax.numpy as jnp

    from metadyn import dynamics
    from metadyn.measuring import readings
    from metadyn.outer import OuterLoop
    from metadyn.study import HELDOUT, load_study

    found = load_study(study)
    config = found.presets["quick"]
    for field, value in (BEFORE[study] if before else {}).items():
        part = getattr(config, field)
        whole = dataclasses.replace(part, **value) if dataclasses.is_dataclass(part) else value
        config = dataclasses.replace(config, **{field: whole})
    plan = found.plan(config)
    part = plan.comparisons[0]
    outer = dataclasses.replace(config.outer, dispatch=LAST)
    loop = OuterLoop({"lstm": plan.trained["lstm"]}, outer, jax.random.key(0))
    jax.block_until_ready(loop.advance(loop.init(), jnp.int32(0)))
    bayes = next(each for each in part.contenders if each.kind == "bayes")
    heldout = next(tasks for _, tasks, _ in plan.every if tasks.name == HELDOUT)
    tasks = dataclasses.replace(heldout, size=16_384, probes={})
    best = readings(tasks, bayes, (), jax.random.key(1))["loss"]
    over = lambda loss: dynamics.excess_loss(
        float(np.mean(loss)), float(np.asarray(best)[:, 1:].mean()), part.domain.loss_floor
    )
    seconds, excess = [], []
    state, start = loop.init(), time.perf_counter()
    for _, metrics in loop.run(state, [outer.steps]):
        seconds.append(time.perf_counter() - start)
        excess.append(float(over(metrics["lstm"]["loss"])))
    return seconds, excess


def main() -> None:
    """Prints a line for each training."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=[*BEFORE], metavar="STUDY")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    print(f"{device()}; {versions()}", flush=True)
    for study in [arguments.only] if arguments.only else BEFORE:
        shares = []
        for _ in range(arguments.repeats):
            found = {}
            for name, before in (("before", True), ("now", False)):
                side = Side(__name__, "train", {"study": study, "before": before})
                seconds, excess = found[name] = ask(side)
                print(f"{study}, {name}: {seconds[-1]:.3g} s, excess {excess[-1]:.3g}", flush=True)
            (whole, ends), (seconds, excess) = found["before"], found["now"]
            under = [each for each, at in zip(seconds, excess, strict=True) if at <= ends[-1]]
            shares.append(f"{under[0] / whole[-1]:.2f}" if under else "never")
        print(f"{study}: to there in {', '.join(shares)} of the seconds", flush=True)


if __name__ == "__main__":
    main()
