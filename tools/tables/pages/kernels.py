"""Tables of docs/kernels.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..render import Row, Table, column
from .benchmarks import bench_rows

SHAPES = {
    f"d = {width}, T = {tokens:,}": (width, tokens)
    for width in (128, 512)
    for tokens in (1024, 2048)
}


def operators() -> list[Row]:
    """The compiled operators, with all shapes of one in a row."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in bench_rows("The compiled operators"):
        name = entry["operator"], entry["dtype"]
        row = rows.setdefault(name, {"operator": name[0], "dtype": name[1]})
        row[f"{entry['d']} {entry['tokens']}"] = entry
    return list(rows.values())


def against_torch(width: int, tokens: int) -> Callable[[Row], str]:
    """A column of ratios to torch, and both times in microseconds to three digits."""

    def digits(microseconds: float) -> str:
        rounded = float(f"{microseconds:.3g}")
        return f"{rounded:,.0f}"

    def cell(row: Row) -> str:
        entry = row[f"{width} {tokens}"]
        times = f"{digits(entry['torch_us'])} / {digits(entry['native_us'])}"
        return f"{entry['torch_ratio']:.1f} ({times})"

    return cell


def against_compiled(width: int, tokens: int) -> Callable[[Row], str]:
    """A column of ratios to torch.compile."""
    return lambda row: f"{row[f'{width} {tokens}']['compiled_ratio']:.2f}"


TABLES = {
    "operators": Table(
        operators,
        {
            "operator": column("operator"),
            "dtype": column("dtype"),
            **{head: against_torch(*shape) for head, shape in SHAPES.items()},
        },
    ),
    "compiled": Table(
        operators,
        {
            "operator": column("operator"),
            "dtype": column("dtype"),
            **{head: against_compiled(*shape) for head, shape in SHAPES.items()},
        },
    ),
}
