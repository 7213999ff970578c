"""The results that `python -m benchmarks --json FILE` stored, as the table of README.md.

    python -m benchmarks.table FILE

A share of the machine's limit stands beside the time that it belongs to, as its median.
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
    """Lines of Markdown."""
    shares = {
        SHARE.sub("", each["name"]): each["value"] for each in results if SHARE.search(each["name"])
    }
    yield "| figure | median | 95 % interval | share of the limit | target | |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for each in results:
        name = each["name"]
        if SHARE.search(name):
            continue
        belongs = re.sub(r", ms$|[:,] µs an (update|episode)$", "", name)
        share = shares.get(belongs) if belongs != name else None
        verdict = {True: "met", False: "**missed**", None: ""}[each["met"]]
        cells = [
            name,
            f"{each['value']:.3g}",
            f"[{each['low']:.3g}, {each['high']:.3g}]",
            "" if share is None else f"{share:.2g}",
            each["target"] or "",
            verdict,
        ]
        yield f"| {' | '.join(cells)} |".replace("  |", " |")


if __name__ == "__main__":
    print("\n".join(table(json.loads(Path(sys.argv[1]).read_text()))))
