"""Emulates on a CPU what measurements would be if devices rounded their products.

    python -m benchmarks.rounding [--tasks N] [--json FILE]

Linear regression, 5 × 5, T = 20. The factors of every product in the measurements are rounded to
the bits of TensorFloat32 and of bfloat16, as GPUs and TPUs do by default. Sums stay float32, as
there. Learners and tasks are the same in all rows. These results are why metadyn has such products
computed in float32 everywhere.
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
"""Bits of the fraction. Both have 8 bits of exponent, as float32 has."""


@contextmanager
def rounded(bits: int | None) -> Iterator[None]:
    """Makes programs traced in a `with` block round the factors of products; None: no rounding."""
    import jax
    import jax.numpy as jnp
    from jax.extend.core.primitives import dot_general_p

    exact = dot_general_p.bind

    def bind(*factors: Any, **options: Any) -> Any:
        if bits is not None and all(a.dtype == jnp.float32 for a in factors):
            factors = tuple(jax.lax.reduce_precision(a, 8, bits) for a in factors)
        return exact(*factors, **options)

    jax.clear_caches()  # programs traced before do not round
    with patch.object(dot_general_p, "bind", bind):
        yield
    jax.clear_caches()


def rows(tasks: int, steps: int = 1500) -> Iterator[dict[str, Any]]:
    """Yields, by precision and learner, the shift of mode strengths and the excess over Bayes."""
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
    datasets = {}
    for name, bits in {"float32": None, **BITS}.items():
        with rounded(bits):
            data = md.measure(domain, learners, tasks=tasks, updating_tasks=32, updates=300)
        datasets[name] = data.load()
    for name in BITS:
        for learner in learners:
            coarse, exact = (d.sel(learner=learner) for d in (datasets[name], datasets["float32"]))
            shift = float(np.nanmax(np.abs(coarse["mode_strength"] - exact["mode_strength"])))
            row = {"precision": name, "learner": learner, "mode_strength_moved": shift}
            if learner in ("least_squares", "lstm"):  # they learn within the episode
                row |= {"excess": excess(datasets[name], learner)}
                row |= {"excess_float32": excess(datasets["float32"], learner)}
            yield row


def excess(data: Any, learner: str) -> float:
    """Returns the mean loss over that of Bayes in the same dataset, less 1."""
    loss = data["loss"].mean([d for d in data["loss"].dims if d != "learner"])
    return float(loss.sel(learner=learner) / loss.sel(learner="bayes") - 1)


def main() -> None:
    """Prints the rows one by one, and stores them if a JSON file is given."""
    from metadyn import mesh

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", type=int, default=4096)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    mesh.use_every_core()
    stored_rows = []
    for row in rows(arguments.tasks):
        stored_rows.append(row)
        print(" | ".join(f"{v:.3g}" if isinstance(v, float) else v for v in row.values()))
        if arguments.json:
            arguments.json.write_text(json.dumps(stored_rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
