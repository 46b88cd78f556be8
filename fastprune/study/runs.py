"""A study: models x objectives x algorithms x budgets, with one store of scores.

The design is that of arXiv 2604.24938. Each search is a cell, written as soon as it is finished.
Every score is kept in the store, so an interrupted study continues from its last score. At the end,
every chosen mask or sequence, and every control, is scored under every objective.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..costs import Budget, UnitCosts, unit_costs
from ..engine.store import SumStore
from ..errors import InputError
from ..io import write_file, write_json
from ..masks import Candidate, kept_by
from ..objectives import Objective, objective_class
from ..plan.progress import ProgressCallback, ProgressEvent, reporting
from ..search import (
    check_algorithm,
    check_racing,
    find_algorithm,
    protected_units,
    run_search,
)
from ..search.registry import check_limits
from ..search.sizes import CostLimit, Key, RemovalSize, Size
from ..validate import check_callable
from ..workers.processes import Processes, Workers
from .checks import at, check_once, check_sizes, check_study
from .controls import Control, Placed, check_controls, place_controls
from .folder import (
    DOCUMENT,
    INPUTS,
    Cell,
    check_label,
    check_study_folder,
    hold,
    read_cell,
    write_cell,
)
from .judging import WHOLE, Judged, Judgements, compare_candidates, shared_rows
from .machines import fingerprint
from .statistics import (
    cell_record,
    compare_calibrations,
    metric_records,
    summarise,
    summarise_similarity,
)

if TYPE_CHECKING:  # a study is checked without torch
    from ..evaluator import Evaluator
    from ..models import Model

    Makers = Mapping[str, Callable[[Model], Objective]]

Notify = Callable[[str], None]
log = logging.getLogger(__name__)


def run_study(
    models: Sequence[Model],
    objectives: Makers,
    algorithms: Sequence[str],
    budgets: Sequence[int | str | Budget],
    out_dir: str | Path,
    *,
    options: Mapping[str, Mapping[str, object]] | None = None,
    seed: int = 0,
    racing: float | None = None,
    protect: Iterable[int] | str = (),
    notify: Notify = lambda message: None,
    held_out: Makers | None = None,
    controls: Sequence[Control] = (),
    document: str | None = None,
    progress: ProgressCallback | None = None,
    **evaluator_options: Any,
) -> dict:
    """Run every search, score all that they choose under every objective, and write `study.json`.

    The folder keeps `inputs.json`, the score store and one file per finished cell. The same
    settings continue the study in it; further models, objectives, algorithms or budgets extend it.
    Finished cells are used again, those of other machines too. A damaged cell, or one of other
    settings, is named in a RuntimeWarning and searched again. A search that finds no finite loss is
    a cell with an error.

    Args:
        models: Models with distinct names.
        objectives: By label, functions from a model to an objective on its calibration set. One
            objective on several sets, each under a label, compares the sets.
        algorithms: Names of algorithms. One over sequences runs once for each objective.
        budgets: Numbers of units to remove, shares of them such as "25%", or budgets such as
            "params=75%" or `fp.Budget(params="75%")`. None, if all algorithms are over sequences.
        out_dir: The study's folder.
        options: Options of algorithms, by the algorithms' names.
        seed: The seed of every search.
        racing: A confidence, as of `run_search`, for the algorithms that race.
        protect: Units that no search removes, or a preset's name.
        notify: Called with a line about each step.
        held_out: Further objectives; they judge every chosen candidate, and no search sees them.
        controls: Masks and sequences that no search chose, judged beside those that were.
        document: The study's document, kept as study.toml.
        progress: Called with a `ProgressEvent` as the study runs.
        evaluator_options: Options of `Evaluator`; its workers are started once, for all.

    Returns:
        The content of `study.json`.

    Raises:
        InputError: An argument is wrong, the folder holds a study of other settings, or another
            process writes there. Nothing in the folder has changed then.

    Examples:
        >>> import tempfile
        >>> import fastprune as fp
        >>> from fastprune.study import run_study
        >>> batch = fp.TokenBatch.from_ids([[5, 6, 7, 8, 9], [10, 11, 12]])
        >>> objectives = {"text": lambda model: fp.Perplexity(batch)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     study = run_study([fp.load_model("demo")], objectives, ["greedy"], [2], folder)
        >>> [(cell["algorithm"], len(cell["removed"])) for cell in study["cells"]]
        [('greedy', 2)]
    """
    options, held_out = options or {}, held_out or {}
    if progress is not None:
        check_callable("progress", progress, "a function of a ProgressEvent")
    out = Path(out_dir)
    check_study(algorithms, options, out)
    check_racing(algorithms, racing)
    for name, values in (("models", models), ("objectives", objectives)):
        if not values:
            raise InputError(f"{name}: a study needs at least one")
    with at("budgets"):
        check_sizes(algorithms, budgets)
    check_controls(controls, algorithms, has_sizes=bool(budgets))
    evaluators = _Evaluators(models, objectives, held_out, evaluator_options)
    identity: dict[str, Any] = {
        "algorithms": {
            name: check_algorithm(name, options.get(name, {}))[1] for name in algorithms
        },
        "budgets": [RemovalSize.of(budget).key for budget in budgets],
        "seed": seed,
        "racing": racing,
        "protect": protect if isinstance(protect, str) else [*protect],
    }
    evaluators.check(identity, controls)
    identity |= evaluators.identity()
    kept = check_study_folder(out, identity, document)
    identity["machines"] = {**(kept or {}).get("machines", {}), **identity["machines"]}
    is_new = kept != json.loads(json.dumps(identity))  # a new study, or a longer one
    if is_new:
        evaluators.try_all()
    with hold(out):
        if is_new:
            write_json(out / INPUTS, identity, replace=True)
        if document is not None:
            write_file(out / DOCUMENT, document, replace=True)
        makers = objectives, held_out, controls
        return _run(evaluators, models, *makers, identity, out, notify, progress)


def _run(
    evaluators: _Evaluators,
    models: Sequence[Model],
    objectives: Makers,
    held_out: Makers,
    controls: Sequence[Control],
    identity: dict,
    out: Path,
    notify: Notify,
    progress: ProgressCallback | None,
) -> dict:
    """Run a checked study, in a folder that this process holds."""
    evaluators.open_store(out / "scores.db")
    cells = []
    searches = list(_searches(evaluators, models, objectives, identity))
    kept = []
    for search in searches:
        kept.append(_kept_cell(out, identity, *search))
    if num_kept := sum(cell is not None for _, _, cell in kept):
        notify(f"{num_kept} of {len(searches)} cells were finished before")
    for number, (search, (path, made_with, cell)) in enumerate(zip(searches, kept), 1):
        model, label, size, algorithm = search
        if not cell:
            name = f"{model.name}: {label}, {size.describe()}, {algorithm}"
            notify(f"{number}/{len(searches)}  {name}")

            def describe(
                event: ProgressEvent, before: int = number - 1, name: str = name
            ) -> ProgressEvent:
                share = (before + (event.share or 0)) / len(searches)
                return replace(event, share=share, cell=f"{before + 1}/{len(searches)} {name}")

            settings = {
                **identity["algorithms"][algorithm],
                "seed": identity["seed"],
                "protect": identity["protect"],
                "racing": identity["racing"] if find_algorithm(algorithm).races else None,
            }
            empty = Cell(
                model.name, label, size.key, algorithm, machine=evaluators.machines[model.name]
            )
            # no variable holds the evaluator: it would live on while the next one is opened
            with reporting(describe, progress):
                cell = _search(evaluators.get(model, label), empty, settings)
            if cell.error:
                notify(f"{number}/{len(searches)}  found nothing: {cell.error}")
            write_cell(path, cell, made_with)
        else:
            log.info("%s: finished before; used again", path)
        cells.append(cell)
    notify("scoring every chosen mask under every objective")
    judges = [*objectives, *held_out]
    judged, placed = {}, []
    for model in models:
        own = [cell for cell in cells if cell.model == model.name]
        of_model = evaluators.place(model, controls, objectives, identity)
        judged[model.name] = _judge(evaluators, model, judges, own, of_model)
        placed += [(model.name, control) for control in of_model]
    cells = [
        replace(cell, losses=judged[cell.model].losses(cell.candidate, cell.num_remove))
        if cell.candidate
        else cell
        for cell in cells
    ]
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
        "machine": evaluators.machines,
        "objectives": {label: described[label] for label in objectives},
        "held_out": {
            label: {**described[label], "shared_rows": evaluators.shared_rows(label)}
            for label in held_out
        },
        "judgements": {name: of.entries for name, of in judged.items()},
        "dense": {
            model.name: {
                label: objective_class(names[label]).record(entry["loss"])
                | {"standard_error": entry["standard_error"]}
                for label, entries in judged[model.name].entries.items()
                for entry in entries[-1:]
            }
            for model in models
        },
        "num_units": {model.name: evaluators.num_units(model) for model in models},
        "sizes": {
            model.name: [
                {"size": size.key, "asked": budget}
                for budget, size in evaluators.sizes(model, identity).items()
            ]
            for model in models
        },
        "parameters": {model.name: evaluators.parameters(model) for model in models},
        "similarity": {name: summarise_similarity(matrix) for name, matrix in matrices.items()},
        "cells": [_cell_record(cell, judged[cell.model], names) for cell in cells],
        "controls": [
            _control_record(model, control, judged[model], names) for model, control in placed
        ],
        **summarise(cells),
        "calibration": compare_calibrations(
            cells, kinds, {label: names[label] for label in held_out or objectives}
        ),
    }
    write_json(out / "study.json", study, replace=True)  # a summary that every run writes again
    return study


def _searches(
    evaluators: _Evaluators,
    models: Sequence[Model],
    objectives: Iterable[str],
    identity: Mapping[str, Any],
) -> Iterator[tuple[Model, str, RemovalSize, str]]:
    """Yield the model, objective, size and algorithm of each cell."""
    for model, label in product(models, objectives):
        sizes = evaluators.sizes(model, identity).values()
        over_sequences = {
            name: find_algorithm(name).over_sequences for name in identity["algorithms"]
        }
        for size, name in product(sizes, over_sequences):
            if not over_sequences[name]:
                yield model, label, size, name
        for name in over_sequences:
            if over_sequences[name]:
                yield model, label, RemovalSize(), name


def _made_with(identity: dict, model: str, label: str, size: Key, algorithm: str) -> dict:
    """The settings that a cell depends on. Its machine is not one of them."""
    return {
        "model": [model, identity["models"][model], identity["dtype"][model]],
        "objective": [label, *identity["objectives"][f"{model} {label}"]],
        "num_remove": size,
        "algorithm": [algorithm, identity["algorithms"][algorithm]],
        "seed": identity["seed"],
        "racing": identity["racing"],
        "protect": identity["protect"],
        "granularity": identity["granularity"],
        "backend": identity["backend"],
    }


def _kept_cell(
    out: Path, identity: dict, model: Model, label: str, size: RemovalSize, algorithm: str
) -> tuple[Path, dict, Cell | None]:
    """The file of a search, the settings that it depends on, and its cell if it is finished."""
    place = f"{_slug(model.name)}-{label}-{_size_slug(size.key)}-{algorithm}"
    path = out / "cells" / f"{place}.json"
    made_with = _made_with(identity, model.name, label, size.key, algorithm)
    if not path.exists():
        return path, made_with, None
    cell = read_cell(path, made_with)
    if cell is None:
        message = f"{path}: damaged, or of another study; searched again"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
    return path, made_with, cell


def _slug(name: str) -> str:
    """A model's name as a short part of file names, distinct within a study."""
    readable = re.sub(r"[^A-Za-z0-9_.-]", "_", Path(name).name)[:30]
    return f"{readable}-{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:8]}"


def _size_slug(size: Key) -> str:
    """A size as a part of file names."""
    if size is None:
        return "sequences"
    return str(size) if isinstance(size, int) else _slug(size)


class _Evaluators:
    """The evaluators of a study, on one store.

    One exists at a time: the prefix cache of each may take a good part of the free memory.
    """

    def __init__(
        self,
        models: Sequence[Model],
        objectives: Makers,
        held_out: Makers,
        options: Mapping[str, Any],
    ):
        with at("models"):
            check_once([model.name for model in models])
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
        self._granularity = self._options.get("granularity", "block")
        self._backend = self._options.get("backend", "auto")
        self._current: tuple[tuple[str, str], Evaluator] | None = None
        self._store: SumStore | None = None

    def identity(self) -> dict[str, Any]:
        """The part of a study's settings that its models and objectives decide."""
        return {
            "models": {model.name: model.digest for model in self._models},
            "dtype": {model.name: str(model.dtype) for model in self._models},
            "objectives": {
                f"{name} {label}": [objective.name, objective.content_hash]
                for (name, label), objective in self._objectives.items()
                if label in self._searched
            },
            "granularity": self._granularity,
            "backend": self._backend,
            "machines": dict(self._fingerprints.values()),
        }

    @cached_property
    def _fingerprints(self) -> dict[str, tuple[str, dict[str, object]]]:
        return {model.name: fingerprint(model, self._backend) for model in self._models}

    @property
    def machines(self) -> dict[str, str]:
        """By model, the key of this machine's fingerprint."""
        return {name: key for name, (key, _) in self._fingerprints.items()}

    def check(self, settings: Mapping[str, Any], controls: Sequence[Control]) -> None:
        """Check the searches' settings against every model and objective. Raises InputError."""
        from ..models import Needs, open_runner  # only now: it brings torch

        algorithms, budgets = settings["algorithms"], settings["budgets"]
        for model in self._models:
            open_runner(model, "generic", Needs(self._granularity))
            units = self.num_units(model)
            for control in controls:
                control.fixed(units)
            with at(model.name):
                sizes = list(self.sizes(model, settings).values())
            if len({size.key for size in sizes}) < len(sizes):
                raise InputError(
                    f"budgets {', '.join(map(str, budgets))} name one number of units of "
                    f"{model.name} twice"
                )
            for algorithm, values in algorithms.items():
                chosen = find_algorithm(algorithm)
                if chosen.needs_weights and model.weights.streamed:
                    raise InputError(
                        f"{algorithm} needs all weights at once, and {model.name} reads them in "
                        f"bands"
                    )
                for asked in [RemovalSize()] if chosen.over_sequences else sizes:
                    with at(model.name):
                        size, candidates = self.resolve(model, asked, settings["protect"])
                    if isinstance(size, CostLimit):
                        check_limits(chosen, settings["racing"] if chosen.races else None)
                    elif chosen.check_size:
                        chosen.check_size(candidates, size.most, self._granularity, **values)
        for (_, label), objective in self._objectives.items():
            for algorithm in algorithms if label in self._searched else ():
                if find_algorithm(algorithm).needs_gradients and not objective.differentiable:
                    name = f"{label!r} ({objective.name})"
                    raise InputError(
                        f"{algorithm} needs gradients, which the objective {name} has not"
                    )

    def try_all(self) -> None:
        """Open each evaluator once and keep none: a setting that does not fit a model fails now."""
        for (name, _), objective in self._objectives.items():
            (model,) = (model for model in self._models if model.name == name)
            self._evaluator(model, objective)

    def describe_objectives(self) -> dict[str, dict]:
        """By label, the description of an objective."""
        return {label: objective.describe() for (_, label), objective in self._objectives.items()}

    def shared_rows(self, label: str) -> int:
        """The number of rows of a held-out objective that share tokens with a calibration set.

        Tokens depend on the model's tokenizer; the largest number of any model counts.
        """
        counts = []
        for model in self._models:
            searched = [self._objectives[model.name, other].batch for other in self._searched]
            judge = self._objectives[model.name, label]
            counts.append(shared_rows(judge.batch, searched, judge.data == "tasks"))
        return max(counts)

    def open_store(self, path: Path) -> None:
        self._store = SumStore(path)

    def get(self, model: Model, label: str) -> Evaluator:
        """Return the evaluator of a model and a label, and drop the one before it."""
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
        return len(model.unit_names(self._granularity))

    def sizes(self, model: Model, settings: Mapping[str, Any]) -> dict[int | str, RemovalSize]:
        """The size of removals that each budget means for a model, by budget.

        The `key` of a size is that of its cells. Raises InputError for a budget that no removal can
        meet.
        """
        units = self._units_that_may_go(model, settings["protect"])
        return {
            budget: RemovalSize.of(budget).as_number(*units, self._costs_of(model))
            for budget in settings["budgets"]
        }

    def resolve(
        self, model: Model, size: RemovalSize, protect: Iterable[int] | str
    ) -> tuple[Size, list[int]]:
        """The rule for complete removals, and the units that may be removed."""
        units = self._units_that_may_go(model, protect)
        return size.resolve(*units, self._costs_of(model))[:2]

    def _units_that_may_go(
        self, model: Model, protect: Iterable[int] | str
    ) -> tuple[int, list[int]]:
        units = self.num_units(model)
        stay = {*protected_units(protect, units, self._granularity)}
        return units, [unit for unit in range(units) if unit not in stay]

    def _costs_of(self, model: Model) -> Callable[[Budget], UnitCosts]:
        return lambda of: unit_costs(model, self._granularity, of.kind, of.batch_size, of.seq_len)

    def place(
        self,
        model: Model,
        controls: Sequence[Control],
        labels: Iterable[str],
        settings: Mapping[str, Any],
    ) -> list[Placed]:
        """The candidates of a model's controls."""
        sizes = {
            size.key: self.resolve(model, size, settings["protect"])
            for size in self.sizes(model, settings).values()
        }
        units, candidates = self._units_that_may_go(model, settings["protect"])

        def singles(label: str) -> dict[int, float]:
            sequences = [kept_by((unit,), units) for unit in candidates]
            losses = self.get(model, label).score(sequences=sequences)
            return dict(zip(candidates, losses.tolist(), strict=True))

        placed = place_controls(
            controls, units, sizes, list(labels), cache(singles), settings["seed"]
        )
        return list(placed)

    def parameters(self, model: Model) -> dict[str, object]:
        """Parameters of a model: all, those of each unit alone, and those that units share."""
        costs = unit_costs(model, self._granularity, "params")
        shared = [{"units": sorted(units), "parameters": size} for units, size in costs.shared]
        return {"total": costs.total, "own": list(costs.own), "shared": shared}


def _search(evaluator: Evaluator, cell: Cell, settings: Mapping[str, Any]) -> Cell:
    """Search one cell and return it with its result; `settings` are passed to `run_search`."""
    before, started = evaluator.stats, time.perf_counter()
    size = RemovalSize.of(cell.num_remove)
    try:
        result = run_search(evaluator, cell.algorithm, **size.arguments, **settings)
    except ArithmeticError as error:  # no finite loss, or a probe with an infinite value
        masks, cell = (evaluator.stats - before).masks, replace(cell, error=str(error))
    else:
        masks, early = result.evaluations, result.decided_early
        sequence = result.sequence if result.removed is None else None
        cell = replace(
            cell,
            removed=result.removed,
            sequence=sequence,
            loss=result.loss,
            decided_early=early,
            costs=result.costs if size.budget is not None else None,
        )
    seconds = time.perf_counter() - started
    return replace(cell, cost=replace(evaluator.stats - before, masks=masks, seconds=seconds))


def _judge(
    evaluators: _Evaluators,
    model: Model,
    labels: Sequence[str],
    cells: Sequence[Cell],
    controls: Sequence[Placed],
) -> Judgements:
    """Compare the candidates of a model's cells and controls under each objective.

    The whole model is the last candidate.
    """
    judged: dict[tuple[Candidate, Key], Judged] = {}
    for cell in cells:
        if cell.candidate:
            of = Judged(cell.candidate, cell.num_remove)
            judged.setdefault(of.key, of)
    for control in controls:
        of = Judged(control.candidate, control.size, is_control=True)
        judged.setdefault(of.key, of)
    judged.pop(WHOLE.key, None)
    ordered = [*judged.values(), WHOLE]
    units = evaluators.num_units(model)
    sequences = [of.candidate.units(units) for of in ordered]
    entries = {}
    for label in labels:
        evaluator = evaluators.get(model, label)
        sample_losses = evaluator.score_samples(sequences=sequences)
        entries[label] = compare_candidates(evaluator.objective, ordered, sample_losses)
    return Judgements(entries, {of.key: place for place, of in enumerate(ordered)})


def _control_record(
    model: str, control: Placed, judged: Judgements, names: Mapping[str, str]
) -> dict[str, Any]:
    """A control's candidate as study.json has it; `names` are the objectives' names by label."""
    key = control.candidate, control.size
    losses = judged.losses(*key)
    return {
        "model": model,
        "name": control.name,
        "under": control.under,
        "num_remove": control.size,
        **control.candidate.record,
        "losses": losses,
        "metrics": metric_records(losses, names),
        "judged": judged.places[key],
    }


def _cell_record(cell: Cell, judged: Judgements, names: Mapping[str, str]) -> dict[str, Any]:
    """A cell as study.json has it, with the place of its candidate among the judged ones."""
    place = cell.candidate and judged.places[cell.candidate, cell.num_remove]
    return {**cell_record(cell, names), "judged": place}
