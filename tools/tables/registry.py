"""The registry of evidence, bench/evidence.toml: the command that made each measured table or
figure, its files of results, its time and machine, and how to have what it needs."""

from __future__ import annotations

import sys
from typing import Any

from .render import ROOT, Row

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


EVIDENCE = ROOT / "bench" / "evidence.toml"


def read() -> dict[str, Any]:
    """The registry as it is written."""
    return tomllib.loads(EVIDENCE.read_text(encoding="utf-8"))


def evidence() -> list[Row]:
    """The source of each measured table and figure."""
    return read()["evidence"]


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
