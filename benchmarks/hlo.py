"""Reads XLA's text of a compiled program: operations per loop iteration, and bytes moved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from metadyn.program_cost import array_bytes

FREE = {"parameter", "get-tuple-element", "tuple", "constant", "bitcast"}
"""XLA's operations that cost nothing."""
SLICES = {"dynamic-slice", "slice", "gather"}
"""XLA's operations that read only as much of their first operand as they return."""


class Operation(NamedTuple):
    """An operation of a compiled program, as XLA's text describes it."""

    shape: str
    kind: str
    operands: list[str]
    """Names of its operands, in order."""
    more: str
    """The rest of its line: operands, computations it runs, trip count, index of a parameter."""

    def runs(self, what: str) -> list[str]:
        """Names the computations that the operation runs in a role such as "body"."""
        values = re.findall(rf"\b(?:{what})=(\{{.*?\}}|[%\w.-]+)", self.more)
        return [name for value in values for name in re.findall(r"[\w.-]+", value)]


Part = Mapping[str, Operation]
"""One of XLA's computations: its operations by name, in order; the last returns the result."""


def parts(text: str) -> tuple[dict[str, Part], str]:
    """Splits the text of a compiled program into its computations, by name, and names the entry."""
    matches = re.findall(r"^(ENTRY )?%?([\w.-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S)
    line = r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)$"
    read = lambda body: {
        name: Operation(shape, kind, re.findall(r"%([\w.-]+)", operands), f"{operands} {rest}")
        for name, shape, kind, operands, rest in re.findall(line, body, re.M)
    }
    (entry,) = (name for is_entry, name, _ in matches if is_entry)
    return {name: read(body) for _, name, body in matches}, entry


def launches(text: str) -> tuple[int, ...]:
    """Counts the array operations in one iteration of each innermost loop of a compiled program.

    Loop counters, and the waiting for asynchronous operations ("-done"), are left out.
    """
    computations, _ = parts(text)
    loops = [op for part in computations.values() for op in part.values() if op.kind == "while"]
    bodies = [computations[name].values() for loop in loops for name in loop.runs("body")]
    innermost = [body for body in bodies if all(op.kind != "while" for op in body)]
    counted = lambda op: re.search(r"\[\d", op.shape) and not _free(op)
    return tuple(sum(map(bool, map(counted, body))) for body in innermost)


def _free(operation: Operation) -> bool:
    return operation.kind in FREE or operation.kind.endswith("-done")


def moved(text: str, turns: float = 1) -> float:
    """Counts the bytes that the operations of a compiled program read and write in one call.

    Arrays that a processor's cache holds count too. A slice counts the bytes that are sliced out or
    written, not the whole array. A loop counts once per iteration, with `turns` iterations where
    its trip count is unknown. A conditional counts its costliest branch.
    """
    computations, entry = parts(text)

    def bytes_of(part: Part, name: str) -> float:
        """Counts the bytes that the operation `name` of a computation reads and writes."""
        op = part[name]
        if op.kind == "while":
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', op.more)
            return (float(known[1]) if known else turns) * sum(map(total, op.runs("body")))
        if op.kind == "conditional":
            roles = r"branch_computations|true_computation|false_computation"
            return max(map(total, op.runs(roles)))
        if op.kind == "call":
            return sum(map(total, op.runs("to_apply")))
        if _free(op):
            return 0
        sizes = [array_bytes(part[operand].shape) for operand in op.operands]
        if op.kind == "fusion":
            (fused,) = op.runs("calls")
            return _fused(computations[fused], sizes)
        if op.kind in SLICES:
            return 2 * array_bytes(op.shape)
        if op.kind == "dynamic-update-slice":
            return 2 * sizes[1]
        if op.kind == "custom-call":  # a product's shape includes its scratch space, left out here
            return sum(sizes) + array_bytes(re.sub(r", s8\[\d+\]\S*\)$", ")", op.shape))
        # The shape of an asynchronous "-start" repeats its operands besides the result.
        return 2 * sum(sizes) if op.kind.endswith("-start") else sum(sizes, array_bytes(op.shape))

    def total(name: str) -> float:
        return sum(bytes_of(computations[name], op) for op in computations[name])

    return total(entry)


def _fused(fused: Part, sizes: list[int]) -> int:
    """Counts the bytes that a fusion reads, from operands of the given sizes, and writes."""
    source = {name: name for name in fused}  # the operation that a bitcast is another view of
    for name, op in fused.items():
        if op.kind == "bitcast":
            source[name] = source[op.operands[0]]
    uses: dict[str, list[tuple[Operation, int]]] = {name: [] for name in fused}
    for op in fused.values():
        for i, operand in enumerate(op.operands):
            if op.kind != "bitcast":
                uses[source[operand]].append((op, i))
    read = 0
    for name, op in fused.items():
        if op.kind == "parameter":
            size = sizes[int(re.match(r"\d+", op.more)[0])]
            first_uses = [user for user, i in uses[name] if i == 0]
            if len(first_uses) == len(uses[name]) and {user.kind for user in first_uses} <= SLICES:
                size = min(size, sum(array_bytes(user.shape) for user in first_uses))
            elif [user.kind for user, _ in uses[name]] == ["dynamic-update-slice"] and first_uses:
                size = 0  # it is updated in place
            read += size
    *_, root = fused
    outputs = fused[root].operands if fused[root].kind == "tuple" else [root]
    written = 0
    for name in outputs:
        op = fused[source[name]]
        is_update = op.kind == "dynamic-update-slice"
        written += array_bytes(fused[op.operands[1]].shape if is_update else op.shape)
    return read + written
