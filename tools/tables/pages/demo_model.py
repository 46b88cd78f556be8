"""Tables of docs/demo-model.md."""

from __future__ import annotations

from ..render import Row, Table, column, fixed, load, percent


def without_blocks() -> list[Row]:
    """The whole model, and the model without each block."""
    rows = load("demo_model")["without"]
    return [{**row, "block": " ".join(map(str, row["removed"])) or "none"} for row in rows]


TABLES = {
    "demo_text": Table(
        lambda: [load("demo_model")["text"]],
        {
            "windows": column("windows"),
            "tokens of a window": column("tokens"),
            "perplexity (lower is better)": fixed("perplexity", 2),
            "of the unigram model": fixed("unigram", 1),
        },
    ),
    "demo_questions": Table(
        lambda: load("demo_model")["questions"],
        {
            "kind": column("kind"),
            "questions": column("questions"),
            "accuracy (higher is better)": percent("accuracy", 1),
            "chance": percent("chance", 1),
        },
    ),
    "demo_blocks": Table(
        without_blocks,
        {
            "block out": column("block"),
            "perplexity (lower is better)": fixed("perplexity", 2),
            "margin, nats (higher is better)": fixed("margin", 3),
        },
    ),
}
