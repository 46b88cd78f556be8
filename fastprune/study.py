"""The study: models x objectives x algorithms x budgets over one store of scores (design of arXiv 2604.24938).

Every search is a cell. Its result is written as soon as it is finished, and every score is in the store, so a study
that was interrupted continues where it stopped. Every chosen mask is then scored under every objective.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import numpy as np

from . import __version__
from .errors import InputError
from .evaluator import Evaluator
from .masks import from_removed
from .models import Model
from .objectives import Objective
from .records import write_json
from .search import check_algorithm, run_search
from .search.similarity import cluster_units, clusters_for, redundancy_score
from .store import ScoreStore

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """One search of a study and what it found and cost.

    losses: of the chosen mask under every objective of the study, by label. layer_runs: unit runs that were made;
    asked_layer_runs: those it would have made alone, without scores that other searches had left in the store.
    """

    model: str
    objective: str
    num_remove: int
    algorithm: str
    removed: tuple[int, ...]
    loss: float
    masks: int
    layer_runs: float
    asked_layer_runs: float
    naive_layer_runs: float
    seconds: float
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
    store and one file per finished cell. Raises InputError for a directory that belongs to other inputs, and for
    algorithms, options or budgets that cannot be.
    """
    options = options or {}
    if not (models and objectives and algorithms and budgets):
        raise InputError("a study needs at least one model, objective, algorithm and budget")
    for algorithm in algorithms:
        check_algorithm(algorithm, options.get(algorithm, {}))
    out = Path(out_dir)
    evaluators = _Evaluators(models, objectives, evaluator_options)
    for model, num_remove in product(models, budgets):
        if not 0 <= num_remove < evaluators.num_units(model):
            units = evaluators.num_units(model)
            raise InputError(f"num_remove {num_remove} must be from 0 to {units - 1} ({model.name} has {units} units)")
    evaluators.check("cbo" in algorithms)
    _claim(out, evaluators.identity(algorithms, budgets, options, seed))
    evaluators.open_store(out / "scores.db")
    cells = []
    for model, label, num_remove, algorithm in product(models, objectives, budgets, algorithms):
        path = out / "cells" / f"{evaluators.slug(model)}-{label}-{num_remove}-{algorithm}.json"
        if not path.exists():
            notify(f"{model.name}: {label}, {num_remove} removed, {algorithm}")
            evaluator = evaluators.get(model, label)
            cell = _search(evaluator, model, label, num_remove, algorithm, options.get(algorithm, {}), seed)
            write_json(path, vars(cell))
        cells.append(_read_cell(path))
    notify("cross-evaluation")
    cells = [cell for model in models for cell in _cross_evaluate(evaluators, model, objectives, cells)]
    study = {
        "fastprune": __version__,
        "inputs": json.loads((out / "inputs.json").read_text()),
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


def summarise(cells: Sequence[Cell]) -> dict:
    """What the study asks of its cells: overlap of removals, agreement of ranks, spread within an objective.

    jaccard: mean overlap |A n B| / |A u B| of the removed sets of two searches of one model and budget, within an
    objective (two algorithms) and across objectives. spearman: for masks chosen under one objective, the rank
    correlation of their losses under it and under another, over algorithms. spread: for each group, the range of
    each objective's loss over its masks.
    """
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
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
                losses = [cell.losses[judged_by] for cell in chosen]
                spread.append(
                    {**where, "chosen_by": chosen_by, "judged_by": judged_by, "least": min(losses), "most": max(losses)}
                )
                if judged_by != chosen_by:
                    rho = _spearman([cell.losses[chosen_by] for cell in chosen], losses)
                    spearman.append({**where, "chosen_by": chosen_by, "judged_by": judged_by, "rho": rho})
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
        self._store: ScoreStore | None = None

    def identity(self, algorithms, budgets, options, seed) -> dict:
        """What makes a study this study."""
        return {
            "models": {model.name: model.weights_hash for model in self._models},
            "dtype": {model.name: str(model.dtype) for model in self._models},
            "objectives": {
                f"{name} {label}": [objective.name, objective.content_hash]
                for (name, label), objective in self._objectives.items()
            },
            "algorithms": {name: dict(options.get(name, {})) for name in algorithms},
            "budgets": list(budgets),
            "seed": seed,
            "granularity": self._options.get("granularity", "block"),
        }

    def check(self, needs_gradients: bool) -> None:
        """Raise InputError for a granularity that a model has not, or an objective without gradients where needed."""
        for model in self._models:
            model.require(self._options.get("granularity", "block"))
        for (_, label), objective in self._objectives.items():
            if needs_gradients and objective.name in ("kl", "accuracy"):
                raise InputError(f"cbo needs gradients, which the objective {label!r} ({objective.name}) has not")

    def open_store(self, path: Path) -> None:
        self._store = ScoreStore(path)

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


def _claim(out: Path, identity: dict) -> None:
    """Make the directory this study's, or see that it is. Raises InputError when it belongs to another."""
    path = out / "inputs.json"
    if path.exists():
        found = json.loads(path.read_text())
        for name, value in identity.items():
            if found.get(name) != value:
                raise InputError(f"{out}: holds a study with other {name}; name another folder")
    elif out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty and holds no study; name another folder")
    else:
        write_json(path, identity)


def _search(evaluator, model, label, num_remove, algorithm, options, seed) -> Cell:
    before = vars(evaluator.stats).copy()
    result = run_search(evaluator, algorithm, num_remove, seed, **options)
    cost = {name: value - before[name] for name, value in vars(evaluator.stats).items()}
    return Cell(
        model=model.name,
        objective=label,
        num_remove=num_remove,
        algorithm=algorithm,
        removed=result.removed,
        loss=result.loss,
        masks=result.evaluations,
        layer_runs=cost["layer_runs"],
        asked_layer_runs=cost["asked_layer_runs"],
        naive_layer_runs=cost["naive_layer_runs"],
        seconds=result.seconds,
    )


def _cross_evaluate(evaluators, model, objectives, cells: Iterable[Cell]) -> list[Cell]:
    """The cells of one model, with the loss of each chosen mask under every objective."""
    own = [cell for cell in cells if cell.model == model.name]
    masks = from_removed([cell.removed for cell in own], evaluators.num_units(model))
    columns = {label: evaluators.get(model, label).score(masks).tolist() for label in objectives}
    return [
        Cell(**{**vars(cell), "losses": {label: column[i] for label, column in columns.items()}})
        for i, cell in enumerate(own)
    ]


def _similarity(evaluator: Evaluator) -> dict:
    """The similarity of states on a calibration set, its redundancy score (RLS) and clusters (arXiv 2605.27786)."""
    matrix = evaluator.similarity()
    states = matrix[:-1, :-1]  # h_0 .. h_(U-1)
    score = redundancy_score(states)
    labels = cluster_units(states, min(clusters_for(score), len(states)))
    return {"matrix": matrix.tolist(), "rls": score, "clusters": labels.tolist()}


def _read_cell(path: Path) -> Cell:
    values = json.loads(path.read_text())
    return Cell(**{**values, "removed": tuple(values["removed"]), "loss": float(values["loss"])})


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
