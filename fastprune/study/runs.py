"""The study: models x objectives x algorithms x budgets over one store of scores (design of arXiv
2604.24938).

Every search is a cell. Its result is written as soon as it is finished, and every score is in the
store, so a study that was interrupted continues where it stopped. Every chosen mask is then scored
under every objective.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..engine.store import SumStore
from ..errors import InputError
from ..io import write_json
from ..masks import from_removed
from ..objectives import Objective, objective_class
from ..search import check_algorithm, check_racing, find_algorithm, require_sklearn, run_search
from ..validate import check_folder
from ..workers.processes import Processes, Workers
from .folder import Cell, check_label, check_study_folder, hold, read_cell, write_cell
from .statistics import cell_record, compare_calibrations, summarise, summarise_similarity

if TYPE_CHECKING:  # what checks a study does without torch
    from ..evaluator import Evaluator
    from ..models import Model

    Makers = Mapping[str, Callable[[Model], Objective]]

Notify = Callable[[str], None]


def run_study(
    models: Sequence[Model],
    objectives: Makers,
    algorithms: Sequence[str],
    budgets: Sequence[int],
    out_dir: str | Path,
    *,
    options: Mapping[str, Mapping[str, object]] | None = None,
    seed: int = 0,
    racing: float | None = None,
    notify: Notify = lambda message: None,
    held_out: Makers | None = None,
    **evaluator_options: Any,
) -> dict:
    """Run every search, cross-evaluate every chosen mask, and write `study.json`; returns its
    content.

    objectives: by label, functions from a model to an objective on its calibration set (so one
    objective can stand several times, on several sets, which are then compared). options: of
    algorithms, by name. racing: a confidence, as of `run_search`, for those of the algorithms that
    race. held_out: further objectives that no search sees; every chosen mask is scored under them,
    too. evaluator_options: of `Evaluator`; its workers are started once, for all. The directory
    keeps `inputs.json`, the score store and one file per finished cell; a cell that is damaged, or
    was made with other settings, is named in a RuntimeWarning and made again. A search that finds
    no finite loss is a cell with an error, and no reason to end. Raises InputError, before the
    directory is touched, for one that belongs to other inputs or another kind of machine, or in
    which another process is at work, and for algorithms, options, budgets or data that cannot be.
    """
    options, held_out = options or {}, held_out or {}
    out = Path(out_dir)
    check_study(algorithms, options, out)
    check_racing(algorithms, racing)
    if not (models and objectives and budgets):
        raise InputError("a study needs at least one model, objective, algorithm and budget")
    evaluators = _Evaluators(models, objectives, held_out, evaluator_options)
    evaluators.check(algorithms, budgets, options)
    identity = evaluators.identity(algorithms, budgets, options, seed, racing)
    if not check_study_folder(out, identity):
        evaluators.try_all()
    with hold(out):
        return _run(evaluators, models, objectives, held_out, identity, options, out, notify)


def _run(
    evaluators: _Evaluators,
    models: Sequence[Model],
    objectives: Makers,
    held_out: Makers,
    identity: dict,
    options: Mapping[str, Mapping[str, object]],
    out: Path,
    notify: Notify,
) -> dict:
    """The study of these inputs, in a folder that is its own."""
    if not (out / "inputs.json").exists():
        write_json(out / "inputs.json", identity)
    evaluators.open_store(out / "scores.db")
    cells = []
    searches = list(product(models, objectives, identity["budgets"], identity["algorithms"]))
    for number, (model, label, num_remove, algorithm) in enumerate(searches, 1):
        path = out / "cells" / f"{evaluators.slug(model)}-{label}-{num_remove}-{algorithm}.json"
        made_with = _made_with(identity, model.name, label, num_remove, algorithm)
        cell = None
        if path.exists() and not (cell := read_cell(path, made_with)):
            warnings.warn(
                f"{path}: damaged, or of another study; searched again",
                RuntimeWarning,
                stacklevel=3,
            )
        if not cell:
            notify(
                f"{number}/{len(searches)}  {model.name}: {label}, {num_remove} removed, "
                f"{algorithm}"
            )
            given = {**options.get(algorithm, {}), "seed": identity["seed"]}
            given["racing"] = identity["racing"] if find_algorithm(algorithm).races else None
            # not under a name, which would keep it while the next one is made
            cell = _search(evaluators.get(model, label), model, label, num_remove, algorithm, given)
            if cell.error:
                notify(f"{number}/{len(searches)}  found nothing: {cell.error}")
            write_cell(path, cell, made_with)
        cells.append(cell)
    notify("scoring every chosen mask under every objective")
    judges = [*objectives, *held_out]
    cells = [cell for model in models for cell in _cross_evaluate(evaluators, model, judges, cells)]
    described = evaluators.describe_objectives()
    kinds = {
        label: (described[label]["name"], described[label]["settings"]) for label in objectives
    }
    names = {label: described[label]["name"] for label in judges}
    matrices = {
        model.name: evaluators.get(model, next(iter(objectives))).similarity() for model in models
    }
    study = {
        "fastprune": __version__,
        "inputs": identity,
        "objectives": {label: described[label] for label in objectives},
        "held_out": {label: described[label] for label in held_out},
        "dense": {
            model.name: {
                label: objective_class(names[label]).record(evaluators.get(model, label).dense_loss)
                for label in judges
            }
            for model in models
        },
        "num_units": {model.name: evaluators.num_units(model) for model in models},
        "similarity": {name: summarise_similarity(matrix) for name, matrix in matrices.items()},
        "cells": [cell_record(cell, names) for cell in cells],
        **summarise(cells),
        "calibration": compare_calibrations(
            cells, kinds, {label: names[label] for label in held_out or objectives}
        ),
    }
    write_json(
        out / "study.json", study, replace=True
    )  # a summary of the cells, made anew by every run
    return study


def check_study(
    algorithms: Sequence[str], options: Mapping[str, Mapping[str, object]], out_dir: str | Path
) -> None:
    """Everything about a study that can be checked without its models. Raises InputError."""
    if not algorithms:
        raise InputError("a study needs at least one model, objective, algorithm and budget")
    for algorithm in dict.fromkeys([*algorithms, *options]):
        check_algorithm(algorithm, options.get(algorithm, {}))
        if algorithm not in algorithms:
            raise InputError(
                f"options are given for {algorithm}, which is not among the algorithms"
            )
    require_sklearn("a study")  # for the clusters of its summary
    check_folder(Path(out_dir))


def _made_with(identity: dict, model: str, label: str, num_remove: int, algorithm: str) -> dict:
    """All of a study's inputs that a cell depends on."""
    return {
        "model": [model, identity["models"][model], identity["dtype"][model]],
        "objective": [label, *identity["objectives"][f"{model} {label}"]],
        "num_remove": num_remove,
        "algorithm": [algorithm, identity["algorithms"][algorithm]],
        "seed": identity["seed"],
        "racing": identity["racing"],
        "granularity": identity["granularity"],
        "backend": identity["backend"][model],
        "machine": identity["machine"],
    }


class _Evaluators:
    """The evaluators of a study, all on one store; one at a time, since the prefix cache of each
    may take a good part of the memory that is free."""

    def __init__(
        self,
        models: Sequence[Model],
        objectives: Makers,
        held_out: Makers,
        options: Mapping[str, Any],
    ):
        names = [model.name for model in models]
        if len(set(names)) < len(names):
            raise InputError(f"a model is given twice: {', '.join(names)}")
        for label in (*objectives, *held_out):
            check_label(label)
        for label in held_out:
            if label in objectives:
                raise InputError(
                    f"{label!r} is searched with; what is held out has a label of its own"
                )
        self._models, self._options, self._searched = list(models), {**options}, list(objectives)
        makers = {**objectives, **held_out}
        self._objectives = {
            (m.name, label): make(m) for m in models for label, make in makers.items()
        }
        self._current: tuple[tuple[str, str], Evaluator] | None = None
        self._store: SumStore | None = None

    def identity(
        self,
        algorithms: Sequence[str],
        budgets: Sequence[int],
        options: Mapping[str, Mapping[str, object]],
        seed: int,
        racing: float | None,
    ) -> dict:
        """What makes a study this study."""
        from ..models import make_runner
        from ..models.fingerprint import machine_fingerprint  # only now: they bring torch

        backend = self._options.get("backend", "auto")
        return {
            "models": {model.name: model.weights_hash for model in self._models},
            "dtype": {model.name: str(model.dtype) for model in self._models},
            "objectives": {
                f"{name} {label}": [objective.name, objective.content_hash]
                for (name, label), objective in self._objectives.items()
                if label in self._searched
            },
            "algorithms": {
                name: check_algorithm(name, options.get(name, {}))[1] for name in algorithms
            },
            "budgets": list(budgets),
            "seed": seed,
            "racing": racing,
            "granularity": self._options.get("granularity", "block"),
            "backend": {
                model.name: make_runner(model, backend).numerics() for model in self._models
            },
            "machine": {
                model.device.type: machine_fingerprint(model.device) for model in self._models
            },
        }

    def check(
        self,
        algorithms: Sequence[str],
        budgets: Sequence[int],
        options: Mapping[str, Mapping[str, object]],
    ) -> None:
        """Raise InputError for a granularity that a model has not, a budget it cannot have or that
        is too large for an algorithm, or an objective without gradients where they are needed."""
        for what, given in (("an algorithm", algorithms), ("a budget", budgets)):
            if len(set(given)) < len(given):
                raise InputError(f"{what} is given twice: {', '.join(map(str, given))}")
        for model in self._models:
            model.require(self._options.get("granularity", "block"))
            units = self.num_units(model)
            for num_remove in budgets:
                if not 0 <= num_remove < units:
                    raise InputError(
                        f"num_remove {num_remove} must be from 0 to {units - 1} ({model.name} has "
                        f"{units} units)"
                    )
                for algorithm in algorithms:
                    chosen, values = check_algorithm(algorithm, options.get(algorithm, {}))
                    if chosen.needs_weights and model.weights is not None:
                        raise InputError(
                            f"{algorithm} needs all weights at once, and {model.name} reads them "
                            f"in bands"
                        )
                    if chosen.check_size:
                        chosen.check_size(
                            units, num_remove, self._options.get("granularity", "block"), **values
                        )
        for (_, label), objective in self._objectives.items():
            for algorithm in algorithms if label in self._searched else ():
                if find_algorithm(algorithm).needs_gradients and not objective.differentiable:
                    name = f"{label!r} ({objective.name})"
                    raise InputError(
                        f"{algorithm} needs gradients, which the objective {name} has not"
                    )

    def try_all(self) -> None:
        """Make every evaluator once, and keep none: data or options that do not fit a model are
        found now."""
        for (name, _), objective in self._objectives.items():
            (model,) = (model for model in self._models if model.name == name)
            self._evaluator(model, objective)

    def describe_objectives(self) -> dict[str, dict]:
        """By label, what the objective says of itself."""
        return {label: objective.describe() for (_, label), objective in self._objectives.items()}

    def open_store(self, path: Path) -> None:
        self._store = SumStore(path)

    def get(self, model: Model, label: str) -> Evaluator:
        """That of a model and a label; the one before it goes."""
        key = (model.name, label)
        if self._current is None or self._current[0] != key:
            self._current = None
            self._current = key, self._evaluator(model, self._objectives[key], store=self._store)
        return self._current[1]

    def _evaluator(self, model: Model, objective: Objective, **more: Any) -> Evaluator:
        from ..evaluator import Evaluator  # only now: it brings torch

        if not isinstance(self._options.get("workers"), (Workers, type(None))):
            self._options["workers"] = Processes(self._options["workers"])
        return Evaluator(model, objective, **more, **self._options)

    def num_units(self, model: Model) -> int:
        return len(model.unit_names(self._options.get("granularity", "block")))

    def slug(self, model: Model) -> str:
        """A short file-name part for a model, distinct within the study."""
        return f"{self._models.index(model)}-{Path(model.name).name[:30]}"


def _search(
    evaluator: Evaluator,
    model: Model,
    label: str,
    num_remove: int,
    algorithm: str,
    given: Mapping[str, Any],
) -> Cell:
    """given: what `run_search` takes besides."""
    cell = Cell(model.name, label, num_remove, algorithm)
    before, started = vars(evaluator.stats).copy(), time.perf_counter()
    try:
        result = run_search(evaluator, algorithm, num_remove, **given)
        cell = replace(
            cell,
            removed=result.removed,
            loss=result.loss,
            masks=result.evaluations,
            decided_early=result.decided_early,
        )
    except ArithmeticError as error:  # no finite loss, or a probe that is not finite
        cell = replace(cell, error=str(error), masks=evaluator.stats.masks - before["masks"])
    names = ("unit_runs", "asked_unit_runs", "naive_unit_runs")
    cost = {name: getattr(evaluator.stats, name) - before[name] for name in names}
    return replace(cell, **cost, seconds=time.perf_counter() - started)


def _cross_evaluate(
    evaluators: _Evaluators, model: Model, objectives: Sequence[str], cells: Sequence[Cell]
) -> list[Cell]:
    """The cells of one model, with the loss of each chosen mask under every objective."""
    own = [cell for cell in cells if cell.model == model.name]
    chosen = list(dict.fromkeys(cell.removed for cell in own if cell.removed is not None))
    masks = from_removed(chosen, evaluators.num_units(model))
    columns = {label: evaluators.get(model, label).score(masks).tolist() for label in objectives}
    losses: dict[tuple[int, ...] | None, dict[str, float]] = {
        removed: {label: columns[label][i] for label in objectives}
        for i, removed in enumerate(chosen)
    }
    return [replace(cell, losses=losses.get(cell.removed)) for cell in own]
