"""The costs, gates and tables of the command `search`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from ..costs import UNITS
from ..errors import InputError
from ..objectives import objective_class
from ..study.tables import format_removed

if TYPE_CHECKING:
    from ..evaluator import Evaluator

STEPWISE = ("greedy", "beam")  # algorithms that remove unit by unit
NAMES = {"params": "parameters", "bytes": "bytes", "tokens_per_second": "tokens per second"}


def check_table(table: bool, algorithm: str) -> None:
    """Raise InputError for a table of an algorithm that does not remove unit by unit."""
    if table and algorithm not in STEPWISE:
        raise InputError(
            f"--table is of an algorithm that removes unit by unit, {' or '.join(STEPWISE)}, not "
            f"{algorithm}"
        )


def cost_record(
    evaluator: Evaluator, removed: tuple[int, ...] | None, measure_speed: bool
) -> dict[str, Any]:
    """Parameters and bytes of the whole and of the pruned model, and their measured speed; nothing
    for a sequence, which removes none."""
    from ..costs import before_and_after

    if removed is None:
        return {"size": {}}
    return {
        "size": before_and_after(evaluator.model, removed, evaluator.granularity, measure_speed)
    }


def cost_lines(record: Mapping[str, Any]) -> list[str]:
    """The lines about a search's budget and costs."""
    lines = []
    if record["budget"]:
        costs = record["costs"]
        after, before = (_format(costs["kind"], costs[when]) for when in ("after", "before"))
        lines.append(f"budget {record['budget']}: {after} of {before} {UNITS[costs['kind']]}")
    for name, (before, after) in record["size"].items():
        lines.append(
            f"{NAMES[name]}: {before:,.0f} before, {after:,.0f} after ({after / before:.1%})"
        )
    return lines


def path_table(record: Mapping[str, Any]) -> Table:
    """The loss and cost after each unit that went; each row's units contain those above."""
    objective = objective_class(record["objective"])
    kind = record["costs"]["kind"]
    table = Table("removed", "units", objective.header(), UNITS[kind], "of the whole")
    whole = float(record["costs"]["before"])
    dense = float(record["dense_loss"])
    table.add_row("0", "-", objective.format(dense, named=False), _format(kind, whole), "100.0%")
    for step in record["path"]:
        table.add_row(
            str(len(step["removed"])),
            format_removed(step["removed"]),
            objective.format(float(step["loss"]), named=False),
            _format(kind, step["cost"]),
            f"{float(step['cost']) / whole:.1%}",
        )
    return table


def _format(kind: str, cost: Any) -> str:
    return f"{float(cost):,.{2 if kind == 'latency_ms' else 0}f}"


def check_gate(record: Mapping[str, Any], max_loss: str | None) -> None:
    """Raise click.ClickException, so that the exit status is 1, for a loss above the gate.

    max_loss: a loss, or an increase over the whole model's such as +5%. A share is of the size of
    that loss, so that it is an increase for negative losses, too.
    """
    if max_loss is None:
        return
    loss, dense = float(record["loss"]), float(record["dense_loss"])
    most = float(max_loss.strip("+%"))
    of = ""
    if max_loss.endswith("%"):
        most, of = (
            dense + abs(dense) * most / 100,
            f", {max_loss} over the whole model's {dense:.6g}",
        )
    if loss > most:
        read = objective_class(record["objective"]).format(loss)
        raise click.ClickException(
            f"--max-loss: the loss is {loss:.6g} ({read}), above {most:.6g}{of}"
        )
