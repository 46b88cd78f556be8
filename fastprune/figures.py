"""Figures of searches and studies. Needs the extra `plots`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .errors import InputError

KEPT, EDGE, RULE = "#f1f3f5", "#d5d9dd", "#868e96"


def pattern_figure(rows: Sequence[tuple[str, str, Sequence[int]]], num_units: int, title: str):
    """Which units each search removes: a row per search, a column per unit, a cell filled where removed.

    rows: (objective, algorithm, removed units); those of one objective stand together and share a colour.
    """
    plt = _pyplot()
    from matplotlib.patches import Rectangle

    objectives = list(dict.fromkeys(objective for objective, _, _ in rows))
    rows = sorted(rows, key=lambda row: objectives.index(row[0]))
    figure, axes = plt.subplots(figsize=(2.2 + 0.3 * num_units, 1.0 + 0.27 * len(rows)), layout="constrained")
    for y, (objective, _, removed) in enumerate(rows):
        for x in range(num_units):
            colour = f"C{objectives.index(objective)}" if x in removed else KEPT
            cell = Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, facecolor=colour, edgecolor=EDGE, linewidth=0.5)
            axes.add_patch(cell)
        if y and objective != rows[y - 1][0]:
            axes.axhline(y - 0.5, color=RULE, linewidth=0.8)
    axes.set(xlim=(-0.6, num_units - 0.4), ylim=(len(rows) - 0.4, -0.6), xlabel="unit", title=title)
    axes.set_xticks(range(0, num_units, 1 if num_units <= 40 else 4))
    axes.set_yticks(range(len(rows)), [f"{objective}  {algorithm}" for objective, algorithm, _ in rows])
    _plain(axes)
    return figure


def rank_figure(groups: Sequence[tuple[str, Mapping[str, tuple[float, float]], float | None]], x: str, y: str):
    """Rank under one objective against rank under another, one panel per group, rho in its title.

    groups: (name, {algorithm: (loss under x, loss under y)}, rho); rank 1 is the lowest loss.
    """
    from scipy.stats import rankdata

    plt = _pyplot()
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(3.4 * columns, 3.3 * lines), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(groups) :]:
        axes.set_visible(False)
    for axes, (name, losses, rho) in zip(grid.flat, groups):
        ranks = [rankdata([pair[i] for pair in losses.values()], method="min") for i in (0, 1)]
        axes.plot([0.5, len(losses) + 0.5], [0.5, len(losses) + 0.5], color=EDGE, linewidth=1, zorder=0)
        axes.scatter(*ranks, s=26, color="C0")
        at: dict[tuple[int, int], list[str]] = {}
        for algorithm, place in zip(losses, zip(*ranks)):
            at.setdefault(place, []).append(algorithm)
        for (px, py), algorithms in at.items():  # algorithms that found the same mask share a point
            text = "\n".join(algorithms[:3]) + (f"\n+ {len(algorithms) - 3}" if len(algorithms) > 3 else "")
            axes.annotate(text, (px, py), xytext=(5, -3), textcoords="offset points", fontsize=6.5, va="top")
        title = name if rho is None else f"{name}   ρ = {rho:+.2f}"
        axes.set(title=title, xlabel=f"rank by {x}", ylabel=f"rank by {y}", xlim=(0, len(losses) + 2.2),
                 ylim=(len(losses) + 0.8, 0.2))  # fmt: skip
        _plain(axes, spines=True)
    return figure


def spread_figure(groups: Mapping[str, Mapping[str, Sequence[float]]], judged_by: str):
    """How much the algorithms differ: a strip of losses per group, one colour per objective that chose the masks.

    groups: {group: {chosen by: losses under `judged_by`}}.
    """
    plt = _pyplot()
    choosers = list(dict.fromkeys(chooser for group in groups.values() for chooser in group))
    figure, axes = plt.subplots(figsize=(2.0 + 1.9 * len(groups), 3.2), layout="constrained")
    for x, group in enumerate(groups.values()):
        for chooser, losses in group.items():
            offset = (choosers.index(chooser) - (len(choosers) - 1) / 2) * 0.26
            jitter = np.linspace(-0.07, 0.07, len(losses)) if len(losses) > 1 else [0]
            axes.scatter(x + offset + np.asarray(jitter), losses, s=18, alpha=0.8, color=f"C{choosers.index(chooser)}")
    for i, chooser in enumerate(choosers):
        axes.scatter([], [], color=f"C{i}", s=18, label=f"chosen by {chooser}")
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set(ylabel=f"{judged_by} loss", xlim=(-0.6, len(groups) - 0.4))
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _plain(axes, spines=True)
    return figure


def similarity_figure(matrix: np.ndarray, clusters: Sequence[int], title: str):
    """Heat map of the similarity of states before each unit and after the last, with the clusters below."""
    plt = _pyplot()
    matrix = np.asarray(matrix)
    size = 2.6 + 0.13 * len(matrix)
    figure, (axes, strip) = plt.subplots(
        2, 1, figsize=(size + 0.9, size + 0.3), layout="constrained", height_ratios=[24, 1], sharex=True
    )
    image = axes.imshow(matrix, cmap="viridis", vmin=min(0.0, matrix.min()), vmax=1)
    figure.colorbar(image, ax=axes, label="mean token cosine", shrink=0.85)
    axes.set(title=title, ylabel="state before unit (last: after all)")
    strip.imshow(np.asarray([[*clusters, np.nan]], dtype=float), cmap="tab10", vmin=0, vmax=9, aspect="auto")
    strip.set(yticks=[], xlabel="unit, coloured by cluster")
    _plain(axes)
    _plain(strip)
    return figure


def as_svg(figure) -> str:
    """The figure as an <svg> element, to stand in a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    _pyplot().close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=160)
    _pyplot().close(figure)


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        raise InputError("figures need matplotlib: pip install 'fastprune[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 8, "axes.titlesize": 9, "svg.hashsalt": "fastprune"})
    return pyplot


def _plain(axes, spines: bool = False) -> None:
    axes.tick_params(length=0, labelsize=7.5)
    axes.spines[:].set_visible(False)
    if spines:
        axes.spines[["left", "bottom"]].set_visible(True)
