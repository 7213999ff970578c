"""Times meta-learners that are not LSTMs: one outer step against PyTorch, flax and the LSTM.

    python -m benchmarks.sequence_models [--full] [--json FILE]

The first part is `outer_step` with a transformer and a DeltaNet of two layers, 64 units and 4 heads
(`rivals.py`). The rivals are PyTorch's `scaled_dot_product_attention` and a plain loop of the delta
rule, eager and under torch.compile, and flax's own modules under jit. The second part times the
minLSTM, whose episodes are an associative scan, and the LSTM, whose episodes are a sequential one,
at several episode lengths.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.outer_step import SIZES, compared
from benchmarks.timing import Result, Side, alternate, main, result

STEP = "benchmarks.outer_step"
FULL = ((64, 256, 100), (128, 256, 20), (128, 2048, 20))
"""Hidden units, batch, T."""
LENGTHS = ((20, 256), (100, 256), (1000, 32))
"""T, batch."""


def benchmark(full: bool = False) -> Iterator[Result]:
    """Yields the comparisons with other libraries, and with the LSTM."""
    for model in ("transformer", "deltanet"):
        for size in SIZES + (FULL if full else ()):
            yield from compared(model, size, *((1.5, 1.0) if size in SIZES else (None, None)))
    for steps, batch in LENGTHS:
        case = {"hidden": 64, "batch": batch, "steps": steps}
        sides = {m: Side(STEP, "metadyn_side", case | {"model": m}) for m in ("minlstm", "lstm")}
        timings = alternate(sides)
        for model, seconds in timings.items():
            yield result(f"{model}, hidden 64, batch {batch}, T {steps}, ms", 1e3 * seconds)
        ratio = timings["lstm"] / timings["minlstm"]
        yield result(f"minlstm, hidden 64, batch {batch}, T {steps}: × lstm", ratio)


if __name__ == "__main__":
    main({"sequence_models": benchmark}, __doc__ or "")
