"""A study: models x objectives x algorithms x budgets, with one store of scores.

The design is that of arXiv 2604.24938. Each search is a cell, written as soon as it is finished.
Every score is kept in the store, so an interrupted study continues from its last score. At the end,
every chosen mask or sequence, and every control, is scored under every objective.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..costs import Budget
from ..errors import InputError
from ..io import write_file, write_json
from ..masks import Candidate
from ..objectives import objective_class
from ..plan.progress import ProgressCallback, ProgressEvent, reporting
from ..search import (
    check_racing,
    find_algorithm,
    run_search,
)
from ..search.sizes import Key, RemovalSize
from ..validate import check_callable
from .checks import at, check_sizes, check_study, search_settings
from .controls import Control, Placed, check_controls
from .evaluators import Evaluators
from .folder import (
    DOCUMENT,
    INPUTS,
    STORE,
    Cell,
    check_study_folder,
    hold,
    write_cell,
)
from .judging import WHOLE, Judged, Judgements, compare_candidates
from .record import cell_record, control_record, kept_cell
from .statistics import compare_calibrations, summarise, summarise_similarity

if TYPE_CHECKING:  # a study is checked without torch
    from ..evaluator import Evaluator
    from ..models import Model
    from .evaluators import Makers

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
    evaluators = Evaluators(models, objectives, held_out, evaluator_options)
    identity = search_settings(algorithms, options, budgets, seed, racing, protect)
    evaluators.check(identity, controls)
    notify(f"reading the weights of {', '.join(model.name for model in models)}")
    identity |= evaluators.identity()
    kept = check_study_folder(out, identity, document)
    identity["machines"] = {**(kept or {}).get("machines", {}), **identity["machines"]}
    is_new = kept != json.loads(json.dumps(identity))  # a new study, or a longer one
    if is_new:
        evaluators.try_all(notify)
    with hold(out):
        if is_new:
            write_json(out / INPUTS, identity, replace=True)
        if document is not None:
            write_file(out / DOCUMENT, document, replace=True)
        return _run(
            evaluators, models, objectives, held_out, controls, identity, out, notify, progress
        )


def _run(
    evaluators: Evaluators,
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
    evaluators.open_store(out / STORE)
    cells = []
    searches = list(_searches(evaluators, models, objectives, identity))
    kept = []
    for _, empty in searches:
        kept.append(kept_cell(out, identity, empty))
    if num_kept := sum(cell is not None for _, _, cell in kept):
        notify(f"{num_kept} of {len(searches)} cells were finished before")
    for number, ((model, empty), (path, made_with, cell)) in enumerate(zip(searches, kept), 1):
        if not cell:
            label, algorithm = empty.objective, empty.algorithm
            size = RemovalSize.of(empty.num_remove).describe()
            name = f"{model.name}: {label}, {size}, {algorithm}"
            notify(f"{number}/{len(searches)}  {name}")

            def describe(
                event: ProgressEvent, cell: str = f"{number}/{len(searches)} {name}"
            ) -> ProgressEvent:
                return replace(event, cell=cell)

            settings = {
                **identity["algorithms"][algorithm],
                "seed": identity["seed"],
                "protect": identity["protect"],
                "racing": find_algorithm(algorithm).confidence(identity["racing"]),
            }
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
        label: (described[label]["name"], *described[label]["settings"].items())
        for label in objectives
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
        "cells": [cell_record(cell, judged[cell.model], names) for cell in cells],
        "controls": [
            control_record(model, control, judged[model], names) for model, control in placed
        ],
        **summarise(cells),
        "calibration": compare_calibrations(
            cells, kinds, {label: names[label] for label in held_out or objectives}
        ),
    }
    write_json(out / "study.json", study, replace=True)  # a summary that every run writes again
    return study


def _searches(
    evaluators: Evaluators,
    models: Sequence[Model],
    objectives: Iterable[str],
    identity: Mapping[str, Any],
) -> Iterator[tuple[Model, Cell]]:
    """Yield the cell of each search, without a result, and its model."""
    over_sequences = [n for n in identity["algorithms"] if find_algorithm(n).over_sequences]
    removing = [name for name in identity["algorithms"] if name not in over_sequences]
    for model, label in product(models, objectives):
        machine = evaluators.machines[model.name]
        sizes = [size.key for size in evaluators.sizes(model, identity).values()]
        for size, name in [*product(sizes, removing), *product([None], over_sequences)]:
            yield model, Cell(model.name, label, size, name, machine=machine)


def _search(evaluator: Evaluator, cell: Cell, settings: Mapping[str, Any]) -> Cell:
    """Search one cell and return it with its result; `settings` are passed to `run_search`."""
    before, started = evaluator.stats, time.perf_counter()
    size = RemovalSize.of(cell.num_remove)
    try:
        result = run_search(evaluator, cell.algorithm, **size.arguments, **settings)
    except ArithmeticError as error:  # no finite loss, or a probe with an infinite value
        masks, cell = (evaluator.stats - before).masks, replace(cell, error=str(error))
    else:
        masks = result.evaluations
        cell = replace(
            cell,
            removed=result.removed,
            sequence=result.sequence if result.removed is None else None,
            loss=result.loss,
            decided_early=result.decided_early,
            costs=result.costs if size.budget is not None else None,
        )
    seconds = time.perf_counter() - started
    return replace(cell, cost=replace(evaluator.stats - before, masks=masks, seconds=seconds))


def _judge(
    evaluators: Evaluators,
    model: Model,
    labels: Sequence[str],
    cells: Sequence[Cell],
    controls: Sequence[Placed],
) -> Judgements:
    """Compare the candidates of a model's cells and controls under each objective.

    The whole model is the last candidate.
    """
    chosen = [Judged(cell.candidate, cell.num_remove) for cell in cells if cell.candidate]
    others = [Judged(control.candidate, control.size, is_control=True) for control in controls]
    judged: dict[tuple[Candidate, Key], Judged] = {}
    for of in [*chosen, *others]:
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
