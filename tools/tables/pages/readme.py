"""Tables of README.md."""

from __future__ import annotations

from ..render import Row, Table, column, fixed, load, removed_blocks
from .benchmarks import searches


def speed() -> list[Row]:
    """The rows of `searches` that README shows."""
    sizes = {("16 x 256", "no"), ("128 x 256", 0.99)}
    return [row for row in searches() if (row["size"], row["racing"]) in sizes]


def quality() -> list[Row]:
    """A real model whole and pruned, and the same after a short training."""
    entries = []
    for row in load("quality")["rows"]:
        entry = {"removed": row["removed"], "parameters": f"{row['parameters'] / 1e6:.0f}M"}
        entry["speed"] = f"{row['tokens_per_cpu_second']:.1f}"
        for state in ("untrained", "healed"):
            for name, unit in (("perplexity", ""), ("accuracy", "%")):
                judged = (row[state] or {}).get(name)
                cell = f"{judged['value']:.1f}±{judged['error']:.1f}{unit}" if judged else ""
                entry[f"{state} {name}"] = cell
        entries.append(entry)
    return entries


TABLES = {
    "speed": Table(
        speed,
        {
            "search": lambda row: (
                f"{row['algorithm']}, {row['k']} blocks, {row['size']} tokens"
                + (", raced" if row["racing"] != "no" else "")
            ),
            "masks": column("masks"),
            "times faster": fixed("speedup", 1),
        },
    ),
    "quality": Table(
        quality,
        {
            "blocks removed": removed_blocks,
            "parameters": column("parameters"),
            "perplexity": column("untrained perplexity"),
            "ARC-Easy": column("untrained accuracy"),
            "tokens/s": column("speed"),
            "healed: perplexity": column("healed perplexity"),
            "ARC-Easy, healed": column("healed accuracy"),
        },
    ),
}
