"""Search results as tables and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from .search import SearchResult

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


def results_table(results: Sequence[SearchResult], title: str) -> Table:
    """One row per search: algorithm, removed units, loss, masks, layer runs against naive layer runs, seconds."""
    table = Table(title=title, title_justify="left")
    table.add_column("algorithm")
    table.add_column("removed")
    for name in ("loss", "masks", "layer runs", "naive", "saved", "seconds"):
        table.add_column(name, justify="right")
    for r in results:
        saved = f"{r.naive_layer_runs / r.layer_runs:.1f}x" if r.layer_runs else "-"
        row = (
            format_loss(r.loss),
            r.evaluations,
            f"{r.layer_runs:.0f}",
            f"{r.naive_layer_runs:.0f}",
            saved,
            f"{r.seconds:.1f}",
        )
        table.add_row(r.algorithm, format_removed(r.removed), *map(str, row))
    return table


def pattern_text(results: Sequence[SearchResult]) -> str:
    """The pattern figure in characters: a line per search, a column per unit, a full cell where removed."""
    width = max(len(_label(r)) for r in results)
    return "\n".join(
        f"{_label(r):>{width}}  " + " ".join(EMPTY if kept else FULL for kept in r.mask.tolist()) for r in results
    )


def pattern_figure(results: Sequence[SearchResult], path: Path, title: str) -> None:
    """Draw which units each search removes as a PNG: a row per search, a column per unit, a cell filled where removed.

    Searches of one objective stand together and share a colour. Needs the extra `plots`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    objectives = list(dict.fromkeys(r.objective for r in results))
    results = sorted(results, key=lambda r: objectives.index(r.objective))
    num_units = len(results[0].mask)
    figure, axes = pyplot.subplots(figsize=(1.8 + 0.34 * num_units, 1.1 + 0.34 * len(results)), layout="constrained")
    for y, r in enumerate(results):
        colour = f"C{objectives.index(r.objective)}"
        for x, kept in enumerate(r.mask.tolist()):
            face = "#f2f2f2" if kept else colour
            axes.add_patch(
                Rectangle((x - 0.45, y - 0.42), 0.9, 0.84, facecolor=face, edgecolor="#d0d0d0", linewidth=0.5)
            )
    for y in range(1, len(results)):
        if results[y].objective != results[y - 1].objective:
            axes.axhline(y - 0.5, color="#707070", linewidth=0.8)
    axes.set(xlim=(-0.6, num_units - 0.4), ylim=(len(results) - 0.4, -0.6), xlabel="unit", title=title)
    axes.set_xticks(range(num_units))
    axes.set_yticks(range(len(results)), [_label(r) for r in results])
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=160)
    pyplot.close(figure)


def _label(result: SearchResult) -> str:
    return f"{result.objective} {result.algorithm}"
