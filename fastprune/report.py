"""Search results as tables, and a study as one page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from . import figures
from .search import describe_algorithms

FULL, EMPTY = "■", "·"


def format_removed(removed: Sequence[int]) -> str:
    """Unit indices with runs shortened: (3, 4, 5, 9) is '3-5 9'; '-' when nothing is removed."""
    runs: list[list[int]] = []
    for unit in removed:
        if runs and unit == runs[-1][-1] + 1:
            runs[-1].append(unit)
        else:
            runs.append([unit])
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "-"


def format_loss(loss: float) -> str:
    return f"{loss:.5f}" if math.isfinite(loss) else f"{loss} (not finite)"


def format_saved(naive: float, runs: float) -> str:
    """How many times fewer runs were made than one pass per mask takes; '' where they are not fewer."""
    return f"{naive / runs:.1f}x fewer" if 0 < runs < naive else ""


def format_dense(objective: str, loss: float) -> str:
    """The dense model's loss; that of perplexity with what it means."""
    meaning = f" = log of perplexity {math.exp(loss):.3f}" if objective == "perplexity" and loss < 700 else ""
    return f"dense loss {format_loss(loss)}{meaning}"


TABLE_NOTE = (
    "runs: unit runs, each prefix that masks share counted once; naive: those of one forward pass per mask; "
    "saved: naive / runs."
)


def results_table(title: str, rows: Iterable[tuple]) -> Table:
    """A table of searches; rows (algorithm, removed, loss, masks, layer runs, naive layer runs).

    One that found nothing has None removed and the reason in the place of its loss.
    """
    table = Table(title=Text(title, "table.title"), title_justify="left")  # names are no markup
    for name in ("algorithm", "removed"):
        table.add_column(name, no_wrap=True)
    for name in ("loss", "masks", "runs", "naive", "saved"):
        table.add_column(name, justify="right", no_wrap=name != "loss")
    for algorithm, removed, loss, masks, layer_runs, naive in rows:
        found = ("none", loss) if removed is None else (format_removed(removed), format_loss(loss))
        saved = f"{naive / layer_runs:.1f}x" if layer_runs else "-"
        table.add_row(algorithm, *found, str(masks), f"{layer_runs:.0f}", f"{naive:.0f}", saved)
    return table


def pattern_text(rows: Sequence[tuple[str, str, Sequence[int]]], num_units: int) -> str:
    """The pattern figure in characters: a line per (objective, algorithm, removed), a full cell where removed."""
    names = [f"{objective}  {algorithm}" for objective, algorithm, _ in rows]
    width = max(map(len, names), default=0)
    return "\n".join(
        f"{name:>{width}}  " + " ".join(FULL if unit in removed else EMPTY for unit in range(num_units))
        for name, (_, _, removed) in zip(names, rows)
    )


def write_report(study: Mapping, path: Path) -> None:
    """One self-contained page of a study: figures and sortable tables, readable without this repository."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("fastprune", "templates"), autoescape=True)
    environment.filters.update(removed=format_removed, loss=format_loss)
    found = [cell for cell in study["cells"] if not cell["error"]]
    page = environment.get_template("report.html").render(
        study=study,
        found=found,
        failed=[cell for cell in study["cells"] if cell["error"]],
        best=_best(found),
        figures={kind: [figures.as_svg(figure) for figure in made] for kind, made in study_figures(study).items()},
        algorithms=[row for row in describe_algorithms() if row["name"] in study["inputs"]["algorithms"]],
    )
    path.write_text(page, encoding="utf-8")


def _best(cells: Sequence[Mapping]) -> list[dict]:
    """For each model, budget and objective, the mask of lowest loss, and the algorithms that found it."""
    best: dict[tuple, dict] = {}
    for cell in cells:
        entry = best.setdefault((cell["model"], cell["num_remove"], cell["objective"]), {**cell, "algorithms": []})
        if cell["loss"] < entry["loss"]:
            entry.update(cell, algorithms=[])
        if tuple(cell["removed"]) == tuple(entry["removed"]):
            entry["algorithms"].append(cell["algorithm"])
    return list(best.values())


def study_figures(study: Mapping) -> dict[str, list]:
    """The figures of a study: patterns, ranks, spreads, similarity."""
    labels = list(study["objectives"])
    cells = [cell for cell in study["cells"] if not cell["error"]]
    names = {
        (model, num_remove): f"{model}, " * (len(study["num_units"]) > 1) + f"{num_remove} of {units} removed"
        for model, units in study["num_units"].items()
        for num_remove in study["inputs"]["budgets"]
    }
    found: dict[str, list] = {"patterns": [], "ranks": [], "spreads": [], "similarity": []}
    for (model, num_remove), name in names.items():
        group = [cell for cell in cells if (cell["model"], cell["num_remove"]) == (model, num_remove)]
        rows = [(cell["objective"], cell["algorithm"], cell["removed"]) for cell in group]
        if rows:
            found["patterns"].append(figures.pattern_figure(rows, study["num_units"][model], name))
        for chosen_by in labels:
            others = {
                entry["judged_by"]: entry["rho"]
                for entry in study["spearman"]
                if (entry["model"], entry["num_remove"], entry["chosen_by"]) == (model, num_remove, chosen_by)
            }
            by_mask: dict[tuple, list[Mapping]] = {}
            for cell in group:
                if cell["objective"] == chosen_by:
                    by_mask.setdefault(tuple(cell["removed"]), []).append(cell)
            losses = {
                tuple(cell["algorithm"] for cell in same): [same[0]["losses"][label] for label in (chosen_by, *others)]
                for same in by_mask.values()
            }
            if others:
                found["ranks"].append(figures.rank_figure(name, chosen_by, others, losses))
    for judged_by in labels:
        strips: dict[str, dict[str, list[float]]] = {}
        for cell in cells:
            group = strips.setdefault(names[cell["model"], cell["num_remove"]], {})
            group.setdefault(cell["objective"], []).append(cell["losses"][judged_by])
        dense = {name: study["dense"][model][judged_by] for (model, _), name in names.items()}
        if strips:
            found["spreads"].append(figures.spread_figure(strips, dense, judged_by))
    for model, entry in study["similarity"].items():
        if entry:
            title = f"{model}: RLS {entry['rls']:.3f}, {len(set(entry['clusters']))} clusters"
            found["similarity"].append(figures.similarity_figure(entry["matrix"], entry["clusters"], title))
    return found
