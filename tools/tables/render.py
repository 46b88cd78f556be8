"""Tables of Markdown: rows, and by header the function that writes the cell of a row. The kinds of
columns that several pages share are here, too."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"

Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Row], str]]  # by header, the cell of a row


class Table(NamedTuple):
    """Rows, read when the table is written, and columns."""

    rows: Callable[[], Iterable[Row]]
    columns: Columns

    def write(self) -> str:
        """The table in Markdown.

        Raises:
            FileNotFoundError: A file of results is missing.
        """
        lines = [[cell(row) for cell in self.columns.values()] for row in self.rows()]
        lines = [list(self.columns), ["---"] * len(self.columns), *lines]
        return "".join(f"|{'|'.join(line)}|\n" for line in lines)


def load(name: str) -> Any:
    """The results of a file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def bench_rows(title: str, file: str = "cpu") -> list[Row]:
    """The rows of one benchmark in what `make bench-full` writes, by the begin of its title."""
    tables = load(file)["tables"]
    return next(rows for name, rows in tables.items() if name.startswith(title))


def column(key: str) -> Callable[[Row], str]:
    """A column of a text, or of a number as it is."""
    return lambda row: str(row[key])


def fixed(key: str, digits: int) -> Callable[[Row], str]:
    """A column of a number with this many digits behind its point; empty without a value."""
    return lambda row: "" if row[key] is None else f"{row[key]:,.{digits}f}"


def significant(key: str, digits: int) -> Callable[[Row], str]:
    """A column of a number with this many significant digits; empty without a value."""
    return lambda row: "" if row[key] is None else f"{row[key]:.{digits}g}"


def with_error(key: str, error: str) -> Callable[[Row], str]:
    """A column of a number with its standard error, if it has one."""
    return lambda row: f"{row[key]:.2f}" + (f" ± {row[error]:.2f}" if row[error] else "")


def percent(key: str, digits: int = 0) -> Callable[[Row], str]:
    """A column of a share in percent; empty without a value."""
    return lambda row: "" if row[key] is None else f"{100 * row[key]:.{digits}f} %"


def rounded(value: float, error: float, sign: str = "") -> str:
    """A value with its standard error, both to the error's second digit."""
    if abs(value) >= 1e5:
        return f"{value:{sign}.1e} ± {error:.0e}"
    digits = max(0, 1 - math.floor(math.log10(error))) if error else 1
    return f"{value:{sign}.{digits}f} ± {error:.{digits}f}"


def removed_blocks(row: Row) -> str:
    """The removed blocks of a row, or none."""
    return " ".join(map(str, row["removed"])) or "none"
