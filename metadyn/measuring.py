"""Measuring one learner on one set of tasks: the numbers, their labels, and the memory they take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from metadyn import inner, labelled, mesh
from metadyn.base import STRENGTH, Key, Learner, Params, TaskSet
from metadyn.errors import ConfigError, check
from metadyn.study import Contender


def readings(
    tasks: TaskSet, contender: Contender, params: Params, key: Key, chunk: int = 4096
) -> dict[str, Any]:
    """Measures a learner on tasks: every reading by name, [seed,] task, time, ....

    `params` are those of a meta-learner, with a leading seed axis; otherwise an empty tuple. Tasks
    are taken `chunk` at a time, which bounds the memory; sets of more tasks share one program.
    """
    parts = [inner.measure(*given) for given in calls(tasks, contender, params, key, chunk)]
    if len(parts) == 1:
        return parts[0]
    axis, size = int(contender.trained), tasks.size_for(_one(contender))
    whole = jax.tree.map(lambda *leaves: mesh.joined_along(axis, leaves), *parts)
    return jax.tree.map(lambda leaf: leaf[:, :size] if axis else leaf[:size], whole)


def calls(
    tasks: TaskSet, contender: Contender, params: Params, key: Key, chunk: int
) -> list[tuple[Any, ...]]:
    """What `inner.measure` is called with for that; `params` may be shapes, to compile it first."""
    size = tasks.size_for(_one(contender))
    indices = np.arange(size if size <= chunk else -(-size // chunk) * chunk, dtype=np.int32)
    return [
        (
            tasks.domain,
            contender.make,
            params,
            contender.trained,
            tasks.sample,
            tasks.argument,
            key,
            part,
            tuple(contender.times_in(tasks.domain)),
            tuple(tasks.probes.items()),
            chunk,
        )
        for part in np.split(indices, max(1, len(indices) // min(size, chunk)))
    ]


def described(
    tasks: TaskSet, contender: Contender, place: int = 0, title: str = "", followed: bool = True
) -> dict[str, Any]:
    """The description of those readings, which is stored beside them (`labelled.describe`)."""
    learner, probes = _one(contender), tuple(tasks.probes.items())
    lead = ("seed",) if contender.trained else ()
    axes = {
        name: (*lead, "task", "step", *rest)
        for name, rest in inner.reading_axes(learner, probes).items()
    }
    coords: dict[str, Any] = {"time": ("step", contender.times_in(tasks.domain))}
    for name, probe in probes:
        _check_read(tasks, name, learner)
        prefix = "" if name == STRENGTH else f"{name}_"
        coords[prefix + probe.modes.coordinate] = (inner.mode_axis(name), probe.modes.values)
        coords |= probe.coords
    if contender.curve is not None and STRENGTH in tasks.probes:
        axes["closed_form"] = ("step", "mode")
    assert contender.kind is not None
    about = labelled.About(
        contender.name,
        contender.label,
        contender.kind,
        learner.clock,
        tasks.domain.loss_floor,
        contender.drawn,
        place,
        title,
        followed,
    )
    return labelled.describe(about, axes, coords, {name: probe.modes for name, probe in probes})


def _one(contender: Contender) -> Learner:
    """The learner that a contender is, with outer parameters of zeros if it has any."""
    params: Params = ()
    if not isinstance(contender.learner, Learner):
        shapes = jax.eval_shape(contender.learner.init, jax.random.key(0))
        params = jax.tree.map(
            lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), shapes
        )
    return contender.make(params)


def _check_read(tasks: TaskSet, name: str, learner: Learner) -> None:
    """Raises `ConfigError` unless a probe reads what it says, of that learner's answers."""
    probe, key = tasks.probes[name], jax.random.key(0)

    def read(key: Key) -> Mapping[str, Any]:
        answers = jax.vmap(learner.predict, (None, 0))(learner.init(key), probe.queries)
        return probe.read(tasks.sample(key, tasks.argument), answers)

    try:
        found = jax.eval_shape(read, key)
        shapes = {each: leaf.shape for each, leaf in found.items()}
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(f"probe {name!r} on {tasks.name!r} cannot be read ({said})") from error
    modes = len(probe.modes.values)
    right = shapes.pop("strength", None) == (modes,)
    fix = f"`read` must give 'strength' of shape ({modes},), as it has so many modes"
    check(right, f"probe {name!r}", sorted(found), fix)
    extras = {each: len(axes) for each, axes in probe.extras.items()}
    given = {each: len(shape) for each, shape in shapes.items()}
    fix = f"`read` gives extras with so many axes, but `extras` names {extras}"
    check(given == extras, f"probe {name!r}", given, fix)


def bytes_needed(tasks: TaskSet, contender: Contender, seeds: int) -> int:
    """Memory that the readings take, from shapes alone."""
    learner, probes = _one(contender), tuple(tasks.probes.items())
    sizes = {"step": 1} | {inner.mode_axis(n): len(p.modes.values) for n, p in probes}
    for _, probe in probes:
        sizes |= {axis: len(values) for axis, values in probe.coords.values()}
    each = sum(
        math.prod(sizes.get(axis, 1) for axis in axes)
        for axes in inner.reading_axes(learner, probes).values()
    )
    times = len(contender.times_in(tasks.domain))
    return 4 * (seeds if contender.trained else 1) * tasks.size_for(learner) * times * each


def fits(what: str, needed: int, field: str, value: Any = None) -> None:
    """Raises `ConfigError`, naming the field to lower, unless so many bytes can be had."""
    there = mesh.memory()
    gib = 1 << 30
    fix = f"{what} would take {needed / gib:,.1f} GiB of the {there / gib:,.1f} there are; lower it"
    if needed > there:
        raise ConfigError(f"{field}: {fix}", field, value, fix)
