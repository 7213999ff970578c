"""What a run or a sweep would need, here or on devices elsewhere, without running it: `--plan`."""

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
from metadyn.sweep_rows import Rows, by_program


class Program(NamedTuple):
    """A program that a run compiles."""

    name: str
    trace: Callable[[], Any]
    times: int
    """How often the run calls it."""
    turns: float = 1
    """Mean number of turns of each of its loops of unknown length, by which FLOPs are counted."""
    option: str = "measure.chunk"
    """What to change if it does not fit."""
    fix: str = "lower it"
    """How to change it."""
    settings: int = 0
    """How many settings of a sweep it trains at once. 0: it measures, or is of a single run."""


def programs(plan: Plan, loop: OuterLoop) -> list[Program]:
    """Lists every program of a plan's run, each once: first those that train, in their order."""
    found: list[Program] = []
    one = jax.ShapeDtypeStruct((), jnp.int32)
    for name, each in plan.trained.items():
        trace = lambda name=name: loop.advance.trace(loop.abstract.only(name), one)
        times = plan.outer.steps * loop.settings[name].updates_per_step
        found.append(Program(f"outer step of {name}", trace, times, option=each.option("batch")))
    if found:
        found.append(Program("initial state", loop.starting.trace, 1, option="outer.seeds"))
    return [*found, *measuring(plan, loop)]


def measuring(plan: Plan, loop: OuterLoop) -> list[Program]:
    """Lists the programs that measure, each once, whatever it is of."""
    found: dict[Hashable, Program] = {}
    key = jax.eval_shape(lambda: jax.random.key(0))
    for each in plan.every:
        given = calls(*each.arguments(loop.abstract.params, key))
        same = program_key(given[0])
        called = len(given) * (len(plan.outer.checkpoint_steps) if each.at_checkpoints else 1)
        if same in found:
            found[same] = found[same]._replace(times=found[same].times + called)
            continue
        trace = lambda given=given: inner.measure.trace(*given[0])
        times = each.contender.times_in(each.tasks.domain)
        turns = times[-1] / len(times)
        found[same] = Program(each.called, trace, called, turns)
    return list(found.values())


class Needs(NamedTuple):
    """What a program takes on each device, once it is compiled."""

    program: Program
    operations: float
    """Of one call."""
    account: program_cost.Account
    seconds: float
    """Of compiling."""
    text: str = ""
    """What it was compiled to, in XLA's words."""


def compiled(program: Program, there: mesh.TargetDevices | None = None) -> Needs:
    """Compiles a program, for devices elsewhere if they stand in.

    Raises `ConfigError`, naming the option to lower, if its compiler finds that it cannot fit.
    """
    start, traced = time.monotonic(), program.trace()
    lowered, ways = traced.lower(), there.options if there else [{}]
    for options in ways:
        try:
            made = lowered.compile(dict(options) or None)
            break
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                said = "does not fit into the memory, says its compiler"
                raise refused(program, said) from error
            if options is ways[-1]:
                raise
    account, taken = program_cost.account(made), time.monotonic() - start
    operations = program_cost.operations_of(traced.jaxpr.jaxpr, program.turns)
    return Needs(program, operations, account, taken, made.as_text())


class Planned(NamedTuple):
    """What is to be run as a whole: a run, or settings of a sweep that are trained side by side."""

    called: str
    programs: Sequence[Program]
    disk: int
    """Bytes."""
    timed: Callable[[], dict[str, float]] | None
    """Seconds that training each meta-learner would take here (`estimated`), if any is trained."""
    as_typed: Callable[[ConfigError], ConfigError] = lambda error: error
    """Says in the words of the command line why it is refused."""


def of_run(study: Study, config: Any) -> list[Planned]:
    """Lists what a run compiles and stores. Raises `ConfigError` for what fits on no device."""
    plan = study.plan(config)
    check_memory(plan)
    check_traced(plan)
    loop = OuterLoop(plan.trained, plan.outer, jax.random.key(0))
    timed = lambda: estimated([loop], loop.init(), loop.run)
    needed = disk(plan, loop)
    return [Planned("", programs(plan, loop), needed, timed if plan.trained else None)]


def of_sweep(
    asked: sweep.Sweep, study: Study, configs: Mapping[int, Any], part: str
) -> list[Planned]:
    """Lists what a part of a sweep compiles and stores, by groups of settings of one form.

    `configs` are by the settings' numbers; `part` is "1/1", as it is typed. Raises `ConfigError`
    for what fits on no device.
    """
    plans, first = sweep.planned(asked, study, configs), min(configs)
    with asked.naming(first, configs[first]):
        check_traced(plans[first])
    key = jax.random.key(0)
    loops = {i: OuterLoop(plan.trained, plan.outer, key) for i, plan in plans.items()}
    typed = lambda i: lambda error: as_typed(error, configs[i], asked.overrides(i))
    return [
        _of_group({i: plans[i] for i in of}, Rows([loops[i] for i in of]), part, typed(of[0]))
        for of in by_program(loops)
    ]


def _of_group(
    plans: Mapping[int, Plan], rows: Rows, part: str, typed: Callable[[ConfigError], ConfigError]
) -> Planned:
    """Settings of one form. They are trained at once, and begun and measured one after another by
    programs that those of one form share."""
    first = min(plans)
    count, several = len(plans), list(zip(plans.values(), rows.loops, strict=True))
    plan, each = plans[first], [programs(*pair) for pair in several]
    found: dict[str, Program] = {}
    for program, name in zip(each[0], plan.trained, strict=False):
        all_rows = program._replace(trace=partial(rows.trace, name), settings=count)
        if count > 1:
            called, fix = f"{program.name} × {count} settings", "divide them into more parts"
            all_rows = all_rows._replace(name=called, option=f"--part {part}", fix=fix)
        found[name] = all_rows
    for program in (other for of_one in each for other in of_one[len(plan.trained) :]):
        form, _ = split_constants(program.trace().jaxpr)
        place = f"{form} {program.turns}"
        before = found[place].times if place in found else 0
        found[place] = program._replace(times=program.times + before)
    needed = sum(disk(*pair) for pair in several)
    timed = lambda: estimated(rows.loops, rows.start(ProgramCache()), rows.run)
    called = f"{count} settings side by side, from setting {first + 1} on"
    used = timed if plan.trained else None
    return Planned(called, [*found.values()], needed, used, typed)


def report(
    wanted: Callable[[], Sequence[Planned]], device: str, out: str, progress: Progress
) -> None:
    """Says what is needed of each device, and of the disk that DIR is on.

    Raises `ConfigError`, once all is said, for what cannot fit.
    """
    say, there = progress.say, None if device == "here" else absent_devices.find(device)
    with mesh.compiling_for(there) if there else nullcontext():
        found = wanted()
        limit = mesh.memory(split=False)
        where = f"{mesh.processor()}, {size(limit)} for each"
        say(f"on {where}{', not here' if there else ''}; of each device and call:")
        rows: list[tuple[Planned, Needs]] = []
        for planned in found:
            if planned.called:
                say(planned.called)
            say(LINE.format("", "memory", "FLOPs", "communicated", "calls"))
            with progress.counting("compiling", len(planned.programs)) as show:
                for program in planned.programs:
                    show(program.name)
                    try:
                        row = compiled(program, there)
                    except ConfigError as error:
                        raise planned.as_typed(error) from error
                    say(line(row))
                    rows.append((planned, row))
            trained = [row for of, row in rows if of is planned and row.program.settings]
            most = max((row.account.memory / row.program.settings for row in trained), default=0)
            if most:
                many = number(limit // most)
                say(f"settings that would fit into the memory side by side: {many}")
            if there is None and mesh.backend() == "cpu" and planned.timed:
                with progress.counting("timing", 1) as show:
                    show("outer steps")
                    timed = planned.timed()
                said = ", ".join(f"{name} {each:.3g} s" for name, each in timed.items())
                say(f"training takes about {said}, by a few outer steps; measuring comes beside it")
    total = sum(row.operations * row.program.times for _, row in rows)
    say(f"{number(total)} FLOPs in all on each device")
    needed = sum(planned.disk for planned in found)
    at = Path(out).absolute()
    free = shutil.disk_usage(next(each for each in (at, *at.parents) if each.exists())).free
    beside = "figures and descriptions come beside them"
    say(f"on disk arrays take at most {size(needed)}, of {size(free)} that are free; {beside}")
    for planned, row in rows:
        if row.account.memory > limit:
            said = f"would take {size(row.account.memory)} of {size(limit)}"
            raise planned.as_typed(refused(row.program, said))
    if needed > free:
        raise ConfigError(f"--out {out}: it may take {size(needed)} of {size(free)} there")


def refused(program: Program, said: str) -> ConfigError:
    """Says of a program that it cannot fit, and what to change."""
    said = f"{program.name} {said}; {program.fix}"
    return ConfigError(f"{program.option}: {said}", program.option, None, said)


LINE = "{:44} {:>11} {:>9} {:>13} {:>9}"


def line(row: Needs) -> str:
    """Writes a program in a line, as `report` says it."""
    account, times = row.account, f"{row.program.times:,}"
    communicated = size(sum(moved)) if (moved := account.reduced + account.gathered) else "-"
    cells = size(account.memory), number(row.operations), communicated, times
    return LINE.format(row.program.name[:44], *cells)


def disk(plan: Plan, loop: OuterLoop) -> int:
    """Counts the bytes that a run stores at most: before compression, with two later states."""
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(loop.abstract))
    checkpoints = len(plan.outer.checkpoint_steps)
    total = (checkpoints + 2) * state if plan.trained else 0
    for each in plan.every:
        times = checkpoints if each.at_checkpoints else 1
        total += times * bytes_needed(each.tasks, each.contender, plan.outer.seeds)
    return total


def estimated(
    loops: Sequence[OuterLoop], state: Any, run: Callable[[Any, int], Iterator[tuple[Any, Any]]]
) -> dict[str, float]:
    """Estimates the seconds that training each meta-learner would take here, from timed steps.

    Timed is the third dispatch: the first compiles, and the second gives the pace, by which the
    third is as long as it would be (`OuterLoop.dispatched`). `run(state, step)` yields the state,
    and metrics, after each dispatch up to an outer step.
    """
    first, steps = loops[0], loops[0].config.steps
    for step in range(1, min(3, steps)):
        state, _ = next(run(state, step))
    for loop in loops:
        loop.seconds = dict.fromkeys(loop.trained, 0.0)
    next(run(state, steps))
    timed = {name: sum(loop.seconds[name] for loop in loops) for name in first.trained}
    return {name: steps * first.pace * each / sum(timed.values()) for name, each in timed.items()}


def size(count: float) -> str:
    """Writes bytes, as 1.5 GiB."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def number(count: float) -> str:
    """Writes a number of operations, as 1.5 T."""
    return _scaled(count, 1000, ("", "k", "M", "G", "T", "P", "E", "Z"))


def _scaled(count: float, base: int, units: tuple[str, ...]) -> str:
    power = min(int(math.log(max(count, 1), base)), len(units) - 1)
    return f"{count / base**power:,.4g} {units[power]}".rstrip()
