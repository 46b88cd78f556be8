"""The study: models x objectives x algorithms x budgets over one store of scores (design of arXiv 2604.24938).

Every search is a cell. Its result is written as soon as it is finished, and every score is in the store, so a study
that was interrupted continues where it stopped. Every chosen mask is then scored under every objective.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path

import numpy as np

from . import __version__
from .errors import InputError
from .evaluator import Evaluator
from .masks import from_removed
from .models import Model
from .objectives import Objective
from .records import check_folder, write_json
from .search import check_algorithm, find_algorithm, require_sklearn, run_search
from .search.similarity import cluster_units, clusters_for, redundancy_score
from .store import SumStore

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """One search of a study, what it found and what it cost.

    error: why the search found nothing; `removed` and `loss` are then None. losses: of the chosen mask under every
    objective of the study, by label. layer_runs: unit runs that were made; asked_layer_runs: those it would have made
    alone, without scores that other searches had left in the store.
    """

    model: str
    objective: str
    num_remove: int
    algorithm: str
    removed: tuple[int, ...] | None = None
    loss: float | None = None
    error: str | None = None
    masks: int = 0
    layer_runs: float = 0
    asked_layer_runs: float = 0
    naive_layer_runs: float = 0
    seconds: float = 0
    losses: Mapping[str, float] | None = None


def run_study(
    models: Sequence[Model],
    objectives: Mapping[str, Callable[[Model], Objective]],
    algorithms: Sequence[str],
    budgets: Sequence[int],
    out_dir: str | Path,
    *,
    options: Mapping[str, Mapping[str, object]] | None = None,
    seed: int = 0,
    notify: Notify = lambda message: None,
    **evaluator_options,
) -> dict:
    """Run every search, cross-evaluate every chosen mask, and write `study.json`; returns its content.

    objectives: by label, functions from a model to an objective on its calibration set (so one objective can stand
    several times, on several sets). options: of algorithms, by name. The directory keeps `inputs.json`, the score
    store and one file per finished cell. A search that finds no finite loss is a cell with an error, and no reason
    to end. Raises InputError, before the directory is touched, for one that belongs to other inputs, and for
    algorithms, options, budgets or data that cannot be.
    """
    options = options or {}
    out = Path(out_dir)
    check_study(algorithms, options, out)
    if not (models and objectives and budgets):
        raise InputError("a study needs at least one model, objective, algorithm and budget")
    evaluators = _Evaluators(models, objectives, evaluator_options)
    evaluators.check(algorithms, budgets, options)
    identity = evaluators.identity(algorithms, budgets, options, seed)
    if not _continues(out, identity):
        evaluators.try_all()
        write_json(out / "inputs.json", identity)
    evaluators.open_store(out / "scores.db")
    cells = []
    searches = list(product(models, objectives, budgets, algorithms))
    for number, (model, label, num_remove, algorithm) in enumerate(searches, 1):
        path = out / "cells" / f"{evaluators.slug(model)}-{label}-{num_remove}-{algorithm}.json"
        if not path.exists():
            notify(f"{number}/{len(searches)}  {model.name}: {label}, {num_remove} removed, {algorithm}")
            evaluator = evaluators.get(model, label)
            cell = _search(evaluator, model, label, num_remove, algorithm, options.get(algorithm, {}), seed)
            if cell.error:
                notify(f"{number}/{len(searches)}  found nothing: {cell.error}")
            write_json(path, vars(cell))
        cells.append(_read_cell(path))
    notify("scoring every chosen mask under every objective")
    cells = [cell for model in models for cell in _cross_evaluate(evaluators, model, objectives, cells)]
    study = {
        "fastprune": __version__,
        "inputs": identity,
        "objectives": evaluators.objective_names(),
        "dense": {
            model.name: {label: evaluators.get(model, label).dense_loss for label in objectives} for model in models
        },
        "num_units": {model.name: evaluators.num_units(model) for model in models},
        "similarity": {model.name: _similarity(evaluators.get(model, next(iter(objectives)))) for model in models},
        "cells": [vars(cell) for cell in cells],
        **summarise(cells),
    }
    write_json(out / "study.json", study, replace=True)  # a summary of the cells, made anew by every run
    return study


def check_study(algorithms: Sequence[str], options: Mapping[str, Mapping[str, object]], out_dir: str | Path) -> None:
    """Everything about a study that can be checked without its models. Raises InputError."""
    if not algorithms:
        raise InputError("a study needs at least one model, objective, algorithm and budget")
    for algorithm in dict.fromkeys([*algorithms, *options]):
        check_algorithm(algorithm, options.get(algorithm, {}))
    require_sklearn("a study")  # for the clusters of its summary
    check_folder(Path(out_dir))


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


class _Evaluators:
    """The evaluators of a study, each made when it is first needed, all on one store."""

    def __init__(self, models, objectives, options):
        names = [model.name for model in models]
        if len(set(names)) < len(names):
            raise InputError(f"a model is given twice: {', '.join(names)}")
        self._models, self._factories, self._options = list(models), objectives, options
        self._objectives = {(m.name, label): make(m) for m in models for label, make in objectives.items()}
        self._made: dict[tuple[str, str], Evaluator] = {}
        self._store: SumStore | None = None

    def identity(self, algorithms, budgets, options, seed) -> dict:
        """What makes a study this study."""
        return {
            "models": {model.name: model.weights_hash for model in self._models},
            "dtype": {model.name: str(model.dtype) for model in self._models},
            "objectives": {
                f"{name} {label}": [objective.name, objective.content_hash]
                for (name, label), objective in self._objectives.items()
            },
            "algorithms": {name: check_algorithm(name, options.get(name, {}))[1] for name in algorithms},
            "budgets": list(budgets),
            "seed": seed,
            "granularity": self._options.get("granularity", "block"),
        }

    def check(self, algorithms, budgets, options) -> None:
        """Raise InputError for a granularity that a model has not, a budget it cannot have or that is too large for
        an algorithm, or an objective without gradients where they are needed."""
        for model in self._models:
            model.require(self._options.get("granularity", "block"))
            units = self.num_units(model)
            for num_remove in budgets:
                if not 0 <= num_remove < units:
                    raise InputError(
                        f"num_remove {num_remove} must be from 0 to {units - 1} ({model.name} has {units} units)"
                    )
                for algorithm in algorithms:
                    chosen, values = check_algorithm(algorithm, options.get(algorithm, {}))
                    if chosen.check_size:
                        chosen.check_size(units, num_remove, self._options.get("granularity", "block"), **values)
        for (_, label), objective in self._objectives.items():
            for algorithm in algorithms:
                if find_algorithm(algorithm).needs_gradients and not objective.differentiable:
                    name = f"{label!r} ({objective.name})"
                    raise InputError(f"{algorithm} needs gradients, which the objective {name} has not")

    def try_all(self) -> None:
        """Make every evaluator once, and keep none: data or options that do not fit a model are found now."""
        for (name, _), objective in self._objectives.items():
            (model,) = (model for model in self._models if model.name == name)
            Evaluator(model, objective, **self._options)

    def objective_names(self) -> dict[str, str]:
        """By label, the name of the objective."""
        return {label: objective.name for (_, label), objective in self._objectives.items()}

    def open_store(self, path: Path) -> None:
        self._store = SumStore(path)

    def get(self, model: Model, label: str) -> Evaluator:
        key = (model.name, label)
        if key not in self._made:
            self._made[key] = Evaluator(model, self._objectives[key], store=self._store, **self._options)
        return self._made[key]

    def num_units(self, model: Model) -> int:
        return len(model.unit_names(self._options.get("granularity", "block")))

    def slug(self, model: Model) -> str:
        """A short file-name part for a model, distinct within the study."""
        return f"{self._models.index(model)}-{Path(model.name).name}"


def _continues(out: Path, identity: dict) -> bool:
    """Whether the directory holds this study already. Raises InputError when it holds something else."""
    path = out / "inputs.json"
    if path.exists():
        found = json.loads(path.read_text())
        others = [name for name, value in identity.items() if found.get(name) != value]
        if others:
            raise InputError(f"{out}: holds a study with other {', '.join(others)}; name another folder")
        return True
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty and holds no study; name another folder")
    return False


def _search(evaluator, model, label, num_remove, algorithm, options, seed) -> Cell:
    cell = Cell(model.name, label, num_remove, algorithm)
    before, started = vars(evaluator.stats).copy(), time.perf_counter()
    try:
        result = run_search(evaluator, algorithm, num_remove, seed, **options)
        cell = replace(cell, removed=result.removed, loss=result.loss, masks=result.evaluations)
    except ArithmeticError as error:  # no finite loss, or a probe that is not finite
        cell = replace(cell, error=str(error), masks=evaluator.stats.masks - before["masks"])
    names = ("layer_runs", "asked_layer_runs", "naive_layer_runs")
    cost = {name: getattr(evaluator.stats, name) - before[name] for name in names}
    return replace(cell, **cost, seconds=time.perf_counter() - started)


def _cross_evaluate(evaluators, model, objectives, cells: Sequence[Cell]) -> list[Cell]:
    """The cells of one model, with the loss of each chosen mask under every objective."""
    own = [cell for cell in cells if cell.model == model.name]
    chosen = list(dict.fromkeys(cell.removed for cell in own if not cell.error))
    masks = from_removed(chosen, evaluators.num_units(model))
    columns = {label: evaluators.get(model, label).score(masks).tolist() for label in objectives}
    losses = {removed: {label: columns[label][i] for label in objectives} for i, removed in enumerate(chosen)}
    return [replace(cell, losses=losses.get(cell.removed)) for cell in own]


def _similarity(evaluator: Evaluator) -> dict | None:
    """The similarity of states on a calibration set, its redundancy score (RLS) and clusters (arXiv 2605.27786).

    None where the states are not finite.
    """
    matrix = evaluator.similarity()
    if not np.isfinite(matrix).all():
        return None
    states = matrix[:-1, :-1]  # h_0 .. h_(U-1)
    score = redundancy_score(states)
    labels = cluster_units(states, min(clusters_for(score), len(states)))
    return {"matrix": matrix.tolist(), "rls": score, "clusters": labels.tolist()}


def _read_cell(path: Path) -> Cell:
    values = json.loads(path.read_text())
    if values.get("error") is None:
        values.update(removed=tuple(values["removed"]), loss=float(values["loss"]))
    return Cell(**values)


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
