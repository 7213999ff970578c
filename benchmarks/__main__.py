"""All benchmarks at sizes that end in under 10 minutes on 2 CPU cores.

    python -m benchmarks [--full] [--only NAME ...] [--json FILE]

PyTorch comes with `pip install -e '.[benchmark]'`; without it its rows are left out.
"""

from benchmarks import excess_loss, growth, inner_loops, kernels, outer_step, probes, streaming
from benchmarks.timing import main

MODULES = (outer_step, inner_loops, probes, streaming, kernels, growth, excess_loss)

if __name__ == "__main__":
    named = {module.__name__.removeprefix("benchmarks."): module.benchmark for module in MODULES}
    main(named, "Benchmarks of metadyn; see benchmarks/README.md.")
