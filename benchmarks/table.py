"""Prints the results that `python -m benchmarks --json FILE` stored, as the table of README.md.

    python -m benchmarks.table FILE

A time has its median share of the machine's limit beside it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SHARE = re.compile(r"[:,] share of the (product rate|limit)$")


def table(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields the lines of the table, in Markdown."""
    shares = {
        SHARE.sub("", row["name"]): row["value"] for row in results if SHARE.search(row["name"])
    }
    yield "| figure | median | 95 % interval | share of the limit | target | |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in results:
        name = row["name"]
        if SHARE.search(name):
            continue
        timed = re.sub(r", ms$|[:,] µs an (update|episode)$", "", name)
        share = shares.get(timed) if timed != name else None
        verdict = {True: "met", False: "**missed**", None: ""}[row["met"]]
        cells = [
            name,
            f"{row['value']:.3g}",
            f"[{row['low']:.3g}, {row['high']:.3g}]",
            "" if share is None else f"{share:.2g}",
            row["target"] or "",
            verdict,
        ]
        yield f"| {' | '.join(cells)} |".replace("  |", " |")


if __name__ == "__main__":
    print("\n".join(table(json.loads(Path(sys.argv[1]).read_text()))))
