"""Compiles the programs of every study's `paper` preset for GPUs and TPUs that are not here.

    python -m benchmarks.compile [--platform cuda|tpu] [--only REGEX] [--lower]

Needs the extra `aot`, some 5 GB of XLA's compilers: `pip install -e '.[aot]' -c constraints.txt`.
Prints each program as it is compiled, and stores it in compiled.json and the table compiled.md
beside this file. A program is compiled if it, or one that differs from it in numbers alone, is not
there already as it is now: what the code or JAX has changed since is compiled anew. REGEX is
searched for in "STUDY: PROGRAM", such as "linear_regression: outer step". With `--lower` programs
are lowered alone, which needs no compiler and stores nothing, and so is every backend of the LSTM
kernel ("kernel: BACKEND"): CI does it. It ends with exit code 1 if a study's program has a product
that is not of full float32, or what GPUs and TPUs lack: float64, or LAPACK's calls.

For one H100 the bytes that a call reads and writes are counted too, and NVIDIA's `ptxas` says how
many registers a thread of each fused LSTM kernel takes, and how many bytes it spills ("kernel:
fused, ..."). XLA's text of a program for TPUs says neither how often loops turn nor, plainly, what
stays in the chip's own memory.
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
"""The devices for which bytes and registers are counted."""
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
    """Every program of a study, for the devices that stand in or are said to be here."""
    import jax

    from metadyn import planning
    from metadyn.outer import OuterLoop
    from metadyn.study import load_study

    found = load_study(study)
    plan = found.plan(found.presets[preset])
    loop = OuterLoop(plan.trained, plan.outer, jax.random.key(0))
    yield from planning.programs(plan, loop)


def kernels(platform: str, hidden: int = 64, sharding: Any = None) -> Iterator[Any]:
    """The gradient through every backend of the LSTM kernel that a platform has."""
    import jax
    import jax.numpy as jnp

    from metadyn.kernels.lstm import Backend, LSTMWeights, lstm

    inputs, episodes = 6, 128
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    weights = LSTMWeights(array(4 * hidden, inputs), array(4 * hidden, hidden), array(4 * hidden))
    for backend in get_args(Backend):
        if backend != "fused" or platform == "cuda":
            loss = lambda weights, x, backend=backend: jnp.sum(lstm(weights, x, backend))
            gradient = jax.jit(jax.grad(loss, (0, 1)))
            trace = partial(gradient.trace, weights, array(20, inputs, episodes))
            yield SimpleNamespace(name=backend, trace=trace)


def lowered(program: Any, platform: str) -> str:
    """The text of a program for a platform, with the choices that are made there."""
    return program.trace().lower(lowering_platforms=(platform,)).as_text()


EXACT = {("HIGHEST", "HIGHEST")}


def roundings(text: str) -> set[tuple[str, str] | None]:
    """The precisions that the products of a lowered program ask for; None, if one asks for none.

    Three products in TensorFloat32 in the place of one are as exact as float32: test_fused.py sees
    it on a GPU.
    """
    products = [line for line in text.splitlines() if "stablehlo.dot" in line]
    threefold = r"algorithm = <lhs_precision_type = tf32.*num_primitive_operations = 3,"
    single = [line for line in products if not re.search(threefold, line)]
    found = [re.search(r"precision = \[(\w+), (\w+)\]", line) for line in single]
    asked = {each and (each[1], each[2]) for each in found}
    return asked | (EXACT if single != products else set())


def wrong(text: str) -> list[str]:
    """What a lowered program has that one of float32 on GPUs and TPUs must not have."""
    rounded = [f"products of precision {each}" for each in roundings(text) - EXACT]
    lacking = {"float64": r"[<x]f64>", "LAPACK": "@lapack"}
    return rounded + [name for name, form in lacking.items() if re.search(form, text)]


def as_hopper() -> None:
    """Says that Triton kernels are for Hopper if no GPU is here, as JAX 0.10 takes for granted."""
    import jax

    with suppress(ImportError):
        from jax._src.pallas.triton import gpu_info as gpus

        hopper = partial(gpus.get_gpu_info_from_version, gpus.GpuVersion.H100)
        gpus.registry[jax.devices()[0].device_kind] = hopper


@contextmanager
def said_to_be_here(platform: str) -> Iterator[None]:
    """Makes the choices that are made on a platform, for the devices that are here."""
    import jax

    jax.clear_caches()
    as_hopper()
    with patch.object(jax, "default_backend", lambda: BACKENDS[platform]):
        yield
    jax.clear_caches()


def compiled(
    program: Any, target: str, there: Any, before: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """What is stored of a program.

    What was compiled `before`, by its form, is not compiled again: programs of one form differ in
    numbers alone.
    """
    import jax

    from benchmarks import hlo
    from metadyn import planning
    from metadyn.sweep_programs import split_constants

    try:
        form, _ = split_constants(program.trace().jaxpr)
        form = f"{form[:16]} {program.turns}"
        if form not in before:
            row = planning.compiled(program, there)
            before[form] = row.account._asdict() | {
                "launches": hlo.launches(row.text),
                "operations": row.operations,
                "seconds": round(row.seconds, 1),
                "jax": jax.__version__,
            }
            if target == COUNTED:
                before[form]["moved"] = hlo.moved(row.text, program.turns)
    except Exception as error:  # costs this program alone
        return {"fails": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    return before[form] | {"calls": program.times, "form": form}


FUSED = {
    f"kernel: fused, {hidden} units, products in {called}": (hidden, precision)
    for hidden in (64, 128, 256)
    for called, precision in {"float32": "float32", "TensorFloat32": "tensorfloat32"}.items()
}
"""The fused kernels whose registers are counted: hidden units, and JAX's name of a precision."""


def registers(hidden: int, precision: str, there: Any) -> dict[str, list[int]]:
    """Registers of a thread of each fused kernel, and bytes that it spills, by NVIDIA's `ptxas`."""
    import jax
    from nvidia import cu13 as nvidia  # it comes with the extra `aot`

    assembler, counted = Path(next(iter(nvidia.__path__)), "bin", "ptxas"), {}
    on = jax.sharding.SingleDeviceSharding(there.devices[0])
    with jax.default_matmul_precision(precision), tempfile.TemporaryDirectory() as folder:
        with said_to_be_here("cuda"):
            (fused,) = (each for each in kernels("cuda", hidden, on) if each.name == "fused")
            fused.trace().lower().compile({**there.options[0], "xla_dump_to": folder})
        for path in Path(folder).glob("*.ptx"):
            if kernel := re.search(r"\.entry (forward|backward)_kernel", path.read_text()):
                command = [assembler, "-v", "-arch=sm_90a", path, "-o", os.devnull]
                said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
                counted[kernel[1]] = used(said)
    return counted


def used(said: str) -> list[int]:
    """Registers of a thread and bytes that it spills, of what `ptxas -v` said of one kernel."""
    (registers,) = re.findall(r"Used (\d+) registers", said)
    (spilled,) = re.findall(r"(\d+) bytes spill stores", said)
    return [int(registers), int(spilled)]


def table(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    """Lines of Markdown: a table for each study, in which each program is a line."""
    from metadyn.planning import number, size

    targets = [target for each in TARGETS.values() for target in each]
    yield HEAD
    if counted := {name: rows[name][COUNTED] for name in FUSED if name in rows}:
        yield ""
        yield "## Registers of a thread, and bytes that it spills, on one H100"
        yield ""
        yield "| kernel of the LSTM | forwards | backwards |"
        yield "| --- | --- | --- |"
        for name, of in counted.items():
            cells = ("{}, {} B".format(*of[kernel]) for kernel in ("forward", "backward"))
            yield f"| {name.partition(': ')[2]} | {' | '.join(cells)} |"
    for study in sorted({name.partition(": ")[0] for name in rows if name not in FUSED}):
        mine = {n.partition(": ")[2]: of for n, of in rows.items() if n.startswith(f"{study}: ")}
        yield ""
        yield f"## {study}, preset {PRESET}"
        if some := {name: found for name, found in mine.items() if found}:
            yield ""
            yield f"| program | calls | FLOPs | bytes | {' | '.join(targets)} |"
            yield f"| --- | --- | --- | --- |{' --- |' * len(targets)}"
        for name, found in some.items():
            right = [found[t] for t in targets if "fails" not in found.get(t, {"fails": ""})]
            flops = number(right[0]["operations"]) if right else ""
            calls = f"{right[0]['calls']:,}" if right else ""
            moved = found.get(COUNTED, {}).get("moved")
            read = "–" if moved is None else size(moved)
            cells = [_cell(found.get(target)) for target in targets]
            yield f"| {name} | {calls} | {flops} | {read} | {' | '.join(cells)} |"
        if left := len(mine) - len(some):
            yield ""
            yield f"Not compiled yet: {left} of {len(mine)} programs."


def _cell(row: Mapping[str, Any] | None) -> str:
    from metadyn.planning import size

    if row is None:
        return "–"
    if "fails" in row:
        return row["fails"].replace("|", "/")
    steps = " + ".join(map(str, row["launches"])) or "no loop"
    moved = (
        f"; {size(sum(row[each]))} {each}" for each in ("reduced", "gathered") if row.get(each)
    )
    return f"{size(row['memory'])}; {steps}{''.join(moved)}; {row['seconds']:.0f} s"


def lower_all(platform: str, wanted: Callable[[str], Any]) -> int:
    """Lowers programs for a platform, says how long each took, and returns how many are `wrong`."""
    from metadyn.study import study_names

    bad = 0
    made = {"kernel": partial(kernels, platform)}
    made |= {study: partial(programs, study) for study in study_names()}
    with said_to_be_here(platform):
        for of, each in made.items():
            for program in each():
                name, start = f"{of}: {program.name}", time.monotonic()
                if wanted(name):
                    text = lowered(program, platform)
                    found = wrong(text) if of != "kernel" else []  # a kernel alone asks for nothing
                    bad += bool(found)
                    said = [f"{time.monotonic() - start:.1f} s", *found]
                    print(f"{platform}, {name}: {', '.join(said)}", flush=True)
    return bad


def compile_all(target: str, wanted: Callable[[str], Any]) -> None:
    """Compiles programs for devices elsewhere, and stores each as it is done."""
    import jax

    from metadyn import absent_devices, mesh, program_cost
    from metadyn.study import study_names

    rows: dict[str, dict[str, Any]] = json.loads(FILE.read_text()) if FILE.exists() else {}
    there, names = absent_devices.find(target), {*FUSED}
    programs_of = (found for name, found in rows.items() if name not in FUSED)
    stored = [found[target] for found in programs_of if target in found]
    whole = {*program_cost.Account._fields, "launches", "form", "jax"}
    whole |= {"moved"} if target == COUNTED else set()
    now = [each for each in stored if each.keys() >= whole and each["jax"] == jax.__version__]
    before = {each["form"]: each for each in now}
    for name in filter(wanted, FUSED if target == COUNTED else ()):
        rows[name] = {target: registers(*FUSED[name], there)}
        print(f"{target}, {name}: {rows[name][target]}", flush=True)
    with mesh.compiling_for(there):
        for study in study_names():
            for program in programs(study):
                name = f"{study}: {program.name}"
                names.add(name)
                found = rows.setdefault(name, {})
                if not wanted(name):
                    continue
                if (made := compiled(program, target, there, before)) != found.get(target):
                    found[target] = made
                    print(f"{target}, {name}: {made}", flush=True)
                    store(rows)
    store({name: found for name, found in rows.items() if name in names})  # the others are gone


def store(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes what is known of the programs, and the table of it."""
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
    """The command line."""
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
