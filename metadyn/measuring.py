"""Measures one learner on one task set: makes the arrays and labels, and computes their memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metadyn import inner, mesh, trajectories
from metadyn.base import STRENGTH, Key, Params, Probe, TaskSet, weight_shapes
from metadyn.errors import check, check_name, error_context
from metadyn.study import Contender, MeasureConfig

RESERVED = ("time", "closed_form", "learner", "seed", "task", "step", "mode", "outer_step")
"""Names of labelled arrays and axes that no diagnosis or probe can have."""


def readings(
    tasks: TaskSet,
    contender: Contender,
    params: Params,
    key: Key,
    chunk: int = MeasureConfig.chunk,
    measure: Callable[..., Any] = inner.measure,
) -> dict[str, Any]:
    """Measures a learner on a task set. Returns its readings, [seed,] task, time, ..., by name.

    `params` are those of a meta-learner, with a leading seed axis, or else an empty tuple. At most
    `chunk` tasks are measured at a time, which bounds the memory. All chunks share one program,
    which `measure` runs. The closed form of the mode strengths is added if the contender has one.
    """
    # One program at a time: several at once on several CPU devices, which share a pool of threads,
    # can wait for each other for ever (seen with jaxlib 0.10.2).
    chunks = [
        jax.block_until_ready(measure(*arguments))
        for arguments in calls(tasks, contender, params, key, chunk)
    ]
    arrays = chunks[0]
    if len(chunks) > 1:
        axis, size = int(contender.seeded), tasks.size_for(contender.clock)
        arrays = jax.tree.map(lambda *leaves: mesh.joined_along(axis, leaves), *chunks)
        arrays = jax.tree.map(lambda leaf: leaf[:, :size] if axis else leaf[:size], arrays)
    has_curve = contender.curve is not None and STRENGTH in tasks.probes
    return arrays | ({"closed_form": contender.curve} if has_curve else {})


def calls(
    tasks: TaskSet,
    contender: Contender,
    params: Params,
    key: Key | jax.ShapeDtypeStruct,
    chunk: int,
) -> list[tuple[Any, ...]]:
    """Returns the arguments of the calls of `inner.measure` by `readings`, one for each chunk.

    `params` and `key` may be shapes, to compile the program before values exist. The last chunk is
    padded with further tasks to the size of the others.
    """
    size = tasks.size_for(contender.clock)
    count = -(-size // chunk)
    chunks = np.split(np.arange(-(-size // count) * count, dtype=np.int32), count)
    times, probes = tuple(contender.times_in(tasks.domain)), tuple(tasks.probes.items())
    static = tasks.domain, contender.make, times, probes
    return [(*static, params, tasks.sample, key, indices) for indices in chunks]


def program_key(given: tuple[Any, ...]) -> Hashable:
    """Returns a key that is equal for calls of `inner.measure` that run one compiled program.

    `given` are the arguments of a call. Random keys, which are all of one type, are left out.
    """
    *static, params, sample, _, indices = given
    shapes, tree = jax.tree.flatten(jax.eval_shape(lambda *args: args, params, sample, indices))
    return *static, tree, *shapes


def description(
    tasks: TaskSet, contender: Contender, place: int = 0, title: str = "", followed: bool = True
) -> dict[str, Any]:
    """Describes the arrays that `readings` returns: axes, coordinates and modes, stored with them.

    `place`, `title` and `followed` are those of `trajectories.About`. Raises `ConfigError` unless
    the probes read what they declare.
    """
    lead, probes = ("seed",) if contender.seeded else (), tasks.probes.items()
    trailing, sizes = _axes(tasks, contender)
    axes = {name: (*lead, "task", "step", *rest) for name, rest in trailing.items()}
    coords: dict[str, Any] = {"time": ("step", contender.times_in(tasks.domain))}
    coords |= {axis: (axis, range(n)) for axis, n in sizes.items()}
    if contender.curve is not None and STRENGTH in tasks.probes:
        modes = tasks.probes[STRENGTH].modes.values
        shape, expected = np.shape(contender.curve), (len(coords["time"][1]), len(modes))
        hint = f"of contender {contender.name!r}, must be of shape {expected}, [time, mode]"
        check(shape == expected, "curve", shape, hint)
        axes["closed_form"] = ("step", "mode")
    assert contender.kind is not None
    identity = contender.name, contender.label, contender.kind, contender.clock
    floor = float(tasks.domain.loss_floor)
    about = trajectories.About(*identity, floor, contender.drawn, place, title, followed)
    return trajectories.describe(about, axes, coords, {name: probe.modes for name, probe in probes})


@functools.cache
def _axes(
    tasks: TaskSet, contender: Contender
) -> tuple[Mapping[str, tuple[str, ...]], Mapping[str, int]]:
    """Returns each reading's axes after seed, task and time, and the sizes of all but mode axes.

    Axis i of a diagnosis NAME is NAME_i. The learner is traced, not run. Raises `ConfigError`
    unless each probe reads what it declares from that learner's answers.
    """
    axes: dict[str, tuple[str, ...]] = {"loss": ()}
    sizes: dict[str, int] = {}
    used, name_hint = {*axes, *RESERVED, *trajectories.FIELDS}, "this name is taken: choose another"
    lengths: dict[str, int] = {}  # of the mode axes
    for name, probe in tasks.probes.items():
        further = *probe.extras, probe.modes.coordinate
        for stored in (name, *(inner.reading_name(name, n) for n in further)):
            check(stored not in used, f"probe {name!r}", stored, name_hint)
            used.add(stored)
        lengths[inner.reading_name(name, "mode")] = len(probe.modes.values)
    for axis in lengths:
        hint = f"{axis.removesuffix('_mode')!r} has its modes under this name: choose another"
        check(axis not in tasks.probes, "probe", axis, hint)

    def trace(key: Key, params: Params, task: Any) -> None:
        with error_context(f"contender {contender.name!r} cannot be run on {tasks.name!r}"):
            learner = contender.make(params)
            state = learner.init(key)
            for name, leaf in (learner.diagnose(state) if learner.diagnose else {}).items():
                check_name(name, "diagnosis")
                check(name not in used, "diagnose", name, name_hint)
                axes[name] = tuple(f"{name}_{i}" for i in range(leaf.ndim))
                sizes.update(zip(axes[name], leaf.shape, strict=True))
        for name, probe in tasks.probes.items():
            with error_context(f"contender {contender.name!r} cannot answer probe {name!r}"):
                answers = jax.vmap(learner.predict, (None, 0))(state, probe.queries)
            with error_context(f"probe {name!r} on {tasks.name!r} cannot be read"):
                values = probe.read(task, answers)
                shapes = {reading: leaf.shape for reading, leaf in values.items()}
            _check_read(name, probe, shapes)
            axes[name] = (inner.reading_name(name, "mode"),)
            for extra, extra_axes in probe.extras.items():
                axes[inner.reading_name(name, extra)] = extra_axes
                for axis, n in zip(extra_axes, shapes[extra], strict=True):
                    hint = f"of probe {name!r}: this name is taken: choose another"
                    check(axis in lengths or axis not in used, "axis", axis, hint)
                    length = lengths.get(axis) or sizes.setdefault(axis, n)
                    hint = f"axis {axis!r} is {length} long elsewhere: rename it"
                    check(n == length, f"probe {name!r}", n, hint)

    params = weight_shapes(contender.learner.init) if contender.seeded else ()
    with error_context(f"tasks of {tasks.name!r} cannot be drawn"):
        task = _task(tasks) if tasks.probes else None
    jax.eval_shape(trace, jax.random.key(0), params, task)
    return axes, sizes


@functools.cache
def _task(tasks: TaskSet) -> Any:
    """Returns the shapes of one task of a task set."""
    return jax.eval_shape(lambda sample, key: sample(key), tasks.sample, jax.random.key(0))


def check_step(tasks: TaskSet, contender: Contender) -> None:
    """Traces a learner's step on a task set. Raises `ConfigError` unless it can be taken."""
    params = weight_shapes(contender.learner.init) if contender.seeded else ()

    def trace(key: Key, params: Params, task: Any, state: Any) -> None:
        learner = contender.make(params)
        after, loss = inner.episode_step(tasks.domain, learner, task, key, jnp.int32(0), state)
        check(jnp.shape(loss) == (), "loss.shape", jnp.shape(loss), "must be one number")
        (leaves, tree), (new_leaves, new_tree) = map(jax.tree.flatten, (state, after))
        same: bool = tree == new_tree  # type: ignore[operator]
        check(same, "update", new_tree, f"must keep the structure of init's state, {tree}")
        for pair in zip(leaves, new_leaves, strict=True):
            kind, new_kind = ((jnp.shape(leaf), jnp.result_type(leaf).name) for leaf in pair)
            check(kind == new_kind, "update", new_kind, f"must keep init's shape and type, {kind}")

    with error_context(f"contender {contender.name!r} cannot be run on {tasks.name!r}"):
        key = jax.random.key(0)
        # Evaluated apart from the step, so that a state of Python numbers is traced, as it is in
        # the inner loop.
        state = jax.eval_shape(lambda params: contender.make(params).init(key), params)
        jax.eval_shape(trace, key, params, _task(tasks), state)


def _check_read(name: str, probe: Probe, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `ConfigError` unless a probe's readings have the shapes that its fields declare."""
    modes = len(probe.modes.values)
    valid = shapes.get("strength") == (modes,)
    hint = f"`read` must return 'strength' of shape ({modes},), a number per mode"
    check(valid, f"probe {name!r}", dict(shapes), hint)
    declared = {extra: len(axes) for extra, axes in probe.extras.items()}
    read = {extra: len(shape) for extra, shape in shapes.items() if extra != "strength"}
    hint = f"`extras` must name as many axes for each as `read` returns, not {declared}"
    check(read == declared, f"probe {name!r}", read, hint)


def bytes_needed(tasks: TaskSet, contender: Contender, seeds: int) -> int:
    """Computes the bytes that a contender's readings on a task set take, from shapes alone."""
    probes = tasks.probes.items()
    axes, sizes = _axes(tasks, contender)
    modes = {inner.reading_name(name, "mode"): len(probe.modes.values) for name, probe in probes}
    sizes = {**sizes, "step": 1} | modes
    values = sum(math.prod(sizes[axis] for axis in names) for names in axes.values())
    times = len(contender.times_in(tasks.domain))
    return 4 * (seeds if contender.seeded else 1) * tasks.size_for(contender.clock) * times * values


def check_readings_fit(tasks: TaskSet, contender: Contender, seeds: int) -> None:
    """Raises `ConfigError`, naming the option to lower, if readings do not fit into the memory."""
    needed_bytes = 2 * bytes_needed(tasks, contender, seeds)  # with a copy
    times, size = len(contender.times_in(tasks.domain)), tasks.size_for(contender.clock)
    what = f"{contender.name} on {size:,} tasks of {tasks.name!r} at {times:,} times"
    option, n = "updating_tasks" if size < tasks.size else tasks.option or "size", size
    if times > size and contender.times is None:
        option, n = "steps", tasks.domain.steps
    mesh.require_memory(what, needed_bytes, option, n, split=True)


def training_bytes(init: Callable[[Key], Params]) -> int:
    """Computes the bytes to train one seed of a meta-learner: weights, gradient and two moments."""
    return 4 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight_shapes(init)))
