"""What a study asks of its cells and of its models' states."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from ..search.similarity import cluster_units, clusters_for, redundancy_score

if TYPE_CHECKING:
    from .folder import Cell


def summarise(cells: Sequence[Cell]) -> dict:
    """What the study asks of its cells: overlap of removals, agreement of ranks, spread within an objective.

    jaccard: mean overlap |A n B| / |A u B| of the removed sets of two searches of one model and budget, within an
    objective (two algorithms) and across objectives. spearman: for masks chosen under one objective, the rank
    correlation of their losses under it and under another, over algorithms, and how many distinct masks these chose.
    spread: for each group, the range of each objective's finite losses over its masks. Searches that found nothing
    are left out.
    """
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        if not cell.error:
            groups.setdefault((cell.model, cell.num_remove), []).append(cell)
    jaccard, spearman, spread = [], [], []
    for (model, num_remove), group in groups.items():
        where = {"model": model, "num_remove": num_remove}
        pairs = list(combinations(group, 2))
        within = [_jaccard(a, b) for a, b in pairs if a.objective == b.objective]
        across = [_jaccard(a, b) for a, b in pairs if a.objective != b.objective]
        jaccard.append({**where, "within": _mean(within), "across": _mean(across)})
        labels = list(dict.fromkeys(cell.objective for cell in group))
        for chosen_by in labels:
            chosen = [cell for cell in group if cell.objective == chosen_by]
            for judged_by in chosen[0].losses:
                entry = {**where, "chosen_by": chosen_by, "judged_by": judged_by}
                losses = [cell.losses[judged_by] for cell in chosen]
                finite = [loss for loss in losses if math.isfinite(loss)] or [None]
                spread.append({**entry, "least": min(finite), "most": max(finite)})
                if judged_by != chosen_by:
                    distinct = len({cell.removed for cell in chosen})
                    rho = _spearman([cell.losses[chosen_by] for cell in chosen], losses) if distinct > 2 else None
                    spearman.append({**entry, "masks": distinct, "rho": rho})
    return {"jaccard": jaccard, "spearman": spearman, "spread": spread}


def summarise_similarity(matrix: np.ndarray) -> dict | None:
    """The similarity of states on a calibration set, its redundancy score (RLS) and clusters (arXiv 2605.27786).

    matrix: as Evaluator.similarity gives it. None where the states are not finite.
    """
    if not np.isfinite(matrix).all():
        return None
    states = matrix[:-1, :-1]  # h_0 .. h_(U-1)
    score = redundancy_score(states)
    labels = cluster_units(states, min(clusters_for(score), len(states)))
    return {"matrix": matrix.tolist(), "rls": score, "clusters": labels.tolist()}


def _jaccard(a: Cell, b: Cell) -> float:
    union = set(a.removed) | set(b.removed)
    return len(set(a.removed) & set(b.removed)) / len(union) if union else 1.0


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rho; None where it is not defined (fewer than 3 values, or all equal)."""
    from scipy.stats import spearmanr

    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2 or not np.isfinite([*a, *b]).all():
        return None
    return float(spearmanr(a, b).statistic)
