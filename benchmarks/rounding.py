"""What measurements would come to if devices rounded their products: an emulation on a CPU.

    python -m benchmarks.rounding [--tasks N] [--json FILE]

Linear regression, 5 × 5, T = 20. The factors of every product in what measures are rounded to as
many bits as TensorFloat32 and bfloat16 have, as GPUs and TPUs do unless they are told otherwise;
sums stay float32, as there. Learners and tasks are the same in all rows. metadyn has such
products made in float32 everywhere; this is why.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

BITS = {"tensorfloat32": 10, "bfloat16": 7}
"""Of the fraction; both have the 8 bits of exponent of float32."""


@contextmanager
def rounded(bits: int | None) -> Iterator[None]:
    """Makes the programs that are traced inside round the factors of their products; None: not."""
    import jax
    import jax.numpy as jnp
    from jax.extend.core.primitives import dot_general_p

    exact = dot_general_p.bind

    def bind(*factors: Any, **given: Any) -> Any:
        if bits is not None and all(a.dtype == jnp.float32 for a in factors):
            factors = tuple(jax.lax.reduce_precision(a, 8, bits) for a in factors)
        return exact(*factors, **given)

    jax.clear_caches()  # of what was traced without
    with patch.object(dot_general_p, "bind", bind):
        yield
    jax.clear_caches()


def rows(tasks: int, steps: int = 1500) -> Iterator[dict[str, Any]]:
    """For each precision and learner, how far mode strengths move, and the excess over Bayes."""
    import numpy as np
    import optax

    import metadyn as md
    from metadyn.domains.linear import LinearRegression
    from metadyn.learners import gradient as gd
    from metadyn.learners.bayes import bayes_linear, ridge
    from metadyn.learners.lstm import LSTMConfig

    domain = LinearRegression(5, 5, steps=20)
    learners = {
        "bayes": bayes_linear(domain),
        "least_squares": ridge(5, 5, 1e-5),
        "sgd": gd.gradient(gd.deep_linear(5, 5), optax.sgd(0.05), 8),
        "lstm": md.train(LSTMConfig().make(domain), domain, steps=steps, seeds=1, progress=False),
    }
    found = {}
    for name, bits in {"float32": None, **BITS}.items():
        with rounded(bits):
            data = md.measure(domain, learners, tasks=tasks, updating_tasks=32, updates=300)
        found[name] = data.load()
    for name in BITS:
        for learner in learners:
            now, before = (d.sel(learner=learner) for d in (found[name], found["float32"]))
            moved = float(np.nanmax(np.abs(now["mode_strength"] - before["mode_strength"])))
            row = {"precision": name, "learner": learner, "mode_strength_moved": moved}
            if learner in ("least_squares", "lstm"):  # those that learn within the episode
                row |= {"excess": excess(found[name], learner)}
                row |= {"excess_float32": excess(found["float32"], learner)}
            yield row


def excess(data: Any, learner: str) -> float:
    """Mean loss over that of Bayes in the same dataset, less 1."""
    loss = data["loss"].mean([d for d in data["loss"].dims if d != "learner"])
    return float(loss.sel(learner=learner) / loss.sel(learner="bayes") - 1)


def main() -> None:
    """Prints the table, row by row."""
    from metadyn import mesh

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", type=int, default=4096)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    mesh.use_every_core()
    done = []
    for row in rows(arguments.tasks):
        done.append(row)
        print(" | ".join(f"{v:.3g}" if isinstance(v, float) else v for v in row.values()))
        if arguments.json:
            arguments.json.write_text(json.dumps(done, indent=2) + "\n")


if __name__ == "__main__":
    main()
