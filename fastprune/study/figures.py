"""Figures of searches and studies. Needs the extra `plots`."""

from __future__ import annotations

import importlib.util
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..io import write_file
from ..objectives import Objective
from .tables import distance_header

KEPT, EDGE, RULE, INK = "#f1f3f5", "#d5d9dd", "#868e96", "#1c2024"
# Colours by the names of variables, which a page may change, such as for dark mode.
PAGE_COLOURS = {KEPT: "--cell", EDGE: "--edge", INK: "--ink"}


def check_installed() -> None:
    """Raise InputError, before any work, when matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            "figures need matplotlib, which is not installed: pip install 'fastprune[plots]'"
        )


def pattern_figure(
    rows: Sequence[tuple[str, str, Sequence[int]]], num_units: int, title: str
) -> Any:
    """Draw the removed units of each search as filled cells: a row a search, a column a unit.

    Args:
        rows: (objective, algorithm, removed units). Rows of one objective are grouped and share a
            colour.
        num_units: U.
        title: The title.
    """
    plt = _pyplot()
    objectives = list(dict.fromkeys(objective for objective, _, _ in rows))
    rows = sorted(rows, key=lambda row: objectives.index(row[0]))
    names = [f"{objective}: {algorithm}" for objective, algorithm, _ in rows]
    width = 0.4 + 0.075 * max(map(len, names), default=0) + 0.34 * num_units
    figure, axes = plt.subplots(figsize=(width, 0.9 + 0.25 * len(rows)), layout="constrained")
    for y, (objective, _, removed) in enumerate(rows):
        for x in range(num_units):
            colour = f"C{objectives.index(objective)}" if x in removed else KEPT
            cell = plt.Rectangle(
                (x - 0.46, y - 0.42), 0.92, 0.84, facecolor=colour, edgecolor=EDGE, linewidth=0.5
            )
            axes.add_patch(cell)
        if y and objective != rows[y - 1][0]:
            axes.axhline(y - 0.5, color=RULE, linewidth=0.8)
    axes.set(
        xlim=(-0.6, num_units - 0.4),
        ylim=(len(rows) - 0.4, -0.6),
        xlabel="unit, in the order of depth",
    )
    axes.set_title(title, loc="left")
    axes.set_xticks(range(0, num_units, 1 if num_units <= 40 else 4))
    axes.set_yticks(range(len(rows)), names)
    _plain(axes)
    return figure


def rank_figure(
    title: str, chosen_by: str, others: Mapping[str, float | None], losses: Mapping[tuple, Sequence]
) -> Any:
    """Draw the ranks of masks, chosen under one objective, under it and under others.

    A mask is a line, and the best rank is on top. Masks of equal loss have equal ranks.

    Args:
        title: The title.
        chosen_by: The objective that chose the masks.
        others: Spearman's rho, or None, by the name of each other objective.
        losses: A mask's losses under `chosen_by` and each of the others, by the tuple of the
            algorithms that chose it.
    """
    from scipy.stats import rankdata

    plt = _pyplot()
    labels = ["\n".join(textwrap.wrap(", ".join(names), 46)) for names in losses]
    table = np.array([*losses.values()], dtype=float)  # [masks, objectives]
    ranks = rankdata(np.where(np.isfinite(table), table, np.inf), method="min", axis=0)
    places = np.argsort(
        np.lexsort((np.arange(len(table)), ranks[:, 0]))
    )  # of each label, from the top
    lines = np.array([label.count("\n") + 1 for label in labels])
    heights = np.array(
        [0.12 + 0.15 * lines[i] for i in np.argsort(places)]
    )  # inches, top to bottom
    left = (np.cumsum(heights) - heights / 2)[places]
    columns = [left]
    for rank in ranks.T[1:]:  # evenly; equal ranks side by side, in the order of the labels
        columns.append((np.argsort(np.lexsort((places, rank))) + 0.5) * heights.sum() / len(rank))
    figure, axes = plt.subplots(
        figsize=(4.2 + 2.0 * len(others), 0.75 + heights.sum()), layout="constrained"
    )
    for i, label in enumerate(labels):
        colour, ys = f"C{places[i] % 10}", [column[i] for column in columns]
        axes.plot(range(len(ys)), ys, color=colour, marker="o", markersize=13, linewidth=1.6)
        for x, y in enumerate(ys):
            axes.annotate(
                f"{ranks[i, x]:.0f}", (x, y), ha="center", va="center", fontsize=7.5, color="white"
            )
        axes.annotate(
            label, (0, ys[0]), xytext=(-11, 0), textcoords="offset points", ha="right", va="center"
        )
    axes.set(xlim=(-0.2, len(others) + 0.2), ylim=(heights.sum(), 0), yticks=[])
    rho = [
        f"by {name}\nρ = " + ("n/a" if value is None else f"{value:+.2f}")
        for name, value in others.items()
    ]
    axes.set_xticks(range(len(columns)), [f"rank by {chosen_by}\n", *rho])
    axes.xaxis.tick_top()
    figure.suptitle(f"{title}, chosen by {chosen_by}", x=0.01, ha="left", fontsize=10)
    _plain(axes)
    return figure


def spread_figure(
    groups: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    dense: Mapping[str, float],
    judged_by: str,
    objective: type[Objective],
) -> Any:
    """Draw the spread of algorithms: a strip of metrics for each group and choosing objective.

    Bars are standard errors.

    The axis is logarithmic if positive values are more than a factor of 10 apart.

    Args:
        groups: Losses under `judged_by` with their standard errors, by group and by the objective
            that chose the masks.
        dense: The loss of the whole model by group, drawn as a grey mark.
        judged_by: The label of the judging objective.
        objective: Its class, whose metric the axis has.
    """
    plt = _pyplot()
    choosers = list(dict.fromkeys(chooser for group in groups.values() for chooser in group))
    rows = [(group, chooser) for group, strips in groups.items() for chooser in strips]
    figure, axes = plt.subplots(figsize=(8.5, 0.9 + 0.3 * len(rows)), layout="constrained")
    shown: list[float] = []
    for y, (group, chooser) in enumerate(rows):
        losses = [(float(loss), float(error)) for loss, error in groups[group][chooser]]
        values = np.array([objective.metric(loss) for loss, _ in losses])
        slopes = np.array([abs(objective.slope(loss)) for loss, _ in losses])  # the delta method
        errors = np.nan_to_num(slopes * [error for _, error in losses], posinf=0.0)
        whole = objective.metric(dense[group])
        shown += [*values[np.isfinite(values)].tolist(), whole]
        jitter = np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else 0
        axes.axhline(y, color=KEPT, linewidth=7, zorder=0)
        axes.scatter([whole], [y], s=90, marker="|", color=RULE, zorder=1)
        colour = f"C{choosers.index(chooser)}"
        axes.scatter(values, y + jitter, s=24, alpha=0.8, color=colour, zorder=2)
        axes.errorbar(
            values, y + jitter, xerr=errors, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.5
        )
        if y and group != rows[y - 1][0]:
            axes.axhline(y - 0.5, color=RULE, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{group}, chosen by {chooser}" for group, chooser in rows])
    axes.set(
        xlabel=f"{objective.header()}; bars: standard errors; grey mark: nothing removed",
        ylim=(len(rows) - 0.4, -0.6),
    )
    axes.set_title(f"Judged by {judged_by}", loc="left")
    if shown and 0 < 10 * min(shown) < max(shown) < np.inf:
        from matplotlib.ticker import LogLocator, NullLocator

        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    _plain(axes)
    return figure


def calibration_figure(
    entries: Sequence[Mapping], title: str, objectives: Mapping[str, type[Objective]]
) -> Any:
    """Draw the effect of the calibration set beside that of the algorithm: a row an algorithm.

    The first panel has overlaps of removals. Each further panel has the differences of the metric
    under one judge.

    Args:
        entries: Entries of `compare_calibrations` for one model, budget and objective.
        title: The title.
        objectives: The judges' classes, by label.
    """
    plt = _pyplot()
    judges = list(entries[0]["metrics"])
    size = (2.4 + 2.6 * (1 + len(judges)), 1.3 + 0.25 * len(entries))
    figure, panels = plt.subplots(
        1, 1 + len(judges), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    rows = [[entry["overlap"], *entry["metrics"].values()] for entry in entries]
    heads = [distance_header(judge, objectives[judge]) for judge in judges]
    names = ["overlap of removed units", *(head.replace(": ", ":\n", 1) for head in heads)]
    for column, (axes, name) in enumerate(zip(panels[0], names)):
        for y, row in enumerate(rows):
            axes.axhline(y, color=KEPT, linewidth=7, zorder=0)
            for by, marker, filled in (("sets", "o", True), ("algorithms", "D", False)):
                if row[column][by] is not None:
                    colour = "C0" if filled else "none"
                    axes.scatter(
                        [row[column][by]],
                        [y],
                        s=30,
                        marker=marker,
                        facecolor=colour,
                        edgecolor="C0",
                        zorder=2,
                    )
        axes.set(
            xlabel=name, ylim=(len(rows) - 0.4, -0.6), xlim=(-0.04, 1.04) if column == 0 else None
        )
        if column and (most := axes.get_xlim()[1]) > 0:
            axes.set_xlim(-0.04 * most, most)
        _plain(axes)
    panels[0][0].set_yticks(range(len(rows)), [entry["algorithm"] for entry in entries])
    figure.suptitle(
        f"{title}\nfilled: another calibration set; open: another algorithm",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    return figure


def similarity_figure(matrix: np.ndarray, clusters: Sequence[int], title: str) -> Any:
    """Draw the similarity of states as a heat map, with the clusters of units below."""
    plt = _pyplot()
    matrix = np.asarray(matrix)
    size = 3.4 + 0.13 * len(matrix)
    figure, axes = plt.subplots(figsize=(size + 0.9, size), layout="constrained")
    image = axes.imshow(matrix, cmap="viridis", vmin=min(0.0, matrix.min()), vmax=1)
    figure.colorbar(image, ax=axes, label="mean token cosine", shrink=0.85)
    below, height = len(matrix), 0.04 * len(matrix)
    for unit, cluster in enumerate(clusters):
        axes.add_patch(
            plt.Rectangle((unit - 0.5, below - 0.2), 1, height, facecolor=f"C{cluster % 10}")
        )
    axes.set_ylim(below + height, -0.5)
    axes.set_title(title, loc="left")
    axes.set(
        ylabel="state before unit (last: after all)", xlabel="unit; the strip shows its cluster"
    )
    ticks = range(0, len(matrix), 1 if len(matrix) <= 20 else 4)
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    _plain(axes)
    return figure


def as_svg(figure: Any) -> str:
    """Convert a figure to an <svg> element for a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    _pyplot().close(figure)
    text = buffer.getvalue()
    for colour, name in PAGE_COLOURS.items():
        text = text.replace(colour, f"var({name}, {colour})")
    return text[text.index("<svg") :]


def path_figure(
    points: Sequence[tuple[int, float, float, float]],
    objective: type[Objective],
    unit: str,
    title: str,
) -> Any:
    """Draw the metric of nested results against their cost, with standard errors.

    Args:
        points: (units removed, cost, loss, standard error of the loss), the whole model first.
            Points without a finite loss are left out.
        unit: The unit of the costs.
        objective: The objective's class, whose metric the axis has.
        title: The title.
    """
    plt = _pyplot()
    finite = [point for point in points if np.isfinite(point[2])]
    _, costs, losses, loss_errors = (np.array(values) for values in zip(*finite))
    values = np.array([objective.metric(loss) for loss in losses])
    slopes = np.array([abs(objective.slope(loss)) for loss in losses])  # the delta method
    errors = np.nan_to_num(slopes * loss_errors)
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    axes.errorbar(costs, values, yerr=errors, color="C0", marker="o", markersize=4, capsize=2)
    for (removed, *_), cost, value in zip(finite, costs, values):
        axes.annotate(str(removed), (cost, value), xytext=(3, 5), textcoords="offset points")
    axes.set(xlabel=f"{unit}; numbers: units removed", ylabel=objective.header())
    axes.set_title(title, loc="left")
    axes.invert_xaxis()  # the whole model is on the left
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG or SVG, by the ending of its name; an existing file is replaced."""
    buffer = io.BytesIO()
    kind = path.suffix.lstrip(".")
    figure.savefig(buffer, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    _pyplot().close(figure)
    write_file(path, buffer.getvalue(), replace=True)


def _pyplot() -> Any:
    check_installed()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings: Any = {"font.size": 9, "axes.titlesize": 10, "svg.hashsalt": "fastprune"}
    settings |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    settings["text.parse_math"] = False  # a `$` in a model's name is a `$`
    settings["figure.max_open_warning"] = 0  # a page holds all its figures until it is written
    pyplot.rcParams.update(settings)
    return pyplot


def _plain(axes: Any) -> None:
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
