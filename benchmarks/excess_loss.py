"""Excess loss over Bayes and seconds of training: how soon is a meta-learner near Bayes?

    python -m benchmarks.excess_loss [--full] [--only PROBLEM ...] [--json FILE]

A problem is a study's preset: `quick` (3 × 3 tasks and the like) or `workstation` (the paper's own
sizes). Its LSTM is trained anew in every row, all seeds together on every device, with what the row
names changed; the schedule is stretched over the steps it is given. A row says the seconds of
training, compiling left out, the seconds after which the mean over seeds first came under the
problem's TARGET on training episodes, if it did, and the excess at the end on held-out tasks
of each seed. The first row of a quick problem has the settings of version 0.1; without `--full`
there are no rows but that and the settings of now.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, get_args

import numpy as np

from benchmarks.timing import Result, Side, ask, main, result

TARGET = {
    "linear_regression": 0.256,
    "nonlinear_regression": 0.557,
    "contextual_bandit": 0.113,
    "linear_regression workstation": 0.2,
    "nonlinear_regression workstation": 0.3,
    "contextual_bandit workstation": 0.03,
}
"""Excess at which version 0.1's quick presets ended, and that the paper's sizes are asked for; of
the bandit, 0.03 of the regret of chance is a reward of 0.97."""
BEFORE: dict[str, dict[str, Any]] = {
    "linear_regression": {
        "lstm.hidden": 64, "target": "feedback", "outer.steps": 12_000, "outer.optimizer": "adam",
        "outer.b2": None, "outer.learning_rate": 2e-2,
    },
    "nonlinear_regression": {
        "domain.embedding": "standard", "lstm.vector_rate": 1.0, "target": "feedback",
        "outer.steps": 12_000, "outer.optimizer": "adam", "outer.b2": None,
        "outer.learning_rate": 3e-2,
    },
    "contextual_bandit": {
        "lstm.vector_rate": 1.0, "actor_critic.annealed": False, "outer.steps": 4000,
    },
}  # fmt: skip
"""What version 0.1's quick presets had instead."""
STAGES = "stages"
"""Changes of the stages that training has, one after another and equally long, in a row."""
AVERAGED = "averaged"
"""Whether the weights at the end are the mean over the last third of the steps."""


def rows(problem: str) -> dict[str, dict[str, Any]]:
    """What is changed in each row, by dotted field of the study's configuration."""
    study, _, preset = problem.partition(" ")
    config = settings(problem)
    steps, batch, rate = config.outer.steps, config.outer.batch, config.outer.learning_rate
    hidden, bandit = config.lstm.hidden, study == "contextual_bandit"
    found = {} if preset else {"version 0.1": BEFORE[study]}
    found["as it is"] = {}
    found |= {
        f"{hidden // 2} units, twice the steps": {
            "lstm.hidden": hidden // 2, "outer.steps": 2 * steps,
        },
        f"{2 * hidden} units, a third of the steps": {
            "lstm.hidden": 2 * hidden, "outer.steps": steps // 3,
        },
        "Muon at 3e-2": {"outer.optimizer": "muon", "outer.b2": None, "outer.learning_rate": 3e-2},
        "Muon at 1e-1": {"outer.optimizer": "muon", "outer.b2": None, "outer.learning_rate": 1e-1},
        f"learning rate {2 * rate:g}": {"outer.learning_rate": 2 * rate},
        f"learning rate {4 * rate:g}": {"outer.learning_rate": 4 * rate},
        f"learning rate {rate / 2:g}": {"outer.learning_rate": rate / 2},
        "mean of the last third's weights": {AVERAGED: True},
        "the same, constant rate": {AVERAGED: True, "outer.schedule": "constant"},
        f"batch {batch // 2} growing to {3 * batch // 2}": {
            STAGES: [{"outer.batch": batch // 2}, {"outer.batch": 3 * batch // 2}],
        },
        "first half on episodes of half the length": {
            STAGES: [{"domain.steps": config.domain.steps // 2}, {}],
        },
    }  # fmt: skip
    other = 3.0 if config.lstm.vector_rate == 1 else 1.0
    found[f"biases and readout at {other:g} times the rate"] = {"lstm.vector_rate": other}
    if study == "nonlinear_regression":
        from metadyn.domains.fourier import Embedding

        found |= {f"embedding {e}": {"domain.embedding": e} for e in get_args(Embedding)}
    if not bandit:
        other = "feedback" if config.target == "bayes" else "bayes"
        found[f"target: {other}"] = {"target": other}
    return found


def settings(problem: str, changes: Mapping[str, Any] = {}) -> Any:
    """A problem's configuration, with fields changed by their dotted names."""
    from metadyn.study import load_study

    study, _, preset = problem.partition(" ")
    config = load_study(study).presets[preset or "quick"]
    parts: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        part, _, field = name.rpartition(".")
        parts.setdefault(part, {})[field] = value
    whole = {
        part: dataclasses.replace(getattr(config, part), **each)
        for part, each in parts.items()
        if part
    }
    return dataclasses.replace(config, **parts.get("", {}), **whole)


def train(problem: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Trains as a row says: seconds and excess [dispatch], and the excess at the end [seed]."""
    from metadyn import mesh

    mesh.use_every_core()
    import jax
    import jax.numpy as jnp

    from metadyn import dynamics
    from metadyn.measuring import readings
    from metadyn.outer import OuterLoop
    from metadyn.study import HELDOUT, load_study

    rest = {name: value for name, value in changes.items() if name not in (STAGES, AVERAGED)}
    stages = changes.get(STAGES, [{}])
    study = load_study(problem.partition(" ")[0])
    loops = []
    for stage in stages:
        config = settings(problem, rest | stage)
        plan = study.plan(config)
        loops.append(OuterLoop({"lstm": plan.trained["lstm"]}, config.outer, jax.random.key(0)))
    part, steps = plan.comparisons[0], config.outer.steps
    bayes = next(each for each in part.contenders if each.kind == "bayes")
    lstm = next(each for each in part.contenders if each.name == "lstm")
    heldout = next(each.tasks for each in plan.measurements if each.tasks.name == HELDOUT)
    tasks = dataclasses.replace(heldout, size=8192, probes={})

    def loss(contender, params):
        found = readings(tasks, contender, params, jax.random.key(1), 2048)
        return np.asarray(found["loss"])[..., 1:].mean((-2, -1))

    best = loss(bayes, ())
    over = lambda loss: dynamics.excess_loss(loss, best, part.domain.loss_floor)
    state, seconds, excess, mean, parts = loops[0].init(), [], [], None, 0
    for i, loop in enumerate(loops):
        for now, metrics in loop.run(state, steps * (i + 1) // len(loops)):
            seconds.append(sum(each.seconds["lstm"] for each in loops))
            excess.append(float(over(np.mean(metrics["lstm"]["loss"]))))
            state = now
            if changes.get(AVERAGED) and int(now.step) > 2 * steps / 3:
                copy, parts = jax.tree.map(jnp.copy, now.params["lstm"]), parts + 1
                mean = copy if mean is None else jax.tree.map(jnp.add, mean, copy)
    params = state.params["lstm"] if mean is None else jax.tree.map(lambda x: x / parts, mean)
    return {"seconds": seconds, "excess": excess, "ends": [*map(float, over(loss(lstm, params)))]}


def table(problem: str, full: bool = False) -> Iterator[Result]:
    """Seconds and excess of a problem's rows; one that fails costs itself alone."""
    for name, changes in rows(problem).items():
        if not full and name not in ("version 0.1", "as it is"):
            continue
        where = f"{problem}, {name}"
        try:
            found = ask(Side(__name__, "train", {"problem": problem, "changes": changes}))
        except Exception as error:
            print(f"{where}: {type(error).__name__}: {error}".splitlines()[0], flush=True)
            continue
        smooth = np.convolve(found["excess"], [0.5, 0.5], "valid")  # of two dispatches
        under = np.flatnonzero(smooth <= TARGET[problem])
        yield result(f"{where}: seconds", found["seconds"][-1])
        if len(under):
            at = found["seconds"][under[0] + 1]
            yield result(f"{where}: seconds to an excess of {TARGET[problem]:g}", at)
        yield result(f"{where}: excess at the end", found["ends"])


def benchmark(full: bool = False) -> Iterator[Result]:
    """That of linear regression, 3 × 3; with `full` of all problems."""
    for problem in TARGET if full else ("linear_regression",):
        yield from table(problem, full)


if __name__ == "__main__":
    main({problem: partial(table, problem) for problem in TARGET}, __doc__ or "")
