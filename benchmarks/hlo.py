"""Reads XLA's text of a compiled program: what a step of its loops does, and the bytes it moves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from metadyn.program_cost import array_bytes

FREE = {"parameter", "get-tuple-element", "tuple", "constant", "bitcast"}
"""XLA's operations that nothing is done for."""
SLICES = {"dynamic-slice", "slice", "gather"}
"""XLA's operations that read no more of their first operand than they give."""


class Operation(NamedTuple):
    """An operation of a compiled program, as XLA writes it."""

    shape: str
    kind: str
    operands: list[str]
    """Names of those that it takes, in order."""
    more: str
    """What is said of it beside: the programs that it runs, how often, which operand it is."""

    def runs(self, what: str) -> list[str]:
        """Names the programs that it runs as its "body", for example."""
        said = re.findall(rf"\b(?:{what})=(\{{.*?\}}|[%\w.-]+)", self.more)
        return [name for each in said for name in re.findall(r"[\w.-]+", each)]


Part = Mapping[str, Operation]
"""Operations by name, in order; the last gives the result."""


def parts(text: str) -> tuple[dict[str, Part], str]:
    """Splits the text of a compiled program into its parts, by name; and names the main one."""
    found = re.findall(r"^(ENTRY )?%?([\w.-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S)
    line = r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)$"
    read = lambda body: {
        name: Operation(shape, kind, re.findall(r"%([\w.-]+)", given), f"{given} {more}")
        for name, shape, kind, given, more in re.findall(line, body, re.M)
    }
    (entry,) = (name for first, name, _ in found if first)
    return {name: read(body) for _, name, body in found}, entry


def launches(text: str) -> tuple[int, ...]:
    """Counts operations on arrays in one turn of each innermost loop of a compiled program.

    Counters of loops, and the waiting for what was begun before, are left out.
    """
    of, _ = parts(text)
    loops = [each for part in of.values() for each in part.values() if each.kind == "while"]
    bodies = [of[name].values() for loop in loops for name in loop.runs("body")]
    inner = [body for body in bodies if all(each.kind != "while" for each in body)]
    counted = lambda each: re.search(r"\[\d", each.shape) and not _free(each)
    return tuple(sum(map(bool, map(counted, body))) for body in inner)


def _free(operation: Operation) -> bool:
    return operation.kind in FREE or operation.kind.endswith("-done")


def moved(text: str, turns: float = 1) -> float:
    """Counts the bytes that the operations of a compiled program read and write in one call.

    Of what they read and write, wherever it is: what is in a cache still counts. Slices count as
    what is sliced out or written, not as the whole; loops as often as they turn, and those of
    unknown length as so many `turns`; of the branches of a condition the costliest counts.
    """
    of, entry = parts(text)

    def bytes_of(part: Part, name: str) -> float:
        """Counts the bytes that the operation `name` of a part reads and writes."""
        each = part[name]
        if each.kind == "while":
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', each.more)
            return (float(known[1]) if known else turns) * sum(map(total, each.runs("body")))
        if each.kind == "conditional":
            named = r"branch_computations|true_computation|false_computation"
            return max(map(total, each.runs(named)))
        if each.kind == "call":
            return sum(map(total, each.runs("to_apply")))
        if _free(each):
            return 0
        sizes = [array_bytes(part[operand].shape) for operand in each.operands]
        if each.kind == "fusion":
            (inside,) = each.runs("calls")
            return _fused(of[inside], sizes)
        if each.kind in SLICES:
            return 2 * array_bytes(each.shape)
        if each.kind == "dynamic-update-slice":
            return 2 * sizes[1]
        if each.kind == "custom-call":  # beside its result a product has the scratch that it takes
            return sum(sizes) + array_bytes(re.sub(r", s8\[\d+\]\S*\)$", ")", each.shape))
        # What is begun gives, beside its result, its operands again.
        return (
            2 * sum(sizes) if each.kind.endswith("-start") else sum(sizes, array_bytes(each.shape))
        )

    def total(name: str) -> float:
        return sum(bytes_of(of[name], each) for each in of[name])

    return total(entry)


def _fused(inside: Part, sizes: list[int]) -> int:
    """Counts the bytes that a fusion reads of operands of some sizes, and those that it writes."""
    source = {name: name for name in inside}  # that of which a bitcast is another view
    for name, each in inside.items():
        if each.kind == "bitcast":
            source[name] = source[each.operands[0]]
    used: dict[str, list[tuple[Operation, int]]] = {name: [] for name in inside}
    for each in inside.values():
        for i, operand in enumerate(each.operands):
            if each.kind != "bitcast":
                used[source[operand]].append((each, i))
    read = 0
    for name, each in inside.items():
        if each.kind == "parameter":
            size = sizes[int(re.match(r"\d+", each.more)[0])]
            part = [user for user, i in used[name] if i == 0]
            if len(part) == len(used[name]) and {user.kind for user in part} <= SLICES:
                size = min(size, sum(array_bytes(user.shape) for user in part))
            elif [user.kind for user, _ in used[name]] == ["dynamic-update-slice"] and part:
                size = 0  # it is written in place
            read += size
    *_, root = inside
    outputs = inside[root].operands if inside[root].kind == "tuple" else [root]
    written = 0
    for name in outputs:
        each = inside[source[name]]
        update = each.kind == "dynamic-update-slice"
        written += array_bytes(inside[each.operands[1]].shape if update else each.shape)
    return read + written
