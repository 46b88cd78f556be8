"""Tables of docs/reliability.md."""

from __future__ import annotations

from collections.abc import Callable

from ..render import Row, Table, column, fixed, load

ENDS = {  # by the names of bench/reliability.py
    "2, one line": "exit status 2 and one line of error",
    "0": "exit status 0, because no code reads the altered bytes",
    "right": "right",
    "refused by name": "files refused by name",
    "same result, at most one chunk repeated": "the same result, at most one chunk repeated",
}


def ends(row: Row) -> str:
    """The ends of a fault with their counts, the most frequent first."""
    return "; ".join(f"{count:,} {ENDS.get(end, end)}" for end, count in row["ends"].items())


def megabytes(key: str) -> Callable[[Row], str]:
    """A column of bytes, in MB of 2^20."""
    return lambda row: f"{row[key] / 2**20:,.0f} MB"


TABLES = {
    "faults": Table(
        lambda: load("reliability")["faults"],
        {"fault": column("fault"), "tried": fixed("tried", 0), "result": ends},
    ),
    "memory": Table(
        lambda: load("reliability")["memory"],
        {
            "masks": fixed("masks", 0),
            "choices of that question": fixed("choices", 0),
            "tokens of its prompt": column("prompt"),
            "smallest accepted limit": megabytes("least_limit"),
            "growth": megabytes("grown"),
            "growth with 512 MB": megabytes("grown_within_512_mb"),
        },
    ),
}
