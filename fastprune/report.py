"""Search results as tables, and a study as one page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations
from pathlib import Path

from rich.table import Table

from . import figures

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


def results_table(title: str, rows: Iterable[tuple]) -> Table:
    """A table of searches; rows (algorithm, removed, loss, masks, layer runs, naive layer runs, seconds)."""
    table = Table(title=title, title_justify="left")
    for name in ("algorithm", "removed"):
        table.add_column(name, no_wrap=True)
    for name in ("loss", "masks", "runs", "naive", "saved", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    for algorithm, removed, loss, masks, layer_runs, naive, seconds in rows:
        saved = f"{naive / layer_runs:.1f}x" if layer_runs else "-"
        runs = (f"{layer_runs:.0f}", f"{naive:.0f}")
        table.add_row(algorithm, format_removed(removed), format_loss(loss), str(masks), *runs, saved, f"{seconds:.1f}")
    return table


def pattern_text(rows: Sequence[tuple[str, str, Sequence[int]]], num_units: int) -> str:
    """The pattern figure in characters: a line per (objective, algorithm, removed), a full cell where removed."""
    names = [f"{objective}  {algorithm}" for objective, algorithm, _ in rows]
    width = max(map(len, names))
    return "\n".join(
        f"{name:>{width}}  " + " ".join(FULL if unit in removed else EMPTY for unit in range(num_units))
        for name, (_, _, removed) in zip(names, rows)
    )


def write_report(study: Mapping, path: Path) -> None:
    """One self-contained page of a study: figures and sortable tables, readable without this repository."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("fastprune", "templates"), autoescape=True)
    environment.filters.update(removed=format_removed, loss=format_loss)
    page = environment.get_template("report.html").render(study=study, figures=_figures(study), groups=_groups(study))
    path.write_text(page, encoding="utf-8")


def _groups(study: Mapping) -> list[tuple[str, int]]:
    """(model, budget) of a study, in order."""
    return list(dict.fromkeys((cell["model"], cell["num_remove"]) for cell in study["cells"]))


def _group_name(study: Mapping, model: str, num_remove: int) -> str:
    units = f"{num_remove} of {study['num_units'][model]} removed"
    return f"{model}, {units}" if len(study["num_units"]) > 1 else units


def _figures(study: Mapping) -> dict[str, list[str]]:
    """The figures of a study as SVG: patterns, ranks, spreads, similarity."""
    cells = study["cells"]
    labels = list(dict.fromkeys(cell["objective"] for cell in cells))
    found: dict[str, list[str]] = {"patterns": [], "ranks": [], "spreads": [], "similarity": []}
    for model, num_remove in _groups(study):
        group = [cell for cell in cells if (cell["model"], cell["num_remove"]) == (model, num_remove)]
        rows = [(cell["objective"], cell["algorithm"], cell["removed"]) for cell in group]
        title = _group_name(study, model, num_remove)
        found["patterns"].append(figures.as_svg(figures.pattern_figure(rows, study["num_units"][model], title)))
    for chosen_by, judged_by in permutations(labels, 2):
        panels = []
        for entry in study["spearman"]:
            if (entry["chosen_by"], entry["judged_by"]) == (chosen_by, judged_by):
                losses = {
                    cell["algorithm"]: (cell["losses"][chosen_by], cell["losses"][judged_by])
                    for cell in cells
                    if (cell["model"], cell["num_remove"], cell["objective"])
                    == (entry["model"], entry["num_remove"], chosen_by)
                }
                panels.append((_group_name(study, entry["model"], entry["num_remove"]), losses, entry["rho"]))
        if panels:
            found["ranks"].append(figures.as_svg(figures.rank_figure(panels, chosen_by, judged_by)))
    for judged_by in labels:
        strips: dict[str, dict[str, list[float]]] = {}
        for cell in cells:
            group = strips.setdefault(_group_name(study, cell["model"], cell["num_remove"]), {})
            group.setdefault(cell["objective"], []).append(cell["losses"][judged_by])
        found["spreads"].append(figures.as_svg(figures.spread_figure(strips, judged_by)))
    for model, entry in study["similarity"].items():
        title = f"{model}: RLS {entry['rls']:.3f}, {len(set(entry['clusters']))} clusters"
        found["similarity"].append(figures.as_svg(figures.similarity_figure(entry["matrix"], entry["clusters"], title)))
    return found
