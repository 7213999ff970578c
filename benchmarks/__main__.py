"""Runs seven benchmarks at sizes that finish in under 10 minutes on 2 CPU cores.

    python -m benchmarks [--full] [--only NAME ...] [--json FILE]

`pip install -e '.[benchmark]'` installs PyTorch. Without it, PyTorch's rows are left out.
"""

from benchmarks import excess_loss, growth, inner_loops, kernels, outer_step, probes, streaming
from benchmarks.timing import main

MODULES = (outer_step, inner_loops, probes, streaming, kernels, growth, excess_loss)

if __name__ == "__main__":
    by_name = {module.__name__.removeprefix("benchmarks."): module.benchmark for module in MODULES}
    main(by_name, "Benchmarks of metadyn; see benchmarks/README.md.")
