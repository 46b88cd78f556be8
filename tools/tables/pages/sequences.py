"""Tables of docs/sequences.md."""

from __future__ import annotations

from collections.abc import Callable

from ..render import Row, Table, column, fixed, load

MODELS = {"demo": "demo", "smollm2": "SmolLM2-135M", "gemma3": "Gemma 3 270M"}


def repeated_windows() -> list[Row]:
    """The first three windows of blocks that each race chose to run twice, on both halves."""
    return [
        {**row, "model": MODELS[model], "chosen_by": result["objective"]}
        for model, entry in load("repeat").items()
        for result in entry["chosen_by"].values()
        for row in result["best"][:3]
    ]


def told(half: str, digits: int) -> Callable[[Row], str]:
    """A column of differences to the whole model with their errors; in brackets, if two errors
    do not tell them apart."""

    def cell(row: Row) -> str:
        value = row.get(half)
        if value is None:
            return ""
        text = f"{value['difference']:+.{digits}f} ± {value['error']:.{digits}f}"
        return text if value["told_apart"] else f"({text})"

    return cell


def window_races() -> list[Row]:
    """Races of all windows against their prefix tree, and that against one pass for each."""
    return [
        {
            **entry["unraced"],
            **result["race"],
            "model": MODELS[model],
            "windows": entry["windows"],
            "by": result["objective"],
            "raced": 1 / result["race"]["share_of_unraced"],
        }
        for model, entry in load("repeat").items()
        for result in entry["chosen_by"].values()
    ]


TABLES = {
    "windows": Table(
        repeated_windows,
        {
            "model": column("model"),
            "chosen by": column("chosen_by"),
            "blocks run twice": column("window"),
            "on the half that chose": told("chosen on", 3),
            "perplexity (lower is better)": told("perplexity", 3),
            "margin, nats (higher is better)": told("margin", 3),
            "accuracy, points (higher is better)": told("accuracy", 1),
        },
    ),
    "window_races": Table(
        window_races,
        {
            "model": column("model"),
            "by": column("by"),
            "windows": column("windows"),
            "FLOP ratio, unraced": fixed("flop_ratio", 2),
            "measured": lambda row: f"{row['times_faster']:.2f}" if "times_faster" in row else "",
            "fewer unit runs, raced": fixed("raced", 1),
            "race, CPU s": fixed("cpu_s", 0),
        },
    ),
}
