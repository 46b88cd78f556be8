"""Search results as text and as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ..costs import UNITS, UnitCosts
from ..masks import Candidate, format_removed
from ..objectives import Objective, no_judge, objective_class
from ..search.sizes import Key, RemovalSize
from .judging import WINDOW, direction, format_judged, format_to_whole, judgement, to_difference

FULL, EMPTY = "#", "."
MOST_COMPARED = 3  # candidates beside the best one, in a line


def format_record(record: Mapping) -> str:
    """Format the units of a record of `masks.record_units`."""
    if record.get("sequence") is not None:
        return f"sequence {format_removed(record['sequence'])}"
    return format_removed(record["removed"])


def units_header(records: Iterable[Mapping]) -> str:
    """The head of a column of `format_record`."""
    kinds = ("removed", "sequence")
    heads = {kind for row in records for kind in kinds if row.get(kind) is not None}
    return ", or ".join(kind for kind in kinds if kind in heads) or "removed"


def format_saved(naive: float, runs: float) -> str:
    """The factor by which runs are fewer than with one pass a mask; '' if they are not."""
    return f"{naive / runs:.1f}x fewer" if 0 < runs < naive else ""


def format_dense(
    objective: Objective | type[Objective], loss: float, error: float | None = None
) -> str:
    """The whole model's loss, under its metric."""
    return f"whole model: {objective.format(loss, error)}"


def short_name(model: str) -> str:
    """A model's name without the folders of this machine; a hub id stays whole."""
    return Path(model).name if Path(model).is_absolute() else model


def size_name(study: Mapping[str, Any], model: str, size: Key) -> str:
    """A size of removals of a model in words, with the share or budget that asked for it."""
    name = RemovalSize.of(size).describe(study["num_units"][model])
    asked = [entry["asked"] for entry in study["sizes"][model] if entry["size"] == size]
    return f"{name} ({asked[0]})" if asked and asked[0] != size else name


def removed_share(study: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    """The share of the model that a mask removes; '' for a sequence.

    It is a share of the budget's costs, and without a budget of parameters. Parameters that units
    share are removed with the last of these units.
    """
    if cell["removed"] is None:
        return ""
    if costs := cell.get("costs"):
        kind, share = UNITS[costs["kind"]], 1 - float(costs["after"]) / float(costs["before"])
    else:
        parameters = study["parameters"][cell["model"]]
        shared = [(frozenset(of["units"]), of["parameters"]) for of in parameters["shared"]]
        whole = UnitCosts("params", parameters["total"], tuple(parameters["own"]), tuple(shared))
        kind, share = UNITS["params"], 1 - whole.after(cell["removed"]) / whole.total
    return f"{100 * share:.{0 if share >= 0.1 else 1}f} % fewer {kind}"


def best_cells(study: Mapping) -> list[dict]:
    """The search of lowest loss for each model, budget and objective, and those that tie with it.

    A candidate has one entry, whose `algorithms` names all algorithms that chose it.
    """
    best: dict[tuple, dict[Candidate, dict]] = {}
    for cell in study["cells"]:
        if cell["error"]:
            continue
        entries = best.setdefault((cell["model"], cell["num_remove"], cell["objective"]), {})
        lowest = min((entry["loss"] for entry in entries.values()), default=cell["loss"])
        if cell["loss"] < lowest:
            entries.clear()
        if cell["loss"] <= lowest:
            entry = entries.setdefault(Candidate.of(cell), {**cell, "algorithms": []})
            entry["algorithms"].append(cell["algorithm"])
    return [entry for entries in best.values() for entry in entries.values()]


def answers(study: Mapping) -> list[str]:
    """A line with the best mask under the first objective, for each model and budget.

    It names the masks that tie with the best one, and describes the first of them. Searches over
    sequences add a line with the best sequence. Held-out objectives judge it; without these, the
    study's own objectives do.
    """
    labels = list(study["held_out"] or study["objectives"])
    described = {**study["objectives"], **study["held_out"]}
    groups: dict[tuple[str, Key], list[dict]] = {}
    for cell in best_cells(study):
        groups.setdefault((cell["model"], cell["num_remove"]), []).append(cell)
    lines = []
    for (model, _), (cell, *rest) in groups.items():
        names: list[str] = []
        changes = []
        for label in labels:
            metric = objective_class(described[label]["name"])
            names.append(metric.metric_name)
            before = format_judged(metric, judgement(study, model, label))
            after = format_judged(metric, judgement(study, model, label, cell))
            name = metric.metric_name if names.count(names[-1]) == 1 else label
            change = f"{name} ({direction(metric)}) {before} -> {after}"
            difference = format_to_whole(metric, judgement(study, model, label, cell))
            changes.append(f"{change}, difference {difference}" if difference else change)
        if cell["removed"] is None:
            runs = f"Run {format_removed(cell['sequence'])}"
            changes.append(f"{len(cell['sequence'])} units in place of {study['num_units'][model]}")
        else:
            runs = f"Remove {format_removed(cell['removed'])}"
            changes.append(removed_share(study, cell))
        start = f"{short_name(model)}: " * (len(study["num_units"]) > 1)
        judged = " (on held-out data)" * bool(study["held_out"])
        ties = [entry for entry in rest if entry["objective"] == cell["objective"]]
        if ties:
            runs += f" ({_tied(map(format_record, ties))} under {cell['objective']})"
        lines.append(f"{start}{runs}: {', '.join(changes)}{judged}")
    return lines


def judge_notes(study: Mapping) -> list[str]:
    """A line for each objective that judges nothing on a model, or shares text with a calibration
    set."""
    described = {**study["objectives"], **study["held_out"]}
    notes = []
    for model, results in study["dense"].items():
        for label, result in results.items():
            if note := no_judge(described[label], result["loss"]):
                notes.append(f"{Path(model).name}, {label}: {note}")
    return notes + unseen_notes(study)


def unseen_notes(study: Mapping[str, Any]) -> list[str]:
    """A line for each held-out objective of a study that shares text with a calibration set."""
    return [
        f"{label}: {described['shared_rows']} of its {described['num_samples']} samples share "
        f"{WINDOW} tokens in a row with a calibration set; it is not unseen"
        for label, described in study["held_out"].items()
        if described["shared_rows"]
    ]


def comparison_lines(study: Mapping[str, Any]) -> list[str]:
    """The best chosen mask or sequence, and the others' differences, by model, judge and size.

    Held-out objectives judge; without these, the study's own do. A line names the candidates whose
    metric equals the best one's, and has the three best of the others. Controls are marked, and so
    are differences below two standard errors.
    """
    judges = list(study["held_out"] or study["objectives"])
    described = {**study["objectives"], **study["held_out"]}
    lines = []
    for model, by_label in study["judgements"].items():
        start = f"{short_name(model)}, " * (len(study["judgements"]) > 1)
        for label in judges:
            objective = objective_class(described[label]["name"])
            groups: dict[Key, list[Mapping[str, Any]]] = {}
            for entry in by_label[label]:
                groups.setdefault(entry["size"], []).append(entry)
            for size, entries in groups.items():
                if len(entries) < 2:
                    continue
                # a control is the best only if no search chose a candidate
                best = min(entries, key=lambda e: (e["is_control"], *_by_loss(e)))
                rest = sorted((e for e in entries if e is not best), key=_by_loss)
                ties = [entry for entry in rest if _by_loss(entry) == _by_loss(best)]
                rest = [entry for entry in rest if _by_loss(entry) != _by_loss(best)]
                tied = f", {_tied(map(_marked, ties))}" if ties else ""
                others = [
                    f"{_marked(entry)} "
                    f"{objective.format_difference(to_difference(entry['to_best']))}"
                    for entry in rest[:MOST_COMPARED]
                ]
                if len(rest) > MOST_COMPARED:
                    others.append(f"and {len(rest) - MOST_COMPARED:,} more")
                lines.append(
                    f"{start}{label}, {RemovalSize.of(size).describe()}: best {_marked(best)}"
                    f"{tied} ({objective.metric_name} {format_judged(objective, best)}, "
                    f"{direction(objective)})" + f"; others: {'; '.join(others)}" * bool(others)
                )
    return lines


def _tied(names: Iterable[str]) -> str:
    """A note that names the candidates whose loss equals the best one's."""
    first, more = (names := list(names))[:MOST_COMPARED], len(names) - MOST_COMPARED
    return f"tied with {'; '.join([*first, *[f'{more:,} more'] * (more > 0)])}"


def _by_loss(entry: Mapping[str, Any]) -> tuple[bool, float]:
    """A sort key: the lowest loss first, and losses that are not finite last."""
    loss = float(entry["loss"])
    return not math.isfinite(loss), loss


def _marked(entry: Mapping[str, Any]) -> str:
    """The units of a judged candidate, and whether it is a control."""
    candidate = Candidate.of(entry)
    units = format_removed(candidate.sequence or candidate.removed or ())
    return f"{units} (control)" if entry["is_control"] else units


def format_races(decided_early: int) -> str:
    """A note about the subsets that left races early, and are not in a table."""
    return (
        f"{decided_early} subsets left a race early; masks counts those whose loss is "
        f"remembered, exact"
    )


TABLE_NOTE = (
    "runs: unit runs, each prefix that masks share counted once; naive: those of one forward pass "
    "per mask; "
    "saved: naive / runs."
)


def results_table(
    title: str,
    header: str,
    rows: Iterable[tuple],
    units_header: str = "removed",
    shares: Sequence[str] | None = None,
) -> Table:
    """Make a table of searches.

    Args:
        title: The title.
        header: The head of the column of results, `Objective.header`.
        rows: (algorithm, removed, result, masks, unit runs, naive unit runs). A result is text of
            `Objective.format`. A search that found nothing has None, and the reason as its result.
        units_header: The head of the column of units, such as "sequence".
        shares: The share that each row removes, such as "25 % fewer parameters".
    """
    table = Table(title=Text(title, "table.title"), title_justify="left")  # names are no markup
    for name in ("algorithm", units_header, *["share"] * (shares is not None)):
        table.add_column(name, no_wrap=True)
    for name in (header, "masks", "runs", "naive", "saved"):
        table.add_column(name, justify="right", no_wrap=name != header)
    for number, (algorithm, removed, result, masks, unit_runs, naive) in enumerate(rows):
        units = "none" if removed is None else format_removed(removed)
        saved = f"{naive / unit_runs:.1f}x" if unit_runs else "-"
        counts = (str(masks), f"{unit_runs:.0f}", f"{naive:.0f}", saved)
        share = () if shares is None else (shares[number],)
        table.add_row(algorithm, units, *share, result, *counts)
    return table


def calibration_table(entries: Sequence[Mapping], described: Mapping[str, Mapping]) -> Table:
    """Make a table of the effect of the calibration set; the algorithm's effect is in brackets.

    Args:
        entries: Entries of `compare_calibrations`.
        described: The objectives' descriptions, by label.
    """
    table = Table(title="Another calibration set (another algorithm)", title_justify="left")
    table.add_column("sets")
    table.add_column("removed", justify="right")
    table.add_column("algorithm", no_wrap=True)
    table.add_column("overlap", justify="right")
    judges = {judge: objective_class(described[judge]["name"]) for judge in entries[0]["metrics"]}
    for judge, objective in judges.items():
        table.add_column(Text(distance_header(judge, objective)), justify="right")
    for entry in entries:
        differences = [
            _both(entry["metrics"][judge], objective.digits) for judge, objective in judges.items()
        ]
        size = "-" if entry["num_remove"] is None else str(entry["num_remove"])
        row = (Text(", ".join(entry["sets"])), size, entry["algorithm"])
        table.add_row(*row, _both(entry["overlap"], 3), *differences)
    return table


def difference_header(judge: str, objective: type[Objective]) -> str:
    """The head of a column of differences under a judge, with metric, unit and direction."""
    return f"{judge}: difference in {_in_units(objective)} ({direction(objective)})"


def distance_header(judge: str, objective: type[Objective]) -> str:
    """The head of a column of mean absolute differences under a judge, with metric and unit."""
    return f"{judge}: mean distance in {_in_units(objective)}"


def _in_units(objective: type[Objective]) -> str:
    """The metric with the unit of its differences."""
    return objective.metric_name + f", {objective.difference_unit()}" * bool(objective.unit)


def _both(values: Mapping, digits: int) -> str:
    first, second = (
        "n/a" if values[by] is None else f"{values[by]:.{digits}f}" for by in ("sets", "algorithms")
    )
    return f"{first} ({second})"


def pattern_text(rows: Sequence[tuple[str, str, Sequence[int]]], num_units: int) -> str:
    """Draw removed units as full cells of text, a line for each (objective, algorithm, removed)."""
    names = [f"{objective}  {algorithm}" for objective, algorithm, _ in rows]
    width = max(map(len, names), default=0)
    return "\n".join(
        f"{name:>{width}}  "
        + " ".join(FULL if unit in removed else EMPTY for unit in range(num_units))
        for name, (_, _, removed) in zip(names, rows)
    )
