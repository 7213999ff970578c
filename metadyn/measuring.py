"""Measures one learner on one set of tasks: the numbers, their labels, the memory they take."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metadyn import inner, mesh, trajectories
from metadyn.base import STRENGTH, Key, Params, Probe, TaskSet
from metadyn.errors import ConfigError, check, check_name, error_context
from metadyn.study import Contender, MeasureConfig

RESERVED = ("time", "closed_form", "learner", "seed", "task", "step", "mode", "outer_step")
"""Names in the labelled arrays that no diagnosis can have."""


def readings(
    tasks: TaskSet,
    contender: Contender,
    params: Params,
    key: Key,
    chunk: int = MeasureConfig.chunk,
    measure: Callable[..., Any] = inner.measure,
) -> dict[str, Any]:
    """Measures a learner on tasks: every reading by name, [seed,] task, time, ....

    `params` are those of a meta-learner, with a leading seed axis; otherwise an empty tuple. Tasks
    are taken `chunk` at a time, which bounds the memory; sets of more tasks share one program.
    `measure` runs it. The closed form of the mode strengths is given beside them, if there is one.
    """
    # One program at a time: several at once on several CPU devices, which share a pool of threads,
    # can wait for each other for ever (seen with jaxlib 0.10.2).
    parts = [
        jax.block_until_ready(measure(*given))
        for given in calls(tasks, contender, params, key, chunk)
    ]
    whole = parts[0]
    if len(parts) > 1:
        axis, size = int(contender.seeded), tasks.size_for(contender.clock)
        whole = jax.tree.map(lambda *leaves: mesh.joined_along(axis, leaves), *parts)
        whole = jax.tree.map(lambda leaf: leaf[:, :size] if axis else leaf[:size], whole)
    has_curve = contender.curve is not None and STRENGTH in tasks.probes
    return whole | ({"closed_form": contender.curve} if has_curve else {})


def calls(
    tasks: TaskSet,
    contender: Contender,
    params: Params,
    key: Key | jax.ShapeDtypeStruct,
    chunk: int,
) -> list[tuple[Any, ...]]:
    """Lists the arguments of `inner.measure` that `readings` calls it with, once for each chunk.

    `params` and `key` may be shapes, to compile the program before there are any.
    """
    size = tasks.size_for(contender.clock)
    check(size >= 1, tasks.option or tasks.name, size, "must be 1 or more")
    check(chunk >= 1, "chunk", chunk, "must be 1 or more")
    count = -(-size // chunk)
    parts = np.split(np.arange(-(-size // count) * count, dtype=np.int32), count)
    times, probes = tuple(contender.times_in(tasks.domain)), tuple(tasks.probes.items())
    fixed = tasks.domain, contender.make, contender.seeded, times, probes
    return [(*fixed, params, tasks.sample, key, part) for part in parts]


def program_key(given: tuple[Any, ...]) -> Hashable:
    """Returns a key: calls of `inner.measure` with equal keys run one compiled program.

    `given` are the arguments of a call. Random keys, which are all of one type, are left out.
    """
    *fixed, params, sample, _, indices = given
    leaves, form = jax.tree.flatten(jax.eval_shape(lambda *each: each, params, sample, indices))
    shapes = [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in leaves]
    return *fixed, form, tuple(shapes)


def described(
    tasks: TaskSet, contender: Contender, place: int = 0, title: str = "", followed: bool = True
) -> dict[str, Any]:
    """Describes what `readings` gives: the axes, coordinates and modes to be stored beside it.

    Raises `ConfigError` unless the probes read what they say.
    """
    lead, probes = ("seed",) if contender.seeded else (), tasks.probes.items()
    found, sizes = _axes(tasks, contender)
    axes = {n: (*lead, "task", "step", *rest) for n, rest in found.items()}
    coords: dict[str, Any] = {"time": ("step", contender.times_in(tasks.domain))}
    coords |= {axis: (axis, range(n)) for axis, n in sizes.items()}
    for name, probe in probes:
        coordinate, axis = (inner.recorded(name, n) for n in (probe.modes.coordinate, "mode"))
        coords[coordinate] = (axis, probe.modes.values)
    if contender.curve is not None and STRENGTH in tasks.probes:
        modes = tasks.probes[STRENGTH].modes.values
        shape, right = np.shape(contender.curve), (len(coords["time"][1]), len(modes))
        fix = f"that of contender {contender.name!r} must be of shape {right}: [time, mode]"
        check(shape == right, "curve", shape, fix)
        axes["closed_form"] = ("step", "mode")
    assert contender.kind is not None
    who = contender.name, contender.label, contender.kind, contender.clock
    floor = float(tasks.domain.loss_floor)
    about = trajectories.About(*who, floor, contender.drawn, place, title, followed)
    return trajectories.describe(about, axes, coords, {name: probe.modes for name, probe in probes})


@functools.cache
def _axes(
    tasks: TaskSet, contender: Contender
) -> tuple[Mapping[str, tuple[str, ...]], Mapping[str, int]]:
    """Axes of each reading, beyond those of seeds, tasks and times; sizes of all but the modes'.

    Axis i of a diagnosis NAME is NAME_i. Traced, not computed. Raises `ConfigError` unless each
    probe reads what it says, of that learner's answers.
    """
    axes: dict[str, tuple[str, ...]] = {"loss": ()}
    sizes: dict[str, int] = {}
    taken, other = {*axes, *RESERVED, *trajectories.FIELDS}, "this name is taken: choose another"
    for name, probe in tasks.probes.items():
        for each in (
            name,
            *(inner.recorded(name, n) for n in (*probe.extras, probe.modes.coordinate)),
        ):
            check(each not in taken, f"probe {name!r}", each, other)
            taken.add(each)

    def trace(key: Key, params: Params, task: Any) -> None:
        with error_context(f"contender {contender.name!r} cannot be run on {tasks.name!r}"):
            learner = contender.make(params)
            state = learner.init(key)
            for name, leaf in (learner.diagnose(state) if learner.diagnose else {}).items():
                check_name(name, "diagnosis")
                check(name not in taken, "diagnose", name, other)
                axes[name] = tuple(f"{name}_{i}" for i in range(leaf.ndim))
                sizes.update(zip(axes[name], leaf.shape, strict=True))
        for name, probe in tasks.probes.items():
            with error_context(f"contender {contender.name!r} cannot answer probe {name!r}"):
                answers = jax.vmap(learner.predict, (None, 0))(state, probe.queries)
            with error_context(f"probe {name!r} on {tasks.name!r} cannot be read"):
                read = probe.read(task, answers)
                shapes = {each: leaf.shape for each, leaf in read.items()}
            _check_read(name, probe, shapes)
            axes[name] = (inner.recorded(name, "mode"),)
            for extra, of in probe.extras.items():
                axes[inner.recorded(name, extra)] = of
                for axis, n in zip(of, shapes[extra], strict=True):
                    fix = f"axis {axis!r} is {sizes.setdefault(axis, n)} long elsewhere: rename it"
                    check(sizes[axis] == n, f"probe {name!r}", n, fix)

    params = weights(contender.learner.init) if contender.seeded else ()
    with error_context(f"tasks of {tasks.name!r} cannot be drawn"):
        task = _task(tasks) if tasks.probes else None
    jax.eval_shape(trace, jax.random.key(0), params, task)
    return axes, sizes


@functools.cache
def weights(init: Callable[[Key], Params]) -> Params:
    """Gives the shapes of the outer parameters that a meta-learner's `init` draws."""
    with error_context(f"{getattr(init, '__qualname__', init)} cannot draw outer parameters"):
        return jax.eval_shape(init, jax.random.key(0))


@functools.cache
def _task(tasks: TaskSet) -> Any:
    """Gives the shapes of a task of a set."""
    return jax.eval_shape(lambda sample, key: sample(key), tasks.sample, jax.random.key(0))


def check_step(tasks: TaskSet, contender: Contender) -> None:
    """Raises `ConfigError` unless a learner can take a step on a set of tasks. Traced, not run."""
    params = weights(contender.learner.init) if contender.seeded else ()

    def trace(key: Key, params: Params, task: Any, state: Any) -> None:
        learner = contender.make(params)
        after, loss = inner.stepped(tasks.domain, learner, task, key, jnp.int32(0), state)
        check(jnp.shape(loss) == (), "loss", f"of shape {jnp.shape(loss)}", "must be one number")
        (leaves, tree), (updated, found) = map(jax.tree.flatten, (state, after))
        right: bool = tree == found  # type: ignore[operator]
        check(right, "update", found, f"must give a state as init does, {tree}")
        for one, other in zip(leaves, updated, strict=True):
            kind, new = ((jnp.shape(leaf), jnp.result_type(leaf).name) for leaf in (one, other))
            check(kind == new, "update", new, f"must give a state as init does, {kind}")

    with error_context(f"contender {contender.name!r} cannot be run on {tasks.name!r}"):
        key = jax.random.key(0)
        # Apart, so that a state of Python's numbers is traced, as it is in the inner loop.
        state = jax.eval_shape(lambda params: contender.make(params).init(key), params)
        jax.eval_shape(trace, key, params, _task(tasks), state)


def _check_read(name: str, probe: Probe, shapes: Mapping[str, tuple[int, ...]]) -> None:
    modes = len(probe.modes.values)
    right = shapes.get("strength") == (modes,)
    fix = f"`read` must give 'strength' of shape ({modes},), as it has so many modes"
    check(right, f"probe {name!r}", sorted(shapes), fix)
    extras = {each: len(axes) for each, axes in probe.extras.items()}
    given = {each: len(shape) for each, shape in shapes.items() if each != "strength"}
    fix = f"`read` gives extras with so many axes, but `extras` names {extras}"
    check(given == extras, f"probe {name!r}", given, fix)


def bytes_needed(tasks: TaskSet, contender: Contender, seeds: int) -> int:
    """Reckons up the memory that the readings of a contender take, from shapes alone."""
    probes = tasks.probes.items()
    axes, sizes = _axes(tasks, contender)
    modes = {inner.recorded(name, "mode"): len(probe.modes.values) for name, probe in probes}
    sizes = {**sizes, "step": 1} | modes
    each = sum(math.prod(sizes[axis] for axis in of_one) for of_one in axes.values())
    times = len(contender.times_in(tasks.domain))
    return 4 * (seeds if contender.seeded else 1) * tasks.size_for(contender.clock) * times * each


def training_bytes(init: Callable[[Key], Params]) -> int:
    """Reckons up what one seed of a meta-learner takes: weights, gradient and two moments."""
    return 4 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights(init)))


def require_memory(
    what: str,
    needed: int,
    field: str,
    value: Any = None,
    split: bool = False,
    change: str = "lower it",
) -> None:
    """Raises `ConfigError`, naming the field to change, unless so many bytes can be had.

    With `split` they are divided over all devices; otherwise each device has a copy of them.
    """
    there = mesh.memory(split)
    gib = 1 << 30
    fix = f"{what} would take {needed / gib:,.1f} GiB of the {there / gib:,.1f} there are; {change}"
    if needed > there:
        said = field if value is None else f"{field} = {value!r}"
        raise ConfigError(f"{said}: {fix}", field, value, fix)
