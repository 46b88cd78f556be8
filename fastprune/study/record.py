"""The contents of a finished cell: its file, the settings it depends on, and its record."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..objectives import objective_class
from ..search.sizes import Key
from .controls import Placed
from .folder import Cell, read_cell
from .judging import Judgements


def kept_cell(
    out: Path, identity: Mapping[str, Any], empty: Cell
) -> tuple[Path, dict, Cell | None]:
    """The file of a search, the settings that it depends on, and its cell if it is finished.

    The machine is no such setting.
    """
    model, label, size, algorithm = empty.model, empty.objective, empty.num_remove, empty.algorithm
    place = f"{_slug(model)}-{label}-{_size_slug(size)}-{algorithm}"
    path = out / "cells" / f"{place}.json"
    made_with = {
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


def cell_record(cell: Cell, judged: Judgements, names: Mapping[str, str]) -> dict[str, Any]:
    """Make the record of a cell in study.json.

    Args:
        cell: The cell, with the losses of its candidate under every objective.
        judged: The judgements of its model.
        names: The objectives' names, by label.

    Returns:
        The fields of the cell, its losses as metrics, and the place of its candidate in the lists
        of judgements.
    """
    record: dict[str, Any] = {**cell.to_dict(), "metrics": None}
    if cell.loss is not None:
        record |= objective_class(names[cell.objective]).record(cell.loss)
    if cell.losses is not None:
        record["metrics"] = _metric_records(cell.losses, names)
    place = cell.candidate and judged.places[cell.candidate, cell.num_remove]
    return {**record, "judged": place}


def control_record(
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
        "metrics": _metric_records(losses, names),
        "judged": judged.places[key],
    }


def _metric_records(losses: Mapping[str, float], names: Mapping[str, str]) -> dict[str, dict]:
    """The record of each loss, with its metric, by label; `names` are the objectives' names."""
    return {label: objective_class(names[label]).record(loss) for label, loss in losses.items()}
