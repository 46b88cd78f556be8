"""Tables of bench/README.md."""

from __future__ import annotations

from ..registry import evidence, needs
from ..render import Row, Table, column


def link(row: Row) -> str:
    """The title of an entry, linked to its first page, from bench/."""
    return f"[{row['shows']}](../{row['at'][0].removesuffix('#')})"


TABLES = {
    "evidence": Table(
        evidence,
        {
            "shows": link,
            "command": lambda row: f"`{row['command']}`",
            "result": lambda row: ", ".join(f"`{file}`" for file in row.get("result", ["printed"])),
            "time": column("time"),
            "machine": column("machine"),
            "needs": lambda row: ", ".join(row.get("needs", [])),
        },
    ),
    "needs": Table(
        needs,
        {"name": column("name"), "how to have it": column("how")},
    ),
}
