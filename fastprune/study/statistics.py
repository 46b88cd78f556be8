"""The statistics of a study's cells and of its models' states."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from ..objectives import objective_class
from ..search.similarity import cluster_units, clusters_for, redundancy_score

if TYPE_CHECKING:
    from ..search.sizes import Key
    from .folder import Cell


def summarise(cells: Sequence[Cell]) -> dict:
    """Compute the statistics of a study's cells. Cells with an error are left out.

    Args:
        cells: The cells, with the losses of their candidates under every objective.

    Returns:
        Three lists of dicts, one dict for each model and budget, and for two objectives where the
        statistic compares them:

        - "jaccard": the mean overlap |A n B| / |A u B| of the sets that two searches removed.
          "within" compares two algorithms under one objective, "across" two objectives. Sequences
          remove nothing and have no entry.
        - "spearman": the rank correlation of the losses of masks under the objective that chose
          them and under another, with the number of distinct masks.
        - "spread": the least and the greatest finite loss of the masks under an objective.

    Examples:
        >>> from fastprune.study.folder import Cell
        >>> from fastprune.study.statistics import summarise
        >>> cells = [
        ...     Cell("demo", "text", 2, "greedy", removed=(1, 2), losses={"text": 1.5}),
        ...     Cell("demo", "text", 2, "beam", removed=(2, 3), losses={"text": 1.4}),
        ... ]
        >>> round(summarise(cells)["jaccard"][0]["within"], 3)
        0.333
    """
    jaccard, spearman, spread = [], [], []
    for (model, num_remove), group in _groups(cells).items():
        key = {"model": model, "num_remove": num_remove}
        pairs = list(combinations(group, 2))
        if num_remove is not None:
            within = [_jaccard(a, b) for a, b in pairs if a.objective == b.objective]
            across = [_jaccard(a, b) for a, b in pairs if a.objective != b.objective]
            jaccard.append({**key, "within": _mean(within), "across": _mean(across)})
        labels = list(dict.fromkeys(cell.objective for cell in group))
        for chosen_by in labels:
            chosen = [cell for cell in group if cell.objective == chosen_by]
            for judged_by in _losses(chosen[0]):
                entry = {**key, "chosen_by": chosen_by, "judged_by": judged_by}
                losses = [_losses(cell)[judged_by] for cell in chosen]
                finite = [loss for loss in losses if math.isfinite(loss)]
                least, most = min(finite, default=None), max(finite, default=None)
                spread.append({**entry, "least_loss": least, "most_loss": most})
                if judged_by != chosen_by:
                    distinct = len({cell.candidate for cell in chosen})
                    rho = (
                        _spearman([_losses(cell)[chosen_by] for cell in chosen], losses)
                        if distinct > 2
                        else None
                    )
                    spearman.append({**entry, "masks": distinct, "rho": rho})
    return {"jaccard": jaccard, "spearman": spearman, "spread": spread}


def compare_calibrations(
    cells: Sequence[Cell], objectives: Mapping[str, object], judges: Mapping[str, str]
) -> list[dict]:
    """Compare the effect of the calibration set with the effect of the algorithm.

    Cells are paired in two ways. A pair of "sets" has one algorithm and two calibration sets. A
    pair of "algorithms" has one set and two algorithms. Cells with an error are left out.

    Args:
        cells: The cells, with the losses of their candidates under every objective.
        objectives: The objective of the searches, by label. Labels with equal objectives differ in
            their calibration sets alone.
        judges: The names of the objectives whose losses are compared, by label.

    Returns:
        A dict for each model, budget, objective with several sets, and algorithm. "overlap" is the
        mean Jaccard overlap of the removals of each kind of pair; None for sequences. "losses" and
        "metrics" are the mean absolute differences under each judge, over finite values. A kind
        without pairs has None.
    """
    records = []
    for (model, num_remove), group in _groups(cells).items():
        for kind in dict.fromkeys(objectives.values()):
            sets = [label for label in objectives if objectives[label] == kind]
            alike = [cell for cell in group if cell.objective in sets]
            for algorithm in (
                dict.fromkeys(cell.algorithm for cell in alike) if len(sets) > 1 else ()
            ):
                own = [cell for cell in alike if cell.algorithm == algorithm]
                others = [cell for cell in alike if cell.algorithm != algorithm]
                pairs = {
                    "sets": list(combinations(own, 2)),
                    "algorithms": [
                        (a, b) for a in own for b in others if a.objective == b.objective
                    ],
                }
                overlap = {
                    by: _mean([_jaccard(a, b) for a, b in of if num_remove is not None])
                    for by, of in pairs.items()
                }
                losses, metrics = (
                    {
                        judge: {
                            by: _mean(_differences(of, judge, name)) for by, of in pairs.items()
                        }
                        for judge, name in names.items()
                    }
                    for names in (dict.fromkeys(judges, ""), judges)
                )
                records.append(
                    {
                        "model": model,
                        "num_remove": num_remove,
                        "sets": sets,
                        "algorithm": algorithm,
                        "overlap": overlap,
                        "losses": losses,
                        "metrics": metrics,
                    }
                )
    return records


def summarise_similarity(matrix: np.ndarray) -> dict | None:
    """Summarise the similarity of states on a calibration set (arXiv 2605.27786).

    Args:
        matrix: The similarities, as `Evaluator.similarity` returns them.

    Returns:
        The matrix, its redundancy score ("rls") and the cluster of each unit; None if the states
        are not finite.
    """
    if not np.isfinite(matrix).all():
        return None
    states = matrix[:-1, :-1]  # h_0 .. h_(U-1)
    score = redundancy_score(states)
    labels = cluster_units(states, min(clusters_for(score), len(states)))
    return {"matrix": matrix.tolist(), "rls": score, "clusters": labels.tolist()}


def _groups(cells: Iterable[Cell]) -> dict[tuple[str, Key], list[Cell]]:
    """The cells of each model and size that found something."""
    groups: dict[tuple[str, Key], list[Cell]] = {}
    for cell in cells:
        if not cell.error:
            groups.setdefault((cell.model, cell.num_remove), []).append(cell)
    return groups


def _losses(cell: Cell) -> Mapping[str, float]:
    return cell.losses or {}


def _jaccard(a: Cell, b: Cell) -> float:
    one, other = set(a.removed or ()), set(b.removed or ())
    return len(one & other) / len(one | other) if one | other else 1.0


def _differences(pairs: Sequence[tuple[Cell, Cell]], judge: str, name: str) -> list[float]:
    """The absolute differences of pairs in the metric of the objective `name`, finite ones only.

    The empty name compares the losses themselves.
    """
    metric = objective_class(name).metric
    values = [(metric(_losses(a)[judge]), metric(_losses(b)[judge])) for a, b in pairs]
    return [abs(x - y) for x, y in values if math.isfinite(x) and math.isfinite(y)]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rho; None if it is not defined (fewer than 3 values, or all equal)."""
    from scipy.stats import spearmanr

    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2 or not np.isfinite([*a, *b]).all():
        return None
    return float(spearmanr(a, b).statistic)
