"""Measures one learner on one set of tasks: the numbers, their labels, the memory they take."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
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
    axis, size = int(contender.seeded), tasks.size_for(contender.clock)
    whole = jax.tree.map(lambda *leaves: mesh.joined_along(axis, leaves), *parts)
    return jax.tree.map(lambda leaf: leaf[:, :size] if axis else leaf[:size], whole)


def calls(
    tasks: TaskSet, contender: Contender, params: Params, key: Key, chunk: int
) -> list[tuple[Any, ...]]:
    """What `inner.measure` is called with for that; `params` may be shapes, to compile it first."""
    size = tasks.size_for(contender.clock)
    indices = np.arange(size if size <= chunk else -(-size // chunk) * chunk, dtype=np.int32)
    return [
        (
            tasks.domain,
            contender.make,
            params,
            contender.seeded,
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
    lead, probes = ("seed",) if contender.seeded else (), tasks.probes.items()
    axes = {n: (*lead, "task", "step", *rest) for n, rest in _axes(tasks, contender).items()}
    coords: dict[str, Any] = {"time": ("step", contender.times_in(tasks.domain))}
    for name, probe in probes:
        _check_read(tasks, name, contender)
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
        contender.clock,
        tasks.domain.loss_floor,
        contender.drawn,
        place,
        title,
        followed,
    )
    return labelled.describe(about, axes, coords, {name: probe.modes for name, probe in probes})


def _traced(contender: Contender, f: Callable[[Learner, Key], Any]) -> Any:
    """The shapes of what `f(learner, key)` gives of the learner that a contender is, or will be."""

    def of(key: Key) -> Any:
        meta = contender.learner
        params = () if isinstance(meta, Learner) else meta.init(key)
        return f(contender.make(params), key)

    return jax.eval_shape(of, jax.random.key(0))


def _axes(tasks: TaskSet, contender: Contender) -> dict[str, tuple[str, ...]]:
    """Axes of each reading, beyond those of seeds, tasks and times."""
    found: dict[str, tuple[str, ...]] = {}
    probes = tuple(tasks.probes.items())
    _traced(contender, lambda learner, key: found.update(inner.reading_axes(learner, probes)))
    return found


def _check_read(tasks: TaskSet, name: str, contender: Contender) -> None:
    """Raises `ConfigError` unless a probe reads what it says, of that learner's answers."""
    probe = tasks.probes[name]

    def read(learner: Learner, key: Key) -> Mapping[str, Any]:
        answers = jax.vmap(learner.predict, (None, 0))(learner.init(key), probe.queries)
        argument = jax.tree.map(jnp.asarray, tasks.argument)
        return probe.read(tasks.sample(key, argument), answers)

    try:
        found = _traced(contender, read)
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
    probes = tasks.probes.items()
    sizes = {"step": 1} | {inner.mode_axis(n): len(p.modes.values) for n, p in probes}
    for _, probe in probes:
        sizes |= {axis: len(values) for axis, values in probe.coords.values()}
    each = sum(
        math.prod(sizes.get(axis, 1) for axis in axes) for axes in _axes(tasks, contender).values()
    )
    times = len(contender.times_in(tasks.domain))
    return 4 * (seeds if contender.seeded else 1) * tasks.size_for(contender.clock) * times * each


def fits(what: str, needed: int, field: str, value: Any = None) -> None:
    """Raises `ConfigError`, naming the field to lower, unless so many bytes can be had."""
    there = mesh.memory()
    gib = 1 << 30
    fix = f"{what} would take {needed / gib:,.1f} GiB of the {there / gib:,.1f} there are; lower it"
    if needed > there:
        raise ConfigError(f"{field}: {fix}", field, value, fix)
