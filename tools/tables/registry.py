"""The registry of evidence, bench/evidence.toml: the command that made each measured table or
figure, its files of results, its time and machine, and how to have what it needs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from .render import ROOT, Row, load

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


EVIDENCE = ROOT / "bench" / "evidence.toml"


def read() -> dict[str, Any]:
    """The registry as it is written."""
    return tomllib.loads(EVIDENCE.read_text(encoding="utf-8"))


def evidence() -> list[Row]:
    """The source of each measured table and figure, with the time that it took."""
    return [{**entry, "time": time_of(entry)} for entry in read()["evidence"]]


def time_of(entry: Row) -> str:
    """The time that the runs recorded in their files of results. Older files have none: then the
    entry says it, or nobody noted it."""
    times = [time_recorded(result) for result in entry.get("result", [])]
    known = [time for time in times if time is not None]
    if not times or len(known) < len(times):
        return entry.get("time", "not recorded")
    seconds = sum(time["cpu_seconds"] for time in known)
    return f"{seconds:.0f} CPU seconds" if seconds < 120 else f"{seconds / 60:,.0f} CPU minutes"


def time_recorded(result: str) -> Mapping[str, float] | None:
    """Seconds that a file of results records, or one part of it, named behind a #."""
    name, _, part = result.partition("#")
    found = load(name.removesuffix(".json"))
    found = found[part] if part else found
    return found.get("took") if isinstance(found, dict) else None


def needs() -> list[Row]:
    """The things that commands need and the repository does not hold."""
    entries = read()["needs"]
    return [{"name": name, "how": " ".join(text.split())} for name, text in entries.items()]


def print_evidence() -> None:
    """Print where each measured table and figure comes from, and how to have what it needs."""
    for row in evidence():
        print(f"{row['shows']}\n  on       {', '.join(row['at'])}\n  command  {row['command']}")
        print(f"  result   {', '.join(row.get('result', ['printed']))}")
        print(f"  took     {row['time']}; {row['machine']}")
        if "needs" in row:
            print(f"  needs    {', '.join(row['needs'])}")
        print()
    for row in needs():
        print(f"{row['name']}: {row['how']}\n")
