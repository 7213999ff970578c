"""Outer loops whose programs differ only in numbers, as one program with a row per loop and seed.

Rows do not communicate: they are sharded over all devices, and each is trained on one device.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr

from metadyn import mesh, sweep_programs
from metadyn.outer import OuterLoop, TrainState, compiled


class TracedSeed(NamedTuple):
    """The traced program of outer steps for one seed of one meta-learner, with form and numbers."""

    program: ClosedJaxpr
    form: str
    numbers: sweep_programs.Constants
    out_tree: Any
    """The tree structure of the outputs."""


@functools.cache
def traced_seed(loop: OuterLoop, name: str) -> TracedSeed:
    """Traces the outer steps of one seed of a meta-learner, as they run on one device."""
    of_one_seed = lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    state, now = loop.abstract, (jax.ShapeDtypeStruct((), jnp.int32),) * 2
    stacked = jax.eval_shape(loop.keys), state.params[name], state.moments[name]
    traced = jax.make_jaxpr(
        partial(loop.advance_seed, name), axis_env=[(mesh.EPISODES, 1)], return_shape=True
    )
    program, shapes = traced(now, jax.tree.map(of_one_seed, stacked))
    return TracedSeed(program, *sweep_programs.split_constants(program), jax.tree.structure(shapes))


def by_program(loops: Mapping[int, OuterLoop]) -> list[list[int]]:
    """Groups outer loops that can be rows of one program; returns each group's keys in `loops`."""
    forms: dict[Hashable, list[int]] = {}
    for i, loop in loops.items():
        config, names = loop.config, loop.trained
        traced = [(name, traced_seed(loop, name)) for name in names]
        updates = {name: settings.updates_per_step for name, settings in loop.settings.items()}
        seeds = tuple((name, updates[name], seed.form, seed.out_tree) for name, seed in traced)
        form = seeds, config.seeds, config.checkpoint_steps, config.dispatch
        forms.setdefault(form, []).append(i)
    return list(forms.values())


class OuterLoops:
    """Outer loops of one form (`by_program`), trained side by side from the same random keys."""

    def __init__(self, loops: Sequence[OuterLoop]):
        self.loops = loops
        self.trace = functools.cache(self._traced)
        """Traces the outer steps of all rows of a meta-learner (`jax.stages.Traced`); cached."""
        self._compiled = functools.cache(self._checked)

    def _checked(self, name: str) -> Any:
        """Compiles the outer steps of all rows. Raises `ConfigError` if they exceed the memory."""
        what, count, traced = f"an outer step of {name}", len(self.loops), self.trace(name)
        if count == 1:
            return compiled(what, traced, self.loops[0].trained[name].option("batch"))
        what += f" for {count} settings at once"
        return compiled(what, traced, "--part", "use more parts, in another DIR")

    def _traced(self, name: str) -> Any:
        """Traces ((step, count), params, moments) to (params, moments, metrics), of all rows."""
        first, seeds = self.loops[0], self.loops[0].config.seeds
        rows = [traced_seed(loop, name) for loop in self.loops]
        places = sweep_programs.varying([row.numbers for row in rows])
        numbers = [jnp.stack([row.numbers[place] for row in rows]) for place in places]
        devices = len(mesh.devices())
        count = len(rows) * seeds
        # The last row is repeated until all devices have equally many.
        padded = np.minimum(np.arange(-(-count // devices) * devices), count - 1)

        def one_row(replicated: Any, row: Any) -> Any:
            now, numbers = replicated
            loop_index, *inputs = row
            own_numbers = {p: values[loop_index] for p, values in zip(places, numbers, strict=True)}
            leaves = jax.tree.leaves((now, inputs))
            outputs = sweep_programs.evaluate(rows[0].program, own_numbers, leaves)
            return jax.tree.unflatten(rows[0].out_tree, outputs)

        def advance(now: Any, params: Any, moments: Any) -> Any:
            stacked = jax.tree.map(lambda leaf: leaf[padded], (params, moments))
            results = mesh.train_seeds(
                one_row,
                (now, numbers),
                (jnp.asarray(padded // seeds), first.keys()[padded % seeds], *stacked),
                first.settings[name].batch,
                first.trained[name].objective.group,
            )
            return jax.tree.map(lambda leaf: leaf[:count], results)

        all_rows = lambda leaf: leaf.update(shape=(count, *leaf.shape[1:]))
        state, now = first.abstract, (jax.ShapeDtypeStruct((), jnp.int32),) * 2
        params, moments = jax.tree.map(all_rows, (state.params[name], state.moments[name]))
        jitted = jax.jit(advance, out_shardings=mesh.replicated())
        return jitted.trace(now, params, moments)

    def start(self, shared: sweep_programs.ProgramCache) -> list[TrainState]:
        """Makes the state of each loop at outer step 0."""
        for loop in self.loops:
            shared.expect(loop.init_on_one_device.trace(), ())
        return [
            jax.tree.map(np.asarray, shared(loop.init_on_one_device.trace())) for loop in self.loops
        ]

    def run(
        self, states: Sequence[TrainState], target: int
    ) -> Iterator[tuple[list[TrainState], list[Mapping[str, Any]]]]:
        """Yields the states and metrics of all loops after every dispatch, up to step `target`.

        Loops share the seconds of a dispatch evenly (`OuterLoop.seconds`). Metrics are not checked:
        a loop whose loss becomes non-finite does not stop the others.
        """
        first, seeds = self.loops[0], self.loops[0].config.seeds
        join = lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves])
        step = int(states[0].step)
        params = jax.tree.map(join, *(state.params for state in states))
        moments = jax.tree.map(join, *(state.moments for state in states))
        while step < target:
            count, total_seconds = first.dispatched(target - step), 0.0
            metrics: dict[str, Any] = {}
            for name in first.trained:
                advance, updates = self._compiled(name), first.settings[name].updates_per_step
                now = np.int32(updates * step), np.int32(updates * count)
                start = time.perf_counter()
                results = jax.block_until_ready(advance(now, params[name], moments[name]))
                seconds = time.perf_counter() - start
                total_seconds += seconds
                for loop in self.loops:
                    loop.seconds[name] += seconds / len(self.loops)
                results = jax.tree.map(np.asarray, results)
                params[name], moments[name], metrics[name] = results
            step, first.pace = step + count, total_seconds / count

            def part(i: int, tree: Any) -> Any:
                return jax.tree.map(lambda leaf: leaf[i * seeds : (i + 1) * seeds], tree)

            indices = range(len(self.loops))
            yield (
                [TrainState(jnp.int32(step), part(i, params), part(i, moments)) for i in indices],
                [part(i, metrics) for i in indices],
            )
