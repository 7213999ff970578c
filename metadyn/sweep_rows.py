"""Outer loops whose programs differ in numbers alone, as one program: a row for each seed of each.

Rows need not communicate: they are split over all devices, and each is trained whole on one.
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

from metadyn import mesh, program_cost, sweep_programs
from metadyn.errors import error_context
from metadyn.measuring import require_memory
from metadyn.outer import OuterLoop, TrainState


class Row(NamedTuple):
    """The traced outer steps of one seed of one meta-learner."""

    program: ClosedJaxpr
    form: str
    numbers: sweep_programs.Constants
    found: Any
    """The structure of what it returns."""


@functools.cache
def row_of(loop: OuterLoop, name: str) -> Row:
    """Traces the outer steps of one seed of a meta-learner, as they are on one device."""
    one = lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    state, now = loop.abstract, (jax.ShapeDtypeStruct((), jnp.int32),) * 2
    stacked = jax.eval_shape(loop.keys), state.params[name], state.moments[name]
    traced = jax.make_jaxpr(
        partial(loop.one_seed, name), axis_env=[(mesh.EPISODES, 1)], return_shape=True
    )
    program, shapes = traced(now, jax.tree.map(one, stacked))
    return Row(program, *sweep_programs.split_constants(program), jax.tree.structure(shapes))


def by_program(loops: Mapping[int, OuterLoop]) -> list[list[int]]:
    """Groups outer loops, by their numbers, into those that can be rows of one program."""
    forms: dict[Hashable, list[int]] = {}
    for i, loop in loops.items():
        config, names = loop.config, loop.trained
        traced = [(name, row_of(loop, name)) for name in names]
        rows = tuple((n, loop.settings[n].updates_per_step, r.form, r.found) for n, r in traced)
        form = rows, config.seeds, config.checkpoint_steps, config.dispatch
        forms.setdefault(form, []).append(i)
    return list(forms.values())


class Rows:
    """Outer loops of one form (`by_program`), trained side by side from the same keys."""

    def __init__(self, loops: Sequence[OuterLoop]):
        self.loops = loops
        self._advance = {name: self._program(name) for name in loops[0].trained}
        self._compiled = functools.cache(self._checked)

    def _checked(self, name: str) -> Any:
        """Compiles the outer steps of all rows. `ConfigError` if they do not fit into memory."""
        what, count, change = f"an outer step of {name}", len(self.loops), "lower it"
        with error_context(f"{what} cannot be compiled", jax.errors.JaxRuntimeError):
            compiled = self.trace(name).lower().compile()
        option = self.loops[0].trained[name].option("batch")
        if count > 1:
            what += f" for {count} settings at once"
            option, change = "--part", "divide them into more parts, in another DIR"
        require_memory(what, program_cost.memory(compiled), option, change=change)
        return compiled

    def _program(self, name: str) -> Any:
        """Updates of all rows: (step, count, params, moments) to params, moments, metrics."""
        first, seeds = self.loops[0], self.loops[0].config.seeds
        rows = [row_of(loop, name) for loop in self.loops]
        places = sweep_programs.varying([row.numbers for row in rows])
        numbers = [jnp.stack([row.numbers[place] for row in rows]) for place in places]
        devices = len(mesh.devices())
        count = len(rows) * seeds
        at = np.minimum(np.arange(-(-count // devices) * devices), count - 1)  # the last repeated

        def one_row(everywhere: Any, one: Any) -> Any:
            now, numbers = everywhere
            which, *row = one
            mine = {place: of[which] for place, of in zip(places, numbers, strict=True)}
            leaves = jax.tree.leaves((now, row))
            found = sweep_programs.evaluate(rows[0].program, mine, leaves)
            return jax.tree.unflatten(rows[0].found, found)

        def advance(now: Any, params: Any, moments: Any) -> Any:
            stacked = jax.tree.map(lambda leaf: leaf[at], (params, moments))
            found = mesh.train_seeds(
                one_row,
                (now, numbers),
                (jnp.asarray(at // seeds), first.keys()[at % seeds], *stacked),
                len(at),
                first.settings[name].batch,
                first.trained[name].objective.group,
            )
            return jax.tree.map(lambda leaf: leaf[:count], found)

        return jax.jit(advance, out_shardings=mesh.replicated())

    def trace(self, name: str) -> Any:
        """Traces the outer steps of all rows of a meta-learner (`jax.stages.Traced`)."""

        def all_rows(leaf: Any) -> Any:
            shape = len(self.loops) * leaf.shape[0], *leaf.shape[1:]
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)

        state, now = self.loops[0].abstract, (jax.ShapeDtypeStruct((), jnp.int32),) * 2
        params, moments = jax.tree.map(all_rows, (state.params[name], state.moments[name]))
        return self._advance[name].trace(now, params, moments)

    def start(self, shared: sweep_programs.ProgramCache) -> list[TrainState]:
        """Makes the state of each at outer step 0."""
        for loop in self.loops:
            shared.expect(loop.starting.trace(), ())
        return [jax.tree.map(np.asarray, shared(loop.starting.trace())) for loop in self.loops]

    def run(
        self, states: Sequence[TrainState], target: int
    ) -> Iterator[tuple[list[TrainState], list[Mapping[str, Any]]]]:
        """Yields the state and metrics of each after every dispatch up to an outer step.

        The time that a dispatch takes is shared out evenly (`OuterLoop.seconds`). Whatever the
        metrics of one come to be, the others go on.
        """
        first, seeds = self.loops[0], self.loops[0].config.seeds
        join = lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves])
        step = int(states[0].step)
        params = jax.tree.map(join, *(state.params for state in states))
        moments = jax.tree.map(join, *(state.moments for state in states))
        while step < target:
            count, taken = first.dispatched(target - step), 0.0
            metrics: dict[str, Any] = {}
            for name in self._advance:
                advance, times = self._compiled(name), first.settings[name].updates_per_step
                now = np.int32(times * step), np.int32(times * count)
                start = time.perf_counter()
                found = jax.block_until_ready(advance(now, params[name], moments[name]))
                seconds = time.perf_counter() - start
                taken += seconds
                for loop in self.loops:
                    loop.seconds[name] += seconds / len(self.loops)
                found = jax.tree.map(np.asarray, found)
                params[name], moments[name], metrics[name] = found
            step, first.pace = step + count, taken / count

            def of(i: int, tree: Any) -> Any:
                return jax.tree.map(lambda leaf: leaf[i * seeds : (i + 1) * seeds], tree)

            each = range(len(self.loops))
            yield (
                [TrainState(jnp.int32(step), of(i, params), of(i, moments)) for i in each],
                [of(i, metrics) for i in each],
            )
