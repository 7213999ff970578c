"""What a run would need, here or on devices elsewhere, without running it: `metadyn run --plan`."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metadyn import cost, elsewhere, inner, mesh
from metadyn.errors import ConfigError
from metadyn.measuring import bytes_needed, calls
from metadyn.outer import OuterLoop
from metadyn.runner import check_memory
from metadyn.study import Plan, Study

HERE = "here"
SECONDS = 2.0  # for which outer steps are timed, at least: our choice


class Program(NamedTuple):
    """A program that a run compiles."""

    name: str
    trace: Callable[[], Any]
    times: int
    """How often the run calls it."""
    turns: float = 1
    """Of its loops of unknown length, in one call."""
    option: str = "measure.chunk"
    """What to lower if it does not fit."""


def programs(plan: Plan, loop: OuterLoop) -> list[Program]:
    """Lists every program of a plan's run, each once, whatever it is of."""
    one = jax.ShapeDtypeStruct((), jnp.int32)
    found: dict[Any, Program] = {}
    for name, each in plan.trained.items():
        trace = lambda name=name: loop.advance.trace(loop.abstract.only(name), one)
        own = each.own is not None and each.own.batch != plan.outer.batch
        option = "outer_batch" if own else "outer.batch"
        found[name] = Program(f"outer step of {name}", trace, plan.outer.steps, option=option)
    key, chunk = jax.eval_shape(lambda: jax.random.key(0)), plan.comparisons[0].measure.chunk
    for part, tasks, contender in plan.every:
        params = loop.abstract.params.get((contender.of or contender.name) + part.suffix, ())
        given = calls(tasks, contender, params, key, chunk)
        domain, make, _, seeded, sample, argument, _, indices, times, *probed = given[0]
        shapes = [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(argument)]
        same = (domain, make, seeded, sample, str(shapes), len(indices), times, *probed)
        watched = contender.trained and tasks in part.watched
        called = len(given) * (len(plan.outer.checkpoint_steps) if watched else 1)
        if same in found:
            found[same] = found[same]._replace(times=found[same].times + called)
            continue
        trace = lambda given=given: inner.measure.trace(*given[0])
        turns = times[-1] / (len(times) - 1)
        found[same] = Program(f"{contender.name} on {tasks.name}", trace, called, turns)
    return list(found.values())


class Row(NamedTuple):
    """What a program takes on each device, once it is compiled."""

    program: Program
    operations: float
    """Of one call."""
    account: cost.Account
    seconds: float
    """Of compiling."""


def compiled(program: Program, there: mesh.Elsewhere | None = None) -> Row:
    """Compiles a program, for devices elsewhere if they stand in.

    Raises `ConfigError`, naming the option to lower, if its compiler finds that it cannot fit.
    """
    start, traced = time.monotonic(), program.trace()
    try:
        made = traced.lower().compile(dict(there.options) if there else None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = f"{program.name} does not fit into the memory, says its compiler; lower it"
        raise ConfigError(f"{program.option}: {said}", program.option, None, said) from error
    account, taken = cost.account(made), time.monotonic() - start
    operations = cost.operations_of(traced.jaxpr.jaxpr, program.turns)
    return Row(program, operations, account, taken)


def report(study: Study, config: Any, device: str, out: str, say: Callable[[str], None]) -> None:
    """Says what a run would need of each device, and of the disk that DIR is on.

    Raises `ConfigError`, once all is said, for what cannot fit.
    """
    there = None if device == HERE else elsewhere.find(device)
    with mesh.standing_in(there) if there else nullcontext():
        plan = study.plan(config)
        check_memory(plan)
        loop = OuterLoop(plan.trained, plan.outer, jax.random.key(0))
        limit = mesh.memory(split=False)
        where = f"{mesh.processor()}, {size(limit)} for each"
        say(f"on {where}{', not here' if there else ''}; of each device and call:")
        say(LINE.format("", "memory", "FLOPs", "all-reduced", "calls"))
        total, over = 0.0, []
        for program in programs(plan, loop):
            row = compiled(program, there)
            total += row.operations * program.times
            over += [row] if row.account.memory > limit else []
            say(line(row))
        say(f"{number(total)} FLOPs in all on each device")
        needed, free = disk(plan, loop), shutil.disk_usage(_existing(out)).free
        say(f"on disk at most {size(needed)}, of {size(free)} that are free")
        if there is None and mesh.backend() == "cpu" and plan.trained:
            said = ", ".join(f"{name} {each:.3g} s" for name, each in estimated(loop).items())
            say(f"training takes about {said}, by a few outer steps; measuring comes beside it")
    for row in over:
        said = (
            f"{row.program.name} would take {size(row.account.memory)} of {size(limit)}; lower it"
        )
        raise ConfigError(f"{row.program.option}: {said}", row.program.option, None, said)
    if needed > free:
        raise ConfigError(f"--out {out}: the run may take {size(needed)} of {size(free)} there")


LINE = "{:44} {:>11} {:>9} {:>13} {:>9}"


def line(row: Row) -> str:
    """A program in a line, as `report` says it."""
    account, reduced = row.account, size(sum(row.account.reduced)) if row.account.reduced else "-"
    cells = size(account.memory), number(row.operations), reduced, f"{row.program.times:,}"
    return LINE.format(row.program.name[:44], *cells)


def disk(plan: Plan, loop: OuterLoop) -> int:
    """Bytes that a run stores at most, which is before compression."""
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(loop.abstract))
    checkpoints = len(plan.outer.checkpoint_steps)
    total = checkpoints * state if plan.trained else 0
    for part, tasks, contender in plan.every:
        watched = contender.trained and tasks in part.watched
        times = checkpoints if watched else 1
        total += times * bytes_needed(tasks, contender, plan.outer.seeds)
    return total


def estimated(loop: OuterLoop) -> dict[str, float]:
    """Seconds that training each meta-learner would take here, from steps that are timed.

    So many that they take `SECONDS`, or one dispatch; the first, in which all is compiled, is not.
    """
    done, count, end = 1, 1, loop.config.steps
    ((state, _),) = loop.run(loop.init(), [done])
    while True:
        count = min(count, end - done)
        loop.seconds = dict.fromkeys(loop.trained, 0.0)
        for reached, _ in loop.run(state, [done + count]):
            state, done = reached, done + count
        timed = sum(loop.seconds.values())
        if timed > SECONDS or count == loop.config.dispatch or done == end:
            return {name: end * each / max(count, 1) for name, each in loop.seconds.items()}
        count = min(2 * count, loop.config.dispatch)


def _existing(path: str) -> Path:
    """The folder nearest to a path that there is already."""
    return next(
        each for each in (Path(path).absolute(), *Path(path).absolute().parents) if each.exists()
    )


def size(count: float) -> str:
    """Bytes, as 1.5 GiB."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def number(count: float) -> str:
    """Operations, as 1.5 T."""
    return _scaled(count, 1000, ("", "k", "M", "G", "T", "P", "E", "Z"))


def _scaled(count: float, base: int, units: tuple[str, ...]) -> str:
    power = min(int(math.log(max(count, 1), base)), len(units) - 1)
    return f"{count / base**power:,.4g} {units[power]}".rstrip()
