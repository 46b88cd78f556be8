"""Search results as text and as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from ..objectives import Objective

FULL, EMPTY = "#", "."


def format_removed(removed: Sequence[int]) -> str:
    """Unit indices with runs shortened: (3, 4, 5, 9) is '3-5 9'; '-' when nothing is removed."""
    runs: list[list[int]] = []
    for unit in removed:
        if runs and unit == runs[-1][-1] + 1:
            runs[-1].append(unit)
        else:
            runs.append([unit])
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "-"


def format_loss(loss: float) -> str:
    return f"{loss:.5f}" if math.isfinite(loss) else f"{loss} (not finite)"


def format_saved(naive: float, runs: float) -> str:
    """How many times fewer runs were made than one pass per mask takes; '' where they are not
    fewer."""
    return f"{naive / runs:.1f}x fewer" if 0 < runs < naive else ""


def format_dense(objective: Objective | type[Objective], loss: float) -> str:
    """The dense model's loss, with what it is read as."""
    read = f", {objective.reading} {objective.read(loss)}" if objective.reading else ""
    return f"dense loss {format_loss(loss)}{read}"


def format_races(decided_early: int) -> str:
    """What races have left out of a table."""
    return (
        f"{decided_early} subsets left a race early; masks counts those whose loss is "
        f"remembered, exact"
    )


TABLE_NOTE = (
    "runs: unit runs, each prefix that masks share counted once; naive: those of one forward pass "
    "per mask; "
    "saved: naive / runs."
)


def results_table(title: str, rows: Iterable[tuple]) -> Table:
    """A table of searches; rows (algorithm, removed, loss, masks, unit runs, naive unit runs).

    One that found nothing has None removed and the reason in the place of its loss.
    """
    table = Table(title=Text(title, "table.title"), title_justify="left")  # names are no markup
    for name in ("algorithm", "removed"):
        table.add_column(name, no_wrap=True)
    for name in ("loss", "masks", "runs", "naive", "saved"):
        table.add_column(name, justify="right", no_wrap=name != "loss")
    for algorithm, removed, loss, masks, unit_runs, naive in rows:
        found = ("none", loss) if removed is None else (format_removed(removed), format_loss(loss))
        saved = f"{naive / unit_runs:.1f}x" if unit_runs else "-"
        table.add_row(algorithm, *found, str(masks), f"{unit_runs:.0f}", f"{naive:.0f}", saved)
    return table


def calibration_table(entries: Sequence[Mapping]) -> Table:
    """What another calibration set changes, and in brackets what another algorithm changes
    (`compare_calibrations`)."""
    table = Table(title="Another calibration set (another algorithm)", title_justify="left")
    table.add_column("sets")
    table.add_column("removed", justify="right")
    table.add_column("algorithm", no_wrap=True)
    table.add_column("overlap", justify="right")
    for judge in entries[0]["losses"]:
        table.add_column(Text(f"difference in {judge}"), justify="right")
    for entry in entries:
        losses = [_both(values, 5) for values in entry["losses"].values()]
        row = (Text(", ".join(entry["sets"])), str(entry["num_remove"]), entry["algorithm"])
        table.add_row(*row, _both(entry["overlap"], 3), *losses)
    return table


def _both(values: Mapping, digits: int) -> str:
    first, second = (
        "n/a" if values[by] is None else f"{values[by]:.{digits}f}" for by in ("sets", "algorithms")
    )
    return f"{first} ({second})"


def pattern_text(rows: Sequence[tuple[str, str, Sequence[int]]], num_units: int) -> str:
    """The pattern figure in characters: a line per (objective, algorithm, removed), a full cell
    where removed."""
    names = [f"{objective}  {algorithm}" for objective, algorithm, _ in rows]
    width = max(map(len, names), default=0)
    return "\n".join(
        f"{name:>{width}}  "
        + " ".join(FULL if unit in removed else EMPTY for unit in range(num_units))
        for name, (_, _, removed) in zip(names, rows)
    )
