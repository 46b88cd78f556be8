"""Tables of docs/tutorial.md."""

from __future__ import annotations

from ..render import Row, Table, column, load


def scores(data: str) -> list[list[list[str]]]:
    """The printed rows of each score on these data, in the order of the page."""
    found = load("tutorial")["scores"]
    return [score["rows"] for score in found if f"data/{data}.jsonl" in score["command"]]


def prices() -> list[Row]:
    """The rows of the first score."""
    return [dict(zip(("removed", "value", "difference"), row)) for row in scores("text")[0]]


def judged() -> list[Row]:
    """By the two judges, the whole model, the pruned one and the healed one."""
    rows = []
    for name, data in (
        ("text, perplexity (lower is better)", "text-heldout"),
        ("200 questions, accuracy (higher is better)", "questions-heldout"),
    ):
        (whole, pruned), (healed,) = scores(data)
        row = {"judge": name, "whole": whole[1], "pruned": pruned[1], "healed": healed[1]}
        rows.append({**row, "difference": pruned[2]})
    return rows


TABLES = {
    "tutorial_prices": Table(
        prices,
        {
            "removed": column("removed"),
            "perplexity (lower is better)": column("value"),
            "difference to the whole model": column("difference"),
        },
    ),
    "tutorial_judged": Table(
        judged,
        {
            "judged on": column("judge"),
            "whole model": column("whole"),
            "without 3 5 7-8 11": column("pruned"),
            "difference": column("difference"),
        },
    ),
    "tutorial_healed": Table(
        judged,
        {"judged on": column("judge"), "pruned": column("pruned"), "healed": column("healed")},
    ),
}
