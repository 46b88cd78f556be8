"""The tables of a study that a terminal shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.table import Table
from rich.text import Text

from ..objectives import objective_class
from ..study.judging import format_judged, judgement
from ..study.machines import machines_note
from ..study.tables import (
    TABLE_NOTE,
    calibration_table,
    format_dense,
    format_races,
    format_removed,
    judge_notes,
    pattern_text,
    results_table,
)
from .output import say


def print_cells(study: Mapping) -> None:
    """Print a table for each model, objective and budget, and notes on races, data and cost."""
    groups: dict[tuple, list[dict]] = {}
    for cell in study["cells"]:
        groups.setdefault((cell["model"], cell["objective"], cell["num_remove"]), []).append(cell)
    for (model, objective, num_remove), cells in groups.items():
        measured = objective_class(study["objectives"][objective]["name"])
        dense = format_dense(measured, study["dense"][model][objective]["loss"])
        rows = []
        for cell in cells:
            cost = (cell["masks"], cell["asked_unit_runs"], cell["naive_unit_runs"])
            result = cell["error"] or measured.format(cell["loss"], named=False)
            rows.append((cell["algorithm"], cell["removed"], result, *cost))
        units = f"{num_remove} of {study['num_units'][model]} removed"
        title = f"{Path(model).name}, {objective}, {units} ({dense})"
        say(results_table(title, measured.header(), rows))
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
            if cell["model"] == model and not cell["error"]
        ]
        say(f"\nRemoved units of {Path(model).name} (filled), by objective and algorithm:\n")
        say(pattern_text(rows, units))


def held_out_table(study: Mapping) -> Table:
    """The chosen masks on the held-out data, each loss through its metric."""
    unseen = not any(described["shared_rows"] for described in study["held_out"].values())
    title = "\nOn held-out data" + ", which no search has seen" * unseen
    table = Table(title=title, title_justify="left")
    table.add_column("removed")
    table.add_column("chosen by")
    read = []
    for label, described in study["held_out"].items():
        known = objective_class(described["name"])
        read.append((label, known))
        table.add_column(Text(f"{label}: {known.header()}"), justify="right")
    for model in study["dense"]:
        prefix = f"{Path(model).name}: " * (len(study["dense"]) > 1)
        chosen: dict[tuple[int, ...], dict[str, list[str]]] = {(): {}}
        for cell in study["cells"]:
            if cell["model"] == model and not cell["error"]:
                searches = chosen.setdefault(tuple(cell["removed"]), {})
                names = searches.setdefault(cell["objective"], [])
                names += [cell["algorithm"]] * (cell["algorithm"] not in names)
        for removed, searches in chosen.items():
            by = "; ".join(f"{label}: {', '.join(names)}" for label, names in searches.items())
            values = [
                format_judged(known, judgement(study, model, label, removed))
                for label, known in read
            ]
            table.add_row(Text(prefix + format_removed(removed)), Text(by or "(dense)"), *values)
    return table
