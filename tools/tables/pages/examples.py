"""Tables of examples/README.md."""

from __future__ import annotations

from ..render import Row, Table, column, fixed, load


def examples(model: str) -> list[Row]:
    """The examples, by the loop and by fastprune, on a model."""
    return load("examples")[model]["examples"]


TABLES = {
    f"examples_{model}": Table(
        lambda model=model: examples(model),
        {
            "example": column("example"),
            "loop, CPU s": fixed("loop", 1),
            "fastprune, CPU s": fixed("fast", 1),
            "times faster": fixed("ratio", 1),
            "same choice": lambda row: "yes" if row["same"] else "no",
        },
    )
    for model in ("demo", "smollm2")
}
