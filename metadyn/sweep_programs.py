"""Programs that differ in numbers alone, as one program that is given the numbers.

A configuration's numbers are constants of what JAX traces from it: σ, a learning rate, a prior
covariance. Traced programs of the same form, operation by operation, that differ in such constants
alone are compiled once: where they differ, the constant becomes an argument, which may be batched.
No domain, learner or objective has to know of it.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.sharding import PartitionSpec

Place = tuple[Any, ...]
"""Where in a program a number stands: steps down into it, and the position there."""
Constants = Mapping[Place, Any]
CALLS = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",  # what JAX calls it inside
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
"""Operations that do no more than run a program, and the parameter that holds it."""
OPENED = {
    **{name: (inner,) for name, inner in CALLS.items()},
    "scan": ("jaxpr",),
    "while": ("cond_jaxpr", "body_jaxpr"),
    "cond": ("branches",),
    "shard_map": ("jaxpr",),
}
"""Operations inside which numbers are looked for. Those of any other are part of the form."""


def split_constants(program: ClosedJaxpr) -> tuple[str, dict[Place, np.ndarray]]:
    """Splits a program into its form, as a hash, and its numbers by their places.

    Programs of one form do the same, given the same arguments and the same numbers.
    """
    numbers: dict[Place, np.ndarray] = {}
    keys: list[bytes] = []
    form = [_form(program, (), numbers, keys), *keys]
    return hashlib.sha256(repr(form).encode()).hexdigest(), numbers


def _inner(eqn: JaxprEqn) -> dict[Place, ClosedJaxpr | Jaxpr]:
    """The programs inside an operation, by the steps down to them."""
    found = {}
    for name in OPENED.get(eqn.primitive.name, ()):
        held = eqn.params[name]
        for i, each in enumerate(held if isinstance(held, tuple) else (held,)):
            found[name, i] = each
    return found


def _opened(program: ClosedJaxpr | Jaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    """A program and the arrays that it is closed over: a jitted function keeps its own."""
    if isinstance(program, ClosedJaxpr):
        return program.jaxpr, program.consts
    return program, ()


def _form(
    program: ClosedJaxpr | Jaxpr, at: Place, numbers: dict[Place, np.ndarray], keys: list[bytes]
) -> list[Any]:
    """What a program does, all but its numbers and its random keys, which are collected."""
    names: dict[Any, int] = {}
    jaxpr, consts = _opened(program)

    def name(place: Place, atom: Any) -> tuple[Any, str]:
        if isinstance(atom, Literal):
            numbers[place] = np.asarray(atom.val, jnp.result_type(atom.aval))
            return "number", str(atom.aval)
        return names.setdefault(atom, len(names)), str(atom.aval)

    form: list[Any] = [[name((), var) for var in (*jaxpr.constvars, *jaxpr.invars)]]
    for i, value in enumerate(consts):
        if jnp.issubdtype(jnp.result_type(value), jax.dtypes.prng_key):
            keys.append(_bytes(value))
        else:
            numbers[(*at, "constant", i)] = np.asarray(value)
    for i, eqn in enumerate(jaxpr.eqns):
        inner, kind = _inner(eqn), eqn.primitive.name
        if kind not in OPENED:
            keys.extend(_hidden(kind, eqn.params))
        params = {} if kind in CALLS else eqn.params
        said = {k: _said(v) for k, v in params.items() if k not in OPENED.get(kind, ())}
        read = [name((*at, i, k), atom) for k, atom in enumerate(eqn.invars)]
        opened = [_form(each, (*at, i, *step), numbers, keys) for step, each in inner.items()]
        form.append([kind, read, said, opened, [name((), var) for var in eqn.outvars]])
    form.append([name((*at, "out", k), atom) for k, atom in enumerate(jaxpr.outvars)])
    return form


def _hidden(kind: str, params: Mapping[str, Any]) -> Iterator[bytes]:
    """What an operation that is not opened holds, and does not say in words: its arrays.

    Of a callback its function, which may hold anything.
    """
    for value in jax.tree.leaves([*params.values()]):
        if isinstance(value, (Jaxpr, ClosedJaxpr)):
            jaxpr, consts = _opened(value)
            yield from map(_bytes, consts)
            for eqn in jaxpr.eqns:
                yield from _hidden(eqn.primitive.name, eqn.params)
        elif isinstance(value, (np.ndarray, jax.Array)):
            yield _bytes(value)
        elif "callback" in kind and callable(value):
            yield str(id(value)).encode()


def _bytes(value: Any) -> bytes:
    """The bytes of an array, or of a random key."""
    if jnp.issubdtype(jnp.result_type(value), jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    return np.asarray(value).tobytes()


def _said(parameter: Any) -> str:
    """Writes a parameter of an operation alike in every process: Python orders sets as it likes."""
    ordered = sorted(parameter) if isinstance(parameter, (set, frozenset)) else parameter
    return str(ordered)


def varying(many: Sequence[Constants]) -> list[Place]:
    """Finds the places at which programs of one form have different numbers."""
    first, *others = many
    alike = lambda a, b: np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return [p for p in first if not all(alike(first[p], each[p]) for each in others)]


def evaluate(
    program: ClosedJaxpr | Jaxpr, numbers: Constants, arguments: Sequence[Any]
) -> list[Any]:
    """Runs a program with other numbers at some places, which may be traced."""
    jaxpr, consts = _opened(program)
    held = [numbers.get(("constant", i), value) for i, value in enumerate(consts)]
    variables = (*jaxpr.constvars, *jaxpr.invars)
    values: dict[Any, Any] = dict(zip(variables, (*held, *arguments), strict=True))

    def read(place: Place, atom: Any) -> Any:
        if isinstance(atom, Literal):
            return numbers.get(place, atom.val)
        return values[atom]

    for i, eqn in enumerate(jaxpr.eqns):
        operands = [read((i, k), atom) for k, atom in enumerate(eqn.invars)]
        inside = {step: _below((i, *step), numbers) for step in _inner(eqn)}
        with eqn.ctx.manager:
            if any(inside.values()):
                found = _again(eqn, inside, operands)
            else:
                params = eqn.primitive.get_bind_params(eqn.params)
                found = eqn.primitive.bind(*operands, **params)
        several = eqn.primitive.multiple_results
        values |= zip(eqn.outvars, list(found) if several else [found], strict=True)
    return [read(("out", k), atom) for k, atom in enumerate(jaxpr.outvars)]


def _below(steps: Place, numbers: Constants) -> Constants:
    """The numbers in the program that some steps lead to, by their places there."""
    n = len(steps)
    return {place[n:]: value for place, value in numbers.items() if place[:n] == steps}


def _again(eqn: JaxprEqn, numbers: Mapping[Place, Constants], operands: list[Any]) -> list[Any]:
    """Does an operation anew, with other numbers in each of the programs inside it."""
    inner, params, kind = _inner(eqn), eqn.params, eqn.primitive.name
    run = lambda step, *given: evaluate(inner[step], numbers[step], given)
    if kind in CALLS:
        if params.get("differentiated") and params.get("prevent_cse"):
            # Computed once more, backwards, and not kept from when it was first.
            operands = list(jax.lax.optimization_barrier(operands))
        return run((CALLS[kind], 0), *operands)
    if kind == "scan":
        if "ft_in" in params:  # from JAX 0.12 on: a tree for each of the three
            fixed, carried, _ = map(len, params["ft_in"].unpack())
        else:
            fixed, carried = params["num_consts"], params["num_carry"]
        consts, init = operands[:fixed], operands[fixed : fixed + carried]
        xs = operands[fixed + carried :]

        def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
            found = run(("jaxpr", 0), *consts, *carry, *x)
            return found[:carried], found[carried:]

        more = {name: params[name] for name in ("length", "reverse", "unroll")}
        carry, ys = jax.lax.scan(body, init, xs, **more)
        return [*carry, *ys]
    if kind == "while":
        a, b = params["cond_nconsts"], params["body_nconsts"]
        to_cond, to_body, init = operands[:a], operands[a : a + b], operands[a + b :]
        return jax.lax.while_loop(
            lambda carry: run(("cond_jaxpr", 0), *to_cond, *carry)[0],
            lambda carry: run(("body_jaxpr", 0), *to_body, *carry),
            init,
        )
    if kind == "cond":
        which, *rest = operands
        branches = [functools.partial(run, step) for step in inner]
        return jax.lax.switch(which, branches, *rest)
    assert kind == "shard_map", kind
    ((step, mapped),) = inner.items()
    places = list(numbers[step])
    sharded = jax.shard_map(
        lambda values, *given: evaluate(mapped, dict(zip(places, values, strict=True)), given),
        mesh=params["mesh"],
        in_specs=(PartitionSpec(), *params["in_specs"]),
        out_specs=list(params["out_specs"]),
        check_vma=params["check_vma"],
    )
    return sharded([*numbers[step].values()], *operands)


class ProgramCache:
    """A cache of compiled programs in which those that differ in constants alone share one.

    What is going to be called is best announced by `expect` before the first call; otherwise
    programs of one form are compiled again when it shows that they differ. A call that is announced
    several times, numbers and arguments alike, is done once.
    """

    def __init__(self) -> None:
        self._awaited: Counter[str] = Counter()
        self._results: dict[str, list[Any]] = {}
        self._first: dict[str, Constants] = {}
        self._varying: dict[str, set[Place]] = {}
        self._compiled: dict[tuple[str, int], tuple[list[Place], Callable[..., Any]]] = {}
        self._split = functools.cache(split_constants)

    def expect(
        self, traced: Any, arguments: tuple[Any, ...] | None = None
    ) -> tuple[str, Constants]:
        """Announces a traced program (`jax.stages.Traced`), with its arguments if they are known.

        Returns its form and numbers.
        """
        form, numbers = self._split(traced.jaxpr)
        first = self._first.setdefault(form, numbers)
        self._varying.setdefault(form, set()).update(varying([first, numbers]))
        if arguments is not None:
            self._awaited[_call(form, numbers, arguments)] += 1
        return form, numbers

    def __call__(self, traced: Any, *arguments: Any) -> Any:
        """The results of a traced program on its arguments, those that are not static."""
        form, numbers = self.expect(traced)
        call = _call(form, numbers, arguments)
        found = self._results.pop(call, None) or self._run(form, numbers, traced, arguments)
        self._awaited[call] -= 1
        if self._awaited[call] > 0:
            self._results[call] = found
        return jax.tree.unflatten(jax.tree.structure(traced.out_info), found)

    def _run(
        self, form: str, numbers: Constants, traced: Any, arguments: tuple[Any, ...]
    ) -> list[Any]:
        key = form, len(self._varying[form])
        if key not in self._compiled:
            # In the order of the program, so that it is the same one in every process.
            places = [place for place in self._first[form] if place in self._varying[form]]
            program = traced.jaxpr

            def run(values: list[Any], leaves: list[Any]) -> list[Any]:
                return evaluate(program, dict(zip(places, values, strict=True)), leaves)

            self._compiled[key] = places, jax.jit(run)
        places, compiled = self._compiled[key]
        return compiled([numbers[place] for place in places], jax.tree.leaves(arguments))


def _call(form: str, numbers: Constants, arguments: tuple[Any, ...]) -> str:
    """A program, its numbers and its arguments, as a hash."""
    hashed = hashlib.sha256(form.encode())
    for leaf in (*numbers.values(), *jax.tree.leaves(arguments)):
        hashed.update(_bytes(leaf))
    return hashed.hexdigest()
