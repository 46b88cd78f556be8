"""The tables of a study that a terminal shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.table import Table
from rich.text import Text

from ..masks import Candidate
from ..objectives import Objective, objective_class
from ..study.judging import format_judged, judgement
from ..study.machines import machines_note
from ..study.tables import (
    TABLE_NOTE,
    calibration_table,
    format_dense,
    format_races,
    format_record,
    judge_notes,
    pattern_text,
    removed_share,
    results_table,
    size_name,
    units_header,
)
from .output import say


def print_cells(study: Mapping) -> None:
    """Print a table for each model, objective and budget, and notes on races, data and cost."""
    groups: dict[tuple, list[dict]] = {}
    for cell in study["cells"]:
        groups.setdefault((cell["model"], cell["objective"], cell["num_remove"]), []).append(cell)
    for (model, objective, num_remove), cells in groups.items():
        measured = objective_class(study["objectives"][objective]["name"])
        whole = judgement(study, model, objective)
        dense = format_dense(measured, float(whole["loss"]), float(whole["standard_error"]))
        rows = []
        for cell in cells:
            cost = (cell["masks"], cell["asked_unit_runs"], cell["naive_unit_runs"])
            result = cell["error"] or format_judged(
                measured, judgement(study, model, objective, cell)
            )
            chosen = cell["sequence"] if cell["removed"] is None else cell["removed"]
            rows.append((cell["algorithm"], chosen, result, *cost))
        title = f"{Path(model).name}, {objective}, {size_name(study, model, num_remove)} ({dense})"
        head = "sequence" if num_remove is None else "removed"
        shares = None
        if isinstance(num_remove, str):  # within a budget, masks remove different shares
            shares = [removed_share(study, cell) for cell in cells]
        say(results_table(title, measured.header(), rows, head, shares))
    say(TABLE_NOTE, style="dim")
    if machines := machines_note(study):
        say(machines)
    if study["inputs"]["racing"]:
        say(format_races(sum(cell["decided_early"] for cell in study["cells"])))
    if study["calibration"]:
        say(calibration_table(study["calibration"], study["objectives"] | study["held_out"]))
    for line in judge_notes(study):
        say(line)
    made, asked = (
        sum(cell[name] for cell in study["cells"]) for name in ("unit_runs", "asked_unit_runs")
    )
    if 0 < made < asked:
        how = "share their scores, and race" if study["inputs"]["racing"] else "share their scores"
        say(f"Searches {how}: {made:.0f} unit runs were made where they take {asked:.0f} alone.")


def print_pattern(study: Mapping) -> None:
    """Print the removed units of every search as a row of filled cells."""
    for model, units in study["num_units"].items():
        rows = [
            (cell["objective"], cell["algorithm"], cell["removed"])
            for cell in study["cells"]
            if cell["model"] == model and cell["removed"] is not None
        ]
        if not rows:
            continue
        say(f"\nRemoved units of {Path(model).name} (filled), by objective and algorithm:\n")
        say(pattern_text(rows, units))


def held_out_table(study: Mapping) -> Table:
    """All chosen candidates on the held-out data, each with its metric."""
    unseen = not any(described["shared_rows"] for described in study["held_out"].values())
    title = "\nOn held-out data" + ", which no search has seen" * unseen
    table = Table(title=title, title_justify="left")
    table.add_column(units_header(study["cells"]))
    table.add_column("chosen by")
    read = _judges(table, study["held_out"])
    for model in study["dense"]:
        prefix = f"{Path(model).name}: " * (len(study["dense"]) > 1)
        whole = [format_judged(known, judgement(study, model, label)) for label, known in read]
        table.add_row(Text(f"{prefix}-"), "whole model", *whole)
        chosen: dict[Candidate, dict[str, list[str]]] = {}
        cells = {}
        for cell in study["cells"]:
            if cell["model"] == model and not cell["error"]:
                cells[Candidate.of(cell)] = cell
                searches = chosen.setdefault(Candidate.of(cell), {})
                names = searches.setdefault(cell["objective"], [])
                names += [cell["algorithm"]] * (cell["algorithm"] not in names)
        for candidate, searches in chosen.items():
            by = "; ".join(f"{label}: {', '.join(names)}" for label, names in searches.items())
            values = [
                format_judged(known, judgement(study, model, label, cells[candidate]))
                for label, known in read
            ]
            table.add_row(Text(prefix + format_record(candidate.record)), Text(by), *values)
    return table


def controls_table(study: Mapping) -> Table:
    """The controls, which no search chose, under every objective."""
    table = Table(title="\nControls, which no search chose", title_justify="left")
    table.add_column("control")
    table.add_column(units_header(study["controls"]))
    read = _judges(table, {**study["objectives"], **study["held_out"]})
    for control in study["controls"]:
        model = control["model"]
        prefix = f"{Path(model).name}: " * (len(study["dense"]) > 1)
        under = f", {control['under']}" * bool(control["under"])
        values = [
            format_judged(known, judgement(study, model, label, control)) for label, known in read
        ]
        table.add_row(Text(f"{prefix}{control['name']}{under}"), format_record(control), *values)
    return table


def _judges(table: Table, described: Mapping[str, Mapping]) -> list[tuple[str, type[Objective]]]:
    """Add a column for each judge to a table, and return the judges."""
    read = [(label, objective_class(of["name"])) for label, of in described.items()]
    for label, known in read:
        table.add_column(Text(f"{label}: {known.header()}"), justify="right")
    return read
