"""The costs, gates and tables of the command `search`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from ..costs import UNITS, before_and_after
from ..errors import InputError, shown
from ..masks import format_removed
from ..objectives import objective_class
from ..search import known_algorithms
from ..study.figures import check_installed, path_figure, save
from ..study.judging import format_judged
from ..study.tables import short_name
from ..validate import check_folder
from .held_out import dense_of
from .options import naming
from .output import note

if TYPE_CHECKING:
    from ..evaluator import Evaluator
    from ..search.registry import Algorithm

NAMES = {"params": "parameters", "bytes": "bytes", "tokens_per_second": "tokens per second"}


def check_stepwise(flags: Mapping[str, object], chosen: Algorithm) -> None:
    """Raise InputError for a flag about steps if the algorithm does not remove unit by unit."""
    for flag, value in flags.items():
        if value and not chosen.stepwise:
            stepwise = [known.name for known in known_algorithms().values() if known.stepwise]
            raise InputError(
                f"{flag} is of an algorithm that removes unit by unit, {' or '.join(stepwise)}, "
                f"not {chosen.name}"
            )


def check_figure(figure: str | None) -> None:
    """Raise InputError, before any work, for a figure that could not be written."""
    if figure is None:
        return
    place = Path(figure)
    if place.suffix not in (".png", ".svg") or place.is_dir():
        raise InputError(f"--figure must be a .png or .svg file, not {shown(figure)}")
    with naming("--figure"):
        check_folder(place.absolute().parent)
    check_installed()


def write_path_figure(record: Mapping[str, Any], figure: str | None) -> None:
    """Draw the loss and cost of each size of a search's record into a file, unless it is None.

    Raises click.ClickException if the file cannot be written.
    """
    if figure is None:
        return
    objective = objective_class(record["objective"])
    costs = record["costs"]
    points = [
        (len(s["removed"]), float(s["cost"]), float(s["loss"]), float(s["standard_error"]))
        for s in _steps(record)
    ]
    title = f"{short_name(record['model'])}, {record['algorithm']}"
    drawn = path_figure(points, objective, UNITS[costs["kind"]], title)
    try:
        save(drawn, Path(figure))
    except OSError as error:
        raise click.ClickException(f"{figure}: cannot be written ({error.strerror})") from None
    note(f"written: {figure}")


def cost_record(
    evaluator: Evaluator, removed: tuple[int, ...] | None, measure_speed: bool
) -> dict[str, Any]:
    """Parameters, bytes and measured speed of the whole and the pruned model; none of sequences."""
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
    """The loss and cost after each removed unit. A row's units include those of the row above."""
    objective = objective_class(record["objective"])
    kind = record["costs"]["kind"]
    table = Table("removed", "units", objective.header(), UNITS[kind], "of the whole")
    whole = float(record["costs"]["before"])
    for step in _steps(record):
        table.add_row(
            str(len(step["removed"])),
            format_removed(step["removed"]),
            format_judged(objective, step),
            _format(kind, step["cost"]),
            f"{float(step['cost']) / whole:.1%}",
        )
    return table


def _steps(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The whole model, then the result after each removed unit."""
    whole = {"removed": [], "cost": record["costs"]["before"], **dense_of(record)}
    return [whole, *record["path"]]


def _format(kind: str, cost: Any) -> str:
    return f"{float(cost):,.{2 if kind == 'latency_ms' else 0}f}"


def check_gate(record: Mapping[str, Any], max_loss: str | None) -> None:
    """Raise click.ClickException, with exit status 1, for a loss above the gate.

    Args:
        record: The search's record.
        max_loss: A loss, or an increase over the whole model's loss such as +5%. The share is of
            that loss's absolute value, so that it is an increase for negative losses, too.
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
