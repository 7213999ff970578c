"""Plans a run or a sweep without running it (`--plan`): what it needs here or on other devices."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metadyn import absent_devices, inner, mesh, program_cost, sweep
from metadyn.errors import ConfigError
from metadyn.measuring import bytes_needed, calls, program_key
from metadyn.options import as_typed
from metadyn.outer import OuterLoop
from metadyn.progress import Progress
from metadyn.runner import check_memory, check_traced
from metadyn.study import Plan, Study
from metadyn.sweep_programs import ProgramCache, split_constants
from metadyn.sweep_training import OuterLoops, by_program


class Program(NamedTuple):
    """A program that a run compiles."""

    name: str
    trace: Callable[[], Any]
    times: int
    """How often the run calls it."""
    turns: float = 1
    """Mean number of turns of each of its loops of unknown length, for counting FLOPs."""
    option: str = "measure.chunk"
    """The option to change if the program does not fit."""
    hint: str = "lower it"
    """How to change the option."""
    settings: int = 0
    """How many settings of a sweep it trains at once. 0: it does not train, or is of one run."""


def programs(plan: Plan, loop: OuterLoop) -> list[Program]:
    """Lists every program that a run compiles, each once: those that train first, in order."""
    training: list[Program] = []
    count = jax.ShapeDtypeStruct((), jnp.int32)
    for name, meta in plan.trained.items():
        trace = lambda name=name: loop.advance.trace(loop.abstract.only(name), count)
        times = plan.outer.steps * loop.settings[name].updates_per_step
        training.append(Program(f"outer step of {name}", trace, times, option=meta.option("batch")))
    if training:
        training.append(
            Program("initial state", loop.init_on_one_device.trace, 1, option="outer.seeds")
        )
    return [*training, *measuring(plan, loop)]


def measuring(plan: Plan, loop: OuterLoop) -> list[Program]:
    """Lists the programs that measure, each once; measurements of one form share a program."""
    listed: dict[Hashable, Program] = {}
    random_key = jax.eval_shape(lambda: jax.random.key(0))
    for measured in plan.measurements:
        chunks = calls(*measured.arguments(loop.abstract.params, random_key))
        key = program_key(chunks[0])
        times = len(plan.outer.checkpoint_steps) if measured.at_checkpoints else 1
        count = len(chunks) * times
        if key in listed:
            listed[key] = listed[key]._replace(times=listed[key].times + count)
            continue
        trace = lambda chunks=chunks: inner.measure.trace(*chunks[0])
        recorded = measured.contender.times_in(measured.tasks.domain)
        turns = recorded[-1] / len(recorded)
        listed[key] = Program(measured.label, trace, count, turns)
    return list(listed.values())


class Needs(NamedTuple):
    """Operations and memory of a compiled program on each device."""

    program: Program
    operations: float
    """FLOPs of one call."""
    memory: int
    """Bytes (`program_cost.memory`)."""
    text: str
    """The compiled program, as XLA prints it."""
    seconds: float
    """Seconds that tracing and compiling took."""


def compiled(program: Program, there: mesh.TargetDevices | None = None) -> Needs:
    """Compiles a program and counts its cost, for the devices of `there` if that is given.

    Raises `ConfigError`, naming the option to lower, if the compiler finds that it does not fit.
    """
    start, traced = time.monotonic(), program.trace()
    lowered, option_sets = traced.lower(), there.options if there else [{}]
    for options in option_sets:
        try:
            executable = lowered.compile(dict(options) or None)
            break
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                message = "does not fit into memory, according to the compiler"
                raise does_not_fit(program, message) from error
            if options is option_sets[-1]:
                raise
    memory, seconds = program_cost.memory(executable), time.monotonic() - start
    operations = program_cost.operations(traced.jaxpr.jaxpr, program.turns)
    return Needs(program, operations, memory, executable.as_text(), seconds)


class WorkPlan(NamedTuple):
    """Plan of one run, or of the settings of a sweep that are trained side by side."""

    label: str
    programs: Sequence[Program]
    disk: int
    """Bytes that it stores at most."""
    timed: Callable[[], dict[str, float]] | None
    """Measures the seconds that training each meta-learner takes here (`estimated`), if any is."""
    as_typed: Callable[[ConfigError], ConfigError] = lambda error: error
    """Rewords an error so that it names the options as they were typed."""


def plan_run(study: Study, config: Any) -> list[WorkPlan]:
    """Lists what a run compiles and stores. Raises `ConfigError` for what fits on no device."""
    plan = study.plan(config)
    check_memory(plan)
    check_traced(plan)
    loop = OuterLoop(plan.trained, plan.outer, jax.random.key(0))
    timed = lambda: estimated([loop], loop.init(), loop.run)
    stored = disk(plan, loop)
    return [WorkPlan("", programs(plan, loop), stored, timed if plan.trained else None)]


def plan_sweep(
    asked: sweep.Sweep, study: Study, configs: Mapping[int, Any], part: str
) -> list[WorkPlan]:
    """Lists what a part of a sweep compiles and stores, for each group of settings of one form.

    `configs` are keyed by the number of their setting; `part` is the option as typed, such as
    "1/1". Raises `ConfigError` for what fits on no device.
    """
    plans, first = sweep.planned(asked, study, configs), min(configs)
    with asked.naming_errors(first, configs[first]):
        check_traced(plans[first])
    key = jax.random.key(0)
    loops = {i: OuterLoop(plan.trained, plan.outer, key) for i, plan in plans.items()}
    reword = lambda i: lambda error: as_typed(error, configs[i], asked.overrides(i))
    side_by_side = lambda ids: OuterLoops([loops[i] for i in ids])
    return [
        _of_group({i: plans[i] for i in ids}, side_by_side(ids), part, reword(ids[0]))
        for ids in by_program(loops)
    ]


def _of_group(
    plans: Mapping[int, Plan],
    group: OuterLoops,
    part: str,
    reword: Callable[[ConfigError], ConfigError],
) -> WorkPlan:
    """Plans settings of one form. One program trains all of them at once; the programs that start
    and measure them run one setting after another, and settings share those of one form."""
    first = min(plans)
    count, pairs = len(plans), list(zip(plans.values(), group.loops, strict=True))
    plan, listings = plans[first], [programs(*pair) for pair in pairs]
    combined: dict[str, Program] = {}
    for program, name in zip(listings[0], plan.trained, strict=False):
        all_rows = program._replace(trace=partial(group.trace, name), settings=count)
        if count > 1:
            label, hint = f"{program.name} × {count} settings", "use more parts"
            all_rows = all_rows._replace(name=label, option=f"--part {part}", hint=hint)
        combined[name] = all_rows
    for program in (entry for listing in listings for entry in listing[len(plan.trained) :]):
        form, _ = split_constants(program.trace().jaxpr)
        key = f"{form} {program.turns}"
        earlier = combined[key].times if key in combined else 0
        combined[key] = program._replace(times=program.times + earlier)
    stored = sum(disk(*pair) for pair in pairs)
    estimate = lambda: estimated(group.loops, group.start(ProgramCache()), group.run)
    label = f"{count} settings side by side, from setting {first + 1} on"
    timed = estimate if plan.trained else None
    return WorkPlan(label, [*combined.values()], stored, timed, reword)


def report(
    wanted: Callable[[], Sequence[WorkPlan]], device: str, out: str, progress: Progress
) -> None:
    """Prints what each device must hold and compute, and what is stored on the disk of `out`.

    `device` is "here" or a name that `absent_devices.find` knows. Raises `ConfigError`, after
    everything is printed, for what does not fit.
    """
    say, target = progress.say, None if device == "here" else absent_devices.find(device)
    with mesh.compiling_for(target) if target else nullcontext():
        everything = wanted()
        limit = mesh.memory(split=False)
        hardware = f"{mesh.processor()}{', not on this machine' if target else ''}"
        say(f"cost on each device and per call, on {hardware}, with {size(limit)} each:")
        rows: list[tuple[WorkPlan, Needs]] = []
        for planned in everything:
            if planned.label:
                say(planned.label)
            say(LINE.format("", "memory", "FLOPs", "communicated", "calls"))
            with progress.counting("compiling", len(planned.programs)) as show:
                for program in planned.programs:
                    show(program.name)
                    try:
                        row = compiled(program, target)
                    except ConfigError as error:
                        raise planned.as_typed(error) from error
                    say(line(row))
                    rows.append((planned, row))
            training = [row for group, row in rows if group is planned and row.program.settings]
            share = max((row.memory / row.program.settings for row in training), default=0)
            if share:
                count = number(limit // share)
                say(f"settings that would fit into the memory side by side: {count}")
            fits = all(row.memory <= limit for group, row in rows if group is planned)
            if target is None and mesh.backend() == "cpu" and planned.timed and fits:
                with progress.counting("timing", 1) as show:
                    show("outer steps")
                    seconds = planned.timed()
                text = ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items())
                say(f"training takes about {text}, going by a few outer steps; measuring is extra")
    total = sum(row.operations * row.program.times for _, row in rows)
    say(f"{number(total)} FLOPs in all on each device")
    stored = sum(planned.disk for planned in everything)
    folder = Path(out).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    remark = "figures and descriptions are extra"
    say(f"arrays on disk take at most {size(stored)} of the free {size(free)}; {remark}")
    for planned, row in rows:
        if row.memory > limit:
            text = f"would take {size(row.memory)}, more than {size(limit)}"
            raise planned.as_typed(does_not_fit(row.program, text))
    if stored > free:
        raise ConfigError(f"--out {out}: arrays may take {size(stored)}, but {size(free)} is free")


def does_not_fit(program: Program, message: str) -> ConfigError:
    """Makes the error for a program that does not fit, with the option to change."""
    hint = f"{program.name} {message}; {program.hint}"
    return ConfigError(f"{program.option}: {hint}", program.option, None, hint)


LINE = "{:44} {:>11} {:>9} {:>13} {:>9}"


def line(row: Needs) -> str:
    """Formats a program's cost as a line of the table that `report` prints."""
    exchanged = program_cost.exchanged(row.text, f"all-reduce|{program_cost.GATHERS}")
    communicated, times = size(sum(exchanged)) if exchanged else "-", f"{row.program.times:,}"
    cells = size(row.memory), number(row.operations), communicated, times
    return LINE.format(row.program.name[:44], *cells)


def disk(plan: Plan, loop: OuterLoop) -> int:
    """Counts the bytes that a run stores at most: uncompressed, with its two latest states."""
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(loop.abstract))
    checkpoints = len(plan.outer.checkpoint_steps)
    total = (checkpoints + 2) * state_bytes if plan.trained else 0
    for measured in plan.measurements:
        times = checkpoints if measured.at_checkpoints else 1
        total += times * bytes_needed(measured.tasks, measured.contender, plan.outer.seeds)
    return total


def estimated(
    loops: Sequence[OuterLoop], state: Any, run: Callable[[Any, int], Iterator[tuple[Any, Any]]]
) -> dict[str, float]:
    """Estimates the seconds that training each meta-learner would take here, from timed steps.

    It times the third dispatch. The first one compiles; the second one gives the pace, which makes
    the third as long as it is in training (`OuterLoop.dispatched`). `run(state, step)` yields
    (state, metrics) after each dispatch up to an outer step.
    """
    first, steps = loops[0], loops[0].config.steps
    for step in range(1, min(3, steps)):
        state, _ = next(run(state, step))
    for loop in loops:
        loop.seconds = dict.fromkeys(loop.trained, 0.0)
    next(run(state, steps))
    seconds = {name: sum(loop.seconds[name] for loop in loops) for name in first.trained}
    total = sum(seconds.values())
    return {name: steps * first.pace * part / total for name, part in seconds.items()}


def size(count: float) -> str:
    """Formats a number of bytes, such as 1.5 GiB."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def number(count: float) -> str:
    """Formats a number with a decimal prefix, such as 1.5 T."""
    return _scaled(count, 1000, ("", "k", "M", "G", "T", "P", "E", "Z"))


def _scaled(count: float, base: int, units: tuple[str, ...]) -> str:
    power = min(int(math.log(max(count, 1), base)), len(units) - 1)
    return f"{count / base**power:,.4g} {units[power]}".rstrip()
