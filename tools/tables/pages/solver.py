"""Tables of docs/solver.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..render import Row, Table, column, fixed, load


def grouped(rows: Iterable[Row], keys: tuple[str, ...], by: str) -> list[dict[str, Any]]:
    """One row for all that agree in `keys`, which holds each of them under its value of `by`."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(str(row[name]) for name in keys)
        group = found.setdefault(key, {name: row[name] for name in keys})
        group[str(row[by])] = row
    return list(found.values())


def named(row: Row) -> str:
    """A matrix by its kind, its variables and how many are chosen."""
    return f"{row['matrix']} {row['size']}, {row['k']}"


def named_by_seed(row: Row) -> str:
    """The same with the states; with the seed where it is a single one."""
    text = f"{row['matrix']}, {row['size']}, {row['k']}, {row['states']}"
    return text + (f", seed {row['seeds'][0]}" if len(row["seeds"]) == 1 else "")


def solved(states: int) -> Callable[[Row], str]:
    """A column of proven optima, and the median and worst seconds; of the gap, if none is."""

    def cell(row: Row) -> str:
        found = row[str(states)]
        proven = f"{found['proven']}/{found['seeds']}"
        if not found["proven"]:
            return f"{proven} in {found['limit']:g} s, gap up to {100 * found['worst_gap']:.0f} %"
        return f"{proven}, {found['median_s']:.3f} ({found['worst_s']:.3f})"

    return cell


def bound(name: str) -> Callable[[Row], str]:
    """A column of a bound's distance at the root, and the seconds of the search with it."""

    def cell(row: Row) -> str:
        found = row[name]
        gap = f"{100 * found['gap']:,.{1 if found['gap'] < 1 else 0}f} %"
        if "seconds" not in found:
            return gap
        spent = f"{found['seconds']:.2f} s" if found["all_proven"] else f"> {found['limit']:g} s"
        return f"{gap}, {spent}"

    return cell


def without(part: str) -> Callable[[Row], str]:
    """A column of nodes and processor seconds without a part of the solver."""
    return lambda row: f"{row[part]['nodes']:,} nodes, {row[part]['cpu_s']:.2f} s"


MATRIX = "matrix", "size", "k"
TABLES = {
    "solver_methods": Table(
        lambda: load("solver")["times"]["methods"],
        {
            "N = 32, k = 8, 100 states": column("method"),
            "seconds": fixed("seconds", 4),
            "solve_subset is faster by": fixed("slower", 1),
        },
    ),
    "solver_sizes": Table(
        lambda: grouped(load("solver")["times"]["sizes"], MATRIX, "states"),
        {
            "matrix, N, k": named,
            "1 state: proven, median s (worst)": solved(1),
            "100 states": solved(100),
        },
    ),
    "solver_bounds": Table(
        lambda: grouped(load("solver")["times"]["bounds"], MATRIX, "bound"),
        {
            "matrix, N, k": named,
            "pairwise": bound("pairwise"),
            "H as it is": bound("convex as it is"),
            "eigenvalue shift": bound("eigenvalue shift"),
            "best diagonal": bound("best diagonal"),
        },
    ),
    "solver_parts": Table(
        lambda: grouped(
            load("solver")["without parts"]["rows"], (*MATRIX, "states", "seeds"), "without"
        ),
        {
            "matrix, N, k, states": named_by_seed,
            "all": without("None"),
            "without exact sums": without("exact_sums"),
            "without symmetry": without("symmetry"),
            "without subtrees' own diagonals": without("subtree_diagonals"),
        },
    ),
}
