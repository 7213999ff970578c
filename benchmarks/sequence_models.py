"""Meta-learners that are not LSTMs: one outer step against PyTorch and flax, and against the LSTM.

    python -m benchmarks.sequence_models [--full] [--json FILE]

The first part does what `outer_step` does, which see, with a transformer and a DeltaNet of two
layers, 64 units and 4 heads (`rivals.py`): PyTorch's `scaled_dot_product_attention` and a plain
loop of the delta rule, eager and under torch.compile; flax's own modules under jit. The second part
times the minLSTM, whose episodes are an associative scan, and the LSTM, whose episodes are a
sequential one, at several lengths of an episode.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.timing import Result, Side, alternate, main, result

STEP = "benchmarks.outer_step"
SIZES, FULL = ((64, 256, 20), (64, 2048, 20)), ((64, 256, 100), (128, 256, 20), (128, 2048, 20))
"""Hidden units, batch, T."""
LENGTHS = ((20, 256), (100, 256), (1000, 32))
"""T, batch."""


def benchmark(full: bool = False) -> Iterator[Result]:
    """The comparisons with other libraries, and with the LSTM."""
    for model in ("transformer", "deltanet"):
        for hidden, batch, steps in SIZES + (FULL if full else ()):
            case = {"hidden": hidden, "batch": batch, "steps": steps, "model": model}
            side = lambda name, case=case, **more: Side(STEP, name, case | more)
            sides = {
                "metadyn": side("metadyn_side"),
                "PyTorch eager": side("torch_side"),
                "PyTorch compiled": side("torch_side", compiled=True),
                "flax": side("flax_side"),
            }
            taken = alternate(sides)
            where = f"{model}, hidden {hidden}, batch {batch}, T {steps}"
            for name, seconds in taken.items():
                yield result(f"{where}: {name}, ms", 1e3 * seconds)
            targeted, ours = (hidden, batch, steps) in SIZES, taken["metadyn"]
            pytorch = [taken[name] for name in sides if "PyTorch" in name and name in taken]
            if pytorch:
                least = 1.5 if targeted else None
                better = np.min(pytorch, axis=0)
                yield result(f"{where}: × better of PyTorch", better / ours, at_least=least)
            if "flax" in taken:
                least = 1.0 if targeted else None
                yield result(f"{where}: × flax", taken["flax"] / ours, at_least=least)
    for steps, batch in LENGTHS:
        case = {"hidden": 64, "batch": batch, "steps": steps}
        sides = {m: Side(STEP, "metadyn_side", case | {"model": m}) for m in ("minlstm", "lstm")}
        taken = alternate(sides)
        for model, seconds in taken.items():
            yield result(f"{model}, hidden 64, batch {batch}, T {steps}, ms", 1e3 * seconds)
        ratio = taken["lstm"] / taken["minlstm"]
        yield result(f"minlstm, hidden 64, batch {batch}, T {steps}: × lstm", ratio)


if __name__ == "__main__":
    main({"sequence_models": benchmark}, __doc__ or "")
