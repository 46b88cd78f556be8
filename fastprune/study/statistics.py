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


def cell_record(cell: Cell, names: Mapping[str, str]) -> dict:
    """A cell as study.json has it: its losses, and each under its metric's own name.

    names: of the objectives, by label.
    """
    record: dict = {**cell.to_dict(), "metrics": None}
    if cell.loss is not None:
        record |= objective_class(names[cell.objective]).record(cell.loss)
    if cell.losses is not None:
        record["metrics"] = metric_records(cell.losses, names)
    return record


def metric_records(losses: Mapping[str, float], names: Mapping[str, str]) -> dict[str, dict]:
    """By label, a loss under its metric's own name. names: of the objectives, by label."""
    return {label: objective_class(names[label]).record(loss) for label, loss in losses.items()}


def summarise(cells: Sequence[Cell]) -> dict:
    """The statistics of a study's cells: overlap of removals, agreement of ranks, spread within an
    objective.

    jaccard: mean overlap |A n B| / |A u B| of the removed sets of two searches of one model and
    budget, within an objective (two algorithms) and across objectives; not of sequences, which
    remove nothing. spearman: for masks chosen
    under one objective, the rank correlation of their losses under it and under another, over
    algorithms, and how many distinct masks these chose.
    spread: for each group, the least and the greatest of each objective's finite losses over its
    masks. Searches
    that found nothing are left out.
    """
    groups: dict[tuple[str, Key], list[Cell]] = {}
    for cell in cells:
        if not cell.error:
            groups.setdefault((cell.model, cell.num_remove), []).append(cell)
    jaccard, spearman, spread = [], [], []
    for (model, num_remove), group in groups.items():
        where = {"model": model, "num_remove": num_remove}
        pairs = list(combinations(group, 2))
        if num_remove is not None:
            within = [_jaccard(a, b) for a, b in pairs if a.objective == b.objective]
            across = [_jaccard(a, b) for a, b in pairs if a.objective != b.objective]
            jaccard.append({**where, "within": _mean(within), "across": _mean(across)})
        labels = list(dict.fromkeys(cell.objective for cell in group))
        for chosen_by in labels:
            chosen = [cell for cell in group if cell.objective == chosen_by]
            for judged_by in _losses(chosen[0]):
                entry = {**where, "chosen_by": chosen_by, "judged_by": judged_by}
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
    """The effect of the choice of calibration set, beside that of the algorithm.

    objectives: by label, the objective of the searches: labels with the same differ in their
    calibration sets alone. judges: by label, the names of the objectives whose losses are compared.
    For each model, budget, objective with several sets and algorithm: the mean Jaccard overlap of
    its removals on two sets ("sets"), and with those of another algorithm on the same set
    ("algorithms"), None of sequences; and of the same pairs, under each judge, the mean difference
    of their losses and of their metrics, as an absolute value. None without such a pair. Searches
    that found nothing, and losses that are not finite, are left out.
    """
    found = []
    groups: dict[tuple, list[Cell]] = {}
    for cell in cells:
        if not cell.error:
            groups.setdefault((cell.model, cell.num_remove), []).append(cell)
    for (model, num_remove), group in groups.items():
        for kind in _distinct(objectives.values()):
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
                entry = {
                    "model": model,
                    "num_remove": num_remove,
                    "sets": sets,
                    "algorithm": algorithm,
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
                found.append({**entry, "overlap": overlap, "losses": losses, "metrics": metrics})
    return found


def summarise_similarity(matrix: np.ndarray) -> dict | None:
    """The similarity of states on a calibration set, its redundancy score (RLS) and clusters (arXiv
    2605.27786).

    matrix: as Evaluator.similarity gives it. None if the states are not finite.
    """
    if not np.isfinite(matrix).all():
        return None
    states = matrix[:-1, :-1]  # h_0 .. h_(U-1)
    score = redundancy_score(states)
    labels = cluster_units(states, min(clusters_for(score), len(states)))
    return {"matrix": matrix.tolist(), "rls": score, "clusters": labels.tolist()}


def _losses(cell: Cell) -> Mapping[str, float]:
    return cell.losses or {}


def _jaccard(a: Cell, b: Cell) -> float:
    one, other = set(a.removed or ()), set(b.removed or ())
    return len(one & other) / len(one | other) if one | other else 1.0


def _differences(pairs: Sequence[tuple[Cell, Cell]], judge: str, name: str) -> list[float]:
    """The pairs' absolute differences in the metric of the objective `name`, finite ones only; ''
    compares the losses themselves."""
    metric = objective_class(name).metric
    values = [(metric(_losses(a)[judge]), metric(_losses(b)[judge])) for a, b in pairs]
    return [abs(x - y) for x, y in values if math.isfinite(x) and math.isfinite(y)]


def _distinct(values: Iterable[object]) -> list[object]:
    found: list[object] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rho; None if it is not defined (fewer than 3 values, or all equal)."""
    from scipy.stats import spearmanr

    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2 or not np.isfinite([*a, *b]).all():
        return None
    return float(spearmanr(a, b).statistic)
