"""Write the tables of docs/benchmarks.md from bench/results: `python tools/tables.py`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. A test finds every one up to date.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "bench" / "results"
PLACE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Row], str]]  # by header, the cell of a row


def fixed(key: str, digits: int) -> Callable[[Row], str]:
    """A column of a number with this many digits behind its point."""
    return lambda row: f"{row[key]:,.{digits}f}"


def with_error(key: str, error: str) -> Callable[[Row], str]:
    """A column of a number with its standard error, if it has one."""
    return lambda row: f"{row[key]:.2f}" + (f" ± {row[error]:.2f}" if row[error] else "")


def cells(name: str) -> list[Row]:
    """The cells of a file, the slowest against the loop first."""
    found = json.loads((RESULTS / f"{name}.json").read_text())["cells"]
    return sorted(found, key=lambda row: row["times_faster"])


def families() -> list[Row]:
    """The families of the fused path, the one that gains least first."""
    found = json.loads((RESULTS / "families.json").read_text())["families"]
    return sorted(
        ({"family": name, **row} for name, row in found.items()), key=lambda r: r["ratio"]
    )


def tools() -> list[Row]:
    """The scripts of other tools, with the rows and tokens that they ran on."""
    entries = json.loads((RESULTS / "tools.json").read_text())
    size = re.compile(r"--rows (\d+) --length (\d+)")
    found = []
    for entry in entries:
        match = size.search(entry["command"])
        assert match is not None
        of_entry = {"size": f"{match[1]} x {match[2]}", "model": entry.get("model", "random")}
        found += [{**row, **of_entry} for row in entry["rows"]]
    return sorted(found, key=lambda row: (row["model"], row["size"]))


AGAINST_LOOP: Columns = {
    "fastprune, CPU s": fixed("fastprune_s", 2),
    "loop, CPU s": fixed("loop_s", 2),
    "times faster": with_error("times_faster", "standard_error"),
    "turns": lambda row: str(row["repeats"]),
}
TABLES: dict[str, tuple[Callable[[], Iterable[Row]], Columns]] = {
    "head": (
        lambda: cells("head"),
        {"cell": lambda row: row["cell"], "path": lambda row: row["path"], **AGAINST_LOOP},
    ),
    "grid": (
        lambda: cells("grid"),
        {
            "cell": lambda row: row["cell"],
            **AGAINST_LOOP,
            "FLOP ratio": fixed("flop_ratio", 2),
            "peak, MB": fixed("fastprune_peak_mb", 0),
            "loop's peak, MB": fixed("loop_peak_mb", 0),
        },
    ),
    "families": (
        families,
        {
            "family": lambda row: row["family"],
            "generic, CPU s": fixed("generic_s", 2),
            "fused, CPU s": fixed("fused_s", 2),
            "times faster": fixed("ratio", 2),
        },
    ),
    "tools": (
        tools,
        {
            "script": lambda row: row["tool"],
            "model": lambda row: row["model"],
            "rows x tokens": lambda row: row["size"],
            "theirs, CPU s": fixed("theirs", 1),
            "with fastprune": fixed("fastprune", 1),
            "times faster": fixed("ratio", 1),
            "same choice": lambda row: "yes" if row["same"] else "no",
        },
    ),
}


def write_table(name: str) -> str:
    """A table in Markdown."""
    rows, columns = TABLES[name]
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[cell(row) for cell in columns.values()] for row in rows()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def updated(page: str) -> str:
    """A page with every table as the results have it."""
    return PLACE.sub(lambda found: f"{found[1]}{write_table(found[2])}{found[4]}", page)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
