"""Shared by the benchmarks: rows that are printed as tables at the end of the run, and written as
JSON."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from record import save

TABLES: dict[str, list[dict]] = {}  # rows by title


@pytest.fixture
def report(request):
    """report(**columns): add a row to the module's table at the end, whose title is the module's
    first line."""
    title = request.module.__doc__.splitlines()[0].rstrip(".")
    return lambda **columns: TABLES.setdefault(title, []).append(columns)


def pytest_terminal_summary(terminalreporter) -> None:
    for title, rows in TABLES.items():
        terminalreporter.section(title)
        names = list(dict.fromkeys(name for row in rows for name in row))
        cells = [names] + [[_format(row.get(name, "")) for name in names] for row in rows]
        widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
        for line in cells:
            terminalreporter.write_line(
                "  ".join(cell.rjust(width) for cell, width in zip(line, widths))
            )
    if TABLES and "BENCH_JSON" in os.environ:
        save(Path(os.environ["BENCH_JSON"]), {"tables": TABLES})


def _format(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
