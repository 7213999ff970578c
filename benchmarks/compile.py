"""Compiles the programs of every study's `paper` preset for GPUs and TPUs that are not here.

    python -m benchmarks.compile [--platform cuda|tpu] [--only REGEX] [--lower]

Needs the extra `aot`, some 5 GB of XLA's compilers: `pip install -e '.[aot]' -c constraints.txt`.
Prints each program as it is compiled, and stores it in compiled.json and in the table compiled.md
beside this file. It skips a program if the same one, or one that differs from it only in numbers,
is already stored from the present code and version of JAX. REGEX is searched for in
"STUDY: PROGRAM", such as "linear_regression: outer step". With `--lower` programs are only lowered,
which needs no compiler and stores nothing, and every backend of the LSTM kernel is lowered too
("kernel: BACKEND"). CI does so. The exit code is then 1 if a study's program has a product that is
not in full float32, or what GPUs and TPUs lack: float64, or LAPACK's calls.

For one H100 it also counts the bytes that a call reads and writes, and NVIDIA's `ptxas` reports how
many registers a thread of each fused LSTM kernel uses, and how many bytes it spills ("kernel:
fused..."). XLA's text of a program for TPUs does not give the trip counts of loops, nor plainly
what stays in the chip's own memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, get_args
from unittest.mock import patch

TARGETS = {"cuda": ("h100:1", "h100:8"), "tpu": ("v5e:1", "v5e:4")}
BACKENDS = {"cuda": "gpu", "tpu": "tpu"}
FILE = Path(__file__).with_name("compiled.json")
COUNTED = "h100:1"
"""The target for which bytes and registers are counted."""
PRESET = "paper"
HEAD = """# Programs compiled for absent devices

Written by `python -m benchmarks.compile`, whose docstring says how. Nothing was run on these
devices, so nothing was timed. A cell lists, for each device: memory; the number of operations on
arrays in one iteration of each innermost loop, in program order; the bytes of all-reduces, counted
once if in a loop; the bytes that a device holds after all other exchanges, which occur once a call;
and seconds of compiling on a share of one CPU core. For example, 6 + 9 + 5 for an outer step in
linear regression stands for a step of an episode forwards (6), a step of the loop that computes
Bayes' answers (9) and a step backwards (5). With few episodes one of the 5 adds up the parts into
which XLA split the product; with a GPU present, the faster way is taken. FLOPs are those of one
call on the first of the devices that has a cell. Bytes are those that one call reads and writes on
one H100, its caches included, which does about 20 float32 FLOPs in the time of one byte from its
memory. A dash: not compiled yet."""


def programs(study: str, preset: str = PRESET) -> Iterator[Any]:
    """Yields every program of a study, for the platform of `compiling_for` or `said_to_be_here`."""
    import jax

    from metadyn import planning
    from metadyn.outer import OuterLoop
    from metadyn.study import load_study

    definition = load_study(study)
    plan = definition.plan(definition.presets[preset])
    loop = OuterLoop(plan.trained, plan.outer, jax.random.key(0))
    yield from planning.programs(plan, loop)


EPISODES, STEPS, INPUTS = 16_384, 20, 6
"""Sizes for which the LSTM kernel is compiled: episodes, steps of each, and inputs of a step."""


def kernels(platform: str, hidden: int = 64, sharding: Any = None) -> Iterator[Any]:
    """Yields the gradient through each backend of the LSTM kernel that a platform has."""
    import jax
    import jax.numpy as jnp

    from metadyn.kernels.fused import fits
    from metadyn.kernels.lstm import Backend, LSTMWeights, lstm

    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    weights = LSTMWeights(array(4 * hidden, INPUTS), array(4 * hidden, hidden), array(4 * hidden))
    episodes = array(STEPS, INPUTS, EPISODES), array(STEPS, hidden, EPISODES)
    for backend in get_args(Backend):
        is_fused, is_remat = backend.startswith("fused"), backend == "fused_remat"
        if not is_fused or (platform == "cuda" and fits(hidden, INPUTS, is_remat)):
            run = partial(lstm, backend=backend)
            loss = lambda weights, x, by_h, run=run: jnp.vdot(by_h, run(weights, x))
            gradient = jax.jit(jax.grad(loss, (0, 1)))
            yield SimpleNamespace(name=backend, trace=partial(gradient.trace, weights, *episodes))


def lowered(program: Any, platform: str) -> str:
    """Returns the text of a program lowered for a platform, under the choices in force."""
    return program.trace().lower(lowering_platforms=(platform,)).as_text()


EXACT = {("HIGHEST", "HIGHEST")}


def roundings(text: str) -> set[tuple[str, str] | None]:
    """Returns the precisions that a lowered program's products request; None for one without.

    Three TensorFloat32 products in place of one count as exact: test_fused.py checks on a GPU that
    they are as exact as float32.
    """
    products = [line for line in text.splitlines() if "stablehlo.dot" in line]
    threefold = r"algorithm = <lhs_precision_type = tf32.*num_primitive_operations = 3,"
    other_products = [line for line in products if not re.search(threefold, line)]
    matches = [re.search(r"precision = \[(\w+), (\w+)\]", line) for line in other_products]
    precisions = {match and (match[1], match[2]) for match in matches}
    return precisions | (EXACT if other_products != products else set())


def wrong(text: str) -> list[str]:
    """Lists what a lowered program has that a float32 program on GPUs and TPUs must not have."""
    rounded = [f"products of precision {precision}" for precision in roundings(text) - EXACT]
    forbidden = {"float64": r"[<x]f64>", "LAPACK": "@lapack"}
    return rounded + [name for name, pattern in forbidden.items() if re.search(pattern, text)]


def as_hopper() -> None:
    """Registers Hopper as Triton's GPU where no GPU is present, as JAX 0.10 takes for granted."""
    import jax

    with suppress(ImportError):
        from jax._src.pallas.triton import gpu_info as gpus

        hopper = partial(gpus.get_gpu_info_from_version, gpus.GpuVersion.H100)
        gpus.registry[jax.devices()[0].device_kind] = hopper


@contextmanager
def said_to_be_here(platform: str) -> Iterator[None]:
    """Makes programs for the present devices choose as on a platform, within a `with` block."""
    import jax

    jax.clear_caches()
    as_hopper()
    with patch.object(jax, "default_backend", lambda: BACKENDS[platform]):
        yield
    jax.clear_caches()


def compiled(
    program: Any, target: str, there: Any, before: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Compiles a program for a target. Returns the row to store, or why compiling failed.

    A row in `before`, keyed by form, is reused: programs of one form differ only in numbers.
    """
    import jax

    from benchmarks import hlo
    from metadyn import planning
    from metadyn.program_cost import GATHERS, exchanged
    from metadyn.sweep_programs import split_constants

    try:
        form, _ = split_constants(program.trace().jaxpr)
        form = f"{form[:16]} {program.turns}"
        if form not in before:
            row = planning.compiled(program, there)
            before[form] = {
                "memory": row.memory,
                "reduced": exchanged(row.text),
                "gathered": exchanged(row.text, GATHERS),
                "launches": hlo.launches(row.text),
                "operations": row.operations,
                "seconds": round(row.seconds, 1),
                "jax": jax.__version__,
            }
            if target == COUNTED:
                before[form]["moved"] = hlo.moved(row.text, program.turns)
    except Exception as error:  # costs only this program
        return {"fails": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    return before[form] | {"calls": program.times, "form": form}


FUSED = {
    f"kernel: {backend}, {hidden} units, products in {label}": (backend, hidden, precision)
    for backend, hidden in (("fused", 64), ("fused_remat", 64), ("fused", 128), ("fused", 256))
    for label, precision in {"float32": "float32", "TensorFloat32": "tensorfloat32"}.items()
}
"""Fused kernels whose registers and bytes are counted: backend, hidden units, JAX's precision."""


def registers(backend: str, hidden: int, precision: str, there: Any) -> dict[str, Any]:
    """Returns what the two kernels of a fused backend need, compiled for a device that is not here.

    "forward" and "backward" are registers per thread and bytes spilled, by NVIDIA's `ptxas`.
    "bytes" are those that an episode reads and writes, forwards and backwards (`hlo.moved`).
    """
    import jax
    from nvidia import cu13 as nvidia  # from the extra `aot`

    from benchmarks import hlo

    assembler = Path(next(iter(nvidia.__path__)), "bin", "ptxas")
    sharding = jax.sharding.SingleDeviceSharding(there.devices[0])
    with jax.default_matmul_precision(precision), tempfile.TemporaryDirectory() as folder:
        with said_to_be_here("cuda"):
            (kernel,) = (p for p in kernels("cuda", hidden, sharding) if p.name == backend)
            options = {**there.options[0], "xla_dump_to": folder}
            executable = kernel.trace().lower().compile(options)
        usage: dict[str, Any] = {"bytes": round(hlo.moved(executable.as_text()) / EPISODES)}
        for path in Path(folder).glob("*.ptx"):
            if match := re.search(r"\.entry (forward|backward)\w*_kernel", path.read_text()):
                command = [assembler, "-v", "-arch=sm_90a", path, "-o", os.devnull]
                report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
                usage[match[1]] = used(report)
    return usage


def used(said: str) -> list[int]:
    """Reads registers per thread, and bytes spilled, from what `ptxas -v` reports of one kernel."""
    (registers,) = re.findall(r"Used (\d+) registers", said)
    (spilled,) = re.findall(r"(\d+) bytes spill stores", said)
    return [int(registers), int(spilled)]


def table(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    """Yields lines of Markdown: a table for each study, with one row per program."""
    from metadyn.planning import number, size

    targets = [target for group in TARGETS.values() for target in group]
    yield HEAD
    if fused_rows := {name: rows[name][COUNTED] for name in FUSED if name in rows}:
        yield ""
        yield "## The fused kernels of the LSTM on one H100"
        yield ""
        yield "Registers of a thread and bytes that it spills, and the bytes that an episode of 20"
        yield "steps, forwards and backwards, reads and writes in a batch of 16,384. Each argument"
        yield "and result of a kernel counts once: what a block reads again should be in caches."
        yield ""
        yield "| kernel of the LSTM | forwards | backwards | bytes an episode |"
        yield "| --- | --- | --- | --- |"
        for name, usage in fused_rows.items():
            cells = ("{}, {} B".format(*usage[kernel]) for kernel in ("forward", "backward"))
            moved_text = f"{usage['bytes']:,}"
            yield f"| {name.partition(': ')[2]} | {' | '.join(cells)} | {moved_text} |"
    for study in sorted({name.partition(": ")[0] for name in rows if name not in FUSED}):
        study_rows = {
            n.partition(": ")[2]: r for n, r in rows.items() if n.startswith(f"{study}: ")
        }
        yield ""
        yield f"## {study}, preset {PRESET}"
        if stored := {name: row for name, row in study_rows.items() if row}:
            yield ""
            yield f"| program | calls | FLOPs | bytes | {' | '.join(targets)} |"
            yield f"| --- | --- | --- | --- |{' --- |' * len(targets)}"
        for name, by_target in stored.items():
            valid = [
                by_target[t] for t in targets if "fails" not in by_target.get(t, {"fails": ""})
            ]
            flops = number(valid[0]["operations"]) if valid else ""
            calls = f"{valid[0]['calls']:,}" if valid else ""
            moved = by_target.get(COUNTED, {}).get("moved")
            moved_text = "–" if moved is None else size(moved)
            cells = [_cell(by_target.get(target)) for target in targets]
            yield f"| {name} | {calls} | {flops} | {moved_text} | {' | '.join(cells)} |"
        if missing := len(study_rows) - len(stored):
            yield ""
            yield f"Not compiled yet: {missing} of {len(study_rows)} programs."


def _cell(row: Mapping[str, Any] | None) -> str:
    from metadyn.planning import size

    if row is None:
        return "–"
    if "fails" in row:
        return row["fails"].replace("|", "/")
    steps = " + ".join(map(str, row["launches"])) or "no loop"
    exchanged = (
        f"; {size(sum(row[kind]))} {kind}" for kind in ("reduced", "gathered") if row.get(kind)
    )
    return f"{size(row['memory'])}; {steps}{''.join(exchanged)}; {row['seconds']:.0f} s"


def lower_all(platform: str, wanted: Callable[[str], Any]) -> int:
    """Lowers programs, prints how long each took, and returns how many are `wrong`."""
    from metadyn.study import study_names

    wrong_count = 0
    sources = {"kernel": partial(kernels, platform)}
    sources |= {study: partial(programs, study) for study in study_names()}
    with said_to_be_here(platform):
        for source, make_programs in sources.items():
            for program in make_programs():
                name, start = f"{source}: {program.name}", time.monotonic()
                if wanted(name):
                    text = lowered(program, platform)
                    problems = wrong(text) if source != "kernel" else []  # kernels request none
                    wrong_count += bool(problems)
                    report = [f"{time.monotonic() - start:.1f} s", *problems]
                    print(f"{platform}, {name}: {', '.join(report)}", flush=True)
    return wrong_count


def compile_all(target: str, wanted: Callable[[str], Any]) -> None:
    """Compiles programs for a target that is not here, and stores each as soon as it is done."""
    import jax

    from metadyn import absent_devices, mesh
    from metadyn.study import study_names

    rows: dict[str, dict[str, Any]] = json.loads(FILE.read_text()) if FILE.exists() else {}
    devices, names = absent_devices.find(target), {*FUSED}
    program_rows = (r for name, r in rows.items() if name not in FUSED)
    stored = [by_target[target] for by_target in program_rows if target in by_target]
    required = {"memory", "reduced", "gathered", "launches", "form", "jax"}
    required |= {"moved"} if target == COUNTED else set()
    current = [row for row in stored if row.keys() >= required and row["jax"] == jax.__version__]
    before = {row["form"]: row for row in current}
    for name in filter(wanted, FUSED if target == COUNTED else ()):
        rows[name] = {target: registers(*FUSED[name], devices)}
        print(f"{target}, {name}: {rows[name][target]}", flush=True)
    with mesh.compiling_for(devices):
        for study in study_names():
            for program in programs(study):
                name = f"{study}: {program.name}"
                names.add(name)
                by_target = rows.setdefault(name, {})
                if not wanted(name):
                    continue
                if (new_row := compiled(program, target, devices, before)) != by_target.get(target):
                    by_target[target] = new_row
                    print(f"{target}, {name}: {new_row}", flush=True)
                    store(rows)
    store({name: row for name, row in rows.items() if name in names})  # the rest no longer exist


def store(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the rows of all programs to compiled.json, and their table to compiled.md."""
    FILE.write_text(json.dumps(rows, indent=1) + "\n")
    FILE.with_suffix(".md").write_text("\n".join(table(rows)) + "\n")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"compile: {message}\n")


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None


def main(given: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    from metadyn import absent_devices
    from metadyn.errors import ConfigError

    parser = _Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--platform", choices=[*TARGETS], help="default: both")
    parser.add_argument("--only", type=_pattern, default=re.compile(""), metavar="REGEX")
    parser.add_argument("--lower", action="store_true", help="lower alone, store nothing")
    arguments = parser.parse_args(given)
    absent_devices.use_cpus_alone()
    wanted = arguments.only.search
    platforms = [arguments.platform] if arguments.platform else [*TARGETS]
    if arguments.lower:
        sys.exit(any([lower_all(platform, wanted) for platform in platforms]))
    try:
        for target in (target for platform in platforms for target in TARGETS[platform]):
            compile_all(target, wanted)
    except ConfigError as error:
        parser.error(str(error).replace("--plan ", ""))


if __name__ == "__main__":
    main()
