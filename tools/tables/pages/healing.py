"""Tables of docs/healing.md."""

from __future__ import annotations

from collections.abc import Callable

from ..render import Row, Table, column, load, removed_blocks, rounded


def healing() -> list[Row]:
    """Each model on each judge, before and after training."""
    entries = []
    for model, result in load("healing").items():
        for row in result["rows"]:
            judge = result["judges"][row["judge"]]
            unit = " %" if judge["metric"] == "accuracy" else ""
            sampled = {"model": model, "unit": unit, "samples": judge["samples"]}
            entries.append({**row, **sampled, "metric": judge["metric"]})
    return entries


def measured(key: str) -> Callable[[Row], str]:
    """A column of a metric with its standard error and unit."""
    return lambda row: rounded(row[key], row[f"{key}_error"]) + row["unit"]


def difference(key: str) -> Callable[[Row], str]:
    """A column of a paired difference, marked where it is not told apart."""

    def cell(row: Row) -> str:
        value, error = row[key]["value"], row[key]["error"]
        if not error:
            return ""
        apart = "" if abs(value) > 2 * error else " (not told apart)"
        return f"{rounded(value, error, '+')}{row['unit']}{apart}"

    return cell


TABLES = {
    "healing": Table(
        healing,
        {
            "model": column("model"),
            "removed": removed_blocks,
            "judge": lambda row: f"{row['judge']}: {row['metric']}, n = {row['samples']}",
            "untrained": measured("untrained"),
            "trained": measured("trained"),
            "trained, to the whole model untrained": difference("trained_to_whole_untrained"),
            "trained, to the whole model trained alike": difference("trained_to_whole_trained"),
        },
    ),
}
