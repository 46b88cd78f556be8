"""A study as one page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..io import write_file
from ..masks import Candidate
from ..objectives import Objective, format_size, objective_class
from ..search import describe_algorithms
from ..search.sizes import RemovalSize
from . import figures
from .judging import format_judged, format_to_whole, judgement, to_difference
from .machines import machines_note
from .tables import (
    answers,
    best_cells,
    difference_header,
    distance_header,
    format_record,
    judge_notes,
    removed_share,
    short_name,
    size_name,
    units_header,
    unseen_notes,
)


def write_report(study: Mapping, path: Path) -> None:
    """Write a study as one self-contained page, with figures and sortable tables.

    Args:
        study: The content of `study.json`.
        path: The HTML file; an existing one is replaced.
    """
    from jinja2 import Environment

    environment = Environment(autoescape=True)
    environment.filters.update(
        units=format_record,
        data=_data,
        name=short_name,
        size=lambda key: "-" if key is None else key,
        asked=lambda budget: RemovalSize.of(budget).describe(),
        share=lambda cell: removed_share(study, cell) or "-",
    )
    objectives = _objectives(study)
    found = [cell for cell in study["cells"] if not cell["error"]]
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        study=study,
        found=found,
        failed=[cell for cell in study["cells"] if cell["error"]],
        answers=answers(study),
        best=best_cells(study),
        machines=machines_note(study),
        notes=judge_notes(study),
        measures=objectives,
        judged=lambda model, label, cell=None: format_judged(
            objectives[label], judgement(study, model, label, cell)
        ),
        to_best=lambda model, label, cell: _to_best(
            objectives[label], judgement(study, model, label, cell)
        ),
        to_whole=lambda model, label, cell: (
            format_to_whole(objectives[label], judgement(study, model, label, cell)) or "-"
        ),
        head=units_header,
        unseen=not unseen_notes(study),
        distances={label: distance_header(label, of) for label, of in objectives.items()},
        differences={label: difference_header(label, of) for label, of in objectives.items()},
        figures={
            kind: [figures.as_svg(figure) for figure in made]
            for kind, made in study_figures(study).items()
        },
        algorithms=[
            row for row in describe_algorithms() if row["name"] in study["inputs"]["algorithms"]
        ],
    )
    write_file(path, page, replace=True)


def _objectives(study: Mapping) -> dict[str, type[Objective]]:
    """The objective of each label, which reads its losses as their metric."""
    described = {**study["objectives"], **study["held_out"]}
    return {label: objective_class(entry["name"]) for label, entry in described.items()}


def _to_best(objective: type[Objective], entry: Mapping) -> str:
    """A candidate's difference from the best one of its size; "best" for that one, and for one that
    equals it on every sample."""
    difference = to_difference(entry["to_best"])
    is_best = not difference.value and not difference.error > 0  # one sample has no error
    return "best" if is_best else objective.format_difference(difference)


def _data(objective: Mapping) -> str:
    """The source of an objective's calibration data, and its size."""
    size = format_size(objective["num_samples"], objective["num_tokens"])
    return f"{objective['source']}, {size}" if objective["source"] else size


def study_figures(study: Mapping) -> dict[str, list]:
    """The figures of a study: patterns, ranks, spreads, calibration sets, similarity."""
    labels, objectives = list(study["objectives"]), _objectives(study)
    cells = [cell for cell in study["cells"] if not cell["error"]]
    names = {
        (model, num_remove): f"{short_name(model)}, " * (len(study["num_units"]) > 1)
        + size_name(study, model, num_remove)
        for model in study["num_units"]
        for num_remove in dict.fromkeys(
            cell["num_remove"] for cell in study["cells"] if cell["model"] == model
        )
    }
    drawn: dict[str, list] = {
        "patterns": [],
        "ranks": [],
        "spreads": [],
        "calibration": [],
        "similarity": [],
    }
    for (model, num_remove), name in names.items():
        group = [
            cell for cell in cells if (cell["model"], cell["num_remove"]) == (model, num_remove)
        ]
        rows = [
            (cell["objective"], cell["algorithm"], cell["removed"])
            for cell in group
            if cell["removed"] is not None  # the figure is of removed units
        ]
        if rows:
            drawn["patterns"].append(figures.pattern_figure(rows, study["num_units"][model], name))
        for chosen_by in labels:
            others = {
                entry["judged_by"]: entry["rho"]
                for entry in study["spearman"]
                if (entry["model"], entry["num_remove"], entry["chosen_by"])
                == (model, num_remove, chosen_by)
            }
            by_mask: dict[Candidate, list[Mapping]] = {}
            for cell in group:
                if cell["objective"] == chosen_by:
                    by_mask.setdefault(Candidate.of(cell), []).append(cell)
            losses = {
                tuple(cell["algorithm"] for cell in same): [
                    same[0]["losses"][label] for label in (chosen_by, *others)
                ]
                for same in by_mask.values()
            }
            if others and len(losses) > 1:  # one mask has no ranks
                drawn["ranks"].append(figures.rank_figure(name, chosen_by, others, losses))
    for judged_by in (*labels, *study["held_out"]):
        strips: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for cell in cells:
            strip = strips.setdefault(names[cell["model"], cell["num_remove"]], {})
            entry = judgement(study, cell["model"], judged_by, cell)
            strip.setdefault(cell["objective"], []).append((entry["loss"], entry["standard_error"]))
        dense = {
            name: study["dense"][model][judged_by]["loss"] for (model, _), name in names.items()
        }
        if strips:
            objective = objectives[judged_by]
            drawn["spreads"].append(figures.spread_figure(strips, dense, judged_by, objective))
    groups: dict[tuple, list[Mapping]] = {}
    for entry in study["calibration"]:
        groups.setdefault((entry["model"], entry["num_remove"], *entry["sets"]), []).append(entry)
    for (model, num_remove, *sets), entries in groups.items():
        title = f"{names[model, num_remove]}, calibrated on {', '.join(sets)}"
        drawn["calibration"].append(figures.calibration_figure(entries, title, objectives))
    for model, entry in study["similarity"].items():
        if entry:
            clusters = len(set(entry["clusters"]))
            title = f"{short_name(model)}: RLS {entry['rls']:.3f}, {clusters} clusters"
            drawn["similarity"].append(
                figures.similarity_figure(entry["matrix"], entry["clusters"], title)
            )
    return drawn
