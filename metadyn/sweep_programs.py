"""Programs that differ only in numbers, run as one program that takes the numbers as arguments.

The numbers of a configuration, such as σ, a learning rate or a prior covariance, are constants in
the program that JAX traces from it. Programs of the same form, operation by operation, that differ
only in such constants are compiled once: each constant that differs becomes an argument, which may
be batched. Domains, learners and objectives need no code for this: they may check their numbers and
compute with them in NumPy, which numbers that are arguments from the start would forbid.
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
"""Position of a number: the steps into nested programs, then its position in the last of them."""
Constants = Mapping[Place, Any]  # numbers, keyed by place
PLAIN_CALLS = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",  # the name of `checkpoint` inside JAX
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
"""Operations that only run a nested program, and the parameter that holds that program."""
SEARCHED = {
    **{name: (inner,) for name, inner in PLAIN_CALLS.items()},
    "scan": ("jaxpr",),
    "while": ("cond_jaxpr", "body_jaxpr"),
    "cond": ("branches",),
    "shard_map": ("jaxpr",),
}
"""Operations whose nested programs are searched for numbers, and the parameters that hold them."""
# Numbers inside any other operation are part of the form.


def split_constants(program: ClosedJaxpr) -> tuple[str, dict[Place, np.ndarray]]:
    """Splits a program into its form, as a hash, and its numbers, keyed by place.

    Two programs of one form compute the same results from the same arguments and numbers.
    """
    numbers: dict[Place, np.ndarray] = {}
    keys: list[bytes] = []
    form = [_form(program, (), numbers, keys), *keys]
    return hashlib.sha256(repr(form).encode()).hexdigest(), numbers


def _nested(eqn: JaxprEqn) -> dict[Place, ClosedJaxpr]:
    """Returns the programs nested in an operation, keyed by the step that leads to each."""
    programs = {}
    for name in SEARCHED.get(eqn.primitive.name, ()):
        value = eqn.params[name]
        for i, program in enumerate(value if isinstance(value, tuple) else (value,)):
            programs[name, i] = _closed(program)
    return programs


def _closed(program: ClosedJaxpr | Jaxpr) -> ClosedJaxpr:
    """Returns a nested program with the arrays that it closes over, where it has any."""
    return program if isinstance(program, ClosedJaxpr) else ClosedJaxpr(program, ())


def _form(
    program: ClosedJaxpr, steps: Place, numbers: dict[Place, np.ndarray], keys: list[bytes]
) -> list[Any]:
    """Returns the form of the program at `steps`; collects its `numbers`, and its random `keys`."""
    ids: dict[Any, int] = {}
    jaxpr = program.jaxpr

    def describe(place: Place, atom: Any) -> tuple[Any, str]:
        if isinstance(atom, Literal):
            numbers[place] = np.asarray(atom.val, jnp.result_type(atom.aval))
            return "number", str(atom.aval)
        return ids.setdefault(atom, len(ids)), str(atom.aval)

    form: list[Any] = [[describe((), var) for var in (*jaxpr.constvars, *jaxpr.invars)]]
    for i, value in enumerate(program.consts):
        if jnp.issubdtype(jnp.result_type(value), jax.dtypes.prng_key):
            keys.append(_bytes(value))
        else:
            numbers[(*steps, "constant", i)] = np.asarray(value)
    for i, eqn in enumerate(jaxpr.eqns):
        nested, kind = _nested(eqn), eqn.primitive.name
        if kind not in SEARCHED:
            keys.extend(_hidden_data(kind, eqn.params))
        params = {} if kind in PLAIN_CALLS else eqn.params
        texts = {k: _as_text(v) for k, v in params.items() if k not in SEARCHED.get(kind, ())}
        operands = [describe((*steps, i, k), atom) for k, atom in enumerate(eqn.invars)]
        inside = [_form(inner, (*steps, i, *step), numbers, keys) for step, inner in nested.items()]
        form.append([kind, operands, texts, inside, [describe((), var) for var in eqn.outvars]])
    form.append([describe((*steps, "out", k), atom) for k, atom in enumerate(jaxpr.outvars)])
    return form


def _hidden_data(kind: str, params: Mapping[str, Any]) -> Iterator[bytes]:
    """Yields the arrays in an operation outside `SEARCHED`, which its text does not show in full.

    For a callback, yields the identity of its function, which may hold anything.
    """
    for value in jax.tree.leaves([*params.values()]):
        if isinstance(value, (Jaxpr, ClosedJaxpr)):
            program = _closed(value)
            yield from map(_bytes, program.consts)
            for eqn in program.eqns:
                yield from _hidden_data(eqn.primitive.name, eqn.params)
        elif isinstance(value, (np.ndarray, jax.Array)):
            yield _bytes(value)
        elif "callback" in kind and callable(value):
            yield str(id(value)).encode()


def _bytes(value: Any) -> bytes:
    """Returns the bytes of an array, or of a random key."""
    if jnp.issubdtype(jnp.result_type(value), jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    return np.asarray(value).tobytes()


def _as_text(parameter: Any) -> str:
    """Writes an operation's parameter, with sets sorted: their order differs between processes."""
    ordered = sorted(parameter) if isinstance(parameter, (set, frozenset)) else parameter
    return str(ordered)


def varying(many: Sequence[Constants]) -> list[Place]:
    """Returns the places where programs of one form have different numbers, in program order."""
    first, *others = many
    equal = lambda a, b: np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return [p for p in first if not all(equal(first[p], other[p]) for other in others)]


def evaluate(program: ClosedJaxpr, numbers: Constants, arguments: Sequence[Any]) -> list[Any]:
    """Evaluates a program, with its numbers replaced at the places in `numbers`.

    The replacements may be traced values. `arguments` and results are leaves, not trees.
    """
    jaxpr = program.jaxpr
    constants = [numbers.get(("constant", i), value) for i, value in enumerate(program.consts)]
    variables = (*jaxpr.constvars, *jaxpr.invars)
    values: dict[Any, Any] = dict(zip(variables, (*constants, *arguments), strict=True))

    def read(place: Place, atom: Any) -> Any:
        if isinstance(atom, Literal):
            return numbers.get(place, atom.val)
        return values[atom]

    for i, eqn in enumerate(jaxpr.eqns):
        operands = [read((i, k), atom) for k, atom in enumerate(eqn.invars)]
        inside = {step: _numbers_at((i, *step), numbers) for step in _nested(eqn)}
        with eqn.ctx.manager:
            if any(inside.values()):
                results = _rebuild(eqn, inside, operands)
            else:
                params = eqn.primitive.get_bind_params(eqn.params)
                results = eqn.primitive.bind(*operands, **params)
        multiple = eqn.primitive.multiple_results
        values |= zip(eqn.outvars, list(results) if multiple else [results], strict=True)
    return [read(("out", k), atom) for k, atom in enumerate(jaxpr.outvars)]


def _numbers_at(steps: Place, numbers: Constants) -> Constants:
    """Returns the numbers in the nested program at `steps`, keyed by their places within it."""
    depth = len(steps)
    return {place[depth:]: value for place, value in numbers.items() if place[:depth] == steps}


def _rebuild(eqn: JaxprEqn, numbers: Mapping[Place, Constants], operands: list[Any]) -> list[Any]:
    """Applies an operation like `eqn` with replaced numbers in each of its nested programs."""
    nested, params, kind = _nested(eqn), eqn.params, eqn.primitive.name
    run = lambda step, *leaves: evaluate(nested[step], numbers[step], leaves)
    if kind in PLAIN_CALLS:
        if params.get("differentiated") and params.get("prevent_cse"):
            # So that the backward pass recomputes this and XLA does not keep the forward results.
            operands = list(jax.lax.optimization_barrier(operands))
        return run((PLAIN_CALLS[kind], 0), *operands)
    if kind == "scan":
        if "ft_in" in params:  # from JAX 0.12 on: one tree each for constants, carry and inputs
            n_consts, n_carry, _ = map(len, params["ft_in"].unpack())
        else:
            n_consts, n_carry = params["num_consts"], params["num_carry"]
        consts, init = operands[:n_consts], operands[n_consts : n_consts + n_carry]
        xs = operands[n_consts + n_carry :]

        def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
            outputs = run(("jaxpr", 0), *consts, *carry, *x)
            return outputs[:n_carry], outputs[n_carry:]

        options = {name: params[name] for name in ("length", "reverse", "unroll")}
        carry, ys = jax.lax.scan(body, init, xs, **options)
        return [*carry, *ys]
    if kind == "while":
        a, b = params["cond_nconsts"], params["body_nconsts"]
        cond_consts, body_consts, init = operands[:a], operands[a : a + b], operands[a + b :]
        return jax.lax.while_loop(
            lambda carry: run(("cond_jaxpr", 0), *cond_consts, *carry)[0],
            lambda carry: run(("body_jaxpr", 0), *body_consts, *carry),
            init,
        )
    if kind == "cond":
        branch, *rest = operands
        branches = [functools.partial(run, step) for step in nested]
        return jax.lax.switch(branch, branches, *rest)
    assert kind == "shard_map", kind
    ((step, local),) = nested.items()
    places = list(numbers[step])
    sharded = jax.shard_map(
        lambda values, *leaves: evaluate(local, dict(zip(places, values, strict=True)), leaves),
        mesh=params["mesh"],
        in_specs=(PartitionSpec(), *params["in_specs"]),
        out_specs=list(params["out_specs"]),
        check_vma=params["check_vma"],
    )
    return sharded([*numbers[step].values()], *operands)


class ProgramCache:
    """A cache of compiled programs in which programs that differ only in numbers share one.

    Announce all calls with `expect` before the first call: otherwise a form is compiled again each
    time a call has a different number at a new place. A call that is announced several times, with
    the same numbers and arguments, is computed once.
    """

    def __init__(self) -> None:
        self._awaited: Counter[str] = Counter()  # announced calls still to come, by call hash
        self._results: dict[str, list[Any]] = {}  # kept for calls still to come, by call hash
        self._first: dict[str, Constants] = {}  # numbers of the first program of each form
        self._varying: dict[str, set[Place]] = {}  # places that differ among programs of a form
        self._compiled: dict[tuple[str, int], tuple[list[Place], Callable[..., Any]]] = {}
        self._split = functools.cache(split_constants)

    def expect(
        self, traced: Any, arguments: tuple[Any, ...] | None = None
    ) -> tuple[str, Constants]:
        """Announces a call of a traced program (`jax.stages.Traced`), with arguments where known.

        Returns the form and the numbers of the program.
        """
        form, numbers = self._split(traced.jaxpr)
        first = self._first.setdefault(form, numbers)
        self._varying.setdefault(form, set()).update(varying([first, numbers]))
        if arguments is not None:
            self._awaited[_call_hash(form, numbers, arguments)] += 1
        return form, numbers

    def __call__(self, traced: Any, *arguments: Any) -> Any:
        """Returns the results of a traced program for `arguments`: all that are not static."""
        form, numbers = self.expect(traced)
        call = _call_hash(form, numbers, arguments)
        results = self._results.pop(call, None) or self._run(form, numbers, traced, arguments)
        self._awaited[call] -= 1
        if self._awaited[call] > 0:
            self._results[call] = results
        return jax.tree.unflatten(jax.tree.structure(traced.out_info), results)

    def _run(
        self, form: str, numbers: Constants, traced: Any, arguments: tuple[Any, ...]
    ) -> list[Any]:
        """Runs the compiled program of a form, compiled anew if more places vary than before."""
        key = form, len(self._varying[form])
        if key not in self._compiled:
            # In program order, so that every process compiles the same program.
            places = [place for place in self._first[form] if place in self._varying[form]]
            program = traced.jaxpr

            def run(values: list[Any], leaves: list[Any]) -> list[Any]:
                return evaluate(program, dict(zip(places, values, strict=True)), leaves)

            self._compiled[key] = places, jax.jit(run)
        places, compiled = self._compiled[key]
        return compiled([numbers[place] for place in places], jax.tree.leaves(arguments))


def _call_hash(form: str, numbers: Constants, arguments: tuple[Any, ...]) -> str:
    """Returns a hash of a program's form, its numbers and its arguments."""
    digest = hashlib.sha256(form.encode())
    for leaf in (*numbers.values(), *jax.tree.leaves(arguments)):
        digest.update(_bytes(leaf))
    return digest.hexdigest()
